import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import ks_2samp, wasserstein_distance

from sbi_phys.calibration.two_sample import N_FOLDS, _folds, _scaled, c2st, marginal_ks, mmd
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError


def test_accuracy_of_shifted_gaussians_is_that_of_the_best_classifier():
    rng = np.random.default_rng(0)
    result = c2st(rng.standard_normal((2000, 1)) + 1.0, rng.standard_normal((2000, 1)), seed=1)
    assert result.accuracy == pytest.approx(ndtr(0.5), abs=0.01 + 3 * np.sqrt(0.21 / 4000))
    assert result.pvalue < 1e-20
    assert result.reliable
    assert float(result) == result.accuracy
    assert "different" in result.summary()


def null_results(repetitions, seed):
    rng = np.random.default_rng(seed)
    return [c2st(*rng.standard_normal((2, 50, 1)), seed=i) for i in range(repetitions)]


def test_equal_distributions_give_one_half():
    results = null_results(10, 1)
    accuracies = np.array([r.accuracy for r in results])
    assert accuracies.mean() == pytest.approx(0.5, abs=3 * 0.5 / np.sqrt(10 * 100))
    assert sum(r.pvalue < 0.05 for r in results) <= 3
    assert not results[0].reliable
    assert "2000 are needed" in results[0].summary()


@pytest.mark.slow
def test_size_on_equal_distributions():
    results = null_results(400, 2)
    accuracies = np.array([r.accuracy for r in results])
    assert accuracies.mean() == pytest.approx(0.5, abs=3 * accuracies.std() / np.sqrt(400))
    assert np.mean([r.pvalue < 0.05 for r in results]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_reproducible_whatever_the_number_of_workers():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 20, 1))
    one, two, other = c2st(a, b, seed=3), c2st(a, b, seed=3, workers=2), c2st(a, b, seed=4)
    np.testing.assert_array_equal(one.fold_accuracies, two.fold_accuracies)
    assert np.any(one.fold_accuracies != other.fold_accuracies)


def test_copies_share_a_fold_and_folds_are_equal():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 2))[rng.integers(0, 40, 200)]
    folds = _folds(x, rng)
    for row in np.unique(x, axis=0):
        assert np.unique(folds[(x == row).all(axis=1)]).size == 1
    assert np.all(np.abs(np.bincount(folds) - 40) <= 15)
    assert set(np.bincount(_folds(rng.standard_normal((100, 1)), rng))) == {100 // N_FOLDS}


def test_resampled_copies_are_not_taken_for_a_difference():
    rng = np.random.default_rng(4)
    a = rng.standard_normal((60, 1))[rng.integers(0, 60, 300)]
    result = c2st(a, rng.standard_normal((300, 1)))
    assert result.accuracy < 0.62  # split over folds, the copies give more than 0.8
    assert result.unique_fraction < 0.25
    assert "copies" in result.summary()


def test_scaling_by_the_reference_and_constant_columns():
    rng = np.random.default_rng(5)
    a, b = 3 + 5 * rng.standard_normal((2, 60, 2))
    scaled_a, scaled_b = _scaled(np.insert(a, 1, 1 / 3, axis=1), np.insert(b, 1, 1 / 3, axis=1))
    np.testing.assert_allclose(scaled_a, (a - b.mean(axis=0)) / b.std(axis=0))
    np.testing.assert_allclose(scaled_b.std(axis=0), 1)
    only_in_reference, still = _scaled(a, np.column_stack([b[:, 0], np.zeros(60)]))
    assert np.sqrt((only_in_reference[:, 1] ** 2).mean()) == pytest.approx(1)
    assert np.all(still[:, 1] == 0)


def test_different_constants_are_told_apart():
    x = np.random.default_rng(6).standard_normal((40, 1))
    assert c2st(np.insert(x[:20], 0, 1.0, axis=1), np.insert(x[20:], 0, 2.0, axis=1)).accuracy == 1.0


def test_sizes_are_made_equal_up_to_the_limit():
    rng = np.random.default_rng(6)
    result = c2st(rng.standard_normal((70, 1)), rng.standard_normal((200, 1)))
    assert result.n == 70
    assert c2st(rng.standard_normal((70, 1)), rng.standard_normal((200, 1)), max_draws=30).n == 30
    ax = result.plot()
    assert ax.get_ylabel() == "classifier accuracy"
    assert result.plot(ax) is ax


def test_bad_input():
    x = np.random.default_rng(7).standard_normal((50, 2))
    with pytest.raises(ShapeError, match="same number of columns"):
        c2st(x, x[:, :1])
    with pytest.raises(ShapeError, match="a has shape"):
        c2st(x[:, 0], x)
    with pytest.raises(DataError, match="at least 10"):
        c2st(x[:9], x)
    with pytest.raises(NonFiniteError, match="b has NaN"):
        c2st(x, x * np.nan)
    with pytest.raises(DataError, match="complex"):
        c2st(x * 1j, x)
    with pytest.raises(DataError, match="constant"):
        c2st(np.ones((50, 2)), np.ones((50, 2)))
    with pytest.raises(DataError, match="copies of few rows"):
        c2st(np.repeat(x[:3], 10, axis=0), x)
    with pytest.raises(SettingError, match="max_draws"):
        c2st(x, x, max_draws=5)
    with pytest.raises(SettingError, match="workers"):
        c2st(x, x, workers=0)


TESTS = {
    "mmd": lambda a, b, seed: mmd(a, b, seed=seed, n_permutations=39),
    "marginal": lambda a, b, seed: marginal_ks(a, b),
}


def brute_mmd(a, b, bandwidth):
    def kernel(s, t):
        return np.exp(-((s[:, None] - t[None]) ** 2).sum(axis=-1) / (2 * bandwidth**2))

    n, m = len(a), len(b)
    within = (kernel(a, a).sum() - n) / (n * (n - 1)) + (kernel(b, b).sum() - m) / (m * (m - 1))
    return within - 2 * kernel(a, b).mean()


def test_mmd_is_the_definition_and_its_null_that_of_permuted_rows():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 2)), 1 + rng.standard_normal((20, 2))
    result = mmd(a, b, bandwidth=0.7, n_permutations=200)
    pooled = np.concatenate([a, b])
    scaled = (pooled - pooled.mean(axis=0)) / pooled.std(axis=0)
    assert float(result) == pytest.approx(brute_mmd(scaled[:30], scaled[30:], 0.7), rel=1e-10)
    null = []
    for _ in range(400):
        rows = scaled[rng.permutation(50)]
        null.append(brute_mmd(rows[:30], rows[30:], 0.7))
    assert result.null.mean() == pytest.approx(np.mean(null), abs=4 * np.std(null) / np.sqrt(200))
    assert result.null.std() == pytest.approx(np.std(null), rel=0.25)
    assert result.pvalue == pytest.approx((1 + (result.null >= result.mmd2).sum()) / 201)


def test_mmd_of_gaussians_has_its_closed_form():
    # N(0, 1) and N(delta, 1) with kernel width h: MMD^2 = 2 h / sqrt(h^2 + 2) (1 - exp(-delta^2 / (2 (h^2 + 2))))
    rng = np.random.default_rng(1)
    sd = np.sqrt(1 + 0.25)  # of both pooled, with delta = 1
    a, b = rng.standard_normal((2000, 1)) + 1, rng.standard_normal((2000, 1))
    result = mmd(a, b, bandwidth=1 / sd, max_draws=2000, n_permutations=19)
    assert float(result) == pytest.approx(2 / np.sqrt(3) * (1 - np.exp(-1 / 6)), abs=0.02)


def test_median_heuristic():
    a, b = np.random.default_rng(2).standard_normal((2, 40, 3))
    pooled = np.concatenate([a, b])
    scaled = pooled / pooled.std(axis=0)
    pairs = [np.linalg.norm(scaled[i] - scaled[j]) for i in range(80) for j in range(i)]
    assert mmd(a, b, n_permutations=19).bandwidth == pytest.approx(np.median(pairs))


def test_marginals_are_those_of_scipy():
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((100, 2)), rng.standard_normal((80, 2)) * [1, 2]
    result = marginal_ks(a, b, ["u", "v"])
    for j, name in enumerate(("u", "v")):
        expected = ks_2samp(a[:, j], b[:, j])
        assert (result.ks[j], result.pvalues[name]) == pytest.approx((expected.statistic, expected.pvalue))
        assert result.wasserstein[j] == pytest.approx(wasserstein_distance(a[:, j], b[:, j]) / b[:, j].std())
    assert result.verdicts == {"u": "same", "v": "different"}
    assert result.width[1] == pytest.approx(a[:, 1].std() / b[:, 1].std())
    assert result.pvalue == pytest.approx(2 * result.pvalues["v"])
    assert "different" in result.summary()


@pytest.mark.parametrize("name", TESTS)
def test_size(name):
    rng = np.random.default_rng(6)
    p = np.array([TESTS[name](*rng.standard_normal((2, 50, 2)), i).pvalue for i in range(200)])
    assert np.mean(p <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    if name != "marginal":  # KS with Bonferroni is conservative
        assert np.mean(p <= 0.05) > 0.05 - 3 * np.sqrt(0.05 * 0.95 / 200)
        assert abs(p.mean() - 0.5125) < 3 * np.sqrt(1 / 12 / 200)


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("wrong", ["narrow", "shifted"])
def test_power(name, wrong):
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((2, 1000, 2))
    assert TESTS[name](0.75 * a if wrong == "narrow" else a + 0.3, b, 0).pvalue <= 0.025


def test_wrong_correlation_is_seen_jointly_and_not_in_marginals():
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((2, 1000, 2))
    a[:, 1] = 0.6 * a[:, 0] + 0.8 * a[:, 1]
    assert mmd(a, b).pvalue < 0.01
    assert marginal_ks(a, b).pvalue > 0.05


def test_unequal_sizes_subsamples_and_seeds():
    rng = np.random.default_rng(9)
    a, b = rng.standard_normal((60, 2)), rng.standard_normal((200, 2))
    result = mmd(a, b, max_draws=50, n_permutations=19)
    assert (result.n_a, result.n_b) == (50, 50)
    assert mmd(a, b, max_draws=50, n_permutations=19).mmd2 == result.mmd2 != mmd(a, b, max_draws=50, n_permutations=19, seed=1).mmd2


def test_copies_are_said():
    rng = np.random.default_rng(10)
    b = rng.standard_normal((400, 1))
    a = b[rng.integers(0, 100, 400)]
    for result in (mmd(a, b, n_permutations=19), marginal_ks(a, b)):
        assert result.unique_fraction < 0.3
        assert "copies" in result.summary()


def test_constant_columns_and_integers():
    rng = np.random.default_rng(11)
    a, b = rng.integers(0, 4, (2, 60, 2))
    plain = mmd(a, b, n_permutations=19).mmd2
    assert mmd(np.insert(a * 1.0, 1, 1 / 3, axis=1), np.insert(b * 1.0, 1, 1 / 3, axis=1), n_permutations=19).mmd2 == pytest.approx(plain)
    marginals = marginal_ks(np.insert(a, 1, 7, axis=1), np.insert(b, 1, 7, axis=1))
    assert (marginals.ks[1], marginals.pvalues["theta_1"], marginals.width[1]) == (0, 1, 1)
    assert mmd(np.zeros((20, 1)), np.ones((20, 1)), n_permutations=19).pvalue == 1 / 20


@pytest.mark.parametrize("name", TESTS)
def test_plots(name):
    rng = np.random.default_rng(12)
    result = TESTS[name](*rng.standard_normal((2, 50, 2)), 0)
    ax = result.plot()
    assert ax.get_xlabel()
    assert result.plot(ax) is ax


@pytest.mark.parametrize("name", TESTS)
def test_bad_input_of_distances(name):
    x = np.random.default_rng(13).standard_normal((50, 2))
    test = TESTS[name]
    with pytest.raises(ShapeError, match="same number of columns"):
        test(x, x[:, :1], 0)
    with pytest.raises(ShapeError, match="a has shape"):
        test(x[:, 0], x, 0)
    with pytest.raises(DataError, match="at least 5"):
        test(x[:1], x, 0)
    with pytest.raises(NonFiniteError, match="b has NaN"):
        test(x, x * np.nan, 0)
    with pytest.raises(DataError, match="complex"):
        test(x * 1j, x, 0)


def test_bad_settings():
    x = np.random.default_rng(14).standard_normal((50, 2))
    with pytest.raises(DataError, match="constant"):
        mmd(np.ones((20, 2)), np.ones((20, 2)))
    with pytest.raises(DataError, match="'theta_1' is constant in b"):
        marginal_ks(x, np.column_stack([x[:, 0], np.zeros(50)]))
    with pytest.raises(SettingError, match="bandwidth"):
        mmd(x, x, bandwidth=0.0)
    with pytest.raises(SettingError, match="n_permutations"):
        mmd(x, x, n_permutations=3)
    with pytest.raises(ShapeError, match="names"):
        marginal_ks(x, x, ["only one"])
