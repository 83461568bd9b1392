"""The log, Weights & Biases, the profiler."""

import json
import sys
import types

import pytest
import torch

from cfg import Config
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
    folder = train_here("--wandb=offline", "--save_every=1")
    name = (folder / "wandb_id.txt").read_text()
    assert list(folder.glob("wandb/offline-run-*"))
    keys = set().union(*(values for _, _, values in logged))
    assert {"mae", "lr", "val_mae", "family_mae/Style_B"} <= keys
    resumed = [f"--resume={folder}", "--wandb=offline", "--save_every=1"]
    (folder / "last.pt").unlink()  # previous.pt is from a step earlier
    train_here(*resumed)
    assert {id for id, _, _ in logged} == {name}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed"):
        log.start_wandb(Config(wandb="offline"), folder)


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
