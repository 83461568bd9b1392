"""The examples run and draw; the recipes' commands are commands of today."""

import re
import shlex
import subprocess

import pytest
import torch
from conftest import ROOT

from cfg import Config, parse
from examples import invert_one_gather, simulate_and_gradient, train_tiny_network

RECIPES = sorted((ROOT / "recipes").glob("*.sh"))


def test_the_gradient_example_draws(tmp_path, capsys):
    simulate_and_gradient.main([str(tmp_path / "gradient.png")])
    assert (tmp_path / "gradient.png").stat().st_size > 10_000
    misfit = float(re.search(r"([\d.]+)%", capsys.readouterr().out)[1])
    assert 0.1 < misfit < 20


def test_the_inversion_example_draws_and_comes_nearer(tmp_path, capsys):
    invert_one_gather.main([str(tmp_path / "inversion.png")], minutes=2.0)
    assert (tmp_path / "inversion.png").stat().st_size > 10_000
    before, after = map(float, re.search(r"error ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups())
    assert after < 0.5 * before


def test_the_training_example_learns(tmp_path):
    loss = train_tiny_network.main([str(tmp_path / "network.png")], n_maps=8, n_steps=30)
    assert (tmp_path / "network.png").stat().st_size > 10_000
    assert loss < 450  # untrained: 700 and more


def commands(path):
    """(program, its words) of a recipe's lines that start one of our programs."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line.split("#")[0]) if re.match(r"python|torchrun", line) else []
        for i, word in enumerate(words):
            if word in ("train.py", "infer.py", "synth.py"):
                yield word, words[i + 1 :]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_options_of_today(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    found = list(commands(path))
    assert found
    for program, words in found:
        values = [word.replace("$WEIGHTS", "--pretrained=false") for word in words]
        if program == "synth.py":
            continue
        cfg = parse(values)
        assert isinstance(cfg, Config) and cfg.given


def test_an_option_that_is_gone_would_be_found():
    with pytest.raises(ValueError, match="unknown option"):
        parse(["--no_such_option=1"])
    assert torch.get_num_threads() == 1  # the examples leave threads alone
