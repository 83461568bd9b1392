"""The training loss: L1 in m/s, with optional smoothness and weights of families."""

import torch

from utils import FAMILIES, check_family


def roughness(vel, edge_m_s=0.0):
    """Mean absolute difference of neighbouring cells: (B, 1, Z, X) m/s -> (B,) m/s.

    With `edge_m_s` > 0, a difference d counts as edge·tanh(|d| / edge): an interface costs no more than
    `edge_m_s`, so it is not smeared out. This is a bounded potential as in Geman & McClure (1985).
    """
    total = 0
    for dim in (2, 3):
        step = vel.diff(dim=dim).abs()
        if edge_m_s:
            step = edge_m_s * torch.tanh(step / edge_m_s)
        total = total + step.mean((1, 2, 3))
    return total


def parse_family_weights(words):
    """("Style_B:2", …) -> weight of each of the ten families, 1 where not named: (10,).

    Raises ValueError for words of another form, unknown families and negative weights.
    """
    weights = torch.ones(len(FAMILIES))
    for word in words:
        name, colon, value = str(word).partition(":")
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not colon or not 0 <= weight <= 1e12:
            raise ValueError(f"--family_weights={word}: expected NAME:WEIGHT with a weight of 0 or more")
        weights[FAMILIES.index(check_family(name))] = weight
    return weights


def sample_losses(prediction, vel, family, cfg, weights):
    """Loss of each sample: (B, 1, Z, X) maps in m/s and (B,) family indices -> (B,) m/s."""
    losses = (prediction - vel).abs().mean((1, 2, 3))
    if cfg.smoothness:
        losses = losses + cfg.smoothness * roughness(prediction, cfg.smoothness_edge)
    return losses * weights[family]
