"""Augmentation of gathers: each kind does what its name says, exactly where it can, and spoils no sample."""

import dataclasses

import pytest
import torch

from cfg import Config
from parallel.processes import Process
from train import train_step
from training import augment as module
from training.augment import KINDS, N_DRAWS, augment, draw, is_on, resample
from training.trainer import Trainer
from waves.acquisition import ricker
from waves.equation import simulate

CPU = Process(torch.device("cpu"))
NETWORK = {"arch": "seisnext", "head": "perfect", "width": 16, "decoder_channels": (16, 8, 8)}
ALL = {f"{kind}_p": 1.0 for kind in KINDS}


def gathers(n=2, seed=0):
    """Band-limited noise as gathers, and maps within [2000, 4000]."""
    generator = torch.Generator().manual_seed(seed)
    seis = torch.randn(n, 5, 1000, 70, generator=generator)
    band = torch.fft.rfft(ricker(1000), 2048).abs()
    seis = module.filter_time(seis, band.expand(n, -1)) / 10
    return seis, 2000 + 2000 * torch.rand(n, 1, 70, 70, generator=generator)


def draws(n=2, strength=None, seed=0):
    """Draws that choose every kind, all at one strength where given."""
    numbers, seeds = draw((n,), torch.Generator().manual_seed(seed))
    numbers[:, : len(KINDS)] = 0.0
    if strength is not None:
        numbers[:, len(KINDS) : 2 * len(KINDS)] = strength
    return numbers, seeds


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def test_it_is_off_by_default_and_switched_on_by_any_probability():
    assert not is_on(Config())
    assert all(is_on(Config(**{f"{kind}_p": 0.1})) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_chosen_samples_and_no_others(kind):
    seis, vel = gathers(4)
    given = seis.clone(), vel.clone()
    numbers, seeds = draws(4, 0.9)
    numbers[:2, : len(KINDS)] = 0.6
    got_seis, got_vel = augment(seis, vel, Config(**{f"{kind}_p": 0.5}), numbers, seeds)
    assert torch.equal(seis, given[0]) and torch.equal(vel, given[1])  # the given ones are left alone
    assert torch.equal(got_seis[:2], seis[:2]) and torch.equal(got_vel[:2], vel[:2])
    assert all(not torch.equal(got, s) for got, s in zip(got_seis[2:], seis[2:], strict=True))
    assert torch.equal(got_vel, vel) == (kind != "stretch")


def test_what_a_sample_gets_does_not_depend_on_the_batch_it_is_in():
    seis, vel = gathers(3)
    numbers, seeds = draws(3)
    cfg = Config(**ALL)
    whole = augment(seis, vel, cfg, numbers, seeds)
    for i in range(3):
        part = augment(seis[i : i + 1], vel[i : i + 1], cfg, numbers[i : i + 1], seeds[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, part, strict=True))
    other = augment(seis, vel, cfg, *draws(3, seed=1))
    assert not torch.equal(whole[0], other[0])


# ---------------------------------------------------------------- the physical scaling


@pytest.fixture(scope="module")
def layered():
    """A dipping, layered map that leaves room for c of 0.85 to 1.15, and its gather."""
    z, x = torch.meshgrid(torch.arange(70.0), torch.arange(70.0), indexing="ij")
    layer = ((z + 0.2 * x) // 18).clamp(max=4)
    vel = (1900 + 450 * layer)[None, None]
    return vel, simulate(vel)


@pytest.mark.parametrize("c, most", [(0.85, 0.03), (0.95, 0.01), (1.05, 0.01), (1.15, 0.03)])
def test_velocity_time_scaling_is_the_simulation_of_the_scaled_map(layered, c, most):
    vel, seis = layered
    cfg = Config(stretch_p=1.0, stretch=tuple(sorted((c, 1.0))))
    got_seis, got_vel = augment(seis, vel, cfg, *draws(1, 0.0 if c < 1 else 1.0))
    assert torch.allclose(got_vel, vel * c)
    n = int(min(1000, 1000 / c)) - 40  # the record's end: what lies beyond is unknown for c > 1
    true = simulate(got_vel)[:, :, :n]
    assert relative(got_seis[:, :, :n], true) < most
    # negative controls: the gather as it was, and its time axis stretched with the wavelet's
    assert relative(seis[:, :, :n], true) > 10 * most
    plain = resample(seis, torch.tensor([c]))[:, :, :n]
    assert relative(plain, true) > 10 * most


def test_scaled_velocities_stay_within_openfwis_range():
    seis, _ = gathers(4)
    vel = torch.empty(4, 1, 70, 70)
    for i, (low, high) in enumerate([(1500, 4500), (1510, 3000), (2500, 4450), (2500, 3000)]):
        vel[i] = torch.linspace(low, high, 4900).view(1, 70, 70)
    for strength in (0.0, 1.0):
        cfg = Config(stretch_p=1.0, stretch=(0.8, 1.25))
        got_seis, got = augment(seis, vel, cfg, *draws(4, strength))
        assert got.min() >= 1499.9 and got.max() <= 4500.1 and got_seis.isfinite().all()
        c = (got / vel).mean((1, 2, 3))
        expected = [1, 1500 / 1510, 0.8, 0.8] if strength == 0 else [1, 1.25, 4500 / 4450, 1.25]
        assert torch.allclose(c, torch.tensor(expected), atol=1e-4)


# ---------------------------------------------------------------- the others


def test_noise_has_the_ratio_asked_for_and_the_band_and_spread():
    seis, vel = gathers(2)
    spectra = {}
    for coloured in (0.0, 1.0):
        for decibels in (10, 30):
            cfg = Config(noise_p=1.0, noise_db=(decibels, decibels), noise_coloured=coloured)
            noise = augment(seis, vel, cfg, *draws(2))[0] - seis
            ratio = 20 * torch.log10(seis.std((1, 2, 3)) / noise.std((1, 2, 3)))
            assert torch.allclose(ratio, torch.tensor(float(decibels)), atol=0.2)
        spectra[coloured] = torch.fft.rfft(noise, dim=2).abs().square().mean((0, 1, 3))
        levels = noise.std(2).log()
        assert 0.2 < levels.std() < 0.45
    low, high = slice(5, 40), slice(100, 400)  # Hz, in samples of 1 s
    assert spectra[1.0][high].mean() < 1e-3 * spectra[1.0][low].mean()
    assert 0.5 < spectra[0.0][high].mean() / spectra[0.0][low].mean() < 2
    even = augment(seis, vel, Config(noise_p=1.0, noise_coloured=0.0, noise_spread=0.0), *draws(2))[0] - seis
    assert (even.std(2) / even.std((1, 2, 3))[:, None, None] - 1).abs().max() < 0.15


def test_gain_is_one_factor_within_its_range():
    seis, vel = gathers(2)
    for strength, factor in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0)):
        got, _ = augment(seis, vel, Config(gain_p=1.0, gain=(0.5, 2.0)), *draws(2, strength))
        assert torch.allclose(got, seis * factor, rtol=1e-5)


def test_shift_moves_whole_samples_either_way_and_fills_with_zeros():
    seis, vel = gathers(1)
    seen = {}
    for strength in (0.0, 0.5, 0.999):
        seen[strength] = augment(seis, vel, Config(shift_p=1.0, shift=3), *draws(1, strength))[0]
    assert torch.equal(seen[0.0][:, :, :-3], seis[:, :, 3:]) and not seen[0.0][:, :, -3:].any()
    assert torch.equal(seen[0.5], seis)
    assert torch.equal(seen[0.999][:, :, 3:], seis[:, :, :-3]) and not seen[0.999][:, :, :3].any()


def test_dropout_takes_at_most_so_many_shots_and_receivers_and_never_all():
    seis, vel = gathers(1)
    lost = set()
    for seed in range(40):
        cfg = Config(shot_drop_p=1.0, shot_drop=4)
        got, _ = augment(seis, vel, cfg, *draws(1, seed=seed))
        alive = got.abs().amax((2, 3))[0] > 0
        assert torch.equal(got[0, alive], seis[0, alive]) and 1 <= alive.sum() <= 4
        lost.add(int((~alive).sum()))
        cfg = Config(receiver_drop_p=1.0, receiver_drop=0.1)
        got, _ = augment(seis, vel, cfg, *draws(1, seed=seed))
        alive = got.abs().amax((1, 2))[0] > 0
        assert torch.equal(got[..., alive], seis[..., alive]) and 63 <= alive.sum() <= 69
    assert lost == {1, 2, 3, 4}


# ---------------------------------------------------------------- extremes


def extremes():
    one_shot = torch.zeros(1, 5, 1000, 70)
    one_shot[:, 2] = 1.0
    one_value = torch.zeros(1, 5, 1000, 70)
    one_value[0, 4, 999, 69] = 1e-20
    return {
        "zeros": torch.zeros(1, 5, 1000, 70),
        "constant": torch.full((1, 5, 1000, 70), 3.0),
        "float16's largest": torch.full((1, 5, 1000, 70), 65504.0)
        * (torch.rand(1, 5, 1000, 70) - 0.5).sign(),
        "float32's largest": torch.full((1, 5, 1000, 70), 3e38),
        "tiny": torch.full((1, 5, 1000, 70), 1e-42),
        "one shot": one_shot,
        "one value": one_value,
    }


@pytest.mark.parametrize("name", extremes())
@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_no_gather_becomes_nan_infinite_or_zero_throughout(name, kind):
    seis, vel = extremes()[name], gathers(1)[1]
    kinds = ALL if kind == "all" else {f"{kind}_p": 1.0}
    cfg = Config(**kinds, shot_drop=4, receiver_drop=0.9, shift=999, stretch=(0.5, 2.0), noise_db=(-40, 40))
    for seed in range(3):
        got_seis, got_vel = augment(seis, vel, cfg, *draws(1, seed=seed))
        assert got_seis.isfinite().all() and got_vel.isfinite().all()
        assert got_seis.any() or name == "zeros"
        if not got_seis.any() or torch.equal(got_seis, seis):
            assert torch.equal(got_vel, vel) or kind == "stretch"


def test_what_would_spoil_a_gather_is_taken_back_with_its_map(monkeypatch):
    seis, vel = gathers(2)
    spoil = {"nan": float("nan"), "infinite": float("inf"), "zero": 0.0}
    for value in spoil.values():

        def spoiled(seis, vel, *rest, value=value):
            seis[0] *= 0
            seis[0] += value
            return seis, vel + 1

        monkeypatch.setitem(KINDS, "stretch", spoiled)
        got_seis, got_vel = augment(seis, vel, Config(stretch_p=1.0), *draws(2))
        assert torch.equal(got_seis, seis)
        assert torch.equal(got_vel[0], vel[0]) and torch.equal(got_vel[1], vel[1] + 1)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["zeros", "constant", "float16's largest"])
def test_a_step_in_reduced_precision_stays_finite_on_augmented_extremes(precision, name):
    cfg = Config(precision=precision, input_scaling="signed_log", batch_size=2, **ALL, **NETWORK)
    trainer = Trainer(cfg, CPU, 4)
    batch = trainer.prepare(
        0, extremes()[name].expand(2, -1, -1, -1).half(), gathers(2)[1], torch.zeros(2, dtype=torch.long)
    )
    for _ in range(12):  # float16 finds its loss scale by leaving out steps
        losses, mae, norm = train_step(trainer, [batch])
        assert losses.isfinite().all() and mae.isfinite()
        if norm.isfinite():
            break
    assert norm.isfinite()
    assert all(p.isfinite().all() for p in trainer.network.parameters())


# ---------------------------------------------------------------- in training


def prepared(world, size, accumulate, step=3):
    """The global batch of a step of 8 samples, as ranks and accumulated batches of this size get it."""
    seis, vel = gathers(8)
    family = torch.arange(8)
    parts = []
    for micro in range(accumulate):
        for rank in range(world):
            cfg = Config(batch_size=size, accumulate=accumulate, **dict.fromkeys(ALL, 0.5), **NETWORK)
            trainer = Trainer(cfg, CPU, 4, torch.nn.Conv2d(5, 1, 1))
            trainer.step, trainer.process = step, dataclasses.replace(CPU, rank=rank, world=world)
            first = (micro * world + rank) * size
            some = slice(first, first + size)
            parts.append(trainer.prepare(micro, seis[some], vel[some], family[some]))
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def test_a_step_gets_the_same_samples_on_any_number_of_ranks_and_accumulated_batches():
    whole = prepared(1, 8, 1)
    for world, size, accumulate in ((2, 4, 1), (1, 4, 2), (2, 2, 2)):
        got = prepared(world, size, accumulate)
        assert all(torch.equal(a, b) for a, b in zip(whole, got, strict=True))
    assert not torch.equal(prepared(1, 8, 1, step=4)[0], whole[0])


@pytest.mark.parametrize(
    "wrong",
    [{"gain": (0.0, 1.0)}, {"gain": (2.0, 1.0)}, {"stretch": (1.0,)}, {"stretch": (1.1, 1.2)}]
    + [{"noise_p": 1.5}, {"shot_drop": 5}, {"receiver_drop": 1.0}, {"noise_coloured": 2.0}],
)
def test_ranges_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}=.*expected"):
        Config(**wrong)
    assert N_DRAWS == 2 * len(KINDS) + 76


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_same_draws_do_the_same():
    seis, vel = gathers(4)
    cfg = Config(**{k: p for k, p in ALL.items() if k != "noise_p"})
    on_cpu = augment(seis, vel, cfg, *draws(4))
    on_cuda = augment(seis.cuda(), vel.cuda(), cfg, *draws(4))
    assert all(relative(b.cpu(), a) < 1e-4 for a, b in zip(on_cpu, on_cuda, strict=True))
