import numpy as np
import pytest
from scipy.stats import norm

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold import Response, StoppingRule, ibu
from tests.unfold import steep_toy


def gaussian_bins(edges, mean, sd):
    return np.diff(norm.cdf(edges, mean, sd))


def moments(edges, counts):
    centre = (edges[1:] + edges[:-1]) / 2
    mean = (counts @ centre) / counts.sum()
    return mean, np.sqrt(counts @ (centre - mean) ** 2 / counts.sum())


@pytest.mark.parametrize(
    ("low", "high", "prior", "data", "sigma", "bias"),
    [(-8, 8, (0, 1), (0.2, 0.8), 0.5, 0), (-30, 38, (4, 4), (10, 3.8), 3, -6), (-10, 10, (0, 1), (-0.3, 1.2), 1, 0.5)],
)
def test_gaussian_recursion(low, high, prior, data, sigma, bias):
    edges = np.linspace(low, high, 601)
    response = Response.from_resolution(edges, edges + bias, sigma, bias)
    truth = gaussian_bins(edges, *data)
    found = ibu(response.fold(truth), response, 10, gaussian_bins(edges, *prior) + 1e-30)
    m, v = prior[0], prior[1] ** 2
    for k in range(1, 11):
        g = v / (v + sigma**2)
        m, v = m + g * (data[0] - m), g**2 * (data[1] ** 2 + sigma**2) + g * sigma**2
        mean, sd = moments(edges, found.history[k])
        assert abs(mean - m) < 1e-3 and abs(sd - np.sqrt(v)) < 1e-3


def small(**extra):
    rng = rng_for(5, "small response")
    matrix = rng.dirichlet(np.ones(6), size=5).T * rng.uniform(0.5, 0.9, 5)
    return Response(matrix, **extra)


FAKES, BACKGROUND = np.array([0.1, 0.0, 0.2, 0.05, 0.0, 0.3]), np.array([5.0, 20.0, 0.0, 11.0, 2.0, 30.0])
COUNTS, PRIOR = np.array([120.0, 340.0, 90.0, 205.0, 77.0, 150.0]), np.array([3.0, 9.0, 4.0, 1.0, 6.0])


def derivative(function, at):
    """Central differences of a vector function by every element of `at`: (m, *at.shape)."""
    columns = np.empty((function(at).size, at.size))
    for i in range(at.size):
        step = np.zeros(at.size)
        step[i] = 1e-4 * max(abs(at.flat[i]), 1e-2)
        shift = step.reshape(at.shape)
        columns[:, i] = (function(at + shift) - function(at - shift)) / (2 * step[i])
    return columns.reshape(-1, *at.shape)


@pytest.mark.parametrize("smoothing", [0, 0.4])
@pytest.mark.parametrize("extra", [{}, {"fakes": FAKES, "background": BACKGROUND}])
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_derivatives_agree_with_differences(k, extra, smoothing):
    response = small(n_simulated=np.full(5, 100.0), **extra)
    found = ibu(COUNTS, response, k, PRIOR, smoothing=smoothing)

    def by_matrix(matrix):
        return ibu(COUNTS, Response(matrix, **extra), k, PRIOR, smoothing=smoothing).counts

    pairs = [
        (found.jacobian, derivative(lambda c: ibu(c, response, k, PRIOR, smoothing=smoothing).counts, COUNTS)),
        (found.prior_jacobian, derivative(lambda p: ibu(COUNTS, response, k, p, smoothing=smoothing).counts, PRIOR)),
        (found.response_jacobian, derivative(by_matrix, response.matrix)),
    ]
    for exact, difference in pairs:
        assert np.abs(exact - difference).max() < 1e-6 * np.abs(exact).max()


def test_two_steps_as_written_in_the_book():
    response, n = small(), PRIOR
    p, eff = response.matrix, response.efficiency
    for _ in range(2):
        m = np.array([[p[j, mu] * n[mu] / (eff[mu] * (p[j] @ n)) for mu in range(5)] for j in range(6)])
        n = COUNTS @ m
    found = ibu(COUNTS, p, 2, PRIOR)
    np.testing.assert_allclose(found.counts, n, rtol=1e-12)
    np.testing.assert_allclose(found.counts @ eff, COUNTS.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, (found.jacobian * COUNTS) @ found.jacobian.T)
    np.testing.assert_allclose(ibu(COUNTS, p, 2, 77 * PRIOR).counts, n, rtol=1e-12)  # a prior is a shape


def test_the_truth_is_a_fixed_point_with_fakes_and_background():
    response = small(fakes=FAKES, background=BACKGROUND)
    truth = 300 * PRIOR
    np.testing.assert_allclose(ibu(response.fold(truth), response, 3, truth).counts, truth, rtol=1e-12)
    bare = small(fakes=FAKES)
    np.testing.assert_allclose(ibu(response.fold(truth), bare, 3, truth, background=BACKGROUND).counts, truth, rtol=1e-12)


def test_the_prior_wears_off():
    counts = small().fold(300 * PRIOR)
    remaining = [ibu(counts, small(), k, PRIOR[::-1].copy()).prior_remaining.max() for k in (1, 10, 100, 10_000)]
    assert remaining == sorted(remaining, reverse=True)
    assert remaining[0] > 0.1 and remaining[-1] < 1e-2


def test_a_tilted_prior_moves_the_result_by_what_is_left_of_the_tilt():
    response, prior = steep_toy.response(), steep_toy.power_law(2.9)
    expected = response.fold(steep_toy.power_law(2.7))
    left = []
    for k in (1, 4, 30):
        found = ibu(expected, response, k, prior)
        tilted = [ibu(expected, response, k, prior * np.exp(s * 1e-3 * np.linspace(-1, 1, 20))).counts for s in (1, -1)]
        np.testing.assert_allclose(found.tilt_remaining, np.abs(tilted[0] - tilted[1]) / 2e-3 / found.counts, rtol=1e-4, atol=1e-7)
        left.append(found.tilt_remaining.max())
    assert left[0] > 4 * left[1] > 16 * left[2]


def test_the_prior_of_the_response_is_taken_and_named():
    assert ibu(COUNTS, small().matrix).prior_origin == "flat"
    found = ibu(COUNTS, small(truth=PRIOR))
    assert found.prior_origin == "spectrum of the response"
    np.testing.assert_array_equal(found.counts, ibu(COUNTS, small(), 4, PRIOR).counts)


def test_covariance_of_the_prior_as_given():
    v = np.diag((0.1 * PRIOR) ** 2)
    found = ibu(COUNTS, small(), 3, PRIOR, prior_covariance=v)
    np.testing.assert_allclose(found.covariance_prior, found.prior_jacobian @ v @ found.prior_jacobian.T)
    np.testing.assert_allclose(found.covariance, found.covariance_data + found.covariance_prior)
    assert not ibu(COUNTS, small(), 3, PRIOR).covariance_prior.any()


def test_a_response_from_few_simulations_gives_the_spread_that_is_quoted():
    rng, exact = rng_for(2, "responses"), small()
    n_sim = 2000
    shares = np.vstack([exact.matrix, 1 - exact.efficiency]).T
    counts = exact.fold(100 * PRIOR)
    answers = [ibu(counts, rng.multinomial(n_sim, shares)[:, :-1].T / n_sim, 3, PRIOR).counts for _ in range(800)]
    quoted = ibu(counts, small(n_simulated=np.full(5, float(n_sim))), 3, PRIOR).covariance_response
    np.testing.assert_allclose(np.std(answers, axis=0), np.sqrt(np.diag(quoted)), rtol=0.12)
    np.testing.assert_allclose(np.corrcoef(np.transpose(answers))[0, 1], quoted[0, 1] / np.sqrt(quoted[0, 0] * quoted[1, 1]), atol=0.15)


@pytest.mark.parametrize(("k", "low", "high"), [(4, 0.5, 1.02), (20, 0.5, 1.02)])
def test_bottom_line(k, low, high):
    response = steep_toy.response()
    one, two = (response.fold(steep_toy.power_law(g)) for g in (2.70, 2.72))
    measured = ((one - two) ** 2 / one).sum()
    a, b = (ibu(c, response, k, steep_toy.power_law(3.0)) for c in (one, two))
    scale = a.errors
    difference = (a.counts - b.counts) / scale
    unfolded = difference @ np.linalg.solve(a.covariance / np.outer(scale, scale), difference)
    assert low < unfolded / measured <= high


@pytest.mark.parametrize("kind", ["background", "fakes"])
def test_a_tenth_of_background_or_fakes_leaves_no_bias(kind):
    plain = steep_toy.response()
    truth = steep_toy.power_law(2.7)
    extra = {"background": 0.1 * plain.fold(truth)} if kind == "background" else {"fakes": np.full(20, 0.1)}
    response = steep_toy.response(**extra)
    pulls, _ = steep_toy.toys(60, response.fold(truth), 4, lambda c: ibu(c, response, 20, truth))
    assert np.abs(pulls.mean(axis=0)).max() < 0.5
    ignored, _ = steep_toy.toys(5, response.fold(truth), 4, lambda c: ibu(c, plain, 20, truth))
    assert np.abs(ignored.mean(axis=0)).max() > 2  # the test sees what it is for


def test_steep_spectrum_the_rule_covers_and_four_iterations_do_not():
    response = steep_toy.response()
    expected, prior = response.fold(steep_toy.power_law(2.7)), steep_toy.power_law(3.0)
    rule = StoppingRule(n_toys=150)
    pulls, found = steep_toy.toys(60, expected, 1, lambda c: ibu(c, response, "coverage", prior, rule=rule))
    assert steep_toy.coverage(pulls).min() >= 0.5  # 0.60 with the noise of 60 toys in the worst of 20 bins
    assert np.abs(pulls.mean(axis=0)).max() <= 0.6
    assert all(r.stopping.met for r in found)
    four, _ = steep_toy.toys(60, expected, 1, lambda c: ibu(c, response, 4, prior))
    assert steep_toy.coverage(four).min() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("index", [2.4, 2.7, 3.0])
def test_steep_spectrum_in_full(index):
    response = steep_toy.response()
    expected, prior = response.fold(steep_toy.power_law(2.7)), steep_toy.power_law(index)
    pulls, _ = steep_toy.toys(500, expected, 2, lambda c: ibu(c, response, "coverage", prior))
    assert steep_toy.coverage(pulls).min() >= 0.60
    assert np.abs(pulls.mean(axis=0)).max() <= 0.5


def test_the_rule_is_seeded_bounded_and_says_when_it_is_not_met():
    response = steep_toy.response()
    counts = rng_for(0, "rule").poisson(response.fold(steep_toy.power_law(2.7)))
    prior = steep_toy.power_law(3.0)
    one, two = (ibu(counts, response, "bias", prior, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.stopping.mean_pull, two.stopping.mean_pull)
    assert one.n_iterations == one.stopping.chosen == one.stopping.iterations[-1]
    assert np.abs(one.stopping.mean_pull[-1]).max() <= one.stopping.rule.bias
    assert one.covariance_prior.any()
    with pytest.warns(UserWarning, match=r"after 2 iterations \|mean pull\| is .* in truth bin"):
        short = ibu(counts, response, "coverage", prior, rule=StoppingRule(max_iterations=2, n_toys=50))
    assert short.n_iterations == 2 and not short.stopping.met


def test_a_step_that_cannot_be_resolved_is_not_passed_over_in_silence():
    edges = np.linspace(0, 20, 21)
    response = Response.from_resolution(edges, edges, 1.0, efficiency=0.8)
    truth = np.where(edges[1:] <= 10, 4000.0, 400.0)
    with pytest.warns(UserWarning, match=r"in truth bin (9|10|11) "):
        found = ibu(rng_for(1, "step").poisson(response.fold(truth)), response, "coverage")
    assert not found.stopping.met
    assert (np.abs(found.counts - truth) / found.errors).max() > 2  # and it would have been wrong


def test_the_rule_takes_a_covariance_and_smoothing():
    response = steep_toy.response()
    expected = response.fold(steep_toy.power_law(2.7))
    rule = StoppingRule(bias=1.0)  # the kernel has a bias of its own
    found = ibu(expected, response, "bias", steep_toy.power_law(3.0), counts_covariance=np.diag(expected), smoothing=0.1, rule=rule)
    assert found.stopping.met
    poisson = ibu(expected, response, found.n_iterations, steep_toy.power_law(3.0), smoothing=0.1)
    np.testing.assert_allclose(found.covariance_data, poisson.covariance_data)


def test_errors_at_the_expectation_are_those_of_the_counts_where_these_are_smooth():
    response, truth = steep_toy.response(), steep_toy.power_law(2.7)
    counts = response.fold(truth)
    own, smooth = (ibu(counts, response, 5, steep_toy.power_law(3.0), errors=errors) for errors in ("observed", "expected"))
    np.testing.assert_array_equal(own.counts, smooth.counts)
    np.testing.assert_allclose(smooth.expected, counts, rtol=1e-4)
    np.testing.assert_allclose(smooth.covariance, own.covariance, rtol=1e-3, atol=1e-3 * own.covariance.max() / 1e4)
    assert own.expected is None and "at the smooth expectation" in smooth.summary() and "expectation" not in own.summary()


def test_errors_at_the_expectation_cover_where_few_events_are_expected():
    """Three events in the last bin, twenty iterations: the counts' own errors are near 0 where it has fluctuated down."""
    response, truth, prior = steep_toy.response(), steep_toy.power_law(2.7, 20_000), steep_toy.power_law(3.0)
    expected = response.fold(truth)
    assert expected[-1] < 4
    pulls: dict[str, list[np.ndarray]] = {"observed": [], "expected": []}
    for i in range(60):
        counts = rng_for(8, "few", i).poisson(expected)
        for errors, rows in pulls.items():
            found = ibu(counts, response, 20, prior, errors=errors)
            rows.append((found.counts - truth) / found.errors)
    own, smooth = (np.array(rows) for rows in pulls.values())
    assert np.abs(smooth.mean(axis=0)[-4:]).max() < 0.5 and np.abs(own.mean(axis=0)[-4:]).max() > 2
    within = (np.abs(smooth) < 2).mean(axis=0)[-4:]
    assert within.min() >= 0.88 and (np.abs(own) < 2).mean(axis=0)[-4:].min() < within.min()
    assert steep_toy.coverage(smooth).min() >= 0.5


def test_the_rule_tests_the_errors_that_are_quoted():
    response, prior = steep_toy.response(), steep_toy.power_law(3.0)
    counts = rng_for(0, "few").poisson(response.fold(steep_toy.power_law(2.7, 8000)))
    own, smooth = (ibu(counts, response, "coverage", prior, rule=StoppingRule(n_toys=100), errors=e) for e in ("observed", "expected"))
    assert own.stopping.met and smooth.stopping.met and smooth.n_iterations <= own.n_iterations / 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"errors": "exact"}, SettingError, "errors is 'exact'"),
        ({"counts": COUNTS[:5]}, ShapeError, r"counts has shape \(5,\); expected \(6,\)"),
        ({"counts": -COUNTS}, DataError, "counts is -120 at reco bin 0"),
        ({"counts": COUNTS * np.nan}, NonFiniteError, "counts"),
        ({"counts": 0 * COUNTS}, DataError, "zero in all 6 bins"),
        ({"counts": ["a"] * 6}, DataError, "counts has dtype"),
        ({"response": np.ones((6, 5))}, DataError, "truth bin 0 has a column sum .* above 1"),
        ({"prior": [1, 1, 0, 1, 1]}, DataError, "prior is 0 at truth bin 2"),
        ({"prior": [1, 1]}, ShapeError, "prior"),
        ({"n_iterations": 0}, SettingError, "n_iterations is 0"),
        ({"n_iterations": 2.5}, SettingError, "n_iterations"),
        ({"n_iterations": "covrage"}, SettingError, "did you mean 'coverage'"),
        ({"smoothing": 2}, SettingError, "smoothing is 2"),
        ({"background": -np.ones(6)}, DataError, "background is -1 at reco bin 0"),
        ({"counts_covariance": -np.eye(6)}, DataError, "negative eigenvalue"),
        ({"counts_covariance": np.triu(np.ones((6, 6)))}, DataError, "not symmetric"),
        ({"rule": StoppingRule()}, SettingError, "rule is given"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        ibu(**({"counts": COUNTS, "response": small(), "prior": PRIOR} | change))


def test_no_overlap_is_named_and_few_events_are_warned_of():
    # the prior has all but left the only bin that could explain the counts: the fold underflows to nothing there
    matrix = np.array([[0.9, 0.0], [0.0, 0.9], [0.0, 1e-200]])
    with pytest.raises(DataError, match=r"counts are 7 in reco bin 2 \[2, 3\).* no overlap"):
        ibu([5, 5, 7], Response(matrix, reco_edges=np.arange(4.0)), prior=[1, 1e-200])
    with pytest.warns(UserWarning, match="3 events for 5 truth bins"):
        ibu([1, 1, 1, 0, 0, 0], small())


def test_result_in_words_and_pictures():
    response = steep_toy.response(n_simulated=np.full(20, 1e4))
    found = ibu(response.fold(steep_toy.power_law(2.7)), response, "bias", steep_toy.power_law(3.0))
    assert "iterations from prior 'given'" in found.summary() and "stopped by bias" in found.summary()
    assert found.chi2 < 1 and found.ndf == 20
    np.testing.assert_allclose(np.diag(found.correlation), 1)
    assert found.plot().get_yscale() == "log"
    assert len(found.stopping.plot().lines) >= 5
