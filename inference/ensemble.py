"""Networks that predict together: loaded from checkpoints of any origin, and weighted."""

import copy
import math
from pathlib import Path

import numpy as np
import torch

from cfg import network_config
from inference.tta import make_views, predict
from model import build_model
from networks.checkpoints import averaged_weights, load_described
from networks.weights import load_weights
from openfwi.modes import preprocess
from postprocess import fuse
from system.devices import AUTOCAST, pick_precision
from utils import FAMILIES
from waves.misfit import is_flat

# The family assigned to gathers of flat layers. Velocities of B need not increase with depth: it includes A.
FLAT = FAMILIES.index("FlatVel_B")


class Member:
    """The network of a checkpoint: called with gathers in its input mode, it gives maps (B, 1, 70, 70) m/s.

    The checkpoint brings the network's options. Those of a bare state dict come from a `.json` file of the
    same name next to it, or from the command line. Raises ValueError if they do not fit.
    """

    def __init__(self, cfg, path, device):
        self.path, checkpoint = Path(path), load_described(path)
        mine = copy.copy(cfg)
        mine.ckpt = str(path)
        if "," in cfg.ckpt and "cfg" in checkpoint:
            # with several checkpoints, the command line describes those without options of their own
            mine.given = frozenset()
        self.cfg = network_config(mine, checkpoint)
        self.network = build_model(self.cfg).eval().requires_grad_(False)
        load_weights(self.network, averaged_weights(checkpoint), path)
        self.mode, self.device = self.cfg.mode, device
        self.dtype = AUTOCAST.get(pick_precision(cfg.precision, device))
        self.forward = self.network
        if cfg.compile != "off":
            self.forward = torch.compile(self.network, mode=cfg.compile)

    def load(self, device=None):
        """Move the network to a device, by default the one it predicts on."""
        self.network.to(device or self.device)
        return self

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def __call__(self, seis):
        with self._autocast():
            return self.forward(seis)

    @torch.no_grad()
    def families(self, seis):
        """Full gathers (B, 5, 1000, 70) -> indices of FAMILIES (B,), -1 = unknown.

        The network's classifier decides, if it has one; else a gather equal to its mirror image is FLAT.
        """
        if not self.cfg.classify_family:
            return torch.where(is_flat(seis), FLAT, -1)
        with self._autocast():
            return self.network(preprocess(seis, self.mode), extras=True)[1]["family"].argmax(1)


def checkpoint_paths(words):
    """The paths in --ckpt, which are separated by commas."""
    return [Path(word) for word in words.split(",") if word]


class Ensemble:
    """Networks that predict together: the views of each are joined, then the networks' maps by `weights`."""

    def __init__(self, cfg, device, fitted_weights=None):
        paths = checkpoint_paths(cfg.ckpt)
        self.views, self.combine = make_views(cfg.tta), cfg.combine
        self.weights = normalised_weights(cfg.ensemble_weights, fitted_weights, len(paths))
        self.members = [Member(cfg, path, device) for path in paths]

    def predict(self, seis):
        """Full gathers (B, 5, 1000, 70) -> (B, 1, 70, 70) m/s."""
        maps = [predict(member, seis, self.views, member.mode, self.combine) for member in self.members]
        return fuse(torch.stack(maps), self.weights, self.combine)

    def join(self, predictions, numbers):
        """Join the kept results of each network into maps of the gathers `numbers`: (B, 1, 70, 70) m/s."""
        maps = torch.stack([torch.from_numpy(p["vel"][numbers].astype(np.float32)) for p in predictions])
        return fuse(maps, self.weights, self.combine)

    def families(self, predictions, numbers=slice(None)):
        """The family of each gather, a name or None, from the first network that recognises one."""
        found = predictions[0]["family"][numbers]
        for p in predictions[1:]:
            found = np.where(found < 0, p["family"][numbers], found)
        return [FAMILIES[i] if i >= 0 else None for i in found]


def normalised_weights(given, fitted, n):
    """Weights of n checkpoints that sum to 1: those given, else fitted, else equal.

    Raises ValueError for another number of weights, negative ones, or none above 0.
    """
    weights = given or fitted or (1.0,) * n
    if len(weights) != n or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"--ensemble_weights={','.join(map(str, weights))}: expected {n} numbers, one for each "
            "checkpoint, none below 0 and not all 0"
        )
    return [w / sum(weights) for w in weights]
