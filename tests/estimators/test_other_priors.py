"""theta from another distribution than the prior, in training and at inference, against conjugate Gaussians."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import sbi_phys as sp
from sbi_phys.core.errors import ConvergenceError, DataError, SettingError, SimulatorMismatchError, SupportError
from sbi_phys.core.types import Array
from sbi_phys.estimators.other_priors import (
    LEVEL,
    MixedPriors,
    as_theta,
    independent_normals,
    prior_weights,
    require_within,
    reweighted,
    warn_unlike_prior,
)
from tests.toys import LinearGaussian

A = sp.Parameter("a")
PRIOR = sp.NormalPrior([A])
WIDE = sp.NormalPrior([A], mean=[0.5], sd=[1.5])
SMALL = sp.EmbeddingConfig(hidden=16, n_blocks=1, n_features=8)
SETTINGS = {
    "seed": 1,
    "flow": sp.FlowConfig(n_layers=0),
    "embedding": sp.EmbeddingConfig(hidden=16, n_blocks=1, n_features=8),
    "device": "cpu",
}


def test_size_of_the_test_of_draws() -> None:
    rng = np.random.default_rng(0)
    p = np.array([independent_normals(rng.standard_normal((60, 3)))[0] for _ in range(3000)])
    for level in (0.05, 0.01):
        assert (p < level).mean() < level + 3 * np.sqrt(level / 3000)
    assert (p < 0.05).mean() > 0.02  # it is not idle
    assert p.min() > LEVEL


@pytest.mark.parametrize("n", [300, 8000])
@pytest.mark.parametrize("kind", ["shift", "width", "correlation", "grid", "constant"])
def test_power_of_the_test_of_draws(kind: str, n: int) -> None:
    u = np.random.default_rng(1).standard_normal((n, 2))
    if kind == "shift":
        u[:, 1] += 0.5
    elif kind == "width":
        u[:, 0] *= 0.5
    elif kind == "correlation":
        u[:, 1] = 0.4 * u[:, 0] + np.sqrt(1 - 0.16) * u[:, 1]
    elif kind == "grid":
        u = stats.norm.ppf((np.floor(3 * stats.norm.cdf(u)) + 0.5) / 3)
    else:
        u[:, 0] = 0.3
    pvalue, words = independent_normals(u)
    found = {"shift": "{1} is off", "width": "{0} is off", "correlation": "{0} and {1} have", "grid": "is off", "constant": "{0} is off"}
    assert pvalue < LEVEL and found[kind] in words


BOX, LOG, SIMPLEX = (
    sp.BoxPrior([sp.Parameter("a", 0, 1)]),
    sp.LogUniformPrior([sp.Parameter("e", 1, 1e3)]),
    sp.DirichletPrior([sp.Parameter(k) for k in "xyz"]),
)


@pytest.mark.parametrize(
    ("prior", "theta", "said"),
    [
        (BOX, lambda rng: rng.beta(4, 1, (900, 1)), r"n = 900, the distribution of a is off by 0\.4"),
        (LOG, lambda rng: rng.uniform(1, 1e3, (500, 1)), "n = 500, the distribution of e is off"),
        (SIMPLEX, lambda rng: rng.dirichlet([5, 5, 5], 800), "n = 800, the distribution of u0 is"),
    ],
)
def test_the_warning_says_what_it_saw(prior: sp.Prior, theta: object, said: str) -> None:
    with pytest.warns(UserWarning, match=f"do not look like draws of the prior: of {said}.*proposal="):
        warn_unlike_prior(prior, theta(np.random.default_rng(2)))
    warn_unlike_prior(prior, prior.sample(900, np.random.default_rng(3)))  # warnings are errors


def pairs(prior: sp.Prior, n: int = 6000) -> tuple[Array, Array]:
    rng = np.random.default_rng(5)
    theta = prior.sample(n, rng)
    return theta, theta + rng.standard_normal(theta.shape)


def test_a_proposal_gives_the_posterior_under_the_prior() -> None:
    theta, x = pairs(WIDE)
    with pytest.warns(UserWarning, match="of n = 6000, the distribution of a is off by"):
        plain = sp.NPE(PRIOR, **SETTINGS).fit(theta, x)
    assert plain.sample([1.0], 4000).mean() == pytest.approx(0.846, abs=0.08)  # the posterior under the proposal
    right = sp.NPE(PRIOR, **SETTINGS).fit(theta, x, proposal=WIDE)
    draws = right.sample([1.0], 4000)
    assert draws.mean() == pytest.approx(0.5, abs=0.08) and draws.std() == pytest.approx(2**-0.5, rel=0.1)


def test_stores_drawn_from_another_prior_are_weighted(tmp_path: Path) -> None:
    sim = LinearGaussian(dim=1)
    wide = sp.NormalPrior(sim.parameters, mean=[0.5], sd=[1.5])
    quick = SETTINGS | {"config": sp.TrainConfig(max_epochs=2)}
    store = sp.simulate(sim, 800, tmp_path / "wide", prior=wide, seed=1, workers=1)
    theta, x = store.read()
    by_store = sp.NPE(sim.prior, **quick).fit(store)
    by_hand = sp.NPE(sim.prior, observables=sim.observables, **quick).fit(theta, x, weights=prior_weights(sim.prior, wide, theta))
    np.testing.assert_allclose(by_store.log_prob(theta[:9], x[:9]), by_hand.log_prob(theta[:9], x[:9]), atol=1e-4)
    given = sp.simulate(sim, None, tmp_path / "given", theta=theta, prior=wide, workers=1)
    with pytest.warns(UserWarning, match="of n = 800"):
        sp.NPE(sim.prior, **quick).fit(given)
    sp.NPE(sim.prior, **quick).fit(given, proposal=given.prior)
    both = MixedPriors([sim.prior, wide], [400, 1200])
    exact = 0.25 * np.exp(sim.prior.log_prob(theta)) + 0.75 * np.exp(wide.log_prob(theta))
    np.testing.assert_allclose(np.exp(both.log_prob(theta)), exact, rtol=1e-9)


def test_weights() -> None:
    theta = WIDE.sample(4000, np.random.default_rng(0))
    w = prior_weights(PRIOR, WIDE, theta)
    assert w.mean() == pytest.approx(1)
    np.testing.assert_allclose(
        w / w[0], np.exp(PRIOR.log_prob(theta) - WIDE.log_prob(theta) - PRIOR.log_prob(theta[:1]) + WIDE.log_prob(theta[:1]))
    )
    assert prior_weights(PRIOR, PRIOR, theta) is None
    assert as_theta(PRIOR, theta[:, 0]).shape == (4000, 1) and as_theta(PRIOR, np.ones((3, 2))) is None

    class Unnormalised:
        def log_prob(self, theta: Array) -> Array:
            return WIDE.log_prob(theta) + 7

    np.testing.assert_allclose(prior_weights(PRIOR, Unnormalised(), theta), w)


def test_wrong_proposals_are_named() -> None:
    theta, x = pairs(PRIOR, 100)
    npe = sp.NPE(PRIOR, config=sp.TrainConfig(max_epochs=1))
    with pytest.raises(SettingError, match="proposal is a str; expected a prior, or an object with log_prob"):
        npe.fit(theta, x, proposal="wide")
    with pytest.raises(SimulatorMismatchError, match=r"proposal has parameters \('b',\)"):
        npe.fit(theta, x, proposal=sp.NormalPrior([sp.Parameter("b")]))
    with pytest.raises(DataError, match="the proposal has log density -inf at"):
        npe.fit(theta, x, proposal=sp.BoxPrior([sp.Parameter("a", 0, 1)]))
    with pytest.raises(SettingError, match="NRE.fit takes draws of its prior"):
        sp.NRE(PRIOR).fit(theta, x, proposal=WIDE)
    narrow = sp.BoxPrior([sp.Parameter("a", -1, 1)])
    inside = narrow.sample(200, np.random.default_rng(0))
    with pytest.warns(UserWarning, match=r"leaves 3\d\.\d% of the prior without simulations"):
        prior_weights(PRIOR, narrow, inside)
    far = sp.NormalPrior([A], mean=[5.0])
    with pytest.warns(UserWarning, match="worth .* of 2000 simulations"):
        prior_weights(PRIOR, far, far.sample(2000, np.random.default_rng(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = WIDE.sample(200, np.random.default_rng(0))
        sp.NLE(PRIOR, config=sp.TrainConfig(max_epochs=1)).fit(wide, wide + 0.1)


@pytest.fixture(scope="module")
def trained() -> sp.NPE:
    return sp.NPE(PRIOR, **SETTINGS).fit(*pairs(PRIOR))


OTHER = sp.NormalPrior([A], mean=[0.5], sd=[0.5])


def test_another_prior_at_inference(trained: sp.NPE) -> None:
    found = trained.posterior([1.0], 4000, prior=OTHER)
    assert found.theta.mean() == pytest.approx(0.6, abs=0.06) and found.theta.std() == pytest.approx(5**-0.5, rel=0.1)
    assert found.n_effective >= 4000 and found.pareto_k < 0.7 and re.search(r"worth \d+", found.message)
    exact = stats.norm.logpdf(1.0, 0.5, 1.25**0.5) - stats.norm.logpdf(1.0, 0, 2**0.5)
    assert found.log_evidence == pytest.approx(exact, abs=0.1)
    np.testing.assert_allclose(found.log_prob, stats.norm.logpdf(found.theta[:, 0], 0.6, 5**-0.5), atol=0.5)
    several = trained.sample([[1.0], [0.0]], 500, prior=OTHER)
    assert several.shape == (2, 500, 1)
    np.testing.assert_array_equal(several[0], trained.sample([1.0], 500, prior=OTHER))
    assert several[1].mean() == pytest.approx(0.4, abs=0.1)
    np.testing.assert_allclose(trained.sample([1.0], 3000, prior=PRIOR).mean(), trained.sample([1.0], 3000).mean(), atol=0.06)


@pytest.mark.parametrize("kind", [sp.NLE, sp.NRE])
def test_likelihoods_and_ratios_take_another_prior(kind: type[sp.Estimator]) -> None:
    model = kind(PRIOR, embedding=SMALL, device="cpu", config=sp.TrainConfig(max_epochs=12)).fit(*pairs(PRIOR, 1500))
    draws = model.sample([1.0], 1000, prior=OTHER, method="grid")
    assert draws.mean() == pytest.approx(0.6, abs=0.15) and draws.std() == pytest.approx(5**-0.5, rel=0.2)
    with pytest.raises(SupportError, match="of its mass outside the prior of the training"):
        box = sp.BoxPrior([sp.Parameter("a", -1, 1)])
        inside = kind(box, config=sp.TrainConfig(max_epochs=1)).fit(*pairs(box, 100))
        inside.sample([0.0], 10, prior=OTHER)


def test_other_priors_that_cannot_be_used(trained: sp.NPE) -> None:
    with pytest.raises(SimulatorMismatchError, match=r"prior has parameters \('b',\); expected those of the training, \('a',\)"):
        trained.sample([1.0], 10, prior=sp.NormalPrior([sp.Parameter("b")]))
    with pytest.raises(SettingError, match="prior is a float"):
        trained.sample([1.0], 10, prior=0.5)
    far = sp.NormalPrior([A], mean=[6.0], sd=[0.1])
    with pytest.raises(ConvergenceError, match="draws are worth"):
        trained.sample([-1.0], 500, prior=far)
    box, wide = sp.BoxPrior([sp.Parameter("a", 0, 1)]), sp.BoxPrior([sp.Parameter("a", 0, 2)])
    with pytest.raises(SupportError, match=r"prior has (4\d|5\d)\.\d+% of its mass outside .*a = 1\.\d+, expected within \[0, 1\]"):
        require_within(box, wide)
    assert require_within(wide, box) is box
    with pytest.raises(DataError, match="none of .* draws"):
        reweighted(lambda n, k: np.full((n, 1), 1.5), wide, box, 100, seed=0)
    theta, log_w, ess, k, log_z = reweighted(lambda n, r: wide.sample(n, np.random.default_rng(r)), wide, box, 800, seed=0)
    assert box.contains(theta).all() and k == 0 and ess > 800 and np.ptp(log_w) == 0
    assert log_z == pytest.approx(0, abs=0.1)  # half of the draws, each with weight two
