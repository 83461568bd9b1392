"""What happens before training: a process for each card."""

import os

import pytest
import torch

import train
from cfg import Config
from training.launch import launch


def test_several_cards_start_a_process_each_unless_torchrun_has(monkeypatch):
    commands = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "execv", lambda path, words: commands.append(words))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="data_openfwi: no such folder"):
        launch(Config(), "train.py", [])
    assert not commands
    launch(Config(synth_per_family=1), "train.py", ["--lr=1"])
    assert "--nproc_per_node=3" in commands[0] and commands[0][-1] == "--lr=1"
    for cfg in (Config(gpus="1"), Config(device="cpu")):
        launch(cfg, "train.py", [])
    monkeypatch.setenv("RANK", "0")
    launch(Config(), "train.py", [])
    assert len(commands) == 1
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="--gpus=4: 3 CUDA devices found"):
        launch(Config(gpus="4"), "train.py", [])
    for wrong in ("many", "-1", "²"):
        with pytest.raises(ValueError, match="expected a positive number or auto"):
            Config(gpus=wrong)
    with pytest.raises(ValueError, match="--gpus=0 is gone; write --device=cpu"):
        Config(gpus="0")


def test_a_missing_data_folder_is_said_before_missing_weights(tmp_path, refuses):
    words = (f"--data_root={tmp_path / 'none'}", f"--pretrained={tmp_path / 'none.pth'}", "--threads=1")
    refuses(train.main, *words, words=["none: no such folder", "--data_root=DIR"])
    (tmp_path / "none").mkdir()
    refuses(train.main, *words, words=["none.pth: no such file", "--pretrained=false"])
