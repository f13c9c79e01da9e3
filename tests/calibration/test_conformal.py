import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, chi2, kstest

from sbi_phys.calibration.conformal import conformal_regions, hpd_content
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from tests import oracles


def densities(pairs):
    return pairs.log_prob_theta, pairs.log_prob_draws


@pytest.mark.parametrize("score", ["density", "hpd"])
@pytest.mark.parametrize("name", oracles.ORACLES)
def test_regions_cover_90_percent_where_the_raw_posterior_covers_under_75(name, score):
    rng = np.random.default_rng(1)
    held_out, fresh = (oracles.ORACLES[name](rng, n=n, n_draws=30, scale=0.55) for n in (2500, 3000))
    regions = conformal_regions(*densities(held_out), level=0.9, score=score)
    raw = (hpd_content(fresh.log_prob_theta[:, None], fresh.log_prob_draws) <= 0.9).mean()
    assert raw < 0.75
    assert regions.raw[0] == pytest.approx(raw, abs=0.03)
    inside = regions.contains(fresh.log_prob_theta, fresh.log_prob_draws)
    assert inside.mean() == pytest.approx(0.9, abs=0.02)
    assert np.mean(regions.mass(fresh.log_prob_draws)) > 0.9
    assert regions.repaired
    assert "repaired" in regions.summary()
    assert "repaired" in regions.label


def test_content_given_the_held_out_set_follows_its_beta_distribution():
    rng = np.random.default_rng(2)
    contents, n = [], 99
    for _ in range(400):
        regions = conformal_regions(rng.gumbel(size=n), level=0.9)
        contents.append(np.exp(-np.exp(-np.inf)) - np.exp(-np.exp(regions.threshold)))  # P(-log q <= t), log q Gumbel
    assert regions.guarantee == 0.9
    assert kstest(contents, beta(90, 10).cdf).pvalue > 1e-3
    np.testing.assert_allclose(regions.interval, beta.interval(0.95, 90, 10))
    assert np.mean(contents) == pytest.approx(0.9, abs=3 * beta(90, 10).std() / np.sqrt(400))


@settings(max_examples=40)
@given(st.integers(10, 200), st.floats(0.05, 0.95), st.integers(0, 10_000))
def test_threshold_is_the_order_statistic_of_the_definition(n, level, seed):
    log_q = np.random.default_rng(seed).standard_normal(n)
    k = next(k for k in range(1, n + 2) if k / (n + 1) >= level - 1e-12)
    if k > n:
        with pytest.raises(DataError, match="simulations are left for the threshold"):
            conformal_regions(log_q, level=level)
        return
    regions = conformal_regions(log_q, level=level)
    assert regions.threshold == sorted(-log_q)[k - 1]
    assert level - 1e-9 <= regions.guarantee <= level + 1 / (n + 1) + 1e-9
    assert regions.contains(log_q).sum() == k


def test_content_of_a_gaussian_is_chi_square_and_uniform_at_the_truth():
    p = oracles.gaussian(np.random.default_rng(3), n=800, n_draws=2000, dim=3)
    content = hpd_content(p.log_prob_theta[:, None], p.log_prob_draws)[:, 0]
    peak = -0.5 * np.log(np.linalg.det(2 * np.pi * oracles.Gaussian(3).covariance))
    np.testing.assert_allclose(np.minimum(content, 1), chi2.cdf(2 * (peak - p.log_prob_theta), 3), atol=0.05)
    assert kstest(content, "uniform").pvalue > 1e-3


def test_content_goes_on_beyond_the_draws_and_keeps_the_order():
    draws = np.log(np.array([[0.1, 0.2, 0.3, 0.4]]))
    points = np.log(np.array([[0.5, 0.4, 0.35, 0.2, 0.1, 0.05, 0.01]]))
    content = hpd_content(np.append(points, [[-np.inf]], axis=1), draws)[0]
    assert np.all(np.diff(content) > 0)
    np.testing.assert_allclose(content[[1, 3, 4]], [0.2, 0.6, 0.8])
    assert content[-1] == np.inf
    assert content[5] == pytest.approx(0.8 + np.log(2) / draws.std())


@pytest.mark.parametrize("score", ["density", "hpd"])
def test_features_repair_a_posterior_that_is_wrong_locally(score):
    rng = np.random.default_rng(4)
    held_out, fresh = (oracles.gaussian(rng, n=n, n_draws=50, local=True) for n in (2000, 4000))
    low = fresh.x[:, 0] < 0
    marginal = conformal_regions(*densities(held_out), score="hpd")
    spread = marginal.contains(fresh.log_prob_theta, fresh.log_prob_draws)
    assert spread[low].mean() < 0.85 < 0.95 < spread[~low].mean()
    regions = conformal_regions(*densities(held_out), score=score, features=held_out.x, n_trees=60, seed=1)
    inside = regions.contains(fresh.log_prob_theta, fresh.log_prob_draws, fresh.x)
    assert inside.mean() == pytest.approx(0.9, abs=0.02)
    assert inside[low].mean() == pytest.approx(0.9, abs=0.03)
    assert inside[~low].mean() == pytest.approx(0.9, abs=0.03)
    mass = regions.mass(fresh.log_prob_draws, fresh.x)
    assert mass[low].mean() == pytest.approx(0.947, abs=0.03)  # where the narrow level map reaches 0.05 and 0.95
    assert mass[~low].mean() < 0.8
    assert regions.n == 1000
    assert "quantile learned from 1 features" in regions.summary()
    again = conformal_regions(*densities(held_out), score=score, features=held_out.x, n_trees=60, seed=1)
    assert again.threshold == regions.threshold


def test_points_of_several_kinds_and_mass():
    p = oracles.gaussian(np.random.default_rng(5), n=100, n_draws=50)
    regions = conformal_regions(*densities(p), level=0.5, score="hpd")
    assert regions.contains(p.log_prob_draws, p.log_prob_draws).shape == (100, 50)
    np.testing.assert_allclose(regions.mass(p.log_prob_draws), regions.contains(p.log_prob_draws, p.log_prob_draws).mean(axis=1))
    assert regions.mass(p.log_prob_draws).mean() == pytest.approx(regions.threshold, abs=0.02)
    dense = conformal_regions(p.log_prob_theta, level=0.5)
    assert np.isnan(dense.raw[0])
    assert not dense.contains([-np.inf])[0]


def test_some_truths_without_density_are_outside_and_many_are_an_error():
    log_q = np.zeros(100) + np.linspace(0, 1, 100)
    log_q[:5] = -np.inf
    assert np.isfinite(conformal_regions(log_q).threshold)
    log_q[:20] = -np.inf
    with pytest.raises(DataError, match="-inf for 20 % of true values"):
        conformal_regions(log_q)


@pytest.mark.parametrize("score", ["density", "hpd"])
@pytest.mark.parametrize("features", [True, False])
def test_plot(score, features):
    p = oracles.gaussian(np.random.default_rng(6), n=200, n_draws=30, scale=0.6)
    regions = conformal_regions(*densities(p), score=score, features=p.x if features else None, n_trees=10)
    ax = regions.plot()
    assert ax.get_ylabel() == "fraction of simulations"
    assert ax.get_xlabel()
    assert regions.plot(ax) is ax


def test_bad_input():
    p = oracles.gaussian(np.random.default_rng(7), n=200, n_draws=30)
    with pytest.raises(NonFiniteError, match="log_prob_theta has NaN"):
        conformal_regions(p.log_prob_theta * np.nan)
    with pytest.raises(NonFiniteError, match="log_prob_draws"):
        conformal_regions(p.log_prob_theta, p.log_prob_draws * np.inf, score="hpd")
    with pytest.raises(DataError, match="complex"):
        conformal_regions(p.log_prob_theta * 1j)
    with pytest.raises(DataError, match="empty"):
        conformal_regions([])
    with pytest.raises(ShapeError, match="log_prob_theta has shape"):
        conformal_regions(p.log_prob_draws)
    with pytest.raises(SettingError, match="log_prob_draws is None"):
        conformal_regions(p.log_prob_theta, score="hpd")
    with pytest.raises(SettingError, match="score"):
        conformal_regions(p.log_prob_theta, score="hdp")
    with pytest.raises(SettingError, match="level"):
        conformal_regions(p.log_prob_theta, level=1.0)
    with pytest.raises(DataError, match="at least 999"):
        conformal_regions(p.log_prob_theta, level=0.999)
    with pytest.raises(DataError, match="constant in row 0"):
        conformal_regions(p.log_prob_theta, p.log_prob_draws * 0, score="hpd")
    with pytest.raises(DataError, match="at least 2"):
        hpd_content(p.log_prob_theta[:, None], p.log_prob_draws[:, :1])
    with pytest.raises(ShapeError, match="rows differ"):
        hpd_content(p.log_prob_theta[:10, None], p.log_prob_draws)
    with pytest.raises(DataError, match="to learn the quantile"):
        conformal_regions(p.log_prob_theta, features=p.x, train_share=0.1)
    with pytest.raises(ShapeError, match="features"):
        conformal_regions(p.log_prob_theta, features=p.x[:10])
    plain, learned = conformal_regions(p.log_prob_theta), conformal_regions(p.log_prob_theta, features=p.x)
    with pytest.raises(SettingError, match="features is given"):
        plain.contains(p.log_prob_theta, features=p.x)
    with pytest.raises(SettingError, match="features is None"):
        learned.contains(p.log_prob_theta)
    with pytest.raises(ShapeError, match="log_prob has shape"):
        plain.contains(np.zeros((2, 2, 2)))
