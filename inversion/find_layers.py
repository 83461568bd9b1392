"""Layered maps found from a gather: candidates fitted in a growing time window.

Maps are fitted from the top down, since late echoes mislead while the layers above are wrong. A guess (the
network's map) helps, but layers are found without one. The sizes of populations and windows were chosen on
real training maps.
"""

import itertools
import math
from collections import deque

import numpy as np

from inversion.anneal import anneal_curves
from inversion.gauss_newton import gauss_newton, settle
from inversion.parameters import SPACINGS, Layers, paint
from inversion.population import CONTRASTS, NO_ECHO_NORM, depths_beneath, evolve, parents, top_velocity
from synthetic.layers import N_CELLS
from utils import V_MAX, V_MIN

# time samples, members of the population that survive
FIRST_WINDOWS = ((110, 16), (140, 12), (170, 10), (200, 8), (235, 6), (270, 4))

FLAT_WINDOWS = (300, 380, 470, 570, 680, 800, 1000)  # time samples

# Echoes of flanks arrive late, so that curved layers need more windows
CURVED_WINDOWS = (300, 340, 380, 425, 470, 520, 570, 625, 680, 800, 1000)

ECHO_SHARE = 0.2  # of the first echo's norm, which a first interface that fits may leave unexplained

WAVELET = 110  # time samples after which most of an echo's wavelet has arrived


def _fit_controls(layers, cells, depths, smoothness=0.3):
    """The spline's controls (m,) of an interface that passes through depths at the given columns."""
    bend = smoothness * np.diff(np.eye(layers.m), 2, axis=0)
    target = np.concatenate([np.asarray(depths) - 0.3, np.zeros(len(bend))])
    return np.linalg.lstsq(np.vstack([layers.basis[np.asarray(cells)], bend]), target, rcond=None)[0]


def _first_starts(observed, layers, top, guess, rng, n=24):
    """Starts (theta) for the first interface: from echoes beneath the sources, from the guess, and varied."""
    beneath = depths_beneath(observed, top, layers.increasing)
    below = np.median([v for _, v in beneath])
    starts = [
        np.concatenate([[top, below], _fit_controls(layers, observed.sources, [d for d, _ in beneath])])
    ]
    if layers.m == 1:
        starts += [np.array([top, v, depth - 0.3]) for depth, v in beneath]
    for ratio in (1.1, 1.2, 1.35) if guess is not None else ():
        above = np.vstack([guess > top * ratio, np.ones((1, N_CELLS), bool)])
        controls = _fit_controls(layers, range(N_CELLS), above.argmax(0).clip(3, 40), 1.0)
        starts.append(np.concatenate([[top, min(V_MAX, top * (2 * ratio - 1))], controls]))
    n_found = len(starts)
    while len(starts) < n:
        start = starts[rng.integers(n_found)].copy()
        start[1] = top + rng.uniform(50, 1200) * (1 if layers.increasing else rng.choice([-1, 1]))
        start[2:] += rng.normal(0, 3, layers.m)
        starts.append(start)
    return starts


def _target(observed, top=None):
    """f(time samples): the residual norm beyond the noise, that rounding depths to cells may leave.

    Where `top`, the velocity of the uppermost layer, is given: at most a share of the echoes' norm, which is
    what a map of that velocity alone leaves.
    """

    def target(n_samples):
        rest = 0.006 + 6e-5 * (n_samples - 100)
        if top is not None:
            echo = float(observed.residuals([np.full((N_CELLS, N_CELLS), top)], n_samples)[0].norm())
            rest = min(rest, max(ECHO_SHARE * echo, NO_ECHO_NORM))
        return observed.noise_threshold(n_samples, rest)

    return target


def _first_interfaces(observed, curved, increasing, guess, rng):
    """Fit the uppermost interface: the best two, (residual norm, theta, Layers) each."""
    layers = Layers(1, 0.0, curved, increasing)

    def breed(population):
        (theta, _), (other, _) = parents(population, rng)
        controls, m = theta[2:], layers.m
        if rng.random() < 0.5:  # the left of one, the right of the other
            cut = rng.integers(0, m)
            controls[cut:] = other[2:][cut:]
        if rng.random() < 0.7:
            j = rng.integers(0, m)
            controls[j : j + rng.integers(1, 4)] += rng.normal(0, 5)
        if rng.random() < 0.2:
            controls[rng.integers(0, m)] = rng.uniform(3, 30)
        if rng.random() < 0.3:
            theta[1] += rng.normal(0, rng.choice([150, 600]) if curved else 150)
        return theta, layers

    top = top_velocity(observed)
    starts = _first_starts(observed, layers, top, guess, rng)
    population = [(math.inf, theta, layers) for theta in starts]

    target = _target(observed, top if curved else None)
    population = evolve(observed, population, FIRST_WINDOWS, breed, target)
    n_samples = FIRST_WINDOWS[-1][0]
    while n_samples < 1000:
        velocities, depths = layers.split(population[0][1])
        if n_samples > _echo_time(velocities, _shallow(depths)) + WAVELET:
            break
        n_samples = int(1.2 * n_samples)  # the echo of a deep interface has not arrived yet
        population = evolve(observed, population, [(min(n_samples, 1000), 4)], breed, target)
    return population[:2]


def _shallow(depths):
    """The depth (K,) below which all but a seventh of each interface's columns lie: depths (K, 70)."""
    return np.sort(depths, 1)[:, N_CELLS // 7]


def _echo_time(velocities, depths):
    """Two-way time, in samples, straight down through the layers to the last depth, in cells."""
    at = [0.5, *depths]
    return sum(2e4 * max(b - a, 0) / v for a, b, v in zip(at, at[1:], velocities, strict=False))


def _add_interface(observed, layers, theta, n_samples):
    """Add the interface below, its contrast and shift chosen by trial: (Layers, theta)."""
    last = theta[layers.n]
    steps = [s * c for c in CONTRASTS for s in ((1,) if layers.increasing else (1, -1))]
    velocities = sorted({float(np.clip(last + step, V_MIN, V_MAX)) for step in steps})
    trials = [layers.deeper(theta, v, shift) for v in velocities for shift in (-0.6, 0.0, 0.6)]
    norms = observed.residuals([model.smooth(t) for model, t in trials], n_samples).norm(dim=1)
    return trials[int(norms.argmin())]


def _grow(observed, first, curved, increasing):
    """Add interfaces below the first for every possible spacing: (norm, theta, Layers) each, best first."""
    hypotheses = []  # (how often in a row it was far behind, theta, layers)
    for _, theta, layers in first:
        middle = np.sort(layers.split(theta)[1][0])[5:-5].mean()
        for spacing in SPACINGS:
            # the first interface found may be the uppermost, or lie below some whose echoes are too faint
            least = max(0, math.ceil((middle - 2) / spacing - 1.5))
            for n_above in range(least, math.floor((middle + 2) / spacing - 0.5) + 1):
                model = Layers(1 + n_above, spacing, curved, increasing)
                shifts = np.zeros(n_above * layers.m)
                parts = [np.full(n_above, theta[0]), theta[:2], theta[2:] - n_above * spacing, shifts]
                hypotheses.append((0, np.concatenate(parts), model))
    if not hypotheses:  # the interface reaches the surface nearly everywhere
        hypotheses = [(0, theta, Layers(1, SPACINGS[-1], curved, increasing)) for _, theta, _ in first]
    windows = CURVED_WINDOWS if curved else FLAT_WINDOWS
    for n_samples in windows:
        fitted, done = {}, []
        for number, (strikes, theta, layers) in enumerate(hypotheses):
            while layers.n < round(N_CELLS / layers.spacing):
                velocities, depths = layers.split(theta)
                if np.median(depths[-1]) + layers.spacing > N_CELLS + 5:
                    break
                echo = _echo_time(velocities, [*_shallow(depths), _shallow(depths)[-1] + layers.spacing - 1])
                if echo + 70 > n_samples:
                    break
                window = min(1000, max(n_samples, int(echo + WAVELET + 40)))
                layers, theta = _add_interface(observed, layers, theta, window)
            key = tuple(theta.round(1)) if layers.n == 1 else number  # the spacing matters from the second on
            if key not in fitted:
                fitted[key] = gauss_newton(
                    observed,
                    layers.smooth,
                    theta,
                    layers.scale,
                    n_samples,
                    4,
                    layers.clip,
                    prior=layers.prior,
                )
            done.append((*fitted[key][::-1], strikes, layers))
        done.sort(key=lambda one: one[0])
        observed.note(n_samples, done[0][3].smooth(done[0][1]))
        limit = 2 * done[0][0] + 1e-3
        # dropped when twice as bad as the best in two windows: in one, only the best may have an echo yet
        hypotheses = [
            (strikes + 1 if norm > limit else 0, theta, layers)
            for norm, theta, strikes, layers in done
            if norm <= limit or strikes == 0 and n_samples < windows[-2]
        ][: 8 if n_samples < 500 or not curved else 4 if n_samples < 700 else 2]
        if observed.out_of_time:
            break
    return [(norm, theta, layers) for norm, theta, _, layers in done]


def _fit_sharp(observed, layers, theta):
    """Fit theta so that its map of whole cells and whole velocities explains the whole record."""
    prior = 1e-3 * layers.prior  # sharp edges fit exactly, so that the data decide
    return gauss_newton(
        observed, layers.smooth, theta, layers.scale, 1000, 12, layers.clip, layers.sharp, prior, 1e-3
    )[0]


def _retry_flat(observed, layers, theta):
    """Fit flat layers, then search nearby for each interface: yields (velocities, cells, residual norm).

    In the first windows depth and velocity can make up for each other, and the layers below follow both. The
    first fit is yielded, then the best so far after each interface.
    """

    def settled(theta):
        return settle(observed, np.rint(theta[: layers.n + 1]), layers.cells(theta), layers.increasing)

    theta = _fit_sharp(observed, layers, theta)
    best, n = settled(theta), layers.n + 1
    yield best
    factors = 1 + np.array([-0.1, -0.06, -0.03, -0.015, 0, 0.015, 0.03, 0.06, 0.1])
    n_idle, k = 0, 0
    while n_idle < layers.n:
        trials = []
        # velocities changed together: the one above the interface, this and all below, only those below
        ranges = ((k, k + 1), (k, n), (k + 1, n))
        for shift, factor, some in itertools.product((-1.5, -1, -0.5, 0, 0.5, 1, 1.5), factors, ranges):
            trials.append(theta.copy())
            trials[-1][slice(*some)] *= factor
            trials[-1][n + k] += shift
        trials = [layers.clip(t) for t in trials]
        norms = observed.residuals([layers.sharp(t) for t in trials], 1000).norm(dim=1)
        before = best[2]
        for i in np.argsort(norms.cpu().numpy())[:3]:
            fitted = _fit_sharp(observed, layers, trials[i])
            result = settled(fitted)
            if result[2] < best[2]:
                theta, best = fitted, result
        n_idle, k = (0, k) if best[2] < 0.99 * before else (n_idle + 1, (k + 1) % layers.n)
        yield best


def _first_explained(observed, grown):
    """The first of several flat-layered fits that explains the gather, else the best of them.

    They take turns, since a wrong spacing may take a minute to come to its end.
    """
    best, target = (None, None, math.inf), observed.noise_threshold(1000, 1e-4)
    # the right spacing is rarely beyond the sixth
    tries = deque(_retry_flat(observed, layers, theta) for _, theta, layers in grown[:6])
    while tries:
        found = next(tries[0], None)
        if found is None:
            tries.popleft()
            continue
        best = min(best, found, key=lambda one: one[2])
        if best[2] < target or observed.out_of_time:
            break
        tries.rotate(-1)
    return best


def find_layers(observed, curved, increasing=True, guess=None, n_starts=8):
    """Search maps of flat or curved layers that explain a gather: yields (map, residual norm).

    observed: `Observed`; increasing: velocities increase with depth; guess and maps: (70, 70) m/s. A map is
    yielded for each start, up to `n_starts` with different random numbers, until one leaves only noise.
    """
    for seed in range(n_starts):
        rng = np.random.default_rng(seed)
        first = _first_interfaces(observed, curved, increasing, guess, rng)
        grown = _grow(observed, first, curved, increasing)
        if curved:
            _, theta, layers = grown[0]
            theta = _fit_sharp(observed, layers, theta)
            velocities, cells, norm = anneal_curves(observed, layers, theta, seed=seed)
        else:
            velocities, cells, norm = _first_explained(observed, grown)
        yield paint(velocities, cells), norm
        if norm < observed.noise_threshold(1000, 1e-3 if curved else 1e-4):
            break
