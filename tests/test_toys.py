import numpy as np
import pytest
from scipy import stats

from sbi_phys.core.rng import rng_for
from tests.toys import LinearGaussian


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 5), (3, 2)])
def test_the_exact_posterior_is_bayes(shape):
    toy = LinearGaussian(*shape, prior_sd=1.3)
    rng = rng_for(1)
    theta = toy.prior.sample(6, rng)
    x = toy.simulate(theta, rng)
    for row in x:
        # log posterior - log prior - log likelihood is the evidence: one number, whatever theta
        evidence = toy.exact_log_posterior(theta, row) - toy.prior.log_prob(theta) - toy.log_likelihood(row, theta)
        np.testing.assert_allclose(evidence, evidence[0], atol=1e-9)
    joint = toy.prior.sd[0] ** 2 * toy.matrix @ toy.matrix.T + toy.noise**2 * np.eye(shape[1])
    np.testing.assert_allclose(-evidence[0], stats.multivariate_normal(np.zeros(shape[1]), joint).logpdf(x[-1]), atol=1e-9)
    mean, covariance = toy.posterior(x)
    draws = toy.posterior_sample(x, 20_000, rng)
    assert draws.shape == (6, 20_000, shape[0])
    np.testing.assert_allclose(draws.mean(axis=1), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(draws[0].T).reshape(covariance.shape), covariance, atol=0.05)
