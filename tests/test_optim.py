"""Optimizers and the learning-rate schedule."""

import copy
import math

import pytest
import torch
from conftest import CPU, NETWORK, random_batch

from cfg import Config
from networks.checkpoints import load_checkpoint
from train import train_step
from training.optim import MuonAdamW, Schedule, build_optimizer
from training.trainer import Trainer

MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def test_the_schedule_warms_up_holds_and_falls():
    cfg = Config(lr=1.0, min_lr=0.0, warmup_steps=4, constant_share=0.25, **NETWORK)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    schedule = Schedule(optimizer, cfg, n_steps=20)
    rates = []
    for step in range(21):
        schedule.set(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates[4:9] == pytest.approx([1] * 5)  # a quarter of the sixteen steps after warm-up
    assert rates[8:] == pytest.approx([(1 + math.cos(math.pi * k / 12)) / 2 for k in range(13)])


@MUON
def test_muon_takes_each_parameter_once_and_moves_kernels_like_adamw_moves_them():
    trainer = Trainer(Config(optimizer="muon", lr=1e-3, warmup_steps=0, **NETWORK), CPU, 4)
    optimizer = trainer.optimizer
    assert isinstance(optimizer, MuonAdamW)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in trainer.network.parameters())
    hidden = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in hidden]
    for _ in range(2):  # the first finds residual branches that start at zero
        train_step(trainer, [random_batch()])
    rms = [(p.detach() - old).square().mean().sqrt().item() for p, old in zip(hidden, before, strict=True)]
    assert min(rms) > 0 and max(rms) < 2e-3 and 0.1e-3 < sorted(rms)[len(rms) // 2]  # 0.2 of the rate a step


@MUON
def test_a_run_with_muon_resumes_bit_for_bit(train_here):
    whole = load_checkpoint(train_here("--optimizer=muon", "--save_minutes=0") / "last.pt")
    trainer = Trainer(Config(**whole["cfg"]), CPU, 4)
    trainer.restore(whole, "run")
    again = Trainer(Config(**whole["cfg"]), CPU, 4)
    again.restore(copy.deepcopy(trainer.state()), "run")
    for each in (trainer, again):
        train_step(each, [random_batch()])
    pairs = zip(trainer.network.parameters(), again.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_muon_one_line_says_so(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="has no Muon"):
        build_optimizer(torch.nn.Linear(2, 2), Config(optimizer="muon"))


@MUON
@pytest.mark.parametrize("step", [0, 1])
def test_muon_takes_a_step_back_that_is_not_finite_without_asking_the_device(step, monkeypatch):
    """The scaler hands the answer over as a tensor; its own way, `item`, would wait for a card."""
    trainer = Trainer(Config(optimizer="muon", warmup_steps=0, **NETWORK), CPU, 4)
    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", lambda *args: pytest.fail("asked"))
    for _ in range(step):
        train_step(trainer, [random_batch()])
    before = [p.clone() for p in trainer.network.parameters()]
    state = copy.deepcopy(trainer.optimizer.state_dict())
    seis, vel, family = random_batch()
    train_step(trainer, [(seis * math.inf, vel, family)])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    for name, part in trainer.optimizer.state_dict().items():
        for k, values in part["state"].items():
            for key, value in values.items():
                assert torch.equal(value, state[name]["state"].get(k, {}).get(key, torch.zeros_like(value)))
    train_step(trainer, [random_batch()])
    assert all(p.isfinite().all() for p in trainer.network.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
