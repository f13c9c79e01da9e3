import numpy as np
import pytest
from scipy.stats import norm

from sbi_phys.confidence import LRT, Profiled, Waldo, limits, neyman, posterior_moments, waldo
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for


def log_likelihood(theta, data):
    return -0.5 * ((data[:, None, :] - theta[None]) ** 2).sum(axis=-1)


GRID = np.stack([g.ravel() for g in np.meshgrid(np.linspace(-3, 3, 61), np.linspace(-3, 3, 61), indexing="ij")], axis=1)
DATA = np.array([[0.4, -1.0], [2.0, 1.5], [0.0, 0.0]])


def test_lrt_of_a_gaussian_is_the_distance_squared():
    q = LRT(log_likelihood=log_likelihood, search=GRID)
    assert np.allclose(q(DATA, [1.0, 1.0]), ((DATA - 1.0) ** 2).sum(axis=1), atol=1e-9)
    rows = np.array([[0.4, -1.0], [1.0, 1.0], [3.0, 0.0]])
    assert np.allclose(q(DATA, rows), ((DATA - rows) ** 2).sum(axis=1), atol=1e-9)


def test_a_closed_form_maximum_does_the_same():
    by_form = LRT(log_likelihood=log_likelihood, maximum=lambda data: (data, np.zeros(len(data))))
    assert np.allclose(by_form(DATA, [1.0, 1.0]), LRT(log_likelihood=log_likelihood, search=GRID)(DATA, [1.0, 1.0]))


def test_one_sided_kinds():
    theta = np.array([1.0, 0.0])
    both, upper, lower = (LRT(log_likelihood=log_likelihood, search=GRID, kind=k)(DATA, theta) for k in ("two-sided", "upper", "lower"))
    above = DATA[:, 0] > 1.0
    assert np.array_equal(upper, np.where(above, 0, both))
    assert np.array_equal(lower, np.where(above, both, 0))


def test_profiling_takes_the_maximum_over_nuisances():
    profiled = Profiled(log_likelihood=log_likelihood, nuisances=np.linspace(-3, 3, 61))
    q = LRT(log_likelihood=profiled, search=np.linspace(-3, 3, 61))
    assert np.allclose(q(DATA, [1.0]), (DATA[:, 0] - 1) ** 2, atol=1e-9)
    assert np.allclose(profiled.nuisance(DATA, [0.0])[:, 0], DATA[:, 1], atol=1e-9)


def test_waldo_of_a_gaussian_posterior():
    mean, covariance = np.array([[1.0, 2.0]]), np.array([[[2.0, 0.5], [0.5, 1.0]]])
    exact = np.array([1.0, 1.0]) @ np.linalg.inv(covariance[0]) @ np.array([1.0, 1.0])
    assert waldo(mean, covariance, [0.0, 1.0])[0] == pytest.approx(exact)
    draws = rng_for(0, "waldo").multivariate_normal(mean[0], covariance[0], (1, 200_000))
    assert Waldo(draws=lambda data: draws)(None, [0.0, 1.0])[0] == pytest.approx(exact, rel=0.02)
    one = Waldo(moments=lambda data: (mean, covariance), columns=(1,))
    assert one(None, [0.0, 1.0])[0] == pytest.approx(1.0)
    assert one(None, [1.0])[0] == pytest.approx(1.0)


SHRINK = 0.6  # a prior as wide as it pulls the posterior's mean to 0 by this factor


def pulled(data):
    """Posterior mean and covariance of x ~ N(theta, 1) under a narrow prior around 0."""
    return SHRINK * np.asarray(data)[:, None], np.full((len(data), 1, 1), SHRINK)


def gaussian(theta, n, rng):
    return rng.normal(theta[0], 1.0, n)


@pytest.fixture(scope="module", params=["upper", "lower"])
def one_sided(request):
    return neyman(gaussian, Waldo(moments=pulled, kind=request.param), {"theta": np.linspace(-9, 9, 37)}, [0.3, 0.9], n_toys=4000, seed=2)


def test_one_sided_limits_are_those_of_the_gaussian(one_sided):
    # at each theta the statistic is a falling function of x (rising for a lower limit): the prior drops out
    side, x = (1, "high") if one_sided.statistic.kind == "upper" else (-1, "low"), np.array([-3.0, 0.0, 1.2, 4.0])
    for level in (0.3, 0.9):
        found = one_sided.interval(x, level, points=100)
        assert np.allclose(getattr(found, side[1]), x + side[0] * norm.ppf(level), atol=0.08)
        assert np.isinf(found.low if side[0] > 0 else found.high).all()


def test_size_and_power_of_one_sided_limits(one_sided):
    sign = 1 if one_sided.statistic.kind == "upper" else -1
    for i, theta in enumerate((-2.0, 0.0, 3.0)):
        data = gaussian([theta], 4000, rng_for(3, "size", i))
        assert one_sided.contains(data, theta, 0.9).mean() == pytest.approx(0.9, abs=0.02)
        far = one_sided.contains(data, theta + 2.5 * sign, 0.9).mean()
        assert far == pytest.approx(norm.sf(2.5 - norm.ppf(0.9)), abs=0.025)
        assert one_sided.contains(data, theta - 2.5 * sign, 0.9).mean() > 0.995  # it does not object to this side
        p = one_sided.pvalue(data, theta)
        assert np.abs(np.quantile(p, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03


def test_limits_from_one_sided_sets(one_sided):
    kind = one_sided.statistic.kind
    found = limits(one_sided, np.array([0.5]), kind=kind, level=0.9)
    assert np.isfinite(found.high if kind == "upper" else found.low).all()
    assert found.summary().splitlines()[1].strip()[0] == ("<" if kind == "upper" else ">")


def test_one_of_several_parameters_one_sided():
    mean, covariance = np.array([[1.0, 2.0], [1.0, -1.0]]), np.array([[[2.0, 0.5], [0.5, 4.0]]] * 2)
    q = Waldo(moments=lambda data: (mean, covariance), columns=(1,), kind="upper")(None, [0.0, 0.5])
    assert np.allclose(q, [-(1.5**2) / 4, 1.5**2 / 4])
    assert np.allclose(waldo(mean[:, 1:], covariance[:, 1:, 1:], [0.5], "lower"), -q)


def test_moments():
    draws = rng_for(1, "moments").normal(size=(4, 500, 3))
    mean, covariance = posterior_moments(draws)
    assert np.allclose(mean, draws.mean(axis=1))
    assert np.allclose(covariance[2], np.cov(draws[2].T))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LRT(log_likelihood=log_likelihood), SettingError, "search and maximum"),
        (lambda: LRT(log_likelihood=log_likelihood, search=GRID, maximum=lambda d: (d, d)), SettingError, "expected one of them"),
        (lambda: LRT(log_likelihood=log_likelihood, search=GRID, kind="uper"), SettingError, "upper"),
        (lambda: LRT(log_likelihood=lambda t, d: np.full((3, len(t)), np.nan), search=GRID)(DATA, [0, 0]), NonFiniteError, "is nan"),
        (lambda: LRT(log_likelihood=lambda t, d: np.full((3, len(t)), -np.inf), search=GRID)(DATA, [0, 0]), DataError, "-Inf at all"),
        (lambda: LRT(log_likelihood=lambda t, d: np.zeros(3), search=GRID)(DATA, [0, 0]), ShapeError, "log_likelihood"),
        (lambda: LRT(log_likelihood=log_likelihood, search=GRID)(DATA, np.zeros((2, 2))), ShapeError, "one row per data set"),
        (lambda: LRT(log_likelihood=log_likelihood, search=GRID)(DATA, [np.nan, 0]), NonFiniteError, "theta"),
        (lambda: Waldo(), SettingError, "draws and moments"),
        (lambda: waldo(np.zeros((2, 2)), np.zeros((2, 2, 2)), [0.0, 0.0]), DataError, "not positive definite"),
        (lambda: waldo(np.zeros((2, 2)), np.ones((2, 2, 2)), [0.0]), ShapeError, "theta has shape"),
        (lambda: waldo(np.zeros((2, 2)), np.stack([np.eye(2)] * 2), [0.0, 0.0], "upper"), SettingError, "with 2 parameters; expected one"),
        (lambda: Waldo(draws=lambda d: d, kind="uper"), SettingError, "upper"),
        (lambda: Waldo(draws=lambda d: d, kind="upper", columns=(0, 1)), SettingError, "expected one column"),
        (lambda: posterior_moments(np.zeros((1, 2, 1))), DataError, "expected 3 or more"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)


def test_minus_infinity_means_impossible():
    q = LRT(log_likelihood=lambda t, d: np.where(t[None, :, 0] < 0, -np.inf, log_likelihood(t, d)), search=GRID)
    assert np.isposinf(q(DATA, [-1.0, 0.0])).all()
    assert np.isfinite(q(DATA, [1.0, 0.0])).all()
