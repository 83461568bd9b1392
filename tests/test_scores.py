"""report/scores.py."""

import math

import pytest
import torch

from report.scores import Score, score_table


def test_score_is_the_mean_over_samples_whatever_the_batches():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, 1, 70, 70, generator=rng) * 3000 + 1500 for _ in range(2))
    family = torch.tensor([0, 0, 9, 9, 9, -1, 0])
    whole, parts = Score(), Score()
    whole.add(a, b, family)
    for i in range(7):
        parts.add(a[i : i + 1], b[i : i + 1], family[i : i + 1])
    error = (a.double() - b.double()).abs().mean((1, 2, 3))
    result = whole.result()
    assert result["all"] == (pytest.approx(error.mean().item()), 7)
    assert result["Style_B"] == (pytest.approx(error[2:5].mean().item()), 3) and result["unknown"][1] == 1
    assert {k: v[0] for k, v in result.items()} == pytest.approx({k: v[0] for k, v in parts.result().items()})
    assert "Style_B" in score_table(result) and score_table(result, result).endswith("1.000")
    assert math.isnan(Score().result()["all"][0])
