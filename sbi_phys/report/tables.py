"""Summaries of a posterior as rows, and rows as tables of text, Markdown, CSV and HTML.

Rows have full precision; a `Table` has rounded text. Intervals are central: 68 % is [q16, q84], 95 % is [q025, q975].
"""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any, ClassVar

import numpy as np

from sbi_phys.core.checks import as_matrix
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.numbers import MINUS, decimals, fixed, format_interval
from sbi_phys.core.types import ArrayLike
from sbi_phys.priors import Parameter
from sbi_phys.report.latex import latex_to_html

__all__ = [
    "ComparisonRow",
    "PosteriorRow",
    "ShiftRow",
    "Table",
    "comparison_table",
    "inline_html",
    "posterior_table",
    "rows_to_csv",
    "rows_to_table",
    "shift_table",
    "summarise",
]

NONE = "\N{EN DASH}"

_LEVELS = {"q025": 0.025, "q05": 0.05, "q16": 0.16, "q50": 0.5, "q84": 0.84, "q95": 0.95, "q975": 0.975}
_SUMMARY = ("q05", "q16", "q50", "q84", "q95")
_MARKUP = re.compile(
    r"`([^`\n]+)`|\*\*(?=\S)(.+?)(?<=\S)\*\*|\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)|(https://[^\s<>\"'`)\]]*[^\s<>\"'`)\].,;:])"
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text: header (c,), rows (r, c), a caption; cells may contain `code`, **bold** and $LaTeX$.

    Raises: ShapeError for a row whose length differs from that of the header.

    >>> from sbi_phys.report import Table
    >>> Table(("Test", "p"), (("SBC", "0.3"),)).header
    ('Test', 'p')
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        """Convert sequences to tuples of str and check their lengths."""
        object.__setattr__(self, "header", tuple(str(h) for h in self.header))
        object.__setattr__(self, "rows", tuple(tuple(str(cell) for cell in row) for row in self.rows))
        for i, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ShapeError(f"row {i} of the table has {len(row)} cells; expected {len(self.header)} = {self.header}")

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, with the caption below."""
        lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in (self.header, *self.rows)]
        lines.insert(1, "|" + "|".join(" --- " for _ in self.header) + "|")
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])]) + "\n"

    def to_html(self) -> str:
        """The table as an HTML `<table>`, with escaped text; the first column has the row headings."""
        head = "".join(f'<th scope="col">{inline_html(h)}</th>' for h in self.header)
        body = "".join(
            "<tr>" + f'<th scope="row">{inline_html(row[0])}</th>' + "".join(f"<td>{inline_html(c)}</td>" for c in row[1:]) + "</tr>\n"
            for row in self.rows
            if row
        )
        caption = f"<caption>{inline_html(self.caption)}</caption>" if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


@dataclass(frozen=True, slots=True)
class PosteriorRow:
    """Marginal of one parameter in units of `unit`: mean, standard deviation (n - 1), quantiles."""

    header: ClassVar[tuple[str, ...]] = ("Parameter", "Median and 68 % interval", "95 % interval", "Mean", "Sd", "Unit")
    name: str
    label: str
    unit: str
    mean: float
    sd: float
    q025: float
    q05: float
    q16: float
    q50: float
    q84: float
    q95: float
    q975: float

    @property
    def interval68(self) -> str:
        """For example '18.21 +0.05 -0.04 lg V'."""
        return format_interval(self.q50, self.q16, self.q84, self.unit)

    def cells(self) -> tuple[str, ...]:
        """The cells as text; all numbers have one digit more than the 68 % interval."""
        digits = decimals(self.q50 - self.q16, self.q84 - self.q50) + 1
        low, high, mean, sd = (fixed(v, digits) for v in (self.q025, self.q975, self.mean, self.sd))
        central = format_interval(self.q50, self.q16, self.q84)
        return (self.label, central, f"[{low}, {high}]", mean, sd, self.unit or NONE)


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """A published value of one parameter and the posterior: offset = (value - median) / sd, and the posterior mass below the value."""

    header: ClassVar[tuple[str, ...]] = ("Parameter", "Fit", "Published", "This posterior", "Offset [sd]", "Posterior mass below")
    name: str
    label: str
    unit: str
    fit: str
    source: str
    value: float
    q025: float
    q16: float
    q50: float
    q84: float
    q975: float
    offset: float
    below: float

    def cells(self) -> tuple[str, ...]:
        """The cells as text."""
        ours = format_interval(self.q50, self.q16, self.q84, self.unit)
        return (self.label, self.fit, f"{self.value:.4g}".replace("-", MINUS), ours, fixed(self.offset, 1, sign=True), f"{self.below:.3f}")


@dataclass(frozen=True, slots=True)
class ShiftRow:
    """One parameter of a posterior and of a reference: shift = (median - reference median) / reference sd, and the ratio of sds."""

    header: ClassVar[tuple[str, ...]] = ("Parameter", "Posterior", "Reference", "Median shift [sd]", "Ratio of widths")
    name: str
    label: str
    unit: str
    q16: float
    q50: float
    q84: float
    reference_q16: float
    reference_q50: float
    reference_q84: float
    shift: float
    width_ratio: float

    def cells(self) -> tuple[str, ...]:
        """The cells as text."""
        ours = format_interval(self.q50, self.q16, self.q84, self.unit)
        theirs = format_interval(self.reference_q50, self.reference_q16, self.reference_q84, self.unit)
        return (self.label, ours, theirs, fixed(self.shift, 3, sign=True), f"{self.width_ratio:.3f}")


def summarise(samples: ArrayLike, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Summary of samples (n, d), n >= 2 -> {name: {mean, sd, q05, q16, q50, q84, q95}}, JSON-able, in the parameters' units.

    sd divides by n - 1; quantiles interpolate linearly (numpy's default).   Raises: ShapeError, NonFiniteError, DataError.

    >>> import numpy as np
    >>> from sbi_phys.report import summarise
    >>> summarise(np.linspace(0, 1, 101)[:, None], ["mass"])["mass"]["q50"]
    0.5
    """
    theta, quantiles = _checked(samples, names)
    mean, sd = theta.mean(axis=0), theta.std(axis=0, ddof=1)
    return {name: {"mean": float(mean[k]), "sd": float(sd[k])} | {q: quantiles[q][k] for q in _SUMMARY} for k, name in enumerate(names)}


def posterior_table(samples: ArrayLike, parameters: Sequence[Parameter]) -> list[PosteriorRow]:
    """Marginals of samples (n, d), one row a parameter, in its unit.   Raises: ShapeError, NonFiniteError, DataError.

    >>> import numpy as np
    >>> from sbi_phys.priors import Parameter
    >>> from sbi_phys.report import posterior_table
    >>> draws = np.linspace(0, 1, 101)[:, None] * [1, 10]
    >>> posterior_table(draws, [Parameter("mass", 0, 1), Parameter("energy", 0, 10, unit="EeV")])[1].unit
    'EeV'
    """
    theta, quantiles = _checked(samples, [p.name for p in parameters])
    return [
        PosteriorRow(
            name=p.name,
            label=_symbol(p),
            unit=p.unit,
            mean=float(theta[:, k].mean()),
            sd=float(theta[:, k].std(ddof=1)),
            **{q: values[k] for q, values in quantiles.items()},
        )
        for k, p in enumerate(parameters)
    ]


def comparison_table(samples: ArrayLike, parameters: Sequence[Parameter], published: Sequence[Mapping[str, Any]]) -> list[ComparisonRow]:
    """Published fits (dicts with label, source, theta {name: value}) against samples (n, d); parameters without a value have no row.

    Read: offset is in posterior sds and can mislead for a skewed marginal; `below` near 0 or 1 means disagreement.
    Raises: ShapeError, NonFiniteError, DataError.

    >>> import numpy as np
    >>> from sbi_phys.priors import Parameter
    >>> from sbi_phys.report import comparison_table
    >>> draws = np.linspace(0, 1, 101)[:, None] * [1, 10]
    >>> fit = {"label": "fit of 2020", "source": "journal", "theta": {"mass": 0.5}}
    >>> comparison_table(draws, [Parameter("mass", 0, 1), Parameter("energy", 0, 10)], [fit])[0].fit
    'fit of 2020'
    """
    theta, _ = _checked(samples, [p.name for p in parameters])
    rows = []
    for k, (p, ours) in enumerate(zip(parameters, posterior_table(theta, parameters), strict=True)):
        for fit in published:
            if p.name not in _theta_of(fit):
                continue
            value = float(fit["theta"][p.name])
            shared = {q: getattr(ours, q) for q in ("name", "label", "unit", "q025", "q16", "q50", "q84", "q975")}
            offset = (value - ours.q50) / ours.sd if ours.sd > 0 else math.nan
            # half of the ties count as below, so that draws equal to the value are neither below nor above it
            below = float(np.mean(theta[:, k] < value) + 0.5 * np.mean(theta[:, k] == value))
            rows.append(
                ComparisonRow(fit=fit["label"], source=str(fit.get("source", "")), value=value, offset=offset, below=below, **shared)
            )
    return rows


def shift_table(samples: ArrayLike, reference: ArrayLike, parameters: Sequence[Parameter]) -> list[ShiftRow]:
    """Medians and widths of samples (n, d) against reference draws (m, d).   Raises: ShapeError, NonFiniteError, DataError.

    >>> import numpy as np
    >>> from sbi_phys.priors import Parameter
    >>> from sbi_phys.report import shift_table
    >>> draws = np.linspace(0, 1, 101)[:, None] * [1, 10]
    >>> shift_table(draws, draws, [Parameter("mass", 0, 1), Parameter("energy", 0, 10)])[0].shift
    0.0
    """
    rows = []
    for p, ours, ref in zip(parameters, posterior_table(samples, parameters), posterior_table(reference, parameters), strict=True):
        shift, ratio = ((ours.q50 - ref.q50) / ref.sd, ours.sd / ref.sd) if ref.sd > 0 else (math.nan, math.nan)
        theirs = {f"reference_{q}": getattr(ref, q) for q in ("q16", "q50", "q84")}
        mine = {q: getattr(ours, q) for q in ("label", "unit", "q16", "q50", "q84")}
        rows.append(ShiftRow(name=p.name, shift=shift, width_ratio=ratio, **mine, **theirs))
    return rows


def rows_to_table(rows: Sequence[PosteriorRow] | Sequence[ComparisonRow] | Sequence[ShiftRow], caption: str = "") -> Table:
    """Rows of one class as a table of text.   Raises: DataError for no rows.

    >>> import numpy as np
    >>> from sbi_phys.priors import Parameter
    >>> from sbi_phys.report import posterior_table, rows_to_table
    >>> draws = np.linspace(0, 1, 101)[:, None] * [1, 10]
    >>> rows = posterior_table(draws, [Parameter("mass", 0, 1), Parameter("energy", 0, 10)])
    >>> rows_to_table(rows).header[0]
    'Parameter'
    """
    if not rows:
        raise DataError("rows is empty; expected at least one row")
    return Table(rows[0].header, tuple(row.cells() for row in rows), caption)


def rows_to_csv(rows: Sequence[PosteriorRow] | Sequence[ComparisonRow] | Sequence[ShiftRow]) -> str:
    """Rows of one class as CSV with all fields at full precision (repr of a float, which reads back without loss).

    >>> import numpy as np
    >>> from sbi_phys.priors import Parameter
    >>> from sbi_phys.report import posterior_table, rows_to_csv
    >>> draws = np.linspace(0, 1, 101)[:, None] * [1, 10]
    >>> len(rows_to_csv(posterior_table(draws, [Parameter("mass", 0, 1), Parameter("energy", 0, 10)])).splitlines())
    3
    """
    if not rows:
        raise DataError("rows is empty; expected at least one row")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f.name for f in fields(rows[0])]
    writer.writerow(names)
    writer.writerows([[getattr(row, name) for name in names] for row in rows])
    return out.getvalue()


def inline_html(text: str) -> str:
    """Escape `text` and convert `code`, **bold**, $LaTeX$ and https addresses to HTML; other text is unchanged."""
    out, at = [], 0
    for match in _MARKUP.finditer(text):
        out.append(escape(text[at : match.start()]))
        code, bold, math_, link = match.groups()
        if code is not None:
            out.append(f"<code>{escape(code)}</code>")
        elif bold is not None:
            out.append(f"<strong>{inline_html(bold)}</strong>")
        elif math_ is not None:
            out.append(f'<span class="math">{latex_to_html(math_)}</span>')
        else:
            out.append(f'<a href="{escape(link)}" rel="noopener noreferrer">{escape(link)}</a>')
        at = match.end()
    return "".join([*out, escape(text[at:])])


def _symbol(p: Parameter) -> str:
    return f"${p.latex}$" if p.latex else p.name


def _theta_of(fit: Mapping[str, Any]) -> Mapping[str, float]:
    if "theta" not in fit or "label" not in fit:
        raise DataError(f"published fit has keys {sorted(fit)}; expected label, source and theta")
    theta: Mapping[str, float] = fit["theta"]
    return theta


def _checked(samples: ArrayLike, names: Sequence[str]) -> tuple[np.ndarray, dict[str, list[float]]]:
    theta = as_matrix("samples", samples, len(names), names)
    if theta.shape[0] < 2:
        raise DataError(f"samples has {theta.shape[0]} rows; expected at least 2 for a standard deviation")
    values = np.quantile(theta, list(_LEVELS.values()), axis=0)
    return theta, {q: [float(v) for v in values[i]] for i, q in enumerate(_LEVELS)}
