"""Gathers are found, named, checked and read as they are, and each has its own true map."""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import kaggle_folder, write_pair

from openfwi.gathers import GatherDataset, find_gathers, find_truths, read_truth


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(size=(5, 1000, 70)).astype(np.float32)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def test_truth_is_scored_against_the_right_map(tmp_path):
    seis, vel = write_pair(tmp_path, "FlatVel_A", 3, n=2)
    gathers = find_gathers(tmp_path)
    assert find_truths(tmp_path, gathers) == [(vel, 0, "FlatVel_A"), (vel, 1, "FlatVel_A")]
    folder = kaggle_folder(tmp_path / "Style_A", 1)
    maps = tmp_path / "maps"
    save(maps / "0000000000.npy", np.zeros((70, 70), np.float32))
    assert find_truths(maps, find_gathers(folder)) == [(maps / "0000000000.npy", None, "Style_A")]


def test_ids_that_collide_are_refused(tmp_path):
    for folder in ("a", "b"):
        kaggle_folder(tmp_path / folder, 1)
    with pytest.raises(ValueError, match="same id 0000000000"):
        find_gathers(tmp_path)


@pytest.mark.parametrize("name", ["a,b", "a\nb", 'a"b', "a\x1bb", "a\u2028b", os.fsdecode(b"\xff\xfe")])
def test_ids_that_no_csv_can_hold_are_refused_in_one_printable_line(tmp_path, noise, name):
    save(tmp_path / "input" / f"{name}.npy", noise)
    with pytest.raises(ValueError, match="a comma, a quote or an unprintable character") as error:
        find_gathers(tmp_path / "input")
    assert str(error.value).isprintable() and str(error.value).isascii()
    os.rename(tmp_path / "input" / f"{name}.npy", tmp_path / "input" / "ü b.npy")
    assert [gather.oid for gather in find_gathers(tmp_path / "input")] == ["ü b"]


@pytest.mark.parametrize("shape", [(70, 70), (1, 70, 70), (1, 1, 70, 70)])
def test_a_file_of_one_gather_may_have_a_first_axis_of_one(tmp_path, noise, shape):
    path = save(tmp_path / "test" / "00ab.npy", noise[None])
    truth = np.random.default_rng(1).uniform(1500, 4500, shape).astype(np.float32)
    save(tmp_path / "maps" / "00ab.npy", truth)
    (gather,) = find_gathers(tmp_path / "test")
    assert gather.oid == "00ab" and find_gathers(path)[0].oid == "00ab"
    assert torch.equal(GatherDataset([gather])[0][1], torch.from_numpy(noise))
    (found,) = find_truths(tmp_path / "maps", [gather])
    assert torch.equal(read_truth(*found), torch.from_numpy(truth).view(1, 70, 70))


def test_an_openfwi_file_of_one_gather_is_named_by_its_path(tmp_path):
    _, vel = write_pair(tmp_path, "FlatVel_A", n=1)
    (gather,) = find_gathers(tmp_path)
    assert gather.oid == "FlatVel_A_data_data1"
    assert find_truths(tmp_path, [gather]) == [(vel, 0, "FlatVel_A")]


def test_true_maps_may_lack_their_channel_and_differ_in_case(tmp_path):
    _, vel = write_pair(tmp_path, "FlatVel_A", n=3)
    maps = np.load(vel)
    vel.unlink()
    save(vel.with_name("MODEL1.NPY"), maps[:, 0])
    os.rename(vel.with_name("MODEL1.NPY.npy"), vel.with_name("MODEL1.NPY"))
    truths = find_truths(tmp_path, find_gathers(tmp_path))
    assert torch.equal(read_truth(*truths[2]), torch.from_numpy(maps[2]))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int16", "int8"])
def test_gathers_of_any_numbers_are_read_as_their_values(tmp_path, noise, dtype):
    values = (20 * noise).astype(dtype)
    save(tmp_path / "00ab.npy", values)
    seis = GatherDataset(find_gathers(tmp_path))[0][1]
    assert seis.dtype == torch.float32 and torch.equal(seis, torch.from_numpy(values.astype(np.float32)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x * np.float32(1e16), "amplitudes up to 4"),
        (lambda x: x.astype(np.float64) * 1e300, "amplitudes up to inf in float64"),
        (lambda x: (5000 * x).astype(np.int16), "in int16, expected OpenFWI's of about 50; divide by"),
        (lambda x: 0 * x, "all zeros, as of a broken download"),
        (lambda x: x + np.float32(np.inf), "NaN or infinity"),
    ],
)
def test_gathers_that_cannot_be_pressures_are_refused(tmp_path, noise, change, message):
    save(tmp_path / "00ab.npy", np.stack([change(noise)] * 2))
    dataset = GatherDataset(find_gathers(tmp_path))
    with pytest.raises(ValueError, match=f"00ab.npy: sample 1.*{message}"):
        dataset[1]


def test_digests_tell_gathers_apart_by_their_values_alone(tmp_path, noise):
    other = noise.copy()
    other[4, 999, 69] += 1
    both = save(tmp_path / "a" / "x.npy", np.stack([noise, other]))
    save(tmp_path / "b" / "y.npy", noise)
    batch, digests, numbers = GatherDataset(find_gathers(both.parent)).read_batch([1, 0])
    assert numbers.tolist() == [1, 0] and torch.equal(batch, torch.from_numpy(np.stack([other, noise])))
    (single,) = GatherDataset(find_gathers(tmp_path / "b")).read_batch([0])[1]
    assert torch.equal(digests[1], single) and not torch.equal(digests[0], single)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files in /proc")
def test_no_file_stays_open(tmp_path):
    folder = kaggle_folder(tmp_path / "test", 70, np.float16)

    def held():
        mapped = open("/proc/self/maps").read().count(str(folder))
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return mapped + sum(str(folder) in os.readlink(link) for link in links if os.path.islink(link))

    kept = [np.load(folder / f"{i:010x}.npy", mmap_mode="r") for i in range(3)]
    assert held() >= len(kept)  # what this test would find
    del kept
    batches = [GatherDataset(find_gathers(folder)).read_batch([i]) for i in range(70)]
    assert len(batches) == 70 and held() == 0


def test_a_gather_named_as_a_velocity_map_is_a_gather(tmp_path, noise):
    np.save(tmp_path / "vel2.npy", noise)
    np.save(tmp_path / "model1.npy", np.full((3, 1, 70, 70), 2000.0))
    (tmp_path / "model3.npy").write_text("damaged")
    assert [gather.oid for gather in find_gathers(tmp_path)] == ["vel2"]
