r"""Counting experiments: unified intervals of Feldman and Cousins, a background measured off source, CLs and asymptotic limits.

**Known background** (`feldman_cousins`). At each mu >= 0 outcomes enter the acceptance region in falling order of the likelihood ratio

    R(n; mu) = P(n | mu + b) / P(n | mu_best + b),   mu_best = max(0, n - b),

until their probability reaches the level. The interval for n is the set of mu that accept n. It is two-sided or an upper limit, depending
on the data, and never empty. So n is accepted exactly if the outcomes ordered before it have less probability than the level,

    sum_{k: R(k) > R(n)} P(k | mu + b) < level .

R rises up to k = mu + b and falls after it. With lambda = mu + b, ln R(k) = k - lambda + k ln(lambda / k) for k >= b, so that R takes the
value R(n) again at k = lambda exp(1 + W(-(1 + ln R(n) / lambda) / e)), W being Lambert's function on its two branches; for k < b ln R is
linear in k. The sum is thus a difference of two Poisson sums, exact for any mu, and the ends follow from bisection.

Counts are whole numbers, with two consequences. The set of mu may consist of several pieces: the interval is its hull. And the upper end
may rise with b; the published tables lengthen the intervals to max_{b' >= b} high(n, b'), as `monotone=True`, the default, does.

**Bounded Gaussian** (`feldman_cousins_gaussian`). For x ~ N(mu, 1) with mu >= 0: R = exp(-(x - mu)^2 / 2) for x >= 0 and
exp(x mu - mu^2 / 2) below; the other end of the region is 2 mu - x, or x - x^2 / (2 mu) where that is negative.

**Background measured off source** (`on_off`). n_on ~ Poisson(mu + b), n_off ~ Poisson(tau b), mu >= 0 of interest, b a nuisance parameter.
With A = n_on + n_off - (1 + tau) mu the background that fits best at mu, and the profile likelihood ratio, are

    b(mu) = [A + sqrt(A^2 + 4 (1 + tau) n_off mu)] / (2 (1 + tau)),
    mu_hat = max(0, n_on - n_off / tau),      q(mu) = 2 [ln L(mu_hat, b(mu_hat)) - ln L(mu, b(mu))].

The p-value is summed over all pairs of counts, at the background that fits the data best,

    p(mu) = sum over (n, m) with q(n, m; mu) >= q(data; mu) of Poisson(n | mu + b(mu)) Poisson(m | tau b(mu)),

and the set is {mu: p(mu) > 1 - level}: the construction of Feldman and Cousins with the nuisance profiled, without toys. It covers as far
as p varies little with b around b(mu): to about a percent from a few counts on (`on_off_coverage` gives the exact coverage). For an upper
limit q is 0 where mu_hat > mu, for a lower limit where mu_hat < mu. The interval is the hull of the set. sqrt(q(0)) is the significance of
Li and Ma.

Source: Feldman & Cousins 1998, arXiv:physics/9711021, sections III, IV and VI, tables IV and X; profiled nuisances: Cousins, Linnemann &
Tucker 2008, arXiv:physics/0702156; Li & Ma 1983, ApJ 272, 317, equation 17; CLs: Read 2002, J. Phys. G 28, 2693.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri, gammaln, lambertw, ndtr, ndtri, pdtr, xlogy

from sbi_phys.confidence._inputs import KINDS
from sbi_phys.confidence.sets import Interval
from sbi_phys.core.checks import as_real, check_level, require_choice, require_finite, require_number
from sbi_phys.core.errors import ConvergenceError, DataError, ShapeError
from sbi_phys.core.types import Array, ArrayLike

__all__ = [
    "FeldmanCousins",
    "OnOff",
    "acceptance",
    "counting_cls",
    "counting_wilks",
    "feldman_cousins",
    "feldman_cousins_gaussian",
    "li_ma",
    "on_off",
    "on_off_coverage",
    "on_off_wilks",
]

Ends = tuple[float, float] | tuple[Array, Array]

SCAN = 6000  # points in mu: pieces of the set that are narrower than 1/6000 of the range may be missed
B_STEP, B_SPAN = 0.005, 5.0  # step and range of the backgrounds above b that are searched for a higher limit
RISES = np.array([0.001, 0.004, 0.01, 0.03, 0.1, 0.3])  # above the limit: a piece of the set that ends higher holds one of these


def feldman_cousins(n: ArrayLike, background: ArrayLike, level: float = 0.9, *, monotone: bool = True) -> Ends:
    r"""Unified interval for the mean mu >= 0 of a Poisson signal over a known background, {mu: sum_{R(k) > R(n)} P(k | mu + b) < level}.

    Args:
        n: observed counts, whole numbers >= 0, any shape.
        background: expected counts b >= 0, known; broadcast against n.
        level: confidence level in (0, 1).
        monotone: lengthen the interval where a larger background would give a higher limit, as the published tables do
            (backgrounds up to b + 5 are searched; accurate to about 0.005 in mu); False: the plain belt.

    Returns: (low, high), counts; numbers for numbers, else arrays of the common shape.
    Raises: ShapeError, NonFiniteError, DataError (negative or fractional counts, negative background), SettingError (level).
    Source: arXiv:physics/9711021, table IV; b = 0, n = 3 gives [1.10, 7.42].
    Read: low = 0 is an upper limit. Fewer counts than background give a small limit: quote the expected one as well.

    >>> from sbi_phys.confidence import feldman_cousins
    >>> [round(end, 1) for end in feldman_cousins(3, 0.0, 0.9)]
    [1.1, 7.4]
    """
    counts, b = as_real("n", n), as_real("background", background)
    require_finite("n", counts)
    require_finite("background", b)
    level = check_level(level)
    if (counts < 0).any() or (counts != np.rint(counts)).any():
        bad = counts[(counts < 0) | (counts != np.rint(counts))].flat[0]
        raise DataError(f"n has {bad:g}; expected whole numbers of counts >= 0")
    if (b < 0).any():
        raise DataError(f"background has {b.min():g}; expected a mean number of counts >= 0")
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

    >>> from sbi_phys.confidence import acceptance
    >>> low, high = acceptance([0.5], 3.0, 0.9)
    >>> low.tolist(), high.tolist()
    ([0.0], [6.0])
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
    # below lambda: the branch valid for k >= b, then the line valid below b; -1 where all counts down to 0 have a larger R
    k = np.where(w < 0, lam * np.exp(1 + _lambert(np.minimum(w, -1e-300), -1)), -1.0)
    line = (k < b) & (b > 0)
    slope = np.log(lam[line] / b[line])
    k[line] = np.where(slope > 0, (log_r[line] + mu[line]) / np.maximum(slope, 1e-300), -1.0)
    return np.maximum(k, -1.0)


def _lambert(w: Array, branch: int) -> Array:
    # rounding may move the argument beyond the branch point -1/e, where W = -1
    value = lambertw(np.maximum(w, -np.exp(-1)), branch).real
    return np.where(np.isfinite(value), value, -1.0)


def _cdf(k: Array, lam: Array) -> Array:
    return np.where(k < 0, 0.0, pdtr(np.maximum(k, 0.0), lam))


def _ends(n: float, b: float, level: float, monotone: bool) -> tuple[float, float]:
    # beyond `top` the probability of n or fewer counts is below a thousandth of 1 - level
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

    >>> from sbi_phys.confidence import feldman_cousins_gaussian
    >>> [round(end, 1) for end in feldman_cousins_gaussian(0.0, level=0.9)]
    [0.0, 1.6]
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
    """Counting experiment with known background as a source of intervals, for `limits` and `expected_limits`; data are counts.

    >>> from sbi_phys.confidence import FeldmanCousins, limits
    >>> found = limits(FeldmanCousins(background=3.0), [4, 6], kind="upper", level=0.9)
    >>> found.high.round(1).tolist()
    [5.6, 8.5]
    """

    background: float
    name: str = "mu"
    monotone: bool = True

    def interval(self, data: ArrayLike, level: float | None = None) -> Interval:
        """Unified intervals for counts (n,); level 0.9 if None.   Raises: as `feldman_cousins`."""
        wanted = 0.9 if level is None else check_level(level)
        low, high = feldman_cousins(np.atleast_1d(as_real("data", data)), self.background, wanted, monotone=self.monotone)
        return Interval(name=self.name, level=wanted, low=np.asarray(low), high=np.asarray(high), method="Feldman-Cousins")


FINE, COARSE, HALVINGS = 120, 40, 26  # values of mu that are tried; fewer with many counts, where the set has no pieces
MANY = 100  # counts above which the coarse grid is used
MOST_PAIRS = 4_000_000  # largest number of pairs of counts that a p-value is summed over
TIE = 1e-9  # values of q closer than this are equal up to rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class OnOff:
    """Counts n_on, n_off with exposure ratio tau = off / on.   Raises: DataError, SettingError.

    >>> from sbi_phys.confidence import OnOff
    >>> counts = OnOff(n_on=5, n_off=4, tau=2)
    >>> counts.best, bool(counts.pvalue(3.0) > 0.99)
    (3.0, True)
    """

    n_on: float
    n_off: float
    tau: float

    def __post_init__(self) -> None:
        """Check the counts and the ratio."""
        for name in ("n_on", "n_off"):
            value = require_number(name, getattr(self, name), low=0)
            if value != round(value):
                raise DataError(f"{name} is {value:g}; expected a whole number of counts >= 0")
        require_number("tau", self.tau, low=0, open_low=True)

    @property
    def best(self) -> float:
        """mu_hat, counts."""
        return max(0.0, self.n_on - self.n_off / self.tau)

    def background(self, mu: ArrayLike) -> Array:
        """Background b(mu) (g,) that fits best at each mu (g,), counts in the on region."""
        return _background(np.asarray(self.n_on), np.asarray(self.n_off), np.asarray(mu, dtype=np.float64), self.tau)

    def q(self, mu: ArrayLike) -> Array:
        """Profile likelihood ratio 2 [ln L(mu_hat, b) - ln L(mu, b(mu))] (g,)."""
        return _q(np.asarray(self.n_on), np.asarray(self.n_off), np.asarray(mu, dtype=np.float64), self.tau, "interval")

    def pvalue(self, mu: float, *, kind: str = "interval") -> float:
        """P(q >= q of the data | mu, b(mu)), summed over all counts.   Raises: SettingError, DataError (too many counts to sum over)."""
        require_choice("kind", kind, KINDS)
        mu = require_number("mu", mu, low=0)
        b = float(self.background(mu))
        n, p_n = _poisson(mu + b)
        m, p_m = _poisson(self.tau * b)
        if n.size * m.size > MOST_PAIRS:
            raise DataError(f"n_on = {self.n_on:g} and n_off = {self.n_off:g} are {n.size} x {m.size} pairs of counts; expected at most "
                            f"{MOST_PAIRS:g}: with so many counts on_off_wilks is accurate")  # fmt: skip
        observed = _q(np.asarray(self.n_on), np.asarray(self.n_off), np.asarray(mu), self.tau, kind)
        as_bad = _q(n[:, None], m[None, :], np.asarray(mu), self.tau, kind) >= observed - TIE * (1 + observed)
        return min(1.0, float(p_n @ as_bad @ p_m))


def on_off(n_on: float, n_off: float, tau: float, level: float = 0.9, *, kind: str = "interval") -> tuple[float, float]:
    r"""Confidence interval for a signal mu >= 0 over a background that was counted off source, {mu: p(mu) > 1 - level}.

    Args: n_on, n_off: counts. tau: exposure of the off region over that of the on region. level. kind: 'interval' (two-sided or an upper
        limit, as the data decide), 'upper' or 'lower'.
    Returns: (low, high), counts; 0 or inf on a side that was not asked for.
    Raises: DataError (counts that are negative, no whole numbers, or too many to sum over), SettingError.
    Source: arXiv:physics/9711021, arXiv:physics/0702156.   Read: low = 0 is an upper limit.

    >>> from sbi_phys.confidence import on_off
    >>> low, high = on_off(5, 4, 2.0, 0.9)
    >>> low < 3 < high
    True
    """
    counts, alpha = OnOff(n_on=n_on, n_off=n_off, tau=tau), 1 - check_level(level)
    require_choice("kind", kind, KINDS)
    top = _beyond(lambda mu: counts.pvalue(mu, kind=kind) < 1e-2 * alpha if kind != "lower" else True, counts)
    if kind == "lower":
        top = counts.best
    grid = np.unique(np.append(np.linspace(0, top, FINE if n_on + n_off < MANY else COARSE), counts.best))
    inside = np.array([counts.pvalue(float(mu), kind=kind) > alpha for mu in grid])
    if not inside.any():  # cannot happen: the grid contains mu_hat, where q = 0
        raise ConvergenceError(f"no mu up to {top:g} is in the set of n_on = {n_on:g}, n_off = {n_off:g}; expected one that holds mu_hat")
    first, last = int(inside.argmax()), int(inside.size - 1 - inside[::-1].argmax())

    def edge(within: float, out: float) -> float:
        for _ in range(HALVINGS):
            middle = (within + out) / 2
            within, out = (middle, out) if counts.pvalue(middle, kind=kind) > alpha else (within, middle)
        return within

    low = 0.0 if first == 0 else edge(float(grid[first]), float(grid[first - 1]))
    if kind == "lower":
        return low, float("inf")
    high = edge(float(grid[last]), float(grid[last + 1])) if last + 1 < grid.size else float(grid[-1])
    return (0.0 if kind == "upper" else low), high


def on_off_wilks(n_on: float, n_off: float, tau: float, level: float = 0.9, *, kind: str = "interval") -> tuple[float, float]:
    """Asymptotic interval {mu: q(mu) <= chi2_level(1)}, for a limit Phi^-1(level)^2; returns and raises as `on_off`.

    Read: the difference from `on_off` is the effect of few counts and of the bound at 0; at mu = 0 nominal 90 % covers 95 %.

    >>> from sbi_phys.confidence import on_off_wilks
    >>> low, high = on_off_wilks(5, 4, 2.0, kind="upper")
    >>> low, high > 3
    (0.0, True)
    """
    counts = OnOff(n_on=n_on, n_off=n_off, tau=tau)
    return _wilks_ends(lambda mu: float(counts.q(mu)), counts.best, check_level(level), kind, 1 + np.sqrt(n_on + n_off))


def counting_wilks(n: float, background: float, level: float = 0.9, *, kind: str = "interval") -> tuple[float, float]:
    """Asymptotic interval or limit for a known background, n ~ Poisson(mu + background).   Raises: DataError, SettingError.

    >>> from sbi_phys.confidence import counting_wilks
    >>> [round(end, 2) for end in counting_wilks(0, 3.0, 0.9)]
    [0.0, 1.35]
    """
    n, b = require_number("n", n, low=0), require_number("background", background, low=0)
    best = max(0.0, n - b)

    def q(mu: float) -> float:
        return float(2 * (xlogy(n, best + b) - best - xlogy(n, mu + b) + mu))

    return _wilks_ends(q, best, check_level(level), kind, 1 + np.sqrt(n + b))


def counting_cls(n: float, background: float, level: float = 0.9) -> float:
    """Upper limit by CLs, P(N <= n | mu + b) / P(N <= n | b) = 1 - level, counts.

    Raises: DataError, SettingError.   Source: Read 2002, J. Phys. G 28, 2693.   Read: it covers more than the level, especially
    with few counts; it is never empty and never below -ln(1 - level).

    >>> from sbi_phys.confidence import counting_cls
    >>> round(counting_cls(0, 3.0, 0.9), 3)  # -ln(0.1), whatever the background
    2.303
    """
    n, b = require_number("n", n, low=0), require_number("background", background, low=0)
    wanted = (1 - check_level(level)) * float(pdtr(n, b))
    low, high = 0.0, 10.0 + n
    while pdtr(n, high + b) > wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if pdtr(n, middle + b) > wanted else (low, middle)
    return high


def li_ma(n_on: float, n_off: float, tau: float) -> float:
    """Significance sqrt(q(0)) of a signal, sd; 0 where there is a deficit.   Raises: DataError, SettingError.   Source: ApJ 272, 317.

    >>> from sbi_phys.confidence import li_ma
    >>> li_ma(5, 20, 2.0), round(li_ma(12, 4, 1.0), 2)
    (0.0, 2.05)
    """
    return float(np.sqrt(max(0.0, float(OnOff(n_on=n_on, n_off=n_off, tau=tau).q(0.0)))))


def on_off_coverage(mu: float, background: float, tau: float, level: float = 0.9, *, kind: str = "interval") -> float:
    """Exact coverage of the sets of `on_off` at (mu, background): the probability of all counts whose p-value at mu exceeds 1 - level.

    Raises: DataError, SettingError.   Read: a value below the level is the effect of profiling; a value above it, that of discrete counts.

    >>> from sbi_phys.confidence import on_off_coverage
    >>> on_off_coverage(1.0, 1.0, 1.0, 0.9) > 0.88
    True
    """
    alpha = 1 - check_level(level)
    (n, p_n), (m, p_m) = _poisson(mu + background, 1e-6), _poisson(tau * background, 1e-6)
    total = 0.0
    for k, p in zip(m, p_m, strict=True):
        held = [OnOff(n_on=float(i), n_off=float(k), tau=tau).pvalue(mu, kind=kind) > alpha for i in n]
        total += float(p * (p_n @ np.array(held, dtype=np.float64)))
    return total / float(p_n.sum() * p_m.sum())


def _background(n: Array, m: Array, mu: Array, tau: float) -> Array:
    a = n + m - (1 + tau) * mu
    root = np.sqrt(a * a + 4 * (1 + tau) * m * mu)
    # the second form avoids the difference of two large numbers where a < 0
    with np.errstate(divide="ignore", invalid="ignore"):
        other = np.where(root - a > 0, 2 * m * mu / (root - a), 0.0)
    return np.where(a >= 0, (a + root) / (2 * (1 + tau)), other)


def _log_l(n: Array, m: Array, mu: Array, b: Array, tau: float) -> Array:
    return np.asarray(xlogy(n, mu + b) - mu - b + xlogy(m, tau * b) - tau * b)


def _q(n: Array, m: Array, mu: Array, tau: float, kind: str) -> Array:
    best = np.maximum(0.0, n - m / tau)
    top = _log_l(n, m, best, np.where(best > 0, m / tau, (n + m) / (1 + tau)), tau)
    q = np.maximum(2 * (top - _log_l(n, m, mu, _background(n, m, mu, tau), tau)), 0.0)
    if kind == "interval":
        return q
    return np.where(best > mu if kind == "upper" else best < mu, 0.0, q)


def _poisson(mean: float, tail: float = 1e-7) -> tuple[Array, Array]:
    """Counts with all but about `tail` of the probability on each side, and their probabilities."""
    z = float(-ndtri(tail))
    low = max(0, int(np.floor(mean - z * np.sqrt(mean) - 1)))
    k = np.arange(low, int(np.ceil(mean + z * np.sqrt(mean) + z * z / 3 + 3)) + 1, dtype=np.float64)
    return k, np.exp(xlogy(k, mean) - mean - gammaln(k + 1))


def _beyond(outside: Callable[[float], bool], counts: OnOff) -> float:
    """A value of mu above the set, found with growing steps."""
    step = 2 + 2 * np.sqrt(counts.n_on + counts.n_off / counts.tau**2)
    top = counts.best + step
    while not outside(top):
        top += step
        step *= 1.3
    return float(top)


def _wilks_ends(q: Callable[[float], float], best: float, level: float, kind: str, step: float) -> tuple[float, float]:
    require_choice("kind", kind, KINDS)
    target = float(chdtri(1, 1 - level)) if kind == "interval" else float(ndtri(level)) ** 2

    def root(within: float, out: float) -> float:
        for _ in range(60):
            middle = (within + out) / 2
            within, out = (middle, out) if q(middle) <= target else (within, middle)
        return within

    high = best + step
    while q(high) <= target:
        high += step
    low = 0.0 if kind == "upper" or q(0.0) <= target else root(best, 0.0)
    return float(low), float("inf") if kind == "lower" else float(root(best, high))
