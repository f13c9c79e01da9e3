"""Local coverage: how often credible regions contain the true parameters, in cells of one or two quantities instead of on average.

A posterior is calibrated given x: in cells of any function of x (a summary statistic, the posterior mean), regions of content a contain
the true value with probability a exactly. In cells of the *true* theta they do not, even for an exact posterior: near a boundary of the
prior a central interval rarely reaches the boundary, so true values there are missed, and true values in the middle are contained too
often. Cells of theta therefore come in two kinds, chosen by `at`:

"posterior" (default): cells of the posterior mean. The mean includes the true value as one of the L + 1 values, so it treats true value
    and draws alike, and the number of true values contained in a cell of M rows is exactly Binomial(M, a) for any L. (The mean of the
    draws alone is not exactly independent of the rank of the true value, because it fluctuates with the draws.)
"truth": cells of the true theta (the frequentist coverage map). The nominal value is not a, but the value for a calibrated posterior
    *with these draws* is known: true value and draws are exchangeable, so letting each of the L + 1 values of a row be the true one in
    turn gives the expected coverage of every cell, including boundary effects. The map is compared with that. The difference between
    `expected` and the level is the effect of conditioning on the true value; the difference between `observed` and `expected` is a fault
    of the posterior, and the p-value is valid.

Cells contain equal numbers of rows; the second quantity is divided separately within each slice of the first, so that no cell is empty.
The p-value of each kind of region combines two statistics, the sum of z^2 over cells and levels (faults everywhere) and the largest |z|
(one bad cell), ranked among simulated calibrated counts, so that its size is exact.

Coverage at one level is a weak statistic: `pit_regression` detects smaller faults, and this map shows where they are. A posterior that
equals the prior passes in cells of its own mean, which is noise; in cells of x it does not pass.

Source: coverage as a function of theta: Dey et al. 2022 (arXiv:2205.14568), Masserano et al. 2023 (arXiv:2205.15680); errors: Clopper
& Pearson 1934.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom

from sbi_phys.calibration._results import NamedTests
from sbi_phys.calibration.coverage import CENTRAL, HPD, from_the_middle, level_steps
from sbi_phys.calibration.inputs import check_log_probs, check_names, check_pairs, count_below, require_varying
from sbi_phys.calibration.pvalues import ALPHA, chunks, combine, smallest_pvalue
from sbi_phys.core.checks import as_real, require_choice, require_finite, require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Rows
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import AnyArray, Array, ArrayLike, Integers, Mask
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Cells", "LocalCoverage", "candidate_ranks", "local_coverage", "make_cells", "read_by"]
N_NULL = 1999
ONE_SIGMA = 0.6827


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCoverage(NamedTests):
    r"""Result of `local_coverage`: coverage of r kinds of region at m levels in c cells of q (1 or 2) quantities; n simulations, l draws.

    by, by_labels (q), the quantities that define the cells; at, 'posterior', 'truth' or 'given'. names (r), the parameters whose central
    intervals are tested, or the one entry of `kind` for joint regions. level (m,), multiples of 1/(l+1). cell_low, cell_high (c, q), edges
    in the quantities' units. count (c,), rows. observed, expected (c, m, r), fractions; low, high, Clopper-Pearson 68.3 % errors.
    z (c, m, r), (observed - expected) in its standard deviation; cell_pvalues, binomial (normal for at = 'truth'), not corrected.
    pvalues by name, of the whole map; pvalue, smallest times r.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(400, 1))
    >>> result = sp.calibration.local_coverage(x + rng.normal(size=(400, 1)), x[:, None] + rng.normal(size=(400, 50, 1)), x)
    >>> result.observed.shape, result.n, result.verdicts
    ((8, 1, 1), 400, {'theta_0': 'calibrated'})
    """

    kind: str
    at: str
    by: tuple[str, ...]
    by_labels: tuple[str, ...]
    n_draws: int
    level: Array
    cell_low: Array
    cell_high: Array
    count: Integers
    observed: Array
    low: Array
    high: Array
    expected: Array
    z: Array
    cell_pvalues: Array

    @property
    def n(self) -> int:
        """Number of simulations."""
        return int(self.count.sum())

    @property
    def worst(self) -> tuple[int, int, int]:
        """(cell, level, kind of region) whose own p-value is smallest."""
        # equal p-values (0 by underflow) are ordered by z
        order = np.lexsort((-np.abs(self.z).ravel(), self.cell_pvalues.ravel()))
        cell, level, region = np.unravel_index(int(order[0]), self.z.shape)
        return int(cell), int(level), int(region)

    def _fault(self, j: int) -> str:
        z = self.z[..., j]
        large = np.abs(z) > -ndtri(ALPHA / (2 * z.size))  # corrected for the number of cells and levels
        signs = {int(s) for s in np.sign(z[large])} or {int(np.sign(z.sum()))}
        words = {frozenset({-1}): "overconfident", frozenset({1}): "underconfident"}.get(frozenset(signs), "over- and underconfident")
        return f"{words} in places"

    @property
    def _of(self) -> str:
        return {"posterior": "posterior mean of ", "truth": "true ", "given": ""}[self.at]

    def where(self, cell: int) -> str:
        """The cell in words: the range of each quantity."""
        ends = zip(self.by, self.cell_low[cell], self.cell_high[cell], strict=True)
        return " and ".join(f"{self._of}{name} in [{low:.4g}, {high:.4g}]" for name, low, high in ends)

    def rows(self) -> Rows:
        """Return the table: one row for each cell, level and kind of region."""
        c, m, r = (index.ravel() for index in np.indices(self.observed.shape))
        ends = {"low": self.cell_low, "high": self.cell_high}
        edges = {f"{name}_{end}": a[c, k] for k, name in enumerate(self.by) for end, a in ends.items()}
        found: dict[str, Any] = {"name": [self.names[j] for j in r], "level": self.level[m], "n": self.count[c]}
        numbers = {k: getattr(self, k).ravel() for k in ("observed", "low", "high", "expected", "z")}
        return Rows.of(found | edges | numbers | {"pvalue": self.cell_pvalues.ravel()}, errors={"observed": ("low", "high")})

    def summary(self) -> str:
        """Return the result in words: one line for all, one for each kind of region, and the worst cell with its coverage and error."""
        over = f"{self._of}{' and '.join(self.by)}"
        subject = f"Local coverage of {self.kind} over {over}, {self.n} simulations in {self.count.size} cells"
        lines = self._summary(subject, "no cell stands out", "not calibrated everywhere")
        c, m, r = self.worst
        got, low, high, right = (100 * a[c, m, r] for a in (self.observed, self.low, self.high, self.expected))
        p = min(1.0, self.cell_pvalues[c, m, r] * self.z.size)
        lines.append(
            f"  worst: {self.where(c)}: {100 * self.level[m]:.0f} % regions ({self.names[r]}) contain {got:.0f} %"
            f" (68 % errors {low:.0f} to {high:.0f}), expected {right:.0f} %;"
            f" {self.count[c]} rows, p = {p:.2g} after correction for {self.z.size} cells and levels"
        )
        if self.at == "truth":
            lines.append(
                "  cells of the true value: even an exact posterior differs from the level; compare with `expected`, as the p-value does"
            )
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, name: str | None = None, level: float | None = None) -> "Axes":
        """Draw the coverage of one kind of region at one level (default: that of the worst cell): a line, or for two quantities a map.

        Raises: SettingError.   Read: below the band, or red = overconfident there; above, or blue = underconfident.
        """
        _, m, r = self.worst
        if name is not None and name not in self.names:
            raise SettingError(f"name is {name!r}; expected one of {', '.join(self.names)}")
        r = r if name is None else self.names.index(name)
        m = m if level is None else int(np.argmin(np.abs(self.level - level)))
        draw = figures.calibration.coverage_map if len(self.by) == 2 else figures.calibration.coverage_line
        return draw(self, m, r, ax)


def local_coverage(
    theta: ArrayLike,
    draws: ArrayLike,
    by: ArrayLike | str | int | Sequence[str | int],
    *,
    level: float | ArrayLike = 0.9,
    at: str = "posterior",
    names: Sequence[str | Parameter] | None = None,
    by_names: Sequence[str | Parameter] | None = None,
    log_prob_theta: ArrayLike | None = None,
    log_prob_draws: ArrayLike | None = None,
    n_bins: int | None = None,
    seed: int = 0,
) -> LocalCoverage:
    r"""Map of coverage, P(theta* in C_a(x) | s in cell), s one or two quantities.

    Args:
        theta: (n, d), true parameters of the simulations, prior units; n >= 10.
        draws: (n, l, d), independent posterior draws for each simulation, same units; l >= 2.
        by: one or two names or columns of theta; or an array (n,) or (n, 2) of any function of x (it must not depend on theta*).
        level: content a of the regions, one or several, in (0, 1); moved to the nearest multiple of 1/(l+1).
        at: for `by` of theta, "posterior" (cells of the posterior mean) or "truth" (cells of the true value), see the module's docstring.
        names: d names, or Parameters.
        by_names: names of the columns of an array `by`.
        log_prob_theta: (n,), with log_prob_draws (n, l): test joint highest-density regions instead of each parameter's central interval.
        log_prob_draws: see log_prob_theta.
        n_bins: cells per quantity; default about n/50 from 2 to 10 for one, sqrt(n/25) from 2 to 8 for two. At least 5 rows per cell.
        seed: for breaking ties and of the simulated null.

    Returns: LocalCoverage.
    Raises: ShapeError, NonFiniteError, DataError (few rows, one draw, constant quantities, `by` equal to theta), SettingError.
    Source: module docstring.   Read: p < 0.05 = coverage fails somewhere; the summary names the worst cell.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> x, theta = rng.normal(size=(2, 400, 1))
    >>> draws = np.where(x < 0, 0.4, 1.0)[:, None] * rng.normal(size=(400, 50, 1))  # too narrow for negative x
    >>> sp.calibration.local_coverage(theta, draws, x, names=["energy"]).verdicts
    {'energy': 'overconfident in places'}
    """
    truth, samples = check_pairs(theta, draws)
    n_draws = samples.shape[1]
    plain, labels = check_names(names, samples.shape[2])
    columns, by_plain, by_labels, at = read_by(by, truth, samples, (plain, labels), at, by_names)
    steps = level_steps("level", level, n_draws)
    values, names_, labels_ = _regions(truth, samples, plain, labels, log_prob_theta, log_prob_draws)
    rng = rng_for(seed, "local coverage")
    cells = make_cells(columns, n_bins)
    central, a = log_prob_theta is None, steps / (n_draws + 1)
    held = np.stack([_places(v, cells.fixed, central, rng)[..., None] < steps for v in values], axis=-1)  # (n, 1 or l + 1, m, r)
    found, sd = _compare(cells, held, a)
    pvalues = {name: _pvalue(cells, held[..., r], a, found, sd[..., r], r, rng) for r, name in enumerate(names_)}
    return LocalCoverage(
        kind=CENTRAL if central else HPD,
        at=at,
        by=by_plain,
        by_labels=by_labels,
        names=names_,
        labels=labels_,
        n_draws=n_draws,
        level=a,
        pvalues=pvalues,
        pvalue=combine(pvalues),
        **found,
    )


def _regions(
    truth: Array, samples: Array, names: tuple[str, ...], labels: tuple[str, ...], at_truth: ArrayLike | None, at_draws: ArrayLike | None
) -> tuple[list[Array], tuple[str, ...], tuple[str, ...]]:
    """Values to rank, the true one in the first column and then the draws, (n, l + 1) for each kind of region."""
    n, n_draws, dim = samples.shape
    densities = check_log_probs(at_truth, at_draws, n, n_draws)
    if densities is None:
        for j, name in enumerate(names):
            require_varying(name, truth[:, j], samples[:, :, j])
        return [np.concatenate([truth[:, j, None], samples[:, :, j]], axis=1) for j in range(dim)], names, labels
    return [-np.concatenate([densities[0][:, None], densities[1]], axis=1)], (HPD,), (HPD,)


def _places(values: Array, truth_alone: bool, central: bool, rng: np.random.Generator) -> Integers:
    """Position 0..l of the true value (first column), or of every value if it were the true one, from the middle outwards."""
    rank = count_below(values[:, 0], values[:, 1:], rng)[:, None] if truth_alone else candidate_ranks(values, rng)
    # ranks of a negative log density already increase outwards
    return from_the_middle(rank, values.shape[1] - 1) if central else rank


def _compare(cells: "Cells", held: Mask, level: Array) -> tuple[dict[str, AnyArray], Array]:
    """Results of single cells (fields of LocalCoverage), and the standard deviation of held - expected (c, m, r)."""
    count = cells.sums(np.ones(held.shape[0]), 0).astype(np.int64)
    looks = held[:, 0].reshape(held.shape[0], -1)
    inside = np.stack([cells.sums(look, 0) for look in looks.T], axis=-1).reshape(count.size, *held.shape[2:])
    rows = np.maximum(count, 1)[:, None, None]
    low, high = (1 - ONE_SIGMA) / 2, (1 + ONE_SIGMA) / 2
    expected, sd = _expected(cells, held, level, count)
    z = (inside - expected * count[:, None, None]) / sd
    binomial = 2 * np.minimum(binom.cdf(inside, rows, expected), binom.sf(inside - 1, rows, expected))
    found = {
        "cell_low": cells.low,
        "cell_high": cells.high,
        "count": count,
        "observed": inside / rows,
        "low": np.where(inside > 0, beta.ppf(low, inside, np.maximum(rows - inside + 1, 1e-9)), 0.0),
        "high": np.where(inside < rows, beta.ppf(high, inside + 1, np.maximum(rows - inside, 1e-9)), 1.0),
        "expected": expected,
        "z": z,
        "cell_pvalues": np.minimum(1.0, binomial if cells.fixed else 2 * ndtr(-np.abs(z))),
    }
    return found, sd


def _expected(cells: "Cells", held: Mask, level: Array, count: Integers) -> tuple[Array, Array]:
    """Expected fraction in each cell and the standard deviation of (held - expected) summed over the rows of the cell -> (c, m, r) each."""
    if cells.fixed:
        share = np.broadcast_to(level[:, None], (count.size, *held.shape[2:])).copy()
        return share, np.sqrt(np.maximum(count, 1)[:, None, None] * share * (1 - share))
    share, sd = np.empty((2, count.size, *held.shape[2:]))
    for c in range(count.size):
        within = cells.index == c  # (n, l + 1): whether this value, if it were the true one, would lie in the cell
        for m in range(held.shape[2]):
            for r in range(held.shape[3]):
                both = within & held[:, :, m, r]
                e = both.sum() / max(within.sum(), 1)
                mean_both, mean_within = both.mean(axis=1), within.mean(axis=1)
                square = mean_both * (1 - 2 * e) + e**2 * mean_within  # of 1{within} (held - e)
                share[c, m, r] = e
                sd[c, m, r] = np.sqrt(max(float(np.sum(square - (mean_both - e * mean_within) ** 2)), 1e-12))
    return share, sd


def _pvalue(cells: "Cells", held: Mask, level: Array, found: dict[str, AnyArray], sd: Array, r: int, rng: np.random.Generator) -> float:
    """p-value of the map of one kind of region r, held (n, 1 or l + 1, m), sd (c, m)."""
    z, expected, count = found["z"][..., r], found["expected"][..., r], found["count"]
    if cells.fixed:
        steps = np.diff(level, prepend=0.0, append=1.0)
        inside = np.stack([rng.multinomial(rows, steps, size=N_NULL) for rows in count], axis=1).cumsum(axis=-1)[..., :-1]
        simulated = _statistics((inside - count[:, None] * level) / sd)
    else:
        parts = []
        for b in chunks(N_NULL, held.shape[0]):
            k = rng.integers(0, held.shape[1], (b, held.shape[0]))  # any value of a row may be the true one
            every = np.arange(held.shape[0])
            cell = (cells.index[every, k] + count.size * np.arange(b)[:, None]).ravel()
            hits = [np.bincount(cell, h[every, k].ravel(), minlength=b * count.size) for h in np.moveaxis(held, 2, 0)]
            rows = np.bincount(cell, minlength=b * count.size)
            apart = np.stack(hits, axis=-1) - np.tile(expected, (b, 1)) * rows[:, None]
            parts.append(_statistics(apart.reshape(b, *z.shape) / sd))
        simulated = np.concatenate(parts)
    # Bonferroni over cells and levels needs no simulation and gives p-values too small for the simulations
    tail = float(found["cell_pvalues"][..., r].min() * z.size)
    return smallest_pvalue(_statistics(z[None])[0], simulated, tail)


def _statistics(z: Array) -> Array:
    flat = z.reshape(z.shape[0], -1)
    return np.stack([(flat**2).sum(axis=1), np.abs(flat).max(axis=1)], axis=-1)


Names = tuple[tuple[str, ...], tuple[str, ...]]

MIN_ROWS_PER_CELL = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Cell of every value, index (n, 1) or, where each of the l + 1 values has its own, (n, l + 1); edges low, high (c, q)."""

    index: Integers
    low: Array
    high: Array

    @property
    def fixed(self) -> bool:
        """Whether the cell of a row is the same for all its values."""
        return self.index.shape[1] == 1

    def sums(self, values: Array | Mask, candidate: int) -> AnyArray:
        """Sum of values (n,) over the rows of each cell -> (c,), for that candidate (0: the true value) of each row."""
        return np.bincount(self.index[:, candidate], weights=values, minlength=self.low.shape[0])


def read_by(
    by: ArrayLike | str | int | Sequence[str | int],
    truth: Array,
    samples: Array,
    names: Names,
    at: str,
    by_names: Sequence[str | Parameter] | None,
) -> tuple[Array, tuple[str, ...], tuple[str, ...], str]:
    """Values that define the cells, (n, 1 or l + 1, q), their names and labels, and 'posterior', 'truth' or 'given'.

    Raises: ShapeError, NonFiniteError, DataError, SettingError.
    """
    at = require_choice("at", at, ("posterior", "truth"))
    chosen = _columns(by, names[0])
    if chosen is None:
        if at == "truth":
            raise SettingError("at is 'truth' with an array `by`; expected names or columns of theta, whose true values are known")
        values, (plain, labels) = _given(by, truth, names[0], by_names)
        return values[:, None, :], plain, labels, "given"
    both = np.concatenate([truth[:, None, chosen], samples[:, :, chosen]], axis=1)
    values = both if at == "truth" else both.mean(axis=1, keepdims=True)
    return values, tuple(names[0][j] for j in chosen), tuple(names[1][j] for j in chosen), at


def _columns(by: object, names: tuple[str, ...]) -> list[int] | None:
    """Columns of theta that `by` names, or None if it is an array of values."""
    entries = [by] if isinstance(by, str | int | np.integer | Parameter) else list(by) if isinstance(by, list | tuple) else []
    if not entries or len(entries) > 2 or not all(isinstance(e, str | int | np.integer | Parameter) for e in entries):
        return None
    out = []
    for entry in entries:
        if isinstance(entry, str | Parameter):
            name = entry if isinstance(entry, str) else entry.name
            out.append(names.index(require_choice("by", name, names)))
        else:
            out.append(require_int("by", entry, low=0, high=len(names) - 1))
    if len(set(out)) < len(out):
        raise SettingError(f"by is {by!r}; expected two different parameters")
    return out


def _given(by: object, truth: Array, names: tuple[str, ...], by_names: Sequence[str | Parameter] | None) -> tuple[Array, Names]:
    values = as_real("by", by)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.shape[0] != truth.shape[0] or values.shape[1] not in (1, 2):
        raise ShapeError(
            f"by has shape {values.shape}; expected one or two names or columns of theta, or values (n,) or (n, 2), n = {len(truth)}"
        )
    require_finite("by", values)
    for j, name in enumerate(names):
        if any(np.array_equal(column, truth[:, j]) for column in values.T):
            raise DataError(
                f"by has the true values of {name!r}; no posterior is calibrated given the true value: use by={name!r}, at='truth'"
            )
    if by_names is None:
        by_names = ("by",) if values.shape[1] == 1 else ("by_0", "by_1")
    return values, check_names(by_names, values.shape[1])


def make_cells(values: Array, n_bins: int | None) -> Cells:
    """Divide values (n, k, q) into n_bins cells of equal numbers per quantity, the second separately within each slice of the first.

    Tied values share a cell, so a discrete quantity may have fewer cells.   Raises: SettingError, DataError (a constant quantity).
    """
    n, _, q = values.shape
    if n_bins is None:
        n_bins = int(np.clip(n // 50, 2, 10)) if q == 1 else int(np.clip(np.sqrt(n / 25), 2, 8))
    n_bins = require_int("n_bins", n_bins, low=1)
    if n < MIN_ROWS_PER_CELL * n_bins**q:
        raise SettingError(f"n_bins is {n_bins} per quantity for {n} simulations; expected at least {MIN_ROWS_PER_CELL} rows in each cell")
    if np.any(values.min(axis=(0, 1)) == values.max(axis=(0, 1))):
        raise DataError("by is constant; expected a quantity that varies between simulations")
    corners: list[tuple[float, float, float, float]] = []
    first, edges = _cut(values[..., 0], np.ones(values.shape[:2], dtype=bool), n_bins)
    if q == 1:
        return Cells(index=first, low=edges[:-1, None], high=edges[1:, None])
    index = np.zeros_like(first)
    for i in range(edges.size - 1):
        second, inner = _cut(values[..., 1], first == i, n_bins)
        index = np.where(first == i, second + len(corners), index)
        corners += [(edges[i], inner[j], edges[i + 1], inner[j + 1]) for j in range(inner.size - 1)]
    box = np.array(corners)
    return Cells(index=index, low=box[:, :2], high=box[:, 2:])


def _cut(values: Array, chosen: Mask, n_bins: int) -> tuple[Integers, Array]:
    """Bin of every value (only those chosen count) and the edges (b + 1,), about equal numbers of the chosen in each."""
    inside = values[chosen]
    lowest = inside.min()
    cuts = np.quantile(inside, np.arange(1, n_bins) / n_bins, method="higher")
    if np.any(cuts == lowest) and inside.max() > lowest:  # ties at the lower end: the cut must lie above them
        cuts = np.where(cuts == lowest, inside[inside > lowest].min(), cuts)
    cuts = np.unique(cuts[cuts > lowest])
    return np.searchsorted(cuts, values, side="right").astype(np.int64), np.concatenate([[lowest], cuts, [inside.max()]])


def candidate_ranks(values: Array, rng: np.random.Generator) -> Integers:
    """Rank 0..l of each of the l + 1 values of every row among the others, ties broken at random -> (n, l + 1)."""
    shuffle = rng.random(values.shape).argsort(axis=1)
    order = np.take_along_axis(values, shuffle, axis=1).argsort(axis=1, kind="stable")
    ranks = np.empty(values.shape, dtype=np.int64)
    np.put_along_axis(ranks, np.take_along_axis(shuffle, order, axis=1), np.arange(values.shape[1])[None], axis=1)
    return ranks
