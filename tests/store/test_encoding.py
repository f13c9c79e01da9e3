import os
import zlib
from dataclasses import replace

import h5py
import numpy as np
import pytest

from sbi_phys.core.errors import StoreError
from sbi_phys.store import _encoding as encoding
from sbi_phys.store._encoding import (
    MARK,
    Label,
    array_checksum,
    attribute,
    block_size,
    header_checksum,
    plain,
    read_attributes,
    read_label,
    set_attributes,
)
from sbi_phys.store.layout import Layout
from sbi_phys.store.manifest import Manifest, write_manifest
from sbi_phys.store.shards import open_shard, shard_name, verify_shard, write_shard
from sbi_phys.store.store import Store
from tests.store.helpers import HEADER, rows

WIDE = replace(HEADER, shard_size=3000)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / shard_name(2)
    write_shard(path, WIDE, 2, rows(3000, failed=(0, 5)))
    return path


def test_the_label_says_what_the_file_holds(path):
    label = read_label(path)
    assert (label.header, label.shard, label.rows, label.n_failed) == (WIDE.digest(), 2, 3000, 2)
    assert label.kinds == {"row # ✗": 2} and label.size == path.stat().st_size
    data, want = path.read_bytes(), rows(3000, failed=(0, 5))
    assert data.startswith(MARK) and data[label.block : label.block + 4] == b"\x89HDF"
    with h5py.File(path) as file:
        assert file.userblock_size == label.block == 1024
        sums = dict(zip(plain(file.attrs["datasets"]), plain(file.attrs["checksums"]), strict=True))
    # each run of bytes is the values of one dataset, and its checksum is that dataset's
    stored = {"theta": want.theta, "x": want.x, "status": want.status}
    found = {crc: data[start : start + length] for start, length, _, crc in label.ranges}
    for name, array in stored.items():
        assert found[int(sums[name].removeprefix("crc32:"), 16)] == array.tobytes()
    # the others and these together are the file
    rest, at = b"", label.block
    for start, length, _, _ in label.ranges:
        assert start >= at
        rest, at = rest + data[at:start], start + length
    assert zlib.crc32(rest + data[at:]) == label.rest


def test_a_label_is_proof_enough_and_a_file_without_one_is_read_as_well(path, monkeypatch):
    content = verify_shard(path, WIDE, 2, 3000)
    bare = path.with_name(shard_name(1))
    bare.write_bytes(path.read_bytes()[read_label(path).block :])  # as older versions wrote them
    assert read_label(bare) is None and verify_shard(bare, WIDE, 2, 3000) == content
    monkeypatch.setattr("sbi_phys.store.shards.open_shard", None)
    assert verify_shard(path, WIDE, 2, 3000) == content


@pytest.mark.parametrize(("place", "message"), [(WIDE, "holds shard 2 with 3000 rows; expected shard 3"), (HEADER, "another shard_size")])
def test_a_whole_file_in_the_wrong_place_is_named(path, place, message):
    with pytest.raises(StoreError, match=message):
        verify_shard(path, place, 3, 3000)


def test_every_byte_counts(path):
    data, label = path.read_bytes(), read_label(path)
    places = [0, 30, label.block - 1, label.block, label.block + 9, len(data) - 1]
    places += [start + d for start, length, _, _ in label.ranges for d in (-1, 0, length - 1, length) if start + d < len(data)]
    for at in {*places, *range(0, len(data), 9973)}:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(StoreError, match="damaged|cannot be read"):
            verify_shard(path, WIDE, 2, 3000)
    path.write_bytes(data + b"more")
    assert read_label(path) is None
    with pytest.raises(StoreError, match="its bytes do not agree with the label"):
        verify_shard(path, WIDE, 2, 3000)


def test_what_hdf5_changes_in_place_is_seen(path):
    with h5py.File(path, "r+") as file:
        file["x"][7, 0] += 1
    with pytest.raises(StoreError, match="is damaged: dataset x has checksum"):
        verify_shard(path, WIDE, 2, 3000)


def test_compressed_values_are_covered_too(tmp_path):
    header = replace(WIDE, layout=Layout(compression="gzip:1").plain())
    path = tmp_path / shard_name(0)
    write_shard(path, header, 0, rows(3000))
    assert verify_shard(path, header, 0, 3000)
    data = path.read_bytes()
    for at in range(0, len(data), 1999):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(StoreError, match="damaged|cannot be read"):
            verify_shard(path, header, 0, 3000)


def test_counts_come_from_labels_without_opening_a_file(tmp_path, monkeypatch):
    write_manifest(tmp_path, Manifest(HEADER, 120))
    for i, failed in enumerate([(), (1,), (2, 3)]):
        write_shard(tmp_path / shard_name(i), HEADER, i, rows(failed=failed, seed=i))
    monkeypatch.setattr("sbi_phys.store.info.open_shard", None)
    assert (Store(tmp_path).n_failed, Store(tmp_path).n_ok) == (3, 117)


def test_kinds_that_do_not_fit_are_read_from_the_file(tmp_path):
    many = {f"kind {chr(97 + i % 26)}{chr(97 + i // 26)}" + "x" * 100: 1 for i in range(40)}
    assert block_size(5, {}) == (1024, {}) and block_size(5, many) == (1024, None)
    assert block_size(40, {}) == (4096, {})
    data = replace(rows(failed=range(40)), reasons=dict(enumerate(many)))
    write_manifest(tmp_path, Manifest(HEADER, 40))
    write_shard(tmp_path / shard_name(0), HEADER, 0, data)
    assert read_label(tmp_path / shard_name(0)).kinds is None
    assert Store(tmp_path).n_failed == 40


def test_labels_survive_their_own_text():
    label = Label("é", 1, 2, 3, {'"crc32:0" \x00 {}': 1}, "", 512, 9, ((1, 2, 3, 4),), 5)
    assert replace(Label.decode(label.encode()), ranges=((1, 2, 3, 4),)) == label
    assert len(label.encode()) == 512
    for text in (b"", MARK, MARK + b"{} crc32:00000000", b"\x89HDF\r\n\x1a\n"):
        assert Label.decode(text) is None
    wrong = MARK + b"{} "
    assert Label.decode(wrong + encoding.text_checksum(wrong).encode()) is None  # whole, and none of this version's


def test_attributes_come_back_as_h5py_reads_them(path, tmp_path):
    with open_shard(path) as file:
        got = read_attributes(file)
        assert list(got) and set(got) == set(file.attrs)
        for name, value in file.attrs.items():
            assert np.array_equal(got[name], value) and np.asarray(got[name]).dtype == np.asarray(value).dtype
        assert header_checksum(got) == plain(got["checksum"])  # what the writer puts together from parts
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file.attrs["text"], file.attrs["real"] = "of any length", 1.5
        set_attributes(file.id, {"n": attribute(3)})
        assert read_attributes(file) == {"text": "of any length", "real": 1.5, "n": 3}


def test_isals_checksum_is_zlibs():
    isal = pytest.importorskip("isal.isal_zlib")
    for text in (b"", b"a", os.urandom(100_001)):
        assert isal.crc32(text) == zlib.crc32(text) and isal.crc32(text, 77) == zlib.crc32(text, 77)


def test_the_checksum_covers_shape_and_dtype():
    zeros = np.zeros(4, dtype="<f4")
    sums = {array_checksum(a) for a in (zeros, zeros.reshape(2, 2), zeros.astype("<i4"), zeros[:0])}
    assert len(sums) == 4
