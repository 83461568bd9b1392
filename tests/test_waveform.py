import pytest
import torch

import waves
from inversion.feedback import feedback
from report.scores import spearman
from waves.misfit import WARNINGS, compare, is_flat, log_misfit, misfit, simulated


def maps():
    """A flat map and one with a dipping interface, (2, 1, 70, 70)."""
    depth = torch.arange(70.0)[:, None].expand(70, 70)
    flat = torch.where(depth < 30, 1800.0, 3000.0)
    dipping = torch.where(depth < 20 + torch.arange(70) / 3, 1800.0, 3000.0)
    return torch.stack([flat, dipping])[:, None]


@pytest.fixture(scope="module")
def gathers():
    return simulated(maps())


@pytest.mark.parametrize("measure", [misfit, log_misfit])
def test_the_misfit_of_the_same_gather_is_zero_and_of_its_opposite_two(measure, gathers):
    assert (measure(gathers, gathers) == 0).all()
    assert torch.allclose(measure(gathers, -gathers), torch.tensor(2.0))
    assert torch.allclose(measure(gathers, 0 * gathers), torch.tensor(1.0))


@pytest.mark.parametrize("measure", [misfit, log_misfit])
def test_the_last_sample_does_not_count_and_the_one_before_does(measure, gathers):
    for sample, counts in ((-1, False), (-2, True)):
        changed = gathers.clone()
        changed[:, :, sample] += 100
        assert (measure(gathers, changed) > 0).all() == counts


def test_the_log_misfit_sees_faint_echoes_that_the_misfit_does_not(gathers):
    late = gathers.clone()
    late[:, :, 600:] = 0
    assert (log_misfit(gathers, late) > 10 * misfit(gathers, late)).all()


def test_rank_correlation_of_orders_ties_and_constants():
    a = [3.0, 1.0, 2.0, 5.0]
    assert spearman(a, [x**3 for x in a]) == pytest.approx(1)
    assert spearman(a, [-x for x in a]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # ties share their mean rank
    assert spearman(a, [1] * 4) != spearman(a, [1] * 4)  # NaN


def test_gathers_unlike_openfwis_are_recognised(gathers):
    prediction = simulated(maps() * 1.02)  # not the truth: warnings must not need it
    dead = gathers.clone()
    dead[0, 2, :, 40] = 0
    for seis, found in (
        (gathers, set()),
        (-gathers, {"inverted"}),
        (gathers / 1000, {"scaled"}),
        (-1000 * gathers, {"inverted", "scaled"}),
        (dead, {"dead"}),
    ):
        found_here = compare(seis, prediction)
        assert {name for name in WARNINGS if found_here[name][0]} == found


def test_flat_layers_are_recognised_by_their_gather(gathers):
    assert is_flat(gathers).tolist() == [True, False]
    assert is_flat(gathers.half().float()).tolist() == [True, False]  # public copies are float16


def surface_reader(seis, factor=1.05):
    """A network of sorts: sample 0 at the first source gives the velocity there, 5 % too high."""
    v = (seis[:, 0, 0, 0] / waves.ricker(1)[0]).clamp(min=0).sqrt() / 1e-3 * factor
    return v.clamp(1500, 4500).view(-1, 1, 1, 1).expand(-1, 1, 70, 70).contiguous()


def test_feedback_makes_a_biased_network_right():
    truth = torch.full((2, 1, 70, 70), 2000.0)
    truth[1] = 2600
    seis = simulated(truth)
    start = surface_reader(seis)
    vel, trace = feedback(surface_reader, seis, start, n_rounds=6, step=0.8)
    assert (start - truth).abs().min() > 90
    assert (vel - truth).abs().max() < 1 and (trace[-1] < 0.05 * trace[0]).all()


def test_feedback_halves_a_step_that_is_too_long_until_it_helps():
    """From 16 the first five trials only make it worse; were the step kept, every later one would too."""
    truth = torch.full((1, 1, 70, 70), 2000.0)
    seis = simulated(truth)
    start = surface_reader(seis)
    _, trace = feedback(surface_reader, seis, start, n_rounds=3, step=16.0)
    assert (trace == trace[0]).all()
    vel, trace = feedback(surface_reader, seis, start, n_rounds=10, step=16.0)
    assert trace[-1] < 0.2 * trace[0] and (vel - truth).abs().max() < 20 < (start - truth).abs().min()


def test_feedback_leaves_alone_what_a_trial_makes_infinite(gathers):
    def overflows(seis):
        return torch.full((len(seis), 1, 70, 70), torch.inf)

    vel, trace = feedback(overflows, gathers, maps() * 1.1, n_rounds=2)
    assert torch.equal(vel, maps() * 1.1) and (trace == trace[0]).all()


@pytest.mark.parametrize("step", [0.8, 100.0])
def test_feedback_never_raises_a_misfit_whatever_the_network(step, gathers):
    generator = torch.Generator().manual_seed(0)

    def noise(seis):
        return maps() + 300 * torch.randn(len(seis), 1, 70, 70, generator=generator).clamp(-2, 2)

    start = maps() * torch.tensor([1.0, 1.1]).view(2, 1, 1, 1)  # the first is the truth
    vel, trace = feedback(noise, gathers, start, n_rounds=3, step=step)
    assert (trace.diff(dim=0) <= 0).all()
    assert torch.equal(vel[0], start[0])
    assert torch.allclose(misfit(gathers, simulated(vel)), trace[-1], atol=1e-4)
    assert torch.equal(feedback(noise, gathers, start, n_rounds=0)[0], start)
