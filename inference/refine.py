"""Refining methods, which improve predictions by the observed gather. A new one is one entry in `REFINE`."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from inversion.feedback import feedback
from inversion.invert import expected_gain, invert
from parallel.work import Total


def in_order(numbers, size):
    """Batches of `size` gathers, in the order of `numbers`."""
    return [numbers[k : k + size] for k in range(0, len(numbers), size)]


def refine_feedback(model, seis, vel, families, cfg):
    """See `Method.refine`."""
    maps, misfits = feedback(model, seis, vel, cfg.refine_rounds, cfg.refine_step)
    return maps, [{"misfits": [float(f"{m:.6g}") for m in row]} for row in misfits.T.tolist()]


def refine_inversion(model, seis, vel, families, cfg):
    """See `Method.refine`."""
    return invert(seis, vel, families, cfg.refine_minutes, cfg.refine_iterations)


@dataclass(frozen=True)
class Method:
    """A refining method; only `refine` is required.

    refine(model, seis (B, 5, 1000, 70), vel (B, 1, 70, 70), families [name or None], cfg) returns the refined
    maps and a report for each, a dictionary for JSON. `model` is the whole prediction as a function of
    gathers. A report's "seconds" count towards --refine_budget, and its "steps", which are intermediate maps
    [(what, (70, 70) array), ...], are drawn.
    """

    refine: Callable
    size: int | None = None  # gathers refined together; None = --batch_size
    # (seis, vel) -> (B,), the gain expected per minute. With it, --refine_budget goes to the greatest first
    gain: Callable | None = None


REFINE = {
    "feedback": Method(refine_feedback),
    # one by one, so that each result is kept once its minutes are over
    "inversion": Method(refine_inversion, size=1, gain=expected_gain),
}


def check_method(name):
    """Raise ValueError for the name of an unknown refining method."""
    if name not in ("none", *REFINE):
        raise ValueError(f"--refine={name}: expected one of none, {', '.join(REFINE)}")


class Refiner:
    """Refine the gathers of `results` by the method --refine, within --refine_budget minutes in total.

    The method's reports are saved in `results`.
    """

    def __init__(self, process, cfg, results):
        self.cfg, self.results, self.method = cfg, results, REFINE[cfg.refine]
        self.has_budget = bool(cfg.refine_budget and self.method.gain)
        self.spent_before_s = sum(note.get("seconds", 0) for note in results.notes())
        # by all processes; a gather that is being refined counts with all the time that it may take
        self.spent_ms = Total(process, "refining ms")

    def forget_unfinished(self):
        """Have gathers done again whose report is lost, or that had too little time, if there is more now."""
        lost = np.ones(len(self.results), bool)
        lost[[note["number"] for note in self.results.notes()]] = False
        self.results.forget(lost | ~self.results["refined"] if self.minutes_left > 0 else lost)

    @property
    def minutes_left(self):
        """Minutes left of the budget."""
        if not self.has_budget:
            return math.inf
        return self.cfg.refine_budget - (self.spent_before_s + self.spent_ms.add() / 1000) / 60

    def batches(self, numbers):
        """The gathers `numbers` in batches that the method refines together."""
        return in_order(numbers, self.method.size or self.cfg.batch_size)

    def __call__(self, model, numbers, seis, vel, families):
        """Refine maps: (maps, whether each had enough time). Without budget left, they stay unchanged."""
        left = self.minutes_left
        minutes = min(self.cfg.refine_minutes, left / len(numbers))
        if left > 0:
            reserved_ms = round(60_000 * minutes * len(numbers)) if self.has_budget else 0
            self.spent_ms.add(reserved_ms)
            cfg = dataclasses.replace(self.cfg, refine_minutes=minutes)
            vel, traces = self.method.refine(model, seis, vel, families, cfg)
            self.spent_ms.add(round(1000 * sum(trace.get("seconds", 0) for trace in traces)) - reserved_ms)
            is_whole = minutes == self.cfg.refine_minutes
            done = [is_whole or trace.get("seconds", 0) < 60 * minutes for trace in traces]
        else:
            done = [False] * len(numbers)
            traces = [{"kept": "guess", "why": "--refine_budget is spent"} for _ in numbers]
        for number, trace in zip(numbers, traces, strict=True):
            if (steps := trace.pop("steps", ())) and self.cfg.figures:
                self.results.keep_steps(number, steps)
        self.results.note(numbers, traces)
        return vel, done
