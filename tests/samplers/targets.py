"""Target densities of the sampler tests."""

import numpy as np
from scipy import stats


def normal(u):
    return -0.5 * (u**2).sum(axis=1)


def bimodal_log_prob(u):
    """Weights 0.3 and 0.7 at -3 and 3, sd 1 and 0.5, one dimension."""
    left = np.log(0.3) - 0.5 * (u[:, 0] + 3) ** 2
    right = np.log(0.7) - 0.5 * ((u[:, 0] - 3) / 0.5) ** 2 - np.log(0.5)
    return np.logaddexp(left, right) - 0.5 * np.log(2 * np.pi)


def bimodal_cdf(x):
    return 0.3 * stats.norm.cdf(x, -3, 1) + 0.7 * stats.norm.cdf(x, 3, 0.5)


def bimodal_draws(n, rng):
    left = rng.random(n) < 0.3
    return np.where(left, rng.normal(-3, 1, n), rng.normal(3, 0.5, n))[:, None]
