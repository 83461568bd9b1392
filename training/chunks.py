"""What online simulation simulates: chunks of maps of one family with their exact gathers.

Chunk k holds eight maps, new ones or variations of training maps, and their mirror images; six shots of each
map serve both. Its content depends only on the configuration and k, so that a resumed run continues with the
same samples.
"""

import dataclasses
import hashlib
import json

import numpy as np
import torch

from synthetic.maps import make_maps
from synthetic.vary import FileMaps, vary
from utils import FAMILIES
from waves.equation import simulate

SIX_SOURCES = (0, 17, 34, 35, 52, 69)  # the survey's five, and the centre one's mirror image
N_MAPS = 8  # in a chunk, simulated together; fixed, since float results may depend on it
N_PAIRS = 2 * N_MAPS
CHUNKS_VERSION = 2  # to be raised if chunks change in a way that the first maps drawn do not show
N_DRAWN = 6  # maps of each family whose values identify the code that makes them
OTHER_SEED = 2**31  # added to the run's seed, so that maps differ from data sets made with that seed


def exact_pairs(vel):
    """Simulate maps (B, 1, 70, 70) m/s and their mirrors: seis (2B, 5, 1000, 70), vel (2B, 1, 70, 70)."""
    with torch.no_grad():
        six = simulate(vel, sources=SIX_SOURCES)
    seis = torch.cat([six[:, [0, 1, 2, 4, 5]], six[:, [5, 4, 3, 1, 0]].flip(3)])
    return seis, torch.cat([vel, vel.flip(3)])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the content of chunks."""

    seed: int
    maps: str  # new, varied, both
    families: tuple  # of new maps
    sources: dict  # family -> FileMaps of the training samples

    def family(self, k):
        """The family of chunk k, and whether its maps are variations of training maps."""
        is_varied = self.maps == "varied" or (self.maps == "both" and k % 2 == 1)
        families = tuple(self.sources) if is_varied else self.families
        return families[(k // 2 if self.maps == "both" else k) % len(families)], is_varied

    def velocity(self, k):
        """The maps of chunk k: (8, 1, 70, 70) float32 m/s."""
        family, is_varied = self.family(k)
        if is_varied:
            return vary(self.sources[family], N_MAPS, self.seed, start=k * N_MAPS)
        return make_maps(family, N_MAPS, self.seed, start=k * N_MAPS)

    def key(self):
        """Twelve hexadecimal digits that change whenever chunks would.

        They depend on options, on the samples to be varied, and on some maps as they are drawn. These maps
        stand for the code that makes them, so that an edit that changes no result keeps a cache valid.
        """
        words = [CHUNKS_VERSION, self.seed, self.maps, self.families]
        digest = hashlib.sha256()
        for family, sources in self.sources.items() if self.maps != "new" else ():
            for maps, indices in sources.files:
                words += [family, maps.path.name, maps.n_bytes, indices.tolist()]
                digest.update(maps[0].tobytes())
            self._add_drawn(digest, vary(sources, N_DRAWN, self.seed))
        for family in self.families if self.maps != "varied" else ():
            self._add_drawn(digest, make_maps(family, N_DRAWN, self.seed))
        digest.update(json.dumps(words).encode())
        return digest.hexdigest()[:12]

    def _add_drawn(self, digest, maps):
        digest.update(np.rint(maps).astype(np.int16).tobytes())  # whole m/s: machines differ in the last bits


def make_plan(cfg, items):
    """The plan of a run that trains on these items."""
    sources = {}
    rows = items.rows[np.lexsort(items.rows.T[::-1])]
    for group in np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1):
        pair = items.pairs[group[0, 0]]
        sources.setdefault(pair.family, []).append((pair.maps, group[:, 1]))
    sources = {family: FileMaps(files) for family, files in sorted(sources.items())}
    return Plan(cfg.seed + OTHER_SEED, cfg.online_maps, cfg.families or FAMILIES, sources)
