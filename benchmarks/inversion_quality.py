"""Waveform inversion from several starts and through noise: `python bench.py inversion`."""

import contextlib
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from cfg import Config
from data import whole
from inference.ensemble import Member
from inversion.invert import invert
from openfwi.files import find_pairs, read_sample
from openfwi.modes import preprocess
from options.fields import Options, Section
from postprocess import gaussian
from synthetic.maps import make_maps
from utils import FAMILIES

INVERSION = Section("inversion", "waveform inversion from several starts and through noise")


@dataclass
class InversionOptions(Options):
    """The options of `bench.py inversion`."""

    input: str = INVERSION("", "folder of gathers and their maps, in OpenFWI's layout", path=True)
    ckpt: str = INVERSION("", "a checkpoint, for the start `network`", path=True)
    starts: tuple = INVERSION(("mean",), "network, mean, smooth3, smooth10, … (σ in cells)")
    snr: tuple = INVERSION(("inf",), "signal-to-noise ratios, dB; inf = no noise")
    minutes: float = INVERSION(10.0, "most minutes a map")
    n_iterations: int = INVERSION(40, "most steps cell by cell")


def start_map(name, family, vel, seis, member):
    """A map (1, 70, 70) m/s to start from: the network's, a mean of synthetic maps, or the blurred truth."""
    if name == "network":
        return member(preprocess(seis[None], member.mode))[0].float()
    if name == "mean":
        return torch.from_numpy(make_maps(family, 200, seed=0)).mean(0)
    return gaussian(vel[None], float(name.removeprefix("smooth")))[0]


def decibels(word):
    """A signal-to-noise ratio in dB, or infinity; ValueError for other words."""
    with contextlib.suppress(ValueError):
        if -200 <= float(word) <= 400 or float(word) == math.inf:
            return float(word)
    raise ValueError(f"--snr={word}: expected a number of dB, or inf for no noise")


def bench_inversion(args):
    """Print the error of each map before and after inversion, with means and medians."""
    ratios, starts = [decibels(word) for word in args.snr], args.starts
    for name in starts:
        if name not in ("network", "mean") and not re.fullmatch(r"smooth\d{1,3}(\.\d+)?", name):
            raise ValueError(f"--starts={name}: expected network, mean, or smooth and cells, as smooth3")
    if not args.input:
        raise ValueError("no gathers to invert; give their folder by --input=DIR")
    if "network" in starts and not args.ckpt:
        raise ValueError("--starts=network needs the network's checkpoint; give --ckpt=FILE")
    member = Member(Config(ckpt=args.ckpt), Path(args.ckpt), torch.device("cpu")) if args.ckpt else None
    errors, items = {}, whole(find_pairs([args.input]))
    for number, (item, index) in enumerate(zip(items, items.families.tolist(), strict=True)):
        clean, vel = (torch.as_tensor(array).float() for array in read_sample(*item))
        family = FAMILIES[index]
        for ratio in ratios:
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
            noisy = clean + clean.square().mean().sqrt() * 10 ** (-ratio / 20) * noise
            for name in starts:
                start = start_map(name, family, vel, noisy, member)
                (found,), (trace,) = invert(
                    noisy[None], start[None], [family], args.minutes, args.n_iterations
                )
                pair = [float((v - vel).abs().mean()) for v in (start, found)]
                errors.setdefault((family, ratio, name), []).append(pair)
                cost = f"{trace['seconds']:.0f} s, {trace['simulations']} simulations"
                fits = ", ".join(f"{k} {misfit:.4f}" for k, misfit in trace["misfits"].items())
                case = f"{family} {number:3} {ratio:5.0f} dB, from {name:8}"
                print(f"{case} {pair[0]:7.2f} -> {pair[1]:7.2f} m/s, {cost}; misfits: {fits}", flush=True)
    print(f"\n{'family':12} {'dB':>5} {'start':9} {'before':>8} {'after':>8} {'median':>8}   MAE, m/s")
    for (family, ratio, name), pairs in errors.items():
        before, after = zip(*pairs, strict=True)
        numbers = statistics.mean(before), statistics.mean(after), statistics.median(after)
        print(f"{family:12} {ratio:5.0f} {name:9} " + " ".join(f"{n:8.2f}" for n in numbers))
