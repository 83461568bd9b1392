import csv

import numpy as np
import pytest
import torch
from conftest import run_cli, write_pair

import data
from cfg import Config, parse
from infer import HEADER, find_gathers, find_truths, infer, main, predict, submission_rows
from model import build_model
from utils import Process, mirror_survey, save_checkpoint

SMALL = {"arch": "seisnext", "head": "perfect", "width": 16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A bare state dict of an untrained network, as the public ones are."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "small.pt"
    save_checkpoint(path, {f"module.{k}": v for k, v in build_model(Config(**SMALL)).state_dict().items()})
    return path


def words_for(checkpoint, *args):
    return [
        "--ckpt",
        str(checkpoint),
        "--workers=0",
        "--arch=seisnext",
        "--head=perfect",
        "--width=16",
        *map(str, args),
    ]


def kaggle_folder(folder, n, dtype=np.float32):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        np.save(folder / f"{i:010x}.npy", rng.normal(size=(5, 1000, 70)).astype(dtype))
    return folder


def simple_rows(oid, vel):
    """The obvious writer that the fast one must equal."""
    lines = [
        f"{oid}_y_{y}," + ",".join(f"{v:.2f}" for v in row[1::2]) for y, row in enumerate(vel.astype(float))
    ]
    return "".join(line + "\n" for line in lines).encode()


def test_fast_rows_equal_the_simple_writers():
    rng = np.random.default_rng(0)
    vel = rng.uniform(1500, 4500, (70, 70)).astype(np.float32)
    vel[0], vel[1], vel[2] = 1500, 4500, np.nextafter(np.float32(2000), 0)
    assert submission_rows("000039dca2", vel) == simple_rows("000039dca2", vel)


def test_kaggle_folder_gives_the_competitions_csv_and_maps(tmp_path, checkpoint):
    folder = kaggle_folder(tmp_path / "test", 3)
    out, maps = tmp_path / "deep" / "submission.csv", tmp_path / "maps"
    args = words_for(checkpoint, "--input", folder, "--out", out, "--save_maps", maps, "--batch_size=2")
    result = run_cli("infer.py", *args)
    assert result.returncode == 0, result.stderr
    text = out.read_text()
    assert (
        text.startswith("oid_ypos,x_1,x_3,x_5,")
        and text.startswith(HEADER)
        and text.count("\n") == 1 + 3 * 70
    )
    rows = list(csv.reader(text.splitlines()))
    assert [row[0] for row in rows[1:]] == [f"{i:010x}_y_{y}" for i in range(3) for y in range(70)]
    values = np.array([row[1:] for row in rows[1:]], float).reshape(3, 70, 35)
    assert values.min() >= 1500 and values.max() <= 4500
    for i in range(3):
        saved = np.load(maps / f"{i:010x}.npy")
        assert saved.shape == (70, 70) and saved.dtype == np.float32
        np.testing.assert_allclose(saved[:, 1::2], values[i], atol=0.00501)
    assert sorted(p.name for p in tmp_path.rglob("*.part")) == []


def test_openfwi_files_are_scored_per_family(tmp_path, checkpoint):
    for family in ("FlatVel_A", "FlatFault_B"):
        write_pair(tmp_path, family, n=2)
    out = tmp_path / "s.csv"
    args = words_for(checkpoint, "--input", tmp_path, "--truth", tmp_path, "--out", out)
    score = infer(parse(args), Process(torch.device("cpu")))
    assert {name: n for name, (_, n) in score.items()} == {"FlatVel_A": 2, "FlatFault_B": 2, "all": 4}
    assert "FlatVel_A_data_data1_0_y_0," in out.read_text()


def test_truth_is_scored_against_the_right_map(tmp_path):
    seis, vel = write_pair(tmp_path, "FlatVel_A", 3, n=2)
    gathers = find_gathers(tmp_path)
    assert find_truths(tmp_path, gathers) == [(vel, 0, "FlatVel_A"), (vel, 1, "FlatVel_A")]
    folder = kaggle_folder(tmp_path / "Style_A", 1)
    maps = tmp_path / "maps"
    maps.mkdir()
    np.save(maps / "0000000000.npy", np.zeros((70, 70), np.float32))
    assert find_truths(maps, find_gathers(folder)) == [(maps / "0000000000.npy", None, "Style_A")]


def test_mirror_tta_of_a_mirrored_survey_is_the_mirrored_map(checkpoint):
    network = build_model(Config(**SMALL)).eval()
    seis = torch.randn(2, 5, 1000, 70)
    plain, mirrored = predict(network, seis, tta=True), predict(network, mirror_survey(seis), tta=True)
    assert torch.allclose(mirrored, plain.flip(3), atol=1e-2)
    assert not torch.allclose(
        predict(network, mirror_survey(seis)), predict(network, seis).flip(3), atol=1e-2
    )


def test_open_files_stay_bounded(tmp_path, checkpoint):
    """More gathers than the cache of memory maps holds."""
    folder = kaggle_folder(tmp_path / "test", 70, np.float16)
    find_gathers(folder)
    assert data.open_array.cache_info().currsize <= 64


@pytest.mark.realdata
def test_real_gather_gives_70_rows_in_range(tmp_path, checkpoint, shared_data):
    out = tmp_path / "real.csv"
    main(words_for(checkpoint, "--input", shared_data / "gather", "--out", out, "--tta"))
    rows = list(csv.reader(out.open()))[1:]
    assert [row[0] for row in rows] == [f"000039dca2_y_{y}" for y in range(70)]
    values = np.array([row[1:] for row in rows], float)
    assert values.shape == (70, 35) and values.min() >= 1500 and values.max() <= 4500


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, checkpoint, refuses):
    out = tmp_path / "s.csv"

    def refuse(*args, words, ckpt=checkpoint):
        refuses(main, *words_for(ckpt, "--out", out, *args), words=words)
        assert not list(tmp_path.rglob("*.csv")) and not list(tmp_path.rglob("*.part"))

    good = kaggle_folder(tmp_path / "good", 1)
    (tmp_path / "empty").mkdir()
    refuse("--input", tmp_path / "none", words=["no such file or folder"])
    refuse("--input", tmp_path / "empty", words=["no gathers in it"])
    refuse("--input", good, "--truth", tmp_path / "none", words=["no such folder"])
    refuse("--input", good, "--truth", tmp_path / "empty", words=["0 true maps 0000000000.npy"])
    refuse("--input", good, ckpt=tmp_path / "none.pt", words=["none.pt: no such checkpoint"])
    (tmp_path / "bad.pt").write_bytes(checkpoint.read_bytes()[:1000])
    refuse("--input", good, ckpt=tmp_path / "bad.pt", words=["bad.pt: not a readable checkpoint"])
    save_checkpoint(tmp_path / "empty.pt", {"epoch": 3})
    refuse("--input", good, ckpt=tmp_path / "empty.pt", words=["empty.pt: holds no weights"])
    refuse("--input", good, "--width=32", words=["small.pt: does not fit this network"])
    refuse("--input", good, "--out", checkpoint / "s.csv", words=["small.pt: cannot be written"])
    refuse("--input", good, "--out", good, words=["good: is a folder; give a file"])
    (tmp_path / "short").mkdir()
    _, vel = write_pair(tmp_path / "short", "FlatVel_A", n=3)
    np.save(vel, np.load(vel)[:2])
    refuse("--input", tmp_path / "short", "--truth", tmp_path / "short", words=[vel, "2 maps, fewer than"])
    refuse("--input", good, "--save_maps", checkpoint / "maps", words=["maps: cannot be written"])
    for name, array, words in (
        (
            "shape",
            np.zeros((5, 999, 70), np.float32),
            ["(5, 999, 70), expected (5, 1000, 70) or (n, 5, 1000, 70)"],
        ),
        ("type", np.zeros((5, 1000, 70), np.int16), ["dtype int16"]),
        ("nan", np.full((5, 1000, 70), np.nan, np.float32), ["sample 0", "NaN"]),
    ):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", array)
        refuse("--input", tmp_path / name, words=[tmp_path / name / "x.npy", *words])
    refuses(main, "--input", good, words=["--ckpt=PATH is needed"])


def test_ids_that_collide_are_refused(tmp_path):
    for folder in ("a", "b"):
        kaggle_folder(tmp_path / folder, 1)
    with pytest.raises(ValueError, match="same id 0000000000"):
        find_gathers(tmp_path)
