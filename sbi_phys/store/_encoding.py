"""Encoding of values and checksums in the files of a store: attributes as fixed-length UTF-8, CRC-32 of every dataset, the label.

The label stands before the HDF5 content of a shard, in HDF5's user block, which other programs skip:

    sbi_phys shard label {"header": ..., "shard": 3, "rows": 4096, ...} crc32:1f2e3d4c

It gives the counts with one short read, and verifies the file with one read and without HDF5. Every dataset that is contiguous
in the file has a checksum of its own there; `rest` covers all other bytes behind the block. Where the label is missing or does
not match the file, the HDF5 content decides.
"""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import h5py
import numpy as np

from sbi_phys.core.checksums import crc32, text_checksum, to_json
from sbi_phys.core.errors import StoreError
from sbi_phys.core.files import write_aside
from sbi_phys.core.types import AnyArray
from sbi_phys.store.layout import hdf5_type

__all__ = [
    "MARK",
    "MOST_RANGES",
    "SYNCED",
    "Label",
    "array_checksum",
    "array_seed",
    "attribute",
    "block_size",
    "check_label",
    "difference",
    "header_checksum",
    "plain",
    "read_ahead",
    "read_attributes",
    "read_label",
    "reason_kind",
    "set_attributes",
    "text_checksum",
    "to_json",
    "write_file",
]


# How files of a store are written.
SYNCED: dict[str, Any] = {
    "sync": True,
    "error": StoreError,
    "advice": "shards that are finished are intact, the same call continues after them",
}
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?")


def attribute(value: Any) -> Any:
    """Return a JSON-like value in the form that HDF5 stores: integers as int64, a bool as uint8, everything else as UTF-8 text."""
    if isinstance(value, bool):
        return np.uint8(value)
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        encoded = [v.encode() for v in value]
        # HDF5 has no strings of length zero
        return np.array(encoded, dtype=f"S{max(1, *map(len, encoded), 1)}")
    return np.bytes_((value if isinstance(value, str) else to_json(value)).encode())


def plain(value: Any) -> Any:
    """Inverse of `attribute`, except that JSON stays text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def set_attributes(file: h5py.h5f.FileID, values: Mapping[str, Any]) -> None:
    """Write encoded attributes of the root group by HDF5's low-level calls: h5py takes as long as for the data of a small shard."""
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    for name, value in values.items():
        array = np.asarray(value)
        kind = hdf5_type(array.dtype.str)
        space = h5py.h5s.create_simple(array.shape) if array.ndim else scalar
        h5py.h5a.create(file, name.encode(), kind, space).write(array, mtype=kind)


def read_attributes(file: h5py.File) -> dict[str, Any]:
    """Return the encoded attributes of the root group by HDF5's low-level calls: h5py takes five times as long."""
    values: dict[str, Any] = {}
    root = file.id
    for i in range(h5py.h5a.get_num_attrs(root)):
        item = h5py.h5a.open(root, index=i)
        name, dtype = item.name.decode(), item.dtype
        if dtype.kind not in "iuS":  # not written by this package
            values[name] = file.attrs[name]
            continue
        array = np.empty(item.shape, dtype=dtype)
        item.read(array)
        values[name] = array if array.ndim else array[()]
    return values


def array_checksum(array: AnyArray, name: str = "", crc: int = 0) -> int:
    """Return the CRC-32 of name, shape, dtype and bytes of an array."""
    array = np.ascontiguousarray(array)
    return crc32(array.view(np.uint8).data if array.size else b"", array_seed(array, name, crc))


def array_seed(array: AnyArray, name: str = "", crc: int = 0) -> int:
    """Return the CRC-32 of name, shape and dtype of an array, where that of its bytes starts."""
    return crc32(f"{name} {array.shape} {array.dtype.str}".encode(), crc)


def header_checksum(attributes: Mapping[str, Any]) -> str:
    """Return the CRC-32 of all attributes except the checksum itself; the checksums of the datasets are among them."""
    return text_checksum(to_json({name: plain(value) for name, value in attributes.items() if name != "checksum"}))


def reason_kind(reason: str) -> str:
    """Return a reason with # in place of its numbers, so that equal failures of different rows count as one kind."""
    return _NUMBER.sub("#", reason)[:120]


def difference(mine: Any, theirs: Any) -> tuple[str, str]:
    """Return two values as short text; of dicts, only the first entry that differs."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            if mine.get(key) != theirs.get(key):
                inner = difference(mine.get(key), theirs.get(key))
                return f"{key} = {inner[0]}", f"{key} = {inner[1]}"
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                inner = difference(a, b)
                return f"[{i}] {inner[0]}", f"[{i}] {inner[1]}"
    short = [text if len(text) <= 200 else text[:200] + " ..." for text in map(repr, (mine, theirs))]
    return short[0], short[1]


MARK = b"sbi_phys shard label "
_PIECE = 2**18  # bytes read at once; fits into the processor's cache
_MOST = 4096  # bytes of the largest block
MOST_RANGES = 40  # contiguous ranges with a checksum of their own; a shard with more datasets has none

Range = tuple[int, int, int, int]  # first byte, bytes, the CRC-32 to begin with, the CRC-32 at the end


@dataclass(frozen=True, slots=True)
class Label:
    """Summary and checksums of a shard's file.

    Fields: header, digest of the store's header; shard, rows, n_failed; kinds, failed rows by kind of reason (None: too many
    for the label); content, checksum of theta and x; block, bytes before the HDF5 content; size of the file; ranges; rest.
    """

    header: str
    shard: int
    rows: int
    n_failed: int
    kinds: Mapping[str, int] | None
    content: str
    block: int
    size: int
    ranges: Sequence[Range]
    rest: int

    def encode(self) -> bytes:
        """Return the block: text, checksum of the text, zeros."""
        values = {name: getattr(self, name) for name in self.__slots__}
        text = MARK + to_json(values).encode() + b" "
        return (text + text_checksum(text).encode()).ljust(self.block, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Self | None:
        """Inverse of `encode`, from the first bytes of a file; None if the label is missing or damaged."""
        whole = data.partition(b"\0")[0]
        text, mark, crc = whole.rpartition(b"crc32:")
        if not text.startswith(MARK) or text_checksum(text).encode() != mark + crc:
            return None
        try:
            values = json.loads(text[len(MARK) :])
            label = cls(**{name: values[name] for name in cls.__slots__})
        except (ValueError, KeyError, TypeError):
            return None
        return label if whole == data[: label.block].rstrip(b"\0") else None

    def with_rest(self, file: io.FileIO) -> "Label":
        """Return the label with the size of the written file and the checksum of the bytes outside of the ranges."""
        size, rest, at = os.fstat(file.fileno()).st_size, 0, self.block
        gaps = size - self.block - sum(length for _, length, _, _ in self.ranges)
        piece = memoryview(bytearray(max(1, min(gaps, _PIECE))))
        for start, length, _, _ in [*self.ranges, (size, 0, 0, 0)]:
            file.seek(at)
            rest = _crc(file, start - at, rest, piece)
            at = start + length
        return replace(self, size=size, rest=rest)

    def fits(self, file: BinaryIO) -> bool:
        """Whether every byte of the open file agrees with the label.   Raises: OSError."""
        if os.fstat(file.fileno()).st_size != self.size:
            return False
        rest, at, piece = 0, self.block, memoryview(bytearray(min(_PIECE, max(self.size, 1))))
        file.seek(at)
        for start, length, seed, expected in [*self.ranges, (self.size, 0, 0, 0)]:
            rest = _crc(file, start - at, rest, piece)
            if _crc(file, length, seed, piece) != expected:
                return False
            at = start + length
        return rest == self.rest


def block_size(n_ranges: int, kinds: Mapping[str, int]) -> tuple[int, Mapping[str, int] | None]:
    """Return the bytes of the block, a power of two as HDF5 requires, and the kinds if they fit into it."""
    words = to_json(dict(kinds))
    for shown in (kinds, None):
        need = 400 + 64 * n_ranges + (len(words.encode()) if shown else 4)
        block = 512
        while block < need:
            block *= 2
        if block <= _MOST:
            break
    return block, shown


def read_label(path: Path) -> Label | None:
    """Return the label of a file, None if it is missing, damaged or of another size, or if the file cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            label = Label.decode(os.pread(handle, _MOST, 0))
            return label if label is None or os.fstat(handle).st_size == label.size else None
        finally:
            os.close(handle)
    except OSError:
        return None


def check_label(path: Path) -> tuple[Label | None, bool]:
    """Return the label of a file, None if missing or damaged, and whether every byte agrees with it.   Raises: OSError."""
    with open(path, "rb", buffering=0) as file:
        label = Label.decode(file.read(_MOST))
        return label, label is not None and label.fits(file)


def read_ahead(path: Path) -> None:
    """Ask the system to start reading a file that is needed soon, where it supports that."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)


def _crc(file: Any, length: int, crc: int, piece: memoryview) -> int:
    """Return the CRC-32 of the next bytes of a file; -1 if it ends before."""
    while length:
        got = file.readinto(piece[: min(length, len(piece))])
        if not got:
            return -1
        crc = crc32(piece[:got], crc)
        length -= got
    return crc


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file of a store atomically.   Raises: StoreError, e.g. where the disk is full."""
    write_aside(path, content, **SYNCED)
