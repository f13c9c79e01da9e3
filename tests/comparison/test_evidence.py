"""Evidence by importance sampling against the closed form of conjugate models."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from sbi_phys.comparison import compare_evidence, importance_evidence
from sbi_phys.core.errors import ConvergenceError, SettingError
from sbi_phys.core.rng import rng_for
from tests.toys import LinearGaussian

NARROW, WIDE = LinearGaussian(dim=2, n_columns=5, prior_sd=0.3), LinearGaussian(dim=2, n_columns=5, prior_sd=1.0)
X = WIDE.simulate(np.array([[0.6, -0.3]]), rng_for(0))[0]


def log_evidence(sim, x):
    covariance = sim.settings["prior_sd"] ** 2 * sim.matrix @ sim.matrix.T + sim.noise**2 * np.eye(5)
    return multivariate_normal.logpdf(x, np.zeros(5), covariance)


class Near:
    """The exact posterior in the whitened space, made wider."""

    def __init__(self, sim, widen=1.2, shift=0.0):
        mean, covariance = sim.posterior(X)
        sd = sim.settings["prior_sd"]
        self.density = multivariate_normal(mean / sd + shift, covariance / sd**2 * widen**2)

    def sample(self, n, rng):
        return self.density.rvs(n, random_state=rng)

    def log_prob(self, u):
        return np.atleast_1d(self.density.logpdf(u))


def test_the_evidence_is_the_closed_form():
    for sim in (NARROW, WIDE):
        got = importance_evidence(sim, Near(sim), X, n_draws=20_000)
        assert got.log_evidence == pytest.approx(log_evidence(sim, X), abs=4 * got.log_evidence_err)
        assert got.log_evidence_err < 0.01


def test_the_bayes_factor_and_the_probabilities():
    models = {"narrow": (NARROW, Near(NARROW)), "wide": (WIDE, Near(WIDE))}
    got = compare_evidence(models, X, prior={"narrow": 3, "wide": 1})
    want = log_evidence(WIDE, X) - log_evidence(NARROW, X)
    value, error = got.log_bayes_factor("wide", "narrow")
    assert value == pytest.approx(want, abs=4 * error)
    assert got.log_bayes_factor("wide", "wide") == (0.0, 0.0)
    assert got.probability[1] / got.probability[0] == pytest.approx(np.exp(value) / 3)
    assert "log Z" in got.summary()


def test_a_posterior_that_misses_is_refused():
    models = {"narrow": (NARROW, Near(NARROW)), "wide": (WIDE, Near(WIDE, widen=0.2, shift=1.0))}
    with pytest.raises(ConvergenceError, match="evidence of wide: .*expected below 0.7"):
        compare_evidence(models, X)


def test_bad_input():
    with pytest.raises(SettingError, match="at least two"):
        compare_evidence({"one": (NARROW, Near(NARROW))}, X)
    with pytest.raises(SettingError, match="expected an NPE"):
        importance_evidence(NARROW, object(), X)
    with pytest.raises(SettingError, match="no log_likelihood"):
        importance_evidence(object(), Near(NARROW), X)
    models = {"a": (NARROW, Near(NARROW)), "b": (WIDE, Near(WIDE))}
    with pytest.raises(SettingError, match="no number for b"):
        compare_evidence(models, X, prior={"a": 1.0})
    with pytest.raises(SettingError, match="did you mean"):
        compare_evidence(models, X).log_bayes_factor("bb", "a")
