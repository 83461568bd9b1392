"""What guards a training run: signals, non-finite steps."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import CPU, ROOT, SMALL

from networks.checkpoints import load_checkpoint
from parallel.processes import Process
from training.guards import Output, Stop


def test_a_signal_that_comes_while_the_ranks_agree_is_kept_for_the_next_step(monkeypatch):
    stop = None

    def reduce(number, op, group):
        if not stop.number:
            stop._catch(15, None)  # as Python runs a handler: on return from the wait for the others

    monkeypatch.setattr("training.guards.dist.new_group", lambda backend: backend)
    monkeypatch.setattr("training.guards.dist.all_reduce", reduce)
    stop = Stop(Process(torch.device("cpu"), world=2))
    assert [stop.agree(), stop.agree()] == [0, 15]


def running(two_families, root, *args):
    """`train.py` in a process of its own, once it has made its first step."""
    command = [sys.executable, "-u", "train.py", f"--data_root={two_families}", f"--run_root={root}", *SMALL]
    process = subprocess.Popen(
        [*command, "--batch_size=2", "--epochs=500", "--name=guarded", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None, process.stderr.read()
    return process


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE"])
def test_what_stops_a_run_loses_no_step_and_says_in_a_line_how_to_go_on(two_families, tmp_path, name):
    process = running(two_families, tmp_path)
    if name == "SIGPIPE":
        process.stdout.close()  # as `| head` does
    else:
        process.send_signal(getattr(signal, name))
        process.stdout.read()
    error = process.stderr.read()
    assert process.wait() == 128 + getattr(signal, name), error
    step = load_checkpoint(tmp_path / "001-guarded" / "last.pt")["progress"]["step"]
    cause = "nobody reading its output" if name == "SIGPIPE" else name
    assert error.endswith(f"stopped by {cause} after step {step}; go on: --resume={tmp_path}/001-guarded\n")
    lines = (tmp_path / "001-guarded" / "log.jsonl").read_text().splitlines()
    assert step == max(json.loads(line)["step"] for line in lines)
    assert len(error.strip().splitlines()) == (1 if name == "SIGPIPE" else 2), error


def test_a_second_ctrl_c_ends_a_run_whose_read_hangs(two_families, tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "from training import loader\n"
        "read = loader.read_into\n"
        "def hang(pair, index, seis, vel, check=True):\n"
        "    if [*train.sys.argv].count('hang') and index == 3:\n"
        "        print('hangs', flush=True)\n"
        "        time.sleep(600)\n"
        "    read(pair, index, seis, vel, check)\n"
        "loader.read_into = hang\n"
        "train.main(sys.argv[1:-1])\n"
    )
    words = [f"--data_root={two_families}", f"--run_root={tmp_path}", *SMALL, "--batch_size=2", "--workers=1"]
    process = subprocess.Popen(
        [sys.executable, script, *words, "hang"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.stdout.readline() != "hangs\n":
            assert process.poll() is None, process.stderr.read()
        time.sleep(1)  # the other batches are read and trained on
        process.send_signal(signal.SIGINT)
        while "waiting for the current step" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
    finally:
        process.kill()


def test_output_that_cannot_be_written_is_said_once_and_the_run_goes_on(capfd):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stop = Stop(CPU)
    output = Output(Full(), stop)
    for _ in range(2):
        print("lost", file=output, flush=True)
    assert stop.agree() == 0 and capfd.readouterr().err.count("standard output: not written (No space") == 1


def test_a_terminals_ctrl_c_and_torchruns_echo_of_it_are_one(monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        stop = Stop(CPU)
        with stop:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert stop.agree() == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


def test_stopping_from_another_thread_leaves_signals_and_output_alone():
    def look():
        with Stop(CPU):
            return sys.stdout

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() is sys.stdout
