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

from inversion.cellwise import Cells, Modes, descend
from inversion.find_fault import find_fault
from inversion.find_layers import find_layers
from inversion.observed import EXPLAINED, Observed
from inversion.population import surface_velocity
from utils import V_MAX, V_MIN
from waves.misfit import is_flat, log_misfit, misfit, simulated

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


def is_searched(family):
    """Whether gathers of a family, or None, are searched in few unknowns where they are not flat."""
    return bool(_searches(family, flat=False))


def _one_side(seis):
    """Flat ground: the outer shots are mirror images, and one tells it all; their mean has half the noise."""
    return ((seis[0] + seis[4].flip(1)) / 2)[None]


def expected_gain(seis, vel):
    """Of gathers (B, 5, 1000, 70) and guesses: what inversion may gain a minute, to rank them by, (B,).

    The misfit of logarithms ranks errors; flat layers take seconds, all others minutes (EXPERIMENTS.md).
    """
    minutes = torch.where(is_flat(seis, FLAT), 0.2, 3.0)
    return log_misfit(seis, simulated(vel)) / minutes


class _Course:
    """One gather's inversion: the maps found so far, {name: (1, 70, 70)}, and their misfits."""

    def __init__(self, seis, vel, family, minutes):
        self.began, self.minutes = time.monotonic(), minutes
        self.seis, self.family, self.whole = seis, family, Observed(seis, minutes=minutes)
        rms = float(seis.square().mean().sqrt().clamp(min=1e-30))
        self.noise_share = self.whole.noise / rms  # the true map's misfit
        # of two noisy mirror images the difference holds both noises
        noises = math.sqrt(2) * self.whole.noise / float(seis[:2].square().mean().sqrt().clamp(min=1e-30))
        self.flat = bool(is_flat(seis[None], FLAT + 1.05 * noises)[0])
        if not self.flat and _varies(self.whole):
            self.family = "Style_A" if family == "Style_A" else "Style_B"
        self.smooth = (self.family or "").startswith("Style")
        self.maps, self.told, self.explained = {}, {}, False
        self.add("guess", vel)

    def add(self, name, vel):
        """Keep a map unless one of its name fits as well."""
        fit = float(misfit(self.seis[None], simulated(vel[None]))[0])
        if name not in self.told or fit < self.told[name]:
            self.maps[name], self.told[name] = vel, fit

    def search(self):
        """Search in few unknowns, as the family and the gather say; `left` then tells the minutes left."""
        whole, vel = self.whole, self.maps["guess"]
        side = Observed(_one_side(self.seis), (0,), whole.left)
        start, searches = vel[0].cpu().double().numpy(), []
        for number, (search, one_sided) in enumerate(_searches(self.family, self.flat), 1):
            observed = side if one_sided else whole
            searches.append((f"search{number}", observed, search(observed, start)))
        if self.family and not self.flat:  # the kind that is named has two starts to the other's one
            searches[1:1] = searches[:1]
        while searches and whole.left >= 0.1 * self.minutes:  # the rest is for the fit cell by cell
            name, observed, search = searches.pop(0)
            observed.turn(0.7 if searches else 0.9)
            found, norm = next(search, (None, math.inf))
            if found is None:
                continue
            self.add(name, torch.as_tensor(np.asarray(found), dtype=vel.dtype, device=vel.device)[None])
            if norm < observed.enough(1000, EXPLAINED):
                self.explained, searches = True, []
            searches.append((name, observed, search))  # turn and turn about
        whole.simulations += side.simulations
        whole.steps = side.steps + whole.steps
        # amid noise a wrong map may fit better than a right one that lacks detail
        self.best = min(self.told, key=self.told.get) if self.explained or not whole.noise else "guess"
        self.left, self.seconds = whole.left, time.monotonic() - self.began

    def finish(self):
        """The map to keep (1, 70, 70), and what happened."""
        began = time.monotonic()
        if not self.smooth:
            rounded = self.maps[self.best].round()
            self.add("rounded", rounded)
            if self.told["rounded"] <= self.told[self.best]:
                self.best = "rounded"
        told = {name: float(f"{value:.5g}") for name, value in self.told.items()}
        trace = {"misfits": told, "kept": self.best, "noise": float(f"{self.noise_share:.3g}")}
        trace |= {"flat": self.flat, "simulations": round(self.whole.simulations)}
        trace["seconds"] = round(self.seconds + time.monotonic() - began, 1)
        first, kept = (self.maps[name][0].cpu().numpy() for name in ("guess", self.best))
        trace["steps"] = [("guess", first), *self.whole.steps, (f"kept: {self.best}", kept)]
        return self.maps[self.best].clamp(V_MIN, V_MAX), trace


def _fit_cells(courses, n_iterations):
    """Fit gathers cell by cell, together: all smooth and of one family, or none; all amid noise, or none."""
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

    seis, minutes = torch.stack([course.seis for course in courses]), sum(course.left for course in courses)
    found, fits = descend(seis, cells, n_iterations, noise, minutes, note)
    for course, vel in zip(courses, found, strict=True):
        course.whole.simulations += 6.0 * len(fits)  # a gradient costs about six simulations
        course.add("cells", vel)
        if not course.whole.noise or course.told["cells"] < math.hypot(BELIEVED, course.noise_share):
            course.best = min(course.best, "cells", key=course.told.get)
        course.seconds += (time.monotonic() - began) / len(courses)


def invert(seis, vel, families=None, minutes=math.inf, n_iterations=60):
    """Gathers (B, 5, 1000, 70) and guesses (B, 1, 70, 70) m/s -> (maps, a dict of what happened for each).

    Each is searched for itself; those left to be fitted cell by cell are fitted together. families: a name
    or None for each. minutes: at most so many for a gather, on average. The maps' misfits are never above
    the guesses'. The dicts' "steps" are maps on the way, [(what, (70, 70) array), ...]; all else fits JSON.
    """
    courses, groups = [], {}
    for s, v, family in zip(seis, vel, families or [None] * len(seis), strict=True):
        course = _Course(s.float(), v.float(), family, minutes)
        course.search()
        courses.append(course)
        if not course.explained and n_iterations and course.left > 0:
            kind = course.smooth and course.family, course.whole.noise > 0
            groups.setdefault(kind, []).append(course)
    for group in groups.values():
        _fit_cells(group, n_iterations)
    done = [course.finish() for course in courses]
    return torch.stack([vel for vel, _ in done]), [trace for _, trace in done]
