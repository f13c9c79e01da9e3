r"""One shard of a simulation store: an HDF5 file of rows (theta, x, status), and its schema.

    theta       (n, d) float64   parameters, in the units of the attribute `parameter_units`
    x           (n, k) float32 or float64   observables side by side, in the order of the attribute `observables`
                                 (in a layout of its own, sbi_phys.store.layout: also x_0, x_1, ... and set_0, set_0_offsets, ...)
    status      (n,) uint8       0 ok, 1 non-finite x (kept), 2 the simulator raised (x is NaN)
    failed_row  (m,) int64       rows of this shard whose status is not 0
    reason      (m,) bytes       reason of the failure, UTF-8

Everything else is an attribute; text is fixed-length UTF-8, so that every byte is covered by HDF5's own metadata checksums.
The attributes include a checksum of every dataset, and `checksum` covers all attributes; a label before the HDF5 content
(sbi_phys.store._encoding) covers every byte of the file, and files without a label are read too. The bytes do not depend on the
machine, the time or the worker: equal settings and equal code give equal files. Files are written by `sbi_phys.core.files`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checksums import FileKey, file_key
from sbi_phys.core.errors import StoreError
from sbi_phys.core.files import AsideFile, open_aside
from sbi_phys.core.hdf5 import require_inside
from sbi_phys.core.provenance import git_commit
from sbi_phys.core.types import AnyArray, Array
from sbi_phys.core.version import __version__
from sbi_phys.store._encoding import (
    MOST_RANGES,
    SYNCED,
    Label,
    array_checksum,
    array_seed,
    attribute,
    block_size,
    check_label,
    difference,
    header_checksum,
    plain,
    read_attributes,
    reason_kind,
    set_attributes,
    text_checksum,
    to_json,
    write_file,
)
from sbi_phys.store.layout import DTYPES, Layout, Ragged, add_dataset, add_virtual_x, split_x

__all__ = [
    "FORMAT",
    "NON_FINITE",
    "OK",
    "RAISED",
    "SCHEMA",
    "Header",
    "ShardData",
    "open_intact",
    "open_shard",
    "read_arrays",
    "read_facts",
    "require_place",
    "shard_name",
    "verify_shard",
    "write_file",
    "write_shard",
]

FORMAT = "sbi_phys simulation store"
SCHEMA = 2
OK, NON_FINITE, RAISED = 0, 1, 2
_KINDS: dict[str, type] = {
    "simulator": dict, "prior": dict, "observables": list, "seed": int, "shard_size": int, "dtype": str, "theta": str,
    "layout": dict, "origin": dict,
}  # fmt: skip
_CHECKED: dict[FileKey, tuple[str, int, int]] = {}  # files of this process that agree with their checksums: header, shard, rows
_MOST_CHECKED = 10**6
_OPTIONAL = ("layout", "origin")  # fields of the header that are left out where they are empty
_REASON_BYTES = 240
_REMAKE = "Delete and re-make it"


@dataclass(frozen=True, slots=True)
class Header:
    """Settings that all shards of a store have in common.

    Fields: simulator, the identity (class, settings); prior, `Prior.to_dict`; observables, dicts; seed; shard_size, rows of
    every shard but the last; dtype of x; theta, 'prior' (drawn from it), 'given' (by the caller), or 'merged', 'subset',
    'imported', which `simulate` does not continue; layout, `Layout.plain`; origin, sources of rows that `simulate` did not make.
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
        """Return the fields as a dict of JSON values."""
        return {name: getattr(self, name) for name in self.__slots__ if name not in _OPTIONAL or getattr(self, name)}

    @classmethod
    def from_plain(cls, values: dict[str, Any], where: str) -> "Header":
        """Inverse of `plain`.   Raises: StoreError naming the file and the field."""
        for name in cls.__slots__:
            if name not in values and name not in _OPTIONAL:
                raise StoreError(f"{where} has no field {name!r}; expected a {FORMAT}, schema {SCHEMA}")
        for name, kind in _KINDS.items():
            if name in values and (not isinstance(values[name], kind) or isinstance(values[name], bool)):
                raise StoreError(f"{where} has {name} = {values[name]!r:.100}; expected a {kind.__name__}")
        header = cls(**{name: values[name] for name in cls.__slots__ if name in values})
        header._require_sound(where)
        return header

    def _require_sound(self, where: str) -> None:
        """Raise StoreError unless numbers and descriptions are such as `simulate` writes, so that later readers need no check."""
        try:
            sizes = [o["size"] for o in self.observables]
            names = [o["name"] for o in self.observables] + [p["name"] for p in self.parameters]
        except (KeyError, TypeError, RecursionError) as err:
            raise StoreError(f"{where} describes parameters or observables without {err}; expected their names and sizes") from err
        if not all(isinstance(name, str) for name in names):
            raise StoreError(f"{where} has names {names!r:.200}; expected text")
        for name, value in (("seed", self.seed), ("shard_size", self.shard_size - 1), *(("size", size) for size in sizes)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
                raise StoreError(f"{where} has {name} = {value!r:.100}; expected a whole number below 2^63")
        if self.dtype not in DTYPES:
            raise StoreError(f"{where} has dtype {self.dtype!r:.100}; expected one of {', '.join(DTYPES)}")

    def digest(self) -> str:
        """Return a short digest of all fields, which labels contain in place of the header."""
        return hashlib.sha256(to_json(self.plain()).encode()).hexdigest()[:32]

    def require_equal(self, got: "Header", where: str) -> None:
        """Raise StoreError naming the first field in which the header of the file `where` differs."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(got, name)
            if mine != theirs:
                mine_text, theirs_text = difference(mine, theirs)
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
    """Rows of one shard: theta (n, d), x (n, k), status (n,), reasons {row: text} of the failed rows, and ragged sets by name."""

    theta: Array
    x: NDArray[np.floating]
    status: NDArray[np.uint8]
    reasons: dict[int, str]
    sets: dict[str, Ragged] = field(default_factory=dict)


def shard_name(index: int) -> str:
    """Return the file name of shard `index`."""
    return f"shard-{index:05d}.h5"


def write_shard(path: Path, header: Header, index: int, data: ShardData) -> None:
    """Write one shard atomically.   Raises: StoreError, e.g. where the disk is full."""
    layout = Layout.from_plain(header.layout)
    arrays, virtual = _stored(header, layout, data)
    attributes = _attributes(header, index, arrays)
    kinds = Counter(reason_kind(data.reasons[int(row)]) for row in arrays["failed_row"])
    n_ranges = len(arrays) if len(arrays) <= MOST_RANGES else 0
    block, shown = block_size(n_ranges, kinds)
    sums: dict[str, str] = dict(zip(arrays, plain(attributes["checksums"]), strict=True))
    label = Label(header.digest(), index, data.status.size, arrays["failed_row"].size, shown, _content(sums), block, 0, (), 0)

    with open_aside(path, **SYNCED) as sink:
        places = _write_content(sink, block, arrays, layout, attributes, header.dtype if virtual else "")
        if sink.failure is None:
            ranges = [(at, arrays[name].nbytes, array_seed(arrays[name]), int(sums[name][6:], 16)) for name, at in places.items()]
            whole = replace(label, ranges=sorted(ranges) if n_ranges else ()).with_rest(sink)
            sink.seek(0)
            sink.write(whole.encode())


def _write_content(
    sink: AsideFile, block: int, arrays: dict[str, AnyArray], layout: Layout, attributes: dict[str, Any], virtual: str
) -> dict[str, int]:
    """Write the HDF5 content behind the label's block -> position of the values of each dataset that is contiguous in the file.

    By HDF5's low-level calls: those of h5py take as long for a small shard as the data.
    """
    create, access = h5py.h5p.create(h5py.h5p.FILE_CREATE), h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    create.set_userblock(block)
    create.set_obj_track_times(False)
    create.set_attr_phase_change(64, 32)  # attributes in the root's header: a heap takes twice as long
    # a fixed format version, no times and no paths: equal content gives equal bytes
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, sink)
    file = h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, create, access)
    try:
        places = {name: add_dataset(file, name, array, layout) for name, array in arrays.items()}
        if virtual:
            add_virtual_x(file, {name: array for name, array in arrays.items() if name.startswith("x_")}, np.dtype(virtual))
        set_attributes(file, attributes)
    finally:
        file.close()
    return {name: at for name, at in places.items() if at is not None}


@contextmanager
def open_shard(path: Path) -> Iterator[h5py.File]:
    """Open a shard for reading and check its format.

    Raises: StoreError for a missing, truncated or foreign file, another schema, and damage found while reading.
    """
    if not path.is_file():
        raise StoreError(f"{path} is missing; running the same simulate call again makes it")
    try:
        # no HDF5 file locks: a complete file never changes, and many network file systems refuse locks
        with h5py.File(path, "r", locking=False) as file:
            _require_ours(file.attrs, path)
            yield file
    except StoreError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as err:
        raise StoreError(
            f"{path} cannot be read ({path.stat().st_size if path.exists() else 0} bytes): {err}; expected a complete HDF5 shard: "
            "it is truncated, damaged or no HDF5 file. Delete it and run the same simulate call again"
        ) from err


@contextmanager
def open_intact(path: Path, header: Header, index: int, rows: int) -> Iterator[h5py.File]:
    """Open a shard for reading after every byte of it was compared with its checksums, once for each file and process.

    Raises: StoreError as `verify_shard`, and for values that lie outside of the file (external storage, links to other files).
    """
    place = (header.digest(), index, rows)
    try:
        key = file_key(path.stat())
    except OSError:
        key = None  # `open_shard` says what is missing
    new = key is None or _CHECKED.get(key) != place
    if new and key is not None:
        verify_shard(path, header, index, rows)
    with open_shard(path) as file:
        if key != file_key(os.fstat(file.id.get_vfd_handle())):
            raise StoreError(f"{path} has changed while it was read; expected a finished shard, which never changes. Try again")
        if new and key is not None:
            require_inside(file, path, error=StoreError, advice=f". {_REMAKE}")
            if len(_CHECKED) >= _MOST_CHECKED:
                _CHECKED.clear()
            _CHECKED[key] = place
        yield file


def read_facts(file: h5py.File, path: Path) -> tuple[Header, dict[str, Any]]:
    """Return the header of an open shard and its own facts: shard, rows, n_failed, package_version, checksum."""
    return _facts(read_attributes(file), path)


def _facts(attributes: dict[str, Any], path: Path) -> tuple[Header, dict[str, Any]]:
    values = {name: plain(value) for name, value in attributes.items()}
    for name in ("simulator", "prior", "observables", "layout", "origin"):
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    facts = {name: values.get(name) for name in ("shard", "rows", "n_failed", "package_version", "checksum")}
    return Header.from_plain(values, str(path)), facts


def read_arrays(file: h5py.File, path: Path, header: Header | None = None, rows: int = 0) -> ShardData:
    """Return the rows of an open shard; without the store's header, by its own.   Raises: StoreError if shapes do not fit together."""
    if header is None:
        header, facts = read_facts(file, path)
        rows = int(facts["rows"])
    failed = len(file["failed_row"])
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
    pairs = zip(file["failed_row"][:], file["reason"][:], strict=True) if failed else ()
    reasons = {int(row): bytes(text).decode("utf-8", "replace") for row, text in pairs}
    sets = {}
    for i, name in enumerate(header.layout.get("sets", {})):
        sets[name] = Ragged(file[f"set_{i}"][:], file[f"set_{i}_offsets"][:])
        if len(sets[name]) != rows:
            raise StoreError(f"{path}: set {name} has {len(sets[name])} rows; expected {rows}")
    return ShardData(file["theta"][:], file["x"][:], file["status"][:], reasons, sets)


def verify_shard(path: Path, header: Header, index: int, rows: int) -> str:
    """Read all of a shard and compare header, place and checksums with what is expected -> checksum of theta and x.

    A label that agrees with every byte is sufficient; where it does not, the HDF5 content is read to name the fault.
    Raises: StoreError.
    """
    try:
        label, whole = check_label(path)
    except FileNotFoundError:
        label, whole = None, False
    except OSError as err:
        raise StoreError(f"{path} cannot be read: {err.strerror or err}; {_REMAKE}") from err
    if label is not None and whole and (label.header, label.shard, label.rows) == (header.digest(), index, rows):
        return label.content
    content, block = _verify_content(path, header, index, rows)
    if block and not whole:
        raise StoreError(f"{path} is damaged: its bytes do not agree with the label at its beginning. {_REMAKE}")
    return content


def _verify_content(path: Path, header: Header, index: int, rows: int) -> tuple[str, int]:
    """Compare the HDF5 content of a shard with its checksums -> checksum of theta and x, bytes of the label's block."""
    with open_shard(path) as file:
        attributes = read_attributes(file)
        got, facts = _facts(attributes, path)
        header.require_equal(got, str(path))
        require_place(facts, index, rows, path)
        require_inside(file, path, error=StoreError, advice=f". {_REMAKE}")
        if file["failed_row"].shape != (facts["n_failed"],):
            raise StoreError(f"{path}: dataset failed_row has shape {file['failed_row'].shape}; expected ({facts['n_failed']},)")
        data = read_arrays(file, path, got, rows)
        # the other datasets are small, or part of x in a layout with several dtypes
        ready = {"theta": data.theta, "x": data.x, "status": data.status}
        sums: dict[str, str] = dict(zip(plain(attributes["datasets"]), plain(attributes["checksums"]), strict=True))
        for name, expected in sums.items():
            found = f"crc32:{array_checksum(ready[name] if name in ready else file[name][:]):08x}"
            if found != expected:
                raise StoreError(f"{path} is damaged: dataset {name} has checksum {found}, its header says {expected}. {_REMAKE}")
        checksum = header_checksum(attributes)
        if checksum != facts["checksum"]:
            raise StoreError(f"{path} is damaged: its content has checksum {checksum}, its header says {facts['checksum']}. {_REMAKE}")
        return _content(sums), int(file.userblock_size)


def _content(sums: dict[str, str]) -> str:
    """Checksum over the checksums of theta and x."""
    return text_checksum(" ".join(value for name, value in sums.items() if name == "theta" or name.startswith("x")))


def require_place(facts: dict[str, Any], index: int, rows: int, path: Path) -> None:
    """Raise StoreError if a shard is not number `index` with `rows` rows."""
    if facts["shard"] != index or facts["rows"] != rows:
        raise StoreError(f"{path} holds shard {facts['shard']} with {facts['rows']} rows; expected shard {index} with {rows} rows")


def _stored(header: Header, layout: Layout, data: ShardData) -> tuple[dict[str, AnyArray], bool]:
    """Return the datasets of a shard by name, and whether x consists of several."""
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


def _attributes(header: Header, index: int, arrays: dict[str, AnyArray]) -> dict[str, Any]:
    shared, words = _shared(to_json(header.plain()))
    own = {
        "shard": index,
        "rows": arrays["theta"].shape[0],
        "n_failed": arrays["failed_row"].shape[0],
        "datasets": list(arrays),
        "checksums": [f"crc32:{array_checksum(array):08x}" for array in arrays.values()],
    }
    # the text of `header_checksum`, without encoding the shared attributes for every shard
    text = "{" + ",".join(sorted([*words, *_words(own)])) + "}"
    return shared | {name: attribute(value) for name, value in own.items()} | {"checksum": attribute(text_checksum(text))}


@lru_cache(maxsize=8)
def _shared(header: str) -> tuple[dict[str, Any], list[str]]:
    """Return the attributes that all shards of a store share, encoded and as JSON, from the header as JSON."""
    values = json.loads(header)
    parameters = _parameters(values["prior"])
    facts = {"format": FORMAT, "schema": SCHEMA, "package_version": __version__, "git": git_commit(), "complete": True}
    facts |= {f"parameter_{what}s": [p[what] for p in parameters] for what in ("name", "unit")}
    facts["parameter_latex"] = [p["latex"] for p in parameters]
    encoded = {name: attribute(value) for name, value in (facts | values).items()}
    return encoded, _words({name: plain(value) for name, value in encoded.items()})


def _words(values: dict[str, Any]) -> list[str]:
    return [f"{to_json(name)}:{to_json(value)}" for name, value in values.items()]


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
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        made = plain(attributes.get("package_version"))
        advice = f"it was written by sbi_phys {made}, update this one ({__version__})" if newer else "it cannot be read"
        raise StoreError(f"{path} has schema {schema}; expected {SCHEMA}: {advice}")
    if not attributes.get("complete", 0):
        raise StoreError(f"{path} is not marked complete; delete it and run the same simulate call again")
