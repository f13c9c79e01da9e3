"""Files of weights and plain values: written atomically, and read without executing code.

The format is torch's zip archive restricted to tensors, numbers, text, lists and dicts (`weights_only=True`), so reading a file from an
unknown source cannot execute anything. Every entry of the archive has a CRC-32, which torch does not look at: here it is compared
before anything is read, so a damaged file is refused. It protects against faults of disks and networks, not against forgery.
"""

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sbi_phys.core.checksums import crc32
from sbi_phys.core.errors import ModelFileError
from sbi_phys.core.files import open_aside

__all__ = ["read_file", "write_file"]

_MAGIC = "sbi_phys"
# before, torch.load(weights_only=True) could be made to run code (CVE-2025-32434 until 2.6, CVE-2026-24747 until 2.10)
_SAFE_TORCH = (2, 10)
_PIECE = 2**20
_PLAIN = "expected tensors with their own values, numbers, text, lists and dicts"
# what zipfile, torch's reader and its restricted unpickler raise for bytes that were not written by `write_file`
_UNREADABLE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError, MemoryError,
    RecursionError, OverflowError, ArithmeticError, NotImplementedError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error,
)  # fmt: skip


def write_file(path: str | Path, kind: str, version: int, content: dict[str, Any]) -> None:
    """Write `content` (tensors and plain values) as a file of the given kind; `path` is replaced only when complete.

    Raises: ModelFileError if the folder is missing or the disk is full; the former file then stays as it was.
    """
    advice = "expected a writable folder with room on its disk; the former file, if any, is unchanged"
    with open_aside(path, sync=True, error=ModelFileError, advice=advice) as file:
        torch.save({"format": _MAGIC, "kind": kind, "version": version, "content": content}, file)


def read_file(path: str | Path, kind: str, version: int) -> dict[str, Any]:
    """Read the content of a file of the given kind, on the CPU.

    Raises: ModelFileError if the file is missing, truncated, of another program, of another kind or of a newer version.
    """
    _require_safe_torch(path)
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file; expected a file of kind {kind!r} written by sbi_phys")
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ModelFileError(f"{path} is truncated or not a file of sbi_phys (no zip archive); expected a file of kind {kind!r}")
            _require_intact(path, file)
            file.seek(0)
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except ModelFileError:
        raise
    except _UNREADABLE as err:
        # the first line only, because torch adds advice on how to unpickle the file
        raise ModelFileError(f"{path} cannot be read as a {kind} file: {_first_line(err)}") from err
    if not isinstance(payload, dict) or payload.get("format") != _MAGIC:
        raise ModelFileError(f"{path} was not written by sbi_phys; expected a file of kind {kind!r}")
    if payload.get("kind") != kind:
        raise ModelFileError(f"{path} is a {payload.get('kind')!r} file; expected {kind!r}")
    got, content = payload.get("version"), payload.get("content")
    if not isinstance(got, int) or not isinstance(content, dict):
        raise ModelFileError(f"{path} has format version {got!r} and a {type(content).__name__} as content; expected a number and a dict")
    if got > version:
        raise ModelFileError(f"{path} has format version {got}, expected at most {version}; update sbi_phys")
    _require_plain(path, content)
    return content


def _require_safe_torch(path: str | Path) -> None:
    """Raise ModelFileError for a torch whose loader of files can be made to run code."""
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _SAFE_TORCH:
        wanted = ".".join(map(str, _SAFE_TORCH))
        raise ModelFileError(
            f"{path} is not read: torch {torch.__version__} can be made to run code by a file; expected torch {wanted} or later"
        )


def _require_plain(path: Path, value: Any) -> None:
    """Raise ModelFileError unless a value is of tensors that hold their own values, numbers, text, lists and dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_plain(path, key)
            _require_plain(path, item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _require_plain(path, item)
    elif isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        # a tensor may have any shape over a few values, whose copy would take all memory
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ModelFileError(f"{path} holds a tensor {tuple(value.shape)} on {value.device}; {_PLAIN}")
    elif not isinstance(value, int | float | str | None):
        raise ModelFileError(f"{path} holds a {type(value).__name__}; {_PLAIN}")


def _require_intact(path: Path, file: BinaryIO) -> None:
    """Raise ModelFileError unless the archive is as torch writes it, and every entry agrees with its checksum."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise ModelFileError(f"{path} holds the entry {max(names, key=names.count)!r:.100} twice; expected every entry once")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > size:
            raise ModelFileError(f"{path} has entries that are compressed, or longer than its {size} bytes; expected plain ones")
        for entry in entries:
            # zipfile compares the checksum at the end of an entry, but only where its headers agree; so all bytes are counted here
            crc, n_bytes = 0, 0
            with archive.open(entry) as content:
                while piece := content.read(_PIECE):
                    crc, n_bytes = crc32(piece, crc), n_bytes + len(piece)
            if crc != entry.CRC or n_bytes != entry.file_size:
                raise ModelFileError(f"{path} is damaged: {entry.filename!r:.100} has checksum {crc:08x}; expected {entry.CRC:08x}")


def _first_line(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]
