import numpy as np
import pytest
from scipy.stats import kstest, poisson

from sbi_phys.core.rng import rng_for
from sbi_phys.simulation.protocol import check_simulator, load_simulator
from simulators import CountsError, EventSpectrum, SimulatorSettingError, SourceSpectrum

GRID = np.linspace(18.7, 21.6, 5801)
WIDTH = GRID[1] - GRID[0]
THETA = np.array([[-1.0, 18.2], [2.0, 19.5], [-3.0, 17.8], [2.5, 20.0]])


@pytest.fixture(scope="module", params=[True, False], ids=["at Earth", "at the source"])
def sim(request):
    return EventSpectrum(n_events=50, propagation=request.param)


def test_the_density_is_normalised_and_drawn_from(sim):
    density = np.exp(sim.event_log_density(GRID, THETA))
    np.testing.assert_allclose(np.trapezoid(density, dx=WIDTH, axis=1), 1, rtol=1e-4)
    big = EventSpectrum(n_events=4000, propagation=sim.settings["propagation"])
    for theta, p in zip(THETA[:2], density, strict=False):
        drawn = big.layout.unpack(big.simulate(theta[None], rng_for(0)))[1][:, 0]
        cumulative = np.append(0, np.cumsum((p[1:] + p[:-1]) / 2 * WIDTH))
        assert drawn.min() >= 18.7
        assert kstest(drawn, lambda y, c=cumulative: np.interp(y, GRID, c)).pvalue > 1e-3
    wrong = np.append(0, np.cumsum((density[2, 1:] + density[2, :-1]) / 2 * WIDTH))
    assert kstest(drawn, lambda y: np.interp(y, GRID, wrong)).pvalue < 1e-6


def test_a_set_is_the_sum_of_its_events_one_by_one_or_at_once(sim):
    x = sim.simulate(THETA, rng_for(1))
    counts, events = sim.layout.unpack(x)
    want = [sim.event_log_density(e, t[None]).sum() for e, t in zip(np.split(events[:, 0], 4), THETA, strict=True)]
    assert counts.tolist() == [50] * 4
    np.testing.assert_allclose(sim.log_likelihood(x, THETA), want, rtol=1e-10)
    np.testing.assert_allclose([sim.log_likelihood(x[i], THETA)[i] for i in range(4)], want, rtol=1e-10)


def test_binned_it_is_the_source_spectrum():
    """The same physics as the binned simulator but for the shape of the resolution: bins agree within 4 %."""
    events, binned = EventSpectrum(n_events=1), SourceSpectrum(composition="fixed")
    density = np.exp(events.event_log_density(GRID, THETA[:2]))
    inside = GRID < 20.2
    edges = np.round(np.arange(18.7, 20.25, 0.1), 6)
    place = np.searchsorted(edges, GRID[inside], side="right") - 1
    share = np.stack([np.bincount(np.minimum(place, 14), weights=p[inside], minlength=15) for p in density])
    share /= share.sum(axis=1, keepdims=True)
    want = binned.expected(THETA[:2])
    want /= want.sum(axis=1, keepdims=True)
    many = want > 0.01
    np.testing.assert_allclose(share[many] / want[many], 1, atol=0.04)


def test_the_number_of_events_where_it_is_poisson():
    sim = EventSpectrum(extended=True, lg_n_range=(1.0, 1.5))
    theta = np.array([[-1.0, 18.2, 1.1], [2.0, 19.5, 1.4]])
    x = sim.simulate(np.repeat(theta, 300, axis=0), rng_for(0))
    counts, _ = sim.layout.unpack(x)
    np.testing.assert_allclose(counts.reshape(2, 300).mean(axis=1), 10 ** theta[:, 2], rtol=0.07)
    plain = EventSpectrum(n_events=[1, sim.layout.n_max])
    want = plain.log_likelihood(x[:1], theta[:, :2]) + poisson.logpmf(counts[0], 10 ** theta[:, 2])
    np.testing.assert_allclose(sim.log_likelihood(x[:1], theta), want, rtol=1e-10)
    empty = sim.log_likelihood(np.zeros(sim.layout.size), theta)
    np.testing.assert_allclose(empty, -(10 ** theta[:, 2]), rtol=1e-12)


def test_an_energy_that_no_cutoff_lets_through_has_no_density():
    sim = EventSpectrum(n_events=1, propagation=False)
    assert sim.event_log_density([24.0], THETA[:1])[0, 0] == -np.inf


def test_protocol_and_settings():
    for settings in ({"n_events": 5}, {"n_events": [2, 9], "propagation": False}, {"extended": True, "threshold": 19.0}):
        sim = EventSpectrum(**settings)
        check_simulator(sim, n_simulations=3)
        assert load_simulator("simulators.event_spectrum:EventSpectrum", sim.settings).settings == sim.settings


def test_bad_input(sim):
    with pytest.raises(CountsError, match="down to 18.5; expected at least the threshold 18.7"):
        sim.log_likelihood(np.array([[18.5, 1.0]]), THETA[:1])
    for settings in ({"threshold": 17.0}, {"fractions": [1, 1, 0, 0, 0]}, {"lg_n_range": [3, 2]}, {"n_events": 0}, {"n_max": 10}):
        with pytest.raises(SimulatorSettingError):
            EventSpectrum(**settings)
