"""Toys: p-values that are uniform under the null, and the normal's where the statistic is one."""

import numpy as np
import pytest
from scipy.stats import chi2, kstest, norm

from sbi_phys.comparison import nested_test
from sbi_phys.core.errors import DataError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from simulators import OnOff
from tests.toys import LinearGaussian

TOY = LinearGaussian(dim=1, noise=1.0)


def square(x):
    return x[:, 0] ** 2


def test_the_pvalue_is_the_normals():
    for value in (0.3, 1.5, 2.5):
        got = nested_test(TOY, [value], square, [0.0], n_toys=4000, dof=1)
        want = 2 * norm.sf(value)
        assert got.pvalue == pytest.approx(want, abs=4 * np.sqrt(want * (1 - want) / 4000) + 1e-3)
        assert got.wilks == pytest.approx(chi2.sf(value**2, 1))
        assert got.interval[0] <= got.pvalue <= got.interval[1] + 1e-3
        assert got.significance_interval[0] <= got.significance <= got.significance_interval[1] + 1e-2
        assert got.significance == pytest.approx(norm.isf(got.pvalue))


def test_uniform_under_the_null_and_small_beside_it():
    x = rng_for(0).standard_normal(200)
    p = [nested_test(TOY, [v], square, [0.0], n_toys=99, seed=i).pvalue for i, v in enumerate(x)]
    assert kstest(np.array(p) - rng_for(1).random(200) / 100, "uniform").pvalue > 1e-3
    away = [nested_test(TOY, [v + 4], square, [0.0], n_toys=99, seed=i).pvalue for i, v in enumerate(x[:50])]
    assert np.mean(np.array(away) <= 0.05) > 0.9


def test_a_composite_null_takes_the_largest():
    sim = OnOff()

    def ratio(x):
        return sim.profile_ratio(x, 0.0)

    nulls = np.array([[0.0, 0.8], [0.0, 1.0], [0.0, 1.2]])
    got = nested_test(sim, [98.0, 72.0], ratio, nulls, n_toys=1000, dof=1)
    assert got.pvalue == got.pvalues.max()
    assert got.null_theta.tolist() in nulls.tolist()
    # half of the null's experiments have t = 0: the tail is half of the chi-square's
    assert got.pvalue == pytest.approx(got.wilks / 2, rel=0.5)
    assert "sigma" in got.summary()
    assert got.plot().get_yscale() == "log"


def test_no_toy_reaches_a_discovery():
    got = nested_test(TOY, [20.0], square, [0.0], n_toys=200)
    assert got.pvalue == pytest.approx(1 / 201)
    assert got.interval[0] == 0
    assert got.significance_interval[1] == np.inf
    assert "upper limit" in got.summary()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x_obs": [[1.0], [2.0]]}, ShapeError, "x_obs"),
        ({"statistic": "t"}, SettingError, "statistic"),
        ({"statistic": lambda x: np.full(len(x), np.nan)}, DataError, "statistic is nan"),
        ({"statistic": lambda x: x}, ShapeError, "statistic"),
        ({"null_theta": [[0.0, 1.0]]}, ShapeError, "null_theta"),
        ({"n_toys": 3}, SettingError, "n_toys"),
    ],
)
def test_bad_input(change, error, words):
    settings = {"x_obs": [1.0], "statistic": square, "null_theta": [0.0], **change}
    with pytest.raises(error, match=words):
        nested_test(TOY, **settings)
    with pytest.raises(SupportError, match="outside the prior"):
        nested_test(OnOff(), [1.0, 2.0], square, [9.0, 1.0])
