"""One process for each card: a program starts torchrun by itself."""

import os
import sys
from pathlib import Path

import torch

from utils import is_program


def launch(cfg, program, argv, check=lambda: None):
    """Replace this process by torchrun with one process for each card, if there are several cards.

    cfg: options with `device` and `gpus`. check() is called first and may raise ValueError, which then is
    printed once and not by every process. It may return the largest number of processes that have work to do.

    Does nothing under torchrun. A call from Python uses one card, and this is printed. Raises ValueError if
    more processes are asked for than there are cards, or than a call from Python can start.
    """
    if "RANK" in os.environ:
        return
    n_cards = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    n = n_cards if cfg.gpus == "auto" else int(cfg.gpus)
    if n > n_cards:
        raise ValueError(
            f"--gpus={n}: {n_cards} CUDA devices found; ask for at most that many, or --gpus=auto"
        )
    command = f"python {Path(program).name} --gpus={n}"
    if n > 1 and not is_program():
        if cfg.gpus != "auto":
            raise ValueError(f"--gpus={n}: a call from Python uses one card; use the program: {command}")
        print(f"using one of {n} cards, as called from Python; for all of them: {command}", flush=True)
    elif n > 1 and (n := min(n, check() or n)) > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", program, *argv]
        os.execv(
            sys.executable, [sys.executable, *words]
        )  # from now on torchrun receives signals and passes them on
