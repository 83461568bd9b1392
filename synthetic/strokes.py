"""Style_B's figures: strips, blobs and hatched columns along contours, dark strokes inside."""

import math

import numpy as np

from synthetic.layers import N_CELLS

Z, X = np.arange(N_CELLS, dtype=np.float64)[:, None], np.arange(N_CELLS, dtype=np.float64)


def _window(z0, x0, reach_z, reach_x):
    """Slices of the cells within reach of a point; None where there are none."""
    top, bottom = max(int(z0 - reach_z), 0), min(int(z0 + reach_z) + 2, N_CELLS)
    left, right = max(int(x0 - reach_x), 0), min(int(x0 + reach_x) + 2, N_CELLS)
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None


class Figure:
    """A figure that grows by contours; `crowd` (70, 70) is high where contours like to begin."""

    def __init__(self, rng, scale, crowd):
        self.rng, self.scale, self.crowd = rng, scale, crowd
        shape = N_CELLS, N_CELLS
        self.depth = np.full(shape, -9.0)  # cells from the outline, positive inside
        self.levels, self.columns, self.ghosts = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.pieces = []  # (z, x, half thickness, slope, half length) of strips and blobs
        self.column_share, self.stack_share = 0.45 * rng.beta(1, 2.5), 0.9 * rng.beta(1, 1.6)
        self.heading_spread, self.stretch = rng.uniform(0.1, 0.35), math.exp(rng.normal(0, 0.3))

    def add_contour(self):
        """Lay a chain of pieces from a random point on, or one faint ghost."""
        rng, scale = self.rng, self.scale
        z, x = 66 * rng.random(2), rng.uniform(-2, 72, 2)
        best = np.argmax(self.crowd[z.astype(int), np.clip(x, 0, N_CELLS - 1).astype(int)])
        z, x = z[best], x[best]
        is_steep = rng.random() < self.column_share
        heading, way = rng.normal(-0.08, self.heading_spread), rng.choice([-1, 1])
        is_stack = rng.random() < self.stack_share
        curve, thickness = rng.normal(0.08, 0.15), scale * rng.uniform(3.2, 5)
        level, n_pieces = rng.normal(1.12, 0.08), 1 + min(rng.geometric(0.4) - 1, 7)
        for _ in range(n_pieces):
            if is_steep:
                self._add_column(z, x)
                x, z = x + rng.normal(5, 2) * scale, z + rng.normal(0, 2)
                continue
            tail = (2 if is_stack else 4) * rng.standard_exponential() * (rng.random() < 0.7)
            length = scale * (3 + self.stretch * tail)
            slope = math.tan(np.clip(heading, -0.9, 0.9)) * 0.7
            bend = np.clip(curve, -0.3, 0.3) / (4 * length)
            half = thickness * math.exp(rng.normal(0, 0.15))
            if n_pieces == 1 and rng.random() < 0.3:
                return self._add_ghost(z, x)
            if length < 5:
                length = half * rng.uniform(0.9, 1.3)
            end = length if rng.random() < 0.6 else min(length, half)
            self._add_strip(z, x, length, half, end, slope, bend, level + rng.normal(0, 0.05))
            if is_stack:
                z, x = z + 1.6 * half, x + rng.normal(0, 2.5)
                continue
            step = (1.4 * length + 1) * way
            x, z = x + step * math.cos(heading), z + step * math.sin(heading)
            heading += curve + rng.normal(0, 0.2)
            is_steep = is_steep or abs(heading) > 1.1

    def _add_ghost(self, z0, x0):
        """A faint blob on the ground."""
        at = _window(z0, x0, 8, 8)
        dz = Z[at[0]] - z0
        dx = X[at[1]] - x0 + 0.3 * dz
        faint = self.rng.uniform(0.12, 0.4) * np.clip((4 - np.hypot(dz, dx)) / 1.5, 0, 1)
        self.ghosts[at] = np.maximum(self.ghosts[at], faint)

    def _add_strip(self, z0, x0, length, half, end, slope, bend, level):
        """A strip, blob or lens of half length and half thickness, `end` cells of it rounded."""
        rng = self.rng
        lean, has_seam = rng.normal(0.3, 0.15), rng.random() < 0.45
        self.pieces.append((z0, x0, half, slope, length))
        at = _window(z0, x0, half + abs(slope) * length + abs(bend) * length**2 + 6, length + 5)
        if at is None:
            return
        dz, dx = Z[at[0]] - z0, X[at[1]] - x0
        dz = dz - (slope + bend * dx) * dx
        over = np.maximum(np.abs(dx + lean * dz) - (length - end), 0) * (half / end)
        inside = half + 0.2 - np.sqrt(dz * dz + over * over)
        self._join(at, inside, level + 0.03 * dz.mean(), has_seam)

    def _add_column(self, z0, x0):
        """A column of strands with a tone and an end each, leaning to the right."""
        rng, scale = self.rng, self.scale
        length, half = scale * rng.uniform(3.5, 10), scale * rng.uniform(1.6, 3.0)
        lean = rng.uniform(0.1, 0.4)
        at = _window(z0, x0, length + 2, half + lean * length + 3)
        if at is None:
            return
        dz = Z[at[0]] - z0
        dx = X[at[1]] - x0 + lean * dz
        strand = np.floor(dx + rng.uniform(-0.15, 0.25) * dz).astype(int)
        tone = np.where(rng.random(64) < 0.3, -rng.uniform(0.05, 0.4, 64), rng.uniform(0, 0.12, 64))[strand]
        stagger = rng.normal(0, 1.2, 64)[strand]
        over = np.maximum(np.abs(dz + stagger) - (length - half), 0)
        inside = half + 1.5 * np.minimum(tone, 0) - np.sqrt(dx * dx + over * over)
        self._join(at, inside, rng.normal(1.13, 0.06), rng.random() < 0.6)
        self.columns[at][inside > 0] = tone[inside > 0]

    def _join(self, at, inside, level, has_seam):
        """Add a piece: `inside` is its depth in the window `at`; a seam keeps its outline visible."""
        depth, own = self.depth[at], inside > 0
        if has_seam:
            depth[own] = inside[own] + 0.6
        np.maximum(depth, inside, out=depth)
        self.levels[at][own] = level
        if self.rng.random() < 0.4:
            skirt = np.clip(inside + self.rng.uniform(0.8, 2.6), 0, 1) * self.rng.uniform(0.15, 0.4)
            np.maximum(self.ghosts[at], skirt, out=self.ghosts[at])


def _stroke(image, z0, x0, n, slope, values):
    """Change n rows of a thin slanting line from (z0, x0) on by `values`, one for each cell across."""
    z = np.arange(max(z0, 0), min(z0 + n, N_CELLS))
    x = np.round(x0 + slope * (z - z0)).astype(int)
    for k, value in enumerate(values):
        on_map = (x + k >= 0) & (x + k < N_CELLS)
        image[z[on_map], x[on_map] + k] += value


def draw_marks(rng, image, pieces):
    """Draw dark strokes like faults into a figure's pieces, some in the form of an A."""
    is_free = np.ones((N_CELLS, N_CELLS), bool)
    for z0, x0, half, slope, length in pieces[::-1]:
        row, column = min(max(int(z0), 0), N_CELLS - 1), min(max(int(x0), 0), N_CELLS - 1)
        if not is_free[row, column] or rng.random() < 0.45:
            continue
        is_free[max(row - 5, 0) : row + 6, max(column - 6, 0) : column + 7] = False
        is_letter = half > 3.2 and rng.random() < 0.4
        for _ in range(1 if is_letter else 1 + int(length * rng.random() / 4)):
            along = 0 if is_letter else rng.uniform(-0.8, 0.8) * length
            top, n = int(z0 + slope * along - half + 1), int(2 * half * rng.uniform(0.8, 1.1))
            lean, dark = rng.uniform(0.35, 0.6), rng.uniform(0.25, 0.6)
            line = (0.04, 0.08, -0.2 * dark, -dark, -0.15 * dark, 0.03)
            _stroke(image, top, x0 + along - 2, n, lean, line)
            if is_letter:
                _stroke(image, top + 1, x0 + along - 1, n - 1, -lean, (0.1, -0.4, -0.1))
                _stroke(image, top + n // 2, x0 + along - 2, n - n // 2, 0.2, (0.15, 0.2, 0.15))


def hatch_bottom(rng, image, profile):
    """Cross fine strokes into the lowest rows where `profile` (70,) is high: the grain of real maps."""
    limit = np.quantile(profile, 1 - rng.beta(1.5, 3.0))
    first = 65 + rng.integers(0, 4)
    row = np.arange(N_CELLS - first)[:, None]
    on = profile - 0.12 * row[::-1] > limit
    lines, x = rng.standard_normal((2, 2 * N_CELLS)), np.arange(N_CELLS) + 8
    shift = np.round(0.5 * row).astype(int)
    tone = lines[0][x + shift] + lines[1][x - shift]
    image[first:] = np.where(on, np.clip(0.72 + 0.22 * tone, 0.2, 1.2), image[first:])
