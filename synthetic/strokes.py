"""Style_B's figures: strips, blobs and hatched columns along contours, dark strokes inside, grain below."""

import math

import numpy as np

from synthetic.layers import N_CELLS

Z, X = np.arange(N_CELLS, dtype=np.float64)[:, None], np.arange(N_CELLS, dtype=np.float64)
N_STRANDS = 64  # more than the widest column has


def window(z, x, reach_z, reach_x):
    """Slices of the cells within reach of a point, or None if there are none."""
    top, bottom = max(int(z - reach_z), 0), min(int(z + reach_z) + 2, N_CELLS)
    left, right = max(int(x - reach_x), 0), min(int(x + reach_x) + 2, N_CELLS)
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None


class Figure:
    """A figure that grows by contours; `crowd` (70, 70) is high where contours like to begin."""

    def __init__(self, rng, crowd):
        self.rng, self.crowd = rng, crowd
        shape = N_CELLS, N_CELLS
        self.depth = np.full(shape, -9.0)  # cells from the outline, positive inside
        self.levels = np.zeros(shape)  # grey of the piece at a cell
        self.strands = np.zeros(shape)  # what the strands of hatched columns add to it
        self.ghosts = np.zeros(shape)  # faint shapes on the ground
        self.pieces = []  # (z, x, half thickness, slope, half length) of strips and blobs
        self.scale = math.exp(rng.normal(0, 0.16))
        self.column_share, self.stack_share = 0.43 * rng.beta(1, 2.5), 0.9 * rng.beta(1, 1.6)
        self.heading_spread, self.stretch = rng.uniform(0.1, 0.26), math.exp(rng.normal(0, 0.3))

    def add_contour(self):
        """Add pieces from a random point on, in a row, in a stack or as columns; or one faint ghost."""
        rng, scale = self.rng, self.scale
        z, x = (N_CELLS - 4) * rng.random(2), N_CELLS * rng.random(2)
        best = np.argmax(self.crowd[z.astype(int), x.astype(int)])
        z, x = z[best], x[best]
        is_steep, is_stack = rng.random() < self.column_share, rng.random() < self.stack_share
        heading, curve = rng.normal(-0.08, self.heading_spread), rng.normal(0.08, 0.15)
        way, thickness, level = rng.choice([-1, 1]), scale * rng.uniform(3.1, 4.2), rng.normal(1.12, 0.11)
        n_pieces = min(rng.geometric(0.38), 8)
        if n_pieces == 1 and not is_steep and rng.random() < 0.4:
            self._add_ghost(z, x)
            return
        for _ in range(n_pieces):
            if is_steep:
                self._add_column(z, x, scale * rng.uniform(3.5, 9.3), scale * rng.uniform(1.45, 2.85))
                z, x = z + rng.normal(0, 2), x + rng.normal(5, 2) * scale
                continue
            tail = self.stretch * (2 if is_stack else 4) * (rng.random() < 0.7)
            length = scale * (3 + tail * rng.standard_exponential())
            half = thickness * math.exp(rng.normal(0, 0.15))
            slope, bend = 0.54 * math.tan(heading), min(max(curve, -0.3), 0.3) / (4 * length)
            if length < 5:
                length = half * rng.uniform(0.9, 1.3)
            self._add_strip(z, x, length, half, slope, bend, level + rng.normal(0, 0.045))
            if is_stack:
                z, x = z + 1.6 * half, x + rng.normal(0, 2.5)
                continue
            step = (1.4 * length + 1) * way
            z, x = z + step * math.sin(heading), x + step * math.cos(heading)
            heading += curve + rng.normal(0, 0.2)
            is_steep, heading = abs(heading) > 1.1, min(max(heading, -0.9), 0.9)

    def _add_ghost(self, z, x):
        """A faint blob on the ground."""
        at = window(z, x, 8, 8)
        dz = Z[at[0]] - z
        inside = np.clip((4 - np.hypot(dz, X[at[1]] - x + 0.3 * dz)) / 1.5, 0, 1)
        np.maximum(self.ghosts[at], self.rng.uniform(0.12, 0.4) * inside, out=self.ghosts[at])

    def _add_strip(self, z, x, length, half, slope, bend, level):
        """A strip, blob or lens of half length and half thickness that leans to the right."""
        rng = self.rng
        end = length if rng.random() < 0.6 else min(length, half)  # number of cells that are rounded
        lean, has_seam = rng.normal(0.31, 0.15), rng.random() < 0.4
        at = window(z, x, half + abs(slope) * length + abs(bend) * length**2 + 6, length + 5)
        if at is None:
            return
        dz, dx = Z[at[0]] - z, X[at[1]] - x
        dz = dz - (slope + bend * dx) * dx
        over = np.maximum(np.abs(dx + lean * dz) - (length - end), 0) * (half / end)
        self._join(at, half + 0.2 - np.sqrt(dz * dz + over * over), level, has_seam)
        self.pieces.append((z, x, half, slope, length))

    def _add_column(self, z, x, length, half):
        """A column (half length, half width) leaning to the right; its strands differ in tone and end."""
        rng = self.rng
        lean, lean_of_strands = rng.uniform(0, 0.3), rng.uniform(-0.15, 0.25)
        is_dark = rng.random(N_STRANDS) < 0.2
        tones = np.where(is_dark, -rng.uniform(0.05, 0.27, N_STRANDS), rng.uniform(0, 0.15, N_STRANDS))
        stagger = rng.normal(0, 1.2, N_STRANDS)
        level, has_seam = rng.normal(1.18, 0.06), rng.random() < 0.4
        at = window(z, x, length + 2, half + lean * length + 3)
        if at is None:
            return
        dz = Z[at[0]] - z
        dx = X[at[1]] - x + lean * dz
        strand = np.floor((dx + lean_of_strands * dz) / 1.6).astype(int)
        tone = tones[strand]
        over = np.maximum(np.abs(dz + stagger[strand]) - (length - half), 0)
        inside = half + 1.5 * np.minimum(tone, 0) - np.sqrt(dx * dx + over * over)
        self._join(at, inside, level, has_seam)
        self.strands[at][inside > 0] = tone[inside > 0]

    def _join(self, at, inside, level, has_seam):
        """Add a piece: `inside` is its depth in the window `at`; a seam keeps its outline visible."""
        rng, own = self.rng, inside > 0
        if has_seam:
            self.depth[at][own] = inside[own] + rng.uniform(-0.23, 0.26)
        np.maximum(self.depth[at], inside, out=self.depth[at])
        self.levels[at][own] = level
        if rng.random() < 0.29:  # a faint skirt on the ground
            skirt = np.clip(1.2 * (inside + rng.uniform(0.5, 3)), 0, 1) * rng.uniform(0.1, 0.48)
            np.maximum(self.ghosts[at], skirt, out=self.ghosts[at])


def _draw_line(image, z, x, n_rows, slope, values):
    """Change n rows of a thin slanting line from (z, x) on by `values`, one for each cell across."""
    rows = np.arange(max(z, 0), min(z + n_rows, N_CELLS))
    columns = np.rint(x + slope * (rows - z)).astype(int)
    for k, value in enumerate(values):
        on_map = (columns + k >= 0) & (columns + k < N_CELLS)
        image[rows[on_map], columns[on_map] + k] += value


def _complete_letter(image, z, x, n_rows, lean):
    """Turn a dark stroke into an A: a left leg, a darker lower half, a bright foot."""
    _draw_line(image, z + 1, x - 1, n_rows - 1, -lean, (0.1, -0.4, -0.1))
    rows = slice(max(z + n_rows // 2, 0), max(z + n_rows - 1, 0))
    columns = slice(max(int(x) - 6, 0), max(int(x) + 8, 0))
    image[rows, columns] -= 0.14 * (np.abs(X[columns] - x - 0.5) < lean * (Z[rows] - z) - 0.5)
    _draw_line(image, z + n_rows - 1, x - 3, 1, 0, (0.2,) * 6)


def draw_strokes(rng, image, pieces):
    """Draw dark strokes like faults into a figure's pieces, many of them in the form of an A."""
    is_free = np.ones((N_CELLS, N_CELLS), bool)
    for z, x, half, slope, length in pieces[::-1]:
        row, column = min(max(int(z), 0), N_CELLS - 1), min(max(int(x), 0), N_CELLS - 1)
        if not is_free[row, column] or rng.random() < 0.55:
            continue
        is_free[max(row - 5, 0) : row + 6, max(column - 6, 0) : column + 7] = False
        is_letter = half > 3.2 and rng.random() < 0.9
        for _ in range(1 if is_letter else 1 + int(0.2 * length * rng.random())):
            along = 0 if is_letter else rng.uniform(-0.8, 0.8) * length
            top, n_rows = int(z + slope * along - half + 1), int(2 * half * rng.uniform(0.8, 1.1))
            lean, dark = rng.uniform(0.35, 0.6), rng.uniform(0.22, 0.55)
            line = (0.06, 0.17, -0.2 * dark, -dark, -0.06 * dark, 0.03)
            _draw_line(image, top, x + along - 2, n_rows, lean, line)
            if is_letter:
                _complete_letter(image, top, x, n_rows, lean)


def hatch_bottom(rng, image, profile):
    """Cross fine strokes into the lowest rows where `profile` (70,) is high: the grain of real maps."""
    first = rng.integers(64, 68)
    down = np.arange(N_CELLS - first)[:, None]
    is_hatched = profile - 0.11 * down[::-1] > np.quantile(profile, 1 - rng.beta(1.7, 2.6))
    lines, column = rng.standard_normal((2, N_CELLS + 8)), np.arange(N_CELLS) + 4
    tone = 0.75 + 0.25 * (lines[0][column + (down + 1) // 2] + lines[1][column - down // 2])
    weight = is_hatched * np.minimum(0.42 * (down + 1), 1)
    image[first:] += weight * (np.clip(tone, 0.15, 1.35) - image[first:])
