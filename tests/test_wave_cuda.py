"""The wave equation's kernel for CUDA cards: interpreted and compiled without a card, and tried on one."""

import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_wave import SMALL, error, outcomes, rough_maps

from waves import engine, passes
from waves.acquisition import OPENFWI
from waves.equation import simulate


@pytest.fixture
def cuda():
    pytest.importorskip("triton", reason="Triton is not installed")
    from waves import cuda

    return cuda


def assert_as_exact(got, on_cpu, exact):
    """A kernel's results err no more against float64's than the CPU kernel's in the same precision."""
    floor = 1e-11 if got[0].dtype == torch.float64 else 3e-6
    for a, b, true in zip(got, on_cpu, exact, strict=True):
        assert error(a.cpu(), true) < max(4 * error(b, true), floor)


INTERPRETED = """
import sys, torch
sys.path[:0] = {paths!r}
import waves
from test_wave_cuda import assert_as_exact, outcomes, rough_maps
from waves import cpu, cuda, engine, windows
engine.BLOCK = windows.BLOCK = cpu.BLOCK = cuda.BLOCK = 4
survey = waves.Acquisition(sources=(1, 6), receivers=(7, 2), receiver_row=2, dt_s=5e-4, n_samples=9, n_pad=3)
vels = [rough_maps(1, 5, 8, dtype=dtype) for dtype in (torch.float64, torch.float32)]
on_cpu = [outcomes(vel, survey) for vel in (*vels, vels[1].double())]
engine._kernel = lambda device: (cuda.run, None)
for vel, expected, exact in zip(vels, on_cpu, (on_cpu[0], on_cpu[2])):
    assert_as_exact(outcomes(vel, survey), expected, exact)
"""


def test_the_kernel_equals_the_cpus_in_tritons_interpreter(cuda):
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(paths=[str(ROOT), str(ROOT / "tests")])],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


class Launches:
    """Stands in place of the kernel, and hands the arguments of each launch to a function."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return lambda *args, **constants: self.function(grid, *args, **constants)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capability", [75, 80, 90])  # T4, A100, H100
def test_the_kernel_compiles_for_cards_and_keeps_to_their_registers(
    cuda, capability, dtype, tmp_path, monkeypatch
):
    import triton
    from triton.backends.compiler import GPUTarget

    def uses_memory(kernel):
        """Whether it spills registers, according to CUDA's own tool."""
        (tmp_path / "kernel").write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "-res-usage", tmp_path / "kernel"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert " REG:" in printed, printed
        return "STACK:0 " not in printed or "LOCAL:0 " not in printed

    def compile_once(grid, *args, MODE, **constants):
        if MODE not in made:
            made[MODE] = step.warmup(*args, grid=grid, MODE=MODE, **constants)
            scarce[MODE] = lambda: step.warmup(*args, grid=grid, MODE=MODE, maxnreg=24, **constants)

    card = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    step, made, scarce = cuda._step, {}, {}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", card)
    monkeypatch.setattr(cuda, "_step", Launches(compile_once))
    monkeypatch.setattr(engine, "_kernel", lambda device: (cuda.run, None))
    # few samples, but no number that Triton would make another kernel for
    outcomes(rough_maps(2, 70, 70, dtype), dataclasses.replace(OPENFWI, n_samples=9))
    assert sorted(made) == [passes.PLAIN, passes.STORE, passes.ADJOINT, passes.TANGENT]
    assert not any(map(uses_memory, made.values()))
    assert uses_memory(scarce[passes.PLAIN]())


def broken_target():
    raise RuntimeError("fatal error: Python.h: No such file or directory\nmore")


@pytest.mark.parametrize(
    "target, reason",
    [
        (broken_target, "launcher cannot be built: fatal error: Python.h"),
        (lambda: types.SimpleNamespace(backend="cuda", arch=60), "this card has 6.0"),  # P100
    ],
)
def test_where_triton_cannot_be_used_plain_pytorch_simulates(cuda, monkeypatch, target, reason):
    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_target=target))
    monkeypatch.setattr(cuda.triton.runtime, "driver", driver)
    with pytest.raises(ImportError, match=reason):
        cuda.check_launcher()
    with pytest.warns(RuntimeWarning, match="simulating in plain PyTorch"):
        passes.warn_once.cache_clear()
        assert engine._kernel("cuda")[0].__name__ == "run_torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_a_card_results_are_as_exact_as_on_a_cpu(dtype):
    openfwi = dataclasses.replace(OPENFWI, n_samples=300)
    for vel, survey in ((rough_maps(dtype=dtype), SMALL), (rough_maps(1, 70, 70, dtype=dtype), openfwi)):
        on_cpu = outcomes(vel, survey)
        exact = on_cpu if dtype == torch.float64 else outcomes(vel.double(), survey)
        assert_as_exact(outcomes(vel.cuda(), survey), on_cpu, exact)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_maps_of_the_second_card_are_simulated_there(cuda, monkeypatch):
    cards = set()

    def note(grid, *args, **constants):
        cards.add((torch.cuda.current_device(), *{t.device.index for t in args if torch.is_tensor(t)}))

    monkeypatch.setattr(cuda, "_step", Launches(note))
    monkeypatch.setattr(engine, "_kernel", lambda device: (cuda.run, None))
    vel = rough_maps(1).to("cuda:1").requires_grad_()
    simulate(vel, acquisition=SMALL).sum().backward()
    assert cards == {(1, 1)} and torch.cuda.current_device() == 0
