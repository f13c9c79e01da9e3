"""NRE against exact ratios and posteriors of a linear Gaussian, its event sets, gradients and files, and what it refuses."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit, logsumexp
from torch import Tensor, nn

import sbi_phys as sp
from sbi_phys.core.errors import ConvergenceError, DataError, ModelFileError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators import nre as module
from sbi_phys.estimators.base import load
from sbi_phys.estimators.nre import LOSSES, NRE, WANTED, Gaussians, balance, bnre_loss, carl_loss, joined, mean_over_prior, nre_c_loss
from sbi_phys.nets.classifier import ClassifierConfig
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.importance import importance_sample
from tests import toys
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2, noise=0.7)
training_set = partial(toys.training_set, SIM)
SMALL = EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
PAIRS = ClassifierConfig(hidden=0, n_features=16, rank=16)
QUICK = sp.TrainConfig(max_epochs=12, batch_size=128)


def make(**settings: object) -> NRE:
    defaults = {"seed": 1, "network": PAIRS, "embedding": SMALL, "device": "cpu", "config": QUICK}
    return NRE(SIM.prior, **{**defaults, **settings})


def exact_log_ratio(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return SIM.exact_log_posterior(theta, x) - SIM.prior.log_prob(theta)


@pytest.fixture(scope="module")
def trained() -> NRE:
    return make(n_ensemble=2).fit(*training_set(4000))


@pytest.mark.parametrize("loss", ["carl", "nre-c", "bnre"])
def test_every_loss_learns_the_exact_log_ratio(loss: str) -> None:
    """Errors on fresh joint pairs, where log r has a variance of about 1 and a mean of 1.6; and what BNRE's balance implies:

    E_joint[d* / d] >= 1 and E_marginal[(1 - d*) / (1 - d)] >= 1, d the classifier and d* the exact one (arXiv:2208.13624, theorem 1).
    """
    nre = make(loss=loss, contrast=4, config=sp.TrainConfig(max_epochs=15, batch_size=256)).fit(*training_set(3000))
    theta, x = training_set(2000, seed=7)
    exact = exact_log_ratio(x, theta)
    error = nre.log_ratio(x, theta) - exact
    assert exact.var() > 0.5
    assert (error**2).mean() < 0.12
    if loss == "bnre":
        other = np.roll(theta, -1, axis=0)
        joint = expit(exact) / expit(nre.log_ratio(x, theta))
        marginal = expit(-exact_log_ratio(x, other)) / expit(-nre.log_ratio(x, other))
        assert joint.mean() > 1 - 3 * joint.std() / np.sqrt(len(joint)) - 0.005
        assert marginal.mean() > 1 - 3 * marginal.std() / np.sqrt(len(marginal)) - 0.005


@pytest.mark.parametrize("reference", ["posterior", "likelihood"])
@pytest.mark.parametrize(
    "network",
    [pytest.param(PAIRS, marks=pytest.mark.slow), ClassifierConfig(hidden=16, n_features=16, rank=8)],
    ids=["products", "trunk"],
)
def test_a_narrow_posterior_is_found(reference: str, network: ClassifierConfig) -> None:
    """Noise of 2 % of the prior's width: 7 nats, where hardly a draw of the prior falls near the posterior."""
    narrow = LinearGaussian(dim=2, noise=0.02)
    theta = narrow.prior.sample(2000, rng_for(0, "theta"))
    x = narrow.simulate(theta, rng_for(0, "x"))
    nre = NRE(narrow.prior, seed=1, reference=reference, network=network, embedding=SMALL, device="cpu", config=QUICK).fit(theta, x)
    fresh = narrow.prior.sample(1000, rng_for(1, "theta"))
    x = narrow.simulate(fresh, rng_for(1, "x"))
    exact = narrow.exact_log_posterior(fresh, x) - narrow.prior.log_prob(fresh)
    assert exact.mean() > 6.5
    assert abs(np.median(nre.log_ratio(x, fresh) - exact)) < 1.0


def test_nre_a_is_carl() -> None:
    theta, x = training_set(5, seed=3)
    quick = {"config": sp.TrainConfig(max_epochs=1, batch_size=64)}
    one, other = (make(loss=loss, **quick).fit(*training_set(200)).log_ratio(x, theta) for loss in ("carl", "nre-a"))
    np.testing.assert_array_equal(one, other)


def test_mean_ratio_is_one_and_the_outputs_balance(trained: NRE) -> None:
    theta, x = training_set(4000, seed=8)
    joint, marginal = trained.log_ratio_pairs(theta, x)
    assert np.exp(marginal).mean() == pytest.approx(1, abs=0.15)
    d = [1 / (1 + np.exp(-f)) for f in (joint, marginal)]
    assert d[0].mean() + d[1].mean() == pytest.approx(1, abs=0.025)


def test_the_marginal_pairs_are_of_the_next_theta(trained: NRE) -> None:
    theta, x = training_set(6, seed=3)
    other = theta[[1, 2, 3, 4, 5, 0]]
    joint, marginal = trained.log_ratio_pairs(theta, x)
    np.testing.assert_array_equal(joint, trained.log_ratio(x, theta))
    np.testing.assert_array_equal(marginal, trained.log_ratio(x, other))
    joint, marginal = trained.log_ratio_pairs(theta, x, normalise=True)
    np.testing.assert_allclose(joint, trained.log_ratio(x, theta, normalise=True), atol=1e-5)
    np.testing.assert_allclose(marginal, trained.log_ratio(x, other, normalise=True), atol=1e-5)


# the mean over the prior


def test_a_normalised_ratio_has_mean_one_over_the_prior_at_every_x(trained: NRE) -> None:
    _, x = training_set(6, seed=3)
    side = np.linspace(-6, 6, 101)
    u = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    weight = np.exp(standard_normal_log_prob(u)) * (side[1] - side[0]) ** 2
    raw = np.array([np.log(weight @ np.exp(trained.log_ratio(row, SIM.prior.from_unbounded(u)))) for row in x])
    found = trained.prior_mean(x)
    assert (np.abs(raw - found.log_mean) < 4 * found.error).all()
    assert np.abs(raw).max() > 3 * np.abs(raw - found.log_mean).max()
    for row in x[:2]:
        mean = weight @ np.exp(trained.log_ratio(row, SIM.prior.from_unbounded(u), normalise=True))
        assert mean == pytest.approx(1, abs=0.05)
    # what a posterior says of the evidence is the same number
    assert trained.posterior(x[0], 2000, seed=1, method="grid").log_evidence == pytest.approx(found.log_mean[0], abs=0.05)


def test_a_function_of_x_alone_makes_no_difference_to_a_normalised_ratio() -> None:
    theta, x = training_set(40, seed=3)
    nre = make(config=sp.TrainConfig(max_epochs=2, batch_size=64)).fit(*training_set(600))
    raw = nre.log_ratio(x, theta)
    normalised = nre.log_ratio(x, theta, normalise=True)
    total = nre.log_ratio(x[:5], theta, event_set=True, normalise=True)
    with torch.no_grad():
        nre._nets[0].head.bias += 2.5
    np.testing.assert_allclose(nre.log_ratio(x, theta), raw + 2.5, atol=1e-4)
    np.testing.assert_allclose(nre.log_ratio(x, theta, normalise=True), normalised, atol=1e-4)
    np.testing.assert_allclose(nre.log_ratio(x[:5], theta, event_set=True, normalise=True), total, atol=1e-3)
    np.testing.assert_allclose(total[0], nre.log_ratio(x[:5], np.tile(theta[0], (5, 1)), normalise=True).sum(), atol=1e-3)
    joint, marginal = nre.log_ratio_pairs(theta, x, normalise=True)
    np.testing.assert_allclose(joint, normalised, atol=1e-4)
    np.testing.assert_allclose(marginal, nre.log_ratio(x, np.roll(theta, -1, axis=0), normalise=True), atol=1e-4)


# shapes


def test_one_observation_for_all_theta_and_row_by_row(trained: NRE) -> None:
    theta, x = training_set(5, seed=3)
    one = trained.log_ratio(x[0], theta)
    assert one.shape == (5,)
    np.testing.assert_allclose(one, trained.log_ratio(np.tile(x[0], (5, 1)), theta), atol=1e-5)
    np.testing.assert_allclose(one, trained.log_ratio(x[:1], theta), atol=1e-6)
    paired = trained.log_ratio(x, theta)
    np.testing.assert_allclose(paired, [trained.log_ratio(x[i], theta[i])[0] for i in range(5)], atol=1e-5)
    assert trained.log_ratio(torch.from_numpy(x), torch.from_numpy(theta)).tolist() == paired.tolist()


def test_a_set_of_events_is_the_sum_over_its_events(trained: NRE) -> None:
    theta, x = training_set(6, seed=3)
    total = trained.log_ratio(x, theta[:4], event_set=True)
    assert total.shape == (4,)
    np.testing.assert_allclose(total, [trained.log_ratio(x, np.tile(t, (6, 1))).sum() for t in theta[:4]], atol=1e-4)
    # as many events as theta are no pairs
    assert not np.allclose(trained.log_ratio(x, theta, event_set=True), trained.log_ratio(x, theta))
    np.testing.assert_allclose(trained.log_ratio(x[0], theta, event_set=True), trained.log_ratio(x[0], theta), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_chunks_do_not_matter(trained: NRE, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theta, x = training_set(7, seed=3)
    whole = [trained.log_ratio(x, theta, event_set=True), trained.log_ratio(x, theta), trained.log_ratio(x[0], theta)]
    gradient = trained._density(x, True).with_gradient(trained._u(theta))
    monkeypatch.setattr(module, "_PAIRS", {"cpu": chunk})
    parts = [trained.log_ratio(x, theta, event_set=True), trained.log_ratio(x, theta), trained.log_ratio(x[0], theta)]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for a, b in zip(gradient, trained._density(x, True).with_gradient(trained._u(theta)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_the_ensemble_is_the_mean_of_the_log_ratios(trained: NRE) -> None:
    theta, x = training_set(5, seed=3)
    members = []
    for net in trained._nets:
        one = make()
        one._scaler, one._nets = trained._scaler, [net]
        members.append(one.log_ratio(x, theta))
    assert (members[0] != members[1]).all()
    np.testing.assert_allclose(trained.log_ratio(x, theta), np.mean(members, axis=0), atol=1e-5)


def test_gradient_against_differences(trained: NRE) -> None:
    theta, x = training_set(4, seed=3)
    u = SIM.prior.to_unbounded(theta)
    for observed, event_set in ((x[0], False), (x, True)):
        density = trained._density(observed, event_set)
        value, gradient = density.with_gradient(torch.from_numpy(u.astype(np.float32)))
        np.testing.assert_allclose(value, trained.log_ratio(observed, theta, event_set=event_set), atol=1e-4)
        for j in range(2):
            step = 0.02 * np.eye(2)[j]
            up, down = (density.log_ratio(torch.from_numpy((u + s * step).astype(np.float32))) for s in (1, -1))
            np.testing.assert_allclose(gradient[:, j], (up - down) / 0.04, atol=0.05)


# posteriors


@pytest.mark.parametrize("method", ["auto", *(pytest.param(m, marks=pytest.mark.slow) for m in ("hmc", "emcee", "grid"))])
def test_draws_follow_the_exact_posterior(trained: NRE, method: str) -> None:
    x = np.array([0.8, -0.5])
    draws = trained.sample(x, 3000, seed=4, method=method)
    mean, covariance = SIM.posterior(x)
    sd = np.sqrt(np.diag(covariance))
    assert draws.shape == (3000, 2)
    assert np.abs((draws.mean(axis=0) - mean) / sd).max() < 0.25
    assert np.abs(draws.std(axis=0) / sd - 1).max() < 0.2


def test_draws_follow_from_the_seed(trained: NRE) -> None:
    x = np.array([0.8, -0.5])
    one, again, other = (trained.sample(x, 300, seed=seed) for seed in (4, 4, 5))
    assert (one == again).all()
    assert (one != other).any()


def test_draws_of_a_set_follow_the_exact_posterior(trained: NRE) -> None:
    """Five events of one theta: the exact posterior is that of their mean with a fifth of the noise's variance."""
    theta = np.array([[0.5, -0.3]])
    x = SIM.simulate(np.repeat(theta, 5, axis=0), rng_for(5))
    result = trained.posterior(x, 3000, seed=4, event_set=True)
    averaged = LinearGaussian(dim=2, noise=0.7 / np.sqrt(5))
    mean, covariance = averaged.posterior(x.mean(axis=0))
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((result.theta.mean(axis=0) - mean) / sd).max() < 0.5
    assert np.abs(result.theta.std(axis=0) / sd - 1).max() < 0.35
    assert result.n_effective >= 3000


def test_a_posterior_takes_a_proposal(trained: NRE) -> None:
    class Around:
        """N(0, I) in u."""

        def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
            return rng.standard_normal((n, 2))

        def log_prob(self, u: np.ndarray) -> np.ndarray:
            return -0.5 * (u**2).sum(axis=1) - np.log(2 * np.pi)

    x = np.array([0.2, 0.1])
    result = trained.posterior(x, 500, method="importance", proposal=Around())
    assert result.method == "importance"
    # the evidence of a ratio is E_prior[r] = 1
    assert importance_sample(
        lambda u: trained.log_ratio(x, SIM.prior.from_unbounded(u)) + Around().log_prob(u), Around(), 5000
    ).log_evidence == pytest.approx(0, abs=0.25)
    assert result.log_evidence == pytest.approx(0, abs=0.25)


# reproducibility and files


def test_same_seed_same_result_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (make(seed=s).fit(*training_set(600)) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    theta, x = training_set(5, seed=3)
    assert (one.log_ratio(x, theta) == again.log_ratio(x, theta)).all()
    assert (one.log_ratio(x, theta) != other.log_ratio(x, theta)).any()


def test_saved_and_loaded(trained: NRE, tmp_path: Path) -> None:
    theta, x = training_set(5, seed=3)
    trained.save(tmp_path / "nre.pt")
    again = load(tmp_path / "nre.pt", device="cpu")
    assert isinstance(again, NRE)
    np.testing.assert_array_equal(again.log_ratio(x, theta), trained.log_ratio(x, theta))
    assert (again.loss, again.contrast, again.prior, again.config) == (trained.loss, trained.contrast, trained.prior, trained.config)
    assert again.history == trained.history


class Doubled(nn.Module):
    """An embedding of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x**2], dim=1)


def test_an_embedding_of_ones_own_is_needed_again(tmp_path: Path) -> None:
    nre = make(embedding=Doubled(), config=sp.TrainConfig(max_epochs=1, batch_size=64)).fit(*training_set(200))
    nre.save(tmp_path / "nre.pt")
    with pytest.raises(ModelFileError, match="Doubled"):
        load(tmp_path / "nre.pt")
    theta, x = training_set(5, seed=3)
    again = load(tmp_path / "nre.pt", embedding=Doubled(), device="cpu")
    np.testing.assert_array_equal(again.log_ratio(x, theta), nre.log_ratio(x, theta))


def test_a_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    theta, x = training_set(5, seed=3)
    whole = make().fit(*training_set(400))
    with pytest.raises(KeyboardInterrupt):
        make().fit(*training_set(400), checkpoint=tmp_path / "check", progress=_Stops(5))
    resumed = make().fit(*training_set(400), checkpoint=tmp_path / "check")
    np.testing.assert_array_equal(resumed.log_ratio(x, theta), whole.log_ratio(x, theta))


class _Stops:
    """Progress that interrupts after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def task(self, description: str, total: float | None) -> "_Stops":
        return self

    def __enter__(self) -> "_Stops":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, n: float = 1, text: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def update(self, completed: float, text: str = "") -> None:
        return None


def test_fit_from_a_store(tmp_path: Path) -> None:
    store = sp.simulate(SIM, 400, tmp_path / "store", seed=0, workers=1)
    quick = {"config": sp.TrainConfig(max_epochs=2, batch_size=64)}
    from_store = make(**quick).fit(store)
    theta, x = store.read()
    from_arrays = make(**quick).fit(theta, x)
    np.testing.assert_array_equal(from_store.log_ratio(x[:5], theta[:5]), from_arrays.log_ratio(x[:5], theta[:5]))
    assert from_store.identity == store.identity
    streamed = make(**quick).fit(tmp_path / "store", memory=30_000)
    assert np.isfinite(streamed.log_ratio(x[:5], theta[:5])).all()


# what is refused


def test_theta_outside_the_prior_is_refused() -> None:
    prior = sp.BoxPrior([sp.Parameter("a", low=0, high=1, unit="EV")])
    theta = prior.sample(200, rng_for(0))
    nre = NRE(prior, embedding=SMALL, network=PAIRS, config=sp.TrainConfig(max_epochs=1, batch_size=64)).fit(theta, theta + 1)
    with pytest.raises(SupportError, match=r"1 of 2 rows outside the prior; the first is row 1: a = 1.5 EV, expected within \[0, 1\]"):
        nre.log_ratio([1.2], [[0.5], [1.5]])
    with pytest.raises(SupportError):
        nre.log_ratio([[1.2]], [-0.1], event_set=True)


def test_one_theta_serves_every_row(trained: NRE) -> None:
    theta, x = training_set(5, seed=3)
    np.testing.assert_array_equal(trained.log_ratio(x, theta[:1]), trained.log_ratio(x, np.tile(theta[0], (5, 1))))
    assert trained.log_ratio(x, theta[:1], event_set=True).shape == (1,)


def test_on_an_edge_the_ratio_is_that_of_just_inside() -> None:
    """Theta uniform on [0, 1], x ~ N(theta, 0.1): u of an edge is +-8.2, where no network has been (log r was -27 there)."""
    prior, rng = sp.BoxPrior([sp.Parameter("a", 0.0, 1.0)]), np.random.default_rng(0)
    theta = prior.sample(4000, rng)
    nre = sp.NRE(prior, seed=0, config=QUICK).fit(theta, theta + 0.1 * rng.standard_normal(theta.shape))
    for edge, inside in ((0.0, 1e-4), (1.0, 1 - 1e-4)):
        on, near = nre.log_ratio([[edge]], [[edge], [inside]])
        assert abs(on - near) < 1, (on, near)


def test_bad_observations_are_refused(trained: NRE) -> None:
    theta = np.zeros((4, 2))
    with pytest.raises(ShapeError, match=r"x has shape \(3,\)"):
        trained.log_ratio(np.zeros(3), theta)
    with pytest.raises(ShapeError, match="x holds 3 observations; expected one, or 4, as many as theta; event_set=True"):
        trained.log_ratio(np.zeros((3, 2)), theta)
    with pytest.raises(NonFiniteError, match="x has NaN"):
        trained.log_ratio([0.0, np.nan], theta)
    with pytest.raises(DataError, match=r"x has shape \(0, 2\), no events"):
        trained.log_ratio(np.zeros((0, 2)), theta, event_set=True)
    with pytest.raises(ShapeError, match=r"theta has shape \(4, 3\)"):
        trained.log_ratio(np.zeros(2), np.zeros((4, 3)))
    with pytest.raises(ShapeError, match="x holds 2 observations; expected one; event_set"):
        trained.sample(np.zeros((2, 2)), 10)
    with pytest.raises(SettingError, match="n_draws is 100; expected a power of two"):
        trained.prior_mean(np.zeros(2), n_draws=100)
    with pytest.raises(DataError, match=r"x has shape \(0, 2\), no observations"):
        trained.prior_mean(np.zeros((0, 2)))
    with pytest.raises(SettingError, match="event_set is 1"):
        trained.log_ratio(np.zeros(2), theta, event_set=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss": "nre-b"}, "loss is 'nre-b'; expected one of carl, nre-a, nre-c, bnre"),
        ({"contrast": 0}, "contrast is 0"),
        ({"reference": "gaussian"}, "reference is 'gaussian'; expected one of auto, posterior, likelihood"),
        ({"n_ensemble": 0}, "n_ensemble is 0"),
        ({"network": EmbeddingConfig()}, "network is a EmbeddingConfig"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(SettingError, match=complaint):
        make(**settings)


def test_untrained_and_incomplete_calls_are_refused(tmp_path: Path) -> None:
    theta, x = training_set(30)
    with pytest.raises(SettingError, match="this NRE is not trained"):
        make().log_ratio(x[0], theta)
    with pytest.raises(SettingError, match="this NRE is not trained"):
        make().save(tmp_path / "nre.pt")
    with pytest.raises(SettingError, match="prior is a str"):
        NRE("box")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="x is missing"):
        make().fit(theta)
    with pytest.raises(DataError, match="5 simulations; expected at least 20"):
        make().fit(theta[:5], x[:5])
    with pytest.raises(NonFiniteError):
        make().fit(theta, np.where(x == x[3, 0], np.nan, x))


# ---- losses


# pairs (x, theta) by the number of times they occur in 12
COUNTS = np.array([[3, 1, 1], [1, 2, 0], [1, 0, 3]])
N_CONTRASTS = 2


def table() -> tuple[Tensor, Tensor, Tensor]:
    """x, own theta and K other theta of all equally likely rows: x (12 12^K,), own (same), others (same, K)."""
    pairs = [(x, t) for x, t in product(range(3), range(3)) for _ in range(COUNTS[x, t])]
    thetas = [t for _, t in pairs]
    rows = [(x, t, *others) for (x, t) in pairs for others in product(thetas, repeat=N_CONTRASTS)]
    array = torch.tensor(rows)
    return array[:, 0], array[:, 1], array[:, 2:]


def exact() -> Tensor:
    p = torch.tensor(COUNTS, dtype=torch.float64) / 12
    return (p / p.sum(dim=1, keepdim=True) / p.sum(dim=0)).log()


def minimum(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Table of log odds f(x, theta) at which the exact mean of the loss is least."""
    x, own, others = table()
    f = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([f], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(f[x, own], f[x[:, None], others]).mean()
        value.backward()
        return value

    optimiser.step(closure)
    return f.detach()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_optimum_is_the_exact_log_ratio(name: str) -> None:
    found, truth = minimum(LOSSES[name]), exact()
    possible = torch.isfinite(truth)
    torch.testing.assert_close(found[possible], truth[possible], atol=2e-3, rtol=0)
    assert (found[~possible] < -4).all()  # pairs that never occur: on the way to minus infinity


@pytest.mark.parametrize("gamma", [0.2, 5.0])
def test_contrastive_optimum_for_any_odds(gamma: float) -> None:
    found, truth = minimum(lambda joint, contrast: nre_c_loss(joint, contrast, gamma)), exact()
    possible = torch.isfinite(truth)
    torch.testing.assert_close(found[possible], truth[possible], atol=2e-3, rtol=0)


def test_a_loss_without_none_would_leave_a_function_of_x_free() -> None:
    """The reason why NRE-B is not offered: adding c(x) to f does not change its loss, but changes all those that are."""
    x, own, others = table()
    truth = torch.where(torch.isfinite(exact()), exact(), torch.tensor(-20.0, dtype=torch.float64))
    moved = truth + torch.tensor([[0.5], [-0.2], [0.3]])

    def values(f: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        return float(loss(f[x, own], f[x[:, None], others]).mean())

    def nre_b(joint: Tensor, contrast: Tensor) -> Tensor:
        return -joint + torch.logsumexp(torch.cat([joint[:, None], contrast], dim=1), dim=1)

    assert values(moved, nre_b) == pytest.approx(values(truth, nre_b), abs=1e-9)
    for loss in LOSSES.values():
        assert values(moved, loss) > values(truth, loss) + 1e-3


def test_balance_is_zero_at_the_optimum_and_is_what_the_penalty_sees() -> None:
    x, own, others = table()
    truth = exact()
    joint, contrast = truth[x, own], truth[x[:, None], others]
    assert float(balance(joint, contrast)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(bnre_loss(joint, contrast), carl_loss(joint, contrast))
    moved = bnre_loss(joint + 1, contrast + 1) - carl_loss(joint + 1, contrast + 1)
    assert float(moved.mean()) == pytest.approx(100 * float(balance(joint + 1, contrast + 1)) ** 2)
    assert float(moved.mean()) > 1


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_far_log_odds_stay_finite(name: str) -> None:
    joint = torch.tensor([-300.0, 300.0, 0.0], requires_grad=True)
    contrast = torch.tensor([[300.0, -300.0], [0.0, 300.0], [-300.0, -300.0]], requires_grad=True)
    value = LOSSES[name](joint, contrast)
    assert value.shape == (3,)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert joint.grad is not None and torch.isfinite(joint.grad).all()
    assert contrast.grad is not None and torch.isfinite(contrast.grad).all()


def test_one_contrast_is_enough_for_every_loss() -> None:
    joint, contrast = torch.zeros(4), torch.zeros(4, 1)
    values = {name: float(loss(joint, contrast).mean()) for name, loss in LOSSES.items()}
    assert values["carl"] == values["nre-a"] == pytest.approx(2 * np.log(2))
    assert values["nre-c"] == pytest.approx(np.log(2))  # own or none, nothing known


# ---- the mean over the prior


Array = NDArray[np.float64]
OFFSET = np.array([3.0, -40.0, 0.0, 700.0])


def gaussian_ratio(mean: Array, width: Array, offset: Array) -> Callable[[Array, NDArray[np.int64]], Array]:
    """exp(offset_i) N(u; mean_i, width_i^2) / N(u; 0, I), whose mean over the prior is exp(offset_i)."""

    def log_ratio(u: Array, rows: NDArray[np.int64]) -> Array:
        z = (u - mean[rows][:, None]) / width[rows][:, None]
        found: Array = (
            offset[rows][:, None] + standard_normal_log_prob(z) - np.log(width[rows]).sum(axis=1)[:, None] - standard_normal_log_prob(u)
        )
        return found

    return log_ratio


def at(mean: Array, width: Array) -> Gaussians:
    return mean[:, None], np.stack([np.diag(w)[None] for w in width])


def four(dim: int) -> tuple[Array, Array]:
    rng = rng_for(0, "four")
    return rng.standard_normal((4, dim)), np.array([1.0, 0.1, 0.01, 0.001])[:, None] * rng.uniform(0.5, 2, (4, dim))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_means_of_narrow_ratios(dim: int) -> None:
    mean, width = four(dim)
    found = mean_over_prior(gaussian_ratio(mean, width, OFFSET), at(mean, width), n_draws=512, seed=1)
    assert (found.n_effective >= WANTED).all() and (found.error < 0.05).all()
    np.testing.assert_allclose(found.log_mean, OFFSET, atol=0.1)
    assert "4 observations" in found.summary()


@pytest.mark.parametrize("wrong", [30.0, 0.1], ids=["too wide", "too narrow"])
def test_starts_that_are_wrong_are_mended(wrong: float) -> None:
    mean, width = four(2)
    found = mean_over_prior(gaussian_ratio(mean, width, OFFSET), at(mean + 3 * width, wrong * width), n_draws=512, seed=1)
    assert (np.abs(found.log_mean - OFFSET) < 4 * found.error + 0.02).all()
    assert (found.error < 0.06).all()
    assert found.n_draws.max() > 512


def test_two_modes_far_apart_are_both_counted() -> None:
    """A Gaussian learned by maximum likelihood covers both, and next to none of its draws falls on either."""
    parts = [gaussian_ratio(np.full((1, 2), m), np.full((1, 2), 0.03), np.log([share])) for m, share in ((-1.5, 0.25), (1.5, 0.75))]

    def both(u: Array, rows: NDArray[np.int64]) -> Array:
        return np.asarray(logsumexp([part(u, rows) for part in parts], axis=0))

    found = mean_over_prior(both, at(np.full((1, 2), 0.75), np.full((1, 2), 1.3)), n_draws=512, seed=2)
    assert found.log_mean[0] == pytest.approx(0, abs=0.1)


def test_the_error_is_on_the_safe_side() -> None:
    n = 60
    mean, width = np.full((n, 2), 0.7), np.full((n, 2), 0.05)
    found = mean_over_prior(gaussian_ratio(mean, width, np.zeros(n)), at(mean, width), n_draws=256, seed=3)
    assert found.log_mean.std() < 1.1 * np.median(found.error)
    assert abs(found.log_mean.mean()) < 0.02


def test_draws_follow_from_seed_and_number() -> None:
    mean, width = four(2)

    def run(rows: slice, seed: int) -> Array:
        log_ratio = gaussian_ratio(mean[rows], width[rows], OFFSET[rows])
        return mean_over_prior(log_ratio, at(mean[rows], width[rows]), n_draws=256, seed=seed, first=rows.start, wanted=100).log_mean

    whole = run(slice(0, 4), 0)
    np.testing.assert_allclose(np.concatenate([run(slice(0, 1), 0), run(slice(1, 4), 0)]), whole, rtol=1e-12)
    assert (run(slice(0, 4), 1) != whole).all()


def test_parts_are_joined() -> None:
    mean, width = four(2)
    found = mean_over_prior(gaussian_ratio(mean, width, OFFSET), at(mean, width), n_draws=256, seed=0, wanted=100)
    twice = joined([found, found])
    np.testing.assert_array_equal(twice.log_mean, np.tile(found.log_mean, 2))
    assert len(twice.error) == len(twice.n_effective) == len(twice.n_draws) == 8


def test_a_thousand_needles_are_refused() -> None:
    def needles(u: Array, rows: NDArray[np.int64]) -> Array:
        return np.asarray(3000 * np.sin(200 * u).sum(axis=-1))

    with pytest.raises(ConvergenceError, match="the mean of the ratio over the prior at observation 7: .* expected at least 50"):
        mean_over_prior(needles, at(np.zeros((1, 2)), np.ones((1, 2))), n_draws=64, seed=0, first=7)
