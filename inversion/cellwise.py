"""Waveform inversion cell by cell: Gauss-Newton steps in the slowness squared of every cell.

A step linearises the gather in 1/v² of all cells at once (`waves.map_jacobian`), and finds the map that
explains it best among those that a prior deems likely: few sharp edges, or a Gaussian process. In 1/v², and
not in v, the gather stays linear even where a cell changes from one layer to the next. The first steps see
low frequencies and early arrivals alone, so that no echo is taken for its neighbour.

Sources: Gauss-Newton in seismics, Pratt, Shin and Hicks (1998); from low to high frequencies, Bunks et al.
(1995); early arrivals by exponential damping, Shin and Cha (2009).
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache

import torch

import waves
from utils import V_MAX, V_MIN
from waves.derivatives import means_of

EVERY = 8  # samples whose mean is compared: 62.5 means a second hold the signal, which ends near 45 Hz
# highest frequency in Hz and decay of the weights in 1/s of the first steps; all others see everything
STAGES = ((5, 3.0), (8, 2.0), (12, 1.0), (20, 0.5))
GAIN = 0.4  # a step aims at this share of the residual: a smaller one would trade the prior for noise
# A step takes the residual for noise below this share of the gather: there lies what linearising leaves, and
# what is fitted to that makes maps worse
TRUSTED = 1e-4
SOLUTIONS = 4  # of a step: the prior and the bounds are fitted to the last one's map
N_TRIALS = 3  # of a step, each shorter than the last
FULL_STEP_M_S = 200.0  # standard deviation of a cell's change in the first trial
V_MIN_M_S = 30.0  # standard deviation of the sponge's v_min about the map's smallest velocity
RIDGE = 1e-6  # share added to the diagonal: float32 resolves no more
LEAST_GAIN = 0.01  # of the residual; two steps in turn that gain less are the last


def time_weights(highest_hz, decay, acquisition=waves.OPENFWI):
    """Weights (K, T') of the means of EVERY samples: a cosine transform, damped, up to a frequency.

    The last mean holds sample 999, which in OpenFWI's data does not follow the scheme: it is left out.
    """
    n, duration_s = -(-acquisition.n_samples // EVERY), acquisition.n_samples * acquisition.dt_s
    k = torch.arange(min(n, math.floor(min(2 * highest_hz * duration_s, n)) + 1))
    t = torch.arange(n)
    transform = torch.cos(math.pi * k[:, None] * (t + 0.5) / n) * math.sqrt(2 / n)
    if len(k) < n:  # a smooth end, from 80 % on
        share = (k / (2 * duration_s) / highest_hz - 0.8).clamp(0, 0.2) / 0.2
        transform *= (0.5 + 0.5 * torch.cos(math.pi * share))[:, None]
    transform *= torch.exp(-decay * duration_s / n * t)
    transform[:, -1] = 0
    return transform


@lru_cache(maxsize=2)
def _neighbours(n_rows, n_columns, device):
    """Numbers of the cells on both sides of each edge: (2, E)."""
    cells = torch.arange(n_rows * n_columns, device=device).view(n_rows, n_columns)
    sides = (cells[1:], cells[:-1]), (cells[:, 1:], cells[:, :-1])
    return torch.stack([torch.cat([pair[k].reshape(-1) for pair in sides]) for k in (0, 1)])


class Edges:
    """A prior for maps of few sharp edges: weight · Σ ((difference² + ε²) / (500 m/s)²)^(p/2).

    The sum is over neighbouring cells. p < 1 favours one large step over several small ones; ε shrinks from
    step to step. Source: Rudin, Osher & Fatemi (1992); p < 1 as in Chartrand (2007).
    """

    def __init__(self, weight=15.0, p=0.5, first_m_s=80.0, last_m_s=10.0, n_steps=10):
        self.weight, self.p = weight, p
        self.smallest = [first_m_s * (last_m_s / first_m_s) ** (k / (n_steps - 1)) for k in range(n_steps)]

    def _squares(self, vel, step):
        pairs, flat = _neighbours(*vel.shape, vel.device), vel.reshape(-1)
        small = self.smallest[min(step, len(self.smallest) - 1)]
        return pairs, ((flat[pairs[0]] - flat[pairs[1]]).square() + small**2) / 500**2

    def value(self, vel, step):
        """Minus the logarithm of the probability of a map (Z, X), up to a constant."""
        return self.weight * self._squares(vel, step)[1].pow(self.p / 2).sum().item()

    def parabola(self, vel, step):
        """Q and c, ½ (v - c)ᵀ Q (v - c) being the parabola that touches `value` at a map: (P, P), (P,).

        Source: iteratively reweighted least squares (Weiszfeld, 1937).
        """
        (a, b), squares = self._squares(vel, step)
        weights = self.weight * self.p / 500**2 * squares.pow(self.p / 2 - 1)
        q = weights.new_zeros(vel.numel(), vel.numel())
        for rows, columns, values in ((a, b, -weights), (b, a, -weights), (a, a, weights), (b, b, weights)):
            q.index_put_((rows, columns), values, accumulate=True)
        return q, vel.new_zeros(vel.numel())


@lru_cache(maxsize=2)
def _process_precision(n, deviation, length, nugget):
    """The inverse covariance (n², n²) of a Gaussian process on n × n cells."""
    x = torch.arange(n, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2))
    values = values.clamp(min=0)
    power = (deviation**2 * torch.outer(values, values) + nugget**2).view(-1)
    both = torch.kron(vectors, vectors)
    return ((both / power).float()) @ both.float().T


class Smooth:
    """A prior for maps like the Style families': a Gaussian process about a map (Z, Z).

    deviation and nugget (of white noise) in m/s, length in cells. Source: kriging (Matheron, 1973).
    """

    def __init__(self, centre, deviation=150.0, length=2.0, nugget=50.0):
        self.precision = _process_precision(len(centre), deviation, length, nugget).to(centre)
        self.centre = centre.reshape(-1)

    def value(self, vel, step):
        """See `Edges.value`."""
        away = vel.reshape(-1) - self.centre
        return 0.5 * (away @ (self.precision @ away)).item()

    def parabola(self, vel, step):
        """See `Edges.parabola`."""
        return self.precision, self.centre


@dataclass
class _Linear:
    """The weighted gather near a map: its residual, and all that its derivatives say of steps.

    A step is written in m/s, as the change of 1/v² times dv / d(1/v²); its last number is v_min's.
    """

    vel: torch.Tensor  # (P,) m/s
    hessian: torch.Tensor  # (P + 1, P + 1)
    gradient: torch.Tensor  # (P + 1,)
    energy: float  # of the residual
    v_min_excess: float  # of v_min, over the map's smallest velocity

    def moved(self, step):
        """The map (P,) after a step (P + 1,)."""
        return self.vel * (1 - 2 * step[:-1] / self.vel).rsqrt()

    def solve(self, variance, prior, number, full_step, shape):
        """The step (P + 1,) to the likeliest map, if the residual's noise has this variance; None if none is.

        prior: `Edges` or `Smooth`, in step `number`. full_step: a cell's standard deviation, in m/s.
        """
        n = len(self.vel)
        low, high = (self.vel / 2 * (1 - (self.vel / bound) ** 2) for bound in (V_MIN, V_MAX))
        fixed, held = torch.zeros_like(self.vel, dtype=torch.bool), torch.zeros_like(self.vel)
        step, slope = torch.zeros_like(self.gradient), torch.ones_like(self.vel)
        for _ in range(SOLUTIONS):
            vel = self.moved(step)
            q, centre = prior.parabola(vel.view(shape), number)
            matrix, rest = self.hessian / variance, self.gradient / variance
            matrix[:n, :n] += q * slope * slope[:, None]  # `slope`: of v, by the step
            rest[:n] += slope * (q @ (self.vel - centre))
            diagonal = matrix.diagonal()
            diagonal += full_step**-2
            diagonal[n] += V_MIN_M_S**-2
            rest[n] += V_MIN_M_S**-2 * self.v_min_excess
            diagonal[:n] += 1e4 * diagonal[:n] * fixed  # cells at the bounds stay there
            rest[:n] -= 0.9999 * diagonal[:n] * fixed * held
            scale = diagonal.rsqrt()
            matrix = matrix * scale * scale[:, None]
            matrix.diagonal().add_(RIDGE)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed:
                return None
            step = -scale * torch.cholesky_solve((scale * rest)[:, None], factor)[:, 0]
            outside = (step[:n] < low) | (step[:n] > high)
            step[:n] = torch.minimum(torch.maximum(step[:n], low), high)
            fixed, held = fixed | outside, torch.where(outside, step[:n], held)
            change = self.moved(step) - self.vel
            slope = torch.where(step[:n].abs() > 1e-3, change / step[:n], 1.0)
        return step


class _Fit:
    """One gather and the map that is fitted to it."""

    def __init__(self, seis, vel, noise, acquisition):
        """seis: (S, T, R); vel: (Z, X) m/s; noise: standard deviation of the means of EVERY samples."""
        self.means, self.noise, self.acquisition = means_of(seis, EVERY), noise, acquisition
        self.vel, self.v_min = vel.clamp(V_MIN, V_MAX), vel.min().clamp(V_MIN, V_MAX)[None]
        self.made = self._simulate(self.vel, self.v_min)

    def _simulate(self, vel, v_min):
        return means_of(waves.simulate(vel[None], acquisition=self.acquisition, v_min=v_min)[0], EVERY)

    def linearise(self, weights):
        """See `_Linear`."""
        vel = self.vel.view(-1)
        rows = waves.map_jacobian(self.vel, self.v_min, weights, EVERY, self.acquisition).flatten(1)
        rows[:-1] *= (-2 * vel**-3)[:, None]
        residual = (weights @ (self.made - self.means)).flatten()
        excess = (self.v_min - vel.min()).item()
        return _Linear(vel, rows @ rows.T, rows @ residual, float(residual @ residual), excess)

    def step(self, number, prior, full_step):
        """Take a step: (the residual's share that it left, the full step for the next one)."""
        highest, decay = STAGES[number] if number < len(STAGES) else (math.inf, 0.0)
        weights = time_weights(highest, decay, self.acquisition).to(self.vel)
        linear, n = self.linearise(weights), len(weights) * self.means[:, 0].numel()
        trusted = (TRUSTED * self.means).square().mean().item()
        variance = max(GAIN**2 * linear.energy / n, self.noise**2, trusted, 1e-30)

        def cost(energy, vel):
            return 0.5 * energy / variance + prior.value(vel, number)

        before = cost(linear.energy, self.vel)
        for _ in range(N_TRIALS):
            step = linear.solve(variance, prior, number, full_step, self.vel.shape)
            if step is not None:
                vel = linear.moved(step).clamp(V_MIN, V_MAX).view_as(self.vel)
                v_min = (self.v_min + step[-1]).clamp(V_MIN, V_MAX)
                made = self._simulate(vel, v_min)
                energy = (weights @ (made - self.means)).square().sum().item()
                if cost(energy, vel) < before:
                    self.vel, self.v_min, self.made = vel, v_min, made
                    return math.sqrt(energy / max(linear.energy, 1e-30)), min(2 * full_step, FULL_STEP_M_S)
            full_step /= 4
        return 1.0, full_step

    def is_explained(self):
        """Whether the residual is what noise leaves to the true map (Morozov, 1966), or rounding."""
        residual, observed = (x[:, :-1].square().mean() for x in (self.made - self.means, self.means))
        return bool(residual <= max(1.05 * self.noise**2, 1e-12 * observed))


def fit_cells(
    seis,
    vel,
    prior,
    n_steps=40,
    noise=0.0,
    minutes=math.inf,
    note=lambda number, vel: None,
    acquisition=waves.OPENFWI,
):
    """Fit a map to a gather: (the map (Z, X) m/s, how many steps it took).

    seis: (S, T, R); vel: the start (Z, X) m/s; prior: `Edges` or `Smooth`; noise: standard deviation of the
    means of EVERY samples. Ends after `n_steps`, after `minutes`, once noise explains the rest, or when steps
    gain no more. note(number, map) is called after each step. With OpenFWI's acquisition a step takes about
    30 s of a CPU core, and 4 GiB.
    """
    fit, full_step, n_idle, number = _Fit(seis, vel, noise, acquisition), FULL_STEP_M_S, 0, 0
    end = time.monotonic() + 60 * minutes
    while number < n_steps and n_idle < 2 and time.monotonic() < end and not fit.is_explained():
        left, full_step = fit.step(number, prior, full_step)
        n_idle = n_idle + 1 if number >= len(STAGES) and left > 1 - LEAST_GAIN else 0
        number += 1
        note(number, fit.vel)
    return fit.vel, number
