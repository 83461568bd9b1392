"""Velocity-space augmentation: new maps out of given ones, to be simulated into exact pairs.

What the best entries of the competition trained on: mirrored, shifted, stretched, rotated, cropped, blended,
faulted and recoloured maps. A map's own cells are kept where it has layers, so that interfaces stay sharp.
"""

import math

import numpy as np

from synthetic.layers import N_CELLS
from utils import V_MAX, V_MIN

FEW = 16  # distinct velocities of a map of plain layers; the softened edges of faults and styles have more
CENTRE = (N_CELLS - 1) / 2


class FileMaps:
    """Velocity maps of some samples of some files, read when asked for: (1, 70, 70) each."""

    def __init__(self, files):
        self.files = files  # [(velocity file, sample indices), …]
        self.stops = np.cumsum([len(indices) for _, indices in files])

    def __len__(self):
        return int(self.stops[-1])

    def __getitem__(self, i):
        f = int(np.searchsorted(self.stops, i, side="right"))
        maps, indices = self.files[f]
        return maps[int(indices[i - self.stops[f]])]


def _sample(field, z, x):
    """The field at cells (z, x), edges repeated: nearest where it has layers, linear elsewhere."""
    z, x = (np.clip(c, 0, N_CELLS - 1) for c in (z, x))
    if len(np.unique(field)) <= FEW:
        return field[np.rint(z).astype(int), np.rint(x).astype(int)]
    z0, x0 = (np.minimum(c.astype(int), N_CELLS - 2) for c in (z, x))
    wz, wx = z - z0, x - x0
    upper = (1 - wx) * field[z0, x0] + wx * field[z0, x0 + 1]
    return (1 - wz) * upper + wz * ((1 - wx) * field[z0 + 1, x0] + wx * field[z0 + 1, x0 + 1])


def _warp(field, matrix=((1, 0), (0, 1)), dz=0.0, dx=0.0):
    """Value of each cell from where `matrix` about the centre, then a move by (dz, dx), takes it."""
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
    """A square window of 42 to 66 cells, enlarged to the whole map."""
    size = rng.uniform(0.6, 0.95)
    dz, dx = (1 - size) * CENTRE * rng.uniform(-1, 1, 2)
    return _warp(field, ((size, 0), (0, size)), dz, dx)


def _blend(rng, field, other):
    alpha = rng.uniform(0.3, 0.7)
    return alpha * field + (1 - alpha) * other


def _fault(rng, field, other):
    """One side of a straight fault, dipping 34 to 82 degrees, slips 5 to 10 cells along it."""
    slope = rng.choice([-1, 1]) / math.tan(math.radians(rng.uniform(34, 82)))  # cells across for a cell down
    dz = rng.choice([-1, 1]) * round(rng.uniform(5, 10))
    z, x = np.mgrid[:N_CELLS, :N_CELLS]
    side = x - rng.uniform(10, 60) - slope * (z - CENTRE)
    return np.where(side > 0, _warp(field, dz=dz, dx=round(dz * slope)), field)


def _recolour(field, rng):
    """New velocities in the old order: of every layer, or of more values along a random rising curve."""
    old = np.unique(field)
    if len(old) > FEW:
        old = np.unique(np.quantile(field, np.linspace(0, 1, 7)))
    return np.interp(field, old, np.sort(rng.integers(V_MIN, V_MAX + 1, len(old))))


CHANGES = (_shift, _stretch, _rotate, _crop, _blend, _fault)


def vary(maps, n, seed, start=0):
    """Variations start … start + n - 1 of maps: (n, 1, 70, 70) float32 m/s, within [1500, 4500].

    maps: anything with a length and items (1, 70, 70) m/s. Variation i depends on (maps, seed, i) alone: one
    map, or two blended, changed in shape, every second one mirrored, every second one recoloured. Velocities
    of maps of whole numbers stay whole. Raises ValueError for no maps, maps of another shape, values that are
    not finite, a negative seed or n < 1.
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
