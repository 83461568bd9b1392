"""Velocity maps like those of OpenFWI's Style families: `draw_style`.

OpenFWI laid photographs, repainted in the style of a seismic section, over velocities that rise with depth.
The repainting left two tones: a dark ground and a bright figure on about two fifths of the map. Piles of
shapes stand for the photographs ("dead leaves": Lee, Mumford & Huang, 2001; Baradad et al., 2021, arXiv
2106.05963). All numbers were fitted to statistics of real maps (docs/experiments/generators.md); lengths are
cells, levels of grey are 0 on the ground and about 1 in a figure.
"""

import math

import numpy as np

from synthetic.layers import N_CELLS
from synthetic.strokes import Figure, draw_strokes, hatch_bottom, window
from utils import V_MAX, V_MIN

Z, X = np.arange(N_CELLS, dtype=np.float64)[:, None], np.arange(N_CELLS, dtype=np.float64)
# Sums and exponentials differ in their last bits between processors. Steps of 1/16 m/s, far wider than that
# and far narrower than any gather shows, give all of them the same maps.
STEPS_PER_M_S = 16
# the repainting network met the borders: figures are dimmer at the top, the ground is brighter at the bottom
TOP_DIMMING = np.array([0.78, 0.88, 0.95, 0.98])[:, None]
BOTTOM_GLOW = np.array([0.02, 0.05, 0.09, 0.14, 0.29, 0.43])[:, None]
RAIN = (0.4, 0.9, 1.0, 0.7, 0.3)  # a faint stroke on the ground, along its five cells


def _smoother(sigma):
    """Gaussian blur of a map's rows or columns with mirrored ends, as a matrix (70, 70)."""
    at = np.arange(-N_CELLS, 2 * N_CELLS)
    weight = np.exp(-0.5 * ((X[:, None] - at) / sigma) ** 2)
    left, middle, right = np.split(weight, 3, axis=1)
    folded = middle + left[:, ::-1] + right[:, ::-1]
    return folded / folded.sum(1, keepdims=True)


BLURS_A = [_smoother(0.33 * n) for n in range(5, 11)]  # Style_A is blurred by 1.65 to 3.3 cells
SMOOTHERS = {sigma: _smoother(sigma) for sigma in (1.0, 1.5, 2.5, 4.0, 7.0, 12.0)}


def _smooth(field, sigma):
    return SMOOTHERS[sigma] @ field @ SMOOTHERS[sigma].T


def _random_field(rng, sigma):
    """Gaussian random field of unit variance, `sigma` cells smooth: (70, 70)."""
    field = _smooth(rng.standard_normal((N_CELLS, N_CELLS)), sigma)
    return field / field.std()


def _random_profile(rng, sigma):
    """The same along a row: (70,)."""
    profile = SMOOTHERS[sigma] @ rng.standard_normal(N_CELLS)
    return profile / profile.std()


def draw_style(rng, version):
    """A map of Style_A or Style_B (version "A", "B"): (70, 70) float64, within 1500...4500 m/s."""
    vel = np.clip(_draw_a(rng) if version == "A" else _draw_b(rng), V_MIN, V_MAX)
    return np.rint(vel * STEPS_PER_M_S) / STEPS_PER_M_S


def _pile(rng, n, scale):
    """Dead leaves: n boxes and ellipses of random grey, each painted over the ones before it: (70, 70)."""
    image = np.zeros((N_CELLS, N_CELLS))
    for _ in range(n):
        z, x = rng.uniform(-5, N_CELLS + 5, 2)
        height = scale * min(rng.pareto(1.5) + 1, 8)
        width = height * math.exp(rng.normal(0.2, 0.5))
        turn, grey, is_box = rng.normal(0.1, 0.15), rng.normal(), rng.random() < 0.63
        reach = 1.3 * max(height, width)
        if (at := window(z, x, reach, reach)) is None:
            continue
        dz, dx = Z[at[0]] - z, X[at[1]] - x
        down = (dz * math.cos(turn) + dx * math.sin(turn)) / height
        across = (dx * math.cos(turn) - dz * math.sin(turn)) / width
        is_inside = np.maximum(abs(down), abs(across)) < 1 if is_box else down**2 + across**2 < 1
        image[at][is_inside] = grey
    return image


def _draw_a(rng):
    """Style_A: the brighter parts of a pile over a rising ground, all blurred."""
    pile = _smooth(_pile(rng, 60, rng.uniform(2.9, 5.4)), 1.0)
    pile += 0.15 * _random_field(rng, 1.5) + 0.4 * _random_field(rng, 7.0) + 0.2 * _random_field(rng, 12.0)
    # figures are rare in the top rows, at the sides, and just above the bottom
    pile -= 1.3 * np.exp(-Z / 20) + 0.3 * ((X - 33) / 35) ** 2
    pile -= 0.3 * np.exp(-0.5 * ((Z - 63) / 3) ** 2)
    threshold = np.quantile(pile[:64], 1 - rng.normal(0.385, 0.035))
    figure = np.clip((pile - threshold) / 0.8 + 0.5, 0, 1)
    figure = np.maximum(figure, 0.05 * _random_field(rng, 4.0))  # faint haze on the ground
    figure *= 1 + 0.19 * _random_field(rng, 1.5) + 0.1 * _random_field(rng, 4.0)
    # figures end at the bottom in bright blocks; between them the ground is a little brighter there
    near_bottom = pile[64:].mean(0) + 0.5 * _random_profile(rng, 2.5)
    is_block = near_bottom > np.quantile(near_bottom, 1 - rng.beta(1.1, 2.5))
    first = rng.integers(65, 68)
    figure[first:] = np.where(is_block, np.maximum(figure[first:], 1.1), figure[first:] + 0.1)
    # contrast differs between maps and their mean hardly does: the original scaled each map
    contrast = np.clip(math.exp(rng.normal(3.66, 0.4)), 18, 90)
    rise = Z + contrast * figure
    surface, mean = rng.normal(1530, 53), rng.normal(2737, 53)
    blur = BLURS_A[rng.integers(len(BLURS_A))]
    return blur @ (surface + rise * ((mean - surface) / rise.mean())) @ blur.T


def _ground(rng, figure):
    """The ground around a figure's pieces: brighter near them, fine slanting strokes elsewhere: (70, 70)."""
    near = _smooth((figure.depth > 0).astype(np.float64), 4.0)
    drops = rng.standard_exponential((N_CELLS, N_CELLS)) * (rng.random((N_CELLS, N_CELLS)) < 0.027)
    rain = sum(share * np.roll(drops, (-k, k), (0, 1)) for k, share in enumerate(RAIN))
    rain = rain + 0.3 * (np.roll(rain, 1, 1) + np.roll(rain, 1, 0))
    grey = 0.16 * near + 0.15 * near**2 - 0.012 + 0.045 * _random_field(rng, 4.0)
    grey += 0.13 * rain * np.maximum(1 - 1.5 * near, 0.2)
    return np.maximum(figure.ghosts, grey) + 0.08 * np.exp(np.minimum(figure.depth, 0))


def _draw_b(rng):
    """Style_B: a figure of strips, blobs and hatched columns with dark strokes, grain in the lowest rows."""
    target = np.clip(rng.normal(0.472, 0.022), 0.4, 0.55)  # the share of cells that the figure covers
    # pieces gather in crowds, less at the sides, near the surface and in the lowest rows
    crowd = 1.44 * _random_field(rng, 7.0) + 0.7 * _random_field(rng, 12.0) - 1.5 * np.exp(-Z / 12)
    crowd -= 0.8 * ((X - 35.5) / 35) ** 2 + np.maximum((Z - 42) / 20, 0)
    figure = Figure(rng, crowd)
    for _ in range(60):
        figure.add_contour()
        if np.count_nonzero(figure.depth[:63] > 0) > target * 63 * N_CELLS:
            break
    figure.depth += 0.38 * _random_field(rng, 1.0)  # ragged edges
    ground = _ground(rng, figure)
    rim = -0.23 * np.exp(-np.maximum(figure.depth, 0) / 1.34)
    inner = figure.levels + rim + figure.strands + 0.03 * _random_field(rng, 1.0)
    draw_strokes(rng, inner, figure.pieces)
    inner = np.maximum(inner, 0.25 + 0.1 * figure.levels)
    image = ground + np.clip(figure.depth + 0.42, 0, 1) * (inner - ground)
    image = np.clip(image, -0.04, 1.38)
    image[:4] *= TOP_DIMMING
    image[0] += 0.05 + 0.04 * _random_profile(rng, 4.0)
    glow = np.exp(rng.normal(-0.1, 0.3) + 0.35 * _random_profile(rng, 4.0))
    image[-6:] += np.minimum(BOTTOM_GLOW * glow, 1) * np.maximum(1 - image[-6:], 0)
    hatch_bottom(rng, image, _random_profile(rng, 2.5))
    rise = 30 - rng.gamma(1.5, 1.2)  # m/s a cell
    # a figure is as fast as the ground 17.4 cells deeper, whatever the rise
    return rng.normal(1600, 25) + rise * (Z + rng.normal(17.4, 0.67) * image)
