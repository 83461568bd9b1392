"""Faults to start a search from: drawn as the generator draws them, or through echoes beneath the sources."""

import numpy as np

from inversion.parameters import Fault
from synthetic.soft_fault import FAULT_ENDS, N_FINE, THROW, border_point, fault_line
from utils import V_MAX, V_MIN


def fit_to_guess(model, theta, guess, n_steps=8):
    """Fit a fault to a guessed map (70, 70) without simulating: (mean absolute difference, theta, model)."""

    def difference(t):
        error = (model.smooth(t) - guess).ravel()
        return np.sign(error) * np.sqrt(np.abs(error) + 10)

    residual, damping = difference(theta), 0.1
    for _ in range(n_steps):
        eye = 0.1 * np.diag(model.scale)
        jacobian = np.stack([(difference(theta + step) - residual) / 0.1 for step in eye], 1)
        hessian, slope = jacobian.T @ jacobian, jacobian.T @ residual
        for _ in range(4):
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian) + 1), slope)
            trial = model.clip(theta - step * model.scale)
            if (tried := difference(trial)) @ tried < residual @ residual:
                break
            damping *= 6
        else:
            break
        theta, residual, damping = trial, tried, max(damping / 6, 1e-4)
    return np.abs(model.smooth(theta) - guess).mean(), theta, model


def random_fault(n, guess, rng):
    """Draw a fault through n interfaces as the generator does: (theta, Fault).

    Each layer takes the guess's median velocity within it.
    """
    model = Fault(n, bool(rng.integers(2)))
    thickness = rng.permutation(np.full(n + 1, 60 / (n + 1))) + 10 * rng.dirichlet(np.ones(n + 1))
    throw = rng.choice([-1, 1]) * rng.integers(THROW[0], THROW[1] + 1)
    velocities = np.linspace(V_MIN, V_MAX, n + 1)
    theta = np.concatenate([velocities, np.cumsum(thickness)[:n], [*rng.integers(*FAULT_ENDS, 2), throw]])
    layer = np.abs(model.smooth(theta)[..., None] - velocities).argmin(-1)
    medians = [np.median(guess[layer == k]) if (layer == k).any() else velocities[k] for k in range(n + 1)]
    theta[: n + 1] = np.maximum.accumulate(medians)
    return theta, model


def fault_through(x, z, end):
    """(start, end) of the fault through column x in row z that ends at `end`, all in half cells."""
    last = N_FINE - 1
    x, z = np.clip(x, 1, last - 1), np.clip(z, 1, last - 1)
    bottom, left = border_point(end)
    across = (x - last + bottom) / max(last - left - z, 1)
    top = x + across * z
    return (top if top <= last else last + (top - last) / across), end


def lean_other_way(theta, model, end):
    """A fault that leans the other way through the middle of the map, with the same layers on both sides."""
    theta, throw = theta.copy(), theta[-1]
    top, across = fault_line(*theta[-3:-1])
    theta[-3:-1] = fault_through(N_FINE - 1 - top + across * N_FINE / 2, N_FINE / 2, end)
    theta[model.n + 1 : -3] += throw / 2
    theta[-1] = -throw
    return theta, Fault(model.n, not model.mirrored)


def fault_from_echoes(beneath, sources, top, n, guess, rng):
    """Draw a fault that fits the first echo beneath each source: (theta, Fault).

    beneath: (depth in cells, m/s below) at each source, see `depths_beneath`; top: m/s of the uppermost
    layer. Where the depth changes between two sources by as much as a fault throws, the fault lies between
    them. Everything else is drawn as in `random_fault`.
    """
    theta, model = random_fault(n, guess, rng)
    depths, below = np.array(beneath).T
    sides = [(depths[:k], depths[k:]) for k in range(1, len(depths))]
    strays = [sum(np.abs(side - np.median(side)).sum() for side in pair) for pair in sides]
    k = int(np.argmin(strays)) + 1
    left, right = (np.median(side) for side in sides[k - 1])
    base = np.median(depths)
    if 4 < abs(left - right) < 12:
        base, moved = (right, left) if model.mirrored else (left, right)
        theta[-1] = np.rint(2 * (moved - base))
        x = 2 * rng.uniform(sources[k - 1], sources[k])  # where the fault cuts the interface, half cells
        end = int(rng.integers(*FAULT_ENDS))
        theta[-3:-1] = fault_through(N_FINE - 1 - x if model.mirrored else x, 2 * base, end)
    seen = (
        int(rng.integers(2)) if base > 16 and n > 1 else 0
    )  # the interface above it may be too faint to see
    theta[n + 1 : -3] += base - theta[n + 1 + seen]
    theta[0], theta[seen + 1] = top, np.median(below)
    if seen:
        theta[1] = top + (theta[2] - top) * rng.uniform(0, 0.5)
        theta[n + 1] = max(theta[n + 1], 5.0)
    return theta, model
