"""Every command in the README, the pages, the recipes and EXPERIMENTS.md is one that the programs accept."""

import dataclasses
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT

import bench
from benchmarks.train_speed import TrainSpeedOptions
from cfg import GONE, INFER, Config, parse
from data import percents
from inference.refine import check_method
from inference.tta import make_views
from model import check_model
from openfwi.inspect_data import parse_arguments
from options.command_line import read_words
from postprocess import check_steps
from synth import SynthOptions
from training.loss import parse_family_weights
from training.publish import PublishOptions

RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
PAGES = [ROOT / "README.md", ROOT / "EXPERIMENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(?:train|infer|synth|bench|data)\.py$|training\.publish$")


def code_of(page):
    """The shell code of a page of Markdown: lines of its blocks, and its inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return "\n".join([*blocks, *inline])


def commands(code):
    """(program, its words) of every command that starts one of our programs; shell variables filled in."""
    variables = {}
    for line in code.replace("\\\n", " ").splitlines():
        if assigned := re.match(r"([A-Z]+)=(?:\$\{[A-Z]+:-)?([^}]*)\}?$", line.strip()):
            variables[assigned[1]] = assigned[2]
        for command in re.split(r"&&|;", line):
            words = shlex.split(command, comments=True) if ".py" in command or "training." in command else []
            words = [re.sub(r"\$([A-Z]+)", lambda m: variables.get(m[1], m[0]), word) for word in words]
            found = next((i for i, word in enumerate(words) if PROGRAM.search(word)), None)
            if found is not None and words[0] != "git":
                yield words[found], words[found + 1 :]


def check(program, words):
    """Raise ValueError unless the program accepts the words. Files and folders need not exist."""
    words = [word for word in words if word not in ("--help", "…")]
    if program == "train.py":
        cfg = parse(words)
        check_model(cfg)
        parse_family_weights(cfg.family_weights)
        percents(cfg)
    elif program == "infer.py":
        cfg = parse(words, INFER)
        make_views(cfg.tta)
        check_steps([step for step in cfg.post if step != "auto"])
        check_method(cfg.refine)
    elif program == "synth.py":
        SynthOptions(**read_words(words, SynthOptions))
    elif program == "data.py":
        parse_arguments(words or ["DIR"])
    elif program == "bench.py" and words:
        options = bench.BENCHMARKS[words[0]][0]
        if options is None:
            parse(words[1:], options=TrainSpeedOptions)
        else:
            options(**read_words(words[1:], options))
    elif program.endswith("publish"):
        PublishOptions(**read_words(words, PublishOptions))


@pytest.mark.parametrize(
    "page", [p for p in (*PAGES, *RECIPES) if p.name != "config.md"], ids=lambda p: p.name
)
def test_commands_are_accepted(page):
    code = code_of(page) if page.suffix == ".md" else page.read_text(encoding="utf-8")
    found = list(commands(code))
    assert found
    for program, words in found:
        try:
            check(program, words)
        except (ValueError, KeyError) as error:
            pytest.fail(f"{page.name}: {program} {' '.join(words)}: {error}")


def check_options_named_alone(text):
    """Fail for an option that a text names outside of commands, unless it exists and takes its value."""
    declared = {field.name for field in dataclasses.fields(Config)}
    for options in (SynthOptions, PublishOptions, *(o for o, _ in bench.BENCHMARKS.values() if o)):
        declared |= {field.name for field in dataclasses.fields(options)}
    declared |= {"preset", "help", "verify", "pack", "nproc_per_node", "nnodes", "max_restarts"}
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    for code in re.findall(r"`(--[^`\n]+)`", text):
        for word in code.split():
            name, equals, value = word.removeprefix("--").partition("=")
            assert not word.startswith("--") or name in declared, word
            is_example = (
                equals and not re.search(r"[A-Z]|…|\.\.\.", value) and name in (*vars(Config()), "preset")
            )
            if is_example:
                parse([word])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_named_on_their_own_exist_and_take_their_values(page):
    check_options_named_alone(page.read_text(encoding="utf-8"))


def test_an_option_named_on_its_own_that_does_not_exist_or_takes_other_values_would_be_found():
    with pytest.raises(AssertionError, match="--nothing"):
        check_options_named_alone("Add `--nothing=1`.")
    with pytest.raises(ValueError, match="--lr=fast: expected float"):
        check_options_named_alone("Add `--lr=fast`.")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_shell(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.parametrize("name", GONE)
def test_a_command_with_an_option_that_is_gone_would_be_found(name):
    page = SimpleNamespace(read_text=lambda encoding: f"```sh\npython train.py --{name}=1\n```\n")
    ((program, words),) = commands(code_of(page))
    with pytest.raises(ValueError, match=f"--{name} is gone"):
        check(program, words)


def test_commands_are_found_in_blocks_inline_and_in_scripts():
    text = "```sh\na && python train.py --lr=1 \\\n  --smoke\n```\n`torchrun train.py` and `data.py`"
    page = SimpleNamespace(read_text=lambda encoding: text)
    found = [("train.py", ["--lr=1", "--smoke"]), ("train.py", []), ("data.py", [])]
    assert list(commands(code_of(page))) == found
    script = 'W=--pretrained=false\nD=${D:-x}\npython train.py "$W" --data_root="$D/y"  # no --such'
    assert list(commands(script)) == [("train.py", ["--pretrained=false", "--data_root=x/y"])]
    with pytest.raises(ValueError, match="unknown option --nothing"):
        check("bench.py", ["wave", "--nothing=1"])
