"""The wave engine against its definition, against theory and against real data."""

import dataclasses
import math
import os
import re
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import waves
from benchmarks import wave_speed
from waves import cpu, engine, passes
from waves.acquisition import OPENFWI, SOURCES, Acquisition
from waves.derivatives import jacobian, map_jacobian, means_of
from waves.equation import simulate
from waves.reference import reference_simulate
from waves.windows import windows_of

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared" / "data"
# Small, yet with all there is: energy wraps round, leaves through the sponge, and windows grow and shrink.
SMALL = Acquisition(sources=(0, 9, 20), n_samples=180, n_pad=16)


def rough_maps(n=2, nz=20, nx=26, dtype=torch.float64, seed=0):
    return 1800 + 1500 * torch.rand(n, nz, nx, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def real():
    path = DATA / "reference" / "wave_reference.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with np.load(path) as file:
        return torch.from_numpy(file["velocity"]), torch.from_numpy(file["seismic"])


# --- forward --------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_maps_give_the_independent_reference(real):
    vel, seis = real
    for batch in (vel, vel[:1]):
        for got, expected in zip(simulate(batch), seis, strict=False):
            assert error(got, expected) < 3e-6
    assert error(simulate(vel[:1].double()), seis[:1]) < 5e-8  # the file is float32


@pytest.mark.realdata
def test_wrong_physics_fails_against_the_reference(real):
    vel, seis = real[0][1:2], real[1][1:2]
    got = simulate(vel)
    assert error(got[:, :, :-1], seis[:, :, 1:]) > 0.01  # delayed by a sample
    gain = (vel[:, 1, list(SOURCES)] * OPENFWI.dt_s) ** 2
    assert error(got / gain[:, :, None, None], seis) > 0.1  # source not scaled by its velocity
    one = dataclasses.replace(OPENFWI, sources=(34,))
    assert error(reference_simulate(vel, one), seis[:, 2:3]) < 3e-6
    assert error(reference_simulate(vel, one, periodic=False), seis[:, 2:3]) > 3e-4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize(
    "acquisition, shape",
    [
        (SMALL, (20, 26)),
        (Acquisition(sources=(5,), receivers=(2, 30, 30, 7), n_samples=101, n_pad=9), (11, 37)),
        (
            Acquisition(sources=(3, 0), source_row=9, receiver_row=0, n_samples=77, n_pad=3, dt_s=5e-4),
            (10, 8),
        ),
        (Acquisition(sources=(3, 12), dx_m=5.0, dt_s=5e-4, peak_hz=25.0, n_samples=150, n_pad=30), (14, 14)),
    ],
)
def test_any_acquisition_equals_the_plain_loop(acquisition, shape, dtype, tolerance):
    vel = rough_maps(2, *shape, dtype=dtype)
    got = simulate(vel, acquisition=acquisition)
    n_receivers = len(acquisition.receivers or range(shape[1]))
    assert (
        got.shape == (2, len(acquisition.sources), acquisition.n_samples, n_receivers) and got.dtype == dtype
    )
    assert error(got, reference_simulate(vel, acquisition)) < tolerance


def test_sources_and_samples_replace_the_acquisitions():
    vel = rough_maps(dtype=torch.float32)
    got = simulate(vel, (9,), 50, SMALL)
    assert error(got, simulate(vel, acquisition=SMALL)[:, 1:2, :50]) < 1e-6
    assert torch.equal(got, simulate(vel[:, None], sources=[9], n_samples=50, acquisition=SMALL))
    assert OPENFWI == Acquisition() and SOURCES == (0, 17, 34, 52, 69)


def test_inactive_cells_do_not_matter(monkeypatch):
    vel = torch.linspace(1500, 4500, 70, dtype=torch.float64)[None, :, None].expand(1, 70, 70)
    got = simulate(vel, sources=(17,))
    made, full = wave_speed.active_updates(vel[0])
    assert made < 0.7 * full  # something is left out
    monkeypatch.setattr(engine, "MARGIN", 10**4)
    assert error(got, simulate(vel, sources=(17,))) < 1e-12


@pytest.mark.parametrize("v_max", [1500, 2000, 2750, 3500])
def test_maps_of_every_speed_equal_the_plain_loop(v_max):
    """Slow maps leave out most cells: the windows must lie round each source, at the map's edges too."""
    vel = torch.linspace(1500, v_max, 70)[None, :, None].repeat(1, 1, 70)
    vel[:, 40:, :30] = 1500
    assert error(simulate(vel), reference_simulate(vel)) < 1e-5


def test_windows_hold_the_cells_on_a_path_from_source_to_receivers_and_little_else():
    """Against the definition, cell by cell: energy's shortest ways round the grid at every block."""
    acq, nz, nx, v_max, margin = SMALL, 52, 58, 2000, 8
    z, x = np.arange(nz)[:, None], np.arange(nx)
    columns = np.arange(26) + acq.n_pad

    def distance(rows, first, last):
        dz, dx = abs(z - rows), np.maximum(first - x, x - last)
        around = np.minimum(x + nx - last, first + nx - x)
        return np.hypot(np.minimum(dz, nz - dz), np.maximum(np.minimum(dx, around), 0))

    n_most = 0
    for source in acq.sources:
        windows, bounds = windows_of(acq, nz, nx, source, v_max, margin)
        for block, (window, bound) in enumerate(zip(windows, bounds, strict=True)):
            begin, speed = block * passes.BLOCK, v_max * acq.dt_s / acq.dx_m
            from_source = distance(acq.source_row + acq.n_pad, *[source + acq.n_pad] * 2)
            to_receiver = distance(acq.receiver_row + acq.n_pad, columns[0], columns[-1])
            active = from_source <= speed * (begin + passes.BLOCK) + margin
            active &= to_receiver <= speed * (acq.n_samples - begin) + margin
            inside = (x >= window[:, :1]) & (x < window[:, 1:])
            assert inside[active].all()
            rows, across = np.flatnonzero(inside.any(1)), inside[inside.any(1)].any(0)
            assert bound[0] == rows[0] and bound[2] == rows[-1] + 1
            assert bound[1] <= np.flatnonzero(across)[0] and bound[3] > np.flatnonzero(across)[-1]
            n_most += (inside.sum() < inside.size).item()
    assert n_most  # some blocks leave cells out


def test_a_batch_equals_its_maps_one_by_one():
    vel = rough_maps(3, dtype=torch.float32)
    together = simulate(vel, acquisition=SMALL)
    for i in range(3):
        assert torch.equal(together[i], simulate(vel[i : i + 1], acquisition=SMALL)[0])


def test_a_mirrored_map_gives_the_mirrored_gather():
    sources = (0, 17, 34, 35, 52, 69)  # with 35, every source has its mirror image
    vel = rough_maps(1, 70, 70)
    acquisition = dataclasses.replace(OPENFWI, sources=sources, n_samples=400, n_pad=40)
    seis = simulate(vel, acquisition=acquisition)
    mirrored = simulate(vel.flip(-1), acquisition=acquisition)
    assert error(mirrored, seis.flip(1, 3)) < 1e-12
    assert (
        error(mirrored[:, [0, 1, 2, 4, 5]], seis[:, [0, 1, 2, 4, 5]].flip(1, 3)) > 0.01
    )  # without it: wrong


@pytest.mark.parametrize("vel", [torch.full((1, 20, 26), 2500.0).double(), rough_maps(1)])
def test_source_and_receiver_can_be_exchanged(vel):
    a, b = (
        Acquisition((i,), (j,), ri, rj, n_samples=250, n_pad=16)
        for i, j, ri, rj in ((4, 19, 1, 13), (19, 4, 13, 1))
    )
    there, back = simulate(vel, acquisition=a), simulate(vel, acquisition=b)
    assert there.abs().max() > 1e-3 and error(there, back) < 1e-11


def test_homogeneous_medium_gives_the_analytic_greens_function():
    """p = dx^2/(2 pi) int w(s) / sqrt((t - s)^2 - (r/v)^2) ds, sample n at t = (n + 1) dt; within 0.3 %."""
    v, receivers = 2000.0, (35, 55)
    acq = Acquisition((15,), receivers, 30, 30, dx_m=5.0, dt_s=2.5e-4, n_samples=1200, n_pad=70)
    got = simulate(torch.full((1, 60, 70), v).double(), acquisition=acq, v_min=torch.tensor([1e-9]).double())
    w = waves.ricker(acq.n_samples, torch.float64, acq)
    fine = 20  # substitute s = t - r/v cosh(u): no singularity is left
    for k, x in enumerate(receivers):
        delay = (x - 15) * acq.dx_m / v
        t = (torch.arange(acq.n_samples).double() + 1) * acq.dt_s
        u = torch.linspace(0, 1, 200 * fine).double()[:, None] * torch.acosh((t / delay).clamp(min=1))
        s = (t - delay * torch.cosh(u)) / acq.dt_s
        at = s.clamp(0, acq.n_samples - 2)
        values = torch.lerp(w[at.long()], w[at.long() + 1], at - at.floor()) * (s >= 0)
        expected = acq.dx_m**2 / (2 * math.pi) * torch.trapezoid(values, u, dim=0)
        assert error(got[0, 0, :, k], expected) < 3e-3
        assert error(got[0, 0, 8:, k], expected[:-8]) > 0.03  # 2 ms late


# --- derivatives ----------------------------------------------------------------------------------


def central_difference(f, x, dx, h=0.02):
    """Fourth order."""
    return (8 * (f(x + h * dx) - f(x - h * dx)) - (f(x + 2 * h * dx) - f(x - 2 * h * dx))) / (12 * h)


def test_gradient_equals_central_differences():
    vel = rough_maps(1)
    target = simulate(rough_maps(1, seed=5), acquisition=SMALL)

    def misfit(v):
        return (simulate(v, acquisition=SMALL) - target).square().sum()

    vel.requires_grad_()
    gradient = torch.autograd.grad(misfit(vel), vel)[0]
    vel = vel.detach()
    slowest = divmod(vel.argmin().item(), vel.shape[2])  # moves the sponge
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(vel.shape, dtype=torch.float64, generator=generator)]
    for cell in ((1, 9), (0, 0), (19, 12), (7, 25), (10, 10), slowest):  # source, replicated corner and edges
        directions.append(torch.zeros_like(vel))
        directions[-1][(0, *cell)] = 1
    for direction in directions:
        expected = central_difference(misfit, vel, direction)
        assert abs((gradient * direction).sum() - expected) < 1e-6 * abs(expected)


def test_v_min_can_be_an_unknown_of_its_own():
    vel, v_min = rough_maps(), torch.tensor([1700.0, 1900.0], dtype=torch.float64, requires_grad=True)

    def energy(m):
        return simulate(vel, acquisition=SMALL, v_min=m).square().sum()

    gradient = torch.autograd.grad(energy(v_min), v_min)[0]
    for i in range(2):
        expected = central_difference(energy, v_min.detach(), torch.eye(2, dtype=torch.float64)[i])
        assert abs(gradient[i] - expected) < 1e-6 * abs(expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_adjoint_passes_the_dot_product_test(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    vel = rough_maps()
    generator = torch.Generator().manual_seed(2)
    change = torch.randn(vel.shape, dtype=torch.float64, generator=generator)

    def f(v):
        return simulate(v, acquisition=SMALL)

    seis, d_seis = torch.func.jvp(f, (vel,), (change,))
    assert torch.equal(seis, f(vel))
    residual = torch.randn(seis.shape, dtype=torch.float64, generator=generator)
    gradient = torch.func.vjp(f, vel)[1](residual)[0]
    torch.set_num_threads(before)
    forward, backward = (d_seis * residual).sum(), (gradient * change).sum()
    assert abs(forward - backward) < 1e-10 * abs(forward)
    leaf = vel.clone().requires_grad_()
    f(leaf).backward(residual)
    assert error(leaf.grad, gradient) < 1e-12


def test_jvp_equals_central_differences():
    vel, change = rough_maps(1), 1 + rough_maps(1, seed=3) / 1000

    def f(v):
        return simulate(v, acquisition=SMALL)

    assert error(torch.func.jvp(f, (vel,), (change,))[1], central_difference(f, vel, change)) < 1e-7


@pytest.mark.parametrize("span, receivers", [(1, None), (8, (12, 3))])
def test_jacobian_equals_central_differences(span, receivers):
    rows, columns = np.array([2, 18, 9, 12]), np.array([24, 1, 9, 13])
    acquisition = dataclasses.replace(OPENFWI, sources=(0, 9, 20), receivers=receivers, n_samples=400)
    vel = rough_maps(1)[0]
    made = jacobian(vel, rows, columns, 4, span, acquisition)
    for cell, got in zip(zip(rows, columns, strict=True), made, strict=True):
        change = torch.zeros_like(vel)
        change[cell] = -(vel[cell] ** 3) / 2 * 1e-9  # of 1e-9 s²/m²
        expected = central_difference(lambda v: simulate(v[None], acquisition=acquisition)[0], vel, change)
        expected = torch.nn.functional.avg_pool2d(expected, (span, 1), (4, 1))
        assert error(1e-9 * got[:, : expected.shape[1]], expected) < 1e-3


def test_map_jacobian_equals_central_differences_on_the_rim_too():
    acquisition = dataclasses.replace(SMALL, n_samples=400)
    vel = rough_maps(1)[0]
    weights = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)).double()
    v_min = vel.min()[None] - 50
    made = map_jacobian(vel, v_min, weights, acquisition=acquisition)
    assert made.shape == (20 * 26 + 1, 3, 7, 26)

    def seis(v, least=v_min):
        return weights @ means_of(simulate(v[None], acquisition=acquisition, v_min=least)[0], 8)

    cells = [(9, 13), (1, 4), (1, 9), (0, 20), (0, 12), (7, 0), (12, 25), (19, 5), (0, 0), (19, 25)]
    for row, column in cells:  # (1, 9) is a source
        change = torch.zeros_like(vel)
        change[row, column] = -(vel[row, column] ** 3) / 2 * 1e-9
        expected = central_difference(seis, vel, change)
        assert error(1e-9 * made[row * 26 + column], expected) < 6e-3, (row, column)
    expected = central_difference(lambda least: seis(vel, least), v_min, torch.ones(1).double())
    assert error(made[-1], expected) < 3e-3


def test_a_gradient_keeps_at_most_120_mib_per_map():
    vel = torch.full((1, 70, 70), 4500.0, requires_grad=True)
    seis = simulate(vel)
    kept = seis.grad_fn.kept
    n_bytes = sum(room.nbytes for lane in kept.values() for _, room in lane)
    assert 10 * 2**20 < n_bytes < 120 * 2**20


def test_a_second_derivative_is_refused():
    vel = rough_maps(1).requires_grad_()
    gradient = torch.autograd.grad(simulate(vel, acquisition=SMALL).square().sum(), vel, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- other kernels, threads, memory ---------------------------------------------------------------


def outcomes(vel, acquisition):
    """Gather, its change in one direction, and the gradients towards vel and v_min."""
    change = rough_maps(*vel.shape, dtype=vel.dtype, seed=7).to(vel) / 100
    _, d_seis = torch.func.jvp(lambda v: simulate(v, acquisition=acquisition), (vel,), (change,))
    vel, v_min = vel.clone().requires_grad_(), vel.amin((1, 2)).requires_grad_()
    seis = simulate(vel, acquisition=acquisition, v_min=v_min)
    (seis * torch.linspace(-1, 1, seis.numel()).to(seis).view_as(seis)).sum().backward()
    cells = np.array([vel.shape[1] - 2, vel.shape[1] - 2]), np.array([1, vel.shape[2] // 2])
    change = jacobian(vel.detach()[0], *cells, acquisition=acquisition)
    return seis.detach(), d_seis, vel.grad, v_min.grad, change


def test_without_a_compiler_the_same_numbers_and_one_warning(monkeypatch):
    vel = rough_maps()
    expected = outcomes(vel, SMALL)
    cpu.compiled.cache_clear()
    passes.warn_once.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.warns(RuntimeWarning, match="no C.. compiler works here"):
        got = outcomes(vel, SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(vel, acquisition=SMALL)
    cpu.compiled.cache_clear()
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) < 1e-11


@pytest.mark.parametrize("size, n_pad, n_samples", [(60, 30, 110), (26, 16, 180), (23, 11, 120)])
def test_uninitialised_memory_is_never_read(size, n_pad, n_samples, monkeypatch):
    vel = rough_maps(2, size, size, dtype=torch.float32)
    acquisition = dataclasses.replace(SMALL, n_pad=n_pad, n_samples=n_samples)
    expected, empty = outcomes(vel, acquisition), engine.Job.empty
    monkeypatch.setattr(engine.Job, "empty", lambda *args: empty(*args).fill_(math.nan))
    for a, b in zip(outcomes(vel, acquisition), expected, strict=True):
        assert torch.equal(a, b)


def test_threads_do_not_change_a_bit():
    before, vel, got = torch.get_num_threads(), rough_maps(dtype=torch.float32), []
    for n in (1, 2):
        torch.set_num_threads(n)
        got.append(outcomes(vel, SMALL))
    torch.set_num_threads(before)
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)


class _Gathers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return simulate(rough_maps(1, dtype=torch.float32, seed=i), acquisition=SMALL)[0]


def test_simulates_in_forked_workers_too():
    here = [_Gathers()[i] for i in range(4)]  # threads have run in this process before it forks
    loader = torch.utils.data.DataLoader(
        _Gathers(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    for a, b in zip(here, loader, strict=True):
        assert torch.equal(a, b)


def test_memory_stays_flat():
    def resident_mib(n):
        for _ in range(n):
            vel = rough_maps(2, dtype=torch.float32).requires_grad_()
            simulate(vel, acquisition=SMALL).square().sum().backward()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    if not Path("/proc/self/statm").exists():
        pytest.skip("the system does not tell a process's memory in /proc")
    start = resident_mib(20)
    assert resident_mib(150) - start < 20  # keeping the checkpoints of 150 runs takes ten times that


# --- bad input ------------------------------------------------------------------------------------


def with_cell(value):
    vel = rough_maps()
    vel[1, 3, 3] = value
    return vel


@pytest.mark.parametrize(
    "vel, changes, message",
    [
        (rough_maps().half(), {}, "got torch.float16, expected float32 or float64; convert with .float()"),
        (rough_maps().long(), {}, "got torch.int64, expected float32"),
        (rough_maps()[0], {}, r"got shape (20, 26), expected (B, 1, Z, X) or (B, Z, X)"),
        (rough_maps()[None], {}, r"got shape (1, 2, 20, 26)"),
        (rough_maps()[:0], {}, r"got shape (0, 20, 26)"),
        (with_cell(math.nan), {}, "got nan to nan m/s, expected finite"),
        (with_cell(math.inf), {}, "to inf m/s, expected finite"),
        (with_cell(-2000), {}, "got -2000 to"),
        (rough_maps() / 1000, {}, "check that its unit is m/s"),
        (with_cell(9000), {}, "dt_s: got 0.001 s, expected at most 0.0006476 s for 9000 m/s in 10 m cells"),
        (rough_maps(), {"sources": (0, 26)}, "sources: got (0, 26), expected cells of the map, 0 to 25"),
        (rough_maps(), {"sources": (-1,)}, "sources: got (-1,)"),
        (rough_maps(), {"sources": (1.5,)}, "sources: got (1.5,), expected a list of whole cells"),
        (rough_maps(), {"sources": 3}, "sources: got 3, expected a list of whole cells"),
        (rough_maps(), {"sources": ()}, "sources: got none, expected at least one cell"),
        (rough_maps(), {"receivers": (3, 26)}, "receivers: got (3, 26), expected cells of the map, 0 to 25"),
        (rough_maps(), {"source_row": 20}, "source_row: got (20,), expected cells of the map, 0 to 19"),
        (rough_maps(), {"receiver_row": -1}, "receiver_row: got (-1,)"),
        (rough_maps(), {"n_samples": 0}, "n_samples: got 0, expected at least 1"),
        (rough_maps(), {"n_pad": 1}, "n_pad: got 1, expected at least 2"),
        (rough_maps(), {"dx_m": 0.0}, "dx_m: got 0.0, expected a positive number"),
        (rough_maps(), {"dt_s": math.nan}, "dt_s: got nan, expected a positive number"),
        (rough_maps(), {"peak_hz": -15.0}, "peak_hz: got -15.0, expected a positive number"),
    ],
)
def test_what_cannot_be_simulated_is_refused(vel, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        simulate(vel, acquisition=dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize(
    "v_min", [torch.tensor([1500.0]), torch.tensor([1500.0, 0]), torch.tensor([math.nan, 1500])]
)
def test_a_wrong_v_min_is_refused(v_min):
    with pytest.raises(ValueError, match="expected 2 positive ones, one per map"):
        simulate(rough_maps(), acquisition=SMALL, v_min=v_min.double())


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        ([1], [5], "rows: got [1], expected cells from 2 to 18"),
        ([2, 19], [5, 5], "rows: got [ 2 19], expected cells from 2 to 18"),
        ([5], [0], "columns: got [0], expected cells from 1 to 24"),
        ([5], [25], "columns: got [25], expected cells from 1 to 24"),
        ([], [], "rows: got []"),
    ],
)
def test_a_jacobian_of_cells_it_does_not_hold_for_is_refused(rows, columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jacobian(rough_maps(1)[0], np.array(rows), np.array(columns), acquisition=SMALL)


def test_a_jacobian_of_too_few_samples_is_refused():
    with pytest.raises(ValueError, match="every: got 9, expected 1 to 8"):
        jacobian(rough_maps(1)[0], np.array([5]), np.array([5]), 9)


def test_the_largest_dt_named_is_stable_and_little_more_is_not():
    vel = torch.full((1, 20, 20), 4000.0, dtype=torch.float64)
    acquisition = Acquisition(sources=(9,), n_samples=3000, n_pad=40, dt_s=0.01)
    with pytest.raises(ValueError, match="expected at most") as refused:
        simulate(vel, acquisition=acquisition)
    largest = float(re.search(r"at most (\S+) s", str(refused.value))[1])
    at_limit = dataclasses.replace(acquisition, dt_s=0.999 * largest)
    assert simulate(vel, acquisition=at_limit).abs().max() < 100
    beyond = dataclasses.replace(acquisition, dt_s=1.1 * largest, n_samples=400)
    assert reference_simulate(vel, beyond).abs().max() > 1e6


def test_too_little_memory_for_a_gradient_is_said_beforehand(monkeypatch):
    vel = rough_maps(4)
    monkeypatch.setattr(engine, "_free_bytes", lambda device: 5 * 2**20)
    simulate(vel, acquisition=SMALL)
    with pytest.raises(MemoryError, match=r"needs \d+\.\d+ GiB, 0.00 GiB free; take [123] maps at a time"):
        simulate(vel.requires_grad_(), acquisition=SMALL)


def test_fields_are_made_on_the_device_of_the_map_whatever_it_is():
    job = types.SimpleNamespace(like=torch.empty(1, device="meta"))  # as Apple's MPS
    assert engine.Job.empty(job, 2, 3).device.type == "meta"
    job.like = torch.empty(1)
    assert engine.Job.empty(job, 2, 3).device.type == "cpu"
