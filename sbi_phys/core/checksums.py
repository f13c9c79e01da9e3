r"""Checksums of JSON values and of whole files, and what identifies a file that was checked once.

CRC-32 detects every burst of up to 32 wrong bits and other damage except one case in 4e9. It protects against faults of disks
and networks, not against forgery. Where the package isal is installed, the same checksums are computed five times as fast.

    text = json.dumps(seal({"rows": 100}))      # with an entry "checksum" over all others
    require_seal(json.loads(text), "rows.json", error=StoreError)

A trailer is a line behind the content of a binary file, in a format whose readers ignore what follows (HDF5, .npy):

    \nsbi_phys crc32:1f2e3d4c of 00000000000000012345 bytes\n
"""

import json
import os
import re
from collections.abc import Collection
from typing import Any, BinaryIO

from sbi_phys.core.errors import DataError, SbiPhysError

try:
    from isal.isal_zlib import crc32  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from zlib import crc32

__all__ = ["FileKey", "append_trailer", "crc32", "file_key", "has_trailer", "require_seal", "seal", "text_checksum", "to_json"]

_SEAL = "checksum"
_TRAILER = re.compile(rb"\nsbi_phys crc32:([0-9a-f]{8}) of ([0-9]{20}) bytes\n")
_LENGTH = len("\nsbi_phys crc32:00000000 of 00000000000000000000 bytes\n")
_PIECE = 2**18  # bytes whose checksum is computed at once; they fit into the processor's cache

FileKey = tuple[int, int, int, int, int]


def file_key(facts: os.stat_result) -> FileKey:
    """Device, inode, times of the last change (content, attributes) and size: equal for a file that is still the same."""
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size


def to_json(value: Any) -> str:
    """Return the JSON text of a value, the same for equal values."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def text_checksum(text: str | bytes) -> str:
    """Return the CRC-32 of a text as it is written in a file.

    >>> text_checksum("theta")
    'crc32:0b188a09'
    """
    return f"crc32:{crc32(text.encode() if isinstance(text, str) else text):08x}"


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Return JSON values with the checksum of all of them under "checksum".

    >>> sealed = seal({"rows": 100})
    >>> require_seal(sealed, "rows.json")
    >>> require_seal(sealed | {"rows": 101}, "rows.json")
    Traceback (most recent call last):
    ...
    sbi_phys.core.errors.SbiPhysError: rows.json is damaged: its content has checksum ...
    """
    return {**values, _SEAL: _checksum(values)}


def require_seal(
    values: dict[str, Any], where: str, *, unsealed: Collection[str] = (), error: type[SbiPhysError] = SbiPhysError, advice: str = ""
) -> None:
    """Raise an error unless JSON values agree with their checksum.

    Args: where: the file, for the message. unsealed: names of the entries of an older file without a checksum; such a file is
    accepted if it has no other entry, so that a damaged name of the checksum is not taken for its absence. error, advice: of the message.
    """
    if _SEAL not in values and unsealed and set(values) <= set(unsealed):
        return
    got = _checksum({name: value for name, value in values.items() if name != _SEAL})
    if got != values.get(_SEAL):
        raise error(f"{where} is damaged: its content has checksum {got}, expected {values.get(_SEAL, 'one')!s:.100}{advice}")


def append_trailer(file: BinaryIO) -> None:
    """Write the checksum of all bytes of an open file behind them.

    >>> from pathlib import Path
    >>> _ = Path("draws.bin").write_bytes(b"1234")
    >>> with open("draws.bin", "rb+") as file:
    ...     append_trailer(file)
    >>> has_trailer("draws.bin")
    True
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    crc = _crc(file, size)
    file.seek(size)
    file.write(f"\nsbi_phys crc32:{crc:08x} of {size:020d} bytes\n".encode())


def has_trailer(path: str | os.PathLike[str]) -> bool:
    """Whether a file ends with the checksum of its content and agrees with it; False if it has none.   Raises: DataError, OSError."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - _LENGTH
        if size < 0:
            return False
        file.seek(size)
        match = _TRAILER.fullmatch(file.read())
        if match is None:
            return False
        if int(match[2]) != size:
            raise DataError(f"{path} has {size} bytes before its checksum; expected {int(match[2])}: it is damaged")
        file.seek(0)
        crc = _crc(file, size)
        if crc != int(match[1], 16):
            raise DataError(f"{path} is damaged: its {size} bytes have checksum {crc:08x}; expected {match[1].decode()}")
    return True


def _crc(file: BinaryIO, size: int) -> int:
    crc = 0
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        crc, size = crc32(piece, crc), size - len(piece)
    return crc


def _checksum(values: dict[str, Any]) -> str:
    # as they are after writing and reading: tuples are lists, keys are text
    return text_checksum(to_json(json.loads(json.dumps(values))))
