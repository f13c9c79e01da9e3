r"""Rows of simulation stores for streaming: the shards and their good rows, what a network sees of them, and a cache on disk.

A row is numbered among the *good* rows of its shard (status 0), so that a plan made of these numbers holds for the HDF5 files
and for a cache that contains good rows only. Rows are transformed to float32

    (u | g(x) - shift),   u = prior.to_unbounded(theta),   g Anscombe's root on count columns,

with one `shift`, close to the data, for all rows: a float64 observable of 1e9 +- 1 keeps its digits in float32.

**Cache.** One pass over the shards transforms the rows and computes the scaling; every later epoch reads the results:

    rows-<key>.f32          float32 rows (u | g(x) - shift) of all good rows, shard after shard
    rows-<key>.json         written last: shift; of every shard the good rows and checksums; size and time of the .f32 file
    scale-<key>-<split>.json   mean and scale of the training rows of one split

The key is computed from the stores' headers, the names, sizes and times of their shards, the prior and the transform, so a cache
is never used for other data. The rows of each shard are compared with their checksum before their first use in a process, and
both descriptions have a checksum of their own. One process writes it (rank 0 of several; the others wait). The folder can be
deleted whenever no training runs.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import require_choice
from sbi_phys.core.checksums import FileKey, crc32, file_key, require_seal, seal
from sbi_phys.core.errors import DataError, NonFiniteError, SbiPhysError, SettingError, SimulatorMismatchError, StoreError, SupportError
from sbi_phys.core.files import open_aside, write_aside
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Integers, Mask
from sbi_phys.priors import Observable, Prior
from sbi_phys.priors.blocks import column_name, failed_rows, fractional
from sbi_phys.store.locks import StoreLock
from sbi_phys.store.manifest import Manifest, list_shards, read_manifest
from sbi_phys.store.shards import Header, open_intact, read_facts, shard_name
from sbi_phys.store.store import Store
from sbi_phys.training.scaling import STANDARDISE, Sums, XScaler, count_columns

__all__ = [
    "CELL",
    "Job",
    "Prepared",
    "RowSource",
    "RowTransform",
    "Shard",
    "Split",
    "data_digest",
    "find_shards",
    "inspect_shard",
    "open_stores",
    "prepare",
    "scaler_of",
    "transform_for",
    "typical_row",
]

# Rows among which validation rows are drawn at once. Fixed, because the split must not depend on the memory.
CELL = 4096


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of rows: path, size, time of change, header of its store; good rows and checksum once it was opened (before: -1, '')."""

    path: Path
    store: int
    index: int
    rows: int
    size: int
    mtime_ns: int
    header: Header
    n_ok: int = -1
    checksum: str = ""

    def require_unchanged(self) -> None:
        """Raise StoreError if the file has disappeared or changed."""
        try:
            stat = self.path.stat()
        except OSError as err:
            raise StoreError(
                f"{self.path} has disappeared while it was in use ({err.strerror}); expected it to exist until the training ends"
            ) from err
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise StoreError(
                f"{self.path} has changed while it was in use: {stat.st_size} bytes, changed at {stat.st_mtime_ns} ns; "
                f"expected {self.size} bytes, changed at {self.mtime_ns} ns. Start the training again on the present store"
            )


def open_stores(stores: Store | str | Path | Sequence[Store | str | Path]) -> tuple[list[Path], list[Manifest]]:
    """Folders and manifests of stores that can be combined: same parameters, prior and observables.

    Raises: SettingError (none, or one given twice), StoreError (missing, damaged, or different from the first).
    """
    items = [stores] if isinstance(stores, Store | str | os.PathLike) else list(stores)
    if not items:
        raise SettingError("stores is empty; expected a store, its path, or a list of them")
    folders = [item.path if isinstance(item, Store) else Path(item) for item in items]
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise SettingError(f"stores names {folder} twice; expected every store once (rates= sets their shares)")
    manifests = [read_manifest(folder) for folder in folders]
    first = manifests[0].header
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        # simulator, seed, shard size and dtype may differ; observables and prior may not
        shared = replace(first, prior=manifest.header.prior, observables=manifest.header.observables)
        first.require_equal(shared, f"{folder}, to be combined with {folders[0]},")
    return folders, manifests


def find_shards(folder: Path, manifest: Manifest, store: int) -> list[Shard]:
    """List the files of a complete store without opening them.   Raises: StoreError for a missing shard."""
    present = set(list_shards(folder))
    missing = [i for i in range(manifest.n_shards) if i not in present]
    if missing:
        there = sum(manifest.rows(i) for i in present)
        raise StoreError(
            f"{folder} is not complete: {there} of {manifest.n} rows are there, {shard_name(missing[0])} and {len(missing) - 1} more "
            "shards are missing. Run the same simulate call to make them"
        )
    shards = []
    for index in range(manifest.n_shards):
        path = folder / shard_name(index)
        stat = path.stat()
        shards.append(Shard(path, store, index, manifest.rows(index), stat.st_size, stat.st_mtime_ns, manifest.header))
    return shards


def inspect_shard(shard: Shard) -> Shard:
    """Open a shard, compare it with the store's header and its checksums, and record its good rows and checksum.   Raises: StoreError."""
    header = shard.header
    with open_intact(shard.path, header, shard.index, shard.rows) as file:
        _, facts = read_facts(file, shard.path)
        failed = int(facts["n_failed"])
        for name, shape in (
            ("theta", (shard.rows, len(header.parameters))),
            ("x", (shard.rows, header.n_columns)),
            ("status", (shard.rows,)),
            ("failed_row", (failed,)),
        ):
            if file[name].shape != shape:
                raise StoreError(f"{shard.path}: dataset {name} has shape {file[name].shape}; expected {shape}")
    return replace(shard, n_ok=shard.rows - failed, checksum=str(facts["checksum"]))


def _file_row(failed: Integers, row: int) -> int:
    """Row of the file that holds good row `row`, given the sorted numbers of the failed rows."""
    return row + int(np.searchsorted(failed - np.arange(failed.size), row, side="right"))


def _read_good(shard: Shard, start: int, stop: int) -> tuple[Array, NDArray[np.floating], Integers]:
    """Theta and x of good rows start to stop, and the numbers of the failed rows of the shard.   Raises: StoreError."""
    shard.require_unchanged()
    with open_intact(shard.path, shard.header, shard.index, shard.rows) as file:
        checksum = file.attrs["checksum"]
        checksum = checksum.decode() if isinstance(checksum, bytes) else str(checksum)
        if checksum != shard.checksum:
            raise StoreError(f"{shard.path} has changed while it was in use: its checksum is {checksum}; expected {shard.checksum}")
        if shard.n_ok == shard.rows:
            return file["theta"][start:stop], file["x"][start:stop], np.empty(0, dtype=np.int64)
        failed = file["failed_row"][:]
        return *_compress(file, shard, start, stop, _file_row(failed, start), _file_row(failed, stop - 1) + 1), failed


def _compress(file: h5py.File, shard: Shard, start: int, stop: int, low: int, high: int) -> tuple[Array, NDArray[np.floating]]:
    """Read good rows start to stop from rows low to high of the file, in steps: if most rows failed, high - low is large."""
    theta = np.empty((stop - start, file["theta"].shape[1]))
    x = np.empty((stop - start, file["x"].shape[1]), dtype=file["x"].dtype)
    at, step = 0, stop - start
    for a in range(low, high, step):
        b = min(a + step, high)
        ok = file["status"][a:b] == 0
        count = int(np.count_nonzero(ok))
        if at + count > step:
            break
        theta[at : at + count], x[at : at + count] = file["theta"][a:b][ok], file["x"][a:b][ok]
        at += count
    if at != step:
        raise StoreError(f"{shard.path} is damaged: its status and its list of failed rows differ; expected the same rows in both")
    return theta, x


@dataclass(frozen=True, slots=True)
class RowTransform:
    """Map of a row (theta, x) to float32 (u | g(x) - shift), `width` columns of which the first `dim_u` are u."""

    prior: Prior
    counts: Mask
    shift: Array
    observables: tuple[Observable, ...] = ()
    standardise: str = "column"

    @property
    def dim_u(self) -> int:
        """Columns of u."""
        return self.prior.free_dim

    @property
    def width(self) -> int:
        """Columns of a row."""
        return self.prior.free_dim + self.counts.size

    def read(self, shard: Shard, start: int, stop: int, out: NDArray[np.float32]) -> Array:
        """Fill `out` with good rows start to stop of a shard and return g(x) - shift in float64.

        Raises: StoreError, NonFiniteError, SupportError, DataError, each naming the file and the row.
        """
        theta, y = self._checked(shard, start, stop)
        y -= self.shift
        out[:, : self.dim_u] = self.prior.to_unbounded(theta)
        with np.errstate(over="ignore"):
            out[:, self.dim_u :] = y
        lost = ~np.isfinite(out)
        lost[:, self.dim_u :] &= ~np.isnan(y)  # missing values stay NaN
        if lost.any():
            row, column = np.argwhere(lost)[0]
            raise DataError(
                f"{shard.path}, good row {start + row}: x[{column - self.dim_u}] is {y[row, column - self.dim_u]:g} from the typical "
                "value, which float32 cannot hold; expected another unit or the logarithm"
            )
        return y

    def _checked(self, shard: Shard, start: int, stop: int) -> tuple[Array, Array]:
        """Read and check theta and g(x) of good rows start to stop."""
        theta, x, failed = _read_good(shard, start, stop)
        finite = np.isfinite(theta).all(axis=1) & (~failed_rows(x, self.observables) if self.observables else np.isfinite(x).all(axis=1))
        if not finite.all():
            row = int(np.argmin(finite))
            raise NonFiniteError(
                f"{shard.path}, row {_file_row(failed, start + row)} has NaN or Inf though its status says ok: theta = "
                f"{theta[row].tolist()}, {int((~np.isfinite(x[row])).sum())} of {x.shape[1]} columns of x; expected finite values"
            )
        negative = (x[:, self.counts] < 0).any(axis=1)
        if negative.any():
            row = _file_row(failed, start + int(np.argmax(negative)))
            raise DataError(f"{shard.path}, row {row} has negative values in columns declared as counts; expected counts >= 0")
        found = fractional(x, self.observables) if self.counts.any() else None
        if found is not None:
            raise DataError(
                f"{shard.path}, row {_file_row(failed, start + found[0])} has {x[found]:g} in {column_name(self.observables, found[1])}, "
                "of kind 'counts'; expected whole numbers, or kind='real'"
            )
        inside = self.prior.contains(theta)
        if not inside.all():
            row = int(np.argmin(inside))
            try:
                self.prior.require_contains(theta[row : row + 1])
            except SupportError as err:
                what = str(err).partition(": ")[2]
                where = f"{shard.path}, row {_file_row(failed, start + row)}"
                raise SupportError(f"{where}: theta lies outside the prior: {what}") from err
        # a copy in any case, because the caller works in place
        return theta, np.array(XScaler.identity(self.counts).stabilise(x))


def transform_for(
    prior: Prior, header: Header, x_transform: str, observables: Sequence[Observable], shift: Array, standardise: str = "column"
) -> RowTransform:
    """Transform of the rows of stores with this header.   Raises: SimulatorMismatchError, SettingError, ShapeError."""
    names = tuple(p["name"] for p in header.parameters)
    if names != prior.names:
        raise SimulatorMismatchError(f"the store has parameters {names}; expected those of the prior, {prior.names}")
    counts = count_columns(np.zeros((1, header.n_columns)), x_transform, observables)
    return RowTransform(prior, counts, shift, tuple(observables), require_choice("standardise", standardise, STANDARDISE))


def typical_row(transform: RowTransform, shards: Sequence[Shard]) -> Array:
    """Median of g(x) over the first good rows, a shift that is robust against outliers."""
    shard = next(s for s in shards if s.n_ok)
    n = min(shard.n_ok, max(1, min(1024, 2**17 // transform.counts.size)))
    first = transform._checked(shard, 0, n)[1]
    gone = np.isnan(first)
    if not gone.any():
        return np.asarray(np.median(first, axis=0))
    first[:, gone.all(axis=0)] = 0.0
    return np.asarray(np.nanmedian(first, axis=0))


class Split:
    """Seeded split of good rows: round(fraction n) rows of each store are for validation (at least 1, at most n - 1).

    Rows are drawn within cells of 4096 neighbours, in proportion. The split of any rows can therefore be computed without
    the others, and is the same for every number of ranks.   Raises: DataError for a store with fewer than 2 good rows.
    """

    def __init__(self, folders: Sequence[Path], shards: Sequence[Shard], fraction: float, seed: int) -> None:
        self._shards, self._seed = shards, seed
        n = [0] * len(folders)
        self._first = []
        for shard in shards:
            self._first.append(n[shard.store])
            n[shard.store] += shard.n_ok
        for folder, good in zip(folders, n, strict=True):
            if good < 2:
                rows = sum(s.rows for s in shards if s.path.parent == folder)
                raise DataError(f"{folder} has {good} good rows of {rows}; expected at least 2, one to train on and one to validate")
        self.n_good = n
        self.n_validation = [min(max(1, round(fraction * k)), k - 1) for k in n]
        self.n_training = [k - v for k, v in zip(n, self.n_validation, strict=True)]

    def validation_of(self, i: int) -> int:
        """Number of validation rows of shard number i of the list."""
        return self._taken(i, self._shards[i].n_ok) - self._taken(i, 0)

    def _taken(self, i: int, row: int) -> int:
        """Validation rows of the store before a row of shard number i, which must begin a cell."""
        store = self._shards[i].store
        return self.n_validation[store] * (self._first[i] + row) // self.n_good[store]

    def training(self, i: int, start: int, stop: int) -> Mask:
        """Which of the good rows start to stop of shard number i of the list are for training."""
        shard = self._shards[i]
        mask = np.ones(stop - start, dtype=bool)
        for cell in range(start // CELL, -(-stop // CELL)):
            a, b = cell * CELL, min((cell + 1) * CELL, shard.n_ok)
            count = self._taken(i, b) - self._taken(i, a)
            rng = rng_for(self._seed, "split", shard.store, shard.index, cell)
            chosen = rng.choice(b - a, count, replace=False, shuffle=False) + (a - start)
            mask[chosen[(chosen >= 0) & (chosen < stop - start)]] = False
        return mask


def scaler_of(sums: Sums, transform: RowTransform) -> XScaler:
    """Scaler of g(x) from the sums, the same as that of `XScaler.fit`."""
    return XScaler.from_sums(transform.counts, sums, observables=transform.observables, standardise=transform.standardise)


_FORMAT, _VERSION = "sbi_phys stream cache", 2
_POLL_S = 0.05
_PIECE = 2**18  # bytes of the cache whose checksum is computed at once
_CHECKED: dict[FileKey, set[int]] = {}  # shards whose rows in a cache agree with their checksum, of this process
_ADVICE = "expected a writable folder as cache=, or cache=None to transform the rows in every epoch"
_WRITE: dict[str, Any] = {
    "sync": True,
    "error": StoreError,
    "advice": "expected room on the disk: give another folder as cache=, or cache=None to transform the rows in every epoch",
}

T = TypeVar("T")


class RowSource(Protocol):
    """Source of blocks of transformed rows: the shards or the cache."""

    def read(self, i: int, start: int, stop: int, out: NDArray[np.float32]) -> None:
        """Fill `out` with good rows start to stop of shard number i, not scaled yet.   Raises: StoreError."""

    def check(self, shards: Sequence[int]) -> None:
        """Raise StoreError if a file of these shards has disappeared or changed."""

    def close(self) -> None:
        """Close files."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to prepare: stores, transform without its shift, folder of the cache or None, and the split.

    wait_s: seconds to wait for a cache that another rank or another process builds.
    """

    folders: list[Path]
    manifests: list[Manifest]
    shards: list[Shard]
    transform: RowTransform
    cache: Path | None
    validation_fraction: float
    seed: int
    rank: int
    wait_s: float
    progress: Progress | None
    block_rows: int = 1


@dataclass(frozen=True, slots=True)
class Prepared:
    """Opened shards, the split of their rows, the transform, the scaler, and the source of rows."""

    shards: list[Shard]
    split: Split
    transform: RowTransform
    scaler: XScaler
    source: RowSource


def digest(value: Any) -> str:
    """First 16 hexadecimal digits of SHA-256 over a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def data_digest(job: Job, made: Prepared) -> str:
    """Digest of the data, from the headers and the shards' checksums; a copy of a store has the same digest."""
    return digest([[m.header.plain() for m in job.manifests], [[s.store, s.rows, s.checksum] for s in made.shards]])


def prepare(job: Job) -> Prepared:
    """Return scaler and source of rows, from the cache or by one pass over the shards.

    Raises: StoreError, DataError, NonFiniteError, SupportError naming the file; StoreError if the cache cannot be written or is
    not complete after `wait_s`.
    """
    return _without_cache(job) if job.cache is None else _with_cache(job, job.cache)


def _without_cache(job: Job) -> Prepared:
    shards = _inspect(job)
    split = Split(job.folders, shards, job.validation_fraction, job.seed)
    transform = replace(job.transform, shift=typical_row(job.transform, shards))
    scaler = scaler_of(_pass(job, shards, split, transform, None, "scaling"), transform)
    return Prepared(shards, split, transform, scaler, _Live(shards, transform))


def _with_cache(job: Job, folder: Path) -> Prepared:
    key = _key(job)
    split = digest([job.seed, job.validation_fraction, *([job.transform.standardise] if job.transform.standardise != "column" else [])])
    rows, scale = folder / f"rows-{key}.json", folder / f"scale-{key}-{split}.json"
    ready = _load(job, rows, scale)
    if ready is not None:
        return ready
    if job.rank:
        return _until(job.wait_s, lambda: _load(job, rows, scale), f"{rows} of rank 0")
    _make_folder(folder)
    # another process may be writing the same cache: wait for it and use the result
    with ExitStack() as stack:
        _until(job.wait_s, lambda: _lock(folder, stack), f"the cache {folder}, which another process writes,")
        for litter in folder.glob(".*.tmp"):
            litter.unlink(missing_ok=True)
        ready = _load(job, rows, scale)
        if ready is None:
            _build(job, rows, scale)
            ready = _load(job, rows, scale)
    if ready is None:
        raise StoreError(f"{rows} was written but cannot be read back; expected a folder on a reliable disk as cache=")
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
            shards.append(inspect_shard(shard))
            task.advance(1)
    return shards


def _build(job: Job, rows: Path, scale: Path) -> None:
    """Write rows and scaling, or only the scaling if the rows are there from another split."""
    meta = _rows_meta(rows, job.transform.width)
    shards = _inspect(job) if meta is None else _with_facts(job.shards, meta)
    split = Split(job.folders, shards, job.validation_fraction, job.seed)
    if meta is None:
        transform = replace(job.transform, shift=typical_row(job.transform, shards))
        data = rows.with_suffix(".f32")
        with open_aside(data, **_WRITE) as file:
            crcs = [0] * len(shards)
            sums = _pass(job, shards, split, transform, file, "transform", crcs)
        stat = data.stat()
        _write_json(rows, {
            "rows": sum(s.n_ok for s in shards), "width": transform.width, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            "shift": transform.shift.tolist(), "n_ok": [s.n_ok for s in shards], "checksums": [s.checksum for s in shards],
            "crcs": crcs,
        })  # fmt: skip
    else:
        transform = replace(job.transform, shift=np.array(meta["shift"]))
        sums = _pass(job, shards, split, transform, None, "scaling")
    scaler = scaler_of(sums, transform)
    _write_json(scale, {"mean": scaler.mean.tolist(), "scale": scaler.scale.tolist()})


def _pass(
    job: Job, shards: list[Shard], split: Split, transform: RowTransform, file: BinaryIO | None, what: str, crcs: list[int] | None = None
) -> Sums:
    """Read all good rows once, sum over the training rows; write the transformed rows to `file` and their CRC-32 to `crcs`, if given."""
    sums = Sums(transform.shift)
    out = np.empty((job.block_rows, transform.width), dtype=np.float32)
    with or_none(job.progress).task(what, sum(s.n_ok for s in shards)) as task:
        for i, start, stop in _blocks(shards, job.block_rows):
            y = transform.read(shards[i], start, stop, out[: stop - start])
            mask = split.training(i, start, stop)
            sums.add(y if mask.all() else y[mask])
            if file is not None and crcs is not None:
                data = out[: stop - start].data.cast("B")
                file.write(data)
                crcs[i] = crc32(data, crcs[i])
            task.advance(stop - start)
    return sums


def _blocks(shards: Sequence[Shard], block_rows: int) -> Iterator[tuple[int, int, int]]:
    for i, shard in enumerate(shards):
        for start in range(0, shard.n_ok, block_rows):
            yield i, start, min(start + block_rows, shard.n_ok)


def _with_facts(shards: Sequence[Shard], meta: dict[str, Any]) -> list[Shard]:
    facts = zip(shards, meta["n_ok"], meta["checksums"], strict=True)
    return [replace(shard, n_ok=n_ok, checksum=checksum) for shard, n_ok, checksum in facts]


def _load(job: Job, rows: Path, scale: Path) -> Prepared | None:
    """Return the contents of the cache if it is complete, else None."""
    scaling = _read_json(scale)
    meta = _rows_meta(rows, job.transform.width) if scaling is not None else None
    if meta is None or scaling is None:
        return None
    shards, counts = _with_facts(job.shards, meta), job.transform.counts
    transform = replace(job.transform, shift=np.array(meta["shift"]))
    scaler = XScaler((counts.size,), counts, np.array(scaling["mean"]), np.array(scaling["scale"]), transform.observables)
    split = Split(job.folders, shards, job.validation_fraction, job.seed)
    return Prepared(shards, split, transform, scaler, _Cached(rows.with_suffix(".f32"), meta))


def _rows_meta(path: Path, width: int) -> dict[str, Any] | None:
    """Description of the cached rows if their file is complete and unchanged, else None."""
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
    """Rows read from the shards and transformed in every epoch; a file is opened for every block."""

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
    """Rows read from the cache by `os.preadv`; a memory map would count as memory of this process."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self._path, self._row_bytes = path, 4 * meta["width"]
        self._first = np.cumsum([0, *meta["n_ok"]]).tolist()
        self._expected, self._sums = (meta["size"], meta["mtime_ns"]), meta["crcs"]
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._checked = _CHECKED.setdefault(file_key(os.fstat(self._handle)), set())

    def read(self, i: int, start: int, stop: int, out: NDArray[np.float32]) -> None:
        self.check(())
        if i not in self._checked:
            self._check_rows(i)
        self._fill((self._first[i] + start) * self._row_bytes, out.data.cast("B"))

    def _check_rows(self, i: int) -> None:
        """Compare the rows of a shard with their checksum, once for each file and process."""
        at, end, crc = self._first[i] * self._row_bytes, self._first[i + 1] * self._row_bytes, 0
        piece = memoryview(bytearray(max(1, min(_PIECE, end - at))))
        while at < end:
            view = piece[: end - at]
            self._fill(at, view)
            crc = crc32(view, crc)
            at += len(view)
        if crc != self._sums[i]:
            raise StoreError(
                f"{self._path} is damaged: the rows of shard {i} have checksum {crc:08x}; expected {self._sums[i]:08x}. Delete it, "
                "and the next training makes it again"
            )
        self._checked.add(i)

    def _fill(self, at: int, view: memoryview) -> None:
        """Read bytes from a position of the file."""
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._handle, [view[done:]], at + done)
            except OSError as err:
                raise StoreError(f"{self._path} cannot be read: {err.strerror}; delete it, and the next training makes it again") from err
            if got == 0:
                raise StoreError(
                    f"{self._path} ends at byte {at + done}; expected {self._expected[0]}: it was truncated while it was in use"
                )
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
                f"{self._path} has changed while it was in use: {stat.st_size} bytes; expected {self._expected[0]} and no later change. "
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
        raise StoreError(f"the cache {folder} cannot be created: {err.strerror}; {_ADVICE}") from err
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"the cache {folder} cannot be written; {_ADVICE}")


def _lock(folder: Path, stack: ExitStack) -> bool | None:
    """Lock the folder until the stack is left; None if another process holds the lock."""
    try:
        stack.enter_context(StoreLock(folder))
    except StoreError as err:
        if isinstance(err.__cause__, BlockingIOError):
            return None
        raise StoreError(f"the cache {folder} cannot be written: {err.__cause__}; {_ADVICE}") from err
    return True


def _until(wait_s: float, ask: Callable[[], T | None], what: str) -> T:
    deadline = time.monotonic() + wait_s
    while True:
        answer = ask()
        if answer is not None:
            return answer
        if time.monotonic() >= deadline:
            raise StoreError(
                f"{what} was not complete after {wait_s:g} s; expected it sooner: see the output of rank 0, or increase cache_timeout_s"
            )
        time.sleep(_POLL_S)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_aside(path, json.dumps(seal({"format": _FORMAT, "version": _VERSION, **values}), sort_keys=True), **_WRITE)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        require_seal(values, str(path))
    except (OSError, ValueError, TypeError, RecursionError, SbiPhysError):
        return None
    return values if isinstance(values, dict) and values.get("format") == _FORMAT and values.get("version") == _VERSION else None
