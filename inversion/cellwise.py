"""Waveform inversion cell by cell: misfit plus prior, minimised by L-BFGS for many samples at once."""

import math
import time
from dataclasses import dataclass, field

import torch

import waves
from utils import V_MAX, V_MIN

WINDOWS = {300: 0.1, 500: 0.2, 750: 0.4, 1000: 1.0}  # time samples: share of the minutes when they end
HISTORY = 8  # pairs that L-BFGS keeps
SOURCE_ROW = waves.OPENFWI.source_row
MARGIN = 1e-3  # share of the velocity range kept free at both ends, where the sigmoid is flat


def total_variation(vel, p=1.0, scale_m_s=20.0):
    """Mean of ((difference / s)² + 1)^(p/2) - 1 over neighbours, s = scale_m_s: (B, 1, Z, X) m/s -> (B,).

    The means over vertical and horizontal neighbours are added. p < 1 favours sharp edges. Source: Rudin,
    Osher & Fatemi (1992); p < 1 as in Chartrand (2007).
    """
    terms = [((vel.diff(dim=d) / scale_m_s).square() + 1).pow(p / 2).mean((1, 2, 3)) for d in (2, 3)]
    return terms[0] + terms[1] - 2


class Cells:
    """The unknowns of layered maps: one for each cell, bounded by OpenFWI's range of velocities.

    They are scaled by 1 + z/5 so that deep cells, whose gradient is small, move too. start: (B, 1, Z, X) m/s;
    prior: f(maps (B, 1, Z, X) m/s) -> (B,), by default a total variation that favours few sharp edges.
    """

    def __init__(self, start, weight=3e-5, prior=lambda vel: total_variation(vel, 0.8)):
        depth = 1 + torch.arange(start.shape[2], device=start.device, dtype=start.dtype) / 5
        self.depth, self.weight, self.prior = depth[:, None], weight, prior
        share = ((start - V_MIN) / (V_MAX - V_MIN)).clamp(MARGIN, 1 - MARGIN)
        self.start = share.logit() / self.depth

    def maps(self, unknown):
        """Unknowns, shaped as the maps -> maps (B, 1, Z, X) m/s."""
        return V_MIN + (V_MAX - V_MIN) * torch.sigmoid(unknown * self.depth)

    def penalty(self, unknown):
        """Unknowns -> weighted prior (B,)."""
        return self.weight * self.prior(self.maps(unknown))


class Modes:
    """The unknowns of smooth maps: modes of a Gaussian process around a linear trend with depth.

    The covariance is a squared exponential plus white noise. Each mode is divided by its standard deviation,
    so that the prior is the mean square of the unknowns, and smooth modes, which waves see first, move first.
    start: (B, 1, Z, X) m/s; deviation and nugget (of the white noise) in m/s, length in cells, by default as
    measured on Style_B; Style_A has 183, 20 and 3.5. surface: the velocities at the sources (B, S) m/s, which
    all maps then have there, or None. Source: kriging (Matheron, 1973).
    """

    def __init__(self, start, surface=None, deviation=158.0, length=1.96, nugget=58.0, weight=1e-5):
        n, like = start.shape[-1], {"dtype": start.dtype, "device": start.device}
        x = torch.arange(n, dtype=torch.float64)
        covariance = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
        values, vectors = torch.linalg.eigh(covariance)
        power = deviation**2 * values.clamp(min=0)[:, None] * values.clamp(min=0) + nugget**2
        self.vectors, self.deviations, self.weight = vectors.to(**like), power.sqrt().to(**like), weight
        rows = start.mean(3, keepdim=True)  # the trend is the line that fits the means of the rows best
        z = torch.linspace(-1, 1, n, **like)[:, None]
        self.mean = rows.mean(2, keepdim=True) + z * (rows * z).sum(2, keepdim=True) / z.square().sum()
        self.start = self.vectors.T @ (start - self.mean) @ self.vectors / self.deviations
        self.surface = surface if surface is None else torch.as_tensor(surface).to(**like)
        cells = torch.tensor(waves.SOURCES)
        at_cells = deviation**2 * covariance[SOURCE_ROW][:, None, None] * covariance[:, cells]  # (Z, X, S)
        at_cells[SOURCE_ROW, cells, torch.arange(len(cells))] += nugget**2
        self.gain = (at_cells @ at_cells[SOURCE_ROW, cells].inverse()).to(**like)

    def maps(self, unknown):
        """Unknowns, shaped as the maps -> maps (B, 1, Z, X) m/s within OpenFWI's range."""
        return self.unclamped(unknown).clamp(V_MIN, V_MAX)

    def unclamped(self, unknown):
        """As `maps`, but velocities may leave OpenFWI's range."""
        vel = self.mean + self.vectors @ (self.deviations * unknown) @ self.vectors.T
        if self.surface is None:
            return vel
        missing = self.surface - vel[:, 0, SOURCE_ROW, list(waves.SOURCES)]
        return vel + torch.einsum("zxs,bs->bzx", self.gain, missing)[:, None]

    def penalty(self, unknown):
        """Unknowns -> weighted prior (B,), with a term for velocities outside OpenFWI's range."""
        vel = self.unclamped(unknown)
        outside = ((vel - vel.clamp(V_MIN, V_MAX)) / 100).square().mean((1, 2, 3))
        return self.weight * unknown.square().mean((1, 2, 3)) + 1e-3 * outside


@dataclass
class _Memory:
    """L-BFGS's memory: the last steps and changes of the gradient, lists of (B, P), oldest first."""

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


class _Objective:
    """What `descend` minimises, as a function of unknowns (B, P).

    They are a sample's cells and, last, its minimum velocity as a share of OpenFWI's range.
    """

    def __init__(self, seis, cells):
        self.seis, self.cells = seis, cells
        v_min = cells.maps(cells.start).amin((1, 2, 3)).clamp(V_MIN, V_MAX)
        share = (v_min[:, None] - V_MIN) / (V_MAX - V_MIN)
        self.start = torch.cat([cells.start.flatten(1), share], 1).detach()

    def _of_cells(self, unknown):
        return unknown[:, :-1].view(self.cells.start.shape)

    def maps(self, unknown):
        """Unknowns -> maps (B, 1, Z, X) m/s."""
        return self.cells.maps(self._of_cells(unknown))

    def _weighted(self, n_samples):
        """Weights that grow with time (T, 1), the gathers times them, the energy of these (B,)."""
        n = min(n_samples, self.seis.shape[2] - 1)  # sample 999 of OpenFWI's data does not follow the scheme
        gain = (torch.arange(n, device=self.seis.device, dtype=self.seis.dtype) / n)[:, None]
        observed = self.seis[:, :, :n] * gain
        return gain, observed, observed.flatten(1).square().sum(1).clamp(min=1e-30)

    def misfit_of_noise(self, noise, n_samples):
        """The relative misfit (B,) that noise of standard deviation (B,) leaves to the true map."""
        gain, _, energy = self._weighted(n_samples)
        return 1.02 * noise * (gain.square().sum() * self.seis[0, :, 0].numel() / energy).sqrt()

    def evaluate(self, unknown, n_samples, some):
        """Objective and relative misfit (b,) of some samples, and the objective's gradient (b, P)."""
        gain, observed, energy = self._weighted(n_samples)
        unknown = unknown.detach().requires_grad_()
        made = waves.simulate(
            self.maps(unknown)[some],
            n_samples=n_samples,
            v_min=(V_MIN + (V_MAX - V_MIN) * unknown[some, -1]).clamp(V_MIN, V_MAX),
        )
        residual = made[:, :, : len(gain)] * gain - observed[some]
        fit = residual.flatten(1).square().sum(1) / energy[some]
        value = fit + self.cells.penalty(self._of_cells(unknown))[some]
        (gradient,) = torch.autograd.grad(value.sum(), unknown)
        return value.detach(), fit.detach().sqrt(), gradient[some]


def _line_search(objective, n_samples, unknown, direction, value, fit, gradient, some):
    """Backtrack each sample of `some` for itself (Armijo, 1966), and write what it reaches in place.

    Returns (steps (B, P), changes of the gradient (B, P), samples that found nothing better).
    """
    length, slope = torch.ones_like(value), (direction * gradient).sum(1)
    step, change = torch.zeros_like(unknown), torch.zeros_like(unknown)
    for _ in range(6):
        trial = unknown + length[:, None] * direction
        found = objective.evaluate(trial, n_samples, some)
        good = found[0] <= value[some] + 1e-4 * length[some] * slope[some]
        taken, some = some[good], some[~good]
        step[taken], change[taken] = trial[taken] - unknown[taken], found[2][good] - gradient[taken]
        unknown[taken] = trial[taken]
        value[taken], fit[taken], gradient[taken] = (part[good] for part in found)
        if not len(some):
            break
        length[some] /= 3
    return step, change, some


def descend(seis, cells, n_iterations=60, noise=None, minutes=math.inf, note=lambda n_samples, vel: None):
    """Fit maps to gathers: seis (B, S, T, R) -> (maps (B, 1, Z, X) m/s, relative misfits (iterations, B)).

    cells: the unknowns, `Cells` or `Modes`. Minimises ‖t/T · residual‖² / ‖t/T · observed‖² + penalty in time
    windows that grow, so that maps are fitted from the top down. Each map's minimum velocity, which sets the
    sponge, is an unknown of its own. Each sample has its own step length, and stops once its misfit is what
    noise of the standard deviation `noise` (B,) leaves (discrepancy principle: Morozov, 1966). Each window
    takes an equal part of the iterations, or ends at its share of `minutes`; then `note` is called with the
    window's samples and the maps.
    """
    objective = _Objective(seis, cells)
    unknown, began, trace = objective.start.clone(), time.monotonic(), []
    noise = torch.zeros(len(unknown), device=unknown.device) if noise is None else noise
    for n_samples, share in WINDOWS.items():
        misfit_of_noise = objective.misfit_of_noise(noise, n_samples)
        memory = _Memory()
        value, fit, gradient = objective.evaluate(unknown, n_samples, slice(None))
        done = torch.zeros(len(unknown), dtype=torch.bool, device=unknown.device)
        for _ in range(math.ceil(n_iterations / len(WINDOWS))):
            done |= fit < misfit_of_noise
            if done.all() or time.monotonic() - began > 60 * share * minutes:
                break
            direction = memory.direction(gradient)
            if not memory.steps:  # the first step is small: no cell moves by more than about 40 m/s
                direction = direction * (0.05 / direction.abs().amax(1).clamp(min=1e-30))[:, None]
            moving = (~done).nonzero()[:, 0]
            step, change, failed = _line_search(
                objective, n_samples, unknown, direction, value, fit, gradient, moving
            )
            done[failed] = True
            memory.add(step, change)
            trace.append(fit.clone())
        note(n_samples, objective.maps(unknown).detach())
    return objective.maps(unknown).detach(), torch.stack(trace) if trace else fit[None]
