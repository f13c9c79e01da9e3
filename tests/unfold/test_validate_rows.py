"""p-values of the tests that toys decide: exact at the bound, and smaller only beyond it."""

import numpy as np
import pytest
from scipy.stats import binom, t

from sbi_phys.core.rng import rng_for
from sbi_phys.unfold.validate_rows import Criteria, toy_checks
from sbi_phys.unfold.validate_toys import Toys
from tests.unfold import validate_oracle as oracle


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
