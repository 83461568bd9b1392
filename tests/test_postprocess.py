import json

import numpy as np
import pytest
import torch

from postprocess import (
    FITTED,
    STEPS,
    adaptive_fusion,
    bilateral,
    check_steps,
    ensemble_simulation,
    fit_statistics,
    fit_weights,
    flat_rows,
    frequency_filter,
    fuse,
    gaussian,
    helps,
    load_fit,
    run_step,
    snap,
    statistical_correction,
    try_steps,
)
from report.scores import mae_of

PLAIN_STEPS = sorted(set(STEPS) - set(FITTED))


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def noisy(rng, shape=(3, 1, 70, 70)):
    return 1500 + 3000 * torch.rand(shape, generator=rng)


def layered(velocities=(1600.0, 2200.0, 3100.0, 4400.0)):
    depth = torch.arange(70)[:, None] + 5 * torch.sin(torch.arange(70) / 9)[None]
    return torch.tensor(velocities)[(depth / 20).long().clamp(0, 3)][None, None]


# ---------------------------------------------------------------- joining maps


@pytest.mark.parametrize("how", ["mean", "median", "adaptive"])
def test_equal_maps_and_a_single_map_are_joined_into_themselves(how, rng):
    vel = noisy(rng)
    for k in (1, 2, 3):
        assert torch.allclose(fuse(vel.expand(k, -1, -1, -1, -1), None, how), vel, atol=1e-2)


@pytest.mark.parametrize("how", ["mean", "median", "adaptive"])
def test_joining_does_not_depend_on_the_order_nor_on_the_scale_of_the_weights(how, rng):
    maps, order = noisy(rng, (3, 2, 1, 70, 70)), [2, 0, 1]
    joined = fuse(maps, [1, 2, 4], how)
    assert torch.allclose(joined, fuse(maps[order], [4, 1, 2], how), atol=1e-2)
    assert torch.allclose(joined, fuse(maps, [0.5, 1, 2], how), atol=1e-2)


def test_mean_and_median_are_the_weighted_ones():
    maps = torch.tensor([1000.0, 2000.0, 4000.0]).view(3, 1, 1, 1, 1).expand(3, 1, 1, 2, 2)
    cases = [("mean", [1, 1, 2], 2750), ("median", [1, 1, 1], 2000), ("median", [1, 1, 4], 4000)]
    cases += [("median", [1, 1, 2], 3000), ("median", [3, 1, 1], 1000), ("median", [0, 1, 1], 3000)]
    for how, weights, expected in cases:
        assert (fuse(maps, weights, how) == expected).all(), (how, weights)


def test_adaptive_fusion_trusts_the_candidates_that_agree():
    good = torch.full((2, 1, 1, 20, 20), 2000.0)
    maps = torch.cat([good, torch.full((1, 1, 1, 20, 20), 3000.0)])
    assert (adaptive_fusion(maps) - 2000).abs().max() < 1 < (maps.mean(0) - 2000).abs().min()


def test_fitted_weights_are_shares_and_find_a_known_mixture(rng):
    maps = noisy(rng, (3, 4, 1, 70, 70))
    truth = 0.3 * maps[0] + 0.7 * maps[2]
    weights = fit_weights(maps, truth)
    assert min(weights) >= 0 and sum(weights) == pytest.approx(1)
    assert weights == pytest.approx([0.3, 0, 0.7], abs=0.03)
    assert mae_of(fuse(maps, weights), truth).mean() < 0.1 * mae_of(fuse(maps), truth).mean()


def test_fitted_weights_are_never_worse_than_equal_ones(rng):
    maps = noisy(rng, (4, 2, 1, 70, 70))
    truth = noisy(rng, (2, 1, 70, 70))
    assert (
        mae_of(fuse(maps, fit_weights(maps, truth)), truth).mean() <= mae_of(fuse(maps), truth).mean() + 1e-3
    )


# ---------------------------------------------------------------- the steps


@pytest.mark.parametrize("name", PLAIN_STEPS)
def test_a_step_keeps_shape_dtype_and_its_input(name, rng):
    vel = noisy(rng)
    before = vel.clone()
    after = run_step(name, vel, [None] * 3)
    assert after.shape == vel.shape and after.dtype == vel.dtype and after.isfinite().all()
    assert torch.equal(vel, before)


@pytest.mark.parametrize("name", PLAIN_STEPS)
def test_a_step_of_the_mirrored_map_is_the_mirrored_step(name, rng):
    for vel in (noisy(rng), layered()):
        mirrored = run_step(name, vel.flip(3), ["FlatVel_A"] * len(vel))
        assert torch.allclose(mirrored, run_step(name, vel, ["FlatVel_A"] * len(vel)).flip(3), atol=0.5), name


@pytest.mark.parametrize("name", sorted(set(PLAIN_STEPS) - {"ensemble_simulation"}))
def test_a_constant_map_stays(name):
    vel = torch.full((2, 1, 70, 70), 2345.0)
    assert torch.allclose(run_step(name, vel, ["FlatVel_A"] * 2), vel, atol=0.01)


@pytest.mark.parametrize("name", ["flat_rows", "snap", "round", "clip"])
def test_doing_it_twice_is_doing_it_once(name, rng):
    vel = layered() + 10 * torch.randn(1, 1, 70, 70, generator=rng)
    vel[..., :2, :] = 1400  # below OpenFWI's range
    once = run_step(name, vel, ["FlatVel_A"])
    assert torch.equal(run_step(name, once, ["FlatVel_A"]), once)
    assert not torch.equal(once, vel)


def test_methods_of_no_strength_change_nothing(rng):
    vel = noisy(rng)
    assert torch.allclose(ensemble_simulation(vel, jitter=0, shift=0), vel, atol=0.01)
    assert torch.allclose(frequency_filter(vel, cutoff=1e4), vel, atol=0.01)
    assert torch.allclose(gaussian(vel, sigma=0.05), vel, atol=0.01)
    assert torch.allclose(bilateral(vel, sigma_vel=1e-3), vel, atol=0.01)


def test_smoothing_keeps_the_mean_and_takes_noise_away(rng):
    vel = 3000 + 100 * torch.randn(1, 1, 70, 70, generator=rng)
    for smooth in (frequency_filter, gaussian, bilateral, ensemble_simulation):
        assert (smooth(vel).mean() - vel.mean()).abs() < 10, smooth
        assert smooth(vel).std() < 0.9 * vel.std(), smooth
    assert torch.allclose(frequency_filter(vel).mean(), vel.mean(), atol=0.01)


def test_the_bilateral_filter_keeps_an_edge_that_the_gaussian_blurs():
    vel = layered()
    assert (bilateral(vel) - vel).abs().max() < 1 < 100 < (gaussian(vel) - vel).abs().max()


def test_snapping_recovers_a_layered_map_from_a_noisy_one_and_leaves_a_smooth_one(rng):
    truth = layered()
    vel = truth + 15 * torch.randn(1, 1, 70, 70, generator=rng)
    assert torch.equal(snap(truth), truth)
    assert (snap(vel) - truth).abs().max() < 5 < (vel - truth).abs().mean()
    ramp = torch.linspace(1500, 4500, 70)[:, None].expand(70, 70)[None, None].clone()
    assert torch.equal(snap(ramp), ramp)
    assert torch.equal(snap(vel, share=1.1), vel)  # no map is that layered


def test_flat_rows_and_snapping_change_their_own_families_only(rng):
    vel = (layered() + 10 * torch.randn(3, 1, 70, 70, generator=rng)).expand(3, -1, -1, -1)
    families = ["FlatVel_B", None, "Style_A"]
    flat, snapped = run_step("flat_rows", vel, families), run_step("snap", vel, families)
    assert torch.equal(flat[0], flat_rows(vel)[0]) and torch.equal(flat[1:], vel[1:])
    assert torch.equal(snapped[:2], snap(vel)[:2]) and torch.equal(snapped[2], vel[2])
    assert not torch.equal(flat[0], vel[0]) and not torch.equal(snapped[1], vel[1])


def test_statistics_of_a_biased_prediction_take_the_bias_off(rng):
    truth = 2000 + 1000 * torch.rand(20, 1, 70, 70, generator=rng)
    biased = truth + 50 + torch.linspace(0, 70, 70)[:, None]
    statistics = json.loads(json.dumps(fit_statistics(biased, truth)))
    corrected = statistical_correction(biased, statistics)
    assert mae_of(corrected, truth).mean() < 0.15 * mae_of(biased, truth).mean()
    unbiased = statistical_correction(truth, fit_statistics(truth, truth))
    assert (unbiased - truth).abs().mean() < 0.1  # only outliers move
    wild = truth.clone()
    wild[0, 0, 3, 4] = 9000
    assert statistical_correction(wild, statistics)[0, 0, 3, 4] <= truth.max()


# ---------------------------------------------------------------- choosing


def test_auto_takes_what_helps_and_nothing_that_does_not(rng):
    truth = layered().expand(12, -1, -1, -1)
    vel = truth + 15 * torch.randn(truth.shape, generator=rng)
    errors, chain, best = try_steps(vel, truth, [None] * 12)
    assert "snap" in chain and set(errors) == set(STEPS)
    assert best.mean() < 0.5 * mae_of(vel, truth).mean()
    assert try_steps(truth, truth, [None] * 12)[1] == []


def test_chance_is_no_help(rng):
    before = torch.rand(100, generator=rng)
    assert helps(before + 1, before)
    assert (
        not helps(before, before) and not helps(before, before + 1) and not helps(before[:1] + 1, before[:1])
    )
    assert not helps(before, before[torch.randperm(100, generator=rng)])


def test_a_chain_that_cannot_be_is_refused(rng, tmp_path):
    with pytest.raises(ValueError, match="--post=sharpen: expected some of ensemble_simulation"):
        check_steps(["snap", "sharpen"])
    with pytest.raises(ValueError, match="needs statistics: fit by --fit=FILE"):
        check_steps(["statistical_correction"], is_fitted=False)
    path = tmp_path / "fit.json"
    statistics = fit_statistics(noisy(rng), noisy(rng))
    good = {"ensemble_weights": [1.0], "post": ["snap"], "statistics": statistics}
    path.write_text(json.dumps(good))
    assert load_fit(path, 1) == good
    with pytest.raises(ValueError, match="fitted for 1 checkpoints, --ckpt names 2"):
        load_fit(path, 2)
    for spoilt in (
        "{",
        "[]",
        json.dumps({**good, "post": ["sharpen"]}),
        json.dumps({**good, "statistics": {}}),
    ):
        path.write_text(spoilt)
        with pytest.raises(ValueError, match="fit.json: not a file that --fit wrote"):
            load_fit(path, 1)


def test_errors_are_per_map_in_float64():
    vel = torch.zeros(2, 1, 70, 70)
    truth = vel + torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    assert mae_of(vel, truth).tolist() == [1, 3] and mae_of(vel, truth).dtype == torch.float64
    assert np.isclose(float(mae_of(vel, truth).mean()), 2)
