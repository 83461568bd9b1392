"""Faulted maps found from a gather: a population in a growing time window, then pairs of unknowns."""

import itertools
import math

import numpy as np

from inversion.draw_faults import (
    fault_from_echoes,
    fault_through,
    fit_to_guess,
    lean_other_way,
    random_fault,
)
from inversion.gauss_newton import gauss_newton
from inversion.population import CONTRASTS, depths_beneath, evolve, parents, top_velocity
from inversion.settle_fault import norms_of, settle_fault
from synthetic.soft_fault import FAULT_ENDS, THROW, fault_line
from utils import V_MAX

WINDOWS = ((220, 12), (300, 10), (400, 8))  # time samples, members of the population that survive
LATER_WINDOWS = (520, 700, 1000)  # time samples
N_DRAWN = 400  # faults drawn through the first echoes, the best of which join the first population

# Residual norms, each beyond the noise
FOUND_NORM = 0.0005  # below it no other start is tried
FAULT_FOUND_NORM = 0.01  # below it the fault is kept and only layers are searched
LAYERS_FOUND_NORM = (
    0.001  # of the whole record, below it nothing is searched: faint interfaces remain till then
)


def _norms(observed, model, thetas, n_samples):
    """Residual norms of the sharp maps of one model: (N,)."""
    return norms_of(observed, [(theta, model) for theta in thetas], n_samples)


def _small_steps(model):
    """Steps of one unknown each, all but the fault's start and end: a list of (P,)."""
    unit, n = np.eye(len(model.scale)), model.n + 1
    steps = [step * unit[j] for j in range(n) for step in (-8, -3, -1, 1, 3, 8)]
    return steps + [step * unit[j] for j in (*range(n, len(unit) - 3), -1) for step in (-1, 1)]


def _coordinate_search(observed, theta, model, norm, n_samples):
    """Try small steps of the sharp map, then Gauss-Newton steps, in turn: (theta, residual norm).

    The throw is a whole number of half cells, which Gauss-Newton steps alone do not find.
    """
    unit = np.eye(len(theta))
    moves = _small_steps(model) + [step * unit[j] for j in (-3, -2) for step in (-3, -1, 1, 3)]
    for _ in range(8):
        trials = [model.clip(theta + move) for move in moves]
        norms = _norms(observed, model, trials, n_samples)
        best = int(norms.argmin())
        if not observed.improves(float(norms[best]), norm) or observed.out_of_time:
            break
        theta, norm = trials[best], float(norms[best])
        theta, norm = _fit_sharp(observed, theta, model, n_samples, 3)
    return theta, norm


def _fit_sharp(observed, theta, model, n_samples, n_steps):
    """Gauss-Newton steps that must improve the sharp map: (theta, residual norm)."""
    fitted = theta, model.scale, n_samples, n_steps, model.clip, model.sharp
    return gauss_newton(observed, model.smooth, *fitted, least_gain=1e-2)


def _with_values(theta, at, values):
    """Copies of theta with the unknowns `at` set to values (M, len(at)): (M, P)."""
    trials = np.repeat(theta[None], len(values), 0)
    trials[:, at] = values
    return trials


def _grid(*values):
    return np.stack(np.meshgrid(*values), -1).reshape(-1, len(values))


def _move_faintest_interface(theta, n):
    """Trials (M, P) that replace the faintest interface, which may not exist, by one anywhere else."""
    faintest = int(np.argmin(np.diff(theta[:n])))
    velocities, depths = np.delete(theta[:n], faintest + 1), np.delete(theta[n:-3], faintest)
    trials = []
    for depth, contrast in itertools.product(range(4, 69, 2), CONTRASTS):
        k = int(np.searchsorted(depths, depth))
        if velocities[k] + contrast < np.append(velocities, V_MAX)[k + 1]:
            moved = np.insert(velocities, k + 1, velocities[k] + contrast), np.insert(depths, k, depth)
            trials.append(np.concatenate([*moved, theta[-3:]]))
    return np.array(trials)


def _trial_blocks(theta, n):
    """Trials (M, P) that vary a few unknowns over their whole range, a block each; the fault's come last.

    n: number of velocities in theta.
    """
    blocks, throws = [], np.arange(THROW[0], THROW[1] + 1)
    for k in reversed(range(n - 1)):  # an interface and the velocity below it
        above = theta[n + k - 1] if k else 2.0
        below = theta[n + k + 1] if k < n - 2 else 71.0
        velocities = theta[k] + np.array([5.0, *CONTRASTS])
        pairs = _grid(np.arange(above + 2, below - 1, 2), velocities[velocities < V_MAX])
        blocks.append(_with_values(theta, [n + k, k + 1], pairs))
    blocks.append(_move_faintest_interface(theta, n))
    pairs = _grid(np.append(throws, -throws), theta[-3] + np.array([-8, -4, 0, 4, 8]))
    blocks.append(_with_values(theta, [-1, -3], pairs))
    top, across = fault_line(*theta[-3:-1])
    crossed = itertools.product(2 * theta[n:-3][:2], np.arange(-8, 9, 4), range(*FAULT_ENDS, 8))
    ends = [fault_through(top - across * z + by, z, end) for z, by, end in crossed]
    blocks.append(_with_values(theta, [-3, -2], ends))
    return [block for block in blocks if len(block)]  # between close interfaces there is no room


def _search_blocks(observed, theta, model, n_samples):
    """Search pairs of unknowns over their whole range, in turn, until none helps: (theta, residual norm).

    This leads out of local minima that single steps cannot leave.
    """
    target = observed.noise_threshold(n_samples, FAULT_FOUND_NORM if n_samples < 1000 else LAYERS_FOUND_NORM)
    norm = float(_norms(observed, model, [theta], n_samples))
    theta, norm = _coordinate_search(observed, theta, model, norm, n_samples)
    n_idle, number = 0, 0
    while norm > target and not observed.out_of_time:
        blocks = _trial_blocks(theta, model.n + 1)
        if norm < observed.noise_threshold(n_samples, FAULT_FOUND_NORM):
            blocks = blocks[:-2]
        if n_idle == len(blocks):
            break
        trials = [model.clip(t) for t in blocks[number % len(blocks)]]
        norms = _norms(observed, model, trials, n_samples)
        before = norm
        for i in np.argsort(norms.cpu().numpy())[:3]:
            fitted, fitted_norm = _fit_sharp(observed, trials[i], model, n_samples, 4)
            if fitted_norm < norm:
                theta, norm = fitted, fitted_norm
        if norm < 0.99 * before:
            theta, norm = _coordinate_search(observed, theta, model, norm, n_samples)
            n_idle = 0
        else:
            n_idle, number = n_idle + 1, number + 1
    return theta, norm


def _fit_whole_record(observed, population, target):
    """Fit faults of a short window to the whole record until one reaches the target: (norm, map)."""
    best = (math.inf,)
    for _, theta, model in population:
        last = math.inf
        for n_samples in (0, *LATER_WINDOWS):  # 0: settled as it is, which may be enough
            if n_samples:
                theta, _ = _search_blocks(observed, theta, model, n_samples)
                observed.note(n_samples, model.sharp(theta))
            theta, settled, norm = settle_fault(observed, theta, model)
            stuck = abs(norm - last) < 0.01 * last  # the same map again: another start promises more
            last = norm
            if norm < best[0]:
                best = norm, settled.sharp(theta)
            if best[0] < target or observed.out_of_time:
                return best
            if stuck:
                break
    return best


def _first_population(observed, guess, beneath, top, n, rng):
    """Faults through n interfaces, (norm, theta, model) each: some like the guess, some through echoes."""
    drawn = [random_fault(n, guess, rng) for _ in range(200)]
    drawn.sort(key=lambda one: np.abs(one[1].smooth(one[0]) - guess).mean())
    population = [fit_to_guess(model, theta, guess) for theta, model in drawn[:6]]
    drawn = [fault_from_echoes(beneath, observed.sources, top, n, guess, rng) for _ in range(N_DRAWN)]
    drawn = [(model.clip(theta), model) for theta, model in drawn]
    norms = observed.residuals([model.smooth(theta) for theta, model in drawn], WINDOWS[0][0]).norm(dim=1)
    return population + [(0.0, *drawn[i]) for i in norms.argsort()[:12].tolist()]


def find_fault(observed, guess, n_layers=(4, 3, 2), n_starts=8):
    """Search maps of flat layers cut by one fault that explain a gather: yields (map, residual norm).

    observed: `Observed`; guess and maps: (70, 70) m/s. A map is yielded for each start, up to `n_starts` for
    each number of layers, until one leaves no more than the noise and FOUND_NORM.
    """
    top, target = top_velocity(observed), observed.noise_threshold(1000, FOUND_NORM)
    beneath = depths_beneath(observed, top, increasing=True)
    for seed, n in itertools.product(range(n_starts), n_layers):
        rng = np.random.default_rng([seed, n])
        population = _first_population(observed, guess, beneath, top, n - 1, rng)

        def breed(population, n=n, rng=rng):
            (theta, model), (other, other_model) = parents(population, rng)
            kind = rng.random()
            if kind < 0.4:
                theta[-3:], model = other[-3:], other_model
            elif kind < 0.5:
                theta, model = lean_other_way(theta, model, int(rng.integers(*FAULT_ENDS)))
            elif kind < 0.6:
                theta[-1] *= -1
            elif kind < 0.75:
                theta[-3:] = random_fault(n - 1, guess, rng)[0][-3:]
            if rng.random() < 0.7:
                j = rng.integers(len(theta))
                theta[j] += rng.normal(0, 2) * model.scale[j]
            return theta, model

        def window_target(n_samples):
            return observed.noise_threshold(n_samples, 0.02)

        population = evolve(observed, population, WINDOWS, breed, window_target)
        best_leans = population[0][2].mirrored
        others = [one for one in population[1:] if one[2].mirrored != best_leans]  # not the same fault twice
        best = _fit_whole_record(observed, [population[0], *(others or population[1:])[:1]], target)
        yield best[1], best[0]
        if best[0] < target:
            break
