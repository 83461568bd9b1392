import math
import os

import numpy as np
import pytest
import torch

from report.figures import prediction_figure
from report.scores import Score, score_table
from training.runs import new_run_folder, run_folders
from utils import check_family, load_checkpoint, pick_device, save_checkpoint, write_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.ones(2)}})
    with pytest.raises(RuntimeError):
        with write_atomic(path) as part:
            part.write_text("half")
            raise RuntimeError
    assert torch.equal(load_checkpoint(path)["model"]["w"], torch.ones(2)) and os.listdir(tmp_path) == [
        "last.pt"
    ]


def test_checkpoints_with_code_in_them_are_refused(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "code": os.system}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")


def test_a_bare_state_dict_is_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "bare.pt", {"w": torch.ones(1)})
    assert set(load_checkpoint(tmp_path / "bare.pt")) == {"model"}
    save_checkpoint(tmp_path / "none.pt", [1])
    with pytest.raises(ValueError, match="holds no weights"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")


def test_run_folders_are_numbered_through_all_names(tmp_path):
    names = [new_run_folder(tmp_path / "runs", name).name for name in ("a", "b", "a")]
    assert names == ["001-a", "002-b", "003-a"]
    assert [p.name for p in run_folders(tmp_path / "runs", "a")] == ["001-a", "003-a"]
    assert run_folders(tmp_path / "none", "a") == []


def test_score_is_the_mean_over_samples_whatever_the_batches():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, 1, 70, 70, generator=rng) * 3000 + 1500 for _ in range(2))
    family = torch.tensor([0, 0, 9, 9, 9, -1, 0])
    whole, parts = Score(), Score()
    whole.add(a, b, family)
    for i in range(7):
        parts.add(a[i : i + 1], b[i : i + 1], family[i : i + 1])
    error = (a.double() - b.double()).abs().mean((1, 2, 3))
    result = whole.result()
    assert result["all"] == (pytest.approx(error.mean().item()), 7)
    assert result["Style_B"] == (pytest.approx(error[2:5].mean().item()), 3) and result["unknown"][1] == 1
    assert {k: v[0] for k, v in result.items()} == pytest.approx({k: v[0] for k, v in parts.result().items()})
    assert "Style_B" in score_table(result) and score_table(result, result).endswith("1.000")
    assert math.isnan(Score().result()["all"][0])


def test_an_unknown_family_comes_with_the_nearest():
    assert check_family("Style_B") == "Style_B"
    with pytest.raises(ValueError, match="did you mean CurveFault_A"):
        check_family("Curvefault_a")


def test_a_missing_device_is_refused(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 2 of this machine has no card: 1 CUDA devices found"):
        pick_device("cuda", local_rank=1)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="no MPS device"):
            pick_device("mps")


def test_the_figure_is_a_png_with_and_without_truth(tmp_path):
    pytest.importorskip("matplotlib")
    vel = np.full((70, 70), 2000, np.float32)
    prediction_figure(
        tmp_path / "f.png", [("a", np.zeros((5, 1000, 70)), None, vel), ("b", np.ones((5, 9, 70)), vel, vel)]
    )
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    prediction_figure(tmp_path / "f.png", [])
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.iterdir())
