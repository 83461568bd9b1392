"""Networks: public checkpoints fit, every option trains, bad combinations are refused."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

import bench
import model
from cfg import Config
from model import build_model, extra_loss, predict_tta
from networks import decoder, encoder, weights
from networks.weights import load_weights
from openfwi.modes import MODE_SHAPES
from utils import mirror_survey

OURS = {
    "arch": "seisnext",
    "head": "perfect",
    "decoder_norm": "batch",
    "input_scaling": "signed_log",
    "width": 8,
}
CAFORMER = {
    **{"backbone": "caformer_s18", "norm": "layer", "activation": "original"},
    **{"upsample": "pixelshuffle", "scse": True, "skip_convs": True},
}


def config(**options):
    return dataclasses.replace(Config(), **{"backbone": "convnext_atto", "pretrained": False, **options})


def network(seed=0, **options):
    torch.manual_seed(seed)
    return build_model(config(**options))


def gathers(n=2, mode="full", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 10 * torch.randn(n, *MODE_SHAPES[mode], generator=generator)


def layered_maps(n=2):
    """Maps of two layers, (n, 1, 70, 70) m/s."""
    depth = torch.arange(70)[:, None].expand(70, 70)
    return torch.stack([torch.where(depth < 20 + 20 * i, 1800.0 + 300 * i, 3500.0) for i in range(n)])[
        :, None
    ]


@torch.no_grad()
def fill_by_rule(net):
    """The weights for which the public baseline's output is known."""
    state = net.state_dict()
    for i, key in enumerate(sorted(state)):
        r = torch.randn(state[key].shape, generator=torch.Generator().manual_seed(i))
        if r.ndim >= 2:
            r *= (r.shape[0] / r.numel()) ** 0.5
        elif key.endswith("weight"):
            r = 1 + 0.1 * r
        else:
            r = (0.5 if key.endswith("gamma") else 0) + 0.1 * r
        state[key].copy_(r)
    return net


# ------------------------------------------------------------------ the public baselines


@pytest.mark.realdata
@pytest.mark.parametrize("options", [{}, {"backbone": "convnext_small"}, CAFORMER])
def test_keys_and_shapes_are_those_of_the_public_checkpoints(shared_data, options):
    net = network(**options)
    name = options.get("backbone", "convnext_atto")
    public = json.loads((shared_data / "baseline" / f"keys_{name}.json").read_text())
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == public["keys"]
    assert sum(p.numel() for p in net.parameters()) == public["parameters"]


TOLERANCE = 0.005  # m/s, of a map; ours and the public outputs differ by 0.001


@pytest.fixture(scope="module")
def golden(shared_data):
    """Public networks filled by the rule, and what the public code gives for a real gather."""
    seis = torch.from_numpy(np.load(shared_data / "gather" / "000039dca2.npy"))[None].float()
    found = {}
    for form, name, options in (("ConvNeXt", "convnext_atto", {}), ("CAFormer", "caformer_s18", CAFORMER)):
        outputs = np.load(shared_data / "baseline" / f"golden_{name}.npz")
        found[form] = fill_by_rule(network(**options)).eval(), seis, outputs
    return found


def farthest(prediction, output):
    return np.abs(prediction.numpy()[0, 0] - output).max()


@pytest.mark.realdata
@pytest.mark.parametrize("form", ["ConvNeXt", "CAFormer"])
@torch.no_grad()
def test_output_on_a_real_gather_is_the_publics(golden, form):
    net, seis, outputs = golden[form]
    assert farthest(net(seis), outputs["plain"]) < TOLERANCE
    assert farthest(predict_tta(net, seis), outputs["mirror_tta"]) < TOLERANCE


def replaced(kind, make):
    """Put `make(module)` in the place of every module of a kind."""

    def change(net):
        found = [(m, name, c) for m in net.modules() for name, c in m.named_children() if type(c) is kind]
        assert found
        for module, name, child in found:
            setattr(module, name, make(child))

    return change


def altered(kind, part="", **values):
    """Give every module of a kind, within a part of the network, other attributes."""

    def change(net):
        found = [m for name, m in net.named_modules() if isinstance(m, kind) and name.startswith(part)]
        assert found
        for module in found:
            vars(module).update(values)

    return change


OTHER_CHOICES = {  # layers without parameters, which keys and shapes do not distinguish from others
    "ConvNeXt": {
        "GELU by tanh": replaced(nn.GELU, lambda m: nn.GELU("tanh")),
        "instance norm with eps 1e-6": altered(nn.InstanceNorm2d, eps=1e-6),
        "stem padded with zeros": replaced(encoder.ReflectionPad, lambda m: nn.ZeroPad2d(m.padding)),
        "stem padded with its edge": replaced(
            encoder.ReflectionPad, lambda m: nn.ReplicationPad2d(m.padding)
        ),
        "decoder with leaky ReLU": replaced(nn.ReLU, lambda m: nn.LeakyReLU(0.01)),
        "decoder padded by reflection": altered(nn.Conv2d, "decoder", padding_mode="reflect"),
        "bounded output": altered(model.UNet, bounded=True),
    },
    "CAFormer": {
        "SCSE with ReLU": replaced(nn.Tanh, lambda m: nn.ReLU()),
        "SCSE with hard sigmoids": replaced(nn.Sigmoid, lambda m: nn.Hardsigmoid()),
        "mean over time replaced by the largest": replaced(
            nn.AvgPool2d, lambda m: nn.MaxPool2d(m.kernel_size, m.stride)
        ),
        "shuffle padded with its edge": replaced(nn.ZeroPad2d, lambda m: nn.ReplicationPad2d(m.padding)),
        "layer norm with eps 1e-5": altered(timm.layers.LayerNorm2d, eps=1e-5),
        "decoder with leaky ReLU": replaced(nn.ReLU, lambda m: nn.LeakyReLU(0.01)),
        "decoder padded by reflection": altered(nn.Conv2d, "decoder", padding_mode="reflect"),
        "stem padded with zeros": replaced(encoder.ReflectionPad, lambda m: nn.ZeroPad2d(m.padding)),
    },
}


@pytest.mark.realdata
@pytest.mark.parametrize(
    "form, choice", [(form, choice) for form, choices in OTHER_CHOICES.items() for choice in choices]
)
@torch.no_grad()
def test_the_public_output_tells_every_choice_without_parameters_from_another(golden, form, choice):
    net, seis, outputs = golden[form]
    other = copy.deepcopy(net)
    OTHER_CHOICES[form][choice](other)
    assert farthest(other(seis), outputs["plain"]) > 2 * TOLERANCE


def test_norms_activations_and_drop_path_are_those_of_the_public_description():
    """What a published network is, where outputs alone would tell it only faintly."""
    net = network()
    norms = [m for m in net.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert norms and all(m.eps == 1e-5 and m.affine and not m.track_running_stats for m in norms)
    activations = [m for m in net.modules() if isinstance(m, nn.GELU)]
    assert activations and all(m.approximate == "none" for m in activations)
    assert not any(isinstance(m, timm.layers.DropPath) for m in net.modules())
    norms = [m for m in network(**CAFORMER).modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all(m.eps == 1e-6 for m in norms)  # timm's own


def test_another_norm_gives_another_map():
    """Instance and layer norm have the same keys and shapes: only the option distinguishes them."""
    net = fill_by_rule(network()).eval()
    layer_norm = network(norm="layer").eval()
    load_weights(layer_norm, net.state_dict())
    with torch.no_grad():
        assert (layer_norm(gathers(1)) - net(gathers(1))).abs().max() > 50


def test_inversionnets_layers_without_parameters_are_the_papers():
    kinds = {type(m): m for m in network(arch="inversionnet").modules()}
    assert kinds[nn.LeakyReLU].negative_slope == 0.2 and kinds[nn.BatchNorm2d].eps == 1e-5
    assert nn.Tanh in kinds and kinds[nn.ZeroPad2d].padding == (-5, -5, -5, -5)


# ------------------------------------------------------------------ parts


def test_inversionnet_has_the_papers_size():
    n = sum(p.numel() for p in network(arch="inversionnet").parameters())
    assert 24.3e6 < n < 24.5e6


def test_decoder_fits_skips_of_odd_sizes():
    block = decoder.DecoderBlock(8, 6, 4, config())
    assert block(torch.randn(1, 8, 5, 4), torch.randn(1, 6, 9, 11)).shape == (1, 4, 9, 11)


def test_perfect_head_gives_70_cells_from_any_size():
    head = decoder.PerfectSegmentationHead(4, 2)
    for size in ((9, 9), (35, 72), (70, 70), (100, 31)):
        assert head(torch.randn(1, 4, *size)).shape == (1, 2, 70, 70)


def test_given_fusion_weights_are_normalised_and_learned_ones_start_equal():
    levels = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8)]
    given, doubled, learned = (
        decoder.Fusion((3, 3), (1, 3)),
        decoder.Fusion((3, 3), (2, 6)),
        decoder.Fusion((3, 3), ()),
    )
    for fusion in (doubled, learned):
        fusion.project.load_state_dict(given.project.state_dict())
    assert torch.allclose(given(levels), doubled(levels))
    assert not torch.allclose(given(levels), learned(levels))
    assert learned.logits.softmax(0).tolist() == [0.5, 0.5]
    assert learned.logits.requires_grad and not given.logits.requires_grad


def test_error_output_is_best_at_the_mean_absolute_error():
    pred, vel = torch.zeros(1, 1, 70, 70), torch.randn(1, 1, 70, 70)
    mae = vel.abs().mean()
    loss = [extra_loss({"error": torch.full_like(vel, mae * c)}, pred, vel, None) for c in (0.9, 1, 1.1)]
    assert loss[1] < min(loss[0], loss[2])
    assert extra_loss({}, pred, vel, None) == 0


def test_input_scalings_keep_what_they_should():
    seis = gathers(1).requires_grad_()
    log = model.SignedLog()(seis)
    assert torch.allclose(log, -model.SignedLog()(-seis)) and log.abs().max() < 4
    assert (torch.autograd.grad(log.sum(), seis)[0] >= 0).all()  # monotone
    gain = model.TimeGain()(seis) / seis
    assert torch.allclose(gain[:, :, 0], torch.ones(5, 70)) and torch.allclose(
        gain[:, :, -1], torch.tensor(11.0)
    )


# ------------------------------------------------------------------ mirror, compile, checkpoints, float16


@pytest.mark.parametrize("mode", ["full", "smart_256x72"])
def test_mirrored_input_with_tta_gives_the_mirrored_output(mode):
    net, seis = network(mode=mode).eval(), gathers(1, mode)
    with torch.no_grad():
        mirrored = predict_tta(net, mirror_survey(seis))
        assert torch.allclose(mirrored, predict_tta(net, seis).flip(3), atol=1e-2)
        assert not torch.allclose(net(mirror_survey(seis)), net(seis).flip(3), atol=1)  # TTA is what does it
    assert torch.equal(mirror_survey(mirror_survey(seis)), seis)
    assert torch.equal(mirror_survey(seis)[0, 0, :, 0], seis[0, 4, :, -1])


def test_float16_overflow_is_that_of_the_second_stem_convolution():
    net, seis = network().eval(), 4 * gathers(1)
    stem = net.backbone.stem_0
    with torch.no_grad():
        for conv in stem[1:]:
            conv.weight *= 60
        expected = net(seis)
        with torch.autocast("cpu", torch.float16):
            found = net(seis)
            net.backbone.stem_0 = nn.Sequential(*stem)
            assert net.backbone.stem_0[:2](seis).isfinite().all()
            assert not net.backbone.stem_0(seis).isfinite().all()
            assert not net(seis).isfinite().all()
    assert (found - expected).abs().max() < 60


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"upsample": "bicubic"}, "--upsample=bicubic: expected one of transposed, pixelshuffle, nearest"),
        ({"mode": "half"}, "--mode=half: expected one of full, smart_256x72, small_72x72"),
        ({**OURS, "width": 0}, "--width=0: expected 1 or more"),
        ({"drop_path": 1.0}, "--drop_path=1.0: expected at most 0.99"),
        ({"backbone": "resnet18"}, "--backbone=resnet18: expected"),
        ({"backbone": "convnext_atto_ols"}, "not _ols"),
        ({**OURS, "mode": "small_72x72"}, "--mode=full only"),
        ({**OURS, "head": "crop"}, "use --head=perfect"),
        ({"arch": "inversionnet", "fusion": True}, "no fusion"),
        ({"decoder_channels": (64, 32)}, "expected 3 widths"),
        ({"decoder_channels": (64, 32, 8), "scse": True}, "use 16 or more"),
        ({"out_level": 3, "head": "perfect"}, r"expected 0 \(finest\) to 2"),
        ({"out_level": 1}, "use --head=perfect"),
        ({"out_level": 2, "head": "perfect", "fusion": True}, "use 0 or 1"),
        ({"fusion": True, "fusion_weights": (1, 2)}, "expected 3 positive ones"),
        ({"fusion": True, "fusion_weights": (1, 2, 0)}, "expected 3 positive ones"),
        ({"fusion_weights": (1, 2, 3)}, "with --fusion"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_those_that_do(options, words):
    with pytest.raises(ValueError, match=words):
        build_model(config(**options))


@pytest.mark.parametrize(
    "options", [*({"mode": mode} for mode in MODE_SHAPES), OURS, {"arch": "inversionnet"}], ids=str
)
def test_wrong_input_shape_says_got_and_expected(options):
    _, n, width = MODE_SHAPES[options.get("mode", "full")]
    for shape in ((2, 5, n - 1, width), (2, 5, n, width + 1), (2, 4, n, width), (5, n, width)):
        with pytest.raises(ValueError) as error:
            network(**options)(torch.zeros(shape))
        assert str(error.value) == f"gathers of shape {shape}, expected (B, 5, {n}, {width})"


def test_checkpoint_of_another_network_is_named():
    femto = network(backbone="convnext_femto")
    with pytest.raises(
        ValueError, match="another shape of backbone.stem_0.1.weight.*--backbone=convnext_femto"
    ):
        load_weights(network(), femto.state_dict())
    with pytest.raises(ValueError, match="misses .*unexpected .*--backbone=caformer_s18"):
        load_weights(network(), network(**CAFORMER).state_dict())
    assert weights.guess_backbone(network(backbone="convnextv2_atto").state_dict()) == "convnextv2_atto"
    with pytest.raises(ValueError, match="give the options it was trained with, as --arch"):
        load_weights(network(), network(arch="inversionnet").state_dict())


def test_table_of_a_configuration(capsys):
    bench.main(["network", "--arch=seisnext", "--head=perfect", "--width=8", "--batch_size=1"])
    out = capsys.readouterr().out
    for words in (
        "parameters",
        "multiply-adds",
        "MB a sample",
        "ms a sample",
        "8x36x36, 24x18x18, 48x9x9, 64x5x5",
    ):
        assert words in out
    with pytest.raises(ValueError, match="--mode=full only"):
        bench.main(["network", "--arch=seisnext", "--mode=small_72x72"])
