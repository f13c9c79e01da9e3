from functools import partial

import numpy as np
import pytest
from matplotlib.axes import Axes

from sbi_phys.calibration.pulls import pulls
from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.priors import Parameter
from tests.toys import gaussian_posteriors

gaussian = partial(gaussian_posteriors, n_draws=100, spread=2.0)


def skewed(rng, n, n_draws):
    """Exact posteriors with heavy tails on one side: log-normal of sd 1, location and scale set by x."""
    scale = rng.gamma(3.0, size=(n, 1))
    values = scale * np.exp(rng.standard_normal((n, n_draws + 1)))
    return values[:, 0], values[:, 1:]


@pytest.mark.parametrize("repetitions", [80, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [lambda rng: gaussian(rng, n=100, n_draws=20, d=2), lambda rng: skewed(rng, 60, 15)])
def test_size_on_exact_posteriors(repetitions, make):
    rng = np.random.default_rng(1)
    results = [pulls(*make(rng), seed=i) for i in range(repetitions)]
    error = np.sqrt(0.05 * 0.95 / repetitions)
    assert abs(np.mean([r.pvalue < 0.05 for r in results]) - 0.05) < 3 * error
    for kind in ("pvalues_mean", "pvalues_width"):
        assert abs(np.mean([getattr(r, kind)["theta_0"] < 0.05 for r in results]) - 0.05) < 3 * error


@pytest.mark.parametrize("wrong", [{"width": 0.8}, {"width": 1.25}, {"shift": 0.3}])
def test_power_on_wrong_posteriors(wrong):
    rng = np.random.default_rng(2)
    assert np.mean([pulls(*gaussian(rng, **wrong), seed=i).pvalue < 0.05 for i in range(12)]) >= 0.9


@pytest.mark.parametrize(
    ("wrong", "word", "mean", "width"),
    [
        ({}, "calibrated", 0.0, 1.0),
        ({"width": 0.8}, "overconfident", 0.0, 1.25),
        ({"width": 1.25}, "underconfident", 0.0, 0.8),
        ({"shift": 0.4}, "biased high", -0.4, 1.0),
        ({"shift": -0.4}, "biased low", 0.4, 1.0),
    ],
)
def test_sizes_and_words(wrong, word, mean, width):
    result = pulls(*gaussian(np.random.default_rng(3), n=2000, n_draws=200, **wrong))
    assert result.verdicts == {"theta_0": word}
    assert word in result.summary()
    assert result.mean[0] == pytest.approx(mean, abs=4 * result.mean_err[0])
    assert result.width[0] == pytest.approx(width, abs=4 * result.width_err[0])
    assert result.bias[0] == pytest.approx(-mean, abs=4 * result.bias_err[0])
    assert result.rmse[0] == pytest.approx(np.hypot(1, mean), abs=0.05)


def test_pull_bias_and_contraction_by_hand():
    rng = np.random.default_rng(4)
    theta, draws = gaussian(rng, n=40, n_draws=15, d=2)
    result = pulls(theta, draws, ["a", "b"])
    pull = (theta - draws.mean(axis=1)) / draws.std(axis=1, ddof=1)
    np.testing.assert_allclose(result.pull, pull)
    np.testing.assert_allclose(result.mean, pull.mean(axis=0))
    np.testing.assert_allclose(result.width, pull.std(axis=0, ddof=1))
    np.testing.assert_allclose(result.bias, (draws.mean(axis=1) - theta).mean(axis=0))
    np.testing.assert_allclose(result.contraction, 1 - draws.var(axis=1, ddof=1).mean(axis=0) / theta.var(axis=0, ddof=1))
    assert result.pvalue == pytest.approx(min(1, 2 * min(result.pvalues.values())))


def test_expected_width_is_that_of_every_value_against_the_others():
    rng = np.random.default_rng(5)
    theta, draws = skewed(rng, 30, 12)
    values = np.column_stack([theta, draws])
    square = np.empty_like(values)
    for k in range(13):
        rest = np.delete(values, k, axis=1)
        square[:, k] = (values[:, k] - rest.mean(axis=1)) ** 2 / rest.var(axis=1, ddof=1)
    assert pulls(theta, draws).width_expected[0] == pytest.approx(np.sqrt(np.median(square.mean(axis=1))))


def test_expected_width_of_gaussian_posteriors_is_that_of_student():
    result = pulls(*gaussian(np.random.default_rng(6), n=4000, n_draws=20))
    # a row's mean over 21 values scatters and is skewed: its median lies a little below (L^2 - 1)/(L (L - 3))
    assert result.width_expected[0] ** 2 == pytest.approx(399 / (20 * 17), abs=0.06)


def test_contraction_of_a_known_posterior_and_of_the_prior():
    rng = np.random.default_rng(7)
    known = pulls(*gaussian(rng, n=4000, spread=2.0))
    assert known.contraction[0] == pytest.approx(0.8, abs=4 * known.contraction_err[0])
    assert 0 < known.contraction_err[0] < 0.02
    assert "as wide as the prior" not in known.summary()
    prior = pulls(rng.standard_normal((500, 1)), rng.standard_normal((500, 100, 1)))
    assert prior.pvalue > 0.05
    assert abs(prior.contraction[0]) < 4 * prior.contraction_err[0]
    assert "as wide as the prior" in prior.summary()


def test_truths_far_outside_and_tiny_pvalues():
    theta, draws = gaussian(np.random.default_rng(8), n=200)
    result = pulls(theta + 1e5, draws)
    assert np.isfinite(result.pull).all()
    assert result.mean[0] > 1e4
    assert 0 < result.pvalue < 1e-20
    assert result.verdicts["theta_0"].startswith("biased low")


def test_integers_flat_arrays_and_seed():
    rng = np.random.default_rng(9)
    theta, draws = rng.integers(0, 100, 50), rng.integers(0, 100, (50, 20))
    a, b = pulls(theta, draws, seed=1), pulls(theta[:, None].tolist(), draws[:, :, None], seed=1)
    assert a.pvalues == b.pvalues
    np.testing.assert_array_equal(a.pull, b.pull)


@pytest.mark.parametrize("d", [1, 7])
def test_plots(d):
    result = pulls(*gaussian(np.random.default_rng(10), n=60, d=d))
    ax = result.plot()
    assert isinstance(ax, Axes)
    assert [t.get_text() for t in ax.get_yticklabels()] == list(result.labels)
    assert result.plot(ax) is ax


def test_bad_input():
    theta, draws = gaussian(np.random.default_rng(11), n=50, n_draws=20, d=2)
    with pytest.raises(DataError, match="at least 10"):
        pulls(theta, draws[:, :9])
    with pytest.raises(DataError, match="constant"):
        pulls(theta * 0, draws * 0)
    with pytest.raises(DataError, match="'b' are all equal in 3 of 50 rows, first row 4"):
        flat = draws.copy()
        flat[4:7, :, 1] = 2.0
        pulls(theta, flat, [Parameter("a"), "b"])
    with pytest.raises(NonFiniteError, match="theta"):
        pulls(theta * np.nan, draws)
    with pytest.raises(DataError, match="complex"):
        pulls(theta, draws + 0j)
    with pytest.raises(ShapeError, match="draws has shape"):
        pulls(theta, draws[:, :, :1])
    with pytest.raises(ShapeError, match="names"):
        pulls(theta, draws, ["a"])
    # a constant truth with draws that vary is an answer: contraction has no prior to compare with
    assert np.isnan(pulls(theta * 0, draws).contraction).all()
