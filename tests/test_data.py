import json
import os
import threading

import numpy as np
import pytest
import torch
from conftest import SMALL, write_pair

import train
from cfg import Config
from data import Items, family_numbers, flip_batch, load_items, mean_map, split_pairs, subsample, whole
from openfwi import files
from openfwi.files import find_pairs
from openfwi.modes import preprocess
from parallel.processes import Process
from training.loader import MAX_REPLACEMENTS, PairDataset, Recycled, make_loaders
from training.sampler import TrainBatches, draws_of
from utils import FAMILIES, mirror_survey

CPU = Process(torch.device("cpu"))


def config(root, **options):
    return Config(data_root=(str(root),), **{"split": "share", "batch_size": 2, "workers": 0, **options})


# ---------------------------------------------------------------- items


def test_samples_keep_their_dtype_and_those_of_both_precisions_mix_as_float32(tmp_path):
    half, _ = write_pair(tmp_path, "FlatVel_A", 1, n=1, dtype=np.float16)
    full, vel = write_pair(tmp_path, "FlatVel_A", 2, n=1, dtype=np.float64)
    items = whole(find_pairs([tmp_path]))
    seis, _, family, _ = PairDataset(items[:1])[0]
    assert torch.equal(seis, torch.from_numpy(np.load(half)[0])) and FAMILIES[family] == "FlatVel_A"
    mixed = PairDataset(items)
    assert mixed[0][0].dtype == mixed[1][0].dtype == mixed[1][1].dtype == torch.float32
    assert torch.equal(mixed[1][0], torch.from_numpy(np.load(full)[0]).float())
    assert torch.equal(mixed[1][1], torch.from_numpy(np.load(vel)[0]).float())


def test_labels_read_twice_are_unchanged(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=2)
    train_loader, val_loader = make_loaders(config(tmp_path), CPU, *[whole(find_pairs([tmp_path]))] * 2)
    for loader in (train_loader, val_loader):
        seis, vel, _, index = next(iter(loader))
        kept = vel.clone()[index.argsort()]
        seis.zero_()
        vel -= 3000
        del seis, vel
        seis, vel, _, index = next(iter(loader))
        assert torch.equal(vel[index.argsort()], kept) and seis.any()


def test_items_are_a_sequence_held_in_eight_bytes_each(tmp_path):
    for number in (1, 2):
        write_pair(tmp_path, "FlatVel_A", number, n=3)
    pairs = find_pairs([tmp_path])
    items = whole(pairs)
    listed = [(pair, i) for pair in pairs for i in range(3)]
    assert list(items) == listed and list(items[1::2]) == listed[1::2] and items[-1] == listed[-1]
    assert list(Items.of(listed[2:5])) == listed[2:5] and len(items[6:]) == len(whole([])) == 0
    assert items.rows.nbytes == 8 * len(items)
    assert items.families.tolist() == [FAMILIES.index("FlatVel_A")] * 6


def test_split_by_file_takes_two_files_a_family_and_by_share_the_last_samples(tmp_path):
    for number in range(1, 7):
        write_pair(tmp_path, "FlatVel_A", number, n=1)
    write_pair(tmp_path, "Style_B", n=4)
    train_items, val = split_pairs(find_pairs([tmp_path]), Config(val_files=2, val_share=0.25))
    names = [(pair.family, pair.seis.name, i) for pair, i in val]
    assert names == [
        ("FlatVel_A", "data2.npy", 0),
        ("FlatVel_A", "data5.npy", 0),
        ("Style_B", "data1.npy", 3),
    ]
    assert len(train_items) + len(val) == 10 and not set(train_items) & set(val)
    cfg = Config(split="share", val_share=0.5)
    train_items, val = split_pairs(find_pairs([tmp_path], ("Style_B",)), cfg)
    assert [i for _, i in train_items] == [0, 1] and [i for _, i in val] == [2, 3]


def test_a_validation_root_is_used_whole_and_holds_nothing_trained_on(tmp_path):
    write_pair(tmp_path / "a", "FlatVel_A", n=3)
    write_pair(tmp_path / "b", "FlatVel_A", n=2)
    train_items, val = load_items(config(tmp_path / "a", val_root=(str(tmp_path / "b"),)))
    assert len(train_items) == 3 and len(val) == 2 and val[0][0].seis.is_relative_to(tmp_path / "b")
    with pytest.raises(ValueError, match="data1.npy: in both --data_root and --val_root"):
        load_items(config(tmp_path, val_root=(str(tmp_path / "b"),)))


def test_mean_map_is_the_mean(tmp_path):
    _, vel = write_pair(tmp_path, "FlatVel_A", n=3)
    items = whole(find_pairs([tmp_path]))
    np.testing.assert_allclose(mean_map(items), np.load(vel).mean(0), rtol=1e-6)
    np.testing.assert_allclose(mean_map(items, at_most=2), np.load(vel)[[0, 2]].mean(0), rtol=1e-6)


def test_bad_data_ends_the_program_before_training(tmp_path, refuses):
    seis, _ = write_pair(tmp_path, "FlatVel_A", n=2)
    array = np.load(seis)
    array[1, 2, 3, 4] = np.nan
    np.save(seis, array)
    words = [f"--data_root={tmp_path}", f"--run_root={tmp_path / 'runs'}", *SMALL]
    refuses(train.main, *words, words=[f"{seis}: sample 1 of the seismic holds NaN or infinity"])
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- shares of the data


def many(**counts):
    """Items of so many samples of each family, of no files."""
    pairs = [files.FilePair(None, [0] * n, family) for family, n in counts.items()]
    return Items(pairs, np.concatenate([[(k, i) for i in range(pair.n)] for k, pair in enumerate(pairs)]))


def chosen(items, seed=0, **options):
    return {tuple(row) for row in subsample(items, Config(seed=seed, **options)).rows.tolist()}


def test_percentages_nest_take_their_share_of_each_family_and_follow_the_seed():
    items = many(FlatVel_A=200, Style_B=50, CurveFault_A=1)
    some = [chosen(items, percent=(str(p),)) for p in (1, 10, 30, 99.9, 100)]
    assert all(less < more for less, more in zip(some[:-1], some[1:-1], strict=False)) and some[3] <= some[4]
    assert [sum(k == f for k, _ in some[2]) for f in range(3)] == [60, 15, 1]
    assert some[4] == chosen(items) and len(some[4]) == 251
    assert chosen(items, percent=("10",)) == some[1] != chosen(items, percent=("10",), seed=1)
    # what is taken of a family depends on no other family
    alone = {i for _, i in chosen(many(Style_B=50), percent=("30",))}
    assert alone == {i for k, i in some[2] if k == 1}
    assert {k for k, _ in chosen(items, percent=("0", "Style_B:100"))} == {1}


def test_a_percentage_leaves_validation_whole(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=8)
    everything, val = load_items(config(tmp_path, val_share=0.25))
    half, same = load_items(config(tmp_path, val_share=0.25, percent=("50",)))
    assert len(everything) == 6 and len(half) == 3 and set(half) < set(everything) and list(same) == list(val)


def test_words_for_families_are_read_and_bad_ones_named(tmp_path):
    assert family_numbers("percent", ("30", "Style_B:2.5"), 100) == dict.fromkeys(FAMILIES, 30.0) | {
        "Style_B": 2.5
    }
    for word in ("x", "Style_B:", "Style_B:-1", "-3", "nan", "inf"):
        with pytest.raises(
            ValueError, match=f"--percent={word}: expected a number of 0 or more, or FAMILY:NUMBER"
        ):
            family_numbers("percent", (word,), 100)
    with pytest.raises(ValueError, match="did you mean Style_B"):
        family_numbers("percent", ("style_b:3",), 100)
    with pytest.raises(ValueError, match="--percent=101: expected at most 100"):
        subsample(many(Style_B=3), Config(percent=("101",)))
    with pytest.raises(ValueError, match="all families in the data have weight 0; give"):
        draws_of(many(Style_B=3).families, ("Style_B:0",))


def test_weights_and_the_test_mix_set_how_many_samples_a_family_gives():
    items = many(FlatVel_A=100, Style_B=100)
    flat, style = FAMILIES.index("FlatVel_A"), FAMILIES.index("Style_B")
    assert draws_of(items.families, ("Style_B:3",)) == {flat: 50, style: 150}
    assert draws_of(items.families, ("FlatVel_A:0", "Style_B:3")) == {flat: 0, style: 200}
    mix = draws_of(many(**dict.fromkeys(FAMILIES, 200)).families, ("test_mix",))
    assert sum(mix.values()) == 2000
    flats, a, b = (sum(mix[FAMILIES.index(f)] for f in fs) for fs in (FAMILIES[:2], ["Style_A"], ["Style_B"]))
    assert (flats, a, b) == (362, 172, 192)
    rest = [mix[FAMILIES.index(f)] for f in FAMILIES[2:8]]
    assert sum(rest) == 1274 and max(rest) - min(rest) <= 1


def epoch_of(items, world, batch_size, epoch=0, start=0, seed=0, **options):
    """The epoch's steps, all ranks' samples together."""
    found = []
    for rank in range(world):
        cfg = Config(batch_size=batch_size, seed=seed, **options)
        sampler = TrainBatches(len(items), cfg, Process(torch.device("cpu"), rank, world), items.families)
        sampler.epoch, sampler.start = epoch, start
        batches = list(sampler)
        assert len(sampler) == len(batches)
        found.append(
            [sum(batches[k : k + cfg.accumulate], []) for k in range(0, len(batches), cfg.accumulate)]
        )
    return [sum(step, []) for step in zip(*found, strict=True)]


@pytest.mark.parametrize("weights", [(), ("Style_B:3",), ("test_mix",)])
def test_ranks_partition_an_epoch_whose_order_depends_on_seed_and_epoch_alone(weights):
    items = many(FlatVel_A=30, Style_B=20)
    one = epoch_of(items, 1, 8, sample_weights=weights)
    assert len(one) == 6 and all(len(step) == 8 for step in one)  # what does not fill a seventh is dropped
    for world, batch_size, accumulate in ((2, 4, 1), (4, 2, 1), (1, 2, 4), (2, 2, 2)):
        other = epoch_of(items, world, batch_size, accumulate=accumulate, sample_weights=weights)
        assert [sorted(step) for step in other] == [sorted(step) for step in one]
    assert (
        epoch_of(items, 2, 4, start=2, sample_weights=weights)
        == epoch_of(items, 2, 4, sample_weights=weights)[2:]
    )
    for changed in ({"epoch": 1}, {"seed": 1}):
        assert epoch_of(items, 1, 8, sample_weights=weights, **changed) != one
    seen = np.bincount(
        sum(epoch_of(items, 2, 5, sample_weights=weights), []), minlength=50
    )  # 5 steps of 10: all
    drawn = draws_of(items.families, weights or ("FlatVel_A:1",))
    for f, n in drawn.items():
        mine = seen[items.families == f]
        assert mine.sum() == n and mine.max() - mine.min() <= 1  # each as often as the others


# ---------------------------------------------------------------- loading


def test_any_number_of_workers_gives_the_batches_that_reading_one_by_one_gives(tmp_path):
    for number, family in ((1, "FlatVel_A"), (2, "CurveFault_B")):
        write_pair(tmp_path, family, number, n=5, seed=number, dtype=np.float16)
    items = whole(find_pairs([tmp_path]))
    for workers in (0, 1, 3):
        train_loader, val_loader = make_loaders(config(tmp_path, workers=workers), CPU, items, items)
        assert len(train_loader) == len(val_loader) == 5
        held = [batch for loader in (train_loader, val_loader, train_loader) for batch in loader]
        indices = torch.cat([batch[3] for batch in held]).tolist()
        assert sorted(indices[:10]) == indices[10:20] == list(range(10))
        for seis, vel, family, index in held:  # all are held at once: none may lie where another was
            for k, i in enumerate(index.tolist()):
                pair, j = items[i]
                assert np.array_equal(seis[k].numpy(), np.load(pair.seis)[j])
                assert (
                    np.array_equal(vel[k].numpy(), np.load(pair.vel)[j])
                    and FAMILIES[family[k]] == pair.family
                )


def test_memory_is_used_again_only_when_nobody_holds_any_of_it():
    memory = Recycled(2)
    first = memory(1000, dtype=torch.uint8)
    part, address = first[10:20].view(2, 5), first.data_ptr()
    del first
    second = memory(1000, dtype=torch.uint8)
    assert second.data_ptr() != address
    third = memory(1000, dtype=torch.uint8)  # beyond what is kept
    assert third.data_ptr() not in (address, second.data_ptr())
    del part
    assert memory(900, dtype=torch.uint8).data_ptr() == address
    assert memory(400, dtype=torch.uint8).data_ptr() != address  # small ones do not take large ones' place


def test_a_loader_that_is_left_early_ends_its_threads(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=8)
    items = whole(find_pairs([tmp_path]))
    batches = iter(make_loaders(config(tmp_path, workers=3), CPU, items, items)[0])
    next(batches)
    assert [t for t in threading.enumerate() if t.name.startswith("loader")]
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_validation_samples_are_shared_among_ranks_without_padding(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=5)
    items = whole(find_pairs([tmp_path]))
    processes = [Process(torch.device("cpu"), rank, 2) for rank in range(2)]
    shares = [make_loaders(config(tmp_path), process, items, items)[1] for process in processes]
    assert sorted(i for share in shares for _, i in share.dataset.items) == [0, 1, 2, 3, 4]
    assert [[len(batch[0]) for batch in share] for share in shares] == [[2, 1], [2]]
    with pytest.raises(ValueError, match="lower --batch_size"):
        make_loaders(config(tmp_path, batch_size=6), CPU, items, items)
    with pytest.raises(ValueError, match="0 validation samples"):
        make_loaders(config(tmp_path), CPU, items, items[:0])


# ---------------------------------------------------------------- bad samples in training


def spoil(seis, index):
    """Make a sample infinite in a file that was checked before."""
    array = np.load(seis)
    array[index] = np.inf
    np.save(seis, array)


def test_a_bad_sample_of_a_large_set_stops_training_in_one_line_by_any_reader(tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(files, "FULL_CHECK_GB", 0)
    seis, _ = write_pair(tmp_path, "FlatVel_A", n=7)
    spoil(seis, 1)
    words = [f"--data_root={tmp_path}", f"--run_root={tmp_path / 'runs'}", *SMALL, "--batch_size=2"]
    for workers in (0, 2):
        refuses(
            train.main,
            *words,
            f"--workers={workers}",
            words=[f"error: {seis}: sample 1 of the seismic holds NaN"],
        )


def test_bad_samples_are_replaced_alike_in_training_omitted_in_validation_and_counted(tmp_path, capsys):
    bad, _ = write_pair(tmp_path, "FlatVel_A", 1, n=2)
    write_pair(tmp_path, "FlatVel_A", 2, n=6)
    items = whole(find_pairs([tmp_path]))
    os.truncate(bad, 5_000_000)
    found = []
    for workers in (0, 2):
        cfg = config(tmp_path, workers=workers, skip_bad_files=True, batch_size=4)
        train_loader, val_loader = make_loaders(cfg, CPU, items, items)
        found.append([index.tolist() for *_, index in train_loader])
        for seis, _, _, index in train_loader:
            for k, i in enumerate(index.tolist()):
                assert i >= 2 and np.array_equal(seis[k].numpy(), np.load(items[i][0].seis)[items[i][1]])
        assert train_loader.dataset.skipped[bad] >= 4  # two an epoch, and where a bad one came in place of it
        assert [batch[3].tolist() for batch in val_loader] == [[2, 3], [4, 5, 6, 7]]
        assert val_loader.dataset.skipped == {bad: 2}
    assert found[0] == found[1] and [len(batch) for batch in found[0]] == [4, 4]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and all(f"skipped: {bad}: 5000000 bytes, expected" in line for line in printed)


def test_what_cannot_be_replaced_stops(tmp_path):
    seis, _ = write_pair(tmp_path, "FlatVel_A", n=2)
    items = whole(find_pairs([tmp_path]))
    seis.unlink()
    assert list(make_loaders(config(tmp_path, skip_bad_files=True), CPU, items, items)[1]) == []
    with pytest.raises(
        ValueError, match=f"{MAX_REPLACEMENTS} samples in a row cannot be read, the last of {seis}"
    ):
        PairDataset(items, "replace").read_batch([0])


@pytest.mark.parametrize("skip", [False, True])
def test_a_file_cut_off_during_training_stops_it_or_is_skipped_and_counted(
    tmp_path, monkeypatch, refuses, skip
):
    for number in (1, 2):
        seis, _ = write_pair(tmp_path, "FlatVel_A", number, n=6)
    step = train.train_step

    def cut(trainer, batches):
        if trainer.step == 1:
            os.truncate(seis, 200)
        return step(trainer, batches)

    monkeypatch.setattr(train, "train_step", cut)
    words = [
        f"--data_root={tmp_path}",
        f"--run_root={tmp_path / 'runs'}",
        *SMALL,
        "--batch_size=2",
        "--epochs=2",
    ]
    if not skip:
        return refuses(train.main, *words, words=[f"{seis}: 200 bytes, expected", "overwritten while in use"])
    train.main([*words, "--skip_bad_files"])
    lines = (tmp_path / "runs" / "001-seisnext" / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    counts = [r["skipped_samples"] for r in log if "skipped_samples" in r]
    assert len(counts) == 2 and 0 < counts[0] < counts[1]
    assert [r["step"] for r in log if "val_mae" in r] == [4, 8]


# ---------------------------------------------------------------- input modes, flip


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
    with pytest.raises(ValueError, match="--mode=half: expected one of full, smart_256x72, small_72x72"):
        preprocess(seis, "half")
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
