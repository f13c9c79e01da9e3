r"""Transformed rows on disk: made in one pass over a store's shards, with the scaling, and read by every later epoch.

    rows-<key>.f32          float32 rows (u | g(x) - shift) of all good rows, shard after shard
    rows-<key>.json         written last: shift, good rows and checksum of every shard, size and time of the .f32 file
    scale-<key>-<split>.json   mean and scale of the training rows of one split

The key follows from the stores' headers, the names, sizes and times of their shards, the prior and the transform: other
data never meet an old cache. Files are written aside and renamed, by one process at a time (rank 0 of several; the
others wait). Nothing here is needed to read the stores: the folder may be deleted whenever no training runs.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import require_int, require_number
from sbi_phys.core.errors import StoreError
from sbi_phys.core.files import open_aside, write_aside
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.store.locks import StoreLock
from sbi_phys.store.manifest import Manifest
from sbi_phys.training.scaling import XScaler
from sbi_phys.training.stream_rows import Moments, RowTransform, Shard, Split, inspect_shard, typical_row

__all__ = ["Job", "Prepared", "RowSource", "data_digest", "prepare"]

_FORMAT, _VERSION = "sbi_phys stream cache", 1
_POLL_S = 0.05
_ADVICE = "expected a folder that may be written: give one as cache=, or cache=None to transform anew in every epoch"
_WRITE: dict[str, Any] = {
    "sync": True,
    "error": StoreError,
    "advice": "expected room on the disk: give another folder as cache=, or cache=None to transform anew in every epoch",
}

T = TypeVar("T")


class RowSource(Protocol):
    """Where blocks of transformed rows come from."""

    def read(self, i: int, start: int, stop: int, out: NDArray[np.float32]) -> None:
        """Fill `out` with good rows start to stop of shard number i, not scaled yet.   Raises: StoreError."""

    def check(self, shards: Sequence[int]) -> None:
        """Raise StoreError if a file that the shards with these numbers are read from is gone or has changed."""

    def close(self) -> None:
        """Let go of files."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be prepared: stores, transform without its shift, folder of the cache or None; split; who asks.

    `wait_s`: how long ranks above 0, and a process beside one that builds the same cache, wait for it.
    Raises: SettingError.
    """

    folders: list[Path]
    manifests: list[Manifest]
    shards: list[Shard]
    transform: RowTransform
    cache: Path | None
    validation_fraction: float = 0.1
    seed: int = 0
    block_rows: int = 1
    rank: int = 0
    wait_s: float = 3600.0
    progress: Progress | None = None

    def with_settings(
        self, validation_fraction: float, seed: int, block_rows: int, *, rank: int, wait_s: float, progress: Progress | None
    ) -> "Job":
        """Return the same job with the settings of one training.   Raises: SettingError."""
        require_number("validation_fraction", validation_fraction, low=0, high=1, open_low=True, open_high=True)
        require_int("seed", seed, low=0)
        require_number("cache_timeout_s", wait_s, low=0)
        return replace(
            self,
            validation_fraction=validation_fraction,
            seed=seed,
            block_rows=block_rows,
            rank=rank,
            wait_s=wait_s,
            progress=or_none(progress),
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """Shards with their facts, the split of their rows, the transform, the scaling, and where rows are read from."""

    shards: list[Shard]
    split: Split
    transform: RowTransform
    scaler: XScaler
    source: RowSource


def digest(value: Any) -> str:
    """First 16 hexadecimal digits of SHA-256 over a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def data_digest(job: Job, made: Prepared) -> str:
    """Text that differs for other rows: from the headers and the shards' checksums, so that a copy has the same."""
    return digest([[m.header.plain() for m in job.manifests], [[s.store, s.rows, s.checksum] for s in made.shards]])


def prepare(job: Job) -> Prepared:
    """Scaling and a source of rows: from the cache, else by one pass over the shards.

    Raises: StoreError, DataError, NonFiniteError, SupportError naming the file; StoreError naming `cache` where it can
    not be written, or after `wait_s` of waiting.
    """
    return _without_cache(job) if job.cache is None else _with_cache(job, job.cache)


def _without_cache(job: Job) -> Prepared:
    shards = _inspect(job)
    split = Split(job.folders, shards, job.validation_fraction, job.seed)
    transform = replace(job.transform, shift=typical_row(job.transform, shards))
    scaler = _pass(job, shards, split, transform, None, "scaling").scaler(transform)
    return Prepared(shards, split, transform, scaler, _Live(shards, transform))


def _with_cache(job: Job, folder: Path) -> Prepared:
    key = _key(job)
    rows, scale = folder / f"rows-{key}.json", folder / f"scale-{key}-{digest([job.seed, job.validation_fraction])}.json"
    ready = _load(job, rows, scale)
    if ready is not None:
        return ready
    if job.rank:
        return _until(job.wait_s, lambda: _load(job, rows, scale), f"{rows} of rank 0")
    _make_folder(folder)
    # another process may be at work on the same cache: wait for it, then take what it made
    with _until(job.wait_s, lambda: _locked(folder), f"the cache {folder}, which another process writes,"):
        for litter in folder.glob(".*.tmp"):
            litter.unlink(missing_ok=True)
        ready = _load(job, rows, scale)
        if ready is None:
            _build(job, rows, scale)
            ready = _load(job, rows, scale)
    if ready is None:
        raise StoreError(f"{rows} was written but can not be read back; expected a folder on a reliable disk as cache=")
    return ready


def _key(job: Job) -> str:
    stores = [
        [m.header.plain(), [[s.path.name, s.size, s.mtime_ns] for s in job.shards if s.store == i]] for i, m in enumerate(job.manifests)
    ]
    return digest([_VERSION, stores, job.transform.prior.to_dict(), job.transform.counts.tolist()])


def _inspect(job: Job) -> list[Shard]:
    shards = []
    with or_none(job.progress).task("open shards", len(job.shards)) as task:
        for shard in job.shards:
            shards.append(inspect_shard(shard, job.manifests[shard.store].header))
            task.advance(1)
    return shards


def _build(job: Job, rows: Path, scale: Path) -> None:
    """Write the cache's rows, unless only the scaling of another split is wanted, and the scaling."""
    meta = _rows_meta(rows, job.transform.width)
    shards = _inspect(job) if meta is None else _with_facts(job.shards, meta)
    split = Split(job.folders, shards, job.validation_fraction, job.seed)
    if meta is None:
        transform = replace(job.transform, shift=typical_row(job.transform, shards))
        data = rows.with_suffix(".f32")
        with open_aside(data, **_WRITE) as file:
            moments = _pass(job, shards, split, transform, file, "transform")
        stat = data.stat()
        _write_json(rows, {
            "rows": sum(s.n_ok for s in shards), "width": transform.width, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            "shift": transform.shift.tolist(), "n_ok": [s.n_ok for s in shards], "checksums": [s.checksum for s in shards],
        })  # fmt: skip
    else:
        transform = replace(job.transform, shift=np.array(meta["shift"]))
        moments = _pass(job, shards, split, transform, None, "scaling")
    scaler = moments.scaler(transform)
    _write_json(scale, {"mean": scaler.mean.tolist(), "scale": scaler.scale.tolist()})


def _pass(job: Job, shards: list[Shard], split: Split, transform: RowTransform, file: BinaryIO | None, what: str) -> Moments:
    """Read all good rows once: sums over the training rows and, into `file`, all transformed rows."""
    moments = Moments(transform.counts.size)
    out = np.empty((job.block_rows, transform.width), dtype=np.float32)
    with or_none(job.progress).task(what, sum(s.n_ok for s in shards)) as task:
        for i, start, stop in _blocks(shards, job.block_rows):
            y = transform.read(shards[i], start, stop, out[: stop - start])
            mask = split.training(i, start, stop)
            moments.add(y if mask.all() else y[mask])
            if file is not None:
                file.write(out[: stop - start].data.cast("B"))
            task.advance(stop - start)
    return moments


def _blocks(shards: Sequence[Shard], block_rows: int) -> Iterator[tuple[int, int, int]]:
    for i, shard in enumerate(shards):
        for start in range(0, shard.n_ok, block_rows):
            yield i, start, min(start + block_rows, shard.n_ok)


def _with_facts(shards: Sequence[Shard], meta: dict[str, Any]) -> list[Shard]:
    facts = zip(shards, meta["n_ok"], meta["checksums"], strict=True)
    return [replace(shard, n_ok=n_ok, checksum=checksum) for shard, n_ok, checksum in facts]


def _load(job: Job, rows: Path, scale: Path) -> Prepared | None:
    """Return what the cache holds if it is whole, else None."""
    scaling = _read_json(scale)
    meta = _rows_meta(rows, job.transform.width) if scaling is not None else None
    if meta is None or scaling is None:
        return None
    shards, counts = _with_facts(job.shards, meta), job.transform.counts
    transform = replace(job.transform, shift=np.array(meta["shift"]))
    scaler = XScaler((counts.size,), counts, np.array(scaling["mean"]), np.array(scaling["scale"]))
    split = Split(job.folders, shards, job.validation_fraction, job.seed)
    return Prepared(shards, split, transform, scaler, _Cached(rows.with_suffix(".f32"), meta))


def _rows_meta(path: Path, width: int) -> dict[str, Any] | None:
    """Description of a cache's rows if their file is the one that was written: whole, and not touched since."""
    meta = _read_json(path)
    if meta is None:
        return None
    try:
        stat = path.with_suffix(".f32").stat()
    except OSError:
        return None
    whole = meta["width"] == width and stat.st_size == meta["size"] == 4 * width * meta["rows"] and stat.st_mtime_ns == meta["mtime_ns"]
    return meta if whole else None


class _Live:
    """Rows read from the shards and transformed again each time; a file is opened for every block."""

    def __init__(self, shards: list[Shard], transform: RowTransform) -> None:
        self._shards, self._transform = shards, transform

    def read(self, i: int, start: int, stop: int, out: NDArray[np.float32]) -> None:
        self._transform.read(self._shards[i], start, stop, out)

    def check(self, shards: Sequence[int]) -> None:
        for i in shards:
            self._shards[i].require_unchanged()

    def close(self) -> None:
        pass


class _Cached:
    """Rows read from the flat file by `os.preadv`: no memory map, which would count as this process's memory."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self._path, self._row_bytes = path, 4 * meta["width"]
        self._first = np.cumsum([0, *meta["n_ok"]]).tolist()
        self._expected = (meta["size"], meta["mtime_ns"])
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, i: int, start: int, stop: int, out: NDArray[np.float32]) -> None:
        self.check(())
        view, at = out.data.cast("B"), (self._first[i] + start) * self._row_bytes
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._handle, [view[done:]], at + done)
            except OSError as err:
                raise StoreError(f"{self._path} can not be read: {err.strerror}; delete it, the next training makes it again") from err
            if got == 0:
                raise StoreError(f"{self._path} ends at byte {at + done}; expected {self._expected[0]}: it was cut while it was in use")
            done += got

    def check(self, shards: Sequence[int]) -> None:
        try:
            stat = self._path.stat()
        except OSError as err:
            raise StoreError(
                f"{self._path} has disappeared while it was in use ({err.strerror}); the next training makes it again"
            ) from err
        if (stat.st_size, stat.st_mtime_ns) != self._expected:
            raise StoreError(
                f"{self._path} has changed while it was in use: {stat.st_size} bytes; expected {self._expected[0]}, and no later change. "
                "The next training makes it again"
            )

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"the cache {folder} can not be made: {err.strerror}; {_ADVICE}") from err
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"the cache {folder} can not be written; {_ADVICE}")


def _locked(folder: Path) -> "_Held | None":
    lock = StoreLock(folder)
    try:
        lock.__enter__()
    except StoreError as err:
        if isinstance(err.__cause__, BlockingIOError):  # held by another
            return None
        raise StoreError(f"the cache {folder} can not be written: {err.__cause__}; {_ADVICE}") from err
    return _Held(lock)


class _Held:
    """A lock that is already held, as a context manager."""

    def __init__(self, lock: StoreLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)


def _until(wait_s: float, ask: Callable[[], T | None], what: str) -> T:
    deadline = time.monotonic() + wait_s
    while True:
        answer = ask()
        if answer is not None:
            return answer
        if time.monotonic() >= deadline:
            raise StoreError(f"{what} was not complete after {wait_s:g} s; expected it sooner: see rank 0, or raise cache_timeout_s")
        time.sleep(_POLL_S)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_aside(path, json.dumps({"format": _FORMAT, "version": _VERSION, **values}, sort_keys=True), **_WRITE)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("format") == _FORMAT and values.get("version") == _VERSION else None
