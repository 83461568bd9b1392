"""Decoders and heads: from feature maps to a velocity map of exactly 70 x 70 cells."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from networks.encoder import conv_act, named

MAP_SIZE = 70

N_LEVELS = 3  # levels of the decoder

UPSAMPLE = {
    "transposed": lambda n: named(deconv=nn.ConvTranspose2d(n, n, 2, 2)),
    # the 2x2 mean after the shuffle removes its checkerboard (Sugawara et al., 2018)
    "pixelshuffle": lambda n: named(
        conv_block=nn.Conv2d(n, 4 * n, 3, padding=1),
        shuffle=nn.PixelShuffle(2),
        pad=nn.ZeroPad2d((1, 0, 1, 0)),
        pool=nn.AvgPool2d(2, 1),
    ),
    "nearest": lambda n: nn.Upsample(scale_factor=2),
}

DECODER_NORMS = {
    "none": nn.Identity,
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True),
    "batch": nn.BatchNorm2d,
}


class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze and excitation (Roy et al., 2018, arXiv 1803.02579)."""

    def __init__(self, width, reduction=16):
        super().__init__()
        squeeze, excite = (
            nn.Conv2d(width, width // reduction, 1),
            nn.Conv2d(width // reduction, width, 1),
        )
        # the public baseline has Tanh here, where the paper has ReLU
        self.cSE = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.Tanh(), excite, nn.Sigmoid())
        self.sSE = nn.Sequential(nn.Conv2d(width, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)


class DecoderBlock(nn.Module):
    """Upsample to the skip's size, join, convolve twice."""

    def __init__(self, n_in, n_skip, n_out, cfg):
        super().__init__()
        norm = DECODER_NORMS[cfg.decoder_norm]
        attention = (lambda n: named(attention=SCSE(n))) if cfg.scse else nn.Identity
        self.upsample = UPSAMPLE[cfg.upsample](n_in)
        skip_convs = [conv_act(n_skip, n_skip, norm) for _ in range(2 * cfg.skip_convs)]
        self.intermediate_conv = nn.Sequential(*skip_convs)
        self.attention1 = attention(n_in + n_skip)
        self.conv1 = conv_act(n_in + n_skip, n_out, norm)
        self.conv2 = conv_act(n_out, n_out, norm)
        self.attention2 = attention(n_out)

    def forward(self, x, skip):
        x = self.upsample(x)
        if x.shape[-2:] != skip.shape[-2:]:
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear")
        x = self.attention1(torch.cat([x, self.intermediate_conv(skip)], 1))
        return self.attention2(self.conv2(self.conv1(x)))


class Decoder(nn.Module):
    """U-Net decoder: feature maps, fine to coarse -> its levels, coarse to fine."""

    def __init__(self, n_features, cfg):
        super().__init__()
        *n_skips, n_deepest = n_features
        n_levels = len(n_skips) - cfg.out_level
        self.widths = cfg.decoder_channels[:n_levels]
        n_in = [n_deepest, *self.widths[:-1]]
        widths = zip(n_in, n_skips[::-1][:n_levels], self.widths, strict=True)
        self.blocks = nn.ModuleList(DecoderBlock(*width, cfg) for width in widths)

    def forward(self, features):
        *skips, x = features
        levels = []
        for block, skip in zip(self.blocks, reversed(skips), strict=False):
            x = block(x, skip)
            levels.append(x)
        return levels


class Fusion(nn.Module):
    """Weighted mean of the decoder levels, resized and projected to the size and width of the last one.

    The weights are learned through a softmax, or given and normalised.
    """

    def __init__(self, widths, given):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(width, widths[-1], 1) for width in widths)
        self.logits = nn.Parameter(torch.tensor(given or [1.0] * len(widths)).log(), requires_grad=not given)

    def forward(self, levels):
        size = levels[-1].shape[-2:]
        parts = zip(self.logits.softmax(0), self.project, levels, strict=True)
        return sum(w * F.interpolate(project(x), size, mode="bilinear") for w, project, x in parts)


class CropHead(nn.Module):
    """The baseline's head: (B, C, 72, 72) -> (B, n_out, 70, 70)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, 3, padding=1)

    def forward(self, x):
        return self.conv(x)[..., 1:-1, 1:-1]


class PerfectSegmentationHead(nn.Module):
    """Features of any size, resized and refined: (B, C, H, W) -> (B, n_out, 70, 70)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.refine = nn.Conv2d(n_in, n_in, 3, padding=1)
        self.conv = nn.Conv2d(n_in, n_out, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, (MAP_SIZE, MAP_SIZE), mode="bilinear")
        return self.conv(F.gelu(self.refine(x)))


HEADS = {"crop": CropHead, "perfect": PerfectSegmentationHead}
