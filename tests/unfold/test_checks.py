"""Toys, tests without noise and p-values: against what can be computed by hand, exact at the criterion and smaller only beyond it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, t

from sbi_phys.core.errors import DataError
from sbi_phys.core.progress import NO_PROGRESS
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold.checks import (
    FAR_WAVE,
    LIMIT,
    Criteria,
    Method,
    Toys,
    bottom_line,
    chi2,
    closure,
    compare_priors,
    default_alternatives,
    distance,
    in_errors,
    redrawn,
    run_toys,
    scan_strengths,
    toy_checks,
    waves,
)
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.tikhonov import tikhonov
from tests.unfold import steep_toy
from tests.unfold import validation_oracle as oracle

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


def toys(pulls: np.ndarray, refolded: np.ndarray | None = None, by_truth: np.ndarray | None = None) -> Toys:
    n, bins = pulls.shape
    zero = np.zeros(n)
    return Toys(
        truth=np.full(bins, 100.0),
        expected_errors=np.ones(bins),
        counts=100 + pulls,
        errors=np.ones((n, bins)),
        refolded=zero if refolded is None else refolded,
        by_truth=zero if by_truth is None else by_truth,
        covariance=np.eye(bins),
    )


def checks(made: Toys, observed: float | None = None, **asked: float):
    return {c.name: c for c in toy_checks(made, Criteria(**asked), oracle.response(made.truth.size), observed)}


def test_numbers_by_hand() -> None:
    pulls = rng_for(0, "pulls").standard_normal((50, 3)) + np.array([0.0, 0.8, 0.0])
    found = checks(toys(pulls))
    mean, error = pulls.mean(axis=0), pulls.std(axis=0, ddof=1) / np.sqrt(50)
    assert found["mean pull"].value == pytest.approx(mean[1])
    assert found["mean pull"].pvalue == pytest.approx(3 * t.sf((mean[1] - 0.5) / error[1], 49))
    inside = (np.abs(pulls) <= 1).sum(axis=0)
    assert found["coverage of 68 % intervals"].pvalue == pytest.approx(min(1, 3 * binom.cdf(inside.min(), 50, 0.60)))
    assert found["coverage of 68 % intervals"].value == inside.min() / 50
    assert "bin 1" in found["mean pull"].words


@pytest.mark.parametrize(
    ("name", "shift", "width"),
    [("mean pull", 0.5, 1.0), ("coverage of 68 % intervals", 0.0, 1.188), ("coverage of 68 % intervals, mean of bins", 0.0, 1.070)],
)
def test_size_at_the_bound_and_power_beyond(name: str, shift: float, width: float) -> None:
    """At the bound itself a test rejects in 5 % of cases (fewer for the bins' binomials); a fifth of a sigma beyond, in most."""

    def rate(shift: float, width: float) -> float:
        made = [toys(shift + width * rng_for(i, name).standard_normal((200, 4))) for i in range(120)]
        return float(np.mean([(checks(m)[name].pvalue or 0.0) <= 0.05 for m in made]))

    assert 0.005 <= rate(shift, width) <= 0.10
    assert rate(shift + (0.25 if shift else 0), width * (1 if shift else 1.25)) > 0.8
    assert rate(0.0, 1.0) <= 0.02


def test_refolded_is_compared_with_the_truth_toy_by_toy() -> None:
    rng = rng_for(1, "refolded")
    truth = rng.chisquare(8, 100)
    pulls = rng.standard_normal((100, 4))
    fitted, off = (checks(toys(pulls, truth + by + 0.5 * rng.standard_normal(100), truth)) for by in (-3.0, 0.5))
    assert fitted["refolded chi2 of toys"].pvalue > 0.99 and off["refolded chi2 of toys"].pvalue < 1e-6


def test_the_counts_rank_among_the_toys() -> None:
    made = toys(rng_for(2).standard_normal((99, 4)), np.arange(99.0), np.full(99, 200.0))
    assert checks(made, 98.5)["refolded chi2 of the counts"].pvalue == pytest.approx(0.01)
    assert checks(made, -1.0)["refolded chi2 of the counts"].pvalue == 1
    assert "refolded chi2 of the counts" not in checks(made)
