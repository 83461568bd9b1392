import pytest
import torch

import waves
from inference.tta import DELAY, VIEWS, add_noise, make_views, predict, predict_views, stretch_time
from waves.misfit import misfit

ALL = tuple(name for name in VIEWS if name != "plain")


def network(seis):
    """Maps between 2000 and 3000 m/s that depend on the gather."""
    return 2500 + 500 * torch.tanh(seis[:, :1, :70].mean(2, keepdim=True).expand(-1, -1, 70, -1))


def test_the_full_set_has_at_least_five_views_whose_weights_sum_to_one():
    for names in ((), ("mirror",), ALL):
        views = make_views(names)
        assert sum(view.weight for view in views) == pytest.approx(1) and views[0].name == "plain"
    assert len(views) >= 5 and len({view.name for view in views}) == len(views)


def test_weights_given_replace_their_kind_and_are_normalised():
    views = {view.name: view.weight for view in make_views(("mirror:2", "noise:0.5"))}
    assert views == pytest.approx({"plain": 0.25, "mirror": 0.5, "noise 1": 0.125, "noise 2": 0.125})


def test_no_view_but_the_plain_one_is_the_network_itself():
    seis = torch.randn(2, 5, 1000, 70)
    assert torch.equal(predict(network, seis, make_views(())), network(seis))
    maps = predict_views(network, seis, make_views(ALL))
    assert maps.shape == (len(make_views(ALL)), 2, 1, 70, 70)
    assert maps.min() >= 1500 and maps.max() <= 4500
    median = predict(network, seis, make_views(ALL), combine="median")
    assert (median - maps).abs().min(0).values.max() < 200 and not torch.equal(median, network(seis))


def test_noise_is_the_same_each_time_and_as_strong_as_said():
    seis = torch.randn(2, 5, 1000, 70) * torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    noisy = add_noise(seis, seed=1, snr_db=20)
    assert torch.equal(noisy, add_noise(seis, seed=1, snr_db=20)) and not torch.equal(
        noisy, add_noise(seis, 2, 20)
    )
    for x, y in zip(seis, noisy, strict=True):
        assert ((y - x).std() / x.std()).item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 1.5])
def test_a_stretched_ramp_is_exact_and_ends_in_zeros(factor):
    t = torch.arange(1000.0)
    seis = t[None, None, :, None].expand(1, 5, 1000, 70)
    source = DELAY + factor * (t - DELAY)
    inside = (source >= 0) & (source <= 999)
    stretched = stretch_time(seis, factor)
    assert stretched.shape == seis.shape
    assert torch.allclose(stretched[0, 0, inside, 0], source[inside], atol=1e-3)
    assert (stretched[0, 0, (source <= -1) | (source >= 1000)] == 0).all()
    assert torch.equal(stretch_time(seis, 1.0), seis)


def test_stretching_time_is_the_experiment_on_the_faster_map():
    depth = torch.arange(70)[:, None].expand(70, 70)
    vel = torch.where(depth < 30, 2000.0, 3000.0)[None, None]
    seis, faster = waves.simulate(vel), waves.simulate(1.01 * vel)
    right, wrong = (misfit(faster, stretch_time(seis, c)).item() for c in (1.01, 1 / 1.01))
    assert waves.ricker(1000).argmax() == DELAY
    assert right < 0.5 * misfit(faster, seis).item() and wrong > misfit(faster, seis).item()


def test_each_view_of_a_perfect_network_is_the_map_itself():
    """A network that knows a map up to a factor: a view that forgot to undo its stretching is 1 % off."""
    depth = torch.arange(70)[:, None].expand(70, 70)
    vel = torch.where(depth < 30, 2000.0, 3000.0)[None, None]
    factors = torch.tensor([0.98, 0.99, 1.0, 1.01, 1.02])
    known = waves.simulate(torch.cat([factor * vel for factor in factors]))

    def perfect(seis):
        return factors[misfit(known, seis.expand_as(known)).argmin()] * vel

    seis = waves.simulate(vel)
    assert torch.equal(perfect(known[4:]), 1.02 * vel)  # it tells them apart
    views = make_views(ALL)
    for view, seen in zip(views, predict_views(perfect, seis, views), strict=True):
        assert (seen - vel).abs().max() < 0.5, view.name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_a_network_gives_beyond_numbers_is_not_hidden_by_the_range(value):
    maps = predict_views(lambda seis: network(seis) + value, torch.randn(1, 5, 1000, 70), make_views(ALL))
    assert maps.isnan().all()


@pytest.mark.parametrize(
    "words, message",
    [
        (("mirrors",), "--tta=mirrors: expected names of plain, mirror"),
        (("mirror:",), "--tta=mirror:: expected names of"),
        (("mirror:-1",), "--tta=mirror:-1: expected names of"),
        (("mirror:nan",), "--tta=mirror:nan: expected names of"),
        (("flip:1",), "--tta=flip:1: expected names of"),
        (("plain:0", "mirror:0"), "--tta=plain:0,mirror:0: all weights are 0"),
    ],
)
def test_unknown_views_and_impossible_weights_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        make_views(words)
