"""Velocity maps of OpenFWI's ten families: `make_maps`.

OpenFWI's generator was never released: these follow the maps it published
(Deng et al., 2022, arXiv 2111.02926). `python bench.py realism` says how near
they come; docs/experiments/generators.md says what real maps taught.
"""

import math

import numpy as np

from synthetic.sharp_fault import draw_sharp_faults
from synthetic.soft_fault import FAULT_ENDS, N_CELLS, N_FINE, THROW, slip_soft
from utils import FAMILIES, V_MAX, V_MIN, check_family

FAULT_LAYERS = {"A": (2, 3, 4), "B": (6, 7, 8)}  # the K of OpenFWI's seis{K}_1_{M}.npy

# Styles: standard deviation (m/s) and length (cells) of the random field, white noise (m/s)
STYLE = {"A": (183.0, 3.5, 0.0), "B": (158.0, 1.96, 58.0)}

JITTER = 1.0  # cells: how far a layer's thickness strays from its map's


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


def _layered(rng, curved, increasing):
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


def _slip_soft(rng, field, v_min):
    """Version A's fault: (140, 140) half cells -> (70, 70)."""
    start, end = rng.integers(*FAULT_ENDS, 2)
    dz = int(rng.choice([-1, 1]) * rng.integers(THROW[0], THROW[1] + 1))
    result = slip_soft(field, v_min, start, end, dz)
    return result if rng.random() < 0.5 else result[:, ::-1]


def _faulted_soft(rng, curved, layers):
    """Fault families, version A: one fault with soft edges -> (70, 70)."""
    n = layers or rng.choice(FAULT_LAYERS["A"])
    thickness = np.full(n, 60 // n)  # four real layers: 15 cells each, and ten more dealt out in turn
    for k in range(n - 1):
        thickness[k] += rng.integers(0, N_CELLS - thickness.sum() + 1)
    thickness[-1] += N_CELLS - thickness.sum()
    x = np.arange(N_FINE) / 2
    depths = np.cumsum(rng.permutation(thickness))[:-1, None] + np.zeros_like(x)
    if curved:
        phase = 2 * math.pi * (rng.integers(1, 6) * x / N_CELLS + rng.random())
        depths = depths + rng.uniform(2, 6) * np.sin(phase)
    n_slow = (n + rng.integers(0, 2)) // 2  # of three layers, one or two
    slow, fast = rng.integers(1500, 3001, n_slow), rng.integers(3000, 4501, n - n_slow)
    velocities = np.sort(np.append(slow, fast))
    return _slip_soft(rng, _fill(np.round(2 * depths), velocities, N_FINE), velocities[0])


def _style(rng, version):
    """Style families: a Gaussian random field (squared-exponential) on a depth trend -> (70, 70)."""
    deviation, length, noise = STYLE[version]
    n = 128  # periodic in 128 cells, so nothing wraps round within 70
    k = 2 * math.pi * np.fft.fftfreq(n)
    power = np.exp(-0.5 * length**2 * (k[:, None] ** 2 + k**2))
    white = np.fft.fft2(rng.standard_normal((n, n)))
    field = np.fft.ifft2(white * np.sqrt(power / power.mean())).real[:N_CELLS, :N_CELLS]
    trend = rng.uniform(1500, 2000) + rng.uniform(30, 40) * np.arange(N_CELLS)[:, None]
    field = trend + deviation * field + noise * rng.standard_normal(field.shape)
    return np.clip(field, V_MIN, V_MAX)


DRAW = {  # family: f(rng, layers or None) -> (70, 70) m/s
    "FlatVel_A": lambda rng, layers: _layered(rng, curved=False, increasing=True),
    "FlatVel_B": lambda rng, layers: _layered(rng, curved=False, increasing=False),
    "CurveVel_A": lambda rng, layers: _layered(rng, curved=True, increasing=True),
    "CurveVel_B": lambda rng, layers: _layered(rng, curved=True, increasing=False),
    "FlatFault_A": lambda rng, layers: _faulted_soft(rng, False, layers),
    "FlatFault_B": lambda rng, layers: draw_sharp_faults(rng, False, layers),
    "CurveFault_A": lambda rng, layers: _faulted_soft(rng, True, layers),
    "CurveFault_B": lambda rng, layers: draw_sharp_faults(rng, True, layers),
    "Style_A": lambda rng, layers: _style(rng, "A"),
    "Style_B": lambda rng, layers: _style(rng, "B"),
}


def make_maps(family, n, seed, start=0, layers=None):
    """Velocity maps start … start + n - 1 of a family: (n, 1, 70, 70) float32, m/s.

    Map i depends on (family, seed, i) alone. `layers` is the K of OpenFWI's file names: the number of layers
    in Fault families of version A, of each of the two spliced models in version B; without it each map draws
    its own. Raises ValueError for an unknown family, a negative seed or n < 1.
    """
    draw = DRAW[check_family(family)]
    if n < 1 or seed < 0:
        raise ValueError(f"n = {n}, seed = {seed}; expected n of at least 1 and seed of at least 0")
    maps = np.empty((n, 1, N_CELLS, N_CELLS), np.float32)
    for i in range(n):
        maps[i] = draw(np.random.default_rng([seed, FAMILIES.index(family), start + i]), layers)
    return maps
