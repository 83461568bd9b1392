import dataclasses

import pytest

import cfg as cfg_module
from cfg import Config, network_config, parse


def test_equals_space_and_bare_forms_agree():
    assert parse(["--batch_size=8", "--tta", "--lr=1"]) == parse(
        ["--batch_size", "8", "--tta=true", "--lr", "1.0"]
    )
    assert parse(["--tta", "--name", "x"]).tta is True
    assert parse(["--tta", "false"]).tta is False


def test_later_words_and_overrides_win_over_the_preset():
    assert parse(["--name=mine", "--preset=demo"]).name == "mine"
    assert parse(["--epochs=1", "--epochs=2"]).epochs == 2
    assert parse(["--preset=demo"]) != parse([]) == Config()


def test_sequences_are_comma_separated():
    cfg = parse(["--families=FlatVel_A,Style_B", "--decoder_channels=8,4"])
    assert cfg.families == ("FlatVel_A", "Style_B") and cfg.decoder_channels == (8, 4)


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
        (["--tta=perhaps"], "expected true or false"),
        (["--preset=dem"], "did you mean demo?"),
        (["--precision=half"], "expected one of auto, float32"),
        (["--batch_size=0"], "expected a positive number"),
        (["--workers=-1"], "expected 0 or more"),
        (["--val_share=1"], "between 0 and 1"),
        (["--flip_p=2"], "expected at most 1"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        parse(words)
    assert "\n" not in str(error.value)


def test_a_wrong_type_edited_into_the_file_is_refused():
    with pytest.raises(ValueError, match="epochs = '3' is a str, expected int"):
        Config(epochs="3")
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
