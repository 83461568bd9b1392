"""Scores of velocity maps: errors by family, SSIM, rank correlation, and tables of them."""

import math
from collections import defaultdict

import numpy as np
import torch

from utils import FAMILIES, V_MAX, V_MIN


def mae_of(vel, truth):
    """Mean absolute error of each of the maps (B, 1, Z, X) m/s: (B,) float64 m/s."""
    return (vel.cpu().double() - truth.cpu().double()).abs().mean((1, 2, 3))


class Score:
    """Mean absolute error by family, summed over samples in float64."""

    def __init__(self):
        self.sums = torch.zeros(len(FAMILIES) + 1, 2, dtype=torch.float64)  # on the CPU: MPS has no float64

    def add(self, prediction, target, family):
        """Add maps (B, 1, Z, X) in m/s; family (B,): indices of FAMILIES, -1 = unknown."""
        error = (prediction.cpu().double() - target.cpu().double()).abs().mean((1, 2, 3))
        index = family.cpu().long() % (len(FAMILIES) + 1)
        self.sums.index_add_(0, index, torch.stack([error, torch.ones_like(error)], 1))

    def gather(self, process):
        """Add up the sums of all processes; returns this score."""
        if process.world > 1:
            where = process.device if process.device.type == "cuda" else "cpu"  # NCCL adds on cards alone
            self.sums = process.sum(self.sums.to(where)).cpu()
        return self

    def result(self):
        """{family: (MAE in m/s, number of samples)} of the families added, and "all" for all samples."""
        rows = {
            name: (total / n, int(n))
            for name, (total, n) in zip((*FAMILIES, "unknown"), self.sums.tolist(), strict=True)
            if n
        }
        total, n = self.sums.sum(0).tolist()
        return {**rows, "all": (total / n if n else math.nan, int(n))}


def ssim(prediction, target, size=11, sigma=1.5):
    """Structural similarity of maps (B, 1, Z, X) in m/s as in OpenFWI's paper: (B,), 1 for equal maps.

    It compares velocities mapped to [0, 1] in Gaussian windows of `size` cells, with zeros beyond the edges.
    Source: Wang et al. (2004), "Image quality assessment".
    """
    a, b = ((vel.double() - V_MIN) / (V_MAX - V_MIN) for vel in (prediction, target))
    side = torch.exp(-((torch.arange(size, device=a.device) - size // 2) ** 2) / (2 * sigma**2)).double()
    window = torch.outer(side, side)[None, None] / side.sum() ** 2
    maps = torch.cat([a, b, a * a, b * b, a * b], 1)
    means = torch.nn.functional.conv2d(maps, window.expand(5, 1, -1, -1), padding=size // 2, groups=5)
    mean_a, mean_b, square_a, square_b, product = means.split(1, 1)
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_a * mean_b + c1) * (2 * (product - mean_a * mean_b) + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (square_a - mean_a**2 + square_b - mean_b**2 + c2)
    return (numerator / denominator).mean((1, 2, 3))


def score_table(result, reference=None, reference_name="mean map"):
    """A score as a table, optionally next to a reference score: one string."""
    lines = [f"{'family':<14}{'samples':>8}{'MAE m/s':>10}"]
    if reference:
        lines[0] += f"{reference_name:>12}{'ratio':>8}"
    for name, (mae, n) in result.items():
        line = f"{name:<14}{n:>8}{mae:>10.2f}"
        if reference:
            line += f"{reference[name][0]:>12.2f}{mae / (reference[name][0] or math.nan):>8.3f}"
        lines.append(line)
    return "\n".join(lines)


def by_family(errors, families):
    """Errors (N,) -> {family: (mean error, number of samples)}, in OpenFWI's order, and "all".

    families: a name or None for each sample; None becomes "unknown".
    """
    errors, groups = np.asarray(errors), defaultdict(list)
    for i, family in enumerate(families):
        groups[family or "unknown"].append(i)
    groups = {name: groups[name] for name in (*FAMILIES, "unknown") if name in groups}
    groups["all"] = list(range(len(errors)))
    return {name: (float(errors[mine].mean()), len(mine)) for name, mine in groups.items()}


def error_table(rows, families):
    """A table of mean errors in m/s: a row for each of {name: errors (N,)}, a column for each family."""
    rows = {name: by_family(errors, families) for name, errors in rows.items()}
    found = list(next(iter(rows.values())))
    lines = [f"{'MAE m/s':<24}" + "".join(f"{name:>14}" for name in found)]
    lines += [f"{name:<24}" + "".join(f"{row[f][0]:>14.2f}" for f in found) for name, row in rows.items()]
    return "\n".join(lines)


def spearman(a, b):
    """Rank correlation of two sequences (N,); NaN if one of them is constant."""
    ranks = []
    for values in (a, b):
        _, group, counts = torch.tensor(list(values)).double().unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[group].double())  # equal values share a rank
    a, b = (r - r.mean() for r in ranks)
    return float((a @ b) / (a.norm() * b.norm())) if len(a) > 1 else math.nan
