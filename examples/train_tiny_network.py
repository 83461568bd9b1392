"""Train a small network on simulated pairs: `python examples/train_tiny_network.py [FILE.png]`.

The loop has ten lines and takes a minute on one core. `train.py` adds what long runs need: several cards,
resuming, averaged weights, guards.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this can be started from any folder

import torch

from cfg import Config
from model import build_model
from report.figures import prediction_figure
from synthetic.maps import make_maps
from waves import simulate


def main(argv, n_maps=64, n_steps=150):
    """Overfit n_maps FlatVel_A pairs, and draw gather, truth, prediction and error of the first."""
    path = argv[0] if argv else "docs/train_tiny_network.png"
    torch.manual_seed(0)
    vel = torch.from_numpy(make_maps("FlatVel_A", n_maps, seed=0))
    with torch.no_grad():
        seis = simulate(vel)

    tiny = Config(arch="seisnext", head="perfect", decoder_norm="batch", input_scaling="signed_log", width=16)
    network = build_model(tiny)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, n_steps)
    for step in range(n_steps):
        batch = torch.randperm(n_maps)[:8]
        loss = (network(seis[batch]) - vel[batch]).abs().mean()  # L1 in m/s
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == n_steps - 1:
            print(f"step {step:4d} | L1 {loss.item():6.1f} m/s")

    network.eval()
    with torch.no_grad():
        prediction = network(seis[:1])[0, 0].numpy()
    prediction_figure(path, [("trained on", seis[0].numpy(), vel[0, 0].numpy(), prediction)])
    return loss.item()


if __name__ == "__main__":
    main(sys.argv[1:])
