"""bench.py realism: the classifier and the statistics find what differs, and only that."""

import json

import numpy as np
import pytest

import bench
from benchmarks import map_statistics, realism
from synthetic.maps import make_maps


@pytest.fixture
def real(tmp_path):
    """A folder whose "real" maps are the generator's own."""
    maps = make_maps("FlatVel_A", 60, 5)
    np.savez(tmp_path / "FlatVel_A.npz", dev=maps[:30], shapes=maps[30:])
    return tmp_path


def test_the_classifier_tells_wrong_maps_and_not_those_of_the_same_kind():
    ours, again = (make_maps("FlatVel_A", 80, seed) for seed in (0, 1))
    assert realism.accuracy(ours, again, seed=0, epochs=10)[0] < 0.68  # 4.5 errors of 4 % from one half
    others = make_maps("CurveVel_A", 80, 1)
    assert realism.accuracy(ours, others, seed=0, epochs=10)[0] > 0.85


def test_wrong_maps_keep_what_they_should_and_change_the_rest():
    maps = make_maps("FlatVel_B", 6, 0)
    squeezed = realism.wrong_maps(maps, "FlatVel_B")
    assert (squeezed != maps).any((1, 2, 3)).all() and (squeezed[:, :, 0] == maps[:, :, 0]).all()
    field = 3000 + 50 * np.random.default_rng(0).standard_normal((6, 1, 70, 70)).cumsum(3).astype(np.float32)
    gaussian = realism.wrong_maps(field, "Style_A")
    spectra = [np.abs(np.fft.fft2(m - field.mean(0))) for m in (field, gaussian)]
    assert np.corrcoef(spectra[0].ravel(), spectra[1].ravel())[0, 1] > 0.9
    assert np.abs(gaussian - field).mean() > 50


def test_statistics_are_those_of_a_known_map():
    field = np.repeat([2000.0, 2500.0, 2400.0, 4000.0], [20, 10, 10, 30])[:, None] + np.zeros(70)
    found = map_statistics.statistics(np.stack([field, field[:, ::-1]])[:, None])
    assert found["velocities"][0] == 4 and found["slow share"][0] == 0.75
    assert found["steps that rise"][0] == pytest.approx(2 / 3) and found["interfaces a column"][0] == 3
    assert found["thickness 8-10"][0] == 1  # the border cuts the first and last layer
    assert found["sharpest edge"][0] == 1600 and found["vertical edges a row"][0] == 0
    assert found["fold height"][0] == found["fold turns"][0] == found["interface dips"][0] == 0


def test_statistics_count_folds():
    fold = np.rint(30 + 10 * np.sin(np.arange(70) * 3 * np.pi / 69))  # one and a half periods: three turns
    field = np.where(np.arange(70)[:, None] < fold, 2000.0, 3000.0)
    found = map_statistics.statistics(np.stack([field, field])[:, None])
    assert found["fold height"][0] == 20 and found["fold turns"][0] == 3
    assert found["interface dips"][0] == np.mean(np.diff(fold) != 0)


def test_it_prints_ours_the_control_and_statistics_and_draws_without_labels(real, capsys):
    words = ["realism", f"--maps={real}", "--families=FlatVel_A", "--seeds=1", "--epochs=1"]
    bench.main([*words, f"--figure={real / 'out'}"])
    out = capsys.readouterr().out
    assert "60 real maps" in out and "wrong on purpose" in out and "thickness 8-10" in out
    key = json.loads((real / "out" / "key.json").read_text())
    assert sorted(key["FlatVel_A"]) == ["real"] * 8 + ["synthetic"] * 8
    assert (real / "out" / "which_are_real.png").stat().st_size > 1000


def test_missing_maps_keys_and_families_are_refused(real, refuses):
    refuses(
        bench.main, "realism", f"--maps={real}", "--families=Style_A", words=["Style_A.npz: no such file"]
    )
    np.savez(real / "Style_A.npz", model1=np.zeros(1))
    refuses(
        bench.main, "realism", f"--maps={real}", "--families=Style_A", words=["expected keys dev and shapes"]
    )
    refuses(bench.main, "realism", f"--maps={real}", "--families=StyleA", words=["did you mean Style_A?"])
