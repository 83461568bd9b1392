"""Networks on maps of all ten families: `python bench.py accuracy --maps DIR`, or `--ckpt=a.pt,b.pt`.

DIR holds `<Family>.npz` files of real maps under the key `dev`. Their gathers are simulated, which reproduces
the real ones to float error. For a family without a file, synthetic maps are made from a seed that no
training uses. Every network is scored plain and averaged with its mirrored view, next to the mean of
synthetic maps.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cfg import Config
from inference.ensemble import Member
from inference.tta import make_views, predict_views
from networks.checkpoints import shipped_weights
from options.fields import Options, Section
from report.scores import mae_of, ssim
from synthetic.maps import make_maps
from system.devices import pick_device
from system.files import write_atomic
from utils import FAMILIES
from waves import simulate

TEST_SEED = 987_654_321  # of synthetic test maps
MEAN_SEED = 123_456_789  # of the maps whose mean is the predictor without a gather
N_MEAN = 100  # maps of each family in that mean
BATCH = 8


def test_maps(folder, family, n):
    """Real maps of a family (key `dev`) if `folder` has them, else synthetic ones: (maps, which of both).

    maps: (n, 1, 70, 70) m/s. Raises ValueError for files that hold anything else.
    """
    path = Path(folder) / f"{family}.npz" if folder else None
    if path is None or not path.is_file():
        return make_maps(family, n or 40, TEST_SEED), "synthetic"
    with np.load(path, allow_pickle=False) as file:
        if "dev" not in file.files:
            raise ValueError(f"{path}: holds {', '.join(file.files)}; expected maps under the key 'dev'")
        maps = file["dev"].astype(np.float32)
    if maps.ndim != 4 or maps.shape[1:] != (1, 70, 70):
        raise ValueError(f"{path}: shape {maps.shape}, expected (n, 1, 70, 70)")
    return maps[: n or None], "real"


@torch.no_grad()
def predicted(member, seis, views):
    """Plain and averaged predictions of gathers, each (N, 1, 70, 70), and the seconds each takes a map."""
    plain, mean, seconds = [], [], np.zeros(2)
    for part in seis.split(BATCH):
        begin = time.perf_counter()
        plain.append(predict_views(member, part, views[:1], member.mode)[0].cpu())
        middle = time.perf_counter()
        mean.append(predict_views(member, part, views, member.mode).mean(0).cpu())
        seconds += middle - begin, time.perf_counter() - middle
    return torch.cat(plain), torch.cat(mean), seconds / len(seis)


def mean_map():
    """The mean of synthetic maps of all families: (1, 1, 70, 70) m/s."""
    maps = [make_maps(family, N_MEAN, MEAN_SEED).mean(0, dtype=np.float64) for family in FAMILIES]
    return torch.from_numpy(np.mean(maps, 0)).float()[None]


ACCURACY = Section("accuracy", "networks on maps of all ten families")


@dataclass
class AccuracyOptions(Options):
    """The options of `bench.py accuracy`."""

    maps: str = ACCURACY("", "folder of <Family>.npz with real maps under `dev`", path=True)
    ckpt: tuple = ACCURACY((), "checkpoints; none = the network in weights/", path=True)
    n_per_family: int = ACCURACY(0, "maps of each family; 0 = all real ones, 40 synthetic ones", most=10**6)
    device: str = ACCURACY("auto", "auto, cpu, cuda, mps", choices=("auto", "cpu", "cuda", "mps"))
    json: str = ACCURACY("", "file to write every number to", writes="JSON")


def measure(args):
    """{network: {family: (MAE, RMSE, SSIM, seconds a map)}}, and {family: "real" or "synthetic"}."""
    device, views = pick_device(args.device), make_views(("mirror",))
    paths = args.ckpt or (str(shipped_weights()),)
    members = {name: Member(Config(ckpt=name), name, device).load() for name in paths}
    constant, rows, kinds = mean_map(), {}, {}
    for family in FAMILIES:
        maps, kinds[family] = test_maps(args.maps, family, args.n_per_family)
        vel = torch.from_numpy(maps)
        with torch.no_grad():
            seis = torch.cat([simulate(part.to(device)) for part in vel.split(BATCH)])
        found = {"mean map": (constant.expand_as(vel), 0.0)}
        for name, member in members.items():
            plain, mean, seconds = predicted(member, seis, views)
            found |= {name: (plain, seconds[0]), f"{name}, mirror average": (mean, seconds[1])}
        for name, (prediction, seconds) in found.items():
            rmse = (prediction - vel).double().square().mean((1, 2, 3)).sqrt().mean().item()
            scores = mae_of(prediction, vel).mean().item(), rmse, ssim(prediction, vel).mean().item()
            rows.setdefault(name, {})[family] = (*scores, seconds)
    return rows, kinds


def bench_accuracy(args):
    """Print MAE by family for each network, then mean RMSE, SSIM and seconds a map."""
    rows, kinds = measure(args)
    width = max(len(name) for name in rows)
    initials = ["".join(c for c in family if c.isupper()) for family in FAMILIES]  # FVA, …, SB
    head = " ".join(f"{name:>6}" for name in initials)
    print(f"{'MAE, m/s':{width}} {head} {'mean':>6} {'RMSE':>6} {'SSIM':>6} {'s a map':>8}")
    for name, row in rows.items():
        mae, rmse, similarity, seconds = np.array([row[family] for family in FAMILIES]).T
        print(
            f"{name:{width}} "
            + " ".join(f"{m:6.1f}" for m in mae)
            + f" {mae.mean():6.1f} {rmse.mean():6.1f} "
            f"{similarity.mean():6.3f} {seconds.mean():8.4f}"
        )
    synthetic = [family for family, kind in kinds.items() if kind == "synthetic"]
    print(f"synthetic test maps: {', '.join(synthetic) or 'none, all are real'}")
    if args.json:
        with write_atomic(args.json, "w") as file:
            json.dump({"rows": rows, "maps": kinds}, file)
