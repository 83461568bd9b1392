"""Post-processing: velocity maps in, velocity maps out.

Everything here works on maps (B, 1, Z, X) in m/s, and needs neither gathers nor networks. `--post` takes the
names of `STEPS`. Smoothing makes a good prediction worse: fit on validation data first (`--fit`), and let
`--post=auto` use the steps that helped there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from report.scores import mae_of
from system.files import load_json
from utils import FAMILIES, V_MAX, V_MIN

# ---------------------------------------------------------------- several maps into one


def fuse(maps, weights=None, how="mean"):
    """Join K maps of each sample, (K, B, 1, Z, X) -> (B, 1, Z, X), by their mean, median or adaptively.

    weights: K numbers, equal if None. The median is weighted: values up to it have half of the weight; where
    the weight splits evenly between two values, it is their mean.
    """
    w = torch.tensor(weights or [1.0] * len(maps), dtype=torch.float64)
    w = (w / w.sum()).to(maps).view(-1, 1, 1, 1, 1)
    if how == "adaptive":
        return adaptive_fusion(maps, w)
    if how == "mean":
        return (w * maps).sum(0)
    values, order = maps.sort(0)
    share = w.expand_as(maps).gather(0, order).cumsum(0)
    low, high = (
        (share < half).sum(0, keepdim=True).clamp(max=len(maps) - 1) for half in (0.5 - 1e-6, 0.5 + 1e-6)
    )
    return ((values.gather(0, low) + values.gather(0, high)) / 2)[0]


def adaptive_fusion(maps, weights=1.0, temperature=25.0, size=5):
    """Join candidates (K, B, 1, Z, X) by local confidence -> (B, 1, Z, X).

    A candidate counts more where it agrees with the median of all: its weight is a softmax of the negative
    mean absolute deviation in a window of `size` cells, divided by `temperature` m/s.
    """
    deviation = (maps - maps.median(0, keepdim=True).values).abs()
    deviation = F.avg_pool2d(F.pad(deviation.flatten(0, 1), (size // 2,) * 4, mode="replicate"), size, 1)
    attention = weights * torch.softmax(-deviation.view_as(maps) / temperature, 0)
    return (attention * maps).sum(0) / attention.sum(0)


def fit_weights(maps, truth, n_steps=400):
    """Weights of K predictions that minimise the mean absolute error: K numbers >= 0 that sum to 1.

    maps: (K, B, 1, Z, X); truth: (B, 1, Z, X) m/s. Exponentiated gradient descent (Kivinen & Warmuth, 1997)
    starts from equal weights and keeps to the simplex; the best weights on the way are returned.
    """
    some = slice(None, None, max(1, truth.numel() // 500_000))  # half a million cells are enough
    p, t = maps.flatten(1)[:, some].double(), truth.flatten()[some].double()
    logits = torch.zeros(len(p), dtype=torch.float64)
    best = (math.inf, None)
    for step in range(n_steps):
        w = logits.softmax(0)
        error = w @ p - t
        best = min(best, (error.abs().mean().item(), w.tolist()))
        slope = p @ error.sign() / len(t)
        slope = slope - w @ slope
        logits = logits - slope / slope.abs().max().clamp(min=1e-9) / math.sqrt(step + 1)
    return best[1]


# ---------------------------------------------------------------- corrections of any map


def ensemble_simulation(vel, n=8, jitter=0.01, shift=1):
    """Mean of `n` disturbed copies of each map, as if several networks had predicted it.

    Each copy is moved by up to `shift` cells and multiplied by a smooth random field of strength `jitter`.
    The fields come in mirrored pairs, so that a mirrored map gives the mirrored result.
    """
    generator = torch.Generator().manual_seed(0)
    fields = F.interpolate(torch.randn(n // 2, 1, 8, 8, generator=generator), vel.shape[-2:], mode="bicubic")
    total = torch.zeros_like(vel)
    padded = F.pad(vel, (shift,) * 4, mode="replicate")
    nz, nx = vel.shape[-2:]
    for k, field in enumerate(fields.to(vel)):
        dz, dx = ((k % 3) - 1) * shift, (k // 3 % 2) * shift
        for sign, change in ((1, field), (-1, field.flip(-1))):
            z, x = shift + dz, shift + sign * dx
            total += padded[..., z : z + nz, x : x + nx] * (1 + jitter * change)
    return total / (2 * len(fields))


def fused_candidates(vel):
    """`adaptive_fusion` of each map with its smoothed and its median-filtered version."""
    padded = F.pad(vel, (1,) * 4, mode="replicate")
    median = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).median(4).values
    return adaptive_fusion(torch.stack([vel, gaussian(vel, 1.0), median]))


N_BANDS, N_KNOTS = 7, 9  # bands of depth; knots of predicted velocity in each


def fit_statistics(vel, truth):
    """Average errors of predictions (N, 1, Z, X), given the truth: a dictionary for JSON.

    `bias`: the median of truth − prediction in bands of depth, by predicted velocity (`knots`, at its
    quantiles); `low`, `high`: the range of 99.8 % of the true velocities in each row.
    """
    knots, bias = [], []
    bands = zip(vel.tensor_split(N_BANDS, 2), truth.tensor_split(N_BANDS, 2), strict=True)
    for p, t in ((p.flatten().numpy(), t.flatten().numpy()) for p, t in bands):
        edges = np.quantile(p, np.linspace(0, 1, N_KNOTS + 1))
        inside = np.clip(np.searchsorted(edges, p, "right") - 1, 0, N_KNOTS - 1)
        cells = [inside == k for k in range(N_KNOTS)]
        knots.append([float(np.median(p[c])) if c.any() else float(edges[k]) for k, c in enumerate(cells)])
        bias.append([float(np.median((t - p)[c])) if c.any() else 0.0 for c in cells])
    rows = truth[:, 0].movedim(1, 0).flatten(1).numpy()
    low, high = np.quantile(rows, (0.001, 0.999), axis=1)
    return {"knots": knots, "bias": bias, "low": low.tolist(), "high": high.tolist()}


def statistical_correction(vel, statistics):
    """Add the bias of `fit_statistics`, linear between knots, and clamp to the range of true velocities."""
    parts = []
    for part, knots, bias in zip(
        vel.tensor_split(N_BANDS, 2), *map(statistics.get, ("knots", "bias")), strict=True
    ):
        values = part.cpu().numpy()
        order = np.argsort(knots)
        parts.append(
            torch.from_numpy(values + np.interp(values, np.array(knots)[order], np.array(bias)[order]))
        )
    low, high = (torch.tensor(statistics[name], dtype=torch.float64)[:, None] for name in ("low", "high"))
    return torch.cat(parts, 2).clamp(low, high).to(vel)


def frequency_filter(vel, cutoff=0.5):
    """Gaussian low-pass filter with mirrored edges; at `cutoff` × the Nyquist frequency half is left."""
    nz, nx = vel.shape[-2:]
    whole = torch.cat([vel, vel.flip(2)], 2)
    whole = torch.cat([whole, whole.flip(3)], 3)  # periodic, without a jump at the edges
    kz, kx = torch.fft.fftfreq(2 * nz) * 2, torch.fft.rfftfreq(2 * nx) * 2
    gain = torch.exp2(-(kz[:, None] ** 2 + kx**2) / cutoff**2).to(vel)
    return torch.fft.irfft2(torch.fft.rfft2(whole) * gain, s=whole.shape[-2:])[..., :nz, :nx]


def gaussian(vel, sigma=1.0):
    """Gaussian smoothing with a standard deviation of `sigma` cells; edges are repeated."""
    half = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-half, half + 1).to(vel) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    vel = F.conv2d(F.pad(vel, (0, 0, half, half), mode="replicate"), kernel.view(1, 1, -1, 1))
    return F.conv2d(F.pad(vel, (half, half, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))


def bilateral(vel, sigma=1.5, sigma_vel=100.0, size=5):
    """Smooth but keep edges: weights fall with distance and with velocity difference.

    sigma: cells; sigma_vel: m/s. Source: Tomasi & Manduchi (1998).
    """
    half = size // 2
    padded = F.pad(vel, (half,) * 4, mode="replicate")
    nz, nx = vel.shape[-2:]
    total, weight = torch.zeros_like(vel), torch.zeros_like(vel)
    for z in range(size):
        for x in range(size):
            near = padded[..., z : z + nz, x : x + nx]
            distance = ((z - half) ** 2 + (x - half) ** 2) / (2 * sigma**2)
            w = torch.exp(-distance - (near - vel) ** 2 / (2 * sigma_vel**2))
            total, weight = total + w * near, weight + w
    return total / weight


# ---------------------------------------------------------------- corrections of layered maps


def flat_rows(vel):
    """Give each row its median velocity: for maps known to be flat (`waves.misfit.is_flat`)."""
    return vel.median(3, keepdim=True).values.expand_as(vel).clone()


def snap(vel, width=40.0, share=0.7):
    """Give each cell the nearest of the map's own few velocities.

    These are the peaks of the map's histogram, smoothed over `width` m/s, each replaced by the median of its
    cells. A map with less than `share` of its cells within `width` of a peak is not layered and stays as it
    is.
    """
    return torch.stack([_snap_one(v, width, share) for v in vel])


def _snap_one(vel, width, share):
    values = vel.flatten().cpu().double().numpy()
    start = math.floor(values.min() - 4 * width)
    counts = np.bincount((values - start).astype(int), minlength=int(values.max() - start + 4 * width) + 1)
    reach = np.arange(-int(3 * width), int(3 * width) + 1)
    density = np.convolve(counts, np.exp(-0.5 * (reach / (width / 2)) ** 2), "same")
    is_peak = (density[1:-1] >= density[:-2]) & (density[1:-1] > density[2:])
    peaks = np.flatnonzero(is_peak) + 1
    peaks = peaks[density[peaks] > 0.01 * len(values)] + start + 0.5
    if not len(peaks):
        return vel
    nearest = np.abs(values[:, None] - peaks).argmin(1)
    close = np.abs(values - peaks[nearest]) <= width
    if close.mean() < share:
        return vel
    levels = [np.median(values[close & (nearest == k)]) if (close & (nearest == k)).any() else peaks[k]
              for k in range(len(peaks))]  # fmt: skip
    return torch.from_numpy(np.array(levels)[nearest]).to(vel).view_as(vel)


# ---------------------------------------------------------------- the steps of --post

FLAT = frozenset(("FlatVel_A", "FlatVel_B"))
LAYERED = frozenset(FAMILIES) - {"Style_A", "Style_B"}


@dataclass(frozen=True)
class Step:
    """A post-processing step; only `change`, (B, 1, Z, X) -> (B, 1, Z, X) m/s, is required."""

    change: Callable  # called with (vel), or with (vel, statistics) if `is_fitted`
    families: frozenset = frozenset((*FAMILIES, None))  # whose maps are changed; None = not recognised
    is_fitted: bool = False  # whether it needs the statistics that --fit writes


STEPS = {  # name in --post: the step
    "ensemble_simulation": Step(ensemble_simulation),
    "adaptive_fusion": Step(fused_candidates),
    "statistical_correction": Step(statistical_correction, is_fitted=True),
    "frequency_filter": Step(frequency_filter),
    "gaussian": Step(gaussian),
    "bilateral": Step(bilateral),
    "flat_rows": Step(flat_rows, FLAT),
    "snap": Step(snap, LAYERED | {None}),
    "round": Step(torch.round),
    "clip": Step(partial(torch.clamp, min=V_MIN, max=V_MAX)),
}
FITTED = tuple(name for name, step in STEPS.items() if step.is_fitted)


def run_step(name, vel, families, statistics=None):
    """Apply a step to maps (B, 1, Z, X) m/s; families: the recognised family of each map, or None."""
    step = STEPS[name]
    changed = step.change(vel, statistics) if step.is_fitted else step.change(vel)
    applies = torch.tensor([family in step.families for family in families], device=vel.device)
    return torch.where(applies.view(-1, 1, 1, 1), changed, vel)


def run_steps(names, vel, families, statistics=None):
    """The maps after each step, [(B, 1, Z, X), ...], the last ones clamped to OpenFWI's velocities."""
    stages = []
    for name in names:
        vel = run_step(name, vel, families, statistics)
        stages.append(vel)
    return [*stages[:-1], stages[-1].clamp(V_MIN, V_MAX)] if stages else []


def check_steps(names, is_fitted=True):
    """Raise ValueError for an unknown step, and for one that needs statistics if none are fitted."""
    for name in names:
        if name not in STEPS:
            all_names = ", ".join(STEPS)
            raise ValueError(f"--post={name}: expected some of {all_names}, divided by commas, or auto")
        if name in FITTED and not is_fitted:
            raise ValueError(f"--post={name} needs statistics: fit by --fit=FILE, give it by --use=FILE")


def helps(before, after):
    """Whether errors (N,) fell by more than chance: by twice the standard error of their mean decrease."""
    gain = before - after
    return len(gain) > 1 and gain.mean() > 2 * gain.std() / math.sqrt(len(gain)) and gain.mean() > 0


def try_steps(vel, truth, families):
    """Try every step alone on predictions (N, 1, Z, X) m/s, and find the chain of steps that help.

    Returns ({step: errors (N,)}, names of the chain's steps, errors of the chain). The chain grows by the
    step that helps most, while one does. Statistics are fitted on one half of the maps and judged on the
    other.
    """
    half = torch.arange(len(vel)) % 2 == 0

    def run(name, maps):
        if name not in FITTED:
            return run_step(name, maps, families)
        corrected = maps.clone()
        for part in (half, ~half):
            corrected[part] = statistical_correction(maps[part], fit_statistics(maps[~part], truth[~part]))
        return corrected

    names = [name for name in STEPS if name not in FITTED or len(vel) > 1]
    chain, best, best_error, alone = [], vel, mae_of(vel, truth), None
    while True:
        tried = {name: run(name, best) for name in names if name not in chain}
        errors = {name: mae_of(maps, truth) for name, maps in tried.items()}
        alone = alone or errors
        helpful = [name for name, error in errors.items() if helps(best_error, error)]
        if not helpful:
            return alone, chain, best_error
        chain.append(min(helpful, key=lambda name: errors[name].mean()))
        best, best_error = tried[chain[-1]], errors[chain[-1]]


def load_fit(path, n_members):
    """Read a file that `--fit` wrote. Raises ValueError for other files and other numbers of networks."""
    try:
        fit = load_json(path)
        weights, steps = fit["ensemble_weights"], fit["post"]
        check_steps(steps)
        if not all(name in fit["statistics"] for name in ("knots", "bias", "low", "high")):
            raise KeyError("statistics")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file that --fit wrote ({error}); fit again") from None
    if len(weights) != n_members:
        raise ValueError(
            f"{path}: fitted for {len(weights)} checkpoints, --ckpt names {n_members}; fit again"
        )
    return fit
