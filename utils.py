"""What everything shares: OpenFWI's families and velocities, and how programs start, stop and fail."""

import contextlib
import difflib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

FAMILIES = (  # OpenFWI's ten families, in its own order
    *("FlatVel_A", "FlatVel_B", "CurveVel_A", "CurveVel_B", "FlatFault_A", "FlatFault_B"),
    *("CurveFault_A", "CurveFault_B", "Style_A", "Style_B"),
)

V_MIN, V_MAX = 1500.0, 4500.0  # OpenFWI's velocity range, m/s
SIGPIPE = 13  # Windows has none


def check_family(name):
    """Return `name` if it is one of OpenFWI's ten; raises ValueError with the nearest one."""
    if name not in FAMILIES:
        lower = {family.lower(): family for family in FAMILIES}
        near = difflib.get_close_matches(name.lower(), lower, 1)
        hint = f"; did you mean {lower[near[0]]}?" if near else ""
        raise ValueError(f"unknown family {name!r}{hint} (all: {', '.join(FAMILIES)})")
    return name


def mirror_survey(seis):
    """Reverse the survey left to right: (B, S, T, R) -> (B, S, T, R).

    Sources and receivers swap ends; time is untouched. Exact only when the
    source positions are symmetric: OpenFWI's centre source (cell 34) is not.
    """
    return seis.flip(1, 3)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---------------------------------------------------------------- programs

_is_program = False


def run_program(main):
    """Run `main(argv)`. Errors that a user can mend become one line on stderr and exit code 2.

    `python -X dev PROGRAM` shows the traceback instead.
    """
    global _is_program
    for stream in (sys.stdout, sys.stderr):  # characters outside their encoding are written as \\xd7
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
            f"{Path(sys.argv[0]).name}: stopped, since nobody reads its output any more; what is done is "
            "kept: run the same command again and send its output to a file"
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
    except BrokenPipeError:  # the work is done; only its last lines were not read
        drop_output()


def reason_of(error):
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: cannot be read or written ({error.strerror}); give another path"
    # a loader's worker process sends its whole traceback: the last line is the reason
    reason = str(error).rpartition("Error: ")[2] if "Original Traceback" in str(error) else str(error)
    return " ".join(reason.split()) or type(error).__name__


def is_program():
    """Whether this process runs one of our programs, so that we may tune it; else it uses us as a library."""
    return _is_program


def drop_output():
    """Discard standard output, whose reader is gone: otherwise Python would fail once more as it exits."""
    with contextlib.suppress(OSError, ValueError):  # in a notebook it has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_on_stderr(line):
    """Write a line to standard error, unless its terminal has been closed."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


class Stopped(SystemExit):
    """The program ends because of a signal, after saving its work."""


class StopSignals:
    """A context that delays the first SIGINT, SIGTERM or SIGHUP; a second one ends the program at once.

    The program reads `number`, or calls `check`, wherever its work is saved and it can stop. Python handles
    signals in the main thread only: in any other thread this context changes nothing.
    """

    def __init__(self, waits_for):
        """waits_for: what the program finishes first, for the message, such as "the current step"."""
        self.waits_for, self.number, self.before = waits_for, 0, {}
        # A terminal sends Ctrl-C to torchrun and to all of its processes, and torchrun passes it on to them:
        # a second signal within this time is an echo of the first.
        self.echo_s = 3.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self.first_s = None  # time of the first signal

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
            name = signal.Signals(
                self.number
            ).name  # printed here, after progress bars have ended their lines
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
        # not by print, which the signal may have interrupted
        name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            say_on_stderr(f"\n{name}: waiting for {self.waits_for}; once more ends at once")

    def check(self):
        """Exit if a signal has arrived, and say how to continue."""
        if self.number:
            raise Stopped(128 + self.number)
