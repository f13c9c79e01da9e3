"""NRE against exact ratios and posteriors of a linear Gaussian, its event sets, gradients and files, and what it refuses."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor, nn

import sbi_phys as sp
from sbi_phys.core.errors import DataError, ModelFileError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators import nre as module
from sbi_phys.estimators.base import load
from sbi_phys.estimators.nre import NRE
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
