import numpy as np
import pytest
from scipy.stats import chi2

from sbi_phys.calibration import predictive_pvalue
from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError


def test_number_by_hand_and_its_error():
    result = predictive_pvalue(np.arange(1.0, 100.0), 80.0)
    assert result.pvalue == pytest.approx((1 + 20) / 100)
    assert result.error == pytest.approx(np.sqrt(0.21 * 0.79 / 100))
    assert result.n == 99


def test_agrees_with_the_exact_tail_of_chi_square():
    t = np.random.default_rng(0).chisquare(10, 20_000)
    result = predictive_pvalue(t, 15.0)
    assert result.pvalue == pytest.approx(chi2.sf(15, 10), abs=4 * result.error)


def test_is_uniform_for_data_from_the_same_distribution():
    rng = np.random.default_rng(1)
    p = np.array([predictive_pvalue(rng.standard_normal(99), rng.standard_normal()).pvalue for _ in range(1000)])
    assert abs(np.mean(p <= 0.05) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_pairs_are_compared_row_by_row():
    t_rep, t_obs = np.arange(10.0), np.arange(10.0)[::-1]
    assert predictive_pvalue(t_rep, t_obs).pvalue == pytest.approx(6 / 11)


@pytest.mark.parametrize(("observed", "word"), [(1e9, "does not describe"), (-1e9, "overstated"), (0.0, "look like")])
def test_words_and_plots(observed, word):
    t = np.random.default_rng(2).standard_normal(500)
    for t_obs in (observed, np.full(500, observed)):
        result = predictive_pvalue(t, t_obs)
        assert word in result.summary()
        ax = result.plot()
        assert ax.get_xlabel()
        assert result.plot(ax) is ax
    assert 0 < result.pvalue <= 1


def test_bad_input():
    with pytest.raises(DataError, match="at least 10"):
        predictive_pvalue([1.0, 2.0], 1.0)
    with pytest.raises(ShapeError, match="t_obs"):
        predictive_pvalue(np.ones(20), np.ones(19))
    with pytest.raises(ShapeError, match="t_rep"):
        predictive_pvalue(np.ones((20, 2)), 1.0)
    with pytest.raises(NonFiniteError, match="t_rep"):
        predictive_pvalue(np.full(20, np.nan), 1.0)
    with pytest.raises(NonFiniteError, match="t_obs"):
        predictive_pvalue(np.ones(20), np.inf)
