"""Which cells a pass through time must update: those that energy can reach and still return from."""

import functools
from dataclasses import replace

import numpy as np

from waves.passes import BLOCK


@functools.lru_cache(maxsize=512)
def windows_of(acq, nz, nx, source, v_max, margin):
    """First and last + 1 active column of every row, (blocks, nz, 2) int32, and their bounds, (blocks, 4).

    source: column of the map; nz, nx: size of the padded grid; v_max: m/s; margin: cells. A cell is active in
    a block of time steps if energy can reach it from the source by the block's last step and return to the
    receivers by the last sample, at v_max and around the periodic grid where that way is shorter.
    """
    to_source, to_receivers = _half_widths(replace(acq, sources=(0,)), nz, v_max, margin)
    columns, source = acq.receivers or (0, nx - 2 * acq.n_pad - 1), source + acq.n_pad
    first, last = min(columns) + acq.n_pad - to_receivers, max(columns) + acq.n_pad + to_receivers
    lo, hi = np.full_like(first, np.inf), np.full_like(first, -np.inf)
    for lap in (-nx, 0, nx):  # the source and its images beyond the periodic grid's edges
        left = np.maximum(source + lap - to_source, first)
        right = np.minimum(source + lap + to_source, last) + 1
        meet = left < right  # false for NaN
        np.minimum(lo, left, out=lo, where=meet)
        np.maximum(hi, right, out=hi, where=meet)
    wraps = (lo < 0) | (hi > nx)
    lo[wraps], hi[wraps] = 0, nx
    is_empty = lo >= hi
    lo[is_empty], hi[is_empty] = nx, 0
    lo, hi = np.floor(lo / 16) * 16, np.ceil(hi / 16) * 16  # whole vectors, into the spare columns
    bounds = [(~is_empty).argmax(1), lo.min(1), nz - (~is_empty[:, ::-1]).argmax(1), hi.max(1)]
    bounds = np.where(is_empty.all(1), 0, bounds).T.astype(np.int64)
    lo[is_empty] = 0
    return np.stack([lo, hi], -1).astype(np.int32), bounds


@functools.lru_cache(maxsize=16)
def _half_widths(acq, nz, v_max, margin):
    """Half the width of what the source can reach of each row, and of that from where receivers are reached.

    (blocks, nz) each, in cells; NaN where even the nearest cell of a row is too far.
    """
    cells = v_max * acq.dt_s / acq.dx_m  # per time step
    n, z = np.arange(0, acq.n_samples, BLOCK)[:, None], np.arange(nz)
    halves = []
    for row, reach in ((acq.source_row, n + BLOCK), (acq.receiver_row, acq.n_samples - n)):
        dz = abs(z - row - acq.n_pad)
        square = (cells * reach + margin) ** 2 - np.minimum(dz, nz - dz) ** 2
        halves.append(np.ceil(np.sqrt(np.where(square < 0, np.nan, square))))
    return halves
