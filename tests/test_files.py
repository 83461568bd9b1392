import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, write_pair

from cfg import Config
from data import load_items
from openfwi import files
from openfwi.files import check_values, find_pairs, read_sample, scan
from openfwi.gathers import find_gathers
from openfwi.index import Index
from openfwi.npy import check_array, is_finite, open_array, read_header


@pytest.mark.parametrize("above", ["data", "seis", "model/vel", "with space/ünïcode", "data/data"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_layout_is_found_under_any_folder_names(tmp_path, above, dtype):
    written = {
        write_pair(tmp_path / above, family, n=2, dtype=dtype)
        for family in ("FlatVel_A", "FlatFault_B", "Style_A")
    }
    pairs = find_pairs([tmp_path])
    assert {(pair.seis, pair.vel) for pair in pairs} == written
    assert {pair.family for pair in pairs} == {"FlatVel_A", "FlatFault_B", "Style_A"}
    for pair in pairs:
        seis, vel = read_sample(pair, 1)
        assert seis.dtype == vel.dtype == dtype
        assert np.array_equal(seis, np.load(pair.seis)[1]) and np.array_equal(vel, np.load(pair.vel)[1])


def test_seismic_and_velocity_in_one_folder_and_linked_folders_are_found(tmp_path):
    seis, vel = write_pair(tmp_path / "a", "CurveVel_B", n=1)
    os.rename(vel, seis.with_name("model1.npy"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    assert find_pairs([tmp_path / "b"])[0].vel.name == "model1.npy"


def test_links_in_a_circle_and_roots_within_each_other_give_each_file_once(tmp_path):
    seis, vel = write_pair(tmp_path, "CurveVel_B", n=1)
    (tmp_path / "CurveVel_B" / "up").symlink_to(tmp_path)
    (seis.with_name("data2.npy")).symlink_to(seis)
    (vel.with_name("model2.npy")).symlink_to(vel)
    assert len(find_pairs([tmp_path, tmp_path / "CurveVel_B", str(tmp_path)])) == 1


def test_files_come_in_natural_order_and_may_hold_any_number_of_samples(tmp_path):
    for number, n in ((10, 1), (9, 3), (1, 2)):
        write_pair(tmp_path, "FlatVel_A", number, n=n)
    pairs = find_pairs([tmp_path])
    assert [(pair.seis.name, pair.n) for pair in pairs] == [
        ("data1.npy", 2),
        ("data9.npy", 3),
        ("data10.npy", 1),
    ]


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch, capsys):
    write_pair(tmp_path, "FlatVel_A", n=1)
    write_pair(tmp_path, "Style_B", n=1)
    listed = os.scandir

    def forbid(path):
        if str(path).endswith("Style_B"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(ValueError, match=r"Style_B: folder cannot be read \(Permission denied\)"):
        find_pairs([tmp_path])
    assert [pair.family for pair in find_pairs([tmp_path], skip_bad=True)] == ["FlatVel_A"]
    assert "left out" in (out := capsys.readouterr().out) and "folder cannot be read" in out


def test_a_link_to_a_folder_that_is_not_there_is_said(tmp_path, capsys):
    write_pair(tmp_path, "FlatVel_A", n=1)
    (tmp_path / "Style_B").symlink_to(tmp_path / "unmounted" / "Style_B")
    (tmp_path / "readme.txt").symlink_to("gone.txt")  # no folder's name
    with pytest.raises(ValueError, match="Style_B: a link to .*unmounted/Style_B, which is not there"):
        find_pairs([tmp_path])
    with pytest.raises(ValueError, match="which is not there"):
        find_gathers(tmp_path)
    assert len(find_pairs([tmp_path], skip_bad=True)) == 1
    assert "left out" in capsys.readouterr().out


def test_maps_without_gathers_and_files_like_npy_are_counted(tmp_path, capsys):
    write_pair(tmp_path, "FlatVel_A", n=1)
    for number, name in enumerate(("data2.npz", "data3.npy.gz", "data4.npy.part", "data5.npy "), 2):
        seis, _ = write_pair(tmp_path, "FlatVel_A", number, n=1, seed=number)
        os.rename(seis, seis.with_name(name))
    assert len(find_pairs([tmp_path])) == 1
    folder = tmp_path / "FlatVel_A"
    assert capsys.readouterr().out.splitlines() == [
        f"left out: 4 files are not .npy, first: {folder / 'data' / 'data2.npz'}",
        f"left out: 4 velocity files are without gathers, first: {folder / 'model' / 'model2.npy'}",
    ]
    find_gathers(tmp_path)
    assert "left out: 4 files are not .npy" in capsys.readouterr().out


def test_names_are_read_without_regard_to_case_and_unknown_ones_are_counted(tmp_path, capsys):
    seis, vel = write_pair(tmp_path, "FlatVel_A", n=1)
    os.rename(seis, seis.with_name("DATA1.NPY"))
    os.rename(vel.parent, vel.parent.with_name("Model"))
    assert [pair.vel.parent.name for pair in find_pairs([tmp_path])] == ["Model"]
    assert not capsys.readouterr().out
    for name in ("data1 (1).npy", "data1.0.npy", "b.NPY", ".hidden.npy", "._data1.npy"):
        shutil.copy(seis.with_name("DATA1.NPY"), seis.with_name(name))
    assert len(find_pairs([tmp_path])) == 1
    assert capsys.readouterr().out == (
        f"left out: 3 .npy files are not named as data, first: {seis.with_name('b.NPY')}\n"
    )


def test_hidden_folders_are_left_alone(tmp_path):
    write_pair(tmp_path, "FlatVel_A", n=1)
    write_pair(tmp_path / ".Trash", "FlatVel_A", n=1, seed=1)
    assert len(find_pairs([tmp_path])) == 1
    assert len(find_pairs([tmp_path / ".Trash"])) == 1  # unless it is asked for


def test_a_copy_of_other_precision_is_dropped_and_a_namesake_of_other_maps_kept(tmp_path, capsys):
    for folder, seed, dtype in (("a", 0, np.float32), ("b", 0, np.float16), ("c", 1, np.float32)):
        write_pair(tmp_path / folder, "FlatVel_A", n=2, seed=seed, dtype=dtype)
    pairs = find_pairs([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert [pair.seis.relative_to(tmp_path).parts[0] for pair in pairs] == ["a", "c"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"left out: 1 file is a copy, by the velocities, first: {tmp_path / 'b'}")


@pytest.mark.parametrize("part", [slice(None), slice(2)])
def test_copies_under_another_number_or_of_a_part_are_dropped(tmp_path, capsys, part):
    seis, vel = write_pair(tmp_path / "b", "FlatVel_A", n=3)
    for path, folder, name in ((seis, "data", "data7.npy"), (vel, "model", "model7.npy")):
        (tmp_path / "a" / "FlatVel_A" / folder).mkdir(parents=True)
        np.save(tmp_path / "a" / "FlatVel_A" / folder / name, np.load(path)[part])
    (pair,) = find_pairs([tmp_path])
    assert pair.n == 3 and "left out: 1 file is a copy, by the velocities" in capsys.readouterr().out
    gathers = np.load(seis)
    np.save(seis, gathers + 1)  # other gathers of the same maps, as with noise
    assert len(find_pairs([tmp_path])) == 2
    np.save(seis, gathers)
    with pytest.raises(ValueError, match="in both --data_root and --val_root"):
        load_items(Config(data_root=(str(tmp_path / "a"),), val_root=(str(tmp_path / "b"),)))


def test_maps_without_a_channel_and_whole_numbers_are_read_as_they_mean(tmp_path):
    seis, vel = write_pair(tmp_path, "FlatVel_A", n=2)
    gathers, maps = np.load(seis), np.load(vel)
    np.save(vel, maps[:, 0].astype(np.int16))
    np.save(seis, np.rint(10 * gathers).astype(np.int16))
    (pair,) = check_values(find_pairs([tmp_path]))
    for index in (0, 1):
        got_seis, got_vel = read_sample(pair, index)
        assert got_seis.dtype == got_vel.dtype == np.float32
        assert np.array_equal(got_vel, maps[index]) and np.array_equal(got_seis, np.rint(10 * gathers[index]))
    assert np.array_equal(np.array(pair.maps), maps)


# ---------------------------------------------------------------- bad files


HEADERS = {  # what may be wrong with a .npy header: its text, and how it is said
    "empty": ("", "not a .npy file"),
    "no dictionary": ("[1, 2]", "not a .npy file"),
    "unclosed": ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,", "not a .npy file"),
    "deep": ("(" * 5000, "not a .npy file"),
    "missing key": ("{'descr': '<f4', 'shape': (1, 1, 70, 70)}", "not a .npy file"),
    "no dtype": ("{'descr': 'hello', 'fortran_order': False, 'shape': (1,)}", "not a .npy file"),
    "negative shape": ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 70)}", "damaged"),
    "huge shape": ("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 30 + ", 70)}", "truncated"),
    "odd shape": ("{'descr': '<f4', 'fortran_order': False, 'shape': 'abc'}", "not a .npy file"),
    "fields": ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "escapes": ("{'descr': '\\x1b[2J', 'fortran_order': False, 'shape': (1,)}", "not a .npy file"),
    "zero bytes": ("\0" * 100, "not a .npy file"),
    "cut in a word": ("{'descr': '<f4', 'fortran_order': Fal", "not a .npy file"),
    "capital key": ("{'Descr': '<f4', 'fortran_order': False, 'shape': (1,)}", "not a .npy file"),
    "another key": ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}", "not a .npy file"),
    "order a number": ("{'descr': '<f4', 'fortran_order': 3, 'shape': (1,)}", "not a .npy file"),
    "shape a list": ("{'descr': '<f4', 'fortran_order': False, 'shape': [1, 70]}", "not a .npy file"),
    "shape of fractions": ("{'descr': '<f4', 'fortran_order': False, 'shape': (1.5, 70)}", "not a .npy file"),
    "shape of words": ("{'descr': '<f4', 'fortran_order': False, 'shape': ('1', 70)}", "not a .npy file"),
    "shape empty": ("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", "truncated"),
    "code": ("__import__('os').abort()", "not a .npy file"),
    "a call in place of a dtype": (
        "{'descr': str(4), 'fortran_order': False, 'shape': (1,)}",
        "not a .npy file",
    ),
    "a set": ("{'descr', 'fortran_order', 'shape'}", "not a .npy file"),
    "two dictionaries": ("{}{}", "not a .npy file"),
    "a comment": ("# descr", "not a .npy file"),
    "dtype None": ("{'descr': None, 'fortran_order': False, 'shape': (1,)}", "not a .npy file"),
    "dtype a number": ("{'descr': 4, 'fortran_order': False, 'shape': (1,)}", "not a .npy file"),
    "objects": ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "Python objects"),
    "words": ("{'descr': '<U8', 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "bytes": ("{'descr': '|S8', 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "dates": ("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "truths": ("{'descr': '|b1', 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "void": ("{'descr': '|V8', 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "subarrays": ("{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "complex": ("{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "long integers": ("{'descr': '<i8', 'fortran_order': False, 'shape': (1,)}", "expected float16"),
    "big-endian": ("{'descr': '>f4', 'fortran_order': False, 'shape': (1,)}", "big-endian bytes"),
    "Fortran order": ("{'descr': '<f4', 'fortran_order': True, 'shape': (1, 2)}", "Fortran order"),
}


def npy_bytes(text, version=(1, 0)):
    length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + text.encode("latin1")


def one_line_or_header(path):
    """The header, or the message of the only error that may be: a ValueError of one printable line."""
    try:
        return read_header(path)
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error) and str(error).isprintable(), error
        return str(error)


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_unreadable_header_is_one_line(tmp_path, name, version):
    text, message = HEADERS[name]
    path = tmp_path / "x.npy"
    path.write_bytes(npy_bytes(text + "\n", version))
    assert message in one_line_or_header(path)


def test_versions_two_and_three_are_read(tmp_path):
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}\n"
    for version in ((1, 0), (2, 0), (3, 0)):
        (tmp_path / "x.npy").write_bytes(npy_bytes(text, version) + np.arange(6, dtype="<f4").tobytes())
        assert np.array_equal(np.array(read_header(tmp_path / "x.npy")), [[0, 1, 2], [3, 4, 5]])


def test_any_bit_flipped_and_any_noise_in_a_header_is_one_line_or_success(tmp_path):
    path, rng = tmp_path / "x.npy", np.random.default_rng(0)
    np.save(path, np.ones((2, 5), np.float32))
    good, results = path.read_bytes(), []
    spoilt = [(bit // 8, 1 << bit % 8) for bit in range(1024)]
    for position, mask in spoilt:
        path.write_bytes(good[:position] + bytes([good[position] ^ mask]) + good[position + 1 :])
        results.append(one_line_or_header(path))
    for _ in range(300):
        noise = bytearray(good)
        for position in rng.integers(0, len(noise), rng.integers(1, 20)):
            noise[position] = rng.integers(256)
        path.write_bytes(noise[: rng.integers(1, len(noise) + 1)])
        results.append(one_line_or_header(path))
    n_bad = sum(isinstance(result, str) for result in results)
    assert 500 < n_bad < len(results)  # blanks that turn into other blanks do no harm


def test_skipping_bad_files_survives_any_damage(tmp_path, capsys):
    seis, _ = write_pair(tmp_path, "FlatVel_A", n=1)
    write_pair(tmp_path, "Style_B", n=1)
    good, rng = seis.read_bytes(), np.random.default_rng(1)
    for _ in range(40):
        spoilt = bytearray(good)
        for position in rng.integers(0, 128, 3):
            spoilt[position] ^= 1 << rng.integers(8)
        seis.write_bytes(spoilt)
        left = check_values(find_pairs([tmp_path], skip_bad=True), skip_bad=True)
        assert "Style_B" in [pair.family for pair in left]
        assert len(capsys.readouterr().out.splitlines()) + len(left) == 2


def resave(path, change):
    np.save(path, change(np.load(path)))


def archived(seis, vel):
    np.savez(seis.with_suffix(".npz"), np.load(seis))
    os.replace(seis.with_suffix(".npz"), seis)


def swapped(seis, vel):
    os.rename(seis, seis.with_name("x.npy"))
    os.rename(vel, seis)
    os.rename(seis.with_name("x.npy"), vel)


def with_nan(array, value=np.nan):
    array[1, 0, 2, 4] = value
    return array


BAD = {  # name: (what is done to a good pair, which file is named, what must be said)
    "no velocity": (lambda s, v: v.unlink(), 0, "no velocity file model1.npy"),
    "truncated": (lambda s, v: os.truncate(s, 1000), 0, "truncated: 1000 bytes, expected 2800128"),
    "longer": (lambda s, v: os.truncate(v, 40_000), 1, "overwritten or damaged: 40000 bytes, expected 39328"),
    "not npy": (lambda s, v: s.write_bytes(b"PK garbage"), 0, "not a .npy file"),
    "empty file": (lambda s, v: s.write_bytes(b""), 0, "not a .npy file"),
    "new version": (lambda s, v: s.write_bytes(b"\x93NUMPY\x09\x00"), 0, "not a .npy file"),
    "archive": (archived, 0, "an .npz archive"),
    "shape": (
        lambda s, v: resave(s, lambda a: a[..., :69]),
        0,
        "(2, 5, 1000, 69), expected (n, 5, 1000, 70)",
    ),
    "swapped": (swapped, 0, "seismic and velocity are swapped"),
    "no samples": (lambda s, v: (resave(s, lambda a: a[:0]), resave(v, lambda a: a[:0])), 0, "shape (0, 5"),
    "long integers": (lambda s, v: resave(v, lambda a: a.astype(np.int64)), 1, "int64, expected float16"),
    "complex": (lambda s, v: resave(s, lambda a: a.astype("c8")), 0, "complex64, expected float16"),
    "scaled integers": (
        lambda s, v: resave(s, lambda a: (a * 5000).astype(np.int16)),
        0,
        "scaled by an unknown factor",
    ),
    "pipe": (lambda s, v: (s.unlink(), os.mkfifo(s)), 0, "expected a regular file"),
    "device": (lambda s, v: (s.unlink(), s.symlink_to("/dev/zero")), 0, "expected a regular file"),
    "two velocity files": (
        lambda s, v: (v.rename(v.with_name("MODEL1.npy")), v.with_name("model1.NPY").write_bytes(b"")),
        0,
        "several files fit",
    ),
    "big-endian": (
        lambda s, v: resave(s, lambda a: a.astype(">f4")),
        0,
        "big-endian bytes (dtype >f4), expected",
    ),
    "Fortran": (lambda s, v: resave(s, np.asfortranarray), 0, "Fortran order, expected C order"),
    "objects": (
        lambda s, v: resave(v, lambda a: a.astype(object)),
        1,
        "Python objects (dtype object), expected",
    ),
    "count": (lambda s, v: resave(s, lambda a: a[:1]), 0, "1 samples, but"),
    "family": (
        lambda s, v: s.parents[1].rename(s.parents[2] / "FlatVell_A"),
        None,
        "did you mean FlatVel_A?",
    ),
    "packed": (
        lambda s, v: resave(s, lambda a: a[:, :, :256].repeat(2, 3)[..., :72]),
        0,
        "its pack.json above",
    ),
    "nan": (lambda s, v: resave(s, with_nan), 0, "sample 1 of the seismic holds NaN or infinity"),
    "infinity": (
        lambda s, v: resave(v, lambda a: with_nan(a, -np.inf)),
        1,
        "sample 1 of the velocity holds NaN",
    ),
    "km/s": (lambda s, v: resave(v, lambda a: a / 1000), 1, "expected velocities in m/s"),
    "zeros": (lambda s, v: resave(s, lambda a: a * [[[[0]]], [[[1]]]]), 0, "sample 0 is all zeros"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_explained_and_left_out_if_asked_to(tmp_path, name, capsys):
    spoil, which, message = BAD[name]
    both = write_pair(tmp_path, "FlatVel_A", n=2)
    write_pair(tmp_path, "Style_B", n=1)
    spoil(*both)
    named = both[which] if which is not None else tmp_path / "FlatVell_A" / "data" / "data1.npy"
    with pytest.raises(ValueError) as error:
        check_values(find_pairs([tmp_path]))
    assert str(named) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    left = check_values(find_pairs([tmp_path], skip_bad=True), skip_bad=True)
    assert [pair.family for pair in left] == ["Style_B"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"left out: {named}") and message in printed and len(printed.splitlines()) == 1


def test_missing_folders_files_and_families_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_pairs([tmp_path / "none"])
    with pytest.raises(ValueError, match="see the README for the layout"):
        find_pairs([tmp_path])
    seis, _ = write_pair(tmp_path, "FlatVel_A", n=1)
    write_pair(tmp_path, "Style_B", n=1)
    with pytest.raises(ValueError, match="no files of Style_A"):
        find_pairs([tmp_path], ("Style_A",))
    with pytest.raises(ValueError, match="did you mean Style_A"):
        find_pairs([tmp_path], ("Style_a",))
    assert [pair.family for pair in find_pairs([tmp_path], ("Style_B",))] == ["Style_B"]
    for path in (seis, tmp_path / "Style_B" / "data" / "data1.npy"):
        os.truncate(path, 10)
    with pytest.raises(ValueError, match=r"data1.npy: truncated.*\(1 more: python data.py .*\)"):
        find_pairs([tmp_path])
    with pytest.raises(ValueError, match="no good files; the first one: .*truncated"):
        find_pairs([tmp_path], skip_bad=True)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_header(tmp_path)


def test_values_that_are_all_bad_leave_nothing(tmp_path):
    seis, _ = write_pair(tmp_path, "FlatVel_A", n=1)
    resave(seis, lambda a: a * np.nan)
    with pytest.raises(ValueError, match="NaN or infinity.*; no good files are left"):
        check_values(find_pairs([tmp_path]), skip_bad=True)


def test_of_a_large_set_three_samples_a_file_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FULL_CHECK_GB", 0)
    seis, _ = write_pair(tmp_path, "FlatVel_A", n=7)
    resave(seis, lambda a: with_nan(a, np.inf))
    pair = find_pairs([tmp_path])[0]
    assert check_values([pair]) == [pair]  # samples 0, 3 and 6
    with pytest.raises(ValueError, match="sample 1 of the seismic"):
        read_sample(pair, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_finite_is_what_numpy_calls_finite(dtype):
    largest = np.finfo(dtype).max
    for value in (0, -0.0, largest, -largest, np.finfo(dtype).tiny, np.nan, -np.nan, np.inf, -np.inf):
        array = np.array([1, value, -1], dtype)
        assert is_finite(array) == np.isfinite(array).all(), value


# ---------------------------------------------------------------- files that change in use


def test_a_file_cut_off_overwritten_or_gone_in_use_is_an_error_with_its_name(tmp_path):
    seis, vel = write_pair(tmp_path, "FlatVel_A", n=3)
    pair = find_pairs([tmp_path])[0]
    read_sample(pair, 2)
    for sample in (3, -1):
        with pytest.raises(IndexError, match=f"sample {sample} of 3"):
            pair.gathers[sample]
    whole = seis.read_bytes()
    os.truncate(seis, 3_000_000)
    for sample in (0, 2):  # that is still there, and that is not
        with pytest.raises(ValueError, match="data1.npy: 3000000 bytes, expected 4200128 as indexed"):
            read_sample(pair, sample)
    seis.write_bytes(whole)  # as long as before, but another time
    with pytest.raises(ValueError, match="data1.npy: .* truncated or overwritten while in use"):
        read_sample(pair, 0)
    read_sample(find_pairs([tmp_path])[0], 0)
    vel.unlink()
    with pytest.raises(ValueError, match=r"model1.npy: cannot be read \(No such file"):
        read_sample(find_pairs_again(pair, seis), 0)


def find_pairs_again(pair, seis):
    """The pair with its seismic file as it is now."""
    return files.FilePair(read_header(seis), pair.maps, pair.family)


def test_a_cut_off_file_would_kill_a_process_that_maps_it(tmp_path):
    """The reason for reading instead of mapping, and the control of the test above."""
    path = tmp_path / "x.npy"
    np.save(path, np.ones(1_000_000))
    code = "import os, sys, numpy as np; path = sys.argv[1]"
    code += "; mapped = np.load(path, mmap_mode='r'); os.truncate(path, 200); mapped.sum()"
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGBUS


def test_whole_arrays_and_rows_are_read(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 5))
    np.save(tmp_path / "x.npy", array)
    file = check_array(tmp_path / "x.npy", [(4, 5), (None, 4, 5)], "numbers")
    assert open_array(tmp_path / "x.npy") is file and len(file) == 3 and file.ndim == 3
    assert np.array_equal(np.array(file), array) and np.array_equal(file[1], array[1])
    assert np.array(file, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\), expected \(4, 5\) for maps"):
        check_array(tmp_path / "x.npy", [(4, 5)], "maps")


def write_sparse(path, shape, dtype="<f2"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(dtype[-1]) * int(np.prod(shape)))


def sparse_tree(root, n_pairs, n=1):
    for number in range(n_pairs):
        write_sparse(root / "Style_A" / "data" / f"data{number}.npy", (n, 5, 1000, 70))
        write_sparse(root / "Style_A" / "model" / f"model{number}.npy", (n, 1, 70, 70))


def test_two_thousand_files_are_read_where_only_256_may_be_open(tmp_path):
    sparse_tree(tmp_path, 1000)
    code = f"""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        sys.path.insert(0, {str(ROOT)!r})
        import torch
        from cfg import Config
        from data import whole
        from training.loader import make_loaders
        from openfwi.files import find_pairs
        from parallel.processes import Process
        pairs = find_pairs([{str(tmp_path)!r}])
        cfg = Config(batch_size=8, workers=4)
        train, val = make_loaders(cfg, Process(torch.device("cpu")), whole(pairs), whole(pairs))
        print(sum(len(batch[0]) for loader in (train, val) for batch in loader))
        try:
            files = [open(pair.seis) for pair in pairs]
        except OSError as error:
            print(error.strerror)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["2000", "Too many open files"], result.stderr


# ---------------------------------------------------------------- the index


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Three pairs, old enough to be remembered; the headers that are read are counted in `reads`."""
    root, reads = tmp_path / "root", []
    sparse_tree(root, 3)
    for path in root.rglob("*.npy"):
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr("openfwi.index.SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = read_header
    monkeypatch.setattr("openfwi.index.read_header", lambda path: (reads.append(path.name), read(path))[1])
    return root, reads


def test_headers_are_read_once_and_again_where_a_file_changed(tree):
    root, reads = tree
    pairs, problems = scan([root])
    assert len(pairs) == 3 and not problems and len(reads) == 6
    assert scan([root])[0] == pairs and len(reads) == 6
    write_sparse(root / "Style_A" / "data" / "data1.npy", (2, 5, 1000, 70))
    pairs, problems = scan([root])
    assert reads[6:] == ["data1.npy"] and len(pairs) == 2 and "2 samples, but" in problems[0]
    write_sparse(root / "Style_A" / "model" / "model1.npy", (2, 1, 70, 70))
    assert [pair.n for pair in scan([root])[0]] == [1, 2, 1] and reads[7:] == ["model1.npy"]


def test_another_file_of_the_same_size_and_time_is_not_taken_for_the_old_one(tree):
    root, reads = tree
    scan([root])
    path = root / "Style_A" / "data" / "data2.npy"
    size = path.stat().st_size
    other = path.with_name("other")
    write_sparse(other, (5, 1000, 70, 1))
    os.utime(other, (1e9, 1e9))
    os.replace(other, path)
    assert path.stat().st_size == size and path.stat().st_mtime == 1e9
    assert "shape (5, 1000, 70, 1)" in scan([root])[1][0]


def test_files_that_changed_just_now_are_not_remembered(tree, monkeypatch):
    root, reads = tree
    monkeypatch.setattr("openfwi.index.SETTLED_NS", int(600e9))
    scan([root]), scan([root])
    assert len(reads) == 12


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"a": 1}', "null", "\ud800", "damaged"])
def test_a_damaged_cache_is_made_again(tree, text):
    root, reads = tree
    pairs, _ = scan([root])
    cache = Index(root).cache
    if text == "damaged":
        text = cache.read_text().replace("<f2", "<i2")  # another dtype of equal size
    cache.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert scan([root])[0] == pairs and len(reads) == 12
    assert scan([root])[0] == pairs and len(reads) == 12


def test_without_a_place_for_the_cache_it_goes_without(tree, tmp_path):
    root, reads = tree
    (tmp_path / "cache").write_text("a file in the way")
    assert scan([root]) == scan([root]) and len(reads) == 12


def test_the_whole_of_openfwi_is_indexed_in_seconds(tmp_path, monkeypatch):
    """Measured: 0.4 s of 1,880 files, 0.2 s from the cache; here with room for a busy machine."""
    sparse_tree(tmp_path / "root", 940, n=500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("openfwi.index.SETTLED_NS", 0)
    took = []
    for _ in range(2):
        started = time.process_time()
        assert len(find_pairs([tmp_path / "root"])) == 940
        took.append(time.process_time() - started)
    assert took[0] < 5 and took[1] < 0.5


def test_headers_read_side_by_side_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """Python 3.11 raises SystemError now and then where two threads parse at once (its issue 106905)."""
    parse, alone = np.lib.format.read_array_header_1_0, threading.Lock()

    def parse_slowly(file):
        assert alone.acquire(blocking=False)
        time.sleep(0.001)
        alone.release()
        return parse(file)

    for k in range(4):
        write_pair(tmp_path, "FlatVel_A", k, n=1)
    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", parse_slowly)
    assert len(find_pairs([tmp_path])) == 4
