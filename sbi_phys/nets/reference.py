r"""References: log ratios of Gaussians, learned by maximum likelihood, that a classifier of pairs (x, theta) starts from.

Where a posterior is much narrower than the prior, contrasts drawn from the prior say little about its place and its width: next to
none falls near it. What a pair's own partner says directly, maximum likelihood uses in full. With u ~ N(0, I) over the prior:

    posterior     log N(u; mu(x), S(x)) - log N(u; 0, I)           full covariance, as in `layers.GaussianLayer`
    likelihood    log N(L t; L m(theta), diag(a(theta))^-2) - log N(t; 0, I)        t = clip(x), L = I + N

The second is the one for columns of numbers: m and a are smooth functions of a few parameters, which a small network learns from few
simulations far better than the inverse map, a function of all columns; N, strictly lower triangular, one for all theta, takes up noise
that columns share. It lacks a function of x alone, the log density ratio of N(t; 0, I) and p(x), which moves no posterior and which the
classifier has to add. Any statistic t of x will do: x is clipped softly, x / sqrt(1 + (x / 10)^2), so that a stray value has a bounded say.

Both cost O(size) a pair once the parts of x and of theta are there, and are zero for every pair at the start.
"""

import math

import torch
from torch import Tensor, nn

from sbi_phys.nets.embed import EmbeddingConfig, ResidualMLP

__all__ = ["REFERENCES", "LikelihoodReference", "PosteriorReference"]

REFERENCES = ("posterior", "likelihood")
_SCALE_LIMIT = 12.0  # of the logs of inverse widths
_CLIP = 10.0  # of the standardised columns, in sd


class PosteriorReference(nn.Module):
    """log N(u; mu, S) - log N(u; 0, I), mu and S functions of the features h (n, k) of x."""

    def __init__(self, dim: int, n_features: int) -> None:
        super().__init__()
        self.dim = dim
        self.context = nn.Linear(n_features, 2 * dim + dim * (dim - 1) // 2)
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.context.bias)

    def x_part(self, h: Tensor, x: Tensor) -> Tensor:
        """Mean, log inverse widths and correlations of rows (n, c)."""
        out: Tensor = self.context(h)
        return out

    def theta_part(self, u: Tensor) -> Tensor:
        """U itself (m, dim)."""
        return u

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = self.dim
        mean, raw, lower = x.split([d, d, d * (d - 1) // 2], dim=-1)
        return mean, _SCALE_LIMIT * torch.tanh(raw / _SCALE_LIMIT), lower

    def draw(self, x: Tensor, noise: Tensor) -> Tensor:
        """u = mu + S^(1/2) noise for parts x (n, c) and noise (n, m, dim) -> (n, m, dim)."""
        mean, log_scale, lower = (part[:, None] for part in self._split(x))
        scaled, first = noise * (-log_scale).exp(), 0
        centred: list[Tensor] = []
        for i in range(self.dim):
            value = scaled[..., i]
            for j in range(i):
                value = value - lower[..., first + j] * centred[j]
            first += i
            centred.append(value)
        return mean + torch.stack(centred, dim=-1)

    def forward(self, x: Tensor, u: Tensor, width: float = 1.0) -> Tensor:
        """Log ratio of parts (..., c) and (..., dim), broadcast; `width` widens S^(1/2)."""
        d = self.dim
        mean, log_scale, lower = self._split(x)
        log_scale = log_scale - math.log(width)
        centred = u - mean
        out = log_scale.sum(dim=-1) + 0.5 * (u**2).sum(dim=-1)
        first = 0
        for i in range(d):  # row by row of the triangular matrix: tables of pairs are too large for one small product a pair
            turned = centred[..., i]
            for j in range(i):
                turned = turned + lower[..., first + j] * centred[..., j]
            first += i
            out = out - 0.5 * (log_scale[..., i].exp() * turned) ** 2
        return out

    def table(self, x: Tensor, u: Tensor) -> Tensor:
        """Log ratios (m, e) of m theta and e events."""
        out: Tensor = self(x[None], u[:, None])
        return out


class LikelihoodReference(nn.Module):
    """log N(L t; L m, diag(a)^-2) - log N(t; 0, I), m and a functions of u (n, dim), t (n, size) the clipped columns of x."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        shape = EmbeddingConfig(hidden=64, n_blocks=2, n_features=32)
        self.theta = ResidualMLP(dim, shape)
        self.context = nn.Linear(shape.n_features, 2 * size)
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.context.bias)
        self.lower = nn.Parameter(torch.zeros(size * (size - 1) // 2))
        rows, columns = torch.tril_indices(size, size, offset=-1)
        self.register_buffer("_flat", rows * size + columns, persistent=False)

    def _turned(self, t: Tensor) -> Tensor:
        k = self.size
        lower = self.lower.new_zeros(k * k).index_copy(0, self.get_buffer("_flat"), self.lower).view(k, k)
        return t + t @ lower.T

    def x_part(self, h: Tensor, x: Tensor) -> Tensor:
        """L t and |t|^2 / 2 of rows x (n, ...) -> (n, size + 1)."""
        t = torch.flatten(x, start_dim=1)
        t = t / torch.sqrt(1 + (t / _CLIP) ** 2)
        return torch.cat([self._turned(t), 0.5 * (t**2).sum(dim=1, keepdim=True)], dim=1)

    def theta_part(self, u: Tensor) -> Tensor:
        """L m and log a of u (m, dim) -> (m, 2 size)."""
        mean, raw = self.context(self.theta(u)).chunk(2, dim=1)
        return torch.cat([self._turned(mean), _SCALE_LIMIT * torch.tanh(raw / _SCALE_LIMIT)], dim=1)

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        """Log ratio of parts (..., size + 1) and (..., 2 size), broadcast."""
        mean, log_scale = theta.chunk(2, dim=-1)
        y = log_scale.exp() * (x[..., :-1] - mean)
        return log_scale.sum(dim=-1) - 0.5 * (y**2).sum(dim=-1) + x[..., -1]

    def table(self, x: Tensor, theta: Tensor) -> Tensor:
        """Log ratios (m, e) of m theta and e events: products of matrices, in double because large terms cancel."""
        mean, log_scale = theta.double().chunk(2, dim=1)
        t, square, precision = x[:, :-1].double(), x[:, -1].double(), (2 * log_scale).exp()
        chi2 = precision @ (t**2).T - 2 * (precision * mean) @ t.T + (precision * mean**2).sum(dim=1)[:, None]
        return (log_scale.sum(dim=1)[:, None] - 0.5 * chi2 + square).to(x.dtype)
