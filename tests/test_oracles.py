import numpy as np
import pytest
from scipy.integrate import cumulative_trapezoid, quad, trapezoid
from scipy.stats import gamma, kstest, multivariate_normal, norm, poisson

from tests import oracles
from tests.oracles import LOCAL, ORACLES, WRONG, Bimodal, Gaussian, PoissonGamma

GRID = {Gaussian: np.linspace(-8, 8, 8001), Bimodal: np.linspace(-9, 9, 9001), PoissonGamma: np.linspace(1e-6, 60, 60_001)}


def joint(oracle, t, x):
    """Prior times likelihood from scipy's densities alone."""
    if isinstance(oracle, PoissonGamma):
        return gamma.pdf(t, 2.0, scale=2.0) * poisson.pmf(x, 4.0 * t)
    if isinstance(oracle, Bimodal):
        return norm.pdf(t, 0.3) * 0.5 * (norm.pdf(x, t, 0.3) + norm.pdf(x, -t, 0.3))
    return norm.pdf(t) * norm.pdf(x, t, 0.5)


@pytest.mark.parametrize("make", [Gaussian, Bimodal, PoissonGamma])
def test_one_dimensional_posteriors_agree_with_a_grid(make):
    oracle, rng = make(), np.random.default_rng(1)
    t = GRID[make]
    _, x = oracle.simulate(6, rng)
    draws = oracle.posterior_draws(x, 4000, rng)
    log_q = oracle.log_posterior(np.broadcast_to(t[:, None], (6, t.size, 1)), x)
    for i in range(6):
        exact = joint(oracle, t, x[i, 0])
        exact /= trapezoid(exact, t)
        np.testing.assert_allclose(np.exp(log_q[i]), exact, atol=1e-4 * exact.max())
        cdf = np.cumsum(exact) * (t[1] - t[0])
        assert kstest(draws[i, :, 0], lambda v, cdf=cdf: np.interp(v, t, cdf)).pvalue > 1e-3


def test_many_dimensional_gaussian_is_the_conditional_of_the_joint():
    rng, d = np.random.default_rng(2), 10
    oracle = Gaussian(d)
    theta, x = oracle.simulate(3, rng)
    noise = 0.25 * 0.6 ** np.abs(np.subtract.outer(np.arange(d), np.arange(d)))
    marginal = np.eye(d) + noise
    for i in range(3):  # log p(theta | x) = log p(theta) + log p(x | theta) - log p(x)
        expected = (
            multivariate_normal.logpdf(theta[i], np.zeros(d))
            + multivariate_normal.logpdf(x[i], theta[i], noise)
            - multivariate_normal.logpdf(x[i], np.zeros(d), marginal)
        )
        assert oracle.log_posterior(theta[:, None], x)[i, 0] == pytest.approx(expected)
    draws = oracle.posterior_draws(x, 20_000, rng)
    np.testing.assert_allclose(np.cov(draws[0].T), oracle.covariance, atol=0.01)
    np.testing.assert_allclose(draws.mean(axis=1), x @ np.linalg.solve(marginal, np.eye(d)), atol=0.02)


@pytest.mark.parametrize("make", [Gaussian, Bimodal, PoissonGamma])
@pytest.mark.parametrize("wrong", [{"scale": 0.8}, {"scale": 1.25}, {"shift": 0.3}, {"like_prior": True}, {"local": True}])
def test_densities_of_the_wrong_posteriors_are_those_of_their_draws(make, wrong):
    """The density's integral along the ordered draws is their rank."""
    p = oracles.pairs(make(), np.random.default_rng(3), n=15, n_draws=4000, **wrong)
    order = np.argsort(p.draws[:, :, 0], axis=1)
    t, density = np.take_along_axis(p.draws[:, :, 0], order, 1), np.exp(np.take_along_axis(p.log_prob_draws, order, 1))
    content = cumulative_trapezoid(density, t, axis=1, initial=0)
    away = np.abs(content - np.arange(4000) / 4000).max(axis=1)  # of Kolmogorov's kind, 95 % below 1.36 / sqrt(l)
    assert np.median(away) < 1.36 / np.sqrt(4000)
    assert away.max() < 2.5 / np.sqrt(4000)


@pytest.mark.parametrize("make", [Gaussian, Bimodal, PoissonGamma])
@pytest.mark.parametrize("way", ["stretch", "bend"])
def test_moved_density_integrates_to_one_and_is_the_derivative_of_the_map(make, way):
    oracle, rng = make(), np.random.default_rng(4)
    _, x = oracle.simulate(3, rng)
    more = (0.7, 0.2) if way == "stretch" else (np.array([0.9, -0.9, 0.5]),)
    move, log_density = {"stretch": (oracle.stretch, oracle.log_stretched), "bend": (oracle.bend, oracle.log_bent)}[way]
    t = oracle.posterior_draws(x, 50, rng)
    step = 1e-5
    slope = (move(t + step, x, *more) - move(t - step, x, *more))[:, :, 0] / (2 * step)
    np.testing.assert_allclose(log_density(move(t, x, *more), x, *more), oracle.log_posterior(t, x) - np.log(slope), atol=1e-3)
    grid = GRID[make]
    density = np.exp(log_density(np.broadcast_to(grid[:, None], (3, grid.size, 1)), x, *more))
    np.testing.assert_allclose(trapezoid(np.nan_to_num(density), grid, axis=1), 1, atol=2e-3)


def test_bent_density_of_many_dimensions_is_the_derivative_of_the_map():
    oracle, rng = Gaussian(3), np.random.default_rng(10)
    _, x = oracle.simulate(2, rng)
    strength, step = np.array([0.9, -0.9]), 1e-5
    t = oracle.posterior_draws(x, 20, rng)
    slopes = [(oracle.bend(t + step * e, x, strength) - oracle.bend(t - step * e, x, strength)) @ e / (2 * step) for e in np.eye(3)]
    expected = oracle.log_posterior(t, x) - np.log(slopes).sum(axis=0)
    np.testing.assert_allclose(oracle.log_bent(oracle.bend(t, x, strength), x, strength), expected, atol=1e-3)


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_gaussian_distortions_have_the_moments_they_are_named_after(dim):
    rng = np.random.default_rng(5)
    oracle = Gaussian(dim)
    p = oracles.pairs(oracle, rng, n=4, n_draws=40_000, scale=0.8, shift=0.3)
    sd = np.sqrt(np.diag(oracle.covariance))
    np.testing.assert_allclose(p.draws.std(axis=1), np.tile(0.8 * sd, (4, 1)), rtol=0.02)
    np.testing.assert_allclose((p.draws.mean(axis=1) - p.x @ oracle.gain.T) / sd, 0.3, atol=0.02)
    expected = multivariate_normal.logpdf(p.theta[0], p.x[0] @ oracle.gain.T + 0.3 * sd, 0.64 * oracle.covariance)
    assert p.log_prob_theta[0] == pytest.approx(expected)


def test_bimodal_moments_and_weights():
    oracle = Bimodal()
    x = np.array([[1.5], [-0.4]])
    mean, sd = oracle.moments(x)
    for i in range(2):
        evidence, first, second = (
            quad(lambda t, k=k, v=x[i, 0]: t**k * joint(oracle, t, v), -9, 9, points=[-1.5, 1.5])[0] for k in range(3)
        )
        assert mean[i, 0, 0] == pytest.approx(first / evidence, rel=1e-6)
        assert sd[i, 0, 0] == pytest.approx(np.sqrt(second / evidence - (first / evidence) ** 2), rel=1e-6)
    p = oracles.bimodal(np.random.default_rng(6), n=200, n_draws=50, scale=0.8)
    assert p.draws.shape == (200, 50, 1)


@pytest.mark.parametrize("name", ORACLES)
def test_local_is_narrow_in_one_half_wide_in_the_other_and_right_on_average(name):
    p = ORACLES[name](np.random.default_rng(7), n=1500, n_draws=80, local=True)
    low = (p.x[:, 0] < 0) if name != "Poisson-Gamma" else p.x[:, 0] < PoissonGamma().median
    assert low.mean() == pytest.approx(0.5, abs=0.035)
    level = np.array([0.05, 0.25, 0.75, 0.95])
    rank = (p.draws < p.theta[:, None]).mean(axis=1)
    bent = LOCAL * np.sin(2 * np.pi * level) / (2 * np.pi)
    for column in rank.T:
        for half, sign in ((low, 1), (~low, -1)):
            np.testing.assert_allclose([(column[half] < v).mean() for v in level], level + sign * bent, atol=0.05)
        both = np.mean([[(column[half] < v).mean() for v in level] for half in (low, ~low)], axis=0)
        np.testing.assert_allclose(both, level, atol=0.03)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("wrong", WRONG)
def test_shapes_seed_and_finite_densities(name, wrong):
    a, b = (ORACLES[name](np.random.default_rng(8), n=60, n_draws=20, **WRONG[wrong]) for _ in range(2))
    assert all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))
    d = a.theta.shape[1]
    assert (a.x.shape[0], a.draws.shape, a.log_prob_theta.shape, a.log_prob_draws.shape) == (60, (60, 20, d), (60,), (60, 20))
    assert all(np.isfinite(v).all() for v in a)
