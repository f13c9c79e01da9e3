r"""Layout of a shard's file: dtype and shape of each observable, ragged sets, chunks and compression.

Without a layout, x is one contiguous dataset (n, k): blocks of neighbouring rows, which training reads, are contiguous in the
file. Compressed datasets must be chunked; a chunk holds whole rows, as many as fit into 256 KiB (HDF5's cache holds 1 MiB a
dataset). Bytes are shuffled before compression, because the exponents of neighbouring numbers are similar and their last
digits are not.

Where an observable has a dtype of its own, each observable has its own dataset `x_0`, `x_1`, ..., and `x` is a virtual dataset
over them, which HDF5 converts on reading: readers of `x` need not know the layout. A ragged set is two datasets: `set_0` (m, c),
the members of all rows one after the other, and `set_0_offsets` (n + 1,); row i has the members offsets[i] to offsets[i + 1].
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import h5py
import numpy as np

from sbi_phys.core.checks import require_choice, require_int, require_known
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.types import AnyArray, Integers

__all__ = ["DTYPES", "Layout", "Ragged", "add_dataset", "add_virtual_x", "columns_of", "hdf5_type", "split_x"]

DTYPES = ("float16", "float32", "float64")
_CHUNK_BYTES = 2**18
_SMALL = 4096  # bytes of the smallest dataset that is chunked: the index of a smaller one would take more than is saved
_COMPRESSION = re.compile(r"^(lzf|gzip(:[1-9])?)?$")


@dataclass(frozen=True, slots=True)
class Ragged:
    """Sets of varying length: values (m, c), the members of all rows; row i has the members offsets[i] to offsets[i + 1].

    Raises: ShapeError, DataError where offsets (n + 1,) do not rise from 0 to m.

    >>> import numpy as np, sbi_phys as sp
    >>> hits = sp.Ragged.of([np.zeros((3, 2)), np.ones((1, 2))])
    >>> len(hits), hits.offsets.tolist(), hits.row(1).tolist()
    (2, [0, 3, 4], [[1.0, 1.0]])
    """

    values: AnyArray
    offsets: Integers

    def __post_init__(self) -> None:
        """Check the offsets."""
        offsets = np.asarray(self.offsets)
        if offsets.ndim != 1 or offsets.size < 1 or offsets.dtype.kind not in "iu":
            raise ShapeError(f"offsets have shape {offsets.shape} and dtype {offsets.dtype}; expected (n + 1,) integers")
        if offsets[0] != 0 or offsets[-1] != len(self.values) or (np.diff(offsets.astype(np.int64)) < 0).any():
            raise DataError(
                f"offsets run from {offsets[0]} to {offsets[-1]}; expected 0 to {len(self.values)}, the number of members, in rising order"
            )
        object.__setattr__(self, "offsets", offsets.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return self.offsets.size - 1

    def row(self, i: int) -> AnyArray:
        """Members of row i (m_i, c)."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, rows: AnyArray) -> "Ragged":
        """Sets of the given rows, in that order."""
        parts = [self.row(int(i)) for i in rows]
        return Ragged.of(parts) if parts else Ragged(self.values[:0], np.zeros(1, dtype=np.int64))

    @classmethod
    def of(cls, sets: Sequence[AnyArray]) -> Self:
        """Return the sets of a list of arrays (m_i, c), one for each row.   Raises: DataError for an empty list."""
        if not len(sets):
            raise DataError("a ragged set has no rows; expected at least one")
        return cls(np.concatenate(sets), np.cumsum([0, *map(len, sets)], dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence["Ragged"]) -> Self:
        """Return the rows of several sets, one after the other."""
        starts = np.cumsum([0, *(len(p.values) for p in parts)])
        offsets = [p.offsets[1:] + start for p, start in zip(parts, starts[:-1], strict=True)]
        return cls(np.concatenate([p.values for p in parts]), np.concatenate([[0], *offsets]).astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Compression, dtypes, shapes and ragged sets of a store.

    Args:
        compression: '', 'lzf' (fast), 'gzip' or 'gzip:1' to 'gzip:9'; compressed files have equal bytes only with equal h5py.
        chunk_rows: rows of a chunk; 0: as many as fit into 256 KiB with compression, no chunks without.
        dtypes: dtype of single observables, 'float16', 'float32' or 'float64', not wider than that of the store.
        shapes: shapes of single observables of higher rank, e.g. {"image": (16, 16)}; x holds them flattened.
        sets: names of ragged sets -> names of the columns of their members.

    Raises: SettingError.

    >>> import sbi_phys as sp
    >>> sp.Layout(compression="lzf", dtypes={"image": "float16"}, shapes={"image": (16, 16)}).plain()["compression"]
    'lzf'
    """

    compression: str = ""
    chunk_rows: int = 0
    dtypes: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the settings that do not depend on the observables."""
        if not isinstance(self.compression, str) or not _COMPRESSION.match(self.compression):
            raise SettingError(f"compression is {self.compression!r}; expected '', 'lzf', 'gzip' or 'gzip:1' to 'gzip:9'")
        require_int("chunk_rows", self.chunk_rows, low=0)
        for name, dtype in self.dtypes.items():
            require_choice(f"dtype of {name}", dtype, DTYPES)

    def check(self, observables: Sequence[Mapping[str, Any]], dtype: str) -> Self:
        """Return self if it fits these observables and the dtype of x.   Raises: SettingError, ShapeError."""
        sizes = {str(o["name"]): int(o["size"]) for o in observables}
        require_known("dtypes", self.dtypes, sizes)
        require_known("shapes", self.shapes, sizes)
        for name, own in self.dtypes.items():
            if np.dtype(own).itemsize > np.dtype(dtype).itemsize:
                raise SettingError(f"dtype of {name} is {own}; expected none wider than that of the store, {dtype}")
        own_shapes = {str(o["name"]): tuple(o["shape"]) for o in observables if "shape" in o}
        for name, shape in self.shapes.items():
            if name in own_shapes and own_shapes[name] != tuple(shape):
                raise ShapeError(f"shape of {name} is {tuple(shape)}; expected {own_shapes[name]}, that of the observable, or none here")
            if math.prod(shape) != sizes[name]:
                raise ShapeError(f"shape of {name} is {tuple(shape)}, {math.prod(shape)} values; expected {sizes[name]}")
        return self

    def plain(self) -> dict[str, Any]:
        """Return what differs from the default, as JSON values."""
        values: dict[str, Any] = {"compression": self.compression, "chunk_rows": self.chunk_rows, "dtypes": dict(self.dtypes)}
        values["shapes"] = {name: [int(s) for s in shape] for name, shape in self.shapes.items()}
        values["sets"] = {name: [str(c) for c in columns] for name, columns in self.sets.items()}
        return {name: value for name, value in values.items() if value}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `plain`.   Raises: SettingError for a key this version does not know."""
        require_known("layout", values, ("compression", "chunk_rows", "dtypes", "shapes", "sets"))
        return cls(**values)


def columns_of(observables: Sequence[Mapping[str, Any]]) -> dict[str, slice]:
    """Return the columns of x of each observable."""
    ends = np.cumsum([0, *(int(o["size"]) for o in observables)]).tolist()
    return {str(o["name"]): slice(a, b) for o, a, b in zip(observables, ends[:-1], ends[1:], strict=True)}


def split_x(layout: Layout, observables: Sequence[Mapping[str, Any]], x: AnyArray) -> dict[str, AnyArray]:
    """Return the datasets of x (n, k): 'x', or 'x_0', 'x_1', ... where observables have dtypes of their own.

    Raises: DataError where a finite number does not fit into the narrower dtype, or a whole number of counts would change.
    """
    if not layout.dtypes:
        return {"x": x}
    out = {}
    counts = {str(o["name"]) for o in observables if o.get("kind") == "counts"}
    for i, (name, block) in enumerate(columns_of(observables).items()):
        with np.errstate(over="ignore"):
            part = np.ascontiguousarray(x[:, block], dtype=np.dtype(layout.dtypes.get(name, x.dtype.name)).newbyteorder("<"))
        lost = ~np.isfinite(part) & np.isfinite(x[:, block])
        if name in counts and part.dtype.itemsize < x.dtype.itemsize:
            lost |= np.isfinite(part) & (part != x[:, block]) & (x[:, block] == np.rint(x[:, block]))
        if lost.any():
            row, column = (int(v) for v in np.argwhere(lost)[0])
            raise DataError(
                f"{name}[{column}] of row {row} is {x[row, block][column]:g}, which {part.dtype.name} cannot hold; use a wider one"
            )
        out[f"x_{i}"] = part
    return out


@lru_cache(maxsize=256)
def hdf5_type(dtype: str) -> h5py.h5t.TypeID:
    """Return HDF5's description of the dtype `np.dtype.str`; cached, since making one takes as long as writing an attribute."""
    return h5py.h5t.py_create(np.dtype(dtype), logical=True)


def add_dataset(file: h5py.h5f.FileID, name: str, array: AnyArray, layout: Layout) -> int | None:
    """Create one dataset: contiguous, or in chunks of whole rows where the layout compresses.

    Returns: the position of its values in the file, None where they are not contiguous.
    """
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_obj_track_times(False)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    chunked = bool(layout.compression or layout.chunk_rows) and array.nbytes >= _SMALL
    if chunked:
        row_bytes = array.nbytes // array.shape[0]
        rows = min(layout.chunk_rows or max(1, _CHUNK_BYTES // row_bytes), array.shape[0])
        plan.set_chunk((rows, *array.shape[1:]))
        method, _, level = layout.compression.partition(":")
        if method and array.dtype.itemsize > 1:
            plan.set_shuffle()
        if method == "gzip":
            plan.set_deflate(int(level or 4))
        elif method == "lzf":
            plan.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL)
    made = h5py.h5d.create(file, name.encode(), hdf5_type(array.dtype.str), h5py.h5s.create_simple(array.shape), plan)
    if not array.size:
        return None
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, array)
    return None if chunked else made.get_offset()


def add_virtual_x(file: h5py.h5f.FileID, blocks: Mapping[str, AnyArray], dtype: Any) -> None:
    """Create `x` as a virtual dataset (n, k) over the blocks of columns in the same file."""
    rows, columns = next(iter(blocks.values())).shape[0], sum(b.shape[1] for b in blocks.values())
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_obj_track_times(False)  # h5py's call for virtual datasets writes the time, and bytes would differ
    start = 0
    for name, block in blocks.items():
        place = h5py.h5s.create_simple((rows, columns))
        place.select_hyperslab((0, start), block.shape)
        plan.set_virtual(place, b".", name.encode(), h5py.h5s.create_simple(block.shape))
        start += block.shape[1]
    h5py.h5d.create(file, b"x", hdf5_type(np.dtype(dtype).str), h5py.h5s.create_simple((rows, columns)), plan)
