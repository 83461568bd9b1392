import dataclasses
import sys
import types
from pathlib import Path

import pytest

import cfg as cfg_module
from cfg import Config, network_config, parse


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
    source = Path(cfg_module.__file__).read_text().replace("clip_norm: float = 3.0", "clip_norm: float = 3")
    edited = types.ModuleType("edited_cfg")
    sys.modules["edited_cfg"] = edited
    exec(source, edited.__dict__)
    assert edited.parse(["--clip_norm=2.5"]).clip_norm == 2.5
    exec(source.replace("epochs: int = 40", 'epochs: int = "40"'), edited.__dict__)
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
        (["--refine=magic"], "expected one of none, feedback"),
        (["--ensemble_weights=a"], "expected numbers"),
        (["--post"], "needs a value"),
        (["--preset=dem"], "did you mean demo?"),
        (["--precision=half"], "expected one of auto, float32"),
        (["--batch_size=0"], "expected a positive number"),
        (["--workers=-1"], "expected 0 or more"),
        (["--val_share=1"], "between 0 and 1"),
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
    with pytest.raises(ValueError, match="expected numbers"):
        Config(decoder_channels=("a", 1, 2))
    assert Config(lr=1).lr == 1.0 and isinstance(Config(lr=1).lr, float)  # an int may serve for a float


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"{field.name}:" in text for field in dataclasses.fields(Config))


def test_a_checkpoint_brings_its_own_network():
    checkpoint = {"cfg": dataclasses.asdict(Config(backbone="convnext_atto", pretrained=False))}
    assert network_config(parse([]), checkpoint).backbone == "convnext_atto"
    assert network_config(parse(["--backbone=convnext_nano"]), {"model": {}}).backbone == "convnext_nano"
    with pytest.raises(ValueError, match="leave out --backbone"):
        network_config(parse(["--backbone=convnext_nano"]), checkpoint)
