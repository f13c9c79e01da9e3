"""The Dirichlet prior where fractions are nearly all zero; the dense cases are among those of all priors, in test_priors.py."""

import numpy as np
import pytest

from sbi_phys.priors import DirichletPrior, Parameter


@pytest.mark.parametrize("concentration", [0.2, 0.02, 0.006])
def test_nearly_all_fractions_zero(concentration: float) -> None:
    """A sparse simplex: fractions below the smallest number of float64, with finite densities, and u that is normal and comes back."""
    prior = DirichletPrior([Parameter(f"f{i}") for i in range(4)], concentration=concentration)
    theta = prior.sample(4000, np.random.default_rng(1))
    u = prior.to_unbounded(theta)
    assert (theta > 0).all() and np.isfinite(prior.log_prob(theta)).all()
    np.testing.assert_allclose(u.std(axis=0), 1, atol=0.06)
    np.testing.assert_allclose(u.mean(axis=0), 0, atol=0.08)
    again = prior.from_unbounded(u)
    known = theta > 1e-290
    np.testing.assert_allclose(np.log(again[known]), np.log(theta[known]), rtol=1e-6, atol=1e-6)
    assert np.isfinite(prior.log_prob([[1.0, 0.0, 0.0, 0.0]])).all()
