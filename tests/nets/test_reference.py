"""The Gaussian references against scipy's densities, tables against pairs, and draws."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from sbi_phys.core.rng import torch_rng_for
from sbi_phys.nets.layers import GaussianLayer
from sbi_phys.nets.reference import LikelihoodReference, PosteriorReference


def moved(module: nn.Module, scale: float = 0.3) -> nn.Module:
    generator = torch_rng_for(0, "moved")
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return module


def rows(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch_rng_for(1, "rows")
    return tuple(torch.randn(n, k, generator=generator) for k in (4, 3, 2))  # type: ignore[return-value]


def test_the_posterior_is_that_of_the_flows_layer() -> None:
    h, x, u = rows()
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
    h, x, u = rows()
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
    h, x, u = rows()
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
