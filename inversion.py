"""Waveform inversion: from a gather, and a first guess, to the map that explains it.

Gathers above flat layers are mirror images of themselves, and where velocity differs from source to source
there are no layers; else curved layers and faults are sought, as the family's name says, or both. What the
searches in few unknowns (search.py) leave unexplained is fitted cell by cell (descent.py). Of all maps
the one of least misfit is kept, the guess among them; amid noise another only if it explains the gather.
"""

import math
import time

import numpy as np
import torch

from descent import Cells, Modes, descend
from faults import find_fault
from gauss_newton import EXPLAINED, Observed
from search import find_layers, surface_velocity
from utils import V_MAX, V_MIN
from waveform import is_flat, log_misfit, misfit, simulated

FLAT = 1e-4  # relative difference of mirror images, above the noise, of gathers above flat layers
BELIEVED = 0.04  # misfit, beside the noise, that a fit cell by cell amid noise may leave to be believed
# Style_A's Gaussian process; `Modes` has Style_B's by default
STYLE_A = {"deviation": 183.0, "length": 3.5, "nugget": 20.0}


def _varies(observed):
    """Whether no two sources stand on the same velocity, read from the first sample: no layers then."""
    velocities = np.sort(surface_velocity(observed))
    return observed.noise == 0 and np.diff(velocities).min() > 1


def _searches(family, flat):
    """The searches to try for a family's name or None, in order: (f(observed, guess), one-sided) each.

    A search yields a map (70, 70), an array, and its residuals' norm for each of its starts.
    """
    kind, _, version = (family or "").partition("_")
    increasing = version != "B"

    def layers(curved):
        return lambda observed, guess: find_layers(observed, curved, increasing, guess)

    searches = [(layers(curved=False), True)] if flat else []
    if kind == "Style" or family in ("FlatFault_B", "CurveFault_A", "CurveFault_B"):
        return searches
    sides = [(layers(curved=True), False), (find_fault, False)]
    return searches + (sides[::-1] if kind == "FlatFault" else sides)


def _one_side(seis):
    """Flat ground: the outer shots are mirror images, and one tells it all; their mean has half the noise."""
    return ((seis[0] + seis[4].flip(1)) / 2)[None]


def expected_gain(seis, vel):
    """Of gathers (B, 5, 1000, 70) and guesses: what inversion may gain a minute, to rank them by, (B,).

    The misfit of logarithms ranks errors; flat layers take seconds, all others minutes (EXPERIMENTS.md).
    """
    minutes = torch.where(is_flat(seis, FLAT), 0.2, 3.0)
    return log_misfit(seis, simulated(vel)) / minutes


def invert_one(seis, vel, family=None, minutes=10.0, n_iterations=60):
    """One gather (5, 1000, 70) and its guess (1, 70, 70) m/s -> (map (1, 70, 70), what happened, a dict).

    Its "steps" are maps on the way, [(what, (70, 70) array), ...]; all else fits JSON.
    """
    began = time.monotonic()
    whole = Observed(seis, minutes=minutes)
    noise_share = whole.noise / float(seis.square().mean().sqrt().clamp(min=1e-30))  # the true map's misfit
    # of two noisy mirror images the difference holds both noises
    noises = math.sqrt(2) * whole.noise / float(seis[:2].square().mean().sqrt().clamp(min=1e-30))
    flat = bool(is_flat(seis[None], FLAT + 1.05 * noises)[0])
    if not flat and _varies(whole):
        family = "Style_A" if family == "Style_A" else "Style_B"
    candidates = {"guess": vel}
    told = {"guess": float(misfit(seis[None], simulated(vel[None]))[0])}
    side = Observed(_one_side(seis), (0,), minutes)
    start, explained, searches = vel[0].cpu().double().numpy(), False, []
    for number, (search, one_sided) in enumerate(_searches(family, flat), 1):
        observed = side if one_sided else whole
        searches.append((f"search{number}", observed, search(observed, start)))
    while searches and whole.left >= 0.1 * minutes:  # the rest is for the fit cell by cell
        name, observed, search = searches.pop(0)
        observed.turn(0.7 if searches else 0.9)
        found, norm = next(search, (None, math.inf))
        if found is None:
            continue
        found = torch.as_tensor(np.asarray(found), dtype=vel.dtype, device=vel.device)[None]
        fit = float(misfit(seis[None], simulated(found[None]))[0])
        if fit < told.get(name, math.inf):
            candidates[name], told[name] = found, fit
        if norm < observed.enough(1000, EXPLAINED):
            explained, searches = True, []
        searches.append((name, observed, search))  # turn and turn about
    whole.simulations += side.simulations
    whole.steps = side.steps + whole.steps
    # amid noise a wrong map may fit better than a right one that lacks detail
    best = min(told, key=told.get) if explained or not whole.noise else "guess"
    if not explained and n_iterations and whole.left > 0:
        start = candidates[best][None]
        if (family or "").startswith("Style"):
            surface = surface_velocity(whole)[None] if whole.noise == 0 else None
            cells = Modes(start, surface, **(STYLE_A if family == "Style_A" else {}))
        else:
            cells = Cells(start)
        noise = torch.full((1,), whole.noise, device=vel.device)

        def note(n_samples, made):
            whole.note(n_samples, made[0, 0].cpu())

        cells, course = descend(seis[None], cells, n_iterations, noise, whole.left, note)
        whole.simulations += 6.0 * len(course)  # a gradient costs about six simulations
        candidates["cells"] = cells[0]
        told["cells"] = float(misfit(seis[None], simulated(cells))[0])
        if not whole.noise or told["cells"] < math.hypot(BELIEVED, noise_share):
            best = min(best, "cells", key=told.get)
    rounded = candidates[best].round()
    if not (family or "").startswith("Style"):
        told["rounded"] = float(misfit(seis[None], simulated(rounded[None]))[0])
        if told["rounded"] <= told[best]:
            candidates["rounded"], best = rounded, "rounded"
    told = {name: float(f"{value:.5g}") for name, value in told.items()}
    trace = {"misfits": told, "kept": best, "noise": float(f"{noise_share:.3g}"), "flat": flat}
    trace |= {"simulations": round(whole.simulations), "seconds": round(time.monotonic() - began, 1)}
    kept = candidates[best][0].cpu().numpy()
    trace["steps"] = [("guess", vel[0].cpu().numpy()), *whole.steps, (f"kept: {best}", kept)]
    return candidates[best].clamp(V_MIN, V_MAX), trace


def invert(seis, vel, families=None, minutes=math.inf, n_iterations=60):
    """Gathers (B, 5, 1000, 70) and guesses (B, 1, 70, 70) m/s -> (maps, a dict of what happened for each).

    families: a name or None for each. minutes: at most so many for a gather. The maps' misfits are never
    above the guesses'.
    """
    families = families or [None] * len(seis)
    done = [
        invert_one(s.float(), v.float(), family, minutes, n_iterations)
        for s, v, family in zip(seis, vel, families, strict=True)
    ]
    return torch.stack([vel for vel, _ in done]), [trace for _, trace in done]
