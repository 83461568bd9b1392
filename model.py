"""Networks: shot gathers in, velocity maps out.

`arch="unet"` is the public "ConvNeXt full-resolution baseline" (Bartley, 2025) or its CAFormer variant, with
the same keys, so that their checkpoints load; "seisnext" is ours, made for speed; "inversionnet" is the one
of the OpenFWI paper (Deng et al., 2022, arXiv 2111.02926). `python bench.py network --arch=NAME` measures
one.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from networks.decoder import (
    DECODER_NORMS,
    HEADS,
    N_LEVELS,
    UPSAMPLE,
    Decoder,
    Fusion,
    PerfectSegmentationHead,
)
from networks.encoder import N_SOURCES, SeisEncoder, timm_encoder
from openfwi.modes import MODE_SHAPES
from utils import FAMILIES, V_MAX, V_MIN, mirror_survey


class SignedLog(nn.Module):
    """Compress amplitudes: echoes of deep layers are a thousand times weaker than the first arrival."""

    FLOOR = 0.01  # amplitude below which the scale is linear

    def forward(self, seis):
        return seis.sign() * torch.log1p(seis.abs() / self.FLOOR) / 4  # of order 1


class TimeGain(nn.Module):
    """Multiply by (1 + 10 t/T)^p with a learned power p per shot, to undo geometric spreading."""

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.ones(N_SOURCES, 1, 1))

    def forward(self, seis):
        t = torch.linspace(0, 1, seis.shape[2], device=seis.device)[:, None]
        return seis * (1 + 10 * t) ** self.power


SCALINGS = {"none": nn.Identity, "signed_log": SignedLog, "time_gain": TimeGain}


def to_velocity(x, bounded):
    """Network output -> m/s, in float32: near 3000, float16 velocities are 2 m/s apart."""
    x = x.float()
    if bounded:
        return V_MIN + (V_MAX - V_MIN) * x.sigmoid()
    return (V_MAX - V_MIN) / 2 * x + (V_MAX + V_MIN) / 2


def check_input(seis, shape):
    """Raise ValueError unless `seis` is (B, *shape)."""
    if seis.ndim != 4 or tuple(seis.shape[1:]) != shape:
        raise ValueError(f"gathers of shape {tuple(seis.shape)}, expected (B, {', '.join(map(str, shape))})")


class UNet(nn.Module):
    """Encoder, decoder, head: seis (B, 5, T, R) of the mode -> vel (B, 1, 70, 70) m/s, float32."""

    def __init__(self, cfg):
        super().__init__()
        self.shape, self.bounded = MODE_SHAPES[cfg.mode], cfg.bounded
        self.scaling = SCALINGS[cfg.input_scaling]()
        self.backbone, n_features = self.encoder(cfg)
        self.decoder = Decoder(n_features, cfg)
        *n_coarse, n_finest = self.decoder.widths
        self.fusion = Fusion(self.decoder.widths, cfg.fusion_weights) if cfg.fusion else None
        self.seg_head = HEADS[cfg.head](n_finest, 2 if cfg.confidence else 1)
        self.family_head = nn.Linear(n_features[-1], len(FAMILIES)) if cfg.classify_family else None
        n_coarse = n_coarse if cfg.deep_supervision else []
        self.level_heads = nn.ModuleList(PerfectSegmentationHead(width, 1) for width in n_coarse)

    def encoder(self, cfg):
        return timm_encoder(cfg)

    def forward(self, seis, extras=False):
        """The velocity map; with `extras` also a dictionary of the extra outputs that are switched on.

        These are "error" (B, 1, 70, 70) m/s, "family" (B, 10) logits, and "levels", the velocity maps of the
        coarser decoder levels.
        """
        check_input(seis, self.shape)
        features = self.backbone(self.scaling(seis))
        levels = self.decoder(features)
        x = self.seg_head(self.fusion(levels) if self.fusion else levels[-1])
        vel = to_velocity(x[:, :1], self.bounded)
        if not extras:
            return vel
        found = {}
        if x.shape[1] == 2:
            found["error"] = 100 * F.softplus(x[:, 1:].float())
        if self.family_head:
            found["family"] = self.family_head(features[-1].mean((2, 3))).float()
        if self.level_heads:
            coarse = zip(self.level_heads, levels, strict=False)
            found["levels"] = [to_velocity(head(level), self.bounded) for head, level in coarse]
        return vel, found


class SeisNeXt(UNet):
    """Our network: `SeisEncoder` with the same decoder and heads, channels last in memory."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.to(memory_format=torch.channels_last)

    def encoder(self, cfg):
        encoder = SeisEncoder(cfg.width)
        return encoder, encoder.widths

    def forward(self, seis, extras=False):
        check_input(seis, self.shape)
        return super().forward(seis.contiguous(memory_format=torch.channels_last), extras)


class InversionNet(nn.Module):
    """InversionNet (Wu & Lin, 2019; sizes from OpenFWI's appendix), through a code of 512 numbers."""

    ENCODER = (  # (channels, kernel, stride): time alone until 63 samples remain, then 63x70 -> 8x9 -> 1x1
        *((32, (7, 1), (2, 1)), (64, (3, 1), (2, 1)), (64, (3, 1), 1), (64, (3, 1), (2, 1)), (64, (3, 1), 1)),
        *((128, (3, 1), (2, 1)), (128, (3, 1), 1), (128, (3, 3), 2), (128, (3, 3), 1), (256, (3, 3), 2)),
        *((256, (3, 3), 1), (256, (3, 3), 2), (256, (3, 3), 1), (512, (8, 9), 1)),
    )

    def __init__(self, cfg):
        super().__init__()
        self.shape = MODE_SHAPES["full"]
        self.scaling = SCALINGS[cfg.input_scaling]()
        n, convs = N_SOURCES, []
        for n_out, kernel, stride in self.ENCODER:
            padding = 0 if kernel == (8, 9) else (kernel[0] // 2, kernel[1] // 2)
            convs.append(nn.Conv2d(n, n_out, kernel, stride, padding))
            n = n_out
        for n_out in (512, 256, 128, 64, 32):  # 1 -> 5 -> 10 -> 20 -> 40 -> 80 cells a side
            up = nn.ConvTranspose2d(n, n_out, *((5, 1) if n_out == 512 else (4, 2, 1)))
            convs += [up, nn.Conv2d(n_out, n_out, 3, 1, 1)]
            n = n_out
        layers = [m for c in convs for m in (c, nn.BatchNorm2d(c.out_channels), nn.LeakyReLU(0.2))]
        layers += [nn.ZeroPad2d(-5), nn.Conv2d(n, 1, 3, 1, 1), nn.BatchNorm2d(1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, seis):
        check_input(seis, self.shape)
        return to_velocity(self.layers(self.scaling(seis)), bounded=False)


ARCHS = {"unet": UNet, "seisnext": SeisNeXt, "inversionnet": InversionNet}

CHOICES = {
    "arch": ARCHS,
    "mode": MODE_SHAPES,
    "norm": ("instance", "layer"),
    "activation": ("gelu", "original"),
    "upsample": UPSAMPLE,
    "decoder_norm": DECODER_NORMS,
    "head": HEADS,
    "input_scaling": SCALINGS,
}

EXTRAS = ("confidence", "classify_family", "deep_supervision")  # extra outputs, trained by extra_loss


def check_model(cfg):
    """Raise ValueError, one line, if the network's options do not fit each other."""
    for name, options in CHOICES.items():
        if getattr(cfg, name) not in options:
            raise ValueError(f"--{name}={getattr(cfg, name)}: expected one of {', '.join(options)}")
    arch, widths, weights = cfg.arch, cfg.decoder_channels, cfg.fusion_weights
    n_levels = N_LEVELS - cfg.out_level
    faults = {
        f"--arch={arch} reads --mode=full only; --arch=unet reads all": arch != "unet" and cfg.mode != "full",
        f"--arch=inversionnet has no fusion, {', '.join(EXTRAS)}; use --arch=unet or seisnext": (
            arch == "inversionnet" and any(getattr(cfg, name) for name in ("fusion", *EXTRAS))
        ),
        "--arch=seisnext ends at 36x36, --head=crop needs 72x72; use --head=perfect": (
            arch == "seisnext" and cfg.head == "crop"
        ),
        f"--decoder_channels={widths}: expected {N_LEVELS} widths, as 128,64,32": (
            len(widths) != N_LEVELS or not all(type(n) is int and n > 0 for n in widths)
        ),
        f"--width={cfg.width}: expected 1 or more": cfg.width < 1,
        f"--scse divides widths by 16, got --decoder_channels={widths}; use 16 or more": (
            cfg.scse and min(widths, default=0) < 16
        ),
        f"--out_level={cfg.out_level}: expected 0 (finest) to {N_LEVELS - 1}": not 0 < n_levels <= N_LEVELS,
        f"--out_level={cfg.out_level} is coarser than the 72x72 that --head=crop needs; use --head=perfect": (
            cfg.out_level > 0 and cfg.head == "crop"
        ),
        f"--fusion needs several levels, --out_level={cfg.out_level} leaves one; use 0 or 1": (
            cfg.fusion and n_levels == 1
        ),
        f"--fusion_weights={weights}: expected {n_levels} positive ones, with --fusion, or none": (
            len(weights) > 0 and not (cfg.fusion and len(weights) == n_levels and min(weights) > 0)
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(fault)


def build_model(cfg):
    """The network of a configuration: seis (B, 5, T, R) float -> vel (B, 1, 70, 70) float32, m/s.

    (5, T, R) is `MODE_SHAPES[cfg.mode]`. Raises ValueError for options that do not fit each other.
    """
    check_model(cfg)
    return ARCHS[cfg.arch](cfg)


def predict_tta(network, seis):
    """Mean of the prediction and the mirrored prediction of the mirrored survey: (B, 1, 70, 70) m/s."""
    return (network(seis) + network(mirror_survey(seis)).flip(3)) / 2


def extra_loss(extras, pred, vel, family):
    """The loss of the extra outputs, to be added to the L1 loss; 0 if none is switched on.

    "error" is fitted as the width of a Laplace distribution, whose best value is the mean absolute error. Its
    weight is small, so that it does not disturb the velocity.
    """
    loss = pred.new_zeros(())
    if "error" in extras:
        error = (pred.detach() - vel).abs()
        loss = loss + (error / extras["error"] + extras["error"].log()).mean()
    if "family" in extras:
        loss = loss + 10 * F.cross_entropy(extras["family"], family)
    for level in extras.get("levels", ()):
        loss = loss + 0.3 * F.l1_loss(level, vel)
    return loss


if __name__ == "__main__":
    print(
        "model.py: not a program; `python bench.py network --arch=NAME` measures a network", file=sys.stderr
    )
    sys.exit(2)
