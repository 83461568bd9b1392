"""What runs on CUDA cards: on a real one where there is one, elsewhere on a stand-in for it.

The stand-in computes on the CPU whatever is asked of a card, so that devices that do not fit, waiting for the
card and crashes of the host's code show. It lies outside the repository, in ../shared/fakecuda or where
FAKECUDA says, and needs gcc.
"""

import os
import shutil
import subprocess
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import NETWORK, ROOT, SMALL, maps_of, random_batch, words_for

import train
from cfg import Config
from networks.checkpoints import load_checkpoint
from networks.encoder import _convnext_stem
from parallel.processes import Process
from synthetic.maps import make_maps
from training.guards import BadSteps
from training.loader import Loader
from training.online import Online, Simulated
from training.trainer import Trainer
from waves.equation import simulate

STAND_IN = Path(os.environ.get("FAKECUDA", ROOT.parent / "shared" / "fakecuda"))
CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


# ---------------------------------------------------------------- on a card


@pytest.mark.gpu
@CARD
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_steps_never_wait_for_the_card(optimizer):
    """With every augmentation and simulated samples; the first step, which makes memory ready, may wait."""
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    device = torch.device("cuda", 0)
    kinds = ("flip", "stretch", "shift", "gain", "noise", "shot_drop", "receiver_drop")
    options = {f"{kind}_p": 1.0 for kind in kinds}
    trainer = Trainer(Config(optimizer=optimizer, **options, **NETWORK), Process(device), 4)
    seis, vel, _ = (t.to(device) for t in random_batch())
    trainer.online = Online.__new__(Online)
    trainer.online.sample_at = lambda step, place: (0, 0, place) if place == 1 else None
    plan = types.SimpleNamespace(family=lambda chunk: ("FlatVel_A", False))
    trainer.online.made = types.SimpleNamespace(sample=lambda *where: (seis[0], vel[0]), plan=plan)
    bad_steps = BadSteps(trainer, None, None)

    def step():
        batch = trainer.prepare(0, *random_batch())
        losses, mae, norm = train.train_step(trainer, [batch])
        bad_steps.add(norm, losses, [batch], [0, 1])
        return norm

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        norm = step()
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            norm.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@CARD
def test_a_simulation_waits_for_the_card_once_to_check_the_maps():
    vel = torch.linspace(1500, 3000, 70, device="cuda").expand(2, 1, 70, 70).contiguous()
    simulate(vel, n_samples=60)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            simulate(vel, n_samples=60)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits


@pytest.mark.gpu
@TWO_CARDS
def test_the_threads_of_the_second_rank_keep_to_its_card():
    device, cards = torch.device("cuda", 1), []

    def read_batch(indices, memory):
        cards.append(torch.cuda.current_device())
        return *(memory(4, dtype=torch.uint8) for _ in range(3)), torch.tensor(indices)

    def velocity(chunk):
        cards.append(torch.cuda.current_device())
        return make_maps("FlatVel_A", 1, 0)

    for ahead in (True, False):
        dataset = types.SimpleNamespace(read_batch=read_batch)
        for batch in Loader(dataset, [[0], [1], [2]], 2, device, ahead):
            assert batch[0].device == device if ahead else batch[0].device.type == "cpu"
    made = Simulated(types.SimpleNamespace(velocity=velocity), [(0, 0)], device, 1)
    seis, _ = made.sample(0, 0, 0)
    made.close()
    assert seis.device == device and len(cards) == 7 and set(cards) == {1}


@pytest.mark.gpu
@CARD
def test_with_deterministic_the_unets_stem_learns_on_a_card():
    backbone = timm.create_model("convnext_atto", features_only=True, in_chans=5)
    _convnext_stem(backbone, "full")
    stem = backbone.stem_0.cuda()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):  # torch's own cannot
            torch.nn.ReflectionPad2d(1)(
                torch.ones(1, 1, 4, 4, device="cuda", requires_grad=True)
            ).sum().backward()
        stem(torch.randn(2, 5, 1000, 70, device="cuda", requires_grad=True)).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.grad.abs().sum() > 0 for p in stem.parameters())


# ---------------------------------------------------------------- on the stand-in


@pytest.fixture(scope="session")
def on_cards(tmp_path_factory):
    """Run Python's words with stand-ins for two cards: finished processes; skips where there is none."""
    if not (STAND_IN / "run.sh").exists():
        pytest.skip("no stand-in for CUDA cards here (../shared/fakecuda)")
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    library = tmp_path_factory.mktemp("fakecuda")
    packages = Path(torch.__file__).parents[1]
    built = subprocess.run([STAND_IN / "build.sh", packages, library], capture_output=True, text=True)
    if built.returncode or not (library / "libcuda.so.1").exists():
        pytest.skip(f"the stand-in for CUDA cards does not build here: {built.stderr.strip()[-200:]}")
    env = {"FAKE_LIB": str(library), "FAKE_CARDS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (STAND_IN, ROOT, ROOT / "tests")))}

    def run(*words, **more):
        command = [STAND_IN / "run.sh", *map(str, words)]
        done = subprocess.run(
            command, env=os.environ | env | more, cwd=ROOT, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run


FAKE = ROOT / "tests" / "fake_card.py"


@pytest.mark.slow
def test_all_tests_for_cards_pass_on_the_stand_in(on_cards):
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    out = on_cards(FAKE, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", "gpu", "-rs", *files)
    assert " passed" in out and "SKIPPED" not in out, out


@pytest.mark.slow
def test_two_cards_train_as_one_cpu_and_a_resumed_run_ends_bit_for_bit_the_same(
    on_cards, two_families, tmp_path, train_here
):
    words = [f"--data_root={two_families}", f"--run_root={tmp_path / 'cards'}", *SMALL, "--device=cuda"]
    words += ["--batch_size=1", "--epochs=1", "--save_minutes=0", "--workers=1", "--precision=float32"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", FAKE, ROOT / "train.py"]
    folder = tmp_path / "cards" / "001-cards"
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(on_cards, *two, *words, "--name=cards")
        while not (folder / "last.pt").exists() and not training.done():
            time.sleep(0.02)
        shutil.copy(folder / "last.pt", tmp_path / "early.pt")
        assert "1 a process × 2 processes" in training.result()
    whole, early = load_checkpoint(folder / "last.pt"), load_checkpoint(tmp_path / "early.pt")
    assert early["progress"]["step"] < whole["progress"]["step"] == 4
    shutil.copy(tmp_path / "early.pt", folder / "last.pt")
    on_cards(*two, *words, f"--resume={folder}")
    again = load_checkpoint(folder / "last.pt")
    assert again["progress"] == whole["progress"]
    for part in ("model", "ema"):
        assert all(torch.equal(a, whole[part][name]) for name, a in again[part].items())
    here = load_checkpoint(
        train_here("--epochs=1", "--precision=float32") / "last.pt"
    )  # one CPU, batches of two
    assert here["progress"]["best_mae"] == pytest.approx(whole["progress"]["best_mae"], rel=0.01)


@pytest.mark.slow
def test_inversion_on_a_card_needs_no_float64_there(on_cards, checkpoint, pairs, tmp_path):
    """Nor does the network with all views: Apple's MPS has none."""
    gathers = shutil.copytree(pairs / "FlatVel_A", tmp_path / "in" / "FlatVel_A")
    options = ["--device=cuda", "--tta", "--misfit", "--refine=inversion", "--refine_minutes=0.05"]
    words = words_for(
        checkpoint, "--input", gathers, "--truth", gathers, "--out", tmp_path / "s.csv", *options
    )
    out = on_cards(FAKE, ROOT / "infer.py", *words, WITHOUT_FLOAT64="1", FAKE_CARDS="1")
    maps = maps_of(tmp_path / "s.csv")[1]
    assert len(maps) == 2 and np.isfinite(maps).all() and maps.std() > 0
    assert "inversion" in out
