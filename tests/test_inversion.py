"""Waveform inversion: parts recover what they made, keep their bounds, never fit worse than the guess."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import bench
import waves
from inversion.anneal import anneal_curves
from inversion.cellwise import Edges, Smooth, fit_cells, time_weights
from inversion.draw_faults import fault_from_echoes, fault_through, lean_other_way
from inversion.find_fault import (
    _fit_sharp,
    _fit_whole_record,
    _move_faintest_interface,
    _search_blocks,
    _trial_blocks,
)
from inversion.find_layers import _target, find_layers
from inversion.gauss_newton import changes, gauss_newton, settle
from inversion.invert import invert
from inversion.observed import EXPLAINED_NORM, Observed
from inversion.parameters import Fault, Layers, paint, shade
from inversion.population import _distinct, surface_velocity, top_velocity
from inversion.settle_fault import refit_decisions, settle_fault
from postprocess import gaussian
from synthetic import dataset
from synthetic.maps import make_maps
from synthetic.soft_fault import FAULT_ENDS, N_FINE, fault_line, slip_soft
from waves.misfit import misfit, simulated


def flat_map(velocities, cells):
    return paint(np.array(velocities, float), np.repeat(np.array(cells)[:, None], 70, 1))


def gather(vel, sources=waves.SOURCES, **changes):
    acquisition = waves.Acquisition(**changes)
    return waves.simulate(torch.tensor(vel, dtype=torch.float32)[None], sources, acquisition=acquisition)[0]


def invert_one(seis, vel, family=None, minutes=10.0, n_iterations=0):
    (vel,), (trace,) = invert(seis[None], vel[None], [family], minutes, n_iterations)
    return vel, trace


FLAT = flat_map([1700, 2600, 3400], [20, 43])


# ---------------------------------------------------------------- maps in few unknowns


def test_shaded_layers_of_whole_depths_are_painted_ones():
    cells = np.array([[10] * 70, [30] * 70])
    np.testing.assert_allclose(
        shade(np.array([2000.0, 2500, 3000]), cells), flat_map([2000, 2500, 3000], [10, 30])
    )


def test_depths_between_cells_mix_by_area():
    half = shade(np.array([2000.0, 3000.0]), np.full((1, 70), 9.5))
    np.testing.assert_allclose(half[9] ** -2, (2000.0**-2 + 3000.0**-2) / 2)
    assert (half[8] == 2000).all() and np.allclose(half[10], 3000)


def test_layers_round_as_the_generator_does():
    theta = np.concatenate([[2000.0, 2500.0, 3000.0], np.full(8, 12.3), np.full(8, 0.25)])
    layers = Layers(2, 20.0, curved=True)
    inner = slice(15, 60)
    assert (layers.cells(theta)[0, inner] == math.floor(12.3 + 0.8)).all()
    assert (layers.cells(theta)[1, inner] == math.floor(12.3 + 20.25 + 0.8)).all()


def test_bounds_hold_and_velocities_of_version_a_increase():
    theta = np.array([2600.0, 2500.0, 9000.0, 60.0, 5.0])
    clipped = Layers(2, 20.0, curved=False).clip(theta)
    np.testing.assert_array_equal(clipped, [2600, 2600, 4500, 45, 1])
    free = Layers(2, 20.0, curved=False, increasing=False).clip(theta)
    np.testing.assert_array_equal(free[:3], [2600, 2500, 4500])


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_fault_of_whole_unknowns_is_the_generators(mirrored):
    theta = np.array([2000.0, 2600, 3300, 4100, 18, 35, 52, 120, 110, 12])
    rows = np.array([36, 70, 104])
    field = theta[:4][(np.arange(N_FINE)[:, None] >= rows).sum(1)][:, None] + np.zeros(N_FINE)
    made = slip_soft(field, 2000.0, 120, 110, 12)
    fault = Fault(3, mirrored)
    np.testing.assert_allclose(fault.smooth(theta), made[:, ::-1] if mirrored else made, rtol=1e-12)
    np.testing.assert_allclose(fault.sharp(theta), fault.smooth(theta), rtol=1e-12)
    assert not np.array_equal(fault.smooth(theta), fault.smooth(theta + 0.5 * (np.arange(10) == 9)))


# ---------------------------------------------------------------- what the gather says by itself


def test_the_first_sample_tells_the_velocity_at_each_source():
    vel = np.repeat(np.linspace(1600, 2300, 70)[None], 70, 0)
    observed = Observed(gather(vel))
    np.testing.assert_allclose(surface_velocity(observed), vel[1, list(waves.SOURCES)], rtol=1e-4)


def test_noise_is_measured_where_no_wave_can_be_and_hides_the_first_sample():
    seis = gather(FLAT)
    assert Observed(seis).noise < 1e-6 * float(seis.std())
    noisy = seis + 0.01 * torch.randn(seis.shape, generator=torch.Generator().manual_seed(0))
    observed = Observed(noisy)
    assert observed.noise == pytest.approx(0.01, rel=0.05)
    assert top_velocity(observed) == pytest.approx(1700, abs=50)


@pytest.mark.parametrize("span", (1, 5))  # white and coloured
def test_the_true_map_is_told_from_a_wrong_one_amid_noise(span):
    seis = gather(FLAT)
    noise = torch.randn(seis.shape, generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.avg_pool2d(noise, (span, 1), 1, (span // 2, 0))
    noise *= 0.1 * seis.std() / noise.std()  # 20 dB
    observed, quiet = Observed(seis + noise), Observed(seis)
    wrong = FLAT.copy()
    wrong[21:] += 300
    for n_samples in (300, 1000):
        norm = float(observed.residuals([FLAT], n_samples).norm())
        assert observed.noise_norm(n_samples) == pytest.approx(norm, rel=0.05)
        assert norm < observed.noise_threshold(n_samples, 0.01)
    rest = float(quiet.residuals([wrong], 1000).norm())
    assert observed.noise_threshold(1000, 0.5 * rest) < float(observed.residuals([wrong], 1000).norm())
    assert rest > EXPLAINED_NORM


def test_residuals_of_the_true_map_vanish_in_every_window():
    observed = Observed(gather(FLAT, (0,)), (0,))
    for n_samples in (150, 1000):
        assert float(observed.residuals([FLAT], n_samples).norm()) < 1e-6
        assert float(observed.residuals([FLAT + 10], n_samples).norm()) > 1e-2
    assert observed.simulations == pytest.approx(2 * (0.15**2 + 1) / 5)


# ---------------------------------------------------------------- steps and searches


def test_gauss_newton_finds_velocities_and_depths():
    layers = Layers(2, 23.0, curved=False)
    true = np.array([1700.0, 2600, 3400, 19.7, 0.0])
    observed = Observed(gather(layers.smooth(true), (0,)), (0,))
    start = true + [0, 120, -150, 1.0, 0.5]
    theta, norm = gauss_newton(
        observed, layers.smooth, start, layers.scale, 1000, 12, layers.clip, least_gain=0
    )
    assert norm < 1e-4
    np.testing.assert_allclose(theta, true, atol=0.5)


def test_settling_moves_interfaces_by_whole_cells_and_stops_at_the_truth():
    observed = Observed(gather(FLAT, (0,)), (0,))
    start = np.array([1700.0, 2580, 3440]), np.repeat([[21], [42]], 70, 1)
    velocities, depths, norm = settle(observed, *start)
    assert norm < 1e-5 and (paint(velocities, depths) == FLAT).all()
    before = observed.simulations
    assert settle(observed, velocities, depths)[2] == norm
    assert observed.simulations - before < 1


def test_settling_tells_the_velocity_of_a_layer_of_one_row_from_its_depth():
    true = flat_map([1700, 2600, 3400], [20, 69])
    observed = Observed(gather(true, (0,)), (0,))
    start = np.array([1700.0, 2600, 3410]), np.repeat([[20], [69]], 70, 1)
    velocities, depths, _ = settle(observed, *start)
    assert (paint(velocities, depths) == true).all()


@pytest.mark.slow
def test_annealing_ends_at_the_cells_the_generator_rounded_to():
    layers = Layers(2, 23.0, curved=True)
    controls = np.array([15.0, 18, 22, 16, 14, 19, 21, 20])
    true = np.concatenate([[1700.0, 2600, 3400], controls, [0.5, -0.3, 0.1, 0.8, -0.6, 0.2, 0, 0]])
    observed = Observed(gather(layers.sharp(true), (34,)), (34,))
    rng = np.random.default_rng(0)
    theta = layers.clip(true + np.r_[0, 12, -15, rng.normal(0, 0.3, 16)])
    assert 1 < np.abs(layers.sharp(theta) - layers.sharp(true)).mean()
    velocities, depths, norm = anneal_curves(observed, layers, theta)
    assert norm < 1e-5 and (paint(velocities, depths) == layers.sharp(true)).all()
    before = observed.simulations
    far = anneal_curves(observed, layers, true + np.r_[0, 600, 0, np.zeros(16)])
    assert far[0][1] == 3200 and observed.simulations - before < 1  # far off: no time is spent on it


def test_a_first_contrast_too_faint_to_be_heard_is_found_with_those_below():
    true = flat_map([1511, 1513, 2532, 3068, 3928], [8, 21, 36, 51])
    observed = Observed(gather(true, (0,)), (0,))
    assert (next(find_layers(observed, curved=False))[0] == true).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_trying_pairs_of_unknowns_anew_finds_an_interface_that_steps_do_not(mirrored):
    model = Fault(2, mirrored)
    true = np.array([1700.0, 2500, 3600, 18, 45, 115, 115, 14])
    observed = Observed(gather(model.sharp(true), (34,)), (34,))
    start = true + [0, 0, -1000, 0, 8, 0, 0, 0]
    stepped = _fit_sharp(observed, start, model, 600, 12)[1]
    theta, norm = _search_blocks(observed, start, model, 600)
    assert norm < 0.01 < stepped, (norm, stepped)
    np.testing.assert_allclose(theta[:5], true[:5], atol=20)
    torch.as_tensor(model.sharp(theta))  # which takes no reversed views


def test_linearised_residuals_are_those_of_small_moves():
    velocities, depths = np.array([1700.0, 2600, 4495]), np.repeat([[20], [70]], 70, 1)
    observed = Observed(gather(FLAT, (0,)), (0,))
    rows, residual, step = changes(observed, velocities, depths, [range(70)])
    assert step.tolist() == [5, 5, -5]

    def now(v, d):
        return observed.residuals([paint(v, d)], 1000)[0]

    torch.testing.assert_close(residual, now(velocities, depths))
    torch.testing.assert_close(residual + rows[0], now(velocities, depths + [[1], [0]]))
    torch.testing.assert_close(residual - rows[1], now(velocities, depths - [[0], [1]]))
    torch.testing.assert_close(residual + rows[3], now(velocities + [0, 5, 0], depths))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_residuals_by_reciprocity_are_those_of_moved_cells(noise, monkeypatch):
    velocities, depths = np.array([2400.0, 2500, 2600]), np.full((2, 70), 45)
    depths[0] = 20 + 3 * np.sin(np.arange(70) / 7)
    depths[1, :35] = 69  # moved down from here, a cell of the rim changes
    seis = gather(FLAT, (9, 34))
    seis += noise * torch.randn(seis.shape, generator=torch.Generator().manual_seed(0))
    made = {}
    for few in (30, math.inf):
        observed = Observed(seis, (9, 34))
        monkeypatch.setattr("inversion.gauss_newton.MIN_LINEARISED_MAPS", few)
        made[few] = changes(observed, velocities, depths, [[x] for x in range(70)])[0], observed.simulations
    (fast, few), (slow, many) = made.values()
    error = (fast - slow).norm(dim=1) / slow.norm(dim=1)
    assert few < 0.8 * many and error.max() < 0.015, error
    assert error[139] == error[70] == 0 < error[105]  # the rim's are simulated


def test_a_faint_first_echo_must_be_explained_and_not_only_what_comes_straight():
    strong, faint = (flat_map([2000, v, 3000], [20, 60]) for v in (2600, 2040))
    observed = Observed(gather(faint))
    echo = float(observed.residuals([np.full((70, 70), 2000.0)], 324)[0].norm())
    assert _target(observed, 2000.0)(324) == pytest.approx(0.2 * echo)
    assert _target(Observed(gather(strong)), 2000.0)(324) == pytest.approx(0.006 + 6e-5 * 224)
    assert echo < 0.05


def test_the_best_are_kept_once_each():
    layers = Layers(1, 0.0, curved=False)
    thetas = [np.array([2000.0, v, 10.0]) for v in (2500, 2500.1, 3500)]
    kept = _distinct([(0.2, thetas[0], layers), (0.2, thetas[1], layers), (0.1, thetas[2], layers)], 5)
    assert [one[0] for one in kept] == [0.1, 0.2]


@pytest.mark.parametrize("peak_hz", [15.0, 12.0])
def test_flat_layers_are_found_without_a_guess_but_not_with_a_wrong_wavelet(peak_hz):
    minutes = 5.0 if peak_hz == 15 else 0.15  # the wrong wavelet takes all of them
    observed = Observed(gather(FLAT, (0,), peak_hz=peak_hz), (0,), minutes=minutes)
    found, norm = next(find_layers(observed, curved=False))
    if peak_hz == 15:
        assert norm < 1e-4 and (found == FLAT).all()
    else:
        assert norm > 0.05 and np.abs(found - FLAT).mean() > 10


def test_a_fault_nearly_found_is_finished_to_the_last_whole_unknown():
    model, true = Fault(2, mirrored=True), np.array([1800.0, 2600, 3500, 20, 38, 130, 105, 14])
    observed = Observed(gather(model.sharp(true), (34,)), (34,))
    near = true + np.array([0, 2.3, -3.4, 0, 0, 2.6, -2.4, 0.3])
    norm = float(observed.residuals([model.sharp(near)], 1000)[0].norm())
    theta, _, left = settle_fault(observed, near, model)
    assert norm > 0.01 > 1e-5 > left, (norm, left)
    np.testing.assert_array_equal(np.rint(theta), true)


def test_a_start_that_ends_at_the_same_map_again_gives_way_to_the_next(monkeypatch):
    model, theta = Fault(1, False), np.array([1800.0, 2600, 30, 130, 105, 14])
    population = [(0.1, theta, model), (0.1, theta + np.eye(6)[0], model)]
    norms, tried = {1800: [0.5, 0.04, 0.04, 0.01], 1801: [0.3, 0.2, 0.1, 0.05]}, []

    def finish(_, theta, model):
        tried.append(int(theta[0]))
        return theta, model, norms[tried[-1]].pop(0)

    monkeypatch.setattr("inversion.find_fault.settle_fault", finish)
    monkeypatch.setattr("inversion.find_fault._search_blocks", lambda _, theta, *rest: (theta, 0.0))
    norm, vel = _fit_whole_record(Observed(gather(FLAT, (0,)), (0,)), population, 0.001)
    assert tried == [1800] * 3 + [1801] * 4
    assert norm == 0.04 and (vel == model.sharp(theta)).all()


@pytest.mark.slow
def test_a_row_that_rounding_kept_old_is_found_and_bends_no_velocities():
    model, true = Fault(2, mirrored=False), np.array([1800.0, 2600, 3500, 20, 38, 130, 105, 14])
    masks = model.flips(true)
    assert len(masks) and not masks.sum(0).max() > 1  # no half cell is decided twice
    row = np.flatnonzero(masks.any((0, 2)))[6]
    kept = Fault(2, False, masks[masks[:, row].any(1)].any(0))
    vel = kept.sharp(true)
    assert np.abs(vel - model.sharp(true)).max() > 20
    observed = Observed(gather(vel, (34,)), (34,))
    near = true + np.array([0, 4, -6, 0, 0, 0, 0, 0])
    theta, found, norm = settle_fault(observed, near, model)
    np.testing.assert_array_equal(theta, true)
    assert norm < 2e-3 and np.abs(found.sharp(theta) - vel).mean() < 0.1
    # where a move has led, too, whatever was decided where it came from
    theta, found, norm = refit_decisions(observed, near, Fault(2, False, masks[0]))
    np.testing.assert_array_equal(theta, true)
    assert norm < 2e-3 and np.abs(found.sharp(theta) - vel).mean() < 0.1


def test_faults_are_drawn_through_what_is_seen_beneath_the_sources():
    sources = waves.SOURCES
    beneath = [(20.0, 2600.0), (20.0, 2600.0), (13.0, 2700.0), (13.0, 2600.0), (13.0, 2600.0)]
    guess, right = np.repeat(np.linspace(1800, 4000, 70)[:, None], 70, 1), []
    for seed in range(20):
        theta, model = fault_from_echoes(beneath, sources, 1800.0, 3, guess, np.random.default_rng(seed))
        depths = (model.sharp(model.clip(theta)) > 2500).argmax(0)[list(sources)]
        assert theta[0] == 1800 and abs(theta[-1]) == 14
        right.append(np.abs(depths[1:4] - [20, 13, 13]).max() <= 1)  # far from the fault the old may stay
    assert np.mean(right) > 0.7


@pytest.mark.parametrize("end", range(*FAULT_ENDS, 25))
def test_a_fault_is_aimed_through_a_point(end):
    start, same_end = fault_through(80.0, 40.0, end)
    top, across = fault_line(start, same_end)
    assert same_end == end
    assert top - across * 40 == pytest.approx(80, abs=0.5)  # whole ends of the border's corner


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_fault_turned_to_lean_the_other_way_has_the_same_layers_on_both_sides(mirrored):
    model, theta = Fault(2, mirrored), np.array([1800.0, 2600.0, 3500.0, 20.0, 40.0, 95.0, 95.0, 14.0])
    turned, other = lean_other_way(theta, model, 95)
    assert other.mirrored != mirrored
    sides = [one.sharp(one.clip(t))[:, [8, 61]] for t, one in ((theta, model), (turned, other))]
    for v in (2200, 3000):
        depths, turned_depths = ((side > v).argmax(0) for side in sides)
        assert abs(depths[0] - depths[1]) >= 6
        assert np.abs(depths - turned_depths).max() <= 1


def test_the_faintest_interface_is_tried_elsewhere():
    theta = np.array([1800.0, 2200.0, 2205.0, 3000.0, 15.0, 28.0, 40.0, 95.0, 95.0, 14.0])
    trials = _move_faintest_interface(theta, 4)
    assert (np.diff(trials[:, :4]) > 0).all() and (np.diff(trials[:, 4:7]) >= 0).all()
    assert (trials[:, -3:] == theta[-3:]).all()
    assert [1800, 2200, 3000, 3500, 15, 40, 56] in trials[:, :7].tolist()
    assert not ((trials[:, 1] == 2200) & (trials[:, 2] == 2205)).any()  # what was there is gone


def test_blocks_change_what_they_name_alone():
    theta = np.array([1800.0, 2200.0, 3000.0, 15.0, 40.0, 95.0, 95.0, 14.0])
    *layers, elsewhere, throws, ends = _trial_blocks(theta, 3)
    for trials, changed in zip([*layers, throws, ends], [(2, 4), (1, 3), (5, 7), (5, 6)], strict=True):
        assert tuple(np.flatnonzero((trials != theta).any(0))) == changed
    assert len(elsewhere)
    theta[3:5] = 40.0, 41.0  # no room between them for the second
    assert all(len(trials) for trials in _trial_blocks(theta, 3))


def test_the_recognised_flat_gather_becomes_its_map():
    vel, trace = invert_one(gather(FLAT), torch.full((1, 70, 70), 2500.0), n_iterations=0)
    assert trace["flat"] and trace["kept"] in ("rounded", "search1")
    assert (vel[0].numpy() == FLAT).all()


# ---------------------------------------------------------------- cell by cell


def small_problem():
    """A layered map with a fault (20, 26), its blurred start, its gather, and the acquisition."""
    acquisition = waves.Acquisition(sources=(0, 9, 20), n_samples=400, n_pad=16)
    vel = torch.full((20, 26), 1800.0)
    vel[7:, :14], vel[10:, 14:], vel[14:] = 2300, 2300, 3000
    start = gaussian(vel[None, None], 2.0)[0, 0]
    return vel, start, waves.simulate(vel[None], acquisition=acquisition)[0], acquisition


@pytest.mark.parametrize("make", [lambda vel: Edges(), lambda vel: Edges(p=1.0), Smooth])
def test_a_priors_parabola_touches_it_from_above(make):
    draw = torch.Generator().manual_seed(0)
    vel = 3000 + 300 * torch.randn(8, 8, generator=draw).double()
    prior = make(vel + 50)
    q, centre = prior.parabola(vel, 3)

    def parabola(v):
        away = v.reshape(-1) - centre
        return (away @ (q @ away) / 2).item()

    offset = prior.value(vel, 3) - parabola(vel)
    for size in (1e-3, 10, 300):
        other = vel + size * torch.randn(8, 8, generator=draw).double()
        value, bound = prior.value(other, 3), parabola(other) + offset
        assert value <= bound + 1e-6
        if size < 1:  # the same slope
            assert value == pytest.approx(bound, abs=1e-6)


def test_edges_are_likelier_the_fewer_and_the_more_so_below_one():
    ramp = torch.linspace(2000, 3000, 70).expand(70, 70)
    step = torch.where(torch.arange(70) < 35, 2000.0, 3000.0).expand(70, 70)
    ratios = [Edges(p=p).value(step, 9) / Edges(p=p).value(ramp, 9) for p in (1.0, 0.5)]
    assert ratios[1] < ratios[0]


def test_the_first_steps_see_low_frequencies_and_early_arrivals_alone():
    t = torch.arange(125) * 0.008
    slow, fast = (torch.cos(2 * math.pi * f * t) for f in (3.0, 15.0))
    low, whole = time_weights(5, 3.0), time_weights(math.inf, 0.0)
    assert (low @ slow).norm() > 10 * (low @ fast).norm()
    torch.testing.assert_close(
        (whole @ fast).norm(), fast[:-1].norm(), rtol=1e-3, atol=0
    )  # the last holds sample 999
    early, late = (torch.zeros(125).index_fill(0, torch.tensor(k), 1.0) for k in (5, 115))
    assert (low @ early).norm() > 10 * (low @ late).norm()


@pytest.mark.parametrize("make", [lambda start: Edges(), lambda start: Smooth(start[:20, :20])])
def test_cells_are_fitted_until_noise_explains_the_rest(make):
    vel, start, seis, acquisition = small_problem()
    prior = make(start)
    if isinstance(prior, Smooth):  # a square map
        vel, start = vel[:, :20], start[:, :20]
        acquisition = dataclasses.replace(acquisition, sources=(0, 9, 19))
        seis = waves.simulate(vel[None], acquisition=acquisition)[0]
    steps = []
    fitted, n = fit_cells(
        seis, start, prior, 12, note=lambda number, v: steps.append(number), acquisition=acquisition
    )
    assert steps == list(range(1, n + 1)) and n <= 12
    assert (fitted - vel).abs().mean() < 0.5 * (start - vel).abs().mean()
    unchanged, n = fit_cells(seis, start, prior, noise=1e9, acquisition=acquisition)
    assert n == 0 and torch.equal(unchanged, start)


def test_fitted_cells_keep_openfwis_range():
    vel, start, seis, acquisition = small_problem()
    wrong = waves.simulate((vel - 400)[None].clamp(min=1400), acquisition=acquisition)[0]
    fitted, _ = fit_cells(wrong, start, Edges(), 6, acquisition=acquisition)
    assert fitted.min() == 1500 and fitted.max() <= 4500


@pytest.mark.parametrize("share, kept", [(0.5, "guess"), (1.0, "search1")])
def test_a_map_that_explains_too_little_is_not_believed(share, kept, monkeypatch):
    """Though it fits better than the guess."""
    found = FLAT * share + (1 - share) * (FLAT + 150)
    monkeypatch.setattr("inversion.invert._searches", lambda *_: [(lambda *_: iter([(found, 0.2)]), False)])
    vel, trace = invert_one(
        gather(FLAT), torch.from_numpy(FLAT + 150)[None].float(), "CurveVel_A", n_iterations=0
    )
    assert trace["misfits"]["search1"] < trace["misfits"]["guess"]
    assert trace["kept"] in (kept, "rounded") and trace["explained"] == (kept == "search1")
    assert torch.equal(vel[0], torch.from_numpy(found if trace["explained"] else FLAT + 150).float())


@pytest.mark.parametrize("name", ["search1", "cells"])
@pytest.mark.parametrize("explains", [False, True])
def test_amid_noise_only_a_map_that_explains_the_gather_is_believed(name, explains, monkeypatch):
    seis, found, guess = gather(FLAT), FLAT + (0 if explains else 100), FLAT + 150
    noise = torch.randn(seis.shape, generator=torch.Generator().manual_seed(0))
    noisy = seis + seis.std() * 10 ** (-20 / 20) * noise
    searches = [(lambda *_: iter([(found, 0.1 if explains else 0.5)]), False)] * (name == "search1")
    monkeypatch.setattr("inversion.invert._searches", lambda *_: searches)
    monkeypatch.setattr("inversion.invert.fit_cells", lambda *_: (torch.from_numpy(found).float(), 1))
    guess = torch.from_numpy(guess)[None].float()
    vel, trace = invert_one(noisy, guess, "CurveVel_A", n_iterations=int(name == "cells"))
    assert trace["misfits"][name] < trace["misfits"]["guess"]
    assert np.array_equal(vel[0].numpy(), found if explains else guess[0].numpy()), trace


@pytest.mark.parametrize("family, order", [(None, "cfc"), ("CurveVel_A", "ccfc")])
def test_searches_take_turns_until_one_explains_and_that_goes_on_alone(family, order, monkeypatch):
    called = []

    def search(name, *norms):
        def starts(observed, _):
            for norm in norms:
                alone = observed.turn_ends > observed.deadline - 60 * 0.2 * observed.minutes_left
                observed.extend_turn(norm)
                called.append((name, alone, observed.turn_ends == observed.deadline))
                yield FLAT, norm

        return starts, False

    searches = [search("curved", 0.9, 0.8, 0.7), search("fault", 0.5, 0.04, 0.01)]
    monkeypatch.setattr("inversion.invert._searches", lambda *_: searches)
    monkeypatch.setattr("inversion.invert.is_flat", lambda seis, _: torch.tensor([False]))
    vel, trace = invert_one(gather(FLAT), torch.full((1, 70, 70), 2500.0), family, n_iterations=0)
    assert "".join(name[0] for name, *_ in called) == order + "ff"
    assert [one[1:] for one in called] == [(False, False)] * len(order) + [(False, True), (True, True)]
    assert (vel[0].numpy() == FLAT).all() and list(trace["misfits"])[:3] == ["guess", "search1", "search2"]


@pytest.mark.slow
def test_no_map_fits_worse_than_its_guess():
    true = torch.from_numpy(make_maps("Style_A", 1, 1))
    seis = simulated(true)
    vel, traces = invert(seis, true, ["Style_A"], n_iterations=1)
    assert torch.equal(vel, true) and traces[0]["misfits"]["guess"] == pytest.approx(0, abs=1e-6)
    guess = gaussian(true, 2.0)
    vel, traces = invert(seis, guess, ["Style_A"], n_iterations=2)
    assert misfit(seis, simulated(vel)) < misfit(seis, simulated(guess))
    assert traces[0]["kept"] == "cells" and (vel - true).abs().mean() < (guess - true).abs().mean()


def test_a_search_without_time_ends_with_what_it_has():
    vel, trace = invert_one(gather(FLAT), torch.full((1, 70, 70), 2500.0), minutes=0.0)
    assert trace["seconds"] < 60 and torch.isfinite(vel).all()


def test_ground_that_varies_everywhere_is_not_searched_for_layers():
    vel = torch.from_numpy(make_maps("Style_A", 1, 0))
    _, trace = invert_one(simulated(vel)[0], vel[0] + 20, "CurveVel_A", n_iterations=0)
    assert "search1" not in trace["misfits"]


@pytest.mark.slow
@pytest.mark.parametrize("velocities, cells", [([4500, 4500], [20]), ([3000, 1900, 2700], [18, 45])])
def test_layers_at_the_bounds_and_slower_ones_below_are_found(velocities, cells):
    vel = flat_map(velocities, cells)
    observed = Observed(gather(vel, (0,)), (0,))
    *_, (found, norm) = find_layers(observed, curved=False, increasing=False, n_starts=2)
    assert norm < 1e-3 and (found == vel).all()


def test_the_bench_tells_errors_from_each_start_and_noise(tmp_path, capsys):
    """What it prints of a smooth start is checked against the start itself."""
    dataset.write_dataset(tmp_path, ["Style_A"], 1, seed=0)
    options = ["--starts=smooth3,mean", "--snr=inf,20", "--n_iterations=0"]
    bench.main(["inversion", f"--input={tmp_path}", *options])
    rows = [line.split() for line in capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]]
    cases = itertools.product(["Style_A"], ["inf", "20"], ["smooth3", "mean"])
    assert [tuple(row[:3]) for row in rows] == list(cases)
    vel = torch.from_numpy(np.load(tmp_path / "Style_A/model/model1.npy"))
    assert float(rows[0][3]) == pytest.approx(float((gaussian(vel, 3.0) - vel).abs().mean()), abs=0.01)


def test_the_bench_starts_from_a_network_only_with_its_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="give --ckpt"):
        bench.main(["inversion", f"--input={tmp_path}", "--starts=network"])


@pytest.mark.slow
@pytest.mark.realdata
def test_the_real_gather_is_explained(shared_data):
    seis = torch.from_numpy(np.load(shared_data / "gather" / "000039dca2.npy"))
    start = torch.linspace(1650, 3300, 70)[None, :, None].expand(1, 70, 70)
    _, trace = invert_one(seis, start, n_iterations=3)
    assert trace["misfits"]["cells"] < 0.06 < trace["misfits"]["guess"]
