"""Velocity-space augmentation: new maps made from given ones, whose simulated gathers are exact pairs.

The best entries of the competition trained on such maps: mirrored, shifted, stretched, rotated, cropped,
blended, faulted and recoloured. Layered maps take the nearest cell, so that interfaces stay sharp.
"""

import math

import numpy as np

from synthetic.layers import N_CELLS
from utils import V_MAX, V_MIN

MAX_LAYER_VELOCITIES = 16  # a map of sharp layers has no more; soft edges of faults and Style maps have more
CENTRE = (N_CELLS - 1) / 2


class FileMaps:
    """A sequence of velocity maps (1, 70, 70) from several files, each read on demand."""

    def __init__(self, files):
        self.files = files  # [(velocity file, sample indices), ...]
        self.stops = np.cumsum([len(indices) for _, indices in files])

    def __len__(self):
        return int(self.stops[-1])

    def __getitem__(self, i):
        f = int(np.searchsorted(self.stops, i, side="right"))
        maps, indices = self.files[f]
        return maps[int(indices[i - self.stops[f]])]


def _sample(field, z, x):
    """The field at cells (z, x), with edges repeated: the nearest cell in layered maps, else linear."""
    z, x = (np.clip(c, 0, N_CELLS - 1) for c in (z, x))
    if len(np.unique(field)) <= MAX_LAYER_VELOCITIES:
        return field[np.rint(z).astype(int), np.rint(x).astype(int)]
    z0, x0 = (np.minimum(c.astype(int), N_CELLS - 2) for c in (z, x))
    wz, wx = z - z0, x - x0
    upper = (1 - wx) * field[z0, x0] + wx * field[z0, x0 + 1]
    return (1 - wz) * upper + wz * ((1 - wx) * field[z0 + 1, x0] + wx * field[z0 + 1, x0 + 1])


def _warp(field, matrix=((1, 0), (0, 1)), dz=0.0, dx=0.0):
    """Give each cell the value at the place to which `matrix`, about the centre, and (dz, dx) move it."""
    z, x = np.mgrid[:N_CELLS, :N_CELLS] - CENTRE
    (a, b), (c, d) = matrix
    return _sample(field, a * z + b * x + CENTRE + dz, c * z + d * x + CENTRE + dx)


def _shift(rng, field, other):
    return _warp(field, dz=rng.uniform(-12, 12), dx=rng.uniform(-20, 20))


def _stretch(rng, field, other):
    down, across = np.exp(rng.uniform(-0.35, 0.35, 2))
    return _warp(field, ((down, 0), (0, across)))


def _rotate(rng, field, other):
    angle = math.radians(rng.uniform(-15, 15))
    c, s = math.cos(angle), math.sin(angle)
    return _warp(field, ((c, s), (-s, c)))


def _crop(rng, field, other):
    """Enlarge a square window of 42 to 66 cells to the whole map."""
    size = rng.uniform(0.6, 0.95)
    dz, dx = (1 - size) * CENTRE * rng.uniform(-1, 1, 2)
    return _warp(field, ((size, 0), (0, size)), dz, dx)


def _blend(rng, field, other):
    alpha = rng.uniform(0.3, 0.7)
    return alpha * field + (1 - alpha) * other


def _fault(rng, field, other):
    """Slip one side of a straight fault, which dips 34 to 82 degrees, by 5 to 10 cells along it."""
    slope = rng.choice([-1, 1]) / math.tan(
        math.radians(rng.uniform(34, 82))
    )  # cells across for each cell down
    dz = rng.choice([-1, 1]) * round(rng.uniform(5, 10))
    z, x = np.mgrid[:N_CELLS, :N_CELLS]
    side = x - rng.uniform(10, 60) - slope * (z - CENTRE)
    return np.where(side > 0, _warp(field, dz=dz, dx=round(dz * slope)), field)


def _recolour(field, rng):
    """Draw new velocities in the same order, one for each layer, or along a random rising curve."""
    old = np.unique(field)
    if len(old) > MAX_LAYER_VELOCITIES:
        old = np.unique(np.quantile(field, np.linspace(0, 1, 7)))
    return np.interp(field, old, np.sort(rng.integers(V_MIN, V_MAX + 1, len(old))))


CHANGES = (_shift, _stretch, _rotate, _crop, _blend, _fault)


def vary(maps, n, seed, start=0):
    """Variations number start to start + n - 1 of maps: (n, 1, 70, 70) float32 m/s, within [1500, 4500].

    maps: a sequence of maps (1, 70, 70) m/s. Variation i depends on (maps, seed, i) only. Each is made by one
    of CHANGES; half of them are mirrored, half are recoloured. Whole velocities stay whole. Raises ValueError
    for no maps, maps of another shape, values that are not finite, a negative seed or n < 1.
    """
    if n < 1 or seed < 0 or not len(maps):
        raise ValueError(f"n = {n}, seed = {seed}, {len(maps)} maps; expected at least 1, 0 and 1")
    varied = np.empty((n, 1, N_CELLS, N_CELLS), np.float32)
    for i in range(n):
        rng = np.random.default_rng([seed, start + i])
        k, step = rng.integers(len(maps)), 1 + rng.integers(max(len(maps) - 1, 1))
        field, other = (_checked(maps, int(j) % len(maps)) for j in (k, k + step))
        whole = not (field % 1).any() and not (other % 1).any()
        field = CHANGES[rng.integers(len(CHANGES))](rng, field, other)
        field = field[:, ::-1] if rng.random() < 0.5 else field
        field = _recolour(field, rng) if rng.random() < 0.5 else field
        varied[i] = np.clip(np.rint(field) if whole else field, V_MIN, V_MAX)
    return varied


def _checked(maps, k):
    field = np.asarray(maps[k], np.float64)
    if field.shape != (1, N_CELLS, N_CELLS) or not np.isfinite(field).all():
        raise ValueError(f"map {k}: shape {field.shape} or values not finite; expected (1, 70, 70) in m/s")
    return field[0]
