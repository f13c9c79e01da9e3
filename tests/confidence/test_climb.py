"""Batched Newton climbs end where closed forms, or another optimiser, say that the maxima are."""

import numpy as np
import pytest
from scipy.optimize import minimize

from sbi_phys.confidence.climb import climb

N = 60


def gaussian(x, width, rho):
    d = x.shape[1]
    precision = np.linalg.inv((np.full((d, d), rho) + (1 - rho) * np.eye(d)) * width**2)

    def values(rows, theta):
        away = theta - x[rows][:, None]
        return -0.5 * np.einsum("nji,ik,njk->nj", away, precision, away)

    return values


def run(values, d):
    start = np.full((N, d), 0.5)
    return climb(values, start, values(np.arange(N), start[:, None])[:, 0], np.zeros(d), np.ones(d))


@pytest.mark.parametrize(("d", "rho"), [(1, 0.0), (3, 0.98), (5, 0.99), (8, 0.9)])
def test_narrow_ridges_in_many_parameters(d, rho):
    x = np.random.default_rng(d).uniform(0, 1, (N, d))
    best, at = run(gaussian(x, 0.02, rho), d)
    assert best.min() > -1e-6
    assert np.abs(at - x).max() < 1e-4


def test_single_precision_will_do():
    x = np.random.default_rng(0).uniform(0.1, 0.9, (N, 4))
    exact = gaussian(x, 0.03, 0.8)
    best, _ = run(lambda rows, t: (exact(rows, t) - 5000.0).astype(np.float32).astype(np.float64), 4)
    assert (best + 5000).min() > -0.02  # steps of single precision at 5000 are 5e-4


def test_maxima_beyond_the_box_are_found_on_its_sides():
    x = np.random.default_rng(1).uniform(-0.4, 1.4, (N, 4))
    values = gaussian(x, 0.1, 0.9)
    best, at = run(values, 4)
    assert at.min() >= 0 and at.max() <= 1

    def loss(theta, i):
        return -values(np.array([i]), theta[None, None])[0, 0]

    for i in range(20):
        exact = minimize(
            loss, np.clip(x[i], 0, 1), args=(i,), bounds=[(0, 1)] * 4, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9}
        )
        assert best[i] > -exact.fun - 0.01


def test_a_curved_valley_and_impossible_places():
    x = np.random.default_rng(2).uniform(-1, 1, (N, 3))

    def values(rows, theta):
        u = (theta - 0.5) * 6
        bent = u.copy()
        bent[..., 1] -= (u[..., 0] - x[rows][:, None, 0]) ** 2
        heavy = -3 * np.log1p(((bent - x[rows][:, None]) ** 2).sum(axis=-1) / 0.3)
        return np.where(theta[..., 2] > 0.95, -np.inf, heavy)

    best, at = run(values, 3)
    assert best.min() > -0.01
    assert (at[:, 2] <= 0.95).all()
