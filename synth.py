"""Make data sets in OpenFWI's layout: `python synth.py --out=DIR --n_per_family=1000`.

The velocity maps are synthetic (synthetic/maps.py), variations of others (--vary) or given (--maps); their
gathers are simulated. Every card is used, and `torchrun … synth.py` uses many machines that share a folder:
processes take the files in turn. You can stop it at any time; the same command continues where it stopped.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from options.command_line import parse_options
from options.fields import Options, Section, check_gpus
from options.outputs import check_outside
from parallel.launch import launch
from parallel.processes import processes
from report.figures import new_figure, save_figure
from synthetic.dataset import check_maps, write_dataset, write_given, write_varied
from synthetic.maps import make_maps
from system.files import check_writable
from utils import FAMILIES, V_MAX, V_MIN, check_family, run_program


def contact_sheet(path, n=8, seed=0):
    """Draw n maps of each family on one colour scale; returns False if matplotlib is not installed."""
    if not (fig := new_figure((1.4 * n + 1, 16))):
        return False
    axes = fig.subplots(len(FAMILIES), n, sharex=True, sharey=True)
    ticks = (0, 350, 700)
    for row, family in zip(axes, FAMILIES, strict=True):
        for i, (ax, field) in enumerate(zip(row, make_maps(family, n, seed)[:, 0], strict=True)):
            image = ax.imshow(field, extent=(0, 700, 700, 0), vmin=V_MIN, vmax=V_MAX, cmap="viridis")
            ax.set(xticks=ticks, yticks=ticks, title=family if i == 0 else "")
    fig.supxlabel("x (m)")
    fig.supylabel("depth (m)")
    fig.colorbar(image, ax=axes, label="velocity (m/s)", shrink=0.4)
    save_figure(fig, path, dpi=72)
    return True


def real_above_synthetic(path, folder, n=8, seed=0):
    """Draw n real maps of each family found in `folder`, and n synthetic ones below them.

    folder: holds <Family>.npz with the key dev, or with keys model{k}, which stand for OpenFWI's files. Those
    of FlatFault_A have four layers, so then ours get four, too. Returns False if matplotlib is not installed.
    Raises ValueError if the folder holds no such file.
    """
    found = [Path(folder) / f"{family}.npz" for family in FAMILIES]
    found = [file for file in found if file.is_file()]
    if not found:
        raise ValueError(f"{folder}: no <Family>.npz in it; expected files such as CurveVel_A.npz")
    if not (fig := new_figure((1.6 * n, 3.3 * len(found)))):
        return False
    axes = fig.subplots(2 * len(found), n, squeeze=False)
    for row, file in zip(axes.reshape(-1, 2, n), found, strict=True):
        with np.load(file) as maps:
            key = "dev" if "dev" in maps.files else maps.files[-1]
            real = check_maps(maps[key][:n], file)
        layers = 4 if file.stem == "FlatFault_A" and key != "dev" else None
        for what, line, fields in zip(
            ("real", "synthetic"), row, (real, make_maps(file.stem, n, seed, layers=layers)), strict=True
        ):
            line[0].set_title(f"{file.stem}, {what}", loc="left")
            for ax, field in zip(line, fields[:, 0], strict=False):
                ax.imshow(field, extent=(0, 700, 700, 0), vmin=V_MIN, vmax=V_MAX, cmap="viridis")
                ax.set(xticks=(), yticks=())
    save_figure(fig, path, dpi=90)
    return True


SYNTH = Section("synth", "data sets in OpenFWI's layout")


@dataclass
class SynthOptions(Options):
    """The options of synth.py."""

    out: str = SYNTH("", "folder of the data set", path=True)
    families: tuple = SYNTH((), "families to draw; none or all = all ten")
    n_per_family: int = SYNTH(0, "maps of each family", most=10**6)
    seed: int = SYNTH(0, "random seed of the maps")
    dtype: str = SYNTH("float32", "number format of the gathers: float16, float32",
                       choices=("float16", "float32"))  # fmt: skip
    per_file: int = SYNTH(500, "largest number of maps in a file", above=0)
    maps: str = SYNTH("", "simulate this .npy or .npz file of velocity maps (m/s) instead", path=True)
    keys: tuple = SYNTH((), "with --maps=FILE.npz: model1,model2,…; none = all")
    n_per_file: int = SYNTH(0, "with --maps: the first maps of the .npy or of each key; 0 = all")
    vary: str = SYNTH(
        "", "simulate variations of the velocity maps in this folder of OpenFWI files", path=True
    )
    device: str = SYNTH("auto", "auto, cpu, cuda, mps", choices=("auto", "cpu", "cuda", "mps"))
    gpus: str = SYNTH("auto", "CUDA cards, one process for each: auto = all, or a number")
    threads: int = SYNTH(0, "CPU threads of each process; 0 = an equal share of the cores")
    figure: str = SYNTH("", "draw a contact sheet of all families to this .png", writes="picture")
    real: str = SYNTH("", "with --figure: folder of real maps, <Family>.npz, to draw above ours", path=True)

    def __post_init__(self):
        super().__post_init__()
        check_gpus(self.gpus)


def main(argv):
    """Write a data set or a figure; raises ValueError for unknown or conflicting options."""
    args = parse_options(argv, SynthOptions, __doc__)
    families = FAMILIES if args.families in ((), ("all",)) else [check_family(f) for f in args.families]
    if not (args.figure or args.out):
        raise ValueError("nothing to do; give --out=DIR for a data set, or --figure=FILE.png")
    if args.real and not args.figure:
        raise ValueError("--real needs --figure=FILE.png")
    if args.figure:
        check_writable(Path(args.figure).parent)
    if args.out:
        check_sources(args, families)
        check_outside("out", args.out, [args.vary] if args.vary else [])
        launch(args, __file__, argv)
    if args.figure and os.environ.get("RANK", "0") == "0":
        drawn = real_above_synthetic(args.figure, args.real) if args.real else contact_sheet(args.figure)
        if drawn:
            print(f"wrote {args.figure}")
    if args.out:
        with processes(args, "gloo") as process:
            write(args, families, process)


def check_sources(args, families):
    """Raise ValueError unless the options name exactly one source of maps."""
    if args.maps:
        if args.n_per_family or args.vary or (args.families and len(families) != 1):
            raise ValueError("--maps gives the maps: leave out --vary, --n_per_family and a second family")
    elif not args.n_per_family or args.keys or args.n_per_file:
        raise ValueError("give --n_per_family=N, or --maps=FILE; --keys and --n_per_file need --maps")


def write(args, families, process):
    """Write the data set that the options ask for."""
    common = {"dtype": args.dtype, "per_file": args.per_file, "process": process}
    if args.maps:
        family = families[0] if args.families else None
        write_given(args.out, args.maps, family, args.keys, args.n_per_file or None, **common)
    elif args.vary:
        write_varied(args.out, args.vary, families, args.n_per_family, args.seed, **common)
    else:
        write_dataset(args.out, families, args.n_per_family, args.seed, **common)
    if process.is_main:
        print(f"complete: {args.out}")


if __name__ == "__main__":
    run_program(main)
