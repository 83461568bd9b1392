"""The observed gather, as the searches compare maps with it: time windows, residuals, noise."""

import math
import time
from dataclasses import replace

import numpy as np
import torch

import waves
from synthetic.layers import N_CELLS
from waves.derivatives import means_of

BATCH = 8  # maps simulated together

STRIDE = 4  # every 4th sample is compared: 250 Hz are enough for a signal that ends near 45 Hz

SPAN = (
    8  # with noise, the mean of so many samples is compared: most of the noise lies above the signal's band
)

NOISE_SAFETY = 1.06  # the noise may be stronger than measured by this factor

EXPLAINED_NORM = 0.06  # a search has found its map when this residual norm beyond the noise, is left

QUIET_SAMPLES_PER_CELL = 1.5  # of offset, before the first arrival: the fastest wave takes 2.2 samples a cell

MIN_OFFSET_CELLS = 10  # receivers nearer to the source are not used to measure the noise


class Observed:
    """One gather to be explained, and the time there is for it.

    seis: (S, T, R); sources: the cells of the S shots, of OpenFWI's five. After `minutes`, or when a search's
    turn ends, `out_of_time` becomes true, and the search ends with the best map it has. `simulations` counts
    what was simulated, in maps of 5 shots and 1000 samples; `steps` holds the maps on the way,
    (what it is, (70, 70) m/s) each.
    """

    def __init__(self, seis, sources=waves.SOURCES, minutes=math.inf):
        self.seis, self.sources = seis.float(), tuple(sources)
        self.simulations, self.steps = 0.0, []
        self.deadline = self.turn_ends = time.monotonic() + 60 * minutes
        self.noise = self._measure_noise(self.seis, 1)
        self.thinned_noise = 0.0
        if self.noise:
            self.thinned_noise = self._measure_noise(self._thinned(self.seis), STRIDE, SPAN - 1)

    @property
    def minutes_left(self):
        """Minutes until the deadline of the whole inversion."""
        return (self.deadline - time.monotonic()) / 60

    @property
    def out_of_time(self):
        """Whether the search that has its turn must end."""
        return time.monotonic() > self.turn_ends

    def start_turn(self, share):
        """Give the next search a share of the minutes left; `extend_turn` may give it all of them."""
        self.turn_ends = time.monotonic() + 60 * share * self.minutes_left

    def extend_turn(self, norm):
        """Give the search all the minutes left if a residual norm this small explains the gather."""
        if norm < self.noise_threshold(1000, EXPLAINED_NORM):
            self.turn_ends = self.deadline

    def note(self, n_samples, vel):
        """Note the map (70, 70) that fits the first `n_samples` best, for pictures of the course."""
        self.steps.append((f"{n_samples} samples", np.asarray(vel, np.float32)))

    def note_step(self, number, vel):
        """Note the map (70, 70) after a step cell by cell, for the same."""
        self.steps.append((f"step {number}", vel.cpu().numpy()))

    def noise_of_means(self, n):
        """The standard deviation of the noise in the means of every n samples."""
        if not self.noise:
            return 0.0
        return self._measure_noise(means_of(self.seis, n), n, n - 1)

    def _measure_noise(self, seis, stride, span=0):
        """Standard deviation of the noise, measured before the first arrival.

        seis: (S, T, R), whose value k is taken from samples stride * k to stride * k + span.
        """
        cells = torch.arange(seis.shape[2], device=seis.device)
        offset = (cells - torch.tensor(self.sources, device=seis.device)[:, None, None]).abs()
        last = stride * torch.arange(seis.shape[1], device=seis.device)[:, None] + span
        quiet = seis[(last < QUIET_SAMPLES_PER_CELL * offset) & (offset > MIN_OFFSET_CELLS)]
        noise, signal = (float(x.square().mean().sqrt()) if x.numel() else 0.0 for x in (quiet, seis))
        return noise if noise > 1e-6 * signal else 0.0  # anything fainter is the scheme's own rounding

    def simulate(self, maps, n_samples):
        """Simulate maps, arrays (N, 70, 70) m/s -> gathers (N, S, n_samples, R)."""
        maps = torch.as_tensor(np.asarray(maps), dtype=torch.float32, device=self.seis.device)
        self.simulations += len(maps) * (n_samples / 1000) ** 2 * len(self.sources) / 5
        with torch.no_grad():
            return torch.cat([waves.simulate(m, self.sources, n_samples) for m in maps.split(BATCH)])

    def _thinned(self, seis):
        """Every STRIDE-th sample of gathers (..., T, R), or with noise the mean of SPAN from there on."""
        if not self.noise:
            return seis[..., ::STRIDE, :]
        return torch.nn.functional.avg_pool2d(seis, (SPAN, 1), (STRIDE, 1))

    def _weighted(self, seis):
        """Gathers (N, S, T, R), thinned, with weights that grow with time: (N, S, T', R)."""
        return self._weigh(self._thinned(seis), seis.shape[2])

    def _weigh(self, thinned, n_samples):
        time = STRIDE * torch.arange(thinned.shape[2], device=thinned.device)
        return thinned * ((time + 50) / n_samples)[:, None]

    def residuals(self, maps, n_samples):
        """Residuals of maps (N, 70, 70) m/s within the first samples: (N, D).

        They are relative to the observed gather, and their weight grows with time, since late echoes are
        faint but carry what is known of the deep layers. Sample 999, which in OpenFWI's data does not follow
        the scheme, is left out.
        """
        n = min(n_samples, 999)
        observed = self.seis[None, :, :n]
        rest = self._weighted(self.simulate(maps, n_samples)[:, :, :n] - observed)
        return rest.flatten(1) / self._weighted(observed).norm().clamp(min=1e-30)

    def linearised_change(self, base, maps):
        """How residuals of the whole record change from one map (70, 70) to others (N, 70, 70): (N, D).

        The others differ from it in few cells, where `waves.jacobian` allows it. The change is linear in
        1/v²: for a cell that goes from 1700 to 1800 m/s, or from 3000 to 3400, it is 2 % off; from 1700 to
        2400 m/s, 12 %.
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

    def noise_norm(self, n_samples):
        """The residual norm that the noise alone leaves to the true map."""
        observed = self.seis[None, :, : min(n_samples, 999)]
        level = self._weighted(torch.ones_like(observed)) * self.thinned_noise
        return float(level.norm() / self._weighted(observed).norm().clamp(min=1e-30))

    def noise_threshold(self, n_samples, rest=0.0):
        """The residual norm of a map that explains all but the noise and a norm of `rest`."""
        return math.hypot(rest, NOISE_SAFETY * self.noise_norm(n_samples))

    @property
    def min_relative_gain(self):
        """Smallest decrease of a residual norm, relative to it, that counts as progress.

        With noise, smaller improvements still count.
        """
        return 1e-4 if self.noise else 1e-3

    def improves(self, norm, best):
        """Whether a residual norm is below the best so far by `min_relative_gain` or more."""
        return norm < (1 - self.min_relative_gain) * best
