import numpy as np
import pytest
from scipy.stats import chi2

from sbi_phys.unfold import Response, ibu
from simulators.auger import load_auger
from simulators.detector import (
    AUGER_SD,
    BinnedDetector,
    CalorimeterResolution,
    ConstantResolution,
    DetectorResponse,
    ExponentialResolution,
    auger_flux,
)
from simulators.errors import SimulatorSettingError


def test_resolution_formulas():
    np.testing.assert_allclose(ExponentialResolution()(np.array([6.6])), 0.078 + 0.16 / np.e)
    np.testing.assert_allclose(CalorimeterResolution(0.3, 0.4, 0.01)(np.array([4.0])), np.sqrt(0.0225 + 0.01 + 0.0001))
    np.testing.assert_allclose(ConstantResolution(0.08)(np.array([1.0, 50.0])), 0.08)


def test_migration_rows_sum_to_efficiency():
    response = DetectorResponse(resolution=ConstantResolution(0.1), lg_efficiency_50=18.5, efficiency_width=0.2)
    true, measured = np.arange(18.0, 19.51, 0.1), np.arange(17.0, 20.51, 0.1)
    rows = response.migration_matrix(true, measured).sum(axis=1)
    inside = true[:-1, None] + 0.1 * (np.arange(50) + 0.5) / 50
    np.testing.assert_allclose(rows, response.efficiency(inside).mean(axis=1), atol=1e-4)


def test_folding_reproduces_the_published_corrections():
    data = load_auger()
    edges = np.round(np.arange(17.5, 21.001, 0.01), 4)
    centres = 0.5 * (edges[1:] + edges[:-1])
    true = auger_flux(centres) * np.diff(10.0**edges)
    folded = AUGER_SD.fold(true, edges, data.spectrum_edges)
    inside = [true[(centres > a) & (centres < b)].sum() for a, b in zip(data.spectrum_edges[:-1], data.spectrum_edges[1:], strict=True)]
    assert np.abs(np.array(inside) / folded / data.unfolding_correction - 1).max() < 0.025
    # without resolution the corrections would be 1, which the published ones reject
    assert np.abs(1 / data.unfolding_correction - 1).max() > 0.05


def test_samples_follow_the_migration_matrix_and_a_wrong_one_is_rejected():
    response = DetectorResponse(resolution=ConstantResolution(0.12), bias=0.05, lg_efficiency_50=18.9, efficiency_width=0.1)
    rng = np.random.default_rng(3)
    true, measured = np.array([18.9, 19.0]), np.arange(18.6, 19.31, 0.05)
    n = 40_000
    drawn = response.sample(rng.uniform(*true, n), rng)
    observed = np.histogram(drawn[np.isfinite(drawn)], measured)[0]
    expected = n * response.migration_matrix(true, measured, n_sub=64)[0]
    lost = n * (1 - response.migration_matrix(true, measured, n_sub=64)[0].sum())
    statistic = np.sum((observed - expected)[expected > 5] ** 2 / expected[expected > 5]) + (n - observed.sum() - lost) ** 2 / lost
    assert chi2.sf(statistic, (expected > 5).sum()) > 1e-3
    wrong = n * response.varied(bias=0.04).migration_matrix(true, measured)[0]
    assert chi2.sf(np.sum((observed - wrong)[wrong > 5] ** 2 / wrong[wrong > 5]), (wrong > 5).sum()) < 1e-6


def test_varied_changes_only_what_is_named():
    varied = AUGER_SD.varied(exposure_factor=2.0, live_fraction=0.5)
    assert varied.exposure == 2 * AUGER_SD.exposure
    assert varied.resolution == AUGER_SD.resolution
    assert varied.live_fraction == 0.5
    assert AUGER_SD.live_fraction == 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"exposure": 0.0}, "exposure is 0.0; expected > 0"),
        ({"bias": 1.0}, "bias is 1.0; expected within"),
        ({"efficiency_width": -1.0}, "efficiency_width is -1.0"),
        ({"live_fraction": 0.0}, "live_fraction is 0.0"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(SimulatorSettingError, match=message):
        DetectorResponse(resolution=ConstantResolution(0.1), **setting)


# --- the same object in simulation and unfolding ------------------------------------------------------------------------------------------

TRUE, MEASURED = np.linspace(18.4, 19.6, 7), np.linspace(18.3, 19.7, 15)


@pytest.fixture
def binned():
    return Response(**AUGER_SD.arrays(TRUE, MEASURED), background=np.full(14, 20.0), fakes=np.full(14, 0.05))


def test_arrays_make_a_response_that_folds_alike():
    response = Response(**AUGER_SD.varied(live_fraction=0.9).arrays(TRUE, MEASURED))
    counts = 1e4 * 10 ** (-2 * (TRUE[:-1] - TRUE[0]))
    np.testing.assert_allclose(response.fold(counts), AUGER_SD.fold(counts, TRUE, MEASURED), rtol=1e-12)
    assert response.exposure == pytest.approx(0.9 * AUGER_SD.exposure)


def test_counts_are_drawn_from_the_response_itself(binned):
    """Mean of many draws against fold, fakes and background included; chi-square is of the size that Poisson counts have."""
    detector, rng = BinnedDetector(binned), np.random.default_rng(5)
    expected = np.array([4000.0, 2000, 900, 400, 150, 60])
    n = 400
    drawn = detector.sample_counts(np.tile(expected, (n, 1)), rng)
    folded = binned.fold(expected)
    np.testing.assert_array_equal(detector.fold(expected), folded)
    assert drawn.shape == (n, 14)
    statistic = ((drawn.mean(axis=0) - folded) ** 2 / (folded / n)).sum()
    assert chi2.sf(statistic, 14) > 1e-3
    wrong = Response(binned.matrix, TRUE, MEASURED).fold(expected)
    assert chi2.sf(((drawn.mean(axis=0) - wrong) ** 2 / (wrong / n)).sum(), 14) < 1e-9
    assert detector.sample_counts(expected, rng).shape == (14,)


def test_events_follow_the_columns_of_the_matrix(binned):
    detector, rng = BinnedDetector(binned), np.random.default_rng(6)
    n = 30_000
    measured = detector.sample(rng.uniform(TRUE[2], TRUE[3], n), rng)
    expected = n * np.append(binned.matrix[:, 2], 1 - binned.efficiency[2])
    observed = np.append(np.histogram(measured, MEASURED)[0], np.isnan(measured).sum())
    keep = expected > 5
    assert chi2.sf(((observed - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum()) > 1e-3
    neighbour = n * np.append(binned.matrix[:, 3], 1 - binned.efficiency[3])
    keep = neighbour > 5
    assert chi2.sf(((observed - neighbour)[keep] ** 2 / neighbour[keep]).sum(), keep.sum()) < 1e-9
    np.testing.assert_array_equal(np.isnan(detector.sample([17.0, 21.0], rng)), True)
    assert detector.sample(np.full((3, 2), 18.9), rng).shape == (3, 2)
    assert np.isfinite(detector.sample(np.full(200, TRUE[-1]), rng)).any()  # the last edge belongs to the last bin


def test_what_is_simulated_with_it_is_unfolded_with_it(binned):
    """One object on both sides: iterative Bayes comes back to the truth."""
    truth = np.array([40_000.0, 20_000, 9000, 4000, 1500, 600])
    counts = BinnedDetector(binned).sample_counts(truth, np.random.default_rng(7))
    found = ibu(counts, binned, 60, truth)
    assert np.abs((found.counts - truth) / found.errors).max() < 3.5


def test_what_is_no_response_is_refused(binned):
    with pytest.raises(SimulatorSettingError, match="response is a ndarray without matrix, truth_edges"):
        BinnedDetector(np.eye(3))
    with pytest.raises(SimulatorSettingError, match="response has no truth_edges"):
        BinnedDetector(Response(np.eye(3)))
