"""The samples to train and validate on. As a program it inspects data, see openfwi/inspect_data.py."""

import math

import numpy as np
import torch

from openfwi.files import check_values, find_pairs, first_map, is_copy
from openfwi.npy import MAP_SHAPE
from system.devices import to_device
from utils import FAMILIES, check_family, mirror_survey


class Items:
    """A sequence of samples (pair, index), held as one array: half a million take 4 MB."""

    def __init__(self, pairs, rows):
        self.pairs, self.rows = pairs, rows  # rows (n, 2): number of the pair, index in it

    @classmethod
    def of(cls, samples):
        """Make Items of any sequence of (pair, index)."""
        numbers = {pair: k for k, pair in enumerate(dict.fromkeys(pair for pair, _ in samples))}
        rows = np.array([(numbers[pair], index) for pair, index in samples], np.int32).reshape(-1, 2)
        return cls(list(numbers), rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice | np.ndarray):
            return Items(self.pairs, self.rows[i])
        k, index = self.rows[i].tolist()
        return self.pairs[k], index

    @property
    def families(self):
        """The family of each sample, as an index of FAMILIES: (n,)."""
        return np.array([FAMILIES.index(pair.family) for pair in self.pairs], np.int64)[self.rows[:, 0]]


def whole(pairs):
    """Items of every sample of these file pairs."""
    return _spans(pairs, [(k, 0, pair.n) for k, pair in enumerate(pairs)])


def _spans(pairs, spans):
    """Items of (number of the pair, first index, end)."""
    rows = [np.stack([np.full(end - first, k), np.arange(first, end)], 1) for k, first, end in spans]
    return Items(pairs, np.concatenate([np.empty((0, 2), np.int32), *rows]).astype(np.int32))


def split_pairs(pairs, cfg):
    """Split file pairs into training and validation `Items`.

    split=file takes `val_files` whole files of each family for validation, evenly spaced in name order, so
    that all layer counts of the Fault files stay in training. split=share, and a family with a single file,
    takes the last `val_share` of each file's samples.
    """
    train, val = [], []
    for family in dict.fromkeys(pair.family for pair in pairs):
        files = [(k, pair.n) for k, pair in enumerate(pairs) if pair.family == family]
        n_val = min(cfg.val_files, len(files) // 2)
        if cfg.split == "file" and len(files) > 1:
            held = {int((j + 0.5) * len(files) / n_val) for j in range(n_val)}
            for j, (k, n) in enumerate(files):
                (val if j in held else train).append((k, 0, n))
        else:
            for k, n in files:
                n_train = n - max(1, round(n * cfg.val_share))
                train.append((k, 0, n_train))
                val.append((k, n_train, n))
    return _spans(pairs, train), _spans(pairs, val)


def family_numbers(option, words, default):
    """("30", "Style_B:2", ...) -> {family: number}; a bare number holds for all families not named.

    Raises ValueError for other words, unknown families and negative numbers.
    """
    values, named = dict.fromkeys(FAMILIES, float(default)), {}
    for word in map(str, words):
        name, colon, number = word.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1e12:
            raise ValueError(f"--{option}={word}: expected a number of 0 or more, or FAMILY:NUMBER")
        if colon:
            named[check_family(name)] = value
        else:
            values = dict.fromkeys(FAMILIES, value)
    return values | named


def subsample(items, cfg):
    """Choose `percent` of each family's samples by the seed; larger percentages hold smaller ones."""
    percent, families, chosen = percents(cfg), items.families, []
    for f, family in enumerate(FAMILIES):
        mine = np.flatnonzero(families == f)
        order = np.random.default_rng((cfg.seed, f)).permutation(mine)
        chosen.append(order[: math.ceil(len(mine) * percent[family] / 100)])
    return items[np.sort(np.concatenate(chosen))]


def percents(cfg):
    """{family: percentage of its samples to use}. Raises ValueError for other words than percentages."""
    percent = family_numbers("percent", cfg.percent, 100)
    if max(percent.values()) > 100:
        raise ValueError(f"--percent={','.join(map(str, cfg.percent))}: expected at most 100")
    return percent


def load_items(cfg):
    """Training and validation `Items` as configured, with files checked; raises ValueError for bad ones."""
    percents(cfg)  # refused before files are read
    pairs = good_pairs(cfg.data_root, cfg)
    if not cfg.val_root:
        train, val = split_pairs(pairs, cfg)
        return subsample(train, cfg), val
    val_pairs = good_pairs(cfg.val_root, cfg)
    trained_on = {}
    for pair in pairs:
        trained_on.setdefault(first_map(pair), []).append(pair)
    both = [
        pair.seis
        for pair in val_pairs
        if any(is_copy(pair, other) for other in trained_on.get(first_map(pair), ()))
    ]
    if both:
        raise ValueError(
            f"{both[0]}: in both --data_root and --val_root ({len(both)} files are, by their velocities); "
            "validate on files that are not trained on"
        )
    return subsample(whole(pairs), cfg), whole(val_pairs)


def good_pairs(roots, cfg):
    """Checked file pairs under `roots`. Raises ValueError for bad ones, and for those of another mode."""
    pairs = find_pairs(roots, cfg.families, cfg.skip_bad_files)
    for pair in pairs:
        if pair.mode not in ("full", cfg.mode):
            raise ValueError(
                f"{pair.seis}: packed for --mode={pair.mode}, asked for --mode={cfg.mode}; "
                "give the unpacked files, or pack them for that mode"
            )
    return check_values(pairs, cfg.skip_bad_files)


def mean_map(items, at_most=5000):
    """Mean velocity map (1, 70, 70) float32 m/s of the items, of `at_most` evenly spaced ones."""
    some = items[:: -(-len(items) // at_most)]
    total = np.zeros(MAP_SHAPE, np.float64)
    for pair, index in some:
        total += pair.maps[index]
    return torch.from_numpy((total / len(some)).astype(np.float32))


def flip_batch(seis, vel, chosen):
    """Flip the `chosen` (B,) samples as the baseline does: seis (B, S, T, R) -> float32, vel (B, 1, Z, X)."""
    flipped = torch.empty_like(seis, dtype=torch.float32)
    for sample, source, flip in zip(flipped, seis, chosen.tolist(), strict=True):
        sample.copy_(
            mirror_survey(source[None])[0] if flip else source
        )  # float16 until here, which halves the bytes copied
    return flipped, torch.where(to_device(chosen, vel.device)[:, None, None, None], vel.flip(3), vel)


if __name__ == "__main__":
    from openfwi import inspect_data
    from utils import run_program

    run_program(inspect_data.main)
