"""The pair classifier: its parts against whole pairs, what holds by construction, and the exact last layer against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from sbi_phys.errors import SettingError, ShapeError
from sbi_phys.nets import classifier
from sbi_phys.nets.classifier import ClassifierConfig, PairClassifier, solve_last_layer
from sbi_phys.nets.embed import EmbeddingConfig
from sbi_phys.nets.layers import GaussianLayer
from sbi_phys.rng import torch_rng_for

SMALL = ClassifierConfig(hidden=16, n_blocks=2, n_features=8, rank=5)
EMBEDDING = EmbeddingConfig(hidden=16, n_blocks=1, n_features=8)


PRODUCTS = ClassifierConfig(hidden=0, n_features=8, rank=5)


def net(dim: int = 2, seed: int = 0, *, moved: bool = True, network: ClassifierConfig = SMALL, gaussian: bool = False) -> PairClassifier:
    """A network for x (3,), whose zero weights have been moved off zero if asked for."""
    module = PairClassifier(dim, (3,), network, EMBEDDING, seed=seed, gaussian=gaussian)
    if moved:
        generator = torch_rng_for(seed, "moved")
        with torch.no_grad():
            for p in module.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return module.eval()


def rows(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch_rng_for(1, "rows")
    return torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)


KINDS = [(SMALL, False), (PRODUCTS, False), (SMALL, True), (PRODUCTS, True)]
every_kind = pytest.mark.parametrize(("network", "gaussian"), KINDS, ids=["trunk", "products", "trunk, gaussian", "products, gaussian"])


@every_kind
def test_every_ratio_is_one_at_the_start(network: ClassifierConfig, gaussian: bool) -> None:
    x, u = rows()
    assert (net(moved=False, network=network, gaussian=gaussian)(x, u).abs() < 1e-6).all()
    assert (net(moved=True, network=network, gaussian=gaussian)(x, u) != 0).all()


@every_kind
@pytest.mark.parametrize("block", [256, 3])
def test_contrasts_are_pairs_with_the_next_rows(
    network: ClassifierConfig, gaussian: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "_BLOCK", block)
    x, u = rows()
    module = net(network=network, gaussian=gaussian)
    joint, contrast, _ = module.with_contrasts(x, u, 3)
    torch.testing.assert_close(joint, module(x, u), atol=1e-4, rtol=1e-4)
    assert contrast.shape == (7, 3)
    for k in range(3):
        torch.testing.assert_close(contrast[:, k], module(x, u[[(i + k + 1) % 7 for i in range(7)]]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", [SMALL, PRODUCTS])
@pytest.mark.parametrize(("n", "expected"), [(4, 3), (2, 1), (1, 1)])
def test_small_batches_have_fewer_contrasts(network: ClassifierConfig, n: int, expected: int) -> None:
    x, u = rows(n)
    assert net(network=network).with_contrasts(x, u, 10)[1].shape == (n, expected)


@every_kind
def test_parts_broadcast_as_sets_of_events(network: ClassifierConfig, gaussian: bool) -> None:
    x, u = rows()
    module = net(network=network, gaussian=gaussian)
    table = module.table(module.x_parts(x), module.theta_parts(u[:4]))
    assert table.shape == (4, 7)
    for i in range(4):
        torch.testing.assert_close(table[i], module(x, u[i].expand(7, 2)), atol=1e-4, rtol=1e-4)


def test_the_gaussian_term_is_that_of_the_flows_layer() -> None:
    x, u = rows()
    module, layer = net(network=PRODUCTS, gaussian=True), GaussianLayer(2)
    with torch.no_grad():
        context = module.x_parts(x)[2]
        z, log_det = layer.forward(u, context)
        torch.testing.assert_close(module._gaussian(context, u), log_det + 0.5 * (u**2).sum(1) - 0.5 * (z**2).sum(1), atol=1e-4, rtol=1e-4)
    # normalised: the mean of the ratio over the prior is one
    with torch.no_grad():
        draws = torch.randn(200_000, 2, generator=torch_rng_for(5))
        narrow = torch.tensor([0.2, -0.1, 0.4, 0.2, 0.3])
        assert float(module._gaussian(narrow, draws).exp().mean()) == pytest.approx(1, abs=0.02)


def test_the_classifier_leaves_the_gaussian_alone() -> None:
    x, u = rows()
    module = net(network=PRODUCTS, gaussian=True)
    joint, contrast, gaussian = module.with_contrasts(x, u, 3)
    (joint.sum() + contrast.sum()).backward()
    assert module.context is not None and module.context.weight.grad is None
    module.with_contrasts(x, u, 3)[2].sum().backward()
    assert float(module.context.weight.grad.abs().sum()) > 0
    assert (net().with_contrasts(x, u, 3)[2] == 0).all()
    assert gaussian.shape == (7,)


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
