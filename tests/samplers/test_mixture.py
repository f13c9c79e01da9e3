"""Mixtures as proposal densities: against scipy, and fitted to draws."""

import numpy as np
import pytest
from scipy import stats

from sbi_phys.samplers.mixture import Mixture, fit_mixture
from tests.samplers.targets import bimodal_draws, bimodal_log_prob


def test_mixture_density_is_that_of_scipy_and_of_its_draws():
    rng = np.random.default_rng(4)
    factors = np.tril(rng.standard_normal((3, 2, 2))) * 0.3 + np.eye(2)
    mixture = Mixture(weights=np.array([0.5, 0.3, 0.2]), means=3 * rng.standard_normal((3, 2)), factors=factors, n_tails=1)
    u = 3 * rng.standard_normal((200, 2))
    cov = factors @ factors.transpose(0, 2, 1)
    parts = [stats.multivariate_normal(mixture.means[k], cov[k]).pdf(u) for k in (0, 1)]
    parts.append(stats.multivariate_t(mixture.means[2], cov[2], df=5).pdf(u))
    np.testing.assert_allclose(mixture.log_prob(u), np.log(mixture.weights @ np.array(parts)), rtol=1e-9)
    # E_q[h / q] = 1 for a density h that q covers
    draws = mixture.sample(40_000, np.random.RandomState(5))
    h = stats.multivariate_normal(mixture.means[0], 0.5 * cov[0])
    weights = h.pdf(draws) / np.exp(mixture.log_prob(draws))
    assert weights.mean() == pytest.approx(1, abs=4.5 * weights.std() / 200)


def test_fit_finds_two_gaussians_and_covers_them():
    rng = np.random.default_rng(6)
    parts = [bimodal_draws(1500, rng) for _ in range(4)]
    mixture = fit_mixture(parts, np.random.default_rng(7))
    assert mixture.n_gaussians >= 2
    assert mixture.weights.sum() == pytest.approx(1)
    x = bimodal_draws(4000, rng)
    ratio = bimodal_log_prob(x) - mixture.log_prob(x)
    assert ratio.mean() < 0.5  # Kullback-Leibler divergence
    assert ratio.max() < 3  # nowhere much below
    again = fit_mixture(parts, np.random.default_rng(7))
    np.testing.assert_array_equal(mixture.means, again.means)


def test_fit_to_hardly_any_or_degenerate_draws_is_still_a_density():
    rng = np.random.default_rng(8)
    few = fit_mixture([rng.standard_normal((3, 2)), rng.standard_normal((3, 2))], rng)
    line = rng.standard_normal((500, 1)) * np.array([1.0, 2.0])
    for mixture in (few, fit_mixture([line, line], rng), fit_mixture([np.ones((50, 2))], rng)):
        assert np.isfinite(mixture.log_prob(rng.standard_normal((20, 2)))).all()
        assert np.isfinite(mixture.sample(20, np.random.RandomState(0))).all()


def test_fit_covers_the_places_farther_out_that_it_is_told_of():
    rng = np.random.default_rng(12)
    x = rng.standard_normal((4000, 4))
    far = 2 * rng.standard_normal((4000, 4))
    near, wide = fit_mixture([x[:2000], x[2000:]], rng), fit_mixture([x[:2000], x[2000:]], rng, far)
    edge = np.array([[6.0, 0, 0, 0], [0, -6.0, 0, 0]])
    assert np.all(wide.log_prob(edge) > near.log_prob(edge) + 1)
    assert np.all(wide.log_prob(x) > stats.multivariate_normal(np.zeros(4)).logpdf(x) - 3)
