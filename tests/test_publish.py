"""Weights to share: half the bytes, a card that says where they come from, a checksum that guards them."""

import json

import pytest
import torch
from conftest import CPU, random_batch

from cfg import Config
from inference.ensemble import Member
from networks.checkpoints import load_checkpoint, load_described, save_checkpoint
from training.publish import PublishOptions, half, main, publish


@pytest.fixture
def published(train_here, tmp_path):
    """A run's best.pt and what was published of it."""
    folder, out = train_here(), tmp_path / "weights" / "small.safetensors"
    main([f"--ckpt={folder}/best.pt", f"--out={out}"])
    return folder / "best.pt", out


def test_published_weights_predict_as_the_checkpoint_at_half_the_bytes(published):
    seis = random_batch()[0]
    before, after = (Member(Config(ckpt=str(path)), path, CPU.device)(seis) for path in published)
    assert torch.allclose(before, after, atol=3)  # m/s; float16 keeps three digits
    checkpoint, out = published
    n_values = sum(v.numel() for v in load_checkpoint(checkpoint)["model"].values())
    assert out.stat().st_size < 2.2 * n_values + 20_000


def test_training_goes_on_from_published_weights(published, train_here):
    folder = train_here(f"--ckpt={published[1]}", "--epochs=1")
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] == 4


def test_the_card_tells_where_the_weights_come_from(published):
    checkpoint, out = published
    card = json.loads(out.with_suffix(".json").read_text())
    (stage,) = card["stages"]
    assert stage["samples"] == 16 and stage["command"] and 0 <= stage["hours"] < 1
    assert card["licence"] and card["network"]["width"] == 16
    again = publish(PublishOptions(ckpt=str(checkpoint), out=str(out), before=(str(checkpoint.parent),)))
    assert [s["samples"] for s in again["stages"]] == [16, 16] and again["sha256"] == card["sha256"]


def test_a_file_that_is_not_its_cards_is_refused_by_name(published):
    out = published[1]
    load_described(out)
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    with pytest.raises(
        ValueError, match="small.safetensors: its SHA-256 is .*, small.json in its folder says"
    ):
        load_described(out)


def test_weights_beyond_float16_are_not_published(published, tmp_path, refuses):
    state = load_checkpoint(published[0])
    name = next(iter(state["model"]))
    state["model"][name][0] = 1e5
    save_checkpoint(published[0], state)
    refuses(main, f"--ckpt={published[0]}", f"--out={tmp_path}/x.safetensors", words=[name, "float16"])
    assert not list(tmp_path.glob("x.*"))


def test_counts_stay_whole_numbers():
    count = torch.tensor(70_001)
    assert half({"count": count})["count"] == count


@pytest.mark.parametrize("out", ["", "weights.pt"])
def test_the_name_to_write_says_what_it_holds(published, refuses, out):
    refuses(main, f"--ckpt={published[0]}", f"--out={out}", words=[".safetensors"])
