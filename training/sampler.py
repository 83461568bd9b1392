"""Which samples each training step uses."""

import numpy as np
from torch.utils.data import Sampler

from data import family_numbers
from utils import FAMILIES

# The competition's test set in per cent; the other families share the rest.
TEST_MIX = {"FlatVel_A": 9.05, "FlatVel_B": 9.05, "Style_A": 8.6, "Style_B": 9.6}


class TrainBatches(Sampler):
    """The batches of this rank in one epoch, `accumulate` for each step, from step `start` on.

    The order depends on seed and epoch only, so that the samples of a step are the same however they are
    divided among ranks and accumulated batches. An incomplete last step is dropped. `families`, the family
    index of each sample, is needed only with `sample_weights`.
    """

    def __init__(self, n, cfg, process, families=None):
        self.n, self.cfg, self.process, self.families = n, cfg, process, families
        self.draws = draws_of(families, cfg.sample_weights) if cfg.sample_weights else {}
        self.n_steps = n // (cfg.batch_size * cfg.accumulate * process.world)
        self.epoch = self.start = 0

    def __len__(self):
        return (self.n_steps - self.start) * self.cfg.accumulate

    def __iter__(self):
        order, size = self.order(), self.cfg.batch_size
        for batch in range(self.start * self.cfg.accumulate, self.n_steps * self.cfg.accumulate):
            first = (batch * self.process.world + self.process.rank) * size
            yield order[first : first + size].tolist()

    def order(self):
        """The n samples of the epoch in order, for all ranks.

        With weights, a family may give only part of its samples, the first of a new shuffle each epoch, or
        more than it has: then all of them, and some once more.
        """
        rng = np.random.default_rng((self.cfg.seed, self.epoch))
        if not self.draws:
            return rng.permutation(self.n)
        drawn = []
        for f, n_drawn in self.draws.items():
            mine = np.flatnonzero(self.families == f)
            rounds = [rng.permutation(mine) for _ in range(-(-n_drawn // len(mine)))]
            drawn += [np.concatenate(rounds)[:n_drawn]] if rounds else []
        return rng.permutation(np.concatenate(drawn))


def draws_of(families, words):
    """How many samples an epoch takes of each family, {family index: count}, len(families) in all.

    words: ("test_mix",) for the competition's mix, or FAMILY:WEIGHT each; families not named have weight 1.
    Raises ValueError for other words, and if all weights are zero.
    """
    present, counts = np.unique(families, return_counts=True)
    if tuple(words) == ("test_mix",):
        rest = (100 - sum(TEST_MIX.values())) / (len(FAMILIES) - len(TEST_MIX))
        shares = np.array([TEST_MIX.get(FAMILIES[f], rest) for f in present])
    else:
        weights = family_numbers("sample_weights", words, 1)
        shares = counts * np.array([weights[FAMILIES[f]] for f in present])
    if not shares.sum():
        raise ValueError(
            f"--sample_weights={','.join(map(str, words))}: all families in the data have weight 0; "
            "give one of them a positive weight"
        )
    exact = shares / shares.sum() * len(families)
    drawn = np.floor(exact).astype(int)
    drawn[np.argsort(drawn - exact, kind="stable")[: len(families) - drawn.sum()]] += 1  # largest remainders
    return dict(zip(present.tolist(), drawn.tolist(), strict=True))
