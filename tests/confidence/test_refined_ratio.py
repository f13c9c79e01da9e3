"""The search finds the maximum of ridges far narrower than its first grid; its statistic is the exact one there."""

import numpy as np
import pytest
from scipy.special import chdtri
from scipy.stats import norm

from sbi_phys.confidence import RefinedLRT, fit, lf2i
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError

COVARIANCE = np.array([[1.0, 0.98], [0.98, 1.0]]) * 0.02**2
PRECISION = np.linalg.inv(COVARIANCE)


def log_likelihood(x, theta):
    d = x - theta
    return -0.5 * np.einsum("ni,ij,nj->n", d, PRECISION, d)


def ratio(**changes):
    asked = {"log_likelihood": log_likelihood, "low": [0, 0], "high": [1, 1], "names": ("a", "b")}
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
    value, exact = q(prepared, theta), ((x - theta)[:, 0] / 0.02) ** 2
    assert np.abs(value - exact).max() < 0.03
    assert abs((value <= chdtri(1, 0.1)).mean() - 0.9) < 0.04
    nuisance = q.nuisance(prepared, theta)[:, 0]
    assert np.abs(nuisance - (x[:, 1] + 0.98 * (theta - x)[:, 0])).max() < 2e-3
    assert np.array_equal(q(x, theta), value)  # prepared or not


def test_joint_and_one_sided(sample):
    theta, x = sample
    joint = ratio(interest=2)(x, theta)
    d = x - theta
    assert np.abs(joint - np.einsum("ni,ij,nj->n", d, PRECISION, d)).max() < 0.03
    upper = ratio(kind="upper")(x, theta)
    assert (upper[x[:, 0] > theta[:, 0] + 0.003] == 0).all() and (upper[x[:, 0] < theta[:, 0] - 0.01] > 0).all()


def test_one_data_set_at_many_values(sample):
    _, x = sample
    q, psi = ratio(), np.linspace(0.2, 0.8, 5)[:, None]
    many = q(q.repeated(x[:1], 5), psi)
    assert np.array_equal(many, [q(x[:1], p)[0] for p in psi])
    with pytest.raises(ShapeError, match="2 sets; expected one"):
        q.repeated(x[:2], 5)


def test_sets_from_it_hold_the_truth(sample):
    theta, x = sample
    q = ratio(low=theta.min(axis=0), high=theta.max(axis=0))
    sets = lf2i(theta, q(x, theta), q, 0.9, names=["a", "b"], interest=1, profile=q.nuisance, model="constant")
    x = x[np.abs(x - 0.5).max(axis=1) < 0.25]
    found = sets.interval(x[:3], points=400)
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

    def gaussian(x, theta):
        return -0.5 * np.einsum("ni,ij,nj->n", x - theta, precision, x - theta)

    q = RefinedLRT(log_likelihood=gaussian, low=np.zeros(d), high=np.ones(d), names=tuple("abcdef"), first=12)
    return q, theta, x, covariance


def test_many_nuisances_are_profiled(many):
    q, theta, x, covariance = many
    prepared = q.prepare(x)
    assert np.abs(prepared.at - x).max() < 1e-4
    value, exact = q(prepared, theta), ((x - theta)[:, 0] / 0.02) ** 2
    assert np.abs(value - exact).max() < 0.01
    assert abs((value <= chdtri(1, 0.1)).mean() - 0.9) < 4 * np.sqrt(0.09 / 200)
    expected = x[:, 1:] + 0.9 * (theta - x)[:, :1]
    assert np.abs(q.nuisance(prepared, theta) - expected).max() < 1e-3
    assert np.abs(q.nuisance(x, theta) - expected).max() < 1e-3  # without the first guess
    pair = RefinedLRT(log_likelihood=q.log_likelihood, low=q.low, high=q.high, names=q.names, interest=2, first=12)(x[:50], theta[:50])
    d = (x - theta)[:50, :2]
    assert np.abs(pair - np.einsum("ni,ij,nj->n", d, np.linalg.inv(covariance[:2, :2]), d)).max() < 0.01


def test_counts_with_four_nuisances_agree_with_minuit():
    rng = np.random.default_rng(4)
    # a line over four templates that can be told apart
    shapes = np.stack([np.exp(-0.5 * ((np.arange(16) - m) / w) ** 2) for m, w in ((7, 0.7), (0, 2.5), (5, 2.5), (10, 2.5), (15, 2.5))])
    scale = np.array([15.0, 20.0, 20.0, 20.0, 20.0])

    def counts(n, theta):
        mean = (theta * scale) @ shapes + 1.0
        return (n * np.log(mean) - mean).sum(axis=1)

    names, low, high = ("mu", "a", "b", "c", "d"), np.zeros(5), np.full(5, 4.0)
    data = rng.poisson((np.ones(5) * scale) @ shapes + 1.0, (4, 16)).astype(float)
    q = RefinedLRT(log_likelihood=counts, low=low, high=high, names=names, first=12)
    for row, value in zip(data, q(data, [1.6]), strict=True):
        sides = dict(zip(names, zip(low, high, strict=True), strict=True))
        exact = fit(lambda t, row=row: counts(row, t), np.ones(5), names, sides, minos=False, strategy=2).profile("mu", [1.6])
        assert value == pytest.approx(exact.q[0], abs=0.01)


def test_power_with_many_nuisances(many):
    q, theta, x, _ = many
    away = theta.copy()
    away[:, 0] += 0.05  # 2.5 errors
    assert abs((q(x, away) <= chdtri(1, 0.1)).mean() - norm.sf(2.5 - 1.645)) < 4 * np.sqrt(0.16 / 200)


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
        ratio()(x, [1.5])
    with pytest.raises(ShapeError, match="one row a data set"):
        ratio()(x, [[0.1], [0.2]])
    with pytest.raises(NonFiniteError, match="log_likelihood is nan at theta"):
        ratio(log_likelihood=lambda x, theta: np.full(len(x), np.nan))(x, [0.5])
    with pytest.raises(DataError, match="data set 0 has ln L = -Inf at all"):
        ratio(log_likelihood=lambda x, theta: np.full(len(x), -np.inf))(x, [0.5])
