"""`bench.py ablation`: budgets, resuming, its scores, tables and figure."""

import itertools
import json
import math
import types

import pytest
import torch
from conftest import SMALL, write_pair

import bench
from benchmarks import ablation
from cfg import Config
from openfwi.files import find_pairs
from report.scores import ssim

NARROW = " ".join(word.removeprefix("--") for word in SMALL) + " batch_size=2"


def maps(n=2, size=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 1500 + 3000 * torch.rand(n, 1, size, size, generator=generator)


# ---------------------------------------------------------------- SSIM


def ssim_by_definition(a, b):
    """Cell by cell, from window-weighted moments of one map (Z, X) and another, zeros beyond the edges."""
    weights = {(z, x): math.exp(-(z * z + x * x) / 4.5) for z in range(-5, 6) for x in range(-5, 6)}
    total = sum(weights.values())
    a, b = ((v.double() - 1500) / 3000 for v in (a, b))
    values = []
    for z, x in itertools.product(*map(range, a.shape)):
        pairs = []
        for (dz, dx), w in weights.items():
            inside = 0 <= z + dz < a.shape[0] and 0 <= x + dx < a.shape[1]
            pairs.append((w / total, *((m[z + dz, x + dx].item() if inside else 0.0) for m in (a, b))))
        mean_a, mean_b = sum(w * p for w, p, _ in pairs), sum(w * q for w, _, q in pairs)
        var_a = sum(w * (p - mean_a) ** 2 for w, p, _ in pairs)
        var_b = sum(w * (q - mean_b) ** 2 for w, _, q in pairs)
        cov = sum(w * (p - mean_a) * (q - mean_b) for w, p, q in pairs)
        alike = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
        values.append(alike / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return sum(values) / len(values)


def test_ssim_is_its_definition():
    a, b = maps(3, 13), maps(3, 13, seed=1)
    a[2], b[2] = 2100.0, 3900.0
    expected = [ssim_by_definition(p[0], q[0]) for p, q in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_ssim_is_1_of_equal_maps_less_of_others_and_symmetric():
    a, b = maps(), maps(seed=1)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    assert ssim(a, a + 1).max() < 1 - 1e-8 and ssim(a, b).max() < 0.2
    assert torch.allclose(ssim(a, b), ssim(b, a), atol=1e-12)
    assert torch.allclose(ssim(a, b), ssim(a.mT, b.mT), atol=1e-12)


def test_ssim_of_constant_maps_compares_their_means():
    """Deep inside a large map both variances vanish: (2ab + c1) / (a² + b² + c1)."""
    side = 300
    a, b = torch.full((1, 1, side, side), 2100.0), torch.full((1, 1, side, side), 3900.0)
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=4 * 5 / side)


# ---------------------------------------------------------------- the budget


@pytest.fixture
def clock(monkeypatch):
    """A process time of a second a call."""
    seconds = itertools.count()
    monkeypatch.setattr(ablation.time, "process_time", lambda: float(next(seconds)))


def test_the_rate_warms_up_and_falls_over_the_budget_and_measuring_costs_nothing(clock):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    trainer = types.SimpleNamespace(cfg=Config(lr=1.0, min_lr=0.0), optimizer=optimizer, step=0)
    measured = iter(range(10))
    budget = ablation.Budget(trainer, 40.0, lambda: (ablation.time.process_time(), next(measured))[1])
    rates = [optimizer.param_groups[0]["lr"]]
    while not budget.agree():
        rates.append(optimizer.param_groups[0]["lr"])
    rates.append(optimizer.param_groups[0]["lr"])
    assert budget.curve == [(10.0, 0), (20.0, 1), (40.0, 2)] and budget.spent_s == 40
    assert rates[:3] == pytest.approx([0, 0.5, 1])
    assert rates[2:] == pytest.approx([(1 + math.cos(math.pi * k / 38)) / 2 for k in range(39)])


def test_test_maps_are_evenly_spaced_in_each_family(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=6)
    write_pair(tmp_path, "CurveFault_B", n=2)
    items = [(pair, i) for pair in find_pairs([tmp_path]) for i in range(pair.n)]
    chosen = [(pair.family, i) for pair, i in ablation.spread(items, 3)]
    assert sorted(chosen) == [("CurveFault_B", 0), ("CurveFault_B", 1)] + [
        ("FlatVel_A", i) for i in (1, 3, 5)
    ]


def test_evaluation_is_the_mean_absolute_error_and_ssim_of_each_map(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=3)
    items = [(pair, i) for pair in find_pairs([tmp_path]) for i in range(pair.n)]
    network = torch.nn.Module()
    network.forward = lambda seis: torch.full((len(seis), 1, 70, 70), 2500.0)
    errors, similarities, _ = ablation.evaluate(network, items, "small_72x72")
    vel = torch.stack([torch.from_numpy(ablation.read_sample(*item)[1]) for item in items])
    assert torch.allclose(errors, (vel - 2500).abs().mean((1, 2, 3)))
    assert torch.equal(similarities, ssim(torch.full_like(vel, 2500), vel))


# ---------------------------------------------------------------- the program


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Tiny training and test sets, and two narrow networks to compare."""
    for root, seed in (("train", 0), ("test", 1)):
        write_pair(tmp_path / root, "FlatVel_A", n=4, seed=seed)
    variants = {"one": NARROW, "bounded": f"{NARROW} bounded=true"}
    monkeypatch.setattr(ablation, "GROUPS", {"main": variants, "options": variants})
    common = [f"--results={tmp_path}/results.jsonl", "--budget=6", f"--figure={tmp_path}/figure.png"]
    return tmp_path, [f"--train={tmp_path}/train", f"--test={tmp_path}/test", *common]


def read(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_runs_are_kept_resumed_tabled_and_drawn(folders, clock, monkeypatch, capsys):
    folder, args = folders
    bench.main(["ablation", *args, "--seeds=0,1"])
    records = read(folder)
    assert [(r["seed"], r["variant"]) for r in records] == list(itertools.product((0, 1), ("one", "bounded")))
    for r in records:
        assert r["spent_s"] == 6 and r["samples"] == 12 and len(r["curve"]) == 3 and r["curve"][-1][0] == 6
        assert r["mae"] == pytest.approx(r["family_mae"]["FlatVel_A"]) and -1 < r["ssim"] < 1
    assert len({r["mae"] for r in records}) == 4
    out = capsys.readouterr().out
    assert "| bounded | " in out and "| one | " in out and "mean map" in out
    assert (folder / "figure.png").stat().st_size > 5000

    # a run that is missing is run again, to the same numbers, and no other
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:-1]))
    bench.main(["ablation", *args, "--seeds=0,1"])
    again = read(folder)
    assert again[:-1] == records[:-1]
    assert [again[-1][key] for key in ("seed", "variant", "mae")] == [1, "bounded", records[-1]["mae"]]

    monkeypatch.setattr(ablation, "run_variant", None)  # nothing is left to run
    bench.main(["ablation", *args, "--seeds=0,1"])
    bench.main(["ablation", *args[2:]])  # reports alone
    assert read(folder) == again
    with pytest.raises(ValueError, match="one ran with other options there; give another --results"):
        bench.main(["ablation", *args, "--seeds=0", "--budget=5"])


def test_options_of_the_groups_are_the_configurations_and_build(monkeypatch):
    for group in ablation.GROUPS.values():
        for options in group.values():
            ablation.check_model(ablation.configuration(options, 3))
    cfg = ablation.configuration(ablation.GROUPS["options"]["smoothness=0.05 smoothness_edge=100"], 3)
    assert (cfg.seed, cfg.arch, cfg.smoothness, cfg.smoothness_edge) == (3, "seisnext", 0.05, 100.0)


def test_half_a_command_and_nothing_to_report_are_refused(tmp_path, refuses):
    refuses(bench.main, "ablation", f"--train={tmp_path}", words=["--train and --test go together"])
    refuses(bench.main, "ablation", f"--results={tmp_path}/none", words=["no results yet"])
    refuses(bench.main, "ablation", "--group=other", words=["expected one of main, options"])
