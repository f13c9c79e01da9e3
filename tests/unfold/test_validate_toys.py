"""Toys: what they are drawn from, what they count, and the floor under a pull's error."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError
from sbi_phys.core.progress import NO_PROGRESS
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold.validate_toys import LIMIT, Method, Toys, distance, in_errors, redrawn, run_toys
from tests.unfold import validate_oracle as oracle

TRUTH = oracle.falling()


def made(counts, errors, expected=None) -> Toys:
    counts, errors = np.asarray(counts, dtype=float), np.asarray(errors, dtype=float)
    n, t = counts.shape
    expected = np.ones(t) if expected is None else np.asarray(expected, dtype=float)
    zero = np.zeros(n)
    return Toys(
        truth=np.zeros(t), expected_errors=expected, counts=counts, errors=errors, refolded=zero, by_truth=zero, covariance=np.eye(t)
    )


def test_pulls_and_coverage_of_an_inversion_are_gaussian() -> None:
    with NO_PROGRESS.task("toys", None) as task:
        toys = run_toys(Method("inversion", oracle.inversion), oracle.response(), TRUTH, np.ones(8), 400, 0, task)
    assert toys.n == 400 and toys.covariance.shape == (8, 8)
    assert np.abs(toys.mean_pull / toys.mean_pull_err).max() < 3.5
    assert toys.covered(1.0).mean() == pytest.approx(0.683, abs=0.02)
    assert toys.pulls.std() == pytest.approx(1, abs=0.04)
    scale = np.sqrt(np.diag(toys.covariance))
    np.testing.assert_allclose(toys.sd, scale, rtol=0.15)
    np.testing.assert_allclose(toys.correlation, toys.covariance / np.outer(scale, scale), atol=0.2)
    assert (toys.refolded < 1e-6).all() and toys.by_truth.mean() == pytest.approx(8, abs=0.7)  # 8 bins, all fitted
    np.testing.assert_allclose(toys.bias, toys.counts.mean(axis=0) - TRUTH)


def test_the_floor_under_errors() -> None:
    toys = made([[5.0, 1.0], [5.0, 1.0], [5.0, 0.0]], [[1.0, 0.0], [0.02, 1.0], [1.0, 0.0]])
    np.testing.assert_array_equal(toys.pulls, [[5, 10], [50, 1], [5, 0]])
    assert toys.degenerate == pytest.approx([1 / 3, 2 / 3])
    # coverage takes the interval as quoted: a point holds the truth only if it is the truth
    assert toys.covered(1.0)[:, 1].tolist() == [False, True, True]


def test_no_pull_is_infinite_even_for_a_method_without_errors() -> None:
    toys = made(np.array([[1.0, -1.0], [2.0, 0.0]]), np.zeros((2, 2)), np.zeros(2))
    np.testing.assert_array_equal(toys.pulls, [[LIMIT, -LIMIT], [LIMIT, 0]])
    assert np.isfinite(toys.mean_pull).all() and toys.degenerate.tolist() == [1, 1]


def test_in_errors() -> None:
    np.testing.assert_array_equal(in_errors(np.array([2.0, 0, 1, -1]), np.array([4.0, 0, 0, 0])), [0.5, 0, np.inf, -np.inf])


def test_distance_of_answers_that_fold_to_nothing_or_less() -> None:
    assert distance(np.array([4.0, 0]), np.array([4.0, 0])) == pytest.approx(0, abs=1e-5)
    assert 100 < distance(np.array([4.0, 1]), np.array([-1.0, 1])) < 1e4


def test_responses_are_drawn_with_the_noise_that_they_claim() -> None:
    response = oracle.response(n_simulated=np.full(8, 500.0))
    drawn = np.array([redrawn(response, rng_for(0, "draw", i)).matrix for i in range(400)])
    np.testing.assert_allclose(drawn.mean(axis=0), response.matrix, atol=0.004)
    p = response.matrix
    np.testing.assert_allclose(drawn.var(axis=0), p * (1 - p) / 500, rtol=0.35, atol=1e-12)
    assert redrawn(oracle.response(), rng_for(0)).matrix is not None
    exact = oracle.response()
    assert redrawn(exact, rng_for(0)) is exact


def test_a_simulation_too_small_for_its_bins_is_named() -> None:
    with pytest.raises(DataError, match="empty row or column"):
        redrawn(oracle.response(n=200, stay=0.1, n_simulated=np.ones(200)), rng_for(0))
