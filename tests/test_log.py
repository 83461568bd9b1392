"""The log, Weights & Biases, the profiler."""

import errno
import json
import os
import sys
import types

import pytest
import torch

import train
from networks.checkpoints import load_checkpoint
from system import files
from system.files import append_json
from training import log


def test_profile_writes_a_chrome_trace(train_here):
    trace = json.loads((train_here("--profile") / "trace.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])


def test_weights_and_biases_offline_keeps_its_id_when_resumed(train_here, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, values, step: logged.append((self.id, step, set(values)))
    )
    folder = train_here("--wandb=offline", "--save_minutes=0")
    name = (folder / "wandb_id.txt").read_text()
    assert list(folder.glob("wandb/offline-run-*"))
    keys = set().union(*(values for _, _, values in logged))
    assert {"mae", "lr", "val_mae", "family_mae/Style_B"} <= keys
    resumed = [f"--resume={folder}", "--wandb=offline", "--save_minutes=0"]
    (folder / "last.pt").unlink()  # previous.pt is from a step earlier
    train_here(*resumed)
    assert {id for id, _, _ in logged} == {name}


def test_the_cards_peak_is_known_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert log.peak_flops(torch.device("cuda"), "float16") == 65e12
    assert log.peak_flops(torch.device("cuda"), "float32") == 8.1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another Card")
    assert log.peak_flops(torch.device("cuda"), "float16") is None
    assert log.peak_flops(torch.device("cpu"), "float32") is None


def test_training_operations_are_three_forwards():
    network = torch.nn.Conv2d(5, 2, 3)
    assert log.training_flops(network, "small_72x72", "cpu") == 3 * 2 * 70 * 70 * 2 * 5 * 9


def test_memory_is_told_in_gb_on_linux_and_macos_and_zero_on_windows(monkeypatch):
    resource = pytest.importorskip("resource", reason="POSIX alone")
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=3_000_000))
    cpu = torch.device("cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    assert log.peak_memory_gb(cpu) == 3.0  # kB
    monkeypatch.setattr(sys, "platform", "darwin")
    assert log.peak_memory_gb(cpu) == 0.003  # bytes
    monkeypatch.setitem(sys.modules, "resource", None)
    assert log.peak_memory_gb(cpu) == 0.0


def full_disk(path, *args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_costs_decoration_only_is_said_once_and_best_is_made_up_for(
    train_here, tmp_path, capsys, monkeypatch
):
    """Full from the first validation to the second, whose error is larger than the first's."""
    make_part, validate, errors = files._make_part, train.validate, iter([700.0, 720.0])

    def make(path, mode):
        if path.name in ("metrics.json", "validation.png") or (path.name == "best.pt" and is_full):
            full_disk(path)
        return make_part(path, mode)

    def validate_to(*args):
        nonlocal is_full
        score, mean_score, rows = validate(*args)
        score["all"] = (next(errors), score["all"][1])
        is_full = score["all"][0] == 700
        return score, mean_score, rows

    is_full = False
    monkeypatch.setattr(files, "_make_part", make)
    monkeypatch.setattr(log, "append_json", full_disk)
    monkeypatch.setattr(train, "validate", validate_to)
    folder = train_here()
    out = capsys.readouterr().out
    for name in ("best.pt", "log.jsonl", "metrics.json", "validation.png"):
        assert out.count(f"{name}: not written (No space left on device") == 1, out
    last, best = load_checkpoint(folder / "last.pt"), load_checkpoint(folder / "best.pt")
    assert last["progress"] == {
        "step": 8, "validated": 8, "since_best": 1, "best_mae": 700.0, "best_saved_mae": 720.0
    }  # fmt: skip
    assert best["val_mae"] == 720 and best["step"] == 8
    assert out.endswith(f"best validation MAE 700.00 m/s, not written; {folder}/best.pt has 720.00\n")


def test_a_run_whose_best_weights_were_never_written_does_not_end_as_if_they_were(
    train_here, tmp_path, capsys, monkeypatch
):
    make_part = files._make_part
    monkeypatch.setattr(
        files,
        "_make_part",
        lambda path, mode: (full_disk if path.name == "best.pt" else make_part)(path, mode),
    )
    with pytest.raises(
        ValueError, match="best.pt: the best weights, of .* m/s, could not be written; free some"
    ):
        train_here()
    assert "best validation MAE" not in capsys.readouterr().out
    assert load_checkpoint(max(tmp_path.glob("*-small")) / "last.pt")["progress"]["step"] == 8


def test_a_backend_that_fails_costs_the_figure_only(train_here, capsys, monkeypatch):
    def fails(path, rows):
        raise AttributeError("no such\nbackend")

    monkeypatch.setattr(log, "prediction_figure", fails)
    folder = train_here()
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] == 8
    assert capsys.readouterr().out.count("not written (AttributeError: no such backend)") == 1


def test_lines_that_are_no_records_are_dropped_when_a_run_goes_on(train_here):
    folder = train_here()
    good = (folder / "log.jsonl").read_text().splitlines()
    odd = ["", "3", "null", "{}", '{"step": "x"}', '{"step": 1e9}', '{"step": 9}', "\0\0\0", '{"step": 2, "l']
    (folder / "log.jsonl").write_text("\n".join([*odd, *good, '{"step": 3, "lr"']))
    train_here(f"--resume={folder}")
    assert (folder / "log.jsonl").read_text().splitlines() == good


def test_a_line_after_one_that_was_cut_short_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    append_json(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2')
    append_json(path, {"step": 3})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2', '{"step": 3}']
