"""The training loop against a bare one: `python bench.py train`."""

import dataclasses
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from benchmarks.wave_speed import seconds
from cfg import TRAIN, Config, parse
from data import whole
from openfwi.files import find_pairs
from openfwi.npy import GATHER_SHAPE, MAP_SHAPE
from options.fields import Section
from parallel.processes import processes
from system.files import write_json
from train import train_epoch
from training.guards import BadSteps, Stop
from training.loader import make_loaders
from training.log import Log, peak_memory_gb
from training.trainer import Trainer

TRAIN_SPEED = Section("train", "the training loop against a bare one, with these options", (TRAIN,))


@dataclass
class TrainSpeedOptions(Config):
    """The options of `bench.py train`: those of train.py, and some more."""

    steps: int = TRAIN_SPEED(16, "steps a turn", above=0, most=10**4)
    repeats: int = TRAIN_SPEED(7, "turns", above=0, most=10**4)
    json: str = TRAIN_SPEED("", "file to write every number to", writes="JSON")


def bench_train(argv):
    """Time the training loop against forward, loss, backward and step on fixed tensors."""
    args = parse(["--preset=demo", f"--batch_size={Config.batch_size}", *argv], options=TrainSpeedOptions)
    cfg = dataclasses.replace(args, log_every=10**9, save_minutes=10**9, synth_per_family=0)
    with tempfile.TemporaryDirectory() as folder, processes(cfg) as process:
        n = cfg.batch_size * args.steps
        rng = np.random.default_rng(0)
        for name, shape, kind in (("data", GATHER_SHAPE, np.float16), ("model", MAP_SHAPE, np.float32)):
            values = rng.standard_normal((n + 1, *shape), np.float32)
            Path(folder, "FlatVel_A", name).mkdir(parents=True)
            np.save(
                Path(folder, "FlatVel_A", name, f"{name}1.npy"),
                (3000 + values if kind == np.float32 else values).astype(kind),
            )
        items = whole(find_pairs([folder]))
        loader, _ = make_loaders(cfg, process, items, items)
        trainer, bare = Trainer(cfg, process, args.steps), Trainer(cfg, process, args.steps)
        log = Log(Path(folder), trainer)
        bad_steps, stop = BadSteps(trainer, items, log), Stop(process)
        fixed = bare.prepare(0, *next(iter(loader))[:3])

        def ours():
            train_epoch(trainer, loader, log, bad_steps, stop, None)

        def plain():
            for _ in range(args.steps):
                bare.forward.train()
                with bare.autocast():
                    prediction = bare.forward(fixed[0])
                F.l1_loss(prediction, fixed[1]).backward()
                bare.optimizer.step()
                bare.optimizer.zero_grad(set_to_none=True)

        ours(), plain()  # warm up
        log.reset()
        times = {"ours": [], "bare": []}
        for _ in range(args.repeats):
            times["ours"].append(seconds(ours, process.device))
            times["bare"].append(seconds(plain, process.device))
    step_ms = {name: 1e3 * statistics.median(t) / args.steps for name, t in times.items()}
    overhead = statistics.median(a / b for a, b in zip(times["ours"], times["bare"], strict=True)) - 1
    waited = log.data_s / sum(times["ours"])
    print(
        f"{cfg.arch}, {args.steps} steps of {cfg.batch_size} a turn, {trainer.precision} on {process.device}"
    )
    print(
        f"our loop {step_ms['ours']:.1f} ms a step, bare {step_ms['bare']:.1f} ms: overhead {overhead:+.1%}"
    )
    print(
        f"waiting for data {waited:.1%} | {1e3 * cfg.batch_size / step_ms['ours']:.0f} samples/s | "
        f"{peak_memory_gb(process.device):.1f} GB"
    )
    if args.json:
        result = {"step_ms": step_ms, "overhead": overhead, "data_share": waited, "times_s": times}
        write_json(args.json, result)
