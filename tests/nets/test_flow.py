"""Every flow: inverse, Jacobian against autograd, normalisation by quadrature, gradients, settings."""

import math

import pytest
import torch

from sbi_phys.core.errors import SettingError
from sbi_phys.nets.flow import FLOWS, AffineCoupling, ConditionalFlow, FlowConfig, GaussianLayer, coupling_splits

DIMS = (1, 2, 5)


def make(kind: str, dim: int, *, scale: float = 0.1, gaussian_layer: bool = True) -> ConditionalFlow:
    rng = torch.Generator().manual_seed(dim)
    config = FlowConfig(kind=kind, n_layers=3, hidden=16, gaussian_layer=gaussian_layer)
    flow = ConditionalFlow(dim, 4, config, rng=rng).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return flow.eval()


def batch(n: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(99)
    return 1.5 * torch.randn(n, dim, generator=rng, dtype=torch.float64), torch.randn(n, 4, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", FLOWS)
def test_decode_inverts_encode(kind: str, dim: int) -> None:
    flow, (u, h) = make(kind, dim), batch(200, dim)
    contexts = flow.contexts(h)
    z, log_det = flow.encode(u, contexts)
    again, back = flow.decode(z, contexts)
    assert (again - u).abs().max() < 1e-8
    assert (log_det + back).abs().max() < 1e-8
    assert (z - u).abs().max() > 0.05  # it does something


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", FLOWS)
def test_log_determinant_is_that_of_autograd(kind: str, dim: int) -> None:
    flow, (u, h) = make(kind, dim), batch(5, dim)
    _, log_det = flow.encode(u, flow.contexts(h))
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v, i=i: flow.encode(v[None], flow.contexts(h[i : i + 1]))[0][0], u[i])
        assert torch.linalg.slogdet(jacobian).logabsdet == pytest.approx(log_det[i].item(), abs=1e-10)


@pytest.mark.parametrize("kind", FLOWS)
def test_density_integrates_to_one(kind: str) -> None:
    """Trapezoid rule over +-15, in one and two dimensions."""
    for dim, n in ((1, 4001), (2, 501)):
        flow = make(kind, dim, scale=0.1)
        h = batch(1, dim)[1]
        axis = torch.linspace(-15, 15, n, dtype=torch.float64)
        grid = torch.cartesian_prod(*[axis] * dim).view(-1, dim)
        with torch.no_grad():
            total = flow.log_prob(grid, h.expand(len(grid), -1)).exp().sum() * (30 / (n - 1)) ** dim
        assert total.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("kind", FLOWS)
def test_gradients_reach_every_weight(kind: str) -> None:
    flow, (u, h) = make(kind, 3), batch(20, 3)
    flow.log_prob(u, h).sum().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0 or p.numel() == 0, name


def test_a_new_flow_is_its_base() -> None:
    for kind in FLOWS:
        flow = ConditionalFlow(3, 4, FlowConfig(kind=kind), rng=torch.Generator().manual_seed(0))
        u, h = (t.float() for t in batch(50, 3))
        assert (flow.log_prob(u, h) - torch.distributions.Normal(0, 1).log_prob(u).sum(1)).abs().max() < 1e-4


def test_gaussian_layer_alone_is_a_full_gaussian() -> None:
    """Against torch's MultivariateNormal with precision A^T A."""
    layer = GaussianLayer(3)
    context = torch.randn(1, layer.context_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean, log_scale, lower = layer._split(context)
    a = torch.diag(log_scale[0].exp()) @ (torch.eye(3, dtype=torch.float64) + lower[0])
    want = torch.distributions.MultivariateNormal(mean[0], precision_matrix=a.T @ a)
    u = batch(50, 3)[0]
    z, log_det = layer(u, context.expand(50, -1))
    got = -0.5 * (z * z).sum(1) - 1.5 * math.log(2 * math.pi) + log_det
    assert (got - want.log_prob(u)).abs().max() < 1e-9


def test_splits_change_every_feature() -> None:
    for dim in (1, 2, 5, 8):
        splits = coupling_splits(dim, 6, torch.Generator().manual_seed(0))
        assert len(splits) == 6
        for kept, changed in splits:
            assert sorted([*kept.tolist(), *changed.tolist()]) == list(range(dim))
            assert len(changed) >= 1
        assert set(torch.cat([c for _, c in splits[:2]]).tolist()) == set(range(dim))


def test_extreme_inputs_stay_finite() -> None:
    layer = AffineCoupling(torch.tensor([0]), torch.tensor([1]), hidden=8)
    z, log_det = layer(torch.full((1, 2), 1e6), torch.full((1, 8), 1e6))
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"kind": "splin"}, "did you mean 'spline'"), ({"n_layers": -1}, "n_layers"), ({"bound": 0.0}, "bound"), ({"n_bins": 1}, "n_bins")],
)
def test_bad_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        FlowConfig(**settings)
