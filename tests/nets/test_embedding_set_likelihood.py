"""The summaries of a set through the likelihood of its events: exact where the scores are."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import nn

from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.embedding_set import pad_sets
from sbi_phys.nets.embedding_set_likelihood import AnchoredFlow, EventScores, LikelihoodSet, contrastive_loss
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig

SMALL = EmbeddingConfig(hidden=16, n_blocks=1, n_features=5)
RANK = 2


class GaussianPsi(nn.Module):
    """Of e ~ N(A u, 1), two columns: e.Au - |Au|^2 / 2."""

    mixing = torch.tensor([[1.0, 0.0], [0.8, 0.6]])

    def forward(self, u):
        centre = u @ self.mixing.T.to(u.dtype)
        return torch.cat([centre, -0.5 * (centre**2).sum(dim=1, keepdim=True)], dim=1)


def exact_net(n_points=512):
    net = LikelihoodSet(2, 2, rank=RANK, n_points=n_points, config=SMALL).eval()
    net.scores.phi, net.scores.psi = nn.Identity(), GaussianPsi()
    return net


def summaries(net, sets):
    x = torch.from_numpy(pad_sets(sets).astype(np.float32))
    return tuple(t.detach().double().numpy() for t in net.summaries(*net._events(x.flatten(start_dim=1)), len(sets)))


def exact_posterior(events):
    """Mean, log diagonal and off-diagonal over diagonal of A, A^T A = precision, by its own route."""
    mixing = GaussianPsi.mixing.double().numpy()
    precision = np.eye(2) + len(events) * mixing.T @ mixing
    a = np.linalg.inv(np.linalg.cholesky(np.linalg.inv(precision)))
    return np.array([*np.linalg.solve(precision, mixing.T @ events.sum(axis=0)), *np.log(np.diag(a)), a[1, 0] / a[1, 1]])


@pytest.mark.parametrize("size", [0, 1, 7, 100, 1000])
def test_the_anchor_is_the_posterior_of_a_gaussian(size):
    """By some dozens of points: a tenth of a width, and of the widths, is what the flow is left with."""
    events = np.array([0.5, -0.1]) + rng_for(size).standard_normal((size, 2))
    events = events.astype(np.float32).astype(float)
    net, want = exact_net(2048), exact_posterior(events)
    pooled, anchor = summaries(net, [events])
    assert (np.abs(anchor[0] - want)[:2] * np.exp(want[2:4])).max() < 0.1
    np.testing.assert_allclose(anchor[0, 2:], want[2:], atol=0.1)
    assert pooled.shape[1] == net.rho.first.in_features - 1
    fits = pooled[0, RANK : RANK + 20].reshape(4, 5)[1:]
    if size == 100:  # the fits, given relative to the anchor, are exact where points are many enough: the anchor's own error is all
        np.testing.assert_allclose(fits[2, 2:], (want - anchor[0])[2:], atol=5e-3)


def test_the_flow_in_units_of_the_anchor_is_the_posterior_before_any_training():
    events = np.array([0.5, -0.1]) + rng_for(3).standard_normal((300, 2))
    _, anchor = summaries(exact_net(2048), [events])
    flow = AnchoredFlow(2, 3 + 5, FlowConfig(n_layers=2, hidden=8), rng=torch.Generator().manual_seed(0))
    features = torch.cat([torch.zeros(400, 3), torch.from_numpy(anchor).float().expand(400, 5)], dim=1)
    u, log_det = flow.decode(torch.randn(400, 2, generator=torch.Generator().manual_seed(1)), flow.contexts(features))
    want = exact_posterior(events)
    mixing = GaussianPsi.mixing.double().numpy()
    covariance = np.linalg.inv(np.eye(2) + 300 * mixing.T @ mixing)
    found = flow.log_prob(u, features).detach().numpy()
    difference = found - multivariate_normal.logpdf(u.detach().numpy(), want[:2], covariance)
    assert abs(difference.mean()) < 0.03
    assert difference.std() < 0.15
    z, back = flow.encode(u, flow.contexts(features))
    np.testing.assert_allclose(back.detach().numpy(), -log_det.detach().numpy(), atol=1e-4)
    assert z.std().item() == pytest.approx(1, abs=0.1)


def test_order_padding_and_the_other_sets_do_not_matter():
    net = LikelihoodSet(2, 1, hidden=8, rank=4, n_points=64, config=SMALL).eval()
    data = [rng_for(i).standard_normal((m, 2)) for i, m in enumerate([0, 1, 5, 40])]

    def run(sets, n_max=None):
        with torch.no_grad():
            return net(torch.from_numpy(pad_sets(sets, n_max).astype(np.float32))).numpy()

    want = run(data)
    np.testing.assert_allclose(run([s[::-1] for s in data], 60), want, atol=1e-5)
    np.testing.assert_allclose(run(data[3:]), want[3:], atol=1e-5)
    assert np.abs(run([data[3] + 0.5]) - want[3]).max() > 1e-3


def test_the_scores_are_learned_first_and_then_held():
    net = LikelihoodSet(2, 1, hidden=8, rank=4, n_points=64, config=SMALL)
    x, u = torch.from_numpy(pad_sets([np.ones((3, 2)), np.zeros((2, 2))]).astype(np.float32)), torch.randn(2, 1)
    net.learn_scores(True)
    contrastive_loss(net, u, x).sum().backward()
    assert all((w.grad is not None) == name.startswith("scores.") for name, w in net.named_parameters())
    net.zero_grad()
    net.learn_scores(False)
    net(x).square().sum().backward()
    assert all((w.grad is None) == name.startswith("scores.") for name, w in net.named_parameters())


def test_marginals_and_reading_from_a_summary():
    net = LikelihoodSet(2, 2, rank=RANK, n_points=4096, n_bins=4, config=SMALL).eval()
    net.scores.phi, net.scores.psi = nn.Identity(), GaussianPsi()
    events = np.array([0.5, -0.1]) + rng_for(1).standard_normal((4, 2))
    x = torch.from_numpy(pad_sets([events, np.zeros((0, 2))]).astype(np.float32))
    summary = net.summarise(x)
    assert not summary.requires_grad
    shares = summary[:, -6 - 8 : -6].reshape(2, 2, 4).double().numpy() / 2
    want, mixing = exact_posterior(events.astype(np.float32).astype(float)), GaussianPsi.mixing.double().numpy()
    sd = np.sqrt(np.diag(np.linalg.inv(np.eye(2) + 4 * mixing.T @ mixing)))
    edges = norm.ppf([0, 0.25, 0.5, 0.75, 1])
    exact = np.diff(norm.cdf((edges - want[:2, None]) / sd[:, None]), axis=1)
    np.testing.assert_allclose(shares[0], exact, atol=0.01)
    np.testing.assert_allclose(shares[1], 0.25, atol=2e-3)  # an empty set says nothing: the prior
    np.testing.assert_array_equal(net.read(summary).detach(), net(x).detach())


def test_the_contrastive_loss_is_a_softmax_over_the_parameters():
    net = exact_net()
    events = [rng_for(i).standard_normal((m, 2)) for i, m in enumerate([2, 3, 4])]
    u = torch.from_numpy(rng_for(9).standard_normal((3, 2)).astype(np.float32))
    centre = (u @ GaussianPsi.mixing.T).double().numpy()
    table = np.array([[-0.5 * ((e - c) ** 2).sum() for c in centre] for e in events])
    want = np.log(np.exp(table).sum(axis=1)) - np.diag(table)
    found = contrastive_loss(net, u, torch.from_numpy(pad_sets(events).astype(np.float32))).numpy()
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_bad_settings():
    for settings, word in (({"rank": 0}, "rank"), ({"n_points": 4}, "n_points"), ({"hidden": 0}, "hidden")):
        with pytest.raises(SettingError, match=word):
            LikelihoodSet(1, 1, **settings)
    with pytest.raises(SettingError, match="dim"):
        EventScores(1, 0)
