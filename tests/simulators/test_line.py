import numpy as np
import pytest
from scipy.stats import kstest, poisson

from sbi_phys.core.errors import SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.simulation.protocol import check_simulator, load_simulator
from simulators import CountsError, LineSearch, SimulatorSettingError

GRID = np.linspace(1, 10, 4001)
WIDTH = GRID[1] - GRID[0]
THETA = np.array([[0.0, 5.0], [0.3, 1.05], [0.5, 9.9], [0.2, 4.0]])


def integral(values):
    return np.trapezoid(values, dx=WIDTH, axis=-1)


@pytest.mark.parametrize("settings", [{}, {"background": "power"}, {"background": "power", "shape": 1.0}, {"shape": 0.5}])
def test_the_density_of_an_event_is_normalised_and_drawn_from(settings):
    sim = LineSearch(**settings)
    density = np.exp(sim.event_log_density(GRID, THETA))
    np.testing.assert_allclose(integral(density), 1, rtol=2e-5)
    for theta, p in zip(THETA, density, strict=True):
        drawn = sim.sample_events(np.tile(theta, (4000, 1)), rng_for(1))[:, 0]
        cumulative = np.append(0, np.cumsum((p[1:] + p[:-1]) / 2 * WIDTH))
        assert kstest(drawn, lambda e, c=cumulative: np.interp(e, GRID, c)).pvalue > 1e-3
        # a line at the wrong place is seen
        wrong = np.exp(sim.event_log_density(GRID, [[0.5, 6.5]]))[0]
        other = np.append(0, np.cumsum((wrong[1:] + wrong[:-1]) / 2 * WIDTH))
        assert kstest(drawn, lambda e, c=other: np.interp(e, GRID, c)).pvalue < 1e-6


def test_a_set_is_the_sum_of_its_events():
    sim = LineSearch(n_events=[3, 40])
    x = sim.simulate(THETA, rng_for(2))
    assert x.shape == (4, 80)
    counts, events = sim.layout.unpack(x)
    ends = np.cumsum(counts)
    want = [sim.event_log_density(e, t[None]).sum() for e, t in zip(np.split(events[:, 0], ends[:-1]), THETA, strict=True)]
    np.testing.assert_allclose(sim.log_likelihood(x, THETA), want, rtol=1e-12)
    np.testing.assert_allclose(sim.log_likelihood(x.reshape(4, 40, 2), THETA), want, rtol=1e-12)
    one = [sim.log_likelihood(x[i], THETA)[i] for i in range(4)]
    np.testing.assert_allclose(one, want, rtol=1e-12)


def test_sizes_are_log_uniform_and_say_nothing_of_theta():
    sim = LineSearch(n_events=[10, 1000])
    counts, _ = sim.layout.unpack(sim.simulate(np.tile([[0.1, 5.0]], (600, 1)), rng_for(0)))
    assert counts.min() >= 10
    assert counts.max() <= 1000
    assert kstest(np.log((counts + 0.5) / 10) / np.log(1001 / 10), "uniform").pvalue > 1e-3
    assert LineSearch(n_events=7).simulate(THETA, rng_for(0)).shape == (4, 14)


def test_the_extended_likelihood_counts_the_events():
    sim = LineSearch(n_events=50, extended=True)
    theta = np.tile([[0.5, 5.0]], (400, 1))
    x = sim.simulate(theta, rng_for(3))
    counts, _ = sim.layout.unpack(x)
    assert counts.mean() == pytest.approx(100, abs=4 * np.sqrt(100 / 400))
    plain = LineSearch(n_events=[1, sim.layout.n_max], n_max=sim.layout.n_max)
    np.testing.assert_allclose(sim.log_likelihood(x, theta), plain.log_likelihood(x, theta) + poisson.logpmf(counts, 100), rtol=1e-10)


def test_an_empty_set_is_legal():
    sim = LineSearch(n_events=5, extended=True)
    np.testing.assert_allclose(sim.log_likelihood(np.zeros(sim.layout.size), THETA), -5 / (1 - THETA[:, 0]), rtol=1e-12)
    assert LineSearch(n_events=5).log_likelihood(np.zeros(10), THETA).tolist() == [0, 0, 0, 0]


def test_the_score_is_zero_on_average_at_the_truth():
    """E[d log p / d theta] = 0: fails where density and simulator disagree."""
    sim = LineSearch(background="power")
    theta = np.array([0.2, 4.0])
    events = sim.sample_events(np.tile(theta, (40_000, 1)), rng_for(4))[:, 0]
    for k, step in ((0, 1e-4), (1, 1e-3)):
        move = np.eye(2)[k] * step
        up, down = sim.event_log_density(events, np.stack([theta + move, theta - move]))
        score = (up - down) / (2 * step)
        assert abs(score.mean()) < 4 * score.std() / np.sqrt(score.size)
        elsewhere = theta + np.array([0.1, 0.4])
        shifted = sim.event_log_density(events, np.stack([elsewhere + move, elsewhere - move]))
        wrong = (shifted[0] - shifted[1]) / (2 * step)
        assert abs(wrong.mean()) > 4 * wrong.std() / np.sqrt(wrong.size)


def test_protocol_and_settings():
    for settings in ({}, {"n_events": [2, 9]}, {"extended": True, "background": "power"}):
        sim = LineSearch(**settings)
        check_simulator(sim, n_simulations=4)
        assert load_simulator("simulators.line:LineSearch", sim.settings).settings == sim.settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :-1], "expected"),
        (lambda x: np.where(x == 1, 0.5, x), "0.5 in the mask"),
        (lambda x: np.where(x == x[0, 0], np.nan, x), "NaN"),
        (lambda x: np.where(x == x[0, 0], 11.0, x), "outside the spectrum, first 11 TeV"),
        (lambda x: np.tile(x, (3, 1)), "3 sets and theta 2 rows"),
        (lambda x: x.astype(str), "dtype"),
    ],
)
def test_bad_sets(change, message):
    sim = LineSearch(n_events=4)
    x = sim.simulate(THETA[:1], rng_for(0))
    with pytest.raises(CountsError, match=message):
        sim.log_likelihood(change(x), THETA[:2])


@pytest.mark.parametrize(
    "settings",
    [
        {"n_events": 0}, {"n_events": [5, 3]}, {"extended": True, "n_events": [3, 5]}, {"background": "linear"}, {"energy_range": [0, 5]},
        {"position_range": [0.5, 5]}, {"f_max": 1.0}, {"n_max": 10}, {"sigma": -1},
    ],
)  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(SimulatorSettingError):
        LineSearch(**settings)


def test_theta_outside_the_prior_and_more_events_than_slots():
    with pytest.raises(SupportError, match="f = 0.9"):
        LineSearch().simulate([[0.9, 5.0]], rng_for(0))
    sim = LineSearch(n_events=3)
    with pytest.raises(CountsError, match="set 0 has 4 events; expected at most 3"):
        sim.layout.pack(np.array([4]), np.ones((4, 1)))
    with pytest.raises(SimulatorSettingError, match="extended is False"):
        sim.expected_events(THETA)
