"""Velocity maps of OpenFWI's ten families, and data sets in OpenFWI's own layout.

OpenFWI's generator was never released: these follow the maps it published
(Deng et al., 2022, arXiv 2111.02926). FlatVel_A, CurveVel_A and four-layer
FlatFault_A were fitted to real maps; the other families are sensible stand-ins.
`python synth.py --help` lists the options.
"""

import argparse
import difflib
import hashlib
import io
import json
import math
import os
import re
import shutil
import wave
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from tqdm import tqdm

from utils import FAMILIES, V_MAX, V_MIN, check_family, pick_device, pyplot, run_program

N_CELLS = 70  # cells of 10 m, down and across
N_SAMPLES = 1000  # of 1 ms
FAULT_LAYERS = {"A": (2, 3, 4), "B": (6, 7, 8)}  # the K of OpenFWI's seis{K}_1_{M}.npy
# Styles: standard deviation (m/s) and length (cells) of the random field, white noise (m/s)
STYLE = {"A": (183.0, 3.5, 0.0), "B": (158.0, 1.96, 58.0)}
BLUR = 0.0535  # weight of each neighbour at a blurred edge: real undisturbed FlatFault_A interfaces
BATCH = 8  # maps simulated together; fixed, since float results may depend on it
SANE_M_S = (1000.0, 5500.0)  # a little above, the scheme is unstable; far below 1500, it disperses


# ---------------------------------------------------------------- velocity maps


def _spline_matrix():
    """Control depths to depths at the 70 columns: (70, 8), a C¹ quadratic spline.

    One parabola through the first three controls, then a piece per control
    that goes on with the slope before it. The knots, 10 cells apart from -0.1
    and the last at 77.9, are where 18,000 real interfaces of CurveVel_A leave
    residuals of mere rounding.
    """
    x = np.arange(N_CELLS, dtype=np.float64)
    knots = np.append(np.arange(0, 70, 10), 78) - 0.1
    y = np.eye(8)
    first = np.polyfit(knots[:3], y[:3], 2)
    depths = np.stack([np.polyval(c, x) for c in first.T], 1)
    slope = (2 * first[0] * knots[2]) + first[1]
    for k in range(2, 7):
        step = knots[k + 1] - knots[k]
        bend = (y[k + 1] - y[k] - slope * step) / step**2
        t = (x[x > knots[k]] - knots[k])[:, None]
        depths[x > knots[k]] = y[k] + slope * t + bend * t**2
        slope = slope + 2 * bend * step
    return depths


SPLINE = _spline_matrix()


def _fill(cells, velocities):
    """Paint layers: first cells of the lower layers (n, X), velocities (n + 1) -> (70, X)."""
    layer = (np.arange(N_CELLS)[:, None, None] >= cells.T).sum(-1)
    return velocities[layer].astype(np.float64)


def _layered(rng, curved, increasing):
    """Vel families: 3-7 interfaces about 70/n cells apart -> (70, 70)."""
    n = rng.integers(3, 8)
    thickness = N_CELLS / n
    shape = (n - 1, 8 if curved else 1)  # one number an interface, or eight control depths
    first = rng.uniform(0.5 * thickness, 1.5 * thickness, shape[1])
    below = first + np.cumsum(thickness + rng.uniform(-1, 1, shape), axis=0)
    depths = np.vstack([first, below])
    depths = depths @ SPLINE.T if curved else np.repeat(depths, N_CELLS, axis=1)
    velocities = rng.integers(V_MIN, V_MAX + 1, n + 1)
    # the real first interfaces begin and end where 0.8, not one half, is the offset of rounding
    return _fill(np.floor(depths + 0.8), np.sort(velocities) if increasing else velocities)


def _blur(field):
    """Soften edges with the kernel [w, 1 - 2w, w] along both axes; constants stay exact."""
    for axis in (0, 1):
        p = np.pad(field, 1, mode="edge")
        near = (p[:-2, 1:-1], p[2:, 1:-1]) if axis == 0 else (p[1:-1, :-2], p[1:-1, 2:])
        field = field + BLUR * (near[0] - field) + BLUR * (near[1] - field)
    return field


def _shift(field, dz, dx):
    """Move a field by (dz, dx) cells, linear between cells, edges repeated."""
    for axis, move in ((0, dz), (1, dx)):
        source = np.clip(np.arange(N_CELLS) - move, 0, N_CELLS - 1)
        low = source.astype(int)
        high = np.minimum(low + 1, N_CELLS - 1)
        weight = (source - low)[:, None] if axis == 0 else source - low
        a = field.take(low, axis)
        field = a + weight * (field.take(high, axis) - a)
    return field


def _slip(rng, field, sharp):
    """Move one side of a straight fault along it, except where the move would bring in what lies outside."""
    dip = math.radians(rng.triangular(34, 77, 82))  # median 66 degrees
    slope = rng.choice([-1, 1]) / math.tan(dip)  # cells across for a cell down
    dz = rng.choice([-1, 1]) * rng.uniform(5, 10)
    dx = dz * slope
    if sharp:
        dz, dx = round(dz), round(dx)
    z, x = np.mgrid[:N_CELLS, :N_CELLS]
    side = rng.choice([-1, 1]) * (x - rng.uniform(10, 60) - slope * (z - N_CELLS / 2))
    block = (side > 0) & (x - dx >= 0) & (x - dx <= N_CELLS - 1)
    moved = _shift(field, dz, dx)
    if sharp:
        return np.where(block, moved, field)
    return field + _blur(block.astype(np.float64)) * (_blur(moved) - field)


def _faulted(rng, curved, version, layers):
    """Fault families: A one fault and soft edges, B two or three and sharp ones -> (70, 70)."""
    n = layers or rng.choice(FAULT_LAYERS[version])
    thickness = np.full(n, 60 // n)  # four real layers: 15 cells each, and ten more dealt out in turn
    for k in range(n - 1):
        thickness[k] += rng.integers(0, N_CELLS - thickness.sum() + 1)
    thickness[-1] += N_CELLS - thickness.sum()
    depths = np.cumsum(rng.permutation(thickness))[:-1, None] + np.zeros(N_CELLS)
    for _ in range((1 if version == "A" else rng.integers(2, 4)) if curved else 0):
        phase = 2 * math.pi * (rng.integers(1, 6) * np.arange(N_CELLS) / N_CELLS + rng.random())
        depths = depths + rng.uniform(2, 6) * np.sin(phase)
    if version == "A":
        n_slow = (n + rng.integers(0, 2)) // 2  # of three layers, one or two
        slow, fast = rng.integers(1500, 3001, n_slow), rng.integers(3000, 4501, n - n_slow)
        field = _blur(_fill(np.round(depths), np.sort(np.append(slow, fast))))
        return _slip(rng, field, sharp=False)
    field = _fill(np.round(depths), rng.integers(V_MIN, V_MAX + 1, n))
    for _ in range(rng.integers(2, 4)):
        field = _slip(rng, field, sharp=True)
    return field


def _style(rng, version):
    """Style families: a Gaussian random field (squared-exponential) on a depth trend -> (70, 70)."""
    deviation, length, noise = STYLE[version]
    n = 128  # periodic in 128 cells, so nothing wraps round within 70
    k = 2 * math.pi * np.fft.fftfreq(n)
    power = np.exp(-0.5 * length**2 * (k[:, None] ** 2 + k**2))
    white = np.fft.fft2(rng.standard_normal((n, n)))
    field = np.fft.ifft2(white * np.sqrt(power / power.mean())).real[:N_CELLS, :N_CELLS]
    trend = rng.uniform(1500, 2000) + rng.uniform(30, 40) * np.arange(N_CELLS)[:, None]
    field = trend + deviation * field + noise * rng.standard_normal(field.shape)
    return np.clip(field, V_MIN, V_MAX)


def make_maps(family, n, seed, start=0, layers=None):
    """Velocity maps start … start + n - 1 of a family: (n, 1, 70, 70) float32, m/s.

    Map i depends on (family, seed, i) alone. `layers` fixes the number of
    layers in Fault families; without it each map draws its own. Raises
    ValueError for an unknown family, a negative seed or n < 1.
    """
    kind, version = check_family(family).split("_")
    if n < 1 or seed < 0:
        raise ValueError(f"n = {n}, seed = {seed}; expected n of at least 1 and seed of at least 0")
    maps = np.empty((n, 1, N_CELLS, N_CELLS), np.float32)
    for i in range(n):
        rng = np.random.default_rng([seed, FAMILIES.index(family), start + i])
        curved = kind.startswith("Curve")
        if kind.endswith("Vel"):
            maps[i] = _layered(rng, curved, version == "A")
        elif kind.endswith("Fault"):
            maps[i] = _faulted(rng, curved, version, layers)
        else:
            maps[i] = _style(rng, version)
    return maps


# ---------------------------------------------------------------- file pairs


@dataclass(frozen=True)
class Job:
    """One file pair to write: `n` maps, made by `maps()` when their turn comes."""

    seis: Path
    vel: Path
    n: int
    maps: Callable


def _vel_pair(folder, number):
    return folder / "data" / f"data{number}.npy", folder / "model" / f"model{number}.npy"


def _family_jobs(out, family, n, per_file, seed):
    """A family's file pairs, of equal size as near as may be.

    Fault files take K in turn, one each; n maps make at least min(3, n) files, so that every K occurs.
    """
    kinds = FAULT_LAYERS[family[-1]] if "Fault" in family else (None,)
    n_files = max(math.ceil(n / per_file), min(len(kinds), n))
    jobs = []
    for j in range(n_files):
        start, stop = n * j // n_files, n * (j + 1) // n_files
        pair = _vel_pair(out / family, j + 1)
        if k := kinds[j % len(kinds)]:
            pair = [out / family / f"{what}{k}_1_{j // len(kinds)}.npy" for what in ("seis", "vel")]
        jobs.append(Job(*pair, stop - start, partial(make_maps, family, stop - start, seed, start, k)))
    return jobs


def _checked_maps(maps, name):
    """Given maps as (n, 1, 70, 70) float32; ValueError unless they are sane velocities in m/s."""
    if maps.shape[1:] not in ((70, 70), (1, 70, 70)) or not len(maps):
        raise ValueError(f"{name}: shape {maps.shape}, expected (n, 1, 70, 70) or (n, 70, 70)")
    if maps.dtype.kind not in "fiu" or not np.isfinite(maps).all():
        raise ValueError(f"{name}: dtype {maps.dtype} or values not finite; repair or leave out those maps")
    low, high = float(maps.min()), float(maps.max())
    if low < SANE_M_S[0] or high > SANE_M_S[1]:
        hint = "multiply km/s by 1000" if high < 10 else "give velocities in m/s, not scaled"
        raise ValueError(f"{name}: values {low:g} to {high:g}, expected within {SANE_M_S} m/s; {hint}")
    return maps.reshape(-1, 1, N_CELLS, N_CELLS).astype(np.float32)


def _given_jobs(folder, path, keys, n_per_file, per_file):
    """File pairs of given maps: .npy in files of `per_file`, .npz key model{k} to data{k}.npy."""
    try:
        source = np.load(path, allow_pickle=False)
        named = {key: source[key] for key in source.files} if isinstance(source, NpzFile) else None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a whole .npy or .npz file of numbers ({error})") from None
    if named is None and keys:
        raise ValueError(f"{path}: --keys is for .npz files; leave it out")
    if named is None:
        maps = _checked_maps(source, path)[:n_per_file]
        named = {f"model{i // per_file + 1}": maps[i : i + per_file] for i in range(0, len(maps), per_file)}
    jobs = []
    for key in keys or named:
        if key not in named or not re.fullmatch(r"model\d+", key):
            raise ValueError(
                f"{path}: no maps {key!r}; it holds {', '.join(named)}, wanted are model{{number}}"
            )
        maps = _checked_maps(named[key], f"{path}, {key}")[:n_per_file]
        jobs.append(Job(*_vel_pair(folder, key[5:]), len(maps), partial(np.copy, maps)))
    return jobs


# ---------------------------------------------------------------- writing


def _part(path):
    return path.with_name(path.name + ".part")  # loaders look for .npy


def _write_whole(path, write):
    """Write a file on disk before it takes its name; `write` gets the open file."""
    with open(_part(path), "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(_part(path), path)


def _claim(out, jobs, todo, options):
    """Note each family's options in out/synth.json; ValueError where other files are in the way, or no room.

    jobs: family -> list of Job; todo: those not finished.
    """
    record = out / "synth.json"
    out.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads(record.read_text()) if record.exists() else {}
    except ValueError as error:
        raise ValueError(f"{record}: not JSON ({error}); restore it, or choose another --out") from None
    for family, group in jobs.items():
        was = known.get(family)
        taken = [p for j in group for p in (j.seis, j.vel, _part(j.seis)) if p.exists()]
        if was is None and taken:
            raise ValueError(f"{taken[0]}: there already, not from synth.py; choose another --out")
        names = sorted({*options, *was}) if was else ()
        if all(j not in todo for j in group):
            names = [k for k in names if k != "device"]  # finished: where it was made does not matter
        pairs = [(k, was.get(k), options.get(k)) for k in names]
        differs = [f"{k} was {old}, now {new}" for k, old, new in pairs if old != new]
        if differs:
            raise ValueError(
                f"{out}: {family} was begun otherwise ({'; '.join(differs)}); use the same options or "
                f"another --out, or delete {out / family} and its entry in {record.name}"
            )
    map_bytes = 5 * N_SAMPLES * N_CELLS * np.dtype(options["dtype"]).itemsize + 4 * N_CELLS**2
    need = sum(j.n for j in todo) * map_bytes
    need -= sum(_part(j.seis).stat().st_size for j in todo if _part(j.seis).exists())
    if need > (free := shutil.disk_usage(out).free):
        sizes = f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} free"
        raise ValueError(f"{out}: {sizes}; fewer maps or --dtype=float16")
    known = dict.fromkeys(jobs, options) | known
    _write_whole(record, lambda file: file.write(json.dumps(known, indent=1).encode()))


def _write_pair(job, dtype, device, bar):
    """Simulate and write one pair, going on where a stopped run was.

    The seismic file takes its name last, so one that is there has its velocity file.
    """
    job.seis.parent.mkdir(parents=True, exist_ok=True)
    job.vel.parent.mkdir(parents=True, exist_ok=True)
    vel, header = job.maps(), io.BytesIO()
    shape = (job.n, len(wave.SOURCES), N_SAMPLES, N_CELLS)
    layout = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    map_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    with open(_part(job.seis), "ab") as file:
        # the last batch is made again: a power cut may have kept its length but not its numbers
        done = max((file.tell() - header.tell()) // (BATCH * map_bytes) - 1, 0) * BATCH
        file.truncate(header.tell() + done * map_bytes if done else 0)
        file.write(b"" if done else header.getvalue())
        bar.update(done)
        bar.initial += done  # the maps/s shown are those of this run
        for start in range(done, job.n, BATCH):
            batch = torch.from_numpy(vel[start : start + BATCH]).to(device)
            with torch.no_grad():
                seis = wave.simulate(batch, n_samples=N_SAMPLES)
            file.write(seis.cpu().numpy().astype(dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
    _write_whole(job.vel, lambda file: np.save(file, vel))
    os.replace(_part(job.seis), job.seis)


def _write_jobs(out, jobs, options):
    """Write every file pair that is not there yet; jobs: family -> list of Job."""
    todo = [j for group in jobs.values() for j in group if not (j.seis.exists() and j.vel.exists())]
    _claim(out, jobs, todo, options)
    if todo:
        with tqdm(total=sum(j.n for j in todo), unit=" maps", desc="simulating") as bar:
            for job in todo:
                _write_pair(job, options["dtype"], options["device"], bar)


def write_dataset(out, families, n_per_family, seed, dtype="float32", per_file=500, device="auto"):
    """Write `n_per_family` maps of each family and their gathers under `out`, in OpenFWI's layout.

    Stopped and started again it goes on, and the bytes are those of an
    unbroken run on the same kind of device; what is finished is left alone.
    float32 is OpenFWI's own type; float16 halves the disk space and errs by
    0.015 at the peaks. Raises ValueError for bad values, no room, or other
    files in the way; OSError where `out` cannot be written.
    """
    sizes = {"n_per_family": n_per_family, "per_file": per_file, "seed": seed}
    if n_per_family < 1 or per_file < 1 or seed < 0:
        raise ValueError(f"{sizes}: expected n_per_family and per_file of at least 1, seed of at least 0")
    out = Path(out)
    jobs = {f: _family_jobs(out, check_family(f), n_per_family, per_file, seed) for f in families}
    _write_jobs(out, jobs, sizes | {"dtype": dtype, "device": pick_device(device).type})


def write_given(
    out, path, family=None, keys=(), n_per_file=None, dtype="float32", per_file=500, device="auto"
):
    """Write gathers of given maps, as `write_dataset`; real maps become real OpenFWI pairs.

    path: .npy (n, 1, 70, 70) or (n, 70, 70) m/s, or .npz of such with keys
    model{k}, written as data{k}.npy. `family` defaults to the file's name;
    `keys` and `n_per_file`, maps of the .npy or of each key, take a part.
    Raises ValueError, too, for maps that are no velocities in m/s.
    """
    out, path = Path(out), Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --maps wants a .npy or .npz file of velocity maps")
    if family is None and path.stem not in FAMILIES:
        raise ValueError(f"{path}: its name is no family; rename it or add --families=NAME, as FlatVel_A")
    if per_file < 1 or (n_per_file is not None and n_per_file < 1):
        raise ValueError(f"per_file = {per_file}, n_per_file = {n_per_file}; expected at least 1")
    family = check_family(family or path.stem)
    jobs = {family: _given_jobs(out / family, path, keys, n_per_file, per_file)}
    options = {"maps_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "per_file": per_file}
    options |= {"keys": list(keys), "n_per_file": n_per_file, "dtype": dtype}
    _write_jobs(out, jobs, options | {"device": pick_device(device).type})


# ---------------------------------------------------------------- program


def contact_sheet(path, n=4, seed=0):
    """Draw n maps of each family on one colour scale; returns whether matplotlib was there to do it."""
    plt = pyplot()
    if plt is None:
        return False
    fig, axes = plt.subplots(5, 2 * n, figsize=(3.2 * n, 9), sharex=True, sharey=True, layout="constrained")
    ticks = (0, 350, 700)
    for f, family in enumerate(FAMILIES):
        row = axes[f // 2, f % 2 * n : f % 2 * n + n]
        for i, (ax, field) in enumerate(zip(row, make_maps(family, n, seed)[:, 0], strict=True)):
            image = ax.imshow(field, extent=(0, 700, 700, 0), vmin=V_MIN, vmax=V_MAX, cmap="viridis")
            ax.set(xticks=ticks, yticks=ticks, title=family if i == 0 else "")
    fig.supxlabel("x (m)")
    fig.supylabel("depth (m)")
    fig.colorbar(image, ax=axes, label="velocity (m/s)", shrink=0.6)
    fig.savefig(path, dpi=90)
    plt.close(fig)
    return True


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a ValueError, hence one line."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def _parser():
    p = _Parser(description="Write OpenFWI-format data sets of synthetic or given maps.", allow_abbrev=False)
    p.add_argument("--out", help="folder of the data set")
    p.add_argument("--families", default=None, help="'all', or names divided by commas (default: all)")
    p.add_argument("--n_per_family", type=int, help="maps of each family")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=("float16", "float32"), default="float32", help="of the seismic files")
    p.add_argument("--per_file", type=int, default=500, help="maps a file, at most")
    p.add_argument("--maps", help=".npy or .npz file of velocity maps (m/s) to simulate instead")
    p.add_argument("--keys", help="with --maps FILE.npz: model1,model2,… (default: all)")
    p.add_argument("--n_per_file", type=int, help="with --maps: the first maps of the .npy or each key")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--figure", help="draw a contact sheet of all families to this file")
    return p


def main(argv):
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, 1)
        raise ValueError(f"unknown option {name}; " + (f"did you mean {near[0]}?" if near else "see --help"))
    families = FAMILIES if args.families in (None, "all") else args.families.split(",")
    families = [check_family(f) for f in families]
    if not (args.figure or args.out):
        raise ValueError("nothing to do; say --out=DIR for a data set, or --figure=FILE.png")
    if args.figure and contact_sheet(args.figure):
        print(f"wrote {args.figure}")
    if not args.out:
        return
    common = {"dtype": args.dtype, "per_file": args.per_file, "device": args.device}
    if args.maps:
        if args.n_per_family is not None or (args.families and len(families) != 1):
            raise ValueError("--maps brings its own maps: no --n_per_family, at most one of --families")
        family = families[0] if args.families else None
        keys = args.keys.split(",") if args.keys else ()
        write_given(args.out, args.maps, family, keys, args.n_per_file, **common)
    elif args.n_per_family is None or args.keys or args.n_per_file is not None:
        raise ValueError("say --n_per_family=N, or --maps=FILE; --keys and --n_per_file go with --maps")
    else:
        write_dataset(args.out, families, args.n_per_family, args.seed, **common)
    print(f"complete: {args.out}")


if __name__ == "__main__":
    run_program(main)
