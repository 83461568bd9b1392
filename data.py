"""OpenFWI and Kaggle files: found, paired, checked, split, read, augmented.

Layouts (n samples a file, 500 in OpenFWI), under any folders:
    <Family>/data/data{N}.npy    (n, 5, 1000, 70)    <Family>/model/model{N}.npy  (n, 1, 70, 70)
    <Family>/seis{K}_1_{M}.npy   (n, 5, 1000, 70)    <Family>/vel{K}_1_{M}.npy    (n, 1, 70, 70)
Seismic and velocity are float16, float32 or float64; velocity in m/s.
"""

import functools
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import FAMILIES, check_family, mirror_survey

GATHER_SHAPE, MAP_SHAPE = (5, 1000, 70), (1, 70, 70)
FULL_CHECK_GB = 4  # sets up to this size are read whole at start; of larger ones three samples a file
SEIS_NAME = re.compile(r"(data|seis)(\d+|\d+_\d+_\d+)\.npy")
VEL_NAME = re.compile(r"(model|vel)(\d+|\d+_\d+_\d+)\.npy")
VEL_PREFIX = {"data": "model", "seis": "vel"}


@dataclass(frozen=True)
class FilePair:
    """A seismic file and its velocity file; `n` samples each."""

    seis: Path
    vel: Path
    family: str
    n: int
    is_half: bool  # seismic in float16


# ---------------------------------------------------------------- finding and checking


@functools.lru_cache(maxsize=64)  # a map holds its file open: 64 a process keeps far from the usual limits
def open_array(path):
    """Memory-map a .npy file; ValueError names it when it is no plain array."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: truncated or not a .npy file ({error}); copy it again") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: an .npz archive, not a .npy file; unpack it")
    return array


def check_array(path, shapes, what):
    """Open a .npy file of floats in one of `shapes` (None = any length); ValueError says got and expected."""
    array = open_array(path)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{path}: dtype {array.dtype}, expected float16, float32 or float64")
    fits = [
        len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=False))
        for shape in shapes
    ]
    if not any(fits) or not array.size:
        expected = " or ".join(str(shape).replace("None", "n") for shape in shapes)
        raise ValueError(f"{path}: shape {array.shape}, expected {expected} for {what}")
    return array


def check_finite(values, path, index, what):
    """Raise ValueError naming file and sample unless every value is finite."""
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: sample {index} of the {what} holds NaN or infinity; copy or make it again")


def family_in(path):
    """The family named by the nearest folder above a file, or None."""
    names = {family.lower(): family for family in FAMILIES}
    return next((names[folder.name.lower()] for folder in path.parents if folder.name.lower() in names), None)


def family_of(path):
    """As `family_in`, but a file under no family's folder raises ValueError."""
    if family := family_in(path):
        return family
    folder = path.parent.parent if path.parent.name in VEL_PREFIX else path.parent
    try:
        return check_family(folder.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; rename the folder to its family") from None


def find_files(root, pattern):
    """Files below `root` whose name fits, in natural order; links to folders are followed."""
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if pattern.fullmatch(name)
    ]
    return sorted(found, key=lambda p: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", str(p))])


def velocity_of(seis):
    """The velocity file of a seismic file: beside it, or in the `model` folder beside its own."""
    prefix, number = SEIS_NAME.fullmatch(seis.name).groups()
    name = f"{VEL_PREFIX[prefix]}{number}.npy"
    for vel in (seis.parent.parent / VEL_PREFIX[prefix] / name, seis.parent / name):
        if vel.is_file():
            return vel
    raise ValueError(f"{seis}: no velocity file {name} beside it or in a folder {VEL_PREFIX[prefix]}/")


def find_pairs(roots, families=()):
    """Find and check every file pair under `roots`; headers only.

    Raises ValueError, naming the file, for missing or empty folders, a seismic
    file without velocity, shapes, dtypes and counts that do not fit, an unknown
    family, and families asked for that are not there.
    """
    wanted = [check_family(family) for family in families]
    pairs = []
    for root in roots:
        if not Path(root).is_dir():
            raise ValueError(
                f"{root}: no such folder; give the OpenFWI or Kaggle training files by --data_root=DIR"
            )
        files = find_files(root, SEIS_NAME)
        if not files:
            raise ValueError(
                f"{root}: no data{{N}}.npy or seis{{K}}_1_{{M}}.npy below it; see the README for the layout"
            )
        for seis in files:
            family = family_of(seis)
            if wanted and family not in wanted:
                continue
            vel = velocity_of(seis)
            gathers = check_array(seis, [(None, *GATHER_SHAPE)], "shot gathers")
            n = len(gathers)
            n_vel = len(check_array(vel, [(None, *MAP_SHAPE)], "velocity maps"))
            if n != n_vel:
                raise ValueError(f"{seis}: {n} samples, but {vel} has {n_vel}; copy both again")
            pairs.append(FilePair(seis, vel, family, n, gathers.dtype == np.float16))
    missing = [family for family in wanted if family not in {pair.family for pair in pairs}]
    if missing:
        raise ValueError(f"{', '.join(map(str, roots))}: no files of {', '.join(missing)}; see --families")
    return pairs


def check_values(pairs):
    """Read the values for NaN, infinity and wrong units: all of a small set, some of a large one."""
    total_gb = sum(pair.seis.stat().st_size for pair in pairs) / 1e9
    for pair in pairs:
        some = range(pair.n) if total_gb <= FULL_CHECK_GB else sorted({0, pair.n // 2, pair.n - 1})
        for index in some:
            read_sample(pair, index)
        vel = open_array(pair.vel)[some[0]]
        if not 300 <= vel.min() <= vel.max() <= 10_000:
            raise ValueError(
                f"{pair.vel}: {vel.min():g} to {vel.max():g}, expected velocities in m/s (1500 to 4500)"
            )


def read_sample(pair, index):
    """Sample of a file pair: seis (5, 1000, 70) and vel (1, 70, 70), fresh copies, finite."""
    arrays = []
    for path, what in ((pair.seis, "seismic"), (pair.vel, "velocity")):
        arrays.append(np.array(open_array(path)[index]))  # a copy: nobody can change the file's page
        check_finite(arrays[-1], path, index, what)
    return arrays


# ---------------------------------------------------------------- split


def split_pairs(pairs, cfg):
    """Split file pairs into training and validation items [(pair, sample index), …].

    split=file takes `val_files` whole files of each family, evenly spaced in
    name order (so that all layer counts of the Fault files stay in training);
    split=share, or a family with a single file, the last `val_share` of samples.
    """
    train, val = [], []
    for family in dict.fromkeys(pair.family for pair in pairs):
        files = [pair for pair in pairs if pair.family == family]
        n_val = min(cfg.val_files, len(files) // 2)
        if cfg.split == "file" and len(files) > 1:
            held = {int((k + 0.5) * len(files) / n_val) for k in range(n_val)}
            for k, pair in enumerate(files):
                (val if k in held else train).extend((pair, i) for i in range(pair.n))
        else:
            for pair in files:
                n_train = pair.n - max(1, round(pair.n * cfg.val_share))
                train.extend((pair, i) for i in range(n_train))
                val.extend((pair, i) for i in range(n_train, pair.n))
    return train, val


def load_items(cfg):
    """Training and validation items as the configuration asks, files checked."""
    pairs = find_pairs(cfg.data_root, cfg.families)
    check_values(pairs)
    if not cfg.val_root:
        return split_pairs(pairs, cfg)
    val_pairs = find_pairs(cfg.val_root, cfg.families)
    check_values(val_pairs)
    return tuple([(pair, i) for pair in some for i in range(pair.n)] for some in (pairs, val_pairs))


def mean_map(items, at_most=5000):
    """Mean velocity map (1, 70, 70) float32 m/s of the items, or of evenly spaced ones of very many."""
    some = items[:: -(-len(items) // at_most)]
    total = np.zeros(MAP_SHAPE, np.float64)
    for pair, index in some:
        total += open_array(pair.vel)[index]
    return torch.from_numpy((total / len(some)).astype(np.float32))


# ---------------------------------------------------------------- loading


class PairDataset(Dataset):
    """Items as (seis (5, 1000, 70), vel (1, 70, 70) float32 m/s, family index, item index).

    seis is float32, or float16 where all files are: half the bytes to the device.
    """

    def __init__(self, items):
        self.items = items
        self.dtype = np.float16 if all(pair.is_half for pair, _ in items) else np.float32

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        seis, vel = read_sample(*self.items[i])
        family = FAMILIES.index(self.items[i][0].family)
        seis, vel = (
            torch.from_numpy(a.astype(k, copy=False)) for a, k in ((seis, self.dtype), (vel, np.float32))
        )
        return seis, vel, family, i


class TrainBatches(Sampler):
    """This rank's batches of one epoch, `accumulate` a step, from step `start` on.

    The order depends on seed and epoch only: the samples of a step are the same
    however they are shared among ranks and accumulated batches. What does not
    fill a last step is dropped.
    """

    def __init__(self, n, cfg, process):
        self.n, self.seed, self.size, self.process, self.accumulate = (
            n,
            cfg.seed,
            cfg.batch_size,
            process,
            cfg.accumulate,
        )
        self.n_steps = n // (cfg.batch_size * cfg.accumulate * process.world)
        self.epoch = self.start = 0

    def __len__(self):
        return (self.n_steps - self.start) * self.accumulate

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        for batch in range(self.start * self.accumulate, self.n_steps * self.accumulate):
            first = (batch * self.process.world + self.process.rank) * self.size
            yield order[first : first + self.size].tolist()


def make_loaders(cfg, process, train_items, val_items):
    """Training and validation loaders; validation is shared among ranks without padding."""
    n_global = cfg.batch_size * cfg.accumulate * process.world
    if len(train_items) < n_global or not val_items:
        raise ValueError(
            f"{len(train_items)} training and {len(val_items)} validation samples, expected at least "
            f"{n_global} (batch_size × accumulate × processes) and 1; lower --batch_size or add files"
        )
    common = {"num_workers": cfg.workers, "pin_memory": process.device.type == "cuda"}
    train = DataLoader(
        PairDataset(train_items),
        batch_sampler=TrainBatches(len(train_items), cfg, process),
        persistent_workers=cfg.workers > 0,
        **common,
    )
    mine = val_items[process.rank :: process.world]
    return train, DataLoader(PairDataset(mine), batch_size=cfg.batch_size, **common)


def preprocess(seis, mode):
    """Full gathers (B, 5, 1000, 70) float32 as an input mode's; raises KeyError for modes there are not.

    full: unchanged. smart_256x72: early arrivals, the first 512 samples halved to
    256 by a binomial low-pass (the signal ends near 45 Hz, 250 Hz remain), the
    edge receivers repeated: (B, 5, 256, 72). small_72x72: as the public
    preprocessed set, area-resized to 70x70, edges repeated: (B, 5, 72, 72).
    All commute with `mirror_survey`.
    """
    return {"full": lambda x: x, "smart_256x72": _early, "small_72x72": _small}[mode](seis)


def _early(seis):
    n_batch, n_sources, _, n_receivers = seis.shape
    kernel = seis.new_tensor([[[1, 3, 3, 1]]]) / 8
    traces = seis[:, :, :512].movedim(2, 3).reshape(-1, 1, 512)
    traces = F.conv1d(F.pad(traces, (1, 1), mode="replicate"), kernel, stride=2)
    halved = traces.reshape(n_batch, n_sources, n_receivers, 256).movedim(3, 2)
    return F.pad(halved, (1, 1, 0, 0), mode="replicate")


def _small(seis):
    return F.pad(F.interpolate(seis, (70, 70), mode="area"), (1, 1, 1, 1), mode="replicate")


def flip_batch(seis, vel, chosen):
    """The baseline's flip of the `chosen` (B,) samples: seis (B, S, T, R) -> float32, vel (B, 1, Z, X)."""
    flipped = torch.empty_like(seis, dtype=torch.float32)
    for sample, source, flip in zip(flipped, seis, chosen.tolist(), strict=True):
        sample.copy_(mirror_survey(source[None])[0] if flip else source)  # float16 until here: half the bytes
    return flipped, torch.where(chosen.to(vel.device)[:, None, None, None], vel.flip(3), vel)
