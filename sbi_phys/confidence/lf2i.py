r"""Likelihood-free frequentist inference (LF2I): confidence sets whose critical values and p-values are learned from simulations.

    theta_i ~ any prior, D_i ~ p(D | theta_i), q_i = q(D_i; theta_i)     one sample, as large as possible
    sets = lf2i(theta, q, statistic, level=0.9)                          quantile regression of q on theta
    inside_j = sets.contains_each(D_j, theta_j)                          a second sample
    coverage_map(theta_j, inside_j, 0.9)                                 test of the coverage

One simulation per theta suffices, because the regression combines neighbouring theta.

- **Critical values**: C_a(theta), the a-quantile of q given theta, minimises the pinball loss E[(a - 1{q < C}) (q - C)]. Candidates are
  linear in a basis of splines (solved exactly, as a linear programme) and boosted trees; the one with the lowest cross-validated loss is
  fitted again to the whole sample.
- **p-values**: P(Q >= c | theta) falls with c. Each simulation gets values c drawn from all q, and Y = 1{q_i >= c}; boosted trees that are
  monotone in c regress Y on (theta, c), one fit for all levels.

With profiled nuisance parameters C is taken at (psi_i, nu_i), nu_i being the nuisances that fit D_i best at psi_i, instead of at theta_i.
Given all nu_i, the sample corrects for that: the level-quantile of q_i - C(psi_i, nu_i) given theta_i is regressed on theta and added to
C, for some rounds. For p-values 1 - P(psi_i, nu_i) replaces q_i in the next regression. (`neyman` does the same with toys.)

The sets cover as far as the regression is right. Theta outside of the box that the sample fills is refused.

Source: Dalmasso et al. 2021, arXiv:2107.03920; Masserano et al. 2023, arXiv:2205.15680; linear programme: Koenker 2005, section 6.2;
corrections: Beran 1988 JASA 83, 687.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linprog
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import KFold
from sklearn.preprocessing import SplineTransformer

from sbi_phys.calibration.inputs import check_names
from sbi_phys.confidence._inputs import Bounds, as_points, check_bounds, check_statistic, frozen, nearest_level
from sbi_phys.confidence.sets import Construction, Profile, Statistic, require_within
from sbi_phys.core.checks import as_array, check_level, check_levels, require_choice, require_int, require_same_rows
from sbi_phys.core.errors import DataError, NonFiniteError, SbiPhysError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LF2I", "CriticalValues", "PValues", "learn_critical_values", "learn_pvalues", "lf2i", "pinball"]


Curve = Callable[[Array], Array]

MIN_TAIL = 20  # simulations required above the quantile


@dataclass(frozen=True, kw_only=True, eq=False)
class CriticalValues(Result):
    """Learned C_level(theta): at(theta (m, d)) -> (m,) within the box low..high; cross-validated pinball loss of each candidate.

    >>> import numpy as np
    >>> from sbi_phys.confidence import learn_critical_values
    >>> theta, q = np.linspace(0, 1, 500), np.random.default_rng(0).permutation(500) / 500
    >>> print(learn_critical_values(theta, q, 0.9, model="constant").summary())
    90 % critical values from 500 simulations: constant
    """

    names: tuple[str, ...]
    level: float
    low: Array
    high: Array
    model: str
    losses: dict[str, float]
    curve: Curve
    n: int

    def at(self, theta: ArrayLike) -> Array:
        """Critical values (m,) at theta (m, d).   Raises: SupportError beyond the sample's box, ShapeError, NonFiniteError."""
        points = as_points("theta", theta, len(self.names), self.names)
        require_within("theta", points, self.low, self.high, self.names)
        return self.curve(points)

    def rows(self) -> Rows:
        """Return the table: one row for each candidate, with its cross-validated loss."""
        losses = self.losses or {self.model: float("nan")}
        chosen = [name == self.model for name in losses]
        return Rows.of({"level": self.level, "model": list(losses), "loss": list(losses.values()), "chosen": chosen, "n": self.n})

    def summary(self) -> str:
        """Return in words which candidate was taken, and the loss of each."""
        losses = ", ".join(f"{name} {value:.5g}" for name, value in self.losses.items())
        chosen = f"{100 * self.level:.4g} % critical values from {self.n} simulations: {self.model}"
        return chosen + (f" (pinball loss: {losses})" if losses else "")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the critical value along the first parameter, the others at the middle of the box."""
        x = np.tile((self.low + self.high) / 2, (200, 1))
        x[:, 0] = np.linspace(self.low[0], self.high[0], 200)
        ylabel = f"critical value, {100 * self.level:.4g} %"
        return figures.results.trace(self.at(x), ax, at=x[:, 0], xlabel=self.names[0], ylabel=ylabel)


@dataclass(frozen=True, kw_only=True, eq=False)
class PValues:
    """Learned P(Q >= c | theta): at(c (m,), theta (m, d)) -> (m,) within the box low..high; falls with c.

    >>> import numpy as np
    >>> from sbi_phys.confidence import learn_pvalues
    >>> theta, q = np.linspace(0, 1, 500), np.random.default_rng(0).permutation(500) / 500
    >>> p = learn_pvalues(theta, q, n_cutoffs=2).at([0.1, 0.9], [0.5, 0.5])
    >>> bool(p[0] > 0.7), bool(p[1] < 0.3)
    (True, True)
    """

    names: tuple[str, ...]
    low: Array
    high: Array
    curve: Callable[[Array, Array], Array]
    n: int

    def at(self, q: ArrayLike, theta: ArrayLike) -> Array:
        """p-values (m,) of q (m,) at theta (m, d) or one theta for all.   Raises: SupportError, ShapeError, NonFiniteError."""
        points = as_points("theta", theta, len(self.names), self.names)
        values = check_statistic(np.atleast_1d(np.asarray(q, dtype=np.float64)), None, "q")
        require_within("theta", points, self.low, self.high, self.names)
        if points.shape[0] == 1:
            points = np.broadcast_to(points, (values.size, points.shape[1]))
        require_same_rows(q=values, theta=points)
        return self.curve(values, points)


def learn_critical_values(
    theta: ArrayLike,
    q: ArrayLike,
    level: float = 0.9,
    *,
    names: Sequence[str | Parameter] | None = None,
    bounds: Bounds | None = None,
    model: str = "auto",
    n_folds: int = 5,
    seed: int = 0,
) -> CriticalValues:
    r"""Quantile regression of a test statistic on theta: C = argmin E[(level - 1{q < C}) (q - C)].

    Args:
        theta: (n, d), from a distribution that fills the space, prior units; any will do, and more of them where the quantile
            changes fast, as it does near a physical bound.
        q: (n,), the statistic of D_i ~ p(D | theta_i) at theta_i.
        level: confidence level.
        names: d names or Parameters.
        bounds: physical bounds (low or None, high or None); the box reaches up to one that the sample nearly reaches.
        model: 'splines-3', 'splines-6', 'splines-12' (cubic, knots per parameter; products of pairs), 'boosting', 'constant', or 'auto':
            the lowest cross-validated loss.
        n_folds: folds of the cross-validation.
        seed: of folds and boosting.

    Returns: CriticalValues.
    Raises: ShapeError, NonFiniteError (q infinite too), DataError (fewer than 20 simulations expected above the quantile), SettingError.
    Source: arXiv:2107.03920, algorithm 1.

    >>> import numpy as np
    >>> from sbi_phys.confidence import learn_critical_values
    >>> theta, q = np.linspace(0, 1, 500), np.random.default_rng(0).permutation(500) / 500
    >>> learn_critical_values(theta, q, 0.9, model="constant").at([0.2, 0.7]).round(1).tolist()
    [0.9, 0.9]
    """
    points, values, plain = _sample(theta, q, names)
    level = check_level(level)
    if np.isinf(values).any():
        raise NonFiniteError(f"q is infinite for {int(np.isinf(values).sum())} simulations; expected finite values at their own theta")
    tail = values.size * min(level, 1 - level)
    if tail < MIN_TAIL:
        raise DataError(f"{values.size} simulations leave {tail:.0f} beyond the {level:g} quantile; expected {MIN_TAIL} or more")
    low, high = _box(points, bounds)
    require_choice("model", model, ("auto", *_CANDIDATES))
    losses: dict[str, float] = {}
    chosen = model
    if model == "auto":
        order = KFold(require_int("n_folds", n_folds, low=2), shuffle=True, random_state=seed_for(seed, "folds") % 2**32)
        splits = list(order.split(points))
        for name in _CANDIDATES:
            each = [pinball(values[b], _fit(name, points[a], values[a], level, low, high, seed)(points[b]), level) for a, b in splits]
            losses[name] = float(np.mean(each))
        chosen = min(losses, key=lambda name: losses[name])
    curve = _fit(chosen, points, values, level, low, high, seed)
    return CriticalValues(
        names=plain, level=level, low=frozen(low), high=frozen(high), model=chosen, losses=losses, curve=curve, n=values.size
    )


def pinball(q: ArrayLike, quantile: ArrayLike, level: float) -> float:
    """Mean pinball loss of predicted quantiles, E[(level - 1{q < C}) (q - C)]."""
    difference = np.asarray(q, dtype=np.float64) - np.asarray(quantile, dtype=np.float64)
    return float(np.mean(np.maximum(level * difference, (level - 1) * difference)))


_CANDIDATES = ("constant", "splines-3", "splines-6", "splines-12", "boosting")


def _fit(name: str, theta: Array, q: Array, level: float, low: Array, high: Array, seed: int) -> Curve:
    if name == "boosting":
        trees = HistGradientBoostingRegressor(
            loss="quantile",
            quantile=level,
            max_iter=100,
            learning_rate=0.05,
            max_leaf_nodes=4,
            # the quantile of a leaf needs rows beyond it; with fewer rows the trees fit noise
            min_samples_leaf=max(int(30 / min(level, 1 - level)), q.size // 40),
            early_stopping=False,
            random_state=seed_for(seed, "boosting") % 2**32,
        ).fit(theta, q)
        return lambda points: np.asarray(trees.predict(points), dtype=np.float64)
    basis = _basis(0 if name == "constant" else int(name.removeprefix("splines-")), theta, low, high)
    coefficients = _linear_quantile(basis(theta), q, level)
    return lambda points: np.asarray(basis(points) @ coefficients)


def _basis(knots: int, sample: Array, low: Array, high: Array) -> Curve:
    """Cubic B-splines in each parameter (knots at quantiles of the sample), and products of pairs' linear parts; columns (m, p)."""
    if knots == 0:
        return lambda theta: np.ones((theta.shape[0], 1))
    # knots are denser where the sample is denser
    places = np.quantile(sample, np.linspace(0, 1, knots), axis=0)
    places[0], places[-1] = low, high
    places = np.where((np.diff(places, axis=0) > 1e-6 * (high - low)).all(axis=0), places, np.linspace(low, high, knots))
    spline = SplineTransformer(degree=3, knots=places, include_bias=False, extrapolation="constant")
    spline.fit(np.stack([low, high]))

    def columns(theta: Array) -> Array:
        unit = 2 * (theta - low) / np.maximum(high - low, 1e-300) - 1
        pairs = [unit[:, i] * unit[:, j] for i in range(low.size) for j in range(i)]
        curved = [p * unit[:, k] for p in pairs for k in range(low.size)] if knots > 3 else []
        extra = [c[:, None] for c in (*pairs, *curved)]
        return np.concatenate([np.ones((theta.shape[0], 1)), spline.transform(theta), *extra], axis=1)

    return columns


def _linear_quantile(x: Array, q: Array, level: float) -> Array:
    """Coefficients (p,) that minimise the pinball loss of x (n, p) @ beta, by linear programmes over few rows (Portnoy & Koenker 1997).

    Rows far from the quantile enter with their sign alone: a first solution from some rows identifies them, and the next one is
    exact if it leaves all of their signs unchanged.
    """
    # columns that are 0 in this sample would leave their coefficients undetermined: they are left out
    used = np.flatnonzero(np.abs(x).max(axis=0) > 0)
    design, scale = x[:, used], float(np.std(q)) or 1.0
    n, beta = q.size, np.zeros(x.shape[1])
    m, rounds = int(max(30 * used.size, 6 * n ** (2 / 3))), 0
    found = _programme(design[:: max(n // m, 1)], q[:: max(n // m, 1)] / scale, level, 0.0) if 2 * m < n else None
    while found is not None and 2 * m < n:
        residual = q / scale - design @ found
        near = np.zeros(n, dtype=bool)
        near[np.argpartition(np.abs(residual), m)[:m]] = True
        above = ~near & (residual > 0)
        fixed = design[above].sum(axis=0) - (1 - level) * design[~near].sum(axis=0)
        better = _programme(design[near], q[near] / scale, level, fixed)
        if better is not None and not ((q / scale - design @ better > 0) != above)[~near].any():
            beta[used] = better * scale
            return beta
        rounds += 1
        # the next solution has better signs; more rows only after four rounds, or if the programme has no solution
        m *= 2 if better is None or rounds % 4 == 0 else 1
        found = found if better is None else better
    found = _programme(design, q / scale, level, 0.0)
    if found is None:
        raise SbiPhysError("quantile regression did not converge; expected a statistic that varies smoothly with theta")
    beta[used] = found * scale
    return beta


def _programme(x: Array, q: Array, level: float, fixed: Array | float) -> Array | None:
    """Solve the dual, max q.a with X^T a = (1 - level) X^T 1 - fixed and 0 <= a <= 1; None if it has no solution."""
    right = (1 - level) * x.sum(axis=0) - fixed
    found = linprog(-q, A_eq=x.T, b_eq=right, bounds=(0, 1), method="highs")
    return -np.asarray(found.eqlin.marginals) if found.status == 0 else None


def learn_pvalues(
    theta: ArrayLike,
    q: ArrayLike,
    *,
    names: Sequence[str | Parameter] | None = None,
    bounds: Bounds | None = None,
    n_cutoffs: int = 10,
    seed: int = 0,
) -> PValues:
    r"""Monotone regression of the tail probability P(Q >= c | theta) on (theta, c), for all cutoffs at once.

    Args: theta (n, d), q (n,), names and bounds as in `learn_critical_values`. n_cutoffs: values of c drawn for each simulation.
        seed: of these and the trees.
    Returns: PValues, falling with c; within 1 / n and 1.
    Raises: ShapeError, NonFiniteError, DataError (fewer than 200 simulations).   Source: arXiv:2107.03920, algorithm 2.
    Read: the curve is made of steps; p below about 20 / n is only an order of magnitude.

    >>> import numpy as np
    >>> from sbi_phys.confidence import learn_pvalues
    >>> theta, q = np.linspace(0, 1, 500), np.random.default_rng(0).permutation(500) / 500
    >>> learn_pvalues(theta, q, n_cutoffs=2).at(0.0, 0.5).tolist()  # every q is as large
    [1.0]
    """
    points, values, plain = _sample(theta, q, names)
    n = values.size
    if n < 10 * MIN_TAIL:
        raise DataError(f"theta has {n} rows; expected {10 * MIN_TAIL} or more simulations to learn p-values from")
    if np.isinf(values).any():
        raise NonFiniteError(f"q is infinite for {int(np.isinf(values).sum())} simulations; expected finite values at their own theta")
    k = require_int("n_cutoffs", n_cutoffs, low=1)
    c = rng_for(seed, "cutoffs").choice(values, size=n * k)
    rows = np.repeat(np.arange(n), k)
    above = values[rows] >= c
    trees = HistGradientBoostingClassifier(
        max_iter=60,
        learning_rate=0.1,
        max_leaf_nodes=8,
        # the cutoffs of one simulation are not independent rows: a leaf needs many simulations
        min_samples_leaf=max(20 * k, n * k // 50),
        monotonic_cst=[0] * points.shape[1] + [-1],
        early_stopping=False,
        random_state=seed_for(seed, "p-values") % 2**32,
    ).fit(np.column_stack([points[rows], c]), above)

    def curve(cutoff: Array, at: Array) -> Array:
        finite = np.where(np.isinf(cutoff), np.finfo(np.float64).max, cutoff)
        p = trees.predict_proba(np.column_stack([at, finite]))[:, 1]
        # the smallest q has p-value 1 by definition; n simulations do not resolve p < 1/n
        return np.where(cutoff <= values.min(), 1.0, np.clip(p, 1 / (n + 1), 1.0))

    low, high = _box(points, bounds)
    return PValues(names=plain, low=frozen(low), high=frozen(high), curve=curve, n=n)


def _box(points: Array, bounds: Bounds | None) -> tuple[Array, Array]:
    # a sample never quite reaches a bound: if it comes within 1 % of its range, the box extends to the bound
    low, high = points.min(axis=0), points.max(axis=0)
    near = 0.01 * (high - low)
    for i, (a, b) in enumerate(check_bounds(bounds, low, high)):
        low[i] = a if a is not None and low[i] - a <= near[i] else low[i]
        high[i] = b if b is not None and b - high[i] <= near[i] else high[i]
    return low, high


def _sample(theta: Any, q: Any, names: Sequence[str | Parameter] | None) -> tuple[Array, Array, tuple[str, ...]]:
    array = np.asarray(theta)
    points = as_points("theta", theta, 1 if array.ndim <= 1 else int(array.shape[1]))
    values = check_statistic(q, None, "q")
    require_same_rows(theta=points, q=values)
    if (np.ptp(points, axis=0) == 0).any():
        column = int(np.flatnonzero(np.ptp(points, axis=0) == 0)[0])
        raise DataError(f"theta has a single value in column {column}; expected values that fill the space (or leave the column out)")
    return points, values, check_names(names, points.shape[1])[0]


PROJECTION = 8  # points per nuisance over which a set without a profile is projected


@dataclass(frozen=True, kw_only=True, eq=False)
class LF2I(Construction, Result):
    """Confidence sets with learned critical values; `critical_models`, one CriticalValues per level; p-values, and their corrections.

    >>> import numpy as np
    >>> from sbi_phys.confidence import lf2i
    >>> theta = np.linspace(0, 5, 500)
    >>> x = np.random.default_rng(0).normal(theta, 1)
    >>> sets = lf2i(theta, (x - theta) ** 2, lambda t, x: (x - t[0]) ** 2, model="constant")
    >>> bool(2 < sets.critical([2.5])[0] < 4)
    True
    """

    critical_models: tuple[CriticalValues, ...]
    pvalues: PValues | None
    corrections: tuple[PValues, ...] = ()

    def critical(self, theta: ArrayLike, level: float | None = None) -> Array:
        """Critical values C (m,) at theta (m, d).   Raises: SupportError beyond the sample's box, SettingError, ShapeError."""
        points = as_points("theta", theta, self.dim, self.names)
        return self.critical_models[nearest_level(level, self.levels)].at(points)

    def _tail(self, q: Array, theta: Array) -> Array:
        if self.pvalues is None:
            raise SettingError("p-values were not learned; expected lf2i(..., pvalues=True)")
        return _chain((self.pvalues, *self.corrections), q, theta)

    def _nuisances(self) -> Array:
        axes = [np.linspace(a, b, PROJECTION) for a, b in zip(self.low[self.interest :], self.high[self.interest :], strict=True)]
        return np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], axis=-1)

    def contains_each(self, data: Any, theta: ArrayLike, level: float | None = None) -> Mask:
        """Whether the set of each data set holds its own theta, rows (n, d), as `coverage_map` takes it; all parameters of interest.

        Draw these theta from a box slightly smaller than that of the first sample; theta outside of the latter raise an error.
        Raises: SupportError, ShapeError, NonFiniteError.
        """
        if self.profile is not None:
            raise SettingError("contains_each does not support profiled nuisances; expected one call of contains(data, psi) for each psi")
        points = as_points("theta", theta, self.dim, self.names)
        q = check_statistic(self.statistic(points, data), points.shape[0], "row by row")
        require_within("theta", points, self.low, self.high, self.names)
        return q <= self.critical(points, level)

    def rows(self) -> Rows:
        """Return the table: one row for each level and candidate, with its cross-validated loss."""
        tables = [model.rows() for model in self.critical_models]
        return Rows(tables[0].columns, tuple(row for table in tables for row in table.rows))

    def summary(self) -> str:
        """Return in words which regressions were taken."""
        return "\n".join([f"learned confidence sets in {', '.join(self.names)}", *(f"  {m.summary()}" for m in self.critical_models)])

    def plot(self, ax: "Axes | None" = None, *, level: float | None = None) -> "Axes":
        """Draw the critical values along the first parameter, the others at the middle and at both ends, over Wilks' value."""
        return figures.confidence.learned_critical_values(self, ax, nearest_level(level, self.levels))


def lf2i(
    theta: ArrayLike,
    q: ArrayLike,
    statistic: Statistic,
    level: float | Sequence[float] = 0.9,
    *,
    names: Sequence[str | Parameter] | None = None,
    interest: int | None = None,
    profile: Profile | None = None,
    bounds: Bounds | None = None,
    model: str = "auto",
    pvalues: bool = False,
    profiled: ArrayLike | None = None,
    n_rounds: int = 3,
    seed: int = 0,
) -> LF2I:
    r"""Confidence sets {theta: q(D; theta) <= C_level(theta)} with critical values learned from (theta_i, q_i).

    Args:
        theta: (n, d), filling the space where sets are wanted, parameters of interest first.
        q: (n,), q(D_i; theta_i) of simulations.
        statistic: (theta (d,), data of n sets) -> (n,), the same as q was made with; large where theta is bad.
        level: confidence level, or several (one regression each).
        names: d names or Parameters.
        interest: number of leading parameters that are wanted; the others are nuisances. None = all.
        profile: as in `neyman`; without one, nuisances are projected over 8 values each.
        bounds: physical bounds (low or None, high or None) per parameter.
        model: as in `learn_critical_values`.
        pvalues: learn p-values too.
        profiled: (n, d - interest), `profile` of each simulation at its own psi: critical values are corrected for being taken there.
        n_rounds: rounds of that correction, each a regression.
        seed: of folds and trees.

    Returns: LF2I.
    Raises: as `learn_critical_values`; SettingError.   Source: arXiv:2107.03920.

    >>> import numpy as np
    >>> from sbi_phys.confidence import lf2i
    >>> theta = np.linspace(0, 5, 500)
    >>> x = np.random.default_rng(0).normal(theta, 1)
    >>> sets = lf2i(theta, (x - theta) ** 2, lambda t, x: (x - t[0]) ** 2, 0.9, model="constant")
    >>> sets.contains(np.array([2.6, 6.0]), 2.5).tolist()
    [True, False]
    """
    levels = check_levels(level)
    array = np.asarray(theta)
    dim = 1 if array.ndim <= 1 else int(array.shape[1])
    plain, labels = check_names(names, dim)
    wanted = dim if interest is None else require_int("interest", interest, low=1, high=dim)
    if profile is not None and wanted == dim:
        raise SettingError(f"profile is given but all {dim} parameters are of interest; expected interest < {dim}")
    if profiled is not None and profile is None:
        raise SettingError("profiled is given without a profile; expected both")
    q = as_array("q", q, (None,))
    models = [learn_critical_values(theta, q, a, names=plain, bounds=bounds, model=model, seed=seed) for a in levels]
    tails = [learn_pvalues(theta, q, names=plain, bounds=bounds, seed=seed)] if pvalues else []
    if profiled is not None:
        for _ in range(require_int("n_rounds", n_rounds, low=0)):
            models, tails = _corrected(models, tails, as_points("theta", theta, dim, plain), q, (profiled, wanted), bounds, seed)
    return LF2I(
        names=plain, labels=labels, interest=wanted, levels=levels, low=models[0].low, high=models[0].high,
        bounds=check_bounds(bounds, models[0].low, models[0].high), statistic=statistic, profile=profile,
        method="learned critical values", critical_models=tuple(models), pvalues=tails[0] if tails else None, corrections=tuple(tails[1:]),
    )  # fmt: skip


def _corrected(
    models: list[CriticalValues], tails: list[PValues], theta: Array, q: Array, nuisances: tuple[ArrayLike, int], bounds: Bounds | None,
    seed: int,
) -> tuple[list[CriticalValues], list[PValues]]:  # fmt: skip
    """Critical values, corrected for being taken at the profiled nuisances instead of at theta; p-values likewise."""
    n, dim = theta.shape
    profiled, k = nuisances
    best = as_array("profiled", np.reshape(np.asarray(profiled), (n, -1)), (n, dim - k))
    seen = np.clip(np.concatenate([theta[:, :k], best], axis=1), models[0].low, models[0].high)
    names, better = models[0].names, []
    for model in models:
        lack = learn_critical_values(theta, q - model.curve(seen), model.level, bounds=bounds, model=model.model, seed=seed)
        better.append(replace(model, curve=_Sum(model.curve, lack.curve)))
    if tails:
        tails = [*tails, learn_pvalues(theta, 1 - _chain(tuple(tails), q, seen), names=names, bounds=bounds, seed=seed)]
    return better, tails


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """Sum of two curves."""

    first: Curve
    second: Curve

    def __call__(self, points: Array) -> Array:
        """Values (m,) at points (m, d)."""
        return self.first(points) + self.second(points)


def _chain(parts: tuple[PValues, ...], q: Array, theta: Array) -> Array:
    """p-values (n,) of q (n,) by the first part, each further one of 1 - p of that before."""
    p = parts[0].at(q, theta)
    for part in parts[1:]:
        p = part.at(1 - p, theta)
    return p
