import numpy as np
import pytest
from scipy.stats import kstest, poisson

from sbi_phys.core.rng import rng_for
from sbi_phys.simulation.protocol import check_simulator, load_simulator
from simulators import ArrivalDirections, CountsError, SimulatorSettingError, TableError
from simulators.arrival_directions import Exposure, load_starbursts, random_catalogue, seen_exposure, unit_vectors


def sphere(n=50_000):
    """Points that are spread evenly over the sphere (Fibonacci's lattice)."""
    i = np.arange(n) + 0.5
    sine, ra = 1 - 2 * i / n, np.pi * (1 + 5**0.5) * i
    cosine = np.sqrt(1 - sine**2)
    return np.column_stack([cosine * np.cos(ra), cosine * np.sin(ra), sine])


SKY = sphere()
SIM = ArrivalDirections(n_events=200)


def test_the_exposure_ends_where_no_zenith_angle_reaches():
    omega = Exposure()
    sine = np.sin(np.radians([-90, -60, 0, 44, 46, 90]))
    values = omega(sine)
    assert (values[:4] > 0).all()
    assert values[4:].tolist() == [0, 0]
    # right at the pole the sky never sets: cos(zenith) = sin a0 sin dec = .576 all day, times pi
    assert values[0] == pytest.approx(np.pi * np.sin(np.radians(35.2)), rel=1e-9)


def test_legendre_coefficients_give_the_exposure_back():
    coefficients = Exposure().legendre()
    sine = np.linspace(-0.999, 0.999, 301)
    series = np.polynomial.legendre.legval(sine, coefficients)
    np.testing.assert_allclose(series, Exposure()(sine), atol=3e-3)
    assert coefficients[0] == pytest.approx(Exposure()(SKY[:, 2]).mean(), rel=1e-5)


@pytest.mark.parametrize("delta_deg", [3.0, 15.0, 60.0])
def test_the_exposure_seen_through_the_blurring_is_the_integral_over_the_sphere(delta_deg):
    kappa = 1 / np.radians(delta_deg) ** 2
    sources = unit_vectors([10, 200, 300], [-60.0, 20.0, 85.0])
    got = seen_exposure(Exposure().legendre(), sources[:, 2], np.array([kappa]))[0]
    vmf = kappa / (2 * np.pi * -np.expm1(-2 * kappa)) * np.exp(kappa * (SKY @ sources.T - 1))
    want = 4 * np.pi * (Exposure()(SKY[:, 2])[:, None] * vmf).mean(axis=0)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)


def test_the_relative_exposure_is_that_of_the_blurred_sources():
    kappa = 1 / np.radians(15.0) ** 2
    vmf = kappa / (2 * np.pi * -np.expm1(-2 * kappa)) * np.exp(kappa * (SKY @ SIM.catalogue.directions.T - 1))
    want = 4 * np.pi * (SIM.exposure(SKY[:, 2]) * (vmf @ SIM.catalogue.weights)).mean() / SIM.exposure(SKY[:, 2]).mean()
    assert SIM.relative_exposure([15.0])[0] == pytest.approx(want, rel=1e-3)
    assert SIM.relative_exposure([40.0])[0] != pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("settings", [{}, {"catalogue": "random"}, {"rigidity_index": 4.0}])
def test_the_density_is_normalised_over_the_sky(settings):
    sim = ArrivalDirections(n_events=10, **settings)
    inside = SKY[sim.exposure(SKY[:, 2]) > 0]
    for theta in ([0.0, 10.0], [0.1, 15.0], [1.0, 5.0], [0.5, 40.0]):
        for rigidity in (10.0, 25.0) if sim.settings["rigidity_index"] else (10.0,):
            events = np.column_stack([inside, np.full(len(inside), rigidity)])
            log_p = sim.event_log_density(events, [theta])[0]
            total = 4 * np.pi * np.exp(log_p).sum() / len(SKY)
            index = sim.settings["rigidity_index"]
            want = 1.0 if index is None else (index - 1) / 10 * (rigidity / 10) ** -index
            assert total == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("index", [None, 4.0])
def test_draws_follow_the_density(index):
    """E_0[p_1 / p_0] = 1 and E_1[p_0 / p_1] = 1, and not so for a wrong blurring; the draws use no table."""
    sim = ArrivalDirections(n_events=1, rigidity_index=index)
    n = 8_000
    one, two = np.array([[0.3, 12.0]]), np.array([[0.5, 20.0]])
    for first, second in ((one, two), (two, one)):
        events = sim.sample_events(np.repeat(first, n, axis=0), rng_for(0))
        log_p = sim.event_log_density(events, np.concatenate([first, second, [[0.9, 6.0]]]))
        ratio = np.exp(log_p[1] - log_p[0])
        assert ratio.mean() == pytest.approx(1, abs=4 * ratio.std() / n**0.5)
        wrong = np.exp(log_p[1] - log_p[2])
        assert abs(wrong.mean() - 1) > 4 * wrong.std() / n**0.5


def test_isotropic_draws_follow_the_exposure_in_declination():
    events = SIM.sample_events(np.tile([[0.0, 10.0]], (5000, 1)), rng_for(1))
    sine = np.linspace(-1, 1, 4001)
    omega = SIM.exposure(sine)
    cumulative = np.append(0, np.cumsum((omega[1:] + omega[:-1]) / 2))
    assert kstest(events[:, 2], lambda s: np.interp(s, sine, cumulative / cumulative[-1])).pvalue > 1e-3
    np.testing.assert_allclose(np.linalg.norm(events[:, :3], axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("index", [None, 5.0])
def test_the_ways_to_the_likelihood_agree(index):
    sim = ArrivalDirections(n_events=60, rigidity_index=index)
    theta = np.array([[0.2, 12.0], [0.0, 12.0], [1.0, 3.0], [0.4, 33.0], [0.9, 12.0]])
    x = sim.simulate(theta[:1], rng_for(2))
    _, events = sim.layout.unpack(x)
    want = sim.event_log_density(events, theta).sum(axis=1)
    np.testing.assert_allclose(sim.log_likelihood(x, theta), want, rtol=1e-10)
    np.testing.assert_allclose(sim.log_likelihood(np.tile(x, (5, 1)), theta), want, rtol=1e-10)
    scan = sim.scan(x, [0.2, 0.9], [3.0, 12.0])
    assert scan[0, 1] == pytest.approx(2 * (want[0] - want[1]), abs=1e-8)
    assert scan[1, 1] == pytest.approx(2 * (want[4] - want[1]), abs=1e-8)


def test_a_source_population_is_found_and_isotropy_is_not():
    sim = ArrivalDirections(n_events=1400)
    f, delta = np.linspace(0, 0.5, 26), np.array([8.0, 15.0, 25.0])
    signal, null = sim.simulate([[0.2, 15.0], [0.0, 15.0]], rng_for(3))
    found = sim.scan(signal, f, delta)
    assert found.max() > 25
    assert abs(f[np.unravel_index(found.argmax(), found.shape)[0]] - 0.2) < 0.1
    assert sim.scan(null, f, delta).max() < 15


def test_the_number_of_events_where_it_is_poisson():
    sim, plain = ArrivalDirections(n_events=50, extended=True), ArrivalDirections(n_events=50)
    theta = np.array([[0.2, 12.0, 45.0], [0.2, 12.0, 55.0]])
    x = sim.simulate(theta, rng_for(0))
    counts, events = sim.layout.unpack(x)
    ends = np.split(events, np.cumsum(counts)[:-1])
    want = [plain.event_log_density(e, t[None, :2]).sum() + poisson.logpmf(len(e), t[2]) for e, t in zip(ends, theta, strict=True)]
    np.testing.assert_allclose(sim.log_likelihood(x, theta), want, rtol=1e-9)


def test_catalogues():
    starbursts = load_starbursts()
    assert len(starbursts.names) == 44
    assert starbursts.weights.sum() == pytest.approx(1)
    strongest = [starbursts.names[i] for i in np.argsort(-starbursts.weights)[:4]]
    assert strongest == ["M82", "NGC4945", "NGC253", "NGC1068"]
    random = random_catalogue(20, seed=1)
    np.testing.assert_allclose(np.linalg.norm(random.directions, axis=1), 1)
    np.testing.assert_array_equal(random.weights, random_catalogue(20, seed=1).weights)


def test_a_damaged_catalogue(tmp_path):
    for text in ("", "name,ra_deg\na,1", "name,ra_deg,dec_deg,flux_jy\na,1,95,2"):
        (tmp_path / "c.csv").write_text(text)
        with pytest.raises(TableError, match="c.csv"):
            load_starbursts(tmp_path / "c.csv")


def test_protocol_and_settings():
    for settings in ({"n_events": 5}, {"n_events": 5, "extended": True, "rigidity_index": 5.0, "catalogue": "random"}):
        sim = ArrivalDirections(**settings)
        check_simulator(sim, n_simulations=3)
        assert load_simulator("simulators.arrival_directions:ArrivalDirections", sim.settings).settings == sim.settings


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ([0, 0, 2, 10.0], "no unit vectors"),
        ([0, 0, 1, 10.0], "declinations without exposure"),
        ([0, 0, -1, 9.0], "rigidities down to 9 EV; expected at least 10 EV"),
    ],
)
def test_bad_events(event, message):
    with pytest.raises(CountsError, match=message):
        SIM.log_likelihood(np.array([[*event, 1.0]]), [[0.1, 10.0]])
    with pytest.raises(CountsError, match=r"expected \(m, 4\)"):
        SIM.event_log_density(np.zeros((2, 3)), [[0.1, 10.0]])


@pytest.mark.parametrize(
    "settings", [{"n_events": [1, 5]}, {"catalogue": "agn"}, {"delta_range": [40, 3]}, {"n_max": 3}, {"rigidity_index": 1.0}]
)
def test_bad_settings(settings):
    with pytest.raises(SimulatorSettingError):
        ArrivalDirections(**{"n_events": 5, **settings})
