"""How realistic the synthetic maps are: `python bench.py realism --maps DIR --figure OUT`.

For each family a small network is trained to tell real maps from synthetic ones, and tested on maps it has
not seen. If it is right near 50 % of the time, the generator passes. As a control, the same network must
recognise maps that are deliberately wrong. DIR holds `<Family>.npz` files of real maps under `dev` and
`shapes`. The latter are off by 4 to 6 m/s; therefore noise of NOISE_M_S is added to all maps, real and
synthetic.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.map_statistics import print_statistics
from options.fields import Options, Section
from options.outputs import check_replaces
from report.figures import new_figure, save_figure
from synthetic.maps import make_maps
from system.files import write_json
from utils import FAMILIES, V_MAX, V_MIN, check_family

SYNTH_SEED = 1_234
NOISE_M_S = 10.0  # hides the errors of the recovered `shapes` maps
N_FOLDS = 5
PICTURE, ANSWERS = "which_are_real.png", "key.json"  # in the folder of --figure
SQUEEZE = 0.8  # the control's factor on depths: its layers are thinner than the family's


def real_maps(folder, family):
    """All real maps of a family, `dev` then `shapes`: (n, 1, 70, 70) float32 m/s.

    Raises ValueError if the file or one of the keys is missing.
    """
    path = Path(folder) / f"{family}.npz"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --maps names the folder of <Family>.npz with real maps")
    with np.load(path, allow_pickle=False) as file:
        missing = {"dev", "shapes"} - set(file.files)
        if missing:
            raise ValueError(f"{path}: holds {', '.join(file.files)}; expected keys dev and shapes")
        return np.concatenate([file["dev"], file["shapes"]]).astype(np.float32)


def wrong_maps(maps, family, seed=0):
    """Deliberately wrong maps for the control: (n, 1, 70, 70) float32 m/s.

    Layers are squeezed towards the surface. The residual of Style maps about their mean keeps its spectrum
    but gets random phases, which makes it a Gaussian random field.
    """
    if not family.startswith("Style"):
        rows = np.minimum(np.arange(70) / SQUEEZE, 69).round().astype(int)
        return maps[:, :, rows]
    mean = maps.mean(0, keepdims=True)
    white = np.random.default_rng(seed).standard_normal(maps.shape)
    phases = np.exp(1j * np.angle(np.fft.fft2(white)))
    residual = np.fft.ifft2(np.abs(np.fft.fft2(maps - mean)) * phases).real
    return np.clip(mean + residual, V_MIN, V_MAX).astype(np.float32)


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


def train_and_test(train, test, seed, epochs, batch_size=32, lr=2e-3):
    """Train the classifier; returns the share of test maps that it classifies correctly.

    train, test: (real, synthetic) maps each. The weights are those of the last epoch, so that nothing is
    chosen on the test maps. It is trained on mirrored maps too.
    """
    torch.manual_seed(seed)
    vel = torch.from_numpy(np.concatenate(train))
    is_real = torch.arange(len(vel)) < len(train[0])
    network, n_batches = _network(), max(len(vel) // batch_size, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * n_batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(vel)).tensor_split(n_batches):
            part = vel[batch].flip(3) if torch.rand(()) < 0.5 else vel[batch]
            logits = network(_views(part))[:, 0]
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, is_real[batch].float()).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        real, synthetic = (network(_views(torch.from_numpy(maps)))[:, 0] > 0 for maps in test)
    return torch.cat([real, ~synthetic]).double().mean().item()


def accuracy(real, synthetic, seed, epochs=40):
    """Cross-validated accuracy on equally many real and synthetic maps, and its standard error."""
    noise = np.random.default_rng(seed).normal(0, NOISE_M_S, (2, *real.shape)).astype(np.float32)
    real, synthetic = real + noise[0], synthetic + noise[1]
    fold = np.random.default_rng(seed).permutation(len(real)) % N_FOLDS
    shares = [
        train_and_test(
            (real[fold != k], synthetic[fold != k]), (real[fold == k], synthetic[fold == k]), seed, epochs
        )
        for k in range(N_FOLDS)
    ]
    share = float(np.average(shares, weights=np.bincount(fold)))
    return share, math.sqrt(share * (1 - share) / (2 * len(real)))


def draw_rows(rows, folder, n=8):
    """Draw n real and n synthetic maps of each family, shuffled and unlabelled; the key goes to a file."""
    if not (figure := new_figure((2 * n, 1.1 * len(rows)), layout="tight")):
        return
    axes = figure.subplots(len(rows), 2 * n, squeeze=False)
    rng, key = np.random.default_rng(), {}
    for line, (family, (real, synthetic)) in zip(axes, rows.items(), strict=True):
        n_each = min(n, len(real))
        maps = [("real", m) for m in real[rng.permutation(len(real))[:n_each]]]
        maps += [("synthetic", m) for m in synthetic[rng.permutation(len(synthetic))[:n_each]]]
        maps = [maps[i] for i in rng.permutation(len(maps))]
        key[family] = [kind for kind, _ in maps]
        for axis in line:
            axis.axis("off")
        for axis, (_, vel) in zip(line, maps, strict=False):
            axis.imshow(vel[0], vmin=V_MIN, vmax=V_MAX)
        line[0].set_title(family, fontsize=8, loc="left")
    picture, answers = Path(folder, PICTURE), Path(folder, ANSWERS)
    save_figure(figure, picture, dpi=100)
    write_json(answers, key)
    print(f"which are real? {picture}; the answers: {answers}")


REALISM = Section("realism", "a network trained to tell real maps from synthetic ones")


@dataclass
class RealismOptions(Options):
    """The options of `bench.py realism`."""

    maps: str = REALISM("", "folder of <Family>.npz with real maps under `dev` and `shapes`", path=True)
    families: tuple = REALISM((), "families to test; none or all = all ten")
    seeds: int = REALISM(3, "trainings of the classifier; 0 = statistics only", most=1000)
    epochs: int = REALISM(40, "of each training", above=0, most=10**5)
    figure: str = REALISM(
        "", "folder for a picture of real and synthetic maps in unlabelled order", path=True
    )


def bench_realism(args):
    """Print the classifier's accuracy and control for each family, and statistics of both kinds of maps."""
    torch.set_num_threads(1)
    if args.figure:
        check_replaces(Path(args.figure, PICTURE), "picture")
        check_replaces(Path(args.figure, ANSWERS), "JSON")
    families = FAMILIES if args.families in ((), ("all",)) else [check_family(f) for f in args.families]
    rows = {}
    for family in families:
        real = real_maps(args.maps, family)
        seed = SYNTH_SEED + zlib.crc32(family.encode()) % 1000
        made = make_maps(family, 10 * len(real), seed)
        rows[family] = real, made[: len(real)]
        print(f"\n{family}: {len(real)} real maps")
        sets = {"ours": made[: len(real)], "wrong on purpose": wrong_maps(made[: len(real)], family)}
        for name, maps in sets.items() if args.seeds else ():
            found = [accuracy(real, maps, s, args.epochs) for s in range(args.seeds if name == "ours" else 1)]
            shares = ", ".join(f"{share:.1%}" for share, _ in found)
            mean = np.mean([share for share, _ in found])
            print(f"  correct answers: {name:16} {mean:6.1%} ± {found[0][1]:.1%}   ({shares})", flush=True)
        print_statistics(real, made)
    if args.figure:
        draw_rows(rows, args.figure)
