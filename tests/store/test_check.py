import json
import shutil

import h5py
import numpy as np
import pytest

from sbi_phys.core.errors import StoreError
from sbi_phys.store.check import check_store, ranges_text, repair_store
from sbi_phys.store.locks import StoreLock
from sbi_phys.store.shards import shard_name
from sbi_phys.store.store import Store
from tests.store.helpers import digests, flaky


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "store"
    flaky(path, 750)
    return path


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def damage(folder, other):
    """One shard of every kind of trouble; numbers 0, 5 and 7 stay good."""
    whole = (folder / shard_name(0)).read_bytes()
    (folder / shard_name(1)).write_bytes(whole[:-1000])
    (folder / shard_name(2)).write_bytes(b"not hdf5" * 100)
    shutil.copy(folder / shard_name(0), folder / shard_name(3))
    shutil.copy(other / shard_name(4), folder / shard_name(4))
    with h5py.File(folder / shard_name(6), "r+") as file:
        file["x"][7, 0] += 1
    (folder / shard_name(5)).unlink()
    shutil.copy(folder / shard_name(0), folder / shard_name(12))


EXPECTED = {1: "truncated", 2: "foreign", 3: "misplaced", 4: "foreign", 5: "missing", 6: "damaged", 12: "surplus"}


def test_a_good_store_has_no_findings(made):
    found = check_store(made)
    assert found.ok and found.findings == () and (found.n_whole, found.n_shards) == (8, 8) and found.strays == ()
    assert found.n_bytes == sum(p.stat().st_size for p in made.glob("shard-*"))
    assert found.summary().startswith("8 of 8 shards are intact (")


def test_every_kind_of_trouble_is_found_by_name(copy, tmp_path):
    flaky(tmp_path / "other", 750, seed=6)
    damage(copy, tmp_path / "other")
    (copy / "notes.txt").write_text("x")
    found = check_store(copy)
    assert {f.shard: f.kind for f in found.findings} == EXPECTED
    assert all(f.file == shard_name(f.shard) and f.file in f.what for f in found.findings)
    assert found.n_whole == 2 and found.strays == ("notes.txt",) and not found.ok
    damaged = next(f for f in found.findings if f.kind == "damaged")
    assert "dataset x has checksum" in damaged.what
    assert "2 of 8 shards are intact; 1 damaged, 2 foreign, 1 misplaced, 1 missing, 1 surplus, 1 truncated" in found.summary()


def test_rows_that_come_twice_are_found(copy):
    header = Store(copy)._manifest.header
    from sbi_phys.store.manifest import read_shard
    from sbi_phys.store.shards import write_shard

    write_shard(copy / shard_name(3), header, 3, read_shard(copy, Store(copy)._manifest, 0))
    (finding,) = check_store(copy).findings
    assert (finding.kind, finding.shard) == ("duplicate", 3) and "same rows as shard-00000.h5" in finding.what


def test_repair_loses_nothing_and_simulate_fills_the_gaps(made, copy, tmp_path):
    flaky(tmp_path / "other", 750, seed=6)
    damage(copy, tmp_path / "other")
    broken = {i: (copy / shard_name(i)).read_bytes() for i in EXPECTED if i != 5}
    good = {name: d for name, d in digests(made).items() if name in (shard_name(0), shard_name(7))}
    done = repair_store(copy)
    assert done.to_make == (1, 2, 3, 4, 5, 6)
    assert {copy / name for name in done.moved} == {copy / "broken" / shard_name(i) for i in broken}
    for i, content in broken.items():
        assert (copy / "broken" / shard_name(i)).read_bytes() == content
    for name, digest in good.items():
        assert digests_of(copy)[name] == digest
    flaky(copy, 750)
    assert digests_of(copy) == digests_of(made)
    assert check_store(copy).ok
    # a second break of the same file finds another name
    (copy / shard_name(1)).write_bytes(b"")
    assert repair_store(copy).moved == (f"broken/{shard_name(1)}.1",)


def digests_of(folder):
    (folder / "broken").rename(folder.with_name("set-aside")) if (folder / "broken").exists() else None
    try:
        return digests(folder)
    finally:
        if folder.with_name("set-aside").exists():
            folder.with_name("set-aside").rename(folder / "broken")


def test_repair_of_a_good_store_changes_nothing(copy):
    before = digests(copy)
    done = repair_store(copy)
    assert (done.moved, done.to_make, done.notes) == ((), (), ()) and digests(copy) == before


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_lost_manifest_is_rebuilt_from_the_shards(made, copy, text):
    (copy / "store.json").unlink()
    if text is not None:
        (copy / "store.json").write_text(text)
    (copy / shard_name(2)).write_bytes(b"")
    done = repair_store(copy)
    assert done.to_make == (2,) and len(done.notes) == 1 and "rebuilt from 7 shards for 750 rows" in done.notes[0]
    assert ("broken/store.json" in done.moved) == (text is not None)
    assert json.loads((copy / "store.json").read_text())["n"] == 750
    flaky(copy, 750)
    np.testing.assert_array_equal(Store(copy).read()[1], Store(made).read()[1])


def test_a_newer_file_is_left_alone(copy):
    with h5py.File(copy / shard_name(1), "r+") as file:
        file.attrs["schema"] = 9
    assert [f.kind for f in check_store(copy).findings] == ["schema"]
    done = repair_store(copy)
    assert done.moved == () and "schema 9" in done.notes[0] and (copy / shard_name(1)).exists()


def test_what_cannot_be_repaired_says_why(copy, tmp_path):
    with StoreLock(copy), pytest.raises(StoreError, match="is being written by another"):
        repair_store(copy)
    with pytest.raises(StoreError, match="is not a folder"):
        repair_store(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="neither a manifest nor a shard"):
        repair_store(tmp_path / "empty")


def test_ranges():
    assert ranges_text([3, 0, 1, 7, 2]) == "0-3, 7"
    assert ranges_text(range(0, 20, 2), most=2) == "0, 2 and 8 more ranges"
    assert ranges_text([]) == ""
