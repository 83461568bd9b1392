"""bench.py accuracy: the scores it prints are those of the maps, real ones if there are any."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import SMALL

import bench
from benchmarks import accuracy
from cfg import parse
from model import build_model
from networks.checkpoints import save_checkpoint
from utils import FAMILIES


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(accuracy, "N_MEAN", 2)


def test_real_maps_are_taken_where_they_are_and_the_mean_map_scores_as_it_should(tmp_path):
    real = np.full((2, 1, 70, 70), 3000.0, np.float32)
    np.savez(tmp_path / "Style_B.npz", dev=real)
    bench.main(["accuracy", f"--maps={tmp_path}", "--n_per_family=1", f"--json={tmp_path}/scores.json"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert [family for family, kind in found["maps"].items() if kind == "real"] == ["Style_B"]
    mean = accuracy.mean_map().numpy()
    assert found["rows"]["mean map"]["Style_B"][0] == pytest.approx(np.abs(mean - 3000).mean(), rel=1e-5)
    assert set(found["rows"]["mean map"]) == set(FAMILIES)


def test_a_checkpoint_is_scored_plain_and_with_its_mirrored_view(tmp_path, capsys):
    torch.manual_seed(0)
    cfg = parse(SMALL)
    save_checkpoint(
        tmp_path / "net.pt", {"model": build_model(cfg).state_dict(), "cfg": dataclasses.asdict(cfg)}
    )
    bench.main(["accuracy", f"--ckpt={tmp_path}/net.pt", "--n_per_family=1", "--device=cpu"])
    out = capsys.readouterr().out
    assert (
        f"{tmp_path}/net.pt, mirror average" in out
        and "FVA" in out
        and "synthetic test maps: FlatVel_A" in out
    )


def test_a_file_without_dev_maps_is_refused(tmp_path, refuses):
    np.savez(tmp_path / "FlatVel_A.npz", model1=np.zeros((1, 1, 70, 70)))
    refuses(
        bench.main,
        "accuracy",
        f"--maps={tmp_path}",
        words=["FlatVel_A.npz", "expected maps under the key 'dev'"],
    )
