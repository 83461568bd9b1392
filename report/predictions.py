"""What `infer.py` reports of its predictions: misfits, warnings, and which ones to look at."""

import numpy as np

from report.scores import spearman
from system.files import write_atomic
from waves.misfit import MISFITS, WARNINGS


def write_misfits(path, oids, results, families, errors=None):
    """Write a CSV of misfits, warnings and families, and of errors if they are known."""
    with write_atomic(path, "w") as file:
        file.write(f"oid,{','.join(MISFITS)},warning,family{',mae' if errors is not None else ''}\n")
        for i, oid in enumerate(oids):
            misfits = ",".join(f"{results[m][i]:.6g}" for m in MISFITS)
            warnings = " ".join(name for name in WARNINGS if results[name][i])
            mae = f",{errors[i]:.4f}" if errors is not None else ""
            file.write(f"{oid},{misfits},{warnings},{families[i] or ''}{mae}\n")


def print_warnings(oids, results):
    """Print a line for each kind of gather that does not look like OpenFWI's."""
    for name, text in WARNINGS.items():
        if len(found := np.flatnonzero(results[name])):
            print(f"warning: {len(found)} of {len(oids)} gathers (first {oids[found[0]]}) {text}")


def print_misfits(results, errors):
    """Print quantiles of the misfits, and their rank correlation with the errors if these are known."""
    for name in MISFITS:
        low, middle, high = np.quantile(results[name], (0.1, 0.5, 0.9))
        line = f"{name:<11}10 % {low:.4f}, median {middle:.4f}, 90 % {high:.4f}"
        if errors is not None:
            line += f" | rank correlation with the error {spearman(results[name], errors):.3f}"
        print(line)


def best_median_worst(families, values):
    """Yield each family with the numbers of its samples of lowest, median and highest value."""
    for family in sorted(set(families)):
        mine = sorted((i for i, name in enumerate(families) if name == family), key=lambda i: values[i])
        yield family, list(dict.fromkeys((mine[0], mine[len(mine) // 2], mine[-1])))
