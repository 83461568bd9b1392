"""File pairs of velocity maps and their gathers, simulated and written so that a stopped run continues."""

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import waves
from parallel.work import Bar, check_same, check_shared, code_version, handed_out, on_all, wait_for_all
from synthetic.layers import N_CELLS
from system.files import load_json, sha256, sole_use, write_atomic, write_json
from utils import StopSignals

N_SAMPLES = 1000  # time samples of 1 ms
BATCH = 8  # maps simulated together; fixed, since float results may depend on it
CHECKSUMS = "checksums.json"  # in --out, with the checksum of every finished file


@dataclass(frozen=True)
class FilePair:
    """A file pair to write: `n` maps, which `maps()` makes when they are needed."""

    seis: Path
    vel: Path
    n: int
    maps: Callable


def part_of(path):
    return path.with_name(path.name + ".part")  # which loaders ignore


def claim(out, pairs, todo, options):
    """Note the options of each family in out/synth.json.

    pairs: {family: list of FilePair}; todo: the unfinished ones. Raises ValueError if other files are in the
    way, if the family was begun with other options, and if there is no room on the disk.
    """
    record = out / "synth.json"
    known = read_json(record)
    for family, group in pairs.items():
        was = known.get(family)
        taken = [p for pair in group for p in (pair.seis, pair.vel, part_of(pair.seis)) if p.exists()]
        if was is None and taken:
            raise ValueError(f"{taken[0]}: exists and is not from synth.py; choose another --out")
        names = sorted({*options, *was}) if was else ()
        if all(pair not in todo for pair in group):
            names = [k for k in names if k != "device"]  # once files are finished, it does not matter
        values = [(k, was.get(k), options.get(k)) for k in names]
        differs = [f"{k} was {old}, now {new}" for k, old, new in values if old != new]
        if differs:
            raise ValueError(
                f"{out}: {family} was begun with other options ({'; '.join(differs)}); use the same ones or "
                f"another --out, or delete {out / family} and its entry in {record.name}"
            )
    map_bytes = 5 * N_SAMPLES * N_CELLS * np.dtype(options["dtype"]).itemsize + 4 * N_CELLS**2
    need = sum(pair.n for pair in todo) * map_bytes
    need -= sum(part_of(pair.seis).stat().st_size for pair in todo if part_of(pair.seis).exists())
    if need > (free := shutil.disk_usage(out).free):
        sizes = f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} free"
        raise ValueError(f"{out}: {sizes}; fewer maps or --dtype=float16")
    known = dict.fromkeys(pairs, options) | known
    with write_atomic(record, "w") as file:
        file.write(json.dumps(known, indent=1))


def write_pair(pair, dtype, device, bar, stop):
    """Simulate and write a pair, continuing where a stopped run ended; returns the files' checksums.

    The caller gives the seismic file its final name last, so that a seismic file always has its velocity
    file. Each batch has a fixed place in the file: on a file system without locks, two writers write the same
    bytes.
    """
    pair.seis.parent.mkdir(parents=True, exist_ok=True)
    pair.vel.parent.mkdir(parents=True, exist_ok=True)
    vel, header = pair.maps(), io.BytesIO()
    shape = (pair.n, len(waves.SOURCES), N_SAMPLES, N_CELLS)
    layout = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    map_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    part = part_of(pair.seis)
    part.touch()
    with open(part, "r+b") as file, ThreadPoolExecutor(1) as disk:
        # the last batch is made again: after a power cut its length may be right but not its numbers
        n_bytes = min(os.fstat(file.fileno()).st_size, header.tell() + pair.n * map_bytes)
        done = max((n_bytes - header.tell()) // (BATCH * map_bytes) - 1, 0) * BATCH
        file.truncate(header.tell() + done * map_bytes)
        file.write(header.getvalue())
        file.seek(header.tell() + done * map_bytes)
        bar.update(done)
        bar.initial += done  # the rate shown is that of this run
        synced = None
        for start in range(done, pair.n, BATCH):
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
            stop.check()
        synced.result()
    with write_atomic(pair.vel) as file:
        np.save(file, vel)
    n_bytes, expected = part.stat().st_size, header.tell() + pair.n * map_bytes
    if n_bytes != expected:
        raise ValueError(f"{part}: {n_bytes} bytes, expected {expected}: another program wrote it; delete it")
    return {pair.vel: sha256(pair.vel), pair.seis: sha256(part)}


def read_json(path):
    """The JSON object in a file, {} if there is no file. Raises ValueError for a damaged one."""
    try:
        found = load_json(path) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore it, or choose another --out") from None
    return found


def check_finished(out, pairs):
    """Raise ValueError for a finished file that has changed since it was written."""
    sums = read_json(out / CHECKSUMS)
    for path in (path for pair in pairs for path in (pair.vel, pair.seis)):
        expected = sums.get(path.relative_to(out).as_posix())
        if expected and sha256(path) != expected:
            raise ValueError(
                f"{path}: its checksum is not the one it was written with; delete it and it is made again"
            )


def join_checksums(out, pairs):
    """Merge the checksum files of all processes into one, in the order of `pairs`."""
    found, separate = {}, sorted(out.glob("checksums-*.json"))
    for path in separate:
        found |= read_json(path)
    if found:
        names = [path.relative_to(out).as_posix() for pair in pairs for path in (pair.vel, pair.seis)]
        known = read_json(out / CHECKSUMS) | found
        sums = {name: digest for name, digest in known.items() if name not in set(names)}
        sums |= {name: known[name] for name in names if name in known}
        with write_atomic(out / CHECKSUMS, "w") as file:
            file.write(json.dumps(sums, indent=1))
    for path in separate:
        path.unlink()


def write_pairs(out, pairs, options, process):
    """Write every file pair that is not finished; all processes take pairs in turn.

    pairs: {family: list of FilePair}. Raises ValueError if another command is writing into `out`, or if the
    processes differ in code, options, given maps or the folder that they see.
    """
    in_order = [pair for group in pairs.values() for pair in group]
    check_same(process, {"code": code_version(), "options": options, "files": len(in_order)})
    with contextlib.ExitStack() as held:

        def prepare():
            if not process.is_main:
                return None
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_use(out))
            join_checksums(out, in_order)
            todo = [k for k, pair in enumerate(in_order) if not (pair.seis.exists() and pair.vel.exists())]
            claim(out, pairs, [in_order[k] for k in todo], options)
            check_finished(out, [pair for k, pair in enumerate(in_order) if k not in set(todo)])
            return todo

        todo = on_all(process, prepare)[0]
        start = check_shared(process, out)
        n = sum(in_order[k].n for k in todo)
        options_of_bar = {"total": n, "unit": " maps", "desc": "simulating", "disable": not todo}
        with (
            StopSignals("the current batch, to keep it") as stop,
            Bar(process, "synth", **options_of_bar) as bar,
        ):

            def pause():
                bar.update()
                stop.check()

            for k in handed_out(process, "synth", todo):
                pair = in_order[k]
                made = write_pair(pair, options["dtype"], process.device, bar, stop)
                names = {path.relative_to(out).as_posix(): digest for path, digest in made.items()}
                write_json(out / f"checksums-{start}-{k}.json", names)
                if process.world == 1:
                    join_checksums(out, in_order)
                os.replace(part_of(pair.seis), pair.seis)
            wait_for_all(process, pause)
        if process.is_main:
            join_checksums(out, in_order)
