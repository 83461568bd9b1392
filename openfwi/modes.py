"""The three input modes: full (1000 x 70), smart (256 x 72) and small (72 x 72)."""

import torch.nn.functional as F

from openfwi.npy import GATHER_SHAPE


def preprocess(seis, mode):
    """Full gathers (B, 5, 1000, 70) float32 as an input mode's; raises KeyError for modes there are not.

    Those of a packed copy, which have the mode's shape already, stay as they are.

    full: unchanged. smart_256x72: early arrivals, the first 512 samples halved to
    256 by a binomial low-pass (the signal ends near 45 Hz, 250 Hz remain), the
    edge receivers repeated: (B, 5, 256, 72). small_72x72: as the public
    preprocessed set, area-resized to 70x70, edges repeated: (B, 5, 72, 72).
    All commute with `mirror_survey`.
    """
    if seis.shape[-2:] == MODE_SHAPES[mode][-2:]:
        return seis
    return {"smart_256x72": _early, "small_72x72": _small}[mode](seis)


def _early(seis):
    n_batch, n_sources, _, n_receivers = seis.shape
    kernel = seis.new_tensor([[[1, 3, 3, 1]]]) / 8
    traces = seis[:, :, :512].movedim(2, 3).reshape(-1, 1, 512)
    traces = F.conv1d(F.pad(traces, (1, 1), mode="replicate"), kernel, stride=2)
    halved = traces.reshape(n_batch, n_sources, n_receivers, 256).movedim(3, 2)
    return F.pad(halved, (1, 1, 0, 0), mode="replicate")


def _small(seis):
    return F.pad(F.interpolate(seis, (70, 70), mode="area"), (1, 1, 1, 1), mode="replicate")


MODE_SHAPES = {"full": GATHER_SHAPE, "smart_256x72": (5, 256, 72), "small_72x72": (5, 72, 72)}
