import warnings

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, SettingError, ShapeError, SimulatorMismatchError, SupportError
from sbi_phys.priors import BoxPrior, NormalPrior, Observable, Parameter
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.reweighting import ReweightWarning, reweight
from tests.toys import LinearGaussian


class Box(LinearGaussian):
    """LinearGaussian on a box."""

    def __init__(self):
        super().__init__(dim=2)
        self.settings = {}
        self.prior = BoxPrior([Parameter("t0", 1, 3), Parameter("t1", 1, 3)])
        self.parameters = self.prior.parameters
        self.observables = (Observable("x", 2),)


@pytest.fixture(scope="module")
def normal(tmp_path_factory):
    return simulate(LinearGaussian(2), 20_000, tmp_path_factory.mktemp("normal"), seed=1, workers=1)


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    return simulate(Box(), 5_000, tmp_path_factory.mktemp("box"), seed=2, workers=1)


def test_weights_are_the_ratio_and_the_effective_size_is_as_calculated(normal):
    new = NormalPrior(normal.parameters, mean=0.3, sd=0.8)
    found = reweight(normal, new)
    theta = normal.read()[0]
    ratio = np.exp(new.log_prob(theta) - normal.prior.log_prob(theta))
    np.testing.assert_allclose(found.weights, ratio / ratio.mean(), rtol=1e-10)
    # E[w^2] of N(m, s^2) over N(0, 1), one dimension: exp(m^2 / (2 - s^2)) / (s sqrt(2 - s^2))
    m, s = 0.3, 0.8
    expected = (s * np.sqrt(2 - s**2) * np.exp(-(m**2) / (2 - s**2))) ** 2
    assert found.efficiency == pytest.approx(expected, rel=0.05)
    assert found.ess == pytest.approx(20_000 * expected, rel=0.05)


def test_the_weighted_library_is_the_new_population(normal):
    found = reweight(normal, NormalPrior(normal.parameters, mean=0.3, sd=0.8))
    theta, x = normal.read()
    mean = np.average(theta, axis=0, weights=found.weights)
    np.testing.assert_allclose(mean, 0.3, atol=5 * 0.8 / np.sqrt(found.ess))
    toy = LinearGaussian(2)
    np.testing.assert_allclose(np.average(x, axis=0, weights=found.weights), toy.expected(np.full((1, 2), 0.3))[0], atol=0.06)
    drawn = theta[found.resample(20_000, seed=3)]
    np.testing.assert_allclose(drawn.std(axis=0), 0.8, atol=0.05)
    np.testing.assert_array_equal(found.resample(10, seed=3), found.resample(10, seed=3))


def test_the_same_prior_gives_equal_weights(normal):
    found = reweight(normal.path, normal.prior)
    np.testing.assert_allclose(found.weights, 1)
    assert found.ess == pytest.approx(20_000) and found.largest == pytest.approx(1 / 20_000)


def test_a_spectrum_as_a_function(box):
    found = reweight(box, lambda theta: -2.7 * np.log(theta[:, 0]))
    theta = box.read()[0]
    raw = theta[:, 0] ** -2.7
    np.testing.assert_allclose(found.weights, raw / raw.mean(), rtol=1e-10)
    # <t> under t^-2.7 on [1, 3]
    exact = ((3**-0.7 - 1) / -0.7) / ((3**-1.7 - 1) / -1.7)
    assert np.average(theta[:, 0], weights=found.weights) == pytest.approx(exact, abs=5 * 0.5 / np.sqrt(found.ess))


def test_a_collapse_warns_and_a_good_overlap_does_not(normal):
    with pytest.warns(ReweightWarning, match="effective sample size of the 20000 weighted rows of .* is"):
        found = reweight(normal, NormalPrior(normal.parameters, mean=3.5, sd=0.1))
    assert found.ess < 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reweight(normal, NormalPrior(normal.parameters, sd=0.5))
    with pytest.warns(ReweightWarning):
        reweight(normal, NormalPrior(normal.parameters, sd=0.5), warn_below=0.99)


@pytest.mark.parametrize("bounds", [(0.5, 3), (1, 3.5), (1, 3.0000001), (5, 6)])
def test_a_prior_that_reaches_outside_is_refused(box, bounds):
    new = BoxPrior([Parameter("t0", *bounds), Parameter("t1", 1, 3)])
    with pytest.raises(SupportError, match="reaches outside of what .* was drawn from"):
        reweight(box, new)
    with pytest.raises(SupportError):
        reweight(box, NormalPrior([Parameter("t0"), Parameter("t1")], mean=2))
    inside = reweight(box, BoxPrior([Parameter("t0", 1.5, 2.5), Parameter("t1", 1, 3)]))
    theta = box.read()[0]
    kept = (theta[:, 0] >= 1.5) & (theta[:, 0] <= 2.5)
    np.testing.assert_array_equal(inside.weights > 0, kept)
    assert inside.ess == pytest.approx(np.count_nonzero(kept))


def test_theta_that_were_not_drawn_need_their_density(tmp_path):
    toy = LinearGaussian(1)
    theta = np.random.default_rng(0).uniform(-1, 1, (500, 1))
    store = simulate(toy, None, tmp_path / "s", theta=theta, workers=1)
    with pytest.raises(SettingError, match="'given', not drawn from its prior; expected old="):
        reweight(store, toy.prior)
    flat = BoxPrior([Parameter("t0", -1, 1)])
    found = reweight(store, BoxPrior([Parameter("t0", -0.5, 0.5)]), old=flat)
    np.testing.assert_array_equal(found.weights > 0, np.abs(theta[:, 0]) <= 0.5)


def test_bad_input(box, normal):
    with pytest.raises(SimulatorMismatchError, match="the new prior has parameters"):
        reweight(box, BoxPrior([Parameter("a", 1, 2), Parameter("t1", 1, 2)]))
    with pytest.raises(SettingError, match="new is 3; expected a Prior or a function"):
        reweight(box, 3)
    with pytest.raises(ShapeError, match=r"new returned shape \(5000, 2\)"):
        reweight(box, lambda theta: theta)
    with pytest.raises(DataError, match="new has log density nan"):
        reweight(box, lambda theta: np.full(len(theta), np.nan))
    with pytest.raises(DataError, match="no row of .* has weight"):
        reweight(box, lambda theta: np.full(len(theta), -np.inf))
    with pytest.raises(DataError, match="old has log density -inf"):
        reweight(normal, lambda theta: np.zeros(len(theta)), old=BoxPrior([Parameter("t0", -9, 0), Parameter("t1", -9, 9)]))
