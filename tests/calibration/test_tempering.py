import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from sbi_phys.calibration import coverage, sbc
from sbi_phys.calibration.tempering import _distances, mix_draws, temper
from sbi_phys.core.errors import ConvergenceError, DataError, SettingError, ShapeError, SupportError
from tests import oracles


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
    assert "no widening is called for" in fixed.summary()
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


def test_plot():
    p = oracles.gaussian(np.random.default_rng(8), n=60, n_draws=30, scale=0.7)
    fixed = temper(p.theta, p.draws)
    ax = fixed.plot()
    assert ax.get_xlabel() == "widening factor"
    assert fixed.plot(ax) is ax


def test_bad_input():
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
