"""Data sets in OpenFWI's layout, from velocity maps that are made, varied or given."""

import hashlib
import math
import re
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from openfwi.find import VEL_NAME, family_of, find_files
from openfwi.npy import MAP_SHAPE, check_array
from parallel.processes import Process
from parallel.work import made_on_all
from synthetic.file_pairs import FilePair, write_pairs
from synthetic.layers import N_CELLS
from synthetic.maps import FAULT_LAYERS, make_maps
from synthetic.vary import FileMaps, vary
from system.devices import pick_device
from utils import FAMILIES, check_family

MAX_FILES = 10**4  # of a family; OpenFWI has at most 134
SANE_M_S = (1000.0, 5500.0)  # a little above, the scheme is unstable; far below 1500 m/s it disperses

# ---------------------------------------------------------------- file pairs


def _vel_pair(folder, number):
    return folder / "data" / f"data{number}.npy", folder / "model" / f"model{number}.npy"


def family_pairs(out, family, n, per_file, seed):
    """The file pairs of a family, as equal in size as possible.

    Fault files take the numbers of layers K in turn. There are at least min(3, n) files, so that every K
    occurs.
    """
    kinds = FAULT_LAYERS[family[-1]] if "Fault" in family else (None,)
    n_files = max(math.ceil(n / per_file), min(len(kinds), n))
    pairs = []
    for j in range(n_files):
        start, stop = n * j // n_files, n * (j + 1) // n_files
        pair = _vel_pair(out / family, j + 1)
        if k := kinds[j % len(kinds)]:
            pair = [out / family / f"{what}{k}_1_{j // len(kinds)}.npy" for what in ("seis", "vel")]
        pairs.append(FilePair(*pair, stop - start, partial(make_maps, family, stop - start, seed, start, k)))
    return pairs


def check_maps(maps, name):
    """Return maps as (n, 1, 70, 70) float32. Raises ValueError unless they are plausible in m/s."""
    if maps.shape[1:] not in ((70, 70), (1, 70, 70)) or not len(maps):
        raise ValueError(f"{name}: shape {maps.shape}, expected (n, 1, 70, 70) or (n, 70, 70)")
    if maps.dtype.kind not in "fiu" or not np.isfinite(maps).all():
        raise ValueError(f"{name}: dtype {maps.dtype} or values not finite; repair or leave out those maps")
    low, high = float(maps.min()), float(maps.max())
    if low < SANE_M_S[0] or high > SANE_M_S[1]:
        hint = "multiply km/s by 1000" if high < 10 else "give velocities in m/s, not scaled"
        raise ValueError(f"{name}: values {low:g} to {high:g}, expected within {SANE_M_S} m/s; {hint}")
    return maps.reshape(-1, 1, N_CELLS, N_CELLS).astype(np.float32)


def given_pairs(folder, path, keys, n_per_file, per_file):
    """File pairs of given maps: a .npy in files of `per_file`, a key model{k} of an .npz as data{k}.npy."""
    try:
        source = np.load(path, allow_pickle=False)
        named = {key: source[key] for key in source.files} if isinstance(source, NpzFile) else None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a whole .npy or .npz file of numbers ({error})") from None
    if named is None and keys:
        raise ValueError(f"{path}: --keys is for .npz files; leave it out")
    if named is None:
        maps = check_maps(source, path)[:n_per_file]
        named = {f"model{i // per_file + 1}": maps[i : i + per_file] for i in range(0, len(maps), per_file)}
    pairs = []
    for key in keys or named:
        if key not in named or not re.fullmatch(r"model\d+", key):
            raise ValueError(
                f"{path}: no maps {key!r}; it holds {', '.join(named)}, wanted are model{{number}}"
            )
        maps = check_maps(named[key], f"{path}, {key}")[:n_per_file]
        pairs.append(FilePair(*_vel_pair(folder, key[5:]), len(maps), partial(np.copy, maps)))
    return pairs


def varied_pairs(out, root, families, n, per_file, seed):
    """File pairs of variations of the velocity maps under `root`, and a digest of these maps."""
    sources, digest = {}, hashlib.sha256()
    for path in find_files(root, VEL_NAME):
        if (family := family_of(path)) in families:
            maps = check_array(path, [(None, *MAP_SHAPE)], "velocity maps")
            digest.update(check_maps(np.array(maps), path).tobytes())
            sources.setdefault(family, []).append((maps, np.arange(len(maps))))
    if not sources:
        raise ValueError(f"{root}: no velocity files (model{{N}}.npy, vel{{K}}_1_{{M}}.npy) below it to vary")
    pairs, n_files = {}, math.ceil(n / per_file)
    for family, files in sources.items():
        spans = [(n * j // n_files, n * (j + 1) // n_files) for j in range(n_files)]
        pairs[family] = [
            FilePair(*_vel_pair(out / family, j + 1), b - a, partial(vary, FileMaps(files), b - a, seed, a))
            for j, (a, b) in enumerate(spans)
        ]
    return pairs, digest.hexdigest()[:16]


# ---------------------------------------------------------------- writing


def _checked_sizes(n_per_family, per_file, seed):
    sizes = {"n_per_family": n_per_family, "per_file": per_file, "seed": seed}
    if n_per_family < 1 or per_file < 1 or seed < 0:
        raise ValueError(f"{sizes}: expected n_per_family and per_file of at least 1, seed of at least 0")
    if (n_files := n_per_family // per_file) > MAX_FILES:
        raise ValueError(
            f"{n_files} files of each family: expected at most {MAX_FILES}; put more maps into a file"
        )
    return sizes


def write_dataset(
    out, families, n_per_family, seed, dtype="float32", per_file=500, device="auto", process=None
):
    """Write `n_per_family` maps of each family and their gathers under `out`, in OpenFWI's layout.

    If it is stopped, the same call continues; the bytes are those of an uninterrupted call on the same kind
    of device, and finished files are kept. float32 is OpenFWI's own type; float16 halves the disk space and
    has errors of up to 0.015 at the peaks. process: this one of several that all make this call; None = the
    only one, on `device`. Raises ValueError for bad values, no room, or other files in the way, and OSError
    if `out` cannot be written.
    """
    process, out = process or Process(pick_device(device)), Path(out)

    def make():
        sizes = _checked_sizes(n_per_family, per_file, seed)
        return sizes, {f: family_pairs(out, check_family(f), n_per_family, per_file, seed) for f in families}

    sizes, pairs = made_on_all(process, make)
    write_pairs(out, pairs, sizes | {"dtype": dtype, "device": process.device.type}, process)


def write_given(
    out,
    path,
    family=None,
    keys=(),
    n_per_file=None,
    dtype="float32",
    per_file=500,
    device="auto",
    process=None,
):
    """Write given maps and their gathers, as `write_dataset` does; real maps become real OpenFWI pairs.

    path: a .npy of (n, 1, 70, 70) or (n, 70, 70) m/s, or an .npz of such with keys model{k}, each written as
    data{k}.npy. family: by default the file's name. keys: only these keys; n_per_file: only the first maps of
    the .npy or of each key. Also raises ValueError for maps that are no velocities in m/s.
    """
    process, out, path = process or Process(pick_device(device)), Path(out), Path(path)

    def make():
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --maps wants a .npy or .npz file of velocity maps")
        if family is None and path.stem not in FAMILIES:
            raise ValueError(f"{path}: its name is no family; rename it or add --families=NAME, as FlatVel_A")
        if per_file < 1 or (n_per_file is not None and n_per_file < 1):
            raise ValueError(f"per_file = {per_file}, n_per_file = {n_per_file}; expected at least 1")
        name = check_family(family or path.stem)
        return {name: given_pairs(out / name, path, keys, n_per_file, per_file)}

    pairs = made_on_all(process, make)
    options = {"maps_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "per_file": per_file}
    options |= {"keys": list(keys), "n_per_file": n_per_file, "dtype": dtype}
    write_pairs(out, pairs, options | {"device": process.device.type}, process)


def write_varied(
    out, root, families, n_per_family, seed, dtype="float32", per_file=500, device="auto", process=None
):
    """Write variations of the velocity maps under `root` and their gathers, as `write_dataset` does.

    There are `n_per_family` of each of the families that has maps there. Also raises ValueError if none has,
    and for maps that are no velocities in m/s.
    """
    process = process or Process(pick_device(device))

    def make():
        sizes = _checked_sizes(n_per_family, per_file, seed)
        return sizes, *varied_pairs(Path(out), root, families, n_per_family, per_file, seed)

    sizes, pairs, digest = made_on_all(process, make)
    options = sizes | {"varied_sha256": digest, "dtype": dtype, "device": process.device.type}
    write_pairs(Path(out), pairs, options, process)
