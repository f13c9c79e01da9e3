"""Simulations of other programs as a store: numpy, CSV, ROOT trees, HDF5, with a mapping from names to columns.

    import_store("corsika.h5", "runs/corsika", prior=prior, observables=[Observable("xmax", 1, unit="g/cm2")],
                 columns={"lg_energy": "shower/lgE", "xmax": "shower/Xmax"})

Rows are checked as they come: theta must be finite and lie in the prior, a row whose x is not finite is kept and flagged.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checks import require_choice, require_int, require_known
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.types import AnyArray
from sbi_phys.priors import Observable, Prior
from sbi_phys.priors.parameters import observables_to_dicts
from sbi_phys.store.layout import Layout, Ragged, columns_of
from sbi_phys.store.shards import NON_FINITE, Header, ShardData
from sbi_phys.store.sources import Column, read_chunks
from sbi_phys.store.writer import StoreWriter

__all__ = ["import_store"]

Mapped = Mapping[str, str | Sequence[str]]


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
    """Write the rows of one or several foreign files to a new store.

    Args:
        source: file, or files of the same kind in order: .npz, .npy (structured, or columns by number), .csv (first line
            has the names), .h5 or .hdf5, .root (needs uproot).
        path: of the new store.
        prior: of theta, whose parameters are its columns.
        observables: blocks of x; their values may have any rank.
        columns: name of a parameter, observable or ragged set -> key in the file, or list of keys side by side (dataset
            paths in HDF5; branches of a TTree, "hits.t" for a field in a collection of an RNTuple); a name left out is its own key.
        tree: of a ROOT file that has several.
        dtype: of x, 'float32' or 'float64'.
        layout: of the store; its `sets` name the ragged sets, which come from jagged branches of ROOT trees.
        shard_size: rows of a shard.
        name: of the program, for the record (`Store.identity`).
        settings: of the program, likewise.
        drawn: theta are draws from the prior; then the store may be reweighted and trained on as one that simulate made.
        progress: default none.

    Raises: SettingError, DataError, ShapeError, NonFiniteError, SupportError, naming file, row and column; StoreError.
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
    """Rows of the files, one after the other."""
    keys = list(dict.fromkeys(key for group in mapping.values() for key in group))
    for file in files:
        first = 0
        for chunk in read_chunks(file, keys, tree=tree):
            data = _rows(f"{file}, rows from {first}", prior, header, layout, mapping, chunk)
            yield data
            first += data.status.size


_DTYPES = ("float32", "float64")


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
    """Check and arrange the columns of one piece of a file."""
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
        raise DataError(f'{where}: x has {wide[lost][0]:g}, which {header.dtype} can not hold; expected dtype="float64"')
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
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
