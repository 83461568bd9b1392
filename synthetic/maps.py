"""Velocity maps of OpenFWI's ten families: `make_maps`.

OpenFWI's generator was never released: these follow the maps it published
(Deng et al., 2022, arXiv 2111.02926). FlatVel_A, CurveVel_A and four-layer
FlatFault_A were fitted to real maps (`python bench.py realism` says how near
they come); the other families are sensible stand-ins.
"""

import math

import numpy as np
import torch

from utils import FAMILIES, V_MAX, V_MIN, check_family

N_CELLS = 70  # cells of 10 m, down and across
FAULT_LAYERS = {"A": (2, 3, 4), "B": (6, 7, 8)}  # the K of OpenFWI's seis{K}_1_{M}.npy
# Styles: standard deviation (m/s) and length (cells) of the random field, white noise (m/s)
STYLE = {"A": (183.0, 3.5, 0.0), "B": (158.0, 1.96, 58.0)}
JITTER = 1.0  # cells: how far a layer's thickness strays from its map's
N_FINE = 2 * N_CELLS  # faults of version A are made on half cells
THROW = (10, 20)  # half cells, whole ones: real throws are 5, 5.5, ... 10 cells
LEAN = math.radians(6)  # real faulted maps are sheared so: depths shrink by cos 6°, verticals lean
OUTSIDE = -1500.0  # m/s, the value around real maps while they were made
FAULT_ENDS = (N_FINE // 4, 3 * N_FINE // 2)  # where on the border a fault may start and end, half cells
ROUNDING_ERROR = 5e-13  # m/s: below it ripples are not seen
FAINTEST = 2e-11  # m/s: of fainter ripples the original's rounding may have decided otherwise
RUN = 24  # half cells of a row of which it decides alike


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


def _lean(field):
    """Shear half cells by LEAN about their upper left corner, bilinearly, OUTSIDE from outside."""
    padded = np.pad(field, 1, constant_values=OUTSIDE).ravel()
    top, bottom = (padded[at] + ACROSS * (padded[at + 1] - padded[at]) for at in SHEARED)
    return top + DOWN * (bottom - top)


def _shear():
    """Where `_lean` reads the padded field, upper and lower, and its shares down and across."""
    z, x = np.mgrid[:N_FINE, :N_FINE].astype(np.float64)
    at_z = np.clip(z / math.cos(LEAN) + 1, 0, N_FINE + 1)
    at_x = np.clip(x - math.tan(LEAN) * z + 1, 0, N_FINE + 1)
    row, column = np.minimum(at_z.astype(int), N_FINE), np.minimum(at_x.astype(int), N_FINE)
    at = row * (N_FINE + 2) + column
    return (at, at + N_FINE + 2), at_z - row, at_x - column


def _product(a, b):
    """a @ b of arrays, by torch: numpy's threads and torch's, which simulate, would wait for one another."""
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def _cubic_shift(field, dz, dx, outside):
    """Move (140, 140) by dz whole rows and dx columns along a cubic spline, `outside` from outside."""
    source, knots = np.arange(N_FINE) - dx, np.arange(-1, N_FINE + 1)
    t = np.abs(source[:, None] - knots)
    weight = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
    weight[:, 2] += weight[:, 0]  # the spline is mirrored at both ends
    weight[:, -3] += weight[:, -1]
    moved = np.full_like(field, outside)
    rows, from_rows = slice(max(dz, 0), N_FINE + min(dz, 0)), slice(max(-dz, 0), N_FINE - max(dz, 0))
    moved[rows] = _product(field, _product(weight[:, 1:-1], SPLINE_INVERSE).T)[from_rows]
    moved[:, (source < 0) | (source > N_FINE - 1)] = outside
    return moved


def _median(field):
    """Median of 3 x 3 cells, edges repeated: of columns' highest low, middle middle and lowest high."""
    padded = np.pad(field, 1, mode="edge")
    low, middle, high = _sorted(padded[:-2], padded[1:-1], padded[2:])
    lows, highs = (np.stack([v[:, :-2], v[:, 1:-1], v[:, 2:]]) for v in (low, high))
    middles = _sorted(middle[:, :-2], middle[:, 1:-1], middle[:, 2:])[1]
    return _sorted(lows.max(0), middles, highs.min(0))[1]


def _sorted(a, b, c):
    """Three arrays, value by value in ascending order."""
    a, b = np.minimum(a, b), np.maximum(a, b)
    b, c = np.minimum(b, c), np.maximum(b, c)
    return np.minimum(a, b), np.maximum(a, b), c


def _spline_inverse():
    """Values to coefficients of a cubic spline mirrored at its ends, exact to the faintest: (140, 140).

    Unser et al. (1993): powers of the spline's pole. A numerical inverse would drown the ripples in rounding.
    """
    i = np.arange(N_FINE)
    last, total, pole = N_FINE - 1, i[:, None] + i, math.sqrt(3) - 2
    mirrored = np.where(i > 0, pole**total, 0) + np.where(i < last, pole ** (2 * last - total), 0)
    return math.sqrt(3) * (pole ** np.abs(i[:, None] - i) + mirrored)


def _halving_matrix():
    """Half cells to cells, as an image is scaled by one half: a Gaussian of σ 0.5, then means of two.

    The image is mirrored at its outermost half cells, as real maps' right borders show.
    """
    gauss = np.exp(-2.0 * np.arange(-2, 3) ** 2)
    gauss /= gauss.sum()
    matrix = np.zeros((N_CELLS, N_FINE))
    for offset in range(-2, 4):
        weight = (np.append(gauss, 0) + np.append(0, gauss))[offset + 2] / 2
        column = np.abs(2 * np.arange(N_CELLS) + offset)
        np.add.at(matrix, (np.arange(N_CELLS), np.minimum(column, 2 * (N_FINE - 1) - column)), weight)
    return matrix


SPLINE_INVERSE, HALVING = _spline_inverse(), _halving_matrix()
SHEARED, DOWN, ACROSS = _shear()


def _slip_soft(rng, field, v_min):
    """Version A's fault: (140, 140) half cells -> (70, 70)."""
    start, end = rng.integers(*FAULT_ENDS, 2)
    dz = int(rng.choice([-1, 1]) * rng.integers(THROW[0], THROW[1] + 1))
    result = slip_soft(field, v_min, start, end, dz)
    return result if rng.random() < 0.5 else result[:, ::-1]


def border_point(along):
    """Column and row of the point so many half cells along the top, then down the right side."""
    return min(along, N_FINE - 1), max(along - N_FINE + 1, 0)


def fault_line(start, end):
    """The line of a fault from border to border: (column at the top, columns to the left for a row down).

    start: a `border_point`; end: one of the map turned by 180 degrees, along the bottom, then up the left.
    """
    (top, right), (bottom, left) = border_point(start), border_point(end)
    bottom, left = N_FINE - 1 - bottom, N_FINE - 1 - left
    across = (top - bottom) / max(left - right, 1)
    return top + across * right, across


def _slide(field, v_min, start, end, dz):
    """A fault's block moved down by dz, and all leaning by six degrees, nothing put back yet: (140, 140)."""
    _, across = fault_line(start, end)
    x, (bottom, left) = np.arange(N_FINE), border_point(end)
    z, first, last = x[:, None], border_point(start)[1], N_FINE - 1 - left
    # of half cells on the line itself rounding decides, in this order of terms, as in real maps; the row of
    # the fault's end is wholly in the block, as are those below, and that of its start is not at all
    line = across * z + (bottom - across * last)
    block = (N_FINE - x <= line) & (z > first) | (z >= last)
    # relative to the lowest velocity, the ripples in it are exact
    moved = _cubic_shift(np.where(block, field, OUTSIDE) - v_min, dz, -dz * across, OUTSIDE - v_min)
    return _lean(np.where(block, v_min + moved, field))


def slip_soft(field, v_min, start, end, dz, flipped=False):
    """The fault itself: its block goes down by dz, whole half cells, along `fault_line(start, end)`.

    As real FlatFault_A maps were made, but for rounding. The block under the line slides along it, moved by a
    cubic spline together with the OUTSIDE value around it. All leans by six degrees. What is then below the
    lowest velocity stays as it was: ripples of the spline, some of 1e-12 m/s, so mix old and new in every
    other half column near the fault. Then the map is halved and takes a median of 3 x 3 cells. Where it is
    `flipped` (140, 140), rounding is to decide the other way.
    """
    result = _slide(field, v_min, start, end, dz)
    old = result < v_min - ROUNDING_ERROR
    old ^= flipped & (np.abs(result - v_min) < FAINTEST)
    result = np.where(old, field, result)
    return np.clip(_median(_product(_product(HALVING, result), HALVING.T)), V_MIN, V_MAX)


def undecided(field, v_min, start, end, dz):
    """Where rounding decides whether the old value stays, and that matters: masks (N, 140, 140).

    One for each half cell of a ripple, and one for each RUN half cells of a row where there is none.
    """
    result = _slide(field, v_min, start, end, dz)
    ripple, masks = np.abs(result - v_min), []
    for z, row in enumerate((ripple < FAINTEST) & (field > v_min)):
        runs = [[x] for x in np.flatnonzero(row & (ripple[z] > 0))]
        still = np.flatnonzero(row & (ripple[z] == 0))
        for run in runs + [still[k : k + RUN] for k in range(0, len(still), RUN)]:
            masks.append(np.zeros(field.shape, bool))
            masks[-1][z, run] = True
    return np.array(masks).reshape(-1, *field.shape)


def _slip_sharp(rng, field):
    """Version B's fault: one side moves along it by whole cells, except where that brings in the outside."""
    dip = math.radians(rng.triangular(34, 77, 82))  # median 66 degrees
    slope = rng.choice([-1, 1]) / math.tan(dip)  # cells across for a cell down
    dz = rng.choice([-1, 1]) * rng.uniform(5, 10)
    dz, dx = round(dz), round(dz * slope)
    z, x = np.mgrid[:N_CELLS, :N_CELLS]
    side = rng.choice([-1, 1]) * (x - rng.uniform(10, 60) - slope * (z - N_CELLS / 2))
    block = (side > 0) & (x - dx >= 0) & (x - dx <= N_CELLS - 1)
    moved = field[np.clip(z - dz, 0, N_CELLS - 1), np.clip(x - dx, 0, N_CELLS - 1)]
    return np.where(block, moved, field)


def _faulted(rng, curved, version, layers):
    """Fault families: A one fault and soft edges, B two or three and sharp ones -> (70, 70)."""
    n = layers or rng.choice(FAULT_LAYERS[version])
    thickness = np.full(n, 60 // n)  # four real layers: 15 cells each, and ten more dealt out in turn
    for k in range(n - 1):
        thickness[k] += rng.integers(0, N_CELLS - thickness.sum() + 1)
    thickness[-1] += N_CELLS - thickness.sum()
    fine = 2 if version == "A" else 1  # points a cell
    x = np.arange(fine * N_CELLS) / fine
    depths = np.cumsum(rng.permutation(thickness))[:-1, None] + np.zeros_like(x)
    for _ in range((1 if version == "A" else rng.integers(2, 4)) if curved else 0):
        phase = 2 * math.pi * (rng.integers(1, 6) * x / N_CELLS + rng.random())
        depths = depths + rng.uniform(2, 6) * np.sin(phase)
    rows = np.round(fine * depths)
    if version == "A":
        n_slow = (n + rng.integers(0, 2)) // 2  # of three layers, one or two
        slow, fast = rng.integers(1500, 3001, n_slow), rng.integers(3000, 4501, n - n_slow)
        velocities = np.sort(np.append(slow, fast))
        return _slip_soft(rng, _fill(rows, velocities, N_FINE), velocities[0])
    field = _fill(rows, rng.integers(V_MIN, V_MAX + 1, n))
    for _ in range(rng.integers(2, 4)):
        field = _slip_sharp(rng, field)
    return field


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


def make_maps(family, n, seed, start=0, layers=None):
    """Velocity maps start … start + n - 1 of a family: (n, 1, 70, 70) float32, m/s.

    Map i depends on (family, seed, i) alone. `layers` fixes the number of
    layers in Fault families; without it each map draws its own. Raises
    ValueError for an unknown family, a negative seed or n < 1.
    """
    kind, version = check_family(family).split("_")
    if n < 1 or seed < 0:
        raise ValueError(f"n = {n}, seed = {seed}; expected n of at least 1 and seed of at least 0")
    maps = np.empty((n, 1, N_CELLS, N_CELLS), np.float32)
    for i in range(n):
        rng = np.random.default_rng([seed, FAMILIES.index(family), start + i])
        curved = kind.startswith("Curve")
        if kind.endswith("Vel"):
            maps[i] = _layered(rng, curved, version == "A")
        elif kind.endswith("Fault"):
            maps[i] = _faulted(rng, curved, version, layers)
        else:
            maps[i] = _style(rng, version)
    return maps
