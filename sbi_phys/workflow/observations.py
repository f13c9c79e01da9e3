"""Observations of a run: where they come from, their names, and their values as one row x (k,).

    observed          the simulator's own data, `observed()`
    simulated         a draw from the prior predictive; simulated:7 is another one
    crab.csv          a file with one observation: .csv, .txt or .npy; .npz with one array per observable
    sources.csv#3     row 3 of a file with one observation per row, the first being 1
    sources.csv#all   every row of a file

A table whose shape is not that of the observables is refused: it is never read row by row. The first line of a text file may name its
columns, `observable` for a block of one column, else `observable[0]`, `observable[1]`, ...; they are then matched by name.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_real
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import AnyArray, Array
from sbi_phys.priors import Observable
from sbi_phys.priors.blocks import column_names

__all__ = ["Source", "check_row", "expand", "parse_source", "read_file", "with_observations"]

_ROW = re.compile(r"^(?P<path>.+)#(?P<row>\d+|all)$")
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_LISTED = 8  # names in a message


@dataclass(frozen=True, slots=True)
class Source:
    """Where an observation comes from: kind 'observed', 'simulated' or 'file', with a seed, or a path and a row (0 for the whole file)."""

    kind: str
    path: str = ""
    row: int = 0
    seed: int | None = None

    @property
    def name(self) -> str:
        """A name for results, from the file's name and the row."""
        if self.kind != "file":
            return self.kind if self.seed is None else f"{self.kind}-{self.seed}"
        stem = _NAME.sub("_", Path(self.path).stem).strip("._-") or "observation"
        return f"{stem}-{self.row}" if self.row else stem


def parse_source(text: str) -> Source:
    """Parse 'observed', 'simulated', 'simulated:SEED', 'FILE' or 'FILE#ROW'.   Raises: SettingError.

    >>> from sbi_phys.workflow.observations import parse_source
    >>> parse_source("data/crab.csv#3").name
    'crab-3'
    """
    kind, colon, seed = text.partition(":")
    if kind in ("observed", "simulated") and (not colon or kind == "simulated"):
        if colon and not seed.isdigit():
            raise SettingError(f"observation {text!r} has the seed {seed!r}; expected a whole number, such as simulated:7")
        return Source(kind, seed=int(seed) if colon else None)
    found = _ROW.match(text)
    if found and found["row"] != "all":
        if int(found["row"]) < 1:
            raise SettingError(f"observation {text!r} asks for row 0; expected a row from 1")
        return Source("file", found["path"], int(found["row"]))
    if not text:
        raise SettingError("the observation is empty; expected observed, simulated or the name of a file")
    return Source("file", text)


def expand(text: str) -> list[str]:
    """The sources that FILE#all stands for, one for each row; [text] for anything else.   Raises: DataError."""
    found = _ROW.match(text)
    if not found or found["row"] != "all":
        return [text]
    table = _load(found["path"])
    rows = 1 if isinstance(table, dict) or table.ndim < 2 else len(table)
    return [f"{found['path']}#{i + 1}" for i in range(rows)]


def with_observations(config: Any, words: Sequence[str]) -> tuple[Any, list[str]]:
    """The settings with these observations in them, and their names: a name of the settings stands for its source.

    Raises: SettingError if a name belongs to another source.
    """
    known, names = dict(config.observations), []
    for word in words:
        if word in known:
            names.append(word)
            continue
        for source in expand(word):
            parsed = parse_source(source)
            if parsed.kind == "file" and not Path(parsed.path).is_file():
                have = f"; its observations are {', '.join(known)}" if known else ""
                raise SettingError(f"observation {word!r} is neither a file nor a name of this project{have}")
            if known.setdefault(parsed.name, source) != source:
                raise SettingError(
                    f"observation {source!r} would have the name {parsed.name!r}, which is that of {known[parsed.name]!r}; expected "
                    f"another file name, or a name of its own: --set observations.NAME={source}"
                )
            names.append(parsed.name)
    return (config if known == config.observations else dataclasses.replace(config, observations=known)), list(dict.fromkeys(names))


def read_file(source: Source, observables: Sequence[Observable]) -> Array:
    """The row x (k,) of a file.   Raises: DataError naming the file, the shape that was found and the one expected."""
    table = _load(source.path, column_names(observables))
    if isinstance(table, dict):
        return _from_blocks(source, table, observables)
    size = sum(o.size for o in observables)
    table = as_real(f"the observation in {source.path}", table)
    if source.row:
        rows = table.reshape(len(table), -1) if table.ndim else table.reshape(1, 1)
        if source.row > len(rows):
            raise DataError(f"{source.path} has {len(rows)} rows; expected row {source.row} among them")
        table = rows[source.row - 1]
    shapes = {(size,), (1, size)} | ({(size, 1)} if size > 1 else set()) | ({()} if size == 1 else set())
    if len(observables) == 1:
        shape = tuple(getattr(observables[0], "shape", ()) or (size,))
        shapes |= {shape, (1, *shape)}
    if table.shape not in shapes:
        many = table.ndim == 2 and table.shape[1] == size
        advice = f"; {source.path}#1 is its first row, {source.path}#all every row" if many else ""
        found = table.shape[1:] if table.ndim == 2 and len(table) == 1 else table.shape
        raise DataError(f"the observation in {source.path} has shape {found}; expected ({size},) = {_blocks(observables)}{advice}")
    return np.asarray(table, dtype=np.float64).ravel()


def check_row(x: AnyArray, observables: Sequence[Observable]) -> Array:
    """Return x as (k,) if it fits the observables: number of columns, finite values, whole counts.   Raises: DataError."""
    x = as_real("the observation", x)
    size = sum(o.size for o in observables)
    if x.shape != (size,):
        raise DataError(f"the observation has shape {x.shape}; expected ({size},) = {_blocks(observables)}")
    start = 0
    for o in observables:
        block, names = x[start : start + o.size], column_names([o])
        bad = ~np.isfinite(block) & ~(np.isnan(block) & bool(getattr(o, "missing", False)))
        if bad.any():
            at = int(np.argmax(bad))
            raise DataError(f"the observation is {block[at]} in column {start + at} ({names[at]}); expected finite values")
        if o.kind == "counts":
            wrong = np.isfinite(block) & ((block < 0) | (block != np.round(block)))
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(f"the observation is {block[at]:g} in column {start + at} ({names[at]}); expected whole counts >= 0")
        start += o.size
    return x


def _blocks(observables: Sequence[Observable]) -> str:
    text = [f"{o.name}: {o.size}" for o in observables]
    return ", ".join(text[:_LISTED]) + (", ..." if len(text) > _LISTED else "")


def _load(path: str, names: Sequence[str] | None = None) -> Any:
    """The array of a file, or the arrays of an .npz file by name.   Raises: DataError."""
    expected = "expected a .npy, .npz, .csv or .txt file with one row"
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        if path.endswith(".npy"):
            return np.load(path, allow_pickle=False)
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError, EOFError) as err:
        raise DataError(f"the observation {path!r} cannot be read: {err}; {expected}") from err
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    rows = [[cell.strip() for cell in (line.split(",") if "," in text else line.split())] for line in lines if line]
    if not rows or not rows[0]:
        raise DataError(f"the observation {path!r} has no values; {expected}")
    header = None
    if all(not _is_number(cell) for cell in rows[0]):
        header, rows = rows[0], rows[1:]
        if not rows:
            raise DataError(f"the observation {path!r} has the line {','.join(header)[:60]!r} and no numbers; {expected}")
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        raise DataError(f"the observation {path!r} has rows of {sorted(widths)} values; {expected}")
    bad = next((cell for row in rows for cell in row if not _is_number(cell)), None)
    if bad is not None:
        raise DataError(f"the observation {path!r} has {bad!r}; expected a number without a unit")
    table = np.array(rows, dtype=np.float64)
    return table if header is None or names is None else _ordered(path, table, header, names)


def _ordered(path: str, table: Array, header: list[str], names: Sequence[str]) -> Array:
    """Columns in the order of `names`."""
    if sorted(header) != sorted(names):
        missing, foreign = [n for n in names if n not in header], [n for n in header if n not in names]
        what = f"no column {missing[0]!r}" if missing else f"a column {foreign[0]!r} that is not known" if foreign else "a repeated column"
        shown = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
        raise DataError(f"the observation {path!r} has {what}; expected the columns {shown}")
    return table[:, [header.index(name) for name in names]]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _from_blocks(source: Source, arrays: dict[str, AnyArray], observables: Sequence[Observable]) -> Array:
    """The blocks of an .npz file, in the order of the observables."""
    names = [o.name for o in observables]
    if sorted(arrays) != sorted(names):
        raise DataError(f"{source.path} holds the arrays {sorted(arrays)}; expected one for each observable, {names}")
    parts = []
    for o in observables:
        block = as_real(f"{source.path}[{o.name!r}]", arrays[o.name])
        if source.row:
            if not block.ndim or source.row > len(block):
                raise DataError(f"{source.path}[{o.name!r}] has shape {block.shape}; expected at least {source.row} rows")
            block = block[source.row - 1]
        shape = tuple(getattr(o, "shape", ()) or (o.size,))
        if block.shape not in {shape, (1, *shape), (o.size,), (1, o.size)} and not (o.size == 1 and block.size == 1):
            raise DataError(f"{source.path}[{o.name!r}] has shape {block.shape}; expected {shape}")
        parts.append(np.asarray(block, dtype=np.float64).ravel())
    return np.concatenate(parts)
