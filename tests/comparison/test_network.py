"""The classifier of models: its features by hand, its start, and the exact solution of its last layer."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.comparison import network
from sbi_phys.comparison.network import ModelNet, finish, model_loss, solve_last_layer
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.training.scaling import XScaler

SMALL = EmbeddingConfig(hidden=16, n_blocks=1, n_features=8)


class Doubled(nn.Module):
    """An embedding of one's own, (n, 2) -> (n, 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def gaussians(n: int = 600, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Rows x (n, 2) ~ N(label, 1) in both columns, labels and weights 1."""
    rng = rng_for(0)
    label = rng.integers(0, k, n)
    x = torch.from_numpy((rng.standard_normal((n, 2)) + label[:, None]).astype(np.float32))
    return x, torch.from_numpy(label), torch.ones(n)


# ---- features and scores


def test_few_columns_have_all_products() -> None:
    net = ModelNet(2, (3,), SMALL, seed=0)
    x = torch.tensor([[1.0, 2.0, 5.0]])
    assert net.stages == (9, 17) and net.head.out_features == 1
    assert net.features(x)[0, :9].tolist() == [1, 2, 5, 1, 2, 5, 4, 10, 25]
    assert torch.equal(net.features(x)[:, 9:], F.silu(net.embedding(x)))


def test_many_columns_have_squares_of_a_few_combinations() -> None:
    net = ModelNet(2, (13,), SMALL, seed=0)
    x = torch.randn(4, 13, generator=torch.Generator().manual_seed(1))
    z = net.combine(x)
    assert net.stages == (16, 24)
    assert torch.equal(net.features(x)[:, :16], torch.cat([z, z * z], dim=1))
    assert ModelNet(2, (12,), SMALL, seed=0).combine is None


def test_an_embedding_of_ones_own_has_squares_of_combinations() -> None:
    net = ModelNet(2, (2,), Doubled(), seed=0)
    x = torch.tensor([[1.0, 3.0]])
    z = net.combine(2 * x)
    assert net.stages == (6,)  # a single choice
    assert torch.equal(net.features(x), torch.cat([z, z * z, F.silu(2 * x)], dim=1))


def test_counts_have_functions_of_their_total() -> None:
    counts = np.random.default_rng(1).poisson(20.0, (500, 3)).astype(np.float64)
    scaler = XScaler.fit(counts, np.ones(3, dtype=bool))
    net = ModelNet(2, (3,), SMALL, seed=0, scaler=scaler)
    assert net.counts and net.stages == (4, 13, 21)
    rows = np.array([[10.0, 20.0, 30.0], [0.0, 0.0, 0.0], [900.0, 0.0, 1.0]])
    total, m = rows.sum(axis=1), float((scaler.mean**2 / 4).sum())
    assert m == pytest.approx(60, rel=0.05)
    expected = [total / m - 1, np.log((1 + total) / (1 + m)), np.log((m + total) / (2 * m)), np.sqrt((total + 0.375) / m) - 1]
    assert net.features(scaler.apply(rows))[:, :4].detach().numpy() == pytest.approx(np.stack(expected, axis=1), abs=1e-4)


def test_real_columns_and_own_embeddings_have_no_totals() -> None:
    x = np.random.default_rng(1).poisson(20.0, (50, 2)).astype(np.float64)
    assert not ModelNet(2, (2,), SMALL, seed=0, scaler=XScaler.fit(x, np.array([True, False]))).counts
    assert not ModelNet(2, (2,), Doubled(), seed=0, scaler=XScaler.fit(x, np.array([True, True]))).counts


def test_all_models_are_equal_at_the_start_and_the_first_score_stays_zero() -> None:
    x, label, weight = gaussians()
    net = ModelNet(3, (2,), SMALL, seed=0)
    assert net(x).shape == (600, 3) and not net(x).any()
    assert model_loss(net, x, label, 2 * weight).detach().numpy() == pytest.approx(np.full(600, 2 * math.log(3)))
    solve_last_layer(net, x, label, weight)
    assert not net(x)[:, 0].any() and net(x)[:, 1:].abs().max() > 1


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    nets = [ModelNet(2, (2,), SMALL, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    first, same, other = (torch.cat([p.flatten() for p in net.embedding.parameters()]) for net in nets)
    assert torch.equal(first, same) and not torch.equal(first, other)


# ---- the last layer


def test_features_that_are_not_needed_are_left_out():
    rng = rng_for(8)
    label = torch.from_numpy(rng.integers(0, 2, 4000))
    for square, stage in ((0.0, 0), (1.0, 1)):  # the classes differ in their mean, or in a cube that products do not hold
        x = torch.from_numpy(rng.standard_normal((4000, 1)).astype(np.float32))
        x = x + 0.5 * label[:, None] if not square else torch.where(label[:, None] == 1, 3 * torch.sin(3 * x), x)
        net, weight = ModelNet(2, (1,), EmbeddingConfig(hidden=32, n_blocks=1, n_features=16), seed=0), torch.ones(4000)
        rows = [(x[a], label[a], weight[a]) for a in (slice(0, 3000), slice(3000, None))]
        assert finish(net, *rows) == net.stages[stage]
        assert bool((net.head.weight[0, net.stages[stage] :] == 0).all())


def test_the_last_layer_is_at_its_optimum():
    x, target, weight = gaussians()
    net = ModelNet(3, (2,), SMALL, seed=0)
    solve_last_layer(net, x, target, weight)
    loss = model_loss(net, x, target, weight).mean()
    loss.backward()
    assert loss < np.log(3)
    assert max(net.head.weight.grad.abs().max(), net.head.bias.grad.abs().max()) < 1e-4


def test_weights_count_as_repeated_rows() -> None:
    x, label, _ = gaussians(200, 2)
    n_times = torch.from_numpy(rng_for(3).integers(1, 4, 200))
    weighted, repeated = (ModelNet(2, (2,), SMALL, seed=0) for _ in range(2))
    solve_last_layer(weighted, x, label, n_times.float(), n_columns=2)
    solve_last_layer(
        repeated, x.repeat_interleave(n_times, dim=0), label.repeat_interleave(n_times), torch.ones(int(n_times.sum())), n_columns=2
    )
    assert torch.allclose(weighted(x), repeated(x), atol=1e-3)


def test_the_columns_of_a_scaled_gaussian_get_the_weights_of_theory() -> None:
    rng = rng_for(5)
    label = rng.integers(0, 2, 40_000)
    x = torch.from_numpy((rng.standard_normal((40_000, 1)) + label[:, None]).astype(np.float32))
    net = ModelNet(2, (1,), SMALL, seed=0)
    solve_last_layer(net, x, torch.from_numpy(label), torch.ones(40_000), n_columns=1)
    # log N(x; 1, 1) - log N(x; 0, 1) = x - 1/2; the error of a slope from 40000 rows is about 0.012
    assert float(net.head.weight[0, 0].detach()) == pytest.approx(1, abs=0.07)
    assert float(net.head.bias[0].detach()) == pytest.approx(-0.5, abs=0.06)
    assert not net.head.weight[0, 1:].any()


def test_a_last_layer_that_is_too_large_stays_as_trained_with_all_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    x, label, weight = gaussians()
    net = ModelNet(3, (2,), SMALL, seed=0)
    nn.init.constant_(net.head.weight, 0.1)
    size = net.head.weight.numel() + net.head.bias.numel()
    monkeypatch.setattr(network, "_MOST_WEIGHTS", size - 1)
    assert finish(net, (x[:400], label[:400], weight[:400]), (x[400:], label[400:], weight[400:])) == net.stages[-1]
    assert bool((net.head.weight == 0.1).all())
    monkeypatch.setattr(network, "_MOST_WEIGHTS", size)
    solve_last_layer(net, x, label, weight)
    assert not bool((net.head.weight == 0.1).any())
