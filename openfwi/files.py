"""OpenFWI and Kaggle files: found, paired, indexed, checked, and read a sample at a time.

Layouts (n samples a file, 500 in OpenFWI), under any folders:
    <Family>/data/data{N}.npy    (n, 5, 1000, 70)    <Family>/model/model{N}.npy  (n, 1, 70, 70)
    <Family>/seis{K}_1_{M}.npy   (n, 5, 1000, 70)    <Family>/vel{K}_1_{M}.npy    (n, 1, 70, 70)
Velocity maps may be (n, 70, 70). Seismic and velocity are floats or whole numbers; velocity in m/s. Names are
read without regard to case; hidden files and folders are left alone.
"""

import contextlib
import dataclasses
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

SEIS_NAME = re.compile(r"(data|seis)(\d+|\d+_\d+_\d+)\.npy", re.IGNORECASE | re.ASCII)

VEL_NAME = re.compile(r"(model|vel)(\d+|\d+_\d+_\d+)\.npy", re.IGNORECASE | re.ASCII)

ANY_NPY = re.compile(r"[^.].*\.npy", re.IGNORECASE | re.ASCII | re.DOTALL)  # hidden files are left alone

VEL_PREFIX = {"data": "model", "seis": "vel"}

MANIFEST = "pack.json"  # in the root of a packed copy: its mode and checksums

MAX_WHOLE_AMPLITUDE = 1000  # of gathers in whole numbers; beyond it they were scaled to fill their type

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
    folder = path.parent.parent if path.parent.name.lower() in VEL_PREFIX else path.parent
    try:
        return check_family(folder.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; rename the folder to its family") from None


def find_files(root, pattern, problems=None):
    """Files below `root` whose name fits, in natural order; links are followed, each folder is seen once.

    Hidden folders are left out. A folder that cannot be read raises ValueError, or is added to `problems`.
    """
    found, seen = [], set()

    def unreadable(error):
        problem = (
            f"{error.filename}: folder cannot be read ({error.strerror}); "
            "check its permissions, or move it elsewhere"
        )
        if problems is None:
            raise ValueError(problem)
        problems.append(problem)

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "lost+found"]
        try:
            status = os.stat(folder)
        except OSError as error:
            unreadable(error)
            continue
        # where a file system has no numbers for its folders, as some of Windows have none, the path serves
        identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        found += [os.path.join(folder, name) for name in names if pattern.fullmatch(name)]
    found.sort(key=lambda path: [int(w) if w.isdecimal() else w for w in re.split(r"([0-9]+)", path)])
    return [Path(path) for path in found]


def velocity_name(seis_name):
    """The name of the velocity file that belongs to a seismic file's name; other names stay as they are."""
    return SEIS_NAME.sub(lambda m: f"{VEL_PREFIX[m[1].lower()]}{m[2]}.npy", seis_name)


def velocity_of(seis):
    """The velocity file of a seismic file: beside it, or in the `model` folder beside its own.

    Names are read without regard to case. Raises ValueError where there is none, or more than one.
    """
    name = velocity_name(seis.name)
    prefix = VEL_NAME.fullmatch(name)[1]
    for vel in (seis.parent.parent / prefix / name, seis.parent / name):
        if os.path.isfile(vel):
            return vel
    folders = [*_entries(seis.parent.parent, prefix), seis.parent]
    found = [vel for folder in folders for vel in _entries(folder, name) if os.path.isfile(vel)]
    if len(found) == 1:
        return found[0]
    what = f"several files fit: {', '.join(vel.name for vel in found)}" if found else "no velocity file"
    raise ValueError(f"{seis}: {what} {name} beside it or in a folder {prefix}/")


def _entries(folder, name):
    """What in a folder has this name, in whatever case."""
    try:
        return [folder / entry for entry in os.listdir(folder) if entry.lower() == name]
    except OSError:
        return []


def say_unknown_names(files):
    """Print how many of these .npy files are named as neither gathers nor velocity maps, if any are."""
    unknown = [
        path for path in files if not (SEIS_NAME.fullmatch(path.name) or VEL_NAME.fullmatch(path.name))
    ]
    if unknown:
        what = "1 .npy file is" if len(unknown) == 1 else f"{len(unknown)} .npy files are"
        print(f"left out: {what} not named as data, first: {unknown[0]}", flush=True)


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
            kept = json.loads(self.cache.read_text(encoding="utf-8"))
            self.known = dict(kept["files"]) if kept["sha256"] == _checksum(kept["files"]) else {}
        except (OSError, ValueError, TypeError, KeyError):
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
            str(path): [file.shape, file.stored.str, file.offset, file.mtime_ns, file.ctime_ns]
            for path, file in found.items()
            if isinstance(file, NpyFile) and max(file.mtime_ns, file.ctime_ns) < settled
        }
        if json.loads(json.dumps(entries)) != self.known:
            text = json.dumps({"sha256": _checksum(entries), "files": entries})
            with contextlib.suppress(OSError), write_atomic(self.cache, "w") as file:
                file.write(text)
        return found


def _checksum(entries):
    """Of the index's entries: one that was damaged or edited is not believed."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


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


def check_folder(root):
    """Raise ValueError unless a folder of training files is there."""
    if not Path(root).is_dir():
        raise ValueError(
            f"{root}: no such folder; give the OpenFWI or Kaggle training files by --data_root=DIR"
        )


def scan(roots, families=()):
    """Find every file pair under `roots`, headers only: (pairs, what is wrong with others, a line each).

    A file that is found twice, by links or roots within each other, counts once, and so does its copy.
    Raises ValueError for missing or empty folders and unknown families.
    """
    wanted = [check_family(family) for family in families]
    pairs, problems, seen = [], [], set()
    for root in roots:
        check_folder(root)
        files = find_files(root, ANY_NPY, problems)
        say_unknown_names(files)
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
    """The pairs, without those that hold the same maps as an earlier one of the same name and family.

    Such copies, as of the competition's files beside the whole set, would be trained and validated on at
    once. How many were left out is printed.
    """
    kept, copies, by_name = [], [], {}
    for pair in pairs:
        namesakes = by_name.setdefault((pair.family, pair.mode, pair.seis.name.lower()), [])
        original = next((other for other in namesakes if same_maps(pair, other)), None)
        if original:
            copies.append((pair, original))
        else:
            namesakes.append(pair)
            kept.append(pair)
    if copies:
        pair, original = copies[0]
        what = "1 file is a copy" if len(copies) == 1 else f"{len(copies)} files are copies"
        print(f"left out: {what} by its velocities, first: {pair.seis} of {original.seis}", flush=True)
    return kept


def same_maps(pair, other):
    """Whether two pairs hold the same velocity maps, in float16 at least: precision may differ."""
    if pair.n != other.n:
        return False
    try:
        return all(np.array_equal(np.float16(pair.maps[i]), np.float16(other.maps[i])) for i in range(pair.n))
    except ValueError:  # unreadable by now, which the check of values says
        return False


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
