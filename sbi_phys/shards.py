r"""One shard of a simulation store: an HDF5 file of rows (theta, x, status), and its schema.

    theta       (n, d) float64   parameters, in the units of the attribute `parameter_units`
    x           (n, k) float32 or float64   observables side by side, in the order of the attribute `observables`
                                 (in a layout of its own, sbi_phys.layout: also x_0, x_1, ... and set_0, set_0_offsets, ...)
    status      (n,) uint8       0 ok, 1 non-finite x (kept as it came), 2 the simulator raised (x is NaN)
    failed_row  (m,) int64       rows within this shard whose status is not 0
    reason      (m,) bytes       why, UTF-8

Everything else is an attribute, text in fixed-length UTF-8 so that no byte lies outside HDF5's own metadata checksums.
Every dataset has a checksum among them, and `checksum` covers them all. Nothing in a file depends on the machine, the time
or the worker that made it: equal settings and equal code give equal bytes. A file is written aside, synced and renamed:
under its final name it is complete or it is not there. Files of schema 1, with one checksum over everything, are read too.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sbi_phys.encoding import array_checksum, attribute, header_checksum, legacy_checksum, plain, set_attributes
from sbi_phys.errors import StoreError
from sbi_phys.layout import Layout, Ragged, add_dataset, add_virtual_x, split_x
from sbi_phys.provenance import git_commit, package_version

__all__ = [
    "FORMAT",
    "NON_FINITE",
    "OK",
    "RAISED",
    "READABLE",
    "SCHEMA",
    "Header",
    "ShardData",
    "open_shard",
    "package_version",
    "read_arrays",
    "read_facts",
    "require_place",
    "shard_name",
    "sync_folder",
    "verify_shard",
    "write_aside",
    "write_shard",
]

FORMAT = "sbi_phys simulation store"
SCHEMA = 2
READABLE = (1, 2)
OK, NON_FINITE, RAISED = 0, 1, 2
_OPTIONAL = ("layout", "origin")  # fields of the header that are left out where they say nothing
_REASON_BYTES = 240
_REMAKE = "Delete and re-make it"


@dataclass(frozen=True, slots=True)
class Header:
    """What all shards of a store share: it follows from the settings of the first `simulate` call.

    Fields: simulator, the identity (class, settings); prior, `Prior.to_dict`; observables, dicts; seed; shard_size, rows of
    every shard but the last; dtype of x; theta, 'prior' (drawn from it), 'given' (by the caller), or 'merged', 'subset',
    'imported', which `simulate` does not continue; layout, `Layout.plain`; origin, of rows that `simulate` did not make.
    """

    simulator: dict[str, Any]
    prior: dict[str, Any]
    observables: list[dict[str, Any]]
    seed: int
    shard_size: int
    dtype: str
    theta: str
    layout: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Fields as a dict of JSON values."""
        return {name: getattr(self, name) for name in self.__slots__ if name not in _OPTIONAL or getattr(self, name)}

    @classmethod
    def from_plain(cls, values: dict[str, Any], where: str) -> "Header":
        """Inverse of `plain`.   Raises: StoreError naming the file and the field."""
        for name in cls.__slots__:
            if name not in values and name not in _OPTIONAL:
                raise StoreError(f"{where} has no field {name!r}; expected a {FORMAT}, schema {SCHEMA}")
        return cls(**{name: values[name] for name in cls.__slots__ if name in values})

    def require_equal(self, got: "Header", where: str) -> None:
        """Raise StoreError naming the first field in which the file `where` differs from what is expected."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(got, name)
            if mine != theirs:
                mine_text, theirs_text = _difference(mine, theirs)
                raise StoreError(f"{where} was made with another {name}: got {theirs_text}, expected {mine_text}")

    @property
    def parameters(self) -> list[dict[str, Any]]:
        """Descriptions of the columns of theta."""
        return _parameters(self.prior)

    @property
    def n_columns(self) -> int:
        """Columns k of x."""
        return sum(int(o["size"]) for o in self.observables)


@dataclass(frozen=True, slots=True)
class ShardData:
    """Rows of one shard: theta (n, d), x (n, k), status (n,), the reasons of the failed rows, by row, and ragged sets by name."""

    theta: NDArray[np.float64]
    x: NDArray[np.floating]
    status: NDArray[np.uint8]
    reasons: dict[int, str]
    sets: dict[str, Ragged] = field(default_factory=dict)


def shard_name(index: int) -> str:
    """File name of shard `index`."""
    return f"shard-{index:05d}.h5"


def write_shard(path: Path, header: Header, index: int, data: ShardData) -> None:
    """Write one shard aside, sync it and rename it to `path`.   Raises: StoreError, e.g. when the disk is full."""
    layout = Layout.from_plain(header.layout)
    arrays, virtual = _stored(header, layout, data)
    attributes = _attributes(header, index, arrays)

    def fill(sink: "_Sink") -> None:
        # one fixed format version; no times, no paths: equal content gives equal bytes
        with h5py.File(sink, "w", libver=("v110", "v110")) as file:
            for name, array in arrays.items():
                add_dataset(file, name, array, layout)
            if virtual:
                add_virtual_x(file, {name: array for name, array in arrays.items() if name.startswith("x_")}, np.dtype(header.dtype))
            set_attributes(file, attributes)

    write_aside(path, fill)


def write_aside(path: Path, fill: Callable[["_Sink"], None]) -> None:
    """Write a file under a temporary name in the same folder, sync it, and rename it to `path`.

    Raises: StoreError where the disk is full or the folder can not be written; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _Sink(temporary, "w+") as sink:
            try:
                fill(sink)
            except Exception:
                if sink.failure is None:
                    raise
            if sink.failure is not None:
                raise sink.failure
            os.fsync(sink.fileno())
        # the folder itself is not synced here: a rename that a power cut undoes leaves a shard to be made again
        os.replace(temporary, path)
    except OSError as err:
        raise StoreError(
            f"{path} could not be written: {err.strerror or err}; shards that are finished are intact, the same call continues after them"
        ) from err
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def open_shard(path: Path) -> Iterator[h5py.File]:
    """Open a shard for reading and check that it is one of ours.

    Raises: StoreError for a missing, truncated, foreign or newer-schema file, also for damage met while reading.
    """
    if not path.is_file():
        raise StoreError(f"{path} is missing; running the same simulate call again makes it")
    try:
        # no HDF5 file locks: a file under its final name never changes, and many network file systems refuse locks
        with h5py.File(path, "r", locking=False) as file:
            _require_ours(file.attrs, path)
            yield file
    except StoreError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as err:
        raise StoreError(
            f"{path} can not be read ({path.stat().st_size if path.exists() else 0} bytes): {err}; expected a complete HDF5 shard: "
            "it is truncated, damaged or no HDF5 file. Delete it and run the same simulate call again"
        ) from err


def read_facts(file: h5py.File, path: Path) -> tuple[Header, dict[str, Any]]:
    """Return the header of an open shard and its own facts: shard, rows, n_failed, package_version, checksum."""
    values = {name: plain(value) for name, value in file.attrs.items()}
    for name in ("simulator", "prior", "observables", "layout", "origin"):
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    facts = {name: values.get(name) for name in ("shard", "rows", "n_failed", "package_version", "checksum")}
    return Header.from_plain(values, str(path)), facts


def read_arrays(file: h5py.File, path: Path) -> ShardData:
    """Return the rows of an open shard.   Raises: StoreError if shapes do not fit together."""
    header, facts = read_facts(file, path)
    rows, failed = int(facts["rows"]), int(facts["n_failed"])
    expected = {
        "theta": (rows, len(header.parameters)),
        "x": (rows, header.n_columns),
        "status": (rows,),
        "failed_row": (failed,),
        "reason": (failed,),
    }
    for name, shape in expected.items():
        if file[name].shape != shape:
            raise StoreError(f"{path}: dataset {name} has shape {file[name].shape}; expected {shape}")
    reasons = {int(row): bytes(text).decode("utf-8", "replace") for row, text in zip(file["failed_row"][:], file["reason"][:], strict=True)}
    sets = {}
    for i, name in enumerate(header.layout.get("sets", {})):
        sets[name] = Ragged(file[f"set_{i}"][:], file[f"set_{i}_offsets"][:])
        if len(sets[name]) != rows:
            raise StoreError(f"{path}: set {name} has {len(sets[name])} rows; expected {rows}")
    return ShardData(file["theta"][:], file["x"][:], file["status"][:], reasons, sets)


def verify_shard(path: Path, header: Header, index: int, rows: int) -> dict[str, str]:
    """Read a shard whole, compare header, shapes and checksums with what is expected; return the datasets' checksums (schema 2).

    Raises: StoreError.
    """
    with open_shard(path) as file:
        got, facts = read_facts(file, path)
        header.require_equal(got, str(path))
        require_place(facts, index, rows, path)
        data = read_arrays(file, path)
        attributes = dict(file.attrs.items())
        # what was just read is not read again; the rest is small, or stands beside x in a layout of its own
        sums: dict[str, str] = {}
        ready = {"theta": data.theta, "x": data.x, "status": data.status}
        if "checksums" not in attributes:
            checksum = legacy_checksum(attributes, ready | {name: file[name][:] for name in ("failed_row", "reason")})
        else:
            sums = dict(zip(plain(attributes["datasets"]), plain(attributes["checksums"]), strict=True))
            for name, expected in sums.items():
                found = f"crc32:{array_checksum(ready[name] if name in ready else file[name][:]):08x}"
                if found != expected:
                    raise StoreError(f"{path} is damaged: dataset {name} has checksum {found}, its header says {expected}. {_REMAKE}")
            checksum = header_checksum(attributes)
        if checksum != facts["checksum"]:
            raise StoreError(f"{path} is damaged: its content has checksum {checksum}, its header says {facts['checksum']}. {_REMAKE}")
    return sums


def require_place(facts: dict[str, Any], index: int, rows: int, path: Path) -> None:
    """Raise StoreError if a shard is not number `index` with `rows` rows."""
    if facts["shard"] != index or facts["rows"] != rows:
        raise StoreError(f"{path} holds shard {facts['shard']} with {facts['rows']} rows; expected shard {index} with {rows} rows")


class _Sink(io.FileIO):
    """A file that remembers its first write error and swallows the rest.

    HDF5 can not close a file whose writes fail (it keeps the handle and complains again when the interpreter ends), so
    the error is kept from it and raised by `write_aside` once HDF5 has let go.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.failure is None:
            try:
                sent = 0
                while sent < len(view):
                    sent += self._send(view[sent:])
            except OSError as err:
                self.failure = err
        return len(view)

    def _send(self, view: memoryview) -> int:
        return super().write(view) or 0


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stored(header: Header, layout: Layout, data: ShardData) -> tuple[dict[str, NDArray[Any]], bool]:
    """Datasets of a shard by name, as they are written; whether x lies in several."""
    failed = np.flatnonzero(data.status)
    encoded = [_shorten(data.reasons[int(row)]) for row in failed]
    x = split_x(layout, header.observables, np.ascontiguousarray(data.x, dtype=np.dtype(header.dtype).newbyteorder("<")))
    arrays = {
        "theta": np.ascontiguousarray(data.theta, dtype="<f8"),
        **x,
        "status": np.ascontiguousarray(data.status, dtype="u1"),
        "failed_row": failed.astype("<i8"),
        "reason": np.array(encoded, dtype=f"S{max(map(len, encoded), default=1)}"),
    }
    if set(data.sets) != set(layout.sets):
        raise StoreError(f"rows have the ragged sets {sorted(data.sets)}; expected those of the layout, {sorted(layout.sets)}")
    for i, name in enumerate(layout.sets):
        values = np.ascontiguousarray(data.sets[name].values)
        arrays[f"set_{i}"] = values.astype(values.dtype.newbyteorder("<"), copy=False)
        arrays[f"set_{i}_offsets"] = data.sets[name].offsets.astype("<i8", copy=False)
    return arrays, len(x) > 1 or "x" not in x


def _attributes(header: Header, index: int, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    parameters = header.parameters
    values: dict[str, Any] = {
        "format": FORMAT,
        "schema": SCHEMA,
        "package_version": package_version(),
        "git": git_commit(),
        "shard": index,
        "rows": arrays["theta"].shape[0],
        "n_failed": arrays["failed_row"].shape[0],
        **header.plain(),
        "parameter_names": [p["name"] for p in parameters],
        "parameter_units": [p["unit"] for p in parameters],
        "parameter_latex": [p["latex"] for p in parameters],
        "datasets": list(arrays),
        "checksums": [f"crc32:{array_checksum(array):08x}" for array in arrays.values()],
        "complete": True,
    }
    encoded = {name: attribute(value) for name, value in values.items()}
    encoded["checksum"] = attribute(header_checksum(encoded))
    return encoded


def _shorten(text: str) -> bytes:
    data = text.encode("utf-8", "replace").replace(b"\0", b" ")
    return data if len(data) <= _REASON_BYTES else data[: _REASON_BYTES - 4].decode("utf-8", "ignore").encode() + b" ..."


def _parameters(prior: dict[str, Any]) -> list[dict[str, Any]]:
    if "blocks" in prior:
        return [p for block in prior["blocks"] for p in _parameters(block)]
    return list(prior["parameters"])


def _require_ours(attributes: Any, path: Path) -> None:
    kind = plain(attributes.get("format"))
    if kind != FORMAT:
        raise StoreError(f"{path} is not a shard: attribute format is {kind!r}; expected {FORMAT!r}")
    schema = plain(attributes.get("schema"))
    if schema not in READABLE:
        newer = isinstance(schema, int) and schema > SCHEMA
        made = plain(attributes.get("package_version"))
        advice = f"it was written by sbi_phys {made}, update this one ({package_version()})" if newer else "it can not be read"
        raise StoreError(f"{path} has schema {schema}; expected {READABLE[0]} to {SCHEMA}: {advice}")
    if not attributes.get("complete", 0):
        raise StoreError(f"{path} is not marked complete; delete it and run the same simulate call again")


def _difference(mine: Any, theirs: Any) -> tuple[str, str]:
    """Two values as short text: of dicts, only the first entry that differs."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            if mine.get(key) != theirs.get(key):
                inner = _difference(mine.get(key), theirs.get(key))
                return f"{key} = {inner[0]}", f"{key} = {inner[1]}"
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                inner = _difference(a, b)
                return f"[{i}] {inner[0]}", f"[{i}] {inner[1]}"
    short = [text if len(text) <= 200 else text[:200] + " ..." for text in map(repr, (mine, theirs))]
    return short[0], short[1]
