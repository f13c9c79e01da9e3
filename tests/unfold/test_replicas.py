"""Replicas of event weights: each source varied by itself, and covariances with their exact values."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array
from sbi_phys.unfold.replicas import SOURCES, Sample, WeightReplicas, bootstrap

SAMPLE = Sample(simulation=np.arange(1.0, 41.0), data=np.full(30, 2.0), background=np.full(20, 0.5))


def made(n_replicas: int = 4, seed: int = 1) -> tuple[list[tuple[Sample, int]], dict[str, Array]]:
    """What `unfold` was called with, in order, and the result."""
    calls: list[tuple[Sample, int]] = []

    def unfold(sample: Sample, seed: int) -> Array:
        calls.append((sample, seed))
        return sample.simulation * sample.data.sum()

    return calls, bootstrap(unfold, SAMPLE, n_replicas, seed, ("events",), ("networks",))


def weights(**changes: Array) -> WeightReplicas:
    plain = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 5.0, 2.0]])
    given = {"weights": np.array([2.0, 3.0, 2.0]), "truth_pass": np.ones(3, dtype=bool)} | dict.fromkeys(SOURCES, plain)
    return WeightReplicas(**(given | changes))


def test_one_source_is_varied_and_the_others_stay() -> None:
    calls, found = made()
    assert list(found) == list(SOURCES) == ["data", "simulation", "training"]
    for i, (sample, seed) in enumerate(calls):
        source, b = SOURCES[i // 4], i % 4
        assert seed == seed_for(1, "networks", source, b)
        varied = {"data": ("data",), "simulation": ("simulation", "background"), "training": ()}[source]
        for name in Sample._fields:
            counts = getattr(sample, name) / getattr(SAMPLE, name)
            assert np.array_equal(counts, np.round(counts))
            assert (counts == 1).all() == (name not in varied), (source, name)
        assert np.array_equal(found[source][b], sample.simulation * sample.data.sum())
    assert len({seed for _, seed in calls}) == 12


def test_replicas_differ_and_their_seed_repeats_them() -> None:
    _, found = made()
    assert len(np.unique(found["simulation"], axis=0)) == 4
    assert np.array_equal(made()[1]["simulation"], found["simulation"])
    assert not np.array_equal(made(seed=2)[1]["simulation"], found["simulation"])
    # more replicas begin with the same ones
    assert np.array_equal(made(6)[1]["data"][:4], found["data"])


def test_the_variance_of_a_sum_is_the_sum_of_squares() -> None:
    found = bootstrap(lambda sample, seed: sample.simulation, SAMPLE, 4000, 3, ("events",), ("networks",))
    exact = float((SAMPLE.simulation**2).sum())
    replicas = WeightReplicas(weights=SAMPLE.simulation, truth_pass=np.ones(40, dtype=bool), **found)
    covariance = replicas.covariance(np.sum)
    # a variance from 4000 replicas is known to sqrt(2 / 3999) = 2.2 %
    assert covariance.simulation[0, 0] == pytest.approx(exact, rel=0.12)
    assert covariance.data[0, 0] == covariance.training[0, 0] == 0
    assert covariance.values.tolist() == [820.0]


def test_covariances_by_hand() -> None:
    still = np.tile([2.0, 3.0, 2.0], (3, 1))
    found = weights(training=still).covariance(lambda w: [w.sum(), w[1]])
    # sums 6, 6, 9 and second weights 2, 2, 5: deviations (-1, -1, 2) in both
    assert found.data == pytest.approx(np.full((2, 2), 3.0))
    assert found.training.tolist() == [[0, 0], [0, 0]]
    assert found.values.tolist() == [7.0, 3.0]
    assert found.total == pytest.approx(np.full((2, 2), 6.0)) and found.error == pytest.approx([6**0.5, 6**0.5])
    assert weights().n_replicas == 3


@pytest.mark.parametrize(
    ("statistic", "error", "words"),
    [
        (lambda w: np.outer(w, w), ShapeError, r"statistic has shape \(3, 3\); expected a number or \(q,\)"),
        (lambda w: np.log(w - 2.5), NonFiniteError, "statistic has NaN or Inf"),
        (lambda w: 1 / (w.sum() - 6) if w.sum() != 6 else np.inf, NonFiniteError, "statistic of a replica has NaN or Inf"),
        (lambda w: w[w > 1], ShapeError, r"statistic of a replica has shape \(2,\); expected \(3,\), as with all events"),
        (lambda w: "six", DataError, "statistic has dtype"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in log")
def test_bad_statistics(statistic, error, words) -> None:
    with pytest.raises(error, match=words):
        weights().covariance(statistic)


def test_a_histogram_counts_events_with_a_truth_in_bins_closed_on_the_left() -> None:
    found = weights().histogram([0.0, 1.0, 2.0], [0, 1, 2])
    assert found.values.tolist() == [2.0, 5.0]  # the last edge belongs to the last bin
    # first bin 1, 3, 2 and second bin 5, 3, 7
    assert found.data == pytest.approx(np.array([[1.0, -1.0], [-1.0, 4.0]]))
    assert weights().histogram([-0.1, 2.1, 0.5], [0, 1, 2]).values.tolist() == [2.0, 0.0]


def test_events_without_a_truth_are_in_no_bin() -> None:
    some = weights(truth_pass=np.array([True, False, True]))
    for bins in ([-1, 1, 2], [-10, 10]):  # also where a bin holds 0
        found = some.histogram([1.5, np.nan, 0.5], bins)
        assert found.values.sum() == 4.0
    assert found.data.tolist() == [[0.0]]  # 1 + 3, 3 + 1, 2 + 2


@pytest.mark.parametrize(
    ("edges", "error"), [([0.0], DataError), ([0.0, 0.0, 1.0], DataError), ([0.0, np.nan], NonFiniteError), ([[0.0, 1.0]], ShapeError)]
)
def test_bad_edges(edges, error) -> None:
    with pytest.raises(error, match="edges"):
        weights().histogram([0.0, 1.0, 2.0], edges)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [([0.0, 1.0], ShapeError, r"values has shape \(2,\); expected \(3,\)"), ([0.0, np.nan, 1.0], NonFiniteError, "values has NaN")],
)
def test_bad_values(values, error, words) -> None:
    with pytest.raises(error, match=words):
        weights().histogram(values, [0, 1])
