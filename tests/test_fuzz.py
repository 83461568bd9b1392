"""Random damage, seeded: .npy headers, checkpoints, descriptions and options give one line or success."""

import dataclasses
import json
import math
import os
import random

import numpy as np
import pytest
import safetensors.torch
import torch

import bench
from benchmarks.train_speed import TrainSpeedOptions
from cfg import Config, network_config, parse
from data import family_numbers
from inference.tta import make_views
from model import check_model
from networks.checkpoints import is_weights, load_checkpoint, load_described
from openfwi.npy import GATHER_SHAPE, MAP_SHAPE, check_shape, read_header
from options.command_line import parse_options, read_words
from synth import SynthOptions
from training.loss import parse_family_weights
from training.publish import PublishOptions
from training.resume import check_state


def one_line(call, *args):
    """What a call returns; None where it raises the only error that may be, a ValueError of one line."""
    try:
        return call(*args)
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error), error
        return None


def damaged(content, rng):
    """Bytes with bits flipped, a piece cut out, put in or overwritten, or an end cut off."""
    content, kind = bytearray(content), rng.randrange(5)
    first, n = rng.randrange(len(content)), rng.randrange(1, 40)
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[first : first + n]
    elif kind == 2:
        content[first:first] = rng.randbytes(n)
    elif kind == 3:
        content[first : first + n] = rng.randbytes(n)
    else:
        del content[first:]
    return bytes(content)


# ---------------------------------------------------------------- .npy headers

DESCR = [
    "<f4",
    ">f4",
    "<f2",
    "|i1",
    "<i8",
    "|O",
    "<U7",
    "|V3",
    "<M8[ns]",
    "f4",
    "",
    "<f99",
    "(3,)<f4",
    "🙂",
    None,
    4,
]
DESCR += [[("a", "<f4")], [("a", "|O")], ("<f4", (2,))]
SIZES = [0, 1, 2, 5, 70, 1000, -1, 2**31, 2**63, 10**30, 1.5, "5", None, True, ()]


def random_header(rng):
    """The text of a .npy header of any dtype, order and shape."""
    if rng.random() < 0.3:
        return repr({"descr": "<f4", "fortran_order": False, "shape": (2, *MAP_SHAPE)}) + "\n"
    shape = rng.choice([(1, *GATHER_SHAPE), (2, *MAP_SHAPE), tuple(rng.choices(SIZES, k=rng.randrange(5)))])
    if rng.random() < 0.1:
        shape = rng.choice([None, 5, "abc", [2, 3], {}])
    header = {
        "descr": rng.choice(DESCR),
        "fortran_order": rng.choice([False, True, 0, None, "no"]),
        "shape": shape,
    }
    for name in rng.sample(sorted(header), rng.choice([0, 0, 0, 1])):
        del header[name]
    return repr(header) + rng.choice(["\n", "", " " * 50 + "\n", "; print()\n", "\0\n"])


def test_npy_headers(tmp_path):
    rng, path, n_good = random.Random(0), tmp_path / "x.npy", 0
    for k in range(800):
        text = random_header(rng).encode(rng.choice(["latin-1", "utf-8"]), "replace")
        major = rng.choice([1, 1, 2, 3, 0, 4, 255])
        length = rng.choice([len(text), len(text), len(text), len(text) + 1, 0, 65535])
        width = 2 if major == 1 else 4
        head = (
            b"\x93NUMPY" + bytes([major, rng.choice([0, 0, 0, 1])]) + length.to_bytes(width, "little") + text
        )
        path.write_bytes(head + bytes(rng.choice([0, 3, 4900 * 8, 4900 * 8])))
        if k % 3 == 0:
            path.write_bytes(damaged(path.read_bytes()[: len(head) + 4], rng))
        found = one_line(
            lambda: check_shape(read_header(path), [(None, *GATHER_SHAPE), (None, *MAP_SHAPE)], "gathers")
        )
        if found is not None:
            n_good += 1
            assert np.isfinite(np.array(found)).all()
    assert n_good


# ---------------------------------------------------------------- checkpoints


def small_state():
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(3, 5, generator=generator) for i in range(4)}
    return {
        "model": weights,
        "ema": dict(weights),
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(3, 5)}},
            "param_groups": [{"lr": 1e-3, "params": [0]}],
        },
        "progress": {"step": 3, "validated": 0, "since_best": 0, "best_mae": math.inf},
        "scaler": {"scale": 1.0},
        "global_batch": 2,
        "cfg": {"arch": "unet", "seed": 0, "lr": 1e-3, "epochs": 1, "batch_size": 2},
    }


@pytest.mark.parametrize("suffix", ["pt", "old.pt", "safetensors"])
def test_checkpoints(tmp_path, suffix):
    path, rng, n_good = tmp_path / f"x.{suffix}", random.Random(1), 0
    if suffix == "safetensors":
        safetensors.torch.save_file(small_state()["model"], path)
    else:
        torch.save(small_state(), path, _use_new_zipfile_serialization=suffix == "pt")
    good = path.read_bytes()
    for _ in range(250):
        path.write_bytes(damaged(good, rng))
        checkpoint = one_line(load_checkpoint, path)
        if checkpoint is not None:
            n_good += 1
            assert is_weights(checkpoint["model"])
            one_line(check_state, path, checkpoint)
    assert 0 < n_good < 250


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3,
    10**9,
    10**30,
    10**400,
    0.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    1e300,
]
VALUES += [
    "",
    "x",
    "unet",
    "seisnext",
    "crop",
    "perfect",
    "nan",
    "×…",
    "\0",
    [],
    [1, 2],
    ["a"],
    {},
    {"a": 1},
    (),
]
VALUES += [(64, 32, 16), (16, -8, 8), (math.nan, 1, 2), [[1]], b"bytes"]


def test_configurations_of_checkpoints():
    rng, names = random.Random(2), [field.name for field in dataclasses.fields(Config)]
    n_good = 0
    for _ in range(3000):
        options = {rng.choice(names): rng.choice(VALUES) for _ in range(rng.randrange(1, 4))}
        cfg = one_line(network_config, Config(ckpt="x.pt"), {"cfg": options})
        if cfg is not None:
            one_line(check_model, cfg)
            n_good += 1
    for value in VALUES:
        one_line(network_config, Config(ckpt="x.pt"), {"cfg": value})
    assert 0 < n_good < 3000


def test_damaged_options_next_to_checkpoints_are_one_line(tmp_path):
    rng, path, n_good = random.Random(3), tmp_path / "x.pt", 0
    torch.save({"w": torch.ones(1)}, path)
    good = json.dumps(dataclasses.asdict(Config(width=16))).encode()
    for _ in range(300):
        path.with_suffix(".json").write_bytes(damaged(good, rng))
        checkpoint = one_line(load_described, path)
        if checkpoint is not None:
            n_good += 1
            one_line(network_config, Config(ckpt=str(path)), checkpoint)
    assert 0 < n_good < 300


# ---------------------------------------------------------------- options

WORDS = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "1",
    "1.5",
    "1e9",
    str(10**12),
    "9" * 5000,
    "true",
    "false",
    "",
    ",",
]
WORDS += [
    "×…",
    "\0",
    "\udcff",
    "a:b",
    "Style_B:nan",
    "Style_B:2",
    "nan,1",
    "1,2",
    "1,2,3",
    "1e999,1",
    "auto",
    "mirror",
]
WORDS += [
    "~/x",
    "x" * 300,
    "-",
    "--",
    "=",
    "none",
    "mirror:nan",
    "FlatVel_A",
    "0x10",
    "1_000",
    "١",
    "float16",
    "cpu",
]

PROGRAMS = {
    "train.py, infer.py": lambda words: parse(words),
    "synth.py": lambda words: parse_options(words, SynthOptions, ""),
    "publish": lambda words: parse_options(words, PublishOptions, ""),
    "bench.py train": lambda words: parse(words, options=TrainSpeedOptions),
    **{
        f"bench.py {name}": lambda words, kind=kind: parse_options(words, kind, "")
        for name, (kind, _) in bench.BENCHMARKS.items()
        if kind
    },
}


def numbers_in(options):
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        yield from (
            (field.name, v)
            for v in (value if isinstance(value, tuple) else (value,))
            if type(v) in (int, float)
        )


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_takes_a_value_or_refuses_it_in_one_line(program):
    read = PROGRAMS[program]
    names = [field.name for field in dataclasses.fields(read([]))]
    for name in names:
        for word in WORDS:
            options = one_line(read, [f"--{name}={word}"])
            if options is not None:
                assert all(math.isfinite(v) and abs(v) <= 1e12 for _, v in numbers_in(options)), (name, word)


@pytest.mark.parametrize("program", PROGRAMS)
def test_numbers_that_are_none_and_counts_without_end_are_refused(program):
    read = PROGRAMS[program]
    for field in dataclasses.fields(read([])):
        is_number = field.type in (int, float) or field.type is tuple and field.metadata["items"] is not str
        for word in ("nan", "inf", "-inf", "1e13", str(10**13)) if is_number else ():
            with pytest.raises(ValueError, match=rf"^(--)?{field.name}\b") as error:
                read([f"--{field.name}={word}"])
            assert "\n" not in str(error.value)


def test_random_command_lines():
    rng, names = random.Random(4), [field.name for field in dataclasses.fields(Config)]
    for _ in range(1500):
        words = []
        for _ in range(rng.randrange(1, 6)):
            name, word = rng.choice(names), rng.choice(WORDS)
            words += rng.choice(
                [[f"--{name}={word}"], [f"--{name}", word], [f"--{name}"], [word], [f"--{name[:-1]}"]]
            )
        if not {"-h", "--help"} & set(words):
            one_line(parse, words)
            one_line(read_words, words, Config)


def test_words_with_numbers_in_them():
    for word in WORDS:
        weights = one_line(parse_family_weights, (word,))
        assert weights is None or weights.isfinite().all()
        percent = one_line(family_numbers, "percent", (word,), 100)
        assert percent is None or all(map(math.isfinite, percent.values()))
        views = one_line(make_views, (word,))
        assert views is None or sum(view.weight for view in views) == pytest.approx(1)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_tilde_is_the_home_folder_in_every_path(program, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    read, n_paths = PROGRAMS[program], 0
    for field in dataclasses.fields(read([])):
        meaning = field.metadata["meaning"]
        if field.metadata["path"]:
            n_paths += 1
            value = getattr(read([f"--{field.name}=~/x"]), field.name)
            assert (value if isinstance(value, str) else ",".join(value)) == os.path.join("/home/me", "x")
        elif field.type in (str, tuple) and field.name not in ("name", "keys", "pseudo_family"):
            assert field.metadata["choices"] or not any(
                word in meaning for word in ("folder", " file", "checkpoints")
            ), field.name
    assert n_paths or program == "bench.py csv"
    if program.startswith("train.py"):
        assert read(["--ckpt=~/a.pt,b.pt"]).ckpt == "/home/me/a.pt,b.pt"
        assert read(["--data_root=a,~/b"]).data_root == ("a", "/home/me/b")
