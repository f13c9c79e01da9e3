"""The default embedding, and how embeddings are built."""

import pytest
import torch

from sbi_phys.core.errors import ShapeError
from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP, build_embedding


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


def test_an_embedding_is_built_from_settings_or_copied_from_a_module() -> None:
    built, n_features = build_embedding(EmbeddingConfig(hidden=8, n_features=3), (2, 3))
    assert isinstance(built, ResidualMLP) and n_features == 3 and built.training
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 5)).eval()
    copied, n_features = build_embedding(module, (2, 3))
    assert copied is not module and n_features == 5 and not copied.training
    with torch.no_grad():
        module[1].weight.zero_()
        assert copied(torch.ones(2, 2, 3)).abs().max() > 0.01 + module(torch.ones(2, 2, 3)).sub(module[1].bias).abs().max()


@pytest.mark.parametrize(("module", "got"), [(torch.nn.Identity(), r"\(2, 2, 3\)"), (torch.nn.Flatten(0), r"\(12,\)")])
def test_an_embedding_of_another_shape_is_refused(module: torch.nn.Module, got: str) -> None:
    with pytest.raises(
        ShapeError, match=rf"embedding {type(module).__name__} maps x of shape \(2, 2, 3\) to {got}; expected \(2, n_features\)"
    ):
        build_embedding(module, (2, 3))
