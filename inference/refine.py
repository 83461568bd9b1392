"""Refining methods: predictions improved against the observed gather."""

from inversion.feedback import feedback
from inversion.invert import invert, is_searched


def refine_feedback(model, seis, vel, families, cfg):
    maps, misfits = feedback(model, seis, vel, cfg.refine_rounds, cfg.refine_step)
    return maps, [{"misfits": [float(f"{m:.6g}") for m in row]} for row in misfits.T.tolist()]


def refine_inversion(model, seis, vel, families, cfg):
    return invert(seis, vel, families, cfg.refine_minutes, cfg.refine_iterations)


def inversion_batches(numbers, families, size):
    """Gathers in their order: one that is searched is kept as soon as it is done, for that takes minutes.

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


# name: f(model, seis (B, 5, 1000, 70), vel (B, 1, 70, 70), families [name or None], cfg)
# -> (maps (B, 1, 70, 70), a dict for JSON each: what it tells of its course)
REFINE = {"feedback": refine_feedback, "inversion": refine_inversion}
