"""Interrupted predictions go on, after an exception, a signal, a kill or a full disk, with what is theirs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, kaggle_folder, run_cli, words_for

import infer as infer_module
from cfg import parse
from infer import infer, main
from inference.results import Results
from system.files import sole_use
from utils import run_program

N_KILLS = int(os.environ.get("N_KILLS", 1))  # docs/experiments has 12


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_inversion_of_flat_layers_goes_on_to_the_truth(run, pairs, tmp_path, monkeypatch):
    words = ("--input", pairs / "FlatVel_A", "--truth", pairs, "--refine=inversion", "--refine_iterations=0")
    put = Results.put

    def stop_after(self, numbers, **fields):
        put(self, numbers, **fields)
        if "misfit" in fields:
            raise Stopped

    monkeypatch.setattr(Results, "put", stop_after)
    with pytest.raises(Stopped):
        run(*words)
    monkeypatch.setattr(Results, "put", put)
    score, _ = run(*words, "--figures", tmp_path / "figures")
    assert score["all"][0] == 0
    assert list((tmp_path / "figures" / "steps").iterdir())  # of the one done after the interruption
    traces = [json.loads(line) for line in (tmp_path / "s.trace.jsonl").read_text().splitlines()]
    assert len(traces) == 2 and all(trace["misfits"]["rounded"] < 1e-5 for trace in traces)


FIELDS = [("vel", "f4", (3,)), ("family", "i1")]


def three_records(folder):
    """Results of which two of three records are done, and their file's bytes."""
    results = Results(folder / "network0-0.bin", 3, FIELDS)
    results.make().put([0, 2], vel=[[1.0] * 3, [3.0] * 3], family=[1, 2])
    assert results.open().done.tolist() == [True, False, True]
    return results, bytearray(results.path.read_bytes())


@pytest.mark.parametrize("byte", range(17))
def test_a_record_damaged_in_any_byte_is_not_done(tmp_path, byte, capsys):
    results, content = three_records(tmp_path)
    content[2 * 17 + byte] ^= 16
    results.path.write_bytes(content)
    assert results.make().done.tolist() == [True, False, False]
    assert results.todo([[0], [1], [2]]) == [[1], [2]]
    assert capsys.readouterr().out == f"{results.path}: 1 records are damaged and will be made again\n"


@pytest.mark.parametrize("byte", [0, 1, 91, 255])
def test_files_of_results_overwritten_by_one_byte_hold_none(tmp_path, byte):
    results, content = three_records(tmp_path)
    results.path.write_bytes(bytes([byte]) * len(content))
    assert not results.make().done.any() and len(results) == 3


def test_a_record_in_the_place_of_another_is_not_done(tmp_path):
    results, content = three_records(tmp_path)
    results.path.write_bytes(content[34:] + content[17:34] + content[:17])
    assert not results.make().done.any()


def test_damaged_records_of_one_process_are_left_out_and_sound_ones_joined(tmp_path):
    part = Results(tmp_path / "network0-0.bin", 3, FIELDS, part="one")
    part.make()
    for number in range(3):
        part.put([number], vel=[[number] * 3], family=[0])
    path = tmp_path / "network0-0.one.part"
    content = bytearray(path.read_bytes())
    content[25 + 10] ^= 1  # the second one's velocities
    path.write_bytes(content)
    joined = Results(part.path, 3, FIELDS).make().join()
    assert joined.done.tolist() == [True, False, True] and joined["vel"][2].tolist() == [2.0] * 3
    assert joined.make().done.tolist() == [True, False, True]


def test_damaged_notes_are_left_out_and_damaged_steps_are_not_drawn(tmp_path, capsys):
    results = Results(tmp_path / "final-0.bin", 3, FIELDS).make()
    results.note([0, 1, 2], [{"seconds": k} for k in (10, 11, 12)])
    path = tmp_path / "final-0.notes"
    path.write_bytes(path.read_bytes().replace(b"11", b"71"))
    assert [note["seconds"] for note in results.notes()] == [10, 12]
    results.keep_steps(1, [("start", np.zeros((70, 70)))])
    assert [what for what, _ in results.steps_of(1)] == ["start"] and results.steps_of(2) == []
    path = tmp_path / "final-0.steps1.npz"
    for content in (path.read_bytes()[:-40], path.read_bytes().replace(bytes(100), bytes([1]) * 100), b""):
        path.write_bytes(content)
        assert results.steps_of(1) == [] and "these steps are not drawn" in capsys.readouterr().out


def test_records_of_a_process_that_are_numbered_outside_are_left_out(tmp_path):
    part = Results(tmp_path / "network0-0.bin", 2, [("vel", "f4")], part="one")
    part.make()
    for number in (-1, 1, 2, 10**9):
        part.put([number], vel=[5.0])
    assert Results(part.path, 2, [("vel", "f4")]).make().join().done.tolist() == [False, True]


OPTIONS = ("--tta", "--misfit", "--refine=feedback", "--refine_rounds=1", "--post=round")


@pytest.mark.parametrize("n_puts", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch, n_puts):
    run(*OPTIONS, name="whole.csv")
    put, calls = Results.put, []

    def stop_after(self, numbers, **fields):
        if len(calls) == n_puts:
            raise Stopped
        calls.append(list(numbers))
        put(self, numbers, **fields)

    monkeypatch.setattr(Results, "put", stop_after)
    with pytest.raises(Stopped):
        run(*OPTIONS)
    assert not (tmp_path / "s.csv").exists() and (tmp_path / "s.csv.work").is_dir()
    seen = []
    monkeypatch.setattr(
        Results, "put", lambda self, numbers, **f: (seen.append(list(numbers)), put(self, numbers, **f))
    )
    run(*OPTIONS)
    assert len(seen) == 4 - n_puts  # two batches twice: nothing is done again
    for end in (".csv", ".misfit.csv", ".trace.jsonl"):
        assert (tmp_path / f"s{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    assert not list(tmp_path.rglob("*.work"))


def test_results_of_other_options_are_not_taken(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer_module, "write_outputs", stopping)
    with pytest.raises(Stopped):
        run()
    monkeypatch.undo()
    _, out = run("--tta")
    printed = capsys.readouterr().out
    assert "network0" in printed and "made with other options or files; starting afresh" in printed
    assert out.read_bytes() == run("--tta", name="fresh.csv")[1].read_bytes()


def stopping(*args):
    raise Stopped


@pytest.mark.parametrize("kind", ["network0-*.bin", "final-*.bin", "final-*.notes"])
def test_what_is_damaged_in_an_interrupted_runs_folder_is_made_again(run, tmp_path, monkeypatch, kind):
    with monkeypatch.context() as patch:
        patch.setattr(infer_module, "write_outputs", stopping)
        with pytest.raises(Stopped):
            run(*OPTIONS)
    path = next((tmp_path / "s.csv.work").glob(kind))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    puts, put = [], Results.put
    monkeypatch.setattr(
        Results, "put", lambda self, *a, **f: (puts.append(self.path.name), put(self, *a, **f))
    )
    run(*OPTIONS)
    assert len(puts) == 1 and puts[0].startswith(kind.partition("-")[0])
    monkeypatch.undo()
    run(*OPTIONS, name="whole.csv")
    for end in (".csv", ".misfit.csv", ".trace.jsonl"):
        assert (tmp_path / f"s{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()


def test_results_of_an_older_version_are_refused_in_one_line(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("inference.results.RECORDS", {})
        patch.setattr(infer_module, "write_outputs", stopping)
        with pytest.raises(Stopped):
            run()
    kept = {path: path.read_bytes() for path in (tmp_path / "s.csv.work").glob("*.bin")}
    with pytest.raises(ValueError, match="network0-.*kept by an older version, .*; remove .*s.csv.work to"):
        run()
    assert kept and all(path.read_bytes() == content for path, content in kept.items())


def test_a_full_disk_is_one_line_and_keeps_what_is_done(checkpoint, tmp_path, monkeypatch, capsys):
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small tmpfs")
    disk, folder = tmp_path / "disk", kaggle_folder(tmp_path / "test", 20, np.float16)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        words = words_for(checkpoint, "--input", folder, "--out", disk / "s.csv", "--batch_size=4")
        for n_kib in (1750, 1100):  # no room for all results, then none for the CSV
            (disk / "ballast").write_bytes(bytes(n_kib << 10))
            monkeypatch.setattr(sys, "argv", ["infer.py", *words])
            with pytest.raises(SystemExit) as stop:
                run_program(main)
            line = capsys.readouterr().err.strip().splitlines()[-1]  # after the progress bar
            assert stop.value.code == 2 and line.startswith("infer.py: error: "), line
            assert "not written (No space left on device); free some space and run the same command" in line
            assert not list(disk.glob("*.csv")) and not list(disk.rglob("*.part"))
            done = next(disk.glob("s.csv.work/network0-*.bin")).read_bytes().strip(b"\0")
            assert done  # kept
        (disk / "ballast").unlink()
        main(words)
        main(words_for(checkpoint, "--input", folder, "--out", tmp_path / "s.csv", "--batch_size=4"))
        assert (disk / "s.csv").read_bytes() == (tmp_path / "s.csv").read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---------------------------------------------------------------- kills and signals


def n_bytes_kept(work):
    return sum(np.count_nonzero(np.fromfile(path, np.uint8)) for path in work.glob("*.bin"))


@pytest.mark.slow
def test_killed_at_any_time_and_started_again_it_gives_the_same_bytes(checkpoint, tmp_path):
    """`N_KILLS=12 python -m pytest tests/test_results.py -k killed`: each some time after more is kept."""
    folder = kaggle_folder(tmp_path / "test", 2 + 2 * N_KILLS)
    options = ("--tta", "--misfit", "--refine=feedback", "--refine_rounds=1", "--post=round")
    words = words_for(checkpoint, "--input", folder, "--batch_size=1", *options)
    whole = run_cli("infer.py", *words, "--out", tmp_path / "whole.csv")
    assert whole.returncode == 0, whole.stderr
    draw, kept = random.Random(0), 0
    for _ in range(N_KILLS):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "infer.py"), *words, "--out", str(tmp_path / "s.csv")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 600
        while n_bytes_kept(tmp_path / "s.csv.work") <= kept:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.wait()
        kept = n_bytes_kept(tmp_path / "s.csv.work")
    again = run_cli("infer.py", *words, "--out", tmp_path / "s.csv")
    assert again.returncode == 0 and "going on, " in again.stdout
    for ending in (".csv", ".misfit.csv", ".trace.jsonl"):
        assert (tmp_path / f"s{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.work"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_keeps_the_batch_and_says_in_one_line_how_to_go_on(run, tmp_path, monkeypatch, capfd, name):
    number, put, puts = getattr(signal, name), Results.put, []
    # a shell's background and nohup ignore some
    signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

    def signal_within(self, numbers, **fields):
        if not puts:
            signal.raise_signal(number)
        put(self, numbers, **fields)
        puts.append(numbers)

    before = signal.getsignal(number)
    monkeypatch.setattr(Results, "put", signal_within)
    with pytest.raises(SystemExit) as stop:
        run()
    printed = capfd.readouterr().err
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    assert f"{name}: waiting for the current batch, to keep it; once more ends at once" in printed
    assert printed.endswith(f"stopped by {name}; what is done is kept: the same command continues\n")
    _, out = run()
    assert len(puts) == 4  # one batch before the stop, three after: none twice
    monkeypatch.undo()
    assert out.read_bytes() == run(name="whole.csv")[1].read_bytes()


def test_reading_ahead_needs_no_other_process(run, monkeypatch):
    """Docker gives containers 64 MB of shared memory, too little for batches between processes."""
    _, out = run()
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", stopping)
    assert run("--workers=2", name="threads.csv")[1].read_bytes() == out.read_bytes()


# ---------------------------------------------------------------- whose results, and of what


@pytest.fixture
def predicted(checkpoint, tmp_path, monkeypatch):
    """A run on four test gathers, stopped before it writes; calling it goes on: the batches it puts."""
    folder = kaggle_folder(tmp_path / "test", 4)
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr("openfwi.gathers.SETTLED_NS", -(10**18))  # files are as old as they say

    def go(folder=folder, name="s.csv"):
        puts, put = [], Results.put
        words = words_for(checkpoint, "--input", folder, "--out", tmp_path / name, "--batch_size=1")
        with monkeypatch.context() as patch:
            patch.setattr(
                Results, "put", lambda self, *a, **f: (puts.append(self.path.name), put(self, *a, **f))
            )
            infer(parse(words), CPU)
        return puts

    with monkeypatch.context() as patch:
        patch.setattr(infer_module, "write_outputs", stopping)
        with pytest.raises(Stopped):
            go()
    go.folder = folder
    return go


def test_what_is_predicted_of_gathers_as_they_were_is_kept_also_in_another_place(predicted, tmp_path, capsys):
    shutil.move(predicted.folder, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        os.utime(path, (2e9, 2e9))  # doubtful: read and compared
    assert predicted(tmp_path / "elsewhere") == []


def test_a_gather_replaced_by_another_of_the_same_size_and_time_is_predicted_again(
    predicted, tmp_path, capsys
):
    path = predicted.folder / "0000000002.npy"
    np.save(path, np.load(path)[:, :, ::-1])
    os.utime(path, (1e9, 1e9))
    puts = predicted()
    assert len(puts) == 2 and puts[0].startswith("network0-") and puts[1].startswith("final-")
    assert f"{path}: not the same gather as before; predicting 1 again" in capsys.readouterr().out
    assert (
        predicted(name="fresh.csv")
        and (tmp_path / "s.csv").read_bytes() == (tmp_path / "fresh.csv").read_bytes()
    )


def test_a_gather_replaced_between_prediction_and_refining_is_named(run, pairs, tmp_path, monkeypatch):
    root = tmp_path / "pairs"
    shutil.copytree(pairs, root)
    finish = infer_module.finish

    def replace_first(*args):
        path = root / "FlatFault_A" / "seis2_1_0.npy"
        values, times = np.load(path), os.stat(path)
        np.save(path, values[::-1])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return finish(*args)

    monkeypatch.setattr(infer_module, "finish", replace_first)
    with pytest.raises(ValueError, match="seis2_1_0.npy: sample 0: replaced since its map was predicted"):
        run("--input", root, "--misfit")


def test_two_runs_on_one_output_are_refused_by_the_holders_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr("inference.results.sole_use", partial(sole_use, patience_s=0.1))
    with sole_use(tmp_path / "s.csv.work"):
        with pytest.raises(ValueError, match=f"s.csv.work: in use by process {os.getpid()} on "):
            run()
    assert run()[1].exists() and not (tmp_path / "s.csv.work").exists()


def test_files_of_others_in_the_folder_of_results_stay(run, tmp_path):
    precious = tmp_path / "s.csv.work" / "precious.npy"
    precious.parent.mkdir()
    precious.write_text("mine")
    run()
    assert [path for path in precious.parent.iterdir() if path.name != ".lock"] == [precious]


def test_a_signal_while_the_outputs_are_written_stops_there_too(run, tmp_path, monkeypatch, capfd):
    """Simulating pseudo-labels may take hours: it stops between batches, and goes on with the file."""

    def interrupted(vel):
        signal.raise_signal(signal.SIGINT)
        return torch.zeros(len(vel), 5, 1000, 70)

    monkeypatch.setattr("inference.pseudo.simulated", interrupted)
    words = ("--pseudo", tmp_path / "pseudo", "--pseudo_misfit=100")
    with pytest.raises(SystemExit):
        run(*words)
    assert (tmp_path / "s.csv").exists() and not list((tmp_path / "pseudo").rglob("data*.npy"))
    assert "the same command continues" in capfd.readouterr().err
    monkeypatch.undo()
    run(*words)
    assert list((tmp_path / "pseudo").rglob("data*.npy")) and not (tmp_path / "s.csv.work").exists()
