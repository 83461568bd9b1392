"""Test-time augmentation: several views of a gather, whose predictions estimate the same map.

A view changes the gather, undoes the change in the predicted map, and has a weight. The plain gather is
always one of them. `mirror` reverses the survey. It has the same weight as the plain view: it is as accurate,
since only the centre source has no mirror image, and makes other errors. `noise` adds white noise 60 dB below
the gather's rms; at 40 dB, noise drowned the echoes, and a network lost 40 % of its accuracy. `scale` changes
amplitudes by 2 %. `stretch` changes the time axis by 1 %: velocities times c and times divided by c are the
same experiment, except for the wavelet, so the map is divided by c again. These three mostly repeat the plain
view's errors and add some, so each of their views has an eighth of its weight.
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
    """`change` is applied to gathers (B, S, T, R), `undo` to the maps (B, 1, Z, X) predicted from them."""

    name: str
    weight: float
    change: Callable
    undo: Callable


def add_noise(seis, seed, snr_db=60.0):
    """Add white noise `snr_db` below each gather's rms: (B, S, T, R), the same pattern for all of a seed."""
    noise = torch.randn(seis.shape[1:], generator=torch.Generator().manual_seed(seed)).to(seis)
    return seis + noise * seis.square().mean((1, 2, 3), keepdim=True).sqrt() * 10 ** (-snr_db / 20)


DELAY = 73  # samples before the centre of the wavelet, where travel times begin


def stretch_time(seis, factor):
    """Gathers (B, S, T, R) as if all velocities were multiplied by `factor`, except for the wavelet's width.

    Travel times are divided by it: x'(t) = x(delay + factor (t - delay)), linear between samples and zero
    beyond the ends of the record.
    """
    n = seis.shape[2]
    t = DELAY + factor * (torch.arange(n, dtype=torch.float64) - DELAY)
    t = t.clamp(-1, n)  # into the padding
    before = t.floor().clamp(max=n - 1).long()
    share = (t - before)[:, None].to(seis.device, seis.dtype)
    seis = F.pad(seis, (0, 0, 1, 1))
    return seis[:, :, before + 1] * (1 - share) + seis[:, :, before + 2] * share


def _same(x):
    return x


VIEWS = {  # name in --tta: its views
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
    """The plain view and those that `words` name: "mirror", or "noise:0.5" with a weight of your own.

    The weights of all views sum to 1. Raises ValueError for unknown names and impossible weights.
    """
    given = {"plain": None}
    for word in words:
        name, colon, number = word.partition(":")
        try:
            given[name] = float(number) if colon else None
        except ValueError:
            given[name] = -1.0
        if name not in VIEWS or not (given[name] is None or 0 <= given[name] <= 1e12):
            raise ValueError(
                f"--tta={word}: expected names of {', '.join(VIEWS)}, divided by commas, "
                "with weights where you like, as mirror:1,noise:0.5"
            )
    views = []
    for name, weight in given.items():
        views += [View(v.name, v.weight if weight is None else weight, v.change, v.undo) for v in VIEWS[name]]
    total = sum(view.weight for view in views)
    if total <= 0:
        raise ValueError(f"--tta={','.join(words)}: all weights are 0; give one view a positive weight")
    return [View(v.name, v.weight / total, v.change, v.undo) for v in views]


def predict_views(network, seis, views, mode="full"):
    """Predict full gathers (B, 5, 1000, 70) in every view, with changes undone: (K, B, 1, 70, 70) m/s.

    Velocities lie within OpenFWI's range, or are NaN where the network gives no finite number.
    """
    maps = torch.stack([view.undo(network(preprocess(view.change(seis), mode)).float()) for view in views])
    return maps.clamp(V_MIN, V_MAX).masked_fill(maps.isinf(), torch.nan)


def predict(network, seis, views, mode="full", combine="mean"):
    """Predict full gathers (B, 5, 1000, 70), all views joined: (B, 1, 70, 70) m/s in OpenFWI's range."""
    return fuse(predict_views(network, seis, views, mode), [view.weight for view in views], combine)
