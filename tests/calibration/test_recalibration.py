import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from scipy.stats import kstest, norm

from sbi_phys.calibration import coverage, sbc
from sbi_phys.calibration.recalibration import (
    _distances,
    check_bounds,
    from_line,
    mix_draws,
    normal_scores,
    recalibrate_ranks,
    temper,
    to_line,
)
from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError, ShapeError, SupportError
from tests import oracles

OVERCONFIDENT = {"scale": 0.6, "shift": 0.3}


@pytest.mark.parametrize("name", ["Gaussian, d = 1", "Gaussian, d = 2", "Poisson-Gamma"])
@pytest.mark.parametrize("method", ["isotonic", "beta"])
def test_recalibrated_draws_pass_on_fresh_data_where_the_raw_ones_fail(name, method):
    rng = np.random.default_rng(1)
    held_out, fresh = (oracles.ORACLES[name](rng, n=n, n_draws=60, **OVERCONFIDENT) for n in (3000, 500))
    fixed = recalibrate_ranks(held_out.theta, held_out.draws, method=method)
    draws = fixed.apply(fresh.draws)
    assert sbc(fresh.theta, fresh.draws).pvalue < 1e-10
    assert coverage(fresh.theta, fresh.draws).at(0.9).max() < 0.75
    passes = 0.01 if method == "isotonic" else 1e-4  # a beta CDF is near to what a width leaves behind, not equal to it
    assert sbc(fresh.theta, draws).pvalue > passes
    assert coverage(fresh.theta, draws).pvalue > passes
    np.testing.assert_allclose(coverage(fresh.theta, draws).at(0.9), 0.9, atol=0.04)
    assert fixed.repaired
    assert "repaired" in fixed.summary()
    assert "repaired" in fixed.label


def test_a_bimodal_posterior_keeps_its_modes():
    rng = np.random.default_rng(2)
    held_out, fresh = (oracles.bimodal(rng, n=n, n_draws=100, shift=0.3) for n in (4000, 500))
    assert sbc(fresh.theta, fresh.draws).pvalue < 1e-3
    draws = recalibrate_ranks(held_out.theta, held_out.draws).apply(fresh.draws)
    assert sbc(fresh.theta, draws).pvalue > 0.01


def test_levels_are_exact_for_any_posterior_over_held_out_sets():
    """P(F'(theta) <= k / (n + 1)) = k / (n + 1), here k = 1, 10 and 18 of n = 19, for draws that have nothing to do with theta."""
    rng = np.random.default_rng(3)
    n, repetitions = 19, 500
    hits = np.zeros(3)
    for _ in range(repetitions):
        theta = rng.exponential(size=n + 1)
        draws = rng.standard_normal((n + 1, 20)) * 0.3
        scores = normal_scores(theta, draws)[:, 0]
        fixed = recalibrate_ranks(theta[:n], draws[:n])
        hits += scores[n] <= fixed.moved(norm.ppf([0.05, 0.5, 0.9]))[:, 0]
    expected = np.array([0.05, 0.5, 0.9])
    np.testing.assert_array_less(np.abs(hits / repetitions - expected), 4 * np.sqrt(expected * (1 - expected) / repetitions))


def test_tolerance_holds_the_recalibrated_distribution():
    rng = np.random.default_rng(4)
    outside, n = 0, 200
    for _ in range(200):
        held_out = oracles.gaussian(rng, n=n, n_draws=20, scale=0.6)
        fixed = recalibrate_ranks(held_out.theta, held_out.draws)
        # scores of q are N(0, (1 / 0.6)^2) up to the few draws; their true distribution from many simulations at once
        outside += np.abs(reference(fixed.moved(norm.ppf(fixed.level))[:, 0]) - fixed.level).max() > fixed.tolerance
    assert outside / 200 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


_many = oracles.gaussian(np.random.default_rng(5), n=40_000, n_draws=20, scale=0.6)

_scores = np.sort(normal_scores(_many.theta, _many.draws)[:, 0])


def reference(z):
    return np.searchsorted(_scores, z) / _scores.size


def test_scores_of_an_exact_posterior_are_standard_normal():
    p = oracles.gaussian(np.random.default_rng(6), n=2000, n_draws=1000, dim=2)
    scores = normal_scores(p.theta, p.draws)
    assert all(kstest(column, "norm").pvalue > 1e-3 for column in scores.T)
    mean, sd = oracles.Gaussian(2).moments(p.x)
    np.testing.assert_allclose(np.median(np.abs(scores - (p.theta - mean[:, 0]) / sd[:, 0])), 0, atol=0.05)


def test_map_of_a_gaussian_error_is_the_known_line():
    p = oracles.gaussian(np.random.default_rng(7), n=8000, n_draws=100, scale=0.5, shift=0.2)
    z = np.linspace(-2.5, 2.5, 11)
    for method in ("isotonic", "beta"):
        moved = recalibrate_ranks(p.theta, p.draws, method=method).moved(z)[:, 0]
        assert np.all(np.diff(moved) > 0)
        # the truth is N(0, 1) where q's score is (z - 0.2) / 0.5
        np.testing.assert_allclose(norm.cdf(0.5 * moved + 0.2), norm.cdf(z), atol=0.02)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(["isotonic", "beta"]), st.integers(2, 40))
def test_apply_keeps_order_and_shape(seed, method, n_draws):
    rng = np.random.default_rng(seed)
    p = oracles.gaussian(rng, n=50, n_draws=n_draws, dim=2, scale=float(rng.uniform(0.5, 2)), shift=float(rng.uniform(-1, 1)))
    out = recalibrate_ranks(p.theta, p.draws, method=method).apply(p.draws)
    assert out.shape == p.draws.shape
    assert np.isfinite(out).all()
    before = np.take_along_axis(out, np.argsort(p.draws, axis=1), axis=1)
    assert np.all(np.diff(before, axis=1) >= -1e-12)


def test_bounds_are_kept():
    rng = np.random.default_rng(8)
    p = oracles.poisson_gamma(rng, n=1000, n_draws=50, scale=0.4)
    theta, draws = p.theta / (1 + p.theta), p.draws / (1 + p.draws)
    fixed = recalibrate_ranks(theta, draws, bounds=[(0, 1)])
    out = fixed.apply(draws)
    assert out.min() > 0
    assert out.max() < 1
    fresh = oracles.poisson_gamma(rng, n=500, n_draws=50, scale=0.4)
    assert sbc(fresh.theta / (1 + fresh.theta), fixed.apply(fresh.draws / (1 + fresh.draws))).pvalue > 0.001
    with pytest.raises(SupportError, match="inside its bounds"):
        fixed.apply(draws + 1)


@pytest.mark.parametrize("bounds", [(-1, 2), (-1, np.inf), (-np.inf, 2), (-np.inf, np.inf)])
def test_line_and_back(bounds):
    values = np.random.default_rng(9).uniform(-0.999, 1.999, (20, 3, 1))
    edges = check_bounds([bounds], 1)
    line = to_line("theta", values, edges)
    np.testing.assert_allclose(from_line(line, edges), values)
    assert np.all(np.diff(np.sort(line, axis=None)[np.argsort(np.argsort(values, axis=None))][np.argsort(values, axis=None)]) >= 0)
    assert np.array_equal(np.argsort(line, axis=None), np.argsort(values, axis=None))


def test_exact_posterior_is_left_alone_within_the_tolerance():
    p = oracles.gaussian(np.random.default_rng(10), n=2000, n_draws=200)
    fixed = recalibrate_ranks(p.theta, p.draws, ["gamma"])
    assert np.sqrt(np.mean((fixed.apply(p.draws) - p.draws) ** 2)) < 0.1 * p.draws.std(axis=1).mean()
    assert np.abs(fixed.ecdf[:, 0] - fixed.level).max() < fixed.tolerance < 1.5 / np.sqrt(2000)
    assert "gamma  corrects a shift" in fixed.summary()


@pytest.mark.parametrize("d", [1, 7])
def test_plot(d):
    p = oracles.gaussian(np.random.default_rng(11), n=60, n_draws=30, dim=d, scale=0.7)
    fixed = recalibrate_ranks(p.theta, p.draws)
    ax = fixed.plot()
    assert {t.get_text() for t in ax.get_legend().get_texts()} >= set(fixed.labels)
    assert fixed.plot(ax) is ax


def test_flat_arrays_are_one_parameter():
    p = oracles.gaussian(np.random.default_rng(12), n=60, n_draws=30)
    fixed = recalibrate_ranks(p.theta[:, 0], p.draws[:, :, 0])
    np.testing.assert_array_equal(fixed.apply(p.draws[:, :, 0]), fixed.apply(p.draws)[:, :, 0])


def test_bad_input():
    p = oracles.gaussian(np.random.default_rng(13), n=60, n_draws=30, dim=2)
    fixed = recalibrate_ranks(p.theta, p.draws)
    with pytest.raises(SettingError, match="method"):
        recalibrate_ranks(p.theta, p.draws, method="spline")
    with pytest.raises(DataError, match="all equal"):
        recalibrate_ranks(p.theta, np.zeros_like(p.draws))
    with pytest.raises(ShapeError, match="bounds has shape"):
        recalibrate_ranks(p.theta, p.draws, bounds=[(0, 1)])
    with pytest.raises(SettingError, match="low < high"):
        recalibrate_ranks(p.theta, p.draws, bounds=[(0, 1), (1, 1)])
    with pytest.raises(NonFiniteError, match="bounds"):
        recalibrate_ranks(p.theta, p.draws, bounds=[(0, np.nan), (1, 2)])
    with pytest.raises(SupportError, match="theta has"):
        recalibrate_ranks(p.theta, p.draws, bounds=[(0, 1), (0, 1)])
    with pytest.raises(ShapeError, match="draws has shape"):
        fixed.apply(p.draws[:, :, :1])
    with pytest.raises(DataError, match="1 draws"):
        fixed.apply(p.draws[:, :1])
    with pytest.raises(NonFiniteError, match="draws"):
        fixed.apply(p.draws * np.nan)
    with pytest.raises(NonFiniteError, match="theta"):
        recalibrate_ranks(p.theta * np.nan, p.draws)


@pytest.mark.parametrize("by", ["coverage", "score"])
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_widened_draws_pass_on_fresh_data_where_the_raw_ones_fail(by, dim):
    rng = np.random.default_rng(1)
    held_out, fresh = (oracles.gaussian(rng, n=n, dim=dim, scale=0.6) for n in (1500, 500))
    fixed = temper(held_out.theta, held_out.draws, by=by)
    assert fixed.factor == pytest.approx(1 / 0.6, abs=4 * fixed.error)
    draws = fixed.apply(fresh.draws)
    assert sbc(fresh.theta, fresh.draws).pvalue < 1e-10
    assert coverage(fresh.theta, fresh.draws).at(0.9).min() < 0.75
    assert sbc(fresh.theta, draws).pvalue > 0.01
    assert coverage(fresh.theta, draws).pvalue > 0.01
    np.testing.assert_allclose(coverage(fresh.theta, draws).at(0.9), 0.9, atol=0.05)
    assert "too narrow" in fixed.summary()
    assert "repaired" in fixed.summary()
    assert "repaired" in fixed.label
    assert fixed.repaired


@pytest.mark.parametrize("by", ["coverage", "score"])
@pytest.mark.parametrize("name", oracles.ORACLES)
def test_factor_of_an_exact_posterior_is_one_and_its_error_is_right(by, name):
    rng = np.random.default_rng(2)
    pulls = []
    for _ in range(20):
        p = oracles.ORACLES[name](rng, n=200, n_draws=50)
        fixed = temper(p.theta, p.draws, by=by)
        pulls.append((fixed.factor - 1) / fixed.error)
    assert abs(np.mean(pulls)) < 4 / np.sqrt(20)
    assert 0.6 < np.std(pulls) < 1.5


def test_distances_by_leaving_each_draw_out():
    p = oracles.gaussian(np.random.default_rng(3), n=10, n_draws=12, dim=3)
    at_truth, at_draws = _distances(p.theta, p.draws)
    for i in range(3):
        inverse = np.linalg.inv(np.cov(p.draws[i].T))
        assert at_truth[i] == pytest.approx(mahalanobis(p.theta[i], p.draws[i].mean(axis=0), inverse))
        for k in range(12):
            rest = np.delete(p.draws[i], k, axis=0)
            assert at_draws[i, k] == pytest.approx(mahalanobis(p.draws[i, k], rest.mean(axis=0), np.linalg.inv(np.cov(rest.T))))


def test_widening_of_the_too_wide_and_of_bounded_parameters():
    rng = np.random.default_rng(4)
    wide = oracles.gaussian(rng, n=1000, scale=1.5)
    fixed = temper(wide.theta, wide.draws)
    assert fixed.factor == pytest.approx(1 / 1.5, abs=4 * fixed.error)
    assert "too wide" in fixed.summary()
    p = oracles.poisson_gamma(rng, n=1000, scale=0.4)
    out = temper(p.theta, p.draws, bounds=[(0, np.inf)]).apply(p.draws)
    assert out.min() > 0
    with pytest.raises(SupportError, match="inside its bounds"):
        temper(p.theta, -p.draws, bounds=[(0, np.inf)])


def test_exact_posterior_needs_no_widening():
    p = oracles.gaussian(np.random.default_rng(5), n=1000, dim=2)
    fixed = temper(p.theta, p.draws)
    assert "no widening is needed" in fixed.summary()
    assert fixed.content[np.argmin(np.abs(fixed.grid - fixed.factor))] == pytest.approx(0.5, abs=0.01)
    assert np.all(np.diff(fixed.content) <= 0)


def test_apply_moves_draws_away_from_their_mean():
    p = oracles.gaussian(np.random.default_rng(6), n=100, dim=2, scale=0.5)
    fixed = temper(p.theta, p.draws)
    out = fixed.apply(p.draws)
    np.testing.assert_allclose(out.mean(axis=1), p.draws.mean(axis=1))
    np.testing.assert_allclose(out.std(axis=1), fixed.factor * p.draws.std(axis=1))
    flat = temper(p.theta[:, 0], p.draws[:, :, 0])
    assert flat.apply(p.draws[:, :, 0]).shape == (100, 100)


def test_a_mixture_of_overconfident_posteriors_covers_more():
    rng = np.random.default_rng(7)
    theta = rng.standard_normal((500, 1))
    x = theta + 0.5 * rng.standard_normal((500, 1))
    centre = 0.8 * x[:, None]
    # each member is the exact posterior moved by an error of its own
    members = [centre + 0.4 * rng.standard_normal((500, 1, 1)) + 0.45 * rng.standard_normal((500, 80, 1)) for _ in range(4)]
    mixed = mix_draws(members, n_draws=100, seed=1)
    assert coverage(theta, mixed).at(0.9)[0] > max(coverage(theta, m).at(0.9)[0] for m in members) + 0.05


def test_mixture_takes_each_member_in_its_share_and_no_draw_twice():
    members = [np.arange(200.0).reshape(2, 100, 1), 1000 + np.arange(100.0).reshape(2, 50, 1)]
    mixed = mix_draws(members, [3, 1], n_draws=101, seed=2)
    assert mixed.shape == (2, 101, 1)
    assert all(np.unique(row).size == 101 for row in mixed)
    assert set((mixed[:, :, 0] >= 1000).sum(axis=1)) <= {25, 26}
    many = mix_draws([np.zeros((2000, 9, 1)), np.ones((2000, 9, 1))], n_draws=7, seed=3)
    assert many.mean() == pytest.approx(0.5, abs=0.01)
    assert mix_draws(members).shape[1] == 98
    assert mix_draws([members[0]]).shape[1] == 100
    np.testing.assert_array_equal(mix_draws(members, seed=4), mix_draws(members, seed=4))
    assert np.all(mix_draws(members, [0, 1]) >= 1000)


def test_plot_of_the_widening():
    p = oracles.gaussian(np.random.default_rng(8), n=60, n_draws=30, scale=0.7)
    fixed = temper(p.theta, p.draws)
    ax = fixed.plot()
    assert ax.get_xlabel() == "widening factor"
    assert fixed.plot(ax) is ax


def test_bad_input_of_tempering_and_mixtures():
    p = oracles.gaussian(np.random.default_rng(9), n=60, n_draws=30, dim=2)
    with pytest.raises(SettingError, match="by is"):
        temper(p.theta, p.draws, by="luck")
    with pytest.raises(DataError, match="at least 5"):
        temper(p.theta, p.draws[:, :4])
    with pytest.raises(DataError, match="all equal"):
        temper(p.theta, p.draws * 0)
    with pytest.raises(DataError, match="plane"):
        temper(p.theta, p.draws[:, :, [0, 0]])
    with pytest.raises(ConvergenceError, match="do not surround"):
        temper(p.theta + 1e4, p.draws)
    fixed = temper(p.theta, p.draws)
    with pytest.raises(ShapeError, match="draws has shape"):
        fixed.apply(p.draws[:, :, :1])
    with pytest.raises(DataError, match="posteriors is empty"):
        mix_draws([])
    with pytest.raises(ShapeError, match=r"posteriors\[1\] has shape"):
        mix_draws([p.draws, p.draws[:10]])
    with pytest.raises(ShapeError, match="weights"):
        mix_draws([p.draws, p.draws], [1])
    with pytest.raises(SettingError, match="weights"):
        mix_draws([p.draws, p.draws], [1, -1])
    with pytest.raises(SettingError, match="n_draws"):
        mix_draws([p.draws, p.draws], n_draws=61)
