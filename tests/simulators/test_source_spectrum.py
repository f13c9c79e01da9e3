import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import chi2, multinomial, norm

from sbi_phys.priors import BoxPrior
from simulators import CountsError, SimulatorSettingError, SourceSpectrum, load_auger
from simulators.detector import AUGER_FD, AUGER_SD
from simulators.propagation import MASSES, injection, load_propagation
from simulators.xmax import acceptance, gumbel_parameters, gumbel_pdf

LG_EDGES = np.arange(18.7, 20.25, 0.1)
NEAR_DATA = np.array([1.4, 18.69, 0.18, 0.11, 0.48, 0.21, 0.02, 0.3, 1.2])
EXTREMES = np.array(
    [
        NEAR_DATA,
        [-2.9, 17.81, 1, 0, 0, 0, 0, 0.0, 0.0],
        [2.4, 19.99, 0, 0, 0, 0, 1, -2.5, 3.0],
        [-2.9, 19.99, 0.2, 0.2, 0.2, 0.2, 0.2, 3.3, -2.0],
        [0.9, 18.6, 0, 0, 0.88, 0.12, 0, 1.7, 0.4],
    ]
)


@pytest.fixture(scope="module")
def free():
    return SourceSpectrum()


@pytest.fixture(scope="module")
def fixed():
    return SourceSpectrum(composition="fixed")


def slow_expectation(theta):
    """The model once more, step by step, without tables or interpolation; energies in windows of 0.1, nothing shared but the formulas."""
    gamma, lg_rcut, fractions, nu_energy, nu_xmax = theta[0], theta[1], theta[2:7], theta[7], theta[8]
    data, p = load_auger(), load_propagation("Gilmore12", 0.0)
    earth = p.arrive(injection(gamma, lg_rcut, p.lg_centres) * fractions[:, None])[0]
    shift = nu_energy * np.log10(1.14)
    energy = earth.sum(axis=0) @ AUGER_SD.migration_matrix(p.lg_edges, LG_EDGES - shift)
    groups = earth @ AUGER_FD.migration_matrix(p.lg_edges, np.arange(18.7, 20.05, 0.1) - shift)
    x, edges = np.arange(250.0, 2300.0, 0.5), np.append(np.append(-1e9, np.arange(620.0, 990.0, 20)), 1e9)
    xmax = np.zeros((9, 20))
    for w in range(13):
        i = min(w, 8)
        s1, s2, k = data.resolution[9 + i]
        scale = nu_xmax * data.systematics[9 + i, 0 if nu_xmax > 0 else 1]
        for g, mass in enumerate(MASSES):
            # the templates at the true energies: lower by the shift of the scale
            density = gumbel_pdf(x, *gumbel_parameters(18.75 + 0.1 * w - shift, mass)) * acceptance(x, data.acceptance[9 + i])
            below = k * norm.cdf((edges[:, None] - scale - x) / s1) + (1 - k) * norm.cdf((edges[:, None] - scale - x) / s2)
            xmax[i] += groups[g, w] * np.diff(below @ density)
    return energy / energy.sum(), xmax / xmax.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("row", range(len(EXTREMES)))
def test_expectation_against_the_slow_model(free, row):
    got = free.expected(EXTREMES[row])[0]
    energy, xmax = slow_expectation(EXTREMES[row])
    seen = energy * 55730 > 1e-3
    np.testing.assert_allclose(got[:15][seen] / 55730, energy[seen], rtol=2e-3)
    assert 55730 * np.sum((got[:15] / 55730 - energy)[seen] ** 2 / energy[seen]) < 1e-3  # of a chi-square: invisible to the data
    q = got[15:].reshape(9, 20) / free.observed()[15:].reshape(9, 20).sum(axis=1, keepdims=True)
    # the energy scale moves templates as a whole; acceptance and width change a little with energy, too: a few 1e-3
    assert np.abs(q - xmax).max() < 3e-3
    if not EXTREMES[row, 7:].any():
        assert np.abs(q - xmax).max() < 1e-4


def test_interpolation_without_energy_scale_is_the_fixed_table(free):
    still = SourceSpectrum(energy_scale=False)
    theta = EXTREMES.copy()
    theta[:, 7] = 0
    without = np.delete(theta, 7, axis=1)
    a, b = free.expected(theta), still.expected(without)
    np.testing.assert_allclose(a[b > 1e-6], b[b > 1e-6], rtol=1e-6)


def test_layout_names_and_real_data(free, fixed):
    assert free.prior.names == ("gamma", "lg_rcut", "f_h", "f_he", "f_n", "f_si", "f_fe", "nu_energy", "nu_xmax")
    assert fixed.prior.names == ("gamma", "lg_rcut")
    assert isinstance(fixed.prior, BoxPrior)
    assert fixed.parameters == fixed.prior.parameters
    assert sum(o.size for o in free.observables) == free.observed().size == 15 + 9 * 20
    assert [o.kind for o in free.observables] == ["counts"] * 10
    assert all(o.latex and o.edges_unit for o in free.observables)
    assert all(p.latex for p in free.parameters)
    assert free.observed()[:15].sum() == fixed.observed().sum() == 55730
    assert free.observed()[15:].reshape(9, 20).sum(axis=1).tolist() == [413, 297, 230, 165, 114, 87, 63, 40, 37]
    assert np.isfinite(free.log_likelihood(free.observed(), NEAR_DATA)).all()


def test_every_prior_draw_is_finite_and_positive(free):
    theta = free.prior.sample(3000, np.random.default_rng(0))
    expected = free.expected(theta)
    assert (expected > 0).all()
    np.testing.assert_allclose(expected[:, :15].sum(axis=1), 55730, rtol=1e-9)
    assert np.isfinite(free.log_likelihood(free.observed(), theta)).all()
    x = free.simulate(theta[:200], np.random.default_rng(1))
    assert (x[:, :15].sum(axis=1) == 55730).all()
    assert np.isfinite(free.log_likelihood(x, theta[:200])).all()


def test_log_likelihood_is_scipys_multinomial(free):
    theta = np.repeat(NEAR_DATA[None], 3, axis=0)
    x = free.simulate(theta, np.random.default_rng(2))
    expected = free.expected(theta)
    want = np.zeros(3)
    for block in free.layout.blocks:
        mu = expected[:, block.columns]
        want += [multinomial.logpmf(n, block.total, m / m.sum()) for n, m in zip(x[:, block.columns], mu, strict=True)]
    np.testing.assert_allclose(free.log_likelihood(x, theta), want, rtol=1e-9)
    one = free.log_likelihood(x[0], theta)
    assert one.shape == (3,)
    np.testing.assert_allclose(one, one[0], rtol=1e-12)


def test_simulated_frequencies_follow_the_expectation_and_reject_another(free):
    n = 300
    x = free.simulate(np.repeat(NEAR_DATA[None], n, axis=0), np.random.default_rng(4)).sum(axis=0)

    def pvalue(theta):
        mu = n * free.expected(theta)[0]
        large = mu > 5
        return chi2.sf(np.sum((x - mu)[large] ** 2 / mu[large]), large.sum() - 10)

    assert pvalue(NEAR_DATA) > 1e-3
    other = NEAR_DATA.copy()
    other[1] += 0.02
    assert pvalue(other) < 1e-6


@pytest.mark.parametrize("normalisation", ["conditioned", "parameter"])
def test_score_has_mean_zero_and_the_variance_of_the_fisher_matrix(normalisation):
    sim = SourceSpectrum(normalisation=normalisation)
    theta = NEAR_DATA if normalisation == "conditioned" else np.append(NEAR_DATA, np.log10(55730))
    steps = [{0: 2e-3}, {1: 5e-4}, {2: 1e-3, 4: -1e-3}, {3: 1e-3, 4: -1e-3}, {5: 1e-3, 4: -1e-3}, {7: 2e-3}, {8: 2e-3}]
    if normalisation == "parameter":
        steps.append({9: 5e-4})
    directions = np.zeros((len(steps), theta.size))
    for k, step in enumerate(steps):
        for column, size in step.items():
            directions[k, column] = size
    n = 1500
    x = sim.simulate(np.repeat(theta[None], n, axis=0), np.random.default_rng(6))
    for d in directions:
        up, down = np.repeat([theta + d], n, axis=0), np.repeat([theta - d], n, axis=0)
        score = 0.5 * (sim.log_likelihood(x, up) - sim.log_likelihood(x, down))
        assert abs(score.mean()) < 4 * score.std() / np.sqrt(n)
        slope = 0.5 * (sim.expected(theta + d) - sim.expected(theta - d))[0]
        fisher = np.sum(slope**2 / sim.expected(theta)[0])
        assert score.var() == pytest.approx(fisher, rel=0.2)
        # power: with the likelihood of a theta two standard deviations away the mean is far from zero
        away = theta + 2 * d / np.sqrt(fisher)
        if sim.prior.contains(np.array([away + d, away - d])).all():
            wrong = 0.5 * (sim.log_likelihood(x, [away + d] * n) - sim.log_likelihood(x, [away - d] * n))
            assert abs(wrong.mean()) > 10 * wrong.std() / np.sqrt(n)


def test_poisson_marginalised_over_the_normalisation_is_the_multinomial(fixed):
    poisson = SourceSpectrum(composition="fixed", normalisation="parameter")
    assert poisson.prior.names == ("gamma", "lg_rcut", "lg_n")
    lg_n = np.linspace(4.70, 4.79, 4001)
    theta = np.column_stack([np.full(lg_n.size, -1.05), np.full(lg_n.size, 18.2), lg_n])
    log_l = poisson.log_likelihood(fixed.observed(), theta)
    # integral over ln lambda with the prior 1/lambda
    integral = np.log(trapezoid(np.exp(log_l - log_l.max()), lg_n * np.log(10))) + log_l.max()
    want = fixed.log_likelihood(fixed.observed(), [-1.05, 18.2])[0] - np.log(55730)
    assert integral == pytest.approx(want, abs=1e-6)


def test_poisson_simulations_scatter_in_number():
    sim = SourceSpectrum(composition="fixed", normalisation="parameter")
    x = sim.simulate(np.repeat([[-1.0, 18.2, 4.5]], 400, axis=0), np.random.default_rng(8))
    total = x.sum(axis=1)
    assert total.mean() == pytest.approx(10**4.5, abs=4 * np.sqrt(10**4.5 / 400))
    assert total.var() == pytest.approx(10**4.5, rel=0.3)


def test_deviance_is_twice_the_distance_to_the_saturated_model(fixed):
    x, theta = fixed.observed(), np.array([[-1.05, 18.2]])
    saturated = multinomial.logpmf(x, 55730, x / x.sum())
    assert fixed.deviance(x, theta)[0] == pytest.approx(2 * (saturated - fixed.log_likelihood(x, theta)[0]), abs=1e-6)


def test_best_fit_of_the_real_spectrum_is_the_published_one(fixed):
    """Composition, photon background and propagation code are those of the CTG fit: so should be gamma and R_cut."""
    gamma, lg_rcut = np.meshgrid(np.linspace(-3, 2.5, 111), np.linspace(17.8, 20, 111), indexing="ij")
    theta = np.column_stack([gamma.ravel(), lg_rcut.ravel()])
    log_l = fixed.log_likelihood(fixed.observed(), theta)
    published = fixed.published()[0]["theta"]
    best = theta[log_l.argmax()]
    assert best[0] == pytest.approx(published["gamma"], abs=0.15)
    assert best[1] == pytest.approx(published["lg_rcut"], abs=0.05)
    far = np.abs(theta[:, 1] - best[1]) > 0.5
    assert log_l.max() - log_l[far].max() > 10  # the second mode holds less than e^-10: the problem is well posed


@pytest.mark.parametrize("convention", ["fixed_energy", "energy"])
def test_both_conventions_of_the_fractions_are_one_model(convention):
    reference = SourceSpectrum(energy_scale=False, xmax_scale=False)
    sim = SourceSpectrum(energy_scale=False, xmax_scale=False, fraction_convention=convention)
    for a, b in zip(reference.published(), sim.published(), strict=True):
        mu, nu = (s.expected([list(p["theta"].values())])[0] for s, p in ((reference, a), (sim, b)))
        np.testing.assert_allclose(mu, nu, rtol=1e-5, atol=1e-6)


def test_nuisances_move_the_data_the_right_way(free):
    def shifted(column, value):
        theta = NEAR_DATA.copy()
        theta[7:] = 0
        theta[column] = value
        return free.expected(theta)[0]

    centres = 610 + 20 * np.arange(20)
    mean = lambda mu: (mu[15:].reshape(9, 20) * centres).sum(axis=1) / mu[15:].reshape(9, 20).sum(axis=1)  # noqa: E731
    nominal = shifted(7, 0.0)
    up, down = load_auger().systematics[9:].T
    np.testing.assert_allclose(mean(shifted(8, 1.0)) - mean(nominal), up, rtol=0.05)
    np.testing.assert_allclose(mean(shifted(8, -1.0)) - mean(nominal), -down, rtol=0.05)
    assert (mean(shifted(7, 1.0)) < mean(nominal)).all()  # energies measured too high: the showers of a bin are shallower
    lg = 18.75 + 0.1 * np.arange(15)
    assert (shifted(7, 1.0)[:15] * lg).sum() > (nominal[:15] * lg).sum()
    np.testing.assert_allclose(shifted(8, 7.0), shifted(8, 5.0))  # held beyond five


@pytest.mark.parametrize(
    "settings", [{"energy_scale": False}, {"xmax_scale": False}, {"xmax": False}, {"energy_scale": False, "xmax_scale": False}]
)
def test_each_nuisance_can_be_switched_off(settings):
    sim = SourceSpectrum(**settings)
    assert ("nu_energy" in sim.prior.names) == settings.get("energy_scale", True)
    assert ("nu_xmax" in sim.prior.names) == (settings.get("xmax_scale", True) and settings.get("xmax", True))
    theta = sim.prior.sample(5, np.random.default_rng(0))
    x = sim.simulate(theta, np.random.default_rng(0))
    assert x.shape == (5, sim.observed().size)
    assert np.isfinite(sim.log_likelihood(x, theta)).all()


def test_fixed_composition_with_xmax():
    sim = SourceSpectrum(composition="fixed", xmax=True, fractions=[0, 0.673, 0.281, 0.046, 0])
    assert sim.prior.names == ("gamma", "lg_rcut")
    assert sim.observed().size == 195


@pytest.mark.parametrize("model", ["QGSJETII-04", "Sibyll2.1"])
def test_other_hadronic_models_and_backgrounds_change_the_expectation(free, model):
    other = SourceSpectrum(hadronic_model=model, ebl="Dominguez11", evolution=3)
    mu, nu = free.expected(NEAR_DATA)[0], other.expected(NEAR_DATA)[0]
    assert np.abs(mu[:15] / nu[:15] - 1).max() > 0.01
    assert np.abs(mu[15:] - nu[15:]).max() > 3


def test_group_counts_sum_to_the_expectation(free):
    theta = EXTREMES
    groups = free.group_counts(theta)
    assert (groups >= 0).all()
    np.testing.assert_allclose(groups.sum(axis=1), free.expected(theta)[:, :15], rtol=1e-6)
    assert groups[2, 4].sum() > 0
    np.testing.assert_allclose(groups[1, 1:].sum(), 0, atol=1e-6)  # protons stay protons


def test_same_seed_same_bytes_and_settings_rebuild(free):
    theta = free.prior.sample(600, np.random.default_rng(3))
    first = free.simulate(theta, np.random.default_rng(9))
    again = SourceSpectrum(**json.loads(json.dumps(free.settings)))
    assert again.settings == free.settings
    assert again.simulate(theta, np.random.default_rng(9)).tobytes() == first.tobytes()
    copy = pickle.loads(pickle.dumps(free))
    assert copy.simulate(theta, np.random.default_rng(9)).tobytes() == first.tobytes()
    assert len(pickle.dumps(free)) < 2000
    assert free.simulate(theta, np.random.default_rng(10)).tobytes() != first.tobytes()


def test_theta_outside_is_refused(free, fixed):
    rng = np.random.default_rng(0)
    for call in (lambda t: fixed.simulate(t, rng), fixed.expected, lambda t: fixed.log_likelihood(fixed.observed(), t)):
        with pytest.raises(ValueError, match=r"row 1: gamma = 3, expected within \[-3, 2.5\]"):
            call([[0.0, 18.5], [3.0, 18.5]])
        with pytest.raises(ValueError, match=r"theta has shape \(3,\); expected \(n, 2\)"):
            call([0.0, 18.5, 1.0])
        with pytest.raises(ValueError, match="NaN"):
            call([np.nan, 18.5])
    bad = NEAR_DATA.copy()
    bad[2] += 0.1
    with pytest.raises(ValueError, match="sum"):
        free.expected(bad)


def test_bad_observations(fixed):
    theta = [[-1.0, 18.2], [0.0, 18.5], [1.0, 19.0]]
    x = fixed.observed()
    with pytest.raises(CountsError, match=r"x has shape \(14,\); expected \(n, 15\) or \(15,\), that is 15 n_energy"):
        fixed.log_likelihood(x[:14], theta)
    with pytest.raises(CountsError, match="x has 2 rows and theta 3"):
        fixed.log_likelihood(np.stack([x, x]), theta)
    x[0] += 1
    with pytest.raises(CountsError, match="55731 events in n_energy .*expected 55730"):
        fixed.log_likelihood(x, theta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"composition": "fred"}, "composition is 'fred'; expected one of free, fixed; did you mean 'free'"),
        ({"fractions": [1, 0, 0, 0, 0]}, "expected fractions only with composition='fixed'"),
        ({"composition": "fixed", "fractions": [0.5, 0.5]}, "expected five values"),
        ({"composition": "fixed", "fractions": [2, -1, 0, 0, 0]}, "expected five values >= 0"),
        ({"hadronic_model": "EPOS"}, "hadronic_model is 'EPOS'"),
        ({"evolution": 1}, "expected one of -3, 0, 3, 5"),
        ({"evolution": "strong"}, "evolution is 'strong'; expected a number"),
        ({"energy_scale": 1}, "energy_scale is 1; expected True or False"),
        ({"composition": "fixed", "xmax_scale": True}, "expected xmax=True"),
        ({"normalisation": "free"}, "normalisation is 'free'"),
        ({"xmax_range": (610, 1000)}, "expected two multiples of 20"),
        ({"xmax_range": 7}, "xmax_range is 7"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SimulatorSettingError, match=message):
        SourceSpectrum(**settings)


def test_misspelt_setting_is_a_type_error():
    with pytest.raises(TypeError, match="hadronic"):
        SourceSpectrum(hadronicmodel="EPOS-LHC")


def test_import_is_light():
    code = (
        "import sys, simulators; assert 'scipy' not in sys.modules;"
        "import simulators.source_spectrum; print([m for m in ('matplotlib', 'torch', 'scipy.stats', 'scipy.signal') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_unknown_public_name():
    import simulators

    with pytest.raises(AttributeError, match="No simulators attribute Nope"):
        simulators.Nope  # noqa: B018
    assert "SourceSpectrum" in dir(simulators)
