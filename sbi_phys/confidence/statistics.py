r"""Test statistics, large where theta describes the data badly: likelihood ratio, profile likelihood ratio, WALDO.

Likelihood ratio, over a set Theta of parameters that are looked at:

    q(D; theta) = -2 ln [ L(D; theta) / max_{t in Theta} L(D; t) ] .

With this one a Neyman construction is that of Feldman and Cousins. For an upper limit q is 0 where the best value lies above theta, for
a lower limit where it lies below: data are then held against theta on one side only (arXiv:1007.1727, section 2.4 and 2.5).

Profile likelihood ratio: the same with L(D; psi) = max_nu L(D; psi, nu), nuisances nu with their constraint terms in L. `Profiled`
takes the maximum over a set of nu; a closed form serves as well, or better.

WALDO, from the mean and covariance of any posterior (or a regression's):

    q(D; theta) = (E[theta | D] - theta)^T V[theta | D]^-1 (E[theta | D] - theta) .

A prior that pulls the mean changes the size of the sets and not their coverage, as critical values come from simulations. For an upper
limit on one parameter its signed form

    q(D; theta) = sign(theta - E) (theta - E)^2 / V ,        for a lower limit  sign(E - theta) (theta - E)^2 / V ,

is negative where the data lie on the side that an upper (lower) limit does not object to; {q <= C} is E + sqrt(C V) and all below it.
Unlike a statistic that is cut off at 0, this one has a continuous distribution: p-values are uniform, and any level will do.

Any statistic gives sets that cover, a poor one large sets. So the maximum may be taken over a grid, and the likelihood may be learned.

Source: arXiv:physics/9711021; Cowan et al. 2011, arXiv:1007.1727; Masserano et al. 2023 (WALDO), arXiv:2205.15680.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbi_phys.confidence.inputs import as_points
from sbi_phys.core.checks import as_array, as_real, require_choice, require_finite, require_int
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["LRT", "Profiled", "Waldo", "posterior_moments", "waldo"]

LogLikelihood = Callable[[Array, Any], ArrayLike]
Maximum = Callable[[Any], tuple[ArrayLike, ArrayLike]]

BLOCK = 256  # points at which a log likelihood is asked for at once: n data sets take n x 256 numbers
KINDS = ("two-sided", "upper", "lower")


@dataclass(frozen=True, eq=False)
class _Maximised:
    """Data with the largest ln L (n,) found and where, (n, d)."""

    data: Any
    best: Array
    at: Array


def _log_likelihood(function: LogLikelihood, theta: Array, data: Any, n: int | None = None) -> Array:
    values = as_array("log_likelihood(theta (m, d), data)", function(theta, data), (n, theta.shape[0]), finite=False, note="(n, m)")
    bad = np.isnan(values) | np.isposinf(values)
    if bad.any():
        i, j = (int(k) for k in np.argwhere(bad)[0])
        raise NonFiniteError(f"log_likelihood is {values[i, j]} for data set {i} at theta = {theta[j].tolist()}; expected numbers or -Inf")
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class LRT:
    r"""Likelihood ratio q(D; theta) = 2 [max_t ln L(D; t) - ln L(D; theta)] >= 0, for n data sets at once.

    Args:
        log_likelihood: (theta (m, d), data of n sets) -> (n, m); exact, learned, or profiled (then d counts the interesting ones only).
        search: (s, d), values among which the maximum is looked for, or
        maximum: data -> (theta_hat (n, d), ln L at it (n,)), a closed form or a fit. One of the two is needed.
        kind: 'two-sided', 'upper' (0 where theta_hat > theta) or 'lower' (0 where theta_hat < theta).
        parameter: column of theta that a one-sided statistic looks at.

    Called with (data, theta (d,)) or, row by row, theta (n, d) -> (n,). Where theta is better than all of `search`, q = 0.
    Raises: SettingError, ShapeError, NonFiniteError (NaN or +Inf), DataError (no theta possible: all -Inf).
    """

    log_likelihood: LogLikelihood
    search: ArrayLike | None = None
    maximum: Maximum | None = None
    kind: str = "two-sided"
    parameter: int = 0

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        require_int("parameter", self.parameter, low=0)
        if (self.search is None) == (self.maximum is None):
            raise SettingError("search and maximum are both given or both missing; expected one of them")
        if self.search is not None:
            array = as_real("search", self.search)
            points = as_points("search", array, 1 if array.ndim == 1 else array.shape[-1])
            object.__setattr__(self, "search", points)

    def prepare(self, data: Any) -> _Maximised:
        """Find the maximum of each data set once, for any number of theta."""
        if self.maximum is not None:
            found, value = self.maximum(data)
            highest = as_array("the maximum of ln L", value, (None,))
            at = as_real("theta_hat", found)
            at = as_array("theta_hat", at[:, None] if at.ndim == 1 else at, (highest.size, None))
            return _Maximised(data, highest, at)
        points = np.asarray(self.search, dtype=np.float64)
        best, place = None, np.zeros(0, dtype=np.int64)
        for i in range(0, points.shape[0], BLOCK):
            values = _log_likelihood(self.log_likelihood, points[i : i + BLOCK], data)
            top, where = values.max(axis=1), i + values.argmax(axis=1)
            place = where if best is None else np.where(top > best, where, place)
            best = top if best is None else np.maximum(best, top)
        assert best is not None
        if np.isneginf(best).any():
            i = int(np.flatnonzero(np.isneginf(best))[0])
            raise DataError(f"data set {i} has ln L = -Inf at all {points.shape[0]} values of search; expected one that is possible")
        return _Maximised(data, best, points[place])

    def __call__(self, data: Any, theta: ArrayLike) -> Array:
        """Values (n,) of the statistic for n data sets at theta (d,), or (n, d) row by row."""
        found = data if isinstance(data, _Maximised) else self.prepare(data)
        point = np.atleast_1d(as_real("theta", theta))
        require_finite("theta", point)
        if point.ndim == 1:
            value = _log_likelihood(self.log_likelihood, point[None, :], found.data, found.best.size)[:, 0]
        else:
            value = self._rows(found, point)
        # a maximum from a grid or a fit may lie a little lower than the value itself
        q = 2 * np.maximum(found.best - value, 0.0)
        if self.kind == "two-sided":
            return q
        sign = 1.0 if self.kind == "upper" else -1.0
        return np.where(sign * (found.at[:, self.parameter] - point[..., self.parameter]) > 0, 0.0, q)

    def _rows(self, found: _Maximised, theta: Array) -> Array:
        if theta.ndim != 2 or theta.shape[0] != found.best.size:
            raise ShapeError(f"theta has shape {theta.shape}; expected (d,), or ({found.best.size}, d) with one row per data set")
        pairs = enumerate(theta)
        return np.array([_log_likelihood(self.log_likelihood, t[None, :], found.data[i : i + 1], 1)[0, 0] for i, t in pairs])


@dataclass(frozen=True, kw_only=True, eq=False)
class Profiled:
    r"""Profile log likelihood ln L(D; psi) = max_nu ln L(D; psi, nu) over a set of nuisances (j, d_nu).

    Args: log_likelihood: (theta (m, d), data of n sets) -> (n, m) with theta = (psi, nu), constraint terms of nu included.
    Called with (psi (m, k), data) -> (n, m): hand it to `LRT`. `.nuisance(data, psi)` is the `profile` that `neyman` takes.
    Raises: ShapeError, NonFiniteError.   Read: the set of nu must be finer than their errors, or a closed form should take its place.
    """

    log_likelihood: LogLikelihood
    nuisances: ArrayLike

    def __post_init__(self) -> None:
        array = as_real("nuisances", self.nuisances)
        object.__setattr__(self, "nuisances", as_points("nuisances", array, 1 if array.ndim == 1 else array.shape[-1]))

    def _table(self, psi: Array, data: Any) -> Array:
        nu = np.asarray(self.nuisances, dtype=np.float64)
        theta = np.concatenate([np.repeat(psi, nu.shape[0], axis=0), np.tile(nu, (psi.shape[0], 1))], axis=1)
        values = _log_likelihood(self.log_likelihood, theta, data)
        return values.reshape(values.shape[0], psi.shape[0], nu.shape[0])

    def _blocks(self, psi: Array) -> list[Array]:
        size = max(1, BLOCK // np.shape(self.nuisances)[0])
        return [psi[i : i + size] for i in range(0, psi.shape[0], size)]

    def __call__(self, psi: ArrayLike, data: Any) -> Array:
        """Profile log likelihood (n, m) of n data sets at psi (m, k)."""
        blocks = self._blocks(np.asarray(psi, dtype=np.float64))
        return np.concatenate([self._table(block, data).max(axis=-1) for block in blocks], axis=1)

    def nuisance(self, data: Any, psi: ArrayLike) -> Array:
        """Nuisances (n, d_nu) that fit each data set best at psi (k,)."""
        best = self._table(np.atleast_2d(np.asarray(psi, dtype=np.float64)), data)[:, 0].argmax(axis=-1)
        return np.asarray(np.asarray(self.nuisances)[best])


def posterior_moments(draws: ArrayLike) -> tuple[Array, Array]:
    """Mean (n, d) and covariance (n, d, d) of posterior draws (n, l, d).

    Raises: ShapeError, NonFiniteError, DataError (fewer than d + 2 draws).
    """
    array = as_array("draws", draws, (None, None, None))
    n_draws, dim = array.shape[1:]
    if n_draws < dim + 2:
        raise DataError(f"draws has {n_draws} draws of {dim} parameters; expected {dim + 2} or more for a covariance (100 to be of use)")
    mean = array.mean(axis=1)
    centred = array - mean[:, None]
    return mean, np.einsum("nla,nlb->nab", centred, centred) / (n_draws - 1)


def waldo(mean: ArrayLike, covariance: ArrayLike, theta: ArrayLike, kind: str = "two-sided") -> Array:
    r"""WALDO (m - theta)^T V^-1 (m - theta), (n,); for an 'upper' or 'lower' limit on one parameter signed, see above.

    Args: mean (n, d) and covariance (n, d, d) of the posteriors. theta (d,), or (n, d) row by row. kind: 'two-sided', 'upper', 'lower'.
    Raises: ShapeError, NonFiniteError, DataError (a covariance that is not positive definite), SettingError (one-sided with d > 1).
    Source: arXiv:2205.15680; one-sided: arXiv:1007.1727, section 2.4.
    Read: an upper limit leaves out theta far above the data alone.
    """
    centre = as_array("mean", mean, (None, None))
    require_choice("kind", kind, KINDS)
    if kind != "two-sided" and centre.shape[1] != 1:
        raise SettingError(f"kind is {kind!r} with {centre.shape[1]} parameters; expected one, choose it with columns=(i,)")
    n, dim = centre.shape
    spread = as_array("covariance", covariance, (n, dim, dim))
    point = np.atleast_1d(as_real("theta", theta))
    if point.shape not in ((dim,), (n, dim)):
        raise ShapeError(f"theta has shape {point.shape}; expected ({dim},) or ({n}, {dim})")
    require_finite("theta", point)
    try:
        root = np.linalg.cholesky(spread)
    except np.linalg.LinAlgError as err:
        bad = int(np.argmin(np.linalg.eigvalsh(spread)[:, 0]))
        raise DataError(f"covariance of posterior {bad} is not positive definite; expected draws that vary in each parameter") from err
    z = np.linalg.solve(root, (centre - point)[..., None])[..., 0]
    if kind == "two-sided":
        return np.asarray((z**2).sum(axis=1))
    away = -z[:, 0] if kind == "upper" else z[:, 0]
    return np.asarray(np.sign(away) * away**2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Waldo:
    """WALDO statistic of a posterior: `draws` (data of n sets -> (n, l, d)), or `moments` (-> mean (n, d), covariance (n, d, d)).

    columns: which parameters enter, None = all; with nuisances give those of interest, so that the rest is marginalised.
    kind: 'two-sided', or 'upper', 'lower' for limits on the one parameter that enters.
    Called with (data, theta (d,) or (n, d)) -> (n,); theta may have more columns than are asked for.
    """

    draws: Callable[[Any], ArrayLike] | None = None
    moments: Callable[[Any], tuple[ArrayLike, ArrayLike]] | None = None
    columns: tuple[int, ...] | None = None
    kind: str = "two-sided"

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        if self.kind != "two-sided" and self.columns is not None and len(self.columns) != 1:
            raise SettingError(f"kind is {self.kind!r} with columns {self.columns}; expected one column")
        if (self.draws is None) == (self.moments is None):
            raise SettingError("draws and moments are both given or both missing; expected one of them")

    def prepare(self, data: Any) -> "_Moments":
        """Find the moments of each data set once, for any number of theta."""
        if self.draws is not None:
            mean, spread = posterior_moments(self.draws(data))
        else:
            assert self.moments is not None
            pair = self.moments(data)
            mean, spread = as_array("mean", pair[0], (None, None)), as_array("covariance", pair[1], (None, None, None))
        if self.columns is not None:
            keep = list(self.columns)
            mean, spread = mean[:, keep], spread[:, keep][:, :, keep]
        return _Moments(mean, spread)

    def __call__(self, data: Any, theta: ArrayLike) -> Array:
        """Values (n,) of the statistic."""
        found = data if isinstance(data, _Moments) else self.prepare(data)
        point = np.atleast_1d(as_real("theta", theta))
        if self.columns is not None and point.shape[-1] > len(self.columns):
            point = point[..., list(self.columns)]
        return waldo(found.mean, found.covariance, point, self.kind)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Posterior mean (n, d) and covariance (n, d, d) of n data sets."""

    mean: Array
    covariance: Array
