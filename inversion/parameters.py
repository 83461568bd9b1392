"""Velocity maps of few unknowns, as OpenFWI made them: flat or curved layers, and layers cut by one fault."""

import math

import numpy as np

from synthetic.layers import N_CELLS, SPLINE
from synthetic.soft_fault import FAULT_ENDS, N_FINE, THROW, slip_soft, undecided
from utils import V_MAX, V_MIN

SPACINGS = tuple(N_CELLS / n for n in range(3, 8))  # cells between the interfaces of Vel families
ROUNDING = 0.8  # a depth y begins the lower layer at cell floor(y + 0.8): measured on real CurveVel_A


def paint(velocities, depths):
    """Layers with sharp edges: velocities (K+1,), first cells of the lower layers (K, 70) -> (70, 70)."""
    layer = (np.arange(N_CELLS)[:, None, None] >= depths.T).sum(-1)
    return velocities[layer]


def shade(velocities, depths):
    """As `paint`, but depths may lie between cells, which mix 1/v² by area as waves do."""
    depths = np.maximum.accumulate(depths)
    below = np.clip(np.arange(1, N_CELLS + 1)[:, None, None] - depths.T, 0, 1)  # (Z, X, K)
    slowness = velocities**-2.0
    return (slowness[0] + below @ np.diff(slowness)) ** -0.5


def cells_of(depths):
    """Depths (K, 70) in cells, as the generator draws them -> first cells of the lower layers (K, 70)."""
    cells = np.floor(depths + ROUNDING)
    return np.clip(np.maximum.accumulate(cells), 0, N_CELLS).astype(int)


class Layers:
    """Layers about `spacing` cells thick: theta = (velocities (K+1), first controls (m), shifts (K-1, m)).

    A control is a depth in cells: a flat interface has one, a curved one the eight of its spline
    (`synthetic.layers.SPLINE`). Each further interface lies `spacing` cells below the one above, plus a shift
    within ±1 cell.
    """

    def __init__(self, n_interfaces, spacing, curved, increasing=True):
        self.n, self.spacing, self.increasing = n_interfaces, spacing, increasing
        self.basis = SPLINE if curved else np.ones((N_CELLS, 1))
        self.m = self.basis.shape[1]
        n_shifts = self.m * (self.n - 1)
        self.scale = np.concatenate(
            [[50.0], np.full(self.n, 200.0), np.full(self.m, 2.0), np.full(n_shifts, 0.5)]
        )
        # so weak that it only decides what the data leave open; the generator's shifts are uniform within ±1
        self.prior = np.concatenate([np.zeros(1 + self.n + self.m), np.full(n_shifts, 3e-6)])

    def controls(self, theta):
        """theta -> controls (K, m) of every interface, depths in cells."""
        controls = theta[self.n + 1 :].reshape(self.n, self.m).copy()
        controls[1:] += self.spacing
        return np.cumsum(controls, 0)

    def split(self, theta):
        """theta -> velocities (K+1,) m/s and depths (K, 70) in cells, not rounded."""
        return theta[: self.n + 1], self.controls(theta) @ self.basis.T

    def smooth(self, theta):
        """theta -> the map (70, 70) m/s for derivatives, which changes smoothly with depths."""
        velocities, depths = self.split(theta)
        return shade(velocities, depths + ROUNDING - 0.5)

    def cells(self, theta):
        """theta -> first cells of the lower layers (K, 70)."""
        return cells_of(self.split(theta)[1])

    def sharp(self, theta):
        """theta -> the map (70, 70) m/s of whole velocities and whole cells, as the generator makes it."""
        return paint(np.rint(theta[: self.n + 1]), self.cells(theta))

    def bounded(self, velocities):
        """Velocities brought into OpenFWI's range, and for version A made to increase with depth."""
        return np.clip(np.maximum.accumulate(velocities) if self.increasing else velocities, V_MIN, V_MAX)

    def clip(self, theta):
        """theta brought within the bounds of its unknowns."""
        theta, n = theta.copy(), self.n + 1
        theta[:n] = self.bounded(theta[:n])
        theta[n : n + self.m] = np.clip(theta[n : n + self.m], -2, 45)
        theta[n + self.m :] = np.clip(theta[n + self.m :], -1, 1)
        return theta

    def first(self, theta, n):
        """The part of theta that describes the first n interfaces."""
        return np.concatenate([theta[: n + 1], theta[self.n + 1 :][: n * self.m]])

    def deeper(self, theta, velocity, shift):
        """Add an interface below: (Layers with one more interface, theta)."""
        more = Layers(self.n + 1, self.spacing, self.m > 1, self.increasing)
        n = self.n + 1
        return more, np.concatenate([theta[:n], [velocity], theta[n:], np.broadcast_to(shift, self.m)])


class Fault:
    """Flat layers cut by FlatFault_A's fault: theta = (velocities (K+1), depths (K), start, end, throw).

    Depths are in cells; start and end along the border and the throw are in half cells, as in `slip_soft`.
    mirrored: the map is reversed left to right. flipped: (140, 140) before that, where rounding decides the
    other way.
    """

    def __init__(self, n_interfaces, mirrored, flipped=False):
        self.n, self.mirrored, self.flipped = n_interfaces, mirrored, flipped
        self.scale = np.concatenate([np.full(self.n + 1, 100.0), np.full(self.n, 2.0), [6.0, 6.0, 2.0]])

    def _unfaulted(self, velocities, depths):
        rows = np.arange(1, N_FINE + 1)[:, None]
        below = np.clip(rows - 2 * np.maximum.accumulate(depths), 0, 1)
        profile = velocities[0] + below @ np.diff(velocities)
        return np.repeat(profile[:, None], N_FINE, 1)

    def _map(self, velocities, depths, *fault):
        field = slip_soft(self._unfaulted(velocities, depths), velocities[0], *fault, self.flipped)
        return field[:, ::-1].copy() if self.mirrored else field  # torch takes no reversed views

    def smooth(self, theta):
        """theta -> the map (70, 70) m/s for derivatives, interpolated between whole throws."""
        n, low = self.n + 1, math.floor(theta[-1])
        some = theta[:n], theta[n:-3], *theta[-3:-1]
        share = theta[-1] - low
        field = self._map(*some, low)
        return field if share < 1e-6 else (1 - share) * field + share * self._map(*some, low + 1)

    def _whole(self, theta):
        whole, n = np.rint(theta), self.n + 1
        return whole[:n], whole[n:-3], *whole[-3:-1], int(whole[-1])

    def sharp(self, theta):
        """theta -> the map (70, 70) m/s of whole unknowns, as the generator makes it."""
        return self._map(*self._whole(theta))

    def flips(self, theta):
        """Masks (N, 140, 140) of half cells where rounding decides together: each may be flipped."""
        velocities, depths, *fault = self._whole(theta)
        return undecided(self._unfaulted(velocities, depths), velocities[0], *fault)

    def clip(self, theta):
        """theta brought within the bounds of its unknowns."""
        theta, n = theta.copy(), self.n + 1
        theta[:n] = np.clip(np.maximum.accumulate(theta[:n]), V_MIN, V_MAX)
        theta[n:-3] = np.clip(np.maximum.accumulate(theta[n:-3]), 4, 69)
        theta[-3:-1] = np.clip(theta[-3:-1], FAULT_ENDS[0], FAULT_ENDS[1] - 1)
        theta[-1] = np.copysign(np.clip(abs(theta[-1]), *THROW), theta[-1])
        return theta
