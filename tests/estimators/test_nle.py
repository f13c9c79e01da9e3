"""NLE against exact likelihoods: densities, probabilities of counts, event sets, gradients, posteriors, files, and what it refuses."""

import math
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multinomial, poisson

import sbi_phys as sp
from sbi_phys.core.errors import DataError, ModelFileError, NonFiniteError, SettingError, ShapeError, SimulatorMismatchError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.nle import NLE, Emulator
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FLOWS, FlowConfig
from sbi_phys.priors import Prior
from sbi_phys.samplers.grid import grid_posterior
from sbi_phys.simulation.protocol import check_simulator
from sbi_phys.store.identity import simulator_identity
from tests import toys
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2)
training_set = partial(toys.training_set, SIM)
SMALL = EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
QUICK = sp.TrainConfig(max_epochs=12, batch_size=128)
RATE = sp.BoxPrior([sp.Parameter("rate", 0.2, 30.0)])


def make(prior: Prior | None = None, **settings: object) -> NLE:
    defaults = {"seed": 1, "flow": FlowConfig(n_layers=2, hidden=32), "embedding": SMALL, "device": "cpu", "config": QUICK}
    return NLE(prior or SIM.prior, **{**defaults, **settings})


def rates(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two bins, the second with a tenth of the first's counts: many, few and none."""
    theta = RATE.sample(n, rng_for(seed, "theta"))
    return theta, rng_for(seed, "x").poisson(theta * [1.0, 0.1]).astype(float)


@pytest.fixture(scope="module")
def trained() -> NLE:
    return make(n_ensemble=2).fit(*training_set(3000))


@pytest.fixture(scope="module")
def counting() -> NLE:
    return make(RATE).fit(*rates(6000))


@pytest.mark.parametrize("kind", FLOWS)
def test_every_flow_learns_the_likelihood(kind: str) -> None:
    """Mean divergence of q(x | theta) from the exact density on fresh pairs, nats."""
    nle = make(flow=FlowConfig(kind=kind, n_layers=2, hidden=32)).fit(*training_set(3000))
    theta, x = training_set(2000, seed=7)
    divergence = (SIM.log_likelihood(x, theta) - nle.log_likelihood(x, theta)).mean()
    assert -0.01 < divergence < 0.08


def test_the_density_integrates_to_one(trained: NLE) -> None:
    """Over x, at one theta, per unit of x: the Jacobian of the scaling is right."""
    axes = np.linspace(-6, 6, 301)
    grid = np.stack(np.meshgrid(axes, axes, indexing="ij"), -1).reshape(-1, 2)
    q = np.exp(trained.log_likelihood(grid, np.tile([[0.5, -0.3]], (len(grid), 1))))
    assert q.sum() * (axes[1] - axes[0]) ** 2 == pytest.approx(1, abs=3e-3)


def test_a_steep_positive_column_is_taken_as_its_logarithm() -> None:
    """Pareto energies over four decades: density over E integrates to one and follows the exact one."""
    prior = sp.BoxPrior([sp.Parameter("index", 1.5, 3.5)])
    theta = prior.sample(4000, rng_for(0))
    x = (1 - rng_for(1).random(4000)) ** (-1 / (theta[:, 0] - 1))
    nle = make(prior, flow=FlowConfig(n_layers=3, hidden=32)).fit(theta, x)
    assert nle._scaler is not None and nle._scaler.kind.tolist() == [2]
    energy = np.geomspace(1e-3, 1e12, 6001)[:, None]
    q = np.exp(nle.log_likelihood(energy, np.full((6001, 1), 2.5)))
    assert np.trapezoid(q * energy[:, 0], np.log(energy[:, 0])) == pytest.approx(1, abs=5e-3)
    at = np.array([[1.3], [2.0], [5.0], [20.0]])
    exact = math.log(1.5) - 2.5 * np.log(at[:, 0])
    np.testing.assert_allclose(nle.log_likelihood(at, np.full((4, 1), 2.5)), exact, atol=0.35)
    with pytest.raises(DataError, match="expected values > 0"):
        nle.log_likelihood([-1.0], [[2.5]])


def test_probabilities_of_counts(counting: NLE) -> None:
    """P(x | rate) sums to one over whole numbers and is near the exact Poisson probability, for many counts and few."""
    one, two = np.meshgrid(np.arange(60.0), np.arange(15.0), indexing="ij")
    x = np.stack([one.ravel(), two.ravel()], axis=1)
    for rate in (1.0, 6.0, 25.0):
        log_p = counting.log_likelihood(x, np.full((len(x), 1), rate))
        exact = poisson.logpmf(x[:, 0], rate) + poisson.logpmf(x[:, 1], 0.1 * rate)
        p = np.exp(log_p)
        assert p.sum() == pytest.approx(1, abs=0.05)
        assert 0.5 * np.abs(p - np.exp(exact)).sum() < 0.15  # total variation


def test_more_noise_points_raise_the_lower_bound(counting: NLE) -> None:
    """log mean_v p grows with the number of points on average: one is the bound that was trained."""
    theta, x = rates(1000, seed=5)
    few = make(RATE, n_noise=1)
    few._scaler, few._nets = counting._scaler, counting._nets
    assert counting.log_likelihood(x, theta).mean() > few.log_likelihood(x, theta).mean()


def test_totals_that_never_change_are_conditioned_on() -> None:
    """Multinomial with 60 events: the largest bin says nothing that the others do not."""
    prior = sp.DirichletPrior([sp.Parameter(f"f{k}") for k in range(3)], concentration=3.0)
    theta = prior.sample(5000, rng_for(0))
    x = rng_for(1).multinomial(60, theta)
    nle = make(prior, flow=FlowConfig(n_layers=3, hidden=32)).fit(theta, x)
    assert nle._scaler is not None
    (columns, total, left_out) = nle._scaler.ties[0]
    assert columns == (0, 1, 2) and total == 60 and left_out not in nle._scaler.kept
    truth, data = prior.sample(1000, rng_for(2)), rng_for(3)
    new = data.multinomial(60, truth)
    exact = multinomial.logpmf(new, 60, truth / truth.sum(axis=1, keepdims=True))
    assert -0.02 < (exact - nle.log_likelihood(new, truth)).mean() < 0.25
    drawn = nle.sample_x(truth[:5], 100)
    assert drawn.shape == (5, 100, 3) and (drawn.sum(axis=2) == 60).mean() > 0.98
    with pytest.raises(DataError, match="sums to 59"):
        nle.log_likelihood([20, 20, 19], truth[:1])


def test_a_column_that_never_changes_is_left_out() -> None:
    theta, x = training_set(500)
    nle = make(config=sp.TrainConfig(max_epochs=1)).fit(theta, np.column_stack([x[:, 0], np.full(500, 3.5), x[:, 1]]))
    assert nle.sample_x(theta[:2], 4)[..., 1].tolist() == [[3.5] * 4] * 2
    assert np.isfinite(nle.log_likelihood([0.1, 3.5, 0.2], theta[:3])).all()
    with pytest.raises(DataError, match="column 1; expected 3.5"):
        nle.log_likelihood([0.1, 3.4, 0.2], theta[:3])


def test_a_set_is_the_sum_over_its_events(trained: NLE, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, in chunks of events, in chunks of theta, and by owner: the same numbers."""
    theta, x = training_set(40, seed=9)
    each = np.stack([trained.log_likelihood(x, np.tile(t, (40, 1))) for t in theta[:6]])
    np.testing.assert_array_equal(trained.log_likelihood(x, theta[:1]), each[0])  # rows of x at one theta
    whole = trained.log_likelihood(x, theta[:6], event_set=True)
    np.testing.assert_allclose(whole, each.sum(axis=1), rtol=1e-5)
    owner = np.repeat([5, 0], 20)
    np.testing.assert_allclose(trained.log_density_rows(x, theta[:6], owner), [*each[5, :20], *each[0, 20:]], atol=1e-4)
    for size in (50, 7):
        monkeypatch.setattr("sbi_phys.estimators.nle._SET_ROWS", size)
        np.testing.assert_allclose(trained.log_likelihood(x, theta[:6], event_set=True), whole, rtol=1e-5)
    np.testing.assert_allclose(trained.log_likelihood(x[0], theta[:6], event_set=True), each[:, 0], atol=1e-4)


@pytest.mark.parametrize("event_set", [False, True])
def test_gradient_against_differences(trained: NLE, counting: NLE, event_set: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbi_phys.nets.likelihood._GRADIENT_ROWS", 30)  # several chunks
    for nle, (theta, x) in ((trained, training_set(12, seed=4)), (counting, rates(12, seed=4))):
        data = x if event_set else x[0]
        u = nle.prior.to_unbounded(theta)[:7]
        value, gradient = nle.log_likelihood_and_grad(data, theta[:7], event_set=event_set)
        np.testing.assert_allclose(value, nle.log_likelihood(data, theta[:7], event_set=event_set), rtol=1e-4, atol=1e-3)
        step = 0.02
        for k in range(u.shape[1]):
            ends = [nle.prior.from_unbounded(u + s * step * np.eye(u.shape[1])[k]) for s in (1, -1)]
            up, down = (nle.log_likelihood(data, t, event_set=event_set) for t in ends)
            slope = (up - down) / (2 * step)
            np.testing.assert_allclose(gradient[:, k], slope, rtol=0.03, atol=0.03 * np.abs(slope).max())


@pytest.mark.parametrize(("method", "n"), [("auto", 2000), ("hmc", 400)])
def test_the_posterior_is_the_conjugate_one(trained: NLE, method: str, n: int) -> None:
    x = np.array([0.6, -0.2])
    found = trained.posterior(x, n, seed=1, method=method)
    mean, covariance = SIM.posterior(x)
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((found.theta.mean(axis=0) - mean) / sd).max() < 0.25
    assert np.abs(found.theta.std(axis=0) / sd - 1).max() < 0.15
    assert found.n_effective >= n


def test_the_posterior_of_a_set_narrows(trained: NLE) -> None:
    """20 events: 1 / sqrt(20) as wide, about the mean of the events."""
    truth = np.array([[0.4, -0.6]])
    x = SIM.simulate(np.tile(truth, (20, 1)), rng_for(5))
    draws = trained.sample(x, 1000, event_set=True)
    precision = np.eye(2) + 20 * SIM.matrix.T @ SIM.matrix / SIM.noise**2
    mean = np.linalg.solve(precision, 20 * SIM.matrix.T @ x.mean(axis=0) / SIM.noise**2)
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    assert np.abs((draws.mean(axis=0) - mean) / sd).max() < 1.0  # the network's own error counts for every event
    assert np.abs(draws.std(axis=0) / sd - 1).max() < 0.3


def test_the_posterior_of_counts(counting: NLE) -> None:
    """Against a grid with the exact probabilities, for few counts and many."""
    for x in ([3.0, 0.0], [22.0, 3.0]):
        rng = rng_for(0)
        draws = counting.sample(x, 3000)[:, 0]

        def target(u: np.ndarray, x: list[float] = x) -> np.ndarray:
            rate = RATE.from_unbounded(u)[:, 0]
            return poisson.logpmf(x[0], rate) + poisson.logpmf(x[1], 0.1 * rate) - 0.5 * u[:, 0] ** 2

        exact = RATE.from_unbounded(grid_posterior(target, [-8], [8]).sample(20_000, rng))[:, 0]
        assert abs(draws.mean() - exact.mean()) < 0.25 * exact.std()
        assert draws.std() == pytest.approx(exact.std(), rel=0.2)


def test_the_emulator_follows_the_simulator(trained: NLE, counting: NLE) -> None:
    theta = np.array([[0.5, -1.0], [-0.3, 0.2]])
    x = trained.sample_x(theta, 4000, seed=1)
    assert x.shape == (2, 4000, 2)
    assert np.abs(x.mean(axis=1) - SIM.expected(theta)).max() < 0.12
    assert np.abs(x.std(axis=1) / SIM.noise - 1).max() < 0.15
    n = counting.sample_x([[8.0]], 4000)[0]
    assert (n == np.round(n)).all() and (n >= 0).all()
    assert n.mean(axis=0) == pytest.approx([8.0, 0.8], rel=0.12)
    assert (trained.sample_x(theta, 5, seed=4) == trained.sample_x(theta, 5, seed=4)).all()


def test_whole_numbers_that_are_no_counts() -> None:
    """By default they are taken as real ones; dequantise=True adds noise to any whole numbers, negative ones too."""
    theta = SIM.prior.sample(400, rng_for(0))
    x = np.round(5 * SIM.simulate(theta, rng_for(1)))
    quick = sp.TrainConfig(max_epochs=1)
    noisy = make(dequantise=True, config=quick).fit(theta, x)
    plain = make(config=quick).fit(theta, x)
    assert noisy._scaler is not None and noisy._scaler.noisy.all()
    assert plain._scaler is not None and not plain._scaler.noisy.any()
    assert (noisy.sample_x(theta[:3], 10) == np.round(noisy.sample_x(theta[:3], 10))).all()
    with pytest.raises(DataError, match="whole numbers"):
        noisy.log_likelihood([0.5, 1.0], theta[:1])
    with pytest.raises(DataError, match="fractions"):
        make(dequantise=True).fit(*training_set(100))


def test_files_and_members(trained: NLE, counting: NLE, tmp_path: Path) -> None:
    theta, x = training_set(5, seed=2)
    trained.save(tmp_path / "nle.pt")
    again = sp.load(tmp_path / "nle.pt", device="cpu")
    assert isinstance(again, NLE) and again.prior == trained.prior and again.n_ensemble == 2
    assert (again.log_likelihood(x, theta) == trained.log_likelihood(x, theta)).all()
    counting.save(tmp_path / "counts.pt")
    theta, x = rates(5, seed=2)
    assert (sp.load(tmp_path / "counts.pt", device="cpu").log_likelihood(x, theta) == counting.log_likelihood(x, theta)).all()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "nle.pt").read_bytes()[:-200])
    with pytest.raises(ModelFileError):
        sp.load(tmp_path / "cut.pt")
    with pytest.raises(ModelFileError, match="without an embedding"):
        sp.load(tmp_path / "nle.pt", embedding=torch.nn.Identity())


def test_an_embedding_of_ones_own(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh())
    nle = make(embedding=net, config=sp.TrainConfig(max_epochs=1)).fit(*training_set(200))
    nle.save(tmp_path / "nle.pt")
    with pytest.raises(ModelFileError, match="Sequential"):
        sp.load(tmp_path / "nle.pt")
    again = sp.load(tmp_path / "nle.pt", embedding=torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh()), device="cpu")
    theta, x = training_set(4, seed=1)
    assert (again.log_likelihood(x, theta) == nle.log_likelihood(x, theta)).all()


def test_a_store_a_seed_and_a_checkpoint(tmp_path: Path) -> None:
    store = sp.simulate(SIM, 300, tmp_path / "store", seed=1)
    quick = sp.TrainConfig(max_epochs=2)
    one, two = (make(config=quick).fit(s) for s in (store, tmp_path / "store"))
    theta, x = training_set(5, seed=2)
    assert (one.log_likelihood(x, theta) == two.log_likelihood(x, theta)).all()
    assert one.identity is not None and one.observables is not None
    kept = make(config=quick).fit(store, checkpoint=tmp_path / "check")
    again = make(config=quick).fit(store, checkpoint=tmp_path / "check")
    assert (kept.log_likelihood(x, theta) == again.log_likelihood(x, theta)).all()
    assert len(again.history[0]) == 2
    with pytest.raises(DataError, match="together with a store"):
        make().fit(store, x)


@pytest.mark.parametrize(
    ("x", "theta", "event_set", "error", "match"),
    [
        (np.zeros((0, 2)), [[0.0, 0.0]], True, DataError, "no rows"),
        (np.zeros((3, 3)), [[0.0, 0.0]], True, ShapeError, "expected"),
        (np.zeros((3, 2)), np.zeros((2, 2)), False, ShapeError, "event_set=True"),
        ([np.nan, 0.0], [[0.0, 0.0]], False, NonFiniteError, "x has NaN"),
        ([0.0, 0.0], [[0.0, np.inf]], False, NonFiniteError, "theta"),
        ([0.0, 0.0], [[0.0, 0.0, 0.0]], False, ShapeError, "theta"),
    ],
)
def test_what_a_density_refuses(trained: NLE, x: object, theta: object, event_set: bool, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        trained.log_likelihood(x, theta, event_set=event_set)


def test_what_is_refused(trained: NLE, counting: NLE) -> None:
    with pytest.raises(SupportError, match="rate = 31"):
        counting.log_likelihood([3.0, 1.0], [[31.0]])
    with pytest.raises(DataError, match="row 1: -1 in column 0; expected counts >= 0"):
        counting.log_likelihood([[3.0, 1.0], [-1.0, 0.0]], [[2.0]], event_set=True)
    with pytest.raises(DataError, match="whole numbers"):
        counting.log_likelihood([3.5, 1.0], [[2.0]])
    with pytest.raises(ShapeError, match="event_set=True"):
        trained.posterior(np.zeros((3, 2)), 10)
    with pytest.raises(SettingError, match="not trained"):
        make().log_likelihood([0.0, 0.0], [[0.0, 0.0]])
    with pytest.raises(SettingError, match="dequantise"):
        make(dequantise="yes").fit(*training_set(100))
    with pytest.raises(SettingError, match="x_transform"):
        make(x_transform="lg").fit(*training_set(100))
    with pytest.raises(DataError, match="values <= 0"):
        make(x_transform="log").fit(*training_set(100))
    with pytest.raises(DataError, match="x is missing"):
        make().fit(training_set(100)[0])
    with pytest.raises(DataError, match="at least 20"):
        make().fit(*training_set(10))
    with pytest.raises(ShapeError, match="one event a row"):
        make().fit(training_set(100)[0], np.zeros((100, 2, 2)))
    with pytest.raises(DataError, match="no column that varies"):
        make().fit(training_set(100)[0], np.ones((100, 2)))


def test_a_network_that_has_gone_wrong_is_an_error(trained: NLE) -> None:
    broken = make()
    broken._scaler, broken._nets = trained._scaler, [trained._nets[0]]
    weight = broken._nets[0].flow.context.bias
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    try:
        with pytest.raises(NonFiniteError, match="learned log density is nan"):
            broken.log_likelihood([0.0, 0.0], [[0.1, 0.2]])
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_the_flow_is_chosen_by_the_columns() -> None:
    """A Gaussian alone for many columns of counts, couplings for few or for numbers; what is asked for is kept."""
    rng = rng_for(0)
    prior = sp.BoxPrior([sp.Parameter("rate", low=5, high=50)])
    theta = prior.sample(200, rng)
    once = {"config": sp.TrainConfig(max_epochs=1), "embedding": SMALL, "device": "cpu"}
    counts = rng.poisson(np.repeat(theta, 4, axis=1)).astype(float)
    assert sp.NLE(prior, **once).fit(theta, counts).flow.n_layers == 0
    assert sp.NLE(prior, **once).fit(theta, counts[:, :3]).flow.n_layers == 3
    assert sp.NLE(prior, **once).fit(theta, counts + rng.random((200, 4))).flow.n_layers == 3
    assert sp.NLE(prior, flow="affine", **once).fit(theta, counts).flow == FlowConfig(kind="affine", n_layers=3, hidden=32)


# ---- the likelihood in the place of the simulator


EMULATOR_SIM = LinearGaussian(dim=2)
training_set_emulator = partial(toys.training_set, EMULATOR_SIM)
EMULATOR_SMALL = sp.EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
NO_COUPLINGS = sp.FlowConfig(n_layers=0)


@pytest.fixture(scope="module")
def nle() -> sp.NLE:
    config = sp.TrainConfig(max_epochs=12, batch_size=128)
    settings = {"embedding": EMULATOR_SMALL, "device": "cpu", "config": config, "simulator": EMULATOR_SIM}
    return sp.NLE(EMULATOR_SIM.prior, flow=NO_COUPLINGS, n_ensemble=2, **settings).fit(*training_set_emulator(3000))


@pytest.fixture(scope="module")
def npe(nle: sp.NLE) -> sp.NPE:
    config = sp.TrainConfig(batch_size=256)
    flow = sp.FlowConfig(n_layers=1, hidden=32)
    fresh = sp.NPE(EMULATOR_SIM.prior, flow=flow, embedding=EMULATOR_SMALL, device="cpu", config=config)
    return fresh.fit(simulator=nle.as_simulator(), online=True, n=40_000)


def test_rows_follow_the_likelihood(nle: sp.NLE) -> None:
    """At one theta, mean and covariance of x; the same generator gives the same rows."""
    emulator = nle.as_simulator()
    check_simulator(emulator, n_simulations=50)
    theta = np.array([0.7, -0.4])
    x = emulator.simulate(np.tile(theta, (40_000, 1)), rng_for(3))
    np.testing.assert_allclose(x.mean(axis=0), EMULATOR_SIM.expected(theta[None])[0], atol=0.08)
    np.testing.assert_allclose(np.cov(x.T), EMULATOR_SIM.noise**2 * np.eye(2), atol=0.03)
    assert not np.array_equal(x, emulator.simulate(np.tile(theta, (40_000, 1)), rng_for(4)))


def test_every_row_has_its_own_theta(nle: sp.NLE) -> None:
    """Row i of x belongs to row i of theta, whichever member drew it."""
    theta = EMULATOR_SIM.prior.sample(5000, rng_for(5))
    residual = (nle.as_simulator().simulate(theta, rng_for(6)) - EMULATOR_SIM.expected(theta)) / EMULATOR_SIM.noise
    assert 0.95 < residual.std() < 1.08
    assert np.abs(np.corrcoef(residual.T, theta.T)[:2, 2:]).max() < 0.1


def test_npe_on_emulated_pairs_learns_the_exact_posterior(npe: sp.NPE) -> None:
    """Divergence from the conjugate posterior on fresh pairs of the real simulator, in nats; the prior would be off by 2."""
    theta, x = training_set_emulator(2000, seed=7)
    assert -0.01 < (EMULATOR_SIM.exact_log_posterior(theta, x) - npe.log_prob(theta, x)).mean() < 0.05


def test_a_wrong_likelihood_is_passed_on(nle: sp.NLE) -> None:
    """NPE learns the posterior of the emulator, not of the truth: twice the noise in the likelihood, twice the noise learned."""
    noisy = LinearGaussian(dim=2, noise=2 * EMULATOR_SIM.noise)
    theta = EMULATOR_SIM.prior.sample(3000, rng_for(0, "theta"))
    wrong = sp.NLE(EMULATOR_SIM.prior, flow=NO_COUPLINGS, embedding=EMULATOR_SMALL, device="cpu", config=nle.config)
    wrong.fit(theta, noisy.simulate(theta, rng_for(0, "x")))
    residual = wrong.as_simulator().simulate(theta, rng_for(8)) - EMULATOR_SIM.expected(theta)
    assert residual.std() == pytest.approx(noisy.noise, rel=0.06)


def test_counts_stay_whole_and_totals_stay() -> None:
    """Multinomial counts beside a constant and a real column: what the training data exclude is never emulated."""
    prior = sp.BoxPrior([sp.Parameter("a", low=0.2, high=0.8)])
    theta, rng = prior.sample(1000, rng_for(0)), rng_for(1)
    counts = rng.multinomial(60, np.column_stack([theta / 2, theta / 2, 1 - theta]))
    x = np.column_stack([counts, np.full(1000, 2.5), theta + 0.1 * rng.standard_normal(theta.shape)])
    blocks = [sp.Observable("n", 3, kind="counts"), sp.Observable("y", 2)]
    nle = sp.NLE(prior, embedding=EMULATOR_SMALL, device="cpu", observables=blocks, config=sp.TrainConfig(max_epochs=5)).fit(theta, x)
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
    for same in (EMULATOR_SIM, nle.as_simulator()):
        sp.load(tmp_path / "npe.pt", simulator=same)
    with pytest.raises(SimulatorMismatchError, match="was trained with"):
        sp.load(tmp_path / "npe.pt", simulator=LinearGaussian(dim=3))


def test_what_it_refuses(nle: sp.NLE) -> None:
    with pytest.raises(SettingError, match="not trained"):
        sp.NLE(EMULATOR_SIM.prior).as_simulator()
    with pytest.raises(SettingError, match=r"Emulator cannot be sent to worker processes.*expected workers=0"):
        sp.NPE(EMULATOR_SIM.prior).fit(simulator=nle.as_simulator(), online=True, n=1000, workers=1)
    with pytest.raises(SettingError, match="stays in its process"):
        pickle.dumps(nle.as_simulator())
    prior = sp.BoxPrior([sp.Parameter("a", low=0, high=1)])
    theta = prior.sample(100, rng_for(0))
    boxed = sp.NLE(prior, embedding=EMULATOR_SMALL, device="cpu", config=sp.TrainConfig(max_epochs=1)).fit(theta, theta)
    with pytest.raises(SupportError):
        boxed.as_simulator().simulate(np.array([[1.5]]), rng_for(0))
    assert isinstance(nle.as_simulator(), Emulator)
