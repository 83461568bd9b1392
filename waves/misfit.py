"""Predictions compared with the observed gather: misfits, warnings, and whether the ground is flat."""

import torch

import waves
from utils import V_MAX, V_MIN


@torch.no_grad()
def simulated(vel):
    """Simulate maps (B, 1, Z, X) m/s, clamped to OpenFWI's range of velocities -> gathers (B, S, T, R)."""
    return waves.simulate(vel.float().clamp(V_MIN, V_MAX))


def norm(seis):
    """Norm of each gather (B, S, T, R): (B,)."""
    return seis.flatten(1).norm(dim=1)


def misfit(seis, other):
    """Relative misfit ‖other − seis‖ / ‖seis‖ of each gather (B, S, T, R): (B,).

    The last sample, which in OpenFWI's data does not follow the scheme, is left out.
    """
    seis, other = seis[:, :, :-1], other[:, :, :-1]
    return norm(other - seis) / norm(seis).clamp(min=1e-30)


MISFITS = ("misfit", "log_misfit")

LINEAR_BELOW = 0.01  # amplitude below which the signed logarithm is about linear: late echoes are that faint


def log_misfit(seis, other):
    """`misfit` of the gathers' signed logarithms: (B,).

    In logarithms the echoes of deep layers count, which are a thousand times fainter than the first arrival.
    This ranks the errors of predictions better (EXPERIMENTS.md).
    """
    return misfit(*(x.sign() * torch.log1p(x.abs() / LINEAR_BELOW) for x in (seis, other)))


WARNINGS = {  # column: what it says of the gathers that it marks
    "inverted": "fit better with the sign reversed: is their polarity wrong?",
    "scaled": "have amplitudes beyond half to twice those of their prediction: are their units wrong?",
    "dead": "have dead traces",
}


def compare(seis, other):
    """Compare observed with simulated gathers (B, S, T, R): {a misfit: (B,), a warning: (B,) bool}."""
    seis, other = seis.float(), other.float()
    x, y = seis[:, :, :-1], other[:, :, :-1]
    ratio = norm(x) / norm(y).clamp(min=1e-30)
    fit, reversed_fit = misfit(seis, other), misfit(seis, -other)
    # wrong amplitudes change both misfits too, so that polarity is judged by the correlation
    likeness = (x * y).flatten(1).sum(1) / (norm(x) * norm(y)).clamp(min=1e-30)
    return {
        "misfit": fit,
        "log_misfit": log_misfit(seis, other),
        "inverted": (likeness < -0.3) & (reversed_fit < fit),
        "scaled": (ratio < 0.5) | (ratio > 2),
        "dead": (x == 0).all(2).flatten(1).any(1),
    }


def is_flat(seis, tolerance=0.01):
    """Whether each gather (B, S, T, R) is its own mirror image, as it is above flat layers: (B,) bool.

    Compares the four outer shots, at cells 0 and 69 and at 17 and 52; the centre shot has no mirror image.
    """
    difference = torch.cat([seis[:, 0] - seis[:, 4].flip(2), seis[:, 1] - seis[:, 3].flip(2)], 1)
    return norm(difference) < tolerance * norm(torch.cat([seis[:, 0], seis[:, 1]], 1))
