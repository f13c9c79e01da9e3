import numpy as np
import pytest

from sbi_phys.calibration.lc2st_features import MAX_TERMS, Terms, affordable, polynomial, reduction, residuals, whitened
from sbi_phys.core.errors import DataError


@pytest.mark.parametrize("terms", [Terms(True, True), Terms(False, True), Terms(True, False), Terms(False, False)])
@pytest.mark.parametrize(("d", "c"), [(1, 1), (2, 3), (3, 2)])
def test_features_are_orthonormal_for_standard_normal_variables(terms, d, c):
    rng = np.random.default_rng(0)
    features = polynomial(rng.standard_normal((100_000, d)), rng.standard_normal((100_000, c)), terms)
    assert features.shape[1] == terms.count(d, c)
    gram = features.T @ features / len(features)
    # w and u are held at 6 and 3 sd, which takes 1.5 % of the variance of u^2
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=0.12)


def test_features_by_hand():
    row = polynomial(np.array([[2.0, 3.0]]), np.array([[0.5]]), Terms(False, False))[0]
    root = np.sqrt(2)
    np.testing.assert_allclose(row, [1, 0.5, 2, 1, 3, 1.5, 3 / root, 1.5 / root, 8 / root, 4 / root, 6])


@pytest.mark.parametrize("n", [100, 1000, 10_000])
@pytest.mark.parametrize(("d", "c"), [(1, 1), (2, 8), (7, 8), (10, 8)])
def test_terms_stay_within_what_rows_and_time_allow(n, d, c):
    terms = affordable(n, d, c)
    assert terms == Terms(False, False) or terms.count(d, c) <= min(n / 10, MAX_TERMS)
    assert affordable(10_000, 2, 2) == Terms(True, True)


def test_reduction_has_unit_variance_and_drops_what_does_not_move():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 3)) * [1, 1e-6, 1e6] + [0, 5, 0]
    full = np.column_stack([x, x[:, 0] - 2, np.full(500, 1 / 3)])
    reduce = reduction(full, 8, rng)
    u = reduce(full)
    assert u.shape == (500, 3)
    np.testing.assert_allclose(np.cov(u.T, ddof=0), np.eye(3), atol=1e-8)
    assert reduction(full, 2, rng).n_components == 2
    with pytest.raises(DataError, match="every column of x is constant"):
        reduction(np.full((500, 2), 1 / 3), 2, rng)


def test_spare_draws_whiten_and_their_own_rows_come_out_standard():
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((4, 3, 3)) + 2 * np.eye(3)
    spare = np.einsum("nij,nsj->nsi", mix, rng.standard_normal((4, 200, 3))) + 7
    w = whitened(spare, spare)
    np.testing.assert_allclose(w.mean(axis=1), 0, atol=1e-8)
    for rows in w:
        np.testing.assert_allclose(np.cov(rows.T), np.eye(3), atol=1e-4)
    shifted = whitened(1e3 * spare - 5, 1e3 * spare - 5)
    np.testing.assert_allclose(shifted, w, atol=1e-6)


def test_residuals_know_no_truth_and_remove_the_trend():
    rng = np.random.default_rng(3)
    u = rng.standard_normal((400, 1))
    rows = (u + 0.5 * u**2)[:, None] * [1.0, -2.0] + 0.1 * rng.standard_normal((400, 2, 2))
    frame, swapped = residuals(rows, u), residuals(rows[:, ::-1], u)
    np.testing.assert_allclose(frame(rows[:, 0], u), swapped(rows[:, 0], u), rtol=1e-6)
    w = np.concatenate([frame(rows[:, 0], u), frame(rows[:, 1], u)])
    np.testing.assert_allclose(np.cov(w.T, ddof=0), np.eye(2), atol=1e-6)
    inside = np.abs(u[:, 0]) < 3
    assert abs(np.corrcoef(frame(rows[:, 0], u)[inside, 0], u[inside, 0])[0, 1]) < 0.15
