import numpy as np
import pytest
from matplotlib.axes import Axes

from sbi_phys.calibration import coverage
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError


def gaussian(rng, *, n=500, n_draws=99, d=2, width=1.0, shift=0.0):
    """Truths, draws and log densities of a Gaussian posterior N(m(x) + shift, width^2) where N(m(x), 1) is right."""
    mean = rng.standard_normal((n, d))
    theta = mean + rng.standard_normal((n, d))
    draws = mean[:, None] + shift + width * rng.standard_normal((n, n_draws, d))
    at_theta = -(((theta - mean - shift) / width) ** 2).sum(axis=-1) / 2
    at_draws = -(((draws - mean[:, None] - shift) / width) ** 2).sum(axis=-1) / 2
    return theta, draws, at_theta, at_draws


@pytest.mark.parametrize("density", [True, False])
def test_size_on_an_exact_posterior(density):
    rng = np.random.default_rng(1)
    p = [coverage(*gaussian(rng, d=1 + density)[: 4 if density else 2]).pvalue for _ in range(400)]
    assert abs(np.mean(np.array(p) < 0.05) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("density", [True, False])
@pytest.mark.parametrize("wrong", [{"width": 0.8}, {"width": 1.25}])
def test_power_on_wrong_widths(density, wrong):
    rng = np.random.default_rng(2)
    p = [coverage(*gaussian(rng, **wrong)[: 4 if density else 2]).pvalue for _ in range(60)]
    assert np.mean(np.array(p) < 0.05) >= 0.95


def test_observed_coverage_by_hand():
    rng = np.random.default_rng(3)
    theta, draws, at_theta, at_draws = gaussian(rng, n=60, n_draws=19, d=1)
    hpd = coverage(theta, draws, at_theta, at_draws)
    above = (at_draws > at_theta[:, None]).sum(axis=1)
    np.testing.assert_allclose(hpd.level, np.arange(1, 20) / 20)
    np.testing.assert_allclose(hpd.observed, [(above < k).mean() for k in range(1, 20)])
    central = coverage(theta, draws)
    rank = (draws[:, :, 0] < theta).sum(axis=1)
    assert central.observed.shape == (19, 1)
    # 10 of 20 places: those between the 5th and the 15th draw
    assert central.observed[9, 0] == pytest.approx(((rank >= 5) & (rank <= 14)).mean())


@pytest.mark.parametrize("n_draws", [2, 3, 10, 11])
def test_central_places_are_a_permutation_of_ranks_from_the_middle_out(n_draws):
    draws = np.arange(1.0, n_draws + 1)
    theta = np.repeat(np.arange(n_draws + 1) + 0.5, 10)
    places = coverage(theta, np.tile(draws, (theta.size, 1))).ranks[::10, 0]
    assert sorted(places) == list(range(n_draws + 1))
    middle = np.abs(np.arange(n_draws + 1) - n_draws / 2)
    assert np.all(np.diff(middle[np.argsort(places)]) >= 0)


def test_gaussian_coverage_of_a_narrow_posterior_is_the_known_curve():
    from scipy.stats import chi2

    rng = np.random.default_rng(4)
    result = coverage(*gaussian(rng, n=4000, n_draws=499, d=3, width=0.7), levels=[0.5, 0.68, 0.9, 0.95])
    expected = chi2.cdf(0.49 * chi2.ppf(result.level, 3), 3)
    np.testing.assert_allclose(result.observed, expected, atol=0.03)
    assert result.verdicts == {"highest-density regions": "overconfident"}
    assert "overconfident" in result.summary()
    assert "95 %" in result.summary()


@pytest.mark.parametrize(("width", "word"), [(1.0, "calibrated"), (0.7, "overconfident"), (1.4, "underconfident")])
def test_words(width, word):
    rng = np.random.default_rng(5)
    values = gaussian(rng, width=width)
    assert set(coverage(*values).verdicts.values()) == {word}
    assert set(coverage(*values[:2], names=["a", "b"]).verdicts.items()) == {("a", word), ("b", word)}


def test_band_agrees_with_the_pvalue_and_levels_snap():
    rng = np.random.default_rng(6)
    result = coverage(*gaussian(rng, n_draws=100), levels=[0.9, 0.494, 0.495, 0.5001, 0.68])
    np.testing.assert_allclose(result.level, np.array([50, 51, 69, 91]) / 101)
    assert result.band.shape == (result.level.size, 2)
    assert np.all(result.band[:, 0] < result.level)
    assert np.all(result.band[:, 1] > result.level)
    assert result.at(0.9)[0] == result.observed[-1]


def test_a_truth_outside_the_support_counts_as_outside():
    rng = np.random.default_rng(7)
    theta, draws, at_theta, at_draws = gaussian(rng, n=100)
    at_theta[:] = -np.inf
    result = coverage(theta, draws, at_theta, at_draws)
    assert np.all(result.observed == 0)
    assert result.pvalue < 1e-20


@pytest.mark.parametrize("d", [1, 9])
def test_plots(d):
    rng = np.random.default_rng(8)
    values = gaussian(rng, n=60, n_draws=30, d=d)
    for result in (coverage(*values), coverage(*values[:2])):
        ax = result.plot()
        assert isinstance(ax, Axes)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("credible level", "observed coverage")
        assert result.plot(ax) is ax


def test_bad_input():
    rng = np.random.default_rng(9)
    theta, draws, at_theta, at_draws = gaussian(rng, n=50, n_draws=20)
    with pytest.raises(SettingError, match="log_prob_draws is None"):
        coverage(theta, draws, at_theta)
    with pytest.raises(ShapeError, match="log_prob_draws"):
        coverage(theta, draws, at_theta, at_draws.T)
    with pytest.raises(NonFiniteError, match="log_prob_theta has NaN"):
        coverage(theta, draws, at_theta * np.nan, at_draws)
    with pytest.raises(NonFiniteError, match="log_prob_draws has NaN or"):
        coverage(theta, draws, at_theta, at_draws + np.inf)
    with pytest.raises(DataError, match="constant"):
        coverage(theta, draws, at_theta * 0, at_draws * 0)
    with pytest.raises(DataError, match="'theta_0' is constant"):
        coverage(theta * 0, draws * 0)
    with pytest.raises(DataError, match="1 draws"):
        coverage(theta, draws[:, :1])
    for levels in ([0.0], [0.5, 1.0], []):
        with pytest.raises(SettingError, match="levels"):
            coverage(theta, draws, levels=levels)
    with pytest.raises(NonFiniteError, match="levels"):
        coverage(theta, draws, levels=[np.nan])
    with pytest.raises(ShapeError, match="draws"):
        coverage(theta, draws[:, :, :1])
