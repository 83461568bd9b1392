"""Networks: shot gathers in, velocity maps out.

`arch="unet"` is the public "ConvNeXt full-resolution baseline" (Bartley, 2025) and its CAFormer sister, key
for key, so that their checkpoints load; "seisnext" is ours, made for speed; "inversionnet" is the reference
of the OpenFWI paper (Deng et al., 2022, arXiv 2111.02926). `python model.py --arch=NAME` measures one.
"""

import dataclasses
import pickle
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cfg import parse
from networks.encoder import N_SOURCES, SeisEncoder, conv_act, named, timm_encoder
from utils import FAMILIES, V_MAX, V_MIN, mirror_survey, run_program

MAP_SIZE = 70
MODES = {"full": (1000, 70), "smart_256x72": (256, 72), "small_72x72": (72, 72)}  # (T, R) of the input
N_LEVELS = 3  # of the decoder

# ---------------------------------------------------------------------------- decoder


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
        self.cSE = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Sigmoid())
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
    """Weighted mean of the decoder levels, brought to the size and width of the last.

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


# ---------------------------------------------------------------------------- heads and input scaling


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


class SignedLog(nn.Module):
    """Compress amplitudes: echoes of deep layers are a thousand times weaker than the first arrival."""

    FLOOR = 0.01  # amplitude below which the scale is linear

    def forward(self, seis):
        return seis.sign() * torch.log1p(seis.abs() / self.FLOOR) / 4  # of order 1


class TimeGain(nn.Module):
    """Multiply by (1 + 10 t/T)^p, a learned power p per shot, against geometric spreading."""

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
    return V_MIN + (V_MAX - V_MIN) * x.sigmoid() if bounded else 1500 * x + 3000


def check_input(seis, shape):
    """Raise ValueError unless `seis` is (B, *shape)."""
    if seis.ndim != 4 or tuple(seis.shape[1:]) != shape:
        raise ValueError(f"gathers of shape {tuple(seis.shape)}, expected (B, {', '.join(map(str, shape))})")


# ---------------------------------------------------------------------------- networks


class UNet(nn.Module):
    """Encoder, decoder, head: seis (B, 5, T, R) of the mode -> vel (B, 1, 70, 70) m/s, float32."""

    def __init__(self, cfg):
        super().__init__()
        self.shape, self.bounded = (N_SOURCES, *MODES[cfg.mode]), cfg.bounded
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
        """Velocity; with `extras` also a dictionary of what is switched on: "error" (B, 1, 70, 70) m/s,
        "family" (B, 10) logits, "levels" velocity maps of the coarser decoder levels."""
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
    """Our network: the same decoder and heads on `SeisEncoder`, channels last in memory."""

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
    """InversionNet (Wu & Lin, 2019; sizes of OpenFWI, appendix): through one code of 512 numbers."""

    ENCODER = (  # (channels, kernel, stride): time alone until 63 samples remain, then 63x70 -> 8x9 -> 1x1
        *((32, (7, 1), (2, 1)), (64, (3, 1), (2, 1)), (64, (3, 1), 1), (64, (3, 1), (2, 1)), (64, (3, 1), 1)),
        *((128, (3, 1), (2, 1)), (128, (3, 1), 1), (128, (3, 3), 2), (128, (3, 3), 1), (256, (3, 3), 2)),
        *((256, (3, 3), 1), (256, (3, 3), 2), (256, (3, 3), 1), (512, (8, 9), 1)),
    )

    def __init__(self, cfg):
        super().__init__()
        self.shape = (N_SOURCES, *MODES["full"])
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


# ---------------------------------------------------------------------------- entry points

ARCHS = {"unet": UNet, "seisnext": SeisNeXt, "inversionnet": InversionNet}
CHOICES = {
    "arch": ARCHS,
    "mode": MODES,
    "norm": ("instance", "layer"),
    "activation": ("gelu", "original"),
    "upsample": UPSAMPLE,
    "decoder_norm": DECODER_NORMS,
    "head": HEADS,
    "input_scaling": SCALINGS,
}
EXTRAS = ("confidence", "classify_family", "deep_supervision")  # need extra_loss in training


def check_model(cfg):
    """Raise a one-line ValueError where the network's options do not fit each other."""
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
        f"--drop_path={cfg.drop_path}: expected a share below 1": cfg.drop_path >= 1,
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

    (T, R) is `MODES[cfg.mode]`. Raises ValueError for options that do not fit each other.
    """
    check_model(cfg)
    return ARCHS[cfg.arch](cfg)


def predict_tta(network, seis):
    """Mean of the prediction and the mirrored prediction of the mirrored survey: (B, 1, 70, 70) m/s."""
    return (network(seis) + network(mirror_survey(seis)).flip(3)) / 2


def extra_loss(extras, pred, vel, family):
    """What the extra outputs add to the L1 loss, in its units; 0 where none is switched on.

    "error" is fitted as the width of a Laplace distribution, whose best value is the mean absolute error;
    it weighs little, so that it does not disturb the velocity.
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


SIZES = {  # (stem width, blocks in the third stage): size
    "convnext": {
        **{(40, 6): "atto", (48, 6): "femto", (64, 6): "pico", (80, 8): "nano", (96, 9): "tiny"},
        **{(96, 27): "small", (128, 27): "base", (192, 27): "large", (256, 27): "xlarge", (352, 27): "huge"},
    },
    "caformer": {(64, 9): "s18", (64, 18): "s36", (96, 18): "m36", (128, 18): "b36"},
}


def guess_backbone(state):
    """Name of the timm backbone that a state dict's keys and shapes suggest, or None."""
    depth = len({key.split(".")[3] for key in state if key.startswith("backbone.stages_2.blocks.")})
    for family, stem in (
        ("convnext", "backbone.stem_0.1.weight"),
        ("caformer", "backbone.stem.1.conv.weight"),
    ):
        if stem in state and (len(state[stem]), depth) in SIZES[family]:
            version = "v2" if any(".grn." in key for key in state) else ""
            return f"{family}{version}_{SIZES[family][len(state[stem]), depth]}"
    return None


def load_weights(model, source, name="state dict"):
    """Load a state dict, or the path of one, strictly, without the prefixes of torch.compile and DDP.

    Raises ValueError where it does not fit, with the backbone it seems to be of.
    """
    if isinstance(source, str | Path):
        name = source
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{name}: no state dict that torch.load(weights_only=True) reads") from error
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in source.items()}
    mine = model.state_dict()
    faults = {
        "misses": [key for key in mine if key not in state],
        "has unexpected": [key for key in state if key not in mine],
        "has another shape of": [key for key in mine if key in state and mine[key].shape != state[key].shape],
    }
    found = ", ".join(f"{what} {keys[0]}" for what, keys in faults.items() if keys)
    if found:
        guess = guess_backbone(state)
        remedy = (
            f"it seems to be a {guess}: --backbone={guess}" if guess else "give its --arch and --backbone"
        )
        if guess and guess.startswith("caformer"):
            remedy += " --norm=layer --activation=original --upsample=pixelshuffle --scse --skip_convs"
        raise ValueError(f"{name}: does not fit this network ({found}); {remedy}")
    model.load_state_dict(state)


# ---------------------------------------------------------------------------- the table


def measure(cfg, batch):
    """Size and speed of a configuration's network, {what: text}."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_model(cfg).to(device)
    seis = torch.randn(batch, N_SOURCES, *MODES[cfg.mode], device=device)
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(seis).mean().backward()
    activations = sum(saved.values()) - sum(saved.get(p.data_ptr(), 0) for p in network.parameters())
    training_ms = _time_ms(lambda: network(seis).mean().backward(), device)
    network.eval().requires_grad_(False)
    forward_ms = _time_ms(lambda: network(seis), device)
    with FlopCounterMode(display=False) as flops:
        network(seis)
    table = {
        "parameters": f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M",
        "multiply-adds": f"{flops.get_total_flops() / 2e9 / batch:.2f} G a sample",
        "activations": f"{activations / 1e6 / batch:.1f} MB a sample, kept for the gradient",
        "forward": f"{forward_ms / batch:.2f} ms a sample ({device.type}, batch {batch})",
        "forward + backward": f"{training_ms / batch:.2f} ms a sample",
    }
    if isinstance(network, UNet):
        features = network.backbone(network.scaling(seis))
        table["features"] = ", ".join("x".join(map(str, x.shape[1:])) for x in features)
    return table


def _time_ms(step, device, n=3):
    """Least time of n calls, after one to warm up."""
    times = []
    for _ in range(n + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times[1:])


def main(argv):
    cfg = parse(argv)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    table = measure(dataclasses.replace(cfg, pretrained=False), cfg.batch_size)
    print(f"arch {cfg.arch}, mode {cfg.mode}" + (f", backbone {cfg.backbone}" if cfg.arch == "unet" else ""))
    for what, text in table.items():
        print(f"{what:20}{text}")


if __name__ == "__main__":
    run_program(main)
