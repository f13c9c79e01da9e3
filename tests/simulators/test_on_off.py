import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import poisson

from sbi_phys.core.errors import SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.simulation.protocol import check_simulator, load_simulator
from simulators import CountsError, OnOff, SimulatorSettingError

SIM = OnOff()
ALL = np.stack(np.meshgrid(np.arange(260.0), np.arange(200.0), indexing="ij"), axis=-1).reshape(-1, 2)


def exact_coverage(mu, nu, threshold):
    """Probability that the profile ratio at the true mu stays below a threshold: a sum over all counts."""
    weight = np.exp(SIM.log_likelihood(ALL, np.tile([mu, nu], (len(ALL), 1))))
    assert weight.sum() == pytest.approx(1, abs=1e-9)
    return weight[SIM.profile_ratio(ALL, mu) <= threshold].sum()


def test_the_likelihood_is_scipys():
    theta = np.array([[0.5, 1.0], [3.0, 0.7]])
    x = np.array([[80.0, 66.0], [101.0, 50.0]])
    want = poisson.logpmf(x[:, 0], theta[:, 0] * 15 + theta[:, 1] * 70) + poisson.logpmf(x[:, 1], theta[:, 1] * 70)
    np.testing.assert_allclose(SIM.log_likelihood(x, theta), want, rtol=1e-12)
    np.testing.assert_allclose(SIM.log_likelihood(x[0], theta)[0], want[0], rtol=1e-12)


@given(n=st.integers(0, 300), m=st.integers(0, 300), mu=st.floats(0, 8), tau=st.sampled_from([0.3, 1.0, 4.0]))
def test_the_profiled_background_maximises_the_likelihood(n, m, mu, tau):
    sim = OnOff(tau=tau)
    x = np.array([[n, m]], dtype=float)

    def loss(nu):
        return -float(sim._log_rate(x, np.array([mu]), np.array([nu]))[0])

    found = float(sim.profiled(x, mu)[0])
    best = minimize_scalar(loss, bounds=(1e-9, 12), method="bounded", options={"xatol": 1e-10}).fun
    assert found >= 0
    assert loss(found) <= best + 1e-6


@given(n=st.integers(0, 200), m=st.integers(0, 200))
def test_no_strength_is_better_than_the_best_fit(n, m):
    x = np.array([n, m], dtype=float)
    mu, nu = SIM.best_fit(x)[0]
    assert mu >= 0
    assert nu >= 0
    assert SIM.profile_ratio(x, mu)[0] == pytest.approx(0, abs=1e-9)
    assert (SIM.profile_ratio(np.tile(x, (50, 1)), np.linspace(0, 8, 50)) >= 0).all()


def test_wilks_overcovers_on_the_boundary_and_undercovers_beside_it():
    """The oracle of the method's reference: .84 at mu = 0, .70 to .73 at 0.5 (68.3 % asked for)."""
    assert exact_coverage(0.0, 1.0, 1.0) == pytest.approx(0.84, abs=0.01)
    assert 0.69 < exact_coverage(0.5, 1.0, 1.0) < 0.74
    assert exact_coverage(4.0, 1.0, 1.0) == pytest.approx(0.683, abs=0.01)


def test_draws_have_the_expected_mean_and_spread():
    theta = np.tile([[2.0, 1.2]], (20_000, 1))
    x = SIM.simulate(theta, rng_for(0))
    mean = SIM.expected(theta[:1])[0]
    np.testing.assert_allclose(x.mean(axis=0), mean, atol=4 * np.sqrt(mean.max() / 20_000))
    np.testing.assert_allclose(x.var(axis=0), mean, rtol=0.04)


def test_protocol_and_settings():
    check_simulator(OnOff(), n_simulations=5)
    again = load_simulator("simulators.on_off:OnOff", OnOff(tau=2.0, nu_range=[0.8, 1.2]).settings)
    assert again.prior.parameters[1].low == 0.8


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1, 2, 3], r"shape \(3,\); expected \(n, 2\) or \(2,\), that is 1 n_on \+ 1 n_off"),
        ([1, -2], r"-2 in row 0, column 1 \(n_off\[0\]\); expected a whole number"),
        ([1.5, 2], r"1.5 in row 0, column 0 \(n_on"),
        ([np.nan, 2], "nan in row 0"),
        (["a", "b"], "expected counts"),
    ],
)
def test_bad_counts(x, message):
    with pytest.raises(CountsError, match=message):
        SIM.log_likelihood(x, [[1.0, 1.0]])


def test_bad_settings_and_theta():
    with pytest.raises(SimulatorSettingError, match="tau"):
        OnOff(tau=0)
    with pytest.raises(SimulatorSettingError, match="nu_range"):
        OnOff(nu_range=(1.0,))
    with pytest.raises(SupportError, match="mu = 7"):
        SIM.expected([[7.0, 1.0]])
    with pytest.raises(CountsError, match="strength >= 0"):
        SIM.profile_ratio([1, 2], -1.0)
    with pytest.raises(CountsError, match="3 rows and theta 2"):
        SIM.log_likelihood(np.ones((3, 2)), np.ones((2, 2)))
