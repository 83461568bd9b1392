"""Work shared by all processes that torchrun started: the same for each, taken piece by piece."""

import contextlib
import hashlib
import secrets
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import utils
from utils import reason_of

POLL_S = 0.05
SEEN_S = 10.0  # within which a file made on one machine is seen on another
LAST_WORDS_S = 5.0  # rank 0 has said by then why all end: torchrun ends it once another one has ended


@contextlib.contextmanager
def loss_explained():
    """Where another process is gone, raise ConnectionError, one line that says how to go on."""
    try:
        yield
    except RuntimeError as error:  # gloo's and the store's own
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"another process has ended ({reason}); what is done is kept: the same command continues"
        ) from None


def wait_for_all(process, pause=lambda: None):
    """Return once every process has come here; `pause()` is called meanwhile, and may raise.

    Raises ConnectionError where a process is gone.
    """
    if process.world == 1:
        return
    with loss_explained():
        arrival = dist.barrier(async_op=True)
    while not arrival.is_completed():
        pause()
        time.sleep(POLL_S)
    with loss_explained():
        arrival.wait()


def on_all(process, look):
    """What `look()` returns on each process, a list by rank.

    Where it raises ValueError or OSError on any, all end: rank 0 raises ValueError, in one line, and the
    others exit without a word.
    """
    if process.world == 1:
        return [look()]
    value = error = None
    try:
        value = look()
    except (ValueError, OSError) as raised:
        error = reason_of(raised)
    told = [None] * process.world
    with loss_explained():
        dist.all_gather_object(told, (value, error, socket.gethostname()))
    for rank, (_, error, host) in enumerate(told):
        if error:
            end_all(process, error if rank == 0 else f"process {rank} on {host}: {error}")
    return [value for value, *_ in told]


def made_on_all(process, make):
    """What `make()` returns here, once it has returned on every process; errors as with `on_all`."""
    made = []
    on_all(process, lambda: made.append(make()))
    return made[0]


def end_all(process, reason):
    """End every process, for a reason that all of them know."""
    if process.is_main:
        raise ValueError(reason)
    time.sleep(LAST_WORDS_S)
    raise SystemExit(2)


def from_main(process, value, pause=lambda: None):
    """Rank 0's `value`, on all processes."""
    if process.world == 1:
        return value
    wait_for_all(process, pause)
    values = [value]
    with loss_explained():
        dist.broadcast_object_list(values)
    return values[0]


def check_same(process, seen):
    """End all unless every process has seen the same as rank 0: {what it is: a value for JSON}."""
    told = on_all(process, lambda: (socket.gethostname(), seen))
    expected = told[0][1]
    for rank, (host, found) in enumerate(told):
        for what in expected:
            if found[what] != expected[what]:
                end_all(
                    process,
                    f"process {rank} on {host} has {what} = {found[what]}, process 0 has {expected[what]}; "
                    "start all with the same code, files and options",
                )


def check_shared(process, folder):
    """Return a name for this start, once every process has seen that `folder` is rank 0's, which is there.

    Otherwise all end, and rank 0 says which process sees another one.
    """
    name = on_all(process, lambda: secrets.token_hex(8))[0]
    sign = Path(folder, f"start-{name}.sign")

    def look():
        deadline = time.monotonic() + SEEN_S
        while not sign.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{sign.parent.absolute()}: not the folder that process 0 has here; name one that all "
                    "machines share"
                )
            time.sleep(POLL_S)

    if process.world > 1:
        on_all(process, lambda: sign.touch() if process.is_main else None)
        on_all(process, look)
        if process.is_main:
            sign.unlink()
    return name


def code_version():
    """A short hash of the project's source, whether it is committed or not; and torch's version."""
    root, digest = Path(utils.__file__).parent, hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py"), *root.glob("*/*.cpp")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{digest.hexdigest()[:16]}, torch {torch.__version__}"


def handed_out(process, name, pieces):
    """Yield the pieces of a list that this process takes, in order; each goes to one process.

    A slow process takes fewer. `name` tells this work from all other of this start; processes that see
    other pieces under it share nothing, and nothing is left out.
    """
    if process.world == 1:
        yield from pieces
        return
    key = f"{name} {hashlib.sha256(repr(pieces).encode()).hexdigest()}"
    while (k := add(process, key, 1) - 1) < len(pieces):
        yield pieces[k]


def add(process, name, n):
    """Add to a whole number that all processes share, from 0 on; returns its value then."""
    with loss_explained():
        return process.store.add(name, n)


class Total:
    """A whole number to which all processes add."""

    def __init__(self, process, name):
        self.process, self.name, self.value = process, name, 0

    def add(self, n=0):
        """Returns the value then."""
        self.value = self.value + n if self.process.world == 1 else add(self.process, self.name, n)
        return self.value


class Bar(tqdm):
    """A progress bar of what all processes have done, shown by rank 0."""

    def __init__(self, process, name, disable=False, **options):
        self.process, self.done, self.shown = process, Total(process, f"bar {name}"), 0
        super().__init__(disable=disable or not process.is_main, **options)
        self.initial = self.n

    def update(self, n=0):
        """Count `n` more done by this process, and show what the others have done meanwhile."""
        if n or self.process.is_main:  # at the end rank 0 may be gone already, and the store with it
            done = self.done.add(n)
            super().update(done - self.shown)
            self.shown = done
