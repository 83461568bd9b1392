"""Layered maps: FlatVel and CurveVel, and the layers that faults cut."""

import numpy as np

from utils import V_MAX, V_MIN

N_CELLS = 70  # cells of 10 m, down and across
JITTER = 1.0  # cells by which thicknesses differ from 70 / n at most
FAST_M_S = 3000  # the limit between slow and fast velocities in faulted maps


def _spline_matrix():
    """The matrix (70, 8) from control depths to depths at the columns: a quadratic spline of class C¹.

    One parabola passes through the first three controls; then each control adds a piece that continues with
    the slope before it. The knots are 10 cells apart from -0.1 on, and the last is at 77.9: with these,
    18,000 real interfaces of CurveVel_A differ from splines by rounding only.
    """
    x = np.arange(N_CELLS, dtype=np.float64)
    knots = np.append(np.arange(0, 70, 10), 78) - 0.1
    y = np.eye(8)
    first = np.polyfit(knots[:3], y[:3], 2)
    depths = np.stack([np.polyval(c, x) for c in first.T], 1)
    slope = (2 * first[0] * knots[2]) + first[1]
    for k in range(2, 7):
        step = knots[k + 1] - knots[k]
        bend = (y[k + 1] - y[k] - slope * step) / step**2
        t = (x[x > knots[k]] - knots[k])[:, None]
        depths[x > knots[k]] = y[k] + slope * t + bend * t**2
        slope = slope + 2 * bend * step
    return depths


SPLINE = _spline_matrix()


def _fill(cells, velocities, n_rows=N_CELLS):
    """Paint layers: first rows of the lower layers (n, X), velocities (n + 1) -> (n_rows, X)."""
    layer = (np.arange(n_rows)[:, None, None] >= cells.T).sum(-1)
    return velocities[layer].astype(np.float64)


def draw_layers(rng, curved, increasing):
    """Draw a map of a Vel family with n = 3 to 7 interfaces about 70/n cells apart: (70, 70) m/s."""
    n = rng.integers(3, 8)
    thickness = N_CELLS / n
    shape = (n - 1, 8 if curved else 1)  # a depth for each interface, or eight control depths
    first = rng.uniform(0.5 * thickness, 1.5 * thickness, shape[1])
    below = first + np.cumsum(thickness + rng.uniform(-JITTER, JITTER, shape), axis=0)
    depths = np.vstack([first, below])
    depths = depths @ SPLINE.T if curved else np.repeat(depths, N_CELLS, axis=1)
    velocities = rng.integers(V_MIN, V_MAX + 1, n + 1)
    # the depths of real first interfaces show that 0.8, not one half, is added before rounding down
    return _fill(np.floor(depths + 0.8), np.sort(velocities) if increasing else velocities)


def deal_thicknesses(rng, n, min_thickness):
    """Draw thicknesses of n layers that fill the map, in cells (n,).

    Each layer gets `min_thickness`, the rest is divided at random, and the layers are shuffled.
    """
    thickness = np.full(n, min_thickness)
    for k in range(n - 1):
        thickness[k] += rng.integers(0, N_CELLS - thickness.sum() + 1)
    thickness[-1] += N_CELLS - thickness.sum()
    return rng.permutation(thickness)


def rising_velocities(rng, n):
    """Draw velocities of n layers (n,) m/s for a faulted map, rising with depth; n // 2 of them are slow."""
    slow = rng.integers(V_MIN, FAST_M_S + 1, n // 2)
    return np.sort(np.append(slow, rng.integers(FAST_M_S, V_MAX + 1, n - n // 2))).astype(np.float64)
