"""FlatFault_A and CurveFault_A: layers, folded or not, cut by one fault with soft edges."""

import math

import numpy as np

from synthetic.layers import deal_thicknesses, rising_velocities
from synthetic.soft_fault import FAULT_ENDS, N_FINE, THROW, slip_soft

LAYERS = (2, 3, 4)  # the K of OpenFWI's seis{K}_1_{M}.npy
MIN_THICKNESS = 15  # cells, of a layer
AMPLITUDE = (10, 30)  # of a fold, up and down: whole half cells from 10 to 29
FOLD = np.sin(2 * math.pi * np.arange(N_FINE) / (N_FINE - 1))  # down first, one period across the map


def _fold(profile, amplitude):
    """Fold flat layers, given their velocities (140,) from the top down: (140, 140)."""
    rows = np.floor(np.arange(N_FINE)[:, None] - amplitude * FOLD).astype(int)
    return profile[np.clip(rows, 0, N_FINE - 1)]


def draw_fault_a(rng, curved, layers=None):
    """Draw a map of CurveFault_A if `curved`, else of FlatFault_A: (70, 70) float64 m/s.

    In a curved map the fault's block is folded by an amplitude of its own, and where `slip_soft` keeps the
    old velocities, these are the layers before they were folded.
    """
    n = layers or int(rng.choice(LAYERS))
    interfaces = 2 * np.cumsum(deal_thicknesses(rng, n, MIN_THICKNESS))[:-1]
    velocities = rising_velocities(rng, n)
    profile = velocities[(np.arange(N_FINE)[:, None] >= interfaces).sum(1)]
    folded = [_fold(profile, a) for a in rng.integers(*AMPLITUDE, 2)] if curved else None
    start, end = rng.integers(*FAULT_ENDS, 2)
    throw = int(rng.choice([-1, 1]) * rng.integers(THROW[0], THROW[1] + 1))
    flat = np.repeat(profile[:, None], N_FINE, axis=1)
    field = slip_soft(flat, velocities[0], start, end, throw, folded=folded)
    return field if rng.random() < 0.5 else field[:, ::-1]
