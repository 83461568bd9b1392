"""Encoders of shot gathers: timm's ConvNeXts and MetaFormers (stems, norms, pretrained weights), and ours."""

import math
import pickle
from collections import OrderedDict

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d

from networks.pretrained import OTHERWISE, check_filled, pretrained_source
from networks.weights import check_finite, fill, matching

N_SOURCES = 5


class Float32Sequential(nn.Sequential):
    """Runs in float32 even under autocast.

    Two stem convolutions without a norm between them multiply the range of a gather (200 and more) by the
    square of the weights' size, which exceeds float16's largest number, 65504.
    """

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class ReflectionPad(nn.ReflectionPad2d):
    """Reflection padding that also has a deterministic gradient on CUDA, where torch's raises an error."""

    def forward(self, x):
        if torch.are_deterministic_algorithms_enabled() and x.is_cuda:
            return self.from_pieces(x)
        return super().forward(x)

    def from_pieces(self, x):
        """The padding made of flipped slices: (B, C, H, W) -> (B, C, top + H + bottom, left + W + right)."""
        left, right, top, bottom = self.padding
        for dim, before, after in ((3, left, right), (2, top, bottom)):
            n = x.shape[dim]
            first = x.narrow(dim, 1, before).flip(dim)
            last = x.narrow(dim, n - 1 - after, after).flip(dim)
            x = torch.cat([first, x, last], dim)
        return x


def _convnext_stem(backbone, mode):
    """Two stem convolutions on any mode's input -> (B, C, 72, 72), the second tiled from the first."""
    pad_t, pad_r, stride1, stride2 = {
        "full": (80, 1, 4, 4),  # 1000x70 -> 1160x72 -> 290x73 -> 72x72
        "smart_256x72": (22, 0, 4, 1),  # 256x72 -> 300x72 -> 75x73 -> 72x72
        "small_72x72": (3, 0, 1, 1),  # 72x72 -> 78x72 -> 75x73 -> 72x72
    }[mode]
    first = backbone.stem_0
    first.stride, first.padding = (stride1, 1), (0, 2)
    width, n_in = first.weight.shape[:2]
    second = nn.Conv2d(width, width, 4, (stride2, 1), (0, 1))
    second.weight.data = first.weight.data.repeat(1, math.ceil(width / n_in), 1, 1)[:, :width].clone()
    second.bias.data = first.bias.data.clone()
    backbone.stem_0 = Float32Sequential(ReflectionPad((pad_r, pad_r, pad_t, pad_t)), first, second)


def _metaformer_stem(backbone, mode):
    """One stem convolution and a mean over time on any mode's input -> (B, C, 72, 72)."""
    pad_t, pad_r, stride, pool = {
        "full": (78, 4, 4, 4),  # 1000x70 -> 1156x70 -> 288x72 -> 72x72
        "smart_256x72": (18, 3, 4, 1),  # 256x72 -> 292x72 -> 72x72
        "small_72x72": (3, 3, 1, 1),  # 72x72 -> 78x72 -> 72x72
    }[mode]
    conv = backbone.stem.conv
    conv.stride, conv.padding = (stride, 1), (0, pad_r)
    backbone.stem = Float32Sequential(ReflectionPad((0, 0, pad_t, pad_t)), backbone.stem)
    backbone.stages_0.downsample = nn.AvgPool2d((pool, 1))


STEMS = {"convnext": _convnext_stem, "caformer": _metaformer_stem, "convformer": _metaformer_stem}


class InstanceNormLast(nn.InstanceNorm2d):
    """Instance norm of channels-last features or tokens (B, ..., C), over all axes but batch and channels."""

    def forward(self, x):
        x = F.instance_norm(x.movedim(-1, 1), weight=self.weight, bias=self.bias, eps=self.eps)
        return x.movedim(1, -1)


def _instance_norm(name, child):
    if isinstance(child, LayerNorm2d | RmsNorm2d | SimpleNorm2d):
        return nn.InstanceNorm2d(len(child.weight), affine=True)
    if isinstance(child, nn.LayerNorm | RmsNorm | SimpleNorm):
        return InstanceNormLast(len(child.weight), affine=True)
    return None


def _gelu(name, child):
    return nn.GELU() if name in ("act", "act1") else None


def _replace(module, choose):
    """Replace every descendant of a module for which `choose(name, child)` returns another module."""
    for name, child in module.named_children():
        chosen = choose(name, child)
        if chosen is None:
            _replace(child, choose)
        else:
            setattr(module, name, chosen)


def timm_encoder(cfg):
    """A timm ConvNeXt or MetaFormer, and the widths of its feature maps of 72, 36, 18 and 9 cells a side.

    Raises ValueError for other backbones and for pretrained weights that are not available.
    """
    family = cfg.backbone.split("_")[0].removesuffix("v2")
    if family not in STEMS or "_ols" in cfg.backbone or not timm.is_model(cfg.backbone):
        raise ValueError(
            f"--backbone={cfg.backbone}: expected a timm ConvNeXt, ConvNeXtV2 (not _ols), CAFormer "
            "or ConvFormer, such as convnext_small, convnextv2_tiny, caformer_b36"
        )
    options = {"features_only": True, "in_chans": N_SOURCES, "drop_path_rate": cfg.drop_path}
    source, state = pretrained_source(cfg)
    try:
        backbone = timm.create_model(cfg.backbone, **options, **source)
    except (RuntimeError, OSError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"pretrained weights of {cfg.backbone}: {reason}; {OTHERWISE}") from error
    if source:
        check_finite(backbone, cfg.pretrained if isinstance(cfg.pretrained, str) else cfg.backbone)
    STEMS[family](backbone, cfg.mode)
    if cfg.norm == "instance":
        _replace(backbone, _instance_norm)
    if cfg.activation == "gelu":
        _replace(backbone, _gelu)
    if state is not None:
        fill_encoder(backbone, state, cfg)
    return backbone, backbone.feature_info.channels()


def fill_encoder(backbone, state, cfg):
    """Fill an encoder from a checkpoint of a whole network like ours, ignoring its decoder.

    Raises ValueError if it does not fit.
    """
    mine = backbone.state_dict()
    try:
        found = matching(state, mine, cfg.pretrained)
        check_filled(found, mine, cfg.backbone, cfg.pretrained)
    except ValueError as error:
        raise ValueError(f"{error}; {OTHERWISE}") from None
    fill(backbone, mine | {key: v for key, v in found.items() if key in mine}, cfg.pretrained)


# ---------------------------------------------------------------------------- ours


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def conv_act(n_in, n_out, norm=nn.Identity, stride=1):
    """3x3 convolution without bias, norm, ReLU."""
    conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
    return named(conv=conv, norm=norm(n_out), act=nn.ReLU())


class SeisEncoder(nn.Module):
    """Our encoder: (B, 5, 1000, 70) -> feature maps of 36, 18, 9 and 5 cells a side.

    The stem makes the gather square: each of its cells covers 28 samples of 2 receivers. Most of the work is
    then done at 18 and 9 cells, in plain convolutions, which CPUs run at full speed, and in `AxisMix`.
    """

    DEPTHS = (1, 2, 2, 2)

    def __init__(self, width):
        super().__init__()
        self.widths = [width, 3 * width, 6 * width, 8 * width]
        self.stem = named(
            pad=nn.ZeroPad2d((1, 1, 4, 4)),  # 1000x70 -> 1008x72
            conv=nn.Conv2d(N_SOURCES, width, (28, 2), (28, 2), bias=False),
            norm=nn.BatchNorm2d(width),
            act=nn.ReLU(),
        )
        self.stages = nn.ModuleList()
        for n_in, n_out, depth in zip([0, *self.widths], self.widths, self.DEPTHS, strict=False):
            down = [conv_act(n_in, n_out, nn.BatchNorm2d, stride=2)] if n_in else []
            self.stages.append(nn.Sequential(*down, *(Residual(n_out) for _ in range(depth))))
        self.stages[1].extend([AxisMix(self.widths[1], 18), AxisMix(self.widths[1], 18)])

    def forward(self, seis):
        x = self.stem(seis)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut; initially the shortcut alone."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = conv_act(width, width, nn.BatchNorm2d)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv2(self.conv1(x))))


class AxisMix(nn.Module):
    """Mix all times and all receivers, in the same way in every channel: (B, C, n, n) -> (B, C, n, n).

    The depth from which an echo comes depends on all velocities above it, so each time must see all others.
    """

    def __init__(self, width, n):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.time = nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))
        self.receivers = nn.Linear(n, n)
        for last in (self.time[-1], self.receivers):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x):
        y = self.norm(x)
        return x + self.time(y.mT).mT + self.receivers(y)
