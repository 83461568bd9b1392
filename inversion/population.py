"""Candidate layered maps: drawn, crossed and mutated."""

import numpy as np

import waves
from inversion.gauss_newton import gauss_newton
from inversion.parameters import shade
from synthetic.layers import N_CELLS
from utils import V_MAX, V_MIN

NO_ECHO_NORM = 1e-3  # residual norm below which no echo distinguishes candidates

CONTRASTS = (20, 80, 180, 320, 500, 800, 1200, 1800)  # m/s, tried across a new interface


def surface_velocity(observed):
    """Velocities at the sources (S,) m/s, read from the first sample, which is p = (v dt)² w_0."""
    first = [float(observed.seis[s, 0, x]) for s, x in enumerate(observed.sources)]
    w_0 = waves.ricker(1).item()
    return np.sqrt(np.maximum(np.array(first) / w_0, 0)) / waves.OPENFWI.dt_s


def top_velocity(observed):
    """Velocity of the uppermost layer in m/s: read from the first sample, or fitted where noise hides it."""
    v = surface_velocity(observed)
    if observed.noise < 1e-5 * abs(waves.ricker(1).item()) and v.min() > 1000:
        return float(np.clip(np.rint(v.min()), V_MIN, V_MAX))
    tried = np.arange(V_MIN, V_MAX + 1, 50)
    norms = observed.residuals([np.full((N_CELLS, N_CELLS), v) for v in tried], 90).norm(dim=1)
    return float(tried[int(norms.argmin())])


def _distinct(population, keep):
    """The best `keep` of (norm, theta, model): at most three of about the same norm, and none twice.

    While no echo has arrived all fit alike, and keep the order of the starts.
    """
    chosen = []
    for one in sorted(population, key=lambda one: max(one[0], NO_ECHO_NORM)):
        alike = [other for other in chosen if abs(one[0] - other[0]) < 0.01 * other[0] + 0.1 * NO_ECHO_NORM]
        near = [other for other in alike if np.abs((one[1] - other[1]) / one[2].scale).max() < 0.5]
        if not near and (len(alike) < 3 or one[0] < NO_ECHO_NORM):
            chosen.append(one)
    return chosen[:keep]


def evolve(observed, population, windows, breed, target):
    """Fit a population in growing time windows, bred where none fits: (norm, theta, model), best first.

    windows: (time samples, survivors) each; breed: population -> a new (theta, model); target: time samples
    -> the residual norm below which breeding ends.
    """

    def fit(some, n_samples, n_steps):
        fitted = []
        for theta, model in some:
            theta, norm = gauss_newton(
                observed, model.smooth, model.clip(theta), model.scale, n_samples, n_steps, model.clip
            )
            fitted.append((norm, theta, model))
        return fitted

    for n_samples, keep in windows:
        target_norm, n_idle = target(n_samples), 0
        population = _distinct(fit([one[1:] for one in population], n_samples, 5), keep)
        for _ in range(10):
            least = population[0][0]
            if least < target_norm or n_idle == 3 or observed.out_of_time:
                break
            bred = fit([breed(population) for _ in range(12)], n_samples, 4)
            population = _distinct(population + bred, keep)
            n_idle = 0 if population[0][0] < 0.97 * least else n_idle + 1
        observed.note(n_samples, population[0][2].smooth(population[0][1]))
    return population


def parents(population, rng):
    """Draw two members of a population, better ones more often: (theta, model) each, theta copied."""
    picks = np.minimum(rng.exponential(2.0, 2).astype(int), len(population) - 1)
    return [(population[i][1].copy(), population[i][2]) for i in picks]


def depths_beneath(observed, top, increasing):
    """The first interface beneath each source, as if the ground were flat there: [(cells, m/s below), ...].

    top: velocity of the uppermost layer, m/s.
    """
    ratios = np.array([1.01, 1.03, 1.07, 1.13, 1.22, 1.35, 1.6, 2.0])
    below = np.clip(top * (ratios if increasing else np.concatenate([ratios, 1 / ratios])), V_MIN, V_MAX)
    grid = [(depth, v) for depth in np.arange(4.0, 37.0) for v in np.unique(below)]
    n_samples = min(1000, int(2e4 * 37 / top + 120))
    maps = [shade(np.array([top, v]), np.full((1, N_CELLS), depth)) for depth, v in grid]
    made = observed.simulate([np.full((N_CELLS, N_CELLS), top), *maps], n_samples)
    found = []
    for s, cell in enumerate(observed.sources):
        near = slice(max(0, cell - 7), cell + 8)
        error = (
            (made[:, s, :, near] - observed.seis[s, :n_samples, near]).square().sum(2).cumsum(1).cpu().numpy()
        )
        ends = [min(n_samples - 1, int(2e4 * depth / top + 85)) for depth, _ in grid]
        ratio = [error[i + 1, end] / (error[0, end] + 1e-5 * error[0, -1]) for i, end in enumerate(ends)]
        found.append(grid[int(np.argmin(ratio))])
    return found
