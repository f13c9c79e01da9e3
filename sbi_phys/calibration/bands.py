"""Simultaneous bands and exact p-values for the empirical distribution of uniform quantities.

Let c_i be the number of N independent U(0, 1) values at or below z_i, with z_1 < ... < z_K. Each c_i ~ Binomial(N, z_i), and

    gamma(c) = min_i 2 min{ P(B_i <= c_i), P(B_i >= c_i) },   B_i ~ Binomial(N, z_i),

is the two-sided level of the most extreme point of the curve. The simultaneous band of coverage 1 - alpha contains every point whose
level is above the alpha-quantile of gamma; the p-value of a curve is P(gamma <= observed gamma). Both follow from the probability
that a whole curve lies between two integer boundaries. This probability is computed without simulation: given their sum, Poisson
counts in the intervals (z_i-1, z_i] are multinomial, so the boundary-crossing probability is a chain of K convolutions, divided by
the Poisson probability of the total.

The same numbers hold for discrete ranks r in 0..L if each z_i is a multiple of 1/(L+1), because #{r < k} is exactly
Binomial(N, k/(L+1)). No continuous approximation is made for any L.

Source: Sailynoja, Burkner & Vehtari 2022, arXiv:2103.10522 (the band); Moscovich & Nadler 2017, arXiv:1503.04363 (the sum).
"""

from functools import lru_cache

import numpy as np
from scipy.special import bdtrik, betainc, betaincc, gammaln

from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import SettingError
from sbi_phys.core.types import Array, ArrayLike, Integers

__all__ = ["band_counts", "count_curves", "curve_pvalue", "pointwise_level", "rank_grid", "staying_probability"]


def rank_grid(n_draws: int, n_points: int = 100) -> Integers:
    """Integers k, 0 < k <= L, at which #{rank < k} is counted: at most n_points - 1 of them, evenly spaced.

    Args: n_draws = L, ranks take the values 0..L. n_points, number of intervals of the unit interval.
    Raises: SettingError.   Read: the levels are k / (L + 1).
    """
    n_values = require_int("n_draws", n_draws, low=1) + 1
    n_points = require_int("n_points", n_points, low=2)
    k = np.rint(np.arange(1, n_points) * n_values / n_points).astype(np.int64)
    return np.unique(k[(k > 0) & (k < n_values)])


def staying_probability(n: int, z: ArrayLike, low: ArrayLike, high: ArrayLike) -> float:
    r"""P(low_i <= c_i <= high_i for all i), c_i = #{u <= z_i} of N uniform values; exact.

    Args: n = N. z (k,), increasing, in (0, 1). low, high (k,), whole numbers.
    Raises: ShapeError, SettingError.   Source: Moscovich & Nadler 2017, arXiv:1503.04363.
    """
    n, levels = _check(n, z)
    lower = np.maximum(np.asarray(low, dtype=np.int64), 0)
    upper = np.minimum(np.asarray(high, dtype=np.int64), n)
    if np.any(lower > upper):
        return 0.0
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    probability, first = np.ones(1), 0  # of the counts `first`, `first` + 1, ... without having left the corridor
    edges = np.append(levels, 1.0)
    for step, lo, hi in zip(np.diff(edges, prepend=0.0), np.append(lower, n), np.append(upper, n), strict=True):
        last = first + probability.size - 1
        jumps = np.arange(max(lo - last, 0), hi - first + 1)
        if jumps.size == 0:
            return 0.0
        mean = n * step
        reached = np.convolve(probability, np.exp(jumps * np.log(mean) - mean - log_factorial[jumps]))  # Poisson jumps
        start = first + int(jumps[0])
        lo = max(int(lo), start)
        probability, first = reached[lo - start : int(hi) - start + 1], lo
        if probability.size == 0:
            return 0.0
    total = np.exp(n * np.log(n) - n - log_factorial[n])
    return float(np.clip(probability[-1] / total, 0.0, 1.0))


def _check(n: int, z: ArrayLike) -> tuple[int, Array]:
    levels = as_array("z", z, (None,))
    if levels.size == 0 or levels[0] <= 0 or levels[-1] >= 1 or np.any(np.diff(levels) <= 0):
        raise SettingError("z is not increasing within (0, 1); expected levels 0 < z_1 < ... < z_k < 1")
    return require_int("n", n, low=1), levels


def _below(k: Array | Integers, n: int, z: Array) -> Array:
    """P(B <= k) of Binomial(n, z); k may be any whole number."""
    inside = np.clip(k, 0, n - 1)
    return np.where(k < 0, 0.0, np.where(k >= n, 1.0, betaincc(inside + 1.0, n - inside, z)))


def _above(k: Array | Integers, n: int, z: Array) -> Array:
    """P(B >= k) of Binomial(n, z), with all digits in the far tail."""
    inside = np.clip(k, 1, n)
    return np.where(k < 1, 1.0, np.where(k > n, 0.0, betainc(inside, n - inside + 1.0, z)))


def _corridor(n: int, levels: Array, gamma: float) -> tuple[Integers, Integers]:
    # Counts whose two-sided level is >= gamma: P(B <= c) >= gamma / 2 and P(B >= c) >= gamma / 2.
    # The quantile function rounds; whether to move by one is decided by the probabilities themselves.
    half = gamma / 2
    low = np.ceil(np.nan_to_num(bdtrik(half, n, levels))).astype(np.int64)
    low += _below(low, n, levels) < half
    low -= _below(low - 1, n, levels) >= half
    # the upper end is the lower one of the mirrored count n - c at 1 - z
    mirrored = np.ceil(np.nan_to_num(bdtrik(half, n, 1 - levels))).astype(np.int64)
    high = n - mirrored
    high -= _above(high, n, levels) < half
    high += _above(high + 1, n, levels) >= half
    return low, high


@lru_cache(maxsize=64)
def _level(n: int, levels: tuple[float, ...], coverage: float) -> float:
    z = np.asarray(levels)
    low, high = np.log((1 - coverage) / (2 * z.size)), np.log(1 - coverage)
    # at `low` (half of the Bonferroni level) the coverage is certainly reached; `high` gives the pointwise interval
    if staying_probability(n, z, *_corridor(n, z, float(np.exp(high)))) >= coverage:
        return float(np.exp(high))
    for _ in range(30):
        middle = 0.5 * (low + high)
        if staying_probability(n, z, *_corridor(n, z, float(np.exp(middle)))) >= coverage:
            low = middle
        else:
            high = middle
    return float(np.exp(low))


def pointwise_level(n: int, z: ArrayLike, coverage: float = 0.95) -> float:
    r"""Largest gamma for which the pointwise 1 - gamma binomial intervals contain all K counts jointly with probability >= coverage.

    Args: n = N values. z (k,), levels in (0, 1), increasing. coverage in (0, 1).
    Returns: gamma, e.g. 0.0024 for N = 500 and 100 points.   Raises: ShapeError, SettingError.
    Source: Sailynoja, Burkner & Vehtari 2022, arXiv:2103.10522, section 2.2.
    """
    n, levels = _check(n, z)
    coverage = require_number("coverage", coverage, low=0, high=1, open_low=True, open_high=True)
    return _level(n, tuple(levels.tolist()), coverage)


def band_counts(n: int, z: ArrayLike, coverage: float = 0.95) -> Integers:
    """Simultaneous band (k, 2) of the counts c_i, edges included: all K counts of uniform values lie in it with this probability.

    Args: as in `pointwise_level`.   Raises: ShapeError, SettingError.
    Source: Sailynoja, Burkner & Vehtari 2022, arXiv:2103.10522.
    Read: a curve that leaves the band anywhere is inconsistent with uniformity at level 1 - coverage.
    """
    gamma = pointwise_level(n, z, coverage)
    return np.stack(_corridor(*_check(n, z), gamma), axis=-1)


def curve_pvalue(counts: ArrayLike, n: int, z: ArrayLike) -> float:
    r"""p-value of a curve of counts, P(gamma <= observed gamma), exact for independent uniform values.

    Args: counts (k,), #{u <= z_i}. n = N. z (k,), increasing, in (0, 1).
    Returns: p in (0, 1]; the test uses the most extreme point and corrects for the number of points.
    Raises: ShapeError, SettingError.   Source: Sailynoja, Burkner & Vehtari 2022, arXiv:2103.10522.
    Read: p < 0.05 exactly when the curve leaves the 95 % band (up to the discreteness of counts).
    """
    n, levels = _check(n, z)
    c = as_array("counts", counts, (levels.size,))
    gamma = float(np.min(2 * np.minimum(_below(c, n, levels), _above(c, n, levels))))
    if gamma >= 1:
        return 1.0
    # strictly less extreme curves have every level above gamma; the factor is far below the spacing of binomial tails
    stays = staying_probability(n, levels, *_corridor(n, levels, gamma * (1 + 1e-9)))
    # 1 - stays loses its digits for tiny p, where the union bound is used; p is never below the tail of one point
    return float(np.clip(1 - stays, max(gamma / 2, 1e-300), min(1.0, levels.size * gamma) or 1e-300))


def count_curves(ranks: Integers, k: Integers) -> Integers:
    """Counts #{rank < k} (k, d) of integer ranks (n, d), one curve for each column."""
    return np.stack([np.searchsorted(np.sort(column), k, side="left") for column in ranks.T], axis=-1)
