import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import CPU, NETWORK, kaggle_folder, maps_of, run_cli, words_for, write_pair

from cfg import Config, parse
from infer import infer, main
from inference.ensemble import Member
from inference.pseudo import write_pseudo
from inference.submission import HEADER, submission_rows
from inference.tta import make_views, predict
from model import build_model
from networks.checkpoints import save_checkpoint
from openfwi.files import find_pairs
from openfwi.gathers import GatherDataset, find_gathers, find_truths, read_truth
from utils import mirror_survey
from waves.equation import simulate
from waves.misfit import log_misfit, misfit


def simple_rows(oid, vel):
    """The obvious writer that the fast one must equal."""
    lines = [
        f"{oid}_y_{y}," + ",".join(f"{v:.2f}" for v in row[1::2]) for y, row in enumerate(vel.astype(float))
    ]
    return "".join(line + "\n" for line in lines).encode()


def test_fast_rows_equal_the_simple_writers():
    rng = np.random.default_rng(0)
    vel = rng.uniform(1500, 4500, (70, 70)).astype(np.float32)
    vel[0], vel[1], vel[2] = 1500, 4500, np.nextafter(np.float32(2000), 0)
    assert submission_rows("000039dca2", vel) == simple_rows("000039dca2", vel)


def test_kaggle_folder_gives_the_competitions_csv_and_maps(tmp_path, checkpoint):
    folder = kaggle_folder(tmp_path / "test", 3)
    out, maps = tmp_path / "deep" / "submission.csv", tmp_path / "maps"
    args = words_for(checkpoint, "--input", folder, "--out", out, "--save_maps", maps, "--batch_size=2")
    result = run_cli("infer.py", *args)
    assert result.returncode == 0, result.stderr
    text = out.read_text()
    assert (
        text.startswith("oid_ypos,x_1,x_3,x_5,")
        and text.startswith(HEADER)
        and text.count("\n") == 1 + 3 * 70
    )
    rows = list(csv.reader(text.splitlines()))
    assert [row[0] for row in rows[1:]] == [f"{i:010x}_y_{y}" for i in range(3) for y in range(70)]
    values = np.array([row[1:] for row in rows[1:]], float).reshape(3, 70, 35)
    assert values.min() >= 1500 and values.max() <= 4500
    for i in range(3):
        saved = np.load(maps / f"{i:010x}.npy")
        assert saved.shape == (70, 70) and saved.dtype == np.float32
        np.testing.assert_allclose(saved[:, 1::2], values[i], atol=0.00501)
    assert sorted(p.name for p in tmp_path.rglob("*.part")) == []


def test_openfwi_files_are_scored_per_family(tmp_path, checkpoint):
    for family in ("FlatVel_A", "FlatFault_B"):
        write_pair(tmp_path, family, n=2)
    out = tmp_path / "s.csv"
    args = words_for(checkpoint, "--input", tmp_path, "--truth", tmp_path, "--out", out)
    score = infer(parse(args), CPU)
    assert {name: n for name, (_, n) in score.items()} == {"FlatVel_A": 2, "FlatFault_B": 2, "all": 4}
    assert "FlatVel_A_data_data1_0_y_0," in out.read_text()


def test_mirror_tta_of_a_mirrored_survey_is_the_mirrored_map(checkpoint):
    network = build_model(Config(**NETWORK)).eval()
    seis = torch.randn(2, 5, 1000, 70)
    with torch.no_grad():
        for names, equal in ((("mirror",), True), ((), False)):
            views = make_views(names)
            plain, mirrored = predict(network, seis, views), predict(network, mirror_survey(seis), views)
            assert torch.allclose(mirrored, plain.flip(3), atol=1e-2) == equal


@pytest.mark.realdata
def test_real_gather_gives_70_rows_in_range(tmp_path, checkpoint, shared_data):
    out = tmp_path / "real.csv"
    main(words_for(checkpoint, "--input", shared_data / "gather", "--out", out, "--tta"))
    rows = list(csv.reader(out.open()))[1:]
    assert [row[0] for row in rows] == [f"000039dca2_y_{y}" for y in range(70)]
    values = np.array([row[1:] for row in rows], float)
    assert values.shape == (70, 35) and values.min() >= 1500 and values.max() <= 4500


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, checkpoint, refuses):
    out = tmp_path / "s.csv"

    def refuse(*args, words, ckpt=checkpoint):
        refuses(main, *words_for(ckpt, "--out", out, *args), words=words)
        assert not list(tmp_path.rglob("*.csv")) and not list(tmp_path.rglob("*.part"))

    good = kaggle_folder(tmp_path / "good", 1)
    (tmp_path / "empty").mkdir()
    refuse("--input", tmp_path / "none", words=["no such file or folder"])
    refuse("--input", tmp_path / "empty", words=["no gathers in it"])
    refuse("--input", good, "--truth", tmp_path / "none", words=["no such folder"])
    refuse("--input", good, "--truth", tmp_path / "empty", words=["0 true maps 0000000000.npy"])
    refuse("--input", good, ckpt=tmp_path / "none.pt", words=["none.pt: no such checkpoint"])
    (tmp_path / "bad.pt").write_bytes(checkpoint.read_bytes()[:1000])
    refuse("--input", good, ckpt=tmp_path / "bad.pt", words=["bad.pt: not a readable checkpoint"])
    save_checkpoint(tmp_path / "empty.pt", {"epoch": 3})
    refuse("--input", good, ckpt=tmp_path / "empty.pt", words=["empty.pt: holds no weights"])
    refuse("--input", good, "--width=32", words=["small.pt: does not fit this network"])
    refuse("--input", good, "--out", checkpoint / "s.csv", words=["small.pt: cannot be written"])
    refuse("--input", good, "--out", good, words=["good: is a folder; give a file"])
    (tmp_path / "short").mkdir()
    _, vel = write_pair(tmp_path / "short", "FlatVel_A", n=3)
    np.save(vel, np.load(vel)[:2])
    refuse("--input", tmp_path / "short", "--truth", tmp_path / "short", words=[vel, "2 maps, fewer than"])
    refuse("--input", good, "--save_maps", checkpoint / "maps", words=["maps: cannot be written"])
    for name, array, words in (
        (
            "shape",
            np.zeros((5, 999, 70), np.float32),
            ["(5, 999, 70), expected (5, 1000, 70) or (n, 5, 1000, 70)"],
        ),
        ("type", np.ones((5, 1000, 70), np.complex64), ["dtype complex64"]),
        ("scaled", np.full((5, 1000, 70), 9000, np.int16), ["amplitudes up to 9e+03 in int16", "divide by"]),
        ("huge", np.full((5, 1000, 70), 3e38, np.float32), ["amplitudes up to 3e+38"]),
        ("zero", np.zeros((5, 1000, 70), np.float32), ["all zeros"]),
        ("nan", np.full((5, 1000, 70), np.nan, np.float32), ["sample 0", "NaN"]),
    ):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", array)
        refuse("--input", tmp_path / name, words=[tmp_path / name / "x.npy", *words])
    refuses(main, words=["--input=PATH is needed"])


# ---------------------------------------------------------------- ensembles, fits, refining, what is printed


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A checkpoint of ours, of another architecture and input mode."""
    torch.manual_seed(1)
    cfg = Config(backbone="convnext_atto", mode="small_72x72", pretrained=False, classify_family=True)
    path = tmp_path_factory.mktemp("ckpt") / "second.pt"
    save_checkpoint(path, {"model": build_model(cfg).state_dict(), "cfg": dataclasses.asdict(cfg)})
    return path


def test_checkpoints_of_different_kinds_are_averaged_by_their_weights(run, checkpoint, second):
    _, one = run(name="one.csv")
    _, two = run(name="two.csv", ckpt=second)
    _, both = run("--ensemble_weights=1,3", ckpt=f"{checkpoint},{second}", name="both.csv")
    _, median = run("--combine=median", ckpt=f"{checkpoint},{second}", name="median.csv")
    oids, maps = maps_of(both)
    assert oids == maps_of(one)[0] and len(oids) == 4
    np.testing.assert_allclose(maps, 0.25 * maps_of(one)[1] + 0.75 * maps_of(two)[1], atol=0.02)
    np.testing.assert_allclose(maps_of(median)[1], (maps_of(one)[1] + maps_of(two)[1]) / 2, atol=0.02)


def test_a_bare_state_dict_may_have_its_options_in_a_file_next_to_it(run, checkpoint, second, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(checkpoint, weights_only=True), bare)
    options = tmp_path / "bare.json"
    options.write_text(json.dumps(NETWORK | {"decoder_norm": "none", "input_scaling": "none"}))
    _, with_options = run(ckpt=f"{bare},{bare}", name="a.csv")
    assert with_options.read_bytes() == run(name="b.csv")[1].read_bytes()
    options.write_text("{")
    with pytest.raises(ValueError, match="bare.json: not the network's options"):
        run(ckpt=bare)


def test_fitted_weights_and_steps_are_applied_elsewhere(run, checkpoint, second, pairs, tmp_path, capsys):
    fit = tmp_path / "fit.json"
    score, out = run("--truth", pairs, "--fit", fit, "--post=auto", ckpt=f"{checkpoint},{second}")
    fitted, printed = json.loads(fit.read_text()), capsys.readouterr().out
    assert sum(fitted["ensemble_weights"]) == pytest.approx(1) and fitted["maps"] == 4
    assert "statistical_correction" in printed and "--post=auto:" in printed and "FlatFault_A" in printed
    _, again = run("--use", fit, "--post=auto", ckpt=f"{checkpoint},{second}", name="again.csv")
    assert again.read_bytes() == out.read_bytes()
    _, plain = run(ckpt=f"{checkpoint},{second}", name="plain.csv")
    assert plain.read_bytes() != out.read_bytes()  # the weights alone see to that


def test_a_chain_of_steps_is_applied_and_scored_one_by_one(run, pairs, capsys):
    score, out = run("--truth", pairs, "--post=gaussian,flat_rows,round", "--tta=mirror,scale")
    oids, maps = maps_of(out)
    assert (maps == np.rint(maps)).all()
    flat = maps[[i for i, oid in enumerate(oids) if "FlatVel" in oid]]
    faulted = maps[[i for i, oid in enumerate(oids) if "Fault" in oid]]
    assert (np.ptp(flat, axis=2) == 0).all() and (np.ptp(faulted, axis=2) > 0).any()
    printed = capsys.readouterr().out
    for word in ("plain", "scale 0.98", "network", "gaussian", "flat_rows"):
        assert f"\n{word} " in printed, word
    assert set(score) == {"FlatVel_A", "FlatFault_A", "all"}


def test_misfits_are_those_of_the_simulated_predictions(run, pairs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    maps = tmp_path / "maps"
    score, out = run("--truth", pairs, "--misfit=2", "--figures", tmp_path / "figures", "--save_maps", maps)
    rows = list(csv.DictReader((tmp_path / "s.misfit.csv").open()))
    assert [row["oid"] for row in rows] == maps_of(out)[0]
    for gather, row in zip(find_gathers(pairs), rows, strict=True):
        seis = GatherDataset([gather])[0][1][None]
        vel = torch.from_numpy(np.load(maps / f"{row['oid']}.npy"))[None, None]
        assert float(row["misfit"]) == pytest.approx(misfit(seis, simulate(vel)).item(), rel=1e-4)
        assert float(row["log_misfit"]) == pytest.approx(log_misfit(seis, simulate(vel)).item(), rel=1e-4)
        assert row["family"] in row["oid"]
    assert np.mean([float(row["mae"]) for row in rows]) == pytest.approx(score["all"][0], rel=1e-4)
    worst = max(rows, key=lambda row: float(row["log_misfit"]))["oid"]
    printed = capsys.readouterr().out
    assert (
        printed.count("do not trust") == 2
        and f"do not trust {worst}: " in printed
        and "rank correlation" in printed
    )
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert names == {"FlatVel_A.png", "FlatFault_A.png", "misfit.png", "log_misfit.png"}
    assert (tmp_path / "s.worst.png").is_file()


def test_gathers_of_wrong_polarity_and_units_are_warned_of(checkpoint, pairs, tmp_path, monkeypatch, capsys):
    truths = {
        g.oid: read_truth(*t)
        for g, t in zip(find_gathers(pairs), find_truths(pairs, find_gathers(pairs)), strict=True)
    }
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for (oid, _), change in zip(truths.items(), (1, -1, 1000), strict=False):
        seis = GatherDataset([g for g in find_gathers(pairs) if g.oid == oid])[0][1].numpy()
        np.save(folder / f"{oid}.npy", change * seis)
    names = sorted(p.stem for p in folder.iterdir())
    vel = torch.stack([truths[name] for name in names])
    monkeypatch.setattr(Member, "__call__", lambda self, seis: vel[: len(seis)])  # a perfect network
    infer(
        parse(words_for(checkpoint, "--input", folder, "--out", tmp_path / "w.csv", "--misfit")),
        CPU,
    )
    printed = capsys.readouterr().out
    assert printed.count("warning: 1 of 3 gathers") == 2
    assert "polarity" in printed and "units" in printed and "dead" not in printed


def test_feedback_never_raises_a_misfit_and_tells_its_course(run, tmp_path):
    run("--misfit", name="start.csv")
    run("--misfit", "--refine=feedback", "--refine_rounds=2", name="refined.csv")
    start, refined = (
        {row["oid"]: float(row["misfit"]) for row in csv.DictReader((tmp_path / f"{name}.misfit.csv").open())}
        for name in ("start", "refined")
    )
    traces = [json.loads(line) for line in (tmp_path / "refined.trace.jsonl").read_text().splitlines()]
    assert [trace["oid"] for trace in traces] == list(start)
    for trace in traces:
        assert trace["misfits"] == sorted(trace["misfits"], reverse=True) and len(trace["misfits"]) == 3
        assert trace["misfits"][0] == pytest.approx(start[trace["oid"]], rel=1e-4)
        assert trace["misfits"][-1] == pytest.approx(refined[trace["oid"]], rel=1e-4)


def test_pseudo_labels_are_exact_pairs_and_a_root_for_training(run, tmp_path, capsys):
    root = tmp_path / "pseudo"
    run(
        "--misfit",
        "--pseudo",
        root,
        "--pseudo_misfit=100",
        "--pseudo_family=FlatFault_B",
        "--save_maps",
        tmp_path / "maps",
    )
    found = find_pairs([root])
    assert {pair.family: pair.n for pair in found} == {
        "FlatVel_B": 2,
        "FlatFault_B": 2,
    }  # flat ones are recognised
    for pair in found:
        seis, vel = (torch.from_numpy(np.load(path)) for path in (pair.seis, pair.vel))
        assert torch.equal(simulate(vel), seis) and vel.dtype == torch.float32
    saved = {np.load(path).tobytes() for path in (tmp_path / "maps").iterdir()}
    assert {v.tobytes() for pair in found for v in np.load(pair.vel)[:, 0]} == saved
    with pytest.raises(ValueError, match=r"holds .*npy already; give an empty folder by --pseudo"):
        run("--pseudo", root)
    velocities = np.load(found[0].vel)
    write_pseudo(root, velocities, [found[0].family] * 2, 2, CPU)  # the same maps: goes on
    with pytest.raises(ValueError, match="holds other maps; give an empty folder"):
        write_pseudo(root, velocities + 1, [found[0].family] * 2, 2, CPU)
    rows = list(csv.DictReader((tmp_path / "s.misfit.csv").open()))
    limit = sum(sorted(float(row["log_misfit"]) for row in rows)[1:3]) / 2  # the file has six digits
    run("--pseudo", tmp_path / "best", f"--pseudo_misfit={limit}")
    assert sum(pair.n for pair in find_pairs([tmp_path / "best"])) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--post=sharpen"], "--post=sharpen: expected some of"),
        (["--refine=magic"], "--refine=magic: expected one of none, feedback, inversion"),
        (["--post=auto"], "give its file by --use=FILE"),
        (["--post=statistical_correction"], "needs statistics"),
        (["--fit=f.json"], "--fit needs the true maps"),
        (["--use=none.json"], "none.json"),
        (["--tta=flip"], "--tta=flip: expected names of"),
        (["--ensemble_weights=1,2"], "expected 1 numbers, one for each checkpoint"),
        (["--ensemble_weights=0"], "not all 0"),
        (["--pseudo_family=Flat"], "unknown family 'Flat'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(run, tmp_path, words, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(*words)
    assert not list(tmp_path.rglob("*.work"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("words", [(), ("--misfit", "--tta", "--combine=median")])
def test_a_map_that_is_not_finite_is_refused_by_the_names_of_gather_and_checkpoint(
    run, checkpoint, tmp_path, monkeypatch, value, words
):
    def broken(self, seis):
        vel = torch.full((len(seis), 1, 70, 70), 2000.0)
        vel[1, 0, 3, 4] = value
        return vel

    monkeypatch.setattr(Member, "__call__", broken)
    with pytest.raises(ValueError, match=f"seis2_1_0.npy: sample 1: {checkpoint} predicts nan to nan"):
        run(*words)
    assert not list(tmp_path.glob("*.csv"))
