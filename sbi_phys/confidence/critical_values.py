r"""Critical values and p-values learned from simulations all over parameter space (LF2I).

Given theta_i from any distribution with the whole space as support and q_i = q(D_i; theta_i), D_i ~ p(D | theta_i):

- **critical values**: C_a(theta), the a-quantile of q given theta, minimises the pinball loss E[(a - 1{q < C}) (q - C)]. Candidates
  are linear in a basis of splines (the minimum is found exactly, as a linear programme) and boosted trees; the one
  with the lowest loss in cross-validation is fitted again to everything.
- **p-values**: P(Q >= c | theta) falls with the cutoff c. Each pair gets cutoffs c drawn from all q, and Y = 1{q_i >= c}; boosted trees
  with a monotonic constraint on c regress Y on (theta, c): one fit for all levels.

The set {theta: q(D; theta) <= C(theta)} then covers at every theta as far as the regression is right; `coverage_map` with a third
sample says whether it is. Nothing is extrapolated: theta outside of the box that the sample fills is refused.

Source: Dalmasso et al. 2021, arXiv:2107.03920; linear programme of quantile regression: Koenker 2005, section 6.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import KFold
from sklearn.preprocessing import SplineTransformer

from sbi_phys.calibration.inputs import check_names
from sbi_phys.confidence.inputs import Bounds, as_points, check_bounds, check_level, check_statistic, frozen, require_within
from sbi_phys.core.checks import require_choice, require_int, require_same_rows
from sbi_phys.core.errors import DataError, NonFiniteError, SbiPhysError
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

__all__ = ["CriticalValues", "PValues", "learn_critical_values", "learn_pvalues", "pinball"]

Curve = Callable[[Array], Array]

MIN_TAIL = 20  # simulations that have to lie above the quantile


@dataclass(frozen=True, kw_only=True, eq=False)
class CriticalValues:
    """Learned C_level(theta): at(theta (m, d)) -> (m,) within the box low..high; cross-validated pinball loss of each candidate."""

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

    def summary(self) -> str:
        """Return in words which candidate was taken, and the loss of each."""
        losses = ", ".join(f"{name} {value:.5g}" for name, value in self.losses.items())
        chosen = f"{100 * self.level:.4g} % critical values from {self.n} simulations: {self.model}"
        return chosen + (f" (pinball loss: {losses})" if losses else "")


@dataclass(frozen=True, kw_only=True, eq=False)
class PValues:
    """Learned P(Q >= c | theta): at(c (m,), theta (m, d)) -> (m,) within the box low..high; falls with c."""

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
    folds: int = 5,
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
        folds: of the cross-validation.
        seed: of folds and boosting.

    Returns: CriticalValues.
    Raises: ShapeError, NonFiniteError (q infinite too), DataError (fewer than 20 simulations expected above the quantile), SettingError.
    Source: arXiv:2107.03920, algorithm 1.
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
        order = KFold(require_int("folds", folds, low=2), shuffle=True, random_state=seed_for(seed, "folds") % 2**32)
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
            # a quantile of a leaf needs rows beyond it: with fewer, trees follow the noise
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
    # where the sample is denser the curve may bend more
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

    Rows far from the quantile enter with their sign alone: a first answer from some rows tells which those are, and the next is exact
    if it leaves all of their signs as they were.
    """
    # columns without support in this sample would leave coefficients free: they get none
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
        # a better answer knows the signs better: more rows only where that does not help, or where no answer has these signs
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
    cutoffs: int = 10,
    seed: int = 0,
) -> PValues:
    r"""Monotone regression of the tail probability P(Q >= c | theta) on (theta, c), for all cutoffs at once.

    Args: theta (n, d), q (n,), names and bounds as in `learn_critical_values`. cutoffs: values of c drawn for each simulation.
        seed: of these and the trees.
    Returns: PValues, falling with c; within 1 / n and 1.
    Raises: ShapeError, NonFiniteError, DataError (fewer than 200 simulations).   Source: arXiv:2107.03920, algorithm 2.
    Read: trees are steps; p below about 20 / n is no more than an order of magnitude.
    """
    points, values, plain = _sample(theta, q, names)
    n = values.size
    if n < 10 * MIN_TAIL:
        raise DataError(f"theta has {n} rows; expected {10 * MIN_TAIL} or more simulations to learn p-values from")
    if np.isinf(values).any():
        raise NonFiniteError(f"q is infinite for {int(np.isinf(values).sum())} simulations; expected finite values at their own theta")
    k = require_int("cutoffs", cutoffs, low=1)
    c = rng_for(seed, "cutoffs").choice(values, size=n * k)
    rows = np.repeat(np.arange(n), k)
    above = values[rows] >= c
    trees = HistGradientBoostingClassifier(
        max_iter=60,
        learning_rate=0.1,
        max_leaf_nodes=8,
        # the cutoffs of one simulation are no independent rows: a leaf needs many simulations
        min_samples_leaf=max(20 * k, n * k // 50),
        monotonic_cst=[0] * points.shape[1] + [-1],
        early_stopping=False,
        random_state=seed_for(seed, "p-values") % 2**32,
    ).fit(np.column_stack([points[rows], c]), above)

    def curve(cutoff: Array, at: Array) -> Array:
        finite = np.where(np.isinf(cutoff), np.finfo(np.float64).max, cutoff)
        p = trees.predict_proba(np.column_stack([at, finite]))[:, 1]
        # q = 0 is no evidence, whatever the trees say; and n simulations tell nothing of p < 1/n
        return np.where(cutoff <= values.min(), 1.0, np.clip(p, 1 / (n + 1), 1.0))

    low, high = _box(points, bounds)
    return PValues(names=plain, low=frozen(low), high=frozen(high), curve=curve, n=n)


def _box(points: Array, bounds: Bounds | None) -> tuple[Array, Array]:
    # a sample never quite reaches a bound: where it comes within a hundredth of its range, the box reaches up to it
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
        raise DataError(f"theta has one single value in column {column}; expected values that fill the space, leave the column out")
    return points, values, check_names(names, points.shape[1])[0]
