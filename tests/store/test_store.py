import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, SettingError, SimulatorMismatchError, StoreError
from sbi_phys.core.progress import LineProgress
from sbi_phys.priors import NormalPrior, Parameter
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.check import check_store
from sbi_phys.store.manifest import Manifest, write_manifest
from sbi_phys.store.shards import shard_name, write_shard
from sbi_phys.store.store import Store
from tests.store.helpers import HEADER, rows
from tests.toys import Counts, Flaky, LinearGaussian


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of 3 full shards and a short one, with failed rows; tests copy it before they damage it."""
    path = tmp_path_factory.mktemp("made") / "store"
    simulate(Flaky(1.5, -1.5), 350, path, seed=5, shard_size=100, workers=1)
    return path


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def test_a_store_describes_itself(made):
    store = Store(made)
    toy = Flaky(1.5, -1.5)
    assert store.prior == toy.prior and store.parameters == toy.parameters and store.observables == toy.observables
    assert store.identity == {"class": "tests.toys:Flaky", "settings": {"raise_above": 1.5, "nan_below": -1.5}}
    assert (store.seed, store.shard_size, store.dtype, store.n_shards, store.complete, store.missing) == (5, 100, np.float32, 4, True, ())
    assert len(store) == store.n_rows == store.n_requested == 350
    assert repr(store) == f"Store({str(made)!r}: 350 rows, 2 parameters, 2 columns of float32, tests.toys:Flaky, seed 5, complete)"
    store.verify()
    assert check_store(store.path).ok


def test_infinite_edges_and_labels_survive(tmp_path):
    store = simulate(Counts(), 10, tmp_path, workers=1)
    assert store.observables == Counts().observables
    json.loads((tmp_path / "store.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_failed_rows_are_kept_and_flagged_with_the_reason(made):
    store = Store(made)
    theta, x = store.read(valid_only=False)
    status = store.status()
    np.testing.assert_array_equal(status, np.where(theta[:, 0] > 1.5, 2, np.where(theta[:, 0] < -1.5, 1, 0)))
    assert {0, 1, 2} == set(status.tolist())  # the toy did all three
    assert np.isnan(x[status == 2]).all() and np.isnan(x[status == 1, 1]).all() and np.isfinite(x[status == 1, 0]).all()
    assert store.n_failed == np.count_nonzero(status) and store.n_ok == 350 - store.n_failed
    failures = store.failures()
    assert [f.row for f in failures] == np.flatnonzero(status).tolist()
    for f in failures:
        if f.status == 2:
            assert f.reason == f"ArithmeticError: shower did not converge at t0 = {theta[f.row, 0]:.6f} <object object at 0x...>"
        else:
            assert f.reason == "non-finite x in 1 of 2 columns, first nan in x[1]"


def test_read_gives_the_good_rows_in_order(made):
    store = Store(made)
    theta, x = store.read()
    everything, status = store.read(valid_only=False), store.status()
    np.testing.assert_array_equal(theta, everything[0][status == 0])
    np.testing.assert_array_equal(x, everything[1][status == 0])
    assert theta.dtype == np.float64 and x.dtype == np.float32 and np.isfinite(x).all()


def test_shards_iterate_over_the_same_rows(made):
    store = Store(made)
    parts = list(store.shards())
    assert [p[2].size for p in parts] == [100, 100, 100, 50]
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), store.read(valid_only=False)[1])
    valid = list(store.shards(valid_only=True))
    np.testing.assert_array_equal(np.concatenate([p[0] for p in valid]), store.read()[0])
    assert not np.concatenate([p[2] for p in valid]).any()


def test_read_picks_observables_by_name(tmp_path):
    store = simulate(Counts(), 20, tmp_path, workers=1)
    _, x = store.read()
    np.testing.assert_array_equal(store.read(["xmax", "spectrum"])[1], x[:, [3, 0, 1, 2]])
    np.testing.assert_array_equal(store.read("xmax")[1], x[:, 3:])
    with pytest.raises(SettingError, match=r"columns has an unknown key 'spectrun'.*did you mean 'spectrum'"):
        store.read(["spectrun"])


def test_a_store_with_no_good_row_left_says_so(tmp_path):
    write_shard(tmp_path / shard_name(0), HEADER, 0, rows(failed=range(40)))
    write_manifest(tmp_path, Manifest(HEADER, 40))
    with pytest.raises(DataError, match=r"no valid rows \(40 on disk\)"):
        Store(tmp_path).read()


def test_matches_compares_class_settings_and_observables(made):
    store = Store(made)
    assert store.matches(Flaky(1.5, -1.5))
    store.require_simulator(Flaky(1.5, -1.5))
    other = Flaky(1.5, -1.5)
    other.observables = (replace(other.observables[0], unit="PeV"),)
    for wrong in (Flaky(1.6, -1.5), LinearGaussian(2), other):
        assert not store.matches(wrong)
        with pytest.raises(SimulatorMismatchError, match="made with another simulator: got (identity|observables) .*expected"):
            store.require_simulator(wrong)


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_a_missing_shard_is_named(copy, gone):
    (copy / shard_name(gone)).unlink()
    store = Store(copy)
    assert store.missing == (gone,) and not store.complete
    assert "1 of 4 shards missing" in repr(store)
    for use in (store.read, lambda: list(store.shards()), store.status, store.failures):
        with pytest.raises(StoreError, match=rf"not complete: {store.n_rows} of 350 rows are there, {shard_name(gone)} and 0 more"):
            use()
    assert store.read(valid_only=False, partial=True)[0].shape[0] == store.n_rows == 350 - (50 if gone == 3 else 100)
    with pytest.raises(StoreError, match=f"1 bad shards: .*{shard_name(gone)} is missing"):
        store.verify()


def test_check_lists_all_problems(copy):
    whole = (copy / shard_name(0)).read_bytes()
    (copy / shard_name(0)).write_bytes(whole[:-1000])
    (copy / shard_name(1)).write_bytes(b"not hdf5" * 100)
    (copy / shard_name(2)).write_bytes(whole)
    shutil.copy(copy / shard_name(3), copy / shard_name(9))
    stream = io.StringIO()
    problems = check_store(copy, progress=LineProgress(stream)).findings
    assert [p.shard for p in problems] == [0, 1, 2, 9]
    assert [p.file for p in problems] == [shard_name(i) for i in (0, 1, 2, 9)]
    for p, what in zip(problems, ["truncated", "no HDF5 file", "holds shard 0", "past the end"], strict=True):
        assert what in p.what
    assert "4 found, done" in stream.getvalue()


def test_a_shard_in_the_wrong_place_is_refused(copy):
    shutil.copy(copy / shard_name(0), copy / shard_name(2))
    with pytest.raises(StoreError, match=rf"{shard_name(2)} holds shard 0 with 100 rows; expected shard 2 with 100 rows"):
        Store(copy).read()


def test_a_shard_of_another_store_is_refused(copy, tmp_path):
    for name, other in {
        "seed": (Flaky(1.5, -1.5), {"seed": 6}),
        "simulator": (Flaky(1.5, -1.4), {"seed": 5}),
        "prior": (Flaky(1.5, -1.5), {"seed": 5, "prior": NormalPrior([Parameter("t0"), Parameter("t1")], sd=2)}),
        "dtype": (Flaky(1.5, -1.5), {"seed": 5, "dtype": "float64"}),
    }.items():
        simulate(other[0], 350, tmp_path / name, shard_size=100, workers=1, **other[1])
        shutil.copy(tmp_path / name / shard_name(1), copy / shard_name(1))
        with pytest.raises(StoreError, match=f"{shard_name(1)} was made with another {name}: got .*, expected "):
            Store(copy).read()


def test_parameters_of_all_rows_are_read_without_x_and_the_first_failures_alone(made):
    store = Store(made)
    theta, status = store.theta()
    np.testing.assert_array_equal(theta, store.read(valid_only=False)[0])
    np.testing.assert_array_equal(status, store.status())
    some, _ = store.theta(n_rows=1)
    assert len(some) == min(store.shard_size, len(theta))
    np.testing.assert_array_equal(some, theta[: len(some)])
    assert store.failures(n=2) == store.failures()[:2]
