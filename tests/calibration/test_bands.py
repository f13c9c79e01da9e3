import itertools
from math import comb

import numpy as np
import pytest
from scipy.stats import binom, kstest

from sbi_phys.calibration.bands import _corridor, band_counts, curve_pvalue, pointwise_level, rank_grid, staying_probability
from sbi_phys.core.errors import SettingError, ShapeError

Z = np.arange(1, 100) / 100


def by_enumeration(n, z, low, high):
    cells = np.diff(np.concatenate([[0], z, [1]]))
    total = 0.0
    for counts in itertools.product(range(n + 1), repeat=len(cells)):
        if sum(counts) != n:
            continue
        c = np.cumsum(counts)[:-1]
        if np.all((c >= low) & (c <= high)):
            p, left = 1.0, n
            for k, q in zip(counts, cells, strict=True):
                p *= comb(left, k) * q**k
                left -= k
            total += p
    return total


@pytest.mark.parametrize(("low", "high"), [([0, 0, 1], [2, 3, 4]), ([0, 1, 2], [1, 3, 4]), ([1, 1, 1], [1, 1, 1]), ([0, 0, 0], [4, 4, 4])])
def test_staying_probability_equals_the_sum_over_all_outcomes(low, high):
    z = np.array([0.15, 0.5, 0.7])
    assert staying_probability(4, z, low, high) == pytest.approx(by_enumeration(4, z, np.array(low), np.array(high)), abs=1e-13)


def test_staying_probability_of_one_point_is_binomial():
    assert staying_probability(500, [0.3], [130], [165]) == pytest.approx(binom.cdf(165, 500, 0.3) - binom.cdf(129, 500, 0.3), abs=1e-12)
    assert staying_probability(10, [0.3, 0.6], [5, 0], [4, 10]) == 0.0
    assert staying_probability(10, [0.3, 0.6], [8, 0], [10, 5]) == 0.0


@pytest.mark.parametrize(("n", "level", "half_width"), [(500, 0.0024, 0.068), (1000, 0.0029, 0.047)])
def test_level_and_width_agree_with_published_simulation(n, level, half_width):
    # the reference values come from simulated bands; their levels are good to about a quarter
    band = band_counts(n, Z)
    assert pointwise_level(n, Z) == pytest.approx(level, rel=0.27)
    assert (band[49, 1] - band[49, 0]) / (2 * n) == pytest.approx(half_width, abs=0.0021)


def test_band_holds_the_whole_curve_in_95_percent_of_repetitions():
    n, repetitions = 500, 2000
    rng = np.random.default_rng(0)
    band = band_counts(n, Z)
    counts = np.stack([np.searchsorted(np.sort(u), Z, side="right") for u in rng.random((repetitions, n))])
    inside = np.all((counts >= band[:, 0]) & (counts <= band[:, 1]), axis=1).mean()
    assert abs(inside - 0.95) < 3 * np.sqrt(0.95 * 0.05 / repetitions)
    assert staying_probability(n, Z, band[:, 0], band[:, 1]) == pytest.approx(0.95, abs=0.003)


def test_pvalue_is_uniform_and_agrees_with_the_band():
    n = 300
    rng = np.random.default_rng(1)
    band, z = band_counts(n, Z), Z
    counts = np.stack([np.searchsorted(np.sort(u), z, side="right") for u in rng.random((400, n))])
    pvalues = np.array([curve_pvalue(c, n, z) for c in counts])
    outside = np.any((counts < band[:, 0]) | (counts > band[:, 1]), axis=1)
    assert kstest(pvalues, "uniform").pvalue > 1e-3
    assert np.mean((pvalues < 0.05) == outside) > 0.99


@pytest.mark.parametrize("n", [1, 7, 500, 20_000])
@pytest.mark.parametrize("gamma", [0.9, 0.05, 1e-3, 1e-9])
def test_corridor_is_the_set_of_counts_at_or_above_the_level(n, gamma):
    low, high = _corridor(n, Z, gamma)
    c = np.arange(n + 1)[:, None] if n <= 500 else np.unique(np.clip([low - 1, low, high, high + 1], 0, n))[:, None]
    level = 2 * np.minimum(binom.cdf(c, n, Z), binom.sf(c - 1, n, Z))
    clear = np.abs(level / gamma - 1) > 1e-9  # leave out what rounding decides
    np.testing.assert_array_equal((level >= gamma)[clear], ((c >= low) & (c <= high))[clear])


def test_pvalue_at_its_ends():
    assert 0 < curve_pvalue(np.zeros(99), 500, Z) < 1e-100
    assert curve_pvalue(np.round(500 * Z), 500, Z) > 0.999
    assert curve_pvalue([1], 2, [0.5]) == 1.0
    assert curve_pvalue([0], 2, [0.5]) == pytest.approx(0.5)


@pytest.mark.parametrize(("n_draws", "n"), [(1, 1), (2, 2), (20, 20), (99, 99), (1000, 99)])
def test_rank_grid_stays_between_the_ends(n_draws, n):
    k = rank_grid(n_draws)
    assert k.size == n
    assert k.min() >= 1
    assert k.max() <= n_draws
    assert np.all(np.diff(k) > 0)


def test_errors():
    with pytest.raises(SettingError, match="not increasing"):
        pointwise_level(10, [0.5, 0.5])
    with pytest.raises(SettingError, match="not increasing"):
        band_counts(10, [0.0, 0.5])
    with pytest.raises(SettingError, match="coverage"):
        band_counts(10, [0.5], 1.0)
    with pytest.raises(ShapeError, match="counts"):
        curve_pvalue([1, 2], 10, [0.5])
