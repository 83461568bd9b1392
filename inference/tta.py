"""Test-time augmentation: views of a gather whose predictions, brought back, estimate the same map.

A view is a change of the gather, the change of the map that undoes it, and a weight. The plain gather always
takes part. `mirror` reverses the survey: as accurate as the plain view (only the centre source has no mirror
image) with errors of its own, hence the plain view's weight. `noise` adds white noise 60 dB below the
gather's rms (at 40 dB it drowns the echoes: a network lost 40 %), `scale` changes amplitudes by 2 %,
`stretch` the time axis by 1 %: v·c with t/c is the same experiment but for the wavelet, so the map is divided
by c again. These three repeat most of the plain view's errors and add some of their own: an eighth each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from openfwi.modes import preprocess
from postprocess import fuse
from utils import V_MAX, V_MIN, mirror_survey


@dataclass(frozen=True)
class View:
    """`there` changes gathers (B, S, T, R), `back` takes the maps (B, 1, Z, X) seen in them home."""

    name: str
    weight: float
    there: Callable
    back: Callable


def add_noise(seis, seed, snr_db=60.0):
    """White noise at `snr_db` below each gather's rms; the same pattern for every gather of a seed."""
    noise = torch.randn(seis.shape[1:], generator=torch.Generator().manual_seed(seed)).to(seis)
    return seis + noise * seis.square().mean((1, 2, 3), keepdim=True).sqrt() * 10 ** (-snr_db / 20)


DELAY = 73  # samples from the start to the wavelet's centre: travel times count from there


def stretch_time(seis, factor):
    """The gather of the same map with all velocities times `factor`, up to the wavelet's width.

    Travel times shrink by it, x'(t) = x(delay + factor (t - delay)): linear between samples, zero beyond the
    record's ends.
    """
    n = seis.shape[2]
    t = DELAY + factor * (torch.arange(n, dtype=torch.float64) - DELAY)
    t = t.clamp(-1, n)  # where the padding is
    before = t.floor().clamp(max=n - 1).long()
    share = (t - before)[:, None].to(seis.device, seis.dtype)
    seis = F.pad(seis, (0, 0, 1, 1))
    return seis[:, :, before + 1] * (1 - share) + seis[:, :, before + 2] * share


def _same(x):
    return x


VIEWS = {  # name: its views
    "plain": [View("plain", 1.0, _same, _same)],
    "mirror": [View("mirror", 1.0, mirror_survey, lambda vel: vel.flip(3))],
    "noise": [View(f"noise {k}", 0.125, partial(add_noise, seed=k), _same) for k in (1, 2)],
    "scale": [View(f"scale {a}", 0.125, partial(torch.mul, other=a), _same) for a in (0.98, 1.02)],
    "stretch": [
        View(f"stretch {c}", 0.125, partial(stretch_time, factor=c), partial(torch.mul, other=1 / c))
        for c in (0.99, 1.01)
    ],
}


def make_views(words):
    """The plain view and those named, as "mirror", or "noise:0.5" with a weight in place of the kind's own.

    The views' weights sum to one. Raises ValueError for unknown names and impossible weights.
    """
    given = {"plain": None}
    for word in words:
        name, colon, number = word.partition(":")
        try:
            given[name] = float(number) if colon else None
        except ValueError:
            given[name] = -1.0
        if name not in VIEWS or not (given[name] is None or 0 <= given[name] < float("inf")):
            raise ValueError(
                f"--tta={word}: expected names of {', '.join(VIEWS)}, divided by commas, "
                "with weights where you like, as mirror:1,noise:0.5"
            )
    views = []
    for name, weight in given.items():
        views += [View(v.name, v.weight if weight is None else weight, v.there, v.back) for v in VIEWS[name]]
    total = sum(view.weight for view in views)
    if total <= 0:
        raise ValueError(f"--tta={','.join(words)}: all weights are 0; give one view a positive weight")
    return [View(v.name, v.weight / total, v.there, v.back) for v in views]


def predict_views(network, seis, views, mode="full"):
    """Full gathers (B, 5, 1000, 70) -> each view's map, brought back: (K, B, 1, 70, 70) m/s.

    Within OpenFWI's range, or NaN where the network gives no finite number.
    """
    maps = torch.stack([view.back(network(preprocess(view.there(seis), mode)).float()) for view in views])
    return maps.clamp(V_MIN, V_MAX).masked_fill(maps.isinf(), torch.nan)


def predict(network, seis, views, mode="full", combine="mean"):
    """Full gathers (B, 5, 1000, 70) -> velocity (B, 1, 70, 70) m/s within OpenFWI's range."""
    return fuse(predict_views(network, seis, views, mode), [view.weight for view in views], combine)
