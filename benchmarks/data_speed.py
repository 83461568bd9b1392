"""Speed of reading: `python bench.py data`, our loader against bare reading of the same files.

The ways of reading take turns, each over all files, first with no file in the page cache, then from memory.
`sequential` reads file after file into 1 MiB, which stays in the processor's cache, as dd does. `batchwise`
reads into the memory of a whole batch. `memmap` copies samples in random order out of np.memmap. `loader` is
ours; `processes` is torch's DataLoader over the same data set.
"""

import math
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from cfg import Config
from data import whole
from openfwi.files import find_pairs
from openfwi.npy import GATHER_SHAPE, MAP_SHAPE
from options.fields import Options, Section
from parallel.processes import Process
from system.devices import keep_memory
from system.files import write_json
from training.loader import make_loaders

BLOCK = 1 << 20  # bytes that `sequential` reads at once


def write_files(root, n_files, n_samples, dtype):
    """Write files of random numbers in OpenFWI's layout."""
    rng = np.random.default_rng(0)
    for number in range(1, n_files + 1):
        for name, shape, kind in (("data", GATHER_SHAPE, dtype), ("model", MAP_SHAPE, "float32")):
            path = Path(root, "FlatVel_A", name, f"{name}{number}.npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.lib.format.open_memmap(path, "w+", kind, (n_samples, *shape))
            for row in values:
                row[:] = 3000 + rng.standard_normal(shape, np.float32)
            values.flush()


def forget(paths):
    """Remove the files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_sequentially(paths, n_bytes=BLOCK):
    """Read files one after another, `n_bytes` at a time."""
    block = bytearray(n_bytes)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def read_mapped(pairs, order):
    """Copy samples, (pair, index) each, out of memory maps."""
    maps = [[np.load(path, mmap_mode="r") for path in (pair.seis, pair.vel)] for pair in pairs]
    for k, i in order:
        for array in maps[k]:
            np.array(array[i])


def drain(loader):
    """Read all batches of a loader; returns the number of samples."""
    n = 0
    for batch in loader:
        n += len(batch[0])
    return n


def own_memory():
    """Bytes of this process alone (USS), and with its share of common memory (PSS).

    Raises ValueError if the system does not report them.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        raise ValueError("--soak: this system does not tell a process's memory, Linux does") from None
    kib = {words[0]: int(words[1]) for words in map(str.split, lines)}
    return 1024 * (kib["Private_Clean:"] + kib["Private_Dirty:"]), 1024 * kib["Pss:"]


def loader_of(items, workers, batch_size):
    """Our training loader over these items."""
    cfg = Config(batch_size=batch_size, workers=workers)
    return make_loaders(cfg, Process(torch.device("cpu")), items, items[:1])[0]


DATA = Section("data", "the loader against bare reading of the same files")


@dataclass
class DataOptions(Options):
    """The options of `bench.py data`."""

    files: int = DATA(4, "pairs of files to make", above=0, most=10**4)
    samples: int = DATA(160, "samples a file; files x samples must fill whole batches", above=0, most=10**5)
    dtype: str = DATA("float32", "of the gathers: float16, float32", choices=("float16", "float32"))
    batch_size: int = DATA(16, "samples a batch", above=0, most=10**5)
    workers: tuple = DATA((1, 2, 3, 4), "numbers of the loader's threads", items=int, most=1024)
    processes: tuple = DATA((2,), "numbers of worker processes of torch's DataLoader", items=int, most=1024)
    repeats: int = DATA(9, "turns with the files in memory", above=0, most=10**4)
    cold: int = DATA(3, "turns with none of them in memory; 0 where a system cannot", most=10**4)
    folder: str = DATA("", "where to put the files; none = the system's temporary folder", path=True)
    soak: int = DATA(0, "> 0: instead read this many samples and watch the memory")
    json: str = DATA("", "file to write every number to", writes="JSON")


def bench_data(args):
    """Print how fast the loader reads, against bare reading of the same files; with --soak its memory."""
    if args.cold and not args.soak and not hasattr(os, "posix_fadvise"):
        raise ValueError("--cold: this system cannot take files out of memory, Linux can; use --cold=0")
    keep_memory()
    with tempfile.TemporaryDirectory(dir=args.folder or None) as root:
        sample_bytes = math.prod(GATHER_SHAPE) * np.dtype(args.dtype).itemsize + 4 * math.prod(MAP_SHAPE)
        need, free = args.files * args.samples * sample_bytes, shutil.disk_usage(root).free
        if need > free:
            raise ValueError(
                f"{root}: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} free; fewer --files or --samples"
            )
        write_files(root, args.files, args.samples, args.dtype)
        pairs = find_pairs([root])
        items, paths = whole(pairs), [path for pair in pairs for path in (pair.seis, pair.vel)]
        n, sample_bytes = len(items), sum(os.path.getsize(path) for path in paths) / len(items)
        if args.soak:
            return soak(items, args)
        order = items.rows[np.random.default_rng(0).permutation(n)].tolist()
        contenders = {
            "sequential": lambda: read_sequentially(paths),
            "batchwise": lambda: read_sequentially(paths, round(args.batch_size * sample_bytes)),
            "memmap": lambda: read_mapped(pairs, order),
        }
        for workers in args.workers:
            loader = loader_of(items, workers, args.batch_size)
            assert len(loader) * args.batch_size == n, "samples must fill whole batches"
            contenders[f"loader {workers}"] = lambda loader=loader: drain(loader)
        for workers in args.processes:
            ours = loader_of(items, 0, args.batch_size)
            options = {
                "batch_sampler": ours.batch_sampler,
                "num_workers": workers,
                "persistent_workers": True,
            }
            torchs = DataLoader(ours.dataset, **options)
            contenders[f"processes {workers}"] = lambda loader=torchs: drain(loader)
        print(
            f"{n} samples of {sample_bytes / 1e6:.2f} MB, {args.dtype}, in {len(pairs)} pairs of files, "
            f"{os.cpu_count()} cores"
            + (f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "")
        )
        turns = {state: n for state, n in (("cold", args.cold), ("warm", args.repeats)) if n}
        times = {name: {state: [] for state in turns} for name in contenders}
        cpu_s = {name: [] for name in contenders}
        for state, repeats in turns.items():
            for run in contenders.values():
                run()  # opens, starts workers, fills the page cache
            for _ in range(repeats):
                for name, run in contenders.items():
                    if state == "cold":
                        forget(paths)
                    started, cpu_started = time.perf_counter(), time.process_time()
                    run()
                    times[name][state].append(time.perf_counter() - started)
                    if state == "warm":
                        cpu_s[name].append(time.process_time() - cpu_started)
    result = table(times, cpu_s, n, sample_bytes)
    if args.json:
        write_json(args.json, {"rows": result, "times_s": times, "cpu_s": cpu_s})


def table(times, cpu_s, n, sample_bytes):
    """Print and return medians: rates, their ratios to sequential reading in the same turn, CPU times.

    CPU time is that of all threads of this process; worker processes are not counted.
    """
    columns = "".join(
        f"{state:>8} {'samples/s':>9} {'MB/s':>6} {'of dd':>6}" for state in times["sequential"]
    )
    print(f"{'who':<14}{columns} {'CPU us a sample':>16}")
    rows = []
    for name, states in times.items():
        row, text = {"who": name, "cpu_s_per_sample": statistics.median(cpu_s[name]) / n}, f"{name:<14}"
        for state, took in states.items():
            rate = n / statistics.median(took)
            ratio = statistics.median(a / b for a, b in zip(times["sequential"][state], took, strict=True))
            row[state] = {"samples_per_s": rate, "MB_per_s": rate * sample_bytes / 1e6, "ratio": ratio}
            text += f"{'':8} {rate:>9.0f} {row[state]['MB_per_s']:>6.0f} {ratio:>6.2f}"
        print(f"{text} {1e6 * row['cpu_s_per_sample']:>16.0f}")
        rows.append(row)
    return rows


def soak(items, args):
    """Read args.soak samples with each number of workers and print the memory in use."""
    for workers in args.workers:
        loader = loader_of(items, workers, args.batch_size)
        batch_bytes = sum(t.nbytes for t in loader.dataset.read_batch(range(args.batch_size))[:2])
        held, n, epoch, marks = own_memory(), 0, 0, []
        while n < args.soak:
            loader.batch_sampler.epoch = epoch
            n, epoch = n + drain(loader), epoch + 1
            marks.append((n, own_memory()))
        print(f"{workers} workers, batches of {batch_bytes / 1e6:.1f} MB; before: USS {held[0] / 1e6:.0f} MB")
        for n, (uss, pss) in (marks[0], marks[len(marks) // 2], marks[-1]):
            grown = (uss - held[0] - batch_bytes) / batch_bytes / workers
            print(
                f"{n:>8} samples: USS {uss / 1e6:.0f} MB, PSS {pss / 1e6:.0f} MB: "
                f"beyond the interpreter and the batch in use {grown:.2f} batches a worker",
                flush=True,
            )
