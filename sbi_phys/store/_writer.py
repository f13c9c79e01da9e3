"""Writer of a new store from rows of any origin.

    with StoreWriter("runs/merged", header) as writer:
        for data in parts:
            writer.add(data)

The folder is built under a temporary name and renamed after the last row. Memory holds the rows of one shard and of the part
that was added last.
"""

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.errors import DataError, StoreError
from sbi_phys.core.files import sync_folder
from sbi_phys.store.layout import Layout, Ragged
from sbi_phys.store.locks import StoreLock
from sbi_phys.store.manifest import MANIFEST, Manifest, list_shards, write_manifest
from sbi_phys.store.shards import (
    Header,
    ShardData,
    shard_name,
    write_shard,
)

__all__ = ["Folder", "StoreWriter", "join_rows", "require_complete", "take_rows"]


class Folder:
    """A folder that is built under a temporary name and renamed when the block ends without an error, else removed.

    An unfinished folder of a killed process is built anew; one that another process is building is refused.
    Raises: StoreError if `path` exists, or the folder cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.aside = self.path.with_name(f".{self.path.name}.part")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise StoreError(f"{self.path} exists already; expected the name of a new store")
        try:
            self.aside.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StoreError(f"{self.aside} cannot be made: {err.strerror}; expected a writable place") from err
        facts = self.aside.lstat()
        # in a shared place somebody else could have made it, or a link, to have files elsewhere removed
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            raise StoreError(f"{self.aside} is a link or belongs to another user; expected a folder of yours: remove it")
        self._stack.enter_context(StoreLock(self.aside))
        for name in os.listdir(self.aside):
            if name != ".lock":
                (self.aside / name).unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if error is not None:
                shutil.rmtree(self.aside, ignore_errors=True)
                return
            sync_folder(self.aside)
            try:
                os.rename(self.aside, self.path)
            except OSError as err:
                shutil.rmtree(self.aside, ignore_errors=True)
                raise StoreError(f"{self.path} cannot be made: {err.strerror}; expected the name of a new store") from err
            sync_folder(self.path.parent)


class StoreWriter:
    """Writes a new store, as a context manager; rows are numbered in the order in which they are added.

    Args: path: of the new store. header: of all its shards. code: fingerprints of the code that made the rows.
    Raises: StoreError; SettingError for a layout that does not fit; DataError when the block ends without a row.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header, code: tuple[dict[str, Any], ...] = ()) -> None:
        Layout.from_plain(header.layout).check(header.observables, header.dtype)
        self._folder, self._header, self._code = Folder(path), header, code
        self._parts: list[ShardData] = []
        self._held = self._shard = 0
        self.n = 0

    def __enter__(self) -> Self:
        self._folder.__enter__()
        return self

    def add(self, data: ShardData) -> None:
        """Append rows.   Raises: StoreError, e.g. when the disk is full."""
        rows = data.status.size
        if rows == 0:
            return
        self._parts.append(data)
        self._held += rows
        self.n += rows
        if self._held >= self._header.shard_size:
            self._flush(whole_only=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            try:
                if not self.n:
                    raise DataError(f"{self._folder.path} would have no rows; expected at least one")
                self._flush(whole_only=False)
                write_manifest(self._folder.aside, Manifest(self._header, self.n, code=self._code))
            except BaseException as err:
                self._folder.__exit__(type(err), err, err.__traceback__)
                raise
        self._folder.__exit__(kind, error, trace)

    def _flush(self, *, whole_only: bool) -> None:
        if not self._parts:
            return
        data, size, start = join_rows(self._parts), self._header.shard_size, 0
        while self._held - start >= size or (not whole_only and start < self._held):
            stop = min(start + size, self._held)
            write_shard(self._folder.aside / shard_name(self._shard), self._header, self._shard, take_rows(data, np.arange(start, stop)))
            self._shard, start = self._shard + 1, stop
        self._parts = [take_rows(data, np.arange(start, self._held))] if start < self._held else []
        self._held -= start


def take_rows(data: ShardData, rows: NDArray[np.integer]) -> ShardData:
    """Return the given rows, in that order, with their reasons and sets."""
    if rows.size and rows.size == rows[-1] - rows[0] + 1 and (np.diff(rows) == 1).all():
        pick: slice | NDArray[np.integer] = slice(int(rows[0]), int(rows[-1]) + 1)  # consecutive rows: no copy
    else:
        pick = rows
    status = data.status[pick]
    reasons = {int(i): data.reasons[int(rows[i])] for i in np.flatnonzero(status)}
    return ShardData(data.theta[pick], data.x[pick], status, reasons, {name: r.take(rows) for name, r in data.sets.items()})


def join_rows(parts: Sequence[ShardData]) -> ShardData:
    """Return the rows of several parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    reasons: dict[int, str] = {}
    start = 0
    for part in parts:
        reasons |= {start + row: reason for row, reason in part.reasons.items()}
        start += part.status.size
    arrays = [np.concatenate([getattr(p, name) for p in parts]) for name in ("theta", "x", "status")]
    sets = {name: Ragged.join([p.sets[name] for p in parts]) for name in parts[0].sets}
    return ShardData(arrays[0], arrays[1], arrays[2], reasons, sets)


def require_complete(folder: Path, manifest: Manifest) -> Iterator[int]:
    """Iterate over the numbers of all shards.   Raises: StoreError if one is missing."""
    missing = sorted(set(range(manifest.n_shards)) - set(list_shards(folder)))
    if missing:
        raise StoreError(
            f"{folder} is not complete: {shard_name(missing[0])} and {len(missing) - 1} more shards are missing, {MANIFEST} asks for "
            f"{manifest.n} rows; expected a complete store. The same simulate call makes them"
        )
    return iter(range(manifest.n_shards))
