"""Velocity maps like those of OpenFWI's Style families: `draw_style`.

Real ones are photographs put through style transfer and laid over velocities that rise with depth. Here
piles of shapes stand for the photographs ("dead leaves": Lee, Mumford & Huang, 2001; Baradad et al., 2021,
arXiv 2106.05963). All numbers were fitted to statistics of real maps (docs/experiments/generators.md);
lengths are cells, levels of grey are 0 on the ground and about 1 in a figure.
"""

import math

import numpy as np

from synthetic.layers import N_CELLS
from synthetic.strokes import Figure, draw_marks, hatch_bottom
from utils import V_MAX, V_MIN

Z, X = np.arange(N_CELLS, dtype=np.float64)[:, None], np.arange(N_CELLS, dtype=np.float64)


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


def _leaning_field(rng):
    """Random field of unit variance whose features lean to the right: (70, 70)."""
    white = rng.standard_normal((N_CELLS, N_CELLS))
    field = _smooth(sum(np.roll(white, (-k, k), (0, 1)) for k in range(-2, 3)), 1.5)
    return field / field.std()


def draw_style(rng, version):
    """A map of Style_A or Style_B (version "A", "B"): (70, 70) float64, within 1500...4500 m/s."""
    return np.clip(_draw_a(rng) if version == "A" else _draw_b(rng), V_MIN, V_MAX)


def _pile(rng, n, scale):
    """Dead leaves: n rectangles and ellipses of random grey, each over those before it: (70, 70)."""
    image = np.zeros((N_CELLS, N_CELLS))
    for _ in range(n):
        height = scale * min(rng.pareto(1.5) + 1, 8)
        width = height * math.exp(rng.normal(0.2, 0.5))
        z0, x0 = rng.uniform(-5, 75), rng.uniform(-5, 75)
        turn = rng.normal(0, 0.3) + (0.5 if rng.random() < 0.25 else 0)
        top, bottom = max(int(z0 - height - width), 0), min(int(z0 + height + width) + 2, N_CELLS)
        left, right = max(int(x0 - height - width), 0), min(int(x0 + height + width) + 2, N_CELLS)
        if top >= bottom or left >= right:
            continue
        dz, dx = Z[top:bottom] - z0, X[left:right] - x0
        down = np.abs(dz * math.cos(turn) + dx * math.sin(turn)) / height
        across = np.abs(dx * math.cos(turn) - dz * math.sin(turn)) / width
        is_box = rng.random() < 0.5
        inside = (down < 1) & (across < 1) if is_box else down * down + across * across < 1
        image[top:bottom, left:right][inside] = rng.normal()
    return image


def _draw_a(rng):
    """Style_A: the pile's bright part over a rising ground, all blurred."""
    blur = BLURS_A[rng.integers(6)]
    pile = _smooth(_pile(rng, 60, rng.uniform(2.5, 5)), 1.0)
    pile += 0.3 * _leaning_field(rng) + 0.4 * _random_field(rng, 7.0)
    # figures are rare in the top rows, at the sides, and just above the bottom
    pile += 1.3 * (1 - np.exp(-Z / 20)) - 0.3 * ((X - 34.5) / 35) ** 2
    pile -= 0.5 * np.exp(-0.5 * ((Z - 64) / 3) ** 2)
    threshold = np.quantile(pile[:64], 1 - rng.normal(0.385, 0.035))
    figure = np.clip((pile - threshold) / 0.3 + 0.5, 0, 1)
    figure *= 1 + 0.17 * _random_field(rng, 1.5)
    at_bottom = pile[66] > np.quantile(pile[66], 1 - rng.uniform(0.05, 0.75))
    figure[66:] = np.maximum(figure[66:], 1.1 * at_bottom)
    rise = np.clip(rng.normal(24.5, 4), 15, 31.5)  # m/s a cell
    contrast = max((42.7 - rise + rng.normal(0, 1.5)) / 0.018, 600)  # a slower rise has brighter figures
    vel = rng.normal(1545, 30) + rise * Z + 0.92 * contrast * figure
    vel[66:] += 40
    return blur @ vel @ blur.T


def _ground(rng, figure):
    """Grey between a figure's pieces: brighter near it, with fine slanting rain elsewhere: (70, 70)."""
    near = _smooth((figure.depth > 0).astype(float), 4.0)
    drops = rng.standard_exponential((N_CELLS, N_CELLS)) * (rng.random((N_CELLS, N_CELLS)) < 0.035)
    rain = sum(w * np.roll(drops, (-k, k), (0, 1)) for k, w in enumerate((0.4, 0.9, 1.0, 0.7, 0.3)))
    rain = rain + 0.45 * np.roll(rain, 1, 1) + 0.45 * np.roll(rain, 1, 0)
    grey = 0.13 * near + 0.22 * near**2 + 0.03 * _random_field(rng, 4.0)
    grey += 0.055 * rain * (1 - np.clip(1.5 * near, 0, 0.8))
    return np.maximum(figure.ghosts, grey) + 0.05 * np.exp(np.minimum(figure.depth, 0))


def _draw_b(rng):
    """Style_B: a figure of strips, blobs and hatched columns with dark strokes, grain in the lowest rows."""
    scale = math.exp(rng.normal(0, 0.14))
    target = np.clip(rng.normal(0.495, 0.022), 0.4, 0.55)  # the share of cells that the figure covers
    crowd = _random_field(rng, 7.0) + 0.7 * _random_field(rng, 12.0) + 1.5 * (1 - np.exp(-Z / 12))
    crowd -= 0.8 * ((X - 35.5) / 35) ** 2 + np.clip((Z - 45) / 20, 0, 1)
    figure = Figure(rng, scale, crowd)
    for _ in range(60):
        figure.add_contour()
        if np.count_nonzero(figure.depth[:63] > 0) > target * 63 * N_CELLS:
            break
    figure.depth += 0.4 * _random_field(rng, 1.0)
    ground = _ground(rng, figure)
    rim = -0.3 * np.exp(-np.maximum(figure.depth, 0) / 1.3)
    inner = figure.levels + rim + figure.columns + 0.025 * _random_field(rng, 1.0)
    draw_marks(rng, inner, figure.pieces)
    inner = np.maximum(inner, 0.32 + 0.1 * figure.levels)
    image = ground + np.clip(figure.depth / 0.9 + 0.45, 0, 1) * (inner - ground)
    image = np.clip(image, -0.04, 1.38)
    image[:5] += np.array([0.25, 0.17, 0.1, 0.06, 0.03])[:, None] * (0.25 - image[:5])
    hatch_bottom(rng, image, _random_field(rng, 2.5)[0])
    image[67:] += np.array([0.08, 0.2, 0.3])[:, None] * (1 - image[67:])
    rise = 30 - rng.gamma(1.5, 1.2)  # m/s a cell
    return rng.normal(1600, 25) + rise * Z + rise * rng.normal(17.4, 0.6) * image
