"""OpenFWI and Kaggle files: found, paired, indexed, checked, and read a sample at a time.

Layouts (n samples a file, 500 in OpenFWI), under any folders:
    <Family>/data/data{N}.npy    (n, 5, 1000, 70)    <Family>/model/model{N}.npy  (n, 1, 70, 70)
    <Family>/seis{K}_1_{M}.npy   (n, 5, 1000, 70)    <Family>/vel{K}_1_{M}.npy    (n, 1, 70, 70)
Seismic and velocity are float16, float32 or float64; velocity in m/s.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openfwi.modes import MODE_SHAPES
from openfwi.npy import MAP_SHAPE, NpyFile, check_finite, check_shape, read_header
from utils import FAMILIES, check_family, write_atomic

FULL_CHECK_GB = 4  # sets up to this size are read whole at start; of larger ones three samples a file

SEIS_NAME = re.compile(r"(data|seis)(\d+|\d+_\d+_\d+)\.npy")

VEL_NAME = re.compile(r"(model|vel)(\d+|\d+_\d+_\d+)\.npy")

VEL_PREFIX = {"data": "model", "seis": "vel"}

MANIFEST = "pack.json"  # in the root of a packed copy: its mode and checksums

N_READERS = 8  # threads that wait for the disk while files are indexed or checked

SETTLED_NS = 2_000_000_000  # a file changed later than this before indexing could change again unseen

# ---------------------------------------------------------------- finding


def family_in(path):
    """The family named by the nearest folder above a file, or None."""
    names = {family.lower(): family for family in FAMILIES}
    return next((names[folder.name.lower()] for folder in path.parents if folder.name.lower() in names), None)


def family_of(path):
    """As `family_in`, but a file under no family's folder raises ValueError."""
    if family := family_in(path):
        return family
    folder = path.parent.parent if path.parent.name in VEL_PREFIX else path.parent
    try:
        return check_family(folder.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; rename the folder to its family") from None


def find_files(root, pattern):
    """Files below `root` whose name fits, in natural order; links are followed, each folder is seen once."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += [os.path.join(folder, name) for name in names if pattern.fullmatch(name)]
    found.sort(key=lambda path: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", path)])
    return [Path(path) for path in found]


def velocity_of(seis):
    """The velocity file of a seismic file: beside it, or in the `model` folder beside its own."""
    prefix, number = SEIS_NAME.fullmatch(seis.name).groups()
    name = f"{VEL_PREFIX[prefix]}{number}.npy"
    for vel in (seis.parent.parent / VEL_PREFIX[prefix] / name, seis.parent / name):
        if vel.is_file():
            return vel
    raise ValueError(f"{seis}: no velocity file {name} beside it or in a folder {VEL_PREFIX[prefix]}/")


# ---------------------------------------------------------------- the index


class Index:
    """The headers under a root, kept between runs in the user's cache folder.

    A header is read again when the file's size or times differ, or were too new to be told apart.
    A cache that cannot be read or written, or holds anything else, is as none.
    """

    def __init__(self, root):
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
        self.cache = Path(folder, "openfwi-index", f"{name}.json")
        try:
            self.known = dict(json.loads(self.cache.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.known = {}

    def remembered(self, path):
        """The header as it was, where the file still is as it was; else None."""
        try:
            status = os.stat(path)
            shape, kind, offset, *times = self.known[str(path)]
            file = NpyFile(path, tuple(shape), np.dtype(kind), offset, *times)
            same = (file.n_bytes, *times) == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except (OSError, KeyError, ValueError, TypeError):
            return None
        return file if same else None

    def headers(self, paths):
        """{path: header or ValueError} of many files, read side by side; remembers the good ones."""
        settled = time.time_ns() - SETTLED_NS
        found = {path: self.remembered(path) for path in paths}
        missing = [path for path, file in found.items() if file is None]
        with ThreadPoolExecutor(N_READERS) as pool:
            found |= zip(missing, pool.map(_header_or_error, missing), strict=True)
        entries = {
            str(path): [file.shape, file.dtype.str, file.offset, file.mtime_ns, file.ctime_ns]
            for path, file in found.items()
            if isinstance(file, NpyFile) and max(file.mtime_ns, file.ctime_ns) < settled
        }
        text = json.dumps(entries)
        if json.loads(text) != self.known:
            with contextlib.suppress(OSError), write_atomic(self.cache, "w") as file:
                file.write(text)
        return found


def _header_or_error(path):
    try:
        return read_header(path)
    except ValueError as error:
        return error


@dataclass(frozen=True)
class FilePair:
    """A seismic file and its velocity file, `n` samples each; gathers have the shape of input mode `mode`."""

    gathers: NpyFile
    maps: NpyFile
    family: str
    mode: str = "full"

    seis = property(lambda self: self.gathers.path)
    vel = property(lambda self: self.maps.path)
    n = property(lambda self: len(self.maps))
    is_half = property(lambda self: self.gathers.dtype == np.float16)


def scan(roots, families=()):
    """Find every file pair under `roots`, headers only: (pairs, what is wrong with others, a line each).

    A file that is found twice, by links or roots within each other, counts once.
    Raises ValueError for missing or empty folders and unknown families.
    """
    wanted = [check_family(family) for family in families]
    pairs, problems, seen = [], [], set()
    for root in roots:
        if not Path(root).is_dir():
            raise ValueError(
                f"{root}: no such folder; give the OpenFWI or Kaggle training files by --data_root=DIR"
            )
        files = find_files(root, SEIS_NAME)
        if not files:
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
    return pairs, problems


def pair_up(gathers, maps, family):
    """A `FilePair` of two headers; raises ValueError for what does not fit, or what either was instead."""
    for file in (gathers, maps):
        if isinstance(file, ValueError):
            raise file
    mode = next((name for name, shape in MODE_SHAPES.items() if gathers.shape[1:] == shape), "full")
    if mode != "full" and (manifest := manifest_above(gathers.path)[1]).get("mode") != mode:
        raise ValueError(
            f"{gathers.path}: shape {gathers.shape}, expected (n, 5, 1000, 70), or a packed copy with its "
            f"{MANIFEST} above, which says mode {manifest.get('mode', 'nothing')}; pack it again"
        )
    check_shape(gathers, [(None, *MODE_SHAPES[mode])], "shot gathers")
    check_shape(maps, [(None, *MAP_SHAPE)], "velocity maps")
    if len(gathers) != len(maps):
        raise ValueError(
            f"{gathers.path}: {len(gathers)} samples, but {maps.path} has {len(maps)}; copy both again"
        )
    return FilePair(gathers, maps, family, mode)


@functools.lru_cache(maxsize=4096)
def _manifest_in(folder):
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST}: not readable ({error}); pack the folder again") from None
    return found if isinstance(found, dict) and {"mode", "files"} <= set(found) else None


def manifest_above(path):
    """The packed copy that holds the file, and its manifest: (folder, dict), or (None, {})."""
    folders = path.absolute().parents
    return next(((folder, found) for folder in folders if (found := _manifest_in(folder))), (None, {}))


def find_pairs(roots, families=(), skip_bad=False):
    """Find and check every file pair under `roots`; headers only.

    Raises ValueError, naming the file, for missing or empty folders, a seismic
    file without velocity, shapes, dtypes and counts that do not fit, an unknown
    family, and families asked for that are not there. With `skip_bad` bad files
    are left out and said, a line each.
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
    """Sample `index` into `seis` (5, T, R) and `vel` (1, 70, 70), read once, converted once, finite."""
    for file, out, what in ((pair.gathers, seis, "seismic"), (pair.maps, vel, "velocity")):
        if out.dtype == file.dtype:
            file.read_into(index, out)
        else:
            out[:] = file[index]
        if check:
            check_finite(out, file.path, index, what)


def read_sample(pair, index):
    """Sample of a file pair: seis (5, T, R) and vel (1, 70, 70), fresh, in the files' dtypes, finite."""
    arrays = [np.empty(file.shape[1:], file.dtype) for file in (pair.gathers, pair.maps)]
    read_into(pair, index, *arrays)
    return arrays


def check_pair(pair, indices):
    """Read these samples: the smallest and largest value of seismic and velocity, (4,).

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
        if not any(found[-1][:2]):
            raise ValueError(
                f"{pair.seis}: sample {index} is all zeros, as of a broken download; copy it again"
            )
    low, high = np.min(found, 0), np.max(found, 0)
    return np.array([low[0], high[1], low[2], high[3]])


def some_samples(pair):
    """The first, middle and last sample."""
    return sorted({0, pair.n // 2, pair.n - 1})


def check_values(pairs, skip_bad=False):
    """Read values for `check_pair`: all of a small set, some of a large one; returns the good pairs.

    Raises ValueError for the first bad pair in order, or with `skip_bad` says each and leaves it out.
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
