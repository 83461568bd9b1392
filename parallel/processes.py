"""The processes that torchrun starts: joining them, and what each knows of the others."""

import contextlib
import datetime
import os
import secrets
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from system.devices import keep_memory, pick_device, settings_restored
from utils import is_program


@dataclass
class Process:
    """This process: its device, and its place among the processes that were started together."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: dist.Store | None = None  # shared by all processes, if there are several

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor):
        """Sum of `tensor` over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def processes(cfg, backend=None):
    """Join torchrun's process group if there is one; yields this `Process`.

    backend: None means NCCL on CUDA and gloo elsewhere. Raises ValueError for a device that is missing.
    """
    env = {name: int(os.environ.get(name, default)) for name, default in
           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))}  # fmt: skip
    with settings_restored():
        device = pick_device(cfg.device, env["LOCAL_RANK"])
        torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // env["LOCAL_WORLD_SIZE"]))
        if device.type == "cpu" and is_program():
            keep_memory()
        store = None
        if env["WORLD_SIZE"] > 1:
            store = join_group(backend or ("nccl" if device.type == "cuda" else "gloo"))
        try:
            yield Process(device, env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], store)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def join_group(backend):
    """Join torchrun's process group; returns the store that its processes share."""
    store, rank, world = next(rendezvous("env://"))
    store = fresh_store(store, rank, world)
    timeout = datetime.timedelta(hours=4)  # rank 0 may simulate a data set while the others wait
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=world, timeout=timeout)
    return dist.PrefixStore("ours", store)


def fresh_store(store, rank, world):
    """A part of torchrun's store that belongs to this start only.

    When torchrun restarts processes, they find the addresses of the lost ones in the store and would wait for
    them for ever; the count of restarts does not help, since machines count differently. So rank 0 draws a
    name for this start. Each other process says hello by a name of its own, and rank 0 answers with the name
    of the start until all processes have used it.
    """
    name = secrets.token_hex(8)
    if rank:
        store.set(f"hello {rank}", name)
        started = store.get(f"answer {name}").decode()
        store.set(f"{started} {rank}", "")
        return dist.PrefixStore(started, store)
    awaited = set(range(1, world))
    while awaited:
        for other in sorted(awaited):
            if store.check([f"{name} {other}"]):
                awaited.discard(other)
            elif store.check(
                [f"hello {other}"]
            ):  # perhaps of a lost process: its successor will say hello too
                store.set(f"answer {store.get(f'hello {other}').decode()}", name)
        time.sleep(0.05)
    return dist.PrefixStore(name, store)
