"""Data folders described, verified and packed: the program `python data.py`.

python data.py ROOT...            table of families, files, samples and values, and of bad files
python data.py ROOT... --verify   the same from all values instead of three samples a file; checks checksums
python data.py --pack ROOT --out DIR --mode=small_72x72   float16 copy in an input mode's shape

A packed copy is used like any other data folder. The exit status is 1 if files are bad.
"""

import argparse
import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from openfwi.files import MANIFEST, check_pair, find_pairs, manifest_above, scan, some_samples
from openfwi.find import family_in
from openfwi.index import N_READERS
from openfwi.modes import MODE_SHAPES, preprocess
from openfwi.npy import MAP_SHAPE, check_finite
from system.files import sha256, sole_use, write_atomic
from utils import FAMILIES

CHUNK = 20  # samples that are packed at once
HALF_MAX = 65504.0  # float16's largest number


# ---------------------------------------------------------------- table and verification


def look(pair, verify):
    """Value ranges as `check_pair` returns them, of some or all samples, or the ValueError it raised."""
    try:
        if verify:
            check_sums(pair)
        return check_pair(pair, range(pair.n) if verify else some_samples(pair))
    except ValueError as error:
        return error


def check_sums(pair):
    """Raise ValueError if the files of a packed pair differ from their checksums."""
    folder, manifest = manifest_above(pair.seis)
    for path in (pair.seis, pair.vel) if manifest else ():
        entry = manifest["files"].get(path.absolute().relative_to(folder).as_posix(), {})
        if sha256(path) != entry.get("sha256"):
            raise ValueError(
                f"{path}: other bytes than were packed, by its checksum; remove it and pack again"
            )


def overview(roots, verify=False):
    """Print a table of all data under `roots`; returns the problems found, a line each."""
    pairs, problems = scan(roots)
    ranges = {}
    n_bytes = {pair: pair.gathers.n_bytes + pair.maps.n_bytes for pair in pairs}
    bar = tqdm(total=sum(n_bytes.values()), unit="B", unit_scale=True, disable=None if verify else True)
    with bar, ThreadPoolExecutor(N_READERS) as pool:
        for pair, found in zip(pairs, pool.map(lambda pair: look(pair, verify), pairs), strict=True):
            if isinstance(found, ValueError):
                problems.append(str(found))
            else:
                ranges[pair] = found
            bar.update(n_bytes[pair])
    print(f"{'family':<13}{'files':>6}{'samples':>9}{'GB':>9}  {'seismic':<18}{'velocity, m/s':<20}dtypes")
    for family in [*FAMILIES, "all"]:
        mine = [pair for pair in pairs if family in (pair.family, "all")]
        if mine:
            print(table_row(family, mine, [ranges[pair] for pair in mine if pair in ranges], n_bytes))
    print(
        f"{'all values' if verify else 'headers and three samples a file'} read, {len(problems)} bad", end=""
    )
    print("".join(f"\nbad: {problem}" for problem in problems))
    return problems


def table_row(name, pairs, ranges, n_bytes):
    """A row of the table: files, samples, GB, value ranges, dtypes (seismic/velocity, input mode)."""
    kinds = {}
    for pair in pairs:
        kind = f"{pair.gathers.dtype}/{pair.maps.dtype}" + (f" {pair.mode}" if pair.mode != "full" else "")
        kinds[kind] = kinds.get(kind, 0) + 1
    text = f"{name:<13}{len(pairs):>6}{sum(pair.n for pair in pairs):>9}"
    text += f"{sum(n_bytes[pair] for pair in pairs) / 1e9:>9.2f}  "
    if ranges:
        low, high = np.min(ranges, 0), np.max(ranges, 0)
        text += f"{f'{low[0]:.1f} … {high[1]:.1f}':<18}{f'{low[2]:.0f} … {high[3]:.0f}':<20}"
    else:
        text += f"{'-':<18}{'-':<20}"
    return text + ", ".join(f"{kind} × {n}" if len(kinds) > 1 else kind for kind, n in kinds.items())


# ---------------------------------------------------------------- packed copies


def pack(root, out, mode):
    """Copy every pair under `root` to `out`: gathers in float16 and the shape of `mode`, maps in float32.

    Files keep their names, so that `out` can be used like any data folder. Its manifest holds the mode, and
    the checksum and source of each file. Files that are complete are kept, so that a stopped run can be
    continued, with the same bytes in the end. Raises ValueError if other files are in the way, if there is no
    room, and for bad files.
    """
    root, out = Path(root), Path(out)
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise ValueError(f"{out}: lies in {root}, where its files would be found again; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with sole_use(out):
        _pack(root, out, mode)


def _pack(root, out, mode):
    """`pack`, while no other process writes into `out`."""
    pairs = find_pairs([root])
    if packed := next((pair for pair in pairs if pair.mode != "full"), None):
        raise ValueError(f"{packed.seis}: packed already, for {packed.mode}; pack the original files")
    _, manifest = manifest_above(out / MANIFEST)
    if manifest.get("mode", mode) != mode:
        raise ValueError(f"{out}: packed for {manifest['mode']}, asked for {mode}; give another --out")
    if not manifest and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out}: holds other files; give an empty or new folder by --out")
    jobs = [job for pair in pairs for job in jobs_of(pair, root, mode)]
    left = [job for job in jobs if not is_packed(out, manifest, *job)]
    n_bytes = sum(len(file) * math.prod(shape) * kind.itemsize for _, _, file, shape, kind in left)
    if n_bytes > (free := shutil.disk_usage(out).free):
        raise ValueError(f"{out}: {free / 1e9:.1f} GB free, {n_bytes / 1e9:.1f} GB needed; free some space")
    done = manifest.get("files", {})
    n_clipped = 0
    for name, source, file, shape, kind in tqdm(left, unit="file", disable=None):
        digest, clipped = write_packed(out / name, file, shape, kind, mode)
        n_clipped += clipped
        done[name] = {"sha256": digest, "source": source}
        write_manifest(out, mode, {job[0]: done[job[0]] for job in jobs if job[0] in done})
    if n_clipped:
        print(f"{n_clipped} values beyond float16's range were clipped to ±{HALF_MAX:.0f}")
    print(f"complete: {out}, {len(jobs)} files, {len(left)} of them written now, --mode={mode}")


def jobs_of(pair, root, mode):
    """Yield (name in the copy, source, file, shape of a sample, dtype) for a pair's gathers and its maps."""
    for file, shape, kind in (
        (pair.gathers, MODE_SHAPES[mode], np.dtype(np.float16)),
        (pair.maps, MAP_SHAPE, np.dtype(np.float32)),
    ):
        below = file.path.relative_to(root)
        name = (below if family_in(below) else pair.family / below).as_posix()
        yield name, [below.as_posix(), file.n_bytes, file.mtime_ns, file.ctime_ns], file, shape, kind


def is_packed(out, manifest, name, source, file, shape, kind):
    """Whether a file of the copy is complete and made from this very source."""
    path, entry = out / name, manifest.get("files", {}).get(name, {})
    known = entry.get("source", [])
    n_bytes = 128 + len(file) * math.prod(shape) * kind.itemsize
    is_same = len(known) >= 3 and known == source[: len(known)]  # older manifests lack the last, ctime
    return is_same and path.is_file() and path.stat().st_size == n_bytes


def write_manifest(out, mode, files):
    """Write the manifest of a packed copy."""
    with write_atomic(out / MANIFEST, "w") as file:
        file.write(json.dumps({"mode": mode, "dtype": "float16", "files": files}, indent=1) + "\n")


def write_packed(path, source, shape, kind, mode):
    """Write one file of a copy; returns its checksum and how many values had to be clipped."""
    n_clipped = 0
    header = {"descr": kind.str, "fortran_order": False, "shape": (len(source), *shape)}
    with write_atomic(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(source), CHUNK):
            rows = range(first, min(first + CHUNK, len(source)))
            block = np.stack([source[i] for i in rows]).astype(np.float32)
            check_finite(block, source.path, f"{rows[0]} to {rows[-1]}", "file")
            if shape != MAP_SHAPE:
                ready = preprocess(torch.from_numpy(block), mode)
                n_clipped += int((ready.abs() > HALF_MAX).sum())
                block = ready.clamp(-HALF_MAX, HALF_MAX).numpy()
            file.write(block.astype(kind).tobytes())
    return sha256(path), n_clipped


# ---------------------------------------------------------------- program


class _Parser(argparse.ArgumentParser):
    """argparse that raises ValueError, so that a mistake is one line."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def parse_arguments(argv):
    """The words of the command line as a namespace. Raises ValueError for words that do not go together."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "roots", nargs="*", metavar="ROOT", help="folders of OpenFWI or Kaggle training files"
    )
    parser.add_argument("--verify", action="store_true", help="read everything")
    parser.add_argument("--pack", metavar="ROOT", help="folder to copy")
    parser.add_argument("--out", metavar="DIR", help="where to")
    parser.add_argument(
        "--mode", choices=tuple(MODE_SHAPES), default="full", help="input mode (default: full)"
    )
    args = parser.parse_args(argv)
    if args.pack and (not args.out or args.roots or args.verify):
        raise ValueError(
            "--pack takes one folder and --out: python data.py --pack ROOT --out DIR --mode=MODE"
        )
    if not args.pack and not args.roots:
        raise ValueError("no folder given: python data.py ROOT… [--verify], or --pack ROOT --out DIR")
    return args


def main(argv):
    """Describe, verify or pack data sets; exit with status 1 if files are bad."""
    args = parse_arguments(argv)
    if args.pack:
        pack(expanduser(args.pack), expanduser(args.out), args.mode)
    elif overview([*map(expanduser, args.roots)], args.verify):
        sys.exit(1)
