"""The search finds the maximum of ridges far narrower than its first grid; its statistic is the exact one there."""

import numpy as np
import pytest
from scipy.special import chdtri

from sbi_phys.confidence import RefinedLRT, lf2i
from sbi_phys.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError

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


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"low": [0, 0, 0], "high": [1, 1, 1], "names": ("a", "b", "c")}, SettingError, "3 parameters; expected one or two"),
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
