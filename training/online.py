"""Online simulation: training pairs simulated while training, in place of a share of those from files.

The pairs come in chunks, see `training/chunks.py`. On CUDA a thread simulates them ahead on the training
device; elsewhere processes fill a folder of files in OpenFWI's format, which later runs reuse.
"""

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from openfwi.npy import GATHER_SHAPE, MAP_SHAPE, check_shape, read_header
from system.devices import to_device
from system.files import check_writable, write_atomic
from training.chunks import N_PAIRS, exact_pairs, make_plan
from utils import FAMILIES

CHUNK_BYTES = N_PAIRS * math.prod(GATHER_SHAPE) * 2  # gathers in float16

# ---------------------------------------------------------------- which sample goes where


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The places in the global batch for simulated samples, called lanes, each with chunks of its own.

    There are share × global batch lanes, rounded up; the last one may take part in some steps only. A lane
    keeps its place, hence its rank, and the samples of a step are the same on any number of ranks.
    """

    share: float
    global_batch: int
    n_chunks: int | None  # in the cache, used in turn; None = always new ones

    @property
    def n(self):
        return math.ceil(self.share * self.global_batch)

    def place(self, lane):
        return lane * self.global_batch // self.n

    def sample(self, lane, step):
        """(chunk, index in it) of a lane in a step, or None if it takes no part."""
        part = min(self.share * self.global_batch - lane, 1)
        visit = math.floor(step * part)
        if math.floor((step + 1) * part) == visit:
            return None
        chunk = visit // N_PAIRS * self.n + lane
        return chunk if self.n_chunks is None else chunk % self.n_chunks, visit % N_PAIRS

    def chunks(self, mine, steps):
        """Yield (lane, chunk) in the order in which the lanes `mine` need them in these steps."""
        now = {}
        for step in steps:
            for lane in mine:
                if (found := self.sample(lane, step)) and now.get(lane) != found[0]:
                    now[lane] = found[0]
                    yield lane, found[0]


# ---------------------------------------------------------------- chunks made ahead


class Simulated:
    """Chunks that a thread simulates on the training device, up to `ahead` of them in advance."""

    def __init__(self, plan, chunks, device, ahead):
        self.plan, self.chunks, self.device = plan, chunks, device
        self.queue, self.held, self.closed = queue.Queue(ahead), {}, False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            on_cuda = self.device.type == "cuda"
            if on_cuda:
                torch.cuda.set_device(self.device)  # a new thread's is card 0
            stream = torch.cuda.Stream(self.device) if on_cuda else None
            for lane, k in self.chunks:
                with torch.cuda.stream(stream):
                    pairs = exact_pairs(to_device(torch.from_numpy(self.plan.velocity(k)), self.device))
                    event = stream.record_event() if stream else None
                self.queue.put((lane, k, pairs, event))
                if self.closed:
                    return
        except Exception as error:  # whatever it is, the training thread reports it
            self.queue.put(error)

    def sample(self, lane, k, index):
        """seis (5, 1000, 70) and vel (1, 70, 70) of a chunk. Raises ChildProcessError if that failed."""
        while self.held.get(lane, (None,))[0] != k:
            made = self.queue.get()
            if isinstance(made, Exception):
                self.queue.put(made)  # for the next call
                raise ChildProcessError(f"online simulation stopped: {made}") from made
            made_lane, number, pairs, event = made
            if event:
                torch.cuda.current_stream(self.device).wait_event(event)
                for tensor in pairs:
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            self.held[made_lane] = number, pairs
        return tuple(tensor[index] for tensor in self.held[lane][1])

    def close(self):
        self.closed = True
        while self.thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self.queue.get(timeout=0.1)


class Cached:
    """Chunks that separate processes write into a folder; those already there are reused.

    Raises ValueError if there is no room for them.
    """

    def __init__(self, plan, chunks, folder, n_workers, n_chunks):
        self.plan, self.folder = plan, Path(folder) / plan.key()
        check_writable(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        need = (n_chunks - len(list(self.folder.glob("*/data/*.npy")))) * CHUNK_BYTES
        if need > (free := shutil.disk_usage(self.folder).free):
            raise ValueError(
                f"{self.folder}: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} free; lower --online_pairs, or "
                "give another folder by --online_cache"
            )
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would inherit threads in the middle of their work
        self.workers = [
            context.Process(target=fill, args=(plan, self.folder, chunks, w, n_workers), daemon=True)
            for w in range(n_workers)
        ]
        for worker in self.workers:
            worker.start()

    def sample(self, lane, k, index):
        """seis (5, 1000, 70) and vel (1, 70, 70) of a chunk. Raises ChildProcessError if no one makes it."""
        seis, vel = chunk_files(self.plan, self.folder, k)
        while True:
            codes = [worker.exitcode for worker in self.workers]  # first, so that its last file is not missed
            if seis.exists():
                break
            if any(codes) or None not in codes:
                raise ChildProcessError(
                    f"{seis}: missing, and the simulating processes ended with exit codes {codes}; see their "
                    "message above; --resume goes on from the last checkpoint"
                )
            time.sleep(0.02)
        arrays = (
            check_shape(read_header(path), [(N_PAIRS, *shape)], "a chunk")
            for path, shape in ((seis, GATHER_SHAPE), (vel, MAP_SHAPE))
        )
        return tuple(torch.from_numpy(np.array(array[index])) for array in arrays)

    def close(self):
        for worker in self.workers:
            worker.terminate()
            worker.join()


def chunk_files(plan, folder, k):
    """Seismic and velocity file of chunk k, named as OpenFWI's."""
    family = folder / plan.family(k)[0]
    return family / "data" / f"data{k + 1}.npy", family / "model" / f"model{k + 1}.npy"


def fill(plan, folder, chunks, worker, n_workers):
    """Simulate every n-th missing chunk, n = n_workers, in a process of its own, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal, which the parent handles
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit()
    )  # by an exception, so that unfinished files are removed
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)
    torch.set_num_threads(1)
    seen = set()
    try:
        for _, k in chunks():
            if k in seen:
                continue
            seen.add(k)
            seis_file, vel_file = chunk_files(plan, folder, k)
            if len(seen) % n_workers != worker or seis_file.exists():
                continue
            seis, vel = exact_pairs(torch.from_numpy(plan.velocity(k)))
            for path, values in ((vel_file, vel.numpy()), (seis_file, seis.numpy().astype(np.float16))):
                with write_atomic(path) as file:
                    np.save(file, values)
            if not multiprocessing.parent_process().is_alive():
                return
    except (ValueError, OSError, MemoryError) as error:
        print(f"online simulation: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


# ---------------------------------------------------------------- mixing into training batches


def cache_folder(cfg):
    """The folder of the pairs that are kept on disk."""
    return cfg.online_cache or str(Path(cfg.run_root, "online_cache"))


class Online:
    """Puts simulated samples into training batches. Use it in a `with`."""

    def __init__(self, cfg, process, items, steps):
        plan, world_batch = make_plan(cfg, items), cfg.batch_size * process.world
        global_batch = world_batch * cfg.accumulate
        on_cuda = process.device.type == "cuda"
        n_lanes = math.ceil(cfg.online * global_batch)
        n_needed = n_lanes * (steps.stop // N_PAIRS + 1)
        n_chunks = min(max(cfg.online_pairs // N_PAIRS, n_lanes), n_needed)
        self.lanes = Lanes(cfg.online, global_batch, None if on_cuda else n_chunks)
        places = {self.lanes.place(lane): lane for lane in range(n_lanes)}
        # place in the global batch -> lane, of this rank only
        self.mine = {
            p: lane for p, lane in places.items() if p % world_batch // cfg.batch_size == process.rank
        }
        chunks = functools.partial(self.lanes.chunks, tuple(self.mine.values()), steps)
        if on_cuda:
            # one for each lane: all lanes come to their next chunks at the same step
            self.made = Simulated(plan, chunks(), process.device, len(self.mine))
        else:
            self.made = Cached(plan, chunks, cache_folder(cfg), cfg.online_workers, n_chunks)

    def mix(self, step, first_place, seis, vel, family):
        """Replace this step's share of a batch in place; `first_place` is its place in the global batch."""
        found = {i: self.sample_at(step, first_place + i) for i in range(len(seis))}
        found = {i: where for i, where in found.items() if where}
        for i, where in found.items():
            seis[i], vel[i] = self.made.sample(*where)
        if found:
            numbers = [FAMILIES.index(self.made.plan.family(chunk)[0]) for _, chunk, _ in found.values()]
            rows, numbers = (to_device(torch.tensor(n), family.device) for n in (list(found), numbers))
            family.index_copy_(0, rows, numbers)

    def sample_at(self, step, place):
        """(lane, chunk, index in it) of the sample simulated for a place of this rank, or None."""
        lane = self.mine.get(place)
        found = None if lane is None else self.lanes.sample(lane, step)
        return found and (lane, *found)

    def name(self, step, place):
        """What was simulated for a place, for messages, or None."""
        found = self.sample_at(step, place)
        return found and f"simulated {self.made.plan.family(found[1])[0]}, chunk {found[1]}[{found[2]}]"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.made.close()
