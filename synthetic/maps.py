"""Velocity maps of OpenFWI's ten families: `make_maps`.

OpenFWI's generator was never released. These generators follow the maps it published (Deng et al., 2022,
arXiv 2111.02926). `python bench.py realism` measures how realistic they are, and
docs/experiments/generators.md describes what was learned from real maps.
"""

import numpy as np

from synthetic import faulted_a, faulted_b
from synthetic.layers import N_CELLS, draw_layers
from synthetic.style import draw_style
from utils import FAMILIES, check_family

FAULT_LAYERS = {"A": faulted_a.LAYERS, "B": faulted_b.LAYERS}  # the K of OpenFWI's seis{K}_1_{M}.npy


DRAW = {  # family: f(rng, layers or None) -> (70, 70) m/s
    "FlatVel_A": lambda rng, layers: draw_layers(rng, curved=False, increasing=True),
    "FlatVel_B": lambda rng, layers: draw_layers(rng, curved=False, increasing=False),
    "CurveVel_A": lambda rng, layers: draw_layers(rng, curved=True, increasing=True),
    "CurveVel_B": lambda rng, layers: draw_layers(rng, curved=True, increasing=False),
    "FlatFault_A": lambda rng, layers: faulted_a.draw_fault_a(rng, False, layers),
    "FlatFault_B": lambda rng, layers: faulted_b.draw_fault_b(rng, False, layers),
    "CurveFault_A": lambda rng, layers: faulted_a.draw_fault_a(rng, True, layers),
    "CurveFault_B": lambda rng, layers: faulted_b.draw_fault_b(rng, True, layers),
    "Style_A": lambda rng, layers: draw_style(rng, "A"),
    "Style_B": lambda rng, layers: draw_style(rng, "B"),
}


def make_maps(family, n, seed, start=0, layers=None):
    """Velocity maps number start to start + n - 1 of a family: (n, 1, 70, 70) float32 m/s.

    Map i depends on (family, seed, i) only. `layers` is the K of OpenFWI's file names: the number of layers
    in Fault families of version A, and of each of the two spliced models in version B; without it each map
    draws its own. Raises ValueError for an unknown family, a negative seed or n < 1.
    """
    draw = DRAW[check_family(family)]
    if n < 1 or seed < 0:
        raise ValueError(f"n = {n}, seed = {seed}; expected n of at least 1 and seed of at least 0")
    maps = np.empty((n, 1, N_CELLS, N_CELLS), np.float32)
    for i in range(n):
        maps[i] = draw(np.random.default_rng([seed, FAMILIES.index(family), start + i]), layers)
    return maps
