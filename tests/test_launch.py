"""What happens before training: a process for each card."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, SMALL, kaggle_folder, words_for

import infer
import train
from cfg import Config
from networks.checkpoints import load_checkpoint
from parallel.launch import launch
from training.launch import memory_explained


def test_several_cards_start_a_process_each_unless_torchrun_has(monkeypatch):
    commands = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "execv", lambda path, words: commands.append(words))
    monkeypatch.setattr("utils._is_program", True)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="data_openfwi: no such folder"):
        train.main(["--arch=seisnext"])
    assert not commands
    launch(Config(), "train.py", ["--lr=1"])
    assert "--nproc_per_node=3" in commands[0] and commands[0][-1] == "--lr=1"
    for cfg in (Config(gpus="1"), Config(device="cpu")):
        launch(cfg, "train.py", [])
    monkeypatch.setenv("RANK", "0")
    launch(Config(), "train.py", [])
    assert len(commands) == 1
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="--gpus=4: 3 CUDA devices found"):
        launch(Config(gpus="4"), "train.py", [])
    for wrong in ("many", "-1", "²"):
        with pytest.raises(ValueError, match="expected a positive number or auto"):
            Config(gpus=wrong)
    with pytest.raises(ValueError, match="--gpus=0 is gone; write --device=cpu"):
        Config(gpus="0")


def test_infer_starts_no_more_processes_than_there_are_gathers(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(os, "execv", lambda path, words: commands.append(words) or sys.exit(0))
    monkeypatch.setattr("utils._is_program", True)
    monkeypatch.delenv("RANK", raising=False)
    words = ["--ckpt=a.pt", f"--input={kaggle_folder(tmp_path / 'test', 3)}"]
    with pytest.raises(SystemExit):
        infer.main(words)
    assert "--nproc_per_node=3" in commands[0] and commands[0][-2:] == words
    with pytest.raises(ValueError, match="none: "):
        infer.main(["--ckpt=a.pt", f"--input={tmp_path / 'none'}"])


def test_a_missing_data_folder_is_reported_before_missing_weights(tmp_path, refuses):
    words = (f"--data_root={tmp_path / 'none'}", f"--pretrained={tmp_path / 'none.pth'}", "--threads=1")
    refuses(train.main, *words, words=["none: no such folder", "--data_root=DIR"])
    (tmp_path / "none").mkdir()
    refuses(train.main, *words, words=["none.pth: no such checkpoint", "--pretrained=false"])


def test_a_call_from_python_keeps_to_its_process_and_leaves_it_as_it_was(train_here, monkeypatch, capsys):
    """In a thread, with two cards there; signals, streams and torch's settings are the caller's."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        "parallel.processes.keep_memory", lambda: pytest.fail("the process's memory is the caller's")
    )
    torch.set_num_threads(2)
    try:
        before = sys.stdout, sys.getswitchinterval(), signal.getsignal(signal.SIGINT), torch.get_num_threads()
        with ThreadPoolExecutor(1) as pool:
            folder = pool.submit(train_here, "--device=auto", "--deterministic", "--workers=1").result()
        after = sys.stdout, sys.getswitchinterval(), signal.getsignal(signal.SIGINT), torch.get_num_threads()
    finally:
        torch.set_num_threads(1)
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] == 8
    assert before == after and not torch.are_deterministic_algorithms_enabled()
    assert "using one of 2 cards, as called from Python" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--gpus=2: a call from Python uses one card"):
        train_here("--device=auto", "--gpus=2")


def test_weights_and_biases_that_is_missing_or_not_logged_in_is_reported_before_data_are_read(
    tmp_path, monkeypatch, refuses
):
    words = [f"--data_root={tmp_path}", "--arch=seisnext"]  # the folder holds no data
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    refuses(train.main, *words, "--wandb=online", words=["--wandb=online: not logged in", "--wandb=offline"])

    def fails(prompt):
        raise wandb.Error("no network\nat all")

    monkeypatch.setattr(wandb, "login", fails)
    refuses(train.main, *words, "--wandb=online", words=["--wandb=online: no network; call `wandb login`"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    refuses(train.main, *words, "--wandb=offline", words=["wandb is not installed; pip install wandb"])


def test_a_missing_compiler_is_reported_before_data_are_read(tmp_path):
    words = [
        f"--data_root={tmp_path}",
        "--arch=seisnext",
        "--head=perfect",
        "--device=cpu",
        "--compile=default",
    ]
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", *words],
        env={"CXX": "/no/compiler", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("train.py: error: --compile=default does not work on cpu here (")
    assert "leave --compile out" in result.stderr and len(result.stderr.splitlines()) == 1


def too_much():
    torch.empty(1 << 60)


def too_much_on_a_card():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")


def too_much_for_python():
    raise MemoryError


@pytest.mark.parametrize("fails", [too_much, too_much_on_a_card, too_much_for_python])
@pytest.mark.parametrize(
    "size, remedy",
    [
        (4, "--batch_size=2 --accumulate=2 makes the same steps"),
        (3, "--batch_size=1 needs"),
        (1, "smaller network"),
    ],
)
def test_running_out_of_memory_is_one_line_with_the_option_to_change(
    two_families, tmp_path, monkeypatch, refuses, fails, size, remedy
):
    monkeypatch.setattr(train, "mean_map", lambda items: fails())
    words = [f"--data_root={two_families}", f"--run_root={tmp_path}", *SMALL, f"--batch_size={size}"]
    refuses(train.main, *words, words=[f"out of memory on cpu with --batch_size={size}", remedy])


@pytest.mark.parametrize("fails", [too_much, too_much_on_a_card, too_much_for_python])
@pytest.mark.parametrize("size, remedy", [(4, "--batch_size=2 needs less"), (1, "a smaller network")])
def test_predicting_out_of_memory_is_one_line_too(
    checkpoint, tmp_path, monkeypatch, refuses, fails, size, remedy
):
    monkeypatch.setattr(infer, "Run", lambda *args: fails())
    words = words_for(
        checkpoint, f"--input={tmp_path}", f"--out={tmp_path / 's.csv'}", f"--batch_size={size}"
    )
    message = f"out of memory on cpu with --batch_size={size}"
    refuses(infer.main, *words, "--device=cpu", words=[message, f"); {remedy}"])


def test_predicting_says_before_gathers_are_read_that_compiling_does_not_work(
    checkpoint, tmp_path, monkeypatch, refuses
):
    def fails(*args, **options):
        raise RuntimeError("No working C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(infer, "Run", None)
    words = words_for(checkpoint, f"--input={tmp_path}", f"--out={tmp_path / 's.csv'}", "--compile=default")
    refuses(infer.main, *words, "--device=cpu", words=["(No working C++ compiler); install what"])


@pytest.mark.parametrize("name", ["", "a/b", "../../evil", "a\\b", "a\nb"])
def test_names_that_are_none_of_a_folder_are_refused_before_data_are_read(refuses, name):
    refuses(train.main, f"--name={name}", words=["--name=", "expected a name for a folder"])


def test_other_runtime_errors_keep_their_traceback():
    for words in ("size mismatch", "an illegal memory access was encountered"):
        with pytest.raises(RuntimeError, match=words), memory_explained(Config(), torch.device("cpu")):
            raise RuntimeError(words)
