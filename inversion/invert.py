"""Waveform inversion: from a gather and a first guess to the map that explains the gather.

The gather itself says what to search: above flat layers it is its own mirror image, and where the velocity
differs from source to source there are no layers. Otherwise curved layers, faults or both are searched,
according to the family. A gather that these searches in few unknowns (find_layers.py, find_fault.py) do not
explain is fitted cell by cell (cellwise.py). The map of least misfit is kept, which may be the guess; another
map replaces the guess only if it explains nearly all of the gather.
"""

import math
import time

import numpy as np
import torch

from inversion.cellwise import EVERY, Edges, Smooth, fit_cells
from inversion.find_fault import find_fault
from inversion.find_layers import find_layers
from inversion.observed import EXPLAINED_NORM, Observed
from inversion.population import surface_velocity
from utils import V_MAX, V_MIN
from waves.misfit import is_flat, log_misfit, misfit, simulated

FLAT_TOLERANCE = 1e-4  # relative difference of mirror images, beyond the noise's, up to which ground is flat
# The guess is kept unless another map leaves less than this, beyond the noise: maps that leave more are
# about as wrong as the guess, or more (docs/experiments/inversion.md).
CREDIBLE_MISFIT = 0.04
SETTLED_MISFIT = 1e-3  # below it a map that a search has found is not fitted cell by cell
# the Gaussian process of Style_A; `Smooth` has that of Style_B by default
STYLE_A = {"deviation": 180.0, "length": 3.5, "nugget": 5.0}


def _varies(observed):
    """Whether the velocity differs at all sources, read from the first sample: then there are no layers."""
    velocities = np.sort(surface_velocity(observed))
    return observed.noise == 0 and np.diff(velocities).min() > 1


def _searches(family, flat):
    """The searches to try for a family's name or None, in order: (f(observed, guess), one_sided) each.

    A search yields a map (70, 70) and its residual norm for each of its starts. One-sided searches need only
    the outer shot.
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
    """The outer shot (1, T, R) of flat ground, as the mean with its mirror image: half the noise's power."""
    return ((seis[0] + seis[4].flip(1)) / 2)[None]


def expected_gain(seis, vel):
    """Rank gathers (B, 5, 1000, 70) by what inversion may gain per minute: (B,); vel: guesses (B, 1, 70, 70).

    The misfit of logarithms ranks the guesses' errors; flat layers take seconds, all others minutes
    (EXPERIMENTS.md).
    """
    minutes = torch.where(is_flat(seis, FLAT_TOLERANCE), 0.2, 3.0)
    return log_misfit(seis, simulated(vel)) / minutes


class _Course:
    """The inversion of one gather: the maps found so far, {name: (1, 70, 70)}, and their misfits."""

    def __init__(self, seis, vel, family, minutes):
        self.began, self.minutes = time.monotonic(), minutes
        self.seis, self.family, self.whole = seis, family, Observed(seis, minutes=minutes)
        rms = float(seis.square().mean().sqrt().clamp(min=1e-30))
        self.noise_share = self.whole.noise / rms  # the true map's misfit
        self.credible = math.hypot(CREDIBLE_MISFIT, self.noise_share)
        # the difference of two noisy mirror images holds the noise of both
        noises = math.sqrt(2) * self.whole.noise / float(seis[:2].square().mean().sqrt().clamp(min=1e-30))
        self.flat = bool(is_flat(seis[None], FLAT_TOLERANCE + 1.05 * noises)[0])
        if not self.flat and _varies(self.whole):
            self.family = "Style_A" if family == "Style_A" else "Style_B"
        self.smooth = (self.family or "").startswith("Style")
        self.maps, self.misfits, self.explained = {}, {}, False
        self.add("guess", vel)

    def add(self, name, vel):
        """Keep a map (1, 70, 70) unless the one of this name fits as well."""
        fit = float(misfit(self.seis[None], simulated(vel[None]))[0])
        if name not in self.misfits or fit < self.misfits[name]:
            self.maps[name], self.misfits[name] = vel, fit

    def search(self):
        """Search in few unknowns, as family and gather suggest, until a search explains the gather."""
        whole, vel = self.whole, self.maps["guess"]
        side = Observed(_one_side(self.seis), (0,), whole.minutes_left)
        start, searches = vel[0].cpu().double().numpy(), []
        for number, (search, one_sided) in enumerate(_searches(self.family, self.flat), 1):
            observed = side if one_sided else whole
            searches.append((f"search{number}", observed, search(observed, start)))
        if self.family and not self.flat:  # the family's own search has two starts before the other's first
            searches[1:1] = searches[:1]
        while searches and whole.minutes_left >= 0.1 * self.minutes:  # the rest is for the fit cell by cell
            name, observed, search = searches.pop(0)
            observed.start_turn(0.7 if searches else 0.9)
            found, norm = next(search, (None, math.inf))
            if found is None:
                continue
            self.add(name, torch.as_tensor(np.asarray(found), dtype=vel.dtype, device=vel.device)[None])
            if norm < observed.noise_threshold(1000, EXPLAINED_NORM):
                self.explained, searches = True, []
            searches.append((name, observed, search))  # searches take turns
        whole.simulations += side.simulations
        whole.steps = side.steps + whole.steps
        self.minutes_left, self.elapsed_s = whole.minutes_left, time.monotonic() - self.began

    @property
    def best(self):
        """The name of the map to keep."""
        # with noise, a wrong map of few unknowns may fit better than a right one that lacks detail
        believed = {"guess": self.misfits["guess"]}
        for name, fit in self.misfits.items():
            if fit < self.credible and (
                self.explained or name in ("cells", "rounded") or not self.whole.noise
            ):
                believed[name] = fit
        return min(believed, key=believed.get)

    def fit_cells(self, n_steps):
        """Fit the map cell by cell, from the best one so far."""
        began, (vel,) = time.monotonic(), self.maps[self.best]
        prior = Edges()
        if self.smooth:
            prior = Smooth(vel, **(STYLE_A if self.family == "Style_A" else {}))
        noise = self.whole.noise_of_means(EVERY)
        found, n = fit_cells(self.seis, vel, prior, n_steps, noise, self.minutes_left, self.whole.note_step)
        self.whole.simulations += 25.0 * n  # a step costs about as much
        self.add("cells", found[None])
        self.elapsed_s += time.monotonic() - began

    def finish(self):
        """The map to keep (1, 70, 70), and what happened, a dictionary."""
        began = time.monotonic()
        if not self.smooth:
            self.add("rounded", self.maps[self.best].round())
        misfits = {name: float(f"{value:.5g}") for name, value in self.misfits.items()}
        trace = {"misfits": misfits, "kept": self.best, "noise": float(f"{self.noise_share:.3g}")}
        trace |= {
            "explained": self.misfits[self.best] < self.credible,
            "flat": self.flat,
            "simulations": round(self.whole.simulations),
        }
        trace["seconds"] = round(self.elapsed_s + time.monotonic() - began, 1)
        first, kept = (self.maps[name][0].cpu().numpy() for name in ("guess", self.best))
        trace["steps"] = [("guess", first), *self.whole.steps, (f"kept: {self.best}", kept)]
        return self.maps[self.best].clamp(V_MIN, V_MAX), trace


def invert(seis, vel, families=None, minutes=math.inf, n_iterations=40):
    """Invert gathers (B, 5, 1000, 70) from guesses (B, 1, 70, 70) m/s: (maps, what happened to each).

    families: a name or None for each; minutes: how many a gather may take; n_iterations: steps cell by cell,
    0 for none. What happened is a dictionary each: "explained" says whether the map kept explains the gather;
    "steps" are maps on the way, [(what, (70, 70) array), ...]; everything else can be written as JSON.
    """
    done = []
    for s, v, family in zip(seis, vel, families or [None] * len(seis), strict=True):
        course = _Course(s.float(), v.float(), family, minutes)
        course.search()
        is_settled = course.misfits[course.best] < math.hypot(SETTLED_MISFIT, 1.05 * course.noise_share)
        if n_iterations and course.minutes_left > 0 and not (course.explained and is_settled):
            course.fit_cells(n_iterations)
        done.append(course.finish())
    return torch.stack([vel for vel, _ in done]), [trace for _, trace in done]
