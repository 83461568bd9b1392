"""Speed of writing the submission: `python bench.py csv`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.wave_speed import seconds
from inference.submission import HEADER, write_submission
from options.fields import Options, Section

CSV = Section("csv", "the submission's writer against a simple one")


@dataclass
class CsvOptions(Options):
    """The options of `bench.py csv`."""

    n: int = CSV(65_818, "gathers; the competition has 65,818", above=0, most=10**7)


def bench_csv(args):
    """Write n maps as the competition's CSV, and some by a simple writer, whose bytes must be the same."""
    n, maps = args.n, np.random.default_rng(0).uniform(1500, 4500, (64, 70, 70)).astype(np.float32)
    oids = [f"{i:010x}" for i in range(n)]

    def simple():
        lines = [HEADER]
        for oid, vel in zip(oids, maps, strict=False):
            for y, row in enumerate(vel.astype(float)):
                lines.append(f"{oid}_y_{y}," + ",".join(f"{v:.2f}" for v in row[1::2]) + "\n")
        return "".join(lines).encode()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "submission.csv")
        cpu = torch.device("cpu")
        simple_s = seconds(simple, cpu) * n / len(maps)
        ours_s = seconds(lambda: write_submission(path, oids, [maps[i % len(maps)] for i in range(n)]), cpu)
        with open(path, "rb") as file:
            expected = simple()
            assert file.read(len(expected)) == expected, "the two writers disagree"
        n_bytes = path.stat().st_size
    print(f"{70 * n} rows, {n_bytes / 1e9:.2f} GB: {ours_s:.1f} s, {n_bytes / ours_s / 1e6:.0f} MB/s; "
          f"a simple writer would take {simple_s:.0f} s; identical bytes")  # fmt: skip
