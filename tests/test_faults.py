"""Training survives what long runs meet: kills, signals, lost ranks, a full disk, NaN. On CPU with gloo."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, write_pair

import train
from networks.checkpoints import load_checkpoint
from training import loader

N_KILLS = int(os.environ.get("N_KILLS", 3))  # EXPERIMENTS.md has 20
OPTIONS = [*SMALL, "--val_share=0.25", "--batch_size=2", "--epochs=4", "--save_minutes=0", "--name=fault"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("openfwi")
    write_pair(root, "FlatVel_A", n=16)
    return root


def start(world, files, root, *args, launcher=(), program=ROOT / "train.py"):
    """`torchrun` in a process group of its own: 4 epochs of 3 steps of 4 samples."""
    command = [sys.executable, "-m", "torch.distributed.run", *(launcher or ["--standalone"])]
    command += [f"--nproc_per_node={world}", str(program), f"--data_root={files}", f"--run_root={root}"]
    options = [*OPTIONS, *args]
    if world == 1 and "--nnodes=2" not in launcher:
        options += ["--accumulate=2"]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, code=0, timeout=240):
    out, _ = process.communicate(timeout=timeout)
    assert code is None or process.returncode == code, out
    return out


def wait_for(condition, timeout=600):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def last(root):
    return load_checkpoint(root / "001-fault" / "last.pt")


def steps_logged(root):
    path = root / "001-fault" / "log.jsonl"
    return path.read_text().count('"lr"') if path.exists() else 0


def assert_same_run(a, b):
    assert a["progress"] == b["progress"]
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The checkpoint of a run of two ranks that nothing disturbs."""
    root = tmp_path_factory.mktemp("whole")
    finish(start(2, files, root))
    state = last(root)
    assert state["progress"]["step"] == 12
    return state


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_bit_for_bit_the_same(files, whole, tmp_path):
    rng, n_kills = random.Random(0), 0
    while n_kills < N_KILLS:
        before = steps_logged(tmp_path)
        process = start(2, files, tmp_path, "--resume=auto")
        wait_for(lambda process=process, n=before: process.poll() is not None or steps_logged(tmp_path) > n)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            n_kills += 1
            process.wait()
        else:  # it came to its end: compare, and kill another run
            assert_same_run(last(tmp_path), whole)
            shutil.rmtree(tmp_path / "001-fault")
    finish(start(2, files, tmp_path, "--resume=auto"))
    assert [p.name for p in tmp_path.iterdir()] == ["001-fault"]
    assert_same_run(last(tmp_path), whole)


@pytest.mark.slow
def test_sigterm_loses_no_step(files, whole, tmp_path):
    process = start(2, files, tmp_path)
    wait_for(lambda: steps_logged(tmp_path) >= 4)
    os.kill(process.pid, signal.SIGTERM)
    out = finish(process, code=None)
    assert "stopped by SIGTERM after step" in out, out
    state, log = last(tmp_path), (tmp_path / "001-fault" / "log.jsonl").read_text().splitlines()
    assert state["progress"]["step"] == max(json.loads(line)["step"] for line in log) < 12
    finish(start(2, files, tmp_path, "--resume=auto"))
    assert_same_run(last(tmp_path), whole)


def kill_a_worker(agent):
    children = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_and_torchrun_restarts_carry_on(files, whole, tmp_path):
    lost = start(2, files, tmp_path / "lost")
    wait_for(lambda: steps_logged(tmp_path / "lost") >= 2)
    kill_a_worker(lost)
    since = time.monotonic()
    out = finish(lost, code=1)
    assert time.monotonic() - since < 60 and "Signal 9 (SIGKILL)" in out, out
    restarted = start(2, files, tmp_path / "re", launcher=["--standalone", "--max-restarts=3"])
    wait_for(lambda: steps_logged(tmp_path / "re") >= 5)
    kill_a_worker(restarted)
    finish(restarted)
    assert_same_run(last(tmp_path / "re"), whole)


@pytest.mark.slow
def test_two_nodes_equal_one(files, whole, tmp_path):
    port = random.randint(20_000, 40_000)
    launcher = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=two"]
    nodes = [start(1, files, tmp_path, launcher=launcher) for _ in range(2)]
    for node in nodes:
        finish(node)
    assert_same_run(last(tmp_path), whole)


@pytest.mark.slow
def test_a_rank_lost_on_one_of_two_nodes_is_started_again_on_both(files, whole, tmp_path):
    port = random.randint(20_000, 40_000)
    launcher = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=lost"]
    launcher += ["--max-restarts=3"]
    nodes = [start(1, files, tmp_path, "--resume=auto", launcher=launcher) for _ in range(2)]
    wait_for(lambda: steps_logged(tmp_path) >= 5)
    kill_a_worker(nodes[0])
    for node in nodes:
        finish(node)
    assert_same_run(last(tmp_path), whole)


@pytest.mark.slow
def test_another_number_of_ranks_resumes_the_same_global_batches(files, whole, tmp_path):
    process = start(2, files, tmp_path)
    wait_for(lambda: steps_logged(tmp_path) >= 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(start(1, files, tmp_path, "--resume=auto"))
    got = last(tmp_path)
    assert got["progress"]["step"] == 12
    assert got["progress"]["best_mae"] == pytest.approx(whole["progress"]["best_mae"], rel=0.02)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(files, tmp_path):
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        process = start(1, files, disk)
        wait_for(lambda: (disk / "001-fault" / "previous.pt").exists())
        with open(disk / "ballast", "wb") as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        out = finish(process, code=None)
        assert "last.pt: not written" in out and "free some space" in out, out
        assert last(disk)["progress"]["step"] >= 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------- NaN


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """Train in this process: (run folder, lines of skipped.jsonl)."""

    def go(*args):
        train.main([f"--data_root={files}", f"--run_root={tmp_path}", *OPTIONS, *args])
        return skipped(tmp_path)

    return go


def skipped(root):
    path = root / "001-fault" / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finite(state):
    return all(v.isfinite().all() for v in state["model"].values())


def test_a_nan_sample_costs_its_steps_only_and_is_named(tmp_path, run, monkeypatch):
    whole_read = loader.read_into

    def spoilt_read(pair, index, seis, vel, check):
        whole_read(pair, index, seis, vel, check)
        if index == 3:
            seis[0, 0, 0] = np.nan

    monkeypatch.setattr(loader, "read_into", spoilt_read)
    lines = run()
    assert len(lines) == 4  # once an epoch
    # batch norm spreads it over its batch of two, not further
    assert all(len(line["samples"]) <= 2 for line in lines)
    assert all(any(name.endswith("data1.npy[3]") for name in line["samples"]) for line in lines)
    assert last(tmp_path)["progress"]["step"] == 24 and finite(last(tmp_path))


def test_nan_in_the_weights_stops_with_the_layer_named_and_keeps_the_checkpoint(tmp_path, run, monkeypatch):
    step = train.train_step

    def spoil(trainer, batches):
        if trainer.step == 7:
            trainer.network.get_parameter("decoder.blocks.0.conv1.conv.weight").data[0, 0, 0, 0] = np.nan
        return step(trainer, batches)

    monkeypatch.setattr(train, "train_step", spoil)
    with pytest.raises(
        ArithmeticError, match=r"3 steps in a row.*weight: decoder.blocks.0.conv1.conv.weight"
    ):
        run("--max_bad_steps=3")
    assert finite(last(tmp_path)) and last(tmp_path)["progress"]["step"] == 7
    assert len(skipped(tmp_path)) == 3


def test_a_nan_gradient_skips_one_step_and_lasting_ones_are_traced(tmp_path, run, monkeypatch):
    step = train.train_step

    def spoil(first, last_step):
        def spoilt(trainer, batches):
            name, p = list(trainer.network.named_parameters())[-1]
            if first <= trainer.step <= last_step and not p._backward_hooks:
                p.register_hook(lambda grad: grad * np.nan)
            elif trainer.step > last_step and p._backward_hooks:
                p._backward_hooks.clear()
            before = [p.detach().clone() for p in trainer.network.parameters()]
            result = step(trainer, batches)
            same = all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
            assert same == (first <= trainer.step - 1 <= last_step)
            return result

        return spoilt

    monkeypatch.setattr(train, "train_step", spoil(5, 5))
    lines = run()
    assert [line["step"] for line in lines] == [6] and finite(last(tmp_path))
    monkeypatch.setattr(train, "train_step", spoil(2, 99))
    with pytest.raises(ArithmeticError, match="first non-finite gradient: "):
        run("--max_bad_steps=4", "--name=traced")


def test_all_ranks_skip_and_stop_alike(files, tmp_path):
    program = tmp_path / "spoilt.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "from training import loader\n"
        "whole = loader.read_into\n"
        "def spoilt(pair, index, seis, vel, check):\n"
        "    whole(pair, index, seis, vel, check)\n"
        "    if index == 3: seis[:] = float('inf')\n"
        "loader.read_into = spoilt\n"
        "train.main(sys.argv[1:])\n"
    )
    finish(start(2, files, tmp_path, program=program))
    lines = skipped(tmp_path)
    steps = [{line["step"] for line in lines if line["rank"] == rank} for rank in (0, 1)]
    assert steps[0] == steps[1] and len(steps[0]) == 4
    assert any(f"{files}/FlatVel_A/data/data1.npy[3]" in line["samples"] for line in lines)
    assert finite(last(tmp_path))
