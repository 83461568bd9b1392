"""No output lies on an input, by whatever name, nor on another output."""

import os
import shutil

import numpy as np
import pytest
from conftest import kaggle_folder, words_for, write_pair

import infer as infer_module
from infer import main
from inference.outputs import check_outputs, output_folders
from inference.submission import submission_rows


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
        (["--input=old.csv.work", "--out=old.csv"], "old.csv.work: inputs lie in"),
    ],
)
def test_outputs_on_inputs_are_refused_before_any_work(place, refuses, words, message):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    words = words_for("best.pt", "--input=test", "--out=s.csv", *words)
    refuses(main, *words, words=[message])
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_outputs_beside_inputs_are_fine(place):
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
