"""Resuming a run: finding it, and checking its checkpoint, its options and its samples."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from cfg import TRAINING, Config, fields_that_decide
from networks.checkpoints import is_weights, read_checkpoint
from openfwi.files import some_samples
from system.files import read_lines
from training.runs import launch_line, run_folders

STATE = {  # what a checkpoint of a run holds: its type
    "model": dict,
    "ema": dict,
    "optimizer": dict,
    "scaler": dict,
    "progress": dict,
    "global_batch": int,
    "cfg": dict,
}
COUNTS = ("step", "validated", "since_best")  # in the progress
ERRORS = ("best_mae", "best_saved_mae")  # in the progress; older versions saved only the first
OLDEST_OPTIONS = {"seed", "arch", "lr", "epochs", "batch_size"}  # present in all versions
# Files are compared by their contents instead of these folders' names.
COMPARED_OTHERWISE = ("data_root", "val_root")
# Options of one call, not of the run that it starts or resumes.
OF_THIS_CALL = (
    *("run_root", "device", "gpus", "threads", "workers", "resume", "ckpt"),
    *("eval_only", "dry_run", "profile", "pretrained"),
)


def find_run(cfg):
    """The run to resume: (its folder, its state), or (None, None) for a new run.

    Raises ValueError if the run that --resume names cannot be resumed.
    """
    folders = []
    if cfg.eval_only:
        return None, None
    if cfg.resume:
        folders = run_folders(cfg.run_root, cfg.name)[::-1] if cfg.resume == "auto" else [Path(cfg.resume)]
        if not folders and cfg.name == Config.name:
            folders = run_folders(cfg.run_root, "full")[::-1]  # the former default name
    elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun started us again after a failure
        folders = [
            f for f in run_folders(cfg.run_root, cfg.name) if launch_line() in read_lines(f / "env.txt")
        ]
    folders = [f.parent if f.name in ("last.pt", "previous.pt") and f.is_file() else f for f in folders]
    folder = next((f for f in folders if (f / "last.pt").exists() or (f / "previous.pt").exists()), None)
    if folder is not None:
        return folder, latest_state(folder)
    if cfg.resume not in ("", "auto"):
        raise ValueError(f"{cfg.resume}: no last.pt to resume from; start without --resume")
    return None, None


def latest_state(folder):
    """The newest intact checkpoint of a run folder; raises ValueError if there is none."""
    failures = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
            check_state(path, state)
        except ValueError as error:
            failures.append(str(error))
            continue
        if failures:
            print(f"{failures[0]}; going on from {path}", flush=True)
        return state
    raise ValueError("; ".join(failures))


def check_state(path, state):
    """Raise ValueError unless a checkpoint holds the whole state of a run, undamaged."""
    if not isinstance(state, dict) or "optimizer" not in state:
        kind = "only weights" if isinstance(state, dict) and "model" in state else "no run"
        raise ValueError(
            f"{path}: holds {kind}, expected the state of a run; start from weights with --ckpt={path}"
        )
    faults = [
        f"{name} is a {type(state.get(name)).__name__}, expected {kind.__name__}"
        for name, kind in STATE.items()
        if not isinstance(state.get(name), kind)
    ]
    if not faults:
        faults = [f"{name} holds no weights" for name in ("model", "ema") if not is_weights(state[name])]
        faults += [f"cfg lacks {name}" for name in sorted(OLDEST_OPTIONS - state["cfg"].keys())]
        faults += progress_faults(state["progress"])
    if faults:
        raise ValueError(
            f"{path}: a damaged checkpoint ({', '.join(faults)}); start from its weights with --ckpt={path}"
        )


def progress_faults(progress):
    """What is wrong with the progress saved in a checkpoint: a list of texts."""
    faults = [f"{name} = {progress.get(name)!r}" for name in COUNTS if not is_count(progress.get(name))]
    if not faults and max(progress[name] for name in COUNTS) > progress["step"]:
        faults = [", ".join(f"{name} = {progress[name]}" for name in COUNTS)]
    errors = {name: progress.get(name, progress.get("best_mae")) for name in ERRORS}
    faults += [f"{n} = {v!r}" for n, v in errors.items() if type(v) is not float or not v >= 0]
    return faults


def is_count(value):
    return type(value) is int and value >= 0


def resumed_config(cfg, folder, state):
    """`cfg` with the options that a run was started with.

    Options given in this call that decide the run's result must agree with them. Raises ValueError, naming
    what differs, if they do not.
    """
    saved, decisive = state["cfg"], fields_that_decide(TRAINING)
    differs = [
        f"{name}: {saved[name]} in the run, {getattr(cfg, name)} now"
        for name in decisive
        if name in cfg.given and name in saved and name not in COMPARED_OTHERWISE
        and saved[name] != getattr(cfg, name)
    ]  # fmt: skip
    if saved.get("warmup_epochs"):
        raise ValueError(
            f"{folder}: trained with --warmup_epochs={saved['warmup_epochs']}, which no longer exists; "
            f"start a new run from its weights with --ckpt={folder}/last.pt"
        )
    if differs:
        raise ValueError(
            f"{folder}: another configuration ({'; '.join(differs)}); resume with the same options"
        )
    inference = {f.name for f in dataclasses.fields(Config) if f.metadata["section"].name == "inference"}
    kept = {
        field.name: saved[field.name]
        for field in dataclasses.fields(Config)
        if field.name in saved and field.name not in cfg.given | inference | set(OF_THIS_CALL)
    }
    silent = [f"{name}={value}" for name, value in kept.items()
              if name in decisive and value != getattr(cfg, name)]  # fmt: skip
    try:
        resumed = dataclasses.replace(cfg, **kept, pretrained=False, ckpt="")
    except ValueError as error:
        raise ValueError(f"{folder}: its configuration is damaged or of another version ({error})") from None
    if silent and os.environ.get("RANK", "0") == "0":
        print(f"{folder}: going on with its own {' '.join(silent)}", flush=True)
    resumed.given = cfg.given
    return resumed


def describe_samples(items):
    """What identifies `items`, wherever their files are: {"files", "samples", "digest", "values"}.

    The digest covers, in order, each file's family, name, length and first velocity map, and the rows used;
    "values" each file's first gather, and its first, middle and last map.
    """
    used, numbers = np.unique(items.rows[:, 0], return_inverse=True)
    digest, values = hashlib.sha256(), hashlib.sha256()
    for pair in (items.pairs[k] for k in used):
        words = (pair.family, pair.seis.name, pair.vel.name, pair.n, pair.mode, pair.gathers.dtype.str)
        digest.update(repr(words).encode())
        digest.update(np.asarray(pair.maps[0], np.float32).tobytes())
        values.update(pair.gathers[0].tobytes())
        for i in some_samples(pair):
            values.update(np.asarray(pair.maps[i], np.float32).tobytes())
    digest.update(np.stack([numbers, items.rows[:, 1]], 1).astype("<i4").tobytes())
    found = {"files": len(used), "samples": len(items)}
    return found | {"digest": digest.hexdigest()[:16], "values": values.hexdigest()[:16]}


def check_resumed(folder, state, trainer):
    """Raise ValueError unless a run would continue with the samples and steps that it began with."""
    remedy = f"restore them, or start a new run from its weights with --ckpt={folder}/last.pt"
    saved = state.get("samples")
    for what, mine in trainer.samples.items():
        if not isinstance(saved, dict):
            break
        there = saved[what] if isinstance(saved.get(what), dict) else {}
        if mine | there != mine or not there:  # older versions saved no values
            counts = [
                f"{found.get('samples')} of {found.get('files')} files {where}"
                for found, where in ((there, "there"), (mine, "here"))
            ]
            if all(there.get(name) == mine[name] for name in ("samples", "files")):
                counts.append("in another order, of other names or with other values")
            raise ValueError(f"{folder}: other {what} samples than before ({', '.join(counts)}); {remedy}")
    for name in () if isinstance(saved, dict) else COMPARED_OTHERWISE:  # of older versions
        there, here = state["cfg"].get(name, ()), getattr(trainer.cfg, name)
        if list(there) != list(here):
            raise ValueError(
                f"{folder}: another --{name}, and the checkpoint is too old to show whether the files are "
                f"the same; give --{name}={','.join(map(str, there))}"
            )
    if state["global_batch"] != trainer.global_batch:
        raise ValueError(
            f"{folder}: another configuration (samples a step: {state['global_batch']} in the run, "
            f"{trainer.global_batch} now); change --batch_size, --accumulate or the number of processes"
        )
    step = state["progress"]["step"]
    if step > trainer.n_steps:
        raise ValueError(
            f"{folder}: its checkpoint is of step {step}, but the run has only {trainer.n_steps} steps; "
            f"start a new run from its weights with --ckpt={folder}/last.pt"
        )
