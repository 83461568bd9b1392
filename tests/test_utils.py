import contextlib
import errno
import io
import math
import os
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import utils
from networks.checkpoints import load_checkpoint, save_checkpoint
from report.scores import Score, score_table
from utils import StopSignals, check_family, pick_device, pick_precision, run_program, sole_use, write_atomic


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
    monkeypatch.setattr("utils.secrets.token_hex", lambda n: next(tokens))
    (tmp_path / "victim").write_text("precious")
    planted = tmp_path / f".out.csv.{'0' * 16}.part"
    planted.symlink_to(tmp_path / "victim")
    with write_atomic(tmp_path / "out.csv", "w") as file:
        file.write("new")
    assert (tmp_path / "victim").read_text() == "precious" and planted.is_symlink()
    assert (tmp_path / "out.csv").read_text() == "new"


def test_what_a_killed_writer_left_is_swept_and_a_living_writers_file_stays(tmp_path):
    script = (
        "import os, sys, time, utils\n"
        "with utils.write_atomic(sys.argv[1]) as file:\n"
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
            f"utils.os.{name}", lambda *args, real=real, name=name: (calls.append(name), real(*args))[1]
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

    monkeypatch.setattr("utils._make_part", lambda path, mode: (tmp_path / ".p.part", Full()))
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
        "import sys, time, utils\n"
        "with utils.sole_use(sys.argv[1]):\n"
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


def test_score_is_the_mean_over_samples_whatever_the_batches():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, 1, 70, 70, generator=rng) * 3000 + 1500 for _ in range(2))
    family = torch.tensor([0, 0, 9, 9, 9, -1, 0])
    whole, parts = Score(), Score()
    whole.add(a, b, family)
    for i in range(7):
        parts.add(a[i : i + 1], b[i : i + 1], family[i : i + 1])
    error = (a.double() - b.double()).abs().mean((1, 2, 3))
    result = whole.result()
    assert result["all"] == (pytest.approx(error.mean().item()), 7)
    assert result["Style_B"] == (pytest.approx(error[2:5].mean().item()), 3) and result["unknown"][1] == 1
    assert {k: v[0] for k, v in result.items()} == pytest.approx({k: v[0] for k, v in parts.result().items()})
    assert "Style_B" in score_table(result) and score_table(result, result).endswith("1.000")
    assert math.isnan(Score().result()["all"][0])


def test_an_unknown_family_comes_with_the_nearest():
    assert check_family("Style_B") == "Style_B"
    with pytest.raises(ValueError, match="did you mean CurveFault_A"):
        check_family("Curvefault_a")


def test_a_missing_device_is_refused(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 2 of this machine has no card: 1 CUDA devices found"):
        pick_device("cuda", local_rank=1)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="no MPS device"):
            pick_device("mps")


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


def test_errors_are_one_line_and_developers_get_the_traceback(monkeypatch, capsys):
    def fail(argv):
        raise ArithmeticError("a\nb")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run_program(fail)
    assert stop.value.code == 2 and capsys.readouterr().err == "train.py: error: a b\n"


# ---------------------------------------------------------------- how programs end


def program(body):
    """A process that runs `body` as `main` of a program, ready once it has printed a line."""
    code = f"import sys, time, utils\nsys.argv = ['program.py']\ndef main(argv):\n    {body}\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}utils.run_program(main)"],
        cwd=ROOT,
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
        **pipes,
    )


def test_an_interruption_is_one_line():
    process = program("print('ready', flush=True); time.sleep(60)")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "program.py: interrupted\n" and process.returncode == 130


def test_a_second_signal_ends_a_program_that_hangs():
    body = "print('ready', flush=True); utils.StopSignals('the read').__enter__(); print('go', flush=True); "
    process = program(body + "[time.sleep(60) for _ in range(9)]")
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stderr.readline()  # the empty one that ends a progress bar's
    assert process.stderr.readline() == "SIGINT: waiting for the read; once more ends at once\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


def test_signals_that_are_ignored_and_those_of_other_threads_stay_as_they_are():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals("nothing"):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(StopSignals("nothing").__enter__).result().before == {}


@pytest.mark.parametrize(
    "body, code, said",
    [
        (
            "print('ready', flush=True); [print('x' * 9999) for _ in range(99)]",
            141,
            "stopped, for nobody reads",
        ),
        ("print('ready', flush=True); time.sleep(0.5); print('the last line')", 0, ""),
    ],
)
def test_a_closed_pipe_is_one_line_or_none_where_all_is_done(body, code, said):
    process = program(body)
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == code and said in told and told.count("\n") == bool(said)


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


@pytest.mark.parametrize(
    "reason, is_said",
    [
        ("Found no NVIDIA driver on your system. Please check", False),
        ("No CUDA GPUs are available", False),
        ("The NVIDIA driver on your system is too old (found version 11040). Please update it", True),
        ("Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before", True),
    ],
)
def test_a_card_that_its_driver_keeps_from_use_is_said_and_none_is_not(monkeypatch, reason, is_said):
    def fails():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fails)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("cpu").type == "cpu"
    if not is_said:
        return None if pick_device("auto").type == "cpu" else pytest.fail("no card, but another device")
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"cannot be used: .*update its driver.*--device=cpu"):
            pick_device(name)


@pytest.mark.parametrize(
    "card, arches, remedy",
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_120"], "whl/cu126"),  # V100 with the wheels for CUDA 13
        ((6, 0), ["sm_75", "sm_80"], "whl/cu126"),
        ((7, 0), ["sm_50", "sm_60", "sm_70"], None),
        ((7, 5), ["sm_75", "sm_80"], None),
        ((8, 6), ["sm_75", "sm_80", "sm_90"], None),
        ((9, 0), ["sm_90a"], None),
        ((12, 0), ["sm_90"], "a newer torch"),
        ((12, 1), ["sm_90", "compute_120"], None),
        ((7, 0), [], None),
    ],
)
def test_a_card_that_torch_holds_no_code_for_is_said_with_what_to_install(monkeypatch, card, arches, remedy):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arches)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A card")
    with (
        contextlib.nullcontext() if remedy is None else pytest.raises(ValueError, match=f"install .*{remedy}")
    ):
        utils.check_card(0)


def test_only_copies_to_cuda_go_on_without_waiting():
    """On Apple's MPS what such a copy brings may be read before it is there."""
    copies = []
    tensor = types.SimpleNamespace(device=torch.device("cpu"), pin_memory=lambda: tensor)
    tensor.to = lambda device, **options: copies.append((device.type, options))
    for kind in ("mps", "cuda"):
        utils.to_device(tensor, torch.device(kind))
    assert copies == [("mps", {}), ("cuda", {"non_blocking": True})]
    sources = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests"]
    assert [path.name for path in sources if "non_blocking" in path.read_text("utf-8")] == ["utils.py"]
