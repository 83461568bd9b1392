"""Predictions asked of the wave equation: misfit to the observed gather, feedback, flat ground recognised."""

import math

import torch

import waves
from utils import V_MAX, V_MIN

# ---------------------------------------------------------------- misfit


@torch.no_grad()
def simulated(vel):
    """Gathers (B, S, T, R) of maps (B, 1, Z, X), brought into OpenFWI's range of velocities."""
    return waves.simulate(vel.float().clamp(V_MIN, V_MAX))


def _norm(seis):
    return seis.flatten(1).norm(dim=1)


def misfit(seis, other):
    """‖other − seis‖ / ‖seis‖ of each gather (B, S, T, R): (B,).

    The last sample is left out: the real data's does not follow the scheme.
    """
    seis, other = seis[:, :, :-1], other[:, :, :-1]
    return _norm(other - seis) / _norm(seis).clamp(min=1e-30)


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
    ratio = _norm(x) / _norm(y).clamp(min=1e-30)
    fit, reversed_fit = misfit(seis, other), misfit(seis, -other)
    # both misfits change when amplitudes are wrong too: compare after scaling to equal energy
    likeness = (x * y).flatten(1).sum(1) / (_norm(x) * _norm(y)).clamp(min=1e-30)
    return {
        "misfit": fit,
        "log_misfit": log_misfit(seis, other),
        "inverted": (likeness < -0.3) & (reversed_fit < fit),
        "scaled": (ratio < 0.5) | (ratio > 2),
        "dead": (x == 0).all(2).flatten(1).any(1),
    }


def spearman(a, b):
    """Rank correlation of two sequences (N,); NaN where one is constant."""
    ranks = []
    for values in (a, b):
        _, group, counts = torch.tensor(list(values)).double().unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[group].double())  # equal values share a rank
    a, b = (r - r.mean() for r in ranks)
    return float((a @ b) / (a.norm() * b.norm())) if len(a) > 1 else math.nan


def is_flat(seis, tolerance=0.01):
    """Whether a gather (B, S, T, R) is its own mirror image, as above flat layers: (B,) bool.

    Only the outer shots (cells 0 and 69, 17 and 52) have mirror images.
    """
    difference = torch.cat([seis[:, 0] - seis[:, 4].flip(2), seis[:, 1] - seis[:, 3].flip(2)], 1)
    return _norm(difference) < tolerance * _norm(torch.cat([seis[:, 0], seis[:, 1]], 1))


# ---------------------------------------------------------------- feedback


@torch.no_grad()
def feedback(model, seis, vel, n_rounds=3, step=0.8):
    """Feed the network its own residual: x <- x - step (F(M(x)) - x_observed), F the wave equation.

    model: M, full gathers (B, 5, 1000, 70) -> maps (B, 1, 70, 70) m/s; seis: observed; vel: M(seis). Each
    sample keeps the map of least misfit, and its own step, halved where the misfit grew and the trial is
    undone. Returns the maps and each one's misfits (n_rounds + 1, B), which never grow. Source: the 14th
    place of the Kaggle competition (2025).
    """
    fed, residual = seis, _residual(vel, seis)
    best, least = vel, _norm(residual)
    steps = torch.full_like(least, step)
    scale = _norm(seis[:, :, :-1]).clamp(min=1e-30)
    trace = [least / scale]
    for _ in range(n_rounds):
        trial = fed - steps.view(-1, 1, 1, 1) * residual
        trial_vel = model(trial)
        trial_residual = _residual(trial_vel, seis)
        better = _norm(trial_residual) < least
        chosen = better.view(-1, 1, 1, 1)
        fed, residual = torch.where(chosen, trial, fed), torch.where(chosen, trial_residual, residual)
        best, least = torch.where(chosen, trial_vel, best), torch.where(better, _norm(trial_residual), least)
        steps = torch.where(better, steps, steps / 2)
        trace.append(least / scale)
    return best, torch.stack(trace)


def _residual(vel, seis):
    residual = simulated(vel) - seis
    residual[:, :, -1] = 0  # the last sample does not follow the scheme
    return residual
