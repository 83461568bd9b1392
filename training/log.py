"""Reports of training: log lines, log.jsonl, Weights & Biases, the share of the card's peak speed."""

import contextlib
import dataclasses
import json
import math
import re
import sys
import time
import uuid

import torch
from torch.utils.flop_counter import FlopCounterMode

from openfwi.modes import preprocess
from openfwi.npy import GATHER_SHAPE
from report.figures import prediction_figure
from system.files import append_json, read_lines, write_atomic, write_json

PEAK_TFLOPS = {  # peak speed without sparsity, by the card's name: (float32, tf32, 16 bits)
    "H200": (67, 495, 989),
    "H100": (67, 495, 989),
    "A100": (19.5, 156, 312),
    "L4": (30, 60, 121),
    "L40S": (92, 183, 366),
    "V100": (15.7, 15.7, 125),
    "T4": (8.1, 8.1, 65),
    "P100": (9.5, 9.5, 19),
}


def peak_memory_gb(device):
    """Peak memory of this process in GB: on the card, or on the CPU; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # Windows does not have it
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on macOS, kB on Linux


def peak_flops(device, precision):
    """The card's peak in floating-point operations per second at this precision; None if unknown."""
    if device.type != "cuda":
        return None
    column = {"float32": 0, "tf32": 1}.get(precision, 2)
    name = torch.cuda.get_device_name(device)
    found = [peaks for card, peaks in PEAK_TFLOPS.items() if card in name.replace("-", " ").split()]
    return found[0][column] * 1e12 if found else None


def training_flops(network, mode, device):
    """Floating-point operations of training on one gather: three times those of the forward pass."""
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(preprocess(torch.zeros(1, *GATHER_SHAPE, device=device), mode))
    return 3 * counter.get_total_flops()


def step_of(line):
    """The step in a line of log.jsonl; infinity if the line is no record, for example cut short."""
    try:
        step = json.loads(line)["step"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


class Log:
    """Log lines, log.jsonl and Weights & Biases, and what is counted between lines; only rank 0 writes."""

    def __init__(self, folder, trainer):
        self.folder, self.trainer, self.first_step = folder, trainer, trainer.step
        self.peak = peak_flops(trainer.process.device, trainer.precision)
        self.flops_per_sample = 0
        if self.peak:
            self.flops_per_sample = training_flops(trainer.network, trainer.cfg.mode, trainer.process.device)
        self.started, self.run, self.failed = time.perf_counter(), None, set()
        if trainer.process.is_main:
            self.attempt(self.drop_after, trainer.step)
            self.run = start_wandb(trainer.cfg, folder)
        self.reset()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.run:
            self.attempt(self.run.finish, int(error[0] is not None))

    def attempt(self, write, *args):
        """Call `write`, which training does not need: a failure is printed once, and training continues."""
        try:
            return write(*args)
        except Exception as error:  # disk, matplotlib and Weights & Biases raise errors of many types
            what = getattr(error, "filename", None) or write.__qualname__
            if what not in self.failed:
                self.failed.add(what)
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                reason = " ".join(reason.split())
                print(f"{what}: not written ({reason}); training goes on without it", flush=True)

    def drop_after(self, step):
        """Remove records of steps that a resumed run will repeat, and lines that are no records."""
        path = self.folder / "log.jsonl"
        if path.exists():
            kept = [line for line in read_lines(path) if step_of(line) <= step]
            with write_atomic(path, "w") as file:
                file.writelines(f"{line}\n" for line in kept)

    def reset(self):
        """Start counting for the next log line."""
        self.losses, self.data_s, self.since = [], 0.0, time.perf_counter()

    def add(self, mae, norm, data_s):
        """Add a step: its MAE and gradient norm, on the device, and the seconds waited for data."""
        self.losses.append(mae)
        self.norm, self.data_s = norm, self.data_s + data_s

    def record(self, values):
        """Write a record to log.jsonl and Weights & Biases."""
        self.attempt(append_json, self.folder / "log.jsonl", values)
        if self.run:
            flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
            for name, inner in values.items():
                flat |= {f"{name}/{k}": v for k, v in inner.items()} if isinstance(inner, dict) else {}
            self.attempt(self.run.log, flat, values["step"])

    def write_validation(self, score, mean_score, rows):
        """Write the results of a validation: metrics.json, a record, and a figure of `rows`."""
        record = {
            "step": self.trainer.step,
            "val_mae": score["all"][0],
            "best_mae": self.trainer.best_mae,
            "mean_map_mae": mean_score["all"][0],
            "family_mae": {name: value for name, (value, _) in score.items() if name != "all"},
        }
        self.attempt(write_json, self.folder / "metrics.json", record)
        self.record(record)
        picture = self.folder / "validation.png"
        self.attempt(prediction_figure, picture, rows)
        if self.run and picture.exists():
            self.attempt(self.show_figure, picture)

    def show_figure(self, path):
        """Send a figure to Weights & Biases."""
        import wandb

        self.run.log({"validation": wandb.Image(str(path))}, self.trainer.step)

    def write(self):
        """Write the log line and record of the steps added since the last one."""
        trainer, process = self.trainer, self.trainer.process
        mae = process.sum(torch.stack(self.losses).mean()).item() / process.world
        elapsed_s = time.perf_counter() - self.since
        n_steps = len(self.losses)
        per_step_s = (time.perf_counter() - self.started) / (trainer.step - self.first_step)
        r = {
            "step": trainer.step,
            "epoch": (trainer.step - 1) // trainer.steps_per_epoch,
            "mae": round(mae, 3),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "grad_norm": round(self.norm.item(), 4),
            "samples_per_s": round(n_steps * trainer.global_batch / elapsed_s, 2),
            "data_share": round(self.data_s / elapsed_s, 4),
            "memory_gb": round(peak_memory_gb(process.device), 2),
            "eta_h": round((trainer.n_steps - trainer.step) * per_step_s / 3600, 3),
        }
        if self.peak:
            r["peak_share"] = round(r["samples_per_s"] * self.flops_per_sample / self.peak / process.world, 4)
        self.reset()
        if not process.is_main:
            return
        self.record({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()})
        peak = f" | {r['peak_share']:.0%} of peak" if self.peak else ""
        print(
            f"step {r['step']:>6}/{trainer.n_steps} | epoch {r['epoch']} | mae {r['mae']:6.1f} m/s | "
            f"lr {r['lr']:.1e} | grad {r['grad_norm']:.2f} | {r['samples_per_s']:.0f} samples/s | "
            f"data {r['data_share']:.0%} | {r['memory_gb']:.1f} GB{peak} | eta {r['eta_h']:.2f} h",
            flush=True,
        )


def start_wandb(cfg, folder):
    """A Weights & Biases run for this run folder, the same one when resumed; None when off."""
    if cfg.wandb == "off":
        return None
    import wandb

    path = folder / "wandb_id.txt"
    (name,) = read_lines(path)[:1] or [""]
    if not re.fullmatch(r"[0-9a-f]{8}", name):
        name = uuid.uuid4().hex[:8]
        with write_atomic(path, "w") as file:
            file.write(name)
    try:
        return wandb.init(
            project="openfwi",
            name=folder.name,
            id=name,
            resume="allow",
            mode=cfg.wandb,
            dir=str(folder),
            config=dataclasses.asdict(cfg),
        )
    except wandb.Error as error:
        raise ValueError(
            f"--wandb={cfg.wandb}: {str(error).splitlines()[0]}; use --wandb=offline, or off"
        ) from None


def make_profiler(log):
    """With --profile, a profiler that writes a Chrome trace of four steps into the run folder."""
    if not (log.trainer.cfg.profile and log.trainer.process.is_main):
        return contextlib.nullcontext()
    path = str(log.folder / "trace.json")
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=4, repeat=1),
        on_trace_ready=lambda profiler: log.attempt(profiler.export_chrome_trace, path),
    )


def describe(cfg, trainer, n_train, n_val):
    """A line that describes the training about to start."""
    process, n_parameters = trainer.process, sum(p.numel() for p in trainer.network.parameters())
    name = cfg.backbone if cfg.arch == "unet" else cfg.arch
    return (
        f"{name}: {n_parameters / 1e6:.1f} M parameters | {n_train} training, {n_val} validation samples | "
        f"{cfg.batch_size} a process × {process.world} processes × {cfg.accumulate} accumulated = "
        f"{trainer.global_batch} samples a step | "
        f"{process.device}, {trainer.precision} | {trainer.n_steps} steps"
    ) + (f" | {cfg.online:.0%} simulated online" if cfg.online else "")


def count_skipped(trainer, loader, log):
    """Print and log how many bad samples all ranks together have replaced so far."""
    process = trainer.process
    mine = torch.tensor(float(sum(loader.dataset.skipped.values())), device=process.device)
    n = int(process.sum(mine).item())
    if process.is_main and n:
        print(f"{n} samples of bad files skipped so far (--skip_bad_files)", flush=True)
        log.record({"step": trainer.step, "skipped_samples": n})
