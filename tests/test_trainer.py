"""The state of a training run: what learns, in which precision, under which keys."""

import pytest
import torch
from conftest import CPU, NETWORK, random_batch

from cfg import Config
from train import train_step
from training.trainer import Trainer
from utils import seed_all


@pytest.mark.parametrize(
    "extra",
    [{"confidence": True}, {"classify_family": True}, {"deep_supervision": True}, {"smoothness": 0.1}],
)
def test_every_parameter_learns_with_extra_outputs_and_losses(extra):
    trainer = Trainer(Config(lr=1e-2, warmup_steps=0, weight_decay=0.0, **NETWORK, **extra), CPU, 4)
    before = {k: v.clone() for k, v in trainer.network.named_parameters()}
    for _ in range(3):
        losses, mae, norm = train_step(trainer, [random_batch()])
    assert losses.dtype == torch.float32 and mae.isfinite() and norm.isfinite()
    still = [k for k, v in trainer.network.named_parameters() if torch.equal(before[k], v)]
    assert not still


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_gives_a_float32_loss_near_float32s(precision):
    losses = []
    for name in ("float32", precision):
        seed_all(0)
        trainer = Trainer(Config(precision=name, **NETWORK), CPU, 4)
        losses.append(train_step(trainer, [random_batch()])[0])
    assert losses[1].dtype == torch.float32
    assert torch.allclose(*losses, rtol=0.02)


def test_compiled_and_plain_runs_have_the_same_keys(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, mode: torch._dynamo.optimize("eager")(module))
    plain, compiled = (Trainer(Config(compile=mode, **NETWORK), CPU, 4) for mode in ("off", "default"))
    train_step(compiled, [random_batch()])
    assert list(plain.state()["model"]) == list(compiled.state()["model"])


def test_float16_starts_near_the_scale_that_it_ends_at():
    trainer = Trainer(Config(precision="float16", **NETWORK), CPU, 4)
    norms = [train_step(trainer, [random_batch()])[2] for _ in range(3)]
    assert sum(not norm.isfinite() for norm in norms) <= 1
    assert Trainer(Config(precision="bfloat16", **NETWORK), CPU, 4).scaler.get_scale() == 1
