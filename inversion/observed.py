"""The observed gather as the searches see it: windows, norms, noise."""

import math
import time
from dataclasses import replace

import numpy as np
import torch

import waves
from synthetic.layers import N_CELLS

BATCH = 8  # maps simulated together

STRIDE = 4  # every 4th sample: 250 Hz hold a signal that ends near 45 Hz

SPAN = 8  # samples of which each is the mean where there is noise: most of that lies above the signal

SURE = 1.06  # how much more noise there may be than is measured

EXPLAINED = 0.06  # norm of residuals, beside the noise, at which a search has found its map

QUIET = 1.5  # samples a cell from a source on, before which nothing is heard: the fastest wave takes 2.2

NEAREST = 10  # cells: nearer receivers are not asked


class Observed:
    """One gather to fit: seis (S, T, R), and of which of OpenFWI's sources; counts what is simulated.

    `minutes` from now, or when a search's turn ends, `late` turns true: searches then end with what they
    have. `steps`: maps on the way, (what it is, (70, 70) m/s) each.
    """

    def __init__(self, seis, sources=waves.SOURCES, minutes=math.inf):
        self.seis, self.sources = seis.float(), tuple(sources)
        self.simulations, self.steps = 0.0, []  # simulations of 5 shots and 1000 samples
        self.deadline = self.turn_ends = time.monotonic() + 60 * minutes
        self.noise = self._noise(self.seis, 1)
        self.thinned_noise = self._noise(self._thinned(self.seis), STRIDE, SPAN - 1) if self.noise else 0.0

    @property
    def left(self):
        """Minutes."""
        return (self.deadline - time.monotonic()) / 60

    @property
    def late(self):
        return time.monotonic() > self.turn_ends

    def turn(self, share):
        """Begin a search's turn: it may use a share of the minutes left, or all should it `stay`."""
        self.turn_ends = time.monotonic() + 60 * share * self.left

    def stay(self, norm):
        """Let a search have all the minutes left if residuals of such a norm explain the gather."""
        if norm < self.enough(1000, EXPLAINED):
            self.turn_ends = self.deadline

    def note(self, n_samples, vel):
        """Keep a map (70, 70) that fits the first `n_samples`."""
        self.steps.append((f"{n_samples} samples", np.asarray(vel, np.float32)))

    def _noise(self, seis, stride, span=0):
        """Standard deviation of the noise: what receivers record before any wave can have come.

        seis (S, T, R): value k is of samples stride · k to stride · k + span.
        """
        cells = torch.arange(seis.shape[2], device=seis.device)
        far = (cells - torch.tensor(self.sources, device=seis.device)[:, None, None]).abs()
        last = stride * torch.arange(seis.shape[1], device=seis.device)[:, None] + span
        quiet = seis[(last < QUIET * far) & (far > NEAREST)]
        noise, signal = (float(x.square().mean().sqrt()) if x.numel() else 0.0 for x in (quiet, seis))
        return noise if noise > 1e-6 * signal else 0.0  # fainter: the scheme's own

    def simulate(self, maps, n_samples):
        """Maps (N, 70, 70), arrays -> gathers (N, S, n_samples, R)."""
        maps = torch.as_tensor(np.asarray(maps), dtype=torch.float32, device=self.seis.device)
        self.simulations += len(maps) * (n_samples / 1000) ** 2 * len(self.sources) / 5
        with torch.no_grad():
            return torch.cat([waves.simulate(m, self.sources, n_samples) for m in maps.split(BATCH)])

    def _thinned(self, seis):
        """Gathers (..., T, R), of every STRIDE samples one: where there is noise, means of SPAN."""
        if not self.noise:
            return seis[..., ::STRIDE, :]
        return torch.nn.functional.avg_pool2d(seis, (SPAN, 1), (STRIDE, 1))

    def _weighted(self, seis):
        """Gathers (N, S, T, R) thinned, their weight growing with time: (N, S, T', R)."""
        return self._weigh(self._thinned(seis), seis.shape[2])

    def _weigh(self, thinned, n_samples):
        time = STRIDE * torch.arange(thinned.shape[2], device=thinned.device)
        return thinned * ((time + 50) / n_samples)[:, None]

    def residuals(self, maps, n_samples):
        """Residuals of maps within the first samples, growing weight with time, relative: (N, D).

        Late echoes are faint and tell of the deep; index 999 does not follow the scheme and is left out.
        """
        n = min(n_samples, 999)
        observed = self.seis[None, :, :n]
        rest = self._weighted(self.simulate(maps, n_samples)[:, :, :n] - observed)
        return rest.flatten(1) / self._weighted(observed).norm().clamp(min=1e-30)

    def linear(self, base, maps):
        """How residuals of the whole record change from a map (70, 70) to others (N, 70, 70): (N, D).

        Others of few cells, inside as `waves.jacobian` has it. Linear in their 1/v²: a cell that changes from
        1700 to 1800 m/s is 2 % off, as is one from 3000 to 3400; one from 1700 to 2400 is 12 % off.
        """
        observed, geometry = self.seis[None, :, :999], replace(waves.OPENFWI, sources=self.sources)
        change = maps**-2.0 - base**-2.0
        cells = np.nonzero(change.any(0))
        vel = torch.as_tensor(base, dtype=torch.float32, device=self.seis.device)
        self.simulations += (len(self.sources) + N_CELLS) / 5
        made = waves.jacobian(vel, *cells, STRIDE, SPAN if self.noise else 1, geometry)
        norm = self._weighted(observed)
        made = self._weigh(made[:, :, : norm.shape[2]], observed.shape[2]).flatten(1)
        change = torch.as_tensor(change[(slice(None), *cells)], dtype=torch.float32, device=made.device)
        return change @ made / norm.norm().clamp(min=1e-30)

    def floor(self, n_samples):
        """The norm that `residuals` of the true map would have for the noise alone."""
        observed = self.seis[None, :, : min(n_samples, 999)]
        level = self._weighted(torch.ones_like(observed)) * self.thinned_noise
        return float(level.norm() / self._weighted(observed).norm().clamp(min=1e-30))

    def enough(self, n_samples, rest=0.0):
        """The norm of residuals that are noise but for `rest`."""
        return math.hypot(rest, SURE * self.floor(n_samples))

    @property
    def least_share(self):
        """Of a norm: a step that leaves more gains nothing. Amid noise less is gained, yet no chance."""
        return 0.9999 if self.noise else 0.999
