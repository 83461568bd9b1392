"""Curved layers settled to the cell: simulated annealing of the splines' controls on linearised residuals."""

import numpy as np

from inversion.gauss_newton import changes
from inversion.parameters import cells_of, paint
from synthetic.layers import N_CELLS

N_PROPOSALS = 200_000  # in each round
HOT, COLD = 0.3, 1e-5  # first and last temperature, times the squared norm at the start of a round
HOPELESS_NORM = 0.1  # from a residual norm above this beyond the noise, annealing never found the truth
MAX_MOVE = 3  # cells by which a depth may move in a round: the residuals are linear only nearby


class _Quadratic:
    """‖r + Σ s_i rows_i‖² as a function of moves s of the depths, with the velocities that suit s best."""

    def __init__(self, rows, residual, n_moves):
        gram = (rows @ rows.T).cpu().double().numpy()
        slope = (rows @ residual).cpu().double().numpy()
        some, rest = slice(n_moves), slice(n_moves, None)
        ridge = 1e-9 * np.diag(gram[rest, rest].diagonal())
        self.by_velocity = np.linalg.solve(gram[rest, rest] + ridge, gram[rest, some])
        self.shares = np.linalg.solve(gram[rest, rest] + ridge, slope[rest])
        self.gram = gram[some, some] - gram[some, rest] @ self.by_velocity
        self.slope = slope[some] - gram[some, rest] @ self.shares
        self.least = float(residual @ residual) - slope[rest] @ self.shares

    def value(self, s):
        return self.least + s @ self.gram @ s + 2 * self.slope @ s

    def velocity_shares(self, s):
        return -self.shares - self.by_velocity @ s


def _directions(basis):
    """Changes of controls (n, m) that move depths by up to a cell: near a column, all alike, or tilted."""
    x = np.arange(N_CELLS)
    bumps = [np.exp(-0.5 * ((x - centre) / 5) ** 2) for centre in range(0, N_CELLS, 5)]
    shapes = np.stack([*bumps, *bumps, *[np.ones(N_CELLS)] * 3, x / 34.5 - 1], 1)
    controls = np.linalg.lstsq(basis, shapes, rcond=None)[0]
    return (controls / np.abs(basis @ controls).max(0)).T


def _anneal(observed, quadratic, layers, controls, depths, rng):
    """Simulated annealing: the best controls (K, m), and how they move the depths (K, 70), flattened.

    Source: Kirkpatrick, Gelatt & Vecchi (1983).
    """
    directions = _directions(layers.basis)
    sizes = np.exp(rng.normal(-2.2, 1.0, N_PROPOSALS)) * rng.choice([-1, 1], N_PROPOSALS)
    first = rng.integers(0, layers.n, N_PROPOSALS)
    which = rng.integers(0, len(directions), N_PROPOSALS)
    together, chance = rng.random(N_PROPOSALS) < 0.4, np.log(rng.random(N_PROPOSALS))
    temperatures = np.geomspace(HOT, COLD, N_PROPOSALS)
    cells = cells_of(controls @ layers.basis.T)
    moved = (cells - depths).ravel().astype(float)
    slope = quadratic.slope + quadratic.gram @ moved
    value = quadratic.value(moved)
    temperatures *= max(quadratic.least, 1e-30)
    best = value, controls, moved.copy()
    for i in range(N_PROPOSALS):
        if observed.out_of_time:
            break
        k = first[i]
        trial = controls.copy()
        trial[k : None if together[i] else k + 1] += sizes[i] * directions[which[i]]
        if np.abs(np.diff(trial, axis=0) - layers.spacing).max(initial=0) > 1:
            continue
        trial_cells = cells_of(trial @ layers.basis.T)
        if np.abs(trial_cells - depths).max() > MAX_MOVE:
            continue
        change = (trial_cells - cells).ravel()
        number = change.nonzero()[0]
        step = change[number].astype(float)
        gain = 2 * step @ slope[number] + step @ quadratic.gram[np.ix_(number, number)] @ step
        if gain <= 0 or chance[i] < -gain / temperatures[i]:
            controls, cells, value = trial, trial_cells, value + gain
            moved[number] += step
            slope += quadratic.gram[:, number] @ step
            if value < best[0]:
                best = value, controls, moved.copy()
    return best[1:]


def anneal_curves(observed, layers, theta, n_rounds=20, seed=0):
    """Settle curved layers to the cell: (velocities (K+1,) m/s, first cells (K, 70), residual norm).

    Each round linearises the residuals in every velocity and in every column of every interface. On the
    quadratic form that results, the controls of all splines are annealed, with depths rounded as the
    generator rounds them. Eight controls decide about 70 cells, so the well-illuminated columns settle the
    others. A map that is far from explaining the gather is returned unchanged, to leave the time to another
    start.
    """
    rng = np.random.default_rng(seed)
    velocities, controls = np.rint(theta[: layers.n + 1]), layers.controls(theta)
    depths = cells_of(controls @ layers.basis.T)
    norm = float(observed.residuals([paint(velocities, depths)], 1000)[0].norm())
    columns = [[x] for x in range(N_CELLS)]
    quadratic, n_idle = None, 0
    for _ in range(n_rounds if norm < observed.noise_threshold(1000, HOPELESS_NORM) else 0):
        observed.extend_turn(norm)
        if norm < 1e-6 or n_idle == 3 or observed.out_of_time:
            break
        if quadratic is None:
            rows, residual, step = changes(observed, velocities, depths, columns)
            quadratic = _Quadratic(rows, residual, depths.size)
        found, moved = _anneal(observed, quadratic, layers, controls, depths, rng)
        shares = quadratic.velocity_shares(moved)
        cells = depths + moved.reshape(depths.shape).astype(int)
        tried = [np.rint(layers.bounded(velocities + share * step * shares)) for share in (1.0, 0.5, 0.0)]
        norms = observed.residuals([paint(v, cells) for v in tried], 1000).norm(dim=1)
        best = int(norms.argmin())
        if observed.improves(float(norms[best]), norm):
            velocities, depths, controls, norm = tried[best], cells, found, float(norms[best])
            quadratic, n_idle = None, 0
        else:
            n_idle += 1
    return velocities, depths, norm
