"""Run folders: creating them, finding them again, and writing checkpoints into them."""

import contextlib
import dataclasses
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cfg import network_config
from model import build_model
from networks.checkpoints import averaged_weights, load_checkpoint, save_checkpoint
from networks.weights import load_weights
from openfwi.modes import preprocess
from system.files import write_atomic, write_json


def start_run(cfg, process):
    """Make a new run folder with its options and environment; returns it on every rank."""
    process.barrier()  # by now every rank has looked for a run to resume
    folder = [None]
    if process.is_main:
        folder = [new_run_folder(cfg.run_root, cfg.name)]
        write_json(folder[0] / "cfg.json", dataclasses.asdict(cfg))
        with write_atomic(folder[0] / "env.txt", "w") as file:
            file.write(environment(process.device))
    if process.world > 1:
        dist.broadcast_object_list(folder)
    return folder[0]


@torch.no_grad()
def check_reload(cfg, folder, trainer, loader):
    """Reload best.pt as infer.py does. Raises ValueError unless it predicts the same."""
    checkpoint = load_checkpoint(folder / "best.pt")
    network = build_model(network_config(cfg, checkpoint)).to(trainer.process.device).eval()
    load_weights(network, averaged_weights(checkpoint), str(folder / "best.pt"))
    seis = preprocess(next(iter(loader))[0].to(trainer.process.device).float(), cfg.mode)
    if not torch.equal(network(seis), trainer.ema.module.eval()(seis)):
        raise ValueError(f"{folder}/best.pt: predicts another map after reloading; please report this")
    print("smoke: trained, validated, saved, reloaded and predicted")


def run_folders(root, name):
    """Existing runs/<number>-<name>/ folders, oldest first."""
    found = [
        (int(m[1]), p)
        for p in Path(root).glob("*")
        if (m := re.fullmatch(r"(\d+)-(.+)", p.name)) and m[2] == name
    ]
    return [p for _, p in sorted(found)]


def new_run_folder(root, name):
    """Make runs/<number>-<name>/ with the next free number. Raises OSError if that fails."""
    Path(root).mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(m[1]) for p in Path(root).iterdir() if (m := re.match(r"(\d+)-", p.name))]
        folder = Path(root) / f"{max(taken, default=0) + 1:03d}-{name}"
        with contextlib.suppress(FileExistsError):  # another run was started at the same moment
            folder.mkdir()
            return folder


def environment(device):
    """Commit, versions and device as lines of `name: value`, for env.txt."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = (
            subprocess.run(git, capture_output=True, text=True, errors="replace", timeout=10).stdout.strip()
            or "unknown"
        )
    except (OSError, subprocess.TimeoutExpired):
        commit = "unknown"
    card = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    rows = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"{device} ({card}), {torch.get_num_threads()} CPU threads",
    }
    return "".join(f"{name}: {value}\n" for name, value in rows.items()) + launch_line() + "\n"


def launch_line():
    """A line that identifies a launch: restarts by torchrun keep both its id and its process."""
    return f"launch: {os.environ.get('TORCHELASTIC_RUN_ID', 'none')} {os.getppid()}"


def save_last(trainer, folder):
    """Write last.pt on rank 0; the previous one becomes previous.pt. A full disk does not end training."""
    trainer.saved_s = time.monotonic()
    if not trainer.process.is_main:
        return
    weights = trainer.network.state_dict().values()
    if not torch.stack([v.isfinite().all() for v in weights]).all():
        return  # weights that are not finite must not replace good ones; BadSteps stops such a run
    save(folder / "last.pt", trainer.state(), keep_as=folder / "previous.pt")


def save_best(trainer, folder, mae):
    """Write the averaged weights to best.pt if their validation MAE is lower than that of best.pt."""
    if mae < trainer.best_saved_mae:
        best = {"model": trainer.ema.module.state_dict(), "cfg": dataclasses.asdict(trainer.cfg)}
        if save(folder / "best.pt", {**best, "step": trainer.step, "val_mae": mae}):
            trainer.best_saved_mae = mae


def tell_best(trainer, folder):
    """Print the best error and where its weights are; raises ValueError if no best weights were written."""
    best, saved = trainer.best_mae, trainer.best_saved_mae
    if best < saved == math.inf:
        raise ValueError(
            f"{folder}/best.pt: the best weights, of {best:.2f} m/s, could not be written; free some space "
            f"and train on from the last ones that were, --ckpt={folder}/last.pt"
        )
    where = f" | {folder}/best.pt" if saved <= best else f", not written; {folder}/best.pt has {saved:.2f}"
    print(f"best validation MAE {best:.2f} m/s{where}")


def save(path, state, keep_as=None):
    """Write a checkpoint; returns whether that worked. A full disk is reported, and training continues."""
    try:
        save_checkpoint(path, state, keep_as)
        return True
    except OSError as error:
        print(f"{path}: not written ({error.strerror}), the old one is kept; free some space", flush=True)
        return False
