"""Train a network: `python train.py`, which takes every GPU it finds, or `torchrun … train.py`.

Options are the fields of cfg.py. A run leaves runs/<number>-<name>/ with cfg.json, env.txt, log.jsonl,
metrics.json, validation.png, best.pt (averaged weights) and last.pt (all that --resume needs).
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time

import torch

from cfg import network_config, parse
from data import mean_map
from model import build_model
from networks.checkpoints import load_described
from openfwi.files import find_pairs
from openfwi.modes import preprocess
from parallel.launch import launch
from parallel.processes import processes
from report.scores import Score, score_table
from system.devices import to_device
from system.files import sole_use
from training.guards import BadSteps, Stop
from training.launch import adapted, check_compile, check_config, memory_explained
from training.loader import make_loaders, prepare_data
from training.log import Log, count_skipped, describe, make_profiler
from training.online import Online
from training.resume import check_resumed, describe_samples, find_run, resumed_config
from training.runs import check_reload, save_best, save_last, start_run, tell_best
from training.trainer import Trainer
from utils import FAMILIES, run_program, say_on_stderr, seed_all

N_FIGURE_ROWS = 5  # families in the figure of a validation


def main(argv):
    """Train with the options `argv`; returns (run folder, best validation MAE in m/s).

    The program uses every card it finds; a call from Python stays in its own process and uses one. Raises
    ValueError for options and data that cannot work.
    """
    cfg = adapted(parse(argv))
    folder, state = find_run(cfg)
    if state:
        cfg = resumed_config(cfg, folder, state)
    elif cfg.ckpt:
        cfg = network_config(cfg, load_described(cfg.ckpt))
    check_config(cfg)
    launch(cfg, __file__, argv, lambda: check_data(cfg))
    if cfg.dry_run and os.environ.get("RANK", "0") == "0":
        print(json.dumps(dataclasses.asdict(cfg), indent=1))
    with processes(cfg) as process, memory_explained(cfg, process.device):
        check_compile(cfg, process.device)
        return train(cfg, process, folder, state)


def check_data(cfg):
    """Raise ValueError for data that cannot be read."""
    if not cfg.synth_per_family:
        find_pairs((*cfg.data_root, *cfg.val_root), cfg.families, cfg.skip_bad_files)


def train(cfg, process, folder=None, state=None):
    """Train as configured, or continue the run in `folder` from its `state`.

    Returns (run folder, or None if nothing is trained; best validation MAE in m/s).
    """
    seed_all(cfg.seed)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    network = build_model(cfg)  # first, so that options that do not fit are refused before any long work
    train_items, val_items = prepare_data(cfg, process)
    loaders = make_loaders(cfg, process, train_items, val_items)
    reference = mean_map(train_items)
    samples = {"training": describe_samples(train_items), "validation": describe_samples(val_items)}
    trainer = Trainer(cfg, process, loaders[0].batch_sampler.n_steps, network, samples)
    if process.is_main:
        print(describe(cfg, trainer, len(train_items), len(val_items)), flush=True)
    if cfg.dry_run:
        return None, math.nan
    if cfg.eval_only:
        score, mean_score, _ = validate(
            trainer.network, loaders[1], process, reference, trainer.autocast, cfg.mode
        )
        if process.is_main:
            print(f"{score_table(score, mean_score)}\nvalidation MAE {score['all'][0]:.6f} m/s")
        return None, score["all"][0]
    if state:
        check_resumed(folder, state, trainer)
        trainer.restore(state, folder)
    else:
        folder = start_run(cfg, process)
    steps = range(trainer.step, trainer.n_steps)
    online = Online(cfg, process, train_items, steps) if cfg.online else contextlib.nullcontext()
    with (
        sole_use(folder) if process.is_main else contextlib.nullcontext(),
        Stop(process) as stop,
        Log(folder, trainer) as log,
        make_profiler(log) as profiler,
        online as trainer.online,
    ):
        fit(trainer, log, loaders, BadSteps(trainer, train_items, log), stop, reference, profiler)
        if cfg.smoke and process.is_main and not stop.signal:
            check_reload(cfg, folder, trainer, loaders[1])
        if process.is_main and not stop.signal:
            tell_best(trainer, folder)
    if stop.signal:
        if process.is_main:
            say_on_stderr(f"stopped by {stop.cause()} after step {trainer.step}; go on: --resume={folder}")
        sys.exit(128 + stop.signal)
    return folder, trainer.best_mae


def fit(trainer, log, loaders, bad_steps, stop, reference, profiler):
    """Train until the end, early stopping or a signal, and save."""
    cfg, (train_loader, val_loader) = trainer.cfg, loaders
    while not stop.signal:
        epoch, within = divmod(trainer.step, trainer.steps_per_epoch)
        if within == 0 and epoch and trainer.validated != trainer.step:
            if epoch % cfg.val_every == 0 or epoch == cfg.epochs:
                finish_epoch(trainer, log, val_loader, reference)
        if cfg.patience and trainer.since_best >= cfg.patience:
            if trainer.process.is_main:
                print(f"stopped early: no better validation for {trainer.since_best} in a row")
            return
        if trainer.step >= trainer.n_steps:
            return
        if not stop.agree():  # a signal may have come during validation
            train_epoch(trainer, train_loader, log, bad_steps, stop, profiler)
    save_last(trainer, log.folder)


def steps_of(trainer, loader):
    """Yield for each remaining step of the epoch its batches, their indices and the seconds waited."""
    sampler = loader.batch_sampler
    sampler.epoch, sampler.start = divmod(trainer.step, trainer.steps_per_epoch)
    batches, indices, data_s = [], [], 0.0
    before = time.perf_counter()
    for *batch, index in loader:
        waited_s = time.perf_counter() - before
        batches.append(trainer.prepare(len(batches), *batch))
        # with online simulation, preparing a batch may wait for it
        data_s += waited_s if trainer.online is None else time.perf_counter() - before
        indices += index.tolist()
        if len(batches) == trainer.cfg.accumulate:
            yield batches, indices, data_s
            batches, indices, data_s = [], [], 0.0
        before = time.perf_counter()


def train_epoch(trainer, loader, log, bad_steps, stop, profiler):
    """Train the rest of the current epoch, or until a signal."""
    cfg = trainer.cfg
    for batches, indices, data_s in steps_of(trainer, loader):
        torch.manual_seed(
            trainer.step_seed() + trainer.process.rank
        )  # for drop path, so that a resumed run repeats it
        losses, mae, norm = train_step(trainer, batches)
        bad_steps.add(norm, losses, batches, indices)
        log.add(mae, norm, data_s)
        if profiler is not None:
            profiler.step()
        if trainer.step % cfg.log_every == 0 or trainer.step == trainer.n_steps:
            log.write()
        if time.monotonic() - trainer.saved_s >= 60 * cfg.save_minutes:
            save_last(trainer, log.folder)
        if stop.agree():
            break
    bad_steps.check()
    if cfg.skip_bad_files:
        count_skipped(trainer, loader, log)


def train_step(trainer, batches):
    """Update the weights once, from `accumulate` batches.

    Returns the loss of each sample (B,), the mean absolute error in m/s and the gradient norm before
    clipping, all on the device. If the gradient is not finite, the weights stay as they are, on every rank.
    """
    trainer.forward.train()
    statistics = trainer.batch_statistics()
    losses, errors = [], []
    for m, (seis, vel, family) in enumerate(batches):
        is_last = m == len(batches) - 1  # ranks share their gradients only once
        with contextlib.nullcontext() if is_last else trainer.no_sync():
            loss, error = trainer.losses(trainer.forward, seis, vel, family)
            mean = loss.mean() / len(batches)
            # a loss that is not finite must spoil the shared gradient, so that all ranks skip the step
            mean = mean * torch.where(mean.isfinite(), 1.0, math.nan)
            trainer.scaler.scale(mean).backward()
        losses.append(loss.detach())
        errors.append(error)
    trainer.scaler.unscale_(trainer.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), trainer.cfg.clip_norm or math.inf)
    trainer.scaler.step(trainer.optimizer)  # does nothing if a gradient is not finite
    trainer.scaler.update(None if trainer.dtype is torch.float16 else 1.0)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.share_statistics(statistics, keep=norm.isfinite())
    trainer.step += 1
    trainer.ema.update(trainer.network, step=trainer.step)
    trainer.schedule.set(trainer.step)
    return torch.cat(losses), torch.cat(errors).mean(), norm


def finish_epoch(trainer, log, val_loader, reference):
    """Validate the averaged weights, print the table, and write checkpoints, metrics and a figure."""
    process, folder = trainer.process, log.folder
    score, mean_score, rows = validate(
        trainer.ema.module, val_loader, process, reference, trainer.autocast, trainer.cfg.mode
    )
    mae = score["all"][0]
    is_best = mae < trainer.best_mae
    trainer.validated, trainer.since_best = trainer.step, 0 if is_best else trainer.since_best + 1
    trainer.best_mae = min(mae, trainer.best_mae)
    if not process.is_main:
        return
    print(f"validation after step {trainer.step}\n{score_table(score, mean_score)}", flush=True)
    save_best(trainer, folder, mae)
    save_last(trainer, folder)
    log.write_validation(score, mean_score, rows)


@torch.no_grad()
def validate(network, loader, process, reference, autocast, mode="full"):
    """Score `network`, and the constant map `reference` (1, Z, X) m/s, over the samples of all ranks.

    Returns (score, score of the reference, figure rows: the first sample of some families on this rank).
    """
    network.eval()
    score, mean_score, rows = Score(), Score(), {}
    for seis, vel, family, _ in loader:
        with autocast():
            prediction = network(preprocess(to_device(seis, process.device).float(), mode)).cpu()
        score.add(prediction, vel, family)
        mean_score.add(reference.expand_as(vel), vel, family)
        for i, index in enumerate(family.tolist()):
            if index not in rows and len(rows) < N_FIGURE_ROWS:
                rows[index] = (FAMILIES[index], seis[i].numpy(), vel[i, 0].numpy(), prediction[i, 0].numpy())
    return score.gather(process).result(), mean_score.gather(process).result(), list(rows.values())


if __name__ == "__main__":
    run_program(main)
