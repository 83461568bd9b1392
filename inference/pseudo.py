"""Predictions as training data: each map with the gather simulated from it is an exact pair."""

import contextlib
from pathlib import Path

import numpy as np
import torch

from openfwi.find import ANY_NPY, find_files
from openfwi.npy import GATHER_SHAPE
from parallel.work import handed_out, on_all, wait_for_all
from system.files import sole_use, write_atomic
from utils import FAMILIES
from waves.misfit import simulated

PER_FILE = 500  # samples, as in OpenFWI


def check_root(root):
    """Raise ValueError if a folder already holds .npy files: they would be taken for pseudo-labels."""
    if Path(root).exists() and (found := find_files(root, ANY_NPY)):
        raise ValueError(f"{root}: holds {found[0].name} already; give an empty folder by --pseudo=DIR")


def pair_paths(root, family, number):
    """(seismic, velocity) paths of a family's file number 0, 1, ..., named as in OpenFWI."""
    if "Fault" in family:
        layers = 2 if family.endswith("A") else 6
        return tuple(Path(root, family, f"{what}{layers}_1_{number}.npy") for what in ("seis", "vel"))
    return tuple(Path(root, family, what, f"{what}{number + 1}.npy") for what in ("data", "model"))


def write_pseudo(root, maps, families, batch_size, process, pause=lambda: None):
    """Write maps (N, 1, 70, 70) float32 m/s and their simulated gathers as a data folder for training.

    families: a name for each map. All processes take files. A file appears only when complete, the seismic
    file of a pair last. Pairs left by an interrupted call with the same maps are kept. `pause` is called
    after each batch and may raise. Raises ValueError if another command is writing into the folder, or if it
    holds pairs of other maps.
    """
    with contextlib.ExitStack() as held:
        on_all(process, lambda: held.enter_context(sole_use(root)) if process.is_main else None)
        pairs = list(_pairs(root, families))
        for k in handed_out(process, "pseudo", list(range(len(pairs)))):
            seis_path, vel_path, numbers = pairs[k]
            vel = np.stack([maps[i] for i in numbers])
            if seis_path.exists():
                if not np.array_equal(np.load(vel_path), vel):
                    raise ValueError(f"{vel_path}: holds other maps; give an empty folder by --pseudo=DIR")
                continue
            with write_atomic(vel_path) as file:
                np.save(file, vel)
            with write_atomic(seis_path) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(vel), *GATHER_SHAPE)}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(vel), batch_size):
                    batch = torch.from_numpy(vel[start : start + batch_size]).to(process.device)
                    file.write(simulated(batch).cpu().numpy().astype("<f4").tobytes())
                    pause()
        wait_for_all(process, pause)


def _pairs(root, families):
    """(seismic path, velocity path, numbers of the maps) of each file pair."""
    for family in FAMILIES:
        mine = [i for i, name in enumerate(families) if name == family]
        for number, start in enumerate(range(0, len(mine), PER_FILE)):
            yield *pair_paths(root, family, number), mine[start : start + PER_FILE]
