"""Version A's fault, with soft edges and faint seams, as real FlatFault_A and CurveFault_A maps have it."""

import math

import numpy as np
import torch

from synthetic.layers import N_CELLS
from utils import V_MAX, V_MIN

N_FINE = 2 * N_CELLS  # faults of version A are made on half cells

THROW = (10, 20)  # half cells, whole ones: real throws are 5, 5.5, ... 10 cells

LEAN = math.radians(6)  # the shear of real faulted maps: depths shrink by cos 6°, verticals lean

OUTSIDE = -1500.0  # m/s, the value around real maps while they were made

FAULT_ENDS = (N_FINE // 4, 3 * N_FINE // 2)  # where on the border a fault may start and end, half cells

ROUNDING_ERROR = 5e-13  # m/s: below it ripples are not seen

FAINTEST = 2e-11  # m/s: fainter ripples may have been rounded differently by the original

RUN = 24  # half cells of a row for which rounding decides alike


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
    """a @ b of arrays, by torch: numpy's own threads would compete with torch's, which simulate."""
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def _cubic_shift(field, dz, dx, outside):
    """Move (140, 140) by dz whole rows and dx columns by a cubic spline; `outside` is the value outside."""
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
    """Median of 3 x 3 cells, edges repeated; computed from the columns' lowest, middle and highest values."""
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


def _slide(field, in_block, v_min, start, end, dz):
    """A fault's block, cut out of `in_block` and moved down by dz, in a field; all leaning: (140, 140).

    Cells into which the outside has moved are not yet restored.
    """
    _, across = fault_line(start, end)
    x, (bottom, left) = np.arange(N_FINE), border_point(end)
    z, first, last = x[:, None], border_point(start)[1], N_FINE - 1 - left
    # of half cells on the line itself rounding decides, in this order of terms, as in real maps; the row of
    # the fault's end is wholly in the block, as are those below, and that of its start is not at all
    line = across * z + (bottom - across * last)
    block = (N_FINE - x <= line) & (z > first) | (z >= last)
    # relative to the lowest velocity, the ripples in it are exact
    moved = _cubic_shift(np.where(block, in_block, OUTSIDE) - v_min, dz, -dz * across, OUTSIDE - v_min)
    return _lean(np.where(block, v_min + moved, field))


def slip_soft(field, v_min, start, end, dz, flipped=False, folded=None):
    """The fault itself: its block goes down by dz, whole half cells, along `fault_line(start, end)`.

    As real maps of version A were made, but for rounding. The block under the line slides along it, moved by
    a cubic spline together with the OUTSIDE value around it. All leans by six degrees. What is then below the
    lowest velocity stays as it was: ripples of the spline, some of 1e-12 m/s, so mix old and new in every
    other half column near the fault. Then the map is halved and takes a median of 3 x 3 cells. Where it is
    `flipped` (140, 140), rounding is to decide the other way. `folded`: two fields to take instead of `field`
    outside the block and in it; what stays as it was is still `field`.
    """
    outside_block, in_block = folded or (field, field)
    result = _slide(outside_block, in_block, v_min, start, end, dz)
    old = result < v_min - ROUNDING_ERROR
    old ^= flipped & (np.abs(result - v_min) < FAINTEST)
    result = np.where(old, field, result)
    return np.clip(_median(_product(_product(HALVING, result), HALVING.T)), V_MIN, V_MAX)


def undecided(field, v_min, start, end, dz):
    """Where rounding decides whether the old value stays, and this matters: masks (N, 140, 140).

    One mask for each half cell of a ripple, and one for each RUN half cells of a row without ripples.
    """
    result = _slide(field, field, v_min, start, end, dz)
    ripple, masks = np.abs(result - v_min), []
    for z, row in enumerate((ripple < FAINTEST) & (field > v_min)):
        runs = [[x] for x in np.flatnonzero(row & (ripple[z] > 0))]
        still = np.flatnonzero(row & (ripple[z] == 0))
        for run in runs + [still[k : k + RUN] for k in range(0, len(still), RUN)]:
            masks.append(np.zeros(field.shape, bool))
            masks[-1][z, run] = True
    return np.array(masks).reshape(-1, *field.shape)
