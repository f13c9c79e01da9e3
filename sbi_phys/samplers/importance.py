r"""Importance sampling: draws of an approximate density, weighted so that they represent the exact one.

With draws u_i ~ q and an unnormalised target p~ = Z p,

    w_i = p~(u_i) / q(u_i),   Z = E_q[w] ~ mean(w),   E_p[f] ~ sum w_i f(u_i) / sum w_i,   ESS = (sum w)^2 / sum w^2.

The relative error of Z is sqrt((1/ESS - 1/n) n/(n-1)). ESS and errors are valid only if the tail of the weights is light enough: a
generalised Pareto distribution is fitted to the largest weights, and its shape k says how many moments they have. For k < 0.5 their
variance is finite; for k < 0.7 the result is still reliable with Pareto smoothing; above, neither ESS nor errors are valid.

Source: Vehtari, Simpson, Gelman, Yao & Gabry, arXiv:1507.02646 (k and smoothing); Zhang & Stephens 2009, Technometrics 51, 316 (the fit).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy.special import logsumexp

from sbi_phys.core.checks import as_array, require_choice, require_int, require_number
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.results import Result, Rows, draws_rows
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.samplers.density import LogDensity, require_log_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ImportanceResult", "Proposal", "effective_size", "importance_sample", "pareto_smooth", "resample_indices"]


class Proposal(Protocol):
    """A density to draw from: `sample(n, rng) -> u (n, d)` and its normalised `log_prob(u (n, d)) -> (n,)`.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> class Normal:
    ...     def sample(self, n, rng):
    ...         return rng.standard_normal((n, 1))
    ...     def log_prob(self, u):
    ...         return -0.5 * u[:, 0] ** 2 - 0.5 * np.log(2 * np.pi)
    >>> sp.samplers.importance_sample(lambda u: -0.5 * (u[:, 0] - 0.5) ** 2, Normal(), 2000).reliable
    True
    """

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw u (n, d)."""
        ...

    def log_prob(self, u: Array) -> Array:
        """Log density of u (n, d) -> (n,), normalised, finite at every draw of `sample`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceResult(Result):
    r"""Weighted draws, returned by `importance_sample`.

    samples (n, d), in the proposal's space. log_weights (n,), raw log(p~/q); -inf where the target is zero.
    weights (n,), normalised to 1 (after smoothing, if asked for). ess; ess_fraction = ess / n, 1 for a perfect proposal.
    log_evidence, log Z in nats, with log_evidence_err. pareto_k, tail shape: below 0.7 reliable. smoothed, whether weights are.
    n_requested, draws allowed; fewer were made if target_ess was reached earlier.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> q = sp.samplers.Mixture(weights=np.ones(1), means=np.zeros((1, 1)), factors=np.ones((1, 1, 1)))
    >>> result = sp.samplers.importance_sample(lambda u: -0.5 * (u[:, 0] - 0.5) ** 2, q, 2000)
    >>> result.summary().split(":")[0], result.resample(10, np.random.default_rng(0)).shape
    ('Importance sampling, 2000 draws', (10, 1))
    """

    samples: Array
    log_weights: Array
    weights: Array
    ess: float
    ess_fraction: float
    log_evidence: float
    log_evidence_err: float
    pareto_k: float
    smoothed: bool
    n_requested: int

    @property
    def reliable(self) -> bool:
        """Whether ESS and errors are valid, pareto_k < 0.7."""
        return self.pareto_k < 0.7

    def resample(self, n: int, rng: np.random.Generator, *, method: str = "systematic") -> Array:
        """Draw n rows (n, d) of equal weight, in random order; see `resample_indices` for methods and `unique_fraction` for copies.

        Raises: SettingError.
        """
        return self.samples[resample_indices(self.weights, n, rng, method=method)]

    def unique_fraction(self, n: int) -> float:
        """Expected share of distinct rows among n multinomially resampled ones (systematic resampling has at least as many)."""
        return float(-np.expm1(n * np.log1p(-np.minimum(self.weights, 1 - 1e-16))).sum() / n)

    def rows(self) -> Rows:
        """Return the table: one row for each column of the weighted draws, with mean, sd, median and central intervals."""
        return draws_rows(self.samples, [f"u_{j}" for j in range(self.samples.shape[1])], self.weights)

    def summary(self) -> str:
        """Return the result in words."""
        words = "reliable" if self.reliable else "NOT reliable: the proposal misses part of the target"
        return (
            f"Importance sampling, {self.log_weights.size} draws: ESS {self.ess:.0f} ({100 * self.ess_fraction:.1f} %), "
            f"log evidence {self.log_evidence:.3f} +- {self.log_evidence_err:.3f}, Pareto k {self.pareto_k:.2f}: {words}"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the distribution of the weights.   Read: the tail ends far below the number of draws = reliable."""
        return figures.results.importance_weights(self, ax)


def importance_sample(
    log_prob: LogDensity,
    proposal: Proposal,
    n: int,
    *,
    seed: int = 0,
    chunk: int = 10_000,
    target_ess: float | None = None,
    smooth: bool = False,
    progress: Progress | None = None,
) -> ImportanceResult:
    r"""Self-normalised importance sampling of p~(u) = exp log_prob(u) with draws from a proposal.

    Args:
        log_prob: (m, d) -> (m,), unnormalised log density in the proposal's space; -inf outside its support.
        proposal: has .sample(n, rng) -> (n, d) and .log_prob(u) -> (n,), normalised.
        n: most draws.
        seed: chunk i draws from the generator of (seed, i): a larger n begins with the same draws.
        chunk: draws at a time; part of the identity of the result, like the seed.
        target_ess: stop after the first chunk at which the effective sample size is reached.
        smooth: replace the largest weights by their Pareto-smoothed values (less variance, a little bias; evidence included).
        progress: shows draws done and ESS.

    Returns: ImportanceResult.
    Raises: SettingError, ShapeError, NonFiniteError (NaN or +inf, naming the point), DataError (no draw has a positive weight).
    Source: Vehtari et al., arXiv:1507.02646.
    Read: ess_fraction near 1 = the proposal is the posterior; pareto_k > 0.7 = do not use the result.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> q = sp.samplers.Mixture(weights=np.ones(1), means=np.zeros((1, 1)), factors=np.ones((1, 1, 1)))
    >>> result = sp.samplers.importance_sample(lambda u: -0.5 * (u[:, 0] - 0.5) ** 2, q, 4000, seed=1)
    >>> bool(abs(result.weights @ result.samples[:, 0] - 0.5) < 0.1), bool(abs(result.log_evidence - 0.919) < 0.1)
    (True, True)
    """
    n, chunk = require_int("n", n, low=2), require_int("chunk", chunk, low=1)
    enough = math.inf if target_ess is None else require_number("target_ess", target_ess, low=0, open_low=True)
    parts: list[tuple[Array, Array]] = []
    done, ess = 0, 0.0
    with or_none(progress).task("importance sampling", total=n) as task:
        for i in range(-(-n // chunk)):
            size = min(chunk, n - done)
            parts.append(_draw(log_prob, proposal, size, rng_for(seed, "importance", i)))
            done += size
            ess = effective_size(np.concatenate([w for _, w in parts]))
            task.advance(size, text=f"ESS {ess:.0f}")
            if ess >= enough:
                break
    samples, log_weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not np.isfinite(log_weights).any():
        raise DataError(f"all {done} draws of the proposal have log_prob -inf; expected a proposal that overlaps the target")
    return _result(samples, log_weights, smooth, n)


def _draw(log_prob: LogDensity, proposal: Proposal, size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    u = as_array("proposal.sample(n, rng)", proposal.sample(size, rng), (size, None))
    log_q = as_array("proposal.log_prob(u)", proposal.log_prob(u), (size,), finite=False)
    log_p = as_array("log_prob(u)", log_prob(u), (size,), finite=False)
    require_log_density("proposal.log_prob", log_q, u, zero=False)
    require_log_density("log_prob", log_p, u)
    return u, log_p - log_q


def _result(samples: Array, log_weights: Array, smooth: bool, n_requested: int) -> ImportanceResult:
    smoothed, k = pareto_smooth(log_weights)
    used = smoothed if smooth else log_weights
    n, ess = log_weights.size, effective_size(used)
    total = float(logsumexp(used))
    return ImportanceResult(
        samples=samples,
        log_weights=log_weights,
        weights=np.exp(used - total),
        ess=ess,
        ess_fraction=ess / n,
        log_evidence=total - math.log(n),
        log_evidence_err=math.sqrt(max(1 / ess - 1 / n, 0.0) * n / (n - 1)),
        pareto_k=k,
        smoothed=smooth,
        n_requested=n_requested,
    )


def effective_size(log_weights: ArrayLike) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2 of unnormalised log weights (n,); 0 if all are -inf.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> round(sp.samplers.effective_size(np.log([1.0, 1.0, 2.0])), 3)
    2.667
    """
    raw = np.asarray(log_weights, dtype=np.float64)
    top = raw.max(initial=-np.inf)
    if not np.isfinite(top):
        return 0.0
    w = np.exp(raw - top)
    return float(w.sum() ** 2 / (w**2).sum())


def pareto_smooth(log_weights: ArrayLike) -> tuple[Array, float]:
    r"""Pareto-smoothed log weights (n,) and the tail shape k.

    The largest M = min(n/5, 3 sqrt(n)) weights are fitted by a generalised Pareto distribution and replaced by its quantiles,
    not above the largest raw weight. k is inf where fewer than 5 weights form the tail (n < 25, or a few dominate), 0 where
    all weights are equal.

    Raises: ShapeError, NonFiniteError.   Source: Vehtari et al., arXiv:1507.02646; as in the R package loo.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> smoothed, k = sp.samplers.pareto_smooth(np.random.default_rng(0).exponential(0.3, 10_000))
    >>> smoothed.shape, 0.15 < k < 0.45
    ((10000,), True)
    """
    raw = as_array("log_weights", log_weights, (None,), finite=False)
    if np.isnan(raw).any() or np.isposinf(raw).any():
        raise NonFiniteError("log_weights has NaN or +inf; expected finite values or -inf")
    if raw.size < 25 or not np.isfinite(raw).any():
        return raw.copy(), math.inf
    order = np.argsort(raw, kind="stable")
    top = float(raw[order[-1]])
    if top - raw[order[0]] < 1e-10:  # equal up to rounding: a perfect proposal has no tail to fit
        return raw.copy(), 0.0
    # the cutoff is the largest weight outside the tail; weights that vanish against the largest are never part of it
    tail_size = math.ceil(min(raw.size / 5, 3 * math.sqrt(raw.size)))
    cutoff = max(float(raw[order[-tail_size - 1]]) - top, math.log(np.finfo(float).tiny))
    tail = order[raw[order] - top > cutoff]
    if tail.size < 5:
        return raw.copy(), math.inf
    threshold = math.exp(cutoff)
    k, sigma = _fit_pareto(np.exp(raw[tail] - top) - threshold)
    smoothed = raw.copy()
    if math.isfinite(k):
        p = (np.arange(tail.size) + 0.5) / tail.size
        quantiles = -sigma * np.log1p(-p) if abs(k) < 1e-12 else sigma * np.expm1(-k * np.log1p(-p)) / k
        smoothed[tail] = np.minimum(np.log(quantiles + threshold), 0.0) + top
    return smoothed, k


def _fit_pareto(x: Array) -> tuple[float, float]:
    """Shape k and scale sigma of a generalised Pareto distribution, x (m,) ascending and positive: quasi-Bayesian estimate.

    Source: Zhang & Stephens 2009, Technometrics 51, 316, with the weak prior on k of arXiv:1507.02646, appendix C.
    """
    n, n_grid = x.size, 30 + int(math.sqrt(x.size))
    grid = 1 - np.sqrt(n_grid / (np.arange(1, n_grid + 1) - 0.5))
    grid = grid / (3 * x[int(n / 4 + 0.5) - 1]) + 1 / x[-1]
    shapes = np.log1p(-grid[:, None] * x).mean(axis=1)
    log_likelihood = n * (np.log(-grid / shapes) - shapes - 1)
    weights = np.exp(log_likelihood - logsumexp(log_likelihood))
    theta = float((weights * grid).sum())
    k = float(np.log1p(-theta * x).mean())
    sigma = -k / theta
    return (n * k + 5.0) / (n + 10), sigma


def resample_indices(weights: ArrayLike, n: int, rng: np.random.Generator, *, method: str = "systematic") -> Integers:
    """Indices (n,) drawn in proportion to weights (m,), in random order.

    Args: method, 'systematic' (least variance: row i comes floor or ceil of n w_i times) or 'multinomial' (independent draws).
    Raises: SettingError, ShapeError, DataError (weights negative, NaN or all zero).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> np.bincount(sp.samplers.resample_indices(np.array([1.0, 0.0, 3.0]), 8, np.random.default_rng(0))).tolist()
    [2, 0, 6]
    """
    n = require_int("n", n, low=1)
    require_choice("method", method, ("systematic", "multinomial"))
    if not isinstance(rng, np.random.Generator):
        raise SettingError(f"rng is {rng!r}; expected a numpy Generator, e.g. sbi_phys.core.rng.rng_for(seed)")
    w = as_array("weights", weights, (None,), finite=False)
    if w.size == 0:
        raise ShapeError("weights has shape (0,); expected at least one weight")
    if not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise DataError("weights has NaN, Inf, negative values or only zeros; expected non-negative weights with a positive sum")
    cumulative = np.cumsum(w)
    places = (np.arange(n) + rng.random()) / n if method == "systematic" else rng.random(n)
    found = np.searchsorted(cumulative, places * cumulative[-1], side="right")
    # shuffled, because copies of one row are neighbours: so any part of the result is a fair sample
    return rng.permutation(np.minimum(found, np.flatnonzero(w)[-1]))
