import numpy as np
import pytest
from scipy.stats import norm

from sbi_phys.confidence import LRT, FeldmanCousins, expected_limits, feldman_cousins, limits, neyman
from sbi_phys.core.errors import DataError, SettingError, SupportError
from sbi_phys.core.rng import rng_for


def gaussian(theta, n, rng):
    return rng.normal(theta[0], 1.0, n)


def log_likelihood(theta, data):
    return -0.5 * (np.asarray(data)[:, None] - theta[None, :, 0]) ** 2


def maximum(data):
    return np.asarray(data)[:, None], np.zeros(len(data))


@pytest.fixture(scope="module")
def upper():
    statistic = LRT(log_likelihood=log_likelihood, maximum=maximum, kind="upper")
    return neyman(gaussian, statistic, np.linspace(-6, 9, 31), 0.95, n_toys=8000, names=["mu"])


def test_one_sided_statistic_gives_the_textbook_limit(upper):
    x = np.array([-1.0, 0.0, 2.0])
    found = limits(upper, x, kind="upper", level=0.95)
    assert np.allclose(found.high, x + norm.ppf(0.95), atol=0.08)
    assert np.isneginf(found.low).all()
    assert "upper limit on mu" in found.summary()


def test_upper_limits_cover(upper):
    x = gaussian([1.3], 4000, rng_for(0, "cover"))
    assert abs(upper.contains(x, 1.3).mean() - 0.95) < 0.015


def test_expected_limits(upper):
    found = expected_limits(upper, gaussian([0.0], 4000, rng_for(1, "toys")), level=0.95)
    assert np.allclose(found.bands, norm.ppf(0.95) + np.array([-2, -1, 0, 1, 2]), atol=0.2)
    assert found.median == found.bands[2]
    assert found.share_beyond(norm.ppf(0.95) - 1) == pytest.approx(0.159, abs=0.03)
    assert "68 %" in found.summary()
    ax = found.plot(observed=1.0)
    assert "observed 1" in ax.get_legend_handles_labels()[1]


def test_expected_limits_of_a_counting_experiment():
    counts = rng_for(2, "counts").poisson(3.0, 500)
    found = expected_limits(FeldmanCousins(background=3.0), counts, level=0.9)
    # the median count of Poisson(3) is 3; sensitivity of arXiv:physics/9711021, table XII, is the mean, 4.42 to 4.5
    assert found.median == pytest.approx(feldman_cousins(3, 3.0)[1], abs=1e-6)


def test_lower_limits_and_intervals():
    lower = LRT(log_likelihood=log_likelihood, maximum=maximum, kind="lower")
    found = neyman(gaussian, lower, np.linspace(-6, 9, 16), 0.95, n_toys=4000)
    assert limits(found, [2.0], kind="lower", level=0.95).low[0] == pytest.approx(2 - norm.ppf(0.95), abs=0.12)


@pytest.mark.parametrize(
    ("data", "settings", "error", "words"),
    [
        (None, {}, SettingError, "expected data"),
        ([0.0], {"kind": "uper"}, SettingError, "kind is 'uper'"),
        ([0.0], {"level": 0.9}, SettingError, "expected one that critical values were made for"),
        ([8.5], {}, SupportError, "reaches the end of the simulated grid"),
    ],
)
def test_bad_input(upper, data, settings, error, words):
    with pytest.raises(error) as raised:
        limits(upper, data, **({"kind": "upper", "level": 0.95} | settings))
    assert words in str(raised.value)


def test_an_empty_set_is_an_error(upper):
    with pytest.raises(DataError, match="excluded"):
        limits(upper, [-40.0], kind="upper", level=0.95)


def test_few_toys():
    with pytest.raises(DataError, match="40 or more"):
        expected_limits(FeldmanCousins(background=3.0), [1, 2, 3])
