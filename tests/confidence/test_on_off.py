"""Counting with a counted background: coverage summed exactly, limits that are known in closed form, and what is refused."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import poisson

from sbi_phys.confidence import OnOff, counting_cls, counting_wilks, feldman_cousins, li_ma, on_off, on_off_coverage, on_off_wilks
from sbi_phys.core.errors import DataError, SettingError


@pytest.mark.parametrize(
    ("mu", "background", "tau", "kind"), [(0.0, 3.0, 1.0, "interval"), (2.0, 2.0, 1.0, "interval"), (3.0, 1.0, 2.0, "upper")]
)
def test_the_sets_cover_with_few_counts(mu, background, tau, kind):
    assert on_off_coverage(mu, background, tau, 0.9, kind=kind) > 0.885


def test_coverage_sees_sets_that_are_too_short(monkeypatch):
    shorter = OnOff.pvalue
    monkeypatch.setattr(OnOff, "pvalue", lambda self, mu, *, kind="interval": 0.6 * shorter(self, mu, kind=kind))
    assert on_off_coverage(2.0, 2.0, 1.0, 0.9) < 0.885


def test_an_interval_is_the_set_of_values_that_its_p_values_keep():
    counts, (low, high) = OnOff(n_on=10, n_off=3, tau=1.0), on_off(10, 3, 1.0)
    assert counts.pvalue(low + 1e-3) > 0.1 > counts.pvalue(low - 1e-3)
    assert counts.pvalue(high - 1e-3) > 0.1 > counts.pvalue(high + 1e-3)
    assert counts.pvalue(counts.best) == pytest.approx(1.0, abs=1e-5)


def test_without_counts_off_source_the_upper_limit_is_that_of_no_background():
    # the background that fits best is 0 for every mu: P(0 | mu) = 1 - level
    low, high = on_off(0, 0, 1.0, 0.9, kind="upper")
    assert low == 0.0 and high == pytest.approx(-np.log(0.1), abs=1e-4)
    assert on_off(4, 0, 2.0, 0.9, kind="upper")[1] == pytest.approx(7.99359, abs=1e-3)  # half a chi-square's quantile, 10 dof


def test_the_best_background_maximises_the_likelihood():
    counts = OnOff(n_on=7, n_off=9, tau=2.5)
    for mu in (0.0, 1.3, 6.0, 40.0):
        found = minimize_scalar(
            lambda b, mu=mu: -poisson.logpmf(7, mu + b) - poisson.logpmf(9, 2.5 * b),
            bounds=(1e-9, 60),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert float(counts.background(mu)) == pytest.approx(found.x, abs=1e-5)


def test_li_and_ma_published_form():
    n_on, n_off, alpha = 140.0, 70.0, 1.0
    total = n_on + n_off
    s = np.sqrt(2 * (n_on * np.log((1 + alpha) / alpha * n_on / total) + n_off * np.log((1 + alpha) * n_off / total)))
    assert li_ma(n_on, n_off, 1 / alpha) == pytest.approx(s, abs=1e-10)
    assert li_ma(3, 20, 2.0) == 0.0


def test_many_counts_agree_with_wilks_and_few_do_not():
    ours, theirs = on_off(140, 70, 1.0), on_off_wilks(140, 70, 1.0)
    assert np.abs(np.subtract(ours, theirs)).max() < 0.3  # sd 14.5
    assert on_off(0, 5, 4.0)[1] > on_off_wilks(0, 5, 4.0)[1] + 0.2


def test_lower_and_known_background():
    low, high = on_off(10, 3, 1.0, kind="lower")
    assert high == np.inf and low > on_off(10, 3, 1.0)[0]
    assert on_off_wilks(10, 3, 1.0, kind="lower")[1] == np.inf
    # q of Wilks at its ends is the chi-square's quantile
    _, high = counting_wilks(3, 1.2)
    q = 2 * (3 * np.log(3) - 3 - 3 * np.log(high + 1.2) + high + 1.2)
    assert q == pytest.approx(2.70554, abs=1e-4)
    assert counting_cls(0, 5.0, 0.95) == pytest.approx(-np.log(0.05), abs=1e-6)
    mu = counting_cls(3, 1.2, 0.9)
    assert poisson.cdf(3, mu + 1.2) / poisson.cdf(3, 1.2) == pytest.approx(0.1, abs=1e-8)
    assert mu < float(feldman_cousins(3, 1.2)[1]) + 1


@pytest.mark.parametrize(
    ("asked", "error", "complaint"),
    [
        ({"n_on": 2.5, "n_off": 1, "tau": 1.0}, DataError, "n_on is 2.5; expected a whole number"),
        ({"n_on": 2, "n_off": -1, "tau": 1.0}, SettingError, "n_off is -1"),
        ({"n_on": 2, "n_off": 1, "tau": 0.0}, SettingError, "tau is 0"),
        ({"n_on": 2, "n_off": 1, "tau": 1.0, "kind": "both"}, SettingError, "kind is 'both'"),
        ({"n_on": 10**6, "n_off": 10**6, "tau": 1.0}, DataError, "expected at most 4e.06"),
    ],
)
def test_bad_input_is_named(asked, error, complaint):
    with pytest.raises(error, match=complaint):
        on_off(**asked)
