"""Shared fixtures: small OpenFWI-like files, and where real data may lie."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from cfg import Config, parse
from infer import infer
from inference.pseudo import pair_paths
from model import build_model
from networks.checkpoints import save_checkpoint
from openfwi import npy
from parallel.processes import Process
from synthetic.maps import make_maps
from utils import run_program
from waves.equation import simulate

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

torch.set_num_threads(1)  # tests are small; more threads only wait for each other
# ignored under nohup and in a shell's background; programs under test would inherit that
for name, usual in (("SIGHUP", signal.SIG_DFL), ("SIGINT", signal.default_int_handler)):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


# a network and a schedule that train in seconds
NETWORK_WORDS = ["--arch=seisnext", "--width=16", "--decoder_channels=16,8,8"]
NETWORK_WORDS += ["--decoder_norm=none", "--input_scaling=none"]
SMALL = [
    *NETWORK_WORDS,
    "--workers=0",
    "--split=share",
    "--val_share=0.34",
    "--warmup_steps=2",
    "--log_every=1",
    "--device=cpu",
    "--threads=1",
]
CPU = Process(torch.device("cpu"))
NETWORK = {
    "arch": "seisnext",
    "head": "perfect",
    "width": 16,
    "decoder_channels": (16, 8, 8),
}  # as NETWORK_WORDS


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """The index of files is kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fresh_maps():
    """Tests write other files under names that were read before."""
    npy.open_array.cache_clear()


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real OpenFWI data; skips the test if it is missing."""
    if not SHARED.is_dir():
        pytest.skip("real OpenFWI data (../shared/data) is missing")
    return SHARED


def write_pair(folder, family, number=1, n=4, seed=0, dtype=np.float32):
    """One file pair of random numbers in OpenFWI's layout; returns (seismic path, velocity path).

    The numbers depend on seed and file number, since copies of a file are left out.
    """
    rng = np.random.default_rng(seed if number == 1 else (seed, number, 1))
    if "Fault" in family:
        seis, vel = folder / family / f"seis2_1_{number}.npy", folder / family / f"vel2_1_{number}.npy"
    else:
        seis, vel = (
            folder / family / "data" / f"data{number}.npy",
            folder / family / "model" / f"model{number}.npy",
        )
    for path in (seis, vel):
        path.parent.mkdir(parents=True, exist_ok=True)
    np.save(seis, rng.normal(size=(n, 5, 1000, 70)).astype(dtype))
    np.save(vel, rng.integers(1500, 4501, (n, 1, 70, 70)).astype(dtype))
    return seis, vel


def random_batch(n=2, family=0):
    """Random gathers and velocity maps of one family, as `train_step` takes them."""
    generator = torch.Generator().manual_seed(0)
    seis = torch.randn(n, 5, 1000, 70, generator=generator)
    vel = 1500 + 3000 * torch.rand(n, 1, 70, 70, generator=generator)
    return seis, vel, torch.full((n,), family)


@pytest.fixture(scope="session")
def two_families(tmp_path_factory):
    """A folder with a file pair of six random samples of each of two families."""
    root = tmp_path_factory.mktemp("two_families")
    for family in ("FlatVel_A", "Style_B"):
        write_pair(root, family, n=6)
    return root


@pytest.fixture
def train_here(two_families, tmp_path):
    """Train for two epochs of four steps in this process; returns the newest run folder named "small"."""

    def run(*args):
        words = [f"--data_root={two_families}", f"--run_root={tmp_path}", *SMALL, "--batch_size=2"]
        train.main([*words, "--epochs=2", "--name=small", *args])
        return max(tmp_path.glob("*-small"), default=None)

    return run


def run_cli(program, *args, timeout=1200):
    """Run one of our programs in a process of its own."""
    command = [sys.executable, str(ROOT / program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def refuses(monkeypatch, capsys):
    """Assert that a program's `main` refuses its arguments: exit code 2, one line that holds all `words`."""

    def check(main, *args, words):
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_program(main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        for word in words:
            assert str(word) in lines[0], (word, lines[0])

    return check


# ---------------------------------------------------------------- predictions


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A bare state dict of an untrained network, as the public ones are."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "small.pt"
    weights = build_model(Config(**NETWORK)).state_dict()
    save_checkpoint(path, {f"module.{name}": values for name, values in weights.items()})
    return path


def words_for(checkpoint, *args):
    """The command line that predicts with a checkpoint as the fixture of this name."""
    return ["--ckpt", str(checkpoint), *NETWORK_WORDS, "--workers=0", "--threads=1", *map(str, args)]


def kaggle_folder(folder, n, dtype=np.float32):
    """A folder of n test gathers of random numbers, named as Kaggle's."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        np.save(folder / f"{i:010x}.npy", rng.normal(size=(5, 1000, 70)).astype(dtype))
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Exact pairs: two flat maps and two faulted ones, a root for training and for truth."""
    root = tmp_path_factory.mktemp("pairs")
    for family in ("FlatVel_A", "FlatFault_A"):
        vel = torch.from_numpy(make_maps(family, 2, 0))
        seis_path, vel_path = pair_paths(root, family, 0)
        for path, array in ((seis_path, simulate(vel)), (vel_path, vel)):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array.numpy())
    return root


@pytest.fixture
def run(checkpoint, pairs, tmp_path):
    """Run `infer` on the pairs: (score, path of the CSV)."""

    def go(*args, ckpt=checkpoint, name="s.csv"):
        words = ["--input", pairs, "--out", tmp_path / name, "--batch_size=2", *args]
        words = words_for(ckpt, *words)
        if str(ckpt).endswith("second.pt") and "," not in str(ckpt):
            words = [word for word in words if word not in NETWORK_WORDS]
        return infer(parse(words), CPU), tmp_path / name

    return go


def maps_of(path):
    """Oids and the odd columns (N, 70, 35) of a submission."""
    rows = list(csv.reader(path.open()))[1:]
    return [row[0].rpartition("_y_")[0] for row in rows[::70]], np.array(
        [r[1:] for r in rows], float
    ).reshape(-1, 70, 35)
