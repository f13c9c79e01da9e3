"""The generative model of smooth spectra: its prior is that of Bayesian unfolding, and a network trained on it has the same posterior."""

import numpy as np
import pytest
from scipy.stats import chi2

from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.simulation.protocol import check_simulator, load_simulator
from sbi_phys.store.identity import simulator_identity
from sbi_phys.unfold import Response
from sbi_phys.unfold.bayes import bayesian_unfold
from sbi_phys.unfold.spectrum import SpectrumModel, SpectrumPrior

EDGES = np.arange(6.0)
RESPONSE = Response.from_resolution(EDGES, EDGES, 0.5, efficiency=0.8)
REFERENCE = 400 * np.exp(-0.5 * np.arange(5.0))
SETTINGS = {"smoothness": 5.0, "level_sd": 0.5, "tilt_sd": 0.5}


def test_spectra_have_the_priors_covariance():
    model = SpectrumModel(RESPONSE, REFERENCE, **SETTINGS)
    x = np.log(model.spectrum(model.prior.sample(40_000, rng_for(0, "spectra"))) / REFERENCE)
    precision = SpectrumPrior.build(REFERENCE, EDGES, **SETTINGS).precision(-np.log(5.0))
    distance = ((x @ precision) * x).sum(axis=1)
    assert distance.mean() == pytest.approx(5, abs=0.06)
    assert (distance > chi2.isf(0.05, 5)).mean() == pytest.approx(0.05, abs=0.006)
    assert x.mean(axis=1).std() == pytest.approx(0.5, rel=0.03)
    assert np.diff(x, n=2, axis=1).std() == pytest.approx(0.2, rel=0.03)


def test_it_is_a_simulator():
    model = SpectrumModel(Response(RESPONSE.matrix, background=np.full(5, 3.0)), REFERENCE)
    check_simulator(model, n_simulations=4)
    identity = simulator_identity(model)
    again = load_simulator(identity["class"], identity["settings"])
    theta = model.prior.sample(50, rng_for(1, "theta"))
    np.testing.assert_array_equal(again.spectrum(theta), model.spectrum(theta))
    np.testing.assert_array_equal(again.simulate(theta, rng_for(2, "x")), model.simulate(theta, rng_for(2, "x")))
    many = np.repeat(theta[:1], 4000, axis=0)
    mean = model.simulate(many, rng_for(3, "x")).mean(axis=0)
    expected = model.response.fold(model.spectrum(theta[:1]))[0]
    assert np.abs((mean - expected) / np.sqrt(expected / 4000)).max() < 4.5


def test_bad_input():
    with pytest.raises(SettingError, match="response is a ndarray; expected a Response"):
        SpectrumModel(RESPONSE.matrix, REFERENCE)
    with pytest.raises(DataError, match="prior is 0 at truth bin 1"):
        SpectrumModel(RESPONSE, [1, 0, 1, 1, 1])
    with pytest.raises(SettingError, match="smoothness is 0"):
        SpectrumModel(RESPONSE, REFERENCE, smoothness=0)
    with pytest.raises(SettingError, match="did you mean 'matrix'"):
        SpectrumModel({"matrx": [[1.0]]}, REFERENCE)


@pytest.mark.slow
def test_neural_posterior_is_that_of_the_chains():
    """One network for all histograms, against chains for three of them: means within 0.15 sd, widths within 15 %."""
    from sbi_phys.estimators.npe import NPE

    model = SpectrumModel(RESPONSE, REFERENCE, **SETTINGS)
    rng = rng_for(4, "train")
    theta = model.prior.sample(20_000, rng)
    npe = NPE(model.prior, seed=0, observables=model.observables, device="cpu").fit(theta, model.simulate(theta, rng))
    for i, w in enumerate(([0, 0, 0, 0, 0], [1, -1, 0.5, 0, 1], [-1.2, 0.8, 1, -1, 0])):
        counts = model.simulate(np.array([w], dtype=float), rng_for(5, "data", i))[0]
        exact = np.log(bayesian_unfold(counts, RESPONSE, reference=REFERENCE, n_draws=4000, seed=i, **SETTINGS).samples)
        learned = np.log(model.spectrum(npe.sample(counts, 4000, seed=i)))
        assert np.abs((learned.mean(axis=0) - exact.mean(axis=0)) / exact.std(axis=0)).max() < 0.15
        np.testing.assert_allclose(learned.std(axis=0) / exact.std(axis=0), 1, atol=0.15)
