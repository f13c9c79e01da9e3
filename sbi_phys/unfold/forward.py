r"""Forward unfolding: learn the detector p(reco | truth), then fit the spectrum of the truth to the data through it.

    minimise  sum_i w_i [ -log q(r_i | t_i) ]  over reconstructed simulated events ,   eps(t) = P(reconstructed | t)

The response of a detector to a given truth does not depend on the spectrum that was simulated: q and eps are the same for any simulated
spectrum that covers the truths that occur. The spectrum is then fitted by maximum likelihood, and the simulation's prior does not enter:

    p(r | reconstructed) = int f(t) eps(t) q(r | t) dt / int f(t) eps(t) dt

- `unfold`: weights on truth points by expectation maximisation, without bins, in any dimension;
- `response`: q and eps integrated over bins, for `bayesian_unfold`, `ibu`, `tikhonov` and `forward_fold`;
- `fit_density`: a density f(t; phi) with a few parameters and their errors.

Truth and reco are standardised with the simulation's mean and standard deviation; take logarithms of steep quantities. Outside of the
simulated truths q would be an extrapolation, which is refused.

Expectation maximisation (Richardson-Lucy) of counts omega_i at truth points t_i, with K[e, i] = eps_i q(r_e | t_i):

    omega_i <- (omega_i / eps_i) sum_e w_e K[e, i] / sum_l omega_l K[e, l]
    log L = sum_e w_e log sum_i omega_i K[e, i] - sum_i omega_i eps_i

The likelihood rises at every step, and its maximum does not depend on the start. Before convergence, details finer than the resolution
are those of the start, which is flat. With `smoothing` the weights pass through a normalised Gaussian kernel between iterations.

At the maximum one outlying event can be explained by truths that are hardly ever reconstructed, each of which stands for 1/eps unseen
events, so that it changes all moments. Two limits prevent this. Truths with eps below 1/sqrt(N) of the largest, where one event of N
would count for more than the total error, are left out. And the iterations stop where the likelihood of held-out events (five folds) is
highest.

Parameters are fitted by minimising -sum_e w_e log [ sum_i v_i f_i K[e, i] / sum_i v_i f_i eps_i ], with v_i the volume of point i.

Source: SPINUP, arXiv:2507.15084; Shepp & Vardi 1982 (EM); Silverman+ 1990, J. R. Stat. Soc. B 52, 271 (EM with smoothing).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from scipy.special import expit, ndtr

from sbi_phys.core.checks import as_array, as_real, require_finite, require_int, require_number
from sbi_phys.core.errors import ConvergenceError, DataError, SbiPhysError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for, seed_for, torch_rng_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.nets.posterior import PosteriorNet, encode_net, log_prob_nets, sample_net
from sbi_phys.unfold._inputs import as_columns, as_weights, bin_name, check_edges, check_overlap
from sbi_phys.unfold._learned import LearnedUnfolder, PairScaler
from sbi_phys.unfold.classifier import RatioEstimator
from sbi_phys.unfold.histograms import to_hist
from sbi_phys.unfold.response import Response

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DensityFit", "ForwardUnfolder", "Kernel", "UnfoldedTruth", "fit_weights", "minimise_density", "points_of"]


Density = Callable[[Array, Array], ArrayLike]

MOST, FOLDS, PATIENCE = 1000, 5, 1.5  # largest number of iterations; folds; iterations tried, relative to the best number so far

SELDOM = 0.05  # upper limit of the relative efficiency below which points are left out, for few events

GAIN = 0.5  # gain in log likelihood of the held-out events that justifies more iterations


class Kernel(NamedTuple):
    """The learned detector between data and truth points.

    values (m, s) = q(r_e | t_i) / exp(offset_e), offset (m,). efficiency (s,). counts (m,); weights, of the single events.
    points (s, d). volume (s,) of each point, for integrals.
    """

    values: Array
    offset: Array
    efficiency: Array
    counts: Array
    weights: Array
    points: Array
    volume: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfoldedTruth(Result):
    """Counts at truth points.

    points (s, d). weights (s,), counts corrected for efficiency. replicas (n_replicas, s), of bootstrapped data. log_likelihood (k + 1,),
    of the start and after every iteration, up to a constant.

    >>> import numpy as np
    >>> from sbi_phys.training import TrainConfig
    >>> from sbi_phys.unfold import ForwardUnfolder
    >>> rng, quick = np.random.default_rng(1), TrainConfig(max_epochs=1)
    >>> truth = rng.normal(size=120)
    >>> reco, data = truth + 0.3 * rng.normal(size=120), rng.uniform(-1.5, 1.5, size=100)
    >>> unfolder = ForwardUnfolder(flow="affine", config=quick, device="cpu").fit(truth, reco)
    >>> result = unfolder.unfold(data, support=32, n_iterations=3, n_replicas=5)
    >>> round(result.total), result.replicas.shape
    (100, (5, 32))
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
            raise SettingError(f"there are {len(self.replicas)} replicas; expected n_replicas >= 2 in `unfold` for a covariance")
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

    def rows(self) -> Rows:
        """Return the table: one row for each truth point, with its counts and their error by bootstrap."""
        points = {f"truth_{j}": self.points[:, j] for j in range(self.points.shape[1])}
        spread = {"counts_err": self.replicas.std(axis=0, ddof=1)} if len(self.replicas) > 1 else {}
        return Rows.of(points | {"counts": self.weights} | spread)

    def summary(self) -> str:
        """Return the result in words."""
        moments = ", ".join(f"{m:.4g} +- {s:.4g}" for m, s in zip(self.mean, self.sd, strict=True))
        return (
            f"forward unfolding at {len(self.points)} truth points, {self.n_iterations} iterations: {self.total:.6g} events,"
            f" mean and width of the truth {moments}; {len(self.replicas)} replicas"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the log likelihood after each iteration, relative to the last."""
        return figures.results.trace(self.log_likelihood - self.log_likelihood[-1], ax, ylabel="log likelihood - last [nats]")


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityFit(Result):
    """Parameters of a density of the truth, fitted through the detector.

    names (p). values, errors (p,), covariance (p, p), from Hesse. log_likelihood. efficiency, mean over the fitted density; total and
    total_error, number of true events: measured over efficiency, with the errors of both.

    >>> import numpy as np
    >>> from sbi_phys.training import TrainConfig
    >>> from sbi_phys.unfold import ForwardUnfolder
    >>> rng, quick = np.random.default_rng(1), TrainConfig(max_epochs=1)
    >>> truth = rng.normal(size=120)
    >>> reco, data = truth + 0.3 * rng.normal(size=120), rng.uniform(-1.5, 1.5, size=100)
    >>> unfolder = ForwardUnfolder(flow="affine", config=quick, device="cpu").fit(truth, reco)
    >>> fit = unfolder.fit_density(data, lambda t, phi: np.exp(-0.5 * (t[:, 0] - phi[0]) ** 2), [0.0], ["mean"])
    >>> fit.names, round(fit.total)
    (('mean',), 100)
    """

    names: tuple[str, ...]
    values: Array
    errors: Array
    covariance: Array
    log_likelihood: float
    efficiency: float
    total: float
    total_error: float

    def rows(self) -> Rows:
        """Return the table: one row for each parameter."""
        return Rows.of({"name": self.names, "value": self.values, "value_err": self.errors})

    def summary(self) -> str:
        """Return the result in words."""
        lines = [
            f"forward fit of a density: log likelihood {self.log_likelihood:.6g}, {self.total:.6g} +- {self.total_error:.3g} true events"
        ]
        lines += [f"  {name:<8} {v:.5g} +- {e:.3g}" for name, v, e in zip(self.names, self.values, self.errors, strict=True)]
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the fitted values with their errors, in units of the errors."""
        return figures.results.forest(self.names, self.values / self.errors, np.ones(len(self.names)), ax, line=0.0, xlabel="value / error")


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
    kernel: Kernel, n_iterations: int | None, widths: Array, n_replicas: int, rng: np.random.Generator, task: Task
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
    counts = scale * rng.poisson(np.tile(kernel.counts / scale, (n_replicas, 1))).astype(np.float64)
    again = start(counts)
    for _ in range(len(history) - 1 if n_replicas else 0):
        again = _step(again, counts / (again @ values.T), values, effective, smear)
    task.advance(n_replicas)
    weights, replicas = np.zeros(usable.size), np.zeros((n_replicas, usable.size))
    weights[usable], replicas[:, usable] = omega, again
    return UnfoldedTruth(points=kernel.points, weights=weights, replicas=replicas, log_likelihood=np.array(history))


def _folds(counts: Array, rng: np.random.Generator) -> Array:
    """Events (m,) assigned to folds at random, (FOLDS, m); fractional counts are rounded at random."""
    left = np.floor(counts + rng.random(counts.size)).astype(np.int64)
    parts = np.empty((FOLDS, counts.size))
    for i in range(FOLDS):
        drawn = rng.binomial(left, 1 / (FOLDS - i))
        parts[i], left = drawn, left - drawn
    return parts


def _best(parts: Array, omega: Array, values: Array, effective: Array, smear: Array | None) -> int:
    """Number of iterations with the highest likelihood of held-out events (FOLDS, m) under the fit to the others, from omega (FOLDS, s)."""
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
            return 1e15  # no event of this density would be measured
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
            f"fit_density did not converge, it ended at {got}; expected a start near the answer and parameters that the data determine"
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


MAX_PAIRS = 30_000_000  # of data and truth points: 240 MB

GRID = 1024  # nodes that one reco quantity is gathered on, where there are more events

NODES = 12  # Gauss-Legendre points in a truth bin

_ROWS = 262_144


class ForwardUnfolder(LearnedUnfolder):
    """Conditional flow q(reco | truth) and efficiency eps(truth); then the truth's spectrum by maximum likelihood.

    Args: seed: of weights, splits and order. flow: 'spline', 'affine', 'maf' or a FlowConfig. embedding: of truth, None, an
    EmbeddingConfig or a module. n_ensemble: networks, whose densities are averaged. device: 'auto' takes CUDA where there is one. config:
    of every training; None chooses batches and epochs from the number of events.
    Raises: SettingError.

    `save(path)` writes the detector, with the truths that it was learned from, and `sp.load(path)` reads it.

    >>> import numpy as np
    >>> from sbi_phys.training import TrainConfig
    >>> from sbi_phys.unfold import ForwardUnfolder
    >>> rng, quick = np.random.default_rng(1), TrainConfig(max_epochs=1)
    >>> truth = rng.normal(size=120)
    >>> reco, data = truth + 0.3 * rng.normal(size=120), rng.uniform(-1.5, 1.5, size=100)
    >>> unfolder = ForwardUnfolder(flow="affine", config=quick, device="cpu").fit(truth, reco)
    >>> unfolder.response([-1, 0, 1], [-2, -1, 0, 1, 2]).matrix.shape
    (4, 2)
    """

    _acceptance: RatioEstimator | None = None
    _intercept = 0.0

    def build(self, scaler: PairScaler, seed: int) -> PosteriorNet:
        """Flow of reco, given truth."""
        return PosteriorNet(scaler.reco.shape[0], scaler.truth.shape, self.flow, self.embedding, seed=seed)

    def state(self) -> dict[str, Any]:
        """Simulated truths and their weights, range of the reco, and the classifier of the efficiency."""
        arrays = {name: torch.from_numpy(getattr(self, f"_{name}")) for name in ("truth", "truth_weights", "reco_range")}
        return arrays | {"acceptance": None if self._acceptance is None else self._acceptance.state(), "intercept": self._intercept}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self._truth, self._truth_weights, self._reco_range = (state[k].numpy() for k in ("truth", "truth_weights", "reco_range"))
        self._acceptance, self._intercept = None, state["intercept"]
        if state["acceptance"] is not None:
            self._acceptance = self._new_acceptance()
            self._acceptance.set_state(state["acceptance"])

    @property
    def losses(self) -> tuple[float, ...]:
        """Best held-out -log q per event of each network, in units of the standardised reco."""
        return tuple(min(record["valid"] for record in member) for member in self.history)

    def fit(
        self,
        truth: ArrayLike,
        reco: ArrayLike,
        reco_pass: ArrayLike | None = None,
        *,
        weights: ArrayLike | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn q(reco | truth) from reconstructed events and eps(truth) from all.

        Args: truth (n, d), reco (n, k). reco_pass (n,): reconstructed; where False, reco may be NaN. weights (n,) >= 0.
        checkpoint: path prefix, one file per network; an interrupted training continues from there.
        Raises: ShapeError, NonFiniteError, DataError (too few events, negative weights), TrainingError, ModelFileError (a checkpoint of
        another training).
        Read: `losses`; `history`, of each network, a dictionary per epoch.
        """
        with self._all_or_nothing(), or_none(progress).task("learn the detector", self.n_ensemble + 1) as task:
            t, r, seen, own, keep = self._pairs(truth, reco, reco_pass, weights)
            self._truth, self._truth_weights = t, own
            self._reco_range = np.stack([r[keep].min(axis=0), r[keep].max(axis=0)])
            rows = self._scaler.reco.apply(r[keep]), self._scaler.truth.apply(t[keep])
            self._nets, self.history = [], []
            for m in range(self.n_ensemble):
                self._nets.append(self._new_net(self._scaler, seed_for(self.seed, "member", m)))
                self.history.append(self._train_further(self._nets[m], rows, own[keep], (16, 5e-3), checkpoint, m))
                task.advance(1, text=f"loss {self.losses[-1]:.3f}")
            self._acceptance = self._learn_acceptance(t, seen, own)
            task.advance()
        return self

    def _learn_acceptance(self, t: Array, seen: Mask, own: Array) -> RatioEstimator | None:
        if own[~seen].sum() == 0:
            return None
        ratio = self._new_acceptance()
        found = ratio.fit(t, np.where(seen, own, 0.0), np.where(seen, 0.0, own))
        # a ratio is scaled so that it sums to one over the missed events, of which there are none where nearly all are seen; as log odds
        # the classifier's own constant is the right one
        self._intercept = math.log(found.norm)
        return ratio

    def _new_acceptance(self) -> RatioEstimator:
        n_inputs, seed = self._truth.shape[1], seed_for(self.seed, "acceptance")
        return RatioEstimator(n_inputs, seed=seed, n_ensemble=self.n_ensemble, device=self.device)

    def efficiency(self, truth: ArrayLike) -> Array:
        """eps(truth) (n,), P(reconstructed | truth), from a classifier of reconstructed against missed; 1 if none was missed.

        Raises: SettingError (not trained), ShapeError, NonFiniteError.
        """
        t, _ = self._check("truth", truth, "truth")
        return np.ones(len(t)) if self._acceptance is None else np.asarray(expit(self._acceptance.log_ratio(t) + self._intercept))

    def sample(self, truth: ArrayLike, n: int = 1, *, seed: int = 0) -> Array:
        """Draw n reconstructions of each truth (m, d) -> (m, n, k), given that it is reconstructed.   Raises: as `efficiency`."""
        (t, inputs), n = self._check("truth", truth, "truth"), require_int("n", n, low=1)
        scaler = self._scaler.reco
        owner = rng_for(seed, "members").integers(self.n_ensemble, size=(len(t), n))
        out = np.empty((len(t), n, *scaler.shape))
        for m, net in enumerate(self._nets):
            drawn = sample_net(net, inputs, n, torch_rng_for(seed, "draws", m, device=self.device)).double().numpy()
            out = np.where((owner == m)[:, :, None], drawn, out)
        return np.asarray(scaler.mean + scaler.scale * out)

    def log_likelihood(self, reco: ArrayLike, truth: ArrayLike) -> Array:
        """log q(reco | truth) of paired rows reco (n, k), truth (n, d) -> (n,), in the reco's units.   Raises: as `efficiency`."""
        (r, _), (t, inputs) = self._check("reco", reco, "reco"), self._check("truth", truth, "truth")
        if len(r) != len(t):
            raise ShapeError(f"reco has {len(r)} rows and truth {len(t)}; expected pairs")
        return self._log_prob(r, self._scaler.reco, inputs)

    def response(
        self,
        truth_edges: ArrayLike,
        reco_edges: ArrayLike,
        *,
        spectrum_index: float | None = None,
        background: ArrayLike | None = None,
        exposure: float | None = None,
    ) -> Response:
        r"""Integrate the learned detector over bins, P[j, mu] = int_mu w(t) eps(t) Q_j(t) dt / int_mu w(t) dt, of one truth and one reco.

        Q_j(t) is the probability of the reco bin, from the distribution function of the flow, without draws or bins.

        Args: truth_edges, reco_edges in the units of truth and reco. spectrum_index g: then truth is lg(E) and w = E^(1 - g) within a bin;
            None: w = 1. background (n_reco,), counts. exposure, km2 sr yr.
        Returns: Response; n_simulated, the training events of each truth bin: the noise of a matrix filled with them, which a smooth
            network is below.
        Raises: SettingError (several truths or recos), DataError (a truth bin without training events: named), ShapeError.
        """
        n_truth, n_reco = (scaler.shape[0] for scaler in (self._require_fit().truth, self._scaler.reco))
        if n_truth != 1 or n_reco != 1:
            dims = f"{n_truth} truth and {n_reco} reco quantities"
            raise SettingError(f"the detector has {dims}; expected one of each for a matrix, use `unfold` or `fit_density`")
        bins_t, bins_r = check_edges("truth_edges", truth_edges), check_edges("reco_edges", reco_edges)
        index = None if spectrum_index is None else require_number("spectrum_index", spectrum_index)
        total = np.histogram(self._truth[:, 0], bins_t, weights=self._truth_weights)[0]
        squares = np.histogram(self._truth[:, 0], bins_t, weights=self._truth_weights**2)[0]
        if (total <= 0).any():
            place = bin_name("truth", int(np.flatnonzero(total <= 0)[0]), bins_t)
            raise DataError(
                f"no training events in {place}; expected some, the network only extrapolates there: drop the bin or simulate it"
            )
        u, v = np.polynomial.legendre.leggauss(NODES)
        t = bins_t[:-1, None] + np.diff(bins_t)[:, None] * (u + 1) / 2
        w = np.tile(v / 2, (len(t), 1)) if index is None else v / 2 * 10.0 ** ((1 - index) * (t - bins_t[0]))
        inside = np.diff(self._distribution(t.ravel(), bins_r), axis=1) * self.efficiency(t.ravel())[:, None]
        matrix = np.einsum("mqj,mq->jm", inside.reshape(*t.shape, -1), w) / w.sum(axis=1)
        return Response(
            np.maximum(matrix, 0.0),
            bins_t,
            bins_r,
            n_simulated=total**2 / squares,
            truth=None if index is None else w.sum(axis=1) * np.diff(bins_t),
            background=np.zeros(bins_r.size - 1) if background is None else np.asarray(background, dtype=np.float64),
            exposure=exposure,
        )

    def _distribution(self, t: Array, edges: Array) -> Array:
        """P(reco < edge | t) (n, k) of t (n,), edges (k,): in one dimension the flow's base coordinate rises with reco."""
        inputs = self._scaler.truth.apply(t[:, None]).to(self.device)
        owner = torch.arange(len(t), device=self.device).repeat_interleave(len(edges))
        u = self._scaler.reco.apply(np.tile(edges, len(t))[:, None]).to(self.device)
        parts = [ndtr(encode_net(net, u, inputs, owner)[0][:, 0].double().cpu().numpy()) for net in self._nets]
        return np.asarray(np.mean(parts, axis=0).reshape(len(t), len(edges)))

    def unfold(
        self,
        data: ArrayLike,
        *,
        support: ArrayLike | int = 256,
        n_iterations: int | None = None,
        smoothing: float | None = None,
        data_weights: ArrayLike | None = None,
        n_replicas: int = 50,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> UnfoldedTruth:
        r"""Maximise sum_e log sum_i omega_i eps_i q(r_e | t_i) - sum_i omega_i eps_i over counts omega_i >= 0 at truth points t_i.

        Args: data (m, k). support: truth points (s, d), or how many: equally spaced (one truth) or quasi-random over the simulated range.
            n_iterations of expectation maximisation; None: the number with the highest held-out likelihood (five folds), at most 1000.
            smoothing: width of a Gaussian kernel between iterations, in standard deviations of the simulated truth; None = 0.
            data_weights (m,). n_replicas: replicas of the data for the errors, each unfolded with the same number of iterations.
        Returns: UnfoldedTruth; its weights are in counts, corrected for efficiency; 0 where that is below 1/sqrt(events) of its largest.
        Raises: SettingError, ShapeError, NonFiniteError, DataError (no overlap, points outside of the simulated truths).
        Read: without smoothing the maximum-likelihood spectrum consists of spikes: take means, widths and wide bins from it, or use
            `response` with `bayesian_unfold`. Its errors hold the data's statistics, not the training's.
        """
        kernel = self._kernel(data, data_weights, support, seed)
        steps = None if n_iterations is None else require_int("n_iterations", n_iterations, low=1)
        width = 0.0 if smoothing is None else require_number("smoothing", smoothing, low=0)
        n_replicas = require_int("n_replicas", n_replicas, low=0)
        with or_none(progress).task("expectation maximisation", 1 + n_replicas) as task:
            return fit_weights(kernel, steps, width * self._scaler.truth.scale, n_replicas, rng_for(seed, "bootstrap forward"), task)

    def fit_density(
        self,
        data: ArrayLike,
        density: Density,
        start: ArrayLike,
        names: Sequence[str],
        *,
        support: ArrayLike | int = 512,
        data_weights: ArrayLike | None = None,
        seed: int = 0,
    ) -> DensityFit:
        r"""Fit f(t; phi) by maximum likelihood, sum_e log [ int f eps q(r_e | t) dt / int f eps dt ], through the learned detector.

        Args: data (m, k). density: f(t (s, d), phi (p,)) -> (s,) >= 0, of any normalisation; it is taken to end with the simulated truths.
            start (p,), names (p). support: points of the quadrature (number, or a regular grid (s, 1) of one truth). data_weights (m,).
        Returns: DensityFit with values, errors (Hesse) and the number of true events.
        Raises: SettingError, ShapeError, NonFiniteError, DataError, ConvergenceError, SbiPhysError (iminuit is not installed).
        """
        return minimise_density(self._kernel(data, data_weights, support, seed), density, start, names)

    def _kernel(self, data: ArrayLike, data_weights: ArrayLike | None, support: ArrayLike | int, seed: int) -> Kernel:
        """eps_i q(r_e | t_i) (m, s) of data and truth points; many events of one reco quantity are gathered on a fine grid first."""
        r, _ = self._check("data", data, "reco")
        if len(r) == 0:
            raise DataError("data has no rows; expected at least one event")
        w = as_weights("data_weights", data_weights, len(r), "data")
        check_overlap(r, self._reco_range)
        points, volume = points_of(support, self._truth, seed)
        r, counts = gathered(r[:, 0], w, GRID) if r.shape[1] == 1 and len(r) > GRID else (r, w)
        if len(r) * len(points) > MAX_PAIRS:
            raise SettingError(
                f"{len(r)} events x {len(points)} truth points = {len(r) * len(points)} pairs; expected at most {MAX_PAIRS}: fewer points,"
                " or events gathered in fine bins with data_weights"
            )
        inputs, targets = self._scaler.truth.apply(points).to(self.device), self._scaler.reco.apply(r).to(self.device)
        shape = (len(r), len(points))
        out = np.empty(shape)
        for rows in np.array_split(np.arange(len(r)), max(1, math.ceil(out.size / _ROWS))):
            if len(rows):
                u = targets[torch.from_numpy(rows).to(self.device)].repeat_interleave(len(points), dim=0)
                owner = torch.arange(len(points), device=self.device).repeat(len(rows))
                out[rows] = log_prob_nets(self._nets, u, inputs, owner).reshape(len(rows), -1)
        # a constant per event takes no part in the fit and keeps far tails from underflowing
        top = out.max(axis=1)
        offset = top - np.log(self._scaler.reco.scale).sum()
        return Kernel(np.exp(out - top[:, None]), offset, self.efficiency(points), counts, w, points, volume)


def gathered(values: Array, weights: Array, n: int) -> tuple[Array, Array]:
    """Share each value (m,) between its two neighbours on n equally spaced nodes: mean and total are kept -> nodes (n, 1), weights (n,)."""
    nodes = np.linspace(values.min(), values.max(), n)
    place = (values - nodes[0]) / (nodes[1] - nodes[0])
    left = np.clip(place.astype(np.int64), 0, n - 2)
    share = place - left
    total = np.bincount(left, weights * (1 - share), n) + np.bincount(left + 1, weights * share, n)
    return np.asarray(nodes[total > 0][:, None]), np.asarray(total[total > 0], dtype=np.float64)
