"""What `infer.py` reads: gathers, found and checked, and the true maps that belong to them."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from openfwi.files import ANY_NPY, FULL_CHECK_GB, VEL_NAME, family_in, find_files, velocity_name
from openfwi.npy import GATHER_SHAPE, MAP_SHAPE, check_array, check_finite, open_array


@dataclass(frozen=True)
class Gather:
    """One gather to predict: `index` in a file of many, None where the file is the gather."""

    oid: str
    path: Path
    index: int | None = None


def find_gathers(root):
    """Every gather of a file or folder, in name order; headers checked.

    A file of one gather gives its stem as id, a file of many its path below `root`
    and the index: FlatVel_A_data_data1_0. Raises ValueError for a missing or empty
    folder, wrong shapes or dtypes, and ids that collide.
    """
    root = Path(root)
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder; give gathers by --input=PATH")
    files = [root] if root.is_file() else find_files(root, ANY_NPY)
    gathers, seen = [], {}
    for path in files:
        if root.is_dir() and VEL_NAME.fullmatch(path.name):
            continue  # velocity maps beside their gathers
        array = check_array(path, [GATHER_SHAPE, (None, *GATHER_SHAPE)], "shot gathers")
        if array.ndim == len(GATHER_SHAPE):
            found = [Gather(path.stem, path)]
        else:
            parts = (path.relative_to(root) if root.is_dir() else Path(path.name)).with_suffix("").parts
            found = [Gather("_".join((*parts, str(i))), path, i) for i in range(len(array))]
        for gather in found:
            if seen.setdefault(gather.oid, path) != path:
                raise ValueError(f"{path}: same id {gather.oid} as {seen[gather.oid]}; rename one of the two")
        gathers.extend(found)
    if not gathers:
        raise ValueError(
            f"{root}: no gathers in it; expected .npy files of {GATHER_SHAPE} or (n, 5, 1000, 70)"
        )
    return gathers


def find_truths(root, gathers):
    """The true map of each gather as (path, index, family or None).

    `root` holds `<id>.npy` maps, or OpenFWI velocity files under their families' folders.
    Raises ValueError naming the first gather without one, and maps of a wrong shape.
    """
    if not Path(root).is_dir():
        raise ValueError(f"{root}: no such folder; give the true maps by --truth=DIR")
    by_name = {}
    for path in find_files(root, ANY_NPY):
        by_name.setdefault(path.name, []).append(path)

    @functools.cache
    def truth_of(path, is_single):
        name = path.name if is_single else velocity_name(path.name)
        found = by_name.get(name, [])
        if len(found) > 1:
            found = [vel for vel in found if family_in(vel) == family_in(path)]
        if len(found) != 1:
            raise ValueError(f"{root}: {len(found)} true maps {name} for {path}; expected one")
        shapes = [MAP_SHAPE, MAP_SHAPE[1:]] if is_single else [(None, *MAP_SHAPE)]
        check_finite(check_array(found[0], shapes, "velocity maps"), found[0], "…", "velocity")
        return found[0], family_in(found[0]) or family_in(path)

    truths = []
    for gather in gathers:
        path, family = truth_of(gather.path, gather.index is None)
        if gather.index is not None and gather.index >= (n := len(open_array(path))):
            raise ValueError(f"{path}: {n} maps, fewer than the gathers of {gather.path}; copy both again")
        truths.append((path, gather.index, family))
    return truths


class GatherDataset(Dataset):
    """Gathers as (number, seis (5, 1000, 70) float32), each read once and checked for NaN."""

    def __init__(self, gathers):
        self.gathers = gathers

    def __len__(self):
        return len(self.gathers)

    def __getitem__(self, i):
        gather = self.gathers[i]
        array = open_array(gather.path)
        seis = np.array(array if gather.index is None else array[gather.index], dtype=np.float32)
        check_finite(seis, gather.path, gather.index or 0, "seismic")
        return i, torch.from_numpy(seis)


def check_values(gathers):
    """Read the gathers for NaN and infinity before any work; very many are checked as they are used."""
    if len(gathers) * math.prod(GATHER_SHAPE) * 4 / 1e9 <= FULL_CHECK_GB:
        for _ in map(GatherDataset(gathers).__getitem__, range(len(gathers))):
            pass


def read_truth(path, index, family=None):
    """A true map as (1, 70, 70) float32 m/s; arguments as `find_truths` gives them."""
    array = open_array(path)
    truth = np.array(array if index is None else array[index], np.float32)
    return torch.from_numpy(truth.reshape(MAP_SHAPE))
