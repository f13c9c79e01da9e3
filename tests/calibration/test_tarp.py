import numpy as np
import pytest
from matplotlib.axes import Axes

from sbi_phys.calibration.tarp import tarp
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from tests.toys import rejection_rate


def conjugate(rng, *, n=500, n_draws=100, d=1, noise=0.5, width=1.0, shift=0.0, prior=False):
    """theta ~ N(0, 1), x = theta + noise; draws of the exact posterior, of one with another width or a shift, or of the prior."""
    theta = rng.standard_normal((n, d))
    x = theta + noise * rng.standard_normal((n, d))
    gain = 1 / (1 + noise**2)
    sd = noise * np.sqrt(gain)
    draws = (gain * x)[:, None] + sd * (shift + width * rng.standard_normal((n, n_draws, d)))
    return theta, rng.standard_normal(draws.shape) if prior else draws, x


def rejections(repetitions, seed, **kwargs):
    return rejection_rate(lambda rng, i: tarp(*conjugate(rng, **kwargs), seed=i).pvalue, repetitions, seed)


@pytest.mark.parametrize("repetitions", [80, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("n", "n_draws", "d"), [(100, 20, 2), (200, 49, 1)])
def test_size_on_an_exact_posterior(repetitions, n, n_draws, d):
    assert abs(rejections(repetitions, 1, n=n, n_draws=n_draws, d=d) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / repetitions)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("wrong", [{"width": 0.8}, {"width": 1.25}, {"prior": True}])
def test_power_on_wrong_posteriors(wrong, d):
    assert rejections(10, 2, d=d, **wrong) >= 0.9


def test_a_shift_of_one_parameter_is_seen():
    assert rejections(20, 3, shift=0.4) >= 0.9


def test_only_references_that_depend_on_x_see_a_posterior_equal_to_the_prior():
    rng = np.random.default_rng(4)
    data = [conjugate(rng, prior=True, d=2) for _ in range(25)]
    blind = np.mean([tarp(theta, draws, seed=i).pvalue < 0.05 for i, (theta, draws, _) in enumerate(data)])
    given = np.mean([tarp(theta, draws, references=x + 0.5).pvalue < 0.05 for theta, draws, x in data])
    assert blind < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 25)
    assert given >= 0.95
    assert "cannot detect a posterior that equals the prior" in tarp(*data[0][:2]).summary()
    assert "cannot" not in tarp(*data[0]).summary()


def test_posterior_equal_to_the_prior_is_seen_where_the_mean_of_theta_does_not_depend_on_x():
    rng = np.random.default_rng(5)
    found = []
    for i in range(20):
        theta = rng.standard_normal((500, 1))
        x = theta**2 + 0.1 * rng.standard_normal((500, 1))
        found.append(tarp(theta, rng.standard_normal((500, 100, 1)), x, seed=i).pvalue < 0.05)
    assert np.mean(found) >= 0.8


def test_a_wrong_correlation_is_seen():
    rng = np.random.default_rng(6)
    found = []
    for i in range(20):
        mean = rng.standard_normal((500, 2))
        noise = rng.standard_normal((500, 101, 2))
        noise[:, 0, 1] = 0.9 * noise[:, 0, 0] + np.sqrt(1 - 0.81) * noise[:, 0, 1]
        values = mean[:, None] + noise
        found.append(tarp(values[:, 0], values[:, 1:], mean, seed=i).pvalue < 0.05)
    assert np.mean(found) >= 0.9


def test_references_never_know_the_truth_of_their_row_or_of_later_ones():
    rng = np.random.default_rng(7)
    theta, draws, x = conjugate(rng, n=200, n_draws=20)
    before = tarp(theta, draws, x, seed=8)
    swapped_theta, swapped_draws = theta.copy(), draws.copy()  # truth and a draw change places: nothing pooled may notice
    swapped_theta[0], swapped_draws[0, 0] = draws[0, 0], theta[0]
    after = tarp(swapped_theta, swapped_draws, x, seed=8)
    assert after.references[0] == before.references[0]
    assert np.sum(after.references != before.references) < 200  # rows after it may move, it and those before may not


def test_ranks_and_curve_by_hand():
    rng = np.random.default_rng(9)
    theta, draws, x = conjugate(rng, n=60, n_draws=9, d=1)
    result = tarp(theta, draws, references=x)
    f = (np.abs(draws[:, :, 0] - x) < np.abs(theta - x)).sum(axis=1)
    np.testing.assert_array_equal(result.ranks, f)
    np.testing.assert_allclose(result.level, np.arange(1, 10) / 10)
    np.testing.assert_allclose(result.observed, [(f < k).mean() for k in range(1, 10)])
    assert result.mean == pytest.approx((f + 0.5).mean() / 10)
    np.testing.assert_array_equal(result.references, x)


def test_distances_are_in_units_of_each_parameter():
    rng = np.random.default_rng(10)
    theta, draws, x = conjugate(rng, n=100, d=2)
    units = np.array([1e-3, 1e4])
    a, b = tarp(theta, draws, x, seed=1), tarp(theta * units, draws * units, x * 7 + 3, seed=1)
    np.testing.assert_array_equal(a.ranks, b.ranks)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({}, "calibrated"), ({"width": 0.6}, "overconfident"), ({"width": 1.8}, "underconfident"), ({"prior": True}, "equal to the prior")],
)
def test_words(wrong, word):
    result = tarp(*conjugate(np.random.default_rng(11), n=1000, d=2, **wrong))
    assert word in result.verdict
    assert word in result.summary()
    assert "largest deviation: regions of" in result.summary()


def test_ties_are_shared_at_random_and_keep_the_size():
    rng = np.random.default_rng(12)
    found = []
    for i in range(60):
        p = rng.beta(2, 2, (200, 1))
        values = (rng.random((200, 50)) < p).astype(int)
        found.append(tarp(values[:, 0], values[:, 1:], p, seed=i).pvalue < 0.05)
    assert np.mean(found) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)
    one, again, other = (tarp(values[:, 0], values[:, 1:], p, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.ranks, again.ranks)
    assert np.any(one.ranks != other.ranks)


def test_truths_outside_all_draws_are_legal_and_rejected():
    theta, draws, x = conjugate(np.random.default_rng(13), n=100)
    result = tarp(theta + 1e6, draws, x)
    assert set(result.ranks) <= {0, 100}  # the references follow the truths, whose regression they are
    assert result.pvalue < 1e-20
    assert "biased" in result.verdict


def test_few_rows_many_columns_and_images_as_x():
    rng = np.random.default_rng(14)
    theta, draws, _ = conjugate(rng, n=12, n_draws=2)
    assert 0 < tarp(theta, draws, rng.standard_normal((12, 4, 300))).pvalue <= 1
    theta, draws, x = conjugate(rng, n=120)
    constant = np.column_stack([x, np.full(120, 0.1), 1e200 * x])
    assert np.isfinite(tarp(theta, draws, constant).references).all()


@pytest.mark.parametrize("kind", ["coverage", "ecdf"])
def test_plots(kind):
    result = tarp(*conjugate(np.random.default_rng(15), n=60, n_draws=30))
    ax = result.plot(kind=kind)
    assert isinstance(ax, Axes)
    assert ax.get_xlabel() and ax.get_ylabel()
    assert result.plot(ax, kind=kind) is ax
    with pytest.raises(SettingError, match="kind"):
        result.plot(kind="pie")


def test_bad_input():
    theta, draws, x = conjugate(np.random.default_rng(16), n=50, n_draws=20, d=2)
    with pytest.raises(SettingError, match="both given"):
        tarp(theta, draws, x, x)
    with pytest.raises(ShapeError, match="references has shape"):
        tarp(theta, draws, references=x[:, :1])
    with pytest.raises(NonFiniteError, match="references"):
        tarp(theta, draws, references=x * np.nan)
    with pytest.raises(DataError, match="references equal theta"):
        tarp(theta, draws, references=theta)
    with pytest.raises(ShapeError, match="x has shape"):
        tarp(theta, draws, x[:49])
    with pytest.raises(NonFiniteError, match="x has NaN"):
        tarp(theta, draws, x * np.inf)
    with pytest.raises(DataError, match="x is constant"):
        tarp(theta, draws, np.ones((50, 3)))
    with pytest.raises(DataError, match="complex"):
        tarp(theta, draws, x * 1j)
    with pytest.raises(DataError, match="constant"):
        tarp(theta * 0, draws * 0, x)
    with pytest.raises(DataError, match="1 draws"):
        tarp(theta, draws[:, :1], x)
    with pytest.raises(NonFiniteError, match="draws has NaN"):
        tarp(theta, draws * np.nan, x)
    with pytest.raises(ShapeError, match="draws has shape"):
        tarp(theta, draws[:, :, :1], x)
