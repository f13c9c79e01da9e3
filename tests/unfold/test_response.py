import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold.response import Response, as_response

EDGES = np.array([0.0, 1.0, 2.0, 4.0])


def test_resolution_is_integrated_as_quadrature_does():
    index, sigma, shift = 2.5, (lambda x: 0.1 + 0.02 * x), (lambda x: 0.05 - 0.01 * x)
    turn = lambda x: 0.5 + 0.1 * x  # noqa: E731
    made = Response.from_resolution(EDGES, [0.5, 1.5, 3.0, 5.0], sigma, shift, turn, spectrum_index=index)
    for mu in range(3):
        weight = lambda x: 10 ** ((1 - index) * x)  # noqa: E731
        norm = quad(weight, EDGES[mu], EDGES[mu + 1], epsabs=0, epsrel=1e-12)[0]
        for j, (low, high) in enumerate([(0.5, 1.5), (1.5, 3.0), (3.0, 5.0)]):
            inside = lambda x: ndtr((high - x - shift(x)) / sigma(x)) - ndtr((low - x - shift(x)) / sigma(x))  # noqa: B023, E731
            steps = [e for e in (low, high) if EDGES[mu] < e < EDGES[mu + 1]] or None
            value = quad(lambda x: weight(x) * turn(x) * inside(x), EDGES[mu], EDGES[mu + 1], points=steps, epsabs=1e-13, limit=200)[0]  # noqa: B023
            assert made.matrix[j, mu] == pytest.approx(value / norm, rel=1e-8, abs=1e-10)


def test_a_power_law_fills_the_truth_bins_as_its_integral_does():
    made = Response.from_resolution(EDGES, EDGES, 0.3, spectrum_index=2.0)
    content = 10.0 ** -EDGES[:-1] - 10.0 ** -EDGES[1:]
    np.testing.assert_allclose(made.truth, content / content.sum(), rtol=1e-10)
    assert Response.from_resolution(EDGES, EDGES, 0.3).truth is None


def test_far_tails_keep_their_digits():
    made = Response.from_resolution([0.0, 0.001], [0.0, 8.0, 9.0], 1.0)
    assert made.matrix[1, 0] == pytest.approx(ndtr(-8.0) - ndtr(-9.0), rel=0.01)


def test_pairs_by_hand():
    truth = [0.5, 0.5, 0.5, 1.5, 1.5, 9.0, np.nan, 1.5]
    reco = [0.5, 1.5, np.nan, 1.5, 0.5, 0.5, 0.5, 1.5]
    made = Response.from_pairs(
        truth,
        reco,
        [0, 1, 2],
        [0, 1, 2],
        weights=[1, 2, 1, 1, 1, 1, 1, 2],
        reco_pass=[1, 1, 0, 1, 1, 1, 1, 1],
        truth_pass=[1, 1, 1, 1, 1, 1, 0, 1],
    )
    np.testing.assert_allclose(made.matrix, [[1 / 4, 1 / 4], [2 / 4, 3 / 4]])
    np.testing.assert_allclose(made.efficiency, [3 / 4, 1])
    np.testing.assert_allclose(made.fakes, [2 / 4, 0])  # beyond the truth edges, and without truth
    np.testing.assert_allclose(made.n_simulated, [16 / 6, 16 / 6])
    np.testing.assert_allclose(made.fold(made.truth), [4, 5])


def test_pairs_agree_with_the_integral_within_their_own_errors():
    rng = rng_for(3, "pairs")
    truth = rng.uniform(0, 4, 40_000)
    reco = truth + 0.3 * rng.standard_normal(truth.size)
    seen = rng.random(truth.size) < 0.8
    filled = Response.from_pairs(truth, reco, EDGES, EDGES, reco_pass=seen)
    exact = Response.from_resolution(EDGES, EDGES, 0.3, efficiency=0.8)
    error = np.sqrt(exact.matrix * (1 - exact.matrix) / filled.n_simulated)
    pulls = ((filled.matrix - exact.matrix) / error)[exact.matrix > 1e-3]
    assert np.abs(pulls).max() < 4
    assert filled.fakes.max() == 0


def test_noise_of_the_matrix_is_multinomial():
    rng = rng_for(0, "noise")
    response = Response(np.array([[0.5, 0.1], [0.2, 0.6], [0.1, 0.1]]), n_simulated=np.array([50.0, 80.0]))
    sensitivity = rng.standard_normal((4, 3, 2))
    expected = np.zeros((4, 4))
    for mu in range(2):
        p = response.matrix[:, mu]
        block = (np.diag(p) - np.outer(p, p)) / response.n_simulated[mu]
        expected += sensitivity[:, :, mu] @ block @ sensitivity[:, :, mu].T
    np.testing.assert_allclose(response.propagate(sensitivity), expected, atol=1e-14)
    assert not as_response(response.matrix).propagate(sensitivity).any()
    with pytest.raises(ShapeError, match="sensitivity"):
        response.propagate(sensitivity[:, :2])


def test_drawn_counts_have_the_folded_mean_and_the_right_variance():
    response = Response(np.array([[0.6, 0.2], [0.1, 0.7]]), fakes=np.array([0.1, 0.0]), background=np.array([3.0, 5.0]))
    rng = rng_for(1, "draws")
    truth = np.array([40, 60])
    drawn = np.array([response.sample(truth, rng) for _ in range(4000)])
    expected = response.fold(truth)
    binomial = (response.matrix * (1 - response.matrix)) @ truth
    variance = binomial + expected - response.matrix @ truth
    np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=4 * np.sqrt(variance / 4000).max())
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.12)
    assert drawn.dtype == np.int64
    with pytest.raises(DataError, match="fractions"):
        response.sample([0.5, 1], rng)


def test_purity_stability_and_condition():
    response = Response(np.array([[0.6, 0.2], [0.2, 0.6]]), truth=np.array([3.0, 1.0]))
    np.testing.assert_allclose(response.purity, [1.8 / 2.0, 0.6 / 1.2])
    np.testing.assert_allclose(response.stability, [0.75, 0.75])
    assert response.condition_number == pytest.approx(2)
    with pytest.raises(SettingError, match="purity needs the same"):
        _ = Response(np.full((3, 2), 0.2)).purity


def test_spectra_fold_in_batches_and_the_response_is_read_only():
    response = Response(np.array([[0.6, 0.2], [0.2, 0.6]]), background=np.array([1.0, 0.0]))
    batch = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(response.fold(batch), [response.fold(row) for row in batch])
    np.testing.assert_allclose(response.with_background([0, 0]).fold([1, 2]), [1.0, 1.4])
    with pytest.raises(ValueError, match="read-only"):
        response.matrix[0, 0] = 1
    with pytest.raises(ShapeError, match="truth_counts"):
        response.fold([1, 2, 3])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(30, 200))
def test_what_is_filled_folds_back_to_what_was_reconstructed(seed, n):
    rng = np.random.default_rng(seed)
    truth = np.concatenate([[0.5, 1.5, 3.0], rng.uniform(-1, 5, n)])
    reco = np.concatenate([[0.5, 1.5, 3.0], truth[3:] + rng.normal(0, 0.5, n)])
    weights = rng.uniform(0.1, 2, n + 3)
    filled = Response.from_pairs(truth, reco, EDGES, EDGES, weights)
    np.testing.assert_allclose(filled.fold(filled.truth), np.histogram(reco, EDGES, weights=weights)[0], rtol=1e-9)
    assert (filled.efficiency <= 1 + 1e-12).all() and (filled.n_simulated > 0).all()


@pytest.mark.parametrize(
    ("matrix", "extra", "error", "words"),
    [
        ([[0.5, 0.0], [0.5, 0.0]], {}, DataError, "truth bin 1 is an empty column"),
        ([[0.5, 0.5], [0.0, 0.0]], {}, DataError, "reco bin 1 is an empty row"),
        ([[0.5, 0.7], [0.5, 0.7]], {}, DataError, "truth bin 1 has a column sum .* above 1: 1.4"),
        ([[0.5, -0.1], [0.5, 0.5]], {}, DataError, "response matrix is -0.1 at index"),
        ([[0.5, np.nan], [0.5, 0.5]], {}, NonFiniteError, "response matrix"),
        ([0.5, 0.5], {}, ShapeError, "response matrix has shape"),
        (np.zeros((0, 3)), {}, ShapeError, "at least one bin"),
        ([[0.5, 0.0], [0.5, 0.0]], {"truth_edges": [1, 2, 3]}, DataError, r"truth bin 1 \[2, 3\)"),
        ([[0.5], [0.5]], {"reco_edges": [0, 1]}, ShapeError, "reco_edges"),
        ([[0.5], [0.5]], {"reco_edges": [0, 2, 1]}, DataError, "strictly increasing"),
        ([[0.5], [0.5]], {"fakes": [0.1, 1.0]}, DataError, "fakes is 1 in reco bin 1"),
        ([[0.5], [0.5]], {"background": [-1, 1.0]}, DataError, "background is -1"),
        ([[0.5], [0.5]], {"n_simulated": [0.0]}, DataError, "n_simulated is 0"),
        ([[0.5], [0.5]], {"exposure": 0.0}, SettingError, "exposure"),
    ],
)
def test_a_wrong_response_is_refused(matrix, extra, error, words):
    with pytest.raises(error, match=words):
        Response(np.asarray(matrix), **extra)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weights": [1, 1, -1]}, DataError, "weights sum to -1 in truth bin 2"),
        ({"truth": [0.5, np.nan, 3]}, NonFiniteError, "truth of events that pass"),
        ({"reco": [0.5, 1.5]}, ShapeError, "rows differ"),
        ({"truth": [0.5, 0.6, 0.7]}, DataError, r"no simulated events in truth bin 1 \[1, 2\)"),
        ({"reco": [50, 60, 70]}, DataError, "no overlap"),
        ({"reco_pass": [0, 1, 2]}, DataError, "reco_pass has values other than"),
        ({"reco_pass": [1, 1, 0]}, DataError, r"truth bin 2 \[2, 4\) is an empty column"),
    ],
)
def test_wrong_pairs_are_refused(change, error, words):
    pairs = {"truth": [0.5, 1.5, 3], "reco": [0.5, 1.5, 3], "truth_edges": EDGES, "reco_edges": EDGES}
    with pytest.raises(error, match=words):
        Response.from_pairs(**(pairs | change))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"resolution": 0.0}, DataError, "resolution is 0"),
        ({"resolution": lambda x: x[:2]}, ShapeError, "resolution gives shape"),
        ({"efficiency": 1.2}, DataError, "efficiency is 1.2"),
        ({"efficiency": [0.5, 0.5]}, ShapeError, "efficiency has shape"),
        ({"bias": np.nan}, NonFiniteError, "bias"),
        ({"resolution": 1e-9}, DataError, "times smaller than a truth bin"),
    ],
)
def test_a_wrong_resolution_is_refused(change, error, words):
    given_ = {"truth_edges": EDGES, "reco_edges": EDGES, "resolution": 0.3}
    with pytest.raises(error, match=words):
        Response.from_resolution(**(given_ | change))


def test_the_plot_has_matrix_and_efficiency():
    ax = Response.from_resolution(EDGES, EDGES, 0.3, efficiency=[0.5, 0.7, 0.9]).plot()
    assert len(ax.collections) == 1
    assert ax.get_xlim() == (0, 4)


def test_signed_weights_give_the_matrix_of_their_expectation():
    """Weights +1 and -1 of which the sum of every bin is positive: the matrix agrees with that of unit weights within its errors."""
    rng, edges = rng_for(6, "signed"), np.linspace(-2, 2, 9)
    truth = rng.uniform(-2, 2, 20_000)
    reco = truth + 0.3 * rng.standard_normal(truth.size)
    weights = np.where(rng.random(truth.size) < 0.2, -1.0, 1.0)
    truth, reco, weights = (np.append(a, v) for a, v in ((truth, -1.9), (reco, 1.9), (weights, -1.0)))  # one event alone in its bin
    with pytest.warns(RuntimeWarning, match=r"signed weights sum to less than 0 in \d+ of 64 bins of the response"):
        signed = Response.from_pairs(truth, reco, edges, edges, weights=weights)
    plain = Response.from_pairs(truth, reco, edges, edges)
    np.testing.assert_allclose(signed.matrix, plain.matrix, atol=5 * np.sqrt(0.5 / (2500 * 0.6**2)))
    np.testing.assert_allclose(signed.truth, 0.6 * plain.truth, rtol=0.12)
    assert (signed.n_simulated < 0.5 * plain.n_simulated).all()
    with pytest.raises(DataError, match="sigma below 0; expected a positive sum"):
        Response.from_pairs(truth, reco, edges, edges, weights=np.where(np.abs(truth - reco) > 0.3, -1.0, 1.0))
