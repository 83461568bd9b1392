"""bench.py: one table of benchmarks, their options written and explained as the other programs'."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

import bench


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_every_benchmark_explains_its_options_and_names_the_nearest_to_a_wrong_one(name, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([name, "--help"])
    options = re.findall(r"^  --(\w+)=", capsys.readouterr().out, re.M)
    assert stop.value.code == 0 and options
    with pytest.raises(ValueError, match=f"unknown option --{options[0]}x; did you mean --{options[0]}?"):
        bench.main([name, f"--{options[0]}x=1"])


def test_without_a_name_the_benchmarks_are_listed_and_unknown_ones_are_one_line(capsys, refuses):
    with pytest.raises(SystemExit) as stop:
        bench.main([])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"\n  {name} " in printed for name in bench.BENCHMARKS)
    refuses(bench.main, "weve", words=["unknown benchmark 'weve'; did you mean wave?"])
    refuses(bench.main, "wave", "--repeats=0", words=["--repeats=0: expected a positive number"])


@pytest.mark.parametrize(
    "words", [("-m", "benchmarks.ablation"), ("-m", "benchmarks.realism"), ("model.py",)]
)
def test_what_is_no_program_names_the_one_to_use(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "`python bench.py " in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ("inversion --input=x --snr=nan", "--snr=nan: expected a number of dB, or inf"),
        ("inversion --input=x --snr=loud", "--snr=loud: expected a number of dB, or inf"),
        ("inversion --input=x --starts=smoothnan", "--starts=smoothnan: expected network, mean, or smooth"),
        ("inversion --input=x --starts=truth", "--starts=truth: expected network, mean, or smooth"),
        ("wave --who=abc", "--who=abc: expected some of ours, plain, deepwave"),
        ("wave --who=", "--who=: expected some of"),
        ("data --files=10000 --samples=100000", "GB, .* free; fewer --files or --samples"),
    ],
)
def test_words_and_sizes_that_cannot_be_are_one_line_before_any_work(words, message):
    with pytest.raises(ValueError, match=message):
        bench.main(words.split())


def test_the_writers_loops_and_simulators_are_measured(capsys, tmp_path):
    bench.main(["csv", "--n=64"])
    assert "identical bytes" in capsys.readouterr().out
    words = ["--steps=1", "--repeats=1", "--batch_size=2", "--width=8", "--device=cpu", "--threads=1"]
    bench.main(["train", *words, f"--json={tmp_path / 'train.json'}"])
    assert "overhead" in capsys.readouterr().out and (tmp_path / "train.json").is_file()
    bench.main(["wave", "--who=ours", "--batch=1", "--repeats=1", "--device=cpu", "--threads=1"])
    assert len(re.findall(r"^(?:low|high) +1 \w+ +ours", capsys.readouterr().out, re.M)) == 4
