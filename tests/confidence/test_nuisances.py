"""What is done about nuisances: prepivoting turns z into Student's t, corrects on/off counting, and covers where the plug-in does not."""

import numpy as np
import pytest
from scipy.stats import chi2, norm, poisson
from scipy.stats import t as student

from sbi_phys.confidence import LRT, lf2i, neyman
from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import rng_for
from tests.confidence import on_off_toy as toy

DEGREES = 4
LEVELS = (0.68, 0.9)
GRID = {"mu": [-1.0, 1.0], "log_sigma": np.linspace(-3.5, 2.5, 25)}


def simulate(theta, n, rng):
    """A mean that is known to sigma, and an estimate of sigma with 4 degrees of freedom."""
    mu, sigma = np.atleast_2d(theta)[:, 0], np.exp(np.atleast_2d(theta)[:, 1])
    return np.stack([rng.normal(mu, sigma, n), sigma * np.sqrt(rng.chisquare(DEGREES, n) / DEGREES)], axis=1)


def distance(data, theta):
    # in logarithm critical values are straight lines in log sigma, as the interpolation has them
    return 2 * np.log(np.abs(data[:, 0] - np.atleast_1d(theta)[..., 0]))


def estimate(data, psi):
    return np.clip(np.log(data[:, 1]), -3.5, 2.5)


def sets(**changes):
    asked = {"n_toys": 3000, "interest": 1, "profile": estimate, "seed": 1}
    return neyman(simulate, distance, GRID, LEVELS, **(asked | changes))


@pytest.fixture(scope="module")
def plug_in():
    return sets()


@pytest.fixture(scope="module")
def prepivoted():
    return sets(nuisance="prepivoted", rounds=1)


def test_the_plug_in_is_z_and_prepivoting_is_students_t(plug_in, prepivoted):
    at = [[0.0, 0.25], [0.3, -0.5], [0.0, 0.75]]
    scale = np.exp(np.array(at)[:, 1])
    for level in LEVELS:
        z, t = norm.ppf((1 + level) / 2), student.ppf((1 + level) / 2, DEGREES)
        assert np.allclose(np.exp(plug_in.critical(at, level) / 2) / scale, z, rtol=0.06)
        assert np.allclose(np.exp(prepivoted.critical(at, level) / 2) / scale, t, rtol=0.06)


@pytest.mark.parametrize("level", LEVELS)
def test_coverage(plug_in, prepivoted, level):
    wanted = 2 * student.cdf(norm.ppf((1 + level) / 2), DEGREES) - 1  # what taking s for sigma costs
    for i, log_sigma in enumerate((-1.0, 0.1, 0.8)):
        data = simulate((0.2, log_sigma), 8000, rng_for(1, "cover", i))
        assert plug_in.contains(data, 0.2, level).mean() == pytest.approx(wanted, abs=0.025)
        assert prepivoted.contains(data, 0.2, level).mean() == pytest.approx(level, abs=0.025)


def test_power_is_that_of_the_t_test(prepivoted):
    data = simulate((0.0, 0.0), 8000, rng_for(2, "power"))
    exact = np.abs(data[:, 0] - 1.0) <= student.ppf(0.95, DEGREES) * data[:, 1]
    assert prepivoted.contains(data, 1.0, 0.9).mean() == pytest.approx(exact.mean(), abs=0.02)


def test_further_rounds_leave_a_pivot_as_it_is(prepivoted):
    again = sets(nuisance="prepivoted", rounds=2)
    data = simulate((0.0, 0.0), 4000, rng_for(3, "rounds"))
    assert (again.contains(data, 0.0, 0.9) == prepivoted.contains(data, 0.0, 0.9)).mean() > 0.98
    assert len(again.rounds) == 2 and "nuisances prepivoted" in again.summary()


def test_pvalues_are_uniform_and_agree_with_the_sets(prepivoted):
    data = simulate((-1.0, 0.3), 8000, rng_for(4, "p"))
    p = prepivoted.pvalue(data, -1.0)
    assert np.abs(np.quantile(p, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03
    for level in LEVELS:
        assert np.array_equal(p > 1 - level, prepivoted.contains(data, -1.0, level))


def test_intervals_are_students(prepivoted):
    data = np.array([[0.1, 0.3], [-0.2, 0.2]])
    found = prepivoted.interval(data, 0.68, points=200)
    half = student.ppf(0.84, DEGREES) * data[:, 1]
    assert np.allclose(found.low, data[:, 0] - half, atol=0.03)
    assert np.allclose(found.high, data[:, 0] + half, atol=0.03)


def test_the_supremum_covers_at_least_and_asks_for_no_profile(plug_in):
    grid = {"mu": [-1.0, 1.0], "log_sigma": np.linspace(-1, 1, 5)}
    found = neyman(simulate, distance, grid, LEVELS, n_toys=2000, interest=1, nuisance="supremum", seed=1)
    assert np.ptp(found.critical([[0.0, v] for v in (-1, 0.3, 1)], 0.9)) < 1e-12
    for i, (log_sigma, least, most) in enumerate([(-1.0, 1.0, 1.0), (0.0, 0.98, 1.0), (1.0, 0.88, 0.92)]):
        data = simulate((0.0, log_sigma), 4000, rng_for(5, "supremum", i))
        assert least - 1e-3 <= found.contains(data, 0.0, 0.9).mean() <= most
    p = found.pvalue(data, 0.0)
    assert np.mean(p > 0.1) == pytest.approx(found.contains(data, 0.0, 0.9).mean(), abs=5e-3)


def exact_coverage(found, mu, nu, level, background):
    """Sum over all counts."""
    counts = np.stack([g.ravel() for g in np.meshgrid(np.arange(90), np.arange(25), indexing="ij")], axis=1).astype(float)
    weight = poisson.pmf(counts[:, 0], mu * toy.S + nu * background) * poisson.pmf(counts[:, 1], toy.TAU * nu * background)
    return float((weight * found.contains(counts, mu, level)).sum() / weight.sum())


def test_on_off_counting_with_few_off_counts(monkeypatch):
    # two counts off source tell the background of 20 on source: what is taken for it is wrong by much, and data are discrete
    for name, value in (("S", 4.0), ("B", 20.0), ("TAU", 0.1)):
        monkeypatch.setattr(toy, name, value)
    grid = {"mu": np.array([0.0, 1.0, 2.0]), "nu": np.linspace(0.05, 3, 14)}
    statistic = LRT(log_likelihood=toy.profiled, maximum=toy.maximum)
    asked = {"n_toys": 4000, "interest": 1, "profile": lambda d, psi: np.clip(toy.nu_hat(d, psi), 0.05, 3.0), "bounds": [(0, None)] * 2}
    off = {}
    for how in ("profiled", "prepivoted"):
        found = neyman(toy.simulate, statistic, grid, 0.9, nuisance=how, seed=3, **asked)
        off[how] = np.array([exact_coverage(found, mu, nu, 0.9, 20.0) - 0.9 for mu in (0.0, 1.0, 2.0) for nu in (0.7, 1.0, 1.3)])
    assert off["profiled"].min() < -0.025
    assert off["prepivoted"].min() > off["profiled"].min() + 0.004
    assert (off["prepivoted"] ** 2).sum() < 0.7 * (off["profiled"] ** 2).sum()


def test_learned_critical_values_are_corrected_too():
    rng = rng_for(6, "learned")
    theta = np.column_stack([rng.uniform(-1, 1, 8000), rng.uniform(-3, 2, 8000)])
    data = simulate(theta, 8000, rng)
    q = distance(data, theta)
    asked = {"names": ["mu", "log_sigma"], "interest": 1, "profile": lambda d, psi: np.clip(estimate(d, psi), -2.9, 1.9)}
    best = asked["profile"](data, None)
    fresh = simulate((0.0, -0.5), 8000, rng_for(7, "fresh"))
    plain = lf2i(theta, q, distance, 0.9, model="splines-3", **asked)
    found = lf2i(theta, q, distance, 0.9, model="splines-3", profiled=best, rounds=1, pvalues=True, **asked)
    assert plain.contains(fresh, 0.0).mean() < 0.85
    assert found.contains(fresh, 0.0).mean() == pytest.approx(0.9, abs=0.02)
    assert np.mean(found.pvalue(fresh, 0.0) > 0.1) == pytest.approx(0.9, abs=0.04)  # .82 without, and trees are steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nuisance": "profile"}, "did you mean 'profiled'"),
        ({"nuisance": "prepivoted", "profile": None}, "'prepivoted' without a profile"),
        ({"nuisance": "supremum"}, "'supremum' with a profile"),
        ({"nuisance": "prepivoted", "rounds": 0}, "rounds is 0"),
        ({"nuisance": "supremum", "profile": None, "interest": 2}, "all parameters are of interest"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(SettingError, match=words):
        sets(n_toys=20, **changes)


def test_profiled_without_profile_is_named():
    theta, q = np.random.default_rng(0).uniform(size=(400, 2)), np.random.default_rng(1).chisquare(1, 400)
    with pytest.raises(SettingError, match="profiled is given without a profile"):
        lf2i(theta, q, distance, 0.5, interest=1, profiled=np.zeros(400))


def test_wilks_is_no_way_out(plug_in):
    data = simulate((0.0, 0.0), 4000, rng_for(8, "wilks"))
    q = ((data[:, 0]) / data[:, 1]) ** 2
    assert (q <= chi2.ppf(0.9, 1)).mean() < 0.85
