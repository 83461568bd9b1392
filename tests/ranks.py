"""The processes of a program as torchrun starts them, for tests."""

import faulthandler
import functools
import multiprocessing
import os
import random
import signal
import socket
import sys
import time

import waves
from utils import run_program

# A server process loads torch once and forks each process in milliseconds. pytest itself is never forked:
# it has threads, and locks that it shares with the forked ones (tqdm's): a killed process would keep them.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["infer", "synth"])
WAIT_S = 120


def simulate_at_once(vel, n_samples=1000):
    """Something like gathers (B, 5, 1000, 70) of maps."""
    return (vel[:, :, :1] / 1000).repeat(1, 5, 1000, 1)


def nothing(rank):
    """What a process does before the program, unless a test says otherwise."""


def free_port():
    """A port below those that the system gives to connections of its own."""
    while True:
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port := random.SystemRandom().randint(20_000, 32_000)))
            except OSError:
                continue
            return port


def run_rank(main, words, env, log, before):
    """Run a program as one of several processes, its output in the file `log`; never returns."""
    code = 1
    try:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        for number in (1, 2):
            os.dup2(sys.stdout.fileno(), number)
        faulthandler.dump_traceback_later(WAIT_S - 10)  # says where it hangs
        os.environ.update(env)
        waves.simulate = simulate_at_once
        sys.argv = ["program.py", *words]
        before(int(env["RANK"]))
        run_program(main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(f"traceback of {error!r}")
    finally:
        os._exit(code)


class Ranks:
    """Processes that run a program together."""

    def __init__(self, main, words, world, folder, before=nothing):
        """before(rank): called in each process before the program; a function of a module."""
        self.logs = [folder / f"log{time.monotonic_ns()}-{rank}" for rank in range(world)]
        env = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": free_port()}
        start = functools.partial(run_rank, main, [str(word) for word in words])
        self.processes = []
        for rank, log in enumerate(self.logs):
            mine = {name: str(value) for name, value in (env | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            self.processes.append(SERVER.Process(target=start, args=(mine, log, before), daemon=True))
            self.processes[-1].start()

    def wait(self, timeout=WAIT_S):
        """Exit codes by rank, negative for signals; what they printed, by rank."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        if self.are_running():
            self.kill()
            raise AssertionError("waited too long:\n" + "\n".join(self.printed()))
        return [process.exitcode for process in self.processes], self.printed()

    def are_running(self):
        return any(process.is_alive() for process in self.processes)

    def printed(self):
        return [log.read_text() if log.exists() else "" for log in self.logs]

    def kill(self, ranks=None):
        for rank in range(len(self.processes)) if ranks is None else ranks:
            self.processes[rank].kill()


def kill_this_process(*args, **fields):
    os.kill(os.getpid(), signal.SIGKILL)
