import dataclasses
import sys
import types
from pathlib import Path

import pytest

import cfg as cfg_module
from cfg import NETWORK_FIELDS, Config, fields_that_decide, network_config, parse


def test_equals_space_and_bare_forms_agree():
    assert parse(["--batch_size=8", "--tta", "--lr=1"]) == parse(
        ["--batch_size", "8", "--tta=true", "--lr", "1.0"]
    )
    assert parse(["--misfit", "--name", "x"]).misfit is True
    assert parse(["--misfit", "false"]).misfit is False
    assert parse(["--flag-worst", "3"]).flag_worst == 3  # a hyphen does as well


def test_a_bare_tta_is_the_mirror_and_a_list_what_it_says():
    assert parse(["--tta"]).tta == parse(["--tta=true"]).tta == ("mirror",)
    assert parse(["--tta", "false"]).tta == parse([]).tta == ()
    assert parse(["--tta", "--name=x"]) == parse(["--tta=mirror", "--name", "x"])
    assert parse(["--tta=mirror,noise"]).tta == ("mirror", "noise")


def test_later_words_and_overrides_win_over_the_preset():
    assert parse(["--name=mine", "--preset=demo"]).name == "mine"
    assert parse(["--epochs=1", "--epochs=2"]).epochs == 2
    assert parse(["--preset=demo"]) != parse([]) == Config()


def test_sequences_are_comma_separated():
    cfg = parse(["--families=FlatVel_A,Style_B", "--decoder_channels=8,4"])
    assert cfg.families == ("FlatVel_A", "Style_B") and cfg.decoder_channels == (8, 4)
    assert parse(["--data_root=2024,b"]).data_root == ("2024", "b")


def test_a_default_edited_in_the_file_keeps_the_fields_type(monkeypatch):
    source = Path(cfg_module.__file__).read_text().replace("training(3.0,", "training(3,")
    edited = types.ModuleType("edited_cfg")
    sys.modules["edited_cfg"] = edited
    exec(source, edited.__dict__)
    assert edited.parse(["--clip_norm=2.5"]).clip_norm == 2.5
    exec(source.replace("training(40,", 'training("40",'), edited.__dict__)
    with pytest.raises(ValueError, match="epochs = '40' is a str, expected int"):
        edited.Config()
    del sys.modules["edited_cfg"]


def test_every_preset_is_valid_and_every_field_survives_a_round_trip():
    for preset in cfg_module.PRESETS:
        cfg = parse([f"--preset={preset}"])
        assert Config(**dataclasses.asdict(cfg)) == cfg


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batchsize=8"], "did you mean --batch_size?"),
        (["batch_size=8"], "unknown option"),
        (["--batch_size=many"], "expected int, got 'many'"),
        (["--batch_size"], "needs a value"),
        (["--misfit=perhaps"], "expected true or false"),
        (["--ensemble_weights=a"], "expected numbers"),
        (["--post"], "needs a value"),
        (["--preset=dem"], "did you mean demo?"),
        (["--precision=half"], "expected one of auto, float32"),
        (["--batch_size=0"], "expected a positive number"),
        (["--workers=-1"], "expected 0 or more"),
        (["--val_share=1"], "expected at most 0.999"),
        (["--flip_p=2"], "expected at most 1"),
        (["--fusion_weights=a,1"], "expected numbers divided by commas, got 'a'"),
        (["--data_root="], "at least one folder"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        parse(words)
    assert "\n" not in str(error.value)


def test_a_wrong_type_edited_into_the_file_is_refused():
    with pytest.raises(ValueError, match="epochs = '3' is a str, expected int"):
        Config(epochs="3")
    with pytest.raises(ValueError, match="expected whole numbers"):
        Config(decoder_channels=("a", 1, 2))
    assert Config(lr=1).lr == 1.0 and isinstance(Config(lr=1).lr, float)  # an int may serve for a float


@pytest.mark.parametrize("program", ["train", "infer"])
def test_help_shows_a_programs_own_sections_aligned_with_their_defaults(program, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], program)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 112
    for field in dataclasses.fields(Config):
        assert (f"  --{field.name}=" in text) == (program in field.metadata["programs"])
    for section in ("run:", "network:"):
        assert f"\n{section}" in text
    assert ("\ninference:" in text) == (program == "infer") or program == "train"
    column = next(line for line in text.splitlines() if line.startswith("  --width=32")).index("seisnext:")
    assert next(line for line in text.splitlines() if line.startswith("  --batch_size=16"))[column - 1] == " "


def test_what_an_interrupted_run_depends_on_is_told_by_the_fields():
    training, predictions, maps = map(fields_that_decide, ("training", "predictions", "maps"))
    assert {"lr", "seed", "families", "noise_p", "online", "backbone", "smoke"} <= set(training)
    assert not {"name", "resume", "workers", "batch_size", "log_every", "tta", "out"} & set(training)
    assert set(NETWORK_FIELDS) <= set(predictions) <= set(maps)
    assert {"refine", "refine_minutes", "post"} <= set(maps) - set(predictions)
    assert {"tta", "combine", "precision"} <= set(predictions)
    assert not {"ckpt", "input", "out", "figures", "pseudo", "device", "workers"} & set(maps)
    assert "pretrained" in training and "pretrained" not in NETWORK_FIELDS
    inference = {f.name for f in dataclasses.fields(Config) if f.metadata["section"].name == "inference"}
    assert not inference & set(training)
    with pytest.raises(AssertionError):
        fields_that_decide("all")


def test_a_checkpoint_brings_its_own_network():
    checkpoint = {"cfg": dataclasses.asdict(Config(backbone="convnext_atto", pretrained=False))}
    assert network_config(parse([]), checkpoint).backbone == "convnext_atto"
    assert network_config(parse(["--backbone=convnext_nano"]), {"model": {}}).backbone == "convnext_nano"
    with pytest.raises(ValueError, match="leave out --backbone"):
        network_config(parse(["--backbone=convnext_nano"]), checkpoint)
