"""Event-wise ranks against exact two-dimensional Gaussian posteriors, and posteriors that are wrong in one way each."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold.validate_pit import event_pit

PRIOR = np.array([[1.0, 0.6], [0.6, 1.0]])
NOISE = 0.5 * np.array([[1.0, 0.4], [0.4, 1.0]])


def events(n: int, seed: int, *, shift: float = 0.0, width: float = 1.0, correlated: bool = True) -> tuple[np.ndarray, ...]:
    """Truths, exact draws (spoilt as asked) and reco of n events."""
    rng = rng_for(seed, "events")
    truth = rng.multivariate_normal(np.zeros(2), PRIOR, n)
    reco = truth + rng.multivariate_normal(np.zeros(2), NOISE, n)
    gain = PRIOR @ np.linalg.inv(PRIOR + NOISE)
    covariance = PRIOR - gain @ PRIOR
    if not correlated:
        covariance = np.diag(np.diag(covariance))
    draws = (reco @ gain.T)[:, None] + shift + width * rng.multivariate_normal(np.zeros(2), covariance, (n, 99))
    return truth, draws, reco


def test_the_exact_posterior_passes() -> None:
    found = event_pit(*events(1500, 0), names=["energy", "depth"])
    assert found.pvalue > 0.01
    assert found.sbc.names == ("energy", "depth", "energy x depth") and found.regression is not None
    assert "SBC" in found.summary() and found.plot() is not None


def test_size() -> None:
    assert sum(event_pit(*events(300, 10 + s)[:2]).pvalue <= 0.05 for s in range(20)) <= 4


@pytest.mark.parametrize("wrong", [{"shift": 0.2}, {"width": 0.8}, {"width": 1.3}])
def test_wrong_posteriors_are_found(wrong) -> None:
    assert event_pit(*events(1500, 1, **wrong)[:2]).pvalue < 1e-3


def test_right_marginals_of_events_without_their_correlation_are_found() -> None:
    """Each quantity's ranks are uniform; only their product tells."""
    found = event_pit(*events(3000, 2, correlated=False)[:2])
    assert min(found.sbc.pvalues["truth_0"], found.sbc.pvalues["truth_1"]) > 0.01
    assert found.sbc.pvalues["truth_0 x truth_1"] < 1e-4 and found.pvalue < 1e-3


def test_wrong_in_places_is_found_with_reco() -> None:
    """Shifted up where reco is positive and down where it is negative: on average over events there is no shift."""
    truth, draws, reco = events(1500, 3)
    moved = draws + 0.25 * np.sign(reco[:, None, :1])
    assert event_pit(truth, moved, reco).regression.pvalue < 1e-4


def test_one_dimension_and_bad_input() -> None:
    truth, draws, reco = events(200, 4)
    found = event_pit(truth[:, 0], draws[:, :, 0])
    assert found.sbc.names == ("truth_0",) and found.regression is None
    with pytest.raises(ShapeError, match="draws has shape"):
        event_pit(truth, draws[:100])
    with pytest.raises(DataError, match="expected at least 10"):
        event_pit(truth[:5], draws[:5])
    with pytest.raises(ShapeError, match="x has shape"):
        event_pit(truth, draws, reco[:50])
