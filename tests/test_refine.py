"""Refining methods: which gathers they take when, within what budget; a new one is one entry."""

import json

import numpy as np
import pytest
import torch
from conftest import maps_of

import infer as infer_module
from inference.refine import REFINE, Method
from inference.results import Results


def test_a_budget_is_spent_where_most_is_gained_and_the_rest_is_kept(run, pairs, tmp_path, monkeypatch):
    order = []

    def invert(seis, vel, families, minutes, n_iterations):
        order.append(minutes)
        return torch.full_like(vel, 1600.0 + len(order)), [{"seconds": 45.0}]

    monkeypatch.setattr("inference.refine.invert", invert)
    _, plain = run(name="plain.csv")
    _, out = run("--refine=inversion", "--refine_budget=1", "--refine_minutes=0.9")
    assert order == [0.9, 0.25]
    oids, maps = maps_of(out)
    before = maps_of(plain)[1]
    for k, family in enumerate(oids):
        inverted = maps[k].min() == maps[k].max()
        assert inverted == ("FlatVel_A" in family)  # seconds each
        assert inverted or (maps[k] == before[k]).all()
    traces = [json.loads(line) for line in (tmp_path / "s.trace.jsonl").read_text().splitlines()]
    assert sum("spent" in trace.get("why", "") for trace in traces) == 2


class Stopped(Exception):
    pass


def stopping(*args):
    raise Stopped


def test_a_greater_budget_goes_on_where_the_smaller_one_was_spent(run, monkeypatch, capsys):
    """Stopped with one minute and started again with a thousand: the rest is inverted, in full time."""
    order = []

    def invert(seis, vel, families, minutes, n_iterations):
        order.append(minutes)
        return torch.full_like(vel, 1600.0), [{"seconds": 45.0}]

    monkeypatch.setattr("inference.refine.invert", invert)
    words = ("--refine=inversion", "--refine_minutes=0.9")
    with monkeypatch.context() as patch:
        patch.setattr(infer_module, "write_outputs", stopping)
        with pytest.raises(Stopped):
            run(*words, "--refine_budget=1")
        assert order == [0.9, 0.25]
        with pytest.raises(Stopped):
            run(*words, "--refine_budget=1")  # spent is spent
        assert order == [0.9, 0.25]
    _, out = run(*words, "--refine_budget=1000")
    assert order[2:] == [0.9] * 3  # the one that was cut short, and the two that were left out
    assert (maps_of(out)[1] == 1600).all()


@pytest.mark.parametrize("words, again", [(["--refine_rounds=2"], 2), (["--combine=median", "--tta"], 4)])
def test_what_other_options_decide_is_done_again_and_nothing_else(run, monkeypatch, words, again):
    """Two batches each: `refine_rounds` decides the final maps alone, `combine` those of the network too."""
    monkeypatch.setitem(
        REFINE, "kept", Method(lambda model, seis, vel, families, cfg: (vel, [{}] * len(vel)))
    )
    with monkeypatch.context() as patch:
        patch.setattr(infer_module, "write_outputs", stopping)
        with pytest.raises(Stopped):
            run("--refine=kept")
    put, calls = Results.put, []
    monkeypatch.setattr(
        Results, "put", lambda self, numbers, **fields: (calls.append(numbers), put(self, numbers, **fields))
    )
    run("--refine=kept", *words)
    assert len(calls) == again


def test_a_new_method_is_one_entry(run, pairs, tmp_path, monkeypatch, capsys):
    """It gets the whole prediction as a function, the gathers, the maps, their families and the options."""

    def halve(model, seis, vel, families, cfg):
        assert torch.allclose(model(seis), vel, atol=0.1) and len(families) == len(vel)
        steps = [("start", vel[0, 0].numpy())]
        return 1500 + (vel - 1500) / 2, [{"rounds": cfg.refine_rounds, "steps": steps}, {"rounds": 1}][
            : len(vel)
        ]

    monkeypatch.setitem(REFINE, "halve", Method(halve))
    _, plain = run("--post=round", name="plain.csv")
    _, out = run("--refine=halve", "--post=round", "--truth", pairs, "--figures", tmp_path / "figures")
    assert np.allclose(maps_of(out)[1], 1500 + (maps_of(plain)[1] - 1500) / 2, atol=0.01)
    assert "\nhalve " in capsys.readouterr().out  # a row of the table of stages
    traces = [json.loads(line) for line in (tmp_path / "s.trace.jsonl").read_text().splitlines()]
    assert [trace["rounds"] for trace in traces] == [3, 1, 3, 1] and set(traces[0]) == {"oid", "rounds"}


def test_a_method_says_how_many_gathers_it_refines_together(run, monkeypatch):
    seen = []

    def look(model, seis, vel, families, cfg):
        seen.append(len(families))
        return vel, [{}] * len(vel)

    for size, expected in ((1, [1, 1, 1, 1]), (3, [3, 1])):
        monkeypatch.setitem(REFINE, "look", Method(look, size))
        seen.clear()
        run("--refine=look", name=f"{size}.csv")
        assert seen == expected


def test_gathers_that_inversion_does_not_explain_are_counted(run, capsys, monkeypatch):
    reports = iter([{"explained": True}, {"explained": False}, {"explained": False}, {"explained": True}])
    monkeypatch.setitem(
        REFINE, "look", Method(lambda model, seis, vel, families, cfg: (vel, [next(reports)]), 1)
    )
    run("--refine=look")
    assert "2 of 4 gathers not explained, the first " in capsys.readouterr().out
