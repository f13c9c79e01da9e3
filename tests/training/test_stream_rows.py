"""Errors of streaming: damaged or changed shards and caches, bad rows, bad settings, each naming the file, the setting or both numbers."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, SimulatorMismatchError, StoreError, SupportError
from sbi_phys.priors import BoxPrior, NormalPrior, Observable, Parameter
from sbi_phys.store.locks import StoreLock
from sbi_phys.store.manifest import Manifest, read_manifest, write_manifest
from sbi_phys.store.shards import open_shard, read_arrays, read_facts, shard_name, write_shard
from sbi_phys.store.store import Store
from sbi_phys.training.stream import Stream
from tests.training.stream_helpers import PRIOR, epoch_numbers, flat, make_store

ROW = 4 * 5 + 8


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", 300, failed=[7])


def edit(path: Path, name: str, row: int, column: int, value: float) -> None:
    """Write a shard anew with one other number, as a faulty program could."""
    with open_shard(path) as file:
        header, facts = read_facts(file, path)
        data = read_arrays(file, path)
    getattr(data, name)[row, column] = value
    write_shard(path, header, facts["shard"], data)


def cache_file(store: Store) -> Path:
    (path,) = (store.path / ".cache").glob("rows-*.f32")
    return path


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"observables": [Observable("number", 1), Observable("n", 3, kind="counts")]}, r"other.*observables.*size = 3.*size = 2"),
        ({"observables": [Observable("number", 1), Observable("m", 2, kind="counts")]}, r"other.*observables.*'m'.*'n'"),
        ({"prior": NormalPrior([Parameter("a"), Parameter("c")], [1, -2], [0.5, 3])}, r"other.*prior.*'c'.*'b'"),
        ({"prior": NormalPrior([Parameter("a"), Parameter("b")])}, r"other.*prior.*mean"),
    ],
)
def test_stores_must_be_alike(store, tmp_path, other, words):
    second = make_store(tmp_path / "other", 300, **other)
    with pytest.raises(StoreError, match=words):
        Stream([store, second], PRIOR)


@pytest.mark.parametrize("what", [{"observables": [Observable("number", 3)]}, {"prior": NormalPrior([Parameter("a"), Parameter("c")])}])
def test_shards_must_be_alike(store, tmp_path, what):
    foreign = make_store(tmp_path / "other", 300, **what)
    shutil.copy(foreign.path / shard_name(1), store.path / shard_name(1))
    with pytest.raises(StoreError, match=f"{shard_name(1)} was made with another"):
        Stream(store, PRIOR)


def test_a_shard_of_another_width(store):
    with h5py.File(store.path / shard_name(2), "r+") as file:
        del file["x"]
        file["x"] = np.zeros((100, 4))
    with pytest.raises(StoreError, match=rf"{shard_name(2)}: dataset x has shape \(100, 4\); expected \(100, 3\)"):
        Stream(store, PRIOR)


def test_a_missing_shard_and_an_incomplete_store(store):
    manifest = read_manifest(store.path)
    write_manifest(store.path, Manifest(manifest.header, 500))
    with pytest.raises(StoreError, match=rf"not complete: 300 of 500 rows are there, {shard_name(3)} and 1 more"):
        Stream(store.path, PRIOR)
    write_manifest(store.path, manifest)
    (store.path / shard_name(1)).unlink()
    with pytest.raises(StoreError, match=rf"200 of 300 rows are there, {shard_name(1)}"):
        Stream(store.path, PRIOR)


def test_a_truncated_shard(store):
    os.truncate(store.path / shard_name(1), 3000)
    with pytest.raises(StoreError, match=f"{shard_name(1)} cannot be read"):
        Stream(store, PRIOR)


@pytest.mark.parametrize("memory", [700 * ROW, 2**20])
@pytest.mark.parametrize("how", ["remove", "touch", "cut"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_changes_while_training(store, memory, how, cached):
    with Stream(store, PRIOR, memory=memory, cache="auto" if cached else None) as stream:
        epoch_numbers(stream, 0, 60)
        path = cache_file(store) if cached else store.path / shard_name(1)
        if how == "remove":
            path.unlink()
        elif how == "touch":
            os.utime(path, ns=(1, 1))
        else:
            os.truncate(path, 1000)
        with pytest.raises(StoreError, match=rf"{path} has (changed|disappeared) while it was in use"):
            epoch_numbers(stream, 1, 60)


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_disappears_within_an_epoch(store, cached):
    with Stream(store, PRIOR, memory=128 * ROW, cache="auto" if cached else None) as stream:
        batches = stream.epoch(0, 100)
        next(batches)
        paths = [cache_file(store)] if cached else [store.path / shard_name(i) for i in range(3)]
        for path in paths:
            path.unlink()
        with pytest.raises(StoreError, match=r"has disappeared while it was in use"):
            list(batches)


def test_a_shard_that_is_replaced_by_another_of_the_same_size_and_time(store):
    """The checksum in its header tells."""
    with Stream(store, PRIOR, memory=200 * ROW, cache=None) as stream:
        path = store.path / shard_name(1)
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        edit(path, "x", 3, 0, 5.0)
        os.utime(path, ns=times)
        with pytest.raises(StoreError, match=r"shard-00001\.h5 has changed.*its checksum is crc32:"):
            epoch_numbers(stream, 1, 60)


@pytest.mark.parametrize("memory", [200 * ROW, 2**20])
@pytest.mark.parametrize("at", [0, 2000, -1])
def test_damage_in_the_rows_of_the_cache_is_found_before_they_are_used(store, memory, at):
    with Stream(store, PRIOR, memory=memory) as stream:
        first = flat(epoch_numbers(stream, 0, 30))
    path = cache_file(store)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)
    with (
        pytest.raises(StoreError, match=r"rows-.*\.f32 is damaged: the rows of shard \d have checksum"),
        Stream(store, PRIOR, memory=memory) as stream,
    ):
        epoch_numbers(stream, 0, 30)
    path.unlink()
    with Stream(store, PRIOR, memory=memory) as stream:
        assert flat(epoch_numbers(stream, 0, 30)) == first


@pytest.mark.parametrize("name", ["rows", "scale"])
@pytest.mark.parametrize("key", ["shift", "mean", "n_ok"])
def test_a_description_of_the_cache_with_another_number_is_made_again(store, name, key):
    with Stream(store, PRIOR) as stream:
        first, scaler = flat(epoch_numbers(stream, 0, 5)), stream.scaler
    (path,) = (store.path / ".cache").glob(f"{name}-*.json")
    values = json.loads(path.read_text())
    if key in values:
        values[key][0] += 1
        path.write_text(json.dumps(values))
        with Stream(store, PRIOR) as stream:
            assert flat(epoch_numbers(stream, 0, 5)) == first and np.array_equal(stream.scaler.mean, scaler.mean)


@pytest.mark.parametrize("damage", ["cut", "grown", "lost", "bad json", "other format", "no scaling", "touched"])
def test_a_damaged_cache_is_made_again(store, damage):
    with Stream(store, PRIOR) as stream:
        first = flat(epoch_numbers(stream, 0, 5))
    path = cache_file(store)
    size, described = path.stat().st_size, path.with_suffix(".json")
    if damage in ("cut", "grown"):
        os.truncate(path, size - 20 if damage == "cut" else size + 20)
    elif damage == "lost":
        path.unlink()
    elif damage == "bad json":
        described.write_text("{")
    elif damage == "other format":
        described.write_text(json.dumps({"format": "x"}))
    elif damage == "no scaling":
        next(path.parent.glob("scale-*")).unlink()
    else:
        path.write_bytes(bytes(size))
    (path.parent / ".rows-0.f32.tmp").write_bytes(b"left by a build that was killed")
    with Stream(store, PRIOR) as stream:
        assert flat(epoch_numbers(stream, 0, 5)) == first
    assert path.stat().st_size == size and not list(path.parent.glob(".*.tmp"))


def test_a_cache_that_cannot_be_written(store, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match=r"cache .*file cannot be created: .*; expected a writable folder as cache="):
        Stream(store, PRIOR, cache=tmp_path / "file")
    (store.path / ".cache").write_text("in the way")
    with pytest.raises(StoreError, match=r"cache="):
        Stream(store, PRIOR)
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"locked cannot be written: .*as cache="):
        Stream(store, PRIOR, cache=tmp_path / "locked")
    with Stream(store, PRIOR, cache=tmp_path / "new" / "folder") as stream:
        assert len(list(stream.epoch(0, 3))) == 3
    with Stream(store, PRIOR, cache=None) as stream:
        assert len(list(stream.epoch(0, 3))) == 3


def test_a_cache_that_another_process_writes(store, tmp_path):
    with StoreLock(tmp_path), pytest.raises(StoreError, match=r"another process writes, was not complete after 0\.1 s"):
        Stream(store, PRIOR, cache=tmp_path, cache_timeout_s=0.1)
    with Stream(store, PRIOR, cache=tmp_path, cache_timeout_s=0.1) as stream:
        assert stream.n == 269


def test_a_full_disk_leaves_no_half_cache(store, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"rows-.*could not be written: No space left.*another folder as cache="):
        Stream(store, PRIOR)
    assert [p.name for p in (store.path / ".cache").iterdir()] == [".lock"]


def test_memory_too_small(store):
    with pytest.raises(DataError, match=rf"memory is 1000 bytes, and a row takes 28; expected at least {128 * 28} bytes"):
        Stream(store, PRIOR, memory=1000)
    with pytest.raises(DataError, match="expected at least"):
        Stream(store, PRIOR, memory=128 * 28 - 1)
    with Stream(store, PRIOR, memory=128 * 28) as stream:  # the least works
        assert len(flat(epoch_numbers(stream, 0, 100))) == stream.n_own
        with pytest.raises(DataError, match=rf"a batch has 27 rows of 28 bytes; expected at least {16 * 27 * 28} bytes"):
            stream.epoch(0, 10)


@pytest.mark.parametrize("failed", [range(300), range(299)])
def test_hardly_any_good_row(tmp_path, failed):
    store = make_store(tmp_path / "s", 300, failed=failed)
    with pytest.raises(DataError, match=rf"{store.path} has {300 - len(failed)} good rows of 300; expected at least 2"):
        Stream(store, PRIOR)


def test_mostly_failed_rows(tmp_path):
    """Good rows far apart are found, and no more rows than a block are held."""
    good = {5, 6, 150, 298, 299}
    store = make_store(tmp_path / "s", 300, failed=set(range(300)) - good)
    with Stream(store, PRIOR, validation_fraction=0.4) as stream:
        rows = flat(epoch_numbers(stream, 0, 1))
        assert len(rows) == 3 and set(rows) < good


@pytest.mark.parametrize("cached", [True, False])
def test_nan_in_a_row_that_says_ok(store, cached):
    edit(store.path / shard_name(1), "x", 30, 2, np.nan)
    with pytest.raises(NonFiniteError, match=r"shard-00001\.h5, row 30 has NaN or Inf though its status says ok"):
        Stream(store, PRIOR, cache="auto" if cached else None)
    assert not cached or [p.name for p in (store.path / ".cache").iterdir()] == [".lock"]


def test_theta_outside_the_prior_and_negative_counts(tmp_path):
    prior = BoxPrior([Parameter("a", 0, 1, unit="EV"), Parameter("b", 0, 1)])
    store = make_store(tmp_path / "s", 300, prior=prior, failed=[100, 103])
    edit(store.path / shard_name(1), "theta", 30, 0, 1.5)
    with pytest.raises(SupportError, match=r"shard-00001\.h5, row 30: theta lies outside the prior: a = 1\.5 EV, expected within \[0, 1\]"):
        Stream(store, prior)
    edit(store.path / shard_name(1), "theta", 30, 0, 0.5)
    edit(store.path / shard_name(2), "x", 4, 1, -1)
    with pytest.raises(DataError, match=r"shard-00002\.h5, row 4 has negative values in columns declared as counts"):
        Stream(store, prior)


def test_a_value_that_float32_cannot_hold(store):
    edit(store.path / shard_name(1), "x", 30, 0, 1e60)
    with pytest.raises(DataError, match=r"shard-00001\.h5, good row 30: x\[0\] is 1e\+60"):
        Stream(store, PRIOR)


def test_status_and_list_of_failed_rows_that_differ(store, monkeypatch):
    with h5py.File(store.path / shard_name(0), "r+") as file:
        file["status"][50] = 1
    with pytest.raises(StoreError, match=r"shard-00000\.h5 is damaged: dataset status has checksum"):
        Stream(store, PRIOR)
    monkeypatch.setattr("sbi_phys.store.shards.verify_shard", lambda *_: "")  # a file that was made so
    with pytest.raises(StoreError, match=r"shard-00000\.h5 is damaged: its status and its list of failed rows differ"):
        Stream(store, PRIOR)


def test_more_ranks_than_shards_and_ranks_without_rows(store, tmp_path):
    with pytest.raises(DataError, match="4 ranks share 3 shards"):
        Stream(store, PRIOR, n_ranks=4)
    tiny = make_store(tmp_path / "tiny", 4, shard_size=1)
    with Stream(tiny, PRIOR, cache=None) as stream:
        assert stream.n == 3
    with pytest.raises(DataError, match=r"rank \d of 4 has \d training and \d validation rows"):
        for rank in range(4):
            Stream(tiny, PRIOR, cache=None, rank=rank, n_ranks=4)


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ({"memory": 0}, SettingError, "memory"),
        ({"rank": 1}, SettingError, "rank"),
        ({"n_ranks": 0}, SettingError, "n_ranks"),
        ({"seed": -1}, SettingError, "seed"),
        ({"validation_fraction": 1.0}, SettingError, "validation_fraction"),
        ({"x_transform": "log"}, SettingError, "x_transform"),
        ({"cache_timeout_s": -1}, SettingError, "cache_timeout_s"),
        ({"rates": [1, 2]}, SettingError, "rates has 2 numbers; expected 1"),
        ({"rates": [0]}, SettingError, r"rates\[0\] is 0; expected a finite number > 0"),
        ({"observables": [Observable("x", 2)]}, ValueError, r"expected \(2,\)"),
    ],
)
def test_settings_are_checked_before_any_shard_is_read(store, monkeypatch, setting, error, words):
    monkeypatch.setattr("sbi_phys.training._stream_rows.open_intact", None)
    with pytest.raises(error, match=words):
        Stream(store, PRIOR, **setting)


def test_what_is_no_store_or_no_prior(store, tmp_path):
    for stores, error, words in [
        ([], SettingError, "stores is empty"),
        ([store, store.path], SettingError, "twice"),
        (tmp_path / "nowhere", StoreError, "not a folder"),
    ]:
        with pytest.raises(error, match=words):
            Stream(stores, PRIOR)
    with pytest.raises(SettingError, match="prior is a dict"):
        Stream(store, {})  # type: ignore[arg-type]
    with pytest.raises(SimulatorMismatchError, match=r"parameters \('a', 'b'\)"):
        Stream(store, NormalPrior([Parameter("a"), Parameter("c")]))


def test_more_batches_than_rows(store):
    with Stream(store, PRIOR) as stream:
        with pytest.raises(DataError, match=r"n_batches is 270, and rank 0 has 269 training rows"):
            stream.epoch(0, 270)
        for bad in ((-1, 5), (0, 0), (0.5, 5)):
            with pytest.raises(SettingError):
                stream.epoch(*bad)
        assert {len(u) for u, _ in stream.epoch(0, 269)} == {1}


def test_the_manifest_alone_differs(store):
    manifest = read_manifest(store.path)
    write_manifest(store.path, Manifest(replace(manifest.header, seed=99), 300))
    with pytest.raises(StoreError, match=f"{shard_name(0)} was made with another seed"):
        Stream(store.path, PRIOR)
