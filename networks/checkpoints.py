"""Checkpoint files, our own and published ones. Code in a file is never run."""

import argparse
import os
import pathlib
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from system.files import load_json, sha256, write_atomic

# The names under which timm, PyTorch's tutorials, Lightning, segmentation_models and we save weights.
WEIGHTS = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "params")
AVERAGES = ("ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema")
multiarray = (getattr(np, "_core", None) or np.core).multiarray  # NumPy 2, NumPy 1
NUMPY_NAMES = ("numpy._core.multiarray", "numpy.core.multiarray")
PLAIN_DATA = [  # harmless classes in such files; some as (the class that is made, its name in the file)
    *(argparse.Namespace, np.ndarray, np.dtype),
    *((pathlib.PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath")),
    *((pathlib.PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath")),
    *((getattr(multiarray, name), f"{module}.{name}")
      for name in ("scalar", "_reconstruct") for module in NUMPY_NAMES),
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"},  # only numbers: a forged object type crashes
]  # fmt: skip
SAVE_WEIGHTS = "save only its weights: torch.save(model.state_dict(), PATH)"


def save_checkpoint(path, state, keep_as=None):
    """Write `state` (tensors, numbers, strings, containers) whole or not at all; OSError names the file.

    With `keep_as`, an existing checkpoint is kept under that name.
    """
    path = Path(path)
    with write_atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides the reason, such as a full disk, behind its own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        if keep_as and path.exists():
            os.replace(path, keep_as)


def read_checkpoint(path, option="--ckpt"):
    """The content of a checkpoint file as it was saved, on the CPU; Python objects are refused.

    Reads files of torch.save and .safetensors. Raises ValueError, one line that names the file.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such checkpoint"
        raise ValueError(f"{path}: {what}; give the path of a .pt file by {option}=PATH")
    with open(path, "rb") as file:
        check_head(path, file.read(512))
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)


def load_checkpoint(path, option="--ckpt"):
    """Read a checkpoint of any origin: a dict with at least "model", {name: tensor}.

    Weights are found bare or under one of the names in WEIGHTS; a running average of them, found under one of
    AVERAGES, is returned as "ema". Raises ValueError, one line that names the file, for anything else.
    """
    return with_weights(path, read_checkpoint(path, option))


def shipped_weights():
    """The path of the network that comes with the project; raises ValueError if it is missing."""
    path = Path(__file__).parents[1] / "weights" / "seisnext.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: missing; bring it back by git checkout, or name a network by --ckpt=PATH")
    return path


def load_described(path):
    """A checkpoint with its network's options, {name: value}, under "cfg" if they are known.

    A file without options may have them in a `.json` file of the same name and folder: either the options
    alone, or a card as `publish.py` writes it, with the options under "network" and the file's SHA-256.
    Raises ValueError as `load_checkpoint` does, and for a file whose SHA-256 is not the card's.
    """
    checkpoint, options = load_checkpoint(path), Path(path).with_suffix(".json")
    if "cfg" not in checkpoint and options.is_file():
        try:
            card = dict(load_json(options))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{options}: not the network's options as JSON ({error}); correct it") from None
        if (expected := card.get("sha256")) and (got := sha256(path)) != expected:
            raise ValueError(
                f"{path}: its SHA-256 is {got}, {options.name} in its folder says {expected}; "
                "restore both files from one version, for example by git checkout"
            )
        checkpoint["cfg"] = card.get("network", card)
    return checkpoint


def check_head(path, head):
    """Raise ValueError for files whose first bytes show that they are no checkpoint."""
    text = head.lstrip().lower()
    if not head:
        raise ValueError(f"{path}: an empty file; copy or download it again")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; fetch that by git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path}: a web page, not a checkpoint; download the file itself")


def read_safetensors(path):
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise unreadable(path, error) from None


def read_pickled(path):
    """The content of a file of torch.save: tensors and plain data. Raises ValueError for anything else."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN_DATA):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # zip, pickle and torch raise errors of many types
        if found := re.search(r"(?:GLOBAL|global) `?([\w.]+) (?:was not an allowed|whose)", str(error)):
            raise ValueError(
                f"{path}: holds a Python object ({found[1]}), as whole modules do, which could run any code; "
                f"{SAVE_WEIGHTS}"
            ) from None
        if "TorchScript" in str(error):
            raise ValueError(f"{path}: a TorchScript archive, which holds code; {SAVE_WEIGHTS}") from None
        if isinstance(error, pickle.UnpicklingError) and "WeightsUnpickler" in str(error):
            error = ValueError("damaged, or holds more than tensors and plain data")
        raise unreadable(path, error) from None


def unreadable(path, error):
    reason = " ".join((str(error).strip() or type(error).__name__).split("\n")[0].split())[:160]
    return ValueError(f"{path}: not a readable checkpoint ({reason}); copy or train it again")


def is_weights(value):
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in value.items())
    )


def with_weights(path, state):
    """A file's content, its weights under "model" and their average under "ema"; ValueError without any."""
    if is_weights(state):
        return {"model": state}
    held = state if isinstance(state, dict) else {}
    found, averaged = ([n for n in names if is_weights(held.get(n))] for names in (WEIGHTS, AVERAGES))
    if len(found) > 1 or len(averaged) > 1:
        names = ", ".join(found if len(found) > 1 else averaged)
        raise ValueError(f"{path}: several networks, under {names}; save the one to use in a file of its own")
    if not found and not averaged:
        raise ValueError(
            f"{path}: holds no weights, but {described(state)}; expected a state dict, or one under "
            f"{', '.join(WEIGHTS[:3])}"
        )
    checkpoint = {name: value for name, value in held.items() if value is not None or name not in AVERAGES}
    checkpoint["model"] = held[(found or averaged)[0]]
    if averaged:
        checkpoint["ema"] = held[averaged[0]]
    return checkpoint


def described(state):
    """A few words on what a file holds instead of weights."""
    if isinstance(state, dict) and state:
        names = [str(name)[:40] for name in list(state)[:5]]
        return f"a dictionary with {', '.join(names)}{', …' if len(state) > 5 else ''}"
    return f"an empty {type(state).__name__}" if state in ({}, [], ()) else f"a {type(state).__name__}"


def averaged_weights(checkpoint):
    """The weights to predict with: the running average if the checkpoint has one."""
    return checkpoint.get("ema", checkpoint["model"])
