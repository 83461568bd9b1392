"""Train a network: `python train.py`, which takes every GPU it finds, or `torchrun … train.py`.

Options are the fields of cfg.py. A run leaves runs/<number>-<name>/ with cfg.json, env.txt, log.jsonl,
metrics.json, validation.png, best.pt (averaged weights) and last.pt (all that --resume needs).
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time

import torch

from cfg import network_config, parse
from data import load_items, mean_map
from model import build_model, check_model
from openfwi.files import find_pairs
from openfwi.modes import preprocess
from report.figures import prediction_figure
from report.scores import Score, score_table
from synthetic.dataset import write_dataset
from training.augment import is_on
from training.guards import BadSteps, Stop
from training.loader import make_loaders
from training.log import Log
from training.loss import parse_family_weights
from training.online import Online
from training.runs import check_reload, open_run, save_last
from training.trainer import Trainer
from utils import (
    FAMILIES,
    check_writable,
    load_checkpoint,
    processes,
    run_program,
    save_checkpoint,
    seed_all,
    write_atomic,
)

N_FIGURE_ROWS = 5  # families in the figure of a validation

# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(network, loader, process, reference, autocast, mode="full"):
    """Score `network`, fed in its input mode, and the constant map `reference` per sample, over all ranks.

    Returns (score, reference's score, figure rows: the first sample of each family on this rank).
    """
    network.eval()
    score, mean_score, rows = Score(), Score(), {}
    for seis, vel, family, _ in loader:
        with autocast():
            prediction = network(preprocess(seis.to(process.device).float(), mode)).cpu()
        score.add(prediction, vel, family)
        mean_score.add(reference.expand_as(vel), vel, family)
        for i, index in enumerate(family.tolist()):
            if index not in rows and len(rows) < N_FIGURE_ROWS:
                rows[index] = (FAMILIES[index], seis[i].numpy(), vel[i, 0].numpy(), prediction[i, 0].numpy())
    return score.gather(process).result(), mean_score.gather(process).result(), list(rows.values())


def finish_epoch(trainer, log, val_loader, reference):
    """Validate the averaged weights, print the table, write metrics, figure and checkpoints."""
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
    record = {
        "step": trainer.step,
        "val_mae": mae,
        "best_mae": trainer.best_mae,
        "mean_map_mae": mean_score["all"][0],
        "family_mae": {name: value for name, (value, _) in score.items() if name != "all"},
    }
    with write_atomic(folder / "metrics.json", "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
    prediction_figure(folder / "validation.png", rows)
    log.record(record)
    log.figure(folder / "validation.png")
    if is_best:
        best = {"model": trainer.ema.module.state_dict(), "cfg": dataclasses.asdict(trainer.cfg)}
        save_checkpoint(folder / "best.pt", {**best, "step": trainer.step, "val_mae": mae})
    save_last(trainer, folder)


# ---------------------------------------------------------------- the loop


def fit(trainer, log, loaders, items, reference, profiler):
    """Train to the end, to early stopping, or to a signal; returns the signal's number or 0."""
    cfg, (train_loader, val_loader) = trainer.cfg, loaders
    bad_steps, stop = BadSteps(trainer, items, log.folder), Stop(trainer.process)
    try:
        while True:
            epoch, within = divmod(trainer.step, trainer.steps_per_epoch)
            if within == 0 and epoch and trainer.validated != trainer.step:
                if epoch % cfg.val_every == 0 or epoch == cfg.epochs:
                    finish_epoch(trainer, log, val_loader, reference)
            if cfg.patience and trainer.since_best >= cfg.patience:
                if trainer.process.is_main:
                    print(f"stopped early: no better validation for {trainer.since_best} in a row")
                return 0
            if trainer.step >= trainer.n_steps:
                return 0
            train_epoch(trainer, train_loader, log, bad_steps, stop, profiler)
            if stop.signal:
                save_last(trainer, log.folder)
                return stop.signal
    finally:
        stop.restore()


def prepare_data(cfg, process):
    """Training and validation items; first makes the synthetic data set if the configuration asks for one."""
    if cfg.synth_per_family:
        if process.is_main:
            families = cfg.families or FAMILIES
            write_dataset(
                cfg.data_root[0], families, cfg.synth_per_family, cfg.seed, "float16", device=cfg.device
            )
        process.barrier()
    train_items, val_items = load_items(cfg)
    if cfg.overfit:
        train_items = val_items = train_items[: cfg.overfit]
    if cfg.smoke:
        n_global = cfg.batch_size * cfg.accumulate * process.world
        train_items, val_items = train_items[: 3 * n_global], val_items[:n_global]
    if (cfg.online or is_on(cfg)) and any(pair.mode != "full" for pair in train_items.pairs):
        raise ValueError(
            "augmentation and online simulation need whole gathers, data_root holds a packed copy of "
            f"--mode={cfg.mode}; give the original files, or switch them off"
        )
    return train_items, val_items


def make_profiler(cfg, process, folder):
    """With `profile`, a profiler that writes four steps as a Chrome trace into the run folder."""
    if not (cfg.profile and process.is_main):
        return contextlib.nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=4, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(folder / "trace.json")),
    )


def describe(cfg, trainer, n_train, n_val):
    """The line that says what is about to be trained."""
    process, n_parameters = trainer.process, sum(p.numel() for p in trainer.network.parameters())
    name = cfg.backbone if cfg.arch == "unet" else cfg.arch
    return (
        f"{name}: {n_parameters / 1e6:.1f} M parameters | {n_train} training, {n_val} validation samples | "
        f"{cfg.batch_size} a process × {process.world} processes × {cfg.accumulate} accumulated = "
        f"{trainer.global_batch} samples a step | "
        f"{process.device}, {trainer.precision} | {trainer.n_steps} steps"
    ) + (f" | {cfg.online:.0%} simulated online" if cfg.online else "")


def train(cfg, process):
    """Train as configured: (run folder or None, best validation MAE in m/s)."""
    seed_all(cfg.seed)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    network = build_model(cfg)  # what does not fit shows before any long work
    train_items, val_items = prepare_data(cfg, process)
    loaders = make_loaders(cfg, process, train_items, val_items)
    reference = mean_map(train_items)
    trainer = Trainer(cfg, process, loaders[0].batch_sampler.n_steps, network)
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
    folder, state = open_run(cfg, process, trainer.global_batch)
    if state:
        trainer.restore(state)
    steps = range(trainer.step, trainer.n_steps)
    online = Online(cfg, process, train_items, steps) if cfg.online else contextlib.nullcontext()
    with (
        make_profiler(cfg, process, folder) as profiler,
        Log(folder, trainer) as log,
        online as trainer.online,
    ):
        number = fit(trainer, log, loaders, train_items, reference, profiler)
    if number:
        print(f"stopped by {signal.Signals(number).name} after step {trainer.step}; go on: --resume={folder}")
        sys.exit(128 + number)
    if cfg.smoke and process.is_main:
        check_reload(cfg, folder, trainer, loaders[1])
    if process.is_main:
        print(f"best validation MAE {trainer.best_mae:.2f} m/s | {folder}/best.pt")
    return folder, trainer.best_mae


def check_config(cfg):
    """Raise ValueError for options that cannot work, before anything is started, made or read whole."""
    if cfg.eval_only and not cfg.ckpt:
        raise ValueError("--eval_only needs a checkpoint: --ckpt=PATH")
    check_model(cfg)
    parse_family_weights(cfg.family_weights)
    check_writable(cfg.run_root)


def launch(cfg, argv):
    """Hand over to torchrun, a process a card, where there are several cards and nobody has done so.

    Raises ValueError when more processes are asked for than there are cards.
    """
    if "RANK" in os.environ:
        return
    n_cards = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    n = n_cards if cfg.gpus == "auto" else int(cfg.gpus)
    if n > n_cards:
        raise ValueError(
            f"--gpus={n}: {n_cards} CUDA devices found; ask for at most that many, or --gpus=auto"
        )
    if n > 1:
        if not cfg.synth_per_family:  # one line now rather than one from every process
            find_pairs((*cfg.data_root, *cfg.val_root), cfg.families, cfg.skip_bad_files)
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__, *argv]
        os.execv(sys.executable, [sys.executable, *words])  # signals now go to torchrun, which passes them on


def main(argv):
    """Train, on as many GPUs as there are; raise ValueError for a configuration that cannot work."""
    cfg = parse(argv)
    if cfg.ckpt:
        cfg = network_config(cfg, load_checkpoint(cfg.ckpt))
    check_config(cfg)
    launch(cfg, argv)
    if cfg.gpus == "0":
        cfg = dataclasses.replace(cfg, device="cpu")
    if cfg.smoke:
        cfg = dataclasses.replace(cfg, epochs=1, log_every=1)
    if cfg.overfit:
        cfg = dataclasses.replace(cfg, flip_p=0.0, batch_size=min(cfg.batch_size, cfg.overfit))
    if cfg.dry_run and os.environ.get("RANK", "0") == "0":
        print(json.dumps(dataclasses.asdict(cfg), indent=1))
    with processes(cfg) as process:
        train(cfg, process)


def steps_of(trainer, loader):
    """Yield, for each remaining step of the epoch, its batches, their item indices and the seconds waited."""
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
    """The rest of the current epoch, or up to a stop."""
    cfg = trainer.cfg
    for batches, indices, data_s in steps_of(trainer, loader):
        torch.manual_seed(trainer.step_seed() + trainer.process.rank)  # drop path
        losses, mae, norm = trainer.train_step(batches)
        bad_steps.add(norm, losses, batches, indices)
        log.add(mae, norm, data_s)
        if profiler is not None:
            profiler.step()
        if trainer.step % cfg.log_every == 0 or trainer.step == trainer.n_steps:
            log.write()
        if trainer.step % cfg.save_every == 0 or time.monotonic() - trainer.saved_s > 60 * cfg.save_minutes:
            save_last(trainer, log.folder)
        if stop.agree():
            break
    bad_steps.check()
    if cfg.skip_bad_files:
        count_skipped(trainer, loader, log)


def count_skipped(trainer, loader, log):
    """Print and log how many reads of bad samples all ranks have replaced so far."""
    process = trainer.process
    mine = torch.tensor(float(sum(loader.dataset.skipped.values())), device=process.device)
    n = int(process.sum(mine).item())
    if process.is_main and n:
        print(f"{n} samples of bad files skipped so far (--skip_bad_files)", flush=True)
        log.record({"step": trainer.step, "skipped_samples": n})


if __name__ == "__main__":
    run_program(main)
