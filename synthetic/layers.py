"""Layered maps: FlatVel and CurveVel, and the layers that faults cut."""

import numpy as np

from utils import V_MAX, V_MIN

N_CELLS = 70  # cells of 10 m, down and across
JITTER = 1.0  # cells: how far a layer's thickness strays from its map's
FAST_M_S = 3000  # in faulted maps slow velocities end and fast ones begin here


def _spline_matrix():
    """Control depths to depths at the 70 columns: (70, 8), a C¹ quadratic spline.

    One parabola through the first three controls, then a piece per control
    that goes on with the slope before it. The knots, 10 cells apart from -0.1
    and the last at 77.9, are where 18,000 real interfaces of CurveVel_A leave
    residuals of mere rounding.
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
    """Vel families: 3-7 interfaces about 70/n cells apart -> (70, 70)."""
    n = rng.integers(3, 8)
    thickness = N_CELLS / n
    shape = (n - 1, 8 if curved else 1)  # one number an interface, or eight control depths
    first = rng.uniform(0.5 * thickness, 1.5 * thickness, shape[1])
    below = first + np.cumsum(thickness + rng.uniform(-JITTER, JITTER, shape), axis=0)
    depths = np.vstack([first, below])
    depths = depths @ SPLINE.T if curved else np.repeat(depths, N_CELLS, axis=1)
    velocities = rng.integers(V_MIN, V_MAX + 1, n + 1)
    # the real first interfaces begin and end where 0.8, not one half, is the offset of rounding
    return _fill(np.floor(depths + 0.8), np.sort(velocities) if increasing else velocities)


def deal_thicknesses(rng, n, thinnest):
    """Thicknesses of n layers that fill the map: `thinnest` each, the rest dealt out, then shuffled."""
    thickness = np.full(n, thinnest)
    for k in range(n - 1):
        thickness[k] += rng.integers(0, N_CELLS - thickness.sum() + 1)
    thickness[-1] += N_CELLS - thickness.sum()
    return rng.permutation(thickness)


def rising_velocities(rng, n):
    """Velocities of a faulted map's n layers, rising with depth; half of them (rounded down) are slow."""
    slow = rng.integers(V_MIN, FAST_M_S + 1, n // 2)
    return np.sort(np.append(slow, rng.integers(FAST_M_S, V_MAX + 1, n - n // 2))).astype(np.float64)
