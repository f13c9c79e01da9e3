r"""Spectra of the truth by maximum likelihood through a known kernel K[e, i] = eps_i q(r_e | t_i).

Free weights (counts omega_i at truth points t_i), by expectation maximisation, which is Bayesian unfolding without bins (Richardson-Lucy):

    omega_i <- (omega_i / eps_i) sum_e w_e K[e, i] / sum_l omega_l K[e, l]
    log L = sum_e w_e log sum_i omega_i K[e, i] - sum_i omega_i eps_i

The likelihood rises at every step; its maximum does not know where it started from. Before that, details finer than the resolution still
are those of the start, a flat one. Smoothing: the weights pass through a normalised Gaussian kernel between iterations.

At the maximum one event far out is explained by truths that are hardly ever seen, each of them with 1/eps others unseen: it moves all
moments. Hence two limits. Truths with eps below 1/sqrt(N) of the largest, where one event of N would count for more than the error of all,
take no part; what lies there is not in the answer. And the iterations stop where the likelihood of events left out (five folds) is highest.

Parameters: minus log likelihood - sum_e w_e log [ sum_i v_i f_i K[e, i] / sum_i v_i f_i eps_i ], v_i the volume that belongs to a point.

Source: Shepp & Vardi 1982 (EM); Silverman+ 1990, J. R. Stat. Soc. B 52, 271 (EM with smoothing); SPINUP, arXiv:2507.15084.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sbi_phys.core.checks import as_array, as_real, require_finite, require_int
from sbi_phys.core.errors import ConvergenceError, DataError, SbiPhysError, SettingError, ShapeError
from sbi_phys.core.progress import Task
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold.histograms import to_hist
from sbi_phys.unfold.inputs import check_edges
from sbi_phys.unfold.omnifold_inputs import as_columns

__all__ = ["DensityFit", "Kernel", "UnfoldedTruth", "fit_weights", "minimise_density", "points_of"]

Density = Callable[[Array, Array], ArrayLike]

MOST, FOLDS, PATIENCE = 1000, 5, 1.5  # iterations; parts that are left out in turn; how much longer than the best to look on
SELDOM = 0.05  # the most of the efficiency that may be cut away, for few events
GAIN = 0.5  # of log likelihood of the events left out that is worth more iterations


class Kernel(NamedTuple):
    """The learned detector between data and truth points.

    values (m, s) = q(r_e | t_i) / exp(offset_e), offset (m,). efficiency (s,). counts (m,); weights, of the single events.
    points (s, d). volume (s,), what belongs to each point, for integrals.
    """

    values: Array
    offset: Array
    efficiency: Array
    counts: Array
    weights: Array
    points: Array
    volume: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfoldedTruth:
    """Counts at truth points.

    points (s, d). weights (s,), counts corrected for efficiency. replicas (n_boot, s), of bootstrapped data. log_likelihood (k + 1,), of
    the start and after every iteration, up to a constant.
    """

    points: Array
    weights: Array
    replicas: Array
    log_likelihood: Array

    @property
    def n_iterations(self) -> int:
        """Iterations of expectation maximisation."""
        return int(self.log_likelihood.size - 1)

    @property
    def total(self) -> float:
        """Number of true events."""
        return float(self.weights.sum())

    @property
    def mean(self) -> Array:
        """Mean truth (d,)."""
        return np.asarray(self.weights @ self.points / self.weights.sum())

    @property
    def sd(self) -> Array:
        """Standard deviation of the truth (d,)."""
        return np.asarray(np.sqrt(self.weights @ (self.points - self.mean) ** 2 / self.weights.sum()))

    def statistic(self, function: Callable[[Array], ArrayLike]) -> tuple[Array, Array]:
        """Values (q,) and covariance (q, q) of function(weights (s,)) -> number or (q,), by bootstrap.

        Raises: SettingError (fewer than 2 replicas), NonFiniteError.
        Read: with b replicas an error is known to 1 / sqrt(2 (b - 1)) of itself.
        """
        if len(self.replicas) < 2:
            raise SettingError(f"there are {len(self.replicas)} replicas; expected n_boot >= 2 in `unfold` for a covariance")
        values = np.atleast_1d(as_real("statistic", function(self.weights)))
        spread = np.array([np.atleast_1d(as_real("statistic of a replica", function(w))) for w in self.replicas])
        require_finite("statistic", values)
        require_finite("statistic of a replica", spread)
        return values, np.atleast_2d(np.cov(spread, rowvar=False))

    def histogram(self, edges: ArrayLike, column: int = 0) -> tuple[Array, Array]:
        """Counts (q,) and covariance (q, q) of one truth in bins (q + 1,).   Raises: ShapeError, DataError, SettingError.

        Read: bins should be wider than the resolution and the spacing of the points.
        """
        bins = check_edges("edges", edges)
        x = self.points[:, require_int("column", column, low=0, high=self.points.shape[1] - 1)]
        return self.statistic(lambda w: np.histogram(x, bins, weights=w)[0])

    def to_hist(self, edges: ArrayLike, column: int = 0) -> Any:
        """Counts and variances in bins as a `hist` or `boost-histogram` object.   Raises: as `histogram`, SbiPhysError."""
        return to_hist(edges, *self.histogram(edges, column))

    def summary(self) -> str:
        """Return the result in words."""
        moments = ", ".join(f"{m:.4g} +- {s:.4g}" for m, s in zip(self.mean, self.sd, strict=True))
        return (
            f"forward unfolding at {len(self.points)} truth points, {self.n_iterations} iterations: {self.total:.6g} events,"
            f" mean and width of the truth {moments}; {len(self.replicas)} replicas"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityFit:
    """Parameters of a density of the truth, fitted through the detector.

    names (p). values, errors (p,), covariance (p, p), from Hesse. log_likelihood. efficiency, mean over the fitted density; total and
    total_error, number of true events: measured over efficiency, with the errors of both.
    """

    names: tuple[str, ...]
    values: Array
    errors: Array
    covariance: Array
    log_likelihood: float
    efficiency: float
    total: float
    total_error: float

    def summary(self) -> str:
        """Return the result in words."""
        lines = [
            f"forward fit of a density: log likelihood {self.log_likelihood:.6g}, {self.total:.6g} +- {self.total_error:.3g} true events"
        ]
        lines += [f"  {name:<8} {v:.5g} +- {e:.3g}" for name, v, e in zip(self.names, self.values, self.errors, strict=True)]
        return "\n".join(lines)


def points_of(support: ArrayLike | int, truth: Array, seed: int) -> tuple[Array, Array]:
    """Truth points (s, d) and their volumes (s,).

    Args: support: points, or how many: a regular grid over the range of truth (n, 1), a Sobol sequence over the box of truth (n, d).
    Raises: SettingError, ShapeError, DataError (points outside of the simulated range: the network was not trained there).
    """
    low, high = truth.min(axis=0), truth.max(axis=0)
    d = truth.shape[1]
    if isinstance(support, int | np.integer) and not isinstance(support, bool):
        n = require_int("support", support, low=2)
        if d == 1:
            return _with_volume(np.linspace(low[0], high[0], n)[:, None], low, high)
        from scipy.stats.qmc import Sobol

        # a power of two keeps the sequence balanced
        unit = Sobol(d, seed=np.random.default_rng(seed_for(seed, "support"))).random_base2(int(np.ceil(np.log2(n))))
        return _with_volume(low + unit * (high - low), low, high)
    points = as_columns("support", support)
    if points.shape[1] != d:
        raise ShapeError(f"support has {points.shape[1]} columns; expected {d}, those of truth")
    if len(points) < 2:
        raise ShapeError(f"support has {len(points)} points; expected at least 2")
    outside = ((points < low) | (points > high)).any(axis=1)
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"support has {outside.sum()} of {len(points)} points outside of the simulated truths, first {points[i].tolist()};"
            f" expected within {low.tolist()} to {high.tolist()}, where the detector was learned"
        )
    return _with_volume(points, low, high)


def _with_volume(points: Array, low: Array, high: Array) -> tuple[Array, Array]:
    if points.shape[1] > 1:
        return points, np.full(len(points), float(np.prod(high - low)) / len(points))
    order = np.argsort(points[:, 0])
    x = points[order, 0]
    width = np.empty(len(x))
    width[order] = np.gradient(x) if len(x) > 1 else 1.0  # trapezoids: half a step at the ends
    width[order[0]], width[order[-1]] = (x[1] - x[0]) / 2, (x[-1] - x[-2]) / 2
    return points, width


def fit_weights(
    kernel: Kernel, n_iterations: int | None, widths: Array, n_boot: int, rng: np.random.Generator, task: Task
) -> UnfoldedTruth:
    """Expectation maximisation from a flat density, and again on bootstrapped data.   Raises: DataError (efficiency 0 everywhere)."""
    # of many events gathered on a node the sum is Poisson, in units of the mean weight
    scale = float((kernel.weights**2).sum() / kernel.weights.sum())
    seldom = float(kernel.efficiency.max()) * math.sqrt(scale / kernel.counts.sum())
    usable = kernel.efficiency > max(min(seldom, SELDOM), 1e-6)
    if usable.sum() < 2:
        raise DataError(f"the efficiency is above 0 at {usable.sum()} of {usable.size} truth points; expected at least 2")
    smear = _smoother(kernel.points[usable], widths) if (widths > 0).all() else None
    effective, volume = kernel.efficiency[usable], kernel.volume[usable]
    values = kernel.values[:, usable] * effective

    def start(counts: Array) -> Array:
        return np.asarray(counts.sum(axis=-1, keepdims=True) * volume / (volume @ effective))

    if n_iterations is None:
        parts = _folds(kernel.counts / scale, rng)
        n_iterations = _best(parts, start(parts.sum(axis=0) - parts), values, effective, smear)
    omega, history = start(kernel.counts), list[float]()
    for k in range(n_iterations + 1):
        f = omega @ values.T
        history.append(float(kernel.counts @ (np.log(f) + kernel.offset)) - float(omega @ effective))
        if k < n_iterations:
            omega = _step(omega, kernel.counts / f, values, effective, smear)
    task.advance()
    # each event is drawn Poisson(1) times
    counts = scale * rng.poisson(np.tile(kernel.counts / scale, (n_boot, 1))).astype(np.float64)
    again = start(counts)
    for _ in range(len(history) - 1 if n_boot else 0):
        again = _step(again, counts / (again @ values.T), values, effective, smear)
    task.advance(n_boot)
    weights, replicas = np.zeros(usable.size), np.zeros((n_boot, usable.size))
    weights[usable], replicas[:, usable] = omega, again
    return UnfoldedTruth(points=kernel.points, weights=weights, replicas=replicas, log_likelihood=np.array(history))


def _folds(counts: Array, rng: np.random.Generator) -> Array:
    """Whole events (m,) shared out at random, (FOLDS, m); parts of an event are rounded at random."""
    left = np.floor(counts + rng.random(counts.size)).astype(np.int64)
    parts = np.empty((FOLDS, counts.size))
    for i in range(FOLDS):
        drawn = rng.binomial(left, 1 / (FOLDS - i))
        parts[i], left = drawn, left - drawn
    return parts


def _best(parts: Array, omega: Array, values: Array, effective: Array, smear: Array | None) -> int:
    """Iterations after which events left out, (FOLDS, m), are likeliest under the fit to the others, which starts from omega (FOLDS, s)."""
    others, best, reached = parts.sum(axis=0) - parts, 1, -np.inf
    for k in range(1, MOST + 1):
        omega = _step(omega, others / np.maximum(omega @ values.T, 1e-300), values, effective, smear)
        density = omega @ values.T / (omega @ effective)[:, None]
        score = float((parts * np.log(np.maximum(density, 1e-300))).sum())
        if score > reached + GAIN:
            best, reached = k, score
        elif k > PATIENCE * best + 10:
            break
    return best


def _step(omega: Array, ratio: Array, values: Array, effective: Array, smear: Array | None) -> Array:
    omega = np.maximum(omega * (ratio @ values) / effective, 1e-250)
    return omega if smear is None else np.asarray(omega @ smear.T)


def _smoother(points: Array, widths: Array) -> Array:
    """Matrix (s, s) that spreads the count of each point over its neighbours and keeps the total."""
    squared = (((points[:, None] - points[None]) / widths) ** 2).sum(axis=2)
    kernel = np.exp(-0.5 * squared)
    return np.asarray(kernel / kernel.sum(axis=0))


def minimise_density(kernel: Kernel, density: Density, start: ArrayLike, names: Sequence[str]) -> DensityFit:
    """Fit the parameters of a density by Minuit.   Raises: ShapeError, SettingError, DataError, ConvergenceError, SbiPhysError."""
    try:
        from iminuit import Minuit
    except ImportError as err:
        raise SbiPhysError("fit_density needs iminuit, which is not installed; expected `pip install iminuit`") from err
    theta0, labels = as_array("start", start, (None,)), tuple(names)
    if theta0.size != len(labels) or len(set(labels)) != len(labels):
        raise ShapeError(f"start has {theta0.size} values and names {labels}; expected as many different names as values")
    counts = kernel.counts.sum()

    def content(theta: Array) -> Array:
        f = as_array("density(t, phi)", density(kernel.points, theta), (len(kernel.points),), finite=False)
        return np.where(np.isfinite(f) & (f > 0), f, 0.0) * kernel.volume * kernel.efficiency

    def cost(theta: Array) -> float:
        f = content(theta)
        seen = f.sum()
        if not np.isfinite(seen) or seen <= 0:
            return 1e15  # nothing of this density would be measured
        return float(-kernel.counts @ (np.log(np.maximum(kernel.values @ f, 1e-300) / seen) + kernel.offset))

    if not cost(theta0) < 1e15:
        raise SettingError(f"density is 0 at all truth points for start = {theta0.tolist()}; expected a start where events can be measured")
    fit: Any = Minuit(cost, theta0, name=labels)
    fit.errordef = Minuit.LIKELIHOOD
    fit.migrad(ncall=20_000)
    if not fit.valid:
        fit.simplex()
        fit.migrad(ncall=20_000)
    fit.hesse()
    if not fit.valid or fit.covariance is None:
        got = ", ".join(f"{n} = {v:.4g}" for n, v in zip(labels, fit.values, strict=True))
        raise ConvergenceError(
            f"fit_density did not converge, it ended at {got}; expected a start near the answer and parameters data can tell"
        )
    # a sum over weighted events has the variance of sum w^2
    covariance = np.array(fit.covariance) * float((kernel.weights**2).sum() / kernel.weights.sum())
    values = np.array(fit.values)
    return _with_total(kernel, content, values, covariance, labels, -float(fit.fval), float(counts))


def _with_total(
    kernel: Kernel, content: Callable[[Array], Array], values: Array, covariance: Array, names: tuple[str, ...], best: float, counts: float
) -> DensityFit:
    def seen_share(theta: Array) -> float:
        f = content(theta)
        return float(f.sum() / (f / np.maximum(kernel.efficiency, 1e-12)).sum())

    errors = np.sqrt(np.diag(covariance))
    share, slope = seen_share(values), np.empty(errors.size)
    for i, error in enumerate(errors):
        step = np.zeros(errors.size)
        step[i] = 0.1 * error
        slope[i] = (seen_share(values + step) - seen_share(values - step)) / (0.2 * error)
    relative = float((kernel.weights**2).sum()) / counts**2 + float(slope @ covariance @ slope) / share**2
    return DensityFit(
        names=names,
        values=values,
        errors=errors,
        covariance=covariance,
        log_likelihood=best,
        efficiency=share,
        total=counts / share,
        total_error=counts / share * float(np.sqrt(relative)),
    )
