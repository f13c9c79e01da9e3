import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy.stats import beta

from sbi_phys.calibration.coverage import coverage
from sbi_phys.calibration.local import local_coverage
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.priors import Parameter
from tests.toys import rejection_rate

NOISE = 0.7
GAIN = 1 / (1 + NOISE**2)
SD = NOISE * np.sqrt(GAIN)


def conjugate(rng, *, n=500, n_draws=49, d=1, width=1.0, local=False):
    """theta ~ N(0, 1), x = theta + noise; `local`: too narrow where x_0 < 0, too wide elsewhere."""
    theta = rng.standard_normal((n, d))
    x = theta + NOISE * rng.standard_normal((n, d))
    scale = np.where(x[:, 0] < 0, 0.7, 1.4) if local else np.full(n, width)
    return theta, (GAIN * x)[:, None] + SD * scale[:, None, None] * rng.standard_normal((n, n_draws, d)), x


def boxed(rng, *, n=500, n_draws=49):
    """theta ~ U(0, 1), x = theta + noise: exact posteriors are truncated normals, cut off at the prior's edges."""
    from scipy.special import ndtr, ndtri

    theta = rng.random((n, 1))
    x = theta + 0.3 * rng.standard_normal((n, 1))
    low, high = ndtr((0 - x) / 0.3), ndtr((1 - x) / 0.3)
    u = np.clip(low + (high - low) * rng.random((n, n_draws)), 1e-15, 1 - 1e-15)
    return theta, np.clip(x + 0.3 * ndtri(u), 0, 1)[:, :, None], x


def rejections(make, repetitions, seed, by=0, **settings):
    def pvalue(rng, i):
        theta, draws, x = make(rng)
        return local_coverage(theta, draws, x if by is None else by, seed=i, **settings).pvalue

    return rejection_rate(pvalue, repetitions, seed)


@pytest.mark.parametrize("repetitions", [80, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "by", "settings"),
    [
        (lambda rng: conjugate(rng, n=100, n_draws=9), 0, {}),  # ten values: the draws' own mean would not do
        (lambda rng: conjugate(rng, n=250, n_draws=30, d=2), (0, 1), {}),
        (lambda rng: conjugate(rng, n=200, n_draws=30), None, {"level": [0.5, 0.9]}),
        (lambda rng: boxed(rng, n=150, n_draws=19), 0, {"at": "truth"}),
    ],
)
def test_size_on_exact_posteriors(repetitions, make, by, settings):
    assert abs(rejections(make, repetitions, 1, by, **settings) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / repetitions)


@pytest.mark.parametrize("by", [0, None])
def test_a_posterior_too_narrow_here_and_too_wide_there_is_caught(by):
    rng = np.random.default_rng(2)
    found = []
    for i in range(20):
        theta, draws, x = conjugate(rng, n_draws=100, local=True)
        found.append(local_coverage(theta, draws, x if by is None else by, seed=i).pvalue < 0.05)
    assert np.mean(found) >= 0.95


def test_exact_posterior_at_the_truth_departs_from_the_level_as_expected():
    theta, draws, x = boxed(np.random.default_rng(3), n=20_000, n_draws=49)
    result = local_coverage(theta, draws, 0, at="truth", n_bins=10)
    observed, expected = result.observed[:, 0, 0], result.expected[:, 0, 0]
    assert observed[0] < 0.8 and observed[-1] < 0.8  # central intervals do not reach the prior's edges
    assert observed[4:6].min() > 0.93
    np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / 2000))
    assert result.pvalue > 1e-3
    assert "even an exact posterior differs from the level" in result.summary()
    given_x = local_coverage(theta, draws, x, n_bins=10)
    np.testing.assert_allclose(given_x.observed, given_x.level[0], atol=4 * np.sqrt(0.09 / 2000))


def test_power_at_the_truth():
    assert rejections(lambda rng: conjugate(rng, n_draws=100, width=0.7), 8, 4, at="truth") >= 0.9


def test_counts_errors_and_levels_by_hand():
    rng = np.random.default_rng(5)
    theta, draws, x = conjugate(rng, n=120, n_draws=19)
    result = local_coverage(theta, draws, x[:, 0], level=[0.5, 0.8], n_bins=4)
    np.testing.assert_allclose(result.level, [0.5, 0.8])
    rank = (draws[:, :, 0] < theta).sum(axis=1)
    index = np.argsort(np.argsort(x[:, 0])) * 4 // 120
    for c in range(4):
        inside = ((rank >= 5) & (rank <= 14))[index == c].sum()
        assert result.count[c] == 30
        assert result.observed[c, 0, 0] == pytest.approx(inside / 30)
        assert result.low[c, 0, 0] == pytest.approx(beta.ppf(0.15865, inside, 31 - inside))
        assert result.high[c, 0, 0] == pytest.approx(beta.ppf(0.84135, inside + 1, 30 - inside))
        assert result.z[c, 0, 0] == pytest.approx((inside - 15) / np.sqrt(30 / 4))
        assert result.cell_low[c, 0] <= x[index == c, 0].min()
        assert result.cell_high[c, 0] >= x[index == c, 0].max()
    assert (result.n, result.at, result.by) == (120, "given", ("by",))


def test_one_cell_is_the_average_coverage():
    rng = np.random.default_rng(6)
    theta, draws, _ = conjugate(rng, n=200, n_draws=99, d=2)
    whole = local_coverage(theta, draws, 0, n_bins=1)
    np.testing.assert_allclose(whole.observed[0, 0], coverage(theta, draws).at(0.9))
    density = local_coverage(theta, draws, 0, n_bins=1, log_prob_theta=-theta[:, 0], log_prob_draws=-draws[:, :, 0])
    np.testing.assert_allclose(density.observed[0, 0], coverage(theta, draws, -theta[:, 0], -draws[:, :, 0]).at(0.9))
    assert density.names == ("highest-density regions",)


@pytest.mark.parametrize("density", [True, False])
def test_the_worst_cell_is_named_with_its_size(density):
    rng = np.random.default_rng(7)
    theta, draws, x = conjugate(rng, n=1000, n_draws=99, d=2)
    bad = (x[:, 0] > 0.5) & (x[:, 1] > 0.5)
    centre = (GAIN * x)[:, None]
    draws[bad] = centre[bad] + 0.4 * (draws[bad] - centre[bad])
    scale = np.where(bad, 0.4, 1.0)[:, None] * SD
    at_theta = -(((theta - GAIN * x) / scale) ** 2).sum(axis=-1) / 2
    at_draws = -(((draws - centre) / scale[:, None]) ** 2).sum(axis=-1) / 2
    logs = {"log_prob_theta": at_theta, "log_prob_draws": at_draws} if density else {}
    result = local_coverage(theta, draws, ("gamma", "lg_rcut"), names=["gamma", "lg_rcut"], n_bins=4, **logs)
    assert result.pvalue < 1e-3
    cell, level, region = result.worst
    assert result.observed[cell, level, region] < 0.75
    assert result.cell_high[cell].min() > 0.5
    assert set(result.verdicts.values()) == {"overconfident in places"}
    words = result.summary()
    assert "worst: posterior mean of gamma in [" in words and "and posterior mean of lg_rcut in [" in words
    assert "90 % regions" in words


def test_words_for_a_calibrated_and_for_a_mixed_map():
    rng = np.random.default_rng(8)
    assert "no cell stands out" in local_coverage(*conjugate(rng)[:2], 0).summary()
    mixed = local_coverage(*conjugate(rng, n=2000, n_draws=99, local=True)[:2], 0)
    assert mixed.verdicts == {"theta_0": "over- and underconfident in places"}
    wide = local_coverage(*conjugate(rng, n=2000, n_draws=99, width=1.6)[:2], 0)
    assert wide.verdicts == {"theta_0": "underconfident in places"}


def test_discrete_quantities_have_a_cell_each_and_ties_are_random():
    rng = np.random.default_rng(9)
    theta, draws, _ = conjugate(rng, n=200, n_draws=20)
    result = local_coverage(theta, draws, rng.integers(0, 2, 200), n_bins=4)
    assert result.count.size == 2
    assert result.count.sum() == 200
    steps = local_coverage(np.round(theta), np.round(draws), 0, at="truth", seed=1)
    again = local_coverage(np.round(theta), np.round(draws), 0, at="truth", seed=1)
    np.testing.assert_array_equal(steps.observed, again.observed)
    assert 0 < steps.pvalue <= 1


def test_cells_of_two_quantities_hold_equal_numbers():
    rng = np.random.default_rng(10)
    theta, draws, x = conjugate(rng, n=360, d=2)
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]  # a rectangular grid would have empty cells
    result = local_coverage(theta, draws, x, n_bins=3, by_names=["a", "b"])
    assert set(result.count) == {40}
    assert result.by == ("a", "b")


def test_truths_outside_all_draws_are_legal_and_rejected():
    theta, draws, x = conjugate(np.random.default_rng(11), n=200)
    for settings in ({"by": x}, {"by": 0}, {"by": 0, "at": "truth"}):
        result = local_coverage(theta + 50, draws, **settings)
        assert np.all(result.observed[result.count > 0] == 0)
        assert result.pvalue < 0.01


@pytest.mark.parametrize(("by", "at"), [(0, "posterior"), ((0, 1), "posterior"), (0, "truth"), ((1, 0), "truth")])
def test_plots(by, at):
    theta, draws, _ = conjugate(np.random.default_rng(12), n=100, n_draws=20, d=2)
    result = local_coverage(theta, draws, by, at=at, names=[Parameter("gamma", latex=r"\gamma"), "b"], level=[0.5, 0.9])
    ax = result.plot()
    assert isinstance(ax, Axes)
    assert ("true " if at == "truth" else "posterior mean of ") in ax.get_xlabel()
    assert result.plot(ax, name="b", level=0.5) is ax
    with pytest.raises(SettingError, match="name"):
        result.plot(name="c")


def test_bad_input():
    theta, draws, x = conjugate(np.random.default_rng(13), n=60, n_draws=20, d=2)
    with pytest.raises(DataError, match="true values of 'theta_1'"):
        local_coverage(theta, draws, theta[:, 1])
    with pytest.raises(SettingError, match="at is 'truth' with an array"):
        local_coverage(theta, draws, x, at="truth")
    with pytest.raises(SettingError, match="at is 'true'"):
        local_coverage(theta, draws, 0, at="true")
    with pytest.raises(SettingError, match="by is 'gama'.*'gamma'"):
        local_coverage(theta, draws, "gama", names=["gamma", "b"])
    with pytest.raises(SettingError, match="by is 2"):
        local_coverage(theta, draws, 2)
    with pytest.raises(SettingError, match="two different"):
        local_coverage(theta, draws, (0, 0))
    with pytest.raises(ShapeError, match="by has shape"):
        local_coverage(theta, draws, x[:59])
    with pytest.raises(ShapeError, match="by has shape"):
        local_coverage(theta, draws, np.hstack([x, x]))
    with pytest.raises(NonFiniteError, match="by has NaN"):
        local_coverage(theta, draws, x * np.nan)
    with pytest.raises(DataError, match="by is constant"):
        local_coverage(theta, draws, np.ones(60))
    with pytest.raises(DataError, match="complex"):
        local_coverage(theta, draws, x[:, 0] * 1j)
    with pytest.raises(SettingError, match="n_bins is 4 per quantity for 60"):
        local_coverage(theta, draws, x, n_bins=4)
    for level in ([], 0.0, [0.5, 1.0]):
        with pytest.raises(SettingError, match="level is"):
            local_coverage(theta, draws, 0, level=level)
    with pytest.raises(SettingError, match="log_prob_draws is None"):
        local_coverage(theta, draws, 0, log_prob_theta=theta[:, 0])
    with pytest.raises(NonFiniteError, match="log_prob_theta has NaN"):
        local_coverage(theta, draws, 0, log_prob_theta=theta[:, 0] * np.nan, log_prob_draws=draws[:, :, 0])
    with pytest.raises(DataError, match="constant"):
        local_coverage(theta, draws, 0, log_prob_theta=theta[:, 0] * 0, log_prob_draws=draws[:, :, 0] * 0)
    with pytest.raises(DataError, match="constant"):
        local_coverage(theta * 0, draws * 0, x)
    with pytest.raises(DataError, match="1 draws"):
        local_coverage(theta, draws[:, :1], 0)
    with pytest.raises(ShapeError, match="draws has shape"):
        local_coverage(theta, draws[:, :, :1], 0)
