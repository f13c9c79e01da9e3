"""Means of ratios over the prior against closed forms: narrow peaks, wrong starts, two modes, and what can not be found."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp

from sbi_phys.core.errors import ConvergenceError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.nre import WANTED, Gaussians, joined, mean_over_prior
from sbi_phys.priors import standard_normal_log_prob

Array = NDArray[np.float64]
OFFSET = np.array([3.0, -40.0, 0.0, 700.0])


def gaussian_ratio(mean: Array, width: Array, offset: Array) -> Callable[[Array, NDArray[np.int64]], Array]:
    """exp(offset_i) N(u; mean_i, width_i^2) / N(u; 0, I), whose mean over the prior is exp(offset_i)."""

    def log_ratio(u: Array, rows: NDArray[np.int64]) -> Array:
        z = (u - mean[rows][:, None]) / width[rows][:, None]
        found: Array = (
            offset[rows][:, None] + standard_normal_log_prob(z) - np.log(width[rows]).sum(axis=1)[:, None] - standard_normal_log_prob(u)
        )
        return found

    return log_ratio


def at(mean: Array, width: Array) -> Gaussians:
    return mean[:, None], np.stack([np.diag(w)[None] for w in width])


def four(dim: int) -> tuple[Array, Array]:
    rng = rng_for(0, "four")
    return rng.standard_normal((4, dim)), np.array([1.0, 0.1, 0.01, 0.001])[:, None] * rng.uniform(0.5, 2, (4, dim))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_means_of_narrow_ratios(dim: int) -> None:
    mean, width = four(dim)
    found = mean_over_prior(gaussian_ratio(mean, width, OFFSET), at(mean, width), n_draws=512, seed=1)
    assert (found.n_effective >= WANTED).all() and (found.error < 0.05).all()
    np.testing.assert_allclose(found.log_mean, OFFSET, atol=0.1)
    assert "4 observations" in found.summary()


@pytest.mark.parametrize("wrong", [30.0, 0.1], ids=["too wide", "too narrow"])
def test_starts_that_are_wrong_are_mended(wrong: float) -> None:
    mean, width = four(2)
    found = mean_over_prior(gaussian_ratio(mean, width, OFFSET), at(mean + 3 * width, wrong * width), n_draws=512, seed=1)
    assert (np.abs(found.log_mean - OFFSET) < 4 * found.error + 0.02).all()
    assert (found.error < 0.06).all()
    assert found.n_draws.max() > 512


def test_two_modes_far_apart_are_both_counted() -> None:
    """A Gaussian learned by maximum likelihood covers both, and next to none of its draws falls on either."""
    parts = [gaussian_ratio(np.full((1, 2), m), np.full((1, 2), 0.03), np.log([share])) for m, share in ((-1.5, 0.25), (1.5, 0.75))]

    def both(u: Array, rows: NDArray[np.int64]) -> Array:
        return np.asarray(logsumexp([part(u, rows) for part in parts], axis=0))

    found = mean_over_prior(both, at(np.full((1, 2), 0.75), np.full((1, 2), 1.3)), n_draws=512, seed=2)
    assert found.log_mean[0] == pytest.approx(0, abs=0.1)


def test_the_error_is_on_the_safe_side() -> None:
    n = 60
    mean, width = np.full((n, 2), 0.7), np.full((n, 2), 0.05)
    found = mean_over_prior(gaussian_ratio(mean, width, np.zeros(n)), at(mean, width), n_draws=256, seed=3)
    assert found.log_mean.std() < 1.1 * np.median(found.error)
    assert abs(found.log_mean.mean()) < 0.02


def test_draws_follow_from_seed_and_number() -> None:
    mean, width = four(2)

    def run(rows: slice, seed: int) -> Array:
        log_ratio = gaussian_ratio(mean[rows], width[rows], OFFSET[rows])
        return mean_over_prior(log_ratio, at(mean[rows], width[rows]), n_draws=256, seed=seed, first=rows.start, wanted=100).log_mean

    whole = run(slice(0, 4), 0)
    np.testing.assert_allclose(np.concatenate([run(slice(0, 1), 0), run(slice(1, 4), 0)]), whole, rtol=1e-12)
    assert (run(slice(0, 4), 1) != whole).all()


def test_parts_are_joined() -> None:
    mean, width = four(2)
    found = mean_over_prior(gaussian_ratio(mean, width, OFFSET), at(mean, width), n_draws=256, seed=0, wanted=100)
    twice = joined([found, found])
    np.testing.assert_array_equal(twice.log_mean, np.tile(found.log_mean, 2))
    assert len(twice.error) == len(twice.n_effective) == len(twice.n_draws) == 8


def test_a_thousand_needles_are_refused() -> None:
    def needles(u: Array, rows: NDArray[np.int64]) -> Array:
        return np.asarray(3000 * np.sin(200 * u).sum(axis=-1))

    with pytest.raises(ConvergenceError, match="the mean of the ratio over the prior at observation 7: .* expected at least 50"):
        mean_over_prior(needles, at(np.zeros((1, 2)), np.ones((1, 2))), n_draws=64, seed=0, first=7)
