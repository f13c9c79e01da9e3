"""Test statistics, their maximum search on narrow ridges, and the Newton steps of that search against closed forms."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import chdtri
from scipy.stats import norm

from sbi_phys.confidence import LRT, Profiled, RefinedLRT, Waldo, fit, lf2i, limits, neyman, posterior_moments, waldo
from sbi_phys.confidence.statistics import climb
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for


def log_likelihood(theta, data):
    return -0.5 * ((data[:, None, :] - theta[None]) ** 2).sum(axis=-1)


GRID = np.stack([g.ravel() for g in np.meshgrid(np.linspace(-3, 3, 61), np.linspace(-3, 3, 61), indexing="ij")], axis=1)
DATA = np.array([[0.4, -1.0], [2.0, 1.5], [0.0, 0.0]])


def test_lrt_of_a_gaussian_is_the_distance_squared():
    q = LRT(log_likelihood=log_likelihood, search=GRID)
    assert np.allclose(q([1.0, 1.0], DATA), ((DATA - 1.0) ** 2).sum(axis=1), atol=1e-9)
    rows = np.array([[0.4, -1.0], [1.0, 1.0], [3.0, 0.0]])
    assert np.allclose(q(rows, DATA), ((DATA - rows) ** 2).sum(axis=1), atol=1e-9)


def test_a_closed_form_maximum_does_the_same():
    by_form = LRT(log_likelihood=log_likelihood, maximum=lambda data: (data, np.zeros(len(data))))
    assert np.allclose(by_form([1.0, 1.0], DATA), LRT(log_likelihood=log_likelihood, search=GRID)([1.0, 1.0], DATA))


def test_one_sided_kinds():
    theta = np.array([1.0, 0.0])
    both, upper, lower = (LRT(log_likelihood=log_likelihood, search=GRID, kind=k)(theta, DATA) for k in ("interval", "upper", "lower"))
    above = DATA[:, 0] > 1.0
    assert np.array_equal(upper, np.where(above, 0, both))
    assert np.array_equal(lower, np.where(above, both, 0))


def test_profiling_takes_the_maximum_over_nuisances():
    profiled = Profiled(log_likelihood=log_likelihood, nuisances=np.linspace(-3, 3, 61))
    q = LRT(log_likelihood=profiled, search=np.linspace(-3, 3, 61))
    assert np.allclose(q([1.0], DATA), (DATA[:, 0] - 1) ** 2, atol=1e-9)
    assert np.allclose(profiled.nuisance([0.0], DATA)[:, 0], DATA[:, 1], atol=1e-9)


def test_waldo_of_a_gaussian_posterior():
    mean, covariance = np.array([[1.0, 2.0]]), np.array([[[2.0, 0.5], [0.5, 1.0]]])
    exact = np.array([1.0, 1.0]) @ np.linalg.inv(covariance[0]) @ np.array([1.0, 1.0])
    assert waldo(mean, covariance, [0.0, 1.0])[0] == pytest.approx(exact)
    draws = rng_for(0, "waldo").multivariate_normal(mean[0], covariance[0], (1, 200_000))
    assert Waldo(draws=lambda data: draws)([0.0, 1.0], None)[0] == pytest.approx(exact, rel=0.02)
    one = Waldo(moments=lambda data: (mean, covariance), columns=(1,))
    assert one([0.0, 1.0], None)[0] == pytest.approx(1.0)
    assert one([1.0], None)[0] == pytest.approx(1.0)


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
        found = one_sided.interval(x, level, n_points=100)
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
    q = Waldo(moments=lambda data: (mean, covariance), columns=(1,), kind="upper")([0.0, 0.5], None)
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
        (lambda: LRT(log_likelihood=lambda t, d: np.full((3, len(t)), np.nan), search=GRID)([0, 0], DATA), NonFiniteError, "is nan"),
        (lambda: LRT(log_likelihood=lambda t, d: np.full((3, len(t)), -np.inf), search=GRID)([0, 0], DATA), DataError, "-Inf at all"),
        (lambda: LRT(log_likelihood=lambda t, d: np.zeros(3), search=GRID)([0, 0], DATA), ShapeError, "log_likelihood"),
        (lambda: LRT(log_likelihood=log_likelihood, search=GRID)(np.zeros((2, 2)), DATA), ShapeError, "one row per data set"),
        (lambda: LRT(log_likelihood=log_likelihood, search=GRID)([np.nan, 0], DATA), NonFiniteError, "theta"),
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
    assert np.isposinf(q([-1.0, 0.0], DATA)).all()
    assert np.isfinite(q([1.0, 0.0], DATA)).all()


COVARIANCE = np.array([[1.0, 0.98], [0.98, 1.0]]) * 0.02**2
PRECISION = np.linalg.inv(COVARIANCE)


def ridge(theta, x):
    d = x - theta
    return -0.5 * np.einsum("ni,ij,nj->n", d, PRECISION, d)


def ratio(**changes):
    asked = {"log_likelihood": ridge, "low": [0, 0], "high": [1, 1], "names": ("a", "b")}
    return RefinedLRT(**(asked | changes))


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(0)
    theta = rng.uniform(0.1, 0.9, (600, 2))
    return theta, theta + rng.multivariate_normal([0, 0], COVARIANCE, 600)


def test_profile_ratio_of_a_narrow_correlated_gaussian(sample):
    theta, x = sample
    q = ratio()
    prepared = q.prepare(x)
    assert np.abs(prepared.at - x).max() < 2e-3  # a tenth of the error of x
    value, exact = q(theta, prepared), ((x - theta)[:, 0] / 0.02) ** 2
    assert np.abs(value - exact).max() < 0.03
    assert abs((value <= chdtri(1, 0.1)).mean() - 0.9) < 0.04
    nuisance = q.nuisance(theta, prepared)[:, 0]
    assert np.abs(nuisance - (x[:, 1] + 0.98 * (theta - x)[:, 0])).max() < 2e-3
    assert np.array_equal(q(theta, x), value)  # prepared or not


def test_joint_and_one_sided(sample):
    theta, x = sample
    joint = ratio(interest=2)(theta, x)
    d = x - theta
    assert np.abs(joint - np.einsum("ni,ij,nj->n", d, PRECISION, d)).max() < 0.03
    upper = ratio(kind="upper")(theta, x)
    assert (upper[x[:, 0] > theta[:, 0] + 0.003] == 0).all() and (upper[x[:, 0] < theta[:, 0] - 0.01] > 0).all()


def test_one_data_set_at_many_values(sample):
    _, x = sample
    q, psi = ratio(), np.linspace(0.2, 0.8, 5)[:, None]
    many = q(psi, q.repeated(x[:1], 5))
    assert np.array_equal(many, [q(p, x[:1])[0] for p in psi])
    with pytest.raises(ShapeError, match="2 sets; expected one"):
        q.repeated(x[:2], 5)


def test_sets_from_it_hold_the_truth(sample):
    theta, x = sample
    q = ratio(low=theta.min(axis=0), high=theta.max(axis=0))
    sets = lf2i(theta, q(theta, x), q, 0.9, names=["a", "b"], interest=1, profile=q.nuisance, model="constant")
    x = x[np.abs(x - 0.5).max(axis=1) < 0.25]
    found = sets.interval(x[:3], n_points=400)
    assert np.allclose(found.high - found.low, 2 * 1.645 * 0.02, rtol=0.15)
    assert np.allclose((found.high + found.low) / 2, x[:3, 0], atol=2e-3)


NUISANCES = 5


@pytest.fixture(scope="module")
def many():
    """Six parameters, errors of 2 % of the box, correlations of .9; two of the truths near its sides."""
    d = NUISANCES + 1
    covariance = (np.full((d, d), 0.9) + 0.1 * np.eye(d)) * 0.02**2
    precision = np.linalg.inv(covariance)
    rng = np.random.default_rng(3)
    theta = rng.uniform(0.1, 0.9, (200, d))
    x = theta + rng.multivariate_normal(np.zeros(d), covariance, 200)

    def gaussian(theta, x):
        return -0.5 * np.einsum("ni,ij,nj->n", x - theta, precision, x - theta)

    q = RefinedLRT(log_likelihood=gaussian, low=np.zeros(d), high=np.ones(d), names=tuple("abcdef"), n_points=12)
    return q, theta, x, covariance


def test_many_nuisances_are_profiled(many):
    q, theta, x, covariance = many
    prepared = q.prepare(x)
    assert np.abs(prepared.at - x).max() < 1e-4
    value, exact = q(theta, prepared), ((x - theta)[:, 0] / 0.02) ** 2
    assert np.abs(value - exact).max() < 0.01
    assert abs((value <= chdtri(1, 0.1)).mean() - 0.9) < 4 * np.sqrt(0.09 / 200)
    expected = x[:, 1:] + 0.9 * (theta - x)[:, :1]
    assert np.abs(q.nuisance(theta, prepared) - expected).max() < 1e-3
    assert np.abs(q.nuisance(theta, x) - expected).max() < 1e-3  # without the first guess
    pair = RefinedLRT(log_likelihood=q.log_likelihood, low=q.low, high=q.high, names=q.names, interest=2, n_points=12)(theta[:50], x[:50])
    d = (x - theta)[:50, :2]
    assert np.abs(pair - np.einsum("ni,ij,nj->n", d, np.linalg.inv(covariance[:2, :2]), d)).max() < 0.01


def test_counts_with_four_nuisances_agree_with_minuit():
    rng = np.random.default_rng(4)
    # a line over four templates that can be told apart
    shapes = np.stack([np.exp(-0.5 * ((np.arange(16) - m) / w) ** 2) for m, w in ((7, 0.7), (0, 2.5), (5, 2.5), (10, 2.5), (15, 2.5))])
    scale = np.array([15.0, 20.0, 20.0, 20.0, 20.0])

    def counts(theta, n):
        mean = (theta * scale) @ shapes + 1.0
        return (n * np.log(mean) - mean).sum(axis=1)

    names, low, high = ("mu", "a", "b", "c", "d"), np.zeros(5), np.full(5, 4.0)
    data = rng.poisson((np.ones(5) * scale) @ shapes + 1.0, (4, 16)).astype(float)
    q = RefinedLRT(log_likelihood=counts, low=low, high=high, names=names, n_points=12)
    for row, value in zip(data, q([1.6], data), strict=True):
        sides = dict(zip(names, zip(low, high, strict=True), strict=True))
        exact = fit(lambda t, row=row: counts(t, row), np.ones(5), names, sides, minos=False, strategy=2).profile("mu", [1.6])
        assert value == pytest.approx(exact.q[0], abs=0.01)


def test_power_with_many_nuisances(many):
    q, theta, x, _ = many
    away = theta.copy()
    away[:, 0] += 0.05  # 2.5 errors
    assert abs((q(away, x) <= chdtri(1, 0.1)).mean() - norm.sf(2.5 - 1.645)) < 4 * np.sqrt(0.16 / 200)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"low": [0, 0, 0], "high": [1, 1, 1], "names": ("a", "b", "c"), "interest": 3}, SettingError, "interest is 3; expected"),
        ({"low": [0, 1]}, SettingError, "expected low < high"),
        ({"interest": 3}, SettingError, "interest is 3"),
        ({"kind": "both"}, SettingError, "kind is 'both'"),
    ],
)
def test_a_bad_box_is_named(changes, error, complaint):
    with pytest.raises(error, match=complaint):
        ratio(**changes)


def test_bad_values_are_named(sample):
    _, x = sample
    with pytest.raises(SupportError, match=r"a = 1\.5 lies beyond what was simulated, \[0, 1\]"):
        ratio()([1.5], x)
    with pytest.raises(ShapeError, match="one row per data set"):
        ratio()([[0.1], [0.2]], x)
    with pytest.raises(NonFiniteError, match="log_likelihood is nan at theta"):
        ratio(log_likelihood=lambda theta, x: np.full(len(x), np.nan))([0.5], x)
    with pytest.raises(DataError, match="data set 0 has ln L = -Inf at all"):
        ratio(log_likelihood=lambda theta, x: np.full(len(x), -np.inf))([0.5], x)


N = 60


def gaussian_peak(x, width, rho):
    d = x.shape[1]
    precision = np.linalg.inv((np.full((d, d), rho) + (1 - rho) * np.eye(d)) * width**2)

    def values(rows, theta):
        away = theta - x[rows][:, None]
        return -0.5 * np.einsum("nji,ik,njk->nj", away, precision, away)

    return values


def climb_from_the_middle(values, d):
    start = np.full((N, d), 0.5)
    return climb(values, start, values(np.arange(N), start[:, None])[:, 0], np.zeros(d), np.ones(d))


@pytest.mark.parametrize(("d", "rho"), [(1, 0.0), (3, 0.98), (5, 0.99), (8, 0.9)])
def test_narrow_ridges_in_many_parameters(d, rho):
    x = np.random.default_rng(d).uniform(0, 1, (N, d))
    best, at = climb_from_the_middle(gaussian_peak(x, 0.02, rho), d)
    assert best.min() > -1e-6
    assert np.abs(at - x).max() < 1e-4


def test_single_precision_will_do():
    x = np.random.default_rng(0).uniform(0.1, 0.9, (N, 4))
    exact = gaussian_peak(x, 0.03, 0.8)
    best, _ = climb_from_the_middle(lambda rows, t: (exact(rows, t) - 5000.0).astype(np.float32).astype(np.float64), 4)
    assert (best + 5000).min() > -0.02  # steps of single precision at 5000 are 5e-4


def test_maxima_beyond_the_box_are_found_on_its_sides():
    x = np.random.default_rng(1).uniform(-0.4, 1.4, (N, 4))
    values = gaussian_peak(x, 0.1, 0.9)
    best, at = climb_from_the_middle(values, 4)
    assert at.min() >= 0 and at.max() <= 1

    def loss(theta, i):
        return -values(np.array([i]), theta[None, None])[0, 0]

    for i in range(20):
        exact = minimize(
            loss, np.clip(x[i], 0, 1), args=(i,), bounds=[(0, 1)] * 4, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9}
        )
        assert best[i] > -exact.fun - 0.01


def test_a_curved_valley_and_impossible_places():
    x = np.random.default_rng(2).uniform(-1, 1, (N, 3))

    def values(rows, theta):
        u = (theta - 0.5) * 6
        bent = u.copy()
        bent[..., 1] -= (u[..., 0] - x[rows][:, None, 0]) ** 2
        heavy = -3 * np.log1p(((bent - x[rows][:, None]) ** 2).sum(axis=-1) / 0.3)
        return np.where(theta[..., 2] > 0.95, -np.inf, heavy)

    best, at = climb_from_the_middle(values, 3)
    assert best.min() > -0.01
    assert (at[:, 2] <= 0.95).all()
