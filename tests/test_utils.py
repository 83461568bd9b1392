"""utils.py: family names, and how programs end."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from utils import StopSignals, check_family, run_program


def test_an_unknown_family_comes_with_the_nearest():
    assert check_family("Style_B") == "Style_B"
    with pytest.raises(ValueError, match="did you mean CurveFault_A"):
        check_family("Curvefault_a")


def test_errors_are_one_line_and_developers_get_the_traceback(monkeypatch, capsys):
    def fail(argv):
        raise ArithmeticError("a\nb")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run_program(fail)
    assert stop.value.code == 2 and capsys.readouterr().err == "train.py: error: a b\n"


def program(body):
    """A process that runs `body` as `main` of a program, ready once it has printed a line."""
    code = f"import sys, time, utils\nsys.argv = ['program.py']\ndef main(argv):\n    {body}\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}utils.run_program(main)"],
        cwd=ROOT,
        env=env,
        **pipes,
    )


def test_an_interruption_is_one_line():
    process = program("print('ready', flush=True); time.sleep(60)")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "program.py: interrupted\n" and process.returncode == 130


def test_a_second_signal_ends_a_program_that_hangs():
    body = "print('ready', flush=True); utils.StopSignals('the read').__enter__(); print('go', flush=True); "
    process = program(body + "[time.sleep(60) for _ in range(9)]")
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stderr.readline()  # the empty one that ends a progress bar's
    assert process.stderr.readline() == "SIGINT: waiting for the read; once more ends at once\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


def test_signals_that_are_ignored_and_those_of_other_threads_stay_as_they_are():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals("nothing"):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(StopSignals("nothing").__enter__).result().before == {}


@pytest.mark.parametrize(
    "body, code, said",
    [
        (
            "print('ready', flush=True); [print('x' * 9999) for _ in range(99)]",
            141,
            "stopped, since nobody reads",
        ),
        ("print('ready', flush=True); time.sleep(0.5); print('the last line')", 0, ""),
    ],
)
def test_a_closed_pipe_is_one_line_or_none_where_all_is_done(body, code, said):
    process = program(body)
    process.stdout.readline()
    process.stdout.close()
    printed = process.stderr.read()
    assert process.wait() == code and said in printed and printed.count("\n") == bool(said)
