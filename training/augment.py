"""Augmentation of shot gathers on the device: batched, seeded, off by default.

The augmentation of a sample depends only on seed, step and place in the global batch. A gather that would
become zero throughout or not finite is left unchanged.
"""

import torch

from system.devices import to_device
from utils import V_MAX, V_MIN
from waves.acquisition import ricker

N_FFT = 2048  # for 1000 samples, so that filters do not wrap around
WATER_LEVEL = 3e-3  # times the wavelet's peak spectrum: weaker frequencies are not restored


# ---------------------------------------------------------------- each kind
# (seis (B, S, T, R), vel (B, 1, Z, X), u (B,) of [0, 1), extra (B, 76), seeds, cfg) -> (seis, vel)


def _stretch(seis, vel, u, extra, seeds, cfg):
    """Multiply velocities and divide times by c, log-uniform in the part of cfg.stretch that a map allows.

    This is the same experiment, except that the wavelet is stretched too. A filter restores it: the result is
    within 1 % of a simulation if c differs from one by up to 5 %, and within 2 % for 15 %. For c > 1 the
    record ends in zeros.
    """
    slowest, fastest = vel.amin((1, 2, 3)), vel.amax((1, 2, 3))
    low = (V_MIN / slowest).clamp(cfg.stretch[0], 1)
    high = (V_MAX / fastest).clamp(1, cfg.stretch[1])
    c = low * (high / low) ** u
    wavelet = to_device(ricker(seis.shape[2]), seis.device)
    was = torch.fft.rfft(resample(wavelet.expand(len(c), 1, -1)[..., None], c)[:, 0, :, 0], N_FFT)  # (B, F)
    level = WATER_LEVEL * was.abs().amax(1, keepdim=True)
    restore = torch.fft.rfft(wavelet, N_FFT) * was.conj() / (was.abs() ** 2 + level**2)
    inside = resample(torch.ones_like(seis[:, :1, :, :1]), c)
    return filter_time(resample(seis, c), restore) * inside, vel * c[:, None, None, None]


def _shift(seis, vel, u, extra, seeds, cfg):
    delay = torch.floor(u * (2 * cfg.shift + 1)) - cfg.shift
    return resample(seis, torch.ones_like(u), delay), vel


def _gain(seis, vel, u, extra, seeds, cfg):
    low, high = cfg.gain
    return seis * (low * (high / low) ** u)[:, None, None, None], vel


def _noise(seis, vel, u, extra, seeds, cfg):
    """Add Gaussian noise, white or in the wavelet's band, at another level on every trace."""
    noise, spread = torch.empty_like(seis), torch.empty_like(seis[:, :, :1])
    for i, seed in enumerate(seeds.tolist()):  # a sample gets the same noise however the batch is divided
        generator = torch.Generator(seis.device).manual_seed(seed)
        noise[i].normal_(generator=generator)
        spread[i].normal_(generator=generator)
    band = torch.fft.rfft(to_device(ricker(seis.shape[2]), seis.device), N_FFT).abs()
    coloured = (extra[:, :1] < cfg.noise_coloured).to(band)
    noise = filter_time(noise, coloured * band / band.amax() + 1 - coloured)
    noise = noise * torch.exp(cfg.noise_spread * spread)
    low, high = cfg.noise_db
    ratio = 10 ** (-(low + (high - low) * u) / 20)
    rms, noise_rms = (x.square().mean((1, 2, 3)).sqrt() for x in (seis, noise))
    return seis + noise * (ratio * rms / noise_rms)[:, None, None, None], vel


def _shot_drop(seis, vel, u, extra, seeds, cfg):
    shots = extra[:, 1 : 1 + seis.shape[1]]
    return seis * _kept(shots, torch.ceil(u * cfg.shot_drop))[:, :, None, None], vel


def _receiver_drop(seis, vel, u, extra, seeds, cfg):
    receivers = extra[:, -seis.shape[3] :]
    n_lost = torch.ceil(u * cfg.receiver_drop * seis.shape[3])
    return seis * _kept(receivers, n_lost)[:, None, None], vel


KINDS = {
    "stretch": _stretch,
    "shift": _shift,
    "gain": _gain,
    "noise": _noise,
    "shot_drop": _shot_drop,
    "receiver_drop": _receiver_drop,
}
# for each kind a choice and a strength; then the colour of the noise, which shots, which receivers
N_DRAWS = 2 * len(KINDS) + 1 + 5 + 70


# ---------------------------------------------------------------- parts of several kinds


def resample(seis, speed, delay=None):
    """Gathers (B, S, T, R) read at time samples speed·t − delay, linear between samples, zero outside."""
    n = seis.shape[2]
    t = torch.arange(n, device=seis.device) * speed[:, None]
    t = (t if delay is None else t - delay[:, None])[:, None, :, None]  # (B, 1, T, 1)
    low = t.floor()
    inside = (t >= 0) & (t <= n - 1)
    first, second = (
        seis.gather(2, (low + k).long().clamp(0, n - 1).expand(*seis.shape[:3], seis.shape[3]))
        for k in (0, 1)
    )
    return torch.where(inside, first + (second - first) * (t - low), 0)


def filter_time(seis, response):
    """Multiply the spectrum along time by `response` (B, F)."""
    spectrum = torch.fft.rfft(seis, N_FFT, dim=2) * response[:, None, :, None]
    return torch.fft.irfft(spectrum, N_FFT, dim=2)[:, :, : seis.shape[2]]


def _kept(order, n_lost):
    """Ones, with zeros for the n_lost smallest of each row."""
    return (order.argsort(1).argsort(1) >= n_lost[:, None]).float()


# ---------------------------------------------------------------- all kinds together


def is_on(cfg):
    """Whether any augmentation has a probability above 0."""
    return any(getattr(cfg, f"{kind}_p") > 0 for kind in KINDS)


def draw(shape, generator):
    """Random numbers that decide the augmentation: (*shape, N_DRAWS) in [0, 1), and seeds of this shape."""
    return torch.rand(*shape, N_DRAWS, generator=generator), torch.randint(2**62, shape, generator=generator)


def augment(seis, vel, cfg, draws, seeds):
    """Augment gathers (B, S, T, R) with their maps (B, 1, Z, X) m/s, both float32 on the device.

    draws (B, N_DRAWS) and seeds (B,) on the CPU come from `draw`, probabilities and ranges from cfg. A gather
    that would become zero throughout or not finite is returned unchanged, with its map.
    """
    given = seis, vel
    seis, vel = seis.clone(), vel.clone()
    choice, strength, extra = draws.split([len(KINDS), len(KINDS), N_DRAWS - 2 * len(KINDS)], 1)
    for k, (kind, change) in enumerate(KINDS.items()):
        # chosen on the CPU: on the device, nonzero() would have to wait for all queued work
        rows = (choice[:, k] < getattr(cfg, f"{kind}_p")).nonzero()[:, 0]
        if len(rows):
            u, more = to_device(strength[rows, k], seis.device), to_device(extra[rows], seis.device)
            on_device = to_device(rows, seis.device)
            changed = change(seis[on_device], vel[on_device], u, more, seeds[rows], cfg)
            seis[on_device], vel[on_device] = changed
    peak = seis.abs().amax((1, 2, 3))
    good = (peak.isfinite() & (peak > 0))[:, None, None, None]  # of NaN, the largest is NaN
    return torch.where(good, seis, given[0]), torch.where(good, vel, given[1])
