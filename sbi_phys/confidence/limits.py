r"""Upper and lower limits and intervals by one call, from a fit or any construction, and the limits expected without a signal.

A source is a `Fit` (asymptotic formulae, CLs), or an object with `interval(data, level)`: `Neyman`, `LF2I`, `FeldmanCousins`. What a limit
means follows from the statistic of the construction. With the one-sided statistic (`LRT(kind="upper")`) the upper limit lies above the true
value with probability `level`. With the two-sided ratio the upper end of the unified interval is quoted, which covers at least the level.

Expected limits are those of toys with background alone: their median and central 68.3 and 95.4 % bands. A limit far below the band means
that the data fluctuated or that the background is not understood.

Source: arXiv:1007.1727, section 5; arXiv:physics/9711021, section VI (the sensitivity of the experiment quoted beside the limit).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sbi_phys.confidence._inputs import KINDS, frozen
from sbi_phys.confidence.profile import Fit, asymptotic_interval, asymptotic_limit, cls_limit
from sbi_phys.confidence.sets import Interval
from sbi_phys.core.checks import as_array, check_level, require_choice
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.types import Array, ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ExpectedLimits", "Limits", "Source", "expected_limits", "limits"]


BANDS = (0.0228, 0.1587, 0.5, 0.8413, 0.9772)  # Phi(-2), .., Phi(2)


class Source(Protocol):
    """An object that computes intervals from data."""

    def interval(self, data: Any, level: float | None = None) -> Interval:
        """Return intervals for n data sets."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Limits(Result):
    """Limits for one parameter and n data sets: low (n,), high (n,), -+inf on a side that was not asked for.

    expected (5,), at -2, -1, 0, 1, 2 sd of data without signal, where the source knows it; else None.

    >>> from sbi_phys.confidence import FeldmanCousins, limits
    >>> print(limits(FeldmanCousins(background=3.0), [4], kind="upper", level=0.9).summary())
    90 % upper limit on mu (Feldman-Cousins)
      < 5.597
    """

    name: str
    kind: str
    level: float
    low: Array
    high: Array
    method: str
    expected: Array | None = None

    def rows(self) -> Rows:
        """Return the table: one row for each data set."""
        fixed = {"name": self.name, "kind": self.kind, "level": self.level}
        return Rows.of({"data_set": np.arange(self.low.size)} | fixed | {"low": self.low, "high": self.high})

    def summary(self) -> str:
        """Return the result in words."""
        head = f"{100 * self.level:.4g} % {'interval' if self.kind == 'interval' else self.kind + ' limit'} on {self.name} ({self.method})"
        lines = [head]
        for a, b in list(zip(self.low, self.high, strict=True))[:10]:
            lines.append({"interval": f"  [{a:.4g}, {b:.4g}]", "upper": f"  < {b:.4g}", "lower": f"  > {a:.4g}"}[self.kind])
        if self.low.size > 10:
            lines.append(f"  .. and {self.low.size - 10} more")
        if self.expected is not None:
            e = self.expected
            lines.append(f"  expected without signal {e[2]:.4g}, 68 % [{e[1]:.4g}, {e[3]:.4g}], 95 % [{e[0]:.4g}, {e[4]:.4g}]")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the limits, one row for each data set, over the expected ones if they are known."""
        rows = [str(i) for i in range(self.low.size)]
        return figures.results.intervals(self.low, self.high, rows, ax, xlabel=self.name, bands=self.expected)


def limits(
    source: Fit | Source,
    data: Any = None,
    *,
    kind: str = "interval",
    level: float = 0.9,
    name: str | None = None,
    asimov: Fit | None = None,
) -> Limits:
    r"""Limits or intervals at one confidence level, from a fit or a construction.

    Args:
        source: a Fit; or a Neyman, LF2I, FeldmanCousins, or anything with interval(data, level).
        data: n data sets; None for a Fit, which has its own.
        kind: 'interval', 'upper' or 'lower'.
        level: confidence level; a construction must have been made for it.
        name: parameter, for a Fit of several.
        asimov: Fit to the expected data without signal: then the upper limit is that of CLs.

    Returns: Limits.
    Raises: SettingError (data given with a Fit, unknown kind or level), SupportError (a set that reaches the end of what was simulated),
        DataError (an empty set), ConvergenceError.

    >>> from sbi_phys.confidence import fit, limits
    >>> best = fit(lambda theta: -2 * (theta[:, 0] - 3) ** 2, [0.0], ["mu"])
    >>> limits(best, kind="lower", level=0.9).low.round(2).tolist()
    [2.36]
    """
    require_choice("kind", kind, KINDS)
    level = check_level(level)
    if isinstance(source, Fit):
        return _from_fit(source, data, kind, level, name, asimov)
    if data is None or asimov is not None:
        raise SettingError("a construction has no data of its own and no Asimov fit; expected data and asimov=None")
    found = source.interval(data, level)
    if found.empty.any():
        i = int(np.flatnonzero(found.empty)[0])
        raise DataError(f"the set of {int(found.empty.sum())} of {found.low.size} data sets is empty, first {i}: the whole simulated "
                        "grid is excluded; expected a wider grid or a model that describes the data")  # fmt: skip
    n = found.low.size
    return Limits(
        name=found.name,
        kind=kind,
        level=level,
        low=frozen(np.full(n, -np.inf) if kind == "upper" else found.low),
        high=frozen(np.full(n, np.inf) if kind == "lower" else found.high),
        method=found.method,
    )


def _from_fit(source: Fit, data: Any, kind: str, level: float, name: str | None, asimov: Fit | None) -> Limits:
    if data is not None:
        raise SettingError("a Fit has its data already; expected data=None")
    if name is None and len(source.names) > 1:
        raise SettingError(f"name is None; expected one of {', '.join(source.names)}")
    plain = source.names[0] if name is None else name
    low, high, expected, method = -np.inf, np.inf, None, "asymptotic"
    if asimov is not None:
        if kind != "upper":
            raise SettingError(f"kind is {kind!r}; expected 'upper' with an Asimov fit (CLs)")
        high, expected = cls_limit(source, asimov, plain, level)
        method = "CLs, asymptotic"
    elif kind == "interval":
        low, high = asymptotic_interval(source, plain, level)
    elif kind == "upper":
        high = asymptotic_limit(source, plain, level, kind="upper")
    else:
        low = asymptotic_limit(source, plain, level, kind="lower")
    return Limits(name=plain, kind=kind, level=level, low=frozen([low]), high=frozen([high]), method=method, expected=expected)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpectedLimits(Result):
    """Limits of n toys without signal, values (n,) rising; bands (5,): median and central 68.3 and 95.4 %, in the parameter's unit.

    >>> import numpy as np
    >>> from sbi_phys.confidence import FeldmanCousins, expected_limits
    >>> found = expected_limits(FeldmanCousins(background=3.0), np.repeat([1, 2, 3, 4, 5], 10))
    >>> found.share_beyond(found.median)
    0.6
    """

    name: str
    kind: str
    level: float
    values: Array
    bands: Array

    @property
    def median(self) -> float:
        """Median expected limit: the sensitivity."""
        return float(self.bands[2])

    def share_beyond(self, observed: float) -> float:
        """Share of toys with a limit as strong as `observed` or stronger. Read: below a few percent, the data fluctuated."""
        stronger = self.values <= observed if self.kind == "upper" else self.values >= observed
        return float(stronger.mean())

    def rows(self) -> Rows:
        """Return the table: one row for each quantile of the limits."""
        fixed = {"name": self.name, "kind": self.kind, "level": self.level, "n": self.values.size}
        return Rows.of({"sd": [-2, -1, 0, 1, 2], "quantile": BANDS} | fixed | {"limit": self.bands})

    def summary(self) -> str:
        """Return the result in words."""
        b = self.bands
        return (
            f"expected {100 * self.level:.4g} % {self.kind} limit on {self.name} without signal: {b[2]:.4g}, "
            f"68 % [{b[1]:.4g}, {b[3]:.4g}], 95 % [{b[0]:.4g}, {b[4]:.4g}] ({self.values.size} toys)"
        )

    def plot(self, ax: "Axes | None" = None, *, observed: float | None = None) -> "Axes":
        """Draw the toys' limits with both bands, and the observed one."""
        return figures.confidence.expected(self, ax, observed)


def expected_limits(source: Source, toys: Any, *, kind: str = "upper", level: float = 0.9) -> ExpectedLimits:
    """Median limit and bands from data sets without signal.

    Args: source: as in `limits`, no Fit (see `cls_limit` for the asymptotic bands). toys: n >= 40 data sets of background alone. kind:
        'upper' or 'lower'. level: confidence level.
    Raises: as `limits`; DataError (fewer than 40 toys: no 95 % band).

    >>> import numpy as np
    >>> from sbi_phys.confidence import FeldmanCousins, expected_limits
    >>> found = expected_limits(FeldmanCousins(background=3.0), np.repeat([1, 2, 3, 4, 5], 10), level=0.9)
    >>> round(found.median, 1)
    4.4
    """
    require_choice("kind", kind, ("upper", "lower"))
    found = limits(source, toys, kind=kind, level=level)
    return expected_from_values(found.high if kind == "upper" else found.low, name=found.name, kind=kind, level=level)


def expected_from_values(values: ArrayLike, *, name: str, kind: str, level: float) -> ExpectedLimits:
    """Bands of given limits (n,), one per toy.   Raises: ShapeError, NonFiniteError, DataError."""
    array = np.sort(as_array("limits of the toys", values, (None,)))
    if array.size < 40:
        raise DataError(f"there are {array.size} toys; expected 40 or more for a 95 % band")
    return ExpectedLimits(name=name, kind=kind, level=level, values=frozen(array), bands=frozen(np.quantile(array, BANDS)))
