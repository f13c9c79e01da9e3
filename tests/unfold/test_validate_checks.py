"""Noise-free tests against what can be computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbi_phys.core.progress import NO_PROGRESS
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.tikhonov import tikhonov
from sbi_phys.unfold.validate_checks import (
    FAR_WAVE,
    bottom_line,
    chi2,
    closure,
    compare_priors,
    default_alternatives,
    scan_strengths,
    waves,
)
from sbi_phys.unfold.validate_toys import Method
from tests.unfold import steep_toy
from tests.unfold import validate_oracle as oracle

TRUTH = oracle.falling()
RIGHT = Method("inversion", oracle.inversion)


def test_alternatives_are_what_they_say() -> None:
    made = default_alternatives(TRUTH)
    up, down = made["tilt up"] / TRUTH, made["tilt down"] / TRUTH
    assert up[-1] / up[0] == pytest.approx(2) and down[-1] / down[0] == pytest.approx(0.5)
    assert (made["bump"] / TRUTH).max() == pytest.approx(1.2, abs=0.03) and made["bump"][0] == pytest.approx(TRUTH[0], rel=1e-2)
    assert list(waves(TRUTH)) == ["wave of 2 bins", "wave of 3 bins", "wave of 4 bins", "wave of 6 bins"] and list(waves(TRUTH[:2])) == [
        "wave of 2 bins"
    ]
    np.testing.assert_allclose((waves(TRUTH)["wave of 2 bins"] - TRUTH) / np.sqrt(TRUTH), [3, -3] * 4)
    assert (waves(np.full(6, 1e-3))["wave of 4 bins"] > 0).all()


@given(n=st.integers(2, 12), seed=st.integers(0, 1000))
def test_the_bottom_line_holds_for_any_invertible_response_and_any_hypothesis(n: int, seed: int) -> None:
    """chi2 is invariant under an invertible map; with fewer truth than reco bins it can only fall."""
    rng = rng_for(seed, "bottom line")
    matrix = np.eye(n) * 0.5 + 0.4 * rng.dirichlet(np.ones(n), size=n).T
    first = closure(RIGHT, Response(matrix), rng.uniform(100, 1000, n), "here")
    line = bottom_line(RIGHT, Response(matrix), first, rng.uniform(100, 1000, n), "there")
    assert line.ratio == pytest.approx(1, rel=1e-6) and line.reco <= 25 + 1e-9


def test_hypotheses_that_are_near_stay_where_they_are() -> None:
    response = oracle.response()
    first = closure(RIGHT, response, TRUTH, "here")
    other = TRUTH * 1.001
    expected = ((response.fold(other) - response.fold(TRUTH)) ** 2 / response.fold(TRUTH)).sum()
    assert bottom_line(RIGHT, response, first, other, "there").reco == pytest.approx(expected)
    assert np.isnan(bottom_line(RIGHT, response, first, TRUTH, "there").ratio)


def test_a_covariance_too_small_by_two_breaks_the_bottom_line_by_two() -> None:
    method = Method("narrow", oracle.scaled(covariance=0.5))
    first = closure(method, oracle.response(), TRUTH, "here")
    assert bottom_line(method, oracle.response(), first, 1.01 * TRUTH, "there").ratio == pytest.approx(2)


@pytest.mark.parametrize("unfold", [oracle.iterated(4), oracle.iterated(20), tikhonov])
def test_waves_find_correlations_that_were_left_out(unfold) -> None:
    """Iterative Bayes and Tikhonov on the steep toy, whatever the sign of the correlation between their neighbours."""
    truth, response = steep_toy.power_law(2.7), steep_toy.response()
    worst = []
    for of in (unfold, oracle.diagonal(unfold)):
        method = Method("one", of)
        first = closure(method, response, truth, "here")
        worst.append(max(bottom_line(method, response, first, wave, name, FAR_WAVE).ratio for name, wave in waves(truth).items()))
    assert 0.98 < worst[0] < 1.01 and worst[1] > 1.1


def test_chi2_in_singular_directions() -> None:
    both = np.array([[1.0, 1.0], [1.0, 1.0]])
    assert chi2(np.array([2.0, 2.0]), both) == pytest.approx(4)  # one number, seen twice
    assert chi2(np.array([1.0, 0.0]), np.diag([1.0, 0.0])) == 1
    assert chi2(np.array([1.0, 0.1]), np.diag([1.0, 0.0])) == np.inf
    wide = np.diag([1e-8, 1e12])
    assert chi2(np.array([1e-4, 1e6]), wide) == pytest.approx(2)


def test_scan_by_hand() -> None:
    """Shrinking the inverse by s: the bias is -s times the truth, the spread (1 - s) times that of the inverse."""
    variants = {s: oracle.scaled(1 - s) for s in (0.2, 0.0, 0.1)}
    with NO_PROGRESS.task("scan", None) as task:
        found = scan_strengths(variants, oracle.response(), TRUTH, {"twice": 2 * TRUTH}, 30, 0, task)
    assert found.strength.tolist() == [0.0, 0.1, 0.2]
    np.testing.assert_allclose(found.bias, -found.strength[:, None] * 2 * TRUTH, atol=1e-8)
    np.testing.assert_allclose(found.sd, (1 - found.strength[:, None]) * found.sd[0])
    bias, _, _ = found.sizes()
    assert bias[1] == pytest.approx(0.1 * 2 * np.sqrt(TRUTH.mean()))


def test_priors_by_hand() -> None:
    found = compare_priors({"one": oracle.scaled(1.0), "more": oracle.scaled(1.1)}, oracle.response().fold(TRUTH), oracle.response())
    errors = closure(RIGHT, oracle.response(), TRUTH, "here").errors
    np.testing.assert_allclose(found.spread, 0.1 * TRUTH / errors)
    assert found.names == ("one", "more")
