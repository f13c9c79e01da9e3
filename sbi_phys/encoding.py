"""Values and checksums as they stand in the files of a store: attributes as fixed-length UTF-8, CRC-32 for every dataset.

CRC-32 finds every burst of up to 32 wrong bits, and any other damage but for one case in 4e9. It guards against disks and
networks, not against forgery. It is the fastest checksum of the standard library.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

__all__ = ["array_checksum", "attribute", "header_checksum", "legacy_checksum", "plain", "set_attributes", "to_json"]


def to_json(value: Any) -> str:
    """JSON text of a value, the same for equal values."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def attribute(value: Any) -> Any:
    """Return a JSON-like value as what HDF5 stores: integers as int64, a bool as uint8, all else as UTF-8 text."""
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
    """Inverse of `attribute`, but for JSON, which stays text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def set_attributes(file: h5py.File, values: Mapping[str, Any]) -> None:
    """Write encoded attributes of the root group: through HDF5's own calls, h5py's cost as much as the data of a small shard."""
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    for name, value in values.items():
        array = np.asarray(value)
        kind = h5py.h5t.py_create(array.dtype, logical=True)
        space = h5py.h5s.create_simple(array.shape) if array.ndim else scalar
        h5py.h5a.create(file.id, name.encode(), kind, space).write(array, mtype=kind)


def array_checksum(array: NDArray[Any], name: str = "", crc: int = 0) -> int:
    """CRC-32 over name, shape, dtype and bytes of an array."""
    array = np.ascontiguousarray(array)
    crc = zlib.crc32(f"{name} {array.shape} {array.dtype.str}".encode(), crc)
    return zlib.crc32(array.view(np.uint8).data if array.size else b"", crc)


def header_checksum(attributes: Mapping[str, Any]) -> str:
    """CRC-32 over all attributes but the checksum itself; those of the datasets are among them."""
    text = to_json({name: plain(value) for name, value in attributes.items() if name != "checksum"})
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def legacy_checksum(attributes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Checksum of schema 1: one CRC-32 over all attributes and then all arrays."""
    text = to_json({name: plain(value) for name, value in attributes.items() if name != "checksum"})
    crc = zlib.crc32(text.encode())
    for name in ("theta", "x", "status", "failed_row", "reason"):
        crc = array_checksum(arrays[name], name, crc)
    return f"crc32:{crc:08x}"
