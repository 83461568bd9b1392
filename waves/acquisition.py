"""The survey: sources, receivers, time axis, sponge and wavelet."""

import math
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def _cells(name, cells):
    try:
        return tuple(operator.index(c) for c in cells)
    except TypeError:
        raise ValueError(f"{name}: got {cells!r}, expected a list of whole cells, as (0, 17, 34)") from None


@dataclass(frozen=True)
class Acquisition:
    """Geometry, time axis and sponge of a survey. Cells are counted from the map's top left corner.

    Raises ValueError for cells that are not whole numbers and for sizes that are not positive.
    """

    sources: tuple = (0, 17, 34, 52, 69)  # horizontal cells, one shot each
    receivers: tuple | None = None  # horizontal cells; None: every column of the map
    source_row: int = 1  # vertical cell: 10 m deep
    receiver_row: int = 1
    dx_m: float = 10.0  # cell size, both directions
    dt_s: float = 1e-3
    n_samples: int = 1000
    peak_hz: float = 15.0  # of the Ricker wavelet
    n_pad: int = 120  # width of the sponge on every side, cells

    def __post_init__(self):
        for name in ("sources", "receivers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _cells(name, getattr(self, name)))
                if not getattr(self, name):
                    raise ValueError(f"{name}: got none, expected at least one cell")
        for name, least in (("n_samples", 1), ("n_pad", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        for name in ("dx_m", "dt_s", "peak_hz"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")

    def damping_per_velocity(self):
        """Damping of the sponge / v_min, from the map outwards: (n_pad,) in 1/m.

        It is chosen so that 1e-7 of a wave's amplitude survives.
        """
        width_m = (self.n_pad - 1) * self.dx_m
        i = torch.arange(self.n_pad, dtype=torch.float64)
        return 3 * math.log(1e7) / (2 * width_m) * (i * self.dx_m / width_m) ** 2

    def max_dt_s(self, v_max, v_min):
        """Largest stable time step in s: (v_max dt/dx)^2 <= 3/8 (1 - damping_max dt / 2)."""
        b = 3 / 16 * v_min * self.damping_per_velocity()[-1].item()
        c = (v_max / self.dx_m) ** 2
        return (math.sqrt(b**2 + 1.5 * c) - b) / (2 * c)


OPENFWI = Acquisition()

SOURCES = OPENFWI.sources


def ricker(n_samples, dtype=torch.float32, acquisition=OPENFWI):
    """Ricker wavelet that begins at once: (n_samples,); for OpenFWI 147 samples, then zeros."""
    cycles = acquisition.peak_hz * acquisition.dt_s
    half = math.floor(2.2 / cycles) // 2
    a = (half - torch.arange(2 * half + 1, dtype=torch.float64)) * cycles * math.pi
    w = (1 - 2 * a**2) * torch.exp(-(a**2))
    return F.pad(w, (0, n_samples))[:n_samples].to(dtype)
