"""Refining methods: predictions improved against the observed gather. A new one is an entry in `REFINE`."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from inversion.feedback import feedback
from inversion.invert import expected_gain, invert, is_searched


def in_turn(numbers, families, size):
    """Gathers in their order, `size` together."""
    return [numbers[k : k + size] for k in range(0, len(numbers), size)]


def inversion_batches(numbers, families, size):
    """Gathers in their order: each that is searched alone, so that it is kept once its minutes are over.

    Those that are only fitted cell by cell are fitted `size` together, in the place of the first.
    """
    batches, together = [], []
    for i in numbers:
        if is_searched(families[i]):
            batches.append([i])
        else:
            if len(together) % size == 0:
                together = []
                batches.append(together)
            together.append(i)
    return batches


def refine_feedback(model, seis, vel, families, cfg):
    maps, misfits = feedback(model, seis, vel, cfg.refine_rounds, cfg.refine_step)
    return maps, [{"misfits": [float(f"{m:.6g}") for m in row]} for row in misfits.T.tolist()]


def refine_inversion(model, seis, vel, families, cfg):
    return invert(seis, vel, families, cfg.refine_minutes, cfg.refine_iterations)


@dataclass(frozen=True)
class Method:
    """A refining method; only `refine` is required.

    refine(model, seis (B, 5, 1000, 70), vel (B, 1, 70, 70), families [name or None], cfg) -> (maps, a dict
    for JSON each). `model` is the whole prediction as a function of gathers. Of the dicts, "seconds" count
    towards --refine_budget, and "steps", maps on the way [(what, (70, 70) array), …], are drawn.
    """

    refine: Callable
    batches: Callable = in_turn  # (numbers, families of all, size) -> [[number, …], …]
    size_without_cuda: int | None = None  # gathers refined together elsewhere; None = --batch_size
    # (seis, vel) -> (B,), what a minute may gain: --refine_budget is for methods that tell, greatest first
    gain: Callable | None = None


REFINE = {
    "feedback": Method(refine_feedback),
    # a CPU gains a quarter at most by batches, and an interruption would lose more
    "inversion": Method(refine_inversion, inversion_batches, size_without_cuda=1, gain=expected_gain),
}


def check_method(name):
    """Raise ValueError for a refining method that there is not."""
    if name not in ("none", *REFINE):
        raise ValueError(f"--refine={name}: expected one of none, {', '.join(REFINE)}")


class Refiner:
    """A method at work on the gathers of `results`, within --refine_budget minutes for all; 0 = no limit.

    Notes what the method tells of each gather in `results`. Gathers that had less time than they wanted, for
    the budget was spent, are to be done again when there is some of it now.
    """

    def __init__(self, cfg, results):
        self.cfg, self.results, self.method = cfg, results, REFINE[cfg.refine]
        self.has_budget = bool(cfg.refine_budget and self.method.gain)
        self.spent_s = sum(note.get("seconds", 0) for note in results.notes())
        if self.minutes_left > 0:
            results.forget(~results["refined"])

    @property
    def minutes_left(self):
        return self.cfg.refine_budget - self.spent_s / 60 if self.has_budget else math.inf

    def batches(self, numbers, families, device):
        """Gathers in the order of `numbers`, as the method takes them together; families of all gathers."""
        size = self.method.size_without_cuda if device.type != "cuda" else None
        return self.method.batches(numbers, families, size or self.cfg.batch_size)

    def __call__(self, model, numbers, seis, vel, families):
        """Refine maps: (maps, whether each had the time it wanted). Once the budget is spent they stay."""
        minutes = min(self.cfg.refine_minutes, self.minutes_left / len(numbers))
        if self.minutes_left > 0:
            cfg = dataclasses.replace(self.cfg, refine_minutes=minutes)
            vel, traces = self.method.refine(model, seis, vel, families, cfg)
            is_whole = minutes == self.cfg.refine_minutes
            done = [is_whole or trace.get("seconds", 0) < 60 * minutes for trace in traces]
        else:
            done = [False] * len(numbers)
            traces = [{"kept": "guess", "why": "--refine_budget is spent"} for _ in numbers]
        for number, trace in zip(numbers, traces, strict=True):
            self.spent_s += trace.get("seconds", 0)
            if (steps := trace.pop("steps", ())) and self.cfg.figures:
                self.results.keep_steps(number, steps)
        self.results.note(numbers, traces)
        return vel, done
