import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest

import cfg as cfg_module
import model
from cfg import NETWORK_FIELDS, Config, fields_that_decide, network_config, parse


def test_equals_space_and_bare_forms_agree():
    assert parse(["--batch_size=8", "--tta", "--lr=1"]) == parse(
        ["--batch_size", "8", "--tta=true", "--lr", "1.0"]
    )
    assert parse(["--scse", "--name", "x"]).scse is True
    assert parse(["--scse", "false"]).scse is False
    assert parse(["--batch-size", "3"]).batch_size == 3  # a hyphen does as well


def test_a_bare_tta_is_the_mirror_and_a_list_what_it_says():
    assert parse(["--tta"]).tta == parse(["--tta=true"]).tta == ("mirror",)
    assert parse(["--tta", "false"]).tta == parse([]).tta == ()
    assert parse(["--tta", "--name=x"]) == parse(["--tta=mirror", "--name", "x"])
    assert parse(["--tta=mirror,noise"]).tta == ("mirror", "noise")


def test_pretrained_is_a_switch_or_a_file():
    assert parse([]).pretrained is parse(["--pretrained"]).pretrained is True
    assert parse(["--pretrained=false"]).pretrained is parse(["--pretrained", "no"]).pretrained is False
    assert parse(["--pretrained", "small.pth"]).pretrained == "small.pth"
    with pytest.raises(ValueError, match="pretrained = 1.5 is a float, expected true, false or str"):
        Config(pretrained=1.5)


def test_a_bare_misfit_lists_twenty():
    assert [parse(words).misfit for words in ([], ["--misfit"], ["--misfit=3"], ["--misfit=false"])] == [
        *(0, 20, 3, 0)
    ]


def test_an_architecture_brings_its_own_options_and_explicit_ones_win():
    alone = parse(["--arch=seisnext"])
    assert alone == parse(["--preset=seisnext"])
    assert (alone.name, alone.head, alone.lr) == ("seisnext", "perfect", 1e-3)
    assert parse(["--lr=2e-3", "--arch=seisnext", "--name=mine"]) == dataclasses.replace(
        alone, lr=2e-3, name="mine"
    )
    assert parse(["--preset=demo"]).name == "demo" and parse(["--preset=demo"]).lr == alone.lr
    back = parse(["--preset=demo", "--arch=unet"])
    assert (back.head, back.lr, back.epochs) == (Config.head, Config.lr, 12)
    assert set(cfg_module.ARCHITECTURES) <= set(model.ARCHS)
    for arch in model.ARCHS:
        model.check_model(parse([f"--arch={arch}"]))


@pytest.mark.parametrize("name", cfg_module.GONE)
def test_an_option_that_is_gone_says_what_to_write_instead(name):
    for words in ([f"--{name}=1"], [f"--{name}"], [f"--{name.replace('_', '-')}", "1"]):
        with pytest.raises(ValueError, match=f"--{name} is gone; write --") as error:
            parse(words)
    assert not hasattr(Config, name)
    assert re.search(r"write --(\w+)=", str(error.value))[1] in vars(Config())


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
        (["--scse=perhaps"], "expected true or false"),
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


@pytest.mark.parametrize("program", ["train.py", "infer.py", "bench.py network"])
def test_help_shows_a_programs_own_sections_aligned_with_their_defaults(program, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], program)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 112
    for field in dataclasses.fields(Config):
        assert (f"  --{field.name}=" in text) == (program in field.metadata["programs"])
    for section in ("run:", "network:"):
        assert f"\n{section}" in text
    assert ("\ninference:" in text) == (program in ("train.py", "infer.py"))  # train.py shows --ckpt
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
    assert "pretrained" not in training and "pretrained" not in NETWORK_FIELDS
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


def test_a_checkpoints_options_of_its_architecture_need_not_be_repeated():
    mine = network_config(parse([]), {"cfg": {"arch": "seisnext", "width": 16}})
    assert (mine.head, mine.input_scaling, mine.width) == ("perfect", "signed_log", 16)
    assert network_config(parse(["--head=crop"]), {"cfg": {"arch": "seisnext"}}).head == "crop"
    widths = {"decoder_channels": [16, 8, 8]}  # as JSON has it
    assert network_config(parse(["--decoder_channels=16,8,8"]), {"cfg": widths}).decoder_channels == (
        16,
        8,
        8,
    )


def test_options_of_older_checkpoints_are_understood_and_damaged_ones_named():
    old = dataclasses.asdict(Config(backbone="convnext_atto", pretrained=False))
    old |= {"misfit": False, "flag_worst": 0, "save_every": 1000, "warmup_epochs": 0.0, "pretrained_file": ""}
    assert network_config(parse([]), {"cfg": old}).backbone == "convnext_atto"
    assert network_config(parse([]), {"cfg": None}) == dataclasses.replace(Config(), pretrained=False)
    cfg = parse(["--ckpt=best.pt"])
    for options, message in (
        ("full", "best.pt: its options are a str, expected a dictionary"),
        ({"width": "16"}, "best.pt: its options do not fit: width = '16' is a str, expected int"),
        ({"arch": ["unet"]}, "best.pt: its options do not fit: arch"),
    ):
        with pytest.raises(ValueError, match=message):
            network_config(cfg, {"cfg": options})
