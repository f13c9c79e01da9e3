r"""Test statistics q(D; theta), large where theta describes the data D badly: likelihood ratio, profile likelihood ratio, WALDO.

**Likelihood ratio** over a set Theta of parameters (`LRT`):

    q(D; theta) = -2 ln [ L(D; theta) / max_{t in Theta} L(D; t) ] .

With it a Neyman construction is that of Feldman and Cousins. For an upper limit q is 0 where the best value lies above theta, for a lower
limit where it lies below (arXiv:1007.1727, sections 2.4 and 2.5).

**Profile likelihood ratio**: the same with L(D; psi) = max_nu L(D; psi, nu), the constraint terms of the nuisance parameters nu included
in L. `Profiled` takes the maximum over a given set of nu. `RefinedLRT` searches for the maximum in a box low..high, for a log likelihood
that is evaluated row by row, psi being one or two parameters:

- With one or two free parameters a grid over the box comes first. Then a grid of three points to each side of the best point follows,
  again and again, with a spacing that shrinks to a third whenever the best point is not at the rim.
- With more free parameters points spread evenly over the box come first, and Newton steps from the best of them follow.

All data sets are searched together, in few large batches. The search finds the highest peak that its first points resolve: `n_points`^2
points in d dimensions resolve peaks about 1 / `n_points`^(2/d) of the box wide.

**Newton steps.** Around a point c, with a step h_i in each parameter that changes ln L by about 1/2, the 1 + d + d^2 values

    f(c), f(c +- h_i e_i), f(c +- (h_i e_i + h_j e_j))

give slope g and curvature H, and the step p = -H^-1 g, kept within the box and within a few h. Directions with curvature of the wrong sign
are reversed; a parameter that would leave the box is held at its edge. Then h_i becomes 1 / sqrt(-H_ii). No derivative is needed, and
single precision suffices.

**WALDO**, from the mean and covariance of any posterior (or of a regression), `Waldo`:

    q(D; theta) = (E[theta | D] - theta)^T V[theta | D]^-1 (E[theta | D] - theta) .

The prior changes the size of the sets, not their coverage, because critical values come from simulations. For an upper limit on one
parameter the signed form sign(theta - E) (theta - E)^2 / V is used, for a lower limit its negative; {q <= C} is then one-sided, and the
distribution of q is continuous.

Any statistic gives sets that cover; a poor one gives large sets. So the likelihood may be learned, and the maximum may be approximate.

Source: arXiv:physics/9711021; Cowan et al. 2011, arXiv:1007.1727; Masserano et al. 2023 (WALDO), arXiv:2205.15680; Newton steps: Conn,
Scheinberg & Vicente 2009, Introduction to Derivative-Free Optimization, chapters 3 and 10.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats.qmc import Halton

from sbi_phys.confidence._inputs import KINDS, as_points, frozen
from sbi_phys.confidence.sets import require_within
from sbi_phys.core.checks import as_array, as_real, require_choice, require_finite, require_int
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike, Integers, Mask

__all__ = ["LRT", "Profiled", "RefinedLRT", "Waldo", "climb", "posterior_moments", "waldo"]

LogLikelihood = Callable[[Array, Any], ArrayLike]
Maximum = Callable[[Any], tuple[ArrayLike, ArrayLike]]

BLOCK = 256  # points per call of the log likelihood: n data sets take n x 256 numbers


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
        kind: 'interval', 'upper' (0 where theta_hat > theta) or 'lower' (0 where theta_hat < theta).
        parameter: column of theta that a one-sided statistic refers to.

    Called with (theta (d,), data) or, row by row, (theta (n, d), data) -> (n,). Where theta is better than all of `search`, q = 0.
    Raises: SettingError, ShapeError, NonFiniteError (NaN or +Inf), DataError (no theta possible: all -Inf).

    >>> import numpy as np
    >>> from sbi_phys.confidence import LRT
    >>> q = LRT(log_likelihood=lambda theta, x: -0.5 * (x[:, None] - theta[:, 0]) ** 2, search=np.linspace(-3, 3, 61))
    >>> q([1.0], np.array([0.0, 3.0])).round(2).tolist()
    [1.0, 4.0]
    """

    log_likelihood: LogLikelihood
    search: ArrayLike | None = None
    maximum: Maximum | None = None
    kind: str = "interval"
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

    def __call__(self, theta: ArrayLike, data: Any) -> Array:
        """Values (n,) of the statistic for n data sets at theta (d,), or (n, d) row by row."""
        found = data if isinstance(data, _Maximised) else self.prepare(data)
        point = np.atleast_1d(as_real("theta", theta))
        require_finite("theta", point)
        if point.ndim == 1:
            value = _log_likelihood(self.log_likelihood, point[None, :], found.data, found.best.size)[:, 0]
        else:
            value = self._rows(found, point)
        # the maximum of a grid or a fit may lie slightly below the value at theta
        q = 2 * np.maximum(found.best - value, 0.0)
        if self.kind == "interval":
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
    Called with (psi (m, k), data) -> (n, m): hand it to `LRT`. `.nuisance(psi, data)` is the `profile` that `neyman` takes.
    Raises: ShapeError, NonFiniteError.   Read: the set of nu must be finer than their errors; otherwise use a closed form.

    >>> import numpy as np
    >>> from sbi_phys.confidence import Profiled
    >>> def log_likelihood(theta, x):  # x ~ N(psi + nu, 1), nu constrained to 0 +- 1
    ...     return -0.5 * (x[:, None] - theta.sum(axis=1)) ** 2 - 0.5 * theta[:, 1] ** 2
    >>> best = Profiled(log_likelihood=log_likelihood, nuisances=np.linspace(-2, 2, 41))
    >>> best([[0.0]], np.array([2.0])).round(2).tolist()
    [[-1.0]]
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

    def nuisance(self, psi: ArrayLike, data: Any) -> Array:
        """Nuisances (n, d_nu) that fit each data set best at psi (k,)."""
        best = self._table(np.atleast_2d(np.asarray(psi, dtype=np.float64)), data)[:, 0].argmax(axis=-1)
        return np.asarray(np.asarray(self.nuisances)[best])


def posterior_moments(draws: ArrayLike) -> tuple[Array, Array]:
    """Mean (n, d) and covariance (n, d, d) of posterior draws (n, l, d).

    Raises: ShapeError, NonFiniteError, DataError (fewer than d + 2 draws).

    >>> from sbi_phys.confidence import posterior_moments
    >>> mean, covariance = posterior_moments([[[0.0], [1.0], [2.0], [3.0]]])
    >>> mean.tolist(), covariance.round(2).tolist()
    ([[1.5]], [[[1.67]]])
    """
    array = as_array("draws", draws, (None, None, None))
    n_draws, dim = array.shape[1:]
    if n_draws < dim + 2:
        raise DataError(
            f"draws has {n_draws} draws of {dim} parameters; expected {dim + 2} or more for a covariance (about 100 for a useful one)"
        )
    mean = array.mean(axis=1)
    centred = array - mean[:, None]
    return mean, np.einsum("nla,nlb->nab", centred, centred) / (n_draws - 1)


def waldo(mean: ArrayLike, covariance: ArrayLike, theta: ArrayLike, kind: str = "interval") -> Array:
    r"""WALDO (m - theta)^T V^-1 (m - theta), (n,); for an 'upper' or 'lower' limit on one parameter signed, see above.

    Args: mean (n, d) and covariance (n, d, d) of the posteriors. theta (d,), or (n, d) row by row. kind: 'interval', 'upper', 'lower'.
    Raises: ShapeError, NonFiniteError, DataError (a covariance that is not positive definite), SettingError (one-sided with d > 1).
    Source: arXiv:2205.15680; one-sided: arXiv:1007.1727, section 2.4.
    Read: an upper limit leaves out theta far above the data alone.

    >>> from sbi_phys.confidence import waldo
    >>> waldo([[0.0]], [[[4.0]]], [2.0]).tolist(), waldo([[0.0]], [[[4.0]]], [2.0], "lower").tolist()
    ([1.0], [-1.0])
    """
    centre = as_array("mean", mean, (None, None))
    require_choice("kind", kind, KINDS)
    if kind != "interval" and centre.shape[1] != 1:
        raise SettingError(f"kind is {kind!r} with {centre.shape[1]} parameters; expected one: choose it with columns=(i,)")
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
    if kind == "interval":
        return np.asarray((z**2).sum(axis=1))
    away = -z[:, 0] if kind == "upper" else z[:, 0]
    return np.asarray(np.sign(away) * away**2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Waldo:
    """WALDO statistic of a posterior: `draws` (data of n sets -> (n, l, d)), or `moments` (-> mean (n, d), covariance (n, d, d)).

    columns: which parameters enter, None = all; with nuisances give those of interest, so that the rest is marginalised.
    kind: 'interval', or 'upper', 'lower' for limits on the one parameter that enters.
    Called with (theta (d,) or (n, d), data) -> (n,); theta may have more columns than are asked for.

    >>> import numpy as np
    >>> from sbi_phys.confidence import Waldo
    >>> q = Waldo(moments=lambda x: (x[:, None], np.ones((len(x), 1, 1))))
    >>> q([1.0], np.array([0.0, 3.0])).tolist()
    [1.0, 4.0]
    """

    draws: Callable[[Any], ArrayLike] | None = None
    moments: Callable[[Any], tuple[ArrayLike, ArrayLike]] | None = None
    columns: tuple[int, ...] | None = None
    kind: str = "interval"

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        if self.kind != "interval" and self.columns is not None and len(self.columns) != 1:
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

    def __call__(self, theta: ArrayLike, data: Any) -> Array:
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


Rows = Callable[[Array, Any], ArrayLike]

MOST_WANTED = 2  # sets are evaluated on a grid of the parameters of interest
REACH = 3  # points to each side of the best point in each further grid
FINER = 4  # number of times that the spacing shrinks to a third
MOST_LOOKS = 14
PAIRS = 1 << 17  # (data set, theta) pairs per call of the log likelihood


@dataclass(frozen=True, kw_only=True, eq=False)
class RefinedLRT:
    r"""Profile likelihood ratio over a box of any number of parameters; the first `interest` of them, one or two, are wanted.

    Args: log_likelihood: (theta (n, d), data of n sets) -> (n,), row by row, -inf allowed; data are indexed by rows. low, high (d,): the
        box. interest: 1 or 2. kind: 'interval', 'upper' (0 where psi_hat > psi), 'lower'. n_points: per parameter of the first grid
        where at most two vary; its square is the number of first points where more do.
    Called with (psi (interest,) or (n, interest), data) -> (n,); `.nuisance(psi, data)` is the `profile` that `lf2i` takes.
    Raises: SettingError (interest), ShapeError, NonFiniteError, SupportError (psi outside the box), DataError.

    >>> from sbi_phys.confidence import RefinedLRT
    >>> import numpy as np
    >>> def log_likelihood(theta, x):  # x ~ N(mu + nu, 1), nu constrained to 0 +- 1
    ...     return -0.5 * (x - theta.sum(axis=1)) ** 2 - 0.5 * theta[:, 1] ** 2
    >>> q = RefinedLRT(log_likelihood=log_likelihood, low=[-5, -5], high=[5, 5], names=("mu", "nu"))
    >>> q([0.0], np.array([2.0])).round(1).tolist()
    [2.0]
    """

    log_likelihood: Rows
    low: ArrayLike
    high: ArrayLike
    names: tuple[str, ...]
    interest: int = 1
    kind: str = "interval"
    n_points: int = 24

    def __post_init__(self) -> None:
        """Check the box."""
        for name in ("low", "high"):
            object.__setattr__(self, name, frozen(as_array(name, getattr(self, name), (len(self.names),))))
        if not (self._box[0] < self._box[1]).all():
            raise SettingError(f"low is {self._box[0].tolist()} and high {self._box[1].tolist()}; expected low < high")
        require_int("interest", self.interest, low=1, high=min(len(self.names), MOST_WANTED))
        require_choice("kind", self.kind, KINDS)
        require_int("n_points", self.n_points, low=3)

    @property
    def _box(self) -> tuple[Array, Array]:
        return np.asarray(self.low, dtype=np.float64), np.asarray(self.high, dtype=np.float64)

    def prepare(self, data: Any) -> "_Maximised":
        """Find the maximum of each data set once, for any number of psi."""
        best, at = self._search(data, None)
        return _Maximised(data, best, at)

    def __call__(self, psi: ArrayLike, data: Any) -> Array:
        """Values (n,) of the statistic at psi (interest,), or row by row (n, interest); further columns are left out."""
        found = data if isinstance(data, _Maximised) else self.prepare(data)
        points = self._points(psi, found.best.size)
        value, _ = self._search(found.data, points, found.at)
        q = 2 * np.maximum(found.best - value, 0.0)
        if self.kind == "interval":
            return q
        sign = 1.0 if self.kind == "upper" else -1.0
        return np.where(sign * (found.at[:, 0] - points[:, 0]) > 0, 0.0, q)

    def repeated(self, data: Any, m: int) -> "_Maximised":
        """One data set m times, its maximum found once: for values at many psi (m, interest)."""
        one = self.prepare(data)
        if one.best.size != 1:
            raise ShapeError(f"data has {one.best.size} sets; expected one")
        return _Maximised(np.repeat(one.data, m, axis=0), np.repeat(one.best, m), np.repeat(one.at, m, axis=0))

    def nuisance(self, psi: ArrayLike, data: Any) -> Array:
        """Nuisances (n, d - interest) that fit each data set best at psi."""
        found, near = (data.data, data.at) if isinstance(data, _Maximised) else (data, None)
        _, at = self._search(found, self._points(psi, len(found)), near)
        return at[:, self.interest :]

    def _points(self, psi: ArrayLike, n: int) -> Array:
        array = np.atleast_1d(as_real("psi", psi))
        require_finite("psi", array)
        if array.shape[-1] < self.interest or array.ndim > 2 or (array.ndim == 2 and len(array) != n):
            raise ShapeError(
                f"psi has shape {array.shape}; expected ({self.interest},), or ({n}, {self.interest}) with one row per data set"
            )
        points = np.broadcast_to(array[..., : self.interest], (n, self.interest))
        low, high = self._box
        require_within("theta", points, low[: self.interest], high[: self.interest], self.names[: self.interest])
        return points

    def _search(self, data: Any, fixed: Array | None, near: Array | None = None) -> tuple[Array, Array]:
        """Maxima (n,) and where (n, d), over the box, or over the nuisances at `fixed` psi (n, interest); near (n, d), a first guess."""
        start = 0 if fixed is None else self.interest
        low, high = (side[start:] for side in self._box)
        if low.size == 0:  # no free parameter
            assert fixed is not None
            return self._values(data, fixed[:, None, :])[:, 0], np.array(fixed)
        if low.size <= 2:
            best, at = self._narrowed(data, fixed, low, high)
        else:
            best, at = self._climbed(data, fixed, None if near is None else near[:, start:], low, high)
        if fixed is None and np.isneginf(best).any():
            i = int(np.argmax(np.isneginf(best)))
            raise DataError(f"data set {i} has ln L = -Inf at all points of the search; expected one that is possible")
        return best, at if fixed is None else np.concatenate([fixed, at], axis=1)

    def _climbed(self, data: Any, fixed: Array | None, near: Array | None, low: Array, high: Array) -> tuple[Array, Array]:
        """Maxima over three free parameters or more: points spread over the box, and Newton steps from the best of them."""
        n, d = len(data), low.size
        # with a first guess a few further points suffice
        points = Halton(d, scramble=False).random(self.n_points**2 if near is None else 8 * d)[1:]
        tried = np.broadcast_to(low + points * (high - low), (n, len(points), d))
        tried = tried if near is None else np.concatenate([near[:, None, :], tried], axis=1)

        def values(rows: Integers, theta: Array) -> Array:
            parts = np.array_split(np.arange(rows.size), max(1, rows.size * theta.shape[1] // PAIRS))
            return np.concatenate([self._values(data[rows[part]], _joined(fixed, rows[part], theta[part])) for part in parts])

        first = values(np.arange(n), tried)
        place = first.argmax(axis=1)
        each = np.arange(n)
        return climb(values, tried[each, place], first[each, place], low, high)

    def _narrowed(self, data: Any, fixed: Array | None, low: Array, high: Array) -> tuple[Array, Array]:
        """Maxima over one or two free parameters, by a grid that narrows."""
        n = len(data)
        best, at = np.full(n, -np.inf), np.tile((low + high) / 2, (n, 1))
        spacing = (high - low) / (self.n_points - 1)
        finer = np.zeros(n)  # times that the distance of a data set's points has become a third
        for look in range(MOST_LOOKS):
            half = (self.n_points - 1) / 2 if look == 0 else REACH
            steps = np.arange(-half, half + 0.5)
            mesh = np.stack([g.ravel() for g in np.meshgrid(*[steps] * low.size, indexing="ij")], axis=-1)
            rim = np.abs(mesh).max(axis=1) == half
            todo = np.flatnonzero(finer <= FINER)
            for rows in np.array_split(todo, max(1, todo.size * len(mesh) // PAIRS)):
                tried = np.clip(at[rows, None, :] + mesh * spacing * 3.0 ** -finer[rows, None, None], low, high)
                values = self._values(data[rows], _joined(fixed, rows, tried))
                each = np.arange(len(rows))
                place = values.argmax(axis=1)
                better = values[each, place] > best[rows]
                best[rows] = np.where(better, values[each, place], best[rows])
                at[rows] = np.where(better[:, None], tried[each, place], at[rows])
                finer[rows] += 1.0 if look == 0 else ~(better & rim[place])
            if (finer > FINER).all():
                break
        return best, at

    def _values(self, data: Any, theta: Array) -> Array:
        """Values (n, m) of theta (n, m, d)."""
        n, m, d = theta.shape
        values = as_array("log_likelihood(theta, data)", self.log_likelihood(theta.reshape(-1, d), np.repeat(data, m, axis=0)), (n * m,),
                          finite=False)  # fmt: skip
        bad = np.isnan(values) | np.isposinf(values)
        if bad.any():
            i = int(np.argmax(bad))
            raise NonFiniteError(f"log_likelihood is {values[i]} at theta = {theta.reshape(-1, d)[i].tolist()}; expected numbers or -Inf")
        return values.reshape(n, m)


def _joined(fixed: Array | None, rows: Integers, tried: Array) -> Array:
    """Whole theta (n, m, d) of fixed psi and the nuisances tried (n, m, d - interest)."""
    if fixed is None:
        return tried
    return np.concatenate([np.broadcast_to(fixed[rows, None, :], (*tried.shape[:2], fixed.shape[1])), tried], axis=-1)


Values = Callable[[Integers, Array], Array]

CLOSE = 0.0005  # smallest gain in f, predicted or achieved, for which another step is taken
MOST_STEPS = 40
TRUST = 6.0  # limit of the first step in units of the spacing; doubled after a good prediction, halved after a bad one
SWEEPS = 10
SHARES = np.array([1.0, 0.4, 2.5])  # multiples of the step that are tried
LEAST, WIDEST = 1e-5, 0.2  # smallest and largest spacing, as a share of the box


def climb(values: Values, start: Array, best: Array, low: Array, high: Array) -> tuple[Array, Array]:
    r"""Maximise n functions f_i(t) over low <= t <= high by Newton steps, each from its own start.

    Args: values: (rows (m,) of the n, points (m, j, d)) -> (m, j), -inf allowed. start (n, d), within the box; best (n,), f there.
        low, high (d,).
    Returns: largest values found (n,) and where, (n, d).
    Read: the error of f is about 0.001 where f is smooth, and some hundredths where a flat ridge meets a side of the box.
    """
    n, d = start.shape
    width, best, at = high - low, np.array(best), (start - low) / (high - low)
    reach, trust, todo = np.full((n, d), 0.05), np.full(n, TRUST), np.arange(n)
    stencil, answers = _stencil(d), np.zeros(n, dtype=np.int64)
    for _ in range(MOST_STEPS):
        h = reach[todo]
        centre = np.clip(at[todo], h, 1 - h)
        tried = centre[:, None] + stencil * h[:, None]
        f = values(todo, low + tried * width)
        ok: Mask = np.asarray(np.isfinite(f).all(axis=1))
        g, hessian = _quadratic(np.where(ok[:, None], f, 0.0), d)
        far = trust[todo, None]
        p = _step(g, hessian, -np.minimum(centre / h, far), np.minimum((1 - centre) / h, far))
        ends = np.clip(centre[:, None] + SHARES[:, None] * (p * h)[:, None], 0, 1)
        all_f = np.concatenate([f, values(todo, low + ends * width)], axis=1)
        all_t = np.concatenate([tried, ends], axis=1)
        each, k = np.arange(todo.size), all_f.argmax(axis=1)
        up: Mask = np.asarray(all_f[each, k] > best[todo])
        gain = np.where(up, all_f[each, k], 0.0) - np.where(up, best[todo], 0.0)
        at[todo[up]], best[todo[up]] = all_t[each, k][up], all_f[each, k][up]
        model = np.einsum("ni,ni->n", g, p) + 0.5 * np.einsum("ni,nij,nj->n", p, hessian, p)
        promised = np.where(ok, f[:, 0] + model - best[todo], 0.0)
        # if the quadratic mispredicts the value at the step's end, its points were too far apart
        reached = all_f[:, len(stencil)]
        sure = ok & np.isfinite(reached) & (np.abs(np.where(ok, f[:, 0] + model - reached, 0.0)) < CLOSE)
        short = np.asarray((np.abs(p) > far - 1e-9).any(axis=1))  # the maximum may lie further away
        trust[todo] = np.clip(far[:, 0] * np.where(gain > promised / 2, 2.0, 0.5), 2.0, 1e4)
        curved = -np.diagonal(hessian, axis1=1, axis2=2)
        # next spacing: the conditional error; without a peak, wider after a gain and closer otherwise
        fit = np.where(curved > 1e-6, h / np.sqrt(np.maximum(curved, 1e-6)), h * np.where(gain > CLOSE, 2.0, 0.4)[:, None])
        fit = np.where((sure | short | (gain > CLOSE))[:, None], np.clip(fit, h / 10, 3 * h), 0.4 * h)
        reach[todo] = np.clip(fit, LEAST, WIDEST)
        done = (sure & ~short) | (h <= 1.01 * LEAST).all(axis=1)
        done &= (gain < CLOSE) & (promised < CLOSE)
        # confirmed once from points further apart: along a flat, curved ridge the first steps may stop before the maximum
        reach[todo[done]] = np.minimum(2.5 * reach[todo[done]], WIDEST)
        answers[todo] += done
        todo = todo[answers[todo] < 2]
        if todo.size == 0:
            break
    return best, low + at * width


def _stencil(d: int) -> Array:
    """Offsets (1 + d + d^2, d) in units of the reach: the centre, each side, and pairs."""
    one = np.eye(d)
    pairs = [one[i] + one[j] for i in range(d) for j in range(i)]
    both = np.array(pairs).reshape(-1, d)
    return np.concatenate([np.zeros((1, d)), one, -one, both, -both])


def _quadratic(f: Array, d: int) -> tuple[Array, Array]:
    """Slope (n, d) and curvature (n, d, d), in units of the reach, of the quadratic through values (n, j) on the stencil."""
    middle, plus, minus = f[:, 0], f[:, 1 : 1 + d], f[:, 1 + d : 1 + 2 * d]
    # mean of both sides, so that third-order terms cancel: they would dominate the curvature along a flat ridge
    pairs = f[:, 1 + 2 * d :].reshape(len(f), 2, -1).mean(axis=1)
    sides = (plus + minus) / 2
    hessian = np.zeros((len(f), d, d))
    hessian[:, np.arange(d), np.arange(d)] = plus + minus - 2 * middle[:, None]
    column = 0
    for i in range(d):
        for j in range(i):
            hessian[:, i, j] = hessian[:, j, i] = pairs[:, column] - sides[:, i] - sides[:, j] + middle
            column += 1
    return (plus - minus) / 2, hessian


def _step(g: Array, hessian: Array, low: Array, high: Array) -> Array:
    """Step (n, d) to the top of each quadratic within low..high (n, d); parameters at a bound are held unless they move inside."""
    n, d = g.shape
    value, vector = np.linalg.eigh(hessian)
    # a floor on the curvature: in a flat direction rounding alone would send the step to the edge of the box
    concave = np.einsum("nij,nj,nkj->nik", vector, -np.maximum(np.abs(value), 1e-3), vector)
    p, held = np.zeros((n, d)), np.zeros((n, d), dtype=bool)
    for _ in range(2 * d):
        free = ~held
        matrix = np.where(free[:, :, None] & free[:, None, :], concave, 0.0)
        matrix[:, np.arange(d), np.arange(d)] += np.where(free, 0.0, -1.0)
        right = np.where(free, -(g + np.einsum("nij,nj->ni", concave, np.where(held, p, 0.0))), -p)
        p = np.linalg.solve(matrix, right[..., None])[..., 0]
        out = free & ((p < low) | (p > high))
        p = np.clip(p, low, high)
        slope = g + np.einsum("nij,nj->ni", concave, p)
        back = held & np.where(p >= high, slope < 0, slope > 0)
        if not (out | back).any():
            break
        held = (held | out) & ~back
    for _ in range(SWEEPS):  # coordinate ascent, in case the active set did not converge; it never decreases the model
        for i in range(d):
            slope = g[:, i] + np.einsum("nj,nj->n", concave[:, i], p)
            p[:, i] = np.clip(p[:, i] - slope / concave[:, i, i], low[:, i], high[:, i])
    return p
