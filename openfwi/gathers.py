"""The inputs of `infer.py`: shot gathers, found, checked and read, and the true maps that belong to them."""

import functools
import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from openfwi.files import FULL_CHECK_GB, MAX_WHOLE_AMPLITUDE
from openfwi.find import SEIS_NAME, VEL_NAME, family_in, find_npy, velocity_name
from openfwi.index import SETTLED_NS
from openfwi.npy import GATHER_SHAPE, MAP_SHAPE, check_array, check_finite, open_array

MAX_AMPLITUDE = 1e15  # OpenFWI's are about 50; the squares of larger ones exceed float32's range
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Gather:
    """A gather to predict: `index` within its file, or None if the file holds this gather alone."""

    oid: str
    path: Path
    index: int | None = None
    stamp: tuple = field(default=(0, 0, 0), compare=False)  # of the file, see `stamp_of`

    def __str__(self):
        return str(self.path) if self.index is None else f"{self.path}: sample {self.index}"


def stamp_of(file, now_ns):
    """A file's size and times, which change with its contents; zeros if it is too new to be sure of that."""
    is_settled = max(file.mtime_ns, file.ctime_ns) < now_ns - SETTLED_NS
    return (file.n_bytes, file.mtime_ns, file.ctime_ns) if is_settled else (0, 0, 0)


def check_id(oid, path):
    """Raise ValueError for an id that a CSV cannot hold without quotes."""
    if not oid.isprintable() or {",", '"'} & set(oid):
        raise ValueError(
            f"{str(path)!a}: the id {oid!a} holds a comma, a quote or an unprintable character, "
            "which a CSV cannot hold; rename the file or folder"
        )


def holds_gathers(path):
    """Whether a .npy file has the shape of gathers."""
    try:
        return open_array(path).shape[-3:] == GATHER_SHAPE
    except ValueError:
        return False


def find_gathers(root):
    """Every gather of a file or folder, in the order of names, with headers checked.

    The id of a gather that has its own file is the file's name. In a file of many, it is the path below
    `root` and the index: FlatVel_A_data_data1_0; without the index for a single gather in a file named as
    OpenFWI's. Raises ValueError for a missing or empty folder, wrong shapes or dtypes, equal ids, and ids
    that no CSV can hold.
    """
    root, now_ns = Path(root), time.time_ns()
    open_array.cache_clear()  # files may have changed since an earlier call
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder; give gathers by --input=PATH")
    files = find_npy(root) if root.is_dir() else [root]
    gathers, seen = [], {}
    for path in files:
        if root.is_dir() and VEL_NAME.fullmatch(path.name) and not holds_gathers(path):
            continue  # velocity maps next to their gathers
        file = check_array(path, [GATHER_SHAPE, (None, *GATHER_SHAPE)], "shot gathers")
        below = (path.relative_to(root) if root.is_dir() else Path(path.name)).with_suffix("").parts
        n = 1 if file.ndim == len(GATHER_SHAPE) else len(file)
        if file.ndim == len(GATHER_SHAPE) or (n == 1 and not SEIS_NAME.fullmatch(path.name)):
            ids = {path.stem: None}
        else:
            ids = {"_".join((*below, str(i)) if n > 1 else below): i for i in range(n)}
        for oid in ids:
            check_id(oid, path)
            if seen.setdefault(oid, path) != path:
                raise ValueError(f"{path}: same id {oid} as {seen[oid]}; rename one of the two")
        gathers += [Gather(oid, path, index, stamp_of(file, now_ns)) for oid, index in ids.items()]
    if not gathers:
        raise ValueError(
            f"{root}: no gathers in it; expected .npy files of {GATHER_SHAPE} or (n, 5, 1000, 70)"
        )
    return gathers


def find_truths(root, gathers):
    """Where the true map of each gather lies: (path, index, family or None) each.

    `root` holds maps `<id>.npy`, or OpenFWI's velocity files in the folders of their families. Raises
    ValueError for a gather without a true map, and for maps of a wrong shape.
    """
    if not Path(root).is_dir():
        raise ValueError(f"{root}: no such folder; give the true maps by --truth=DIR")
    by_name = {}
    for path in find_npy(root):
        by_name.setdefault(path.name.lower(), []).append(path)

    @functools.cache
    def truth_of(path, is_single):
        name = path.name if is_single else velocity_name(path.name)
        found = by_name.get(name.lower(), [])
        if len(found) > 1:
            found = [vel for vel in found if family_in(vel) == family_in(path)]
        if len(found) != 1:
            raise ValueError(f"{root}: {len(found)} true maps {name} for {path}; expected one")
        several = [(None, *MAP_SHAPE), (None, *MAP_SHAPE[1:])]
        shapes = [MAP_SHAPE, MAP_SHAPE[1:], (1, *MAP_SHAPE)] if is_single else several
        check_finite(check_array(found[0], shapes, "velocity maps"), found[0], "…", "velocity")
        return found[0], family_in(found[0]) or family_in(path)

    truths = []
    for gather in gathers:
        path, family = truth_of(gather.path, gather.index is None)
        if gather.index is not None and gather.index >= (n := len(open_array(path))):
            raise ValueError(f"{path}: {n} maps, fewer than the gathers of {gather.path}; copy both again")
        truths.append((path, gather.index, family))
    return truths


class GatherDataset:
    """Gathers read in batches, as float32, with a digest of each one's values in the file.

    Reading raises ValueError, which names file and sample, for NaN, infinity, gathers of zeros and impossible
    amplitudes.
    """

    def __init__(self, gathers):
        self.gathers = gathers

    def __len__(self):
        return len(self.gathers)

    def __getitem__(self, i):
        seis, _, _ = self.read_batch([i])
        return i, seis[0]

    def read_batch(self, numbers, memory=torch.empty):
        """(seis (B, 5, 1000, 70), digests (B, 16) uint8, numbers (B,)); `memory(n, dtype=…)` holds seis."""
        shape = (len(numbers), *GATHER_SHAPE)
        seis = memory(4 * math.prod(shape), dtype=torch.uint8).view(torch.float32).view(shape)
        digests = [self._read_into(i, row) for i, row in zip(numbers, seis.numpy(), strict=True)]
        return seis, torch.tensor(digests, dtype=torch.uint8), torch.tensor(numbers)

    def _read_into(self, i, row):
        gather = self.gathers[i]
        file = open_array(gather.path)
        values = np.asarray(file) if gather.index is None else file[gather.index]
        check_finite(values, gather.path, gather.index or 0, "seismic")
        digest = hashlib.blake2b(values, digest_size=DIGEST_BYTES, person=file.stored.str.encode())
        with np.errstate(over="ignore"):  # of float64; refused below
            row[:] = values.reshape(GATHER_SHAPE)
        most = max(row.max(), -row.min())
        if most > (MAX_AMPLITUDE if file.stored.kind == "f" else MAX_WHOLE_AMPLITUDE):
            raise ValueError(
                f"{gather}: amplitudes up to {most:.3g} in {file.stored}, expected OpenFWI's of about 50; "
                "divide by the factor they were multiplied by, and save them as float32"
            )
        if not most:
            raise ValueError(f"{gather}: all zeros, as of a broken download; copy it again")
        return list(digest.digest())


def check_values(gathers):
    """Check the values of all gathers before any work; of very many, each is checked when it is used."""
    if len(gathers) * math.prod(GATHER_SHAPE) * 4 / 1e9 <= FULL_CHECK_GB:
        for _ in map(GatherDataset(gathers).__getitem__, range(len(gathers))):
            pass


def read_truth(path, index, family=None):
    """Read a true map (1, 70, 70) float32 m/s, given what `find_truths` returns for it."""
    file = open_array(path)
    truth = np.array(file if index is None else file[index], np.float32)
    return torch.from_numpy(truth.reshape(MAP_SHAPE))
