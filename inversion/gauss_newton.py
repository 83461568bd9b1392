"""Gauss-Newton for maps of few unknowns: many maps simulated at once, derivatives by differences.

A derivative is the difference of two simulations. It need not be exact, and as one more map in a batch it
costs a third of a forward-mode derivative (`torch.func.jvp` of `waves.simulate`). Where many single cells
move, the derivatives come by reciprocity (`waves.jacobian`).
"""

import numpy as np
import torch

from inversion.parameters import paint
from synthetic.layers import N_CELLS
from utils import V_MAX, V_MIN

DAMPING = (1e-2, 1.0, 1e2)  # tried in each step, times the damping of the step before

# Cells that `waves.jacobian` leaves out: the sources' row, those above, and the rim
RIM = np.pad(np.zeros((N_CELLS - 3, N_CELLS - 2), bool), ((2, 1), (1, 1)), constant_values=True)

MIN_LINEARISED_MAPS = 30  # fewer maps are simulated: that is faster than `Observed.linearised_change`


def gauss_newton(
    observed, smooth, theta, scale, n_samples, n_steps, clip, exact=None, prior=0.0, least_gain=0.03
):
    """Minimise ‖residuals(exact(theta))‖² + Σ prior·theta²: (theta, residual norm).

    smooth: theta (P,) -> map (70, 70) m/s, whose differences over 0.1 `scale` give the derivatives; exact:
    the map to be fitted, by default `smooth`; clip: brings theta within its bounds. A step is at most 3
    `scale`. Ends after `n_steps`, or when a step gains less than the share `least_gain`. Source: Levenberg
    (1944), Marquardt (1963).
    """
    exact, eye = exact or smooth, 0.1 * np.diag(scale)

    def penalty(t):
        return float(np.sum(prior * t**2))

    residual = observed.residuals([exact(theta)], n_samples)[0]
    value, damping = float(residual @ residual) + penalty(theta), 1e-2
    for _ in range(n_steps):
        if observed.out_of_time:
            break
        changed = observed.residuals([smooth(theta), *(smooth(theta + step) for step in eye)], n_samples)
        jacobian = (changed[1:] - changed[0]) / 0.1
        hessian = (jacobian @ jacobian.T).cpu().double().numpy() + np.diag(
            prior * scale**2 + np.zeros(len(theta))
        )
        gradient = (jacobian @ residual).cpu().double().numpy() + prior * theta * scale
        diagonal = np.diag(hessian)
        trials = []
        for factor in DAMPING:
            damped = hessian + np.diag(damping * factor * (diagonal + 0.01 * diagonal.mean()) + 1e-14)
            step = -np.linalg.solve(damped, gradient)
            step *= min(1.0, 3.0 / max(np.abs(step).max(), 1e-12))
            trials += [(damping * factor, clip(theta + share * step * scale)) for share in (1.0, 0.4)]
        residuals = observed.residuals([exact(t) for _, t in trials], n_samples)
        values = [float(r @ r) + penalty(t) for r, (_, t) in zip(residuals, trials, strict=True)]
        best = int(np.argmin(values))
        if not values[best] < value:
            damping *= 100
            if damping > 1e4:
                break
            continue
        gain, value = 1 - values[best] / value, values[best]
        damping, theta, residual = (
            float(np.clip(trials[best][0], 1e-8, 1e2)),
            trials[best][1],
            residuals[best],
        )
        if gain < least_gain:
            break
    return theta, float(residual.norm())


def changes(observed, velocities, depths, columns):
    """How residuals change with depths and velocities: (rows (P, D), residual (D,), velocity steps (K+1,)).

    velocities (K+1,) m/s; depths (K, 70), the first cells of the lower layers; columns: lists of columns that
    move together. There is a row for each interface and list, for a move down by one cell, then a row for
    each velocity, for its step in m/s. At the bottom, the row of a move up is reversed. Moves within the map
    are linearised (`Observed.linearised_change`), unless there are only few.
    """
    base, moves, signs = paint(velocities, depths), [], []
    for k in range(len(depths)):
        for group in columns:
            moved = depths.copy()
            signs.append(1 if (depths[k, group] < N_CELLS).any() else -1)
            moved[k, group] += signs[-1]
            moves.append(paint(velocities, moved))
    step = 5.0 * np.where(velocities < 4490, 1, -1)
    faster = [paint(velocities + step * (np.arange(len(step)) == k), depths) for k in range(len(step))]
    moves = np.stack(moves)
    inside = ~(moves != base)[:, RIM].any(1)
    if inside.sum() < MIN_LINEARISED_MAPS:
        inside[:] = False
    residuals = observed.residuals([base, *moves[~inside], *faster], 1000)
    signs = torch.tensor(signs, device=residuals.device)[:, None]
    rows = torch.empty(len(moves), residuals.shape[1], device=residuals.device)
    rows[~inside] = residuals[1 : len(residuals) - len(step)] - residuals[0]
    if inside.any():
        rows[inside] = observed.linearised_change(base, moves[inside])
    return torch.cat([signs * rows, residuals[-len(step) :] - residuals[0]]), residuals[0], step


def settle(observed, velocities, depths, increasing=True, n_rounds=12):
    """Settle flat layers on whole cells and whole velocities: (velocities, depths, residual norm).

    velocities (K+1,) m/s; depths (K, 70), the first cells of the lower layers. Each round simulates every
    move by one cell, finds the best mixture of moves and velocity changes by least squares within bounds, and
    makes the moves whose share is above a threshold.
    """
    n = len(depths)
    bounds = np.r_[np.full(n, 1.5), np.full(n + 1, 60.0)] * [[-1], [1]]
    norm = float(observed.residuals([paint(velocities, depths)], 1000)[0].norm())
    for _ in range(n_rounds):
        if norm < 1e-6 or observed.out_of_time:
            break
        rows, residual, step = changes(observed, velocities, depths, [range(N_CELLS)])
        shares = least_squares_in_box(rows, residual, bounds)
        # in a thin layer depth and velocity act alike, so that the velocities are tried alone too
        alone = least_squares_in_box(rows[n:], residual, bounds[:, n:])
        both, alone = (np.clip(velocities + step * some, V_MIN, V_MAX) for some in (shares[n:], alone))
        if increasing:
            both, alone = np.maximum.accumulate(both), np.maximum.accumulate(alone)
        trials = [(np.rint(both), depths), (np.rint(alone), depths)]
        for threshold in (0.35, 0.5, 0.65, 0.8, 0.95):
            moves = (np.sign(shares[:n]) * (np.abs(shares[:n]) > threshold)).astype(int)
            moved = np.clip(depths + moves[:, None], 0, N_CELLS)
            trials += [(velocities, moved), (np.rint(both), moved)]
        norms = observed.residuals([paint(*t) for t in trials], 1000).norm(dim=1)
        best = int(norms.argmin())
        if not observed.improves(float(norms[best]), norm):
            break
        (velocities, depths), norm = trials[best], float(norms[best])
    return velocities, depths, norm


def least_squares_in_box(rows, target, bounds, penalty=0.0, n_sweeps=300):
    """Minimise ‖target + Σ s_j rows_j‖² / 2 + Σ penalty_j s_j by coordinate descent: s (P,).

    rows: (P, D); target: (D,); bounds: (2, P), the lowest and highest s.
    """
    gram = (rows @ rows.T).cpu().double().numpy()
    slope = (rows @ target).cpu().double().numpy() + penalty
    diagonal = np.diag(gram) + 1e-7 * np.diag(gram).mean() + 1e-30
    shares = np.zeros(len(gram))
    for _ in range(n_sweeps):
        before = shares.copy()
        for j in range(len(shares)):
            rest = gram[j] @ shares - gram[j, j] * shares[j] + slope[j]
            shares[j] = np.clip(-rest / diagonal[j], *bounds[:, j])
        if np.abs(shares - before).max() < 1e-4:
            break
    return shares
