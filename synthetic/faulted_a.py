"""FlatFault_A and CurveFault_A: layers, folded or not, cut by one fault with soft edges."""

import math

import numpy as np

from synthetic.layers import deal_thicknesses, rising_velocities
from synthetic.soft_fault import FAULT_ENDS, N_FINE, THROW, slip_soft

LAYERS = (2, 3, 4)  # the K of OpenFWI's seis{K}_1_{M}.npy
THINNEST = 15  # cells, the least thickness of a layer
AMPLITUDE = (10, 30)  # half cells, whole ones from 10 to 29: how far a fold goes up and down
FOLD = np.sin(2 * math.pi * np.arange(N_FINE) / (N_FINE - 1))  # down first, one period across the map


def _fold(profile, amplitude):
    """Velocities down a column (140,), each column moved down by a fold: (140, 140)."""
    rows = np.floor(np.arange(N_FINE)[:, None] - amplitude * FOLD).astype(int)
    return profile[np.clip(rows, 0, N_FINE - 1)]


def draw_fault_a(rng, curved, layers=None):
    """One map of FlatFault_A or CurveFault_A: (70, 70) float64, m/s.

    In a curved map the fault's block has a fold of its own amplitude, and what stays as it was where the
    outside came in is the layers before they were folded.
    """
    n = layers or int(rng.choice(LAYERS))
    interfaces = 2 * np.cumsum(deal_thicknesses(rng, n, THINNEST))[:-1]
    velocities = rising_velocities(rng, n)
    profile = velocities[(np.arange(N_FINE)[:, None] >= interfaces).sum(1)]
    folded = [_fold(profile, a) for a in rng.integers(*AMPLITUDE, 2)] if curved else None
    start, end = rng.integers(*FAULT_ENDS, 2)
    throw = int(rng.choice([-1, 1]) * rng.integers(THROW[0], THROW[1] + 1))
    flat = np.repeat(profile[:, None], N_FINE, axis=1)
    field = slip_soft(flat, velocities[0], start, end, throw, folded=folded)
    return field if rng.random() < 0.5 else field[:, ::-1]
