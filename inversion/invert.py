"""Waveform inversion: from a gather and a first guess to the map that explains the gather.

The gather itself says what to search: above flat layers it is its own mirror image, and where the velocity
differs from source to source there are no layers. Otherwise curved layers, faults or both are searched,
according to the family. A gather that these searches in few unknowns (find_layers.py, find_fault.py) do not
explain is fitted cell by cell (cellwise.py). The map of least misfit is kept, which may be the guess; with
noise, another map replaces the guess only if it explains the gather.
"""

import math
import time

import numpy as np
import torch

from inversion.cellwise import Cells, Modes, descend
from inversion.find_fault import find_fault
from inversion.find_layers import find_layers
from inversion.observed import EXPLAINED_NORM, Observed
from inversion.population import surface_velocity
from utils import V_MAX, V_MIN
from waves.misfit import is_flat, log_misfit, misfit, simulated

FLAT_TOLERANCE = 1e-4  # relative difference of mirror images, besides the noise, up to which ground is flat
CREDIBLE_MISFIT = 0.04  # with noise, a fit cell by cell is kept only if it leaves less, besides the noise
# the Gaussian process of Style_A; `Modes` has that of Style_B by default
STYLE_A = {"deviation": 183.0, "length": 3.5, "nugget": 20.0}


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


def is_searched(family):
    """Whether gathers of a family (or None), when not flat, are searched in few unknowns."""
    return bool(_searches(family, flat=False))


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
        # with noise, a wrong map may fit better than a right one that lacks detail
        self.best = "guess"
        if self.explained or not whole.noise:
            self.best = min(self.misfits, key=self.misfits.get)
        self.minutes_left, self.elapsed_s = whole.minutes_left, time.monotonic() - self.began

    def finish(self):
        """The map to keep (1, 70, 70), and what happened, a dictionary."""
        began = time.monotonic()
        if not self.smooth:
            rounded = self.maps[self.best].round()
            self.add("rounded", rounded)
            if self.misfits["rounded"] <= self.misfits[self.best]:
                self.best = "rounded"
        misfits = {name: float(f"{value:.5g}") for name, value in self.misfits.items()}
        trace = {"misfits": misfits, "kept": self.best, "noise": float(f"{self.noise_share:.3g}")}
        trace |= {"flat": self.flat, "simulations": round(self.whole.simulations)}
        trace["seconds"] = round(self.elapsed_s + time.monotonic() - began, 1)
        first, kept = (self.maps[name][0].cpu().numpy() for name in ("guess", self.best))
        trace["steps"] = [("guess", first), *self.whole.steps, (f"kept: {self.best}", kept)]
        return self.maps[self.best].clamp(V_MIN, V_MAX), trace


def _fit_cells(courses, n_iterations):
    """Fit the gathers of several courses cell by cell, together.

    Either all are smooth and of one family, or none is; likewise either all are noisy, or none is.
    """
    began, first = time.monotonic(), courses[0]
    start = torch.stack([course.maps[course.best] for course in courses])
    cells = Cells(start)
    if first.smooth:
        surface = None if first.whole.noise else np.stack([surface_velocity(c.whole) for c in courses])
        cells = Modes(start, surface, **(STYLE_A if first.family == "Style_A" else {}))
    noise = torch.tensor([course.whole.noise for course in courses], device=start.device)

    def note(n_samples, made):
        for course, vel in zip(courses, made.cpu(), strict=True):
            course.whole.note(n_samples, vel[0])

    seis, minutes = (
        torch.stack([course.seis for course in courses]),
        sum(course.minutes_left for course in courses),
    )
    found, fits = descend(seis, cells, n_iterations, noise, minutes, note)
    for course, vel in zip(courses, found, strict=True):
        course.whole.simulations += 6.0 * len(fits)  # a gradient costs about six simulations
        course.add("cells", vel)
        if not course.whole.noise or course.misfits["cells"] < math.hypot(
            CREDIBLE_MISFIT, course.noise_share
        ):
            course.best = min(course.best, "cells", key=course.misfits.get)
        course.elapsed_s += (time.monotonic() - began) / len(courses)


def invert(seis, vel, families=None, minutes=math.inf, n_iterations=60):
    """Invert gathers (B, 5, 1000, 70) from guesses (B, 1, 70, 70) m/s: (maps, what happened to each).

    Each gather is searched for itself; those that remain are fitted cell by cell together. families: a name
    or None for each; minutes: how many a gather may take, on average; n_iterations: steps cell by cell, 0 for
    none. A map's misfit is never above its guess's. What happened is a dictionary each, whose "steps" are
    maps on the way, [(what, (70, 70) array), ...]; everything else in it can be written as JSON.
    """
    courses, groups = [], {}
    for s, v, family in zip(seis, vel, families or [None] * len(seis), strict=True):
        course = _Course(s.float(), v.float(), family, minutes)
        course.search()
        courses.append(course)
        if not course.explained and n_iterations and course.minutes_left > 0:
            kind = course.smooth and course.family, course.whole.noise > 0
            groups.setdefault(kind, []).append(course)
    for group in groups.values():
        _fit_cells(group, n_iterations)
    done = [course.finish() for course in courses]
    return torch.stack([vel for vel, _ in done]), [trace for _, trace in done]
