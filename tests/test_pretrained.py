"""ImageNet weights for the encoder: from timm, from files of many kinds, all filled or refused."""

from urllib.error import HTTPError

import pytest
import safetensors.torch
import timm
import torch
from test_model import CAFORMER, config, network

from networks import pretrained
from networks.pretrained import pretrained_source


@pytest.fixture(scope="module")
def atto():
    """An untrained timm backbone's state dict."""
    torch.manual_seed(3)
    return timm.create_model("convnext_atto").state_dict()


@pytest.fixture
def imagenet(tmp_path, atto):
    """A folder with such weights as .safetensors and as .pth."""
    safetensors.torch.save_file(atto, tmp_path / "atto.safetensors")
    torch.save(atto, tmp_path / "atto.pth")
    return tmp_path


def encoder_of(state, path, **options):
    """The state dict of an encoder that is filled from a file that holds `state`."""
    torch.save(state, path)
    return network(seed=7, pretrained=str(path), **options).backbone.state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_local_file_of_timm_weights_fills_the_encoder(imagenet, atto, suffix, capsys):
    net = network(pretrained=str(imagenet / f"atto.{suffix}"))
    first, second = net.backbone.stem_0[1].weight, net.backbone.stem_0[2].weight
    assert torch.allclose(first, 0.6 * atto["stem.0.weight"].repeat(1, 2, 1, 1)[:, :5])
    assert torch.equal(second[:, 35:40], first) and second.shape == (40, 40, 4, 4)
    key = "stages.2.blocks.5.mlp.fc1.weight"
    assert torch.equal(net.state_dict()["backbone." + key.replace("stages.", "stages_")], atto[key])
    assert "fills 124 of 124 tensors of convnext_atto's encoder\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"backbone.{key}": v for key, v in state.items()} | {"other.weight": torch.ones(3)},
        lambda state: {"state_dict": {f"model.backbone.{key}": value for key, value in state.items()}},
        lambda state: {"model": state, "model_ema": None, "args": {"lr": 1e-3}},
        lambda state: {key: value for key, value in state.items() if not key.startswith("head.")},
        lambda state: {
            key.replace("stages.", "stages_").replace("stem.", "stem_"): value for key, value in state.items()
        },
    ],
    ids=["parallel", "backbone", "lightning", "timm", "headless", "features"],
)
def test_files_of_other_prefixes_and_forms_fill_it_alike(tmp_path, atto, wrap, capsys):
    plain = encoder_of(atto, tmp_path / "plain.pth")
    found = encoder_of(wrap(atto), tmp_path / "wrapped.pth")
    assert all(torch.equal(plain[key], found[key]) for key in plain)
    assert capsys.readouterr().out.count("fills 124 of 124 tensors") == 2


@pytest.mark.parametrize("options", [{}, CAFORMER], ids=["convnext", "caformer"])
def test_a_whole_checkpoint_like_ours_fills_the_encoder_with_its_own(tmp_path, options, capsys):
    source = network(seed=1, **options).state_dict()
    found = encoder_of(
        {"ema": source, "model": network(**options).state_dict()}, tmp_path / "ours.pt", **options
    )
    assert all(torch.equal(value, source[f"backbone.{key}"]) for key, value in found.items())
    assert f"fills {len(found)} of {len(found)} tensors" in capsys.readouterr().out


def test_a_file_that_fills_too_little_is_refused_with_the_counts(tmp_path, atto):
    others = {f"layer{i}.conv.weight": torch.ones(2, 2) for i in range(126)}
    with pytest.raises(
        ValueError, match=r"fills 0 of 124 tensors of convnext_atto's encoder .*stem.0.weight"
    ):
        encoder_of(others, tmp_path / "other.pth")
    half = {key: value for key, value in atto.items() if "stages.2" not in key and "stages.3" not in key}
    with pytest.raises(ValueError, match=r"fills 44 of 124 tensors .*--pretrained=false"):
        encoder_of(half, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"fills \d+ of \d+ tensors of convnext_femto's encoder"):
        encoder_of(network().state_dict(), tmp_path / "ours.pth", backbone="convnext_femto")


def test_a_file_that_lacks_a_few_names_them(tmp_path, atto, capsys):
    few = {key: value for key, value in atto.items() if key != "stages.0.blocks.0.gamma"}
    encoder_of(few, tmp_path / "few.pth")
    said = capsys.readouterr().out
    assert "fills 123 of 124" in said and "keep their initial values: stages.0.blocks.0.gamma" in said


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, atto):
    spoilt = dict(atto) | {
        "stages.1.blocks.0.gamma": torch.full_like(atto["stages.1.blocks.0.gamma"], torch.nan)
    }
    with pytest.raises(ValueError, match="spoilt.pth: stages_1.blocks.0.gamma holds NaN or infinity"):
        encoder_of(spoilt, tmp_path / "spoilt.pth")
    ours = network().state_dict()
    ours["backbone.stem_0.1.weight"][0] = torch.inf
    with pytest.raises(ValueError, match="ours.pth: stem_0.1.weight holds NaN or infinity"):
        encoder_of(ours, tmp_path / "ours.pth")


def test_pretrained_weights_that_cannot_be_had_are_one_line_with_a_way_out(imagenet, monkeypatch):
    (imagenet / "bad.safetensors").write_bytes(b"not weights")
    (imagenet / "bad.pth").write_bytes(b"not weights")
    for file in ("none.pth", "bad.safetensors", "bad.pth", "atto.pth"):
        with pytest.raises(ValueError, match="; .*, or use --pretrained=false$") as error:
            network(backbone="convnext_femto", pretrained=str(imagenet / file))
        assert "\n" not in str(error.value) and str(error.value).count(";") == 1
    with pytest.raises(ValueError, match="no pretrained weights of it"):
        network(backbone="convnextv2_small", pretrained=True)

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(pretrained.huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(pretrained, "urlopen", unreachable)
    with pytest.raises(ValueError, match="cannot be reached; use --pretrained=PATH"):
        network(pretrained=True)


def test_an_answering_hub_and_cached_weights_are_used(imagenet, atto, monkeypatch):
    def refuse(request, timeout):
        raise HTTPError(request.full_url, 403, "forbidden", None, None)

    monkeypatch.setattr(pretrained, "urlopen", refuse)
    monkeypatch.setattr(pretrained.huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    assert pretrained_source(config(pretrained=True)) == ({"pretrained": True}, None)
    cached = str(imagenet / "atto.safetensors")
    monkeypatch.setattr(pretrained.huggingface_hub, "try_to_load_from_cache", lambda *args: cached)
    net = network(pretrained=True)
    key = "stages_0.blocks.1.mlp.fc2.weight"
    assert torch.equal(net.backbone.state_dict()[key], atto[key.replace("stages_", "stages.")])
