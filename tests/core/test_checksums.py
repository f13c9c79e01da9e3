"""Checksums of JSON values and of whole files: what is damaged is refused, what is harmless is not."""

import json
import os
from pathlib import Path

import pytest

from sbi_phys.core.checksums import append_trailer, file_key, has_trailer, require_seal, seal, text_checksum
from sbi_phys.core.errors import DataError, SbiPhysError

VALUES = {"n": 7, "x": [1.5, -2.0, 1e300], "name": "é", "nested": {"a": None, "b": [True, "x"]}, "pair": (1, 2)}


def test_a_sealed_value_survives_json_and_any_layout_of_its_text():
    for indent in (None, 1):
        require_seal(json.loads(json.dumps(seal(VALUES), indent=indent)), "values")
    require_seal(dict(reversed(json.loads(json.dumps(seal(VALUES))).items())), "values")


@pytest.mark.parametrize(
    "change",
    [
        {"n": 8},
        {"n": 7.0000001},
        {"x": [1.5, -2.0, 2e300]},
        {"nested": {}},
        {"more": 1},
        {"checksum": "crc32:00000000"},
        {"checksum": None},
    ],
)
def test_every_other_value_is_damage(change):
    values = json.loads(json.dumps(seal(VALUES)))
    with pytest.raises(DataError, match=r"values\.json is damaged: its content has checksum crc32:.*; remove it"):
        require_seal(values | change, "values.json", error=DataError, advice="; remove it")


def test_a_missing_checksum_is_accepted_only_for_the_content_of_an_older_file():
    require_seal(VALUES, "values", unsealed=VALUES)
    for values in (VALUES | {"chfcksum": "crc32:0"}, {}):
        if values:
            with pytest.raises(SbiPhysError, match="is damaged"):
                require_seal(values, "values", unsealed=VALUES)
    with pytest.raises(SbiPhysError, match="is damaged"):
        require_seal(VALUES, "values")


def test_a_file_with_a_trailer_tells_every_changed_byte(tmp_path: Path):
    path = tmp_path / "draws.nc"
    path.write_bytes(bytes(range(256)) * 3)
    assert not has_trailer(path)
    with open(path, "rb+") as file:
        append_trailer(file)
    whole = path.read_bytes()
    assert has_trailer(path)
    for at in range(0, 768, 37):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"draws\.nc is damaged: its 768 bytes have checksum"):
            has_trailer(path)
    path.write_bytes(whole[100:])
    with pytest.raises(DataError, match="has 668 bytes before its checksum; expected 768"):
        has_trailer(path)
    path.write_bytes(whole[:-1])  # the content is whole
    assert not has_trailer(path)


def test_the_key_of_a_file_changes_with_it(tmp_path: Path):
    path = tmp_path / "a"
    path.write_text("1234")
    key = file_key(path.stat())
    assert key == file_key(path.stat())
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("1235")
    os.utime(path, ns=times)  # the same size and time of change
    assert file_key(path.stat()) != key
    assert text_checksum("1234") != text_checksum(b"1235")
