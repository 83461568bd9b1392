"""OpenFWI and Kaggle files: paired, checked, and read one sample at a time.

Layouts (n samples a file, 500 in OpenFWI), under any folders:
    <Family>/data/data{N}.npy    (n, 5, 1000, 70)    <Family>/model/model{N}.npy  (n, 1, 70, 70)
    <Family>/seis{K}_1_{M}.npy   (n, 5, 1000, 70)    <Family>/vel{K}_1_{M}.npy    (n, 1, 70, 70)
Velocity maps may be (n, 70, 70). Seismic and velocity are floats or whole numbers; velocity in m/s. Upper and
lower case are the same in names; hidden files and folders are ignored.
"""

import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openfwi.find import SEIS_NAME, family_of, find_npy, say_unused, velocity_of
from openfwi.index import N_READERS, Index
from openfwi.modes import MODE_SHAPES
from openfwi.npy import MAP_SHAPE, NpyFile, check_finite, check_shape
from system.files import load_json
from utils import check_family

FULL_CHECK_GB = 4  # up to this size all values of a data set are read at the start; else three samples a file

MANIFEST = "pack.json"  # in a packed copy's folder: its mode and checksums

PUBLIC_MODE = "small_72x72"  # others publish such gathers, too: their shape alone says what they are

MAX_WHOLE_AMPLITUDE = 1000  # of gathers in whole numbers; larger ones were scaled to fill their type


@dataclass(frozen=True)
class FilePair:
    """A seismic file and its velocity file of `n` samples each; gathers have the shape of the input mode."""

    gathers: NpyFile
    maps: NpyFile
    family: str
    mode: str = "full"

    seis = property(lambda self: self.gathers.path)
    vel = property(lambda self: self.maps.path)
    n = property(lambda self: len(self.maps))
    is_half = property(lambda self: self.gathers.dtype == np.float16)


def check_folder(root):
    """Raise ValueError unless `root` is a folder."""
    if not Path(root).is_dir():
        raise ValueError(
            f"{root}: no such folder; give the OpenFWI or Kaggle training files by --data_root=DIR"
        )


def scan(roots, families=()):
    """Find every file pair under `roots` from headers and first maps: (pairs, problems, a line each).

    A file that is found twice, through links or folders within each other, counts once, and so does a copy of
    it. Raises ValueError for missing or empty folders and unknown families.
    """
    wanted = [check_family(family) for family in families]
    _manifest_in.cache_clear()  # a copy may have been packed since
    pairs, problems, seen = [], [], set()
    for root in roots:
        check_folder(root)
        files = find_npy(root, problems)
        say_unused(files)
        files = [path for path in files if SEIS_NAME.fullmatch(path.name)]
        if not files and not problems:
            raise ValueError(
                f"{root}: no data{{N}}.npy or seis{{K}}_1_{{M}}.npy below it; see the README for the layout"
            )
        found = []  # (seismic file, velocity file, family)
        for seis in files:
            try:
                family = family_of(seis)
                if (not wanted or family in wanted) and (real := os.path.realpath(seis)) not in seen:
                    seen.add(real)
                    found.append((seis, velocity_of(seis), family))
            except ValueError as error:
                problems.append(str(error))
        headers = Index(root).headers([path for *both, _ in found for path in both])
        for seis, vel, family in found:
            try:
                pairs.append(pair_up(headers[seis], headers[vel], family))
            except ValueError as error:
                problems.append(str(error))
    return without_copies(pairs), problems


def without_copies(pairs):
    """The pairs, without those that are copies of others, see `is_copy`; of two, the longer is kept.

    Copies, for example of the competition's files next to the whole set, could be both trained and validated
    on. How many are left out is printed.
    """
    copies, by_first = {}, {}
    for pair in sorted(pairs, key=lambda pair: -pair.n):  # of equal length, the first stays first
        others = by_first.setdefault(first_map(pair), [])
        if original := next((other for other in others if is_copy(pair, other)), None):
            copies[pair] = original
        else:
            others.append(pair)
    if copies:
        pair = next(pair for pair in pairs if pair in copies)
        what = "1 file is a copy" if len(copies) == 1 else f"{len(copies)} files are copies"
        print(f"left out: {what}, by the velocities, first: {pair.seis} of {copies[pair].seis}", flush=True)
    return [pair for pair in pairs if pair not in copies]


def first_map(pair):
    """What all copies of a file have in common: family, mode and first velocity map."""
    try:
        vel = np.float16(pair.maps[0])
    except ValueError:  # no longer readable, which the check of values reports
        return pair
    is_empty = vel.min() == vel.max()  # as of a broken download, which that check reports, too
    return pair if is_empty else (pair.family, pair.mode, vel.tobytes())


def is_copy(pair, other):
    """Whether the shorter of two files repeats the beginning of the longer one, whose first map is the same.

    Velocity maps are compared in float16, since their precision may differ; files of different names must
    also have the same first gather.
    """
    n = min(pair.n, other.n)
    try:
        if pair.seis.name.lower() != other.seis.name.lower():
            with np.errstate(over="ignore"):
                if not np.array_equal(np.float16(pair.gathers[0]), np.float16(other.gathers[0])):
                    return False
        return all(np.array_equal(np.float16(pair.maps[i]), np.float16(other.maps[i])) for i in range(n))
    except ValueError:
        return False


def pair_up(gathers, maps, family):
    """Make a `FilePair` of two headers. Raises ValueError if they do not fit, or if one is a ValueError."""
    for file in (gathers, maps):
        if isinstance(file, ValueError):
            raise file
    mode = next((name for name, shape in MODE_SHAPES.items() if gathers.shape[1:] == shape), "full")
    found = manifest_above(gathers.path)[1].get("mode") if mode != "full" else mode
    if found != mode and not (found is None and mode == PUBLIC_MODE):
        raise ValueError(
            f"{gathers.path}: shape {gathers.shape}, expected (n, 5, 1000, 70), or a packed copy with its "
            f"{MANIFEST} above, which says mode {found or 'nothing'}; pack the original files again"
        )
    check_shape(gathers, [(None, *MODE_SHAPES[mode])], "shot gathers")
    check_shape(maps, [(None, *MAP_SHAPE), (None, *MAP_SHAPE[1:])], "velocity maps")
    maps = dataclasses.replace(maps, shape=(len(maps), *MAP_SHAPE))
    if len(gathers) != len(maps):
        raise ValueError(
            f"{gathers.path}: {len(gathers)} samples, but {maps.path} has {len(maps)}; copy both again"
        )
    return FilePair(gathers, maps, family, mode)


@functools.lru_cache(maxsize=4096)
def _manifest_in(folder):
    try:
        found = load_json(folder / MANIFEST)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST}: not readable ({error}); pack the folder again") from None
    return found if isinstance(found, dict) and {"mode", "files"} <= set(found) else None


def manifest_above(path):
    """The packed copy that holds the file, and its manifest: (folder, dictionary), or (None, {})."""
    folders = path.absolute().parents
    return next(((folder, found) for folder in folders if (found := _manifest_in(folder))), (None, {}))


def find_pairs(roots, families=(), skip_bad=False):
    """Find and check every file pair under `roots`, reading headers and first maps only.

    Raises ValueError, which names the file, for missing or empty folders, seismic files without velocity
    files, shapes, dtypes and counts that do not fit, unknown families, and families that are asked for but
    missing. With `skip_bad`, bad files are left out, with a line for each.
    """
    pairs, problems = scan(roots, families)
    if problems and not skip_bad:
        more = (
            f" ({len(problems) - 1} more: python data.py {' '.join(map(str, roots))})" if problems[1:] else ""
        )
        raise ValueError(problems[0] + more)
    for problem in problems:
        print(f"left out: {problem}", flush=True)
    missing = [family for family in families if family not in {pair.family for pair in pairs}]
    if missing:
        raise ValueError(f"{', '.join(map(str, roots))}: no files of {', '.join(missing)}; see --families")
    if not pairs:
        raise ValueError(f"{', '.join(map(str, roots))}: no good files; the first one: {problems[0]}")
    return pairs


# ---------------------------------------------------------------- values


def read_into(pair, index, seis, vel, check=True):
    """Read sample `index` into `seis` (5, T, R) and `vel` (1, 70, 70); raises ValueError unless finite."""
    for file, out, what in ((pair.gathers, seis, "seismic"), (pair.maps, vel, "velocity")):
        if out.dtype == file.dtype:
            file.read_into(index, out)
        else:
            out[:] = file[index]
        if check:
            check_finite(out, file.path, index, what)


def read_sample(pair, index):
    """Read a sample of a file pair: new arrays seis (5, T, R) and vel (1, 70, 70) in the files' dtypes."""
    arrays = [np.empty(file.shape[1:], file.dtype) for file in (pair.gathers, pair.maps)]
    read_into(pair, index, *arrays)
    return arrays


def check_pair(pair, indices):
    """Read the samples `indices`: smallest and largest value of the seismic, then of the velocity, (4,).

    Raises ValueError for NaN, infinity, wrong units and gathers of zeros.
    """
    found = []
    for index in indices:
        seis, vel = (array.astype(np.float32, copy=False) for array in read_sample(pair, index))
        found.append([seis.min(), seis.max(), vel.min(), vel.max()])
        if not 300 <= found[-1][2] <= found[-1][3] <= 10_000:
            raise ValueError(
                f"{pair.vel}: {vel.min():g} to {vel.max():g}, expected velocities in m/s (1500 to 4500)"
            )
        largest = max(-found[-1][0], found[-1][1])
        if pair.gathers.stored.kind != "f" and largest > MAX_WHOLE_AMPLITUDE:
            raise ValueError(
                f"{pair.seis}: {pair.gathers.stored} values up to {largest:g}, expected pressure near ±50: "
                "scaled by an unknown factor; divide by it and save as float32"
            )
        if not any(found[-1][:2]):
            raise ValueError(
                f"{pair.seis}: sample {index} is all zeros, as of a broken download; copy it again"
            )
    low, high = np.min(found, 0), np.max(found, 0)
    return np.array([low[0], high[1], low[2], high[3]])


def some_samples(pair):
    """Indices of the first, middle and last sample."""
    return sorted({0, pair.n // 2, pair.n - 1})


def check_values(pairs, skip_bad=False):
    """Check the values of all samples of a small data set, or of some samples of a large one.

    Returns the good pairs. Raises ValueError for the first bad pair; with `skip_bad`, bad pairs are left out,
    with a line for each.
    """
    is_small = sum(pair.gathers.n_bytes for pair in pairs) / 1e9 <= FULL_CHECK_GB

    def problem_of(pair):
        try:
            check_pair(pair, range(pair.n) if is_small else some_samples(pair))
        except ValueError as error:
            return str(error)

    good, pool = [], ThreadPoolExecutor(N_READERS)
    try:
        for pair, problem in zip(pairs, pool.map(problem_of, pairs), strict=True):
            if problem and not skip_bad:
                raise ValueError(problem)
            if problem:
                print(f"left out: {problem}", flush=True)
            else:
                good.append(pair)
    finally:
        pool.shutdown(cancel_futures=True)
    if not good:
        raise ValueError(f"{problem}; no good files are left")
    return good
