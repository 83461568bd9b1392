"""Gauss-Newton in few unknowns: residuals of many maps at once, derivatives by differences, damped steps.

A derivative is the difference of two simulations: one more map in a batch that uses all cores, a third
of what forward-mode derivatives (`torch.func.jvp` of `waves.simulate`) cost. It need not be exact. Those of
many single cells come by reciprocity (`waves.jacobian`).
"""

import math
import time
from dataclasses import replace

import numpy as np
import torch

import waves
from inversion.parameters import paint
from synthetic.maps import N_CELLS

BATCH = 8  # maps simulated together
STRIDE = 4  # every 4th sample: 250 Hz hold a signal that ends near 45 Hz
SPAN = 8  # samples of which each is the mean where there is noise: most of that lies above the signal
SURE = 1.06  # how much more noise there may be than is measured
EXPLAINED = 0.06  # norm of residuals, beside the noise, at which a search has found its map
DAMPING = (1e-2, 1.0, 1e2)  # tried in each step, times the last one's
QUIET = 1.5  # samples a cell from a source on, before which nothing is heard: the fastest wave takes 2.2
OUTSIDE = np.pad(np.zeros((N_CELLS - 3, N_CELLS - 2), bool), ((2, 1), (1, 1)), constant_values=True)
FEW = 30  # maps that are sooner simulated than by `Observed.linear`
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


def gauss_newton(
    observed, smooth, theta, scale, n_samples, n_steps, clip, exact=None, prior=0.0, least_gain=0.03
):
    """Minimise ‖residuals(exact(theta))‖² + Σ prior·theta²: (theta, norm of the residuals).

    smooth: theta (P,) -> map (70, 70), whose differences over 0.1 `scale` give the derivatives; exact: what
    is fitted, default `smooth`. A step is at most 3 `scale`; `clip` brings theta into its bounds. Ends after
    n_steps, or when a step gains less than the share `least_gain`. Levenberg (1944), Marquardt (1963).
    """
    exact, eye = exact or smooth, 0.1 * np.diag(scale)

    def penalty(t):
        return float(np.sum(prior * t**2))

    residual = observed.residuals([exact(theta)], n_samples)[0]
    value, damping = float(residual @ residual) + penalty(theta), 1e-2
    for _ in range(n_steps):
        if observed.late:
            break
        changed = observed.residuals([smooth(theta), *(smooth(theta + step) for step in eye)], n_samples)
        jacobian = (changed[1:] - changed[0]) / 0.1
        hessian = (jacobian @ jacobian.T).double().cpu().numpy() + np.diag(
            prior * scale**2 + np.zeros(len(theta))
        )
        gradient = (jacobian @ residual).double().cpu().numpy() + prior * theta * scale
        diagonal = np.diag(hessian)
        trials = []
        for factor in DAMPING:
            damped = hessian + np.diag(damping * factor * (diagonal + 0.01 * diagonal.mean()) + 1e-14)
            step = -np.linalg.solve(damped, gradient)
            step *= min(1.0, 3.0 / max(np.abs(step).max(), 1e-12))
            trials += [(damping * factor, clip(theta + share * step * scale)) for share in (1.0, 0.4)]
        residuals = observed.residuals([exact(t) for _, t in trials], n_samples)
        values = [float(r @ r) + penalty(t) for r, (_, t) in zip(residuals, trials, strict=True)]
        best = int(np.argmin(values))
        if not values[best] < value:
            damping *= 100
            if damping > 1e4:
                break
            continue
        gain, value = 1 - values[best] / value, values[best]
        damping, theta, residual = (
            float(np.clip(trials[best][0], 1e-8, 1e2)),
            trials[best][1],
            residuals[best],
        )
        if gain < least_gain:
            break
    return theta, float(residual.norm())


def changes(observed, velocities, depths, columns):
    """How residuals change: (rows (P, D) of a cell down and of `step`, the residual (D,), `step` (K+1,)).

    One row for each interface of depths (K, 70) and each list of columns that move as one, then one for
    each velocity. Where a depth is at the bottom, the change is that of a cell up, reversed. Moves inside are
    linearised (`Observed.linear`), unless they are few.
    """
    base, moves, signs = paint(velocities, depths), [], []
    for k in range(len(depths)):
        for group in columns:
            moved = depths.copy()
            signs.append(1 if (depths[k, group] < N_CELLS).any() else -1)
            moved[k, group] += signs[-1]
            moves.append(paint(velocities, moved))
    step = 5.0 * np.where(velocities < 4490, 1, -1)
    faster = [paint(velocities + step * (np.arange(len(step)) == k), depths) for k in range(len(step))]
    moves = np.stack(moves)
    inside = ~(moves != base)[:, OUTSIDE].any(1)
    if inside.sum() < FEW:
        inside[:] = False
    residuals = observed.residuals([base, *moves[~inside], *faster], 1000)
    signs = torch.tensor(signs, device=residuals.device)[:, None]
    rows = torch.empty(len(moves), residuals.shape[1], device=residuals.device)
    rows[~inside] = residuals[1 : len(residuals) - len(step)] - residuals[0]
    if inside.any():
        rows[inside] = observed.linear(base, moves[inside])
    return torch.cat([signs * rows, residuals[-len(step) :] - residuals[0]]), residuals[0], step


def settle(observed, velocities, depths, increasing=True, n_rounds=12):
    """Settle whole-cell depths and whole velocities of flat layers together: (velocities, depths, norm).

    velocities (K+1,), depths (K, 70), first cells of the lower layers. In each round every move by one cell
    is simulated, the best mixture of moves and changes of velocity is found by least squares within bounds,
    and the moves above a threshold are made.
    """
    n = len(depths)
    bounds = np.r_[np.full(n, 1.5), np.full(n + 1, 60.0)] * [[-1], [1]]
    norm = float(observed.residuals([paint(velocities, depths)], 1000)[0].norm())
    for _ in range(n_rounds):
        if norm < 1e-6 or observed.late:
            break
        rows, residual, step = changes(observed, velocities, depths, [range(N_CELLS)])
        shares = least_squares_in_box(rows, residual, bounds)
        # of a thin layer, depth and velocity tell the same: the velocities are tried alone too
        alone = least_squares_in_box(rows[n:], residual, bounds[:, n:])
        both, alone = (np.clip(velocities + step * some, 1500, 4500) for some in (shares[n:], alone))
        if increasing:
            both, alone = np.maximum.accumulate(both), np.maximum.accumulate(alone)
        trials = [(np.rint(both), depths), (np.rint(alone), depths)]
        for threshold in (0.35, 0.5, 0.65, 0.8, 0.95):
            moves = (np.sign(shares[:n]) * (np.abs(shares[:n]) > threshold)).astype(int)
            moved = np.clip(depths + moves[:, None], 0, N_CELLS)
            trials += [(velocities, moved), (np.rint(both), moved)]
        norms = observed.residuals([paint(*t) for t in trials], 1000).norm(dim=1)
        best = int(norms.argmin())
        if float(norms[best]) >= observed.least_share * norm:
            break
        (velocities, depths), norm = trials[best], float(norms[best])
    return velocities, depths, norm


def least_squares_in_box(rows, target, bounds, price=0.0, n_sweeps=300):
    """argmin ‖target + Σ s_j rows_j‖² / 2 + Σ price_j s_j, s within bounds (2, P), by coordinate descent."""
    gram = (rows @ rows.T).double().cpu().numpy()
    slope = (rows @ target).double().cpu().numpy() + price
    diagonal = np.diag(gram) + 1e-7 * np.diag(gram).mean() + 1e-30
    shares = np.zeros(len(gram))
    for _ in range(n_sweeps):
        before = shares.copy()
        for j in range(len(shares)):
            rest = gram[j] @ shares - gram[j, j] * shares[j] + slope[j]
            shares[j] = np.clip(-rest / diagonal[j], *bounds[:, j])
        if np.abs(shares - before).max() < 1e-4:
            break
    return shares
