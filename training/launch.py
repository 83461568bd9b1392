"""Checks before training starts: options that cannot work together, missing tools, too little memory."""

import contextlib
import dataclasses
import os

import torch

from model import check_model
from openfwi.files import check_folder
from options.outputs import check_outside
from system.files import check_writable
from training.loss import parse_family_weights
from training.online import cache_folder


def adapted(cfg):
    """The configuration with the options that its switches imply."""
    changes = {"epochs": 1, "log_every": 1} if cfg.smoke else {}
    if cfg.overfit:
        changes |= {"flip_p": 0.0, "batch_size": min(cfg.batch_size, cfg.overfit)}
    changed = dataclasses.replace(cfg, **changes)
    changed.given = cfg.given
    return changed


def check_config(cfg):
    """Raise ValueError for options that cannot work, before anything is started, written or read in full."""
    if not cfg.name or not cfg.name.isprintable() or {"/", "\\"} & set(cfg.name):
        raise ValueError(f"--name={cfg.name!a}: expected a name for a folder, printable and without / or \\")
    if cfg.eval_only and not cfg.ckpt:
        raise ValueError("--eval_only needs a checkpoint: --ckpt=PATH")
    for root in (*(() if cfg.synth_per_family else cfg.data_root), *cfg.val_root):
        check_folder(root)  # a missing data folder is reported before missing weights
    check_model(cfg)
    parse_family_weights(cfg.family_weights)
    check_writable(cfg.run_root)
    if cfg.online:
        check_writable(cache_folder(cfg))
        check_outside("online_cache", cache_folder(cfg), (*cfg.data_root, *cfg.val_root))
    if cfg.wandb != "off" and os.environ.get("RANK", "0") == "0":
        check_wandb(cfg)


def check_wandb(cfg):
    """Raise ValueError unless Weights & Biases is installed and, for online, logged in."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"--wandb={cfg.wandb}: wandb is not installed; pip install wandb, or --wandb=off"
        ) from None
    if cfg.wandb == "online":
        try:
            if not wandb.login(prompt=False):
                raise ValueError("--wandb=online: not logged in; call `wandb login`, or use --wandb=offline")
        except wandb.Error as error:
            raise ValueError(
                f"--wandb=online: {first_line(error)}; call `wandb login`, or use --wandb=offline"
            ) from None


def check_compile(cfg, device):
    """Raise ValueError unless torch.compile works on this device; it needs a compiler, and Triton on CUDA."""
    if cfg.compile == "off":
        return
    try:
        torch.compile(lambda x: x.sin() + 1, mode=cfg.compile)(torch.ones(8, device=device))
    except Exception as error:  # each backend raises errors of its own types
        raise ValueError(
            f"--compile={cfg.compile} does not work on {device.type} here ({first_line(error)}); "
            "install what is missing, or leave --compile out"
        ) from None


# parts of the messages of CUDA, its libraries, MPS and the CPU's allocators
OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def memory_explained(cfg, device, is_training=True):
    """If memory runs out, on a card or the CPU, raise MemoryError that names the option to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        n = cfg.batch_size
        options = "a smaller network or --mode=smart_256x72 needs less"
        if n > 1:
            options = f"--batch_size={n // 2} needs less"
        if is_training and n % 2 == 0:
            options = f"--batch_size={n // 2} --accumulate={2 * cfg.accumulate} makes the same steps"
        raise MemoryError(
            f"out of memory on {device} with --batch_size={n} ({first_line(error)}); {options}"
        ) from None


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
