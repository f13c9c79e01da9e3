import numpy as np
import pytest

from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold import Response, tikhonov
from tests.unfold import steep_toy

EDGES = np.linspace(0, 10, 11)
FINE = np.linspace(-1, 11, 25)
TRUTH = 4000 * np.exp(-0.5 * ((EDGES[1:] + EDGES[:-1]) / 2 - 4) ** 2 / 6) + 200


def response(**extra):
    made = Response.from_resolution(EDGES, FINE, 0.7, efficiency=0.9)
    return Response(made.matrix, EDGES, FINE, **extra)


def test_without_penalty_a_square_response_is_inverted():
    square = Response.from_resolution(EDGES, EDGES, 0.3)
    counts = rng_for(0, "square").poisson(square.fold(TRUTH))
    found = tikhonov(counts, square, 0.0)
    inverse = np.linalg.inv(square.matrix)
    np.testing.assert_allclose(found.counts, inverse @ counts, rtol=1e-8)
    np.testing.assert_allclose(found.jacobian, inverse, rtol=1e-8, atol=1e-10)
    assert found.effective == pytest.approx(10)


def test_without_penalty_least_squares_is_weighted_least_squares():
    made = response()
    counts = rng_for(1, "wide").poisson(made.fold(TRUTH)).astype(float)
    v = np.diag(made.fold(TRUTH))
    found = tikhonov(counts, made, 0.0, counts_covariance=v)
    a = made.matrix
    normal = a.T @ np.linalg.inv(v) @ a
    np.testing.assert_allclose(found.counts, np.linalg.solve(normal, a.T @ np.linalg.inv(v) @ counts), rtol=1e-8)
    np.testing.assert_allclose(found.covariance, np.linalg.inv(normal), rtol=1e-6, atol=1e-6)


def test_a_strong_penalty_leaves_prior_times_a_straight_line():
    made = response()
    found = tikhonov(made.fold(TRUTH), made, 1e5, TRUTH)
    np.testing.assert_allclose(found.counts, TRUTH, rtol=1e-6)
    bent = tikhonov(made.fold(TRUTH), made, 1e5, np.ones(10))
    assert np.abs(np.diff(bent.counts, n=2)).max() < 1e-3 * bent.counts.max()
    assert bent.effective == pytest.approx(2, abs=0.01)


def test_the_jacobian_is_exact_at_fixed_weights():
    made = response(fakes=np.full(24, 0.1), background=np.full(24, 7.0))
    counts = made.fold(TRUTH)
    v = np.diag(counts)
    found = tikhonov(counts, made, 0.7, TRUTH[::-1].copy(), counts_covariance=v)
    move = np.zeros(24)
    move[[5, 9]] = 1.0, -1.0  # the prior is scaled to the sum, which stays
    difference = tikhonov(counts + move, made, 0.7, TRUTH[::-1].copy(), counts_covariance=v).counts - found.counts
    np.testing.assert_allclose(found.jacobian @ move, difference, rtol=1e-6, atol=1e-8)


def test_noise_of_the_response_agrees_with_differences():
    fakes = np.full(24, 0.1)
    made = response(fakes=fakes, n_simulated=np.full(10, 500.0))
    counts = rng_for(2, "response").poisson(made.fold(TRUTH)).astype(float)
    v = np.diag(made.fold(TRUTH))
    columns = np.zeros((10, 24, 10))
    for j, mu in np.argwhere(made.matrix > 1e-4):
        h = 1e-5 * made.matrix[j, mu]
        ends = []
        for sign in (1, -1):
            matrix = made.matrix.copy()
            matrix[j, mu] += sign * h
            ends.append(tikhonov(counts, Response(matrix, fakes=fakes), 0.0, counts_covariance=v).counts)
        columns[:, j, mu] = (ends[0] - ends[1]) / (2 * h)
    quoted = tikhonov(counts, made, 0.0, counts_covariance=v).covariance_response
    np.testing.assert_allclose(np.diag(quoted), np.diag(made.propagate(columns)), rtol=0.01)


@pytest.mark.parametrize("method", ["l_curve", "global_correlation"])
def test_the_scan_finds_a_strength_that_covers(method):
    made = response()
    expected = made.fold(TRUTH)
    pulls = []
    for i in range(60):
        found = tikhonov(rng_for(i, "scan", method).poisson(expected), made, prior=np.full(10, 1.0), method=method, n_strengths=30)
        pulls.append((found.counts - TRUTH) / found.errors)
    assert np.abs(np.mean(pulls, axis=0)).max() < 1.0
    assert 0.7 < np.std(pulls, axis=0).mean() < 1.3
    scan = found.scan
    assert found.strength == scan.strength[scan.chosen]
    assert (np.diff(scan.chi2) > -1e-6).all() and (np.diff(scan.effective) < 1e-6).all()
    if method == "global_correlation":
        assert scan.global_correlation[scan.chosen] == np.nanmin(scan.global_correlation)
    assert scan.plot().get_legend() is not None


def test_the_steep_toy_is_unfolded_without_bias_from_a_wrong_prior():
    made = steep_toy.response()
    pulls, _ = steep_toy.toys(40, made.fold(steep_toy.power_law(2.7)), 3, lambda c: tikhonov(c, made, prior=steep_toy.power_law(3.0)))
    assert np.abs(pulls.mean(axis=0)).max() < 0.8
    assert steep_toy.coverage(pulls).min() > 0.45


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"counts": np.ones(3)}, ShapeError, "counts has shape"),
        ({"response": np.full((2, 3), 0.2), "counts": np.ones(2)}, SettingError, "n_reco >= n_truth >= 3"),
        ({"response": np.full((24, 10), 0.02)}, SettingError, "rank below"),
        ({"method": "lcurve"}, SettingError, "did you mean 'l_curve'"),
        ({"strength": -1.0}, SettingError, "strength is -1"),
        ({"counts_covariance": np.zeros((24, 24))}, DataError, "singular"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        tikhonov(**({"counts": response().fold(TRUTH), "response": response()} | change))


def test_result_in_words_and_pictures():
    found = tikhonov(response().fold(TRUTH), response())
    assert "global_correlation" in found.summary()
    assert found.plot().get_ylabel() == "events per bin"
