"""PIT regression: is the rank of the true parameter independent of the observation x?

SBC averages over x: a posterior that is too narrow for half of the observations and too wide for the other half passes. If q is right,
the rank of theta* among the draws is uniform *given x*, so no function of x predicts it. Let

    s = Phi^-1((rank + 1/2)/(L + 1)), scaled to mean 0 and variance 1 under uniform ranks.

The mean of s measures the bias (with opposite sign) and its square the width ((s^2 - 1)/sd is large where the posterior is too narrow).
Both are regressed on functions h(x) with mean 0 and variance 1 over the simulations, by their correlations
T = sum_i s_i h(x_i)/sqrt(n). The functions are grouped in sets:

    1; every column of x (its normal score); its square; the principal components of all columns; random smooth functions of all of x.

The largest |T| of a set is sensitive to one relevant column among many, the sum of T^2 to an effect spread over all. Under the null the
ranks are independent and uniform whatever x is, so the null is simulated from uniform ranks at the same x, and the smallest p-value is
ranked among the simulated ones: its size is exact for any n, L and number of columns. Nothing is trained, so nothing can overfit.

With the constant 1 the test is one of calibration given x, not only of dependence on x: it also detects a posterior that is too narrow
everywhere, and a posterior that equals the prior (which passes SBC) by its bias.

Source: Zhao et al. 2021, arXiv:2102.10473 (the regression of PIT on x); the random functions: Rahimi & Recht 2007.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.special import ndtr, ndtri

from sbi_phys.calibration._covariates import check_x, normal_scores, random_features
from sbi_phys.calibration._results import NamedTests, fault_words, shape_text
from sbi_phys.calibration.inputs import check_names, check_pairs, count_below, require_varying
from sbi_phys.calibration.pvalues import chunks, combine, smallest_pvalue
from sbi_phys.core.checks import require_choice
from sbi_phys.core.errors import DataError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PITRegression", "pit_regression"]
N_NULL = 1999
N_COMPONENTS = 20
N_RANDOM = 50
KINDS = ("low", "high"), ("in the middle", "at the ends")
MIN_DRAWS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class PITRegression(NamedTests):
    r"""Result of `pit_regression`: dependence of the rank scores of d parameters on k columns of x; n simulations, l draws.

    scores (n, d), normal scores of the ranks, mean 0 and variance 1 if calibrated. x (n, k), columns that vary, x_names (k).
    z_shift, z_width (d, 2, k), standard-normal correlations of s and of s^2 with each column ([:, 0]) and its square ([:, 1]):
    z_shift > 0, the posterior is biased low where the column is high; z_width > 0, too narrow there.
    column, shape (d,): the column with the largest |z| and whether its own score (0) or its square (1) has it. shift, width (d, 2) with
    errors: posterior - true value in posterior sd and posterior sd over the right one, in the two parts of that column (see `parts`).
    pvalues by name; pvalue, smallest times d.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(300, 1))
    >>> result = sp.calibration.pit_regression(x + rng.normal(size=(300, 1)), x[:, None] + rng.normal(size=(300, 50, 1)), x)
    >>> result.scores.shape, result.x_names, result.verdicts
    ((300, 1), ('x_0',), {'theta_0': 'calibrated given x'})
    """

    PASSED: ClassVar[str] = "calibrated given x"

    x_names: tuple[str, ...]
    n_draws: int
    scores: Array
    x: Array
    z_shift: Array
    z_width: Array
    column: Integers
    shape: Integers
    shift: Array
    shift_err: Array
    width: Array
    width_err: Array

    @property
    def n(self) -> int:
        """Number of simulations."""
        return int(self.scores.shape[0])

    def parts(self, j: int) -> tuple[str, str]:
        """The two parts of the column to which `shift` and `width` of parameter j refer, in words."""
        low, high = KINDS[int(self.shape[j])]
        name = self.x_names[int(self.column[j])]
        return f"where {name} is {low}", f"where {name} is {high}"

    def _sizes(self, j: int, h: int) -> tuple[float, float, float, float]:
        return self.shift[j, h], self.shift_err[j, h], self.width[j, h], self.width_err[j, h]

    def _fault(self, j: int) -> str:
        found = [(fault_words(*self._sizes(j, h)), part) for h, part in enumerate(self.parts(j))]
        words = ", ".join(f"{fault} {part}" for fault, part in found if fault != "wrong shape")
        return words or "ranks depend on x, but on no single column alone"

    def _columns(self) -> dict[str, Any]:
        found: dict[str, Any] = {"column": [self.x_names[j] for j in self.column]}
        for k in ("shift", "width"):
            for j, part in enumerate(("first", "second")):
                found |= {f"{k}_{part}": getattr(self, k)[:, j], f"{k}_{part}_err": getattr(self, f"{k}_err")[:, j]}
        return found

    def summary(self) -> str:
        """Return the result in words: one line for all, up to three for each parameter with the sizes in both parts of the column."""
        subject = f"PIT regressed on x, {self.n} simulations x {self.n_draws} draws, {len(self.x_names)} columns"
        verdicts = self.verdicts
        head, *_ = self._summary(subject, "no dependence of the ranks on x found", "not calibrated given x")
        lines, pad = [head], max(map(len, self.names))
        for j, name in enumerate(self.names):
            lines.append(f"  {name:<{pad}}  p = {self.pvalues[name]:<8.3g}  {verdicts[name]}")
            if verdicts[name] != self.PASSED:
                lines += [f"  {'':<{pad}}  {part}: {shape_text(*self._sizes(j, h))}" for h, part in enumerate(self.parts(j))]
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, name: str | None = None) -> "Axes":
        """Draw local shift and width of one parameter (default: the worst) along the column of x with the largest effect.

        Raises: SettingError.   Read: width under 1 = overconfident there; shift over 0 = the posterior lies too high there.
        """
        worst = min(self.pvalues, key=lambda key: self.pvalues[key])
        chosen = require_choice("name", worst if name is None else name, self.names)
        return figures.calibration.pit_line(self, self.names.index(chosen), ax)


def pit_regression(
    theta: ArrayLike,
    draws: ArrayLike,
    x: ArrayLike,
    *,
    names: Sequence[str | Parameter] | None = None,
    x_names: Sequence[str | Parameter] | None = None,
    seed: int = 0,
) -> PITRegression:
    r"""Test that the rank of the true value does not depend on x, E[s h(x)] = 0 and E[(s^2 - 1) h(x)] = 0.

    Args:
        theta: (n, d), true parameters of the simulations, prior units; n >= 10.
        draws: (n, l, d), independent posterior draws for each simulation, same units; l >= 5.
        x: (n, ...), the observations or summaries of them, any units; columns that do not vary are left out.
        names: d names, or Parameters.
        x_names: k names of the columns of x; default x_0, x_1, ...
        seed: of the random functions, for breaking ties, and of the simulated null.

    Returns: PITRegression.
    Raises: ShapeError, NonFiniteError, DataError (few rows or draws, constant parameter, constant x), SettingError.
    Source: Zhao et al. 2021, arXiv:2102.10473.
    Read: p < 0.05 = wrong somewhere in x, even if right on average; the summary names the column, the part and the size.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(300, 1))
    >>> theta, draws = x + rng.normal(size=(300, 1)), rng.normal(size=(300, 50, 1))  # draws that ignore x
    >>> sp.calibration.pit_regression(theta, draws, x, x_names=["signal"]).parts(0)
    ('where signal is low', 'where signal is high')
    """
    truth, samples = check_pairs(theta, draws)
    n, n_draws, dim = samples.shape
    if n_draws < MIN_DRAWS:
        raise DataError(f"draws has {n_draws} draws per simulation; expected at least {MIN_DRAWS} for a rank that shows widths")
    plain, labels = check_names(names, dim)
    values = check_x(x, n)
    columns = check_names(x_names, values.shape[1])[0] if x_names is not None else tuple(f"x_{c}" for c in range(values.shape[1]))
    varying = values.max(axis=0) > values.min(axis=0)
    values, columns = values[:, varying], tuple(c for c, keep in zip(columns, varying, strict=True) if keep)
    ranks = []
    for j, name in enumerate(plain):
        require_varying(name, truth[:, j], samples[:, :, j])
        ranks.append(count_below(truth[:, j], samples[:, :, j], rng_for(seed, "pit ties", name)))
    table = _score_table(n_draws)
    rng = rng_for(seed, "pit regression")
    views = _views(normal_scores(values), rng)
    observed = table[:, np.stack(ranks)]  # (2, d, n)
    # one simulated null is used for all parameters, because it depends only on x, n and L
    null = (table[:, rng.integers(0, n_draws + 1, (rows, n))] for rows in chunks(N_NULL, n))
    simulated = np.concatenate([_statistics(_correlations(scores, views), views) for scores in null])
    z = _correlations(observed, views)
    statistics = _statistics(z, views)
    tails = 2 * z[0].size * ndtr(-np.abs(z).max(axis=(1, 2)))  # Bonferroni, normal: for p too small for the simulations
    pvalues = {p: smallest_pvalue(s, simulated, float(t)) for p, s, t in zip(plain, statistics, tails, strict=True)}
    return _result(observed, z, values, views, pvalues, names=plain, labels=labels, x_names=columns, n_draws=n_draws)


def _score_table(n_draws: int) -> Array:
    """Score and standardised squared score of every rank -> (2, l + 1), each of mean 0 and variance 1 under uniform ranks."""
    score = ndtri((np.arange(n_draws + 1) + 0.5) / (n_draws + 1))
    score /= score.std()
    square = score**2 - 1
    return np.stack([score, square / square.std()])


def _views(scores: Array, rng: np.random.Generator) -> list[Array]:
    """Sets of functions of x (n, f); each column has mean 0 and variance 1, except the constant."""
    n = scores.shape[0]
    squares = scores**2 - 1
    sd = squares.std(axis=0)
    # the square of a column with only two values is constant
    squares = np.where(sd > 1e-9, (squares - squares.mean(axis=0)) / np.where(sd > 1e-9, sd, 1.0), 0.0)
    u, weight, _ = np.linalg.svd(scores, full_matrices=False)
    keep = min(N_COMPONENTS, max(n // 10, 1), int((weight > 1e-6 * weight[0]).sum()))
    return [np.ones((n, 1)), scores, squares, u[:, :keep] * np.sqrt(n), random_features(scores, N_RANDOM, rng)]


def _correlations(values: Array, views: list[Array]) -> Array:
    """values (2, b, n) -> T (b, 2, f), f functions of all views side by side."""
    functions = np.concatenate(views, axis=1)
    n = functions.shape[0]
    return (values.reshape(-1, n) @ functions / np.sqrt(n)).reshape(2, -1, functions.shape[1]).transpose(1, 0, 2)


def _statistics(correlations: Array, views: list[Array]) -> Array:
    """Largest |T| and sum of T^2 of every set of functions, separately for shift and width -> (b, s)."""
    out = []
    for part in np.split(correlations, np.cumsum([view.shape[1] for view in views])[:-1], axis=2):
        out.append(np.abs(part).max(axis=2))
        if part.shape[2] > 1:
            out.append((part**2).sum(axis=2))
    return np.concatenate(out, axis=1)


def _result(
    observed: Array,
    correlations: Array,
    x: Array,
    views: list[Array],
    pvalues: dict[str, float],
    *,
    names: tuple[str, ...],
    labels: tuple[str, ...],
    x_names: tuple[str, ...],
    n_draws: int,
) -> PITRegression:
    dim, k = observed.shape[1], x.shape[1]
    z = correlations[:, :, 1 : 2 * k + 1].reshape(dim, 2, 2, k)  # (d, shift or width, column or its square, k)
    largest = np.abs(z).max(axis=1).reshape(dim, -1).argmax(axis=1)
    shape, column = np.divmod(largest, k)
    sizes = np.empty((dim, 2, 4))
    for j in range(dim):
        order = np.abs(views[1][:, column[j]]) if shape[j] else views[1][:, column[j]]
        upper = order > np.median(order)
        for h, rows in enumerate((~upper, upper)):
            sizes[j, h] = _sizes(observed[0, j, rows]) if rows.sum() > 1 else (0.0, np.inf, 1.0, np.inf)
    return PITRegression(
        names=names,
        labels=labels,
        x_names=x_names,
        n_draws=n_draws,
        scores=observed[0].T,
        x=x,
        z_shift=z[:, 0],
        z_width=z[:, 1],
        column=column,
        shape=shape,
        shift=sizes[..., 0],
        shift_err=sizes[..., 1],
        width=sizes[..., 2],
        width_err=sizes[..., 3],
        pvalues=pvalues,
        pvalue=combine(pvalues),
    )


def _sizes(scores: Array) -> tuple[float, float, float, float]:
    """Shift, its error, width, its error: exact where posteriors are Gaussian."""
    spread = max(float(scores.std(ddof=1)), 1e-12)
    return -float(scores.mean()), spread / np.sqrt(scores.size), 1 / spread, 1 / spread / np.sqrt(2 * scores.size)
