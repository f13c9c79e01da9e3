"""A simulation store: a folder of HDF5 shards and a manifest, read in parts and without files that stay open.

    store.json            the manifest: the header of all shards and the number of rows asked for
    shard-00000.h5 ...    rows i * shard_size to (i + 1) * shard_size (the schema is in sbi_phys.store.shards)
    .lock                 held by the process that writes (sbi_phys.store.locks)
    .shards-0-64.lock     held by an array job that writes only these shards
    .index.json           a cache of counts for stores of many shards; may be deleted

The bytes of the folder follow from (simulator, prior, seed, shard_size, dtype, n): they are the same for any number of workers,
after any interruptions, and whether n rows were asked for at once or in steps. A larger n adds shards; only a last shard that
was shorter than shard_size is made again (its theta begin with the same rows, its x are other draws, because the draws of a
simulator depend on the number of rows that it gets at once).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import require_known
from sbi_phys.core.errors import DataError, SimulatorMismatchError, StoreError
from sbi_phys.core.progress import Progress
from sbi_phys.core.types import AnyArray, Array, ArrayLike
from sbi_phys.priors import Observable, Parameter, Prior, prior_from_dict
from sbi_phys.priors.blocks import to_blocks
from sbi_phys.priors.parameters import observables_from_dicts, observables_to_dicts
from sbi_phys.store._encoding import difference
from sbi_phys.store.check import check_store
from sbi_phys.store.identity import simulator_identity
from sbi_phys.store.info import Index
from sbi_phys.store.layout import Layout, Ragged
from sbi_phys.store.manifest import list_shards, read_manifest, read_shard
from sbi_phys.store.merge import split_store, subset_store
from sbi_phys.store.shards import ShardData, open_shard, shard_name

__all__ = ["Failure", "Store"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that failed: its number in the store, its status (1 non-finite x, 2 the simulator raised) and the reason.

    >>> import sbi_phys as sp
    >>> sp.store.Failure(row=17, status=2, reason="ValueError: shower did not converge").status
    2
    """

    row: int
    status: int
    reason: str


class Store:
    """Simulations (theta, x) on disk; files are opened for each operation, so that a Store can be copied and pickled.

    Args: path: of the folder.   Raises: StoreError if it is missing, foreign, damaged or of another schema.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10, unit="EeV")])
    >>> path = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> theta, x = sp.Store(path).read()
    >>> theta.shape, x.shape
    ((50, 1), (50, 1))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._manifest = read_manifest(self.path)
        self._index = Index(self.path)

    @property
    def prior(self) -> Prior:
        """Prior that theta was drawn from (or lies in)."""
        return prior_from_dict(self._manifest.header.prior)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Columns of theta."""
        return self.prior.parameters

    @property
    def observables(self) -> tuple[Observable, ...]:
        """Blocks of columns of x, in order, with their shapes, those of the layout included."""
        shapes = self.layout.shapes
        found = observables_from_dicts(self._manifest.header.observables)
        return tuple(replace(o, shape=tuple(shapes[o.name])) if o.name in shapes else o for o in found)

    @property
    def seed(self) -> int:
        """Seed of all rows."""
        return self._manifest.header.seed

    @property
    def identity(self) -> dict[str, Any]:
        """Class path and settings of the simulator."""
        return dict(self._manifest.header.simulator)

    @property
    def code(self) -> tuple[dict[str, Any], ...]:
        """Fingerprints of the simulator's code: that of the first rows, then those of accepted changes; empty if none is known."""
        return tuple(self._manifest.code)

    @property
    def theta_kind(self) -> str:
        """Origin of theta: 'prior', 'given', 'merged' or 'split' (both still draws of the prior), 'subset', 'imported'."""
        return self._manifest.header.theta

    @property
    def origin(self) -> dict[str, Any]:
        """Sources of a merged, split, cut or imported store; empty for one that simulate made."""
        return dict(self._manifest.header.origin)

    @property
    def layout(self) -> Layout:
        """Compression, dtypes and shapes of observables, ragged sets."""
        return Layout.from_plain(self._manifest.header.layout)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of x."""
        return np.dtype(self._manifest.header.dtype)

    @property
    def shard_size(self) -> int:
        """Rows of every shard but the last."""
        return self._manifest.header.shard_size

    @property
    def n_requested(self) -> int:
        """Rows asked for, on disk or not."""
        return self._manifest.n

    @property
    def n_shards(self) -> int:
        """Shards of the finished store."""
        return self._manifest.n_shards

    @property
    def n_rows(self) -> int:
        """Rows on disk, failed ones included."""
        return sum(self._manifest.rows(i) for i in list_shards(self.path))

    @property
    def n_failed(self) -> int:
        """Rows on disk whose status is not 0."""
        return self._index.n_failed(i for i in list_shards(self.path) if self._manifest.rows(i))

    @property
    def n_ok(self) -> int:
        """Rows on disk that hold a finite x."""
        return self.n_rows - self.n_failed

    @property
    def missing(self) -> tuple[int, ...]:
        """Numbers of the shards that are not on disk."""
        present = set(list_shards(self.path))
        return tuple(i for i in range(self.n_shards) if i not in present)

    @property
    def complete(self) -> bool:
        """Whether all rows asked for are on disk."""
        return not self.missing

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        header = self._manifest.header
        state = "complete" if self.complete else f"{len(self.missing)} of {self.n_shards} shards missing"
        columns = f"{len(header.parameters)} parameters, {header.n_columns} columns of {header.dtype}"
        return f"Store({str(self.path)!r}: {self.n_rows} rows, {columns}, {header.simulator['class']}, seed {self.seed}, {state})"

    def read(
        self, columns: Sequence[str] | None = None, *, valid_only: bool = True, partial: bool = False
    ) -> tuple[Array, NDArray[np.floating]]:
        """Return theta (n, d) in the parameters' units and x (n, k), in the order of simulation; `blocks` gives x in its shapes.

        Args: columns: names of observables, in this order; default all. valid_only: False keeps failed rows too
        (see `status`). partial: True reads an unfinished store as far as it is.
        Raises: StoreError, SettingError for an unknown observable, DataError if no row is left.
        """
        pick = self._pick(columns)
        # listed once, because shards may appear while another process writes
        present = list_shards(self.path)
        n = sum(self._manifest.rows(i) for i in present)
        try:
            theta = np.empty((n, len(self._manifest.header.parameters)))
            x = np.empty((n, self._manifest.header.n_columns if pick is None else pick.size), dtype=self.dtype)
        except (MemoryError, ValueError, OverflowError) as err:
            raise StoreError(f"{self.path} has {n} rows of {self._manifest.header.n_columns} columns, more than memory holds") from err
        start = 0
        for theta_part, x_part, status in self._parts(valid_only, partial, present):
            stop = start + status.size
            theta[start:stop], x[start:stop] = theta_part, x_part if pick is None else x_part[:, pick]
            start = stop
        if start == 0:
            raise DataError(f"{self.path} has no {'valid ' if valid_only else ''}rows ({n} on disk); expected at least one")
        return theta[:start], x[:start]

    def shards(self, *, valid_only: bool = False, partial: bool = False) -> Iterator[tuple[Array, NDArray[np.floating], NDArray[np.uint8]]]:
        """Iterate over (theta, x, status), one shard at a time and in order; arguments as in `read`.

        Raises: StoreError for a missing shard, and for one of another store.
        """
        yield from self._parts(valid_only, partial, None)

    def _parts(
        self, valid_only: bool, partial: bool, present: list[int] | None
    ) -> Iterator[tuple[Array, NDArray[np.floating], NDArray[np.uint8]]]:
        for _, data in self._data(partial, present=present):
            ok = data.status == 0
            if valid_only and not ok.all():
                yield data.theta[ok], data.x[ok], data.status[ok]
            else:
                yield data.theta, data.x, data.status

    def subset(
        self,
        path: str | os.PathLike[str],
        *,
        rows: ArrayLike | None = None,
        where: Mapping[str, tuple[float, float]] | None = None,
        progress: Progress | None = None,
    ) -> "Store":
        """Write some rows to a new store at `path`, in their order here, and return it.

        Args: rows: numbers of rows, or a mask (n_requested,). where: {parameter: (low, high)}, ends included.
        With both, rows must meet both. Failed rows are kept if their theta meets the conditions.
        Raises: SettingError, StoreError (incomplete, `path` exists), DataError if no row is left.
        """
        return Store(subset_store(self.path, path, rows=rows, where=where, progress=progress))

    def split(
        self, paths: Sequence[str | os.PathLike[str]], fractions: Sequence[float], *, seed: int = 0, progress: Progress | None = None
    ) -> tuple["Store", ...]:
        """Write disjoint random parts to new stores: part k has round(N F_k) - round(N F_{k-1}) rows, F_k = f_1 + ... + f_k.

        Fractions sum to at most 1. The part of each row follows from (seed, number of rows).
        Raises: SettingError, StoreError, DataError for a part without rows.
        """
        return tuple(Store(p) for p in split_store(self.path, paths, fractions, seed=seed, progress=progress))

    def observable(self, name: str, *, valid_only: bool = True, partial: bool = False) -> AnyArray:
        """Return one observable of all rows in its shape (n, *shape); missing values are NaN.

        Raises: SettingError for an unknown name, StoreError, DataError.
        """
        _, x = self.read([name], valid_only=valid_only, partial=partial)
        (shape,) = (o.shape for o in self.observables if o.name == name)
        return x.reshape(-1, *shape).astype(self.layout.dtypes.get(name, x.dtype), copy=False)

    def blocks(self, *, valid_only: bool = True, partial: bool = False) -> tuple[Array, dict[str, AnyArray]]:
        """Return theta (n, d) and all observables in their shapes, {name: (n, *shape)}.   Raises: StoreError, DataError."""
        theta, x = self.read(valid_only=valid_only, partial=partial)
        return theta, to_blocks(x, self.observables)

    def sets(self, name: str, *, valid_only: bool = True, partial: bool = False) -> Ragged:
        """Return one ragged set of all rows.   Raises: SettingError for an unknown name, StoreError."""
        require_known("sets", [name], self.layout.sets)
        parts = [(d.sets[name], d.status == 0) for _, d in self._data(partial)]
        return Ragged.join([r.take(np.flatnonzero(ok)) if valid_only and not ok.all() else r for r, ok in parts])

    def status(self, *, partial: bool = False) -> NDArray[np.uint8]:
        """Return the status of every row (n,): 0 ok, 1 non-finite x, 2 the simulator raised.   Raises: StoreError."""
        parts = [data.status for _, data in self._data(partial)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)

    def theta(self, *, n_rows: int | None = None) -> tuple[Array, NDArray[np.uint8]]:
        """Return theta (n, d) and status (n,) of all rows on disk, failed ones included, without reading x.

        Args: n_rows: stop after the shard that reaches so many.   Raises: StoreError, DataError if there is no row.
        """
        parts, held = [], 0
        for index in list_shards(self.path):
            with open_shard(self.path / shard_name(index)) as file:
                parts.append((file["theta"][:], file["status"][:]))
            held += len(parts[-1][1])
            if n_rows is not None and held >= n_rows:
                break
        if not held:
            raise DataError(f"{self.path} has no rows on disk; expected at least one")
        return np.concatenate([t for t, _ in parts]), np.concatenate([s for _, s in parts])

    def failures(self, *, n: int | None = None, partial: bool = False) -> list[Failure]:
        """Return the failed rows, or the first n of them, with their reasons, in order.   Raises: StoreError."""
        out: list[Failure] = []
        for index, data in self._data(partial, only_failed=True):
            first = index * self.shard_size
            out += [Failure(first + row, int(data.status[row]), reason) for row, reason in data.reasons.items()]
            if n is not None and len(out) >= n:
                return out[:n]
        return out

    def verify(self, *, progress: Progress | None = None) -> None:
        """Read every file and compare it with the checksums.   Raises: StoreError that lists what `check_store` found."""
        found = check_store(self.path, progress=progress).findings
        if found:
            more = f" (and {len(found) - 10} more)" if len(found) > 10 else ""
            raise StoreError(f"{self.path} has {len(found)} bad shards{more}: " + "; ".join(f.what for f in found[:10]))

    def matches(self, simulator: object) -> bool:
        """Whether the store was made with this simulator: same class, settings and observables."""
        return self._mismatch(simulator) is None

    def require_simulator(self, simulator: object) -> None:
        """Raise SimulatorMismatchError, naming the difference, unless the store was made with this simulator."""
        if what := self._mismatch(simulator):
            raise SimulatorMismatchError(f"{self.path} was made with another simulator: {what}")

    def _mismatch(self, simulator: object) -> str | None:
        header = self._manifest.header
        for name, got, expected in (
            ("identity", simulator_identity(simulator), header.simulator),
            ("observables", observables_to_dicts(getattr(simulator, "observables", ())), header.observables),
        ):
            if got != expected:
                mine, theirs = difference(got, expected)
                return f"got {name} {mine}, expected {theirs}"
        return None

    def _pick(self, columns: Sequence[str] | None) -> NDArray[np.intp] | None:
        """Numbers of the columns of x that belong to the named observables."""
        if columns is None:
            return None
        names = [columns] if isinstance(columns, str) else list(columns)
        observables = self.observables
        require_known("columns", names, [o.name for o in observables])
        starts = np.cumsum([0, *(o.size for o in observables)])
        blocks = {o.name: np.arange(a, a + o.size) for o, a in zip(observables, starts[:-1], strict=True)}
        return np.concatenate([blocks[name] for name in names]) if names else np.empty(0, dtype=np.intp)

    def _data(self, partial: bool, *, only_failed: bool = False, present: list[int] | None = None) -> Iterator[tuple[int, ShardData]]:
        present = list_shards(self.path) if present is None else present
        missing = [i for i in range(self.n_shards) if i not in set(present)]
        if missing and not partial:
            raise StoreError(
                f"{self.path} is not complete: {self.n_rows} of {self.n_requested} rows are there, {shard_name(missing[0])} and "
                f"{len(missing) - 1} more shards are missing. The same simulate call makes them; partial=True reads the others"
            )
        for index in present:
            if index >= self.n_shards or (only_failed and not self._index.n_failed([index])):
                continue
            yield index, read_shard(self.path, self._manifest, index)
