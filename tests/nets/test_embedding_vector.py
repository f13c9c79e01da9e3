"""The default summary network."""

import torch

from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP


def test_shapes_and_flattening() -> None:
    net = ResidualMLP(6, EmbeddingConfig(hidden=8, n_blocks=1, n_features=3))
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    assert net(x).shape == (5, 3)
    assert torch.equal(net(x), net(x.view(5, 6)))


def test_blocks_begin_as_the_identity_and_learn() -> None:
    net = ResidualMLP(4, EmbeddingConfig(hidden=8, n_blocks=2, n_features=2))
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    plain = net.last(torch.nn.functional.silu(net.first(x))) + net.straight(x)
    assert torch.allclose(net(x), plain)
    net(x).square().sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in net.down)
