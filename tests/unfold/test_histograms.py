"""Histograms of other libraries as counts and as results; the protocol itself needs none of them."""

import sys

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, SbiPhysError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold import Response, forward_fold, ibu, tikhonov
from sbi_phys.unfold.bayes import bayesian_unfold
from sbi_phys.unfold.histograms import counts_of, edges_of, is_histogram, to_hist

EDGES = np.array([18.5, 18.6, 18.7, 18.8, 18.9, 19.1])
RESPONSE = Response.from_resolution(EDGES, EDGES, 0.05, exposure=10.0)
COUNTS = np.array([900.0, 500.0, 300.0, 150.0, 120.0])


class Axis(list):
    """What UHI asks of an axis: a length and items."""


class Plain:
    """The smallest histogram that UHI allows."""

    kind = "COUNT"

    def __init__(self, edges, values, variances=None, **changes):
        self.axes = (Axis(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)),)
        self._values, self._variances = np.asarray(values, dtype=float), variances
        for name, value in changes.items():
            setattr(self, name, value)

    def values(self):
        return self._values

    def variances(self):
        return self._variances


@pytest.fixture
def bh():
    return pytest.importorskip("boost_histogram")


def test_an_array_passes_through():
    counts, covariance = counts_of(COUNTS, RESPONSE)
    assert counts is COUNTS and covariance is None
    assert not is_histogram(COUNTS) and not is_histogram([1, 2]) and is_histogram(Plain(EDGES, COUNTS))


def test_protocol_alone_is_enough():
    """Plain counts have no covariance, weighted ones that of their variances; ibu sees the difference."""
    counts, covariance = counts_of(Plain(EDGES, COUNTS, COUNTS.copy()), RESPONSE)
    np.testing.assert_array_equal(counts, COUNTS)
    assert covariance is None
    np.testing.assert_array_equal(edges_of(Plain(EDGES, COUNTS)), EDGES)
    _, covariance = counts_of(Plain(EDGES, COUNTS, 2 * COUNTS), RESPONSE)
    np.testing.assert_array_equal(covariance, np.diag(2 * COUNTS))
    plain, weighted = (ibu(Plain(EDGES, COUNTS, v), RESPONSE) for v in (COUNTS, 2 * COUNTS))
    np.testing.assert_allclose(weighted.errors, np.sqrt(2) * plain.errors)


@pytest.mark.parametrize("unfold", [ibu, tikhonov, lambda c, r: bayesian_unfold(c, r, n_draws=200)])
def test_filled_histogram_gives_the_answer_of_its_array(bh, unfold):
    events = rng_for(0, "events").uniform(18.4, 19.2, 4000)
    histogram = bh.Histogram(bh.axis.Variable(EDGES))
    histogram.fill(events)
    array = np.histogram(events, EDGES)[0]
    one, other = unfold(histogram, RESPONSE), unfold(array, RESPONSE)
    np.testing.assert_array_equal(one.measured, array)
    np.testing.assert_array_equal(one.counts, other.counts)
    back = one.to_hist()
    np.testing.assert_allclose(back.values(), one.counts)
    np.testing.assert_allclose(back.variances(), np.diag(one.covariance))
    np.testing.assert_allclose(back.axes[0].edges, EDGES)


def test_weighted_fill_uses_its_variances(bh):
    rng = rng_for(1, "events")
    events, weights = rng.uniform(18.5, 19.1, 5000), rng.uniform(0.2, 3, 5000)
    histogram = bh.Histogram(bh.axis.Variable(EDGES), storage=bh.storage.Weight())
    histogram.fill(events, weight=weights)
    variance = np.histogram(events, EDGES, weights=weights**2)[0]
    found = bayesian_unfold(histogram, RESPONSE, n_draws=1000)
    explicit = bayesian_unfold(histogram.values(), RESPONSE, counts_covariance=np.diag(variance), n_draws=1000)
    np.testing.assert_allclose(found.counts, explicit.counts, rtol=1e-9)
    assert ibu(histogram, RESPONSE).errors == pytest.approx(ibu(histogram.values(), RESPONSE, counts_covariance=np.diag(variance)).errors)
    with pytest.raises(SettingError, match="weighted histogram; expected plain counts"):
        forward_fold(histogram, RESPONSE)


def test_forward_fold_takes_one(bh):
    pytest.importorskip("iminuit")
    histogram = bh.Histogram(bh.axis.Variable(EDGES))
    histogram[...] = COUNTS
    one, other = forward_fold(histogram, RESPONSE), forward_fold(COUNTS, RESPONSE)
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_allclose(one.to_hist().values(), one.counts)


def test_hist_library():
    hist = pytest.importorskip("hist")
    histogram = hist.Hist.new.Variable(EDGES).Double()
    histogram[...] = COUNTS
    found = ibu(histogram, RESPONSE)
    np.testing.assert_array_equal(found.measured, COUNTS)
    assert isinstance(found.to_hist(), hist.Hist)
    assert found.to_hist().sum().value == pytest.approx(found.counts.sum())


def test_without_hist_it_is_a_boost_histogram(bh, monkeypatch):
    monkeypatch.setitem(sys.modules, "hist", None)
    out = to_hist(EDGES, COUNTS)
    assert type(out) is bh.Histogram
    np.testing.assert_array_equal(out.variances(), np.zeros(5))


def test_without_either_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "boost_histogram", None)
    with pytest.raises(SbiPhysError, match="needs boost-histogram, which is not installed; expected `pip install hist`"):
        to_hist(EDGES, COUNTS)


@pytest.mark.parametrize(
    ("histogram", "error", "message"),
    [
        (Plain(EDGES + 0.01, COUNTS), DataError, r"edge 0 at 18.51 where reco_edges has 18.5 \(6 of 6 differ\)"),
        (Plain(10 ** (EDGES - 18), COUNTS), DataError, "expected the same bins, in the same unit"),
        (Plain(EDGES[:-1], COUNTS[:-1]), ShapeError, "histogram has 4 bins; expected 5"),
        (Plain(EDGES, COUNTS, axes=(Axis(), Axis())), ShapeError, "histogram has 2 axes; expected 1"),
        (Plain(EDGES, COUNTS, axes=(Axis("abcde"),)), DataError, "bins such as 'a'; expected intervals"),
        (Plain(EDGES, COUNTS, axes=(Axis([(0, 1), (1, 2), (2.5, 3), (3, 4), (4, 5)]),)), DataError, "gap between bin 1"),
        (Plain(EDGES, COUNTS, kind="MEAN"), DataError, "kind MEAN; expected COUNT"),
        (Plain(EDGES, COUNTS, np.array([1.0, 2, 0, 3, 4])), DataError, r"variance 0 in reco bin 2 \[18.7, 18.8\)"),
        (Plain(EDGES, -COUNTS, -COUNTS), DataError, "counts is -900 at reco bin 0"),
    ],
)
def test_bad_histograms_are_named(histogram, error, message):
    with pytest.raises(error, match=message):
        ibu(histogram, RESPONSE)


def test_results_without_edges_have_no_axis():
    with pytest.raises(SettingError, match="no truth edges"):
        ibu([3.0, 4.0], np.eye(2)).to_hist()


def test_weights_without_variances_are_refused(bh):
    """A storage of plain doubles keeps sum w alone: Poisson errors would be too small by the weight."""
    events = rng_for(3, "weighted").uniform(18.4, 19.2, 3000)
    lost, kept = (bh.Histogram(bh.axis.Variable(EDGES), storage=s) for s in (bh.storage.Double(), bh.storage.Weight()))
    for histogram in (lost, kept):
        histogram.fill(events, weight=7.0)
    with pytest.raises(DataError, match=r"keeps no variances.*hist.storage.Weight\(\)"):
        ibu(lost, RESPONSE)
    with pytest.raises(DataError, match="keeps no variances"):
        forward_fold(lost, Response.from_resolution(EDGES, EDGES, resolution=0.05, exposure=1.0))
    variances = kept.variances()
    one, other = ibu(kept, RESPONSE), ibu(lost, RESPONSE, counts_covariance=np.diag(variances))
    np.testing.assert_allclose(one.errors, other.errors)
    np.testing.assert_allclose(variances, 7 * kept.values())
