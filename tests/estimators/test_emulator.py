"""A likelihood as a simulator: its rows against the exact distribution, NPE trained on them against the exact posterior."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import sbi_phys as sp
from sbi_phys.core.errors import SettingError, SimulatorMismatchError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.nle import Emulator
from sbi_phys.simulation.protocol import check_simulator
from sbi_phys.store.identity import simulator_identity
from tests import toys
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2)
training_set = partial(toys.training_set, SIM)
SMALL = sp.EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
NO_COUPLINGS = sp.FlowConfig(n_layers=0)


@pytest.fixture(scope="module")
def nle() -> sp.NLE:
    config = sp.TrainConfig(max_epochs=12, batch_size=128)
    settings = {"embedding": SMALL, "device": "cpu", "config": config, "simulator": SIM}
    return sp.NLE(SIM.prior, flow=NO_COUPLINGS, n_ensemble=2, **settings).fit(*training_set(3000))


@pytest.fixture(scope="module")
def npe(nle: sp.NLE) -> sp.NPE:
    config = sp.TrainConfig(batch_size=256)
    flow = sp.FlowConfig(n_layers=1, hidden=32)
    fresh = sp.NPE(SIM.prior, flow=flow, embedding=SMALL, device="cpu", config=config)
    return fresh.fit(simulator=nle.as_simulator(), online=True, n=40_000)


def test_rows_follow_the_likelihood(nle: sp.NLE) -> None:
    """At one theta, mean and covariance of x; the same generator gives the same rows."""
    emulator = nle.as_simulator()
    check_simulator(emulator, n_simulations=50)
    theta = np.array([0.7, -0.4])
    x = emulator.simulate(np.tile(theta, (40_000, 1)), rng_for(3))
    np.testing.assert_allclose(x.mean(axis=0), SIM.expected(theta[None])[0], atol=0.08)
    np.testing.assert_allclose(np.cov(x.T), SIM.noise**2 * np.eye(2), atol=0.03)
    assert not np.array_equal(x, emulator.simulate(np.tile(theta, (40_000, 1)), rng_for(4)))


def test_every_row_has_its_own_theta(nle: sp.NLE) -> None:
    """Row i of x belongs to row i of theta, whichever member drew it."""
    theta = SIM.prior.sample(5000, rng_for(5))
    residual = (nle.as_simulator().simulate(theta, rng_for(6)) - SIM.expected(theta)) / SIM.noise
    assert 0.95 < residual.std() < 1.08
    assert np.abs(np.corrcoef(residual.T, theta.T)[:2, 2:]).max() < 0.1


def test_npe_on_emulated_pairs_learns_the_exact_posterior(npe: sp.NPE) -> None:
    """Divergence from the conjugate posterior on fresh pairs of the real simulator, in nats; the prior would be off by 2."""
    theta, x = training_set(2000, seed=7)
    assert -0.01 < (SIM.exact_log_posterior(theta, x) - npe.log_prob(theta, x)).mean() < 0.05


def test_a_wrong_likelihood_is_passed_on(nle: sp.NLE) -> None:
    """NPE learns the posterior of the emulator, not of the truth: twice the noise in the likelihood, twice the noise learned."""
    noisy = LinearGaussian(dim=2, noise=2 * SIM.noise)
    theta = SIM.prior.sample(3000, rng_for(0, "theta"))
    wrong = sp.NLE(SIM.prior, flow=NO_COUPLINGS, embedding=SMALL, device="cpu", config=nle.config)
    wrong.fit(theta, noisy.simulate(theta, rng_for(0, "x")))
    residual = wrong.as_simulator().simulate(theta, rng_for(8)) - SIM.expected(theta)
    assert residual.std() == pytest.approx(noisy.noise, rel=0.06)


def test_counts_stay_whole_and_totals_stay() -> None:
    """Multinomial counts beside a constant and a real column: what the training data exclude is never emulated."""
    prior = sp.BoxPrior([sp.Parameter("a", low=0.2, high=0.8)])
    theta, rng = prior.sample(1000, rng_for(0)), rng_for(1)
    counts = rng.multinomial(60, np.column_stack([theta / 2, theta / 2, 1 - theta]))
    x = np.column_stack([counts, np.full(1000, 2.5), theta + 0.1 * rng.standard_normal(theta.shape)])
    blocks = [sp.Observable("n", 3, kind="counts"), sp.Observable("y", 2)]
    nle = sp.NLE(prior, embedding=SMALL, device="cpu", observables=blocks, config=sp.TrainConfig(max_epochs=5)).fit(theta, x)
    named = nle.as_simulator()
    nle.observables = None
    blocks_found = nle.as_simulator().observables
    made = named.simulate(theta, rng_for(2))
    assert (made[:, :3] == np.round(made[:, :3])).all()
    assert (made[:, :3] >= 0).all()
    assert (made[:, :3].sum(axis=1) == 60).mean() > 0.99
    assert (made[:, 3] == 2.5).all()
    assert [o.name for o in named.observables] == ["n", "y"]
    assert [(o.name, o.size, o.kind) for o in blocks_found] == [("x0", 3, "counts"), ("x1", 2, "real")]


def test_the_model_says_what_it_learned_from(nle: sp.NLE, npe: sp.NPE, tmp_path: Path) -> None:
    assert npe.identity == simulator_identity(nle.as_simulator())
    assert npe.identity["class"] == "sbi_phys.estimators.nle:Emulator"
    npe.save(tmp_path / "npe.pt")
    for same in (SIM, nle.as_simulator()):
        sp.load(tmp_path / "npe.pt", simulator=same)
    with pytest.raises(SimulatorMismatchError, match="was trained with"):
        sp.load(tmp_path / "npe.pt", simulator=LinearGaussian(dim=3))


def test_what_it_refuses(nle: sp.NLE) -> None:
    with pytest.raises(SettingError, match="not trained"):
        sp.NLE(SIM.prior).as_simulator()
    with pytest.raises(SettingError, match=r"Emulator cannot be sent to worker processes.*expected workers=0"):
        sp.NPE(SIM.prior).fit(simulator=nle.as_simulator(), online=True, n=1000, workers=1)
    with pytest.raises(SettingError, match="stays in its process"):
        pickle.dumps(nle.as_simulator())
    prior = sp.BoxPrior([sp.Parameter("a", low=0, high=1)])
    theta = prior.sample(100, rng_for(0))
    boxed = sp.NLE(prior, embedding=SMALL, device="cpu", config=sp.TrainConfig(max_epochs=1)).fit(theta, theta)
    with pytest.raises(SupportError):
        boxed.as_simulator().simulate(np.array([[1.5]]), rng_for(0))
    assert isinstance(nle.as_simulator(), Emulator)
