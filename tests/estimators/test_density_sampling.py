"""Posterior draws from exact likelihoods: every method against the exact posterior, and what must be refused."""

import math

import numpy as np
import pytest

from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError
from sbi_phys.core.progress import LineProgress
from sbi_phys.estimators.density_sampling import sample_posterior
from sbi_phys.priors import BoxPrior, DirichletPrior, NormalPrior, Parameter, standard_normal_log_prob
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2, noise=0.05)
X = np.array([0.7, -0.4])


def likelihood(theta):
    return SIM.log_likelihood(X, theta)


def gradient(u):
    """The prior is N(0, 1): theta is u."""
    return SIM.log_likelihood(X, u), (X - SIM.expected(u)) @ SIM.matrix / SIM.noise**2


def log_evidence():
    covariance = SIM.matrix @ SIM.matrix.T + SIM.noise**2 * np.eye(2)
    return float(-0.5 * X @ np.linalg.solve(covariance, X) - 0.5 * np.linalg.slogdet(2 * math.pi * covariance)[1])


class Around:
    """Gaussian proposal about the exact posterior."""

    def __init__(self, shift=0.0, width=1.3):
        self.mean, covariance = SIM.posterior(X)
        self.root = width * np.linalg.cholesky(covariance)
        self.mean = self.mean + shift * np.diag(self.root)

    def sample(self, n, rng):
        return self.mean + rng.standard_normal((n, 2)) @ self.root.T

    def log_prob(self, u):
        return standard_normal_log_prob((u - self.mean) @ np.linalg.inv(self.root).T) - np.log(np.diag(self.root)).sum()


def whitened(theta):
    mean, covariance = SIM.posterior(X)
    return (theta - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T


@pytest.mark.parametrize(
    ("method", "extra", "used"),
    [
        ("auto", {}, "importance"),
        ("importance", {}, "importance"),
        ("importance", {"proposal": Around()}, "importance"),
        ("auto", {"proposal": Around()}, "importance"),
        ("hmc", {"gradient": gradient}, "hmc"),
        ("hmc", {"gradient": gradient, "proposal": Around()}, "hmc"),
        ("emcee", {}, "emcee"),
        ("grid", {}, "grid"),
    ],
)
def test_every_method_draws_the_exact_posterior(method, extra, used):
    """Posterior a twentieth as wide as the prior: mean, covariance, density, evidence."""
    n = 2000 if method != "emcee" else 250
    found = sample_posterior(likelihood, SIM.prior, n, seed=3, method=method, **extra)
    assert found.method == used
    assert found.theta.shape == (n, 2) and found.log_prob.shape == (n,)
    assert found.n_effective >= n
    z = whitened(found.theta)
    assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(n)
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=5 * math.sqrt(2 / n))
    np.testing.assert_allclose(found.log_prob, likelihood(found.theta) + SIM.prior.log_prob(found.theta), atol=1e-8)
    if used in ("importance", "grid"):
        assert found.log_evidence == pytest.approx(log_evidence(), abs=0.05)
        np.testing.assert_allclose(found.log_prob - log_evidence(), SIM.exact_log_posterior(found.theta, X), atol=1e-8)
        assert np.isnan(found.r_hat).all()
    else:
        assert np.isnan(found.log_evidence)
        assert found.r_hat.max() <= 1.01
    assert (found.pareto_k < 0.7) == (used == "importance")
    assert found.evaluations >= n
    assert method == "auto" or used in found.summary()


def test_independent_draws_hardly_repeat():
    found = sample_posterior(likelihood, SIM.prior, 3000, seed=0)
    assert len(np.unique(found.theta, axis=0)) > 0.9 * 3000


def test_same_seed_same_draws():
    one, again, other = (sample_posterior(likelihood, SIM.prior, 200, seed=s).theta for s in (1, 1, 2))
    assert (one == again).all() and (one != other).any()


def test_two_modes_far_apart_have_their_weights():
    """A box of 20, modes of width 0.1 at -6 and 6 with weights 1 to 3: each fills a hundredth of the prior."""
    prior = BoxPrior([Parameter("a", -10, 10)])

    def modes(theta):
        a = theta[:, 0]
        return np.logaddexp(math.log(0.25) - 50 * (a + 6) ** 2, math.log(0.75) - 50 * (a - 6) ** 2)

    for method in ("auto", "grid"):
        found = sample_posterior(modes, prior, 3000, seed=1, method=method)
        assert (found.theta[:, 0] > 0).mean() == pytest.approx(0.75, abs=5 * math.sqrt(0.19 / 3000))
        assert found.log_evidence == pytest.approx(math.log(math.sqrt(2 * math.pi) * 0.1 / 20), abs=0.05)


def test_a_posterior_at_the_edge_stays_inside_the_box():
    prior = BoxPrior([Parameter("a", 0, 1)])
    found = sample_posterior(lambda t: -10 * t[:, 0], prior, 3000, seed=0)
    assert prior.contains(found.theta).all()
    mean = 0.1 - math.exp(-10) / (1 - math.exp(-10))
    assert found.theta.mean() == pytest.approx(mean, abs=5 * 0.1 / math.sqrt(3000))


def test_counts_on_a_simplex():
    """Multinomial counts with a flat prior: Dirichlet(1 + n) exactly, log evidence in closed form."""
    prior, counts = DirichletPrior([Parameter(f"f{k}") for k in range(4)]), np.array([40, 25, 10, 0])
    found = sample_posterior(lambda f: (counts * np.log(np.maximum(f, 1e-300))).sum(axis=1), prior, 3000, seed=2)
    alpha = 1.0 + counts
    mean = alpha / alpha.sum()
    sd = np.sqrt(mean * (1 - mean) / (alpha.sum() + 1))
    assert np.abs((found.theta.mean(axis=0) - mean) / sd).max() < 5 / math.sqrt(3000)
    np.testing.assert_allclose(found.theta.std(axis=0) / sd, 1, atol=5 / math.sqrt(2 * 3000) * 1.5)


def test_auto_goes_on_from_a_bad_proposal():
    """A proposal 20 sd away has useless weights: refused on its own, replaced by what tempering finds."""
    with pytest.raises(ConvergenceError, match="Pareto k"):
        sample_posterior(likelihood, SIM.prior, 1000, method="importance", proposal=Around(shift=20), seed=0)
    found = sample_posterior(likelihood, SIM.prior, 1000, proposal=Around(shift=20), seed=0)
    assert "tempering" in found.message
    assert np.abs(whitened(found.theta).mean(axis=0)).max() < 5 / math.sqrt(1000)


def test_weights_that_are_refused_lead_to_the_grid_where_there_is_one(monkeypatch):
    """One heavy weight in thousands is enough for Pareto k > 0.7; two parameters then need no chain."""
    monkeypatch.setattr("sbi_phys.estimators.density_sampling._by_importance", refused)
    found = sample_posterior(likelihood, SIM.prior, 3000, gradient=gradient, seed=0)
    assert found.method == "grid"
    z = whitened(found.theta)
    assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(3000)
    assert np.abs(z.var(axis=0) - 1).max() < 5 * math.sqrt(2 / 3000) + 0.01  # cells of 1 % of the mass
    assert found.log_evidence == pytest.approx(log_evidence(), abs=0.02)


def refused(job, proposal, name):
    raise ConvergenceError("Pareto k 0.89")


def test_many_parameters_go_to_hmc():
    sim = LinearGaussian(dim=13, noise=0.3)
    x = sim.simulate(sim.prior.sample(1, np.random.default_rng(0)), np.random.default_rng(1))[0]

    def by_u(u):
        return sim.log_likelihood(x, u), (x - sim.expected(u)) @ sim.matrix / sim.noise**2

    found = sample_posterior(lambda t: sim.log_likelihood(x, t), sim.prior, 500, gradient=by_u, seed=0)
    assert found.method == "hmc"
    mean, covariance = sim.posterior(x)
    z = (found.theta - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(500)
    assert np.abs(z.var(axis=0) - 1).max() < 5 * math.sqrt(2 / 500)


def test_the_prior_comes_back_from_a_flat_likelihood():
    prior = NormalPrior([Parameter("a")], mean=3.0, sd=2.0)
    found = sample_posterior(lambda t: np.full(len(t), 7.0), prior, 3000, seed=0)
    assert found.theta.mean() == pytest.approx(3, abs=5 * 2 / math.sqrt(3000))
    assert found.log_evidence == pytest.approx(7, abs=0.02)


def test_progress_is_shown(capsys):
    sample_posterior(likelihood, SIM.prior, 200, progress=LineProgress())
    shown = capsys.readouterr().err
    assert "tempering" in shown and "importance sampling" in shown


@pytest.mark.parametrize(
    ("function", "settings", "error", "match"),
    [
        (lambda t: np.full(len(t), np.nan), {}, NonFiniteError, "log likelihood is nan at .*t0"),
        (lambda t: np.where(t[:, 0] > 0, np.inf, 0.0), {"method": "emcee"}, NonFiniteError, "inf"),
        (lambda t: np.full(len(t), -np.inf), {}, DataError, "zero at all"),
        (likelihood, {"method": "hmc"}, SettingError, "gradient"),
        (likelihood, {"method": "hcm"}, SettingError, "did you mean 'hmc'"),
        (lambda t: np.zeros((len(t), 2)), {}, ValueError, "shape"),
    ],
)
def test_what_is_refused(function, settings, error, match):
    with pytest.raises(error, match=match):
        sample_posterior(function, SIM.prior, 100, **settings)


def test_what_is_refused_of_the_setting():
    with pytest.raises(SettingError, match="one or two"):
        sample_posterior(likelihood, LinearGaussian(dim=3).prior, 10, method="grid")
    with pytest.raises(SettingError, match="expected a prior"):
        sample_posterior(likelihood, "box", 10)  # type: ignore[arg-type]
