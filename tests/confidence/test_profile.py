import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import chi2, norm, poisson

from sbi_phys.confidence import asymptotic_limit, cls_limit, cls_value, contour, discovery, fit, impacts, limits, profile
from sbi_phys.confidence.profile import conditional
from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.priors import Parameter
from tests.confidence import on_off_toy as toy

MEAN = np.array([1.0, -2.0, 0.5])
COVARIANCE = np.array([[1.0, 0.6, 0.2], [0.6, 2.0, -0.3], [0.2, -0.3, 0.5]])
PRECISION = np.linalg.inv(COVARIANCE)


def gaussian(theta):
    d = theta - MEAN
    return -0.5 * np.einsum("mi,ij,mj->m", d, PRECISION, d)


def on_off(on, off):
    return lambda theta: toy.log_likelihood(theta, np.array([[on, off]], dtype=float))[0]


@pytest.fixture(scope="module")
def best():
    return fit(gaussian, [0.0, 0.0, 0.0], ["a", "b", "c"])


def test_a_gaussian_gives_its_own_mean_and_covariance(best):
    assert np.allclose(best.values, MEAN, atol=1e-3)
    assert np.allclose(best.covariance, COVARIANCE, rtol=1e-3, atol=1e-4)
    assert np.allclose(best.minos, np.sqrt(np.diag(COVARIANCE))[:, None] * [-1, 1], rtol=2e-3)
    assert best.nll == pytest.approx(0, abs=1e-5)
    assert np.allclose(np.diag(best.correlation), 1)
    assert best.at_limit == ()
    assert "a " in best.summary() and "Minos" in best.summary()


def test_profile_of_a_gaussian_is_its_marginal_parabola(best):
    found = profile(best, "b", np.linspace(-5, 1, 7))
    assert np.allclose(found.q, (found.grid + 2) ** 2 / 2.0, atol=2e-3)
    # the conditional fit: regression of the others on b
    assert np.allclose(found.values[:, 0], 1.0 + 0.3 * (found.grid + 2), atol=5e-3)
    assert found.plot().get_xlabel() == "b"


def test_contour_content_and_axes(best):
    found = contour(best, "a", "c", n_points=11)
    x, y = np.meshgrid(found.x - 1.0, found.y - 0.5, indexing="ij")
    marginal = np.linalg.inv(COVARIANCE[np.ix_([0, 2], [0, 2])])
    exact = marginal[0, 0] * x**2 + 2 * marginal[0, 1] * x * y + marginal[1, 1] * y**2
    assert np.allclose(found.q, exact, atol=5e-3)
    assert found.threshold(0.683) == pytest.approx(chi2.ppf(0.683, 2))
    assert found.plot().get_ylabel() == "c"


def test_two_parameters_need_no_fits():
    two = fit(on_off(85, 70), [0.5, 1.0], ["mu", "nu"])
    found = contour(two, "nu", "mu", n_points=9)
    nll = -on_off(85, 70)(np.array([[found.y[2], found.x[3]]]))[0]
    assert found.q[3, 2] == pytest.approx(2 * (nll - two.nll), abs=1e-6)


def test_on_off_against_the_closed_form():
    found = fit(on_off(100, 70), [0.5, 1.1], ["mu", "nu"])
    assert found.value("mu") == pytest.approx(2.0, abs=1e-3)
    assert found.value("nu") == pytest.approx(1.0, abs=1e-3)
    assert found.error("mu") == pytest.approx(np.sqrt(170) / 15, rel=2e-3)

    def q(mu):
        data = np.array([[100.0, 70.0]])
        return 2 * (toy.maximum(data)[1][0] - toy.profiled([[mu]], data)[0, 0])

    exact = [brentq(lambda m: q(m) - 1, *ends) for ends in ((0.0, 2.0), (2.0, 5.0))]
    assert np.allclose(found.values[0] + found.minos[0], exact, atol=2e-3)
    assert np.allclose(found.interval("mu", 0.6827), exact, atol=2e-3)
    # significance of Li & Ma 1983, equation 17
    li_ma = np.sqrt(2 * (100 * np.log(2 * 100 / 170) + 70 * np.log(2 * 70 / 170)))
    assert discovery(found, "mu").significance == pytest.approx(li_ma, abs=2e-3)
    assert discovery(found, "mu").pvalue == pytest.approx(norm.sf(li_ma), rel=0.02)
    assert asymptotic_limit(found, "mu", 0.95) == pytest.approx(brentq(lambda m: q(m) - norm.ppf(0.95) ** 2, 2, 9), abs=2e-3)
    lower = asymptotic_limit(found, "mu", 0.95, kind="lower")
    assert lower == pytest.approx(brentq(lambda m: q(m) - norm.ppf(0.95) ** 2, 0, 2), abs=2e-3)


def test_a_limit_is_kept_and_said():
    found = fit(on_off(60, 70), [0.5, 1.0], [Parameter("mu", low=0.0, latex=r"\mu"), "nu"])
    assert found.at_limit == ("mu",)
    assert "AT ITS LIMIT" in found.summary()
    assert found.interval("mu", 0.9)[0] == 0.0
    assert discovery(found, "mu").significance == 0.0
    assert found.labels[0] == r"$\mu$"


def test_constraints_pull_and_impact():
    # counts 110 over 100 (1 + 0.1 a) with a = 0 +- 1 and a signal: Gaussian enough for the exact normal equations
    def log_likelihood(theta):
        mu, a, b = theta.T
        return -0.5 * (110 - 20 * mu - 100 * (1 + 0.1 * a)) ** 2 / 100 - 0.5 * (3.0 - mu - 0.2 * b) ** 2 / 4

    found = fit(log_likelihood, [0.0, 0.0, 0.0], ["mu", "a", "b"], constraints={"a": (0.0, 1.0), "b": (0.5, 1.0)})
    design = np.array([[-2.0, -1.0, 0.0], [-0.5, 0.0, -0.1], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    offset = np.array([-1.0, -1.5, 0.0, 0.5])
    covariance = np.linalg.inv(design.T @ design)
    assert np.allclose(found.values, covariance @ design.T @ offset, atol=1e-3)
    assert np.allclose(found.covariance, covariance, atol=1e-3)
    assert found.pulls["b"] == pytest.approx((found.value("b") - 0.5, np.sqrt(covariance[2, 2])), abs=1e-3)
    ranking = impacts(found, "mu")
    assert ranking.names == ("a", "b")
    assert ranking.up[0] == pytest.approx(covariance[0, 1] / np.sqrt(covariance[1, 1]), abs=1e-3)
    assert ranking.down[0] == pytest.approx(-ranking.up[0], abs=1e-3)
    assert ranking.statistical == pytest.approx(1 / np.sqrt(4.25), abs=1e-3)
    assert "pull" in ranking.summary() and "pull" in found.summary()
    assert [t.get_text() for t in ranking.plot().get_yticklabels()] == ["a", "b"]


def test_cls_of_a_gaussian_is_its_closed_form():
    # x ~ N(mu, 1), mu >= 0: CLs = (1 - Phi(mu - x)) / Phi(x)
    for x in (-1.0, 0.3, 1.5):
        data = fit(lambda t, x=x: -0.5 * (t[:, 0] - x) ** 2, [max(x, 0.1)], ["mu"], {"mu": (0.0, None)})
        asimov = fit(lambda t: -0.5 * t[:, 0] ** 2, [0.1], ["mu"], {"mu": (0.0, None)})
        observed, bands = cls_limit(data, asimov, "mu", 0.95)
        exact = brentq(lambda m, x=x: norm.sf(m - x) / norm.cdf(x) - 0.05, max(x, 0), 12)
        assert observed == pytest.approx(exact, abs=5e-3)
        n = np.array([-2, -1, 0, 1, 2])
        assert np.allclose(bands, norm.ppf(1 - 0.05 * norm.cdf(n)) + n, atol=5e-3)
    found = limits(data, kind="upper", level=0.95, asimov=asimov)
    assert found.high[0] == observed and "CLs" in found.summary() and "expected" in found.summary()


def test_cls_values():
    assert cls_value(0.0, 4.0) == pytest.approx(0.5 / norm.cdf(2))
    assert cls_value(4.0, 4.0) == pytest.approx(2 * norm.sf(2))
    with pytest.raises(DataError, match="q_asimov > 0"):
        cls_value(1.0, 0.0)


def test_limits_of_a_fit():
    found = fit(on_off(100, 70), [0.5, 1.1], ["mu", "nu"])
    both = limits(found, level=0.9, name="mu")
    assert np.allclose([both.low[0], both.high[0]], found.interval("mu", 0.9))
    assert limits(found, kind="upper", name="mu").high[0] == pytest.approx(asymptotic_limit(found, "mu", 0.9))
    assert limits(found, kind="lower", name="mu").low[0] == pytest.approx(asymptotic_limit(found, "mu", 0.9, kind="lower"))
    for settings, words in (({}, "name is None"), ({"name": "mu", "data": [1]}, "data=None"), ({"name": "mux"}, "no parameter 'mux'")):
        with pytest.raises(SettingError, match=words):
            limits(found, **settings)


def test_asymptotic_coverage_with_many_events():
    # one Poisson count of mean 400: Wilks is right
    inside = []
    for n in range(320, 481):
        found = fit(lambda t, n=n: n * np.log(t[:, 0]) - t[:, 0], [float(n)], ["nu"], {"nu": (1.0, None)}, minos=False)
        low, high = found.interval("nu", 0.683)
        inside.append(poisson.pmf(n, 400) * (low <= 400 <= high))
    assert sum(inside) == pytest.approx(0.683, abs=0.02)


def test_single_precision_is_a_matter_of_precision():
    def single(theta):
        return gaussian(theta.astype(np.float32)).astype(np.float32) + np.float32(50)

    found = fit(single, [0.5, 0.5, 0.5], precision=1e-6, minos=False)
    assert np.allclose(found.values, MEAN, atol=0.03)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fit(lambda t: np.full(len(t), np.nan), [0.0], ["a"]), NonFiniteError, "nan at a = 0"),
        (lambda: fit(lambda t: np.full(len(t), np.inf), [0.0], ["a"]), NonFiniteError, "inf at a = 0"),
        (lambda: fit(lambda t: np.full(len(t), -np.inf), [0.0], ["a"]), NonFiniteError, "-Inf at the start"),
        (lambda: fit(lambda t: t[:, 0], [0.0], ["a"]), ConvergenceError, "did not converge"),
        (lambda: fit(lambda t: -(t[:, 0] ** 2), [0.0, 0.0], ["a", "b"]), ConvergenceError, "expected"),
        (lambda: fit(lambda t: np.zeros((len(t), 2)), [0.0], ["a"]), ShapeError, "log_likelihood"),
        (lambda: fit(gaussian, [0.0] * 3, ["a", "b"]), ShapeError, "names has 2"),
        (lambda: fit(gaussian, [0.0] * 3, ["a", "b", "c"], {"a": (1.0, 2.0)}), SettingError, "outside of its limits"),
        (lambda: fit(gaussian, [0.0] * 3, ["a", "b", "c"], {"a": (1.0, -2.0)}), SettingError, "expected low < high"),
        (lambda: fit(gaussian, [0.0] * 3, ["a", "b", "c"], {"d": (1.0, 2.0)}), SettingError, "no parameter 'd'"),
        (lambda: fit(gaussian, [0.0] * 3, ["a", "b", "c"], constraints={"a": (0.0, 0.0)}), SettingError, "sd of the constraint"),
        (lambda: fit(gaussian, [0.0] * 3, ["a", "b", "c"], constraints={"a": 1.0}), SettingError, "(mean, standard deviation)"),
        (lambda: fit(gaussian, [np.nan] * 3), NonFiniteError, "start"),
        (lambda: fit(gaussian, [0.0] * 3, strategy=3), SettingError, "strategy"),
    ],
)
def test_bad_fits(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)


def test_bad_scans(best):
    with pytest.raises(SettingError, match="both 'a'"):
        contour(best, "a", "a")
    with pytest.raises(SettingError, match="did you mean 'a'|no parameter"):
        profile(best, "A")
    bounded = fit(gaussian, [0.5, 0.0, 0.0], ["a", "b", "c"], {"a": (0.0, None)}, minos=False)
    with pytest.raises(SettingError, match="outside of its limits"):
        conditional(bounded, {"a": -1.0})
    with pytest.raises(SettingError, match="more than 0.5"):
        asymptotic_limit(best, "a", 0.4)
    with pytest.raises(SettingError, match="only parameter"):
        impacts(fit(lambda t: -0.5 * t[:, 0] ** 2, [0.1], ["a"]), "a")


def test_a_deeper_minimum_is_an_error():
    def two_wells(theta):
        x = theta[:, 0]
        return np.logaddexp(-0.5 * ((x + 3) / 0.5) ** 2, 2.0 - 0.5 * ((x - 3) / 0.5) ** 2)

    found = fit(two_wells, [-3.2], ["x"], minos=False)
    with pytest.raises(ConvergenceError, match="deeper minimum at x = 3"):
        profile(found, "x", [3.0])
