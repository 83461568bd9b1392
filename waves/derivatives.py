"""Derivatives of a map's gathers towards single cells, by reciprocity.

A cell scatters what the wave equation's right side is there, convolved with the field that an impulse at a
receiver would cause there (Pratt, Shin and Hicks, 1998). That takes one simulation for each source and
receiver, however many cells there are.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from waves.acquisition import OPENFWI, ricker
from waves.engine import Job
from waves.equation import check_maps, simulate

N_RECEIVERS = 14  # simulated at a time by `map_jacobian`, to bound its memory
STEP_M_S = 4.0  # of differences, where there are no derivatives by reciprocity


class _Fields:
    """Spectra of what cells scatter and of what the receivers see of them, for every n-th time sample."""

    def __init__(self, vel, v_min, rows, columns, every, span, acquisition):
        """vel: (Z, X) m/s; v_min: (1,); rows, columns: (C,), counted from the map's corner."""
        acq, most = acquisition, int(1 / (8 * acquisition.peak_hz * acquisition.dt_s))
        if not 1 <= every <= most:
            raise ValueError(f"every: got {every}, expected 1 to {most}")
        v_max = check_maps(vel[None], None, acq)
        receivers = acq.receivers or tuple(range(vel.shape[1]))
        # Every n-th sample is too coarse for the response to an impulse, but not for that to a Gaussian. A
        # Ricker wavelet is that Gaussian convolved with a Ricker wavelet of a slightly higher peak frequency.
        width, later = 0.75 * every, 4 * every  # samples: of the Gaussian; by which everything arrives later
        peak_hz = (acq.peak_hz**-2 - 2 * (math.pi * width * acq.dt_s) ** 2) ** -0.5
        n_samples = acq.n_samples + later + span
        forward = replace(acq, peak_hz=peak_hz, n_samples=n_samples)
        backward = replace(forward, sources=receivers, source_row=acq.receiver_row, receivers=None)
        delay, less = (int(ricker(20 * most, acquisition=a).argmax()) for a in (acq, forward))
        centre = later + delay - less
        pulse = torch.exp(-0.5 * ((torch.arange(n_samples) - centre) / width) ** 2).to(vel)
        wavelet = ricker(n_samples, vel.dtype, forward).to(vel)
        wavelet *= (peak_hz / acq.peak_hz) ** 3 / (width * math.sqrt(2 * math.pi))
        v_source, v_receiver = (vel[a.source_row, list(a.sources)] for a in (forward, backward))
        padded = F.pad(vel[None, None], (acq.n_pad,) * 4, mode="replicate")[0]
        alpha = (padded * acq.dt_s / acq.dx_m) ** 2
        cells = rows + acq.n_pad, columns + acq.n_pad
        drive = (v_source * acq.dt_s)[:, None] ** 2 * wavelet
        kappa = _sponge(rows, columns, vel.shape, acq).to(vel) * v_min * acq.dt_s

        def scattered_by(source):
            alone = replace(forward, sources=acq.sources[source : source + 1])
            job = Job(alpha, v_min, drive[None, source : source + 1], alone, v_max)
            change = F.pad(job.record_at_cells(*cells), (0, 0, 2, 0)).diff(dim=1)
            return (change[:, 1:] - (1 - kappa) * change[:, :-1])[:, ::every]

        scattered = torch.cat([scattered_by(source) for source in range(len(acq.sources))])
        self.size, self.scale = 2 * scattered.shape[1], v_receiver[:, None] ** 2
        self.scattered = self._spectra(scattered)
        radians = torch.arange(self.size // 2 + 1, dtype=torch.float64)[:, None] * 2 * math.pi
        radians = radians / (self.size * every) * torch.arange(span)
        self.means = -every * torch.polar(torch.ones_like(radians), radians).mean(1)
        self.kept = slice(later // every, later // every - (-acq.n_samples // every))
        self.job, self.pulse, self.cells, self.every = (alpha, v_min, v_max, backward), pulse, cells, every

    def _spectra(self, fields):
        """Fields (N, T', C) -> their spectra (C, N, F)."""
        return torch.fft.rfft(fields, self.size, dim=1).permute(2, 0, 1).contiguous()

    def receive(self, which):
        """Simulate impulses at some receivers, a slice, to which `traces` then refers."""
        alpha, v_min, v_max, acquisition = self.job
        acquisition = replace(acquisition, sources=acquisition.sources[which])
        pulses = self.pulse.expand(1, len(acquisition.sources), -1)
        received = Job(alpha, v_min, pulses, acquisition, v_max).record_at_cells(*self.cells, self.every)
        self.received = self._spectra(received)
        self.received *= self.means.to(self.received)
        self.received_scale = self.scale[which]

    def traces(self, cells):
        """The sum of what several cells, a slice, change at the receivers of `receive`: (S, R, T')."""
        scattered, received = self.scattered[cells], self.received[cells]
        if len(scattered) == 1:
            spectrum = scattered[0][:, None] * received[0]
        else:  # a product of matrices for each frequency
            spectrum = (scattered.permute(2, 1, 0) @ received.permute(2, 0, 1)).permute(1, 2, 0)
        return torch.fft.irfft(spectrum, self.size)[..., self.kept] * self.received_scale


def _sponge(rows, columns, shape, acquisition):
    """The sponge's damping / v_min at cells, rows and columns counted from the map's corner: (C,) in 1/m."""
    outside = [np.maximum(-1 - at, at - n) for at, n in zip((rows, columns), shape, strict=True)]
    depth = np.where(outside[1] >= 0, outside[1], np.maximum(outside[0], 0))  # 0 at the border
    return acquisition.damping_per_velocity()[depth]


def jacobian(vel, rows, columns, every=4, span=1, acquisition=OPENFWI):
    """Derivatives of a map's gathers with respect to 1/v² of single cells: (P, S, T', R), in (m/s)².

    vel: (Z, X) m/s. rows, columns: (P,) whole numbers, the cells; they lie below the sources' row and not on
    the map's rim, which the sponge repeats. T' are samples 0, every, 2 every, ..., which hold frequencies up
    to 1 / (2 every dt), or the means of `span` samples from each of these on.

    Raises ValueError for other cells, for `every` beyond what the wavelet allows, and as `simulate` does.
    """
    acq = acquisition
    for name, some, first, last in (
        ("rows", rows, max(acq.source_row, acq.receiver_row) + 1, vel.shape[0] - 2),
        ("columns", columns, 1, vel.shape[1] - 2),
    ):
        if not len(some) or some.min() < first or some.max() > last:
            raise ValueError(f"{name}: got {some}, expected cells from {first} to {last}")
    fields = _Fields(vel, vel.min()[None], rows, columns, every, span, acq)
    fields.receive(slice(None))
    n_receivers = len(fields.scale)
    made = vel.new_empty(len(rows), len(acq.sources), -(-acq.n_samples // every), n_receivers)
    for cell in range(len(rows)):
        made[cell] = fields.traces(slice(cell, cell + 1)).transpose(1, 2)
    return made


def _with_sponge(n_rows, n_columns, n):
    """The map's cells and the sponge's, n on each side: rows, columns, the cell of the map that each repeats.

    They are sorted by the last, row * n_columns + column. The sponge's corners are left out.
    """
    rows, columns = np.mgrid[-n : n_rows + n, -n : n_columns + n].reshape(2, -1)
    is_kept = (rows >= 0) & (rows < n_rows) | (columns >= 0) & (columns < n_columns)
    rows, columns = rows[is_kept], columns[is_kept]
    repeated = rows.clip(0, n_rows - 1) * n_columns + columns.clip(0, n_columns - 1)
    order = np.argsort(repeated, kind="stable")
    return rows[order], columns[order], repeated[order]


@torch.no_grad()
def map_jacobian(vel, v_min, weights, every=8, acquisition=OPENFWI):
    """Derivatives of a map's gathers with respect to 1/v² of all its cells: (Z * X + 1, S, K, R), in (m/s)².

    vel: (Z, X) m/s; v_min: (1,) m/s, the velocity that sets the sponge's strength, whose derivative comes
    last, in 1 per m/s. weights: (K, T') combine the means of `every` samples from 0, every, 2 every, ... on.

    The map's rim scatters where the sponge repeats it too. Raises ValueError as `jacobian` does.
    """
    acq = acquisition
    rows, columns, repeated = _with_sponge(*vel.shape, acq.n_pad)
    fields = _Fields(vel, v_min, rows, columns, every, every, acq)
    first = np.searchsorted(repeated, np.arange(vel.numel() + 1)).tolist()
    made = vel.new_empty(vel.numel() + 1, len(acq.sources), len(weights), len(fields.scale))
    for k in range(0, made.shape[3], N_RECEIVERS):
        which = slice(k, k + N_RECEIVERS)
        fields.receive(which)
        for cell in range(vel.numel()):
            traces = fields.traces(slice(*first[cell : cell + 2]))
            made[cell, ..., which] = (traces @ weights.T).transpose(1, 2)
    # by differences: the corners, which the sponge's corners repeat, and v_min
    corners = [0, vel.shape[1] - 1, vel.numel() - vel.shape[1], vel.numel() - 1]
    trials = vel.repeat(6, 1, 1)
    for k, cell in enumerate(corners):
        trials[k].view(-1)[cell] += STEP_M_S
    at = v_min.repeat(6)
    at[4] += STEP_M_S
    seis = simulate(trials, acquisition=acq, v_min=at)
    changed = weights @ means_of(seis[:5] - seis[5], every) / STEP_M_S
    to_squares = -(vel.view(-1)[corners] ** 3) / 2  # dv / d(1/v²)
    made[corners] = changed[:4] * to_squares.view(-1, 1, 1, 1)
    made[-1] = changed[4]
    return made


def means_of(seis, every):
    """The means of every `every` samples, zeros filling up the last ones: (..., T, R) -> (..., T', R)."""
    padded = F.pad(seis, (0, 0, 0, -seis.shape[-2] % every))
    return padded.unflatten(-2, (-1, every)).mean(-2)
