"""Windows and macOS: what these lack is hidden here, and each program still works or says so in one line."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import data_speed, wave_speed
from networks.checkpoints import load_checkpoint, save_checkpoint
from system import devices, files
from system.files import sole_use, sweep_parts, write_atomic
from training import log
from utils import StopSignals
from waves import cpu, engine

CPU = torch.device("cpu")


@pytest.fixture
def no_proc(monkeypatch):
    """No /proc, as on Windows and macOS."""
    read = Path.read_text

    def read_text(path, *args, **kwargs):
        if path.as_posix().startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.fixture
def no_locks(monkeypatch):
    """No fcntl, as on Windows, which renames and removes closed files only."""
    monkeypatch.setattr(files, "fcntl", None)
    replace, closed = os.replace, []

    def replace_closed(source, target):
        open_files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                      if os.path.islink(f"/proc/self/fd/{n}")]  # fmt: skip
        closed.append(str(os.path.realpath(source)) not in open_files)
        replace(source, target)

    if sys.platform == "linux":
        monkeypatch.setattr(os, "replace", replace_closed)
    yield
    assert all(closed)


def test_files_are_written_whole_without_locks(tmp_path, no_locks):
    sweep_parts.cache_clear()
    leftover = tmp_path / f".last.pt.{'0' * 16}.part"
    leftover.write_bytes(b"half")
    save_checkpoint(tmp_path / "last.pt", {"w": torch.ones(1)})
    save_checkpoint(tmp_path / "last.pt", {"w": torch.zeros(1)}, keep_as=tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path / "last.pt")["model"]["w"] == 0
    assert load_checkpoint(tmp_path / "previous.pt")["model"]["w"] == 1
    with pytest.raises(RuntimeError), write_atomic(tmp_path / "last.pt"):
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]
    with sole_use(tmp_path), sole_use(tmp_path):  # nobody can tell: allowed rather than never
        pass


def test_signals_that_a_system_lacks_are_left_out(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    with StopSignals("the step") as stop:
        handled = set(stop.before)
    assert handled <= {signal.SIGINT, signal.SIGTERM} and signal.SIGTERM in handled


def test_memory_is_reported_in_the_systems_unit_or_not_at_all(monkeypatch):
    pytest.importorskip("resource", reason="POSIX alone")
    kilobytes = log.peak_memory_gb(CPU)
    monkeypatch.setattr(sys, "platform", "darwin")
    if os.uname().sysname == "Linux":
        assert log.peak_memory_gb(CPU) == pytest.approx(kilobytes / 1000, rel=0.1)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert log.peak_memory_gb(CPU) == 0


def test_freed_memory_is_kept_by_glibc_alone(monkeypatch):
    for missing in (OSError, TypeError):  # TypeError: Windows has no library of the process itself

        def load(name, missing=missing):
            raise missing

        monkeypatch.setattr(devices.ctypes, "CDLL", load)
        devices.keep_memory()
        assert wave_speed.peak_mib(lambda: None, CPU) is None
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())  # macOS: no mallopt, no malloc_trim
    devices.keep_memory()
    assert wave_speed.peak_mib(lambda: None, CPU) is None


def test_without_proc_memory_is_not_known(no_proc):
    assert engine._free_bytes(CPU) == float("inf")
    assert "does not report memory" in wave_speed.resident()
    with pytest.raises(ValueError, match="--soak: this system does not tell a process's memory, Linux does"):
        data_speed.own_memory()


def test_without_posix_fadvise_and_load_the_benchmark_of_data_reads_from_memory(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "getloadavg")
    words = ["data", "--files=1", "--samples=4", "--batch_size=2", "--workers=1", "--processes="]
    words += ["--repeats=1", f"--folder={tmp_path}"]
    with pytest.raises(ValueError, match="cannot take files out of memory, Linux can; use --cold=0"):
        bench.main(words)
    bench.main([*words, "--cold=0"])
    printed = capsys.readouterr().out
    assert "warm" in printed and "cold" not in printed and "load" not in printed.splitlines()[0]


def test_without_a_compiler_the_waves_run_in_plain_pytorch(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpu, "warn_once", print)
    assert cpu.compiled.__wrapped__() is None
    assert "no C++ compiler works here" in capsys.readouterr().out
