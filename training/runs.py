"""Run folders: made, found again, checked and saved into."""

import dataclasses
import json
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

from cfg import TRAINING, fields_that_decide, network_config
from model import build_model
from networks.weights import load_weights
from openfwi.modes import preprocess
from utils import averaged_weights, load_checkpoint, read_lines, save_checkpoint


def open_run(cfg, process, global_batch):
    """The run folder, and the state to go on from, None for a new run; the same on all ranks."""
    folders = []
    if cfg.resume:
        folders = run_folders(cfg.run_root, cfg.name)[::-1] if cfg.resume == "auto" else [Path(cfg.resume)]
    elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun started us again after a failure
        folders = [
            f for f in run_folders(cfg.run_root, cfg.name) if launch_line() in read_lines(f / "env.txt")
        ]
    folder = next((f for f in folders if (f / "last.pt").exists() or (f / "previous.pt").exists()), None)
    if folder is not None:
        state = latest_state(folder)
        check_same_run(cfg, folder, state, global_batch)
        return folder, state
    if cfg.resume not in ("", "auto"):
        raise ValueError(f"{cfg.resume}: no last.pt to resume from; start without --resume")
    process.barrier()  # nobody looks for folders to resume any more
    folder = [None]
    if process.is_main:
        folder = [new_run_folder(cfg.run_root, cfg.name)]
        (folder[0] / "cfg.json").write_text(
            json.dumps(dataclasses.asdict(cfg), indent=1) + "\n", encoding="utf-8"
        )
        (folder[0] / "env.txt").write_text(environment(process.device), encoding="utf-8")
    if process.world > 1:
        dist.broadcast_object_list(folder)
    return folder[0], None


def latest_state(folder):
    """The newest whole checkpoint of a run folder; raises ValueError where there is none."""
    failures = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            failures.append(str(error))
            continue
        if "optimizer" not in state:
            raise ValueError(
                f"{path}: holds weights only, expected all of a run; start from it by --ckpt={path}"
            )
        if failures:
            print(f"{failures[0]}; going on from {path}", flush=True)
        return state
    raise ValueError("; ".join(failures))


def check_same_run(cfg, folder, state, global_batch):
    """Refuse to go on with a run of another configuration, naming what differs."""
    saved, asked = state["cfg"], dataclasses.asdict(cfg)
    differs = [
        f"{name}: {saved.get(name)} there, {asked[name]} here"
        for name in fields_that_decide(TRAINING)
        if saved.get(name) != asked[name]
    ]
    if state["global_batch"] != global_batch:
        differs.append(f"samples a step: {state['global_batch']} there, {global_batch} here")
    if differs:
        raise ValueError(
            f"{folder}: another configuration ({'; '.join(differs)}); resume with the same options"
        )


@torch.no_grad()
def check_reload(cfg, folder, trainer, loader):
    """Reload best.pt as `infer.py` does; raises ValueError unless it predicts what was validated."""
    checkpoint = load_checkpoint(folder / "best.pt")
    network = build_model(network_config(cfg, checkpoint)).to(trainer.process.device).eval()
    load_weights(network, averaged_weights(checkpoint), str(folder / "best.pt"))
    seis = preprocess(next(iter(loader))[0].to(trainer.process.device).float(), cfg.mode)
    if not torch.equal(network(seis), trainer.ema.module.eval()(seis)):
        raise ValueError(f"{folder}/best.pt: predicts otherwise after reloading")
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
    """Make runs/<number>-<name>/ with the next free number; raises OSError where that fails."""
    Path(root).mkdir(parents=True, exist_ok=True)
    taken = [int(m[1]) for p in Path(root).iterdir() if (m := re.match(r"(\d+)-", p.name))]
    folder = Path(root) / f"{max(taken, default=0) + 1:03d}-{name}"
    folder.mkdir()
    return folder


def environment(device):
    """Commit, versions and device, one `name: value` a line, for env.txt."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
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
    """What tells one launch from another: torchrun's restarts keep both its id and its process."""
    return f"launch: {os.environ.get('TORCHELASTIC_RUN_ID', 'none')} {os.getppid()}"


def save_last(trainer, folder):
    """Write last.pt on rank 0, the one before becomes previous.pt; a full disk is said and survived."""
    trainer.saved_s = time.monotonic()
    if not trainer.process.is_main or not all(
        v.isfinite().all() for v in trainer.network.state_dict().values()
    ):
        return  # spoilt weights must not replace good ones; BadSteps stops such a run
    last = folder / "last.pt"
    try:
        save_checkpoint(last, trainer.state(), keep_as=folder / "previous.pt")
    except OSError as error:
        print(f"{last}: not written ({error.strerror}); the one before stays; free some space", flush=True)
