r"""Unified intervals of Feldman and Cousins: Poisson counts with known background, and a Gaussian with a bounded mean.

At each mu >= 0 the outcomes enter the acceptance region in the order of the likelihood ratio

    R(n; mu) = P(n | mu + b) / P(n | mu_best + b),   mu_best = max(0, n - b),

largest first, until they hold the level. The interval for n is the set of mu that accept n: two-sided or an upper limit, as the data
decide, and never empty. So n is accepted exactly if what is ordered before it holds less than the level,

    sum_{k: R(k) > R(n)} P(k | mu + b) < level .

R rises up to k = mu + b and falls after it. With lambda = mu + b, lg R(k) = k - lambda + k ln(lambda / k) for k >= b, so the place where R
comes back to R(n) is k = lambda exp(1 + W(-(1 + ln R(n) / lambda) / e)), W Lambert's function on its two branches; for k < b ln R is linear
in k. The sum is thus the difference of two Poisson sums: exact for any mu, no grid of counts, and the ends follow from bisection.

Two mild pathologies, both from the counts being whole numbers. The set of mu may fall in pieces: the interval is its hull, from the
lowest to the highest. And the upper end is no falling function of b: more background may give a higher limit. The published tables
lengthen the intervals until it is one, high(n, b) = max_{b' >= b} high(n, b'); so does `monotone=True`, the default.

For x ~ N(mu, 1) with mu >= 0: R = exp(-(x - mu)^2 / 2) for x >= 0 and exp(x mu - mu^2 / 2) below; the other end of the region is
2 mu - x, or x - x^2 / (2 mu) where that is negative.

Source: Feldman & Cousins 1998, arXiv:physics/9711021, sections III, IV and VI, tables IV and X.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri, lambertw, ndtr, ndtri, pdtr, xlogy

from sbi_phys.confidence.inputs import check_level
from sbi_phys.confidence.sets import Interval
from sbi_phys.core.checks import as_real, require_finite, require_number
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["FeldmanCousins", "acceptance", "feldman_cousins", "feldman_cousins_gaussian"]

Ends = tuple[float, float] | tuple[Array, Array]

SCAN = 6000  # points in mu: pieces of the set that are narrower than 1/6000 of the range may be missed
B_STEP, B_SPAN = 0.005, 5.0  # backgrounds above b that are looked at for a higher limit
RISES = np.array([0.001, 0.004, 0.01, 0.03, 0.1, 0.3])  # above the limit: a piece of the set that ends higher holds one of these


def feldman_cousins(n: ArrayLike, background: ArrayLike, level: float = 0.9, *, monotone: bool = True) -> Ends:
    r"""Unified interval for the mean mu >= 0 of a Poisson signal over a known background, {mu: sum_{R(k) > R(n)} P(k | mu + b) < level}.

    Args:
        n: observed counts, whole numbers >= 0, any shape.
        background: expected counts b >= 0, known; broadcast against n.
        level: confidence level in (0, 1).
        monotone: lengthen the interval where a larger background would give a higher limit, as the published tables do
            (backgrounds up to b + 5 are looked at, to about 0.005 in mu); False: the plain belt.

    Returns: (low, high), counts; numbers for numbers, else arrays of the common shape.
    Raises: ShapeError, NonFiniteError, DataError (negative or fractional counts, negative background), SettingError (level).
    Source: arXiv:physics/9711021, table IV; b = 0, n = 3 gives [1.10, 7.42].
    Read: low = 0 is an upper limit. Fewer counts than background give a small limit: quote the expected one beside it.
    """
    counts, b = as_real("n", n), as_real("background", background)
    require_finite("n", counts)
    require_finite("background", b)
    level = check_level(level)
    if (counts < 0).any() or (counts != np.rint(counts)).any():
        bad = counts[(counts < 0) | (counts != np.rint(counts))].flat[0]
        raise DataError(f"n has {bad:g}; expected whole numbers of counts >= 0")
    if (b < 0).any():
        raise DataError(f"background has {b.min():g}; expected expected counts >= 0")
    try:
        counts, b = np.broadcast_arrays(counts, b)
    except ValueError as err:
        raise ShapeError(f"n has shape {counts.shape} and background {b.shape}; expected shapes that broadcast") from err
    pairs, place = np.unique(np.stack([counts.ravel(), b.ravel()], axis=1), axis=0, return_inverse=True)
    ends = np.array([_ends(float(k), float(mean), level, monotone) for k, mean in pairs]).reshape(-1, 2)[np.ravel(place)]
    low, high = ends.T.reshape(2, *counts.shape)
    return (float(low), float(high)) if counts.ndim == 0 else (low, high)


def acceptance(mu: ArrayLike, background: float, level: float = 0.9) -> tuple[Array, Array]:
    """Belt of Feldman and Cousins: the accepted counts n_low..n_high (g,) at each mu (g,) for a known background b.

    Raises: NonFiniteError, DataError (negative mu), SettingError.   Source: arXiv:physics/9711021, figure 7.
    """
    points, b = np.atleast_1d(as_real("mu", mu)), require_number("background", background, low=0)
    require_finite("mu", points)
    level = check_level(level)
    if points.ndim != 1:
        raise ShapeError(f"mu has shape {points.shape}; expected (g,)")
    if (points < 0).any():
        raise DataError(f"mu has {points.min():g}; expected means >= 0")
    top = float(points.max()) + b
    counts = np.arange(int(top + 12 * np.sqrt(top + 1) + 40))
    ok = _before(points[:, None], counts[None, :].astype(np.float64), b) < level
    return ok.argmax(axis=1).astype(np.float64), (counts.size - 1 - ok[:, ::-1].argmax(axis=1)).astype(np.float64)


def _before(mu: Array, n: ArrayLike, b: ArrayLike) -> Array:
    """Probability of the counts that come before n in the order of R, sum_{k: R(k) > R(n)} P(k | mu + b); all broadcast."""
    mu, n, b = np.broadcast_arrays(mu, np.asarray(n, dtype=np.float64), np.asarray(b, dtype=np.float64))
    lam = mu + b
    out = np.zeros(mu.shape)
    at_zero = mu == 0  # there R = 1 for all counts up to b, and falls after it
    more = at_zero & (n > b)
    out[more] = _cdf(n[more] - 1, lam[more])
    reference = np.maximum(n, b)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_r = np.where(reference > 0, xlogy(n, lam / reference), 0.0) - lam + reference
        argument = -np.exp(-1) * (1 + log_r / lam)
    for chosen, side in ((~at_zero & (n < lam), 0), (~at_zero & (n > lam), -1)):
        if chosen.any():
            k, mean, w = n[chosen], lam[chosen], argument[chosen]
            if side == 0:
                last = np.ceil(mean * np.exp(1 + _lambert(w, 0))) - 1
                out[chosen] = _cdf(last, mean) - _cdf(k, mean)
            else:
                out[chosen] = _cdf(k - 1, mean) - _cdf(np.floor(_left(w, mean, mu[chosen], b[chosen], log_r[chosen])), mean)
    return np.maximum(out, 0.0)


def _left(w: Array, lam: Array, mu: Array, b: Array, log_r: Array) -> Array:
    # below lambda: first the branch that holds for k >= b, then the straight line below b; -1 where all counts down to 0 are better
    k = np.where(w < 0, lam * np.exp(1 + _lambert(np.minimum(w, -1e-300), -1)), -1.0)
    line = (k < b) & (b > 0)
    slope = np.log(lam[line] / b[line])
    k[line] = np.where(slope > 0, (log_r[line] + mu[line]) / np.maximum(slope, 1e-300), -1.0)
    return np.maximum(k, -1.0)


def _lambert(w: Array, branch: int) -> Array:
    # rounding may carry the argument beyond the branch point -1/e, where W = -1
    value = lambertw(np.maximum(w, -np.exp(-1)), branch).real
    return np.where(np.isfinite(value), value, -1.0)


def _cdf(k: Array, lam: Array) -> Array:
    return np.where(k < 0, 0.0, pdtr(np.maximum(k, 0.0), lam))


def _ends(n: float, b: float, level: float, monotone: bool) -> tuple[float, float]:
    # beyond `top` the probability of n or fewer is a thousandth of what is left outside
    rest = 1e-3 * (1 - level)
    top = max(float(chdtri(2 * (n + 1), rest)) / 2 - b, float(chdtri(1, rest)))
    mu = np.unique(np.append(np.linspace(0, top, SCAN), max(n - b, 0.0)))
    inside = np.flatnonzero(_before(mu, n, b) < level)
    first, last = int(inside[0]), int(inside[-1])
    low = 0.0 if first == 0 else float(_bisect(mu[first : first + 1], mu[first - 1 : first], n, np.array([b]), level)[0])
    high = float(_bisect(mu[last : last + 1], mu[last + 1 : last + 2], n, np.array([b]), level)[0]) if last + 1 < mu.size else top
    return low, _lengthen(high, n, b, level) if monotone else high


def _bisect(inside: Array, outside: Array, n: float, b: Array, level: float) -> Array:
    for _ in range(40):
        middle = (inside + outside) / 2
        ok = _before(middle, n, b) < level
        inside, outside = np.where(ok, middle, inside), np.where(ok, outside, middle)
    return inside


def _lengthen(high: float, n: float, b: float, level: float) -> float:
    larger = np.asarray(b + B_STEP * np.arange(1, round(B_SPAN / B_STEP) + 1), dtype=np.float64)
    while True:
        mu = high + RISES
        ok = _before(mu[None, :], n, larger[:, None]) < level
        rows = np.flatnonzero(ok.any(axis=1))
        if rows.size == 0:
            return high
        last = mu.size - 1 - ok[rows][:, ::-1].argmax(axis=1)
        high = float(_bisect(mu[last], np.append(mu, mu[-1] + 1e-9)[last + 1], n, larger[rows], level).max())


def feldman_cousins_gaussian(x: ArrayLike, sigma: ArrayLike = 1.0, level: float = 0.9) -> Ends:
    r"""Unified interval for the mean mu >= 0 of a Gaussian measured once, x ~ N(mu, sigma^2).

    Args: x, any shape, any unit. sigma > 0, known, same unit, broadcast against x. level in (0, 1).
    Returns: (low, high), the unit of x; numbers for numbers, else arrays.
    Raises: ShapeError, NonFiniteError, DataError (sigma <= 0), SettingError.
    Source: arXiv:physics/9711021, table X; x = 0 at 90 % gives [0, 1.64].
    """
    value, scale = as_real("x", x), as_real("sigma", sigma)
    require_finite("x", value)
    require_finite("sigma", scale)
    level = check_level(level)
    if (scale <= 0).any():
        raise DataError(f"sigma has {scale.min():g}; expected > 0")
    try:
        value, scale = np.broadcast_arrays(value, scale)
    except ValueError as err:
        raise ShapeError(f"x has shape {value.shape} and sigma {scale.shape}; expected shapes that broadcast") from err
    z = value / scale
    width = float(ndtri((1 + level) / 2))
    nothing = np.zeros_like(z)
    # at mu = 0 all smaller x come first, P = Phi(x); the content falls from there to 0 at mu = x
    low = np.where(ndtr(z) < level, 0.0, _root(nothing, np.maximum(z, 0), z, level, falling=True))
    high = np.where(z >= 0, z + width, _root(nothing, nothing + width, z, level, falling=False))
    return (float(low * scale), float(high * scale)) if z.ndim == 0 else (low * scale, high * scale)


def _content(mu: Array, x: Array) -> Array:
    """Probability of the outcomes that come before x in the order of R at mu."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mirror = 2 * mu - x
        left = np.where(mirror >= 0, mirror, np.where(mu > 0, x - x**2 / (2 * mu), -np.inf))
        right = np.where(x >= 0, mirror, mu + np.sqrt(np.maximum(mu**2 - 2 * mu * x, 0)))
    return np.where(x >= mu, ndtr(x - mu) - ndtr(np.minimum(left, x) - mu), ndtr(right - mu) - ndtr(x - mu))


def _root(low: Array, high: Array, x: Array, level: float, *, falling: bool) -> Array:
    for _ in range(60):
        middle = (low + high) / 2
        above = (_content(middle, x) >= level) == falling
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class FeldmanCousins:
    """Counting experiment with known background as a source of intervals, for `limits` and `expected_limits`; data are counts."""

    background: float
    name: str = "mu"
    monotone: bool = True

    def interval(self, data: ArrayLike, level: float | None = None) -> Interval:
        """Unified intervals for counts (n,); level 0.9 if None.   Raises: as `feldman_cousins`."""
        wanted = 0.9 if level is None else check_level(level)
        low, high = feldman_cousins(np.atleast_1d(as_real("data", data)), self.background, wanted, monotone=self.monotone)
        return Interval(name=self.name, level=wanted, low=np.asarray(low), high=np.asarray(high), method="Feldman-Cousins")
