r"""The network of neural posterior estimation, q(u | x) = flow(u | h = embedding(x)): loss, draws, and equal mixtures of networks."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbi_phys.core.checks import require_number
from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import seed_for, torch_seeded
from sbi_phys.core.types import Array
from sbi_phys.nets.embedding_vector import EmbeddingConfig, build_embedding
from sbi_phys.nets.flow import ConditionalFlow, FlowConfig, base_log_prob
from sbi_phys.nets.flow_own import DistributionFlow, build_flow, draw_seed
from sbi_phys.priors import standard_normal_log_prob

__all__ = ["FlowProposal", "PosteriorNet", "npe_loss"]

# rows per chunk of sampling and density: bounds the memory, and on a CPU a chunk stays in the cache
_ROWS, _CPU_ROWS = 65536, 4096


class PosteriorNet(nn.Module):
    """Density q(u | x) of an embedding followed by a flow; n_features is the length of the summary between them.

    Args: dim: of u. x_shape: of one observation. flow: shape, or a module (`flow_own`). embedding: shape, or a module
    (n, *x_shape) -> (n, k).
    seed: of the initial weights; the global torch generator is left as it was.   Raises: ShapeError.
    """

    def __init__(
        self, dim: int, x_shape: tuple[int, ...], flow: FlowConfig | nn.Module, embedding: EmbeddingConfig | nn.Module, *, seed: int
    ) -> None:
        super().__init__()
        with torch_seeded(seed_for(seed, "weights")):
            self.embedding, self.n_features = build_embedding(embedding, x_shape)
            self.flow: Any = build_flow(flow, dim, self.n_features, seed=seed)

    def start_at(self, u: Tensor) -> None:
        """Set the Gaussian layer to the mean and covariance of the training parameters u (n, d).

        For draws of the prior this is the identity; for a truncated round it is the whitening of the truncated region.
        """
        if not isinstance(self.flow, ConditionalFlow) or not self.flow.config.gaussian_layer or len(u) <= u.shape[1] + 1:
            return
        u = u.double()
        covariance = torch.atleast_2d(torch.cov(u.T)) + 1e-12 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        inverse = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), torch.eye(u.shape[1], dtype=u.dtype, device=u.device), upper=False
        )
        rows, columns = torch.tril_indices(u.shape[1], u.shape[1], offset=-1)
        lower = (inverse / inverse.diagonal()[:, None])[rows, columns]
        bias = torch.cat([u.mean(dim=0), inverse.diagonal().log(), lower])
        with torch.no_grad():
            self.flow.context.bias[: len(bias)] = bias.to(self.flow.context.bias.dtype)

    def log_prob(self, u: Tensor, x: Tensor) -> Tensor:
        """log q(u | x) of u (n, d), x (n, ...) -> (n,)."""
        log_q: Tensor = self.flow.log_prob(u, self.embedding(x))
        return log_q


def npe_loss(net: nn.Module, u: Tensor, x: Tensor) -> Tensor:
    """-log q(u | x), one value per row; its mean over the joint density p(u, x) is least if q is the posterior."""
    assert isinstance(net, PosteriorNet)
    return -net.log_prob(u, x)


def _in_chunks(n: int, device: torch.device, work: Callable[[slice], None]) -> None:
    """Do work(rows) for chunks of n rows; on a CPU in as many threads as torch has, each with a single thread within torch.

    The operations on one chunk are too small to be parallel within torch, but chunks are independent.
    """
    size = _CPU_ROWS if device.type == "cpu" else _ROWS
    chunks = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    threads = torch.get_num_threads()

    def guarded(rows: slice) -> None:
        with torch.inference_mode():  # the mode holds for one thread only
            work(rows)

    if device.type != "cpu" or threads == 1 or len(chunks) < 2 * threads:
        for rows in chunks:
            guarded(rows)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(guarded, chunks))
    finally:
        torch.set_num_threads(threads)  # new threads start with this number


@torch.inference_mode()
def sample_net(net: PosteriorNet, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw u (b, n, d) for inputs x (b, ...); the embedding is computed once per observation, draws come in chunks."""
    b, d = x.shape[0], net.flow.dim
    if isinstance(net.flow, DistributionFlow):
        return net.flow.draw(n, _embed(net, x), draw_seed(generator)).float().cpu()
    shares = net.flow.contexts(_embed(net, x))
    z = torch.randn(b * n, d, generator=generator, device=x.device)
    out = torch.empty(b * n, d)

    def decode(rows: slice) -> None:
        owner = torch.arange(rows.start, rows.stop, device=x.device) // n
        out[rows] = net.flow.decode(z[rows], [c.index_select(0, owner) for c in shares])[0].cpu()

    _in_chunks(b * n, x.device, decode)
    return out.view(b, n, d)


@torch.inference_mode()
def encode_net(net: PosteriorNet, u: Tensor, x: Tensor, owner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Base coordinates z (n, d) and log|dz/du| (n,) of u (n, d).

    Args: x (1, ...) for all, (n, ...) row by row, or (b, ...) with owner (n,), the observation that each row belongs to.
    """
    shares = net.flow.contexts(_embed(net, x))
    z, log_det = torch.empty_like(u), u.new_empty(u.shape[0])

    def encode(rows: slice) -> None:
        part = u[rows]
        if owner is not None:
            contexts = [c.index_select(0, owner[rows]) for c in shares]
        else:
            contexts = [c.expand(part.shape[0], -1) if x.shape[0] == 1 else c[rows] for c in shares]
        z[rows], log_det[rows] = net.flow.encode(part, contexts)

    _in_chunks(u.shape[0], u.device, encode)
    return z, log_det


@torch.inference_mode()
def _log_prob_rows(net: PosteriorNet, u: Tensor, x: Tensor, owner: Tensor | None) -> Tensor:
    """log q (n,) float64 of a flow without base coordinates; arguments as of `encode_net`."""
    features, out = _embed(net, x), u.new_empty(u.shape[0], dtype=torch.float64)
    for start in range(0, len(u), _CPU_ROWS):
        rows = slice(start, start + _CPU_ROWS)
        part = u[rows]
        h = features[owner[rows]] if owner is not None else features.expand(len(part), -1) if len(features) == 1 else features[rows]
        out[rows] = net.flow.log_prob(part, h).double()
    return out


def _embed(net: PosteriorNet, x: Tensor) -> Tensor:
    """Features of inputs x (b, ...), in chunks."""
    return torch.cat([net.embedding(part) for part in x.split(8192)])


@torch.inference_mode()
def log_prob_nets(nets: Sequence[PosteriorNet], u: Tensor, x: Tensor, owner: Tensor | None = None) -> Array:
    """Log density of the equal mixture of networks at u (n, d) -> (n,) float64; x and owner as in `encode_net`."""
    logs = []
    for net in nets:
        if isinstance(net.flow, DistributionFlow):
            logs.append(_log_prob_rows(net, u, x, owner))
            continue
        z, log_det = encode_net(net, u, x, owner)
        logs.append(base_log_prob(z.double()) + log_det.double())
    return (torch.logsumexp(torch.stack(logs), dim=0) - math.log(len(nets))).cpu().numpy()


class FlowProposal:
    r"""The learned posterior of one observation in whitened space u, with tails widened: for importance sampling.

        q(u) = (1 - a) mean_k sum_j w_j N(z_k(u); 0, s_j^2 I) |dz_k/du| + a N(u; 0, I)

    over the members k of an ensemble and the scales s_j of their base. The prior's share a bounds the weights where the network has missed
    a mode: such a mode then appears as a few large weights instead of not at all.

    Args: scales, weights: of the base densities. prior_share: a.   Raises: SettingError.
    """

    def __init__(
        self,
        nets: Sequence[PosteriorNet],
        x: Tensor,
        *,
        scales: Sequence[float] = (1.0, 1.4, 2.0),
        weights: Sequence[float] = (0.7, 0.25, 0.05),
        prior_share: float = 0.01,
    ) -> None:
        if len(scales) != len(weights) or not scales or min(weights) <= 0 or min(scales) <= 0:
            raise SettingError(f"scales {tuple(scales)} and weights {tuple(weights)}: expected as many positive numbers of each")
        self.prior_share = require_number("prior_share", prior_share, low=0, high=1, open_high=True)
        self._nets, self._x = tuple(nets), x
        self._scales = np.asarray(scales, dtype=np.float64)
        self._weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.dim = nets[0].flow.dim

    @torch.inference_mode()
    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw u (n, d)."""
        u = rng.standard_normal((n, self.dim))
        scale = rng.choice(self._scales, n, p=self._weights)
        source = np.where(rng.random(n) < self.prior_share, -1, rng.integers(len(self._nets), size=n))
        for k, net in enumerate(self._nets):
            rows = np.flatnonzero(source == k)
            if isinstance(net.flow, DistributionFlow):
                if len(rows):
                    seed = int(rng.integers(2**62))
                    u[rows] = net.flow.draw(len(rows), net.embedding(self._x), seed)[0].double().cpu().numpy()
                continue
            shares = net.flow.contexts(net.embedding(self._x))
            for part in np.array_split(rows, max(1, math.ceil(len(rows) / _ROWS))):
                z = torch.from_numpy((u[part] * scale[part, None]).astype(np.float32)).to(self._x.device)
                u[part] = net.flow.decode(z, [c.expand(len(part), -1) for c in shares])[0].double().cpu().numpy()
        return u

    def log_prob(self, u: Array) -> Array:
        """Log density of u (n, d) -> (n,)."""
        tensor = torch.from_numpy(np.asarray(u, dtype=np.float32)).to(self._x.device)
        terms = []
        for net in self._nets:
            if isinstance(net.flow, DistributionFlow):  # no base whose tails could be widened
                share = (1 - self.prior_share) / len(self._nets)
                terms.append(math.log(share) + _log_prob_rows(net, tensor, self._x, None).cpu().numpy())
                continue
            z, log_det = encode_net(net, tensor, self._x)
            base, jacobian = z.double().cpu().numpy(), log_det.double().cpu().numpy()
            for scale, weight in zip(self._scales, self._weights, strict=True):
                share = (1 - self.prior_share) * weight / len(self._nets)
                terms.append(math.log(share) + standard_normal_log_prob(base / scale) - self.dim * math.log(scale) + jacobian)
        if self.prior_share:
            terms.append(math.log(self.prior_share) + standard_normal_log_prob(u))
        return np.logaddexp.reduce(terms, axis=0)
