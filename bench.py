"""Measure parts of the project: `python bench.py wave --batch=1,8`. Options: `python bench.py wave --help`.

What is compared takes turns within one run, so that other load on the machine affects all alike. Compare the
ratios of medians rather than seconds from different runs.
"""

import sys

from benchmarks.ablation import AblationOptions, bench_ablation
from benchmarks.accuracy import AccuracyOptions, bench_accuracy
from benchmarks.csv_speed import CsvOptions, bench_csv
from benchmarks.data_speed import DataOptions, bench_data
from benchmarks.inversion_quality import InversionOptions, bench_inversion
from benchmarks.network_table import bench_networks
from benchmarks.realism import RealismOptions, bench_realism
from benchmarks.train_speed import bench_train
from benchmarks.wave_speed import WaveOptions, bench_wave
from options.command_line import nearest, parse_options
from utils import run_program

BENCHMARKS = {  # name: (its options, the function to call with them)
    "wave": (WaveOptions, bench_wave),
    "accuracy": (AccuracyOptions, bench_accuracy),
    "inversion": (InversionOptions, bench_inversion),
    "realism": (RealismOptions, bench_realism),
    "ablation": (AblationOptions, bench_ablation),
    "data": (DataOptions, bench_data),
    "csv": (CsvOptions, bench_csv),
    "train": (None, bench_train),  # these two parse their own options, most of which are train.py's
    "network": (None, bench_networks),
}


def main(argv):
    """Run the benchmark that the first word names. Raises ValueError for unknown names and options."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for name, (_, benchmark) in BENCHMARKS.items():
            print(f"  {name:12}{benchmark.__doc__.splitlines()[0]}")
        sys.exit(0)
    name, *words = argv
    if name not in BENCHMARKS:
        raise ValueError(
            f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)} (all: {', '.join(BENCHMARKS)})"
        )
    options, benchmark = BENCHMARKS[name]
    if options is None:
        benchmark(words)
    else:
        benchmark(parse_options(words, options, benchmark.__doc__))


if __name__ == "__main__":
    run_program(main)
