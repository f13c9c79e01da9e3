import pytest

from sbi_phys.core.errors import SettingError, StoreError
from sbi_phys.store.manifest import existing_header, list_shards, read_manifest, shard_range
from sbi_phys.store.shards import shard_name
from sbi_phys.store.store import Store
from tests.store.helpers import flaky


@pytest.fixture
def copy(tmp_path):
    return flaky(tmp_path / "copy").path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no store.json \(4 shards\)"),
        ("", "store.json cannot be read"),
        ("[]", "is not the manifest of a store"),
        ('{"format": "other"}', "is not the manifest of a store"),
        (
            '{"format": "sbi_phys simulation store", "schema": 3, "package_version": "9"}',
            "schema 3, written by sbi_phys 9; expected 2: update",
        ),
        ('{"format": "sbi_phys simulation store", "schema": 2, "n": "7"}', "n = '7'"),
        ('{"format": "sbi_phys simulation store", "schema": 2, "n": 7}', "has no field 'simulator'"),
    ],
)
def test_a_bad_manifest_is_named(copy, text, message):
    (copy / "store.json").unlink()
    if text is not None:
        (copy / "store.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        Store(copy)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(StoreError, match="nowhere is not a folder"):
        Store(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is not a folder"):
        Store(tmp_path / "file")


def test_other_files_in_the_folder_do_no_harm(copy):
    for name in ("notes.txt", "shard-1.h5", "shard-00001.h5.bak", "shard-000002.h5"):
        (copy / name).write_text("x")
    assert list_shards(copy) == [0, 1, 2, 3]
    Store(copy).verify()


@pytest.mark.parametrize(
    ("given", "expected"),
    [(3, range(3, 4)), ("3", range(3, 4)), ("2:5", range(2, 5)), (range(2, 5), range(2, 5)), ("0/3", range(3)), ("2/3", range(6, 10))],
)
def test_shard_ranges(given, expected):
    assert shard_range(given, 10) == expected


@pytest.mark.parametrize("given", ["", "a", "3:", -1, 10, "5:5", "5:11", "3/3", range(0, 4, 2), True, 1.5])
def test_bad_shard_ranges_are_named(given):
    with pytest.raises(SettingError, match=r"shards (is )?.*expected"):
        shard_range(given, 10)


def test_parts_cover_every_shard_once():
    for n in (1, 7, 64):
        for parts in range(1, n + 1):
            assert [i for part in range(parts) for i in shard_range(f"{part}/{parts}", n)] == list(range(n))


def test_the_header_comes_from_the_manifest_or_a_shard(copy):
    header = read_manifest(copy).header
    (copy / "store.json").unlink()
    assert existing_header(copy) == header
    for i in list_shards(copy):
        (copy / shard_name(i)).unlink()
    assert existing_header(copy) is None
