"""Many processes on one piece of work: the bytes of one process, whatever dies."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT, kaggle_folder, words_for
from ranks import Ranks, free_port, kill_this_process, nothing, simulate_at_once

import infer
import inference.run
import parallel.work
import synth
import waves
from inference.results import Results, Work

N_KILLS = int(os.environ.get("N_KILLS", 2))  # docs/experiments has 20
OPTIONS = (
    "--tta",
    "--device=cpu",
    "--refine=feedback",
    "--refine_rounds=1",
    "--post=round",
    "--batch_size=1",
)
N = 5  # gathers


def outputs(folder, name):
    """The bytes of all that a run has written, by name."""
    paths = [path for path in folder.glob(f"{name}*") if path.is_file()]
    paths += (folder / f"{name}-pseudo").rglob("*.npy")
    return {str(path.relative_to(folder)).replace(name, "", 1): path.read_bytes() for path in paths}


@pytest.fixture(autouse=True)
def no_waves(monkeypatch):
    monkeypatch.setattr(waves, "simulate", simulate_at_once)


@pytest.fixture(scope="module")
def gathers(tmp_path_factory):
    return kaggle_folder(tmp_path_factory.mktemp("many") / "test", N)


@pytest.fixture
def words(checkpoint, gathers, tmp_path):
    def make(name, *more):
        out = (
            "--out",
            tmp_path / f"{name}.csv",
            "--pseudo",
            tmp_path / f"{name}-pseudo",
            "--pseudo_misfit=9",
        )
        return words_for(
            checkpoint, "--input", gathers, *OPTIONS, *out, "--save_maps", tmp_path / name, *more
        )

    return make


@pytest.fixture
def whole(words, tmp_path):
    """What one process writes."""
    infer.main(words("whole"))
    return outputs(tmp_path, "whole")


def infer_by(world, words, tmp_path, before=nothing):
    return Ranks(infer.main, words, world, tmp_path, before)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_gives_the_bytes_of_one(whole, words, tmp_path, world):
    codes, printed = infer_by(world, words("many"), tmp_path).wait()
    assert codes == [0] * world, printed
    assert outputs(tmp_path, "many") == whole and len(whole) == 5
    assert sum("maps -> " in text for text in printed) == 1  # rank 0 alone speaks
    assert not list(tmp_path.rglob("*.work"))


def come_and_leave_late(rank):
    join, read = Work.join, Results.open
    if rank:
        Results.open = lambda self: (time.sleep(1), read(self))[1]
        Work.join = lambda *args: (join(*args), time.sleep(2))


def test_the_last_to_leave_needs_rank_0_no_more(words, tmp_path):
    """Rank 0 may hold the store, as where no torchrun started it, and ends before the others."""
    codes, printed = infer_by(2, words("many", "--pseudo="), tmp_path, come_and_leave_late).wait()
    assert codes == [0, 0], printed


def log_puts(path, rank):
    """Note each record in `path` once it is kept."""
    put = Results.put

    def noted(self, numbers, **fields):
        put(self, numbers, **fields)
        with open(path, "a") as file:
            file.write("".join(f"{self.path.stem} {number} {rank}\n" for number in numbers))

    Results.put = noted


def check_each_was_kept_once(puts):
    kept = [line.split()[:2] for line in puts.read_text().splitlines()]
    assert len(kept) == len({tuple(line) for line in kept}) == 2 * N


def test_killed_at_any_time_and_started_again_by_others_it_gives_the_same_bytes(whole, words, tmp_path):
    """`N_KILLS=20 python -m pytest tests/test_many.py -k killed`; all that is done once stays done."""
    draw, puts, n_kills = random.Random(0), tmp_path / "puts", 0
    while n_kills < N_KILLS:
        world = draw.choice([2, 3, 4])
        n_before = puts.stat().st_size if puts.exists() else 0
        ranks = infer_by(world, words("many"), tmp_path, partial(log_puts, puts))
        while ranks.are_running() and not (puts.exists() and puts.stat().st_size > n_before):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        n_kills += ranks.are_running()
        lost = draw.randrange(world)
        ranks.kill([lost])  # torchrun ends the others
        ranks.kill(rank for rank in range(world) if rank != lost)
        codes, printed = ranks.wait()
        assert not any(code > 0 for code in codes), printed
        # results are removed once the outputs are complete: compare these, and kill another run
        if (tmp_path / "many.csv").exists() and not list(tmp_path.glob("many.csv.work/*.bin")):
            assert outputs(tmp_path, "many") == whole
            check_each_was_kept_once(puts)
            for path in [puts, *tmp_path.glob("many*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    codes, printed = infer_by(3, words("many"), tmp_path, partial(log_puts, puts)).wait()
    assert codes == [0, 0, 0], printed
    assert outputs(tmp_path, "many") == whole
    check_each_was_kept_once(puts)
    assert not list(tmp_path.rglob("*.work"))


def log_puts_and_be_slow(path, rank):
    log_puts(path, rank)
    put = Results.put
    if rank:
        Results.put = lambda *args, **fields: (time.sleep(3), put(*args, **fields))


def test_a_slow_process_takes_fewer_batches_and_holds_nobody(words, tmp_path):
    puts = tmp_path / "puts"
    codes, printed = infer_by(2, words("many"), tmp_path, partial(log_puts_and_be_slow, puts)).wait()
    assert codes == [0, 0], printed
    of_rank_1 = [line for line in puts.read_text().splitlines() if line.endswith(" 1")]
    assert len(of_rank_1) <= 2  # one of each stage


def log_puts_or_die(path, rank):
    parallel.work.ERROR_GRACE_S = 0.5
    log_puts(path, rank)
    if rank == 1:
        Results.put = kill_this_process


def test_a_lost_process_is_said_by_the_others_and_loses_its_batch_alone(whole, words, tmp_path):
    puts = tmp_path / "puts"
    codes, printed = infer_by(3, words("many"), tmp_path, partial(log_puts_or_die, puts)).wait()
    assert codes == [2, -signal.SIGKILL, 2], printed
    for text in (printed[0], printed[2]):
        last = text.strip().splitlines()[-1]
        assert "another process has ended (" in last and "the same command continues" in last, text
    assert len(puts.read_text().splitlines()) == N - 1
    infer.main(words("many"))  # by one process
    assert outputs(tmp_path, "many") == whole


def signalled(rank):
    put = Results.put
    Results.put = lambda *args, **fields: (signal.raise_signal(signal.SIGTERM), put(*args, **fields))


def test_a_signal_to_all_keeps_their_batches_and_is_said_once(whole, words, tmp_path):
    codes, printed = infer_by(2, words("many"), tmp_path, signalled).wait()
    assert codes == [128 + signal.SIGTERM] * 2, printed
    assert sum("stopped by SIGTERM; what is done is kept" in text for text in printed) == 1
    codes, printed = infer_by(2, words("many"), tmp_path).wait()
    assert codes == [0, 0] and f"going on, 2 of {N} done" in printed[0]
    assert outputs(tmp_path, "many") == whole


# ---------------------------------------------------------------- what is not the same everywhere


def refused(world, words, folder, before, *expected):
    """All processes end soon, and rank 0 alone says why, in one line."""
    since = time.monotonic()
    codes, printed = infer_by(world, words, folder, before).wait(60)
    assert codes == [2] * world and time.monotonic() - since < 60, printed
    lines = "".join(printed).strip().splitlines()
    assert len(lines) == 1 and printed[0] and all(word in lines[0] for word in expected), lines
    assert not list(folder.glob("*.csv"))


def add_option(which, option, rank):
    parallel.work.ERROR_GRACE_S = 0.5
    if rank == which:
        sys.argv.append(option)


def other_code(rank):
    parallel.work.ERROR_GRACE_S = 0.5
    if rank == 1:
        inference.run.code_version = lambda: "another"


def other_gathers(rank):
    parallel.work.ERROR_GRACE_S = 0.5
    if rank == 1:
        read = inference.run.GatherDataset._read_into
        inference.run.GatherDataset._read_into = lambda self, i, row: [1, *read(self, i, row)[1:]]


def homes_of_their_own(folder, rank):
    parallel.work.ERROR_GRACE_S, parallel.work.SEEN_S = 0.5, 0.2
    home = folder / f"home{rank}"
    (home / "s.csv.work").mkdir(parents=True)
    os.chdir(home)


def test_other_options_than_rank_0s_are_refused(words, tmp_path):
    before = partial(add_option, 1, "--post=clip")
    refused(2, words("many"), tmp_path, before, "process 1 on ", "--post = ('clip',)", "('round',)")


def test_other_code_and_other_gathers_are_refused(words, tmp_path):
    refused(2, words("many"), tmp_path, other_code, "process 1 on ", "has code = another", "the same code")
    refused(2, words("many"), tmp_path, other_gathers, "process 1 on ", "has gathers' contents = ")


def test_what_one_process_cannot_read_is_said_by_rank_0(words, tmp_path):
    before = partial(add_option, 2, f"--input={tmp_path / 'none'}")
    refused(3, words("many"), tmp_path, before, "program.py: error: process 2 on ", "none: ")


def test_a_folder_that_is_not_shared_is_refused(words, tmp_path):
    expected = ("process 1 on ", "home1/s.csv.work: not the folder that process 0 has", "machines share")
    before = partial(homes_of_their_own, tmp_path)
    refused(2, [*words("many"), "--out=s.csv"], tmp_path, before, *expected)


# ---------------------------------------------------------------- data sets


def synth_by(world, out, folder, *more, before=nothing):
    options = ["--families=FlatVel_A,FlatFault_A", "--n_per_family=9", "--per_file=3", "--device=cpu"]
    return Ranks(synth.main, [f"--out={out}", *options, "--threads=1", *more], world, folder, before)


def files_of(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.name != ".lock"}


def log_simulated(path, rank):
    """Note each batch in `path`."""

    def simulate(vel, n_samples):
        with open(path, "a") as file:
            file.write(f"{len(vel)}\n")
        return simulate_at_once(vel)

    waves.simulate = simulate


def log_simulated_or_die(path, rank):
    """Rank 1 is lost in its first file."""
    parallel.work.ERROR_GRACE_S = 0.5
    log_simulated(path, rank)
    if rank == 1:
        waves.simulate = kill_this_process


def test_data_sets_made_by_many_and_killed_on_the_way_have_the_bytes_of_one_process(tmp_path):
    whole, many, simulated = tmp_path / "whole", tmp_path / "many", tmp_path / "simulated"
    codes, printed = synth_by(1, whole, tmp_path).wait()
    assert codes == [0], printed
    codes, printed = synth_by(2, many, tmp_path, before=partial(log_simulated_or_die, simulated)).wait()
    assert codes == [2, -signal.SIGKILL] and "another process has ended (" in printed[0], printed
    n_files = len(simulated.read_text().splitlines())
    assert n_files == 5  # all but that of rank 1, which held nobody
    codes, printed = synth_by(3, many, tmp_path, before=partial(log_simulated, simulated)).wait()
    assert codes == [0, 0, 0] and sum("complete: " in text for text in printed) == 1, printed
    assert len(simulated.read_text().splitlines()) == 6  # what was done is not made again
    assert files_of(many) == files_of(whole) and len(files_of(whole)) == 14


def test_data_sets_of_other_options_or_folders_are_refused_in_one_line(tmp_path):
    for out, before, words in (
        (tmp_path / "out", partial(add_option, 1, "--seed=1"), "process 1 on "),
        ("out", partial(homes_of_their_own, tmp_path), "out: not the folder that process 0 has here"),
    ):
        codes, printed = synth_by(2, out, tmp_path, before=before).wait(60)
        lines = "".join(printed).strip().splitlines()
        assert codes == [2, 2] and len(lines) == 1 and words in lines[0], printed
    codes, printed = synth_by(2, tmp_path / "out", tmp_path, "--per_file=0").wait(60)
    assert codes == [2, 2] and all("--per_file=0: expected a positive number" in text for text in printed)


# ---------------------------------------------------------------- torchrun


@pytest.mark.slow
def test_two_nodes_of_torchrun_go_on_after_a_loss_on_one_of_them(whole, words, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        f"import os, pathlib, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import infer, utils, waves\nfrom inference.results import Results\nput = Results.put\n"
        "waves.simulate = lambda vel: (vel[:, :, :1] / 1000).repeat(1, 5, 1000, 1)\n"
        f"dead = pathlib.Path({str(tmp_path / 'dead')!r})\n"
        "def die(*args, **fields):\n"
        "    put(*args, **fields)\n"
        "    if os.environ['RANK'] == '1' and not dead.exists():\n"
        "        dead.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Results.put = die\n"
        "utils.run_program(infer.main)\n"
    )
    launcher = [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{free_port()}",
        "--rdzv-id=two",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launcher,
        "--nproc_per_node=1",
        "--max-restarts=2",
    ]
    command += [str(script), *words("many")]
    nodes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert (tmp_path / "dead").exists() and outputs(tmp_path, "many") == whole
