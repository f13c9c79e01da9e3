"""Tempering: starting places, and the way from the prior to narrow, curved and separate posteriors."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.samplers.importance import importance_sample
from sbi_phys.samplers.tempering import spread_start, temper
from tests.samplers.targets import normal


def log_prior(u):
    return -0.5 * (u**2).sum(axis=1) - 0.5 * u.shape[1] * np.log(2 * np.pi)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_posterior_a_thousandth_as_wide_as_the_prior(dim):
    def log_likelihood(u):
        return -0.5 * ((u - 1.0) ** 2).sum(axis=1) / 1e-6

    found = temper(log_likelihood, dim, np.random.default_rng(0))
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

    found = temper(log_likelihood, 2, np.random.default_rng(2))
    result = importance_sample(lambda u: log_likelihood(u) + log_prior(u), found.proposal, 20_000, seed=3)
    nearest = np.argmin(((result.samples[:, None] - centres) ** 2).sum(axis=2), axis=1)
    share = np.array([result.weights[nearest == k].sum() for k in range(3)])
    # each mode weighs what the prior, widened by nothing much, says at its centre
    exact = np.exp(-0.5 * (centres**2).sum(axis=1) / 1.01)
    np.testing.assert_allclose(share, exact / exact.sum(), atol=0.02)


def test_a_flat_likelihood_is_reached_at_once():
    found = temper(lambda u: np.zeros(len(u)), 3, np.random.default_rng(0))
    assert found.power == 1 and found.n_rounds == 2


def test_zeros_are_left_out_and_all_zeros_refused():
    def half(u):
        return np.where(u[:, 0] > 1, -u[:, 0], -np.inf)

    found = temper(half, 2, np.random.default_rng(0))
    assert found.power == 1 and (found.u[:, 0] > 1).mean() > 0.5
    with pytest.raises(DataError, match="zero at all of 4000 draws"):
        temper(lambda u: np.full(len(u), -np.inf), 2, np.random.default_rng(0))


def test_bad_input_of_tempering():
    rng = np.random.default_rng(0)
    with pytest.raises(NonFiniteError, match="log_likelihood is nan at u"):
        temper(lambda u: np.full(len(u), np.nan), 2, rng)
    with pytest.raises(ShapeError, match="log_likelihood"):
        temper(lambda u: u, 2, rng)
    with pytest.raises(SettingError, match="n_draws"):
        temper(lambda u: u[:, 0], 2, rng, n_draws=1)


def test_spread_start_populates_a_mode_that_lies_lower_and_repeats_no_point():
    def lower(u):
        return np.logaddexp(-0.5 * ((u - 5) ** 2).sum(axis=1) / 0.01, -40 - 0.5 * ((u + 5) ** 2).sum(axis=1) / 0.01)

    rng = np.random.default_rng(11)
    candidates = rng.uniform(-8, 8, (4000, 2))
    start = spread_start(lower, candidates, 64, rng)
    assert np.unique(start, axis=0).shape == (64, 2)
    assert (np.abs(start + 5).max(axis=1) < 1).sum() >= 2
    assert (np.abs(start - 5).max(axis=1) < 1).sum() >= 5
    again = spread_start(lower, candidates, 64, np.random.default_rng(1))
    np.testing.assert_array_equal(again, spread_start(lower, candidates, 64, np.random.default_rng(1)))
    one_mode = spread_start(normal, rng.standard_normal((5000, 2)), 64, rng, random_share=0.0)
    assert np.abs(one_mode).max() < 4


def test_bad_start():
    rng = np.random.default_rng(12)
    start = rng.standard_normal((24, 2))
    with pytest.raises(DataError, match="different points of positive density"):
        spread_start(normal, start[:3], 5, rng)
    with pytest.raises(SettingError, match="rng"):
        spread_start(normal, start, 5, 0)
    with pytest.raises(SettingError, match="random_share"):
        spread_start(normal, start, 5, rng, random_share=2.0)
