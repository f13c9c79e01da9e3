"""The pair classifier: parts against whole pairs, the Gaussian references against scipy, and the exact last layer against scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from sbi_phys.core.errors import SettingError, ShapeError
from sbi_phys.core.rng import torch_rng_for
from sbi_phys.nets.classifier import (
    ClassifierConfig,
    LikelihoodReference,
    PairClassifier,
    PosteriorReference,
    newton,
    newton_step,
    solve_last_layer,
)
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import GaussianLayer

SMALL = ClassifierConfig(hidden=16, n_blocks=2, n_features=8, rank=5)
EMBEDDING = EmbeddingConfig(hidden=16, n_blocks=1, n_features=8)


PRODUCTS = ClassifierConfig(hidden=0, n_features=8, rank=5)


def net(
    dim: int = 2, seed: int = 0, *, moved: bool = True, network: ClassifierConfig = SMALL, reference: str | None = None
) -> PairClassifier:
    """A network for x (3,), whose zero weights have been moved off zero if asked for."""
    module = PairClassifier(dim, (3,), network, EMBEDDING, seed=seed, reference=reference)
    if moved:
        generator = torch_rng_for(seed, "moved")
        with torch.no_grad():
            for name, p in module.named_parameters():
                p += (0.05 if name.startswith("likelihood") else 0.3) * torch.randn(p.shape, generator=generator)
    return module.eval()


def rows(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch_rng_for(1, "rows")
    return torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)


KINDS = [(n, r) for n in (SMALL, PRODUCTS) for r in (None, "posterior", "likelihood")]
every_kind = pytest.mark.parametrize(("network", "reference"), KINDS, ids=lambda v: v if isinstance(v, str) else "")


@every_kind
def test_every_ratio_is_one_at_the_start(network: ClassifierConfig, reference: str | None) -> None:
    x, u = rows()
    assert (net(moved=False, network=network, reference=reference)(x, u).abs() < 1e-6).all()
    assert (net(moved=True, network=network, reference=reference)(x, u) != 0).all()


@every_kind
def test_contrasts_are_pairs_of_other_theta(network: ClassifierConfig, reference: str | None) -> None:
    """Without any from near the posterior, every contrast is the log odds of a row's x with another row's theta."""
    x, u = rows()
    module = net(network=network, reference=reference)
    joint, contrast, _ = module.with_contrasts(x, u, 3, torch_rng_for(4), near=0.0)
    torch.testing.assert_close(joint, module(x, u), atol=1e-4, rtol=1e-4)
    assert contrast.shape == (7, 3)
    table = module.table(module.x_parts(x), module.theta_parts(u)).T
    for i in range(7):
        others = table[i, [j for j in range(7) if j != i]]
        gap = (contrast[i][:, None] - others).abs().min(dim=1).values
        assert (gap < 1e-3 * (1 + contrast[i].abs())).all()


@pytest.mark.parametrize("reference", ["posterior", "likelihood"])
def test_log_odds_are_relative_to_what_the_contrasts_were_drawn_from(reference: str) -> None:
    """f less the loss's log odds is log q(u | x) / N(u; 0, I), and q is normalised."""
    x, u = rows()
    module = net(reference=reference)
    joint = module.with_contrasts(x, u, 3).joint
    context = module.proposal.x_part(module.embedding(x), x)  # type: ignore[union-attr]
    logs = [module.proposal(context, u, width) for width in (1.0, 2.0)]  # type: ignore[misc]
    tilt = torch.log(0.5 + 0.25 * logs[0].exp() + 0.25 * logs[1].exp())
    torch.testing.assert_close(module(x, u) - joint, tilt, atol=1e-4, rtol=1e-4)
    draws = torch.randn(200_000, 2, generator=torch_rng_for(5))
    narrow = torch.tensor([0.2, -0.1, 0.4, 0.2, 0.3])
    assert float(module._log_tilt(narrow, draws, 0.5).exp().mean()) == pytest.approx(1, abs=0.02)


def test_contrasts_follow_the_density_that_they_are_said_to_have() -> None:
    """Half N(0, I), a quarter each N(mu, S) and N(mu, 4 S): E_q[p / q] is the mass of p, over any region that q reaches."""
    module = net(reference="posterior", network=PRODUCTS)
    assert module.proposal is not None
    context = torch.tensor([[3.0, -2.0, 1.0, 0.5, 0.7]]).expand(20_000, -1)
    u = torch.randn(20_000, 2, generator=torch_rng_for(8))
    drawn = module._draw(context, u, 4, 0.5, torch_rng_for(9)).view(-1, 2)
    torch.testing.assert_close(drawn.mean(dim=0), torch.tensor([1.5, -1.0]), atol=0.03, rtol=0)
    log_q = module._log_tilt(context[:1], drawn, 0.5)  # over N(0, I)
    side = drawn[:, 0] > 0
    assert float((torch.exp(-log_q) * side).mean()) == pytest.approx(0.5, abs=0.015)
    for width in (1.0, 2.0):
        weight = torch.exp(module.proposal(context[:1], drawn, width) - log_q)
        assert float(weight.mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("network", [SMALL, PRODUCTS])
def test_few_rows_have_contrasts_all_the_same(network: ClassifierConfig, n: int) -> None:
    x, u = rows(n)
    assert torch.isfinite(net(network=network, reference="likelihood").with_contrasts(x, u, 10).contrast).all()


@every_kind
def test_parts_broadcast_as_sets_of_events(network: ClassifierConfig, reference: str | None) -> None:
    x, u = rows()
    module = net(network=network, reference=reference)
    table = module.table(module.x_parts(x), module.theta_parts(u[:4]))
    assert table.shape == (4, 7)
    for i in range(4):
        torch.testing.assert_close(table[i], module(x, u[i].expand(7, 2)), atol=1e-4, rtol=1e-4)


@every_kind
def test_the_classifier_leaves_the_gaussians_alone(network: ClassifierConfig, reference: str | None) -> None:
    x, u = rows()
    module = net(network=network, reference=reference)
    joint, contrast, learned = module.with_contrasts(x, u, 3)
    (joint.sum() + contrast.sum()).backward()
    parts = [p for part in (module.proposal, module.likelihood) if part is not None for p in part.parameters()]
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in parts)
    assert learned.shape == (7,)
    if reference is None:
        assert (learned == 0).all()
        return
    module.with_contrasts(x, u, 3).learned.sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in parts)


def test_differences_chain_and_change_sign() -> None:
    x, u = rows()
    v, w = u.roll(1, 0), u.roll(2, 0)
    module = net()
    torch.testing.assert_close(module.difference(x, u, v), -module.difference(x, v, u))
    torch.testing.assert_close(module.difference(x, u, v) + module.difference(x, v, w), module.difference(x, u, w))
    by_features = module.difference_features(x, u, v) @ module.head.weight[0]
    torch.testing.assert_close(module.difference(x, u, v), by_features, atol=1e-4, rtol=1e-4)


def test_without_theta_it_is_a_function_of_x() -> None:
    x, _ = rows()
    module = net(dim=0)
    nothing = torch.zeros(7, 0)
    torch.testing.assert_close(module(x, nothing), module.difference(x, nothing, nothing))
    assert module(x, nothing).unique().numel() == 7


def test_weights_follow_from_the_seed_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = net(moved=False), net(moved=False), net(seed=1, moved=False)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.left.weight, same.left.weight)
    assert not torch.equal(one.left.weight, other.left.weight)


class Columns(nn.Module):
    """Embedding of the user's own, of the shape asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(self.shape) if self.shape else x.sum(dim=2)


def test_an_embedding_of_ones_own() -> None:
    module = PairClassifier(2, (4, 3), SMALL, Columns(()), seed=0)
    assert module(torch.ones(5, 4, 3), torch.ones(5, 2)).shape == (5,)
    with pytest.raises(ShapeError, match=r"\(2, 4, 3\) to \(3, 3\); expected \(2, n_features\)"):
        PairClassifier(2, (4, 3), SMALL, Columns((3, 3)), seed=0)


@pytest.mark.parametrize("name", ["theta_hidden", "n_features", "rank"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(SettingError, match=f"classifier {name} is 0"):
        ClassifierConfig(**{name: 0})


# the last layer


def labelled(n: int = 600, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch_rng_for(seed, "labelled")
    features = torch.randn(n, 4, generator=generator)
    p = torch.sigmoid(features @ torch.tensor([1.0, -0.5, 0.0, 0.3]) + 0.7)
    label = (torch.rand(n, generator=generator) < p).float()
    weight = 0.5 + torch.rand(n, generator=generator)
    return features, label * weight, (1 - label) * weight


def test_the_last_layer_is_the_logistic_regression() -> None:
    features, w1, w0 = labelled()
    head = nn.Linear(4, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    chunks = [tuple(t[:250] for t in (features, w1, w0)), tuple(t[250:] for t in (features, w1, w0))]
    assert solve_last_layer(head, chunks, [labelled(seed=3)])
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(features, (w1 > 0).numpy(), sample_weight=(w1 + w0).numpy())
    np.testing.assert_allclose(head.weight.detach().numpy(), model.coef_, atol=2e-4)
    np.testing.assert_allclose(head.bias.detach().numpy(), model.intercept_, atol=2e-4)
    p = torch.sigmoid(head(features).squeeze(-1)).detach()
    # the balance: what the classifier says of all rows is the weight of the numerator
    assert float(((w1 + w0) * p).sum()) == pytest.approx(float(w1.sum()), rel=1e-4)


def test_the_constant_can_be_held() -> None:
    head = nn.Linear(4, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 0.25)
    assert solve_last_layer(head, [labelled()], [labelled(seed=3)], intercept=False)
    assert float(head.bias.detach()) == 0.25
    assert float(head.weight.detach().abs().max()) > 0.5


def test_a_worse_last_layer_is_not_taken() -> None:
    features, w1, w0 = labelled(30)
    head = nn.Linear(4, 1)
    before = head.weight.detach().clone()
    assert not solve_last_layer(head, [(features, w1, w0)], [(features, w0, w1)])  # held-out rows that say the opposite
    assert torch.equal(head.weight, before)


def moved(module: nn.Module, scale: float = 0.3) -> nn.Module:
    generator = torch_rng_for(0, "moved")
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return module


def three_rows(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch_rng_for(1, "rows")
    return tuple(torch.randn(n, k, generator=generator) for k in (4, 3, 2))  # type: ignore[return-value]


def test_the_posterior_is_that_of_the_flows_layer() -> None:
    h, x, u = three_rows()
    reference, layer = moved(PosteriorReference(2, 4)), GaussianLayer(2)
    with torch.no_grad():
        context = reference.x_part(h, x)  # type: ignore[operator]
        z, log_det = layer.forward(u, context)
        expected = log_det + 0.5 * (u**2).sum(1) - 0.5 * (z**2).sum(1)
        torch.testing.assert_close(reference(context, u), expected, atol=1e-4, rtol=1e-4)
        wide = log_det - 2 * np.log(3.0) + 0.5 * (u**2).sum(1) - 0.5 * (z**2).sum(1) / 9
        torch.testing.assert_close(reference(context, u, 3.0), wide, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.forward(reference.draw(context, z[:, None])[:, 0], context)[0], z, atol=1e-4, rtol=1e-4)  # type: ignore[operator]


def test_the_likelihood_is_a_ratio_of_normal_densities() -> None:
    h, x, u = three_rows()
    reference = moved(LikelihoodReference(2, 3), 0.1)
    assert isinstance(reference, LikelihoodReference)
    with torch.no_grad():
        found = reference(reference.x_part(h, x), reference.theta_part(u)).numpy()
        context = reference.context(reference.theta(u)).double().numpy()
        turn = np.eye(3)
        turn[np.tril_indices(3, -1)] = reference.lower.double().numpy()
    t = x.double().numpy() / np.sqrt(1 + (x.double().numpy() / 10) ** 2)
    for i in range(len(x)):
        inverse = np.diag(np.exp(12 * np.tanh(context[i, 3:] / 12))) @ turn
        covariance = np.linalg.inv(inverse.T @ inverse)
        expected = multivariate_normal(context[i, :3], covariance).logpdf(t[i]) - multivariate_normal(np.zeros(3), np.eye(3)).logpdf(t[i])
        assert found[i] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("reference", [PosteriorReference(2, 4), LikelihoodReference(2, 3)], ids=["posterior", "likelihood"])
def test_zero_at_the_start_and_tables_are_pairs(reference: PosteriorReference | LikelihoodReference) -> None:
    h, x, u = three_rows()
    with torch.no_grad():
        assert reference(reference.x_part(h, x), reference.theta_part(u)).abs().max() < 1e-5
        moved(reference)
        events, thetas = reference.x_part(h, x), reference.theta_part(u[:4])
        table = reference.table(events, thetas)
        assert table.shape == (4, 6)
        torch.testing.assert_close(table, reference(events[None], thetas[:, None]), atol=1e-3, rtol=1e-4)


def test_a_stray_value_has_a_bounded_say() -> None:
    reference = moved(LikelihoodReference(2, 3))
    assert isinstance(reference, LikelihoodReference)
    far = reference.x_part(torch.zeros(1, 4), torch.tensor([[1e6, 0.0, 0.0]]))
    further = reference.x_part(torch.zeros(1, 4), torch.tensor([[1e9, 0.0, 0.0]]))
    torch.testing.assert_close(far, further)
    assert float(far[0, -1].detach()) == pytest.approx(50.0, rel=1e-3)


def test_newton_finds_the_minimum_and_never_goes_uphill() -> None:
    """f = sum log cosh(a t - 1), whose full Newton steps diverge from far away."""
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    seen: list[float] = []

    def objective(t: Tensor) -> float:
        return float((a * t - 1).cosh().log().sum())

    def derivatives(t: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(objective(t))
        slope = (a * t - 1).tanh()
        return a * slope, torch.diag(a**2 * (1 - slope**2) + 1e-9)

    found = newton(objective, derivatives, torch.tensor([3.0, -1.0], dtype=torch.float64), n_steps=60, gain=1e-14)
    torch.testing.assert_close(found, 1 / a, atol=1e-6, rtol=0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(seen))
    stuck, _ = newton_step(objective, found, -torch.ones_like(a), torch.eye(2, dtype=torch.float64))
    assert objective(stuck) <= objective(found) + 1e-12
