"""Predictions asked of the wave equation: misfit to the observed gather, feedback, flat ground recognised."""

import torch

import waves
from utils import V_MAX, V_MIN


@torch.no_grad()
def simulated(vel):
    """Gathers (B, S, T, R) of maps (B, 1, Z, X), brought into OpenFWI's range of velocities."""
    return waves.simulate(vel.float().clamp(V_MIN, V_MAX))


def norm(seis):
    return seis.flatten(1).norm(dim=1)


def misfit(seis, other):
    """‖other − seis‖ / ‖seis‖ of each gather (B, S, T, R): (B,).

    The last sample is left out: the real data's does not follow the scheme.
    """
    seis, other = seis[:, :, :-1], other[:, :, :-1]
    return norm(other - seis) / norm(seis).clamp(min=1e-30)


MISFITS = ("misfit", "log_misfit")

FLOOR = 0.01  # amplitude below which the logarithm is linear: late echoes are that faint


def log_misfit(seis, other):
    """As `misfit`, of both gathers' signed logarithms: (B,).

    Echoes of deep layers, a thousand times fainter than the first arrival, then count: it ranks errors
    better (EXPERIMENTS.md).
    """
    return misfit(*(x.sign() * torch.log1p(x.abs() / FLOOR) for x in (seis, other)))


WARNINGS = {  # column: what it says
    "inverted": "fit better with the sign reversed: is their polarity wrong?",
    "scaled": "have amplitudes beyond half to twice those of their prediction: are their units wrong?",
    "dead": "have dead traces",
}


def compare(seis, other):
    """Observed and simulated gathers (B, S, T, R) -> {each of MISFITS: (B,), of WARNINGS: (B,) bool}."""
    seis, other = seis.float(), other.float()
    x, y = seis[:, :, :-1], other[:, :, :-1]
    ratio = norm(x) / norm(y).clamp(min=1e-30)
    fit, reversed_fit = misfit(seis, other), misfit(seis, -other)
    # both misfits change when amplitudes are wrong too: compare after scaling to equal energy
    likeness = (x * y).flatten(1).sum(1) / (norm(x) * norm(y)).clamp(min=1e-30)
    return {
        "misfit": fit,
        "log_misfit": log_misfit(seis, other),
        "inverted": (likeness < -0.3) & (reversed_fit < fit),
        "scaled": (ratio < 0.5) | (ratio > 2),
        "dead": (x == 0).all(2).flatten(1).any(1),
    }


def is_flat(seis, tolerance=0.01):
    """Whether a gather (B, S, T, R) is its own mirror image, as above flat layers: (B,) bool.

    Only the outer shots (cells 0 and 69, 17 and 52) have mirror images.
    """
    difference = torch.cat([seis[:, 0] - seis[:, 4].flip(2), seis[:, 1] - seis[:, 3].flip(2)], 1)
    return norm(difference) < tolerance * norm(torch.cat([seis[:, 0], seis[:, 1]], 1))
