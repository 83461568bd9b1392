"""Online simulation: exact pairs, the same samples however they are made and shared out, and honest ends."""

import contextlib
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

import synth
import train
from cfg import Config
from data import Items, whole
from networks.checkpoints import load_checkpoint
from openfwi import npy
from openfwi.files import find_pairs
from parallel.processes import Process
from synthetic.maps import make_maps
from synthetic.vary import vary
from training import chunks as chunks_module
from training import online as online_module
from training.chunks import N_MAPS, N_PAIRS, Plan, exact_pairs, make_plan
from training.online import Cached, Lanes, Online, Simulated
from utils import FAMILIES, mirror_survey
from waves.equation import simulate

CPU = Process(torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six maps of two families; their gathers are noise, which no simulated pair has."""
    root = tmp_path_factory.mktemp("openfwi")
    for family in ("FlatVel_A", "CurveVel_B"):
        for folder in ("data", "model"):
            (root / family / folder).mkdir(parents=True)
        np.save(root / family / "model" / "model1.npy", make_maps(family, 6, seed=1))
        gathers = np.random.default_rng(0).normal(size=(6, 5, 1000, 70)).astype(np.float16)
        np.save(root / family / "data" / "data1.npy", gathers)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder for all tests: chunks are simulated once."""
    return tmp_path_factory.mktemp("online_cache")


def config(files, cache, **options):
    options = {"online": 0.5, "batch_size": 4, **options}
    return Config(data_root=(str(files),), online_cache=str(cache), **options)


def items(files):
    return whole(find_pairs([files]))


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------- exact pairs


def test_exact_mirror_is_the_simulation_of_the_mirrored_map():
    vel = torch.from_numpy(make_maps("CurveFault_A", 2, seed=0))
    seis, both = exact_pairs(vel)
    assert torch.equal(both, torch.cat([vel, vel.flip(3)]))
    assert relative(seis, simulate(both)) < 1e-5
    # negative control: the baseline's flip takes the shot at cell 34 for the one at 35
    flipped = mirror_survey(seis[:2])
    assert relative(flipped, simulate(vel.flip(3))) > 0.05
    assert relative(flipped[:, [0, 1, 3, 4]], seis[2:][:, [0, 1, 3, 4]]) < 1e-5


# ---------------------------------------------------------------- what a chunk holds


def test_a_chunk_depends_on_the_configuration_and_its_number_alone(files, cache):
    plan = make_plan(config(files, cache), items(files))
    chunks = [plan.velocity(k) for k in range(24)]
    assert all(
        np.array_equal(make_plan(config(files, cache), items(files)).velocity(k), chunks[k]) for k in (5, 6)
    )
    assert len(np.unique(np.stack(chunks)[0::2].reshape(12 * N_MAPS, -1), axis=0)) == 12 * N_MAPS
    assert [plan.family(k) for k in (0, 1, 2, 3, 18, 20)] == [
        ("FlatVel_A", False),
        ("CurveVel_B", True),
        ("FlatVel_B", False),
        ("FlatVel_A", True),
        ("Style_B", False),
        ("FlatVel_A", False),
    ]
    new = make_plan(config(files, cache, online_maps="new", families=("Style_A",)), items(files))
    assert {new.family(k) for k in range(5)} == {("Style_A", False)}
    varied = make_plan(config(files, cache, online_maps="varied"), items(files))
    assert {varied.family(k) for k in range(5)} == {("FlatVel_A", True), ("CurveVel_B", True)}
    other = make_plan(config(files, cache, seed=1), items(files))
    assert not np.array_equal(other.velocity(0), chunks[0]) and not np.array_equal(
        other.velocity(1), chunks[1]
    )
    # a data set made with the run's own seed, perhaps its validation, holds none of them
    assert not np.array_equal(make_maps("FlatVel_A", N_MAPS, seed=0), chunks[0])


def test_only_training_samples_are_varied(files, cache):
    some = Items.of([items(files)[i] for i in (2, 3, 8)])
    plan = make_plan(config(files, cache, online_maps="varied"), some)
    assert {family: len(maps) for family, maps in plan.sources.items()} == {"CurveVel_B": 2, "FlatVel_A": 1}
    maps = np.load(files / "CurveVel_B" / "model" / "model1.npy")
    assert np.array_equal(plan.sources["CurveVel_B"][1], maps[3])


def test_the_caches_name_tells_plans_apart(files, cache, tmp_path):
    keys = [
        make_plan(config(files, cache, **options), items(files)).key()
        for options in ({}, {"seed": 1}, {"online_maps": "new"}, {"families": ("Style_A",)}, {"online": 0.25})
    ]
    keys.append(make_plan(config(files, cache), items(files)[:-1]).key())
    copy = tmp_path / "copy"
    shutil.copytree(files, copy)
    keys.append(make_plan(config(copy, cache), items(copy)).key())
    assert keys[4] == keys[0] == keys[6]  # the share does not change what a chunk holds, nor does the place
    np.save(copy / "CurveVel_B" / "model" / "model1.npy", make_maps("CurveVel_B", 6, seed=2))
    npy.open_array.cache_clear()
    keys.append(make_plan(config(copy, cache), items(copy)).key())
    assert len(set(keys)) == 6


def test_a_cache_outlives_edits_that_change_no_map_and_no_others(files, cache, monkeypatch):
    plan = make_plan(config(files, cache), items(files))
    key = plan.key()
    for name, function in (("make_maps", make_maps), ("vary", vary)):
        with monkeypatch.context() as patch:
            # the same function written elsewhere, then one whose result differs
            patch.setattr(
                chunks_module, name, lambda *args, function=function, **options: function(*args, **options)
            )
            assert plan.key() == key
            patch.setattr(chunks_module, name, lambda *args, f=function, **options: f(*args) + 1)
            assert plan.key() != key
    monkeypatch.setattr(chunks_module, "CHUNKS_VERSION", chunks_module.CHUNKS_VERSION + 1)
    assert plan.key() != key


# ---------------------------------------------------------------- which sample goes where


@pytest.mark.parametrize("share, batch", [(0.5, 16), (0.25, 8), (0.3, 8), (0.1, 4), (0.99, 2), (1 / 3, 6)])
def test_each_step_has_its_share_and_no_sample_comes_twice(share, batch):
    lanes = Lanes(share, batch, None)
    places = [lanes.place(lane) for lane in range(lanes.n)]
    assert len(set(places)) == lanes.n and set(places) <= set(range(batch))
    used = [[lanes.sample(lane, step) for lane in range(lanes.n)] for step in range(400)]
    counts = [sum(s is not None for s in step) for step in used]
    assert abs(sum(counts) - 400 * share * batch) <= 1 and max(counts) - min(counts) <= 1
    seen = [s for step in used for s in step if s]
    assert len(set(seen)) == len(seen) and {index for _, index in seen} == set(range(N_PAIRS))


def test_chunks_come_in_the_order_of_their_use_and_round_again():
    lanes = Lanes(0.3, 8, None)
    for mine, steps in ((range(3), range(200)), ((1, 2), range(77, 200))):
        first_use = []
        for step in steps:
            for lane in mine:
                found = lanes.sample(lane, step)
                if found and (lane, found[0]) not in first_use:
                    first_use.append((lane, found[0]))
        assert list(lanes.chunks(mine, steps)) == first_use
    again = Lanes(0.3, 8, 5)
    assert {again.sample(lane, step)[0] for lane in range(2) for step in range(400)} == set(range(5))


# ---------------------------------------------------------------- in batches


def mixed(cfg, files, world, steps=(0, 1)):
    """The global batches of these steps, all ones where no simulated sample came; -1 is their family."""
    n = cfg.batch_size * world * cfg.accumulate
    seis, vel = torch.ones(len(steps), n, 5, 1000, 70), torch.ones(len(steps), n, 1, 70, 70)
    family = torch.full((len(steps), n), -1)
    for rank in range(world):
        process = dataclasses.replace(CPU, rank=rank, world=world)
        with Online(cfg, process, items(files), range(steps[0], 8)) as online:
            for j, step in enumerate(steps):
                for micro in range(cfg.accumulate):
                    first = (micro * world + rank) * cfg.batch_size
                    some = slice(first, first + cfg.batch_size)
                    online.mix(step, first, seis[j, some], vel[j, some], family[j, some])
    return seis, vel, family


def test_simulated_samples_take_their_share_and_are_the_same_on_any_number_of_ranks(files, cache):
    seis, vel, family = mixed(config(files, cache), files, 1)
    lanes = Lanes(0.5, 4, None)
    assert (family >= 0).tolist() == [[True, False, True, False]] * 2
    plan = make_plan(config(files, cache), items(files))
    for lane in (0, 1):
        true_seis, true_vel = exact_pairs(torch.from_numpy(plan.velocity(lane)))
        for step in (0, 1):
            chunk, index = lanes.sample(lane, step)
            place = lanes.place(lane)
            assert chunk == lane and torch.equal(vel[step, place], true_vel[index])
            assert relative(seis[step, place], true_seis[index]) < 1e-3  # float16
            assert FAMILIES[family[step, place]] == plan.family(chunk)[0]
    assert (seis[family < 0] == 1).all() and (vel[family < 0] == 1).all()
    two = mixed(config(files, cache, batch_size=2), files, 2)
    accumulated = mixed(config(files, cache, batch_size=2, accumulate=2), files, 1)
    for other in (two, accumulated):
        assert all(torch.equal(a, b) for a, b in zip((seis, vel, family), other, strict=True))


def test_an_existing_cache_is_used_as_it_is_and_is_a_data_root(files, cache):
    cfg = config(files, cache)
    mixed(cfg, files, 1)
    folder = cache / make_plan(cfg, items(files)).key()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.npy")}
    with Online(cfg, CPU, items(files), range(8)) as online:
        for worker in online.made.workers:
            worker.join(60)
            assert worker.exitcode == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.npy")}
    pairs = find_pairs([folder])
    assert {pair.n for pair in pairs} == {N_PAIRS} and all(pair.is_half for pair in pairs)
    pair = pairs[0]
    seis, vel = torch.from_numpy(pair.gathers[0]).float(), torch.from_numpy(pair.maps[0])
    assert relative(seis, simulate(vel[None])[0]) < 1e-3


def test_the_thread_makes_the_same_samples_as_the_processes_and_ends_when_closed(files, cache):
    cfg, lanes = config(files, cache), Lanes(0.5, 4, None)
    plan = make_plan(cfg, items(files))
    made = Simulated(plan, lanes.chunks((0,), range(1, 100_000)), torch.device("cpu"), 1)
    with Online(cfg, CPU, items(files), range(8)) as online:
        for step in (1, 2):
            seis, vel = made.sample(0, *lanes.sample(0, step))
            cached_seis, cached_vel = online.made.sample(0, *lanes.sample(0, step))
            assert torch.equal(seis.half(), cached_seis) and torch.equal(vel, cached_vel)
    made.close()
    assert not made.thread.is_alive()


# ---------------------------------------------------------------- in training


RUN = (*SMALL, "--batch_size=2", "--epochs=1", "--online=0.5", "--online_maps=varied", "--flip_p=0")


def run(files, root, *args):
    npy.open_array.cache_clear()
    train.main([f"--data_root={files}", f"--run_root={root}", *RUN, *args])
    return load_checkpoint(sorted(root.glob("*-seisnext"))[-1] / "last.pt")


def test_a_run_with_online_simulation_resumes_bit_for_bit(files, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    options = ("--noise_p=0.5", "--stretch_p=0.5", "--save_minutes=0")
    once, again = (f"--online_cache={tmp_path / name}" for name in ("once", "again"))
    whole_run = run(files, tmp_path / "a", once, *options)
    step = train.train_step

    def stop_at_three(trainer, batches):
        if trainer.step == 2:
            raise Stopped
        return step(trainer, batches)

    monkeypatch.setattr(train, "train_step", stop_at_three)
    with pytest.raises(Stopped):
        run(files, tmp_path / "b", once, *options)
    monkeypatch.setattr(train, "train_step", step)
    resumed = run(
        files, tmp_path / "b", again, "--resume=auto", *options
    )  # where everything is simulated again
    assert whole_run["progress"] == resumed["progress"] and whole_run["progress"]["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(whole_run[part][k], resumed[part][k]) for k in whole_run[part])
    files_only = run(files, tmp_path / "c", "--online=0", *options)
    assert any(not torch.equal(whole_run["model"][k], files_only["model"][k]) for k in whole_run["model"])


def test_a_simulated_sample_that_makes_a_step_non_finite_is_named_as_one(files, tmp_path, monkeypatch):
    cfg = config(files, tmp_path, batch_size=2, online_maps="varied", flip_p=0)
    plan, lanes = make_plan(cfg, items(files)), Lanes(0.5, 2, None)
    sample = Cached.sample

    def spoilt(self, lane, k, index):
        seis, vel = sample(self, lane, k, index)
        return (seis * np.nan if (k, index) == lanes.sample(0, 1) else seis), vel

    monkeypatch.setattr(Cached, "sample", spoilt)
    run(files, tmp_path, f"--online_cache={tmp_path / 'cache'}")
    (line,) = [json.loads(line) for line in next(tmp_path.glob("*-seisnext/skipped.jsonl")).open()]
    chunk, index = lanes.sample(0, 1)
    simulated = f"simulated {plan.family(chunk)[0]}, chunk {chunk}[{index}]"
    assert line["step"] == 2 and line["samples"][0] == simulated
    # batch norm spreads it over its batch: the other sample is a file's
    assert len(line["samples"]) == 2 and ".npy[" in line["samples"][1]


def test_a_killed_simulating_process_stops_the_run_and_says_so(files, tmp_path, monkeypatch, refuses):
    start = Cached.__init__

    def start_and_kill(self, *args):
        start(self, *args)
        self.workers[0].kill()

    monkeypatch.setattr(Cached, "__init__", start_and_kill)
    words = ["missing, and the simulating processes ended with exit codes [-9]", "--resume"]
    begin = time.monotonic()
    refuses(train.main, f"--data_root={files}", f"--run_root={tmp_path}", *RUN, words=words)
    assert time.monotonic() - begin < 30


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the process in /proc")
def test_simulating_processes_end_after_a_killed_run(files, tmp_path):
    program = tmp_path / "endless.py"
    program.write_text(
        f"""import sys, time; sys.path.insert(0, {str(ROOT)!r})
import torch
from cfg import Config
from data import whole
from openfwi.files import find_pairs
from synthetic.maps import make_maps
from training.online import Online
from parallel.processes import Process
if __name__ == "__main__":
    cfg = Config(online=0.5, batch_size=2, online_cache={str(tmp_path / "cache")!r})
    online = Online(cfg, Process(torch.device("cpu")), whole(find_pairs([{str(files)!r}])), range(10**5))
    print(online.made.workers[0].pid, flush=True)
    time.sleep(600)
"""
    )
    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    worker = Path(f"/proc/{parent.stdout.readline().strip()}/stat")
    while not list(tmp_path.glob("cache/*/*/data/*.npy")):
        time.sleep(0.1)
    assert worker.exists()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone
        while worker.read_text().split()[2] != "Z":
            assert time.monotonic() < until
            time.sleep(0.1)


def test_a_failure_in_the_simulating_process_or_thread_reaches_the_run(files, tmp_path):
    root = tmp_path / "files"
    shutil.copytree(files, root)
    cfg = config(root, tmp_path / "cache", online_maps="varied")
    plan = make_plan(cfg, items(root))
    made = Simulated(plan, Lanes(0.5, 4, None).chunks((0, 1), range(8)), torch.device("cpu"), 2)
    made.close()
    folder = plan.key()
    for path in root.glob("*/model/*.npy"):
        path.write_bytes(path.read_bytes()[:1000])  # truncated after it was indexed
    made = Simulated(plan, Lanes(0.5, 4, None).chunks((0, 1), range(8)), torch.device("cpu"), 2)
    for _ in range(2):
        with pytest.raises(ChildProcessError, match="online simulation stopped: .*model1.npy.*truncated"):
            made.sample(0, 0, 0)
    made.close()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Plan, "key", lambda self: folder)
    lanes = Lanes(0.5, 4, 2)
    chunks = functools.partial(lanes.chunks, (0, 1), range(8))
    made = Cached(plan, chunks, tmp_path / "cache", 1, 2)
    with pytest.raises(ChildProcessError, match=r"exit codes \[2\]"):
        made.sample(0, 0, 0)
    made.close()
    monkey.undo()


def test_what_cannot_work_is_refused_before_training(files, tmp_path, monkeypatch, refuses):
    base = (f"--data_root={files}", f"--run_root={tmp_path}", *RUN)
    refuses(train.main, *base, "--online=1", words=["--online=1.0: expected at most 0.99"])
    refuses(train.main, *base, "--online_maps=old", words=["expected one of new, varied, both"])
    refuses(train.main, *base, "--online_workers=0", words=["--online_workers=0: expected a positive number"])
    room = namedtuple("usage", "free")(1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(online_module.shutil, "disk_usage", lambda path: room)
        refuses(train.main, *base, words=["needs 0.0 GB, 0.0 free; lower --online_pairs"])
    pairs = [dataclasses.replace(pair, mode="small_72x72") for pair in find_pairs([files])]
    monkeypatch.setattr("training.loader.load_items", lambda cfg: (whole(pairs), whole(pairs)))
    refuses(train.main, *base, words=["need whole gathers, data_root holds a packed copy"])
    refuses(train.main, *base, "--online=0", "--gain_p=1", words=["need whole gathers"])


def test_vary_on_the_command_line_writes_exact_pairs_and_the_same_ones_again(files, tmp_path, refuses):
    args = [f"--vary={files}", "--n_per_family=3", "--per_file=2", "--seed=4", "--families=CurveVel_B"]
    synth.main([*args, f"--out={tmp_path / 'a'}"])
    synth.main([*args, f"--out={tmp_path / 'b'}", "--dtype=float16"])
    pairs = find_pairs([tmp_path / "a"])
    assert [(pair.family, pair.n) for pair in pairs] == [("CurveVel_B", 1), ("CurveVel_B", 2)]
    vel = torch.from_numpy(np.concatenate([np.array(pair.maps) for pair in pairs]))
    seis = torch.from_numpy(np.concatenate([np.array(pair.gathers) for pair in pairs]))
    assert relative(seis, simulate(vel)) < 1e-6
    given = np.load(files / "CurveVel_B" / "model" / "model1.npy")
    assert np.array_equal(vel, vary(given, 3, 4))
    again = find_pairs([tmp_path / "b"])
    assert all(np.array_equal(a.maps, b.maps) for a, b in zip(pairs, again, strict=True))
    out = f"--out={tmp_path / 'c'}"
    refuses(
        synth.main,
        f"--vary={tmp_path / 'none'}",
        "--n_per_family=3",
        out,
        words=["none: folder cannot be read"],
    )
    refuses(synth.main, f"--vary={files}", "--maps=x.npz", out, words=["leave out --vary, --n_per_family"])
    refuses(
        synth.main,
        f"--vary={files}",
        "--n_per_family=0",
        out,
        words=["give --n_per_family=N"],
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_thread_simulates_what_a_cpu_would(files, cache):
    process = Process(torch.device("cuda", 0))
    cfg = config(files, cache)
    seis, vel = (torch.zeros(4, *shape, device="cuda") for shape in ((5, 1000, 70), (1, 70, 70)))
    with Online(cfg, process, items(files), range(8)) as online:
        online.mix(0, 0, seis, vel, torch.zeros(4, dtype=torch.long, device="cuda"))
    assert relative(seis[0], simulate(vel[:1].cpu()).to(seis)[0]) < 1e-4 and not seis[1].any()
