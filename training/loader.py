"""Training and validation samples: simulated or found, read ahead by threads, copied to the device."""

import functools
import math
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset

from data import Items, load_items
from openfwi.files import read_into
from openfwi.modes import MODE_SHAPES
from openfwi.npy import MAP_SHAPE
from synthetic.dataset import write_dataset
from system.devices import to_device
from training.augment import is_on
from training.sampler import TrainBatches
from utils import FAMILIES

MAX_REPLACEMENTS = 100  # tries to find a readable sample in place of a bad one


# ---------------------------------------------------------------- reading


class PairDataset(Dataset):
    """Items as (seis (5, T, R), vel (1, 70, 70) float32 m/s, family index, item index).

    seis is float32, or float16 if all files are, which halves the bytes to copy. A bad sample raises
    ValueError, unless `bad` is "replace" (take another one, chosen by its index) or "omit" (leave it out of
    the batch); `skipped` counts the bad reads of each file.
    """

    def __init__(self, items, bad="raise"):
        self.items = items if isinstance(items, Items) else Items.of(items)
        self.bad, self.skipped, self.lock = bad, {}, threading.Lock()
        self.finite = np.zeros(len(self.items), bool)  # which items were read and checked
        used = [self.items.pairs[k] for k in np.unique(self.items.rows[:, 0])]
        self.dtype = torch.float16 if all(pair.is_half for pair in used) else torch.float32
        modes = {pair.mode: pair for pair in used}
        if len(modes) > 1:
            raise ValueError(
                f"{modes.popitem()[1].seis}: another input mode than {modes.popitem()[1].seis}: packed and "
                "unpacked files do not mix; give files of one kind, or pack the others too"
            )
        self.shape = MODE_SHAPES[next(iter(modes), "full")]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        seis, vel, family, index = self.read_batch([i])
        return seis[0], vel[0], int(family), int(index)

    def read_batch(self, indices, memory=torch.empty):
        """Read items as a batch of tensors, each directly into its place in `memory(n, dtype=...)`."""
        n, n_seis = len(indices), math.prod(self.shape) * self.dtype.itemsize
        both = memory(n * (n_seis + 4 * math.prod(MAP_SHAPE)), dtype=torch.uint8)
        seis = both[: n * n_seis].view(self.dtype).view(n, *self.shape)
        vel = both[n * n_seis :].view(torch.float32).view(n, *MAP_SHAPE)
        read = []
        seis_rows, vel_rows = seis.numpy(), vel.numpy()  # views of the same memory
        for i in indices:
            i = self.read_one(i, seis_rows[len(read)], vel_rows[len(read)])
            read += [] if i is None else [i]
        family = [FAMILIES.index(self.items[i][0].family) for i in read]
        family, index = (torch.tensor(numbers, dtype=torch.long) for numbers in (family, read))
        return seis[: len(read)], vel[: len(read)], family, index

    def read_one(self, i, seis, vel):
        """Read item i, or its replacement, into the arrays; returns the item that was read, or None."""
        for n_tries in range(MAX_REPLACEMENTS):
            pair, index = self.items[i]
            try:
                # need not be checked twice, since files that change are refused
                read_into(pair, index, seis, vel, check=not self.finite[i])
                self.finite[i] = True
                return i
            except ValueError as error:
                if self.bad == "raise":
                    raise
                self.count(pair, error)
            if self.bad == "omit":
                return None
            i = int(np.random.default_rng((i, n_tries)).integers(len(self)))
        raise ValueError(f"{MAX_REPLACEMENTS} samples in a row cannot be read, the last of {pair.seis}")

    def count(self, pair, error):
        """Count a bad read; the first of a file is printed."""
        with self.lock:
            if pair.seis not in self.skipped:
                print(f"skipped: {error}", flush=True)
            self.skipped[pair.seis] = self.skipped.get(pair.seis, 0) + 1


class Recycled:
    """Memory for batches, reused when no tensor holds it any more: new memory costs a page fault per page."""

    def __init__(self, n_kept):
        self.n_kept, self.kept, self.lock = n_kept, [np.empty(0, np.uint8)], threading.Lock()
        self.idle = self.holders(0)

    def holders(self, k):
        return sys.getrefcount(self.kept[k])  # a tensor made from the array counts as a reference

    def __call__(self, n, dtype):
        for pause_ms in (1, 2, 4, 8, 16, 32, 64):
            with self.lock:
                for k in range(len(self.kept)):
                    if n <= self.kept[k].nbytes < 2 * n and self.holders(k) == self.idle:
                        return torch.from_numpy(self.kept[k][:n])
                if len(self.kept) <= self.n_kept:
                    self.kept.append(np.empty(n, np.uint8))
                    return torch.from_numpy(self.kept[-1])
            time.sleep(pause_ms / 1000)  # the last batch will be released soon
        return torch.empty(n, dtype=dtype)


class Loader:
    """Batches (seis, vel, family, item index), read ahead by `workers` threads, or on demand with 0 workers.

    Reading does not hold Python's lock, so threads are as fast as processes and need no copies between them.
    Each worker holds one batch. For a CUDA `device` batches are in pinned memory; with `ahead` they have been
    copied to the device, except for the item index, by another stream during the training step before.
    """

    def __init__(self, dataset, batch_sampler, workers, device=None, ahead=True):
        if device is not None and device.type != "cuda":
            device = None
        if workers:
            # a thread that has finished reading should get Python's lock at once, not after the usual 5 ms
            sys.setswitchinterval(min(sys.getswitchinterval(), 3e-4))
        self.dataset, self.batch_sampler, self.workers, self.device = dataset, batch_sampler, workers, device
        # torch itself reuses pinned memory once the copies from it have finished
        self.memory = (
            functools.partial(torch.empty, pin_memory=True) if device else Recycled(max(workers, 1) + 1)
        )
        self.stream = torch.cuda.Stream(device) if device and ahead else None

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        for batch, event in self.read_ahead() if self.workers else map(self.fetch, self.batch_sampler):
            if len(batch[-1]):  # empty if none of its samples could be read
                yield self.hand_over(batch, event)
                batch = None  # frees its memory while we wait for the next one

    def read_ahead(self):
        # new threads use card 0, where pinning memory would open a context
        on_card = {"initializer": torch.cuda.set_device, "initargs": (self.device,)} if self.device else {}
        pool, ahead = ThreadPoolExecutor(self.workers, "loader", **on_card), deque()
        try:
            for indices in self.batch_sampler:
                done = ahead.popleft().result() if len(ahead) == self.workers else None
                ahead.append(pool.submit(self.fetch, indices))
                if done is not None:
                    yield done
                    done = None
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def fetch(self, indices):
        """Read a batch; returns it with the event that marks its arrival on the device."""
        batch = self.dataset.read_batch(indices, self.memory)
        if self.stream is None:
            return batch, None
        with torch.cuda.stream(self.stream):
            moved = [to_device(t, self.device) for t in batch[:3]]
            return (*moved, batch[3]), self.stream.record_event()

    def hand_over(self, batch, event):
        """Make the caller's stream wait for the copy, and keep the memory until that stream is done."""
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for t in batch[:3]:
                t.record_stream(stream)
        return batch


# ---------------------------------------------------------------- samples and loaders of a run


def prepare_data(cfg, process):
    """Training and validation items; first simulates a data set if the configuration asks for one."""
    if cfg.synth_per_family:
        if process.is_main:
            families = cfg.families or FAMILIES
            write_dataset(
                cfg.data_root[0], families, cfg.synth_per_family, cfg.seed, "float16", device=cfg.device
            )
        process.barrier()
    train_items, val_items = load_items(cfg)
    if cfg.overfit:
        train_items = val_items = train_items[: cfg.overfit]
    if cfg.smoke:
        n_global = cfg.batch_size * cfg.accumulate * process.world
        train_items, val_items = train_items[: 3 * n_global], val_items[:n_global]
    if (cfg.online or is_on(cfg)) and any(pair.mode != "full" for pair in train_items.pairs):
        raise ValueError(
            "augmentation and online simulation need whole gathers, data_root holds a packed copy for "
            f"--mode={cfg.mode}; give the original files, or switch both off"
        )
    return train_items, val_items


def make_loaders(cfg, process, train_items, val_items):
    """Training and validation loaders; validation samples are divided among ranks without padding."""
    n_global = cfg.batch_size * cfg.accumulate * process.world
    if len(train_items) < n_global or not len(val_items):
        raise ValueError(
            f"{len(train_items)} training and {len(val_items)} validation samples, expected at least "
            f"{n_global} (batch_size × accumulate × processes) and 1; lower --batch_size or add files"
        )
    train = PairDataset(train_items, "replace" if cfg.skip_bad_files else "raise")
    batches = TrainBatches(len(train), cfg, process, train.items.families)
    mine = PairDataset(val_items[process.rank :: process.world], "omit" if cfg.skip_bad_files else "raise")
    starts = range(0, len(mine), cfg.batch_size)
    in_turn = [range(first, min(first + cfg.batch_size, len(mine))) for first in starts]
    return (
        Loader(train, batches, cfg.workers, process.device),
        Loader(mine, in_turn, cfg.workers, process.device, ahead=False),
    )
