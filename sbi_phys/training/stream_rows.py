r"""Rows of simulation stores, a block at a time: which files there are, which rows count, what a network sees of them.

A row is numbered among the *good* rows of its shard (status 0), so that a plan made of such numbers is the same whether
rows come from the HDF5 files or from a cache that holds good rows alone. A row leaves here as float32

    (u | g(x) - shift),   u = prior.to_unbounded(theta),   g Anscombe's root on count columns,

with one `shift` for all rows, close to the data: a float64 observable of 1e9 +- 1 keeps its digits in float32.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, SimulatorMismatchError, StoreError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Integers, Mask
from sbi_phys.priors import Observable, Prior
from sbi_phys.store.manifest import Manifest, list_shards, read_manifest
from sbi_phys.store.shards import Header, open_shard, read_facts, require_place, shard_name
from sbi_phys.store.store import Store
from sbi_phys.training.scaling import XScaler, count_columns

__all__ = [
    "CELL",
    "Moments",
    "RowTransform",
    "Shard",
    "Split",
    "find_shards",
    "inspect_shard",
    "open_stores",
    "transform_for",
    "typical_row",
]

# Rows that share one draw of validation rows. Fixed: the split must not follow from how much memory there is.
CELL = 4096


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of rows as it was found: place, size, time of change; good rows and checksum once it was opened (else -1, '')."""

    path: Path
    store: int
    index: int
    rows: int
    size: int
    mtime_ns: int
    n_ok: int = -1
    checksum: str = ""

    def require_unchanged(self) -> None:
        """Raise StoreError if the file is gone or is not the one that was found."""
        try:
            stat = self.path.stat()
        except OSError as err:
            raise StoreError(
                f"{self.path} has disappeared while it was in use ({err.strerror}); expected it to stay until the end"
            ) from err
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise StoreError(
                f"{self.path} has changed while it was in use: {stat.st_size} bytes, changed at {stat.st_mtime_ns} ns; "
                f"expected {self.size} bytes, changed at {self.mtime_ns} ns. Start again on the store as it is now"
            )


def open_stores(stores: Store | str | Path | Sequence[Store | str | Path]) -> tuple[list[Path], list[Manifest]]:
    """Folders and manifests of stores that can be read side by side: same parameters, prior and observables.

    Raises: SettingError (none, or one given twice), StoreError (missing, damaged, or different from the first).
    """
    items = [stores] if isinstance(stores, Store | str | os.PathLike) else list(stores)
    if not items:
        raise SettingError("stores is empty; expected a store, its path, or a list of them")
    folders = [item.path if isinstance(item, Store) else Path(item) for item in items]
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise SettingError(f"stores names {folder} twice; expected every store once (rates= gives them weights)")
    manifests = [read_manifest(folder) for folder in folders]
    first = manifests[0].header
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        # simulator, seed, shard size and dtype may differ; what columns mean and where theta live may not
        shared = replace(first, prior=manifest.header.prior, observables=manifest.header.observables)
        first.require_equal(shared, f"{folder}, to be read beside {folders[0]},")
    return folders, manifests


def find_shards(folder: Path, manifest: Manifest, store: int) -> list[Shard]:
    """List the files of a complete store without opening them.   Raises: StoreError for a missing shard."""
    present = set(list_shards(folder))
    missing = [i for i in range(manifest.n_shards) if i not in present]
    if missing:
        there = sum(manifest.rows(i) for i in present)
        raise StoreError(
            f"{folder} is not complete: {there} of {manifest.n} rows are there, {shard_name(missing[0])} and {len(missing) - 1} more "
            "shards are missing. The same simulate call makes them"
        )
    shards = []
    for index in range(manifest.n_shards):
        path = folder / shard_name(index)
        stat = path.stat()
        shards.append(Shard(path, store, index, manifest.rows(index), stat.st_size, stat.st_mtime_ns))
    return shards


def inspect_shard(shard: Shard, header: Header) -> Shard:
    """Open a shard, compare it with the store's header, and note its good rows and checksum.   Raises: StoreError."""
    with open_shard(shard.path) as file:
        got, facts = read_facts(file, shard.path)
        header.require_equal(got, str(shard.path))
        require_place(facts, shard.index, shard.rows, shard.path)
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
    """Row of the file that holds good row `row`, given the sorted failed ones."""
    return row + int(np.searchsorted(failed - np.arange(failed.size), row, side="right"))


def _read_good(shard: Shard, start: int, stop: int) -> tuple[Array, NDArray[np.floating], Integers]:
    """Theta and x of good rows start to stop, and the numbers of the failed rows of the shard.   Raises: StoreError."""
    shard.require_unchanged()
    with open_shard(shard.path) as file:
        checksum = file.attrs["checksum"]
        checksum = checksum.decode() if isinstance(checksum, bytes) else str(checksum)
        if checksum != shard.checksum:
            raise StoreError(f"{shard.path} has changed while it was in use: its checksum is {checksum}; expected {shard.checksum}")
        if shard.n_ok == shard.rows:
            return file["theta"][start:stop], file["x"][start:stop], np.empty(0, dtype=np.int64)
        failed = file["failed_row"][:]
        return *_compress(file, shard, start, stop, _file_row(failed, start), _file_row(failed, stop - 1) + 1), failed


def _compress(file: h5py.File, shard: Shard, start: int, stop: int, low: int, high: int) -> tuple[Array, NDArray[np.floating]]:
    """Good rows start to stop from rows low to high of the file, in steps: where most rows fail, high - low is large."""
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
    """Map of one row (theta, x) to float32 (u | g(x) - shift); `width` columns, the first `dim_u` of which are u."""

    prior: Prior
    counts: Mask
    shift: Array

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
        if not np.isfinite(out).all():
            row, column = np.argwhere(~np.isfinite(out))[0]
            raise DataError(
                f"{shard.path}, good row {start + row}: x[{column - self.dim_u}] is {y[row, column - self.dim_u]:g} from the typical "
                "value, which float32 can not hold; expected a smaller unit or its logarithm"
            )
        return y

    def _checked(self, shard: Shard, start: int, stop: int) -> tuple[Array, Array]:
        """Theta and g(x) of good rows start to stop, checked."""
        theta, x, failed = _read_good(shard, start, stop)
        finite = np.isfinite(theta).all(axis=1) & np.isfinite(x).all(axis=1)
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
        inside = self.prior.contains(theta)
        if not inside.all():
            row = int(np.argmin(inside))
            try:
                self.prior.require_contains(theta[row : row + 1])
            except SupportError as err:
                what = str(err).partition(": ")[2]
                where = f"{shard.path}, row {_file_row(failed, start + row)}"
                raise SupportError(f"{where}: theta lies outside the prior: {what}") from err
        # a fresh array also where there is nothing to stabilise: the caller works in place
        return theta, np.array(_blank(self.counts).stabilise(x))


def transform_for(prior: Prior, header: Header, x_transform: str, observables: Sequence[Observable], shift: Array) -> RowTransform:
    """Transform of the rows of stores with this header.   Raises: SimulatorMismatchError, SettingError, ShapeError."""
    names = tuple(p["name"] for p in header.parameters)
    if names != prior.names:
        raise SimulatorMismatchError(f"the store has parameters {names}; expected those of the prior, {prior.names}")
    counts = count_columns(np.zeros((1, header.n_columns)), x_transform, observables)
    return RowTransform(prior, counts, shift)


def typical_row(transform: RowTransform, shards: Sequence[Shard]) -> Array:
    """Median of g(x) over the first good rows: a shift that an outlier in the very first row can not spoil."""
    shard = next(s for s in shards if s.n_ok)
    n = min(shard.n_ok, max(1, min(1024, 2**17 // transform.counts.size)))
    return np.asarray(np.median(transform._checked(shard, 0, n)[1], axis=0))


class Split:
    """Seeded split of good rows: exactly round(fraction n) of each store are for validation (at least 1, at most n - 1).

    Rows are drawn within cells of 4096 neighbours, in proportion, so that the answer for any rows needs no memory and no
    other rows, and is the same for every number of ranks.   Raises: DataError for a store with fewer than 2 good rows.
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
        """Validation rows of the store before a row of shard number i that begins a cell."""
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


class Moments:
    """Sums over rows of y = g(x) - shift, from which `XScaler` follows as `XScaler.fit` would make it."""

    def __init__(self, columns: int) -> None:
        self.n, self.total, self.squares = 0, np.zeros(columns), np.zeros(columns)

    def add(self, y: Array) -> None:
        """Add rows y (n, k)."""
        self.n += len(y)
        self.total += y.sum(axis=0)
        self.squares += np.einsum("nk,nk->k", y, y)

    def scaler(self, transform: RowTransform) -> XScaler:
        """Means and widths of g(x); a count column is never scaled up by more than its unit noise."""
        offset = self.total / self.n
        mean, sd = transform.shift + offset, np.sqrt(np.maximum(self.squares / self.n - offset**2, 0.0))
        scale = np.where(transform.counts, np.maximum(sd, 1.0), np.where(sd > 1e-12 * np.abs(mean), sd, 1.0))
        return XScaler((transform.counts.size,), transform.counts, mean, np.where(scale > 0, scale, 1.0))


def _blank(counts: Mask) -> XScaler:
    return XScaler((counts.size,), counts, np.zeros(counts.size), np.ones(counts.size))
