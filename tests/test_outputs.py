"""No output lies on an input, by whatever name, nor on another output."""

import dataclasses
import os
import shutil
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
from conftest import kaggle_folder, words_for, write_pair

import infer as infer_module
import synth
import train
from bench import BENCHMARKS
from infer import main
from inference.outputs import check_outputs, folders_held, output_folders
from inference.submission import submission_rows, write_submission
from options.command_line import parse_options
from options.outputs import BEGINS, check_replaces
from report.figures import new_figure, save_figure
from system.files import sole_use, write_json
from training.publish import PublishOptions, publish


@pytest.fixture
def place(tmp_path, checkpoint, monkeypatch):
    """The working folder, with gathers, their maps, a checkpoint, its options, and links to them."""
    kaggle_folder(tmp_path / "test", 2)
    _, vel = write_pair(tmp_path / "pairs", "FlatVel_A", n=2)
    for i in range(2):
        (tmp_path / "maps").mkdir(exist_ok=True)
        np.save(tmp_path / "maps" / f"{i:010x}.npy", np.load(vel)[i])
    shutil.copy(checkpoint, tmp_path / "best.pt")
    (tmp_path / "best.json").write_text("{}")
    shutil.copy(checkpoint, tmp_path / "misfit.png")
    (tmp_path / "fit.json").write_text("{}")
    (tmp_path / "link").symlink_to("test")
    (tmp_path / "link.csv").symlink_to("test/0000000001.npy")
    os.link(tmp_path / "best.pt", tmp_path / "hard.csv")
    (tmp_path / "old.csv.work").mkdir()
    shutil.copy(tmp_path / "test" / "0000000000.npy", tmp_path / "old.csv.work" / "x.npy")
    shutil.copy(checkpoint, tmp_path / "last.pt")
    (tmp_path / "others" / "t.trace.jsonl").mkdir(parents=True)
    shutil.copy(tmp_path / "test" / "0000000001.npy", tmp_path / "others")
    for name in ("CurveVel_B.png", "s.misfit.csv"):
        shutil.copy(checkpoint, tmp_path / "others" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words, message",
    [
        (["--save_maps=test"], "--save_maps=test: lies in"),
        (["--save_maps=link"], "--save_maps=link: lies in"),
        (["--save_maps=test/../test/new"], "which is read: its files would be taken for inputs"),
        (["--pseudo=maps/new", "--truth=maps"], "--pseudo=maps/new: lies in"),
        (["--input=test/0000000000.npy", "--save_maps=test"], "--save_maps: test/0000000000.npy is an input"),
        (["--out=test/0000000000.npy"], "--out: test/0000000000.npy is an input and would be overwritten"),
        (["--out=link.csv"], "--out: link.csv is an input"),
        (["--out=hard.csv"], "--out: hard.csv is an input"),
        (["--out=best.pt"], "--out: best.pt is an input"),
        (["--out=best.json"], "--out: best.json is an input"),
        (["--out=maps/0000000001.npy", "--truth=maps"], "--out: maps/0000000001.npy is an input"),
        (["--fit=best.pt", "--truth=maps"], "--fit: best.pt is an input"),
        (["--out=fit.json", "--use=fit.json"], "--out: fit.json is an input"),
        (["--ckpt=misfit.png", "--figures=."], "--figures: misfit.png is an input"),
        (["--fit=./s.csv", "--truth=maps"], "--fit and --out both write s.csv"),
        (["--input=old.csv.work", "--out=old.csv"], "old.csv.work: inputs are in"),
        (["--out=last.pt"], "last.pt: is there already and no submission; give another path"),
        (["--out=pairs/FlatVel_A/data/data1.npy"], "data1.npy: is there already and no submission"),
        (["--fit=last.pt", "--truth=maps"], "last.pt: is there already and no file of --fit"),
        (["--fit=fit.json", "--truth=maps"], "fit.json: is there already and no file of --fit"),
        (["--save_maps=others"], "0000000001.npy: is there already and no velocity map"),
        (["--figures=others"], "CurveVel_B.png: is there already and no picture"),
        (["--out=others/s.csv"], "s.misfit.csv: is there already and no table of misfits"),
        (["--out=others/t.csv"], "t.trace.jsonl: is no file; give another path for the file of traces"),
    ],
)
def test_outputs_on_inputs_are_refused_before_any_work(place, refuses, words, message):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    words = words_for("best.pt", "--input=test", "--out=s.csv", *words)
    refuses(main, *words, words=[message])
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_outputs_next_to_inputs_are_allowed(place):
    for words in (
        ["--out=test/s.csv"],
        ["--figures=test"],
        ["--save_maps=out"],
        ["--out=test/x.csv", "--misfit"],
    ):
        cfg = infer_module.parse(words_for("best.pt", "--input=test", *words))
        check_outputs(cfg, infer_module.find_gathers("test"), None)


def test_folders_that_nothing_is_written_to_may_be_read_only(place, monkeypatch):
    asked = []
    monkeypatch.setattr(infer_module, "check_writable", asked.append)
    monkeypatch.setattr(infer_module, "Run", None)  # the options are checked before
    with pytest.raises(TypeError):
        main(words_for("best.pt", "--input=test", "--out=out/s.csv", "--figures=figures"))
    assert [str(folder) for folder in asked] == ["out", "figures"]
    assert output_folders(infer_module.parse([])) == [
        place.relative_to(place)
    ]  # that of submission.csv: here


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1500.0, 9999.999])
def test_what_is_no_velocity_is_never_written(value):
    vel = np.full((70, 70), 2000.0, np.float32)
    vel[3, 4] = value  # an even column, which the CSV leaves out
    with pytest.raises(ValueError, match="00ab: its map holds .*, expected velocities in m/s"):
        submission_rows("00ab", vel)


# ---------------------------------------------------------------- of the other programs

PROGRAMS = {"synth": synth.SynthOptions, "publish": PublishOptions}
PROGRAMS |= {f"bench {name}": options for name, (options, _) in BENCHMARKS.items() if options}
WRITES = [
    (program, field.name)
    for program, options in PROGRAMS.items()
    for field in dataclasses.fields(options)
    if field.metadata["writes"]
]


def test_every_option_that_names_a_file_to_write_says_what_it_writes():
    assert {("synth", "figure"), ("publish", "out"), ("bench wave", "json"), ("bench data", "json")} < set(
        WRITES
    )
    for program, options in PROGRAMS.items():
        for field in dataclasses.fields(options):
            if field.name in ("figure", "json", "results") and "folder" not in field.metadata["meaning"]:
                assert (program, field.name) in WRITES


@pytest.mark.parametrize("program, name", WRITES)
def test_no_option_overwrites_a_checkpoint_or_data(place, program, name):
    before = {path: path.read_bytes() for path in (place / "last.pt", place / "test" / "0000000000.npy")}
    for path, content in before.items():
        with pytest.raises(ValueError, match=f"{path.name}: is there already and no ") as error:
            parse_options([f"--{name}={path}"], PROGRAMS[program], "")
        assert "\n" not in str(error.value) and path.read_bytes() == content


def test_what_a_program_wrote_itself_it_may_replace(tmp_path):
    vel, path = np.full((70, 70), 2000.0, np.float32), tmp_path / "x"
    writers = {
        "submission": lambda: write_submission(path, ["a"], vel[None]),
        "velocity map": lambda: np.save(path.open("wb"), vel),
        "file of weights": lambda: safetensors.numpy.save_file({"w": vel}, path),
        "card of weights": lambda: write_json(path, {"sha256": "…"}),
        "JSON": lambda: write_json(path, {"rows": []}),
        "file of --fit": lambda: path.write_text('{"ensemble_weights": [1.0]}'),
        "file of traces": lambda: path.write_text('{"oid": "a", "seconds": 1}'),
        "table of misfits": lambda: path.write_text("oid,misfit"),
        "picture": lambda: save_figure(new_figure((1, 1)), path),
    }
    pytest.importorskip("matplotlib")
    assert writers.keys() == BEGINS.keys()
    for kind, write in writers.items():
        path.unlink(missing_ok=True)
        for _ in range(2):
            check_replaces(path, kind)
            write()
        path.write_bytes(b"")
        check_replaces(path, kind)


def test_a_figure_is_no_way_to_overwrite_a_checkpoint(place):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="last.pt: is there already and no picture"):
        save_figure(new_figure((1, 1)), "last.pt")


def test_publishing_overwrites_neither_the_checkpoint_nor_others_json(place):
    safetensors.numpy.save_file({"w": np.ones(3)}, "w.safetensors")
    for words, message in (
        (["--ckpt=w.safetensors", "--out=./w.safetensors"], "w.safetensors: is the checkpoint itself"),
        (["--ckpt=best.pt", "--out=fit.safetensors"], "fit.json: is there already and no card of weights"),
    ):
        with pytest.raises(ValueError, match=message):
            publish(parse_options(words, PublishOptions, ""))


@pytest.mark.parametrize("out", ["pairs", "pairs/new", "pairs/FlatVel_A", "linked"])
def test_variations_are_not_written_among_their_maps(place, refuses, out):
    (place / "linked").symlink_to("pairs")
    words = ["--vary=pairs", "--n_per_family=1", "--families=FlatVel_A"]
    refuses(synth.main, *words, f"--out={out}", words=[f"--out={out}: lies in pairs, which is read"])
    assert not (place / "pairs" / "synth.json").exists()


@pytest.mark.parametrize("words", [["--run_root=pairs"], ["--online_cache=pairs/cache"], ["--val_root=runs"]])
def test_pairs_simulated_while_training_are_not_kept_among_samples(place, refuses, words):
    (place / "runs").mkdir()
    words = ["--data_root=pairs", "--online=0.5", "--batch_size=1", "--arch=seisnext", *words]
    refuses(
        train.main, *words, words=["--online_cache=", "which is read: its files would be taken for inputs"]
    )


@pytest.mark.parametrize("option", ["save_maps", "figures"])
def test_two_commands_do_not_write_into_one_folder_at_a_time(place, option, monkeypatch):
    monkeypatch.setattr("inference.outputs.sole_use", partial(sole_use, patience_s=0.1))
    cfg = infer_module.parse([f"--{option}=shared", "--save_maps=shared"])
    with folders_held(cfg), pytest.raises(ValueError, match=f"shared: in use by process {os.getpid()}"):
        with folders_held(infer_module.parse([f"--{option}=./shared"])):
            pass
    assert list((place / "shared").iterdir()) == []
