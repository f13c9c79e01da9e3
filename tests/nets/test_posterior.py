"""The posterior network: draws and density agree, mixtures of networks, its start, and the widened proposal."""

import numpy as np
import pytest
import torch

from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import torch_rng_for
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import FlowProposal, PosteriorNet, encode_net, log_prob_nets, npe_loss, sample_net


def net(dim: int = 2, seed: int = 0, scale: float = 0.1) -> PosteriorNet:
    """A network for x (3,) with random weights, so that it is not at its start."""
    module = PosteriorNet(dim, (3,), FlowConfig(n_layers=2, hidden=16), EmbeddingConfig(hidden=16, n_features=8), seed=seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=torch_rng_for(seed, "moved"))
    return module.eval()


def observations(n: int) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch_rng_for(1, "x"))


@pytest.mark.parametrize("rows", [7, 10_000])
def test_density_of_rows_of_owners_and_of_one_observation_agree(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbi_phys.nets.posterior._CPU_ROWS", 3000)
    module, x = net(), observations(4)
    owner = torch.arange(rows) % 4
    u = torch.randn(rows, 2, generator=torch_rng_for(2, "u"))
    with torch.no_grad():
        exact = -npe_loss(module, u, x[owner]).numpy()
    np.testing.assert_allclose(log_prob_nets([module], u, x[owner]), exact, atol=1e-4)
    np.testing.assert_allclose(log_prob_nets([module], u, x, owner), exact, atol=1e-4)
    first = owner == 0
    np.testing.assert_allclose(log_prob_nets([module], u[first], x[:1]), exact[first.numpy()], atol=1e-4)


def test_draws_return_to_the_base_and_repeat_with_the_generator() -> None:
    module, x = net(), observations(3)
    u = sample_net(module, x, 500, torch_rng_for(3, "draws"))
    assert u.shape == (3, 500, 2)
    z, _ = encode_net(module, u.reshape(-1, 2), x, torch.arange(3).repeat_interleave(500))
    assert z.mean(0).abs().max() < 0.15 and (z.std(0) - 1).abs().max() < 0.1
    torch.testing.assert_close(u, sample_net(module, x, 500, torch_rng_for(3, "draws")))
    assert not torch.equal(u, sample_net(module, x, 500, torch_rng_for(4, "draws")))


def test_a_mixture_of_networks_is_the_mean_of_their_densities() -> None:
    members, x = [net(seed=0), net(seed=1)], observations(1)
    u = torch.randn(50, 2, generator=torch_rng_for(2, "u"))
    single = [log_prob_nets([m], u, x) for m in members]
    np.testing.assert_allclose(log_prob_nets(members, u, x), np.log(np.mean(np.exp(single), axis=0)), atol=1e-6)


def test_start_at_gives_the_moments_of_the_parameters() -> None:
    u = torch.randn(4000, 2, generator=torch_rng_for(5, "u")) @ torch.tensor([[0.5, 0.2], [0.0, 0.1]]) + torch.tensor([1.0, -2.0])
    module = PosteriorNet(2, (3,), FlowConfig(n_layers=2, hidden=16), EmbeddingConfig(hidden=16, n_features=8), seed=0)
    module.start_at(u)
    draws = sample_net(module, observations(1), 20_000, torch_rng_for(6, "draws"))[0]
    torch.testing.assert_close(draws.mean(0), u.mean(0), atol=0.02, rtol=0.02)
    torch.testing.assert_close(torch.cov(draws.T), torch.cov(u.T), atol=0.01, rtol=0.05)


def test_the_proposal_is_normalised_and_wider_than_the_network() -> None:
    module, x = net(1), observations(1)
    proposal = FlowProposal([module, net(1, seed=1)], x, prior_share=0.1)
    grid = np.linspace(-12, 12, 6001)[:, None]
    density = np.exp(proposal.log_prob(grid))
    assert np.trapezoid(density, grid[:, 0]) == pytest.approx(1, abs=2e-3)
    draws = proposal.sample(20_000, np.random.default_rng(0))
    for level in (-1.0, 0.0, 1.5):
        exact = np.trapezoid(density[grid[:, 0] <= level], grid[grid[:, 0] <= level, 0])
        assert (draws < level).mean() == pytest.approx(exact, abs=0.02)
    narrow = FlowProposal([module], x, scales=(1.0,), weights=(1.0,), prior_share=0.0)
    np.testing.assert_allclose(narrow.log_prob(grid[::100]), log_prob_nets([module], torch.from_numpy(grid[::100]).float(), x), atol=1e-3)


def test_bad_proposals() -> None:
    with pytest.raises(SettingError, match="expected as many positive numbers"):
        FlowProposal([net()], observations(1), scales=(1.0, 2.0))
    with pytest.raises(SettingError, match="prior_share"):
        FlowProposal([net()], observations(1), prior_share=1.0)
