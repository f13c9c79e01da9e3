"""Counting experiments: published intervals, exact coverage, limits known in closed form, and refused input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from scipy.stats import poisson

from sbi_phys.confidence import (
    OnOff,
    acceptance,
    counting_cls,
    counting_wilks,
    feldman_cousins,
    feldman_cousins_gaussian,
    li_ma,
    limits,
    on_off,
    on_off_coverage,
    on_off_wilks,
)
from sbi_phys.confidence.counting import FeldmanCousins, _before, _content
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError

# arXiv:physics/9711021, table IV: 90 %
PUBLISHED = {
    (0, 0.0): (0.00, 2.44),
    (1, 0.0): (0.11, 4.36),
    (2, 0.0): (0.53, 5.91),
    (3, 0.0): (1.10, 7.42),
    (4, 0.0): (1.47, 8.60),
    (5, 0.0): (1.84, 9.99),
    (6, 0.0): (2.21, 11.47),
    (7, 0.0): (3.56, 12.53),
    (0, 3.0): (0.00, 1.08),
    (1, 3.0): (0.00, 1.88),
    (2, 3.0): (0.00, 3.04),
    (3, 3.0): (0.00, 4.42),
    (4, 3.0): (0.00, 5.60),
    (5, 3.0): (0.00, 6.99),
    (6, 3.0): (0.15, 8.47),
    (7, 3.0): (0.89, 9.53),
    (8, 3.0): (1.51, 10.99),
}


def test_published_endpoints():
    n, b = np.array(list(PUBLISHED)).T
    low, high = feldman_cousins(n, b)
    wanted = np.array(list(PUBLISHED.values()))
    assert np.abs(low - wanted[:, 0]).max() < 0.02
    assert np.abs(high - wanted[:, 1]).max() < 0.02


def test_order_against_a_plain_sort():
    # the slow definition: sort all counts by R, add up
    for mu, b in ((0.37, 0.0), (2.3, 0.5), (4.61, 3.0), (0.2, 6.3), (9.7, 12.1)):
        k = np.arange(120)
        ratio = poisson.logpmf(k, mu + b) - poisson.logpmf(k, np.maximum(k, b))
        p = poisson.pmf(k, mu + b)
        slow = np.array([p[ratio > r].sum() for r in ratio[:60]])
        assert np.abs(_before(np.full(60, mu), k[:60], b) - slow).max() < 1e-10


@settings(max_examples=20)
@given(mu=st.floats(0, 12), b=st.sampled_from([0.0, 0.5, 3.0, 7.7]), level=st.sampled_from([0.683, 0.9, 0.95]))
def test_the_belt_holds_the_level_and_intervals_invert_it(mu, b, level):
    low, high = acceptance([mu], b, level)
    covered = poisson.cdf(high[0], mu + b) - poisson.cdf(low[0] - 1, mu + b)
    assert covered >= level - 1e-9
    for n in {int(low[0]), int(high[0])}:
        a, c = feldman_cousins(n, b, level, monotone=False)
        assert a - 1e-6 <= mu <= c + 1e-6


def test_exact_coverage_is_at_least_the_level():
    n = np.arange(60)
    low, high = feldman_cousins(n, 3.0, monotone=False)
    mu = np.linspace(0, 15, 301)
    covered = [(poisson.pmf(n, m + 3.0) * ((low <= m) & (m <= high))).sum() for m in mu]
    assert min(covered) > 0.9 - 1e-9
    assert np.mean(covered) < 0.95


def test_lengthening_makes_the_upper_end_fall_with_background():
    b = np.arange(2.5, 4, 0.05)
    plain, forced = (feldman_cousins(0, b, monotone=m)[1] for m in (False, True))
    assert np.diff(plain).max() > 0.02  # the pathology
    assert np.diff(forced).max() < 0.005
    assert (forced >= plain - 1e-12).all()


def test_shapes_broadcast():
    low, high = feldman_cousins([[0], [4]], [0.0, 3.0, 3.0])
    assert low.shape == high.shape == (2, 3)
    assert np.array_equal(high[:, 1], high[:, 2])
    assert isinstance(feldman_cousins(3, 0.0)[1], float)


def test_gaussian_known_values():
    low, high = feldman_cousins_gaussian([0.0, 1.0, 3.5], level=0.9)
    assert np.allclose(high, [1.645, 2.645, 5.145], atol=1e-3)
    assert np.allclose(low, [0, 0, 1.855], atol=1e-3)
    # table X
    assert np.allclose(feldman_cousins_gaussian(-3.0), (0.0, 0.26), atol=0.01)
    assert np.allclose(feldman_cousins_gaussian(2.0), (0.58, 3.64), atol=0.01)
    assert np.allclose(feldman_cousins_gaussian(6.0, 2.0), 2 * np.array(feldman_cousins_gaussian(3.0)))


@settings(max_examples=12)
@given(mu=st.floats(0, 5), level=st.sampled_from([0.683, 0.9, 0.95]))
def test_gaussian_coverage_is_exact(mu, level):
    x = np.linspace(mu - 8, mu + 8, 16001)
    low, high = feldman_cousins_gaussian(x, level=level)
    inside = (low <= mu) & (mu <= high)
    place = np.flatnonzero(inside)
    assert place.size == place[-1] - place[0] + 1  # one piece; at mu = 0 it has no lower end
    assert ndtr(x[place[-1]] - mu) - ndtr(x[place[0]] - mu) == pytest.approx(level, abs=2e-3)


def test_gaussian_content_is_the_sum_over_better_outcomes():
    x = np.linspace(-12, 14, 260_001)
    for mu, at in ((0.5, -1.0), (0.5, 1.5), (1.2, 0.1), (2.5, -0.3)):
        log_r = -0.5 * (x - mu) ** 2 + 0.5 * np.minimum(x, 0) ** 2
        own = -0.5 * (at - mu) ** 2 + 0.5 * min(at, 0) ** 2
        slow = np.trapezoid(np.where(log_r > own, np.exp(-0.5 * (x - mu) ** 2) / np.sqrt(2 * np.pi), 0), x)
        assert _content(np.array(mu), np.array(at)) == pytest.approx(slow, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: feldman_cousins(-1, 3.0), DataError, "n has -1"),
        (lambda: feldman_cousins(1.5, 3.0), DataError, "whole numbers"),
        (lambda: feldman_cousins(1, -3.0), DataError, "background has -3"),
        (lambda: feldman_cousins(np.nan, 3.0), NonFiniteError, "n has NaN"),
        (lambda: feldman_cousins(1, 3.0, level=1.0), SettingError, "level is 1.0"),
        (lambda: feldman_cousins([1, 2], [1.0, 2.0, 3.0]), ShapeError, "broadcast"),
        (lambda: acceptance([-0.1], 3.0), DataError, "mu has -0.1"),
        (lambda: acceptance([[1.0]], 3.0), ShapeError, "expected (g,)"),
        (lambda: feldman_cousins_gaussian(0.0, 0.0), DataError, "sigma has 0"),
        (lambda: feldman_cousins_gaussian([1.0, 2.0], [1.0, 2.0, 3.0]), ShapeError, "broadcast"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)


def test_as_a_source_of_limits():
    found = limits(FeldmanCousins(background=3.0, name="signal"), [4, 6], kind="upper")
    assert np.allclose(found.high, [5.60, 8.47], atol=0.02)
    assert np.isneginf(found.low).all()
    assert "signal" in found.summary()


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
