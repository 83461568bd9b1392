"""The wave equation of OpenFWI: velocity maps in, shot gathers out, exactly and fast.

2-D constant-density acoustics, second order in time, fourth in space, on a periodic grid with a sponge:

    p[n+1] = p[n] + (1 - kappa) (p[n] - p[n-1]) + alpha lap p[n], and at the source + (v dt)^2 w[n+1]

with alpha = (v dt/dx)^2 and kappa = damping x dt. Source: OpenFWI (Deng et al., 2022, arXiv 2111.02926) and
its forward-modelling code. `engine.py` takes the time steps.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from system.devices import to_device
from waves.acquisition import OPENFWI, ricker
from waves.engine import Checkpoints, Job


def simulate(vel, sources=None, n_samples=None, acquisition=OPENFWI, v_min=None):
    """Simulate shot gathers: (B, 1, Z, X) or (B, Z, X) m/s -> (B, S, T, R), in vel's dtype, on its device.

    sources and n_samples replace the acquisition's own. v_min: (B,) m/s, the velocity that sets the sponge's
    strength, by default each map's minimum. The result is differentiable once towards vel and v_min, in
    backward mode and in forward mode (`torch.func.jvp`), by the exact discrete adjoint.

    Raises ValueError for maps and surveys that cannot be simulated, and MemoryError if a gradient would not
    fit: until the backward pass it keeps checkpoints, on a CPU 40 to 110 MiB per OpenFWI map in float32, more
    for faster maps.
    """
    changes = {"sources": sources, "n_samples": n_samples}
    acquisition = replace(acquisition, **{k: v for k, v in changes.items() if v is not None})
    if vel.ndim == 4 and vel.shape[1] == 1:
        vel = vel[:, 0]
    v_max = check_maps(vel, v_min, acquisition)
    v_min = vel.amin((-2, -1)) if v_min is None else v_min
    padded = F.pad(vel[:, None], (acquisition.n_pad,) * 4, mode="replicate")[:, 0]
    alpha = (padded * acquisition.dt_s / acquisition.dx_m) ** 2
    sources = to_device(torch.tensor(acquisition.sources), vel.device)
    v_source = vel[:, acquisition.source_row, sources]
    wavelet = to_device(ricker(acquisition.n_samples, vel.dtype, acquisition), vel.device)
    drive = (v_source * acquisition.dt_s)[..., None] ** 2 * wavelet  # (B, S, T)
    keep = torch.is_grad_enabled() and (vel.requires_grad or v_min.requires_grad)
    seis = _Wave.apply(alpha, v_min, drive, acquisition, v_max, Checkpoints() if keep else None)
    if acquisition.receivers is not None:
        seis = seis[..., to_device(torch.tensor(acquisition.receivers), vel.device)]
    return seis


def check_maps(vel, v_min, acq):
    """Each map's largest velocity in m/s. Raises ValueError for maps that cannot be simulated."""
    if vel.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"velocity: got {vel.dtype}, expected float32 or float64; convert with .float()")
    if vel.ndim != 3 or 0 in vel.shape:
        raise ValueError(f"velocity: got shape {tuple(vel.shape)}, expected (B, 1, Z, X) or (B, Z, X)")
    for name, cells, size in (
        ("sources", acq.sources, vel.shape[2]),
        ("receivers", acq.receivers or (), vel.shape[2]),
        ("source_row", (acq.source_row,), vel.shape[1]),
        ("receiver_row", (acq.receiver_row,), vel.shape[1]),
    ):
        if not all(0 <= c < size for c in cells):
            raise ValueError(f"{name}: got {cells}, expected cells of the map, 0 to {size - 1}")
    # one copy to the CPU, since each waits for the device
    low, high = torch.stack([vel.detach().amin((-2, -1)), vel.detach().amax((-2, -1))]).cpu()
    slowest, fastest = low.min().item(), high.max().item()
    least = 2 * acq.dx_m * acq.peak_hz
    if not (least <= slowest and fastest < math.inf):  # also true of NaN
        raise ValueError(
            f"velocity: got {slowest:g} to {fastest:g} m/s, expected finite and at least {least:g} m/s"
            " (2 cells per wavelength at the peak frequency); clamp the map, or check that its unit is m/s"
        )
    if v_min is not None:
        if v_min.shape != low.shape or not ((v_min > 0) & v_min.isfinite()).all():
            raise ValueError(f"v_min: got {v_min.tolist()}, expected {len(low)} positive ones, one per map")
        low = v_min.detach()
    fits = min(acq.max_dt_s(b, a) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    if acq.dt_s > fits:
        raise ValueError(
            f"dt_s: got {acq.dt_s:g} s, expected at most {fits:.4g} s for {fastest:g} m/s in {acq.dx_m:g} m"
            " cells; shorten dt_s, enlarge dx_m or clamp the velocity"
        )
    return tuple(high.tolist())


class _Wave(torch.autograd.Function):
    """(alpha, v_min, drive) -> (B, S, T, X) pressure at every column of the map in the receivers' row."""

    @staticmethod
    def forward(alpha, v_min, drive, acquisition, v_max, kept):
        job = Job(alpha, v_min, drive, acquisition, v_max)
        seis = alpha.new_empty(drive.shape + (job.nx - 2 * job.pad,))
        job.simulate(seis.flatten(0, 1), kept)
        return seis

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.acquisition, ctx.v_max, ctx.kept = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs = *ctx.saved_tensors, ctx.acquisition, ctx.v_max, grad, ctx.kept
        return *_Unwrapped.apply(_gradient, *inputs), None, None, None

    @staticmethod
    def jvp(ctx, *changes):
        saved = ctx.saved_tensors
        changes = [torch.zeros_like(x) if d is None else d for x, d in zip(saved, changes[:3], strict=True)]
        return _Unwrapped.apply(_tangent, *saved, ctx.acquisition, ctx.v_max, *changes)


class _Unwrapped(torch.autograd.Function):
    """Call a function with plain tensors: `torch.func` unwraps its own tensors only for a Function."""

    @staticmethod
    def forward(function, *inputs):
        return function(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def _gradient(alpha, v_min, drive, acquisition, v_max, d_seis, kept):
    job = Job(alpha, v_min, drive, acquisition, v_max)
    d_seis = d_seis.contiguous().flatten(0, 1)
    if not kept:
        kept = Checkpoints()
        job.simulate(torch.empty_like(d_seis), kept)
    return job.gradient(d_seis, kept)


def _tangent(alpha, v_min, drive, acquisition, v_max, *changes):
    return Job(alpha, v_min, drive, acquisition, v_max).tangent(*changes)
