"""Neyman construction: coverage of the sets, nuisance parameters (Student's t, on/off counts), executors, refused input."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from scipy.stats import chi2, norm, poisson
from scipy.stats import t as student

from sbi_phys.confidence import LRT, Profiled, feldman_cousins, feldman_cousins_gaussian, lf2i, neyman
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from tests.confidence import on_off_toy as toy


def gaussian(theta, n, rng):
    return rng.normal(theta[0], 1.0, n)


def gaussian_log_likelihood(theta, data):
    return -0.5 * (np.asarray(data)[:, None] - theta[None, :, 0]) ** 2


def bounded_maximum(data):
    best = np.maximum(np.asarray(data), 0.0)
    return best[:, None], -0.5 * (np.asarray(data) - best) ** 2


def centred(theta, data):
    return (np.asarray(data) - theta[0]) ** 2


BOUNDED = LRT(log_likelihood=gaussian_log_likelihood, maximum=bounded_maximum)
MU = np.concatenate([np.linspace(0, 2, 17), np.linspace(2.25, 9, 28)])


@pytest.fixture(scope="module")
def bounded():
    return neyman(gaussian, BOUNDED, {"mu": MU}, [0.683, 0.9], n_toys=8000, bounds=[(0, None)], seed=1)


def test_critical_values_are_those_of_feldman_and_cousins(bounded):
    # the edges of the exact acceptance region have q = C
    x = np.linspace(-5, 14, 4001)
    low, high = feldman_cousins_gaussian(x)
    for mu in (0.0, 0.5, 1.0, 2.0, 4.0):
        outside = x[(mu < low) | (mu > high)]
        exact = BOUNDED(np.array([mu]), outside).min()
        got, at = bounded.critical([[mu]], 0.9)[0], int(np.flatnonzero(mu == MU)[0])
        assert abs(got - exact) < 4 * bounded.critical_errors[1, at] + 0.02


def test_intervals_are_those_of_feldman_and_cousins(bounded):
    x = np.array([-1.0, 0.0, 0.8, 1.7, 3.0, 5.0])
    found = bounded.interval(x, 0.9)
    low, high = feldman_cousins_gaussian(x)
    assert np.abs(found.low - low).max() < 0.06
    assert np.abs(found.high - high).max() < 0.06
    assert "90 % intervals for mu" in found.summary()


def test_poisson_intervals_are_those_of_the_published_table():
    def log_likelihood(theta, data):
        mean = theta[:, 0] + 3.0
        return data[:, None] * np.log(mean) - mean

    def maximum(data):
        best = np.maximum(data - 3.0, 0)
        return best[:, None], data * np.log(best + 3.0) - best - 3.0

    statistic = LRT(log_likelihood=log_likelihood, maximum=maximum)
    found = neyman(
        lambda theta, n, rng: rng.poisson(theta[0] + 3.0, n), statistic, np.arange(0, 14.01, 0.1), n_toys=40_000, bounds=[(0, None)]
    )
    got = found.interval(np.array([4, 6, 8]))
    low, high = feldman_cousins([4, 6, 8], 3.0, monotone=False)
    assert np.abs(got.low - low).max() < 0.25  # in counts: the belt has steps, and C carries the noise of the toys
    assert np.abs(got.high - high).max() < 0.25


@pytest.mark.parametrize("level", [0.683, 0.9])
def test_coverage(bounded, level):
    for i, mu in enumerate((0.0, 0.6, 1.9, 5.3)):
        inside = bounded.contains(gaussian([mu], 4000, rng_for(3, "cover", i)), mu, level)
        assert abs(inside.mean() - level) < 0.02


def test_wilks_overcovers_at_the_bound():
    q = BOUNDED(np.array([0.0]), gaussian([0.0], 20_000, rng_for(0, "wilks")))
    assert np.mean(q <= chi2.ppf(0.683, 1)) == pytest.approx(0.841, abs=0.01)


def test_pvalues_are_uniform_and_agree_with_the_sets(bounded):
    x = gaussian([1.0], 3000, rng_for(5, "p"))
    p = bounded.pvalue(x, 1.0)
    assert np.abs(np.quantile(p, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03
    for level in (0.683, 0.9):
        # at a point of the grid the two are the same statement
        assert np.array_equal(p > 1 - level, bounded.contains(x, 1.0, level))


def test_order_statistic_gives_the_level_and_no_more():
    # with n toys from a continuous distribution, P(q <= C) = ceil(level (n + 1)) / (n + 1) on average over constructions
    inside = []
    for seed in range(150):
        found = neyman(gaussian, centred, [0.0, 1.0], 0.8, n_toys=14, seed=seed)
        inside.append(chi2.cdf(found.critical_values[0, 0], 1))
    assert np.mean(inside) == pytest.approx(12 / 15, abs=4 * np.sqrt(0.8 * 0.2 / 16 / 150))


@pytest.mark.parametrize("pool", ["threads", pytest.param("process", marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same(pool):
    statistic = LRT(log_likelihood=toy.profiled, maximum=toy.maximum)
    settings = {"grid": {"mu": [0.0, 1.0, 2.0], "nu": [0.8, 1.2]}, "n_toys": 50, "interest": 1, "profile": toy.nu_hat}
    alone = neyman(toy.simulate, statistic, seed=4, **settings)
    executor = ThreadPoolExecutor(2) if pool == "threads" else ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with executor:
        shared = neyman(toy.simulate, statistic, seed=4, executor=executor, **settings)
    assert np.array_equal(alone.toys, shared.toys)
    assert not np.array_equal(alone.toys, neyman(toy.simulate, statistic, seed=5, **settings).toys)


@pytest.fixture(scope="module")
def on_off():
    statistic = LRT(log_likelihood=toy.profiled, maximum=toy.maximum)
    grid = {"mu": np.concatenate([[0, 0.15, 0.3, 0.6], np.arange(1, 8.1, 0.5)]), "nu": np.linspace(0.4, 1.7, 5)}
    return neyman(toy.simulate, statistic, grid, n_toys=4000, interest=1, profile=toy.nu_hat, bounds=[(0, None), (0, None)], seed=2)


def test_nuisances_by_profiling_cover(on_off):
    for i, truth in enumerate([(0.0, 1.0), (0.5, 0.8), (2.2, 1.2)]):
        data = toy.simulate(truth, 4000, rng_for(9, "cover", i))
        assert abs(on_off.contains(data, truth[0]).mean() - 0.9) < 0.02
    assert on_off.interval(data[:50]).high.min() > 0


def test_projection_over_nuisances_is_wider():
    def q(theta, data):
        best = np.asarray(data)
        mean = np.array([theta[0] * toy.S + theta[1] * toy.B, toy.TAU * theta[1] * toy.B])
        return 2 * (best * np.log(np.maximum(best, 0.5) / mean) - best + mean).sum(axis=1)

    grid = {"mu": np.linspace(0, 6, 9), "nu": np.linspace(0.5, 1.6, 12)}
    found = neyman(toy.simulate, q, grid, 0.683, n_toys=500, interest=1, seed=2)
    data = toy.simulate((1.5, 1.0), 1000, rng_for(1, "project"))
    inside = found.contains(data, 1.5)
    assert inside.mean() > 0.75
    assert (inside >= found.contains(data, [1.5, 1.0])).all()
    assert (found.pvalue(data, 1.5) >= found.pvalue(data, [1.5, 1.0])).all()


def test_joint_region():
    def simulate(theta, n, rng):
        return rng.normal(theta, 1.0, (n, 2))

    def q(theta, data):
        return ((data - theta) ** 2).sum(axis=1)

    axes = [np.linspace(-5, 5, 6)] * 2
    found = neyman(simulate, q, axes, 0.683, n_toys=4000, names=["a", "b"])
    region = found.region(np.zeros((1, 2)), n_points=61)
    area = region.inside.mean() * 100
    assert area == pytest.approx(np.pi * chi2.ppf(0.683, 2), rel=0.06)
    assert region.plot().get_xlabel() == "a"
    with pytest.raises(SettingError, match="2 parameters of interest"):
        found.interval(np.zeros((1, 2)))


def test_prepare_is_called_once_for_all_theta(bounded):
    calls = []

    class Counting(LRT):
        def prepare(self, data):
            calls.append(1)
            return super().prepare(data)

    found = neyman(gaussian, Counting(log_likelihood=gaussian_log_likelihood, maximum=bounded_maximum), [0.0, 4.0, 8.0], n_toys=100)
    assert len(calls) == 3
    found.interval(np.array([2.0]), on_edge="open")
    assert len(calls) == 4


class TestNothingIsExtrapolated:
    def test_critical_values(self, bounded):
        with pytest.raises(SupportError, match=r"mu = 9.5 lies beyond what was simulated, \[0, 9\]"):
            bounded.critical([[9.5]], 0.9)

    def test_contains_and_pvalue(self, bounded):
        with pytest.raises(SupportError, match="beyond"):
            bounded.contains([1.0], -0.2, 0.9)
        with pytest.raises(SupportError, match="beyond"):
            bounded.pvalue([1.0], 9.2)

    def test_a_set_that_reaches_the_end(self, bounded):
        with pytest.raises(SupportError, match="reaches the end of the simulated grid at mu = 9"):
            bounded.interval([1.0, 8.5], 0.9)
        found = bounded.interval([1.0, 8.5], 0.9, on_edge="open")
        assert np.isfinite(found.high[0]) and np.isposinf(found.high[1])

    def test_an_excluded_grid_is_an_empty_set(self, bounded):
        found = bounded.interval([30.0], 0.9)
        assert found.empty.all() and not found.covers(3.0).any()

    def test_profiled_nuisances(self, on_off):
        data = toy.simulate((1.0, 3.0), 20, rng_for(0, "far"))
        with pytest.raises(SupportError, match="nu = "):
            on_off.contains(data, 1.0)

    def test_levels(self, bounded):
        with pytest.raises(SettingError, match=r"level is 0.95; expected one that critical values were made for: 0.683, 0.9"):
            bounded.contains([1.0], 0.5, 0.95)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"grid": [0.0]}, SettingError, "2 or more, rising"),
        ({"grid": [1.0, 0.0]}, SettingError, "rising"),
        ({"grid": []}, DataError, "empty"),
        ({"grid": {"mu": [0, 1]}, "names": ["mu"]}, SettingError, "only one of them"),
        ({"n_toys": 8}, SettingError, "expected 9 or more"),
        ({"level": 0.0}, SettingError, "level is 0.0"),
        ({"level": []}, SettingError, "empty"),
        ({"interest": 2}, SettingError, "interest"),
        ({"profile": lambda psi, data: data}, SettingError, "expected interest < 1"),
        ({"bounds": [(0.5, None)]}, SettingError, "expected a grid within"),
        ({"bounds": [(0.0, None), (0.0, None)]}, ShapeError, "each of 1 parameters"),
        ({"statistic": lambda theta, data: np.full(data.shape, np.nan)}, NonFiniteError, "theta_0 = 0"),
        ({"statistic": lambda theta, data: data[:3]}, ShapeError, "the test statistic"),
        ({"simulator": lambda theta, n, rng: np.zeros(n - 1)}, ShapeError, "the test statistic"),
    ],
)
def test_bad_settings(settings, error, words):
    given = {"simulator": gaussian, "statistic": centred, "grid": [0.0, 1.0], "n_toys": 20} | settings
    with pytest.raises(error) as raised:
        neyman(given.pop("simulator"), given.pop("statistic"), given.pop("grid"), given.pop("level", 0.9), **given)
    assert words in str(raised.value)


def test_bad_theta(bounded):
    with pytest.raises(ShapeError, match=r"theta has shape \(2,\)"):
        bounded.contains([1.0], [1.0, 2.0], 0.9)
    with pytest.raises(SettingError, match="on_edge"):
        bounded.interval([1.0], 0.9, on_edge="ignore")


def test_infinite_statistic_excludes():
    found = neyman(gaussian, centred, np.linspace(-6, 6, 13), n_toys=200)
    wall = neyman(gaussian, lambda t, d: np.where(t[0] < -5.5, np.inf, (d - t[0]) ** 2), np.linspace(-5, 6, 12), n_toys=200)
    assert found.contains([0.0], 0.0).all()
    assert wall.contains([-5.0], -5.0).all()
    q = neyman(gaussian, lambda t, d: np.where(np.asarray(d) > 50, np.inf, (d - t[0]) ** 2), [0.0, 1.0], n_toys=200)
    assert not q.contains([60.0], 0.5).any()
    assert q.pvalue([60.0], 0.0) == pytest.approx(1 / 201)


def test_words_and_picture(bounded, on_off):
    assert "45 grid points x 8000 toys" in bounded.summary()
    ax = bounded.plot(level=0.9)
    assert ax.get_xlabel() == "mu" and "90 %" in ax.get_ylabel()
    assert len(on_off.plot().get_legend_handles_labels()[1]) == 6


def test_profiled_by_a_set_of_nuisances_agrees_with_the_closed_form():
    data = toy.simulate((1.0, 1.0), 50, rng_for(2, "profiled"))
    grid = Profiled(log_likelihood=toy.log_likelihood, nuisances=np.linspace(0.5, 1.6, 1201))
    psi = np.array([[0.0], [1.0], [3.0]])
    assert np.allclose(grid(psi, data), toy.profiled(psi, data), atol=1e-4)
    assert np.allclose(grid.nuisance([1.0], data)[:, 0], toy.nu_hat(1.0, data), atol=1e-3)


def test_normal_reference():
    # no bound: the interval of the Gaussian is x +- 1.645
    found = neyman(gaussian, centred, np.linspace(-6, 6, 25), n_toys=8000, seed=3)
    got = found.interval(np.array([0.3]))
    assert np.allclose([got.low[0], got.high[0]], 0.3 + norm.ppf([0.05, 0.95]), atol=0.06)


DEGREES = 4
LEVELS = (0.68, 0.9)
GRID = {"mu": [-1.0, 1.0], "log_sigma": np.linspace(-3.5, 2.5, 25)}


def simulate(theta, n, rng):
    """A mean that is known to sigma, and an estimate of sigma with 4 degrees of freedom."""
    mu, sigma = np.atleast_2d(theta)[:, 0], np.exp(np.atleast_2d(theta)[:, 1])
    return np.stack([rng.normal(mu, sigma, n), sigma * np.sqrt(rng.chisquare(DEGREES, n) / DEGREES)], axis=1)


def distance(theta, data):
    # in logarithm critical values are straight lines in log sigma, as the interpolation has them
    return 2 * np.log(np.abs(data[:, 0] - np.atleast_1d(theta)[..., 0]))


def estimate(psi, data):
    return np.clip(np.log(data[:, 1]), -3.5, 2.5)


def sets(**changes):
    asked = {"n_toys": 3000, "interest": 1, "profile": estimate, "seed": 1}
    return neyman(simulate, distance, GRID, LEVELS, **(asked | changes))


@pytest.fixture(scope="module")
def plug_in():
    return sets()


@pytest.fixture(scope="module")
def prepivoted():
    return sets(nuisance="prepivoted", n_rounds=1)


def test_the_plug_in_is_z_and_prepivoting_is_students_t(plug_in, prepivoted):
    at = [[0.0, 0.25], [0.3, -0.5], [0.0, 0.75]]
    scale = np.exp(np.array(at)[:, 1])
    for level in LEVELS:
        z, t = norm.ppf((1 + level) / 2), student.ppf((1 + level) / 2, DEGREES)
        assert np.allclose(np.exp(plug_in.critical(at, level) / 2) / scale, z, rtol=0.06)
        assert np.allclose(np.exp(prepivoted.critical(at, level) / 2) / scale, t, rtol=0.06)


@pytest.mark.parametrize("level", LEVELS)
def test_coverage_with_nuisances(plug_in, prepivoted, level):
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
    again = sets(nuisance="prepivoted", n_rounds=2)
    data = simulate((0.0, 0.0), 4000, rng_for(3, "rounds"))
    assert (again.contains(data, 0.0, 0.9) == prepivoted.contains(data, 0.0, 0.9)).mean() > 0.98
    assert len(again.rounds) == 2 and "nuisances prepivoted" in again.summary()


def test_pvalues_with_nuisances_are_uniform_and_agree_with_the_sets(prepivoted):
    data = simulate((-1.0, 0.3), 8000, rng_for(4, "p"))
    p = prepivoted.pvalue(data, -1.0)
    assert np.abs(np.quantile(p, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03
    for level in LEVELS:
        assert np.array_equal(p > 1 - level, prepivoted.contains(data, -1.0, level))


def test_intervals_are_students(prepivoted):
    data = np.array([[0.1, 0.3], [-0.2, 0.2]])
    found = prepivoted.interval(data, 0.68, n_points=200)
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
    asked = {"n_toys": 4000, "interest": 1, "profile": lambda psi, d: np.clip(toy.nu_hat(psi, d), 0.05, 3.0), "bounds": [(0, None)] * 2}
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
    q = distance(theta, data)
    asked = {"names": ["mu", "log_sigma"], "interest": 1, "profile": lambda psi, d: np.clip(estimate(psi, d), -2.9, 1.9)}
    best = asked["profile"](None, data)
    fresh = simulate((0.0, -0.5), 8000, rng_for(7, "fresh"))
    plain = lf2i(theta, q, distance, 0.9, model="splines-3", **asked)
    found = lf2i(theta, q, distance, 0.9, model="splines-3", profiled=best, n_rounds=1, pvalues=True, **asked)
    assert plain.contains(fresh, 0.0).mean() < 0.85
    assert found.contains(fresh, 0.0).mean() == pytest.approx(0.9, abs=0.02)
    assert np.mean(found.pvalue(fresh, 0.0) > 0.1) == pytest.approx(0.9, abs=0.04)  # .82 without, and trees are steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nuisance": "profile"}, "did you mean 'profiled'"),
        ({"nuisance": "prepivoted", "profile": None}, "'prepivoted' without a profile"),
        ({"nuisance": "supremum"}, "'supremum' with a profile"),
        ({"nuisance": "prepivoted", "n_rounds": 0}, "n_rounds is 0"),
        ({"nuisance": "supremum", "profile": None, "interest": 2}, "all parameters are of interest"),
    ],
)
def test_bad_settings_of_nuisances(changes, words):
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
