"""Each mode with each encoder and decoder option: maps, gradients, mirror, reload, overfit, compile, float16.

N_COMBINATIONS=all overfits and tries float16 on the whole product too, not only on a covering choice of it.
"""

import functools
import itertools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import OURS, config, gathers, layered_maps, network
from timm.models import convnext, metaformer

import model
from model import extra_loss, predict_tta
from networks.checkpoints import averaged_weights, load_checkpoint
from networks.encoder import ReflectionPad
from networks.weights import load_weights
from openfwi.modes import MODE_SHAPES
from training.loss import sample_losses
from utils import mirror_survey

ENCODERS = {
    "convnext": {"backbone": "convnext_atto"},
    "convnextv2": {"backbone": "convnextv2_atto", "norm": "layer"},
    "caformer": {"backbone": "caformer_s18", "norm": "layer", "activation": "original"},
    "convformer": {"backbone": "convformer_s18"},
}
PERFECT = {"head": "perfect"}
DECODERS = {
    "plain": {},
    **{name: {"upsample": name} for name in ("pixelshuffle", "nearest")},
    **{name: {name: True} for name in ("scse", "skip_convs", "bounded", "fusion", *model.EXTRAS)},
    **{name: {"decoder_norm": name} for name in ("instance", "batch")},
    "perfect": PERFECT,
    **{f"level {n}": {**PERFECT, "out_level": n} for n in (1, 2)},
    "given fusion": {**PERFECT, "out_level": 1, "fusion": True, "fusion_weights": (1, 3)},
    **{name: {"input_scaling": name} for name in ("signed_log", "time_gain")},
    "drop_path": {"drop_path": 0.2},
    "widths": {"decoder_channels": (48, 24, 20)},
}
OTHERS = {  # networks with an encoder of their own
    "seisnext": OURS,
    "seisnext, all": {**OURS, "fusion": True, **dict.fromkeys(model.EXTRAS, True)},
    "inversionnet": {"arch": "inversionnet"},
}
UNETS = list(itertools.product(MODE_SHAPES, ENCODERS, DECODERS))
# every mode, encoder and decoder option, each pair of mode and encoder; N_COMBINATIONS=all takes the product
SOME = [(list(MODE_SHAPES)[i % 3], list(ENCODERS)[i % 4], decoder) for i, decoder in enumerate(DECODERS)]
if os.environ.get("N_COMBINATIONS") == "all":
    SOME = UNETS


@pytest.fixture
def narrow(monkeypatch):
    """timm's encoders with their own blocks and stems, one block a stage and few channels."""
    size = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}

    def shrink(make, variant, pretrained=False, **options):
        return make(variant, pretrained, **{**options, **size})

    for module, name in ((convnext, "_create_convnext"), (metaformer, "_create_metaformer")):
        monkeypatch.setattr(module, name, functools.partial(shrink, getattr(module, name)))


def options_of(mode, encoder_name, decoder):
    narrow = {"decoder_channels": (32, 16, 16)}
    return {"mode": mode, **ENCODERS[encoder_name], **narrow, **DECODERS[decoder]}


def check_trains(**options):
    """One pass forward and back, one mirrored, one after reloading: what must hold for every network."""
    cfg, net = config(**options), network(**options)
    seis, vel = gathers(mode=cfg.mode), layered_maps()
    extras = {}
    if any(getattr(cfg, name) for name in model.EXTRAS):
        pred, extras = net(seis, extras=True)
    else:
        pred = net(seis)
    assert pred.shape == (2, 1, 70, 70) and pred.dtype == torch.float32 and pred.isfinite().all()
    if cfg.bounded or cfg.arch == "inversionnet":
        assert pred.min() >= 1500 and pred.max() <= 4500
    family = torch.tensor([0, 9])
    loss = sample_losses(pred, vel, family, cfg, torch.ones(10)).mean()
    start, true = (v.detach().numpy().astype(float) for v in (pred, vel))
    assert loss.item() == pytest.approx(np.abs(true - start).mean(), rel=1e-5)
    if cfg.decoder_norm == "none" and cfg.arch == "unet":  # a norm before the head spreads the start
        assert np.abs(start - 3000).mean() < 300
        assert abs(loss.item() - np.abs(true - 3000).mean()) < 300
    (loss + extra_loss(extras, pred, vel, family)).backward()
    assert not [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)

    net.eval()
    seis = seis[:1]
    with torch.no_grad():
        average = predict_tta(net, seis)
        assert torch.allclose(predict_tta(net, mirror_survey(seis)), average.flip(3), atol=1e-2)
        other = network(seed=1, **options).eval()
        expected = net(seis)
        assert not torch.allclose(other(seis), expected, atol=1e-3)
        load_weights(other, net.state_dict())
        assert torch.equal(other(seis), expected)


@pytest.mark.parametrize("mode, encoder_name, decoder", UNETS, ids=str)
def test_every_combination_gives_a_map_a_gradient_to_every_parameter_and_reloads(
    narrow, mode, encoder_name, decoder
):
    check_trains(**options_of(mode, encoder_name, decoder))


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_give_a_map_a_gradient_to_every_parameter_and_reload(name):
    check_trains(**OTHERS[name])


def check_overfits(lr=3e-3, **options):
    net = network(**options)
    seis, vel = gathers(1, options.get("mode", "full")), layered_maps(1)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    first = None
    for step in range(150):
        loss = F.l1_loss(net(seis), vel)
        first = loss.item() if step == 0 else first
        if loss.item() < 0.05 * first:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"L1 from {first:.0f} to {loss.item():.0f} m/s")


@pytest.mark.parametrize("mode, encoder_name, decoder", SOME, ids=str)
def test_one_batch_overfits(narrow, mode, encoder_name, decoder):
    options = options_of(mode, encoder_name, decoder)
    check_overfits(**{"decoder_norm": "batch", **options})  # the norm saves a hundred steps


def test_one_batch_overfits_without_a_decoder_norm(narrow):
    check_overfits(mode="small_72x72", **PERFECT, out_level=2)


def test_one_batch_overfits_ours():
    check_overfits(lr=1e-3, **{**OURS, "width": 16})


COMPILED = {  # every decoder option, in combinations
    "plain": {**ENCODERS["convnext"]},
    "a": {
        **ENCODERS["caformer"],
        "upsample": "pixelshuffle",
        "scse": True,
        "skip_convs": True,
        "fusion": True,
    },
    "b": {**ENCODERS["convnextv2"], "mode": "small_72x72", "upsample": "nearest", "decoder_norm": "instance"},
    "c": {
        **ENCODERS["convformer"],
        "mode": "smart_256x72",
        **DECODERS["given fusion"],
        "decoder_norm": "batch",
    },
    "d": {**PERFECT, "out_level": 2, "bounded": True, "input_scaling": "time_gain", "drop_path": 0.2},
    **OTHERS,
}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_compiled_network_is_one_graph_and_its_checkpoint_loads(tmp_path, narrow, options):
    net, seis = network(**options).eval(), gathers(1, options.get("mode", "full"))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = net(seis)
        assert torch.allclose(compiled(seis), expected, atol=1e-2)
        torch.save(
            {f"module.{key}": value for key, value in compiled.state_dict().items()}, tmp_path / "c.pt"
        )
        other = network(seed=1, **options).eval()
        assert not torch.allclose(other(seis), expected, atol=1e-2)
        load_weights(other, averaged_weights(load_checkpoint(tmp_path / "c.pt")))
        assert torch.equal(other(seis), expected)
    assert "_orig_mod" in next(iter(torch.load(tmp_path / "c.pt", weights_only=True)))


def check_float16(passes=(True, False), **options):
    """Under float16 autocast every module's output on gathers ×4 and constant ones is finite."""
    net, mode = network(**options), options.get("mode", "full")
    seis = torch.cat([4 * gathers(1, mode), *(gathers(1, mode) * 0 + c for c in (0.0, 200.0))])
    overflows = []
    for name, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda m, args, out, name=name: overflows.extend([] if out.isfinite().all() else [name])
            )
    for train in passes:
        with torch.autocast("cpu", torch.float16):
            vel = net.train(train)(seis)
        assert vel.dtype == torch.float32 and vel.isfinite().all() and not overflows
    F.l1_loss(
        vel[:1], layered_maps(1)
    ).backward()  # a constant gather's may overflow: such a step is left out
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("mode, encoder_name, decoder", SOME, ids=str)
def test_float16_is_finite_on_large_and_constant_gathers(narrow, mode, encoder_name, decoder):
    check_float16(**options_of(mode, encoder_name, decoder))


@pytest.mark.parametrize("options", [{}, OURS], ids=["baseline", "seisnext"])
def test_float16_of_whole_networks_is_finite_on_large_and_constant_gathers(options):
    check_float16(passes=(False,), **options)


def test_reflection_joined_from_flipped_pieces_is_torchs():
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    for padding in ((1, 1, 8, 8), (0, 0, 4, 4), (3, 2, 0, 1)):
        pad = ReflectionPad(padding)
        weights = torch.randn_like(pad(x))
        assert torch.equal(pad.from_pieces(x), pad(x))
        ours, torchs = (torch.autograd.grad((weights * y).sum(), x)[0] for y in (pad.from_pieces(x), pad(x)))
        assert torch.allclose(ours, torchs, rtol=1e-12)
