"""Waveform inversion cell by cell: misfit + prior, by L-BFGS on the exact adjoint, many samples at once."""

import math
import wave
from dataclasses import dataclass, field

import torch

from utils import V_MAX, V_MIN

WINDOWS = (400, 700, 1000)  # samples; each for a third of the iterations
HISTORY = 8  # pairs that L-BFGS keeps
MARGIN = 1e-3  # share of the velocity range that the bounded unknown keeps from its ends


def total_variation(vel, p=1.0, scale_m_s=20.0):
    """Mean (|difference of neighbours|² + s²)^(p/2) / s^p: (B, 1, Z, X) m/s -> (B,); p < 1 for sharper edges.

    Source: Rudin, Osher & Fatemi (1992); p < 1 as Chartrand (2007).
    """
    terms = [((vel.diff(dim=d) / scale_m_s).square() + 1).pow(p / 2).mean((1, 2, 3)) for d in (2, 3)]
    return terms[0] + terms[1] - 2


class GaussianProcess:
    """Squared-exponential prior around a depth trend, as Style's maps: (B, 1, Z, X) m/s -> (B,).

    deviation in m/s, length in cells (FACTS of Style_A: 183, 3.5); `nugget` m/s of white noise.
    """

    def __init__(self, start, deviation=183.0, length=3.5, nugget=20.0):
        n = start.shape[-1]
        x = torch.arange(n, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2))
        power = deviation**2 * values.clamp(min=0)[:, None] * values.clamp(min=0) + nugget**2
        self.vectors, self.power = vectors.to(start), power.to(start)
        rows = start.mean(3, keepdim=True)  # the trend: a line through the mean of each row
        z = torch.linspace(-1, 1, n, dtype=start.dtype, device=start.device)[:, None]
        self.mean = rows.mean(2, keepdim=True) + z * (rows * z).sum(2, keepdim=True) / z.square().sum()

    def __call__(self, vel):
        modes = self.vectors.T @ (vel - self.mean) @ self.vectors
        return (modes.square() / self.power).mean((1, 2, 3))


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


def descend(seis, vel, prior, weight=1e-4, n_iterations=60, floor=None, late=lambda: False):
    """Fit maps to gathers: seis (B, S, T, R), start vel (B, 1, Z, X) m/s -> (vel, relative misfits (n, B)).

    Minimises ‖t/T · residual‖² / ‖t/T · observed‖² + weight · prior(vel), from the top down in windows that
    grow. Unknowns: the cells, bounded, scaled 1 + z/5 so that the deep moves too, and each map's minimum
    velocity, which sets the sponge. Each sample has its own step length; one whose misfit falls below its
    `floor` (B,), what the noise leaves, stops (discrepancy principle, Morozov, 1966).
    """
    n_batch, (n_z, n_x) = len(vel), vel.shape[-2:]
    depth = (1 + torch.arange(n_z, device=vel.device, dtype=vel.dtype) / 5)[:, None]
    span, floor = V_MAX - V_MIN, torch.zeros(n_batch, device=vel.device) if floor is None else floor
    share = ((vel[:, 0] - V_MIN) / span).clamp(MARGIN, 1 - MARGIN)
    v_min = vel.amin((1, 2, 3)).clamp(V_MIN, V_MAX)
    unknown = torch.cat([(share.logit() / depth).flatten(1), (v_min[:, None] - V_MIN) / span], 1)

    def maps(u):
        return V_MIN + span * torch.sigmoid(u[:, :-1].view(n_batch, 1, n_z, n_x) * depth)

    def evaluate(u, n_samples):
        """Objective, misfit (B,) each, and gradient (B, P)."""
        u = u.detach().requires_grad_()
        made = maps(u)
        sponge = (V_MIN + span * u[:, -1]).clamp(V_MIN, V_MAX)
        n = min(n_samples, seis.shape[2] - 1)  # index 999 of the real data does not follow the scheme
        gain = (torch.arange(n, device=seis.device, dtype=seis.dtype) / n)[:, None]
        observed = seis[:, :, :n] * gain
        residual = wave.simulate(made, n_samples=n_samples, v_min=sponge)[:, :, :n] * gain - observed
        energy = observed.flatten(1).square().sum(1).clamp(min=1e-30)
        fit = residual.flatten(1).square().sum(1) / energy
        value = fit + weight * prior(made)
        (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), fit.detach().sqrt(), gradient

    trace = []
    for n_samples in WINDOWS:
        memory, steps = _Memory(), None
        value, fit, gradient = evaluate(unknown, n_samples)
        done = torch.zeros(n_batch, dtype=torch.bool, device=vel.device)
        for _ in range(math.ceil(n_iterations / len(WINDOWS))):
            done |= fit < floor
            if done.all() or late():
                break
            direction = memory.direction(gradient)
            if steps is None:  # the first step moves no cell by more than about 40 m/s
                direction = direction * (0.05 / direction.abs().amax(1).clamp(min=1e-30))[:, None]
                steps = torch.ones_like(value)
            length = torch.ones_like(value).masked_fill(done, 0)
            slope = (direction * gradient).sum(1)
            for _ in range(6):  # backtracking, each sample for itself (Armijo, 1966)
                trial = unknown + length[:, None] * direction
                trial_value, trial_fit, trial_gradient = evaluate(trial, n_samples)
                good = (trial_value <= value + 1e-4 * length * slope) & ~done
                if (good | done).all():
                    break
                length = torch.where(good | done, length, length / 3)
            done |= ~good
            keep = good[:, None]
            memory.add(torch.where(keep, trial - unknown, 0), torch.where(keep, trial_gradient - gradient, 0))
            unknown, gradient = torch.where(keep, trial, unknown), torch.where(keep, trial_gradient, gradient)
            value, fit = torch.where(good, trial_value, value), torch.where(good, trial_fit, fit)
            trace.append(fit)
    return maps(unknown).detach(), torch.stack(trace) if trace else fit[None]
