r"""Counting with a background that was itself counted: n_on ~ Poisson(mu + b), n_off ~ Poisson(tau b); mu >= 0 wanted, b a nuisance.

Profile likelihood ratio, everything in closed form: with A = n_on + n_off - (1 + tau) mu the background that fits best at mu is

    b(mu) = [A + sqrt(A^2 + 4 (1 + tau) n_off mu)] / (2 (1 + tau)),
    mu_hat = max(0, n_on - n_off / tau),      q(mu) = 2 [ln L(mu_hat, b(mu_hat)) - ln L(mu, b(mu))].

Its distribution is summed over all pairs of counts, at the background that fits the data best, instead of being looked up in a chi-square:

    p(mu) = sum over (n, m) with q(n, m; mu) >= q(data; mu) of Poisson(n | mu + b(mu)) Poisson(m | tau b(mu)),

and the set is {mu: p(mu) > 1 - level}: the construction of Feldman and Cousins with the nuisance profiled, without toys and without
their noise. It covers as far as p varies little with b around b(mu): to about a percent from a few counts on, see `on_off_coverage`.
For an upper limit q is 0 where mu_hat > mu, for a lower one where mu_hat < mu. The set may fall in pieces; the interval is its hull.

With q(0), sqrt(q(0)) is the significance of Li and Ma.

Source: Feldman & Cousins 1998, arXiv:physics/9711021; profiled nuisances: Cousins, Linnemann & Tucker 2008, arXiv:physics/0702156;
Li & Ma 1983, ApJ 272, 317, equation 17.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri, gammaln, ndtri, pdtr, xlogy

from sbi_phys.confidence.inputs import check_level
from sbi_phys.core.checks import require_choice, require_number
from sbi_phys.core.errors import ConvergenceError, DataError
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["OnOff", "counting_cls", "counting_wilks", "li_ma", "on_off", "on_off_coverage", "on_off_wilks"]


KINDS = ("interval", "upper", "lower")
SCAN, COARSE, HALVINGS = 120, 40, 26  # values of mu that are tried; fewer with many counts, where the set has no pieces
MANY = 100  # counts
MOST_PAIRS = 4_000_000  # of counts that a p-value is summed over
TIE = 1e-9  # values of q nearer than this are the same but for rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class OnOff:
    """Counts n_on, n_off with exposure ratio tau = off / on.   Raises: DataError, SettingError."""

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
                            f"{MOST_PAIRS:g}: with so many counts on_off_wilks is as good")  # fmt: skip
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
    """
    counts, alpha = OnOff(n_on=n_on, n_off=n_off, tau=tau), 1 - check_level(level)
    require_choice("kind", kind, KINDS)
    top = _beyond(lambda mu: counts.pvalue(mu, kind=kind) < 1e-2 * alpha if kind != "lower" else True, counts)
    if kind == "lower":
        top = counts.best
    grid = np.unique(np.append(np.linspace(0, top, SCAN if n_on + n_off < MANY else COARSE), counts.best))
    inside = np.array([counts.pvalue(float(mu), kind=kind) > alpha for mu in grid])
    if not inside.any():  # cannot be where mu_hat is: there q = 0
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

    Read: beside `on_off` it tells what few counts and the bound at 0 do; at mu = 0 nominal 90 % covers 95 %.
    """
    counts = OnOff(n_on=n_on, n_off=n_off, tau=tau)
    return _wilks_ends(lambda mu: float(counts.q(mu)), counts.best, check_level(level), kind, 1 + np.sqrt(n_on + n_off))


def counting_wilks(n: float, background: float, level: float = 0.9, *, kind: str = "interval") -> tuple[float, float]:
    """The same for a known background: n ~ Poisson(mu + background).   Raises: DataError, SettingError."""
    n, b = require_number("n", n, low=0), require_number("background", background, low=0)
    best = max(0.0, n - b)

    def q(mu: float) -> float:
        return float(2 * (xlogy(n, best + b) - best - xlogy(n, mu + b) + mu))

    return _wilks_ends(q, best, check_level(level), kind, 1 + np.sqrt(n + b))


def counting_cls(n: float, background: float, level: float = 0.9) -> float:
    """Upper limit by CLs, P(N <= n | mu + b) / P(N <= n | b) = 1 - level, counts.

    Raises: DataError, SettingError.   Source: Read 2002, J. Phys. G 28, 2693.   Read: it covers more than the level, the more the fewer
    counts there are; it is never empty and never below -ln(1 - level).
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
    """Significance sqrt(q(0)) of a signal, sd; 0 where there is a deficit.   Raises: DataError, SettingError.   Source: ApJ 272, 317."""
    return float(np.sqrt(max(0.0, float(OnOff(n_on=n_on, n_off=n_off, tau=tau).q(0.0)))))


def on_off_coverage(mu: float, background: float, tau: float, level: float = 0.9, *, kind: str = "interval") -> float:
    """Exact coverage of the sets of `on_off` at (mu, background): the probability of all counts whose p-value at mu exceeds 1 - level.

    Raises: DataError, SettingError.   Read: below the level is what profiling has cost; above it, whole numbers.
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
    # the second form has no difference of large numbers where a < 0
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
    """A value of mu above the set, by steps that grow."""
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
