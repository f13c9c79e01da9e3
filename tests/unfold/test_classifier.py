"""Density ratios from classifiers against ratios that are known: two Gaussians, weights, rows without overlap."""

import numpy as np
import pytest
import torch

from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold.classifier import LOGIT_LIMIT, RatioEstimator, RatioNet

QUICK = TrainConfig(max_epochs=3, batch_size=128)


def test_ratio_of_two_gaussians() -> None:
    rng = rng_for(0)
    one, zero = rng.normal(0.3, 0.8, 10_000), rng.normal(0.0, 1.0, 10_000)
    x = np.concatenate([one, zero])[:, None]
    is_one = np.repeat([1.0, 0.0], 10_000)
    ratio = RatioEstimator(1, seed=0, smooth=True)
    found = ratio.fit(x, 3 * is_one, 1 - is_one)
    grid = np.linspace(-1.5, 2, 50)
    truth = np.log(3) - np.log(0.8) - 0.5 * ((grid - 0.3) / 0.8) ** 2 + 0.5 * grid**2
    assert np.abs(ratio.log_ratio(grid[:, None]) - truth).max() < 0.12
    far = np.array([-4.0, 4.0])  # four rows of 20 000 lie beyond: the quadratic form goes on there
    assert ratio.log_ratio(far[:, None]) == pytest.approx(-np.log(0.8) - 0.5 * ((far - 0.3) / 0.8) ** 2 + 0.5 * far**2 + np.log(3), abs=0.5)
    assert found.norm == pytest.approx(1, abs=0.02) and found.n_effective == pytest.approx(10_000)
    assert 0.01 < found.separation < 0.06


def test_one_sample_under_two_weights_and_the_last_layer_is_at_its_optimum() -> None:
    x = rng_for(1).standard_normal((6000, 2))
    w0, w1 = np.ones(6000), np.exp(0.5 * x[:, 0])
    ratio = RatioEstimator(2, seed=0)
    ratio.fit(x, w1, w0)
    log_r = ratio.log_ratio(x)
    assert np.abs(log_r - 0.5 * x[:, 0]).mean() < 0.02
    assert (w0 * np.exp(log_r)).sum() == pytest.approx(w1.sum(), rel=1e-6)
    # the score equations of constant and inputs, in the balanced loss that is minimised
    p = 1 / (1 + np.exp(-(log_r - ratio._offset)))
    balanced = w1 * 6000 / w1.sum()
    for column in (np.ones(6000), *x.T):
        assert abs(((w0 * p - balanced * (1 - p)) * column).mean()) < 1e-4


def bend(ratio: RatioEstimator) -> float:
    """How far the log ratio is from a parabola on [-2, 2]."""
    grid = np.linspace(-2, 2, 81)
    values = ratio.log_ratio(grid[:, None])
    return float(np.abs(values - np.polyval(np.polyfit(grid, values, 2), grid)).max())


def test_more_than_a_parabola_is_learned_where_the_events_ask_for_it() -> None:
    """2000 against 2000 events; true bend of the bump: 0.67. The evidence must leave out what is chance and keep what is not."""
    bends: dict[str, list[float]] = {"chance": [], "real": [], "few": []}
    for seed, name in ((0, "chance"), (0, "real"), (0, "few"), (1, "chance"), (1, "real")):
        rng = rng_for(seed, "chance" if name == "chance" else "bump")
        one = rng.standard_normal(2000) if name == "chance" else np.concatenate([rng.standard_normal(1700), rng.normal(1, 0.2, 300)])
        is_one, limit = np.repeat([1.0, 0.0], 2000), 20.0 if name == "few" else np.inf
        ratio = RatioEstimator(1, seed=seed, smooth=True)
        found = ratio.fit(np.concatenate([one, rng.standard_normal(2000)])[:, None], is_one, 1 - is_one, n_effective=limit)
        assert found.n_effective == pytest.approx(min(limit, 2000))
        bends[name].append(bend(ratio))
    assert max(bends["chance"]) < 0.15 and min(bends["real"]) > 0.35 and max(bends["few"]) < 0.01


def test_many_inputs_have_squares_and_no_products() -> None:
    few, many = (RatioNet(k, EmbeddingConfig(hidden=4, n_blocks=0, n_features=3), seed=0) for k in (3, 20))
    x = torch.tensor([[2.0, 1.0, 10.0]])
    squares = few.features(x)[0, 6:]  # u^2 / 2 of u = x_i, (x_i + x_j) / sqrt 2; a straight line beyond 4
    far = [4 * u - 8 for u in (12 / 2**0.5, 11 / 2**0.5, 10.0)]
    assert squares.tolist() == pytest.approx([2, 2.25, far[0], 0.5, far[1], far[2]], rel=1e-6)
    assert many.features(torch.zeros(1, 20)).shape == (1, 3 + 20 + 20)


def test_rows_without_weight_do_not_matter() -> None:
    x = rng_for(2).standard_normal((1000, 1))
    w = np.exp(x[:, 0])
    extra = np.concatenate([x, 100 + x])
    zeros = np.zeros(1000)
    ratios = []
    for rows in ((x, w, np.ones(1000)), (extra, np.concatenate([w, zeros]), np.concatenate([np.ones(1000), zeros]))):
        ratio = RatioEstimator(1, seed=0, config=QUICK)
        ratio.fit(*rows)
        ratios.append(ratio.log_ratio(x))
    np.testing.assert_array_equal(*ratios)


def test_disjoint_samples_give_a_bounded_ratio() -> None:
    x = np.concatenate([rng_for(3).normal(-5, 0.1, 500), rng_for(4).normal(5, 0.1, 500)])[:, None]
    is_one = np.repeat([1.0, 0.0], 500)
    ratio = RatioEstimator(1, seed=0)
    ratio.fit(x, is_one, 1 - is_one)
    spread = ratio.log_ratio(x)
    assert np.isfinite(spread).all() and np.ptp(spread) <= 2 * LOGIT_LIMIT and spread[:500].min() > spread[500:].max() + 4


def test_an_untrained_ratio_says_so() -> None:
    with pytest.raises(SettingError, match="not trained"):
        RatioEstimator(1, seed=0).log_ratio(np.zeros((3, 1)))
