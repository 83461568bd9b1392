"""Variations of velocity maps: what each change keeps, and that all are maps a network may learn from."""

import numpy as np
import pytest

from synthetic import vary as module
from synthetic.maps import make_maps
from synthetic.vary import CHANGES, vary
from utils import FAMILIES


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def layered():
    return make_maps("CurveVel_B", 6, seed=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_variations_of_every_family_are_sane_maps(family):
    maps = make_maps(family, 4, seed=1)
    varied = vary(maps, 40, seed=0)
    assert varied.shape == (40, 1, 70, 70) and varied.dtype == np.float32
    assert np.isfinite(varied).all() and varied.min() >= 1500 and varied.max() <= 4500
    assert sum(np.array_equal(v, m) for v in varied for m in maps) <= 4  # flat layers: hardly moved
    assert len(np.unique(varied.reshape(40, -1), axis=0)) >= 37
    if family.endswith("Vel_A"):
        assert not (varied % 1).any()  # whole velocities stay whole
    if family == "FlatVel_A":  # increasing with depth where nothing is turned or slips
        rises = (np.diff(varied[:, 0, :, 35], axis=1) >= 0).all(1)
        assert rises.mean() > 0.7


def test_a_variation_depends_on_maps_seed_and_number_alone(layered):
    whole = vary(layered, 12, seed=5)
    assert np.array_equal(vary(layered, 4, seed=5, start=3), whole[3:7])
    assert not np.array_equal(vary(layered, 12, seed=6), whole)
    assert not np.array_equal(vary(layered[:5], 12, seed=5), whole)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_each_change_changes_and_keeps_layers_sharp(change, layered):
    field, other = layered[0, 0].astype(float), layered[1, 0].astype(float)
    constant = np.full((70, 70), 2000.0)
    differs = 0
    for seed in range(20):
        got = change(rng(seed), field, other)
        differs += not np.array_equal(got, field)
        if change is not module._blend:
            assert set(np.unique(got)) <= set(np.unique(field))
        assert np.array_equal(change(rng(seed), constant, constant), constant)
    assert differs >= 18  # a small turn may leave every cell where it was


def test_shift_stretch_rotate_and_crop_take_each_cell_from_where_they_say():
    z, x = np.mgrid[:70, :70].astype(float)
    field = 2000 + 10 * z + x  # linear: exact between cells
    at = lambda z, x: 2000 + 10 * np.clip(z, 0, 69) + np.clip(x, 0, 69)  # noqa: E731
    assert np.allclose(module._warp(field, dz=2.5, dx=-3), at(z + 2.5, x - 3))
    c = module.CENTRE
    assert np.allclose(module._warp(field, ((0.5, 0), (0, 2.0))), at(c + 0.5 * (z - c), c + 2 * (x - c)))
    quarter = module._warp(field, ((0, 1), (-1, 0)))
    assert np.allclose(quarter, np.rot90(field, -1)) or np.allclose(quarter, np.rot90(field))
    for seed in range(20):  # a crop looks at nothing outside the map
        got = module._crop(rng(seed), field, None)
        assert len(np.unique(got[:, 0])) == len(np.unique(got[0])) == 70


def test_a_blend_lies_between_its_maps():
    a, b = np.full((70, 70), 2000.0), np.full((70, 70), 3000.0)
    alphas = [(3000 - module._blend(rng(seed), a, b)[0, 0]) / 1000 for seed in range(50)]
    assert 0.3 <= min(alphas) < 0.4 and 0.6 < max(alphas) <= 0.7


def test_a_fault_leaves_one_side_and_moves_the_other():
    z, _ = np.mgrid[:70, :70].astype(float)
    field, n_seen = 2000 + 100 * (z // 10), 0
    for seed in range(20):
        got = module._fault(rng(seed), field, None)
        changed = (got != field).any(0)
        assert changed.any()
        throws = {int(t) for t in range(-10, 11) if abs(t) >= 5}
        moved = got[:, 69] if changed[69] else got[:, 0]
        shifted = [np.array_equal(moved[15:55], field[15 + t : 55 + t, 0]) for t in throws]
        assert any(shifted) or not changed[[0, 69]].any()  # a fault that leaves both edges cannot be judged
        n_seen += any(shifted)
    assert n_seen > 10


def test_recolouring_gives_every_layer_a_new_velocity_in_the_old_order(layered):
    field = layered[0, 0].astype(float)
    old, layer = np.unique(field, return_inverse=True)
    got = module._recolour(field, rng())
    new, layer_now = np.unique(got, return_inverse=True)
    assert len(new) == len(old) and np.array_equal(layer, layer_now) and not set(new) & set(old)
    style = make_maps("Style_A", 1, seed=0)[0, 0].astype(float)  # thousands of values: a rising curve
    got = module._recolour(style, rng())
    order = np.argsort(style, axis=None)
    assert (np.diff(got.ravel()[order]) >= 0).all() and not np.array_equal(got, style)


def test_bad_maps_are_refused(layered):
    for maps, n, seed in ((layered[:0], 1, 0), (layered, 0, 0), (layered, 1, -1)):
        with pytest.raises(ValueError, match="expected at least 1, 0 and 1"):
            vary(maps, n, seed)
    for wrong in (layered[..., :60], np.full((1, 1, 70, 70), np.nan)):
        with pytest.raises(ValueError, match=r"map \d: .*expected \(1, 70, 70\)"):
            vary(wrong, 1, 0)
