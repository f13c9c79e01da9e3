import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import poisson

from sbi_phys.confidence import acceptance, feldman_cousins, feldman_cousins_gaussian, limits
from sbi_phys.confidence.feldman_cousins import FeldmanCousins, _before, _content
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
