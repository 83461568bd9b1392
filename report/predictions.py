"""What `infer.py` tells of its predictions: tables of errors, misfits and their warnings, figures."""

from pathlib import Path

import numpy as np

from report.figures import calibration_figure, quality_figure, steps_figure
from report.scores import spearman
from utils import write_atomic
from waves.misfit import MISFITS, WARNINGS

# ---------------------------------------------------------------- misfits


def write_misfits(path, oids, results, families, errors=None):
    """CSV of misfits, warnings and families, with errors where they are known."""
    with write_atomic(path, "w") as file:
        file.write(f"oid,{','.join(MISFITS)},warning,family{',mae' if errors is not None else ''}\n")
        for i, oid in enumerate(oids):
            misfits = ",".join(f"{results[m][i]:.6g}" for m in MISFITS)
            warnings = " ".join(name for name in WARNINGS if results[name][i])
            mae = f",{errors[i]:.4f}" if errors is not None else ""
            file.write(f"{oid},{misfits},{warnings},{families[i] or ''}{mae}\n")


def print_warnings(oids, results):
    """One line for each kind of gather that does not look like OpenFWI's."""
    for name, text in WARNINGS.items():
        if len(found := np.flatnonzero(results[name])):
            print(f"warning: {len(found)} of {len(oids)} gathers (first {oids[found[0]]}) {text}")


def print_misfits(results, errors):
    """The misfits' quantiles, and their rank correlation with the errors where these are known."""
    for name in MISFITS:
        low, middle, high = np.quantile(results[name], (0.1, 0.5, 0.9))
        line = f"{name:<11}10 % {low:.4f}, median {middle:.4f}, 90 % {high:.4f}"
        if errors is not None:
            line += f" | rank correlation with the error {spearman(results[name], errors):.3f}"
        print(line)


# ---------------------------------------------------------------- figures


def draw(path, numbers, run, results, errors, simulate):
    """`quality_figure` of the gathers `numbers` of a run."""
    rows = []
    for i in map(int, numbers):
        vel = np.array(results["vel"][i])
        title = f"{run.gathers[i].oid}\nmisfit {results['misfit'][i]:.2%}"
        truth = run.truth([i])[0, 0].numpy() if errors is not None else None
        rows.append((title, run.gather(i), vel[0], truth, simulate(vel)))
    quality_figure(path, rows)


def draw_families(folder, run, results, families, errors, simulate):
    """Best, median and worst prediction of each family: by error where it is known, else by log misfit.

    Of those that were inverted, the steps too.
    """
    by = errors if errors is not None else results["log_misfit"]
    for family in sorted({f or "unknown" for f in families}):
        mine = [i for i, f in enumerate(families) if (f or "unknown") == family]
        mine.sort(key=lambda i: by[i])
        chosen = dict.fromkeys((mine[0], mine[len(mine) // 2], mine[-1]))
        draw(Path(folder) / f"{family}.png", chosen, run, results, errors, simulate)
        for i in chosen:
            if steps := run.steps_of(i):
                truth = run.truth([i])[0, 0].numpy() if errors is not None else None
                oid = run.gathers[i].oid
                steps_figure(Path(folder) / "steps" / f"{oid}.png", f"{family} {oid}", steps, truth)
    if errors is not None:
        names = [f or "unknown" for f in families]
        for name in MISFITS:
            correlation = spearman(results[name], errors)
            calibration_figure(Path(folder) / f"{name}.png", results[name], errors, names, correlation)
