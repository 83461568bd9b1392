"""Checkpoints of any origin: what is unambiguous is loaded, all else is one line that says what was found."""

import argparse
import collections
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
from conftest import NETWORK, NETWORK_WORDS

from cfg import Config, network_config, parse
from inference.ensemble import Member
from model import build_model
from networks.checkpoints import averaged_weights, load_checkpoint, save_checkpoint
from networks.weights import load_weights

CPU = torch.device("cpu")
A, B = torch.ones(2), torch.zeros(2)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(5)
    return build_model(Config(**NETWORK))


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


class Holder:
    """A class of somebody else's."""


WRAPPED = {
    "bare": lambda state: state,
    "ordered": lambda state: collections.OrderedDict(state),
    "state_dict": lambda state: {"state_dict": state},
    "model_state_dict": lambda state: {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {"lr": 1},
    },
    "ema is None": lambda state: {"model": state, "ema": None},
    "data parallel twice": lambda state: prefixed("module.module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled and parallel": lambda state: {"model": prefixed("module._orig_mod.", state)},
    "lightning": lambda state: {
        "epoch": 1,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model.", state) | {"criterion.weight": A},
        "hyper_parameters": argparse.Namespace(lr=1e-3),
        "callbacks": {"ModelCheckpoint": {"best_model_score": np.float64(0.5), "dirpath": Path("runs")}},
    },
    "NumPy scalars": lambda state: {
        "model": state,
        "val_mae": np.float32(31.5),
        "epoch": np.int64(3),
        "losses": np.arange(3.0),
        "best": np.bool_(True),
    },
    "float16": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    "parameters": lambda state: {key: nn.Parameter(v, v.is_floating_point()) for key, v in state.items()},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_unambiguous_is_loaded(tmp_path, network, kind):
    torch.save(WRAPPED[kind](network.state_dict()), tmp_path / "x.pt")
    filled = build_model(Config(**NETWORK))
    load_weights(filled, averaged_weights(load_checkpoint(tmp_path / "x.pt")))
    for key, value in network.state_dict().items():
        torch.testing.assert_close(filled.state_dict()[key], value, rtol=1e-3, atol=1e-3)


def test_the_running_average_is_used_under_any_of_its_names(tmp_path):
    for name in ("ema", "model_ema", "state_dict_ema"):
        torch.save({"state_dict": {"w": B}, name: {"w": A}}, tmp_path / "x.pt")
        assert torch.equal(averaged_weights(load_checkpoint(tmp_path / "x.pt"))["w"], A)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_described_file_of_safetensors_predicts_as_the_checkpoint(tmp_path, network, suffix):
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    path = tmp_path / f"seisnext.{suffix}"
    safetensors.torch.save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    options = NETWORK | {"decoder_norm": "none", "input_scaling": "none"}
    path.with_suffix(".json").write_text(json.dumps(options))
    seis = torch.randn(1, 5, 1000, 70)
    member = Member(parse([f"--ckpt={path}"]), path, CPU)
    with torch.no_grad():
        assert torch.equal(member(seis), network.eval()(seis))


def test_a_description_from_before_its_architecture_brought_options_says_what_to_add(tmp_path, network):
    path = tmp_path / "old.pth"
    torch.save(network.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(NETWORK))
    with pytest.raises(ValueError) as error:
        Member(parse([f"--ckpt={path}"]), path, CPU)
    assert str(error.value) == (
        f"{path}: its options leave out decoder_norm, input_scaling; add what it was trained with: "
        "--arch=seisnext means --decoder_norm=batch --input_scaling=signed_log now and meant "
        "--decoder_norm=none --input_scaling=none before"
    )
    assert Member(parse([f"--ckpt={path}", *NETWORK_WORDS]), path, CPU).cfg.decoder_norm == "none"
    assert network_config(Config(), {"cfg": {"arch": "seisnext", "width": 8}}).decoder_norm == "batch"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "3",
        "null",
        '"text"',
        "[" * 100_000,
        '{"arch": 3}',
        '{"width": 1e999}',
        "\x00",
        '{"width": null}',
    ],
)
def test_a_damaged_description_is_one_line(tmp_path, network, text):
    path = tmp_path / "x.pth"
    torch.save(network.state_dict(), path)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(
        ValueError, match="x.json: not the network's options|x.pth: its options do not fit"
    ) as error:
        Member(parse([f"--ckpt={path}"]), path, CPU)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- refused, in one line


def scripted(path):
    torch.jit.script(nn.Linear(2, 2)).save(str(path))


def forged_object(path):
    """A NumPy number whose type claims to be of objects, so that its bytes would be an address."""
    forged = np.dtype("O")

    class Forged:
        def __reduce__(self):
            return np._core.multiarray.scalar, (State(forged), b"\x01" * 8)

    class State:
        def __init__(self, dtype):
            self.dtype = dtype

        def __reduce__(self):
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)

    torch.save({"model": {"w": A}, "score": Forged()}, path)


REFUSED = {
    "missing": (None, "no such checkpoint; give the path of a .pt file by --ckpt=PATH"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (b"", "an empty file"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "HTML": (b"\n  <!DOCTYPE html><html><body>404</body></html>", "a web page, not a checkpoint"),
    "html": (b"<html><head></head></html>", "a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    "text": (b"not weights at all", "not a readable checkpoint"),
    "JSON": (b'{"model": 3}', "not a readable checkpoint"),
    "zip": (b"PK\x03\x04", "not a readable checkpoint"),
    "whole module": (lambda path: torch.save(nn.Linear(2, 2), path),
                     "holds a Python object (torch.nn.modules.linear.Linear)"),
    "object next to them": (lambda path: torch.save({"model": {"w": A}, "o": Holder()}, path),
                      "Python object (test_checkpoints.Holder)"),
    "code": (lambda path: torch.save({"model": {"w": A}, "o": os.system}, path), "system), as whole modules"),
    "forged NumPy": (forged_object, "not a readable checkpoint"),
    "TorchScript": (scripted, "TorchScript"),
    "a tensor": (A, "holds no weights, but a Tensor"),
    "a list": ([A, B], "holds no weights, but a list"),
    "nothing": ({}, "holds no weights, but an empty dict"),
    "None": (None.__class__, "Python object"),
    "a number": (3, "holds no weights, but a int"),
    "other keys": ({"epoch": 3, "lr": 0.1}, "holds no weights, but a dictionary with epoch, lr; expected a"),
    "weights None": ({"model": None, "ema": None}, "holds no weights"),
    "weights a list": ({"model": [A]}, "holds no weights"),
    "numbered keys": ({0: A, 1: B}, "holds no weights"),
    "optimizer alone": ({"optimizer": {"state": {0: {"exp_avg": A}}}}, "holds no weights"),
    "two networks": ({"model": {"w": A}, "net": {"w": B}}, "several networks, under model, net"),
    "two averages": ({"model": {"w": A}, "ema": {"w": B}, "model_ema": {"w": B}},
                     "several networks, under ema, model_ema"),
    "a pickle of protocol 0": (b"(lp0\nI1\na.", "not a readable checkpoint"),
    "NumPy file": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "not a readable checkpoint"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\x00" * 64, "not a readable checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_none_says_what_was_found(tmp_path, kind):
    content, words = REFUSED[kind]
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content) and not isinstance(content, type):
        content(path)
    elif kind != "missing":
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and words in said and "\n" not in said and len(said) < 400, said


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\xff" * 16, b"\x08" + b"\0" * 7 + b"{}", b"<html>", b"\x02" + b"\0" * 7 + b"{}"]
)
def test_safetensors_that_are_none_are_one_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors: ") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- weights that fit, but are none


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(network, value):
    state = {key: v.clone() for key, v in network.state_dict().items()}
    key = next(k for k in state if k.endswith("weight"))
    state[key][(0,) * state[key].ndim] = value
    with pytest.raises(ValueError) as error:
        load_weights(build_model(Config(**NETWORK)), state, "a.pt")
    n = state[key].numel()
    assert str(error.value) == f"a.pt: {key} holds NaN or infinity (1 of {n} values); use another checkpoint"


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.to_sparse(),
        lambda v: torch.empty(v.shape, device="meta"),
        lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantized"],
)
def test_tensors_that_cannot_be_copied_are_one_line(network, change):
    state = dict(network.state_dict())
    key = next(k for k in state if state[k].ndim == 4)
    state[key] = change(state[key])
    with pytest.raises(ValueError, match="a.pt: ") as error:
        load_weights(build_model(Config(**NETWORK)), state, "a.pt")
    assert "\n" not in str(error.value)


def test_two_networks_under_other_prefixes_are_refused(network):
    state = prefixed("student.", network.state_dict()) | prefixed("teacher.", network.state_dict())
    with pytest.raises(ValueError, match=r"a.pt: several networks, under student\., teacher\."):
        load_weights(build_model(Config(**NETWORK)), state, "a.pt")


def test_a_saved_checkpoint_comes_back_as_it_was(tmp_path):
    state = {"model": {"w": A}, "ema": {"w": B}, "progress": {"step": 3, "best": 1.5}, "words": ("a", None)}
    save_checkpoint(tmp_path / "x.pt", state)
    assert str(load_checkpoint(tmp_path / "x.pt")) == str(state)
