"""The scheme written in the obvious way: slow, for tests and benchmarks to compare with."""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import waves


def reference_simulate(vel, acquisition=waves.OPENFWI, periodic=True):
    """Simulate in the obvious way: (B, Z, X) m/s -> (B, S, T, R).

    periodic=False puts zeros beyond the grid instead of its other side, which is wrong for OpenFWI's data.
    """
    acq, pad, (nz, nx) = acquisition, acquisition.n_pad, vel.shape[-2:]
    v_min = vel.amin((-2, -1))[:, None]
    d = v_min * acq.damping_per_velocity().to(vel) * acq.dt_s  # (B, pad), from the map outwards
    sides = [torch.cat([d.flip(1), d.new_zeros(len(d), n), d], 1) for n in (nz, nx)]
    inside = F.pad(torch.ones(nx, dtype=torch.bool, device=vel.device), (pad, pad))
    kappa = torch.where(inside, sides[0][:, :, None], sides[1][:, None, :])[:, None]
    alpha = (F.pad(vel[:, None], (pad,) * 4, mode="replicate") * acq.dt_s / acq.dx_m) ** 2
    source = torch.tensor(acq.sources, device=vel.device)
    gain = (vel[:, acq.source_row, source] * acq.dt_s) ** 2  # (B, S)
    wavelet = waves.ricker(acq.n_samples, vel.dtype, acq).to(vel.device)
    shot = torch.arange(len(source), device=vel.device)

    def advance(p, p_old, alpha, kappa, gain, begin, end):
        gather = []
        for n in range(begin, end):
            around = F.pad(p, (2,) * 4, mode="circular" if periodic else "constant")
            lap = 0
            for shift, weight in ((1, 4 / 3), (2, -1 / 12)):
                for z, x in ((-shift, 0), (shift, 0), (0, -shift), (0, shift)):
                    lap = lap + weight * (
                        around[..., 2 + z : 2 + z + p.shape[2], 2 + x : 2 + x + p.shape[3]] - p
                    )
            p_old, p = p, p + ((1 - kappa) * (p - p_old) + alpha * lap)
            p[:, shot, pad + acq.source_row, pad + source] += gain * wavelet[n]
            gather.append(p[:, :, pad + acq.receiver_row, pad : pad + nx])
        return p, p_old, torch.stack(gather, 2)

    p = p_old = vel.new_zeros(len(vel), len(source), *alpha.shape[-2:])
    gathers, block = [], advance
    if vel.requires_grad:  # so that the graph of only 20 steps is kept
        block = functools.partial(checkpoint, advance, use_reentrant=True)
    for begin in range(0, acq.n_samples, 20):
        end = min(begin + 20, acq.n_samples)
        p, p_old, gather = block(p, p_old, alpha, kappa, gain, begin, end)
        gathers.append(gather)
    seis = torch.cat(gathers, 2)
    return seis if acq.receivers is None else seis[..., torch.tensor(acq.receivers, device=vel.device)]
