import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, SettingError, StoreError
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.manifest import read_manifest, write_manifest
from sbi_phys.store.merge import merge_stores
from sbi_phys.store.shards import shard_name
from sbi_phys.store.store import Store
from tests.store.helpers import digests, flaky
from tests.toys import Flaky, LinearGaussian


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Whole stores of 350 and 250 rows with other seeds, which tests only read."""
    folder = tmp_path_factory.mktemp("made")
    return flaky(folder / "a", 350, seed=5), flaky(folder / "b", 250, seed=6, shard_size=70)


def everything(store):
    return [*store.read(valid_only=False), store.status()]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_shard_ranges_of_one_campaign_become_that_campaign(made, tmp_path):
    for name, gone in (("x", (0, 3)), ("y", (1, 2))):
        shutil.copytree(made[0].path, tmp_path / name)
        for i in gone:
            (tmp_path / name / shard_name(i)).unlink()
    merge_stores([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    assert digests(tmp_path / "out") == digests(made[0].path)


def test_the_code_is_kept_and_other_code_is_refused(made, tmp_path):
    code = made[0].code
    assert len(code) == 1 and made[0].subset(tmp_path / "few", rows=[1, 2]).code == code
    assert [s.code for s in made[0].split([tmp_path / "s", tmp_path / "t"], [0.5, 0.5])] == [code, code]
    assert Store(merge_stores([s.path for s in made], tmp_path / "both")).code == code
    shutil.copytree(made[1].path, tmp_path / "edited")
    manifest = read_manifest(tmp_path / "edited")
    other = {"sha256": "b", "parts": {**code[0]["parts"], "tests.more": "b"}}
    write_manifest(tmp_path / "edited", replace(manifest, code=(other,)))
    with pytest.raises(StoreError, match=r"edited was made with other code of the simulator than .*a: tests.more is new"):
        merge_stores([made[0].path, tmp_path / "edited"], tmp_path / "out")
    merged = merge_stores([made[0].path, tmp_path / "edited"], tmp_path / "out", accept_code_change=True)
    assert Store(merged).code == (*code, other)
    write_manifest(tmp_path / "edited", replace(manifest, code=()))  # not known: an older store
    assert Store(merge_stores([tmp_path / "edited", made[0].path], tmp_path / "old")).code == code


def test_gaps_stay_and_simulate_fills_them(made, tmp_path):
    for name, kept in (("x", 0), ("y", 2)):
        shutil.copytree(made[0].path, tmp_path / name)
        for i in set(range(4)) - {kept}:
            (tmp_path / name / shard_name(i)).unlink()
    assert Store(merge_stores([tmp_path / "x", tmp_path / "y"], tmp_path / "out")).missing == (1, 3)
    flaky(tmp_path / "out", 350)
    assert digests(tmp_path / "out") == digests(made[0].path)


def test_a_short_last_shard_gives_way_to_the_longer_campaign(tmp_path):
    flaky(tmp_path / "short", 150)
    flaky(tmp_path / "long", 350)
    (tmp_path / "long" / shard_name(0)).unlink()
    store = Store(merge_stores([tmp_path / "short", tmp_path / "long"], tmp_path / "out"))
    assert store.complete and store.n_rows == 350
    store.verify()


def test_other_seeds_are_laid_end_to_end(made, tmp_path):
    a, b = made
    store = Store(merge_stores([a.path, b.path], tmp_path / "out"))
    assert (store.n_rows, store.shard_size, store.n_shards, store.complete, store.theta_kind) == (600, 100, 6, True, "merged")
    same(everything(store), [np.concatenate(p) for p in zip(everything(a), everything(b), strict=True)])
    assert [f.row for f in store.failures()] == [f.row for f in a.failures()] + [350 + f.row for f in b.failures()]
    assert [f.reason for f in store.failures()] == [f.reason for f in [*a.failures(), *b.failures()]]
    assert store.origin["sources"] == [{"seed": 5, "rows": 350, "theta": "prior"}, {"seed": 6, "rows": 250, "theta": "prior"}]
    store.verify()
    merge_stores([a.path, b.path], tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    with pytest.raises(StoreError, match="made with another theta: got 'merged', expected 'prior'"):
        simulate(Flaky(1.5, -1.5), 700, tmp_path / "out", seed=5, workers=1)
    other = Store(merge_stores([a.path, b.path], tmp_path / "cut", shard_size=64))
    assert other.n_shards == 10
    same(everything(other), everything(store))


def test_what_cannot_be_merged(made, tmp_path):
    a, b = (s.path for s in made)
    shutil.copytree(a, tmp_path / "copy")
    flaky(tmp_path / "cut", 350, seed=5, shard_size=35)
    simulate(Flaky(1.4, -1.5), 100, tmp_path / "other", seed=8, shard_size=100, workers=1)
    simulate(Flaky(1.5, -1.5), 100, tmp_path / "wide", seed=8, shard_size=100, workers=1, dtype="float64")
    shutil.copytree(b, tmp_path / "damaged")
    raw = bytearray((tmp_path / "damaged" / shard_name(1)).read_bytes())
    at = raw.index(np.ascontiguousarray(made[1].read(valid_only=False)[1][70:71]).tobytes())
    raw[at] ^= 1
    (tmp_path / "damaged" / shard_name(1)).write_bytes(bytes(raw))
    shutil.copytree(b, tmp_path / "gap")
    (tmp_path / "gap" / shard_name(2)).unlink()
    for stores, error, message in (
        ([a], SettingError, "merge got 1 stores; expected at least two"),
        ([a, a], SettingError, "got a store twice"),
        ([a, tmp_path / "copy"], StoreError, r"both hold shard-00000\.h5; expected every shard once"),
        ([a, tmp_path / "cut"], StoreError, "has rows that are in .*expected stores made with different seeds"),
        ([a, tmp_path / "other"], StoreError, "was made with another simulator"),
        ([a, tmp_path / "wide"], StoreError, "was made with another dtype"),
        ([a, tmp_path / "damaged"], StoreError, r"shard-00001\.h5 is damaged: dataset x"),
        ([a, tmp_path / "gap"], StoreError, r"is not complete: shard-00002\.h5 and 0 more"),
        ([a, tmp_path / "nowhere"], StoreError, "nowhere is not a folder"),
    ):
        with pytest.raises(error, match=message):
            merge_stores(stores, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()
    with pytest.raises(StoreError, match="exists already"):
        merge_stores([a, b], tmp_path / "gap")


def test_what_a_killed_merge_left_is_made_anew(made, tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / shard_name(77)).write_bytes(b"half")
    store = Store(merge_stores([s.path for s in made], tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["out"] and store.n_rows == 600
    store.verify()


# ---- subset and split


def test_a_subset_by_numbers_and_by_mask(made, tmp_path):
    store = made[0]
    numbers = np.random.default_rng(0).choice(350, 120, replace=False)
    part = store.subset(tmp_path / "numbers", rows=numbers)
    same(everything(part), [v[np.sort(numbers)] for v in everything(store)])
    mask = np.zeros(350, dtype=bool)
    mask[numbers] = True
    same(everything(store.subset(tmp_path / "mask", rows=mask)), everything(part))
    reasons = {f.row: f.reason for f in store.failures()}
    assert [f.reason for f in part.failures()] == [reasons[r] for r in np.sort(numbers).tolist() if r in reasons]
    part.verify()
    assert part.theta_kind == "subset" and part.origin["of_rows"] == 350 and part.matches(Flaky(1.5, -1.5))


def test_a_subset_by_parameter_ranges(made, tmp_path):
    store = made[0]
    theta = store.read(valid_only=False)[0]
    inside = (theta[:, 0] >= -0.5) & (theta[:, 0] <= 1) & (theta[:, 1] >= 0)
    assert 0 < inside.sum() < len(theta)
    part = store.subset(tmp_path / "s", where={"t0": (-0.5, 1), "t1": (0, 99)})
    same(everything(part), [v[inside] for v in everything(store)])
    both = store.subset(tmp_path / "both", rows=np.arange(50), where={"t0": (-0.5, 1), "t1": (0, 99)})
    same(everything(both), [v[:50][inside[:50]] for v in everything(store)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, SettingError, "neither rows nor where"),
        ({"rows": [1, 1]}, SettingError, "names 1 rows twice"),
        ({"rows": [350]}, SettingError, "rows run from 350 to 350; expected 0 to 349"),
        ({"rows": [0.5]}, SettingError, "expected row numbers"),
        ({"rows": np.ones(3, dtype=bool)}, SettingError, r"mask of shape \(3,\); expected \(350,\)"),
        ({"where": {"t9": (0, 1)}}, SettingError, "unknown key 't9'"),
        ({"where": {"t0": (1, 0)}}, SettingError, r"expected \(low, high\)"),
        ({"where": {"t0": (50, 60)}}, DataError, "would have no rows"),
    ],
)
def test_a_bad_subset(made, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        made[0].subset(tmp_path / "s", **arguments)
    assert os.listdir(tmp_path) == []


def test_a_split_is_disjoint_whole_and_seeded(made, tmp_path):
    store = made[0]
    parts = store.split([tmp_path / "t", tmp_path / "v"], [0.8, 0.2], seed=3)
    assert [p.n_rows for p in parts] == [280, 70] and all(p.theta_kind == "split" for p in parts)
    together = np.concatenate([p.read(valid_only=False)[0] for p in parts])
    whole = store.read(valid_only=False)[0]
    np.testing.assert_array_equal(together[np.lexsort(together.T)], whole[np.lexsort(whole.T)])
    again = store.split([tmp_path / "t2", tmp_path / "v2"], [0.8, 0.2], seed=3)
    assert [digests(p.path) for p in again] == [digests(p.path) for p in parts]
    other = store.split([tmp_path / "t3"], [0.8], seed=4)[0]
    assert not np.array_equal(other.read(valid_only=False)[0], parts[0].read(valid_only=False)[0])
    assert other.n_rows == 280


@pytest.mark.parametrize(
    ("n", "fractions", "error"),
    [
        (2, [0.5], SettingError),
        (2, [0.9, 0.2], SettingError),
        (2, [0.999999, 1e-6], DataError),
        (1, [0], SettingError),
        (0, [], SettingError),
    ],
)
def test_a_bad_split(made, tmp_path, n, fractions, error):
    with pytest.raises(error, match="fractions|part"):
        made[0].split([tmp_path / str(i) for i in range(n)], fractions)
    assert os.listdir(tmp_path) == []


def test_merging_given_theta_keeps_that_in_mind(tmp_path):
    toy = LinearGaussian()
    for seed in (1, 2):
        simulate(toy, None, tmp_path / str(seed), theta=np.full((20, 2), seed / 4), seed=seed, workers=1)
    assert Store(merge_stores([tmp_path / "1", tmp_path / "2"], tmp_path / "out")).theta_kind == "merged given"
