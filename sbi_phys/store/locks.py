"""Locks of a store's folder: one simulate call writes alone, or several array jobs write ranges of shards that do not overlap.

    .lock                 a simulate call holds it exclusively, array jobs share it
    .shards-0-64.lock     held by the array job that writes shards 0 to 63
    .plan.lock            held for a moment while an array job reads the folder, so that two jobs do not start at once

All are locks of the operating system (flock), which it releases when a process ends for any reason. They work between machines
where the file system supports them (NFS from version 4 or with its lock daemon, Lustre mounted with -o flock, CephFS, BeeGFS
with locks enabled).
"""

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from sbi_phys.core.errors import StoreError

__all__ = ["LOCK_FILE", "ArrayLock", "StoreLock", "array_jobs", "is_lock_file", "writers"]

LOCK_FILE = ".lock"
_PLAN = ".plan.lock"
_RANGE = re.compile(r"^\.shards-(\d+)-(\d+)\.lock$")


class StoreLock:
    """Exclusive lock of a folder, as a context manager; the system releases it when its process ends.

    Raises: StoreError naming the holder if another process (or another call in this one) has it, or array jobs are running.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle = -1

    def __enter__(self) -> Self:
        self._handle = _open(self._folder / LOCK_FILE)
        if (failed := _try(self._handle, fcntl.LOCK_EX)) is not None:
            raise _refused(self._folder, self._handle, failed) from failed
        _sign(self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # the file stays: without it a third process could lock a new file while a second waits for this one
        os.ftruncate(self._handle, 0)
        os.close(self._handle)


class ArrayLock:
    """Lock of some shards of a folder, compatible with other array jobs, as a context manager.

        with ArrayLock(folder) as lock:
            with lock.planning():   # one job at a time
                ...
                lock.claim(range(0, 64))

    Raises: StoreError where a simulate call writes the whole folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle = self._claimed = -1
        self._path: Path | None = None

    def __enter__(self) -> Self:
        self._handle = _open(self._folder / LOCK_FILE)
        if (failed := _try(self._handle, fcntl.LOCK_SH)) is not None:
            raise _refused(self._folder, self._handle, failed) from failed
        os.ftruncate(self._handle, 0)  # the name of a simulate call that was killed
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._path is not None:
                # the folder may be gone or read-only by now: the next job removes the file then
                with suppress(OSError, StoreError), self.planning():
                    self._path.unlink(missing_ok=True)
                os.close(self._claimed)
        finally:
            os.close(self._handle)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Wait for other jobs that plan, then exclude them until the block ends."""
        handle = _open(self._folder / _PLAN)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def claim(self, shards: range) -> None:
        """Lock a range of shards, within `planning`.   Raises: StoreError naming the holder of an overlapping range."""
        for held, holder in array_jobs(self._folder):
            if held.start < shards.stop and shards.start < held.stop:
                raise StoreError(
                    f"shards {_text(shards)} of {self._folder} overlap shards {_text(held)}, which {holder or 'an unknown process'} "
                    "is writing; expected ranges that do not overlap"
                )
        self._path = self._folder / f".shards-{shards.start}-{shards.stop}.lock"
        self._claimed = _open(self._path)
        if (failed := _try(self._claimed, fcntl.LOCK_EX)) is not None:
            raise StoreError(f"{self._path} is locked although no process writes; expected a file system whose locks work") from failed
        _sign(self._claimed)


def array_jobs(folder: Path) -> list[tuple[range, str]]:
    """Return the ranges of shards that array jobs write, with the holder; files of ended jobs are removed. Only within `planning`."""
    found = []
    for name in sorted(os.listdir(folder)):
        if match := _RANGE.match(name):
            handle = _open(folder / name)
            try:
                if _try(handle, fcntl.LOCK_EX) is None:
                    (folder / name).unlink(missing_ok=True)
                else:
                    found.append((range(int(match[1]), int(match[2])), _holder(handle)))
            finally:
                os.close(handle)
    return found


def is_lock_file(name: str) -> bool:
    """Whether a file in a store's folder is a lock file."""
    return name in (LOCK_FILE, _PLAN) or _RANGE.match(name) is not None


def writers(folder: Path) -> str:
    """Return the processes that write into a folder, as the lock files say; '' if none, or if they ran here and have ended.

    No lock is taken, because a reader must not appear as a writer.
    """
    if holder := _alive(folder / LOCK_FILE):
        return holder
    ranges = ((m, folder / name) for name in _names(folder) if (m := _RANGE.match(name)))
    jobs = [(int(m[1]), int(m[2]), holder) for m, path in ranges if (holder := _alive(path))]
    return ", ".join(f"{holder} (shards {start}:{stop})" for start, stop, holder in sorted(jobs))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _alive(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            text = _holder(handle).strip()
        finally:
            os.close(handle)
    except OSError:
        return ""
    words = text.split()
    if len(words) == 4 and words[3] == socket.gethostname() and words[1].isdigit():
        try:
            os.kill(int(words[1]), 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            return text
    return text


def _open(path: Path) -> int:
    try:
        # no links: in a shared folder one could name another file, which would be emptied
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as err:
        raise StoreError(f"{path} cannot be opened for writing: {err.strerror}; expected a writable folder") from err


def _try(handle: int, kind: int) -> OSError | None:
    """Lock a file -> None, or the error."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as err:
        return err
    return None


def _sign(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _holder(handle: int) -> str:
    return os.pread(handle, 200, 0).decode("utf-8", "replace")


def _refused(folder: Path, handle: int, failed: OSError) -> StoreError:
    holder = _holder(handle)
    os.close(handle)
    if not isinstance(failed, BlockingIOError):
        return StoreError(f"{folder / LOCK_FILE} cannot be locked: {failed.strerror}; expected a file system whose locks work (flock)")
    if not holder and (jobs := writers(folder)):
        return StoreError(f"{folder} is being written by array jobs: {jobs}; expected them to end first, or shards that they do not write")
    return StoreError(f"{folder} is being written by another simulate call ({holder or 'unknown process'}); expected it to end first")


def _text(shards: range) -> str:
    return f"{shards.start}:{shards.stop}"
