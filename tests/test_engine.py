"""The options of training: schedule, optimizers, losses, guards, watching, launch."""

import copy
import dataclasses
import json
import math
import os
import sys

import pytest
import torch
from conftest import SMALL, write_pair

import train
from cfg import Config
from training import log as watch
from training.guards import Stop
from training.loss import parse_family_weights, roughness, sample_losses
from training.optim import MuonAdamW, Schedule, build_optimizer
from training.trainer import Trainer
from utils import FAMILIES, Process, load_checkpoint, pick_precision, run_program

CPU = Process(torch.device("cpu"))
NETWORK = {"arch": "seisnext", "head": "perfect", "width": 16, "decoder_channels": (16, 8, 8)}
MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
OPTIONS = [*SMALL, "--batch_size=2", "--epochs=2", "--name=engine"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("openfwi")
    for family in ("FlatVel_A", "Style_B"):
        write_pair(root, family, n=6)
    return root


@pytest.fixture
def run(files, tmp_path):
    """Train in this process; returns the newest run folder."""

    def go(*args):
        train.main([f"--data_root={files}", f"--run_root={tmp_path}", *OPTIONS, *args])
        folders = sorted(tmp_path.glob("*-engine"))
        return folders[-1] if folders else None

    return go


def batch(n=2, family=0):
    generator = torch.Generator().manual_seed(0)
    seis = torch.randn(n, 5, 1000, 70, generator=generator)
    vel = 1500 + 3000 * torch.rand(n, 1, 70, 70, generator=generator)
    return seis, vel, torch.full((n,), family)


# ---------------------------------------------------------------- schedule and optimizers


def test_the_schedule_warms_up_holds_and_falls():
    cfg = Config(lr=1.0, min_lr=0.0, warmup_steps=2, warmup_epochs=0.4, constant_share=0.25, **NETWORK)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    schedule = Schedule(optimizer, cfg, n_steps=20, steps_per_epoch=5)
    rates = []
    for step in range(21):
        schedule.set(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates[4:9] == pytest.approx([1] * 5)  # a quarter of the sixteen steps after warm-up
    assert rates[8:] == pytest.approx([(1 + math.cos(math.pi * k / 12)) / 2 for k in range(13)])


@MUON
def test_muon_takes_each_parameter_once_and_moves_kernels_like_adamw_moves_them():
    trainer = Trainer(Config(optimizer="muon", lr=1e-3, warmup_steps=0, **NETWORK), CPU, 4)
    optimizer = trainer.optimizer
    assert isinstance(optimizer, MuonAdamW)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in trainer.network.parameters())
    hidden = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in hidden]
    for _ in range(2):  # the first finds residual branches that start at zero
        trainer.train_step([batch()])
    rms = [(p.detach() - old).square().mean().sqrt().item() for p, old in zip(hidden, before, strict=True)]
    assert min(rms) > 0 and max(rms) < 2e-3 and 0.1e-3 < sorted(rms)[len(rms) // 2]  # 0.2 of the rate a step


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
    norm = ours.train_step([batch()])[2].item()
    free.train_step([batch()])
    theirs.losses(theirs.network.train(), *batch())[0].mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.network.parameters(), 1e-4).item()
    assert norm == pytest.approx(expected, rel=1e-4)
    theirs.optimizer.grad_scale = torch.tensor(1.0)
    theirs.optimizer.step()
    assert (weights(ours) - weights(theirs)).abs().max() < 1e-6 < (weights(ours) - weights(free)).abs().max()


@MUON
def test_a_run_with_muon_resumes_bit_for_bit(run):
    whole = load_checkpoint(run("--optimizer=muon", "--save_every=1") / "last.pt")
    trainer = Trainer(Config(**whole["cfg"]), CPU, 4)
    trainer.restore(whole)
    again = Trainer(Config(**whole["cfg"]), CPU, 4)
    again.restore(copy.deepcopy(trainer.state()))
    for each in (trainer, again):
        each.train_step([batch()])
    pairs = zip(trainer.network.parameters(), again.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_muon_one_line_says_so(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="has no Muon"):
        build_optimizer(torch.nn.Linear(2, 2), Config(optimizer="muon"))


# ---------------------------------------------------------------- losses


def test_roughness_is_the_total_variation_and_its_edge_aware_form_bounds_each_edge():
    vel = torch.full((1, 1, 70, 70), 2000.0)
    assert roughness(vel).item() == roughness(vel, 50.0).item() == 0
    vel[..., 35:, :] = 4000  # one interface of 2000 m/s
    assert roughness(vel).item() == pytest.approx(2000 / 69)
    assert roughness(vel, 50.0).item() == pytest.approx(50 / 69, rel=1e-3)
    ripple = 2000 + torch.randn(2, 1, 70, 70)
    assert torch.allclose(roughness(ripple, 1000.0), roughness(ripple), rtol=1e-4)


def test_loss_is_the_mean_absolute_error_plus_what_is_asked_for():
    _, vel, family = batch(3)
    prediction = vel + torch.randn_like(vel)
    plain = sample_losses(prediction, vel, family, Config(), torch.ones(10))
    assert torch.allclose(plain, (prediction - vel).abs().mean((1, 2, 3)))
    smooth = sample_losses(prediction, vel, family, Config(smoothness=0.1), torch.ones(10))
    assert torch.allclose(smooth, plain + 0.1 * roughness(prediction))
    weights = parse_family_weights(("FlatVel_A:3", "Style_B:0.5"))
    assert torch.allclose(sample_losses(prediction, vel, family, Config(), weights), 3 * plain)
    assert weights[FAMILIES.index("Style_B")] == 0.5 and weights.sum() == 8 + 3.5
    for word in ("FlatVel_A", "FlatVel_A:x", "FlatVel_A:-1"):
        with pytest.raises(ValueError, match="expected NAME:WEIGHT"):
            parse_family_weights((word,))
    with pytest.raises(ValueError, match="unknown family"):
        parse_family_weights(("Flat:1",))


@pytest.mark.parametrize(
    "extra",
    [{"confidence": True}, {"classify_family": True}, {"deep_supervision": True}, {"smoothness": 0.1}],
)
def test_every_parameter_learns_with_extra_outputs_and_losses(extra):
    trainer = Trainer(Config(lr=1e-2, warmup_steps=0, weight_decay=0.0, **NETWORK, **extra), CPU, 4)
    before = {k: v.clone() for k, v in trainer.network.named_parameters()}
    for _ in range(3):
        losses, mae, norm = trainer.train_step([batch()])
    assert losses.dtype == torch.float32 and mae.isfinite() and norm.isfinite()
    still = [k for k, v in trainer.network.named_parameters() if torch.equal(before[k], v)]
    assert not still


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_gives_a_float32_loss_near_float32s(precision):
    losses = []
    for name in ("float32", precision):
        train.seed_all(0)
        trainer = Trainer(Config(precision=name, **NETWORK), CPU, 4)
        losses.append(trainer.train_step([batch()])[0])
    assert losses[1].dtype == torch.float32
    assert torch.allclose(*losses, rtol=0.02)


# ---------------------------------------------------------------- the run's switches


def test_early_stopping_counts_validations_without_a_better_one(run, capsys):
    folder = run(
        "--patience=1", "--lr=1e-12", "--min_lr=0", "--epochs=9", "--flip_p=0", "--decoder_norm=none"
    )
    assert "stopped early" in capsys.readouterr().out
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] < 9 * 4


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


def test_smoke_goes_through_everything_in_three_steps(run, capsys):
    folder = run("--smoke")
    assert "smoke: trained, validated, saved, reloaded and predicted" in capsys.readouterr().out
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] == 3


def test_overfit_trains_and_validates_on_the_same_few(run):
    folder = run("--overfit=2", "--epochs=30", "--lr=3e-3", "--val_every=30", "--ema_decay=0.5")
    metrics = json.loads((folder / "metrics.json").read_text())
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert metrics["val_mae"] < 0.95 * first["mae"]


def test_profile_writes_a_chrome_trace(run):
    trace = json.loads((run("--profile") / "trace.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])


def test_deterministic_is_switched_on(run):
    try:
        run("--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiled_and_plain_runs_have_the_same_keys(files, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, mode: torch._dynamo.optimize("eager")(module))
    plain, compiled = (Trainer(Config(compile=mode, **NETWORK), CPU, 4) for mode in ("off", "default"))
    compiled.train_step([batch()])
    assert list(plain.state()["model"]) == list(compiled.state()["model"])


def test_weights_and_biases_offline_keeps_its_id_when_resumed(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, values, step: logged.append((self.id, step, set(values)))
    )
    folder = run("--wandb=offline", "--save_every=1")
    name = (folder / "wandb_id.txt").read_text()
    assert list(folder.glob("wandb/offline-run-*"))
    keys = set().union(*(values for _, _, values in logged))
    assert {"mae", "lr", "val_mae", "family_mae/Style_B"} <= keys
    resumed = [f"--resume={folder}", "--wandb=offline", "--save_every=1"]
    (folder / "last.pt").unlink()  # previous.pt is from a step earlier
    run(*resumed)
    assert {id for id, _, _ in logged} == {name}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed"):
        watch.start_wandb(Config(wandb="offline"), folder)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, tmp_path, capsys, refuses, files):
    folder = run("--save_every=1")
    good = load_checkpoint(folder / "last.pt")["model"]
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:500])
    run(f"--resume={folder}", "--save_every=1")
    assert "going on from" in capsys.readouterr().out
    again = load_checkpoint(folder / "last.pt")["model"]
    assert all(torch.equal(good[k], again[k]) for k in good)
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"no checkpoint")
    words = [f"--data_root={files}", f"--run_root={tmp_path}", *OPTIONS]
    refuses(
        train.main, *words, f"--resume={folder}", words=["last.pt: not a readable checkpoint", "previous.pt"]
    )


# ---------------------------------------------------------------- launch


def test_several_cards_start_a_process_each_unless_torchrun_has(monkeypatch):
    commands = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "execv", lambda path, words: commands.append(words))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="data_openfwi: no such folder"):
        train.launch(Config(), [])
    assert not commands
    train.launch(Config(synth_per_family=1), ["--lr=1"])
    assert "--nproc_per_node=3" in commands[0] and commands[0][-1] == "--lr=1"
    for cfg in (Config(gpus="1"), Config(gpus="0"), Config(device="cpu")):
        train.launch(cfg, [])
    monkeypatch.setenv("RANK", "0")
    train.launch(Config(), [])
    assert len(commands) == 1
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="--gpus=4: 3 CUDA devices found"):
        train.launch(Config(gpus="4"), [])
    with pytest.raises(ValueError, match="expected a number or auto"):
        Config(gpus="many")


def test_precisions_a_device_lacks_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--precision=tf32 is CUDA's"):
        pick_precision("tf32", torch.device("cpu"))

    def lacks(*args, **kwargs):
        raise RuntimeError("not implemented for Half")

    monkeypatch.setattr(torch.nn.functional, "conv2d", lacks)
    with pytest.raises(ValueError, match="--precision=float16 does not work on cpu here"):
        pick_precision("float16", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="only emulates it; use float16"):
        pick_precision("bfloat16", torch.device("cuda"))


def test_the_cards_peak_is_known_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert watch.peak_flops(torch.device("cuda"), "float16") == 65e12
    assert watch.peak_flops(torch.device("cuda"), "float32") == 8.1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another Card")
    assert watch.peak_flops(torch.device("cuda"), "float16") is None
    assert watch.peak_flops(torch.device("cpu"), "float32") is None


def test_training_operations_are_three_forwards():
    network = torch.nn.Conv2d(5, 2, 3)
    assert watch.training_flops(network, "small_72x72", "cpu") == 3 * 2 * 70 * 70 * 2 * 5 * 9


def test_errors_are_one_line_and_developers_get_the_traceback(monkeypatch, capsys):
    def fail(argv):
        raise ArithmeticError("a\nb")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run_program(fail)
    assert stop.value.code == 2 and capsys.readouterr().err == "train.py: error: a b\n"
    assert dataclasses.asdict(Config())["dry_run"] is False
