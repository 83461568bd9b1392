import json
import os

import numpy as np
import pytest
import torch
from conftest import SMALL, run_cli, write_pair

import train
from cfg import Config
from data import load_items, whole
from openfwi import files, inspect_data
from openfwi.files import find_pairs
from openfwi.modes import MODE_SHAPES, preprocess
from system.files import sole_use
from training.loader import PairDataset

UNET = [*SMALL, "--arch=unet", "--backbone=convnext_atto", "--pretrained=false"]


def pack(root, out, mode="small_72x72"):
    inspect_data.main(["--pack", str(root), "--out", str(out), f"--mode={mode}"])


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# ---------------------------------------------------------------- table


def test_the_table_counts_files_samples_and_kinds_and_shows_ranges(tmp_path, capsys):
    write_pair(tmp_path, "FlatVel_A", 1, n=3, dtype=np.float16)
    write_pair(tmp_path, "FlatVel_A", 2, n=2, dtype=np.float32)
    _, vel = write_pair(tmp_path, "CurveFault_B", n=1, dtype=np.float64)
    inspect_data.main([str(tmp_path)])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["FlatVel_A"].split()[1:4] == ["2", "5", "0.00"] and rows["all"].split()[1:3] == ["3", "6"]
    assert "float16/float16 × 1, float32/float32 × 1" in rows["FlatVel_A"]
    maps = np.load(vel)
    assert (
        f"{maps.min():.0f} … {maps.max():.0f}" in rows["CurveFault_B"]
        and "float64/float64" in rows["CurveFault_B"]
    )
    assert rows["headers"] == "headers and three samples a file read, 0 bad"


def test_bad_files_are_rows_and_the_exit_status(tmp_path, capsys):
    seis, _ = write_pair(tmp_path, "FlatVel_A", 1, n=9)
    array = np.load(seis)
    array[1] = np.nan  # between the three samples
    np.save(seis, array)
    cut, _ = write_pair(tmp_path, "FlatVel_A", 2, n=1)
    lonely, vel = write_pair(tmp_path, "Style_A", 1, n=1)
    os.truncate(cut, 1000)
    vel.unlink()
    with pytest.raises(SystemExit) as stop:
        inspect_data.main([str(tmp_path)])
    result = run_cli("data.py", tmp_path, "--verify")
    assert stop.value.code == result.returncode == 1, result.stderr
    for printed, bad in ((capsys.readouterr().out, [cut, lonely]), (result.stdout, [cut, lonely, seis])):
        found = [line for line in printed.splitlines() if line.startswith("bad: ")]
        assert len(found) == len(bad) and all(any(f"bad: {path}: " in line for line in found) for path in bad)
    assert "sample 1 of the seismic" in result.stdout and "all values read, 3 bad" in result.stdout


def test_mistakes_on_the_command_line_are_one_line(tmp_path, refuses):
    refuses(inspect_data.main, words=["no folder given"])
    refuses(inspect_data.main, "--pack", "x", words=["--pack takes one folder and --out"])
    refuses(inspect_data.main, "--pack", "x", "--out", "y", "--mode=tiny", words=["invalid choice: 'tiny'"])
    refuses(inspect_data.main, tmp_path / "none", words=["none: no such folder"])


# ---------------------------------------------------------------- packed copies


@pytest.mark.parametrize("mode", MODE_SHAPES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_packed_copy_holds_what_the_loader_would_make_rounded_to_float16(tmp_path, mode, dtype):
    for family in ("FlatVel_A", "CurveFault_B"):
        write_pair(tmp_path / "root", family, n=inspect_data.CHUNK + 1, dtype=dtype)
    pack(tmp_path / "root", tmp_path / "packed", mode)
    before, after = (whole(find_pairs([tmp_path / name])) for name in ("root", "packed"))
    assert len(before) == len(after) and {pair.mode for pair in after.pairs} == {mode}
    given, packed = PairDataset(before), PairDataset(after)
    for i in (0, len(before) - 1):
        seis, vel, family, _ = given[i]
        expected = preprocess(seis[None].float(), mode)[0].half()
        assert (
            torch.equal(packed[i][0], expected) and torch.equal(packed[i][1], vel) and packed[i][2] == family
        )
        assert torch.equal(preprocess(packed[i][0][None], mode)[0], expected)  # as it is
    inspect_data.main([str(tmp_path / "packed"), "--verify"])


def test_packing_again_changes_nothing_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    root, whole_copy, stopped = (tmp_path / name for name in ("root", "whole", "stopped"))
    for number in (1, 2, 3):
        write_pair(root, "FlatVel_A", number, n=2, seed=number)
    pack(root, whole_copy)
    expected, times = contents(whole_copy), {p: p.stat().st_mtime_ns for p in whole_copy.rglob("*.npy")}
    pack(root, whole_copy)
    assert contents(whole_copy) == expected and times == {p: p.stat().st_mtime_ns for p in times}
    assert "6 files, 0 of them written now" in capsys.readouterr().out

    write, written = inspect_data.write_packed, []

    def stop_at_fourth(path, *args):
        written.append(path)
        if len(written) == 4:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half")  # as of a copy stopped between the file and the manifest
            raise KeyboardInterrupt
        return write(path, *args)

    monkeypatch.setattr(inspect_data, "write_packed", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        pack(root, stopped)
    monkeypatch.setattr(inspect_data, "write_packed", write)
    pack(root, stopped)
    assert "6 files, 3 of them written now" in capsys.readouterr().out
    assert contents(stopped) == expected
    write_pair(root, "FlatVel_A", 2, n=2, seed=9)  # another source
    pack(root, stopped)
    assert "6 files, 2 of them written now" in capsys.readouterr().out and contents(stopped) != expected


def test_a_source_replaced_by_another_of_the_same_size_and_time_is_packed_again(tmp_path, capsys):
    seis, _ = write_pair(tmp_path / "root", "FlatVel_A", n=2)
    pack(tmp_path / "root", tmp_path / "packed")
    times = seis.stat()
    np.save(seis, np.load(seis)[::-1])
    os.utime(seis, ns=(times.st_atime_ns, times.st_mtime_ns))
    pack(tmp_path / "root", tmp_path / "packed")
    assert "2 files, 1 of them written now" in capsys.readouterr().out
    manifest = tmp_path / "packed" / "pack.json"
    older = json.loads(manifest.read_text())
    for entry in older["files"].values():
        del entry["source"][3]
    manifest.write_text(json.dumps(older))
    pack(tmp_path / "root", tmp_path / "packed")
    assert "2 files, 0 of them written now" in capsys.readouterr().out


def test_a_damaged_copy_says_what_to_do_and_that_helps(tmp_path, capsys):
    write_pair(tmp_path / "root", "FlatVel_A", n=1)
    pack(tmp_path / "root", tmp_path / "packed")
    path = next((tmp_path / "packed").rglob("data1.npy"))
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert "remove it and pack again" in inspect_data.overview([tmp_path / "packed"], verify=True)[0]
    path.unlink()
    pack(tmp_path / "root", tmp_path / "packed")
    assert inspect_data.overview([tmp_path / "packed"], verify=True) == []


def test_two_that_pack_into_one_folder_are_not_mixed(tmp_path):
    write_pair(tmp_path / "root", "FlatVel_A", n=1)
    (tmp_path / "packed").mkdir()
    with sole_use(tmp_path / "packed"):
        with pytest.raises(ValueError, match="packed: in use by process .*; wait for its end"):
            pack(tmp_path / "root", tmp_path / "packed")
    pack(tmp_path / "root", tmp_path / "packed")
    assert len(find_pairs([tmp_path / "packed"])) == 1


def test_a_changed_byte_of_a_packed_copy_is_found(tmp_path, capsys):
    write_pair(tmp_path / "root", "FlatVel_A", n=2)
    pack(tmp_path / "root", tmp_path / "packed")
    path = tmp_path / "packed" / "FlatVel_A" / "data" / "data1.npy"
    bytes_ = bytearray(path.read_bytes())
    bytes_[200] ^= 1
    path.write_bytes(bytes_)
    with pytest.raises(SystemExit) as stop:
        inspect_data.main([str(tmp_path / "packed"), "--verify"])
    assert stop.value.code == 1 and f"bad: {path}: other bytes than were packed" in capsys.readouterr().out


def test_values_beyond_float16_are_clipped_and_counted(tmp_path, capsys):
    seis, _ = write_pair(tmp_path / "root", "FlatVel_A", n=1)
    array = np.load(seis)
    array[0, 0, 0, :3] = (1e6, -1e6, 65504)
    np.save(seis, array)
    pack(tmp_path / "root", tmp_path / "packed", "full")
    got = PairDataset(whole(find_pairs([tmp_path / "packed"])))[0][0]
    assert got[0, 0, :3].tolist() == [65504, -65504, 65504] and got.isfinite().all()
    assert "2 values beyond float16's range" in capsys.readouterr().out


def test_a_root_that_is_a_familys_folder_packs_under_its_family(tmp_path):
    write_pair(tmp_path / "root", "FlatFault_A", n=1)
    pack(tmp_path / "root" / "FlatFault_A", tmp_path / "packed")
    assert find_pairs([tmp_path / "packed"])[0].seis == tmp_path / "packed" / "FlatFault_A" / "seis2_1_1.npy"


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch, refuses):
    root, packed = tmp_path / "root", tmp_path / "packed"
    seis, _ = write_pair(root, "FlatVel_A", n=3)

    def refuse(source, out, mode, *words):
        refuses(inspect_data.main, "--pack", source, "--out", out, f"--mode={mode}", words=words)

    pack(root, packed)
    refuse(root, packed, "full", f"{packed}: packed for small_72x72, asked for full")
    refuse(packed, tmp_path / "again", "full", "data1.npy: packed already, for small_72x72")
    refuse(root, root / "deeper", "full", f"lies in {root}")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thing").write_text("x")
    refuse(root, tmp_path / "others", "full", "holds other files")
    monkeypatch.setattr(inspect_data.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    refuse(root, tmp_path / "new", "full", "0.0 GB free, 0.0 GB needed")
    train_words = [*UNET, "--batch_size=1", f"--run_root={tmp_path / 'runs'}"]
    refuses(train.main, f"--data_root={packed}", *train_words, "--mode=full",
            words=["data1.npy: packed for --mode=small_72x72, asked for --mode=full"])  # fmt: skip
    refuses(train.main, f"--data_root={packed},{root}", *train_words, "--mode=small_72x72",
            words=["packed and unpacked files do not mix"])  # fmt: skip
    array = np.load(seis)
    array[2] = np.nan
    np.save(seis, array)
    monkeypatch.undo()
    refuse(root, tmp_path / "new", "full", f"{seis}: sample 0 to 2 of the file holds NaN")
    assert not list((tmp_path / "new").rglob("*.npy"))


def test_small_images_need_no_manifest_but_one_must_not_contradict_them(tmp_path):
    write_pair(tmp_path / "root", "FlatVel_A", n=1)
    pack(tmp_path / "root", tmp_path / "packed")
    manifest = tmp_path / "packed" / files.MANIFEST
    for text in ("[]", None):
        manifest.unlink() if text is None else manifest.write_text(text)
        assert [pair.mode for pair in find_pairs([tmp_path / "packed"])] == ["small_72x72"]
    for text, message in (
        ("{", "not readable"),
        ('{"mode": "full", "files": {}}', "says mode full; pack the"),
    ):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            find_pairs([tmp_path / "packed"])


def test_other_gathers_of_a_modes_shape_need_their_manifest(tmp_path):
    write_pair(tmp_path / "root", "FlatVel_A", n=1)
    pack(tmp_path / "root", tmp_path / "packed", "smart_256x72")
    manifest = tmp_path / "packed" / files.MANIFEST
    assert json.loads(manifest.read_text())["mode"] == "smart_256x72"
    for text, message in (
        ("{", "pack.json: not readable"),
        ("[]", "which says mode nothing"),
        (None, "mode nothing"),
    ):
        manifest.unlink() if text is None else manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            find_pairs([tmp_path / "packed"])


def test_training_on_a_packed_copy_is_training_on_the_rounded_gathers(tmp_path, mode="small_72x72"):
    write_pair(tmp_path / "root", "FlatVel_A", n=6, dtype=np.float16)
    pack(tmp_path / "root", tmp_path / "packed", mode)
    maes = []
    for name in ("root", "packed"):
        words = [
            f"--data_root={tmp_path / name}",
            f"--run_root={tmp_path / name / 'runs'}",
            *UNET,
            f"--mode={mode}",
        ]
        train.main([*words, "--batch_size=2", "--epochs=1"])
        maes.append(
            json.loads((tmp_path / name / "runs" / "001-baseline" / "metrics.json").read_text())["val_mae"]
        )
    assert maes[0] == pytest.approx(maes[1], rel=1e-3)
    items, _ = load_items(Config(data_root=(str(tmp_path / "packed"),), mode=mode))
    assert items.pairs[0].mode == mode


@pytest.mark.realdata
def test_real_gathers_survive_packing(tmp_path, shared_data):
    gather = np.load(next((shared_data / "gather").glob("*.npy")))
    seis, _ = write_pair(tmp_path / "root", "FlatVel_A", n=1)
    np.save(seis, gather[None])
    pack(tmp_path / "root", tmp_path / "packed", "full")
    got = PairDataset(whole(find_pairs([tmp_path / "packed"])))[0][0]
    assert (got.float() - torch.from_numpy(gather)).abs().max() < 0.02  # half of float16's step at the peaks
