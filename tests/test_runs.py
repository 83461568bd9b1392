"""Run folders: numbered, found again, checked."""

import pytest
import torch

from networks.checkpoints import load_checkpoint
from training.runs import new_run_folder, run_folders


def test_run_folders_are_numbered_through_all_names(tmp_path):
    names = [new_run_folder(tmp_path / "runs", name).name for name in ("a", "b", "a")]
    assert names == ["001-a", "002-b", "003-a"]
    assert [p.name for p in run_folders(tmp_path / "runs", "a")] == ["001-a", "003-a"]
    assert run_folders(tmp_path / "none", "a") == []


def test_a_damaged_checkpoint_falls_back_to_the_one_before(train_here, tmp_path, capsys, refuses):
    folder = train_here("--save_minutes=0")
    good = load_checkpoint(folder / "last.pt")["model"]
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:500])
    train_here(f"--resume={folder}", "--save_minutes=0")
    assert "going on from" in capsys.readouterr().out
    again = load_checkpoint(folder / "last.pt")["model"]
    assert all(torch.equal(good[k], again[k]) for k in good)
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="last.pt: not a readable checkpoint.*previous.pt"):
        train_here(f"--resume={folder}")
