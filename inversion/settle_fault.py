"""A fault nearly found is settled: whole unknowns, and how rounding decided at each half cell of a ripple.

A soft fault leaves ripples as faint as rounding, and at each of them rounding decided whether the old
velocity stayed (`synthetic.soft_fault.undecided`). Each decision is an unknown of its own, true or false.
"""

import itertools
import math

import numpy as np
import torch

from inversion.gauss_newton import least_squares_in_box
from inversion.parameters import Fault

HOPELESS_NORM = 0.05  # above this residual norm a map is too wrong to be settled
VELOCITY_STEP = 3.0  # m/s, for derivatives by differences
MAX_MOVE = 20.0  # times VELOCITY_STEP: how far a velocity may move at once
FLIP_PENALTIES = (0.003, 0.03)  # of deciding otherwise than our own rounding, times the squared residual norm
FLIP_THRESHOLDS = (0.3, 0.5, 0.7)  # a decision is changed if least squares takes more than this share of it


def norms_of(observed, trials, n_samples=1000):
    """Residual norms of the sharp maps of trials, (theta, model) each: (N,)."""
    return observed.residuals([model.sharp(theta) for theta, model in trials], n_samples).norm(dim=1)


def _derivatives(observed, theta, model):
    """Residuals (D,), their changes with each velocity and each decision (P, D), the decisions' masks."""
    masks, steps = model.flips(theta), VELOCITY_STEP * np.eye(len(theta))[: model.n + 1]
    flipped = [Fault(model.n, model.mirrored, model.flipped ^ mask) for mask in masks]
    maps = [model.sharp(theta), *(model.sharp(theta + step) for step in steps)]
    residuals = observed.residuals(maps + [one.sharp(theta) for one in flipped], 1000)
    return residuals[0], residuals[1:] - residuals[0], masks


def _neighbours(observed, theta, model, derivatives, moves):
    """The most promising moves, each with velocities and decisions fitted again: [(theta, model), ...].

    The derivatives at theta serve for all moves, since velocities and decisions act much alike nearby.
    """
    residual, rows, masks = derivatives
    n, moved = model.n + 1, [model.clip(theta + move) for move in moves]
    rest = observed.residuals([model.sharp(t) for t in moved], 1000)
    gram, slopes = (rows @ rows.T).cpu().double(), (rows @ rest.T).cpu().double()
    gram.diagonal()[n:] += FLIP_PENALTIES[0] * float(residual @ residual)
    gram.diagonal().add_(1e-9 * gram.diagonal().mean())  # a layer that lies outside has no derivative
    gains = (slopes * torch.linalg.solve(gram, slopes)).sum(0)
    best = (rest.square().sum(1) - gains).argsort()[:4].tolist()
    bounds = np.repeat([[-MAX_MOVE, 0.0], [MAX_MOVE, 1.0]], (n, len(masks)), axis=1)
    trials = []
    for k, penalty in itertools.product(best, FLIP_PENALTIES):
        penalties = np.repeat([0, penalty * float(rest[k] @ rest[k])], (n, len(masks)))
        shares = least_squares_in_box(rows, rest[k], bounds, penalties)[n:]
        for threshold in FLIP_THRESHOLDS:
            chosen = shares > threshold
            unexplained = rest[k] + rows[n:][torch.from_numpy(chosen)].sum(0)
            fitted = moved[k].copy()
            fitted[:n] += VELOCITY_STEP * least_squares_in_box(rows[:n], unexplained, bounds[:, :n])
            other = Fault(model.n, model.mirrored, model.flipped ^ masks[chosen].any(0))
            trials.append((model.clip(np.rint(fitted)), other))
    return trials


def refit_decisions(observed, theta, model):
    """Velocities and decisions fitted with derivatives taken at theta: (theta, model, residual norm).

    For where a move has led: decisions that were fitted elsewhere are dropped first.
    """
    plain, norm = Fault(model.n, model.mirrored), math.inf
    for _ in range(2):
        trials = _neighbours(observed, theta, plain, _derivatives(observed, theta, plain), [0 * theta])
        norms = norms_of(observed, trials)
        best = int(norms.argmin())
        if float(norms[best]) >= norm or observed.out_of_time:
            break
        (theta, model), norm = trials[best], float(norms[best])
    return theta, model, norm


def _kinds_of_moves(n_unknowns, n_velocities):
    """Kinds of moves of depths and fault, in the order to try them, and that of small moves of its ends."""
    unit = np.eye(n_unknowns)[n_velocities:]

    def ends(*steps):
        return np.array(list(itertools.product(steps, repeat=2))) @ unit[-3:-1]

    single = np.concatenate([0 * unit[:1], unit, -unit])
    throws = np.concatenate([by * unit[-1] + ends(-1, 0, 1) for by in range(-5, 6)])
    wide = np.concatenate([by * unit[-1] + ends(*range(-6, 7, 2)) for by in (-2, -1, 1, 2)])
    # the side that stays moves up or down by a cell, where little of it is seen
    side = unit[:-3].sum(0) - 2 * unit[-1]
    sides = np.concatenate([by * side + ends(*range(-6, 7, 2)) for by in (-1, 1)])
    near = ends(*range(-4, 5))
    return (single, near, ends(*range(-20, 21, 5)), throws, sides, wide), near


def settle_fault(observed, theta, model):
    """The best whole unknowns nearby, tried one by one and the fault's together, with rounding's decisions.

    Returns (theta, model, residual norm of the whole record).
    """
    norm = float(norms_of(observed, [(theta, model)]))
    observed.extend_turn(norm)
    kinds, near = _kinds_of_moves(len(theta), model.n + 1)
    theta, n_idle, known = np.rint(theta), 0, {}
    model = plain = Fault(model.n, model.mirrored)  # decisions fitted where the fault was elsewhere mislead
    for moves in itertools.cycle(kinds):
        while 1e-5 < norm < observed.noise_threshold(1000, HOPELESS_NORM) and not observed.out_of_time:
            one = model if moves is kinds[0] else plain
            if one not in known:  # derivatives at theta
                known[one] = _derivatives(observed, theta, one)
            trials = _neighbours(observed, theta, one, known[one], moves)  # the most promising move's first
            norms = norms_of(observed, trials)
            best = int(norms.argmin())
            found = *trials[best], float(norms[best])
            if not observed.improves(found[-1], norm) and moves is near:
                of_first_move = norms[: len(FLIP_PENALTIES) * len(FLIP_THRESHOLDS)]
                found = refit_decisions(observed, *trials[int(of_first_move.argmin())])
            if not observed.improves(found[-1], norm):
                break
            (theta, model, norm), n_idle, known = found, 0, {}
        n_idle += 1
        if n_idle == len(kinds) or observed.out_of_time:  # no kind of move helps any more
            return theta, model, norm
