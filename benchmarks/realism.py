"""Tell real velocity maps from synthetic ones: a small network trained to, for `bench.py realism`.

Near 50 % on maps it has not seen, the generator passes; the same network must find a generator that is
deliberately wrong, or its failure to find ours would mean nothing.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from synthetic import maps
from utils import check_family

# what the control changes in maps.py: thicknesses three times as irregular; twice the throw
WRONG = {"FlatVel_A": {"JITTER": 3.0}, "CurveVel_A": {"JITTER": 3.0}, "FlatFault_A": {"THROW": (20, 40)}}
SYNTH_SEED = 123


def real_maps(path):
    """All maps of an .npz file with keys model{k}, in order of k: (n, 1, 70, 70) float32 m/s."""
    with np.load(path) as file:
        return np.concatenate([file[key] for key in sorted(file.files, key=lambda key: int(key[5:]))])


@contextlib.contextmanager
def wrong_generator(family):
    """Inside, `maps.make_maps` makes this family wrongly."""
    kept = {name: getattr(maps, name) for name in WRONG[family]}
    try:
        for name, value in WRONG[family].items():
            setattr(maps, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(maps, name, value)


def snap(vel, family, share):
    """Set cells within `share` of one of a map's layer velocities to it: (n, 1, 70, 70) -> the same.

    A map's layer velocities are its commonest values, four of them in FlatFault_A's four-layer maps.
    """
    n_layers = 4 if "Fault" in family else 9
    snapped = np.empty_like(vel)
    for i, field in enumerate(vel[:, 0]):
        values, counts = np.unique(field, return_counts=True)
        layers = values[np.argsort(-counts, kind="stable")[:n_layers]]
        nearest = layers[np.abs(field[..., None] - layers).argmin(-1)]
        snapped[i] = np.where(np.abs(field / nearest - 1) < share, nearest, field)
    return snapped


def _views(vel):
    """Maps with their differences down and across, which show faint seams: (B, 1, Z, X) -> (B, 3, Z, X)."""
    down = F.pad(vel.diff(dim=2), (0, 0, 0, 1))
    across = F.pad(vel.diff(dim=3), (0, 1))
    return torch.cat([(vel - 3000) / 1000, (down / 20).asinh() / 4, (across / 20).asinh() / 4], 1)


def _network():
    def block(n_in, n_out, kernel):
        conv = nn.Conv2d(n_in, n_out, kernel, 2, kernel // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())

    return nn.Sequential(
        *(block(3, 16, 5), block(16, 32, 3), block(32, 64, 3)),  # 70 -> 35 -> 18 -> 9
        *(nn.Conv2d(64, 16, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)),
        *(nn.Linear(16 * 9 * 9, 64), nn.ReLU(), nn.Linear(64, 1)),
    )


def accuracy(real, made, n_train, seed, epochs, batch_size=64, lr=2e-3):
    """Train on n_train real and as many synthetic maps; share of the others told rightly, and its error.

    The weights are those of the last epoch: nothing is chosen on the held-out maps.
    """
    torch.manual_seed(seed)
    vel = torch.from_numpy(np.concatenate([real[:n_train], made[:n_train]]))
    is_real = torch.arange(2 * n_train) < n_train
    network, n_batches = _network(), 2 * n_train // batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * n_batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(vel))[: n_batches * batch_size].view(n_batches, -1):
            logits = network(_views(vel[batch]))[:, 0]
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, is_real[batch].float()).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        said = [
            torch.cat([network(_views(part))[:, 0] > 0 for part in torch.from_numpy(v[n_train:]).split(100)])
            for v in (real, made)
        ]
    right = torch.cat([said[0], ~said[1]]).double()
    return right.mean().item(), math.sqrt(right.mean() * (1 - right.mean()) / len(right))


def add_arguments(parser):
    parser.add_argument("--maps", required=True, metavar="DIR", help="folder of <Family>.npz of real maps")
    parser.add_argument("--families", default=",".join(WRONG), help=f"of {', '.join(WRONG)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--snap", type=float, default=0.0, help="first set cells this near a layer to it")


def bench_realism(args):
    """Print the accuracy for each family and seed, and that of the control."""
    torch.set_num_threads(1)
    for family in args.families.split(","):
        if check_family(family) not in WRONG:
            raise ValueError(f"{family}: expected one of {', '.join(WRONG)}")
        real = real_maps(Path(args.maps) / f"{family}.npz")
        few = len(real) < 1000
        layers, n_train = (
            (4 if "Fault" in family else None),
            len(real) * (7 if few else 8) // (10 if few else 11),
        )
        sets = {"ours": maps.make_maps(family, len(real), SYNTH_SEED, layers=layers)}
        with wrong_generator(family):
            sets["wrong on purpose"] = maps.make_maps(family, len(real), SYNTH_SEED, layers=layers)
        for name, made in sets.items():
            for seed in range(args.seeds if name == "ours" else 1):
                pair = [snap(v, family, args.snap) for v in (real, made)] if args.snap else (real, made)
                share, error = accuracy(*pair, n_train, seed, epochs=40 if few else 10)
                who = f"{family:12s} {name:17s} seed {seed}"
                print(f"{who} | {share:6.1%} ± {error:.1%} of {2 * (len(real) - n_train)}", flush=True)
