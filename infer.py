"""Predict velocity maps: `python infer.py --ckpt runs/001-full/best.pt --input DIR --out submission.csv`.

--input takes Kaggle test gathers, one .npy of (5, 1000, 70) each, OpenFWI files
of (n, 5, 1000, 70), or folders of either. Options in cfg.py.
"""

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cfg import network_config, parse
from data import (
    FULL_CHECK_GB,
    GATHER_SHAPE,
    MAP_SHAPE,
    SEIS_NAME,
    VEL_NAME,
    VEL_PREFIX,
    check_array,
    check_finite,
    family_in,
    find_files,
    open_array,
    preprocess,
)
from model import build_model, load_weights, predict_tta
from utils import (
    AUTOCAST,
    FAMILIES,
    V_MAX,
    V_MIN,
    Score,
    averaged_weights,
    check_writable,
    load_checkpoint,
    pick_precision,
    processes,
    run_program,
    score_table,
    write_atomic,
)

HEADER = "oid_ypos," + ",".join(f"x_{x}" for x in range(1, 70, 2)) + "\n"


@dataclass(frozen=True)
class Gather:
    """One gather to predict: `index` in a file of many, None where the file is the gather."""

    oid: str
    path: Path
    index: int | None = None


# ---------------------------------------------------------------- input


def find_gathers(root):
    """Every gather of a file or folder, in name order; headers checked.

    A file of one gather gives its stem as id, a file of many its path below `root`
    and the index: FlatVel_A_data_data1_0. Raises ValueError for a missing or empty
    folder, wrong shapes or dtypes, and ids that collide.
    """
    root = Path(root)
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder; give gathers by --input=PATH")
    files = [root] if root.is_file() else find_files(root, re.compile(r"[^.].*\.npy"))
    gathers, seen = [], {}
    for path in files:
        if root.is_dir() and VEL_NAME.fullmatch(path.name):
            continue  # velocity maps beside their gathers
        array = check_array(path, [GATHER_SHAPE, (None, *GATHER_SHAPE)], "shot gathers")
        if array.ndim == len(GATHER_SHAPE):
            found = [Gather(path.stem, path)]
        else:
            parts = (path.relative_to(root) if root.is_dir() else Path(path.name)).with_suffix("").parts
            found = [Gather("_".join((*parts, str(i))), path, i) for i in range(len(array))]
        for gather in found:
            if seen.setdefault(gather.oid, path) != path:
                raise ValueError(f"{path}: same id {gather.oid} as {seen[gather.oid]}; rename one of the two")
        gathers.extend(found)
    if not gathers:
        raise ValueError(
            f"{root}: no gathers in it; expected .npy files of {GATHER_SHAPE} or (n, 5, 1000, 70)"
        )
    return gathers


def find_truths(root, gathers):
    """The true map of each gather as (path, index, family or None).

    `root` holds `<id>.npy` maps, or OpenFWI velocity files under their families' folders.
    Raises ValueError naming the first gather without one, and maps of a wrong shape.
    """
    if not Path(root).is_dir():
        raise ValueError(f"{root}: no such folder; give the true maps by --truth=DIR")
    by_name = {}
    for path in find_files(root, re.compile(r"[^.].*\.npy")):
        by_name.setdefault(path.name, []).append(path)

    @functools.cache
    def truth_of(path, is_single):
        name = (
            path.name if is_single else SEIS_NAME.sub(lambda m: VEL_PREFIX[m[1]] + m[2] + ".npy", path.name)
        )
        found = by_name.get(name, [])
        if len(found) > 1:
            found = [vel for vel in found if family_in(vel) == family_in(path)]
        if len(found) != 1:
            raise ValueError(f"{root}: {len(found)} true maps {name} for {path}; expected one")
        shapes = [MAP_SHAPE, MAP_SHAPE[1:]] if is_single else [(None, *MAP_SHAPE)]
        check_finite(check_array(found[0], shapes, "velocity maps"), found[0], "…", "velocity")
        return found[0], family_in(found[0]) or family_in(path)

    truths = []
    for gather in gathers:
        path, family = truth_of(gather.path, gather.index is None)
        if gather.index is not None and gather.index >= (n := len(open_array(path))):
            raise ValueError(f"{path}: {n} maps, fewer than the gathers of {gather.path}; copy both again")
        truths.append((path, gather.index, family))
    return truths


class GatherDataset(Dataset):
    """Gathers as (number, seis (5, 1000, 70) float32), each read once and checked for NaN."""

    def __init__(self, gathers):
        self.gathers = gathers

    def __len__(self):
        return len(self.gathers)

    def __getitem__(self, i):
        gather = self.gathers[i]
        array = open_array(gather.path)
        seis = np.array(array if gather.index is None else array[gather.index], dtype=np.float32)
        check_finite(seis, gather.path, gather.index or 0, "seismic")
        return i, torch.from_numpy(seis)


def check_values(gathers):
    """Read the gathers for NaN and infinity before any work; very many are checked as they are used."""
    if len(gathers) * math.prod(GATHER_SHAPE) * 4 / 1e9 <= FULL_CHECK_GB:
        for _ in map(GatherDataset(gathers).__getitem__, range(len(gathers))):
            pass


# ---------------------------------------------------------------- prediction and output


@torch.no_grad()
def predict(network, seis, tta=False):
    """Shot gathers (B, S, T, R) -> velocity (B, 1, Z, X) m/s within OpenFWI's range.

    With `tta` the mean with the mirrored survey's prediction, mirrored back, as the public baseline does.
    """
    return (predict_tta(network, seis) if tta else network(seis)).clamp(V_MIN, V_MAX)


# every number 0.00 … 9999.99 is written with as many characters: ",dddd.dd"
_DIGITS = np.array([1000, 100, 10, 1], np.int64)


def submission_rows(oid, vel):
    """The 70 CSV rows of one map, as bytes: (70, 70) m/s, odd columns, two decimals."""
    hundredths = np.rint(vel[:, 1::2].astype(np.float64) * 100).astype(np.int64)
    whole, rest = np.divmod(hundredths, 100)
    text = np.full((*whole.shape, 8), ord(","), np.uint8)
    text[..., 1:5] = whole[..., None] // _DIGITS % 10 + ord("0")
    text[..., 5] = ord(".")
    text[..., 6] = rest // 10 + ord("0")
    text[..., 7] = rest % 10 + ord("0")
    name = oid.encode()
    return b"".join(b"%s_y_%d%s\n" % (name, y, row.tobytes()) for y, row in enumerate(text))


def infer(cfg, process):
    """Predict every gather of `cfg.input` into `cfg.out`; returns the score where truth is given."""
    if Path(cfg.out).is_dir():
        raise ValueError(f"{cfg.out}: is a folder; give a file by --out=FILE.csv")
    for folder in (Path(cfg.out).parent, Path(cfg.save_maps or ".")):
        check_writable(folder)
    gathers = find_gathers(cfg.input)
    check_values(gathers)
    truths = find_truths(cfg.truth, gathers) if cfg.truth else None
    checkpoint = load_checkpoint(cfg.ckpt)
    cfg = network_config(cfg, checkpoint)
    network = build_model(cfg)
    load_weights(network, averaged_weights(checkpoint), cfg.ckpt)
    network.to(process.device).eval()
    dtype = AUTOCAST.get(pick_precision(cfg.precision, process.device))
    loader = DataLoader(GatherDataset(gathers), batch_size=cfg.batch_size, num_workers=cfg.workers)
    score = Score()
    if cfg.save_maps:
        Path(cfg.save_maps).mkdir(parents=True, exist_ok=True)
    with write_atomic(cfg.out) as part, open(part, "wb") as csv, tqdm(total=len(gathers), unit="map") as bar:
        csv.write(HEADER.encode())
        for numbers, seis in loader:
            with torch.autocast(process.device.type, dtype=dtype, enabled=dtype is not None):
                vel = (
                    predict(network, preprocess(seis.to(process.device), cfg.mode), cfg.tta)
                    .float()
                    .cpu()
                    .numpy()
                )
            for i, prediction in zip(numbers.tolist(), vel[:, 0], strict=True):
                csv.write(submission_rows(gathers[i].oid, prediction))
                if cfg.save_maps:
                    with write_atomic(Path(cfg.save_maps) / f"{gathers[i].oid}.npy") as map_part:
                        with open(map_part, "wb") as file:
                            np.save(file, prediction)
                if truths:
                    score_one(score, prediction, *truths[i])
            bar.update(len(numbers))
    print(f"{len(gathers)} maps -> {cfg.out}")
    if truths:
        print(score_table(score.result()))
    return score.result()


def score_one(score, prediction, path, index, family):
    """Add one prediction (70, 70) to the score, against its true map."""
    truth = open_array(path) if index is None else open_array(path)[index]
    truth = np.array(truth, np.float32).reshape(1, *MAP_SHAPE)
    number = FAMILIES.index(family) if family else -1
    score.add(torch.from_numpy(prediction)[None, None], torch.from_numpy(truth), torch.tensor([number]))


def main(argv):
    cfg = parse(argv)
    for name in ("ckpt", "input"):
        if not getattr(cfg, name):
            raise ValueError(
                f"--{name}=PATH is needed: python infer.py --ckpt PATH --input FILE|DIR --out FILE.csv"
            )
    with processes(cfg) as process:
        infer(cfg, process)


if __name__ == "__main__":
    run_program(main)
