"""Going on with a run: with the same samples and options, however and wherever its files are given."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, SMALL, write_pair

import train
from cfg import TRAINING, Config, fields_that_decide
from data import Items
from networks.checkpoints import load_checkpoint, save_checkpoint
from openfwi.files import find_pairs
from training.resume import check_resumed, describe_samples, find_run, resumed_config
from training.trainer import Trainer


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run of two epochs over data/ that stopped after three of its eight steps: (folder, state, words)."""
    for family in ("FlatVel_A", "Style_B"):
        write_pair(tmp_path / "data", family, n=6)
    words = [*SMALL, f"--run_root={tmp_path / 'runs'}", "--batch_size=2", "--epochs=2", "--save_minutes=0"]
    step = train.train_step

    def stop_at_three(trainer, batches):
        if trainer.step == 3:
            raise InterruptedError
        return step(trainer, batches)

    monkeypatch.setattr(train, "train_step", stop_at_three)
    with pytest.raises(InterruptedError):
        train.main([f"--data_root={tmp_path / 'data'}", *words])
    monkeypatch.setattr(train, "train_step", step)
    folder = tmp_path / "runs" / "001-seisnext"
    return folder, load_checkpoint(folder / "last.pt"), words


def last_step(folder):
    return load_checkpoint(folder / "last.pt")["progress"]["step"]


def test_the_same_files_under_another_spelling_or_place_are_the_same(stopped, tmp_path, monkeypatch):
    folder, state, words = stopped
    monkeypatch.chdir(tmp_path)
    train.main(["--data_root=./data", *words, "--resume=auto"])
    assert last_step(folder) == 8
    save_checkpoint(folder / "last.pt", state)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    os.utime(tmp_path / "moved" / "FlatVel_A" / "data" / "data1.npy")  # as a copy has another time
    train.main([f"--data_root={tmp_path / 'moved'}", *words, "--resume=auto"])
    assert last_step(folder) == 8 and len(list(folder.parent.iterdir())) == 1


@pytest.mark.parametrize("name", ["", "last.pt"])
def test_a_run_brings_its_options_along(stopped, tmp_path, capsys, name):
    folder, state, _ = stopped
    train.main([f"--resume={folder / name}", "--device=cpu", "--threads=1"])
    assert last_step(folder) == 8
    assert "going on with its own" in (out := capsys.readouterr().out) and "width=16" in out
    cfg = load_checkpoint(folder / "last.pt")["cfg"]
    names = set(fields_that_decide(TRAINING)) - {"pretrained"}  # whose weights have been trained since
    assert all(cfg[name] == state["cfg"][name] for name in names | {"batch_size", "save_minutes"})


@pytest.mark.parametrize("change", ["came", "went", "changed", "last map", "gather"])
def test_other_samples_than_before_are_refused(stopped, tmp_path, change):
    folder, _, words = stopped
    words = [f"--data_root={tmp_path / 'data'}", *words, "--resume=auto"]
    vel = tmp_path / "data" / "Style_B" / "model" / "model1.npy"
    if change == "came":
        write_pair(tmp_path / "data", "Style_B", number=2, n=6)
    elif change == "went":
        shutil.rmtree(tmp_path / "data" / "Style_B")
    elif change == "changed":
        np.save(vel, np.load(vel)[::-1])
    elif change == "last map":
        np.save(vel, np.concatenate([np.load(vel)[:-1], np.load(vel)[-1:] + 50]))
    else:
        seis = tmp_path / "data" / "Style_B" / "data" / "data1.npy"
        np.save(seis, 2 * np.load(seis))
    counts = {
        "came": "8 of 2 files there, 12 of 3 files here",
        "went": "8 of 2 files there, 4 of 1 files here",
    }
    counts = {change: "8 of 2 files here, in another order, of other names or with other values"} | counts
    with pytest.raises(ValueError, match=rf"other training samples than before.*{counts[change]}.*--ckpt="):
        train.main(words)
    assert last_step(folder) == 3


def test_validation_samples_are_compared_too(stopped, tmp_path):
    folder, state, _ = stopped
    items = Items.of([(find_pairs([tmp_path / "data"])[0], 0)])
    cfg = Config(**state["cfg"])
    trainer = Trainer(cfg, CPU, 4, torch.nn.Linear(1, 1), {"validation": describe_samples(items)})
    with pytest.raises(ValueError, match="other validation samples than before"):
        check_resumed(folder, state, trainer)


def test_checkpoints_from_before_values_were_told_go_on(stopped, tmp_path):
    folder, state, words = stopped
    for found in state["samples"].values():
        del found["values"]
    save_checkpoint(folder / "last.pt", state)
    train.main([f"--data_root={tmp_path / 'data'}", *words, "--resume=auto"])
    assert last_step(folder) == 8


def test_checkpoints_from_before_the_digest_go_on_with_the_same_folders_only(stopped, tmp_path):
    folder, state, words = stopped
    save_checkpoint(folder / "last.pt", {k: v for k, v in state.items() if k != "samples"})
    with pytest.raises(ValueError, match="too old to show.*give --data_root="):
        train.main([f"--data_root={tmp_path}/./data/../data", *words, "--resume=auto"])
    train.main([f"--data_root={tmp_path / 'data'}", *words, "--resume=auto"])
    assert last_step(folder) == 8


def test_what_is_given_again_must_agree(stopped, tmp_path):
    folder, state, words = stopped
    cfg = Config(lr=5e-4, resume="auto")
    cfg.given = frozenset(["lr"])
    with pytest.raises(ValueError, match="another configuration .lr: 0.001 in the run, 0.0005 now"):
        resumed_config(cfg, folder, state)
    cfg.given = frozenset()
    assert resumed_config(cfg, folder, state).lr == 1e-3


def test_runs_of_older_versions_go_on_unless_a_dropped_option_decided_them(stopped, tmp_path):
    folder, state, words = stopped
    old = {
        "warmup_epochs": 0.0,
        "save_every": 1000,
        "pretrained_file": "",
        "tta_weights": [],
        "misfit": False,
    }
    state["cfg"] |= {**old, "name": "full", "flag_worst": 0, "gpus": "0"}
    save_checkpoint(folder / "last.pt", state)
    folder = folder.rename(folder.with_name("001-full"))
    train.main([f"--run_root={folder.parent}", "--resume=auto", "--device=cpu", "--threads=1"])
    assert last_step(folder) == 8 and len(list(folder.parent.iterdir())) == 1
    state["cfg"]["warmup_epochs"] = 0.5
    with pytest.raises(
        ValueError, match="trained with --warmup_epochs=0.5, which no longer exists; start a new"
    ):
        resumed_config(Config(), folder, state)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(stopped, capsys):
    folder, state, _ = stopped
    save_checkpoint(folder / "last.pt", state | {"cfg": None})
    assert find_run(Config(resume=str(folder)))[1]["progress"]["step"] == 2
    assert "last.pt: a damaged checkpoint" in capsys.readouterr().out


def test_two_cannot_go_on_with_one_run_at_once(stopped, tmp_path, monkeypatch):
    folder, _, words = stopped
    monkeypatch.setattr(train, "sole_use", lambda folder, sole_use=train.sole_use: sole_use(folder, 0.1))
    with train.sole_use(folder), pytest.raises(ValueError, match="001-seisnext: in use by process"):
        train.main([f"--data_root={tmp_path / 'data'}", *words, "--resume=auto"])
