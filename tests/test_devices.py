"""system/devices.py: a device that is missing or cannot be used is refused with a remedy."""

import contextlib
import types

import pytest
import torch
from conftest import ROOT

from system.devices import check_card, pick_device, pick_precision, to_device


def test_a_missing_device_is_refused(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 2 of this machine has no card: 1 CUDA devices found"):
        pick_device("cuda", local_rank=1)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="no MPS device"):
            pick_device("mps")


def test_precisions_a_device_lacks_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--precision=tf32 needs CUDA"):
        pick_precision("tf32", torch.device("cpu"))

    def lacks(*args, **kwargs):
        raise RuntimeError("not implemented for Half")

    monkeypatch.setattr(torch.nn.functional, "conv2d", lacks)
    with pytest.raises(ValueError, match="--precision=float16 does not work on cpu here"):
        pick_precision("float16", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="only emulates it; use float16"):
        pick_precision("bfloat16", torch.device("cuda"))


@pytest.mark.parametrize(
    "reason, is_reported",
    [
        ("Found no NVIDIA driver on your system. Please check", False),
        ("No CUDA GPUs are available", False),
        ("The NVIDIA driver on your system is too old (found version 11040). Please update it", True),
        ("Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before", True),
    ],
)
def test_a_card_that_its_driver_disables_is_reported_and_a_machine_without_cards_is_not(
    monkeypatch, reason, is_reported
):
    def fails():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fails)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("cpu").type == "cpu"
    if not is_reported:
        return None if pick_device("auto").type == "cpu" else pytest.fail("no card, but another device")
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"cannot be used: .*update its driver.*--device=cpu"):
            pick_device(name)


@pytest.mark.parametrize(
    "card, arches, remedy",
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_120"], "whl/cu126"),  # V100 with the wheels for CUDA 13
        ((6, 0), ["sm_75", "sm_80"], "whl/cu126"),
        ((7, 0), ["sm_50", "sm_60", "sm_70"], None),
        ((7, 5), ["sm_75", "sm_80"], None),
        ((8, 6), ["sm_75", "sm_80", "sm_90"], None),
        ((9, 0), ["sm_90a"], None),
        ((12, 0), ["sm_90"], "a newer torch"),
        ((12, 1), ["sm_90", "compute_120"], None),
        ((7, 0), [], None),
    ],
)
def test_a_card_that_torch_is_not_built_for_is_reported_with_what_to_install(
    monkeypatch, card, arches, remedy
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arches)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A card")
    with (
        contextlib.nullcontext() if remedy is None else pytest.raises(ValueError, match=f"install .*{remedy}")
    ):
        check_card(0)


def test_only_copies_to_cuda_go_on_without_waiting():
    """On Apple's MPS what such a copy brings may be read before it is there."""
    copies = []
    tensor = types.SimpleNamespace(device=torch.device("cpu"), pin_memory=lambda: tensor)
    tensor.to = lambda device, **options: copies.append((device.type, options))
    for kind in ("mps", "cuda"):
        to_device(tensor, torch.device(kind))
    assert copies == [("mps", {}), ("cuda", {"non_blocking": True})]
    sources = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests"]
    assert [path.name for path in sources if "non_blocking" in path.read_text("utf-8")] == ["devices.py"]
