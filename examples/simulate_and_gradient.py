"""Simulate a map and take the gradient of a misfit: `python examples/simulate_and_gradient.py [FILE.png]`.

The picture shows the map, its centre shot, and how a blurred map should change to fit the gather better.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this can be started from any folder

import torch

from postprocess import gaussian
from report.figures import draw_gather, draw_map, new_figure, save_figure
from synthetic.maps import make_maps
from waves import simulate


def main(argv):
    """Simulate, differentiate, and draw into the file argv[0], by default docs/simulate_and_gradient.png."""
    path = argv[0] if argv else "docs/simulate_and_gradient.png"
    true_vel = torch.from_numpy(make_maps("CurveFault_A", 1, seed=3))  # (1, 1, 70, 70) m/s
    seis = simulate(true_vel)  # (1, 5 sources, 1000 samples of 1 ms, 70 receivers)

    vel = gaussian(true_vel, 4.0).requires_grad_()
    residual = simulate(vel) - seis
    residual.square().sum().backward()  # vel.grad: (1, 1, 70, 70), exact, by the adjoint of the same scheme
    print(f"relative misfit of the blurred map: {(residual.norm() / seis.norm()).item():.2%}")

    if fig := new_figure((12, 3.2)):
        ax = fig.subplots(1, 3)
        shot, gradient = seis[0, 2].numpy(), -vel.grad[0, 0].numpy()
        draw_map(fig, ax[0], "velocity map", true_vel[0, 0].numpy())
        draw_gather(ax[1], "centre shot", shot, (-1, 1))
        limit = abs(gradient[5:]).max()  # without the rows near the sources, which exceed all others
        title, unit = "downhill direction (red: faster)", "misfit per m/s"
        draw_map(fig, ax[2], title, gradient, cmap="RdBu_r", vmin=-limit, vmax=limit, unit=unit)
        save_figure(fig, path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
