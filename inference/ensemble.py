"""The networks that predict together: loaded from checkpoints of any kind, and their weights."""

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
from utils import AUTOCAST, FAMILIES, pick_precision
from waves.misfit import is_flat

FLAT = FAMILIES.index("FlatVel_B")  # what a gather above flat layers is taken for: B asks less of them than A


class Member:
    """A checkpoint's network; a call takes its own mode's gathers and gives maps (B, 1, 70, 70) m/s.

    The checkpoint brings its network's options; a bare state dict's come from a `.json` of its name beside
    it, or from the command line. Raises ValueError where they do not fit.
    """

    def __init__(self, cfg, path, device):
        self.path, checkpoint = Path(path), load_described(path)
        mine = copy.copy(cfg)
        mine.ckpt = str(path)
        if "," in cfg.ckpt and "cfg" in checkpoint:
            mine.given = frozenset()  # among several, the command line describes those that bring no options
        self.cfg = network_config(mine, checkpoint)
        self.network = build_model(self.cfg).eval().requires_grad_(False)
        load_weights(self.network, averaged_weights(checkpoint), path)
        self.mode, self.device = self.cfg.mode, device
        self.dtype = AUTOCAST.get(pick_precision(cfg.precision, device))
        self.forward = self.network
        if cfg.compile != "off":
            self.forward = torch.compile(self.network, mode=cfg.compile)

    def load(self, device=None):
        """Bring the network to a device, its own by default."""
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
        """Full gathers -> (B,) indices of FAMILIES: by the classifier head, else FLAT or -1 by symmetry."""
        if not self.cfg.classify_family:
            return torch.where(is_flat(seis), FLAT, -1)
        with self._autocast():
            return self.network(preprocess(seis, self.mode), extras=True)[1]["family"].argmax(1)


def checkpoint_paths(words):
    """The paths that --ckpt names, divided by commas."""
    return [Path(word) for word in words.split(",") if word]


class Ensemble:
    """Networks that predict together: each one's views are joined, then the networks' maps by `weights`."""

    def __init__(self, cfg, device, fitted_weights=None):
        paths = checkpoint_paths(cfg.ckpt)
        self.views, self.combine = make_views(cfg.tta), cfg.combine
        self.weights = shares(cfg.ensemble_weights, fitted_weights, len(paths))
        self.members = [Member(cfg, path, device) for path in paths]

    def predict(self, seis):
        """Full gathers (B, 5, 1000, 70) -> (B, 1, 70, 70) m/s."""
        maps = [predict(member, seis, self.views, member.mode, self.combine) for member in self.members]
        return fuse(torch.stack(maps), self.weights, self.combine)

    def join(self, predictions, numbers):
        """The maps of some gathers (B, 1, 70, 70), joined from the results kept of each network."""
        maps = torch.stack([torch.from_numpy(p["vel"][numbers].astype(np.float32)) for p in predictions])
        return fuse(maps, self.weights, self.combine)

    def families(self, predictions, numbers=slice(None)):
        """The families recognised by the first network that tells, a name or None for each gather."""
        found = predictions[0]["family"][numbers]
        for p in predictions[1:]:
            found = np.where(found < 0, p["family"][numbers], found)
        return [FAMILIES[i] if i >= 0 else None for i in found]


def shares(given, fitted, n):
    """The checkpoints' weights, normalised: given, fitted, or equal; ValueError where they are no shares."""
    weights = given or fitted or (1.0,) * n
    if len(weights) != n or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"--ensemble_weights={','.join(map(str, weights))}: expected {n}, one a checkpoint, "
            "none below 0, not all 0"
        )
    return [w / sum(weights) for w in weights]
