"""Work that all processes share: each takes the next piece, and all fail together with one message."""

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
SEEN_S = 10.0  # a file made on one machine must be visible on the others within this time
ERROR_GRACE_S = 5.0  # time for rank 0 to print its error: torchrun kills it as soon as another process ends


@contextlib.contextmanager
def loss_explained():
    """If another process is gone, raise ConnectionError with one line that says how to continue."""
    try:
        yield
    except RuntimeError as error:  # raised by gloo and by the store
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"another process has ended ({reason}); what is done is kept: the same command continues"
        ) from None


def wait_for_all(process, pause=lambda: None):
    """Return when every process has called this; meanwhile `pause()` is called repeatedly and may raise.

    Raises ConnectionError if a process is gone.
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
    """Call `look()` on every process; returns the list of all results, by rank, on every process.

    If it raises ValueError or OSError on any process, all end: rank 0 raises ValueError, in one line, and the
    others exit silently.
    """
    if process.world == 1:
        return [look()]
    value = error = None
    try:
        value = look()
    except (ValueError, OSError) as raised:
        error = reason_of(raised)
    results = [None] * process.world
    with loss_explained():
        dist.all_gather_object(results, (value, error, socket.gethostname()))
    for rank, (_, error, host) in enumerate(results):
        if error:
            end_all(process, error if rank == 0 else f"process {rank} on {host}: {error}")
    return [value for value, *_ in results]


def made_on_all(process, make):
    """Call `make()` on every process and return this process's own result; errors as with `on_all`."""
    made = []
    on_all(process, lambda: made.append(make()))
    return made[0]


def end_all(process, reason):
    """End this process for a reason that all processes share: each of them calls this."""
    if process.is_main:
        raise ValueError(reason)
    time.sleep(ERROR_GRACE_S)
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
    """End all processes unless `seen`, {what it is: a value for JSON}, is the same on each of them."""
    results = on_all(process, lambda: (socket.gethostname(), seen))
    expected = results[0][1]
    for rank, (host, found) in enumerate(results):
        for what in expected:
            if found[what] != expected[what]:
                end_all(
                    process,
                    f"process {rank} on {host} has {what} = {found[what]}, process 0 has {expected[what]}; "
                    "start all with the same code, files and options",
                )


def check_shared(process, folder):
    """Check that every process sees the same existing `folder` as rank 0; returns a name for this start.

    Otherwise all processes end, and rank 0 says which one sees another folder.
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
    """Yield the pieces of a list that this process takes, in order; each piece goes to one process.

    A slow process takes fewer. `name` must differ from that of any other work of this start. Processes whose
    lists differ share nothing: each takes its whole list, so that no piece is left out.
    """
    if process.world == 1:
        yield from pieces
        return
    key = f"{name} {hashlib.sha256(repr(pieces).encode()).hexdigest()}"
    while (k := add(process, key, 1) - 1) < len(pieces):
        yield pieces[k]


def add(process, name, n):
    """Add `n` to a whole number that all processes share, which starts at 0; returns the sum."""
    with loss_explained():
        return process.store.add(name, n)


class Total:
    """A whole number to which all processes add."""

    def __init__(self, process, name):
        self.process, self.name, self.value = process, name, 0

    def add(self, n=0):
        """Add `n`; returns the sum."""
        self.value = self.value + n if self.process.world == 1 else add(self.process, self.name, n)
        return self.value


class Bar(tqdm):
    """A progress bar of what all processes have done, shown by rank 0."""

    def __init__(self, process, name, disable=False, **options):
        self.process, self.done, self.shown = process, Total(process, f"bar {name}"), 0
        super().__init__(disable=disable or not process.is_main, **options)
        self.initial = self.n

    def update(self, n=0):
        """Count `n` more pieces done by this process, and show what all have done."""
        if n or self.process.is_main:  # at the end rank 0 may have gone already, and the store with it
            done = self.done.add(n)
            super().update(done - self.shown)
            self.shown = done
