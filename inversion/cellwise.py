"""Waveform inversion cell by cell: misfit + prior, by L-BFGS on the exact adjoint, many samples at once."""

import math
import time
from dataclasses import dataclass, field

import torch

import waves
from utils import V_MAX, V_MIN

WINDOWS = {300: 0.1, 500: 0.2, 750: 0.4, 1000: 1.0}  # samples: share of the time by which they end
HISTORY = 8  # pairs that L-BFGS keeps
ROW = waves.OPENFWI.source_row
MARGIN = 1e-3  # share of the velocity range that the bounded unknown keeps from its ends


def total_variation(vel, p=1.0, scale_m_s=20.0):
    """Mean (|difference of neighbours|² + s²)^(p/2) / s^p: (B, 1, Z, X) m/s -> (B,); p < 1 for sharper edges.

    Source: Rudin, Osher & Fatemi (1992); p < 1 as Chartrand (2007).
    """
    terms = [((vel.diff(dim=d) / scale_m_s).square() + 1).pow(p / 2).mean((1, 2, 3)) for d in (2, 3)]
    return terms[0] + terms[1] - 2


class Cells:
    """The unknowns of layered maps: each cell for itself, bounded, scaled 1 + z/5 so that the deep moves too.

    prior: f(maps (B, 1, Z, X) m/s) -> (B,), by default a total variation that favours few sharp edges.
    """

    def __init__(self, start, weight=3e-5, prior=lambda vel: total_variation(vel, 0.8)):
        depth = 1 + torch.arange(start.shape[2], device=start.device, dtype=start.dtype) / 5
        self.depth, self.weight, self.prior = depth[:, None], weight, prior
        share = ((start - V_MIN) / (V_MAX - V_MIN)).clamp(MARGIN, 1 - MARGIN)
        self.start = share.logit() / self.depth

    def maps(self, unknown):
        return V_MIN + (V_MAX - V_MIN) * torch.sigmoid(unknown * self.depth)

    def penalty(self, unknown):
        return self.weight * self.prior(self.maps(unknown))


class Modes:
    """The unknowns of smooth maps: modes of a Gaussian process (squared exponential) around a depth trend.

    Each mode is divided by its own deviation, so that the prior is their mean square and the smooth, which
    waves see first, moves first. deviation and nugget (white noise) in m/s, length in cells; as measured on
    Style_B, Style_A: 183, 3.5, 20. surface: the velocities at the sources (B, S) m/s, which all maps then
    have (conditioning by kriging: Matheron, 1973), or None.
    """

    def __init__(self, start, surface=None, deviation=158.0, length=1.96, nugget=58.0, weight=1e-5):
        n, like = start.shape[-1], {"dtype": start.dtype, "device": start.device}
        x = torch.arange(n, dtype=torch.float64)
        covariance = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
        values, vectors = torch.linalg.eigh(covariance)
        power = deviation**2 * values.clamp(min=0)[:, None] * values.clamp(min=0) + nugget**2
        self.vectors, self.deviations, self.weight = vectors.to(**like), power.sqrt().to(**like), weight
        rows = start.mean(3, keepdim=True)  # the trend: a line through the mean of each row
        z = torch.linspace(-1, 1, n, **like)[:, None]
        self.mean = rows.mean(2, keepdim=True) + z * (rows * z).sum(2, keepdim=True) / z.square().sum()
        self.start = self.vectors.T @ (start - self.mean) @ self.vectors / self.deviations
        self.surface = surface if surface is None else torch.as_tensor(surface).to(**like)
        cells = torch.tensor(waves.SOURCES)
        at_cells = deviation**2 * covariance[ROW][:, None, None] * covariance[:, cells]  # (Z, X, S)
        at_cells[ROW, cells, torch.arange(len(cells))] += nugget**2
        self.gain = (at_cells @ at_cells[ROW, cells].inverse()).to(**like)

    def maps(self, unknown):
        return self.free(unknown).clamp(V_MIN, V_MAX)

    def free(self, unknown):
        """As `maps`, not yet within OpenFWI's range."""
        vel = self.mean + self.vectors @ (self.deviations * unknown) @ self.vectors.T
        if self.surface is None:
            return vel
        lack = self.surface - vel[:, 0, ROW, list(waves.SOURCES)]
        return vel + torch.einsum("zxs,bs->bzx", self.gain, lack)[:, None]

    def penalty(self, unknown):
        vel = self.free(unknown)
        outside = ((vel - vel.clamp(V_MIN, V_MAX)) / 100).square().mean((1, 2, 3))
        return self.weight * unknown.square().mean((1, 2, 3)) + 1e-3 * outside


@dataclass
class _Memory:
    """Steps and changes of gradient of each sample: lists of (B, P), oldest first."""

    steps: list = field(default_factory=list)
    changes: list = field(default_factory=list)

    def add(self, step, change):
        self.steps, self.changes = [*self.steps, step][-HISTORY:], [*self.changes, change][-HISTORY:]

    def direction(self, gradient):
        """-H gradient, (B, P), by the two-loop recursion (Nocedal, 1980), each sample for itself."""
        q, alphas = gradient.clone(), []
        for s, y in zip(reversed(self.steps), reversed(self.changes), strict=True):
            curvature = (s * y).sum(1)
            use = curvature > 1e-12 * y.norm(dim=1) * s.norm(dim=1)
            rho = torch.where(use, 1 / curvature.where(use, torch.ones_like(curvature)), 0)
            alpha = rho * (s * q).sum(1)
            q = q - alpha[:, None] * y
            alphas.append((rho, alpha))
        if self.steps:
            s, y = self.steps[-1], self.changes[-1]
            ratio = (s * y).sum(1) / y.square().sum(1).clamp(min=1e-30)
            q = q * ratio.clamp(min=1e-6)[:, None]
        for (rho, alpha), s, y in zip(reversed(alphas), self.steps, self.changes, strict=True):
            q = q + s * (alpha - rho * (y * q).sum(1))[:, None]
        return -q


def descend(seis, cells, n_iterations=60, noise=None, minutes=math.inf, note=lambda n_samples, vel: None):
    """Fit maps to gathers: seis (B, S, T, R), unknowns `Cells` or `Modes` -> (vel, relative misfits (n, B)).

    Minimises ‖t/T · residual‖² / ‖t/T · observed‖² + penalty, from the top down in windows that grow. Each
    map's minimum velocity, which sets the sponge, is an unknown of its own. Each sample has its own step
    length; one whose misfit falls to what noise of its standard deviation `noise` (B,) leaves, stops
    (discrepancy principle, Morozov, 1966). Each window takes an equal part of the iterations, or ends at its
    part of the minutes; `note` is then called with its samples and the maps.
    """
    vel, shape = cells.maps(cells.start), cells.start.shape
    n_batch = len(vel)
    span, noise = V_MAX - V_MIN, torch.zeros(n_batch, device=vel.device) if noise is None else noise
    v_min = vel.amin((1, 2, 3)).clamp(V_MIN, V_MAX)
    unknown = torch.cat([cells.start.flatten(1), (v_min[:, None] - V_MIN) / span], 1).detach()
    began = time.monotonic()

    def field(u):
        return u[:, :-1].view(shape)

    def weighted(n_samples):
        """Weights that grow with time (T, 1), the gathers times them, these gathers' energies (B,)."""
        n = min(n_samples, seis.shape[2] - 1)  # index 999 of the real data does not follow the scheme
        gain = (torch.arange(n, device=seis.device, dtype=seis.dtype) / n)[:, None]
        observed = seis[:, :, :n] * gain
        return gain, observed, observed.flatten(1).square().sum(1).clamp(min=1e-30)

    def evaluate(u, n_samples, some):
        """Objective and misfit (b,) of some samples, and gradient (b, P)."""
        gain, observed, energy = weighted(n_samples)
        u = u.detach().requires_grad_()
        made = waves.simulate(
            cells.maps(field(u))[some],
            n_samples=n_samples,
            v_min=(V_MIN + span * u[some, -1]).clamp(V_MIN, V_MAX),
        )
        residual = made[:, :, : len(gain)] * gain - observed[some]
        fit = residual.flatten(1).square().sum(1) / energy[some]
        value = fit + cells.penalty(field(u))[some]
        (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), fit.detach().sqrt(), gradient[some]

    trace = []
    for n_samples, part in WINDOWS.items():
        gain, _, energy = weighted(n_samples)
        floor = 1.02 * noise * (gain.square().sum() * seis[0, :, 0].numel() / energy).sqrt()
        memory = _Memory()
        value, fit, gradient = evaluate(unknown, n_samples, slice(None))
        done = torch.zeros(n_batch, dtype=torch.bool, device=vel.device)
        for _ in range(math.ceil(n_iterations / len(WINDOWS))):
            done |= fit < floor
            if done.all() or time.monotonic() - began > 60 * part * minutes:
                break
            direction = memory.direction(gradient)
            if not memory.steps:  # the first step is small: no cell moves by more than about 40 m/s
                direction = direction * (0.05 / direction.abs().amax(1).clamp(min=1e-30))[:, None]
            length, slope = torch.ones_like(value), (direction * gradient).sum(1)
            step, change = torch.zeros_like(unknown), torch.zeros_like(unknown)
            some = (~done).nonzero()[:, 0]
            for _ in range(6):  # backtracking, each sample for itself (Armijo, 1966)
                trial = unknown + length[:, None] * direction
                found = evaluate(trial, n_samples, some)
                good = found[0] <= value[some] + 1e-4 * length[some] * slope[some]
                taken, some = some[good], some[~good]
                step[taken], change[taken] = trial[taken] - unknown[taken], found[2][good] - gradient[taken]
                unknown[taken] = trial[taken]
                value[taken], fit[taken], gradient[taken] = (part[good] for part in found)
                if not len(some):
                    break
                length[some] /= 3
            done[some] = True
            memory.add(step, change)
            trace.append(fit.clone())
        note(n_samples, cells.maps(field(unknown)).detach())
    return cells.maps(field(unknown)).detach(), torch.stack(trace) if trace else fit[None]
