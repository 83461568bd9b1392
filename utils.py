"""What every program needs: processes and devices, signals, files written whole."""

import contextlib
import ctypes
import datetime
import difflib
import errno
import functools
import hashlib
import json
import os
import random
import re
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

try:
    import fcntl
except ImportError:  # Windows: no file locks
    fcntl = None

FAMILIES = (  # OpenFWI's ten families, in its own order
    *("FlatVel_A", "FlatVel_B", "CurveVel_A", "CurveVel_B", "FlatFault_A", "FlatFault_B"),
    *("CurveFault_A", "CurveFault_B", "Style_A", "Style_B"),
)

V_MIN, V_MAX = 1500.0, 4500.0  # OpenFWI's velocity range, m/s

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def mirror_survey(seis):
    """Reverse the survey left to right: (B, S, T, R) -> (B, S, T, R).

    Sources and receivers swap ends; time is untouched. Exact only when the
    source positions are symmetric: OpenFWI's centre source (cell 34) is not.
    """
    return seis.flip(1, 3)


def check_family(name):
    """Return `name` if it is one of OpenFWI's ten; raises ValueError with the nearest one."""
    if name not in FAMILIES:
        lower = {family.lower(): family for family in FAMILIES}
        near = difflib.get_close_matches(name.lower(), lower, 1)
        hint = f"; did you mean {lower[near[0]]}?" if near else ""
        raise ValueError(f"unknown family {name!r}{hint} (all: {', '.join(FAMILIES)})")
    return name


# ---------------------------------------------------------------- programs, processes, devices


def run_program(main):
    """Run `main(argv)`; bad input and what cannot go on is one line on stderr and exit code 2.

    `python -X dev PROGRAM` shows the traceback instead.
    """
    global _is_program
    for stream in (sys.stdout, sys.stderr):  # what their encoding lacks is written as \\xd7, not an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        _is_program = True
        main(sys.argv[1:])
    except KeyboardInterrupt:
        say_on_stderr(f"{Path(sys.argv[0]).name}: interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # as by `| head`
        drop_output()
        say_on_stderr(
            f"{Path(sys.argv[0]).name}: stopped, for nobody reads its output any more; what is done is kept: "
            "give the same command again, its output to a file"
        )
        sys.exit(128 + SIGPIPE)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        if sys.flags.dev_mode:
            raise
        rank = os.environ.get("RANK", "0")
        where = Path(sys.argv[0]).name + ("" if rank == "0" else f" [rank {rank}]")
        print(f"{where}: error: {reason_of(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        _is_program = False
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # all is done, only the last lines are not read
        drop_output()


def reason_of(error):
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: cannot be read or written ({error.strerror}); give another path"
    # a loader's worker process sends its whole traceback: the last line is the reason
    reason = str(error).rpartition("Error: ")[2] if "Original Traceback" in str(error) else str(error)
    return " ".join(reason.split())


_is_program = False


def is_program():
    """Whether this process runs one of our programs, and is ours to tune; else it called us as a library."""
    return _is_program


OLD_CARDS = "https://download.pytorch.org/whl/cu126"  # torch for P100 (6.0) and V100 (7.0), too
SIGPIPE = 13  # Windows has none


def drop_output():
    """Send standard output nowhere, for its reader is gone: Python would fail once more at its exit."""
    with contextlib.suppress(OSError, ValueError):  # a notebook's has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_on_stderr(line):
    """Write a line to standard error, where there is one: its terminal may be closed."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


class Stopped(SystemExit):
    """The program ends for a signal, all that is done being kept."""


class StopSignals:
    """Within this context the first SIGINT, SIGTERM or SIGHUP is noted, and a second one ends the program.

    A program asks `number`, or calls `check`, at points where all that is done is kept. Signals reach the
    main thread alone: in another one nothing is changed.
    """

    def __init__(self, waits_for):
        """waits_for: what the line says that follows the first signal, as "the current step"."""
        self.waits_for, self.number, self.before = waits_for, 0, {}
        # within which a second signal is the first one's echo: a terminal sends Ctrl-C to torchrun and all
        # its processes, and torchrun passes it on to these
        self.echo_s = 3.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self.first_s = None  # when the first one came

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
            for number in numbers:  # Windows has no SIGHUP; `nohup` has it ignored
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        is_loss = self.number and isinstance(error, ConnectionError)  # another process has stopped first
        if (is_loss or isinstance(error, Stopped)) and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(self.number).name  # said now that progress bars have ended their lines
            say_on_stderr(f"stopped by {name}; what is done is kept: the same command continues")
        if is_loss:
            raise Stopped(128 + self.number) from None

    def _catch(self, number, frame):
        if self.first_s is not None:
            if time.monotonic() - self.first_s >= self.echo_s:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self.first_s = number, time.monotonic()
        # no print: it may have been interrupted in the midst of another one
        name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            say_on_stderr(f"\n{name}: waiting for {self.waits_for}; once more ends at once")

    def check(self):
        """Exit where a signal has come, saying how to go on."""
        if self.number:
            raise Stopped(128 + self.number)


@dataclass
class Process:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: dist.Store | None = None  # of all processes of this start, where there are several

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
def settings_restored():
    """Leave torch and Python set as they were: threads, TF32, determinism, the current card."""
    card = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    n_threads, switch_s = torch.get_num_threads(), sys.getswitchinterval()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        sys.setswitchinterval(switch_s)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic)
        if card is not None:
            torch.cuda.set_device(card)


@contextlib.contextmanager
def processes(cfg, backend=None):
    """Join torchrun's process group where there is one; yields this `Process`.

    backend: None is NCCL on CUDA and gloo elsewhere. Raises ValueError when a device is asked for
    that is not there.
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
    """Join torchrun's process group; returns a store of this group's own."""
    store, rank, world = next(rendezvous("env://"))
    store = fresh_store(store, rank, world)
    timeout = datetime.timedelta(hours=4)  # rank 0 may simulate a data set while the others wait
    group_store = dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=world, timeout=timeout)
    return dist.PrefixStore("ours", store)


def fresh_store(store, rank, world):
    """The part of torchrun's store that belongs to this start alone.

    Processes that torchrun has restarted find the lost ones' addresses in the store, and would wait for them
    for ever; machines do not count restarts alike. So rank 0 draws a name, and tells it to each process that
    introduces itself by a name of its own, until all have used it.
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
            elif store.check([f"hello {other}"]):  # a lost process's, perhaps: then the next one is answered
                store.set(f"answer {store.get(f'hello {other}').decode()}", name)
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def keep_memory():
    """Keep freed memory for the next step; glibc gives large blocks back, and each page costs a fault."""
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    except (OSError, TypeError):  # Windows has no library of the process itself
        return
    if mallopt and mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def pick_device(name, local_rank=0):
    """auto, cpu, cuda or mps -> torch.device; raises ValueError where it is not there, or cannot be used."""
    if name in ("auto", "cuda"):
        check_driver()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        n_cards = torch.cuda.device_count()
        if local_rank >= n_cards:
            raise ValueError(
                f"process {local_rank + 1} of this machine has no card: {n_cards} CUDA devices found; "
                f"start at most {n_cards} processes, or use --device=cpu"
            )
        check_card(local_rank)
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device=mps: no MPS device here; use --device=auto")
    return torch.device(name)


def check_driver():
    """Raise ValueError where there is a card that its driver keeps torch from using, such as one too old."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "no NVIDIA driver" not in reason and "No CUDA GPUs" not in reason:
            raise ValueError(
                f"the CUDA card cannot be used: {reason.partition('. ')[0]}; update its driver, install a "
                f"torch for an older CUDA than {torch.version.cuda}, or use --device=cpu"
            ) from None


def check_card(index):
    """Raise ValueError unless this torch holds code that card `index` can run."""
    card = torch.cuda.get_device_capability(index)
    names = [arch.rstrip("af").split("_") for arch in torch.cuda.get_arch_list()]  # as sm_90a, compute_120
    built = [(kind, (int(number[:-1]), int(number[-1]))) for kind, number in names]
    # machine code serves later minor versions, PTX ("compute") all later cards
    if not built or any(c <= card and (kind == "compute" or c[0] == card[0]) for kind, c in built):
        return
    remedy = "a newer torch"
    if card < min(capability for _, capability in built):
        remedy = f"a torch for older cards: pip install torch torchvision --index-url {OLD_CARDS}"
    raise ValueError(
        f"{torch.cuda.get_device_name(index)} has compute capability {card[0]}.{card[1]}, and torch "
        f"{torch.__version__} is built for {', '.join(f'{a}.{b}' for _, (a, b) in built)}; "
        f"install {remedy}, or use --device=cpu"
    )


def to_device(tensor, device):
    """A CPU tensor on a device, without waiting for what is queued on a CUDA card."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # from memory that is not pinned, the copy would wait; on MPS, one that does not wait may be corrupt
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A tensor's values for the CPU: copied from a card when the work queued so far is done.

    `get` waits for that, not for what is queued after the copy.
    """

    def __init__(self, tensor):
        self.values, self.event = tensor, None
        if tensor.device.type == "cuda":
            self.values = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.current_stream(tensor.device).record_event()

    def get(self):
        if self.event is not None:
            self.event.synchronize()
        return self.values


AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # the others compute as they are


def pick_precision(name, device):
    """Resolve `auto` and switch TF32: float32, tf32, bfloat16 or float16.

    auto is the 16 bits a CUDA card computes natively, and float32 elsewhere: on
    CPUs bfloat16 was measured slower. Raises ValueError for what the device lacks.
    """
    on_cuda = device.type == "cuda"
    has_bfloat16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = ("bfloat16" if has_bfloat16 else "float16") if on_cuda else "float32"
    if name == "tf32" and not on_cuda:
        raise ValueError(f"--precision=tf32 is CUDA's, this is {device.type}; use float32 or bfloat16")
    if name == "bfloat16" and on_cuda and not has_bfloat16:
        raise ValueError("--precision=bfloat16: this card only emulates it; use float16")
    if name in AUTOCAST:
        try:
            with torch.autocast(device.type, dtype=AUTOCAST[name]):
                torch.nn.functional.conv2d(*torch.ones(2, 1, 1, 3, 3, device=device))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--precision={name} does not work on {device.type} here ({reason}); use float32"
            ) from None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---------------------------------------------------------------- files and folders


def check_writable(folder):
    """Raise ValueError unless `folder`, there or not yet, may be written to; makes nothing."""
    folder = Path(folder).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: cannot be written, {there} is no writable folder; give another path")


@contextlib.contextmanager
def write_atomic(path, mode="wb"):
    """Yield an open file that becomes `path`, on disk and whole, when the block ends well.

    Mode "w" is UTF-8 text. Until then the bytes lie beside `path` in a hidden file with a random name, made
    exclusively, so that no link planted there is followed and two writers never share one; the last to end
    wins. Its writer holds a lock on it: what a killed one left behind is removed by the next to write there.
    A link at `path` is replaced, not followed. Raises OSError that names `path`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
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
                    file.close()  # Windows renames closed files only
                os.replace(part, path)  # still locked, so that nobody takes it for a leftover
                _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is not None and not str(error.filename).endswith(PART):
            raise  # it names another file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


PART = ".part"  # of a hidden file that is being written


def _make_part(path, mode):
    """Make and lock a file beside `path` under a name that nobody can foresee: (its path, the open file)."""
    while True:
        # a part of the name tells people what it is; the whole could be too long for one
        part = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}{PART}")
        with contextlib.suppress(FileExistsError):
            file = open(part, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
            # between its making and its locking it could be taken for a leftover: then make another
            if _lock(file) and os.fstat(file.fileno()).st_nlink:
                return part, file
            file.close()


def _lock(file):
    """Whether we hold the file's lock now; where there are no locks, we do."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # this file system, or Windows, has none
        return True
    return True


@functools.cache  # once a folder and program: a folder may hold very many files
def sweep_parts(folder):
    """Remove what killed writers left in a folder."""
    for part in folder.glob(f".*{PART}"):
        if not re.fullmatch(rf"\..+\.[0-9a-f]{{16}}{PART}", part.name) or part.is_symlink():
            continue
        with contextlib.suppress(OSError):  # that of a living writer, or of another user
            if fcntl is None:
                part.unlink()  # Windows removes no file that is open
                continue
            with open(part, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def _sync_folder(folder):
    """Bring a rename to the disk; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def sole_use(folder, patience_s=5.0):
    """Keep `folder`, made where missing, for this process; ValueError tells who else is writing there.

    The lock ends with the process, however it ends. Another's is waited for a little: it may be dying.
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
                continue  # its last user ended well and removed it
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
    """The lines of a text file, none where it is missing; what is not UTF-8 is replaced."""
    path = Path(path)
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def write_json(path, values):
    """Write values to a .json file, whole or not at all."""
    with write_atomic(path, "w") as file:
        file.write(json.dumps(values, indent=1) + "\n")


def append_json(path, record):
    """Append one line to a .jsonl file; OSError names it. A line that was cut short is ended first."""
    try:
        with open(path, "a+b", buffering=0) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            line = start + json.dumps(record).encode() + b"\n"
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
