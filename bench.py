"""Measure the project's parts: `python bench.py wave [--maps FILE] [--batch=1,8]`, `python bench.py train`.

Contenders take turns within one run, so that other load on the machine meets all alike; compare the ratios of
their medians rather than seconds from different runs.
"""

import argparse

import torch

from benchmarks import accuracy, data_speed, inversion_quality, realism
from benchmarks.csv_speed import bench_csv
from benchmarks.network_table import bench_networks
from benchmarks.train_speed import bench_train
from benchmarks.wave_speed import bench_wave, soak
from utils import run_program


def main(argv):
    """Run the benchmark that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    sub = what.add_parser("wave", help="simulation and its gradient against the plain loop and deepwave")
    sub.add_argument(
        "--maps", metavar="FILE", help=".npy or .npz of velocity maps; default: two layered ones"
    )
    sub.add_argument("--batch", type=lambda s: [int(b) for b in s.split(",")], default=[1, 8], metavar="1,8")
    sub.add_argument("--who", default="ours,plain,deepwave", help="contenders, of ours, plain and deepwave")
    sub.add_argument("--repeats", type=int, default=5)
    sub.add_argument("--threads", type=int, default=torch.get_num_threads())
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sub.add_argument(
        "--soak", type=int, metavar="N", help="instead simulate N maps in a loop and watch the memory"
    )
    sub.add_argument("--json", metavar="FILE", help="write every number there")
    sub = what.add_parser(
        "train", help="our training loop against a bare one; other words are cfg.py's options"
    )
    sub.add_argument("--steps", type=int, default=16, help="a turn")
    sub.add_argument("--repeats", type=int, default=7)
    sub.add_argument("--json", metavar="FILE", help="write every number there")
    what.add_parser("network", help="a network's size and speed; all words are cfg.py's options")
    sub = what.add_parser("csv", help="the submission's writer against a simple one")
    sub.add_argument("--n", type=int, default=65_818, help="gathers; the competition's")
    sub = what.add_parser("data", help="the loader against bare reading of the same files")
    data_speed.add_arguments(sub)
    sub = what.add_parser("accuracy", help="networks on (real) maps of all ten families")
    accuracy.add_arguments(sub)
    sub = what.add_parser("realism", help="a network trained to tell real maps from synthetic ones")
    realism.add_arguments(sub)
    sub = what.add_parser("inversion", help="waveform inversion from several starts and through noise")
    inversion_quality.add_arguments(sub)
    args, options = parser.parse_known_args(argv)
    if args.what == "train":
        return bench_train(args, options)
    if args.what == "network":
        return bench_networks(options)
    if options:
        parser.error(f"unknown option {options[0]}")
    if args.what == "csv":
        return bench_csv(args.n)
    if args.what == "data":
        return data_speed.bench_data(args)
    if args.what == "accuracy":
        return accuracy.bench_accuracy(args)
    if args.what == "realism":
        return realism.bench_realism(args)
    if args.what == "inversion":
        return inversion_quality.bench_inversion(args)
    torch.set_num_threads(args.threads)
    if args.soak:
        soak(args.soak, args.device)
    else:
        bench_wave(args)


if __name__ == "__main__":
    run_program(main)
