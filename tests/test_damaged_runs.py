"""Damaged run folders: every damage is one line that names the folder, or costs nothing."""

import dataclasses
import math

import pytest
import torch
from conftest import CPU, NETWORK, random_batch

import train
from cfg import Config
from networks.checkpoints import read_checkpoint, save_checkpoint
from system.files import sole_use
from training.log import Log
from training.resume import check_resumed, find_run, resumed_config
from training.trainer import Trainer

SAMPLES = {"training": {"files": 1, "samples": 8, "digest": "0" * 16}}
NAMES = ("model", "ema", "optimizer", "scaler", "progress", "global_batch", "samples", "cfg")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a run after two of its eight steps."""
    torch.manual_seed(0)
    cfg = Config(**NETWORK, batch_size=2, epochs=2, warmup_steps=2, precision="float32")
    cfg = dataclasses.replace(cfg, width=8, decoder_channels=(8, 8, 8))
    trainer = Trainer(cfg, CPU, 4, samples=SAMPLES)
    for _ in range(2):
        train.train_step(trainer, [random_batch()])
    path = tmp_path_factory.mktemp("saved") / "last.pt"
    save_checkpoint(path, trainer.state())
    return path


@pytest.fixture
def go_on(tmp_path, saved):
    """Write a changed checkpoint into a run folder and go on with it; returns the trainer."""
    folder = tmp_path / "001-run"
    folder.mkdir()

    def attempt(change=None, content=None, name="last.pt"):
        state = read_checkpoint(saved)
        if change:
            change(state)
        torch.save(state, folder / "last.pt")
        if content is not None:
            (folder / name).unlink(missing_ok=True)
            (folder / name).mkdir() if content is ... else (folder / name).write_bytes(content)
        found, state = find_run(Config(resume=str(folder)))
        cfg = resumed_config(Config(), found, state)
        trainer = Trainer(cfg, CPU, 4, samples=SAMPLES)
        check_resumed(found, state, trainer)
        trainer.restore(state, found)
        return trainer, folder

    return attempt


def change(name, **values):
    return lambda state: state[name].update(values)


def group(**values):
    return lambda state: state["optimizer"]["param_groups"][0].update(values)


def moments(**values):
    return lambda state: state["optimizer"]["state"][0].update(values)


def whole(**values):
    return lambda state: state.update(values)


def first(name, make):
    """Replace the first tensor of a state dict."""

    def update(state):
        key, value = next(iter(state[name].items()))
        state[name][key] = make(value)

    return update


REFUSED = {
    **{f"no {name}": (lambda state, name=name: state.pop(name), f"{name} is a NoneType, expected")
       for name in NAMES if name not in ("optimizer", "samples")},
    "no optimizer": (lambda state: state.pop("optimizer"), "holds only weights, expected the state of a run"),
    **{f"{name} is None": (whole(**{name: None}), f"{name} is a NoneType, expected") for name in NAMES[:6]},
    "cfg is None": (whole(cfg=None), "cfg is a NoneType, expected dict"),
    "cfg is a list": (whole(cfg=[1]), "cfg is a list, expected dict"),
    "cfg is empty": (whole(cfg={}), "cfg lacks arch"),
    "cfg lacks the rate": (lambda state: state["cfg"].pop("lr"), "cfg lacks lr"),
    "rate a word": (change("cfg", lr="fast"), "configuration is damaged or of another version .lr = 'fast'"),
    "rate NaN": (change("cfg", lr=math.nan), "lr=nan: expected a finite number"),
    "rate infinite": (change("cfg", lr=math.inf), "lr=inf: expected a finite number"),
    "width a word": (change("cfg", width="16"), "width = '16' is a str"),
    "width negative": (change("cfg", width=-1), "width=-1: expected 0 or more"),
    "10^12 epochs": (change("cfg", epochs=10**12), "epochs=1000000000000: expected at most"),
    "families numbers": (change("cfg", families=(1, 2)), "families = .1, 2.: expected words"),
    "width huge": (change("cfg", width=10**30), "expected at most"),
    "another architecture": (change("cfg", arch="resnet"), "--arch=resnet: expected one of unet"),
    "architecture a number": (change("cfg", arch=3), "arch = 3 is a int"),
    "progress empty": (whole(progress={}), "step = None, validated = None"),
    "step 10^9": (change("progress", step=10**9), "of step 1000000000, but the run has only 8 steps; start"),
    "step 10^30": (change("progress", step=10**30), "but the run has only 8"),
    "step negative": (change("progress", step=-1), "step = -1"),
    "step 3.0": (change("progress", step=3.0), "step = 3.0"),
    "step True": (change("progress", step=True), "step = True"),
    "step NaN": (change("progress", step=math.nan), "step = nan"),
    "validated in the future": (change("progress", validated=10**9), "validated = 1000000000"),
    "since the best in the future": (change("progress", since_best=10**30), "since_best = 10000"),
    "best NaN": (change("progress", best_mae=math.nan), "best_mae = nan"),
    "best negative": (change("progress", best_mae=-1.0), "best_mae = -1.0"),
    "best a word": (change("progress", best_mae="x"), "best_mae = 'x'"),
    "saved best a word": (change("progress", best_saved_mae="x"), "best_saved_mae = 'x'"),
    "saved best None": (change("progress", best_saved_mae=None), "best_saved_mae = None"),
    "model empty": (whole(model={}), "model holds no weights"),
    "model a list": (whole(model=[1]), "model is a list, expected dict"),
    "model of words": (first("model", str), "model holds no weights"),
    "model NaN": (first("model", lambda v: v * math.nan), "model: .* holds NaN or infinity"),
    "model of another shape": (first("model", lambda v: v[:1]), "model: does not fit"),
    "ema empty": (whole(ema={}), "ema holds no weights"),
    "ema of another shape": (first("ema", lambda v: v[:1]), "ema: does not fit this network"),
    "ema infinite": (first("ema", lambda v: v * math.inf), "ema: .* holds NaN or infinity"),
    "optimizer empty": (whole(optimizer={}), "optimizer or scaler of another kind, or damaged"),
    "optimizer a list": (whole(optimizer=[]), "optimizer is a list, expected dict"),
    "moment of another shape": (moments(exp_avg=torch.ones(3)), "its exp_avg of a .* tensor does not fit"),
    "moment a word": (moments(exp_avg="x"), "its exp_avg of a .* does not fit"),
    "moment NaN": (moments(exp_avg=torch.tensor(math.nan)), "does not fit or is not finite"),
    "moment lost": (lambda state: state["optimizer"]["state"][0].pop("exp_avg"), "it lacks exp_avg of a"),
    "moments lost": (lambda state: state["optimizer"]["state"].pop(0), "it lacks exp_avg, exp_avg_sq, step"),
    "moments None": (lambda state: state["optimizer"]["state"].update({0: None}), "or damaged"),
    "update counted NaN": (moments(step=torch.tensor(math.nan)), "its step of a"),
    "update counted in words": (moments(step="x"), "optimizer or scaler of another kind, or damaged"),
    "parameters a word": (group(params="x"), "optimizer or scaler of another kind, or damaged"),
    "scaler empty": (whole(scaler={}), "optimizer or scaler of another kind, or damaged"),
    "scale NaN": (change("scaler", scale=math.nan), "scale nan"),
    "scale 0": (change("scaler", scale=0.0), "scale 0.0"),
    "scale a word": (change("scaler", scale="x"), "or damaged"),
    "growth a word": (change("scaler", _growth_tracker="x"), "growth x"),
    "another batch": (whole(global_batch=3), "samples a step: 3 in the run, 2 now"),
    "batch a word": (whole(global_batch="2"), "global_batch is a str, expected int"),
    "samples a word": (whole(samples={"training": "x"}), "other training samples than before"),
    "samples None": (whole(samples={"training": None}), "other training samples than before"),
    "samples empty": (whole(samples={}), "other training samples than before"),
}  # fmt: skip


@pytest.mark.parametrize("damage", REFUSED)
def test_a_damaged_checkpoint_is_one_line(go_on, damage):
    damaged, words = REFUSED[damage]
    with pytest.raises(ValueError, match=words) as error:
        go_on(damaged)
    said = str(error.value)
    assert "\n" not in said and ("001-run" in said or damage == "another architecture")


FILES = {
    "empty": (b"", "an empty file"),
    "a web page": (b"<html>", "a web page"),
    "a folder": (..., "is a folder"),
    "noise": (b"\x80\x02\x8a" * 99, "not a readable checkpoint"),
    "zeros": (bytes(4096), "not a readable checkpoint"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_last_checkpoint_that_is_none_is_one_line(go_on, kind):
    content, words = FILES[kind]
    with pytest.raises(ValueError, match=f"001-run/last.pt: .*{words}"):
        go_on(content=content)


def test_a_checkpoint_cut_anywhere_is_one_line(go_on, saved):
    content = saved.read_bytes()
    for n in (1, 9, 63, 1000, len(content) // 2, len(content) - 1):
        with pytest.raises(ValueError, match="001-run/last.pt: not a readable checkpoint"):
            go_on(content=content[:n])


@pytest.mark.parametrize(
    "harmless",
    [
        change("cfg", hello=1),
        lambda state: state["cfg"].update({3: 4}),
        *(group(lr="x"), group(weight_decay=math.nan), group(fused="x"), group(betas=None)),
        change("scaler", growth_interval="x"),
        whole(another={"word": 1}),
    ],
)
def test_what_decides_nothing_may_be_damaged(go_on, harmless):
    """Rates and the like are the options' of the run, not the optimizer's that was saved."""
    trainer, _ = go_on(harmless)
    losses, _, norm = train.train_step(trainer, [random_batch()])
    assert trainer.step == 3 and losses.isfinite().all() and norm.isfinite()
    assert trainer.optimizer.param_groups[0]["weight_decay"] == trainer.cfg.weight_decay


@pytest.mark.parametrize(
    "lines",
    [
        b'\xff\xfe{"step": 1}\n{"step": 2}\n',
        b'[]\nnull\n3\n{"step": "x"}\n{"step": null}\n{"step": 1e999}\n{}\n\n\x00\n{"step": 2}\n',
        b"[" * 100_000 + b'\n{"step": 2}\n{"step": 7}\n',
        b'{"step": 2}\n{"step": 1' + b"0" * 6000 + b'}\n{"step": 2, "mae"',
    ],
    ids=["not UTF-8", "other JSON", "nested deeply", "a huge number and a cut line"],
)
def test_odd_lines_of_a_log_are_dropped(go_on, lines):
    trainer, folder = go_on(content=lines, name="log.jsonl")
    with Log(folder, trainer):
        pass
    assert (folder / "log.jsonl").read_text() == '{"step": 2}\n'


@pytest.mark.parametrize("name", ["log.jsonl", "metrics.json"])
def test_a_folder_in_the_place_of_a_file_is_said_once(go_on, name, capsys):
    trainer, folder = go_on(content=..., name=name)
    score = {"all": (1.0, 1)}
    with Log(folder, trainer) as log:
        log.write_validation(score, score, [])
        log.record({"step": 3})
    said = [line for line in capsys.readouterr().out.splitlines() if f"{name}: not written" in line]
    assert len(said) == 1


@pytest.mark.parametrize("name", ["env.txt", "cfg.json", "best.pt"])
def test_files_that_going_on_does_not_need_may_be_damaged(go_on, name):
    assert go_on(content=b"\xff\xfe\x00", name=name)[0].step == 2


def test_a_lock_that_is_a_folder_is_one_line(go_on, refuses):
    _, folder = go_on(content=..., name=".lock")

    def main(argv):
        with sole_use(folder):
            pass

    refuses(main, words=[".lock: cannot be read or written"])
