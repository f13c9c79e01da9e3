"""Simulations of other programs as a store: numpy, CSV, HDF5 and ROOT files, with a mapping from names to columns.

    import_store("corsika.h5", "runs/corsika", prior=prior, observables=[Observable("xmax", 1, unit="g/cm2")],
                 columns={"lg_energy": "shower/lgE", "xmax": "shower/Xmax"})

Every row is checked: theta must be finite and lie in the prior; a row whose x is not finite is kept with a status.
"""

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sbi_phys.core.checks import did_you_mean, require_choice, require_int, require_known
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.types import AnyArray
from sbi_phys.priors import Observable, Prior
from sbi_phys.priors.blocks import failed_rows
from sbi_phys.priors.parameters import observables_from_dicts, observables_to_dicts
from sbi_phys.store._writer import StoreWriter
from sbi_phys.store.layout import Layout, Ragged, columns_of
from sbi_phys.store.shards import NON_FINITE, Header, ShardData

__all__ = ["import_store", "read_chunks"]

Column = AnyArray | Ragged
Mapped = Mapping[str, str | Sequence[str]]
_DTYPES = ("float32", "float64")
_SUFFIXES = (".npz", ".npy", ".csv", ".h5", ".hdf5", ".root")
_CHUNK = 65536  # rows read at once


def import_store(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    prior: Prior,
    observables: Sequence[Observable],
    columns: Mapped | None = None,
    tree: str | None = None,
    dtype: str = "float32",
    layout: Layout | None = None,
    shard_size: int = 4096,
    name: str = "imported",
    settings: Mapping[str, Any] | None = None,
    drawn: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the rows of one or several files of another program to a new store -> its path.

    Args:
        source: file, or files of the same kind in order: .npz, .npy (structured, or columns by number), .csv (names in the
            first line), .h5 or .hdf5, .root (needs uproot).
        path: of the new store.
        prior: of theta, whose parameters are its columns.
        observables: blocks of x; their values may have any rank.
        columns: name of a parameter, observable or ragged set -> key in the file, or list of keys side by side (dataset
            paths in HDF5; branches of a TTree, "hits.t" for a field in a collection of an RNTuple); a name left out is its own key.
        tree: of a ROOT file that has several.
        dtype: of x, 'float32' or 'float64'.
        layout: of the store; its `sets` name the ragged sets, which come from jagged branches of ROOT trees.
        shard_size: rows of a shard.
        name: of the program, as a record (`Store.identity`).
        settings: of the program, as a record.
        drawn: theta are draws from the prior; then the store can be used like one that simulate made.
        progress: display of the progress, default none.

    Raises: SettingError, DataError, ShapeError, NonFiniteError, SupportError, naming file, row and column; StoreError.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10, unit="EeV")])
    >>> path = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> sp.Store(path).n_rows
    50
    """
    files = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(s) for s in source]
    if not files:
        raise SettingError("source is empty; expected a file, or several")
    layout = (layout or Layout()).check(described := observables_to_dicts(tuple(observables)), require_choice("dtype", dtype, _DTYPES))
    mapping = _mapping(prior, observables, layout, columns or {})
    header = Header(
        simulator={"class": str(name), "settings": dict(settings or {})},
        prior=prior.to_dict(),
        observables=described,
        seed=0,
        shard_size=require_int("shard_size", shard_size, low=1),
        dtype=dtype,
        theta="prior" if drawn else "imported",
        layout=layout.plain(),
        origin={"kind": "imported", "files": [file.name for file in files], "columns": mapping},
    )
    with StoreWriter(path, header) as writer, or_none(progress).task("import", None) as task:
        for data in _pieces(files, prior, header, layout, mapping, tree):
            writer.add(data)
            task.advance(data.status.size)
    return Path(path)


def _pieces(
    files: Sequence[Path], prior: Prior, header: Header, layout: Layout, mapping: Mapping[str, list[str]], tree: str | None
) -> Iterator[ShardData]:
    """Iterate over the rows of the files, in order."""
    keys = list(dict.fromkeys(key for group in mapping.values() for key in group))
    for file in files:
        first = 0
        for chunk in read_chunks(file, keys, tree=tree):
            data = _rows(f"{file}, rows from {first}", prior, header, layout, mapping, chunk)
            yield data
            first += data.status.size


def _mapping(prior: Prior, observables: Sequence[Observable], layout: Layout, columns: Mapped) -> dict[str, list[str]]:
    names = [*prior.names, *(o.name for o in observables), *layout.sets]
    require_known("columns", columns, names)
    if len(set(names)) < len(names):
        raise SettingError(f"names of parameters, observables and sets repeat: {names}; expected each once")
    found: dict[str, list[str]] = {}
    for name in names:
        keys = columns.get(name, name)
        found[name] = [keys] if isinstance(keys, str) else [str(key) for key in keys]
        if not found[name]:
            raise SettingError(f"columns[{name!r}] is empty; expected at least one key")
    return found


def _rows(
    where: str, prior: Prior, header: Header, layout: Layout, mapping: Mapping[str, list[str]], chunk: Mapping[str, Column]
) -> ShardData:
    """Check and arrange the columns of one part of a file."""
    theta = np.concatenate([_block(where, name, 1, mapping[name], chunk) for name in prior.names], axis=1).astype(np.float64)
    if not np.isfinite(theta).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(theta))[0])
        raise NonFiniteError(f"{where}: row {row} has {prior.names[column]} = {theta[row, column]}; expected finite parameters")
    try:
        prior.require_contains(theta)
    except SupportError as err:
        raise SupportError(f"{where}: {err}") from err
    sizes = {name: cut.stop - cut.start for name, cut in columns_of(header.observables).items()}
    wide = np.concatenate([_block(where, name, size, mapping[name], chunk) for name, size in sizes.items()], axis=1)
    with np.errstate(over="ignore"):
        x = wide.astype(header.dtype)
    lost = ~np.isfinite(x) & np.isfinite(wide)
    if lost.any():
        raise DataError(f'{where}: x has {wide[lost][0]:g}, which {header.dtype} cannot hold; expected dtype="float64"')
    bad = np.flatnonzero(failed_rows(x, observables_from_dicts(header.observables)))
    status = np.zeros(len(x), dtype=np.uint8)
    status[bad] = NON_FINITE
    reasons = {int(row): f"non-finite x in {int((~np.isfinite(x[row])).sum())} of {x.shape[1]} columns" for row in bad}
    sets = {name: _set(where, name, len(columns), mapping[name], chunk, len(x)) for name, columns in layout.sets.items()}
    return ShardData(theta, x, status, reasons, sets)


def _block(where: str, name: str, size: int, keys: Sequence[str], chunk: Mapping[str, Column]) -> AnyArray:
    """Columns (rows, size) of one parameter or observable; arrays of higher rank are flattened."""
    parts = []
    for key in keys:
        column = chunk[key]
        if isinstance(column, Ragged):
            raise ShapeError(f"{where}: {key} has a varying length; expected {size} values a row for {name} (sets take others)")
        if column.dtype.kind not in "fiub":
            raise DataError(f"{where}: {key} has dtype {column.dtype}; expected real numbers for {name}")
        parts.append(column.reshape(len(column), -1))
    block = np.concatenate(parts, axis=1)
    if block.shape[1] != size:
        raise ShapeError(f"{where}: {name} has {block.shape[1]} values a row from {list(keys)}; expected {size}")
    return block


def _set(where: str, name: str, width: int, keys: Sequence[str], chunk: Mapping[str, Column], rows: int) -> Ragged:
    """One ragged set from jagged columns of equal lengths."""
    parts = [chunk[key] for key in keys]
    ragged = [p for p in parts if isinstance(p, Ragged)]
    if len(ragged) < len(parts):
        raise ShapeError(f"{where}: set {name} has columns of fixed length in {list(keys)}; expected jagged ones")
    offsets = ragged[0].offsets
    if any(not np.array_equal(r.offsets, offsets) for r in ragged):
        raise ShapeError(f"{where}: columns of set {name} differ in length from row to row; expected the same number of members in all")
    values = np.concatenate([r.values for r in ragged], axis=1).astype(np.float32)
    if values.shape[1] != width or offsets.size - 1 != rows:
        raise ShapeError(f"{where}: set {name} has {values.shape[1]} columns, {offsets.size - 1} rows; expected {width} and {rows}")
    return Ragged(values, offsets)


def read_chunks(path: Path, keys: Sequence[str], *, tree: str | None = None, rows: int = _CHUNK) -> Iterator[dict[str, Column]]:
    """Iterate over the columns `keys` of a file, `rows` rows at a time; the suffix gives the kind of file.

    Raises: SettingError (unknown suffix or key, uproot missing), DataError (a file that cannot be read, columns of
    different lengths).
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise SettingError(f"{path} ends in {suffix!r}; expected one of {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected a table to import")
    if tree is not None and suffix != ".root":
        raise SettingError(f"tree is {tree!r} for {path}; expected it with a .root file only")
    readers = {".npz": _npz, ".npy": _npy, ".csv": _csv, ".h5": _hdf5, ".hdf5": _hdf5}
    try:
        yield from _root(path, keys, tree, rows) if suffix == ".root" else readers[suffix](path, keys, rows)
    except (OSError, ValueError, EOFError) as err:
        if isinstance(err, DataError | SettingError):
            raise
        raise DataError(f"{path} cannot be read: {err}; expected a complete {suffix} file") from err


def _require(path: Path, keys: Sequence[str], there: Sequence[str]) -> None:
    for key in keys:
        if key not in there:
            some = ", ".join(list(there)[:20]) + (" ..." if len(there) > 20 else "")
            raise SettingError(f"{path} has no {key!r}; it has {some}{did_you_mean(key, there)}")


def _cut(path: Path, columns: dict[str, Any], rows: int) -> Iterator[dict[str, Column]]:
    """Iterate over slices of columns that have a length."""
    lengths = {key: len(c) for key, c in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: columns differ in length, {lengths}; expected one row each per simulation")
    for start in range(0, next(iter(lengths.values()), 0), rows):
        yield {key: np.asarray(c[start : start + rows]) for key, c in columns.items()}


def _npz(path: Path, keys: Sequence[str], rows: int) -> Iterator[dict[str, Column]]:
    with np.load(path, allow_pickle=False) as file:
        _require(path, keys, list(file))
        columns = {key: file[key] for key in keys}
    yield from _cut(path, columns, rows)


def _npy(path: Path, keys: Sequence[str], rows: int) -> Iterator[dict[str, Column]]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.names is None:
        # columns without names are called by their numbers
        if array.ndim != 2:
            raise DataError(f"{path} has shape {array.shape}; expected (rows, columns), or a structured array with names")
        _require(path, keys, [str(i) for i in range(array.shape[1])])
        columns = {key: array[:, int(key)] for key in keys}
    else:
        _require(path, keys, array.dtype.names)
        columns = {key: array[key] for key in keys}
    yield from _cut(path, columns, rows)


def _csv(path: Path, keys: Sequence[str], rows: int) -> Iterator[dict[str, Column]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(line for line in file if line.strip() and not line.startswith("#"))
        names = [name.strip() for name in next(reader, [])]
        _require(path, keys, names)
        pick = [names.index(key) for key in keys]
        block: list[list[float]] = []
        for number, row in enumerate(reader, start=1):
            if len(row) != len(names):
                raise DataError(f"{path}, row {number} has {len(row)} values; expected {len(names)}, as in the first line")
            block.append([_number(path, number, names[i], row[i]) for i in pick])
            if len(block) == rows:
                yield dict(zip(keys, np.array(block).T, strict=True))
                block = []
        if block:
            yield dict(zip(keys, np.array(block).T, strict=True))


def _number(path: Path, row: int, name: str, text: str) -> float:
    try:
        return float(text) if text.strip() else np.nan
    except ValueError as err:
        raise DataError(f"{path}, row {row}, column {name} has {text!r}; expected a number") from err


def _hdf5(path: Path, keys: Sequence[str], rows: int) -> Iterator[dict[str, Column]]:
    with h5py.File(path, "r", locking=False) as file:
        there: list[str] = []
        file.visititems(lambda name, item: there.append(name) if isinstance(item, h5py.Dataset) else None)
        _require(path, [key.strip("/") for key in keys], there)
        yield from _cut(path, {key: file[key] for key in keys}, rows)


def _root(path: Path, keys: Sequence[str], tree: str | None, rows: int) -> Iterator[dict[str, Column]]:
    try:
        import uproot  # type: ignore[import-not-found,unused-ignore]
    except ImportError as err:
        raise SettingError(f"{path} is a ROOT file, and the package uproot is not installed; expected it: pip install uproot") from err
    with uproot.open(path) as file:
        trees = sorted({name.partition(";")[0] for name, kind in file.classnames().items() if kind in ("TTree", "ROOT::RNTuple")})
        if tree is None and len(trees) != 1:
            raise SettingError(f"{path} has the trees {', '.join(trees) or 'none'}; expected tree= to name one")
        name = trees[0] if tree is None else tree
        if name not in trees:
            raise SettingError(f"{path} has no tree {name!r}; it has {', '.join(trees)}{did_you_mean(name, trees)}")
        table = file[name]
        _require(path, keys, list(table.keys()))
        for start in range(0, table.num_entries, rows):
            # key by key, since no other call returns fields within a collection of an RNTuple ("hits.t")
            chunk = {key: table[key].array(entry_start=start, entry_stop=start + rows, library="np") for key in keys}
            yield {key: _ragged(column) if column.dtype == object else column for key, column in chunk.items()}


def _ragged(rows: AnyArray) -> Ragged:
    # not with -1: the number of columns cannot be inferred from a row without members
    return Ragged.of([(a := np.asarray(row)).reshape(len(a), math.prod(a.shape[1:])) for row in rows])
