import os

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, StoreError
from sbi_phys.store._writer import StoreWriter
from sbi_phys.store.manifest import Manifest, write_manifest
from sbi_phys.store.shards import shard_name, write_shard
from sbi_phys.store.store import Store
from tests.store.helpers import HEADER, rows


def test_the_writer_cuts_rows_into_shards(tmp_path):
    parts = [rows(n, failed=(n - 1,), seed=n) for n in (7, 100, 1, 40)]
    with StoreWriter(tmp_path / "s", HEADER) as writer:
        for part in parts:
            writer.add(part)
    store = Store(tmp_path / "s")
    assert (store.n_rows, store.n_shards) == (148, 4)
    np.testing.assert_array_equal(store.read(valid_only=False)[1], np.concatenate([p.x for p in parts]))
    assert [f.row for f in store.failures()] == [6, 106, 107, 147]
    assert [f.reason for f in store.failures()] == ["row 6 ✗", "row 99 ✗", "row 0 ✗", "row 39 ✗"]
    write_manifest(tmp_path, Manifest(HEADER, 40))
    write_shard(tmp_path / shard_name(0), HEADER, 0, rows(40))
    with pytest.raises(StoreError, match="exists already"), StoreWriter(tmp_path, HEADER):
        pytest.fail("wrote over a store")


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), StoreWriter(tmp_path / "s", HEADER) as writer:
        writer.add(rows(100))
        1 / 0  # noqa: B018
    with pytest.raises(DataError, match="would have no rows"), StoreWriter(tmp_path / "s", HEADER):
        pass
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_store_are_refused(tmp_path):
    with StoreWriter(tmp_path / "s", HEADER) as writer:
        writer.add(rows(10))
        with pytest.raises(StoreError, match="is being written by another"), StoreWriter(tmp_path / "s", HEADER):
            pytest.fail("two at once")
    assert Store(tmp_path / "s").n_rows == 10


def test_a_link_in_place_of_the_unfinished_folder_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    (tmp_path / ".s.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"\.s\.part is a link or belongs to another user"), StoreWriter(tmp_path / "s", HEADER):
        pytest.fail("built in another folder")
    assert os.listdir(tmp_path / "elsewhere") == ["kept"]
