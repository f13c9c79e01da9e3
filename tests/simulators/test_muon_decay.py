import numpy as np
import pytest
from scipy.stats import poisson

from sbi_phys.core.errors import SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.simulation.protocol import check_simulator, load_simulator
from simulators import CountsError, MuonDecay, SimulatorSettingError

SIM = MuonDecay()
THETA = np.array([2.2, 1000.0, 5.0])


def test_the_likelihood_is_scipys():
    theta = SIM.prior.sample(5, rng_for(0))
    x = SIM.simulate(theta, rng_for(1))
    np.testing.assert_allclose(SIM.log_likelihood(x, theta), poisson.logpmf(x, SIM.expected(theta)).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(SIM.log_likelihood(x[0], theta[:1]), SIM.log_likelihood(x, theta)[:1], rtol=1e-12)


def test_all_muons_decay_and_their_mean_time_is_the_lifetime():
    sim = MuonDecay(n_bins=5000, t_max=100)
    decays = sim.expected(THETA)[0] - THETA[2]
    assert decays.sum() == pytest.approx(THETA[1], rel=1e-9)
    assert np.average((sim.edges[1:] + sim.edges[:-1]) / 2, weights=decays) == pytest.approx(THETA[0], rel=1e-3)


def likelihood_ratio_mean(x, theta, other):
    """Mean of p(x | other) / p(x | theta) over draws at theta, and its standard error: 1 if the likelihood belongs to the draws."""
    ratio = np.exp(SIM.log_likelihood(x, np.tile(other, (len(x), 1))) - SIM.log_likelihood(x, np.tile(theta, (len(x), 1))))
    return ratio.mean(), ratio.std() / np.sqrt(len(x))


def test_the_likelihood_belongs_to_the_draws():
    x = SIM.simulate(np.tile(THETA, (20_000, 1)), rng_for(2))
    for other in THETA + np.diag([0.05, 20.0, 0.5]):
        mean, error = likelihood_ratio_mean(x, THETA, other)
        assert abs(mean - 1) < 4 * error
        wrong, wrong_error = likelihood_ratio_mean(x, other, THETA)  # the draws are not those of `other`
        assert abs(wrong - 1) > 4 * wrong_error


def test_it_is_a_simulator():
    check_simulator(SIM, n_simulations=5)
    assert load_simulator("simulators:MuonDecay", {"n_bins": 7}).settings == {"n_bins": 7, "t_max": 10.0}


def test_what_it_refuses():
    with pytest.raises(SimulatorSettingError, match=r"n_bins is 0; expected a number within \[1, 10000\]"):
        MuonDecay(n_bins=0)
    with pytest.raises(SupportError, match="lifetime = 9"):
        SIM.expected([9.0, 500.0, 5.0])
    with pytest.raises(CountsError, match=r"x has shape \(3,\); expected"):
        SIM.log_likelihood(np.ones(3), [THETA])
