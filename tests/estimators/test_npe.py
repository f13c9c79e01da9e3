"""NPE against exact posteriors, its density against quadrature, its files, and what it refuses."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sbi_phys as sp
from sbi_phys.core.errors import (
    DataError,
    ModelFileError,
    NonFiniteError,
    SettingError,
    ShapeError,
    SimulatorMismatchError,
    SupportError,
)
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FLOWS, FlowConfig
from sbi_phys.priors import standard_normal_log_prob
from tests import toys
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2)
training_set = partial(toys.training_set, SIM)
SMALL = EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
QUICK = sp.TrainConfig(max_epochs=12, batch_size=128)


def make(**settings: object) -> sp.NPE:
    defaults = {"seed": 1, "flow": FlowConfig(n_layers=3, hidden=32), "embedding": SMALL, "device": "cpu", "config": QUICK}
    return sp.NPE(SIM.prior, **{**defaults, **settings})


@pytest.fixture(scope="module")
def trained() -> sp.NPE:
    return make(n_ensemble=2).fit(*training_set(3000))


@pytest.mark.parametrize("kind", FLOWS)
def test_every_flow_learns_the_conjugate_posterior(kind: str) -> None:
    """Mean expected divergence from the exact posterior on fresh pairs, in nats; the prior itself would be off by 2."""
    npe = make(flow=FlowConfig(kind=kind, n_layers=2, hidden=32)).fit(*training_set(3000))
    theta, x = training_set(2000, seed=7)
    divergence = (SIM.exact_log_posterior(theta, x) - npe.log_prob(theta, x)).mean()
    assert -0.01 < divergence < 0.08


def test_draws_follow_the_exact_posterior(trained: sp.NPE) -> None:
    x = training_set(5, seed=3)[1]
    draws = trained.sample(x, 20_000, seed=0)
    assert draws.shape == (5, 20_000, 2)
    mean, covariance = SIM.posterior(x)
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((draws.mean(axis=1) - mean) / sd).max() < 0.25
    assert np.abs(draws.std(axis=1) / sd - 1).max() < 0.15


def test_draws_and_density_agree(trained: sp.NPE) -> None:
    """E_q[g] by draws equals the integral of g q by quadrature, and q integrates to one."""
    x = training_set(1, seed=3)[1][0]
    axes = np.linspace(-5, 5, 301)
    grid = np.stack(np.meshgrid(axes, axes, indexing="ij"), -1).reshape(-1, 2)
    q = np.exp(trained.log_prob(grid, x)) * (axes[1] - axes[0]) ** 2
    assert q.sum() == pytest.approx(1, abs=2e-3)
    draws = trained.sample(x, 50_000, seed=5)
    for g in (lambda t: t[:, 0], lambda t: np.sin(3 * t[:, 1]), lambda t: t[:, 0] * t[:, 1]):
        assert g(draws).mean() == pytest.approx((g(grid) * q).sum(), abs=5 * g(draws).std() / np.sqrt(50_000) + 2e-3)


def test_density_on_a_box_is_normalised_and_never_leaves_it() -> None:
    """One bounded parameter whose posterior piles up at the upper edge: x = theta + noise, observed beyond the box."""
    prior = sp.BoxPrior([sp.Parameter("a", low=0, high=1)])
    theta = prior.sample(3000, rng_for(0))
    x = theta + 0.3 * rng_for(1).standard_normal(theta.shape)
    npe = sp.NPE(prior, flow=FlowConfig(n_layers=2, hidden=32), embedding=SMALL, config=QUICK).fit(theta, x)
    draws = npe.sample([1.2], 4000)
    assert prior.contains(draws).all()
    grid = (np.arange(4000) + 0.5) / 4000
    density = np.exp(npe.log_prob(grid[:, None], [1.2]))
    assert density.mean() == pytest.approx(1, abs=5e-3)
    exact = np.exp(-0.5 * ((1.2 - grid) / 0.3) ** 2)
    assert np.abs(density - exact / exact.mean()).mean() < 0.15
    assert npe.log_prob([[1.5]], [1.2])[0] == -np.inf


def test_simplex_with_counts() -> None:
    """Multinomial counts with a flat prior: Dirichlet(1 + n) exactly."""
    prior = sp.DirichletPrior([sp.Parameter(f"f{k}") for k in range(3)])
    theta = prior.sample(4000, rng_for(0))
    x = rng_for(1).multinomial(40, theta)
    npe = sp.NPE(prior, flow=FlowConfig(n_layers=3, hidden=32), embedding=SMALL, config=QUICK).fit(theta, x)
    assert npe._scaler is not None
    assert npe._scaler.counts.all()
    observed = np.array([20, 15, 5])
    draws = npe.sample(observed, 10_000)
    np.testing.assert_allclose(draws.sum(axis=1), 1, atol=1e-12)
    alpha = 1 + observed
    sd = np.sqrt(alpha * (alpha.sum() - alpha) / alpha.sum() ** 2 / (alpha.sum() + 1))
    assert np.abs((draws.mean(axis=0) - alpha / alpha.sum()) / sd).max() < 0.3


def test_same_seed_same_result_and_members_differ(trained: sp.NPE) -> None:
    x = training_set(3, seed=3)[1]
    assert (trained.sample(x, 50, seed=4) == trained.sample(x, 50, seed=4)).all()
    assert (trained.sample(x, 50, seed=4) != trained.sample(x, 50, seed=5)).any()
    again = make(n_ensemble=2).fit(*training_set(3000))
    assert (again.sample(x, 50) == trained.sample(x, 50)).all()
    one, other = trained._nets
    assert not torch.equal(one.flow.context.weight, other.flow.context.weight)


def test_training_does_not_touch_global_generators() -> None:
    before = torch.random.get_rng_state()
    make(config=sp.TrainConfig(max_epochs=1)).fit(*training_set(100)).sample(np.zeros(2), 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_save_and_load(trained: sp.NPE, tmp_path: Path) -> None:
    x = training_set(3, seed=3)[1]
    trained.save(tmp_path / "npe.pt")
    again = sp.load(tmp_path / "npe.pt", device="cpu")
    assert (again.sample(x, 20, seed=1) == trained.sample(x, 20, seed=1)).all()
    assert (again.log_prob(x, x) == trained.log_prob(x, x)).all()
    assert again.history == trained.history
    assert again.prior == trained.prior
    assert again.config == trained.config


def test_model_files_that_do_not_fit(trained: sp.NPE, tmp_path: Path) -> None:
    path = tmp_path / "npe.pt"
    with pytest.raises(SettingError, match="not trained"):
        make().save(path)
    path.write_bytes(b"no model")
    with pytest.raises(ModelFileError, match="no zip archive"):
        sp.load(path)
    other = make(simulator=LinearGaussian(dim=3, n_columns=2), config=sp.TrainConfig(max_epochs=1))
    other.fit(*training_set(100)).save(path)
    with pytest.raises(SimulatorMismatchError, match="was trained with"):
        sp.load(path, simulator=SIM)
    with pytest.raises(ModelFileError, match="without an embedding"):
        sp.load(path, embedding=nn.Identity())


def test_own_embedding_and_images(tmp_path: Path) -> None:
    theta, x = training_set(300)
    images = np.repeat(x[:, None, :], 4, axis=1)  # (n, 4, 2)
    embedding = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh())
    npe = make(embedding=embedding, config=sp.TrainConfig(max_epochs=2)).fit(theta, images)
    assert npe.embed(images[:7]).shape == (7, 5)
    assert npe.sample(images[0], 3).shape == (3, 2)
    npe.save(tmp_path / "npe.pt")
    with pytest.raises(ModelFileError, match="embedding of class Sequential"):
        sp.load(tmp_path / "npe.pt")
    again = sp.load(tmp_path / "npe.pt", embedding=nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh()))
    assert (again.sample(images[0], 3) == npe.sample(images[0], 3)).all()
    with pytest.raises(ShapeError, match=r"embedding Identity maps x of shape \(2, 4, 2\)"):
        make(embedding=nn.Identity()).fit(theta, images)


def test_training_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Breaks:
        """Progress that interrupts after five epochs."""

        def __init__(self) -> None:
            self.n = 0

        def task(self, description: str, total: float | None) -> "Breaks":
            return self

        def __enter__(self) -> "Breaks":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def advance(self, n: float = 1, text: str = "") -> None:
            self.n += 1
            if self.n == 5:
                raise Stop

        def update(self, completed: float, text: str = "") -> None:
            return None

    theta, x = training_set(500)
    with pytest.raises(Stop):
        make().fit(theta, x, checkpoint=tmp_path / "train.ckpt", progress=Breaks())
    resumed = make().fit(theta, x, checkpoint=tmp_path / "train.ckpt")
    assert (resumed.sample(x[0], 10) == make().fit(theta, x).sample(x[0], 10)).all()


def test_proposal_is_a_normalised_density_that_matches_its_draws(trained: sp.NPE) -> None:
    x = training_set(1, seed=3)[1][0]
    proposal = trained.proposal(x, prior_share=0.05)
    axes = np.linspace(-7, 7, 281)
    grid = np.stack(np.meshgrid(axes, axes, indexing="ij"), -1).reshape(-1, 2)
    q = np.exp(proposal.log_prob(grid)) * (axes[1] - axes[0]) ** 2
    assert q.sum() == pytest.approx(1, abs=2e-3)
    u = proposal.sample(40_000, rng_for(0))
    np.testing.assert_allclose(u.mean(axis=0), (grid * q[:, None]).sum(axis=0), atol=0.02)
    weights = np.exp(SIM.log_likelihood(x, SIM.prior.from_unbounded(u)) + standard_normal_log_prob(u) - proposal.log_prob(u))
    # the mean weight is the evidence, known in closed form: x ~ N(0, A A^T + noise^2 I)
    covariance = SIM.matrix @ SIM.matrix.T + SIM.noise**2 * np.eye(2)
    evidence = np.exp(-0.5 * x @ np.linalg.solve(covariance, x)) / np.sqrt(np.linalg.det(2 * np.pi * covariance))
    assert weights.mean() == pytest.approx(evidence, rel=5 * weights.std() / weights.mean() / 200)
    assert weights.sum() ** 2 / (weights**2).sum() > 0.5 * len(u)


def test_map_is_the_mode(trained: sp.NPE) -> None:
    x = training_set(1, seed=3)[1][0]
    mode = trained.map(x)
    assert trained.log_prob(mode, x)[0] >= trained.log_prob(trained.sample(x, 5000), x).max() - 1e-6
    assert np.abs(mode - SIM.posterior(x)[0]).max() < 0.2


def test_fit_from_a_store(tmp_path: Path) -> None:
    store = sp.simulate(SIM, 400, tmp_path / "store", seed=0, workers=1)
    npe = make(config=sp.TrainConfig(max_epochs=1)).fit(store)
    assert npe.identity is not None
    assert (
        make(config=sp.TrainConfig(max_epochs=1)).fit(str(tmp_path / "store")).sample(np.zeros(2), 3) == npe.sample(np.zeros(2), 3)
    ).all()
    with pytest.raises(SimulatorMismatchError, match="expected"):
        sp.NPE(sp.BoxPrior([sp.Parameter("a", 0, 1)])).fit(store)
    with pytest.raises(DataError, match="together with a store"):
        make().fit(store, np.zeros((400, 2)))


def test_what_it_refuses(trained: sp.NPE) -> None:
    theta, x = training_set(100)
    for bad_theta, bad_x, error, words in [
        (theta[:0], x[:0], DataError, "no rows"),
        (theta[:5], x[:5], DataError, "5 simulations; expected at least 20"),
        (theta, x[:50], ShapeError, "theta has 100, x has 50"),
        (theta[:, :1], x, ShapeError, r"expected \(n, 2\) = \('t0', 't1'\)"),
        (np.where(theta > 1, np.nan, theta), x, NonFiniteError, "theta"),
        (theta, np.where(x > 1, np.inf, x), NonFiniteError, "x has NaN or Inf"),
        (theta, None, DataError, "x is missing"),
    ]:
        with pytest.raises(error, match=words):
            make().fit(bad_theta, bad_x)
    with pytest.raises(SupportError, match="outside the prior"):
        sp.NPE(sp.BoxPrior([sp.Parameter("a", 0, 1), sp.Parameter("b", 0, 1)])).fit(theta, x)
    with pytest.raises(DataError, match="expected at least batch_size = 128"):
        make().fit(*training_set(100))
    for bad, error, words in [
        (np.zeros(3), ShapeError, r"x has shape \(3,\); expected \(2,\)"),
        ([np.nan, 0], NonFiniteError, "x has NaN"),
    ]:
        with pytest.raises(error, match=words):
            trained.sample(bad, 10)
    with pytest.raises(SettingError, match="n is 0"):
        trained.sample(x[0], 0)
    with pytest.raises(DataError, match="as many as theta"):
        trained.log_prob(theta[:3], x[:2])
    with pytest.raises(SettingError, match="not trained"):
        make().sample(x[0], 1)
    with pytest.raises(SettingError, match="did you mean 'spline'"):
        make(flow="splines")
    with pytest.raises(SettingError, match="expected a prior"):
        sp.NPE("prior")
    with pytest.raises(SettingError, match="device is 'gpu'"):
        make(device="gpu")


@pytest.mark.cuda
def test_on_cuda() -> None:
    npe = make(device="cuda").fit(*training_set(3000))
    theta, x = training_set(2000, seed=7)
    assert (SIM.exact_log_posterior(theta, x) - npe.log_prob(theta, x)).mean() < 0.08


def test_a_store_is_streamed_where_memory_is_short(tmp_path: Path) -> None:
    """Streamed rows teach the same posterior as rows in memory; a wrong scaling or a lost row would show in nats."""
    store = sp.simulate(SIM, 3000, tmp_path / "store", seed=0, workers=1, shard_size=500)
    theta, x = training_set(2000, seed=7)
    for memory in (2**17, 2**30):
        npe = make().fit(store, memory=memory)
        assert (SIM.exact_log_posterior(theta, x) - npe.log_prob(theta, x)).mean() < 0.08
        assert npe.identity == store.identity
    other = sp.simulate(SIM, 1000, tmp_path / "other", seed=1, workers=1, shard_size=500)
    two = make(n_ensemble=2).fit([store, other], memory=2**17)
    assert [len(member) for member in two.history] == [12, 12]
    assert two.history[0] != two.history[1]


@pytest.mark.parametrize("n_ensemble", [1, 2])
def test_densities_of_draws_and_base_coordinates(trained: sp.NPE, n_ensemble: int) -> None:
    npe = trained if n_ensemble == 2 else make().fit(*training_set(1000))
    theta, x = training_set(40, seed=3)
    draws = npe.sample(x, 30, seed=2)
    log_q = npe.log_prob_draws(draws, x)
    want = np.stack([npe.log_prob(rows, one) for rows, one in zip(draws, x, strict=True)])
    np.testing.assert_allclose(log_q, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeError, match=r"draws has shape \(39, 30, 2\); expected \(40, n, 2\)"):
        npe.log_prob_draws(draws[1:], x)
    z = npe.latent(theta, x)
    if n_ensemble == 2:
        assert z is None
    else:
        assert z.shape == theta.shape
        assert np.abs(z.mean(axis=0)).max() < 0.8
        assert 0.6 < z.std() < 1.5
