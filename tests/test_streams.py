"""Programs write to terminals and files of any encoding."""

import io
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import run_program

TEXT = "128×128 … – σ ü \udcff"  # \udcff: a byte of a file's name that is no UTF-8


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_an_encoding_lacks_ends_no_program(monkeypatch, encoding, fails):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["program.py"])

    def main(argv):
        print(TEXT)
        if fails:
            raise ValueError(TEXT)

    if fails:
        with pytest.raises(SystemExit) as stop:
            run_program(main)
        assert stop.value.code == 2
    else:
        run_program(main)
    for stream in streams[: 1 + fails]:
        stream.flush()
        written = stream.buffer.getvalue().decode(encoding)
        assert "128" in written and "\\udcff" in written


def test_help_is_printed_whatever_the_locale():
    code = "import sys, cfg, utils; sys.argv = ['train.py', '--help']; utils.run_program(cfg.parse)"
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0 and b"--data_root" in done.stdout and b"Traceback" not in done.stderr


def test_a_stream_that_is_none_of_pythons_own_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in notebooks
    run_program(lambda argv: print(TEXT))
    assert sys.stdout.getvalue() == TEXT + "\n"
