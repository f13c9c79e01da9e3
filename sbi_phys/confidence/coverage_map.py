r"""Coverage of confidence sets as a function of theta, with errors, and a test of the hypothesis "coverage = level everywhere".

Given a further sample theta_i, D_i ~ p(D | theta_i) and w_i = 1{theta_i in set(D_i)}, the coverage c(theta) = E[w | theta] is estimated
in two forms:

- **smooth map**: logistic regression, logit c(theta) = sum_k beta_k P_k(theta), with products of Legendre polynomials up to a total
  degree, theta scaled to [-1, 1]. Errors come from the inverse of the information X^T diag(c (1 - c)) X (plus a ridge of 10^-3).
- **bins** with equal numbers of simulations (products of bins for two parameters, each parameter by itself for more), binomial errors.

The hypothesis c = level has no free parameter, so neither test needs a fit. Smooth map: Rao's score test,

    S = u^T [level (1 - level) X^T X]^-1 u,   u = X^T (w - level),   S ~ chi2(rank X).

Bins: exact two-sided binomial p-values, the smallest times the number of bins. The p-value is twice the smaller of both.

Source: Dalmasso et al. 2021, arXiv:2107.03920, section 3.3; score test: Rao 1948.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import chdtrc, expit, logit
from scipy.stats import binom

from sbi_phys.calibration.inputs import check_names
from sbi_phys.calibration.pvalues import ALPHA
from sbi_phys.confidence._inputs import as_points, frozen
from sbi_phys.confidence.sets import require_within
from sbi_phys.core.checks import as_real, check_level, require_int, require_same_rows
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bin", "CoverageMap", "coverage_map"]


RIDGE = 1e-3
MIN_ROWS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Box {name: (low, high)} with n simulations of which k are covered; coverage k / n, its binomial error; two-sided p-value."""

    box: dict[str, tuple[float, float]]
    n: int
    k: int
    pvalue: float

    @property
    def coverage(self) -> float:
        """Share of simulations whose set holds the truth."""
        return self.k / self.n

    @property
    def error(self) -> float:
        """Binomial error; where no simulation fails, that of one failure."""
        c = np.clip(self.coverage, 1 / (self.n + 1), 1 - 1 / (self.n + 1))
        return float(np.sqrt(c * (1 - c) / self.n))

    def words(self) -> str:
        """Return the box and its coverage in words."""
        box = ", ".join(f"{name} in [{a:.3g}, {b:.3g}]" for name, (a, b) in self.box.items())
        return f"{box}: {100 * self.coverage:.1f} +- {100 * self.error:.1f} %"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CoverageMap(Result):
    """Coverage as a function of theta, n simulations: `at` gives the smooth map, `bins` the binned one; pvalues 'smooth' and 'bins'.

    >>> import numpy as np
    >>> from sbi_phys.confidence import coverage_map
    >>> found = coverage_map(np.linspace(0, 1, 500), np.arange(500) % 10 > 0, 0.9)
    >>> coverage, error = found.at([0.2, 0.5])
    >>> coverage.round(1).tolist(), bool(error.max() < 0.05)
    ([0.9, 0.9], True)
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    level: float
    n: int
    overall: float
    low: Array
    high: Array
    degree: int
    coefficients: Array
    covariance: Array
    bins: tuple[Bin, ...]
    pvalues: dict[str, float]
    pvalue: float

    def at(self, theta: ArrayLike) -> tuple[Array, Array]:
        """Smooth coverage (m,) and its error (m,) at theta (m, d).   Raises: SupportError beyond the sample, ShapeError."""
        points = as_points("theta", theta, len(self.names), self.names)
        require_within("theta", points, self.low, self.high, self.names)
        x = _basis(points, self.low, self.high, self.degree)
        c = expit(x @ self.coefficients)
        return c, c * (1 - c) * np.sqrt(np.einsum("ma,ab,mb->m", x, self.covariance, x))

    @property
    def worst(self) -> Bin:
        """The bin with the smallest p-value of the hypothesis coverage = level."""
        return min(self.bins, key=lambda b: b.pvalue)

    @property
    def covers(self) -> bool:
        """Whether no deviation was found at 5 %."""
        return self.pvalue > ALPHA

    def rows(self) -> Rows:
        """Return the table: one row for each bin of theta."""
        ends = {f"{n}_{end}": [b.box[n][i] for b in self.bins] for n in self.names for i, end in enumerate(("low", "high"))}
        numbers = {"n": "n", "coverage": "coverage", "coverage_err": "error", "pvalue": "pvalue"}
        return Rows.of(ends | {k: [getattr(b, of) for b in self.bins] for k, of in numbers.items()})

    def summary(self) -> str:
        """Return the result in words, the worst region named."""
        head = "no deviation found" if self.covers else "coverage is NOT as stated everywhere"
        overall = f"{100 * self.overall:.1f} +- {100 * np.sqrt(self.level * (1 - self.level) / self.n):.1f} %"
        worst = self.worst
        return "\n".join([
            f"coverage of {100 * self.level:.4g} % sets, {self.n} simulations over {', '.join(self.names)}: {head} (p = {self.pvalue:.3g})",
            f"  on average {overall}",
            f"  worst of {len(self.bins)} regions: {worst.words()} (p = {worst.pvalue:.2g}, uncorrected)",
        ])  # fmt: skip

    def plot(self, ax: "Axes | None" = None, *, name: str | None = None) -> "Axes":
        """Draw the map: curve with band and binned points for one parameter (or `name` of several), colours for two."""
        return figures.confidence.coverage_map(self, ax, name)


def coverage_map(
    theta: ArrayLike,
    inside: ArrayLike,
    level: float,
    *,
    names: Sequence[str | Parameter] | None = None,
    degree: int | None = None,
    n_bins: int | None = None,
) -> CoverageMap:
    r"""Coverage c(theta) = P(theta in set(D) | theta) as a map with errors, and a test of c = level.

    Args:
        theta: (n, d) true parameters of simulations that critical values were not made from.
        inside: (n,), whether each set held its truth (booleans, or 0 and 1).
        level: nominal coverage of the sets.
        names: d names or Parameters.
        degree: of the polynomials; default 5, 3, 2 for one, two, more parameters.
        n_bins: per parameter; default some 100 rows in a bin.

    Returns: CoverageMap.
    Raises: ShapeError, NonFiniteError, DataError (fewer than 100 rows, constant theta, inside not 0 or 1), SettingError.
    Source: arXiv:2107.03920, section 3.3.
    Read: p < 0.05 = the sets do not cover as stated, `worst` says where; a large p-value means that n did not suffice to find it.

    >>> import numpy as np
    >>> from sbi_phys.confidence import coverage_map
    >>> found = coverage_map(np.linspace(0, 1, 500), np.arange(500) % 10 > 0, 0.9)
    >>> round(found.overall, 2), found.pvalue > 0.05
    (0.9, True)
    """
    points, held = _sample(theta, inside)
    n, dim = points.shape
    level = check_level(level)
    plain, labels = check_names(names, dim)
    low, high = points.min(axis=0), points.max(axis=0)
    if (low == high).any():
        raise DataError(f"{plain[int(np.argmax(low == high))]} has a single value; expected a sample that fills the space")
    order = require_int("degree", {1: 5, 2: 3}.get(dim, 2) if degree is None else degree, low=0, high=12)
    x = _basis(points, low, high, order)
    if x.shape[1] > n // 10:
        raise SettingError(f"degree {order} has {x.shape[1]} terms for {n} simulations; expected at least 10 simulations per term")
    beta, covariance = _logistic(x, held, level)
    bins = _bins(points, held, level, plain, n_bins)
    pvalues = {"smooth": _score(x, held, level), "bins": min(1.0, len(bins) * min(b.pvalue for b in bins))}
    return CoverageMap(
        names=plain,
        labels=labels,
        level=level,
        n=n,
        overall=float(held.mean()),
        low=frozen(low),
        high=frozen(high),
        degree=order,
        coefficients=frozen(beta),
        covariance=frozen(covariance),
        bins=bins,
        pvalues=pvalues,
        pvalue=min(1.0, 2 * min(pvalues.values())),
    )


def _sample(theta: ArrayLike, inside: ArrayLike) -> tuple[Array, Array]:
    array = as_real("theta", theta)
    points = as_points("theta", array, 1 if array.ndim <= 1 else array.shape[1])
    held = as_real("inside", inside)
    if held.ndim != 1:
        raise ShapeError(f"inside has shape {held.shape}; expected (n,)")
    n = require_same_rows(theta=points, inside=held)
    if not np.isin(held, (0, 1)).all():
        raise DataError("inside has values other than 0 and 1; expected 1 where the set holds its theta, 0 elsewhere")
    if n < MIN_ROWS:
        raise DataError(f"theta has {n} rows; expected {MIN_ROWS} or more simulations for a map of coverage")
    return points, held


def _basis(theta: Array, low: Array, high: Array, degree: int) -> Array:
    """Products of Legendre polynomials of total degree up to `degree`, (m, p)."""
    unit = 2 * (theta - low) / (high - low) - 1
    columns = np.polynomial.legendre.legvander(np.clip(unit, -1, 1), degree)  # (m, d, degree + 1)
    powers = [p for p in product(range(degree + 1), repeat=theta.shape[1]) if sum(p) <= degree]
    return np.stack([np.prod([columns[:, i, k] for i, k in enumerate(p)], axis=0) for p in powers], axis=1)


def _logistic(x: Array, held: Array, level: float) -> tuple[Array, Array]:
    # Newton steps from coverage = level; the ridge keeps the result finite where all sets cover
    beta = np.zeros(x.shape[1])
    beta[0] = float(logit(level))
    ridge = RIDGE * np.eye(beta.size)
    centre = np.array(beta)

    def loss(b: Array) -> float:
        z = x @ b
        return float(np.logaddexp(0, z).sum() - held @ z + 0.5 * RIDGE * ((b - centre) ** 2).sum())

    now = loss(beta)
    for _ in range(100):
        c = expit(x @ beta)
        information = (x.T * (c * (1 - c))) @ x + ridge
        step = np.linalg.solve(information, x.T @ (held - c) - RIDGE * (beta - centre))
        size = 1.0
        while size > 1e-4 and not loss(beta + size * step) <= now:
            size /= 2
        beta = beta + size * step
        before, now = now, loss(beta)
        if before - now < 1e-9 * abs(now) + 1e-12:
            break
    c = expit(x @ beta)
    return beta, np.linalg.inv((x.T * (c * (1 - c))) @ x + ridge)


def _score(x: Array, held: Array, level: float) -> float:
    u = x.T @ (held - level)
    information = level * (1 - level) * x.T @ x
    value = float(u @ np.linalg.pinv(information, hermitian=True) @ u)
    return float(chdtrc(np.linalg.matrix_rank(information, hermitian=True), value))


def _bins(theta: Array, held: Array, level: float, names: tuple[str, ...], n_bins: int | None) -> tuple[Bin, ...]:
    n, dim = theta.shape
    per = n / 100
    default = int(np.clip(per if dim != 2 else np.sqrt(per), 2, 20 if dim != 2 else 8))
    count = default if n_bins is None else require_int("n_bins", n_bins, low=1, high=n // 10)
    edges = [np.unique(np.quantile(column, np.linspace(0, 1, count + 1))) for column in theta.T]
    place = [np.clip(np.searchsorted(e, c, side="right") - 1, 0, e.size - 2) for e, c in zip(edges, theta.T, strict=True)]
    groups = [(0, 1)] if dim == 2 else [(i,) for i in range(dim)]
    found = []
    for group in groups:
        for cell in product(*(range(edges[i].size - 1) for i in group)):
            rows = np.all([place[i] == c for i, c in zip(group, cell, strict=True)], axis=0)
            if rows.any():
                m, k = int(rows.sum()), int(held[rows].sum())
                box = {names[i]: (float(edges[i][c]), float(edges[i][c + 1])) for i, c in zip(group, cell, strict=True)}
                found.append(Bin(box=box, n=m, k=k, pvalue=_binomial(k, m, level)))
    return tuple(found)


def _binomial(k: int, n: int, p: float) -> float:
    # twice the smaller tail: a valid p-value for any n
    return float(min(1.0, 2 * min(binom.cdf(k, n, p), binom.sf(k - 1, n, p))))
