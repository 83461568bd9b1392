"""Input modes: the part of a full gather (5, 1000, 70) that a network gets."""

import torch.nn.functional as F

from openfwi.npy import GATHER_SHAPE


def preprocess(seis, mode):
    """Bring full gathers (B, 5, 1000, 70) float32 into an input mode: (B, *MODE_SHAPES[mode]).

    Gathers of a packed copy have the mode's shape already and are returned as they are. A mirrored gather
    gives the mirrored result. Raises ValueError for an unknown mode.
    """
    check_mode(mode)
    if seis.shape[-2:] == MODE_SHAPES[mode][-2:]:
        return seis
    return CONVERSIONS[mode](seis)


def check_mode(mode):
    """Raise ValueError unless `mode` is an input mode."""
    if mode not in MODE_SHAPES:
        raise ValueError(f"--mode={mode}: expected one of {', '.join(MODE_SHAPES)}")


def early_arrivals(seis):
    """smart_256x72: the first 512 samples, low-passed and halved to 256, with the edge receivers repeated.

    250 samples a second are enough for a signal that ends near 45 Hz.
    """
    n_batch, n_sources, _, n_receivers = seis.shape
    kernel = seis.new_tensor([[[1, 3, 3, 1]]]) / 8
    traces = seis[:, :, :512].movedim(2, 3).reshape(-1, 1, 512)
    traces = F.conv1d(F.pad(traces, (1, 1), mode="replicate"), kernel, stride=2)
    halved = traces.reshape(n_batch, n_sources, n_receivers, 256).movedim(3, 2)
    return F.pad(halved, (1, 1, 0, 0), mode="replicate")


def small_image(seis):
    """small_72x72, as in the public preprocessed set: means over 70 x 70 areas, with edges repeated."""
    return F.pad(F.interpolate(seis, (70, 70), mode="area"), (1, 1, 1, 1), mode="replicate")


MODE_SHAPES = {"full": GATHER_SHAPE, "smart_256x72": (5, 256, 72), "small_72x72": (5, 72, 72)}
CONVERSIONS = {"smart_256x72": early_arrivals, "small_72x72": small_image}
