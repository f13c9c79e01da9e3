import sys

import numpy as np
import pytest
from scipy.integrate import quad

from sbi_phys.core.errors import SbiPhysError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold import Response, forward_fold
from sbi_phys.unfold.folding import bin_integral, broken_power_law, parameter_names

TRUTH_EDGES, RECO_EDGES = np.linspace(18.0, 20.6, 27), np.linspace(18.4, 20.2, 19)
EXPOSURE = 6e4
POWER = np.array([-17.9, 3.0])
BROKEN = np.array([-17.9, 3.3, 2.5, 3.1, 18.7, 19.1])


def response(**extra):
    return Response.from_resolution(TRUTH_EDGES, RECO_EDGES, 0.08, spectrum_index=3.0, exposure=EXPOSURE, **extra)


def expected(theta, made):
    return made.fold(EXPOSURE * bin_integral(broken_power_law, TRUTH_EDGES, theta))


def test_the_flux_as_written():
    x = np.linspace(18, 20, 9)
    j0, g1, g2, g3, e1, e2 = BROKEN
    energy = 10**x
    by_hand = 10**j0 * (energy / 10**18.5) ** -g1
    by_hand *= (1 + (energy / 10**e1) ** 20) ** ((g1 - g2) * 0.05) * (1 + (energy / 10**e2) ** 20) ** ((g2 - g3) * 0.05)
    np.testing.assert_allclose(broken_power_law(x, BROKEN), by_hand, rtol=1e-10)
    assert parameter_names(2) == ("lg_j0", "gamma_1", "gamma_2", "gamma_3", "lg_e_1", "lg_e_2")


def test_bins_are_integrated_as_quadrature_does():
    found = bin_integral(broken_power_law, TRUTH_EDGES, BROKEN)
    for i in (3, 6, 7, 11, 20):
        value = quad(lambda x: broken_power_law(np.array([x]), BROKEN)[0] * 10**x * np.log(10), TRUTH_EDGES[i], TRUTH_EDGES[i + 1])[0]
        assert found[i] == pytest.approx(value, rel=1e-8)
    low, high = 10.0 ** TRUTH_EDGES[:-1], 10.0 ** TRUTH_EDGES[1:]
    exact = 10.0 ** (POWER[0] + 3 * 18.5) * (low**-2 - high**-2) / 2
    np.testing.assert_allclose(bin_integral(broken_power_law, TRUTH_EDGES, POWER), exact, rtol=1e-10)


@pytest.mark.parametrize(("theta", "start"), [(POWER, None), (BROKEN, BROKEN + np.array([0.1, -0.1, 0.1, 0.1, 0.05, -0.05]))])
def test_expected_counts_give_back_flux_and_corrections(theta, start):
    pytest.importorskip("iminuit")
    made = response(background=np.full(18, 4.0))
    counts = expected(theta, made)
    found = forward_fold(counts, made, n_breaks=theta.size // 2 - 1, start=start)
    assert (np.abs(found.values - theta) < 0.05 * found.errors + 1e-6).all()
    np.testing.assert_allclose(found.counts, EXPOSURE * bin_integral(broken_power_law, RECO_EDGES, theta), rtol=2e-3)
    np.testing.assert_allclose(found.refolded, counts, rtol=2e-3)
    assert found.chi2 < 0.05 and found.ndf == 18 - theta.size


def test_the_covariance_is_that_of_toys_and_the_pulls_are_right():
    pytest.importorskip("iminuit")
    made = response()
    counts, truth = expected(POWER, made), EXPOSURE * bin_integral(broken_power_law, RECO_EDGES, POWER)
    rng = rng_for(0, "folding")
    fits = [forward_fold(rng.poisson(counts), made) for _ in range(80)]
    pulls = np.array([(f.values - POWER) / f.errors for f in fits])
    assert np.abs(pulls.mean(axis=0)).max() < 0.45 and 0.75 < pulls.std(axis=0).min() <= pulls.std(axis=0).max() < 1.25
    quoted = forward_fold(counts, made)
    spread = np.std([f.counts for f in fits], axis=0)
    many = counts > 20
    np.testing.assert_allclose(spread[many], np.sqrt(np.diag(quoted.covariance))[many], rtol=0.3)
    assert np.abs(np.mean([f.counts for f in fits], axis=0) - truth)[many].max() < 0.5 * spread.max()


def test_the_jacobian_agrees_with_fits_to_moved_counts():
    pytest.importorskip("iminuit")
    made = response()
    counts = expected(POWER, made)
    found = forward_fold(counts, made)
    for k in (0, 6):
        move = np.zeros(18)
        move[k] = 0.05 * counts[k]
        up, down = forward_fold(counts + move, made), forward_fold(counts - move, made)
        difference = (up.counts - down.counts) / (2 * move[k])
        np.testing.assert_allclose(found.jacobian[:, k], difference, atol=0.02 * np.abs(difference).max())


def test_minos_errors_flux_band_and_words():
    pytest.importorskip("iminuit")
    found = forward_fold(rng_for(3, "minos").poisson(expected(POWER, response())), response(), minos=True)
    np.testing.assert_allclose(found.minos[:, 1], found.errors, rtol=0.1)
    np.testing.assert_allclose(-found.minos[:, 0], found.errors, rtol=0.1)
    assert "gamma_1" in found.summary() and "Minos" in found.summary()
    value, error = found.band([18.5, 19.0])
    assert value[0] == pytest.approx(10 ** found.values[0]) and (error > 0).all() and (error < 0.1 * value).all()
    np.testing.assert_allclose(found.flux[0], found.counts[0] / (EXPOSURE * (10.0**18.5 - 10.0**18.4)), rtol=1e-9)
    assert found.plot().get_yscale() == "log"


def test_a_flux_of_ones_own():
    pytest.importorskip("iminuit")
    made = response()
    found = forward_fold(
        expected(POWER, made), made, flux=lambda x, t: 10 ** (t[0] - t[1] * (x - 18.5)), start=[-17.8, 2.9], names=["norm", "slope"]
    )
    assert (np.abs(found.values - POWER) < 0.05 * found.errors).all()
    assert found.names == ("norm", "slope")


def test_without_iminuit_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "iminuit", None)
    with pytest.raises(SbiPhysError, match="pip install iminuit"):
        forward_fold(expected(POWER, response()), response())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"counts": np.ones(3)}, ShapeError, "counts has shape"),
        ({"response": Response(np.full((18, 26), 0.01), exposure=1.0)}, SettingError, "response has no edges"),
        ({"response": Response.from_resolution(TRUTH_EDGES, RECO_EDGES, 0.1)}, SettingError, "exposure is not given"),
        ({"exposure": -1.0}, SettingError, "exposure is -1"),
        ({"n_breaks": 2}, SettingError, "start is None; .*lg_e_2"),
        ({"n_breaks": 1, "start": [1.0, 2.0]}, ShapeError, "start has 2 values; expected 4"),
        ({"flux": broken_power_law}, SettingError, "both start and names"),
        ({"names": ["a", "b"]}, SettingError, "names is given without a flux"),
        ({"n_breaks": 9, "start": np.ones(20)}, SettingError, "20 parameters for 18 bins"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        forward_fold(**({"counts": expected(POWER, response()), "response": response()} | change))
