r"""One protocol for the results of all folders: summary, plot, and the same content as plain values, data frame, CSV file and LaTeX table.

A result derives from `Result` and defines `summary()`, `plot(ax=None)` and, unless one row of its numbers says all, `rows()`: one row
for each parameter, bin, level or data set. Everything else follows:

    to_dict     fields of the dataclass as JSON values, None for NaN and infinity
    to_frame    rows as a pandas DataFrame
    to_csv      rows with full precision (RFC 4180); the header holds the units
    to_latex    rows as a booktabs tabular, values rounded to their errors by the rule of the Particle Data Group (`core.numbers`)
"""

import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.core.errors import SbiPhysError, ShapeError
from sbi_phys.core.files import write_aside
from sbi_phys.core.numbers import MINUS, decimals, fixed
from sbi_phys.core.types import ArrayLike

if TYPE_CHECKING:
    import pandas

__all__ = ["Result", "Rows", "bin_columns", "draws_rows", "latex_text", "plain"]

_DIGITS = 4  # significant digits in LaTeX of a number without error
_SPECIAL = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {"\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}", "$": r"\$"}


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of values: names of the c columns, rows (r, c) of text, numbers, booleans or None.

    units {column: unit}, for columns that have one. errors {column: (error,) or (low, high)}: the columns that hold the standard error
    of a column, or the ends of its interval; `to_latex` joins them.
    Raises: ShapeError for a row of another length.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    units: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the lengths of the rows."""
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ShapeError(f"row {i} has {len(row)} values; expected {len(self.columns)}, one per column {self.columns}")

    @classmethod
    def of(
        cls, columns: Mapping[str, Any], units: Mapping[str, str] | None = None, errors: Mapping[str, tuple[str, ...]] | None = None
    ) -> "Rows":
        """Table of columns {name: values (r,)}; a single value (number, text, None) stands in every row.

        A column `a_err` is taken as the error of column `a`.   Raises: ShapeError for columns of different lengths.
        """
        values = {name: v if v is None or np.ndim(v) == 0 or isinstance(v, str) else list(v) for name, v in columns.items()}
        lengths = {name: len(v) for name, v in values.items() if isinstance(v, list)}
        if len(set(lengths.values())) > 1:
            raise ShapeError(f"columns have lengths {lengths}; expected one length")
        n = next(iter(lengths.values()), 1)
        full = {k: [_scalar(v) for v in c] if isinstance(c, list) else [_scalar(c)] * n for k, c in values.items()}
        found = {name: (f"{name}_err",) for name in full if f"{name}_err" in full}
        return cls(tuple(full), tuple(zip(*full.values(), strict=True)) if full else (), dict(units or {}), found | dict(errors or {}))

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns with their units: 'energy [EeV]'."""
        return tuple(f"{name} [{self.units[name]}]" if self.units.get(name) else name for name in self.columns)

    def column(self, name: str) -> list[Any]:
        """Values of one column.   Raises: ShapeError for an unknown name."""
        if name not in self.columns:
            raise ShapeError(f"the table has no column {name!r}; expected one of {self.columns}")
        j = self.columns.index(name)
        return [row[j] for row in self.rows]

    def to_frame(self) -> "pandas.DataFrame":
        """Rows as a pandas DataFrame, whose attribute `attrs["units"]` holds the units.   Raises: SbiPhysError without pandas."""
        try:
            import pandas
        except ImportError as err:
            raise SbiPhysError("to_frame needs pandas, which is not installed; expected `pip install pandas`") from err
        frame = pandas.DataFrame({name: self.column(name) for name in self.columns}, columns=list(self.columns))
        frame.attrs["units"] = dict(self.units)
        return frame

    def csv_text(self) -> str:
        """Rows as CSV: numbers at full precision, None as an empty cell, units in the header."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.header, *(["" if v is None else v for v in row] for row in self.rows)])
        return out.getvalue()

    def latex(self, caption: str = "", label: str = "") -> str:
        """Rows as LaTeX: a tabular with rules of the package booktabs, within a table if there is a caption or a label."""
        joined = {name for parts in self.errors.values() for name in parts}
        shown = [name for name in self.columns if name not in joined]
        units = {name: f" [{latex_text(unit)}]" for name, unit in self.units.items() if unit}
        titles = [latex_text(name.replace("_", " ")) + units.get(name, "") for name in shown]
        at = {name: j for j, name in enumerate(self.columns)}
        text = [[_cell(row[at[name]], [row[at[e]] for e in self.errors.get(name, ())]) for name in shown] for row in self.rows]
        kinds = "".join("l" if any(isinstance(row[at[name]], str) for row in self.rows) else "r" for name in shown)
        lines = [
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            _line(titles),
            r"\midrule",
            *map(_line, text),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        if caption or label:
            ends = [rf"\caption{{{latex_text(caption)}}}"] * bool(caption) + [rf"\label{{{label}}}"] * bool(label)
            lines = [r"\begin{table}", r"\centering", *lines, *ends, r"\end{table}"]
        return "\n".join(lines) + "\n"


class Result:
    """Base of all results: a subclass defines `summary`, `plot` and, if it has more than one row of numbers, `rows`."""

    __slots__ = ()

    def summary(self) -> str:
        """Return the result in words."""
        raise NotImplementedError(f"{type(self).__name__} has no summary()")

    def plot(self, ax: Any = None) -> Any:
        """Draw the result into `ax`, or into a new figure if it is None, and return the axes."""
        raise NotImplementedError(f"{type(self).__name__} has no plot()")

    def rows(self) -> Rows:
        """Return the table of the result; by default one row of all fields that are single values."""
        named: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)} if is_dataclass(self) else {}
        return Rows.of({name: v for name, v in named.items() if isinstance(v, bool | int | float | str | np.generic)})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values: lists for arrays, None for NaN and infinity, for an object such as a network its class."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)} if is_dataclass(self) else {}

    def to_frame(self) -> "pandas.DataFrame":
        """Return `rows` as a pandas DataFrame with `attrs["units"]`.   Raises: SbiPhysError (pandas is not installed)."""
        return self.rows().to_frame()

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write `rows` as CSV with full precision, units in the header -> the path.   Raises: WriteError."""
        return write_aside(path, self.rows().csv_text(), make_folder=True)

    def to_latex(self, *, caption: str = "", label: str = "") -> str:
        """Return `rows` as a LaTeX tabular (package booktabs) with values rounded to their errors.

        With a caption or a label it stands in a table environment.
        """
        return self.rows().latex(caption, label)


def draws_rows(
    theta: ArrayLike,
    names: Sequence[str],
    weights: ArrayLike | None = None,
    units: Sequence[str] = (),
    further: Mapping[str, Any] | None = None,
) -> Rows:
    """One row for each column of draws (n, d): mean, sd, median and the ends of the central 68 and 95 % intervals.

    Args: weights (n,) of the draws, sum 1; units (d,), '' for none; further columns {name: (d,) or a single value}.
    """
    draws = np.asarray(theta, dtype=np.float64)
    w = np.full(len(draws), 1 / len(draws)) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = w @ draws
    sd = np.sqrt(np.maximum(w @ (draws - mean) ** 2, 0))
    levels = {"q025": 0.025, "q16": 0.16, "median": 0.5, "q84": 0.84, "q975": 0.975}
    if weights is None:
        sd = draws.std(axis=0, ddof=1) if len(draws) > 1 else sd
        quantiles = np.quantile(draws, list(levels.values()), axis=0)
    else:
        order = np.argsort(draws, axis=0)
        content = np.cumsum(w[order], axis=0) - 0.5 * w[order]
        ordered = np.take_along_axis(draws, order, axis=0)
        quantiles = np.array([[np.interp(q, content[:, j], ordered[:, j]) for j in range(draws.shape[1])] for q in levels.values()])
    found: dict[str, Any] = {"name": list(names)} | ({"unit": list(units)} if any(units) else {}) | {"mean": mean, "sd": sd}
    found |= dict(zip(levels, quantiles, strict=True)) | dict(further or {})
    return Rows.of(found, errors={"median": ("q16", "q84")})


def bin_columns(edges: ArrayLike | None, n: int) -> dict[str, Any]:
    """Columns that name n bins: their edges `low` and `high`, or their number `bin` where edges are not known."""
    if edges is None:
        return {"bin": np.arange(n)}
    ends = np.asarray(edges, dtype=np.float64)
    return {"low": ends[:-1], "high": ends[1:]}


def plain(value: Any) -> Any:
    """Value as JSON: arrays and sequences as lists, NaN and infinity as None, dataclasses as dicts, other objects by their name."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.ndarray) or hasattr(value, "detach"):
        array = value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return [plain(v) for v in array.tolist()] if array.ndim else None
        return array.tolist() if array.dtype.kind in "fiubU" else [plain(v) for v in array.tolist()]
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def latex_text(text: str) -> str:
    r"""Escape text for LaTeX; what stands between dollar signs is kept as mathematics: 'f_1 of $x_1$' -> 'f\_1 of $x_1$'."""
    parts = re.split(r"(\$[^$]+\$)", text)
    return "".join(part if part.startswith("$") and len(part) > 1 else "".join(_SPECIAL.get(c, c) for c in part) for part in parts)


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic | np.ndarray) else value


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(value: Any, errors: Sequence[Any]) -> str:
    """One cell: a value with its error or interval in mathematics, a number with a few digits, or text."""
    if value is None:
        return "--"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return latex_text(value)
    if isinstance(value, int) and not errors:
        return _math(str(value))
    known = [float(e) for e in errors if e is not None]
    if not math.isfinite(value) or len(known) < len(errors) or not np.isfinite(known).all():
        return _number(float(value))
    if len(known) == 1:
        digits = decimals(known[0], known[0])
        return _math(rf"{fixed(value, digits)} \pm {fixed(known[0], digits)}")
    if len(known) == 2:
        below, above = value - known[0], known[1] - value
        digits = decimals(below, above)
        return _math(f"{fixed(value, digits)}^{{+{fixed(above, digits)}}}_{{-{fixed(below, digits)}}}")
    return _number(float(value))


def _number(value: float) -> str:
    if math.isnan(value):
        return "--"
    if math.isinf(value):
        return _math(("-" if value < 0 else "") + r"\infty")
    mantissa, _, exponent = f"{value:.{_DIGITS}g}".partition("e")
    return _math(mantissa + (rf" \times 10^{{{int(exponent)}}}" if exponent else ""))


def _math(text: str) -> str:
    return f"${text.replace(MINUS, '-')}$"
