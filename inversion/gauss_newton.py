"""Gauss-Newton in few unknowns: residuals of many maps at once, derivatives by differences, damped steps.

A derivative is the difference of two simulations: one more map in a batch that uses all cores, a third
of what forward-mode derivatives (`torch.func.jvp` of `waves.simulate`) cost. It need not be exact. Those of
many single cells come by reciprocity (`waves.jacobian`).
"""

import numpy as np
import torch

from inversion.parameters import paint
from synthetic.layers import N_CELLS
from utils import V_MAX, V_MIN

DAMPING = (1e-2, 1.0, 1e2)  # tried in each step, times the last one's

OUTSIDE = np.pad(np.zeros((N_CELLS - 3, N_CELLS - 2), bool), ((2, 1), (1, 1)), constant_values=True)

FEW = 30  # maps that are sooner simulated than by `Observed.linear`


def gauss_newton(
    observed, smooth, theta, scale, n_samples, n_steps, clip, exact=None, prior=0.0, least_gain=0.03
):
    """Minimise ‖residuals(exact(theta))‖² + Σ prior·theta²: (theta, norm of the residuals).

    smooth: theta (P,) -> map (70, 70), whose differences over 0.1 `scale` give the derivatives; exact: what
    is fitted, default `smooth`. A step is at most 3 `scale`; `clip` brings theta into its bounds. Ends after
    n_steps, or when a step gains less than the share `least_gain`. Levenberg (1944), Marquardt (1963).
    """
    exact, eye = exact or smooth, 0.1 * np.diag(scale)

    def penalty(t):
        return float(np.sum(prior * t**2))

    residual = observed.residuals([exact(theta)], n_samples)[0]
    value, damping = float(residual @ residual) + penalty(theta), 1e-2
    for _ in range(n_steps):
        if observed.late:
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
    """How residuals change: (rows (P, D) of a cell down and of `step`, the residual (D,), `step` (K+1,)).

    One row for each interface of depths (K, 70) and each list of columns that move as one, then one for
    each velocity. Where a depth is at the bottom, the change is that of a cell up, reversed. Moves inside are
    linearised (`Observed.linear`), unless they are few.
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
    inside = ~(moves != base)[:, OUTSIDE].any(1)
    if inside.sum() < FEW:
        inside[:] = False
    residuals = observed.residuals([base, *moves[~inside], *faster], 1000)
    signs = torch.tensor(signs, device=residuals.device)[:, None]
    rows = torch.empty(len(moves), residuals.shape[1], device=residuals.device)
    rows[~inside] = residuals[1 : len(residuals) - len(step)] - residuals[0]
    if inside.any():
        rows[inside] = observed.linear(base, moves[inside])
    return torch.cat([signs * rows, residuals[-len(step) :] - residuals[0]]), residuals[0], step


def settle(observed, velocities, depths, increasing=True, n_rounds=12):
    """Settle whole-cell depths and whole velocities of flat layers together: (velocities, depths, norm).

    velocities (K+1,), depths (K, 70), first cells of the lower layers. In each round every move by one cell
    is simulated, the best mixture of moves and changes of velocity is found by least squares within bounds,
    and the moves above a threshold are made.
    """
    n = len(depths)
    bounds = np.r_[np.full(n, 1.5), np.full(n + 1, 60.0)] * [[-1], [1]]
    norm = float(observed.residuals([paint(velocities, depths)], 1000)[0].norm())
    for _ in range(n_rounds):
        if norm < 1e-6 or observed.late:
            break
        rows, residual, step = changes(observed, velocities, depths, [range(N_CELLS)])
        shares = least_squares_in_box(rows, residual, bounds)
        # of a thin layer, depth and velocity tell the same: the velocities are tried alone too
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
        if float(norms[best]) >= observed.least_share * norm:
            break
        (velocities, depths), norm = trials[best], float(norms[best])
    return velocities, depths, norm


def least_squares_in_box(rows, target, bounds, price=0.0, n_sweeps=300):
    """argmin ‖target + Σ s_j rows_j‖² / 2 + Σ price_j s_j, s within bounds (2, P), by coordinate descent."""
    gram = (rows @ rows.T).cpu().double().numpy()
    slope = (rows @ target).cpu().double().numpy() + price
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
