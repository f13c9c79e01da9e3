import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy.special import ndtri

from sbi_phys.calibration.pit import pit_regression
from sbi_phys.calibration.sbc import sbc
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from tests.toys import rejection_rate


def conjugate(rng, *, n=500, n_draws=100, d=1, k=1, width=1.0, shift=0.0, scale=None, prior=False):
    """Exact posterior N(m(x), 1) of d parameters with k columns of x, or one of another width, `scale(x)`, or shifted."""
    x = rng.standard_normal((n, k))
    mean = x[:, :1] * np.ones(d)
    wide = np.full(n, width) if scale is None else scale(x)
    draws = mean[:, None] + shift + wide[:, None, None] * rng.standard_normal((n, n_draws, d))
    return mean + rng.standard_normal((n, d)), np.sqrt(2) * rng.standard_normal(draws.shape) if prior else draws, x


def halves(x):
    return np.where(x[:, 0] < 0, 0.7, 1.4)


def rejections(repetitions, seed, **kwargs):
    return rejection_rate(lambda rng, i: pit_regression(*conjugate(rng, **kwargs), seed=i).pvalue, repetitions, seed)


@pytest.mark.parametrize("repetitions", [80, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("n", "n_draws", "d", "k"), [(80, 9, 2, 1), (40, 20, 1, 30)])
def test_size_on_an_exact_posterior(repetitions, n, n_draws, d, k):
    assert abs(rejections(repetitions, 1, n=n, n_draws=n_draws, d=d, k=k) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / repetitions)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": halves},
        {"scale": halves, "k": 15},
        {"scale": lambda x: np.where(np.abs(x[:, 0]) < 0.67, 0.7, 1.4)},
        {"width": 0.8},
        {"width": 1.25},
        {"shift": 0.3},
        {"prior": True},
    ],
)
def test_power_on_wrong_posteriors(wrong):
    assert rejections(6, 2, **wrong) >= 0.8


def test_an_interaction_that_no_column_shows_is_seen():
    def scale(x):
        return np.where(x[:, 0] * x[:, 1] < 0, 0.7, 1.4)

    rng = np.random.default_rng(3)
    results = [pit_regression(*conjugate(rng, k=2, scale=scale), seed=i) for i in range(8)]
    assert np.mean([r.pvalue < 0.05 for r in results]) >= 0.8
    assert np.mean([np.abs(r.z_width).max() for r in results]) < 4


def balanced(rng, n=500, n_draws=100, size=0.8):
    """Too narrow where x < 0 and too wide elsewhere, such that the average of the rank's two densities, 1 +- size cos(2 pi u), is flat."""
    x = rng.standard_normal((n, 1))
    u = rng.random((n, n_draws))
    level = u + np.where(x < 0, size, -size) * np.sin(2 * np.pi * u) / (2 * np.pi)
    draws = x + ndtri(np.clip(level, 1e-15, 1 - 1e-15))
    return x + rng.standard_normal((n, 1)), draws[:, :, None], x


def test_what_sbc_passes_is_caught():
    rng = np.random.default_rng(4)
    data = [balanced(rng) for _ in range(30)]
    assert np.mean([sbc(*d[:2]).pvalue < 0.05 for d in data]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 30)
    assert np.mean([pit_regression(*d).pvalue < 0.05 for d in data[:12]]) >= 0.95
    words = pit_regression(*balanced(rng, n=2000)).verdicts["theta_0"]
    assert words == "overconfident where x_0 is low, underconfident where x_0 is high"


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (halves, ("overconfident where energy is low", "underconfident where energy is high")),
        (lambda x: np.where(np.abs(x[:, 0]) < 0.67, 0.7, 1.4), ("overconfident where energy is in the middle", "at the ends")),
    ],
)
def test_where_and_how_much_in_words(scale, words):
    rng = np.random.default_rng(4)
    theta, draws, x = conjugate(rng, n=2000, n_draws=200, k=4, scale=scale)
    x = np.roll(x, 2, axis=1)
    result = pit_regression(theta, draws, x, names=["gamma"], x_names=["a", "b", "energy", "c"])
    assert result.column[0] == 2
    for word in words:
        assert word in result.verdicts["gamma"]
    assert "1 of 1 not calibrated given x" in result.summary()
    np.testing.assert_allclose(result.width[0], [0.7, 1.4], atol=0.12)
    np.testing.assert_allclose(result.shift[0], [0, 0], atol=4 * result.shift_err[0].max())


def test_a_local_bias_has_its_sign():
    rng = np.random.default_rng(5)
    theta, draws, x = conjugate(rng, n=1000)
    draws = draws + np.where(x > 0, 0.4, -0.4)[:, None]
    result = pit_regression(theta, draws, x)
    assert result.verdicts == {"theta_0": "biased low where x_0 is low, biased high where x_0 is high"}
    assert result.z_shift[0, 0, 0] < -5
    assert abs(result.z_width[0, 0, 0]) < 4
    np.testing.assert_allclose(result.shift[0], [-0.4, 0.4], atol=0.15)


def test_scores_have_mean_zero_and_variance_one_under_uniform_ranks():
    n_draws = 12
    draws = np.tile(np.arange(n_draws) + 0.5, (13 * 4, 1))
    theta = np.repeat(np.arange(13.0), 4)
    result = pit_regression(theta, draws, np.arange(52.0))
    assert result.scores.mean() == pytest.approx(0, abs=1e-12)
    assert result.scores.var() == pytest.approx(1)


def test_scale_of_x_does_not_matter_and_constant_columns_are_left_out():
    rng = np.random.default_rng(6)
    theta, draws, x = conjugate(rng, n=200, k=2, scale=halves)
    plain = pit_regression(theta, draws, x, seed=1)
    curved = pit_regression(theta, draws, np.column_stack([np.exp(5 * x[:, 0]), 1e-8 * x[:, 1]]), seed=1)
    assert plain.pvalue == curved.pvalue
    with_constant = pit_regression(theta, draws, np.insert(x, 1, 3.0, axis=1), x_names=["a", "still", "b"], seed=1)
    assert with_constant.x_names == ("a", "b")
    assert with_constant.pvalue == plain.pvalue


def test_two_valued_and_image_like_x():
    rng = np.random.default_rng(7)
    theta, draws, x = conjugate(rng, n=300, scale=halves)
    assert pit_regression(theta, draws, (x > 0).astype(int)).pvalue < 0.05
    assert len(pit_regression(theta, draws, rng.standard_normal((300, 4, 5))).x_names) == 20


def test_tiny_pvalues_and_truths_outside():
    theta, draws, x = conjugate(np.random.default_rng(8), n=200)
    result = pit_regression(theta + 100, draws, x)
    assert 0 < result.pvalue < 1e-10
    assert "biased low" in result.summary()


def test_plot():
    result = pit_regression(*conjugate(np.random.default_rng(9), n=200, d=2, k=3), names=["a", "b"])
    ax = result.plot()
    assert isinstance(ax, Axes)
    assert ax.get_xlabel() in result.x_names
    assert result.plot(ax, name="b") is ax
    with pytest.raises(SettingError, match="name"):
        result.plot(name="c")


def test_bad_input():
    theta, draws, x = conjugate(np.random.default_rng(10), n=50, n_draws=20, d=2, k=2)
    with pytest.raises(ShapeError, match="x has shape"):
        pit_regression(theta, draws, x[:49])
    with pytest.raises(NonFiniteError, match="x has NaN"):
        pit_regression(theta, draws, x * np.nan)
    with pytest.raises(DataError, match="x is constant"):
        pit_regression(theta, draws, x * 0)
    with pytest.raises(DataError, match="complex"):
        pit_regression(theta, draws, x + 0j)
    with pytest.raises(ShapeError, match="names has 1"):
        pit_regression(theta, draws, x, x_names=["a"])
    with pytest.raises(DataError, match="at least 5"):
        pit_regression(theta, draws[:, :4], x)
    with pytest.raises(DataError, match="constant"):
        pit_regression(theta * 0, draws * 0, x)
    with pytest.raises(NonFiniteError, match="draws"):
        pit_regression(theta, draws * np.inf, x)
    with pytest.raises(ShapeError, match="draws has shape"):
        pit_regression(theta, draws[:, :, :1], x)
