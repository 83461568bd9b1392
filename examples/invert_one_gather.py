"""Invert one gather: `python examples/invert_one_gather.py [FILE.png] [CKPT]`.

It starts from the prediction of the network CKPT, or from the mean of the family's maps, and takes half a
minute on two cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this can be started from any folder

import torch

from cfg import Config
from inference.ensemble import Member
from inversion.invert import invert
from report.figures import draw_gather, draw_map, new_figure, save_figure
from synthetic.maps import make_maps
from waves import simulate


def main(argv, family="FlatVel_A", minutes=2.0):
    """Invert one synthetic gather; draw gather, start, inversion and truth."""
    path = argv[0] if argv else "docs/invert_one_gather.png"
    truth = torch.from_numpy(make_maps(family, 1, seed=7))
    seis = simulate(truth)  # the observed gather (1, 5, 1000, 70)
    if argv[1:]:
        start = Member(Config(ckpt=argv[1]), argv[1], torch.device("cpu"))(seis)
    else:
        start = torch.from_numpy(make_maps(family, 200, seed=8)).mean(0, keepdim=True)

    (vel,), (course,) = invert(seis, start, [family], minutes)
    before, after = ((map_ - truth).abs().mean().item() for map_ in (start, vel[None]))
    seconds, n_simulations = course["seconds"], course["simulations"]
    print(f"error {before:.1f} -> {after:.2f} m/s in {seconds:.0f} s, {n_simulations} simulations")

    if fig := new_figure((15, 3.2)):
        ax = fig.subplots(1, 4)
        draw_gather(ax[0], "observed: centre shot", seis[0, 2].numpy(), (-1, 1))
        draw_map(fig, ax[1], f"start, {before:.0f} m/s off", start[0, 0].numpy())
        draw_map(fig, ax[2], f"inversion, {after:.1f} m/s off", vel[0].numpy())
        draw_map(fig, ax[3], "truth", truth[0, 0].numpy())
        save_figure(fig, path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
