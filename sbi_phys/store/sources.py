"""Tables of other programs, some rows at a time: numpy, CSV, HDF5, ROOT. Each gives {key: array (rows, ...) or Ragged}."""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sbi_phys.core.checks import did_you_mean
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import AnyArray
from sbi_phys.store.layout import Ragged

__all__ = ["CHUNK", "SUFFIXES", "Column", "read_chunks"]

CHUNK = 65536
Column = AnyArray | Ragged
SUFFIXES = (".npz", ".npy", ".csv", ".h5", ".hdf5", ".root")


def read_chunks(path: Path, keys: Sequence[str], *, tree: str | None = None, rows: int = CHUNK) -> Iterator[dict[str, Column]]:
    """Columns `keys` of a file, `rows` rows at a time; the kind of file follows from its suffix.

    Raises: SettingError (unknown suffix or key, uproot missing), DataError (a file that can not be read, columns of
    different lengths).
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SettingError(f"{path} ends in {suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected a table to import")
    if tree is not None and suffix != ".root":
        raise SettingError(f"tree is {tree!r} for {path}; expected it with a .root file alone")
    readers = {".npz": _npz, ".npy": _npy, ".csv": _csv, ".h5": _hdf5, ".hdf5": _hdf5}
    try:
        yield from _root(path, keys, tree, rows) if suffix == ".root" else readers[suffix](path, keys, rows)
    except (OSError, ValueError, EOFError) as err:
        if isinstance(err, DataError | SettingError):
            raise
        raise DataError(f"{path} can not be read: {err}; expected a whole {suffix} file") from err


def _require(path: Path, keys: Sequence[str], there: Sequence[str]) -> None:
    for key in keys:
        if key not in there:
            some = ", ".join(list(there)[:20]) + (" ..." if len(there) > 20 else "")
            raise SettingError(f"{path} has no {key!r}; it has {some}{did_you_mean(key, there)}")


def _cut(path: Path, columns: dict[str, Any], rows: int) -> Iterator[dict[str, Column]]:
    """Slices of columns that know their length."""
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
        # no names: columns are called by their numbers
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
        raise SettingError(f"{path} is a ROOT file, which needs the package uproot, which is not installed: pip install uproot") from err
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
            # key by key: fields within a collection of an RNTuple ("hits.t") come out of no other call
            chunk = {key: table[key].array(entry_start=start, entry_stop=start + rows, library="np") for key in keys}
            yield {key: _ragged(column) if column.dtype == object else column for key, column in chunk.items()}


def _ragged(rows: AnyArray) -> Ragged:
    # without -1: a row without members has no size to take the number of columns from
    return Ragged.of([(a := np.asarray(row)).reshape(len(a), math.prod(a.shape[1:])) for row in rows])
