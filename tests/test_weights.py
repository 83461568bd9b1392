"""The network in weights/: its size, its card, and that it predicts without another word."""

import json

import numpy as np
import torch
from conftest import ROOT

from benchmarks.accuracy import TEST_SEED
from infer import main
from networks.checkpoints import shipped_weights
from synthetic.maps import make_maps
from utils import FAMILIES
from waves import simulate

MIB = 2**20


def test_the_weights_are_small_and_their_card_says_where_they_come_from():
    path = shipped_weights()
    assert sum(file.stat().st_size for file in (ROOT / "weights").iterdir()) <= 16 * MIB
    card = json.loads(path.with_suffix(".json").read_text())
    assert set(card["accuracy"]["maps"]) == set(FAMILIES)
    assert card["stages"]
    assert all(stage["samples"] > 0 and stage["commit"] and stage["hours"] > 0 for stage in card["stages"])
    assert "=/" not in json.dumps(card)  # nobody else has those folders


def test_without_a_checkpoint_the_shipped_network_predicts_and_says_so(tmp_path, capsys):
    vel = torch.from_numpy(make_maps("FlatVel_A", 4, TEST_SEED))
    np.save(tmp_path / "gathers.npy", simulate(vel).numpy())
    main(
        [
            f"--input={tmp_path}/gathers.npy",
            f"--out={tmp_path}/s.csv",
            "--workers=0",
            "--threads=1",
            "--device=cpu",
            f"--save_maps={tmp_path}/maps",
        ]
    )
    assert f"the network is {shipped_weights()}" in capsys.readouterr().out
    found = np.stack([np.load(path) for path in sorted((tmp_path / "maps").glob("*.npy"))])
    assert np.abs(found - vel[:, 0].numpy()).mean() < 120  # the mean map: 450
