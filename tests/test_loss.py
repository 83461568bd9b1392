"""What training minimises."""

import pytest
import torch
from conftest import random_batch

from cfg import Config
from training.loss import parse_family_weights, roughness, sample_losses
from utils import FAMILIES


def test_roughness_is_the_total_variation_and_its_edge_aware_form_bounds_each_edge():
    vel = torch.full((1, 1, 70, 70), 2000.0)
    assert roughness(vel).item() == roughness(vel, 50.0).item() == 0
    vel[..., 35:, :] = 4000  # one interface of 2000 m/s
    assert roughness(vel).item() == pytest.approx(2000 / 69)
    assert roughness(vel, 50.0).item() == pytest.approx(50 / 69, rel=1e-3)
    ripple = 2000 + torch.randn(2, 1, 70, 70)
    assert torch.allclose(roughness(ripple, 1000.0), roughness(ripple), rtol=1e-4)


def test_loss_is_the_mean_absolute_error_plus_what_is_asked_for():
    _, vel, family = random_batch(3)
    prediction = vel + torch.randn_like(vel)
    plain = sample_losses(prediction, vel, family, Config(), torch.ones(10))
    assert torch.allclose(plain, (prediction - vel).abs().mean((1, 2, 3)))
    smooth = sample_losses(prediction, vel, family, Config(smoothness=0.1), torch.ones(10))
    assert torch.allclose(smooth, plain + 0.1 * roughness(prediction))
    weights = parse_family_weights(("FlatVel_A:3", "Style_B:0.5"))
    assert torch.allclose(sample_losses(prediction, vel, family, Config(), weights), 3 * plain)
    assert weights[FAMILIES.index("Style_B")] == 0.5 and weights.sum() == 8 + 3.5
    for word in ("FlatVel_A", "FlatVel_A:x", "FlatVel_A:-1", "FlatVel_A:nan", "FlatVel_A:inf"):
        with pytest.raises(ValueError, match="expected NAME:WEIGHT"):
            parse_family_weights((word,))
    with pytest.raises(ValueError, match="unknown family"):
        parse_family_weights(("Flat:1",))
