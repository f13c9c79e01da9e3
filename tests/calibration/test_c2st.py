import numpy as np
import pytest
from scipy.special import ndtr

from sbi_phys.calibration import c2st
from sbi_phys.calibration.c2st import N_FOLDS, _folds, _scaled
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
