import numpy as np
import pytest
from scipy.signal import lfilter

from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, ShapeError
from sbi_phys.core.progress import NO_PROGRESS
from sbi_phys.samplers.diagnostics import autocorrelation_time, judge, require_converged, run_until_converged, split_r_hat, thinned

TASK = NO_PROGRESS.task("", None)


def ar1(rng, rho, shape):
    """Stationary chains x_t = rho x_{t-1} + e_t, autocorrelation time (1 + rho) / (1 - rho)."""
    noise = np.sqrt(1 - rho**2) * rng.standard_normal(shape)
    noise[:, 0] = rng.standard_normal(noise[:, 0].shape)
    return lfilter([1.0], [1.0, -rho], noise, axis=1)


@pytest.mark.parametrize("rho", [0.0, 0.8, 0.95])
def test_autocorrelation_time_of_a_known_process(rho):
    chains = ar1(np.random.default_rng(0), rho, (20, 5000, 2))
    np.testing.assert_allclose(autocorrelation_time(chains), (1 + rho) / (1 - rho), rtol=0.1)


def test_chains_in_modes_of_their_own_have_an_endless_autocorrelation():
    chains = np.random.default_rng(1).standard_normal((10, 1000, 1))
    chains[5:] += 10
    assert autocorrelation_time(chains)[0] > 200
    assert split_r_hat(chains)[0] > 1.5


def test_a_frozen_parameter():
    chains = np.ones((4, 100, 1))
    assert autocorrelation_time(chains)[0] == 100
    assert split_r_hat(chains)[0] == pytest.approx(1)
    chains[2:] = 0
    assert split_r_hat(chains)[0] > 1e6


def test_r_hat_accepts_equal_chains_and_flags_location_spread_and_drift():
    rng = np.random.default_rng(2)
    good = rng.standard_normal((4, 1000, 3))
    assert np.all(split_r_hat(good) < 1.01)
    shifted, wider, drifting = good.copy(), good.copy(), good.copy()
    shifted[0] += 0.5
    wider[0] *= 2
    drifting[:, :500] += 0.5
    for bad in (shifted, wider, drifting):
        assert np.all(split_r_hat(bad) > 1.01)


def test_r_hat_agrees_with_arviz():
    # arviz 0.23.4: rhat(chains, method="rank") of the same array
    x = np.random.default_rng(3).standard_normal((4, 100)).cumsum(axis=1)
    assert split_r_hat(x[:, :, None])[0] == pytest.approx(1.653728003223347, rel=1e-9)


def test_bad_input():
    with pytest.raises(ShapeError, match="chains"):
        split_r_hat(np.ones((4, 100)))
    with pytest.raises(DataError, match="n_steps >= 4"):
        split_r_hat(np.ones((4, 3, 1)))
    with pytest.raises(NonFiniteError):
        autocorrelation_time(np.full((2, 10, 1), np.nan))


class Chains:
    """Independent draws in 4 chains, or chains that stay apart."""

    def __init__(self, apart=0.0):
        self.rng, self.apart, self.calls = np.random.default_rng(3), apart, []
        self.x = np.empty((4, 0, 1))

    def advance(self, n):
        self.calls.append(n)
        self.x = np.concatenate([self.x, self.rng.standard_normal((4, n, 1)) + self.apart * np.arange(4)[:, None, None]], axis=1)

    def judge(self, n_draws):
        return judge(self.x, n_draws, split_r_hat(self.x), "chains")


def test_chains_are_lengthened_until_they_hold_the_draws():
    chains = Chains()
    verdict = run_until_converged(chains.advance, lambda: chains.judge(4000), TASK, first=100, max_steps=5000, piece=30)
    assert verdict.converged and verdict.n_effective >= 4000
    assert 1000 <= chains.x.shape[1] < 2000
    assert max(chains.calls) == 30 and sum(chains.calls) == chains.x.shape[1]
    require_converged("HMC", verdict, 5000)


def test_chains_that_stay_apart_end_at_the_limit_with_an_error_in_numbers():
    chains = Chains(apart=5.0)
    verdict = run_until_converged(chains.advance, lambda: chains.judge(100), TASK, first=100, max_steps=700)
    assert not verdict.converged and chains.x.shape[1] == 700
    assert verdict.r_hat.max() > 1.5
    with pytest.raises(ConvergenceError, match=r"HMC did not converge: 700 steps .* R-hat .* between chains .*max_steps = 700"):
        require_converged("HMC", verdict, 700)


def test_thinned_draws_keep_their_density_and_come_evenly_from_all_chains():
    chains = np.arange(4.0)[:, None, None] + 0.001 * np.arange(100.0)[None, :, None]
    draws, log_prob = thinned(chains, 2 * chains[:, :, 0], 40, np.random.default_rng(0))
    assert draws.shape == (40, 1)
    np.testing.assert_array_equal(log_prob, 2 * draws[:, 0])
    assert np.bincount(draws[:, 0].astype(int)).tolist() == [10, 10, 10, 10]
    assert np.any(np.diff(draws[:, 0]) < 0)
    assert len(thinned(chains, chains[:, :, 0], 10_000, np.random.default_rng(0))[0]) == 400
