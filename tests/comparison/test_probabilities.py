"""The test of calibrated probabilities: its size where they are right, its power where they are not."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom

from sbi_phys.comparison import check_probabilities
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for


def two_models(n, rng, sharpen=1.0, shift=0.0):
    """Probabilities with true labels: f ~ N(0, 2), P(1) = expit(f); handed out as expit(sharpen f + shift)."""
    f = 2 * rng.standard_normal(n)
    label = (rng.random(n) < expit(f)).astype(int)
    p = expit(sharpen * f + shift)
    return np.column_stack([1 - p, p]), label


def rejections(n_repeats, n, **wrong):
    return sum(
        check_probabilities(*two_models(n, rng_for(i, "data"), **wrong), n_toys=199, seed=i).pvalue <= 0.05 for i in range(n_repeats)
    )


def test_size():
    # 5 % at most; 11 or more of 100 has a probability of 1e-2 at exactly 5 %
    assert binom.sf(10, 100, 0.05) < 0.012
    assert rejections(100, 300) <= 10


@pytest.mark.parametrize("wrong", [{"sharpen": 1.4}, {"sharpen": 0.7}, {"shift": 0.5}])
def test_power(wrong):
    assert rejections(10, 2000, **wrong) >= 9


def test_numbers_and_words():
    right = check_probabilities(*two_models(3000, rng_for(0)), ["a", "b"])
    assert right.verdict == "calibrated"
    assert right.ece < right.null_ece_95
    assert right.counts.sum(axis=1).tolist() == [3000, 3000]
    inside = (right.observed >= right.band[..., 0]) & (right.observed <= right.band[..., 1])
    assert inside.mean() > 0.7
    over = check_probabilities(*two_models(3000, rng_for(0), sharpen=1.6), ["a", "b"])
    assert over.verdict == "overconfident"
    assert over.ece > over.null_ece_95
    assert "overconfident" in over.summary()
    assert check_probabilities(*two_models(3000, rng_for(0), sharpen=0.6)).verdict == "underconfident"
    ax = right.plot()
    assert ax.get_title().startswith("calibrated")


def test_three_models_and_constant_probabilities():
    rng = rng_for(1)
    p = rng.dirichlet([1, 1, 1], 2000)
    label = (rng.random(2000)[:, None] > np.cumsum(p, axis=1)[:, :-1]).sum(axis=1)
    assert check_probabilities(p, label).pvalue > 0.01
    assert check_probabilities(p, (label + 1) % 3).pvalue < 0.01
    flat = np.tile([0.5, 0.5], (100, 1))
    assert check_probabilities(flat, np.arange(100) % 2).ece == pytest.approx(0)


@pytest.mark.parametrize(
    ("p", "label", "error", "words"),
    [
        (np.ones((60, 2)), np.zeros(60), DataError, "do not sum to 1"),
        (np.tile([0.5, 0.5], (60, 1)), np.full(60, 2), DataError, "labels run from 2 to 2"),
        (np.tile([0.5, 0.5], (60, 1)), np.zeros(59), ShapeError, "labels"),
        (np.tile([0.5, 0.5], (20, 1)), np.zeros(20), DataError, "at least 50"),
        (np.ones((60, 1)), np.zeros(60), ShapeError, "at least two models"),
        (np.full((60, 2), np.nan), np.zeros(60), NonFiniteError, "probabilities"),
    ],
)
def test_bad_input(p, label, error, words):
    with pytest.raises(error, match=words):
        check_probabilities(p, label)
    with pytest.raises(SettingError, match="n_bins"):
        check_probabilities(np.tile([0.5, 0.5], (60, 1)), np.zeros(60), n_bins=20)
