"""system/files.py: files written whole or not at all, folders used by one program at a time."""

import errno
import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from networks.checkpoints import load_checkpoint, save_checkpoint
from system import files
from system.files import load_json, sole_use, write_atomic, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.ones(2)}})
    with pytest.raises(RuntimeError):
        with write_atomic(path) as file:
            file.write(b"half")
            raise RuntimeError
    assert torch.equal(load_checkpoint(path)["model"]["w"], torch.ones(2)) and os.listdir(tmp_path) == [
        "last.pt"
    ]


def test_a_link_planted_at_the_target_is_replaced_and_never_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out.csv").symlink_to(tmp_path / "victim")
    with write_atomic(tmp_path / "out.csv", "w") as file:
        file.write("new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "out.csv").read_text() == "new" and not (tmp_path / "out.csv").is_symlink()


def test_a_name_that_was_foreseen_is_neither_used_nor_followed(tmp_path, monkeypatch):
    tokens = iter(["0" * 16, "0" * 16, "1" * 16])
    monkeypatch.setattr("system.files.secrets.token_hex", lambda n: next(tokens))
    (tmp_path / "victim").write_text("precious")
    planted = tmp_path / f".out.csv.{'0' * 16}.part"
    planted.symlink_to(tmp_path / "victim")
    with write_atomic(tmp_path / "out.csv", "w") as file:
        file.write("new")
    assert (tmp_path / "victim").read_text() == "precious" and planted.is_symlink()
    assert (tmp_path / "out.csv").read_text() == "new"


def test_what_a_killed_writer_left_is_swept_and_a_living_writers_file_stays(tmp_path):
    script = (
        "import os, sys, time\nfrom system.files import write_atomic\n"
        "with write_atomic(sys.argv[1]) as file:\n"
        "    print(file.name, flush=True)\n"
        "    time.sleep(60)\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / name], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for name in ("dead.pt", "alive.pt")
    ]
    try:
        parts = [Path(writer.stdout.readline().strip()) for writer in writers]
        writers[0].kill()
        writers[0].wait()
        assert all(part.exists() for part in parts)
        mine = tmp_path / ".notes.part"  # no name of ours
        mine.write_text("keep")
        save_checkpoint(tmp_path / "other.pt", {"w": torch.ones(1)})
        assert [part.exists() for part in parts] == [False, True] and mine.exists()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_the_file_is_on_disk_before_it_takes_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            f"system.files.os.{name}",
            lambda *args, real=real, name=name: (calls.append(name), real(*args))[1],
        )
    with write_atomic(tmp_path / "a") as file:
        file.write(b"x")
    assert calls == ["fsync", "replace", "fsync"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match=f"expected a file.*{name}"), write_atomic(tmp_path / name):
            pass
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "write", [lambda file: file.write(b"x"), lambda file: np.save(file, np.ones(9)), "checkpoint"]
)
def test_a_failing_write_names_its_file_and_leaves_the_old_one(tmp_path, monkeypatch, write):
    """A disk that is full when the file is flushed."""
    path = tmp_path / "out"
    path.write_bytes(b"old")

    class Full(io.BytesIO):
        name = "full"

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("system.files._make_part", lambda path, mode: (tmp_path / ".p.part", Full()))
    with pytest.raises(OSError) as error:
        if write == "checkpoint":
            save_checkpoint(path, {"w": torch.ones(1)}, keep_as=tmp_path / "before")
        else:
            with write_atomic(path) as file:
                write(file)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["out"]


def test_anothers_trouble_while_writing_keeps_its_own_name(tmp_path):
    with pytest.raises(OSError) as error, write_atomic(tmp_path / "out"):
        open(tmp_path / "missing", "rb")
    assert error.value.filename == str(tmp_path / "missing")


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / ("ü" * 120)
    with write_atomic(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_a_folder_has_one_user_at_a_time_and_a_killed_one_frees_it(tmp_path):
    script = (
        "import sys, time\nfrom system.files import sole_use\n"
        "with sole_use(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"run: in use by process {holder.pid} on .*another folder"):
            with sole_use(tmp_path / "run", patience_s=0.2):
                pass
    finally:
        holder.kill()
        holder.wait()
    with sole_use(tmp_path / "run", patience_s=0.2):
        pass


def test_a_lock_whose_holder_removed_its_folder_keeps_others_off(tmp_path):
    """The second waits for the first, which removes the file it waits for: it must not believe to have it."""
    folder, entered = tmp_path / "work", []
    with ThreadPoolExecutor(1) as pool:
        with sole_use(folder):

            def second():
                with sole_use(folder):
                    entered.append((folder / ".lock").exists())

            waiting = pool.submit(second)
            time.sleep(0.3)
            (folder / ".lock").unlink()
            folder.rmdir()
        waiting.result()
    assert entered == [True]


@pytest.mark.parametrize("folder", ["/dev", "/dev/fd", "/proc/self"])
def test_devices_are_never_replaced(folder, monkeypatch):
    """`--out=/dev/stdout > log` must not put a file in the place of the link that all programs use."""
    if not os.path.isdir(folder):
        pytest.skip(f"no {folder} here")
    monkeypatch.setattr(files, "_make_part", None)  # so that nothing is made there
    with pytest.raises(OSError, match="a folder or a device, expected a file") as error:
        with write_atomic(f"{folder}/stdout"):
            pass
    assert error.value.filename == f"{folder}/stdout"


def test_json_is_read_from_regular_files_alone(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert load_json(tmp_path / "x.json") == {"a": [1, None]}
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="expected a file"):
            load_json(path)
