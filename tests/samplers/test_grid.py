"""The grid against closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from sbi_phys.core.errors import ConvergenceError, NonFiniteError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.samplers.grid import grid_posterior


def test_a_narrow_gaussian_in_a_wide_box() -> None:
    mean, cov = np.array([0.3, -1.2]), 1e-4 * np.array([[1.0, 0.8], [0.8, 1.0]])
    target = stats.multivariate_normal(mean, cov)
    grid = grid_posterior(lambda t: target.logpdf(t) + 3.0, [-5, -5], [5, 5])
    assert grid.log_evidence == pytest.approx(3.0, abs=1e-6)
    np.testing.assert_allclose(grid.mean(), mean, atol=1e-6)
    draws = grid.sample(50_000, rng_for(0))
    np.testing.assert_allclose(np.cov(draws.T), cov, rtol=0.03)
    for k in range(2):
        assert stats.kstest(draws[:, k], "norm", args=(mean[k], 0.01)).pvalue > 1e-3


def test_two_modes_and_an_edge_in_one_dimension() -> None:
    modes = stats.norm(-2, 0.1), stats.norm(3, 0.3)

    def log_target(t: np.ndarray) -> np.ndarray:
        return np.log(0.25 * modes[0].pdf(t[:, 0]) + 0.75 * modes[1].pdf(t[:, 0]))

    grid = grid_posterior(log_target, [-4], [3], n_cells=2000)  # the box cuts the second mode in half
    assert grid.log_evidence == pytest.approx(math.log(0.25 + 0.375), abs=1e-3)
    assert (grid.sample(20_000, rng_for(1))[:, 0] < 0).mean() == pytest.approx(0.4, abs=0.015)


def test_two_needles_far_apart() -> None:
    """Each a millionth of the box: both are found and weighted, where a single zooming box would resolve neither."""
    needles = stats.multivariate_normal([-3.1, 2.2], 1e-6), stats.multivariate_normal([4.0, -4.4], 4e-6)

    def log_target(t: np.ndarray) -> np.ndarray:
        return np.logaddexp(math.log(0.3) + needles[0].logpdf(t), math.log(0.7) + needles[1].logpdf(t))

    grid = grid_posterior(log_target, [-5, -5], [5, 5])
    assert grid.log_evidence == pytest.approx(0, abs=1e-3)
    assert (grid.sample(20_000, rng_for(1))[:, 0] < 0).mean() == pytest.approx(0.3, abs=0.015)


def test_what_it_refuses() -> None:
    many = stats.norm(np.linspace(-9, 9, 40), 1e-3)  # forty needles: more than these cells can resolve
    with pytest.raises(ConvergenceError, match="raise n_cells"):
        grid_posterior(lambda t: np.logaddexp.reduce(many.logpdf(t), axis=1), [-10], [10], n_cells=100, max_cell_mass=1e-3)
    with pytest.raises(NonFiniteError, match="NaN somewhere"):
        grid_posterior(lambda t: np.full(len(t), np.nan), [0], [1])
    with pytest.raises(ShapeError, match="low < high"):
        grid_posterior(lambda t: t[:, 0], [1], [0])
