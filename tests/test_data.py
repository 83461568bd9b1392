import os

import numpy as np
import pytest
import torch
from conftest import run_cli, write_pair

import data
import train
from cfg import Config
from data import (
    PairDataset,
    TrainBatches,
    check_values,
    find_pairs,
    flip_batch,
    load_items,
    make_loaders,
    mean_map,
    preprocess,
    read_sample,
    split_pairs,
)
from utils import FAMILIES, Process, mirror_survey


@pytest.mark.parametrize("above", ["data", "seis", "model/vel", "with space/ünïcode", "data/data"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_layout_is_found_under_any_folder_names(tmp_path, above, dtype):
    root = tmp_path / above
    written = {
        write_pair(root, family, n=2, dtype=dtype) for family in ("FlatVel_A", "FlatFault_B", "Style_A")
    }
    pairs = find_pairs([tmp_path])
    assert {(pair.seis, pair.vel) for pair in pairs} == written
    assert {pair.family for pair in pairs} == {"FlatVel_A", "FlatFault_B", "Style_A"}
    seis, vel, family, _ = PairDataset([(pairs[0], 1)])[0]
    assert seis.shape == (5, 1000, 70) and vel.shape == (1, 70, 70) and vel.dtype == torch.float32
    assert seis.dtype == (torch.float16 if dtype == np.float16 else torch.float32)
    assert FAMILIES[family] == pairs[0].family


def test_seismic_and_velocity_in_one_folder_and_linked_folders_are_found(tmp_path):
    seis, vel = write_pair(tmp_path / "a", "CurveVel_B", n=1)
    os.rename(vel, seis.with_name("model1.npy"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    assert find_pairs([tmp_path / "b"])[0].vel.name == "model1.npy"


def test_files_come_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        write_pair(tmp_path, "FlatVel_A", number, n=1)
    assert [pair.seis.name for pair in find_pairs([tmp_path])] == ["data1.npy", "data9.npy", "data10.npy"]


def test_files_of_both_precisions_mix_as_float32(tmp_path):
    seis, _ = write_pair(tmp_path, "FlatVel_A", 1, n=1, dtype=np.float16)
    full, _ = write_pair(tmp_path, "FlatVel_A", 2, n=1, dtype=np.float32)
    items = [(pair, 0) for pair in find_pairs([tmp_path])]
    assert PairDataset(items[:1])[0][0].dtype == torch.float16
    mixed = PairDataset(items)
    assert mixed[0][0].dtype == mixed[1][0].dtype == torch.float32
    assert torch.equal(mixed[1][0], torch.from_numpy(np.load(full)[0]))


def test_labels_read_twice_are_unchanged(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=1)
    items = [(find_pairs([tmp_path])[0], 0)]
    first = PairDataset(items)[0][1]
    kept = first.clone()
    first -= 3000
    assert torch.equal(PairDataset(items)[0][1], kept)


def broken(kind, root):
    """Spoil one file of a good tree in the named way; returns what the error must hold."""
    seis, vel = write_pair(root, "FlatVel_A", n=2)
    array = np.load(seis)
    if kind == "no velocity":
        vel.unlink()
        return seis, "no velocity file model1.npy"
    if kind == "truncated":
        seis.write_bytes(seis.read_bytes()[:-100])
        return seis, "truncated"
    if kind == "not npy":
        seis.write_bytes(b"PK garbage")
        return seis, "not a .npy file"
    if kind == "archive":
        np.savez(root / "x.npz", array)
        os.replace(root / "x.npz", seis)
        return seis, "an .npz archive"
    if kind == "empty file":
        seis.write_bytes(b"")
        return seis, "not a .npy file"
    if kind == "shape":
        np.save(seis, array[..., :69])
        return seis, "(2, 5, 1000, 69), expected (n, 5, 1000, 70)"
    if kind == "dtype":
        np.save(vel, np.load(vel).astype(np.int32))
        return vel, "int32, expected float16"
    if kind == "count":
        np.save(seis, array[:1])
        return seis, "1 samples"
    if kind == "nan":
        array[1, 2, 3, 4] = np.nan
        np.save(seis, array)
        return seis, "sample 1 of the seismic holds NaN or infinity"
    if kind == "infinity":
        maps = np.load(vel)
        maps[1, 0, 0, 0] = np.inf
        np.save(vel, maps)
        return vel, "sample 1 of the velocity holds NaN or infinity"
    if kind == "km/s":
        np.save(vel, np.load(vel) / 1000)
        return vel, "expected velocities in m/s"
    if kind == "family":
        (root / "FlatVel_A").rename(root / "FlatVell_A")
        return root / "FlatVell_A" / "data" / "data1.npy", "did you mean FlatVel_A?"
    if kind == "other files":
        seis.rename(seis.with_name("gathers.npy"))
        return root, "see the README for the layout"
    raise AssertionError(kind)


KINDS = ["no velocity", "truncated", "not npy", "empty file", "shape", "dtype", "count", "nan", "infinity"]
KINDS += ["archive", "km/s", "family", "other files"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_named(tmp_path, kind):
    path, message = broken(kind, tmp_path)
    with pytest.raises(ValueError) as error:
        check_values(find_pairs([tmp_path]))
    assert str(path) in str(error.value) and message in str(error.value)


def test_missing_folders_and_families_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_pairs([tmp_path / "none"])
    write_pair(tmp_path, "FlatVel_A", n=1)
    with pytest.raises(ValueError, match="no files of Style_A"):
        find_pairs([tmp_path], ("Style_A",))
    with pytest.raises(ValueError, match="did you mean Style_A"):
        find_pairs([tmp_path], ("Style_a",))
    with pytest.raises(ValueError, match="lower --batch_size"):
        cfg = Config(data_root=(str(tmp_path),), batch_size=16, workers=0)
        make_loaders(cfg, Process(torch.device("cpu")), [], [])


def test_bad_data_ends_the_program_before_training(tmp_path):
    path, message = broken("nan", tmp_path)
    result = run_cli(
        "train.py", f"--data_root={tmp_path}", f"--run_root={tmp_path / 'runs'}", "--pretrained=false"
    )
    assert result.returncode == 2 and not (tmp_path / "runs").exists()
    assert len(result.stderr.splitlines()) == 1 and str(path) in result.stderr and message in result.stderr


def test_split_by_file_takes_two_files_a_family_and_by_share_the_last_samples(tmp_path):
    for number in range(1, 7):
        write_pair(tmp_path, "FlatVel_A", number, n=1)
    write_pair(tmp_path, "Style_B", n=4)
    cfg = Config(val_files=2, val_share=0.25)
    train, val = split_pairs(find_pairs([tmp_path]), cfg)
    names = [(pair.family, pair.seis.name, i) for pair, i in val]
    assert names == [
        ("FlatVel_A", "data2.npy", 0),
        ("FlatVel_A", "data5.npy", 0),
        ("Style_B", "data1.npy", 3),
    ]
    assert len(train) + len(val) == 10 and not set(train) & set(val)
    train, val = split_pairs(find_pairs([tmp_path], ("Style_B",)), Config(split="share", val_share=0.5))
    assert [i for _, i in train] == [0, 1] and [i for _, i in val] == [2, 3]


def test_a_validation_root_is_used_whole(tmp_path):
    write_pair(tmp_path / "a", "FlatVel_A", n=3)
    write_pair(tmp_path / "b", "FlatVel_A", n=2)
    train, val = load_items(Config(data_root=(str(tmp_path / "a"),), val_root=(str(tmp_path / "b"),)))
    assert len(train) == 3 and len(val) == 2 and val[0][0].seis.is_relative_to(tmp_path / "b")


def test_mean_map_is_the_mean(tmp_path):
    _, vel = write_pair(tmp_path, "FlatVel_A", n=3)
    pair = find_pairs([tmp_path])[0]
    items = [(pair, i) for i in range(3)]
    np.testing.assert_allclose(mean_map(items), np.load(vel).mean(0), rtol=1e-6)
    np.testing.assert_allclose(mean_map(items, at_most=2), np.load(vel)[[0, 2]].mean(0), rtol=1e-6)


def batches(world, batch_size, epoch=0, start=0, n=50):
    found = []
    for rank in range(world):
        sampler = TrainBatches(n, Config(batch_size=batch_size), Process(torch.device("cpu"), rank, world))
        sampler.epoch, sampler.start = epoch, start
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return [sum(step, []) for step in zip(*found, strict=True)]


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    assert batches(1, 8) == batches(2, 4) == batches(4, 2)
    assert batches(1, 8)[2:] == batches(2, 4, start=2)
    assert batches(1, 8) != batches(1, 8, epoch=1)
    seen = sum(batches(2, 4), [])
    assert len(seen) == len(set(seen)) == 48  # 6 steps of 8; the incomplete batch is dropped


def test_validation_samples_are_shared_among_ranks_without_padding(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=5)
    items = [(pair, i) for pair in find_pairs([tmp_path]) for i in range(pair.n)]
    cfg = Config(batch_size=2, workers=0)
    shares = [make_loaders(cfg, Process(torch.device("cpu"), rank, 2), items, items)[1] for rank in range(2)]
    assert sorted(i for share in shares for _, i in share.dataset.items) == [0, 1, 2, 3, 4]


def test_flip_reverses_sources_receivers_and_the_map_of_the_chosen_only():
    seis, vel = torch.randn(2, 5, 7, 70), torch.randn(2, 1, 70, 70)
    got_seis, got_vel = flip_batch(seis, vel, torch.tensor([True, False]))
    assert torch.equal(got_seis[0, 1, 3, 2], seis[0, 3, 3, 67]) and torch.equal(
        got_vel[0, 0, 5, 2], vel[0, 0, 5, 67]
    )
    assert torch.equal(got_seis[1], seis[1]) and torch.equal(got_vel[1], vel[1])
    again = flip_batch(got_seis, got_vel, torch.tensor([True, False]))
    assert torch.equal(again[0], seis) and torch.equal(again[1], vel)


@pytest.mark.parametrize(
    "mode, shape", [("full", (1000, 70)), ("smart_256x72", (256, 72)), ("small_72x72", (72, 72))]
)
def test_each_mode_has_its_shape_and_commutes_with_mirroring(mode, shape):
    seis = torch.randn(2, 5, 1000, 70)
    got = preprocess(seis, mode)
    assert got.shape == (2, 5, *shape)
    assert torch.allclose(preprocess(mirror_survey(seis), mode), mirror_survey(got), atol=1e-5)
    assert torch.allclose(preprocess(torch.full_like(seis, 3.0), mode), torch.tensor(3.0))


def test_the_early_mode_keeps_slow_waves_and_stops_those_that_would_alias():
    time_s = torch.arange(1000)[:, None] * 1e-3
    waves = {hz: torch.cos(2 * torch.pi * hz * time_s).expand(1, 5, 1000, 70) for hz in (15, 490)}
    slow, fast = (preprocess(wave, "smart_256x72")[..., 5:-5, :] for wave in waves.values())
    assert 0.95 < slow.std() / waves[15].std() < 1.05 and fast.std() < 0.01
    plain_sampling = waves[490][:, :, :512:2]
    assert plain_sampling.std() > 0.5  # what the low-pass is for


def test_a_bad_sample_of_a_large_set_is_found_when_read(tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(data, "FULL_CHECK_GB", 0)
    seis, _ = write_pair(tmp_path, "FlatVel_A", n=7)
    array = np.load(seis)
    array[1] = np.inf
    np.save(seis, array)
    pair = find_pairs([tmp_path])[0]
    check_values([pair])  # samples 0, 3 and 6 only
    with pytest.raises(ValueError, match="sample 1 of the seismic"):
        read_sample(pair, 1)
    # a loader's worker process finds it, and it is still one line
    words = [f"--data_root={tmp_path}", f"--run_root={tmp_path / 'runs'}", "--workers=1", "--split=share"]
    words += ["--batch_size=2", "--arch=seisnext", "--head=perfect", "--width=16", "--threads=1"]
    refuses(train.main, *words, words=[f"error: {seis}: sample 1 of the seismic holds NaN or infinity"])
