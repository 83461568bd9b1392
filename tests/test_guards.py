"""What guards a training run: signals, non-finite steps."""

import torch

from training.guards import Stop
from utils import Process


def test_a_signal_that_comes_while_the_ranks_agree_is_kept_for_the_next_step(monkeypatch):
    stop = None

    def reduce(number, op, group):
        stop.catch(15, None)  # as Python runs a handler: on return from the wait for the others

    monkeypatch.setattr("training.guards.dist.new_group", lambda backend: backend)
    monkeypatch.setattr("training.guards.dist.all_reduce", reduce)
    stop = Stop(Process(torch.device("cpu"), world=2))
    try:
        assert [stop.agree(), stop.agree()] == [0, 15]
    finally:
        stop.restore()
