"""HMC against distributions with known moments, and what it must refuse."""

import numpy as np
import pytest

from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.samplers.hmc import run_hmc


def gaussian(mean, covariance):
    precision = np.linalg.inv(covariance)

    def log_prob_and_grad(u):
        slope = -(u - mean) @ precision
        return 0.5 * ((u - mean) * slope).sum(axis=1), slope

    return log_prob_and_grad


def banana(u):
    """u0 ~ N(0, 1), u1 - u0^2 ~ N(0, 0.5^2)."""
    off = u[:, 1] - u[:, 0] ** 2
    return -0.5 * u[:, 0] ** 2 - 2 * off**2, np.stack([-u[:, 0] + 8 * off * u[:, 0], -4 * off], axis=1)


def two_modes(u):
    """Unit Gaussians 20 apart in the first of two dimensions."""
    left, right = -0.5 * (u[:, 0] + 10) ** 2, -0.5 * (u[:, 0] - 10) ** 2
    share = 1 / (1 + np.exp(np.clip(left - right, -700, 700)))
    slope = -(u[:, 0] + 10) * (1 - share) - (u[:, 0] - 10) * share
    return np.logaddexp(left, right) - 0.5 * u[:, 1] ** 2, np.stack([slope, -u[:, 1]], axis=1)


def funnel(u):
    """Neal's funnel: v ~ N(0, 3^2), eight x ~ N(0, e^v)."""
    v, x = u[:, 0], u[:, 1:]
    shrink = np.exp(-np.clip(v, -60, 60))
    square = (x**2).sum(axis=1) * shrink
    slope = np.concatenate([(-v / 9 + 0.5 * square - 4)[:, None], -x * shrink[:, None]], axis=1)
    return -(v**2) / 18 - 0.5 * square - 4 * v, slope


@pytest.mark.parametrize("metric", ["dense", "diagonal"])
def test_correlated_gaussian_in_eight_dimensions(metric):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 8))
    covariance, mean = a @ a.T + 0.5 * np.eye(8), np.arange(8.0)
    result = run_hmc(gaussian(mean, covariance), 10 * rng.standard_normal((32, 8)), n_draws=3000, seed=1, metric=metric)
    assert result.converged and result.n_divergent == 0
    assert result.samples.shape == (3000, 8)
    assert result.r_hat.max() <= 1.01
    assert 0.6 < result.acceptance < 0.95
    assert result.n_effective == pytest.approx(32 * result.chains.shape[1] / result.autocorr_time.max())
    white = (result.chains - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    np.testing.assert_allclose(white.mean(axis=(0, 1)), 0, atol=5 / np.sqrt(result.n_effective))
    np.testing.assert_allclose((white**2).mean(axis=(0, 1)), 1, atol=5 * np.sqrt(2 / result.n_effective))
    z = (result.samples - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    np.testing.assert_allclose(result.log_prob, -0.5 * (z**2).sum(axis=1), rtol=1e-9)
    assert "converged" in result.summary()


def test_the_dense_metric_learns_the_covariance():
    covariance = np.array([[1e-4, 0.9e-2], [0.9e-2, 1.0]])
    start = np.random.default_rng(0).standard_normal((32, 2))
    result = run_hmc(gaussian(np.zeros(2), covariance), start, n_draws=2000, seed=0)
    np.testing.assert_allclose(result.covariance / covariance, 1, atol=0.2)
    assert result.autocorr_time.max() < 4  # paths of about a quarter turn: draws are nearly independent


def test_banana_has_its_moments():
    result = run_hmc(banana, 2 * np.random.default_rng(2).standard_normal((32, 2)), n_draws=1000, seed=3)
    u0, u1 = result.chains[..., 0], result.chains[..., 1]
    n = result.n_effective
    assert u0.mean() == pytest.approx(0, abs=5 / np.sqrt(n))
    assert u0.var() == pytest.approx(1, abs=5 * np.sqrt(2 / n))
    assert u1.mean() == pytest.approx(1, abs=5 * np.sqrt(2.25 / n))
    assert (u1 - u0**2).var() == pytest.approx(0.25, abs=5 * 0.25 * np.sqrt(2 / n))


@pytest.mark.slow
def test_rosenbrock_has_its_moments():
    """x ~ N(1, 10), y | x ~ N(x^2, 1 / 10): Rosenbrock's function over 20, whose moments are known in closed form."""

    def rosenbrock(u):
        x, y = u[:, 0], u[:, 1]
        off = y - x**2
        return -((x - 1) ** 2) / 20 - 5 * off**2, np.stack([-(x - 1) / 10 + 20 * off * x, -10 * off], axis=1)

    start = np.random.default_rng(4).normal([1, 5], [3, 10], (64, 2))
    result = run_hmc(rosenbrock, start, n_draws=600, seed=5)
    x, y = result.chains[..., 0], result.chains[..., 1]
    n = result.n_effective
    assert x.mean() == pytest.approx(1, abs=5 * np.sqrt(10 / n))
    assert x.var() == pytest.approx(10, abs=5 * 10 * np.sqrt(2 / n))
    assert (y - x**2).std() == pytest.approx(np.sqrt(0.1), rel=5 / np.sqrt(2 * n))


def test_a_funnel_diverges_and_is_refused():
    start = np.random.default_rng(6).standard_normal((16, 9))
    result = run_hmc(funnel, start, n_draws=500, max_steps=300, seed=7, raise_on_failure=False)
    assert not result.converged and "NOT converged" in result.summary()
    assert result.n_divergent > 1e-3 * 16 * result.chains.shape[1]
    with pytest.raises(ConvergenceError, match=r"divergent transitions"):
        run_hmc(funnel, start, n_draws=500, max_steps=200, seed=7)


def test_chains_in_different_modes_are_no_convergence():
    start = np.random.default_rng(8).normal([0, 0], [10, 1], (16, 2))
    with pytest.raises(ConvergenceError, match="R-hat"):
        run_hmc(two_modes, start, n_draws=500, max_steps=300, seed=9)
    assert run_hmc(two_modes, start, n_draws=500, max_steps=300, seed=9, raise_on_failure=False).r_hat.max() > 1.1


def test_separate_modes_are_given_up_long_before_the_steps_are_used_up():
    start = np.random.default_rng(8).normal([0, 0], [10, 1], (16, 2))
    with pytest.raises(ConvergenceError, match=r"R-hat has stayed at .* separate modes"):
        run_hmc(two_modes, start, n_draws=500, max_steps=100_000, seed=9)
    result = run_hmc(two_modes, start, n_draws=500, max_steps=100_000, seed=9, raise_on_failure=False)
    assert not result.converged and result.n_burn + result.chains.shape[1] < 2000


def test_same_seed_same_draws():
    start = np.random.default_rng(10).standard_normal((16, 2))
    target = gaussian(np.zeros(2), np.eye(2))
    one, again, other = (run_hmc(target, start, n_draws=300, seed=s) for s in (1, 1, 2))
    assert (one.chains == again.chains).all() and (one.samples == again.samples).all()
    assert (one.samples != other.samples).any()


def test_a_wall_is_never_crossed():
    def half(u):
        inside = u[:, 0] > 0
        return np.where(inside, -0.5 * (u**2).sum(axis=1), -np.inf), -u

    result = run_hmc(
        half,
        np.abs(np.random.default_rng(0).standard_normal((8, 2))),
        n_draws=200,
        max_steps=400,
        max_divergent=1.0,
        raise_on_failure=False,
        seed=0,
    )
    assert (result.chains[..., 0] > 0).all()
    assert result.chains[..., 0].mean() == pytest.approx(np.sqrt(2 / np.pi), abs=5 / np.sqrt(result.n_effective))


@pytest.mark.parametrize(
    ("function", "start", "settings", "error", "match"),
    [
        (lambda u: (np.full(len(u), np.nan), u), np.eye(5, 2), {}, NonFiniteError, "log_prob is nan"),
        (lambda u: (np.zeros(len(u)), u * np.inf), np.ones((5, 2)), {}, NonFiniteError, "gradient"),
        (lambda u: (np.full(len(u), -np.inf), u), np.eye(5, 2), {}, DataError, "start"),
        (lambda u: u[:, 0], np.eye(5, 2), {}, ShapeError, "expected .log_prob"),
        (lambda u: (u[:, 0], u[:, 0]), np.eye(5, 2), {}, ShapeError, "shape"),
        (gaussian(np.zeros(2), np.eye(2)), np.eye(2), {}, ShapeError, "n_chains >= 4"),
        (gaussian(np.zeros(2), np.eye(2)), np.eye(5, 2), {"metric": "round"}, SettingError, "metric"),
        (gaussian(np.zeros(2), np.eye(2)), np.eye(5, 2), {"max_divergent": 2}, SettingError, "max_divergent"),
    ],
)
def test_what_is_refused(function, start, settings, error, match):
    with pytest.raises(error, match=match):
        run_hmc(function, start, **settings)
