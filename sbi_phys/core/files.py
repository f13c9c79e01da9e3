"""Atomic file writes: a file is written under a temporary name in its folder and renamed when it is complete.

    with open_aside("run/model.pt", sync=True) as file:
        torch.save(weights, file)

A reader finds the former file or the new one, never a part of it, also after a crash or on a full disk. The open file is a
binary file that numpy, torch, matplotlib and h5py accept; a library that accepts only a path gets `file.name`.
"""

import fcntl
import io
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from sbi_phys.core.errors import SbiPhysError, WriteError

__all__ = ["AsideFile", "is_unfinished", "open_aside", "remove_unfinished", "sync_folder", "write_aside"]

_UNFINISHED = re.compile(r"^\..+\.\d{20,}\.tmp$")
_NEW_S = 1.0  # a file may have been opened and not yet locked
_OPEN: set[Path] = set()  # of this process, which its own locks do not keep out


class AsideFile(io.FileIO):
    """A binary file that keeps its first write error in `failure` and ignores later writes.

    HDF5 cannot close a file whose writes fail: it keeps the handle and reports the error again when the interpreter ends.
    `open_aside` therefore raises the error only after the library has closed the file.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all bytes of `data`, or keep the error in `failure`."""
        view = memoryview(data).cast("B")
        if self.failure is None:
            try:
                sent = 0
                while sent < len(view):
                    sent += self._send(view[sent:])
            except OSError as err:
                self._keep(err)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file, or keep the error in `failure`."""
        if self.failure is None:
            try:
                return super().truncate(size)
            except OSError as err:
                self._keep(err)
        return self.tell() if size is None else size

    def _send(self, view: memoryview) -> int:
        return super().write(view) or 0

    def _keep(self, err: OSError) -> None:
        # without its frames, which would keep memory of HDF5 alive until after HDF5 has ended
        self.failure = err.with_traceback(None)


@contextmanager
def open_aside(
    path: str | os.PathLike[str],
    *,
    sync: bool = False,
    make_folder: bool = False,
    error: type[SbiPhysError] = WriteError,
    advice: str = "the former file, if any, is unchanged",
) -> Iterator[AsideFile]:
    """Open a temporary file that is renamed to `path` when the block ends without an error, and removed otherwise.

    Args: sync: flush the file to the disk before the rename, so that it survives a power cut. make_folder: make missing folders.
    error, advice: class and last words of the error that is raised where the file cannot be written.
    Raises: WriteError, or the class given as `error`, naming the file, e.g. where the disk is full.

    >>> import numpy as np
    >>> with open_aside("counts.npy") as file:
    ...     np.save(file, np.arange(3))
    >>> np.load("counts.npy")
    array([0, 1, 2])
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid4().int}.tmp")
    try:
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        with AsideFile(temporary, "x+") as file:
            _OPEN.add(temporary)
            _lock(file.fileno())  # of the process (not flock, which HDF5 uses when it opens the same file by its name)
            try:
                yield file
            except Exception:
                if file.failure is None:
                    raise
            if file.failure is not None:
                raise file.failure
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as err:
        failed = error(f"{target} could not be written: {err.strerror or err}; {advice}")
        if isinstance(failed, OSError):
            failed.errno = err.errno
        raise failed from err
    finally:
        _OPEN.discard(temporary)
        temporary.unlink(missing_ok=True)


def write_aside(path: str | os.PathLike[str], content: str | bytes, **options: Any) -> Path:
    """Write text (UTF-8) or bytes by `open_aside`, whose options it takes -> the path.   Raises: as `open_aside`.

    >>> write_aside("note.txt", "done").read_text()
    'done'
    """
    with open_aside(path, **options) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


def is_unfinished(path: Path) -> bool:
    """Whether a file has the name of a temporary file of `open_aside`.

    >>> is_unfinished(Path("model.pt"))
    False
    """
    return _UNFINISHED.match(path.name) is not None


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed processes left in a folder and below it. Those of running processes are locked and stay.

    >>> remove_unfinished(".")
    """
    for place, _, names in os.walk(folder):
        for path in filter(is_unfinished, (Path(place, name) for name in names)):
            if path.absolute() in {open_one.absolute() for open_one in _OPEN}:
                continue
            with suppress(OSError):
                handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if time.time() - os.fstat(handle).st_mtime > _NEW_S and _lock(handle):
                        path.unlink(missing_ok=True)
                finally:
                    os.close(handle)


def _lock(handle: int) -> bool:
    """Mark an open file as in use until it is closed; False if another process has it, or if the file system has no locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that they survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
