"""Files of weights and plain values: written atomically, and read without executing code.

The format is torch's zip archive restricted to tensors, numbers, text, lists and dicts (`weights_only=True`), so reading a file from an
unknown source cannot execute anything.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from sbi_phys.core.errors import ModelFileError
from sbi_phys.core.files import open_aside

__all__ = ["read_file", "write_file"]

_MAGIC = "sbi_phys"
_SAFE_TORCH = (
    2,
    10,
)  # before, torch.load(weights_only=True) could be made to run code (CVE-2025-32434 until 2.6, CVE-2026-24747 until 2.10)


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
        if not zipfile.is_zipfile(path):
            raise ModelFileError(f"{path} is truncated or not a file of sbi_phys (no zip archive); expected a file of kind {kind!r}")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as err:
        # the first line only, because torch adds advice on how to unpickle the file
        raise ModelFileError(f"{path} cannot be read as a {kind} file: {str(err).splitlines()[0]}") from err
    if not isinstance(payload, dict) or payload.get("format") != _MAGIC:
        raise ModelFileError(f"{path} was not written by sbi_phys; expected a file of kind {kind!r}")
    if payload.get("kind") != kind:
        raise ModelFileError(f"{path} is a {payload.get('kind')!r} file; expected {kind!r}")
    if payload["version"] > version:
        raise ModelFileError(f"{path} has format version {payload['version']}, expected at most {version}; update sbi_phys")
    content: dict[str, Any] = payload["content"]
    return content


def _require_safe_torch(path: str | Path) -> None:
    """Raise ModelFileError for a torch whose loader of files can be made to run code."""
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _SAFE_TORCH:
        wanted = ".".join(map(str, _SAFE_TORCH))
        raise ModelFileError(
            f"{path} is not read: torch {torch.__version__} can be made to run code by a file; expected torch {wanted} or later"
        )
