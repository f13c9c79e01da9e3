"""Tempering from the prior to narrow, curved and separate posteriors."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError
from sbi_phys.core.progress import NO_PROGRESS
from sbi_phys.samplers.explore import explore
from sbi_phys.samplers.importance import importance_sample

TASK = NO_PROGRESS.task("", None)


def log_prior(u):
    return -0.5 * (u**2).sum(axis=1) - 0.5 * u.shape[1] * np.log(2 * np.pi)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_posterior_a_thousandth_as_wide_as_the_prior(dim):
    def log_likelihood(u):
        return -0.5 * ((u - 1.0) ** 2).sum(axis=1) / 1e-6

    found = explore(log_likelihood, dim, np.random.default_rng(0), TASK)
    assert found.power == 1 and found.n_rounds < 60
    assert found.efficiency > 0.2
    result = importance_sample(lambda u: log_likelihood(u) + log_prior(u), found.proposal, 4000, seed=1)
    assert result.reliable and result.ess_fraction > 0.3
    # exact evidence: N(1; 0, 1 + 1e-6) times the likelihood's norm
    exact = dim * (-0.5 / (1 + 1e-6) + 0.5 * np.log(1e-6 / (1 + 1e-6)))
    assert result.log_evidence == pytest.approx(exact, abs=5 * result.log_evidence_err + 1e-3)


def test_separate_modes_are_all_found():
    centres = np.array([[-1.5, -1.5], [1.5, -1.0], [0.5, 1.8]])

    def log_likelihood(u):
        return np.logaddexp.reduce([-0.5 * ((u - c) ** 2).sum(axis=1) / 0.01 for c in centres])

    found = explore(log_likelihood, 2, np.random.default_rng(2), TASK)
    result = importance_sample(lambda u: log_likelihood(u) + log_prior(u), found.proposal, 20_000, seed=3)
    nearest = np.argmin(((result.samples[:, None] - centres) ** 2).sum(axis=2), axis=1)
    share = np.array([result.weights[nearest == k].sum() for k in range(3)])
    # each mode weighs what the prior, widened by nothing much, says at its centre
    exact = np.exp(-0.5 * (centres**2).sum(axis=1) / 1.01)
    np.testing.assert_allclose(share, exact / exact.sum(), atol=0.02)


def test_a_flat_likelihood_is_reached_at_once():
    found = explore(lambda u: np.zeros(len(u)), 3, np.random.default_rng(0), TASK)
    assert found.power == 1 and found.n_rounds == 2


def test_zeros_are_left_out_and_all_zeros_refused():
    def half(u):
        return np.where(u[:, 0] > 1, -u[:, 0], -np.inf)

    found = explore(half, 2, np.random.default_rng(0), TASK)
    assert found.power == 1 and (found.u[:, 0] > 1).mean() > 0.5
    with pytest.raises(DataError, match="zero at all of 4000 draws"):
        explore(lambda u: np.full(len(u), -np.inf), 2, np.random.default_rng(0), TASK)
