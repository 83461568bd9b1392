import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, NETWORK, ROOT, SMALL, random_batch, write_pair

import train
from cfg import Config, parse
from networks.checkpoints import load_checkpoint
from system.devices import pick_precision
from train import train_step
from training.trainer import Trainer
from utils import seed_all

MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two families of six random samples: two thirds to train on."""
    root = tmp_path_factory.mktemp("openfwi")
    for family in ("FlatVel_A", "CurveFault_B"):
        write_pair(root, family, n=6)
    return root


def run(files, root, *args):
    train.main([f"--data_root={files}", f"--run_root={root}", *SMALL, *args])
    return sorted(root.glob("*-seisnext"))[-1]


def torchrun(n, *args, program=ROOT / "train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command += [str(program), *SMALL, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run of two epochs of four steps."""
    return run(files, tmp_path_factory.mktemp("runs"), "--epochs=2", "--batch_size=2")


def test_a_run_leaves_its_whole_record(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {"cfg.json", "env.txt", "log.jsonl", "metrics.json", "best.pt", "last.pt"}
    assert not [name for name in names if name.endswith(".part")]
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "lr" in r] == list(range(1, 9))
    assert [r["step"] for r in log if "val_mae" in r] == [4, 8]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["family_mae"]) == {"FlatVel_A", "CurveFault_B"}
    assert metrics["best_mae"] == min(r["val_mae"] for r in log if "val_mae" in r)
    assert "torch: " in (finished / "env.txt").read_text()
    pytest.importorskip("matplotlib")
    assert (finished / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(finished):
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in log if "lr" in r]
    cfg = parse(SMALL)
    assert rates[0] == pytest.approx((cfg.lr + cfg.min_lr) / 2) and rates[1] == pytest.approx(cfg.lr)
    expected = [cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(1, 7)]
    assert rates[2:] == pytest.approx(expected)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(files, finished, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    step = train.train_step

    def stop_at_seven(trainer, batches):
        if trainer.step == 6:
            raise Stopped
        return step(trainer, batches)

    args = ("--epochs=2", "--batch_size=2", "--save_minutes=0")
    monkeypatch.setattr(train, "train_step", stop_at_seven)
    with pytest.raises(Stopped):
        run(files, tmp_path, *args)
    assert (
        load_checkpoint(tmp_path / "001-seisnext" / "last.pt")["progress"]["step"] == 6
    )  # in the middle of epoch 1
    monkeypatch.setattr(train, "train_step", step)
    folder = run(files, tmp_path, *args, "--resume=auto")
    assert folder.name == "001-seisnext"
    whole, resumed = load_checkpoint(finished / "last.pt"), load_checkpoint(folder / "last.pt")
    assert whole["progress"] == resumed["progress"] and whole["progress"]["step"] == 8
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])


def test_two_ranks_validate_to_the_same_mae_as_one(files, finished):
    args = [f"--data_root={files}", f"--ckpt={finished / 'best.pt'}", "--eval_only"]
    args += ["--val_share=0.5", "--batch_size=2"]  # three samples a family: an uneven share for each rank
    tables, maes = [], []
    for n in (1, 2):
        result = torchrun(n, *args)
        assert result.returncode == 0, result.stderr
        tables.append(re.findall(r"^(\w+) +(\d+) +(\d+\.\d+)", result.stdout, re.M))
        maes.append(float(re.search(r"validation MAE (\d+\.\d{6}) m/s", result.stdout)[1]))
    assert abs(maes[0] - maes[1]) < 1e-4
    assert tables[0] == tables[1] and [row[1] for row in tables[0]] == ["3", "3", "6"]


def test_two_ranks_train_like_one_of_twice_the_batch_over_20_steps(files, tmp_path):
    # no batch norm: its statistics are each rank's own
    unet = ("--arch=unet", "--head=crop", "--backbone=convnext_atto", "--pretrained=false")
    args = (f"--data_root={files}", "--epochs=5", "--val_every=5", "--lr=1e-4", *unet)
    apart_program = tmp_path / "apart.py"  # the negative control: gradients are not averaged
    apart_program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import contextlib, train\n"
        "from training import trainer\n"
        "class Alone:\n"
        "    def __new__(cls, network, **options):\n"
        "        network.no_sync = contextlib.nullcontext\n"
        "        return network\n"
        "trainer.DistributedDataParallel = Alone\n"
        "train.main(sys.argv[1:])\n"
    )
    runs = {}
    for name, world, options in (
        ("one", 1, ["--batch_size=2"]),
        ("two", 2, ["--batch_size=1"]),
        ("accumulated", 1, ["--batch_size=1", "--accumulate=2"]),
        ("alone", 2, ["--batch_size=1"]),
    ):
        program = apart_program if name == "alone" else ROOT / "train.py"
        result = torchrun(world, *args, *options, f"--run_root={tmp_path / name}", program=program)
        assert result.returncode == 0, result.stderr
        state = load_checkpoint(tmp_path / name / "001-baseline" / "last.pt")
        assert state["progress"]["step"] == 20
        runs[name] = state["model"]
    cfg = Config(**state["cfg"])
    seed_all(cfg.seed)
    start = Trainer(cfg, CPU, 1).network.state_dict()
    flat = {name: torch.cat([(w[k] - start[k]).flatten() for k in start]) for name, w in runs.items()}
    moved = flat["one"].norm()
    # Adam's first steps turn the sign of tiny gradients into full steps, so a few weights may differ
    assert (flat["two"] - flat["one"]).norm() < 0.05 * moved
    assert (flat["accumulated"] - flat["one"]).norm() < 0.05 * moved
    assert (flat["alone"] - flat["one"]).norm() > 0.2 * moved


def test_every_parameter_moves_and_the_average_follows(finished):
    state = load_checkpoint(finished / "last.pt")
    cfg = Config(**state["cfg"])
    seed_all(cfg.seed)
    start = Trainer(cfg, CPU, 4).network.state_dict()
    # a fresh ConvNeXt's deepest norms get gradients below float32's resolution: its layer scale is 1e-6
    assert all(not torch.equal(start[k], v) for k, v in state["model"].items() if v.ndim > 1)
    assert any(not torch.equal(state["ema"][k], v) for k, v in state["model"].items())
    best = load_checkpoint(finished / "best.pt")
    assert best["val_mae"] == state["progress"]["best_mae"]


def test_decay_is_on_matrices_only():
    groups = Trainer(Config(arch="seisnext", head="perfect", width=16), CPU, 1).optimizer.param_groups
    assert groups[0]["weight_decay"] > 0 and all(p.ndim > 1 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == 0 and all(p.ndim <= 1 for p in groups[1]["params"])


def test_one_switch_chooses_the_precision():
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == "float32"
    assert pick_precision("bfloat16", cpu) == "bfloat16"
    cfg = Config(arch="seisnext", head="perfect", width=16, precision="bfloat16", lr=1e-3)
    trainer = Trainer(cfg, CPU, 2)
    before = [p.clone() for p in trainer.network.parameters()]
    loss, _, _ = train_step(trainer, [random_batch()])
    assert loss.dtype == torch.float32 and trainer.scaler.get_scale() == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))


def test_dry_run_prints_the_configuration_and_writes_nothing(files, tmp_path, capsys):
    train.main(
        [f"--data_root={files}", f"--run_root={tmp_path / 'runs'}", *SMALL, "--batch_size=2", "--dry_run"]
    )
    assert '"batch_size": 2' in (out := capsys.readouterr().out) and "M parameters" in out
    assert not (tmp_path / "runs").exists()


def test_bad_options_are_one_line(files, finished, tmp_path, refuses):
    def refuse(*args, words):
        base = (f"--data_root={files}", "--batch_size=2", "--epochs=2", f"--run_root={tmp_path}", *SMALL)
        refuses(train.main, *base, *args, words=words)

    refuse("--head=crop", "--synth_per_family=1", words=["--head=crop needs 72x72"])
    refuse("--family_weights=Style_B", words=["expected NAME:WEIGHT"])
    refuse("--eval_only", words=["--eval_only needs a checkpoint"])
    refuse(f"--resume={tmp_path}", words=["no last.pt to resume from"])
    refuse(
        f"--resume={finished}", "--lr=5e-4", words=["another configuration (lr: 0.001 in the run, 0.0005 now"]
    )
    refuse(f"--ckpt={finished / 'best.pt'}", "--width=32", words=["leave out --width"])
    refuse(
        f"--run_root={finished / 'best.pt'}",
        words=["best.pt: cannot be written", "give another path"],
    )
    refuse("--device=cuda", words=["0 CUDA devices found"]) if not torch.cuda.is_available() else None
    (tmp_path / "x").mkdir()
    best = load_checkpoint(finished / "best.pt")
    torch.save(best, tmp_path / "x" / "last.pt")
    (tmp_path / "x" / "cfg.json").write_bytes((finished / "cfg.json").read_bytes())
    cfg = json.loads((tmp_path / "x" / "cfg.json").read_text())
    refuse(f"--resume={tmp_path / 'x'}", f"--decoder_channels={','.join(map(str, cfg['decoder_channels']))}",
           words=["holds only weights"])  # fmt: skip


def test_the_figure_shows_one_row_a_family(files):
    loader = [
        (torch.zeros(2, 5, 1000, 70), torch.full((2, 1, 70, 70), 2000.0), torch.tensor([0, 3]), None),
        (torch.zeros(1, 5, 1000, 70), torch.full((1, 1, 70, 70), 2600.0), torch.tensor([3]), None),
    ]
    network = torch.nn.Module()
    network.forward = lambda seis: torch.full((len(seis), 1, 70, 70), 2100.0)
    reference = torch.full((1, 70, 70), 2200.0)
    score, mean_score, rows = train.validate(network, loader, CPU, reference, torch.no_grad)
    assert score == {"FlatVel_A": (100.0, 1), "CurveVel_B": (300.0, 2), "all": (pytest.approx(700 / 3), 3)}
    assert mean_score["all"] == (pytest.approx(800 / 3), 3)
    assert [row[0] for row in rows] == ["FlatVel_A", "CurveVel_B"] and np.all(rows[1][3] == 2100)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=MUON)])
def test_gradients_are_clipped_as_torch_clips_them(optimizer):
    """Under a loss scale too; an epsilon and a clip that make the size of a gradient tell."""

    def trainer(clip_norm):
        torch.manual_seed(0)
        made = Trainer(Config(optimizer=optimizer, warmup_steps=0, clip_norm=clip_norm, **NETWORK), CPU, 4)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        parts = made.optimizer.parts.values() if optimizer == "muon" else [made.optimizer]
        for group in (group for part in parts for group in part.param_groups):
            group["eps"] = 1e-6
        return made

    def weights(made):
        return torch.cat([p.detach().flatten() for p in made.network.parameters()])

    ours, theirs, free = trainer(1e-4), trainer(1e-4), trainer(0.0)
    norm = train_step(ours, [random_batch()])[2].item()
    train_step(free, [random_batch()])
    theirs.losses(theirs.network.train(), *random_batch())[0].mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.network.parameters(), 1e-4).item()
    assert norm == pytest.approx(expected, rel=1e-4)
    theirs.optimizer.step()
    assert (weights(ours) - weights(theirs)).abs().max() < 1e-6 < (weights(ours) - weights(free)).abs().max()


def test_early_stopping_counts_validations_without_a_better_one(train_here, capsys):
    folder = train_here(
        "--patience=1", "--lr=1e-12", "--min_lr=0", "--epochs=9", "--flip_p=0", "--decoder_norm=none"
    )
    assert "stopped early" in capsys.readouterr().out
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] < 9 * 4


def test_smoke_goes_through_everything_in_three_steps(train_here, capsys):
    folder = train_here("--smoke")
    assert "smoke: trained, validated, saved, reloaded and predicted" in capsys.readouterr().out
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] == 3


def test_overfit_trains_and_validates_on_the_same_few(train_here):
    folder = train_here("--overfit=2", "--epochs=30", "--lr=3e-3", "--val_every=30", "--ema_decay=0.5")
    metrics = json.loads((folder / "metrics.json").read_text())
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert metrics["val_mae"] < 0.95 * first["mae"]


def test_deterministic_is_switched_on_while_training(train_here, monkeypatch):
    step, found = train.train_step, []

    def look(trainer, batches):
        found.append(torch.are_deterministic_algorithms_enabled())
        return step(trainer, batches)

    monkeypatch.setattr(train, "train_step", look)
    train_here("--deterministic")
    assert all(found) and len(found) == 8 and not torch.are_deterministic_algorithms_enabled()
