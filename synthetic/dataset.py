"""Data sets in OpenFWI's layout, from velocity maps that are made, varied or given."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile

import waves
from openfwi.find import VEL_NAME, family_of, find_files
from openfwi.npy import MAP_SHAPE, check_array
from parallel.processes import Process
from parallel.work import (
    Bar,
    check_same,
    check_shared,
    code_version,
    handed_out,
    made_on_all,
    on_all,
    wait_for_all,
)
from synthetic.layers import N_CELLS
from synthetic.maps import FAULT_LAYERS, make_maps
from synthetic.vary import FileMaps, vary
from system.devices import pick_device
from system.files import sha256, sole_use, write_atomic, write_json
from utils import FAMILIES, check_family

N_SAMPLES = 1000  # time samples of 1 ms

BATCH = 8  # maps simulated together; fixed, since float results may depend on it

MAX_FILES = 10**4  # of a family; OpenFWI has at most 134

CHECKSUMS = "checksums.json"  # in --out, with the checksum of every finished file

SANE_M_S = (1000.0, 5500.0)  # a little above, the scheme is unstable; far below 1500 m/s it disperses

# ---------------------------------------------------------------- file pairs


@dataclass(frozen=True)
class Job:
    """A file pair to write: `n` maps, which `maps()` makes when they are needed."""

    seis: Path
    vel: Path
    n: int
    maps: Callable


def _vel_pair(folder, number):
    return folder / "data" / f"data{number}.npy", folder / "model" / f"model{number}.npy"


def _family_jobs(out, family, n, per_file, seed):
    """The file pairs of a family, as equal in size as possible.

    Fault files take the numbers of layers K in turn. There are at least min(3, n) files, so that every K
    occurs.
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


def _given_jobs(folder, path, keys, n_per_file, per_file):
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
    jobs = []
    for key in keys or named:
        if key not in named or not re.fullmatch(r"model\d+", key):
            raise ValueError(
                f"{path}: no maps {key!r}; it holds {', '.join(named)}, wanted are model{{number}}"
            )
        maps = check_maps(named[key], f"{path}, {key}")[:n_per_file]
        jobs.append(Job(*_vel_pair(folder, key[5:]), len(maps), partial(np.copy, maps)))
    return jobs


def _varied_jobs(out, root, families, n, per_file, seed):
    """File pairs of variations of the velocity maps under `root`, and a digest of these maps."""
    sources, digest = {}, hashlib.sha256()
    for path in find_files(root, VEL_NAME):
        if (family := family_of(path)) in families:
            maps = check_array(path, [(None, *MAP_SHAPE)], "velocity maps")
            digest.update(check_maps(np.array(maps), path).tobytes())
            sources.setdefault(family, []).append((maps, np.arange(len(maps))))
    if not sources:
        raise ValueError(f"{root}: no velocity files (model{{N}}.npy, vel{{K}}_1_{{M}}.npy) below it to vary")
    jobs, n_files = {}, math.ceil(n / per_file)
    for family, files in sources.items():
        spans = [(n * j // n_files, n * (j + 1) // n_files) for j in range(n_files)]
        jobs[family] = [
            Job(*_vel_pair(out / family, j + 1), b - a, partial(vary, FileMaps(files), b - a, seed, a))
            for j, (a, b) in enumerate(spans)
        ]
    return jobs, digest.hexdigest()[:16]


# ---------------------------------------------------------------- writing


def _part(path):
    return path.with_name(path.name + ".part")  # which loaders ignore


def _claim(out, jobs, todo, options):
    """Note the options of each family in out/synth.json.

    jobs: {family: list of Job}; todo: unfinished ones. Raises ValueError if other files are in the way, if
    the family was begun with other options, and if there is no room.
    """
    record = out / "synth.json"
    known = _read_json(record)
    for family, group in jobs.items():
        was = known.get(family)
        taken = [p for j in group for p in (j.seis, j.vel, _part(j.seis)) if p.exists()]
        if was is None and taken:
            raise ValueError(f"{taken[0]}: there already, not from synth.py; choose another --out")
        names = sorted({*options, *was}) if was else ()
        if all(j not in todo for j in group):
            names = [k for k in names if k != "device"]  # of finished files the device does not matter
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
    with write_atomic(record, "w") as file:
        file.write(json.dumps(known, indent=1))


def _write_pair(job, dtype, device, bar):
    """Simulate and write a pair, continuing where a stopped run ended; returns the files' checksums.

    The caller gives the seismic file its final name last, so that a seismic file always has its velocity
    file. Each batch has a fixed place in the file: on a file system without locks, two writers write the same
    bytes.
    """
    job.seis.parent.mkdir(parents=True, exist_ok=True)
    job.vel.parent.mkdir(parents=True, exist_ok=True)
    vel, header = job.maps(), io.BytesIO()
    shape = (job.n, len(waves.SOURCES), N_SAMPLES, N_CELLS)
    layout = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    map_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    part = _part(job.seis)
    part.touch()
    with open(part, "r+b") as file, ThreadPoolExecutor(1) as disk:
        # the last batch is made again: after a power cut its length may be right but not its numbers
        n_bytes = min(os.fstat(file.fileno()).st_size, header.tell() + job.n * map_bytes)
        done = max((n_bytes - header.tell()) // (BATCH * map_bytes) - 1, 0) * BATCH
        file.truncate(header.tell() + done * map_bytes)
        file.write(header.getvalue())
        file.seek(header.tell() + done * map_bytes)
        bar.update(done)
        bar.initial += done  # the rate shown is that of this run
        synced = None
        for start in range(done, job.n, BATCH):
            batch = torch.from_numpy(vel[start : start + BATCH]).to(device)
            with torch.no_grad():
                seis = waves.simulate(batch, n_samples=N_SAMPLES)
            content = seis.cpu().numpy().astype(dtype).tobytes()
            if synced:  # while this batch was simulated: a power cut spoils the last batch at most
                synced.result()
            file.write(content)
            file.flush()
            synced = disk.submit(os.fsync, file.fileno())
            bar.update(len(batch))
        synced.result()
    with write_atomic(job.vel) as file:
        np.save(file, vel)
    n_bytes, expected = part.stat().st_size, header.tell() + job.n * map_bytes
    if n_bytes != expected:
        raise ValueError(f"{part}: {n_bytes} bytes, expected {expected}: another program wrote it; delete it")
    return {job.vel: sha256(job.vel), job.seis: sha256(part)}


def _read_json(path):
    """The JSON object in a file, {} if there is no file. Raises ValueError for a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore it, or choose another --out") from None
    return found


def _check_finished(out, jobs):
    """Raise ValueError for a finished file that has changed since it was written."""
    sums = _read_json(out / CHECKSUMS)
    for path in (path for job in jobs for path in (job.vel, job.seis)):
        expected = sums.get(path.relative_to(out).as_posix())
        if expected and sha256(path) != expected:
            raise ValueError(
                f"{path}: changed since it was written, by its checksum; delete it and it is made again"
            )


def _join_checksums(out, jobs):
    """Join the checksums that processes have written, each in its own files, in the order of `jobs`."""
    found, apart = {}, sorted(out.glob("checksums-*.json"))
    for path in apart:
        found |= _read_json(path)
    if found:
        names = [path.relative_to(out).as_posix() for job in jobs for path in (job.vel, job.seis)]
        known = _read_json(out / CHECKSUMS) | found
        sums = {name: digest for name, digest in known.items() if name not in set(names)}
        sums |= {name: known[name] for name in names if name in known}
        with write_atomic(out / CHECKSUMS, "w") as file:
            file.write(json.dumps(sums, indent=1))
    for path in apart:
        path.unlink()


def _write_jobs(out, jobs, options, process):
    """Write every file pair that is not finished; jobs: {family: list of Job}. All processes take pairs.

    Raises ValueError if another command is writing into `out`, or if processes differ in code, options, given
    maps or the folder that they see.
    """
    jobs_in_order = [job for group in jobs.values() for job in group]
    check_same(process, {"code": code_version(), "options": options, "files": len(jobs_in_order)})
    with contextlib.ExitStack() as held:

        def prepare():
            if not process.is_main:
                return None
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_use(out))
            _join_checksums(out, jobs_in_order)
            todo = [k for k, j in enumerate(jobs_in_order) if not (j.seis.exists() and j.vel.exists())]
            _claim(out, jobs, [jobs_in_order[k] for k in todo], options)
            _check_finished(out, [job for k, job in enumerate(jobs_in_order) if k not in set(todo)])
            return todo

        todo = on_all(process, prepare)[0]
        start = check_shared(process, out)
        n = sum(jobs_in_order[k].n for k in todo)
        with Bar(process, "synth", total=n, unit=" maps", desc="simulating", disable=not todo) as bar:
            for k in handed_out(process, "synth", todo):
                job = jobs_in_order[k]
                made = _write_pair(job, options["dtype"], process.device, bar)
                names = {path.relative_to(out).as_posix(): digest for path, digest in made.items()}
                write_json(out / f"checksums-{start}-{k}.json", names)
                if process.world == 1:
                    _join_checksums(out, jobs_in_order)
                os.replace(_part(job.seis), job.seis)
            wait_for_all(process, bar.update)
        if process.is_main:
            _join_checksums(out, jobs_in_order)


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
        return sizes, {f: _family_jobs(out, check_family(f), n_per_family, per_file, seed) for f in families}

    sizes, jobs = made_on_all(process, make)
    _write_jobs(out, jobs, sizes | {"dtype": dtype, "device": process.device.type}, process)


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
        return {name: _given_jobs(out / name, path, keys, n_per_file, per_file)}

    jobs = made_on_all(process, make)
    options = {"maps_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "per_file": per_file}
    options |= {"keys": list(keys), "n_per_file": n_per_file, "dtype": dtype}
    _write_jobs(out, jobs, options | {"device": process.device.type}, process)


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
        return sizes, *_varied_jobs(Path(out), root, families, n_per_family, per_file, seed)

    sizes, jobs, digest = made_on_all(process, make)
    options = sizes | {"varied_sha256": digest, "dtype": dtype, "device": process.device.type}
    _write_jobs(Path(out), jobs, options, process)
