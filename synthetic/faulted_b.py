"""FlatFault_B and CurveFault_B: two layered models, each with its own faults, spliced along a line."""

import math

import numpy as np

from synthetic.layers import N_CELLS, deal_thicknesses, rising_velocities

LAYERS = (6, 7, 8)  # the K of OpenFWI's seis{K}_1_{M}.npy: layers of each of the two models
MIN_THICKNESS = 7  # cells, of a layer; also the most frequent thickness
SPLICE = (10, 60)  # columns between which the splice starts and ends
MIN_ACROSS = 14  # the splice crosses at least this many columns, unless it is vertical
PERIODS, PERIOD_SHARES = (2, 3, 4), (0.5, 0.35, 0.15)  # of a model's fold, across the map
AMPLITUDE = (5, 21)  # cells, of a fold
FAULTS, FAULT_SHARES = (2, 3), (0.65, 0.35)  # numbers of faults on a model's side of the splice
LEFTWARD = 1.6  # above 1, faults are more frequent on the left of their side of the splice
ACROSS = (6, 36, 110)  # columns that a fault crosses from top to bottom: lowest, most frequent, highest
MOVE = (5, 16)  # cells by which a faulted block moves up or down, and left or right
DOWN_SHARE = 0.55  # share of models whose leftmost fault has its block moved down
SLIDE_SHARE = 0.25  # share of faults that move the layers as they are; in others the block gets its own fold
DEPTH, COLUMN = np.mgrid[:N_CELLS, 1 : N_CELLS + 1]  # lines count columns from 1


def _layers(interfaces, periods, amplitude, dx, dz):
    """Layer of every cell (70, 70): interfaces (n - 1,), folded, then moved by dx columns and dz rows."""
    x = np.clip(np.arange(N_CELLS) - dx, 0, N_CELLS)  # beyond the border a fold continues flat
    fold = amplitude * np.sin(math.pi * periods * (2 * x / N_CELLS - 1))
    depths = np.ceil(np.clip(interfaces[:, None] + fold, 0, N_CELLS)) + dz
    return (np.arange(N_CELLS)[:, None, None] >= depths.T).sum(-1)


def _right_of(top, bottom):
    """Mask (70, 70) of the cells right of the line from column `top` in row 0 to `bottom` in row 70."""
    across = (bottom - top) / N_CELLS
    # in this order of terms, rounding decides about cells on the line as in real maps
    return COLUMN > across * DEPTH + (bottom - across * N_CELLS)


def _slide(layer, n, dx, dz):
    """Move layers (70, 70) by dx columns and dz rows; borders are repeated, the first layer fills the top."""
    from_x, from_z = np.arange(N_CELLS) - dx, np.arange(N_CELLS) - dz
    moved = layer[np.clip(from_z, 0, N_CELLS - 1)][:, np.clip(from_x, 0, N_CELLS - 1)]
    moved[from_z < 0] = 0
    moved[from_z >= N_CELLS] = n - 1
    return moved


def _fault_lines(rng, side):
    """Draw faults through a side of the splice (mask): (column at the top, at the bottom), left to right."""
    lines = []
    for _ in range(rng.choice(FAULTS, p=FAULT_SHARES)):
        row = rng.choice(np.flatnonzero(side.any(1)))
        columns = np.flatnonzero(side[row])
        across = rng.triangular(*ACROSS)
        top = columns[0] + columns.size * rng.random() ** LEFTWARD - across * row / N_CELLS
        lines.append((top, top + across))
    return sorted(lines, key=sum)


def _model(rng, curved, n, side):
    """Draw a layered model with faults through its side of the splice (mask): layers of cells (70, 70)."""
    interfaces = np.cumsum(deal_thicknesses(rng, n, MIN_THICKNESS))[:-1]
    periods = int(rng.choice(PERIODS, p=PERIOD_SHARES)) if curved else 0
    result = _layers(interfaces, periods, rng.integers(*AMPLITUDE), 0, 0)
    sign = 1 if rng.random() < DOWN_SHARE else -1
    for top, bottom in _fault_lines(rng, side):
        dx, dz = rng.choice([-1, 1]) * rng.integers(*MOVE), sign * rng.integers(*MOVE)
        if rng.random() < SLIDE_SHARE:
            moved = _slide(result, n, dx, dz)
        else:
            moved = _layers(interfaces, periods, rng.integers(*AMPLITUDE), dx, dz)
        block = _right_of(top, bottom)
        block[-1] = False  # in real maps the lowest row is never faulted
        result = np.where(block, moved, result)
        sign = -sign  # in real maps neighbouring blocks move in opposite directions
    return result


def draw_fault_b(rng, curved, layers=None):
    """Draw a map of CurveFault_B if `curved`, else of FlatFault_B: (70, 70) float64, whole m/s.

    layers: number of layers of each of the two models; without it, one of LAYERS is drawn.
    """
    n = int(layers or rng.choice(LAYERS))
    start, end = rng.integers(*SPLICE, 2)
    across = int(np.sign(end - start)) * max(abs(int(end - start)), MIN_ACROSS)
    right = _right_of(start, start + across)
    maps = [rising_velocities(rng, n)[_model(rng, curved, n, side)] for side in (~right, right)]
    return np.where(right, *maps[::-1]).astype(np.float64)
