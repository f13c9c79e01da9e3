import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy.stats import chisquare

from sbi_phys.calibration import sbc
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.priors import Parameter
from tests.toys import gaussian_posteriors, rejection_rate


def rejections(repetitions, seed, **kwargs):
    return rejection_rate(lambda rng, i: sbc(*gaussian_posteriors(rng, **kwargs)).pvalue, repetitions, seed)


@pytest.mark.parametrize("n_draws", [20, 99])
def test_size_on_an_exact_posterior(n_draws):
    assert abs(rejections(400, 1, n_draws=n_draws) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("wrong", [{"width": 0.8}, {"width": 1.25}, {"shift": 0.3}])
def test_power_on_wrong_posteriors(wrong):
    assert rejections(60, 2, n_draws=199, **wrong) >= 0.95


def test_chi_square_has_the_right_size_where_bins_do_not_divide_the_ranks():
    rng = np.random.default_rng(3)
    p = [sbc(*gaussian_posteriors(rng, n_draws=22), n_bins=10).pvalues_chi2["theta_0"] for _ in range(400)]
    assert abs(np.mean(np.array(p) < 0.05) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)


def test_ranks_histogram_and_chi_square_by_hand():
    rng = np.random.default_rng(4)
    theta, draws = gaussian_posteriors(rng, n=200, n_draws=10, d=2)
    result = sbc(theta, draws, n_bins=4)
    ranks = (draws < theta[:, None]).sum(axis=1)
    np.testing.assert_array_equal(result.ranks, ranks)
    probability = np.array([2, 3, 3, 3]) / 11
    counts = [np.isin(ranks[:, 1], cell).sum() for cell in ([0, 1], [2, 3, 4], [5, 6, 7], [8, 9, 10])]
    np.testing.assert_array_equal(result.histogram[:, 1], counts)
    np.testing.assert_allclose(result.expected, 200 * probability)
    assert result.pvalues_chi2["theta_1"] == pytest.approx(chisquare(counts, 200 * probability).pvalue)
    np.testing.assert_allclose(result.ecdf[:, 0], [(ranks[:, 0] < k).mean() for k in range(1, 11)])
    assert result.pvalue == pytest.approx(min(1, 2 * min(result.pvalues.values())))


@pytest.mark.parametrize(
    ("wrong", "word", "shift", "width"),
    [
        ({}, "calibrated", 0, 1),
        ({"width": 0.7}, "overconfident", 0, 0.7),
        ({"width": 1.4}, "underconfident", 0, 1.4),
        ({"shift": 0.4}, "biased high", 0.4, 1),
        ({"shift": -0.4}, "biased low", -0.4, 1),
        ({"shift": 0.35, "width": 0.7}, "biased high and overconfident", 0.5, 0.7),
    ],
)
def test_words_and_sizes(wrong, word, shift, width):
    result = sbc(*gaussian_posteriors(np.random.default_rng(5), n=2000, n_draws=399, **wrong))
    assert result.verdicts == {"theta_0": word}
    assert word in result.summary()
    assert result.shift[0] == pytest.approx(shift, abs=4 * result.shift_err[0])
    assert result.width[0] == pytest.approx(width, abs=0.03 + 3 * result.width_err[0])


def test_words_for_a_wrong_shape():
    rng = np.random.default_rng(6)
    theta = rng.standard_normal((2000, 1))
    # two modes at +-a with the variance and mean of the normal that is right
    draws = 0.95 * rng.choice([-1, 1], (2000, 300, 1)) + np.sqrt(1 - 0.95**2) * rng.standard_normal((2000, 300, 1))
    assert sbc(theta, draws).verdicts["theta_0"] != "calibrated"


def test_bonferroni_keeps_the_family_size():
    rng = np.random.default_rng(7)
    rate = np.mean([sbc(*gaussian_posteriors(rng, n=200, n_draws=49, d=5)).pvalue < 0.05 for _ in range(200)])
    assert rate < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_ties_are_random_with_a_seed_and_calibrated():
    rng = np.random.default_rng(8)
    rate, n = [], 500
    for i in range(100):
        p = rng.beta(2, 2, size=(n, 1))
        theta = (rng.random((n, 1)) < p).astype(int)
        draws = (rng.random((n, 49, 1)) < p[:, None]).astype(int)
        rate.append(sbc(theta, draws, seed=i).pvalue < 0.05)
    assert np.mean(rate) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)
    one, again, other = sbc(theta, draws, seed=1), sbc(theta, draws, seed=1), sbc(theta, draws, seed=2)
    np.testing.assert_array_equal(one.ranks, again.ranks)
    assert np.any(one.ranks != other.ranks)


def test_quantities_catch_a_posterior_that_equals_the_prior():
    rng = np.random.default_rng(9)
    theta = rng.standard_normal((500, 1))
    x = theta + 0.5 * rng.standard_normal((500, 1))
    draws = rng.standard_normal((500, 99, 1))

    def log_likelihood(t):
        return -((t - x.reshape(-1, *[1] * (t.ndim - 1))) ** 2)

    blind = sbc(theta, draws)
    seen = sbc(theta, draws, quantities={"log likelihood": (log_likelihood(theta)[:, 0], log_likelihood(draws)[:, :, 0])})
    assert blind.pvalue > 0.05
    assert seen.names == ("theta_0", "log likelihood")
    assert seen.pvalue < 1e-10


def test_truths_outside_all_draws_have_the_end_ranks():
    rng = np.random.default_rng(10)
    theta, draws = gaussian_posteriors(rng, n=100, n_draws=20)
    theta[:50] = 1e6
    theta[50:] = -1e6
    result = sbc(theta, draws)
    assert set(result.ranks[:50, 0]) == {20}
    assert set(result.ranks[50:, 0]) == {0}
    assert result.pvalue < 1e-20
    assert result.verdicts["theta_0"] == "overconfident"


def test_point_like_posteriors_are_legal_and_rejected():
    rng = np.random.default_rng(11)
    theta = rng.standard_normal((300, 1))
    result = sbc(theta, np.zeros((300, 50, 1)))
    assert set(result.ranks[:, 0]) == {0, 50}
    assert result.pvalue < 1e-20


def test_flat_arrays_integers_and_lists_are_one_parameter():
    rng = np.random.default_rng(12)
    theta, draws = rng.integers(0, 100, 50), rng.integers(0, 100, (50, 20))
    a, b = sbc(theta, draws), sbc(theta[:, None].tolist(), draws[:, :, None].tolist())
    np.testing.assert_array_equal(a.ranks, b.ranks)


def test_result_is_frozen_and_names_come_from_parameters():
    rng = np.random.default_rng(13)
    result = sbc(*gaussian_posteriors(rng, n=60, d=2), names=[Parameter("gamma", latex=r"\gamma"), "lg_rcut"])
    assert result.names == ("gamma", "lg_rcut")
    assert result.labels == (r"$\gamma$", "lg_rcut")
    with pytest.raises(AttributeError):
        result.pvalue = 1.0


@pytest.mark.parametrize("d", [1, 7, 10])
def test_plots(d):
    rng = np.random.default_rng(14)
    result = sbc(*gaussian_posteriors(rng, n=60, n_draws=30, d=d))
    for kind in ("ecdf", "histogram"):
        ax = result.plot(kind=kind)
        assert isinstance(ax, Axes)
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert {t.get_text() for t in ax.get_legend().get_texts()} >= set(result.labels)
        assert len(result.figure(kind=kind).axes) == d
        assert result.plot(ax, kind=kind) is ax
    with pytest.raises(SettingError, match="kind"):
        result.plot(kind="pie")


def test_bad_input():
    rng = np.random.default_rng(15)
    theta, draws = gaussian_posteriors(rng, n=50, n_draws=20, d=2)
    with pytest.raises(NonFiniteError, match="draws has NaN or Inf in 1 of 50"):
        sbc(theta, np.where(np.arange(50)[:, None, None] == 3, np.nan, draws))
    with pytest.raises(NonFiniteError, match="theta"):
        sbc(theta * np.inf, draws)
    with pytest.raises(DataError, match="complex"):
        sbc(theta + 0j, draws)
    with pytest.raises(DataError, match="1 draws"):
        sbc(theta, draws[:, :1])
    with pytest.raises(DataError, match="9 rows"):
        sbc(theta[:9], draws[:9])
    with pytest.raises(DataError, match=r"'theta_1' is constant \(2\)"):
        sbc(np.stack([theta[:, 0], np.full(50, 2.0)], 1), np.stack([draws[:, :, 0], np.full((50, 20), 2.0)], 2))
    for bad in (draws[:49], draws[:, :, :1], draws[:, :, 0], np.swapaxes(draws, 0, 1)):
        with pytest.raises(ShapeError, match="draws has shape"):
            sbc(theta, bad)
    with pytest.raises(ShapeError, match="theta has shape"):
        sbc(theta[:, 0], draws)
    with pytest.raises(SettingError, match="n_bins is 15 for 50"):
        sbc(theta, draws, n_bins=15)
    with pytest.raises(SettingError, match="n_bins is 22"):
        sbc(theta, draws, n_bins=22)
    with pytest.raises(ShapeError, match="names has 1"):
        sbc(theta, draws, ["a"])
    with pytest.raises(SettingError, match="repeat"):
        sbc(theta, draws, ["a", "a"])
    with pytest.raises(SettingError, match="names is"):
        sbc(theta, draws, [1, 2])
    with pytest.raises(SettingError, match="quantity 'q'"):
        sbc(theta, draws, quantities={"q": theta})
    with pytest.raises(ShapeError, match="draw values of quantity 'q'"):
        sbc(theta, draws, quantities={"q": (theta[:, 0], draws)})
    with pytest.raises(NonFiniteError, match="quantity 'q' has NaN"):
        sbc(theta, draws, quantities={"q": (theta[:, 0] * np.nan, draws[:, :, 0])})
    with pytest.raises(SettingError, match="quantities repeat"):
        sbc(theta, draws, quantities={"theta_0": (theta[:, 0], draws[:, :, 0])})
