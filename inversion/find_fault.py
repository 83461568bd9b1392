"""Faulted maps found from a gather: a population in a growing time window, then pairs of unknowns anew."""

import itertools
import math

import numpy as np
import torch

from inversion.gauss_newton import gauss_newton, least_squares_in_box
from inversion.parameters import Fault
from inversion.population import CONTRASTS, depths_beneath, evolve, parents, top_velocity
from synthetic.soft_fault import FAULT_ENDS, N_FINE, THROW, border_point, fault_line
from utils import V_MAX, V_MIN

WINDOWS = ((220, 12), (300, 10), (400, 8))  # samples, survivors
N_DRAWN = 400  # faults through what is seen beneath the sources, the best of them into the first population
LATER = (520, 700, 1000)  # samples
FOUND = 0.0005  # norm of residuals at which no other start is tried
NEAR = 0.01  # at which the fault itself is not tried anew
FAINT = 0.001  # at which, in the whole record, nothing is tried anew: faint interfaces hide below NEAR
UNLIKE = 0.05  # above which a map is too wrong to be finished
STEP = 3.0  # m/s: how velocities' derivatives are taken
FARTHEST = 20.0  # times STEP, that velocities may move at once
PRICES = (0.003, 0.03)  # of another decision than ours, times the squared norm to be explained
SHARES = (0.3, 0.5, 0.7)  # of another decision, above which it is made


def _map_fit(model, theta, guess, n_steps=8):
    """theta whose map is nearest to a guess, and the mean absolute difference; no simulation."""

    def difference(t):
        error = (model.smooth(t) - guess).ravel()
        return np.sign(error) * np.sqrt(np.abs(error) + 10)

    residual, damping = difference(theta), 0.1
    for _ in range(n_steps):
        eye = 0.1 * np.diag(model.scale)
        jacobian = np.stack([(difference(theta + step) - residual) / 0.1 for step in eye], 1)
        hessian, slope = jacobian.T @ jacobian, jacobian.T @ residual
        for _ in range(4):
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian) + 1), slope)
            trial = model.clip(theta - step * model.scale)
            if (tried := difference(trial)) @ tried < residual @ residual:
                break
            damping *= 6
        else:
            break
        theta, residual, damping = trial, tried, max(damping / 6, 1e-4)
    return np.abs(model.smooth(theta) - guess).mean(), theta, model


def _random_fault(n, guess, rng):
    """A fault as the generator draws it, its velocities the guess's medians: (theta, Fault)."""
    model = Fault(n, bool(rng.integers(2)))
    thickness = rng.permutation(np.full(n + 1, 60 / (n + 1))) + 10 * rng.dirichlet(np.ones(n + 1))
    throw = rng.choice([-1, 1]) * rng.integers(THROW[0], THROW[1] + 1)
    velocities = np.linspace(V_MIN, V_MAX, n + 1)
    theta = np.concatenate([velocities, np.cumsum(thickness)[:n], [*rng.integers(*FAULT_ENDS, 2), throw]])
    layer = np.abs(model.smooth(theta)[..., None] - velocities).argmin(-1)
    medians = [np.median(guess[layer == k]) if (layer == k).any() else velocities[k] for k in range(n + 1)]
    theta[: n + 1] = np.maximum.accumulate(medians)
    return theta, model


def _aim(x, z, end):
    """The start and end of a fault through column x of row z, half cells, which ends at `end`."""
    last = N_FINE - 1
    x, z = np.clip(x, 1, last - 1), np.clip(z, 1, last - 1)
    bottom, left = border_point(end)
    across = (x - last + bottom) / max(last - left - z, 1)
    top = x + across * z
    return (top if top <= last else last + (top - last) / across), end


def _turned(theta, model, end):
    """A fault that leans the other way through the middle of a map, with the same layers on both sides."""
    theta, throw = theta.copy(), theta[-1]
    top, across = fault_line(*theta[-3:-1])
    theta[-3:-1] = _aim(N_FINE - 1 - top + across * N_FINE / 2, N_FINE / 2, end)
    theta[model.n + 1 : -3] += throw / 2
    theta[-1] = -throw
    return theta, Fault(model.n, not model.mirrored)


def _through(beneath, sources, top, n, guess, rng):
    """As `_random_fault`, through what is seen beneath the sources, [(cells, m/s), ...]: (theta, Fault).

    Where its depth changes between two sources by as much as a fault throws, the fault is there.
    """
    theta, model = _random_fault(n, guess, rng)
    depths, below = np.array(beneath).T
    sides = [(depths[:k], depths[k:]) for k in range(1, len(depths))]
    strays = [sum(np.abs(side - np.median(side)).sum() for side in pair) for pair in sides]
    k = int(np.argmin(strays)) + 1
    left, right = (np.median(side) for side in sides[k - 1])
    base = np.median(depths)
    if 4 < abs(left - right) < 12:
        base, moved = (right, left) if model.mirrored else (left, right)
        theta[-1] = np.rint(2 * (moved - base))
        x = 2 * rng.uniform(sources[k - 1], sources[k])  # where the fault cuts the interface, half cells
        theta[-3:-1] = _aim(N_FINE - 1 - x if model.mirrored else x, 2 * base, int(rng.integers(*FAULT_ENDS)))
    seen = int(rng.integers(2)) if base > 16 and n > 1 else 0  # one above may be too faint to be seen
    theta[n + 1 : -3] += base - theta[n + 1 + seen]
    theta[0], theta[seen + 1] = top, np.median(below)
    if seen:
        theta[1] = top + (theta[2] - top) * rng.uniform(0, 0.5)
        theta[n + 1] = max(theta[n + 1], 5.0)
    return theta, model


def _norms_of(observed, trials, n_samples=1000):
    """Norms of the residuals of sharp maps, (theta, model) each: (N,)."""
    return observed.residuals([model.sharp(theta) for theta, model in trials], n_samples).norm(dim=1)


def _norms(observed, model, thetas, n_samples):
    """As `_norms_of`, of one model."""
    return _norms_of(observed, [(theta, model) for theta in thetas], n_samples)


def _steps(model):
    """Small steps of one unknown each, the fault's start and end left out: a list of (P,)."""
    unit, n = np.eye(len(model.scale)), model.n + 1
    steps = [step * unit[j] for j in range(n) for step in (-8, -3, -1, 1, 3, 8)]
    return steps + [step * unit[j] for j in (*range(n, len(unit) - 3), -1) for step in (-1, 1)]


def _refine(observed, theta, model, norm, n_samples):
    """Coordinate search on the sharp map, whose throw is whole half cells, between Gauss-Newton steps."""
    unit = np.eye(len(theta))
    moves = _steps(model) + [step * unit[j] for j in (-3, -2) for step in (-3, -1, 1, 3)]
    for _ in range(8):
        trials = [model.clip(theta + move) for move in moves]
        norms = _norms(observed, model, trials, n_samples)
        best = int(norms.argmin())
        if float(norms[best]) >= observed.least_share * norm or observed.late:
            break
        theta, norm = trials[best], float(norms[best])
        theta, norm = _descend(observed, theta, model, n_samples, 3)
    return theta, norm


def _descend(observed, theta, model, n_samples, n_steps):
    fitted = theta, model.scale, n_samples, n_steps, model.clip, model.sharp
    return gauss_newton(observed, model.smooth, *fitted, least_gain=1e-2)


def _varied(theta, at, values):
    """theta with some of its unknowns at values (M, len(at)): (M, P)."""
    trials = np.repeat(theta[None], len(values), 0)
    trials[:, at] = values
    return trials


def _grid(*values):
    return np.stack(np.meshgrid(*values), -1).reshape(-1, len(values))


def _elsewhere(theta, n):
    """theta without its faintest interface, which may hide none, and with another somewhere else: (M, P)."""
    faintest = int(np.argmin(np.diff(theta[:n])))
    velocities, depths = np.delete(theta[:n], faintest + 1), np.delete(theta[n:-3], faintest)
    trials = []
    for depth, contrast in itertools.product(range(4, 69, 2), CONTRASTS):
        k = int(np.searchsorted(depths, depth))
        if velocities[k] + contrast < np.append(velocities, V_MAX)[k + 1]:
            new = np.insert(velocities, k + 1, velocities[k] + contrast), np.insert(depths, k, depth)
            trials.append(np.concatenate([*new, theta[-3:]]))
    return np.array(trials)


def _blocks(theta, n):
    """Unknowns tried anew together, over their whole range: arrays of trials (M, P), the fault's last."""
    blocks, throws = [], np.arange(THROW[0], THROW[1] + 1)
    for k in reversed(range(n - 1)):  # an interface and the velocity below it
        above = theta[n + k - 1] if k else 2.0
        below = theta[n + k + 1] if k < n - 2 else 71.0
        velocities = theta[k] + np.array([5.0, *CONTRASTS])
        pairs = _grid(np.arange(above + 2, below - 1, 2), velocities[velocities < V_MAX])
        blocks.append(_varied(theta, [n + k, k + 1], pairs))
    blocks.append(_elsewhere(theta, n))
    pairs = _grid(np.append(throws, -throws), theta[-3] + np.array([-8, -4, 0, 4, 8]))
    blocks.append(_varied(theta, [-1, -3], pairs))
    top, across = fault_line(*theta[-3:-1])
    crossed = itertools.product(2 * theta[n:-3][:2], np.arange(-8, 9, 4), range(*FAULT_ENDS, 8))
    blocks.append(_varied(theta, [-3, -2], [_aim(top - across * z + by, z, end) for z, by, end in crossed]))
    return [block for block in blocks if len(block)]  # between close interfaces there is no room


def _rescan(observed, theta, model, n_samples):
    """Pairs of unknowns tried anew over their whole range, in turn, until none helps: out of local minima."""
    enough = observed.enough(n_samples, NEAR if n_samples < 1000 else FAINT)
    norm = float(_norms(observed, model, [theta], n_samples))
    theta, norm = _refine(observed, theta, model, norm, n_samples)
    n_idle, number = 0, 0
    while norm > enough and not observed.late:
        blocks = _blocks(theta, model.n + 1)
        if norm < observed.enough(n_samples, NEAR):  # the fault is found
            blocks = blocks[:-2]
        if n_idle == len(blocks):
            break
        trials = [model.clip(t) for t in blocks[number % len(blocks)]]
        norms = _norms(observed, model, trials, n_samples)
        before = norm
        for i in np.argsort(norms.cpu().numpy())[:3]:
            fitted, fitted_norm = _descend(observed, trials[i], model, n_samples, 4)
            if fitted_norm < norm:
                theta, norm = fitted, fitted_norm
        if norm < 0.99 * before:
            theta, norm = _refine(observed, theta, model, norm, n_samples)
            n_idle = 0
        else:
            n_idle, number = n_idle + 1, number + 1
    return theta, norm


def _derivatives(observed, theta, model):
    """Residuals (D,), how they change with each velocity, by STEP, and decision (P, D), and its mask."""
    masks, steps = model.flips(theta), STEP * np.eye(len(theta))[: model.n + 1]
    flipped = [Fault(model.n, model.mirrored, model.flipped ^ mask) for mask in masks]
    maps = [model.sharp(theta), *(model.sharp(theta + step) for step in steps)]
    residuals = observed.residuals(maps + [one.sharp(theta) for one in flipped], 1000)
    return residuals[0], residuals[1:] - residuals[0], masks


def _neighbours(observed, theta, model, derivatives, moves):
    """What may fit better after one of the moves, velocities and rounding's decisions fitted anew: trials.

    Both are taken to act alike after each move, so that the derivatives do for all: (theta, model), ...
    """
    residual, rows, masks = derivatives
    n, moved = model.n + 1, [model.clip(theta + move) for move in moves]
    left = observed.residuals([model.sharp(t) for t in moved], 1000)
    gram, slopes = (rows @ rows.T).cpu().double(), (rows @ left.T).cpu().double()
    gram.diagonal()[n:] += PRICES[0] * float(residual @ residual)
    gram.diagonal().add_(1e-9 * gram.diagonal().mean())  # a layer that is nowhere has no derivative
    gains = (slopes * torch.linalg.solve(gram, slopes)).sum(0)
    best = (left.square().sum(1) - gains).argsort()[:4].tolist()
    bounds = np.repeat([[-FARTHEST, 0.0], [FARTHEST, 1.0]], (n, len(masks)), axis=1)
    trials = []
    for k, price in itertools.product(best, PRICES):
        prices = np.repeat([0, price * float(left[k] @ left[k])], (n, len(masks)))
        shares = least_squares_in_box(rows, left[k], bounds, prices)[n:]
        for threshold in SHARES:
            chosen = shares > threshold
            rest = left[k] + rows[n:][torch.from_numpy(chosen)].sum(0)
            fitted = moved[k].copy()
            fitted[:n] += STEP * least_squares_in_box(rows[:n], rest, bounds[:, :n])
            other = Fault(model.n, model.mirrored, model.flipped ^ masks[chosen].any(0))
            trials.append((model.clip(np.rint(fitted)), other))
    return trials


def _settled(observed, theta, model):
    """Velocities and rounding's decisions fitted where a move has led, with derivatives taken there.

    -> (theta, model, norm of the whole record's residuals).
    """
    plain, norm = Fault(model.n, model.mirrored), math.inf
    for _ in range(2):
        trials = _neighbours(observed, theta, plain, _derivatives(observed, theta, plain), [0 * theta])
        norms = _norms_of(observed, trials)
        best = int(norms.argmin())
        if float(norms[best]) >= norm or observed.late:
            break
        (theta, model), norm = trials[best], float(norms[best])
    return theta, model, norm


def _finish(observed, theta, model):
    """The whole unknowns nearby that fit best, one by one and the fault's together, and rounding's decisions.

    -> (theta, model, norm of the whole record's residuals).
    """
    norm = float(_norms(observed, model, [theta], 1000))
    observed.stay(norm)
    unit = np.eye(len(theta))[model.n + 1 :]

    def ends(*steps):
        return np.array(list(itertools.product(steps, repeat=2))) @ unit[-3:-1]

    single = np.concatenate([0 * unit[:1], unit, -unit])
    throws = np.concatenate([by * unit[-1] + ends(-1, 0, 1) for by in range(-5, 6)])
    wide = np.concatenate([by * unit[-1] + ends(*range(-6, 7, 2)) for by in (-2, -1, 1, 2)])
    # the side that stays is another cell higher or lower, where little of it is seen
    side = unit[:-3].sum(0) - 2 * unit[-1]
    sides = np.concatenate([by * side + ends(*range(-6, 7, 2)) for by in (-1, 1)])
    near = ends(*range(-4, 5))
    kinds = single, near, ends(*range(-20, 21, 5)), throws, sides, wide
    theta, n_idle, known = np.rint(theta), 0, {}
    model = plain = Fault(model.n, model.mirrored)  # decisions fitted where the fault was elsewhere mislead
    for moves in itertools.cycle(kinds):
        while 1e-5 < norm < observed.enough(1000, UNLIKE) and not observed.late:
            one = model if moves is single else plain
            if one not in known:  # where theta stands
                known[one] = _derivatives(observed, theta, one)
            trials = _neighbours(observed, theta, one, known[one], moves)  # the most promising move's first
            norms = _norms_of(observed, trials)
            best = int(norms.argmin())
            found = *trials[best], float(norms[best])
            if found[-1] >= observed.least_share * norm and moves is near:
                found = _settled(observed, *trials[int(norms[: len(PRICES) * len(SHARES)].argmin())])
            if found[-1] >= observed.least_share * norm:
                break
            (theta, model, norm), n_idle, known = found, 0, {}
        n_idle += 1
        if n_idle == len(kinds) or observed.late:  # no kind helps
            return theta, model, norm


def _complete(observed, population, enough):
    """Faults of a short window fitted to the whole record, until one leaves `enough`: (norm, map)."""
    best = (math.inf,)
    for _, theta, model in population:
        last = math.inf
        for n_samples in (0, *LATER):  # first as it is: that may do
            if n_samples:
                theta, _ = _rescan(observed, theta, model, n_samples)
                observed.note(n_samples, model.sharp(theta))
            theta, finished, norm = _finish(observed, theta, model)
            stuck = abs(norm - last) < 0.01 * last  # the same map again: another start tells more
            last = norm
            if norm < best[0]:
                best = norm, finished.sharp(theta)
            if best[0] < enough or observed.late:
                return best
            if stuck:
                break
    return best


def find_fault(observed, guess, n_layers=(4, 3, 2), n_starts=8):
    """Maps of flat layers cut by one fault that may explain a gather: yields (map (70, 70), residuals' norm).

    One of each start, up to `n_starts` of each number of layers, until only noise and `FOUND` are left.
    """
    top, enough = top_velocity(observed), observed.enough(1000, FOUND)
    beneath = depths_beneath(observed, top, increasing=True)
    for seed, n in itertools.product(range(n_starts), n_layers):
        rng = np.random.default_rng([seed, n])
        drawn = [_random_fault(n - 1, guess, rng) for _ in range(200)]
        drawn.sort(key=lambda one: np.abs(one[1].smooth(one[0]) - guess).mean())
        population = [_map_fit(model, theta, guess) for theta, model in drawn[:6]]
        drawn = [_through(beneath, observed.sources, top, n - 1, guess, rng) for _ in range(N_DRAWN)]
        drawn = [(model.clip(theta), model) for theta, model in drawn]
        norms = observed.residuals([model.smooth(theta) for theta, model in drawn], WINDOWS[0][0]).norm(dim=1)
        population += [(0.0, *drawn[i]) for i in norms.argsort()[:12].tolist()]

        def breed(population, n=n, rng=rng):
            (theta, model), (other, other_model) = parents(population, rng)
            kind = rng.random()
            if kind < 0.4:
                theta[-3:], model = other[-3:], other_model
            elif kind < 0.5:
                theta, model = _turned(theta, model, int(rng.integers(*FAULT_ENDS)))
            elif kind < 0.6:
                theta[-1] *= -1
            elif kind < 0.75:
                theta[-3:] = _random_fault(n - 1, guess, rng)[0][-3:]
            if rng.random() < 0.7:
                j = rng.integers(len(theta))
                theta[j] += rng.normal(0, 2) * model.scale[j]
            return theta, model

        def target(n_samples):
            return observed.enough(n_samples, 0.02)

        population = evolve(observed, population, WINDOWS, breed, target)
        lean = population[0][2].mirrored
        others = [one for one in population[1:] if one[2].mirrored != lean]  # not the same fault twice
        best = _complete(observed, [population[0], *(others or population[1:])[:1]], enough)
        yield best[1], best[0]
        if best[0] < enough:
            break
