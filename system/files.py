"""Files written whole or not at all, and folders reserved for one program at a time."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no file locks
    fcntl = None

PART = ".part"  # ending of a hidden file that is being written


def check_writable(folder):
    """Raise ValueError unless `folder`, which need not exist yet, can be written to; creates nothing."""
    folder = Path(folder).absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: cannot be written, {existing} is no writable folder; give another path")


@contextlib.contextmanager
def write_atomic(path, mode="wb"):
    """Yield an open file that becomes `path`, complete and on disk, when the block ends without an error.

    Mode "w" is UTF-8 text. Until then the bytes are in a hidden file in the same folder. Its name is random
    and it is created exclusively, so that no link planted there is followed and two writers never share it;
    the last one to finish wins. The writer holds a lock on it: what a killed writer left behind is removed
    by the next one. A link at `path` is replaced, not followed. Raises OSError that names `path`.
    """
    path = Path(path)
    place = path.parent.resolve()  # /dev/stdout may be a link to a file: the link itself would be replaced
    is_device = place == Path("/dev") or place.parts[:2] == ("/", "proc")
    if is_device or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "a folder or a device, expected a file", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_parts(path.parent.resolve())
        part, file = _make_part(path, mode)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows only renames closed files
                os.replace(part, path)  # still locked, so that nobody takes it for a leftover
                _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is not None and not str(error.filename).endswith(PART):
            raise  # it names another file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _make_part(path, mode):
    """Create and lock a file with a random name in the folder of `path`: (its path, the open file)."""
    while True:
        # part of the name shows people what it is; the whole name could be too long
        part = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}{PART}")
        with contextlib.suppress(FileExistsError):
            file = open(part, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
            # before it was locked it may have been removed as a leftover: then create another one
            if _lock(file) and os.fstat(file.fileno()).st_nlink:
                return part, file
            file.close()


def _lock(file):
    """Try to lock a file; returns whether we hold the lock, also True where locks do not exist."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # neither all file systems nor Windows have locks
        return True
    return True


@functools.cache  # once for each folder, which may hold very many files
def sweep_parts(folder):
    """Remove the unfinished files that killed writers left in a folder."""
    for part in folder.glob(f".*{PART}"):
        if not re.fullmatch(rf"\..+\.[0-9a-f]{{16}}{PART}", part.name) or part.is_symlink():
            continue
        with contextlib.suppress(OSError):  # it belongs to a living writer or to another user
            if fcntl is None:
                part.unlink()  # Windows does not remove open files
                continue
            with open(part, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def _sync_folder(folder):
    """Make sure that a rename in this folder is on disk; not every file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def sole_use(folder, patience_s=5.0):
    """Reserve `folder`, created if missing, for this process; ValueError names a process that has it already.

    The lock ends with the process, however that ends. We wait a little for another process, which may be
    ending just now.
    """
    path = Path(folder) / ".lock"
    deadline = time.monotonic() + patience_s
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            while not _lock(file):
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = " ".join(file.read(200).split()) or "another process"
                    raise ValueError(
                        f"{folder}: in use by {holder}; wait for its end, or give another folder"
                    )
                time.sleep(0.1)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # the process before us finished and removed the folder
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield
            return


def sha256(path):
    """SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_lines(path):
    """The lines of a text file, none if it is missing; bytes that are not UTF-8 are replaced."""
    path = Path(path)
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def load_json(path):
    """The value in a .json file; OSError for what is no regular file, ValueError for what is no JSON."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "a folder, pipe or device, expected a file", str(path))
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path, values):
    """Write values to a .json file, whole or not at all."""
    with write_atomic(path, "w") as file:
        file.write(json.dumps(values, indent=1) + "\n")


def append_json(path, record):
    """Append a line to a .jsonl file, after ending a last line that was cut short. OSError names the file."""
    try:
        with open(path, "a+b", buffering=0) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            line = start + json.dumps(record).encode() + b"\n"
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
