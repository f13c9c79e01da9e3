r"""Classifiers of pairs (x, theta), whose log odds are log density ratios, and the exact solution for their last layer.

    f(x, theta) = w . [ silu(trunk(A h + B t)),  (L h + l) * (R t + r) ] + b,     h = embedding(x),  t = perceptron(u)

The second half of the features holds products of one factor of x and one of theta. Their sum has the form of the log density of an
exponential family (Poisson counts, a Gaussian), so the trunk has to learn only what does not factorise. All that depends on x alone or on
theta alone is computed once per row (`x_parts`, `theta_parts`); a pair costs the trunk and a product. This makes several contrasts per
row, or tables of millions of events against thousands of theta, cheap. Without a trunk (hidden = 0), the log odds of all pairs of m theta
and e events are one matrix product. With dim = 0 there is no theta: f(x) is the log ratio of two fixed hypotheses. At the start w = 0, so
that every ratio is one.

With u ~ N(0, I) over the prior, f may contain a reference, the log ratio of Gaussians learned by maximum likelihood:

    posterior     log N(u; mu(x), S(x)) - log N(u; 0, I)           full covariance, as in `flow.GaussianLayer`
    likelihood    log N(L t; L m(theta), diag(a(theta))^-2) - log N(t; 0, I)        t = clip(x), L = I + N

If a posterior is much narrower than the prior, hardly any contrast drawn from the prior is near it, and the classifier learns little
about its place and width; maximum likelihood learns them from the row's own pair. The likelihood reference is for columns of numbers: m
and a are smooth functions of a few parameters, which a small network learns from few simulations better than the inverse map; N,
strictly lower triangular and the same for all theta, describes noise that columns share. It lacks a function of x alone, the log ratio of
N(t; 0, I) and p(x), which changes no posterior and which the classifier adds. Any statistic t of x is allowed: x is clipped smoothly,
x / sqrt(1 + (x / 10)^2), so that the effect of an outlier is bounded. Both references are zero at the start.

The reference is held fixed in the classifier's loss. Contrasts u' for x are then drawn from

    q(u' | x) = N(u'; 0, I) / 2 + N(u'; mu, S) / 4 + N(u'; mu, 4 S) / 4          (those from the prior: the u of other rows)

so that they lie where log odds are not trivial. A classifier of u against such u' has the optimum log p(u | x) / q(u | x); its loss sees
f - log q(u | x) / N(u; 0, I), hence f is the log ratio to the prior whatever q is.

`solve_last_layer` finds the optimum of the weighted cross entropy in (w, b) by Newton's method on all rows: the loss is convex in them, so
this removes the error that stochastic gradient steps leave. At the optimum the mean output of the classifier over both samples equals the
share of the numerator, the balance E_num[d] + E_ref[d] = 1 that a calibrated ratio must have.

Source: Cranmer, Pavez & Louppe 2015, arXiv:1506.02169; Hermans, Begy & Louppe 2019, arXiv:1903.04057.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import require_int
from sbi_phys.core.rng import seed_for, torch_seeded
from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP, build_embedding

__all__ = [
    "NEAR",
    "REFERENCES",
    "ClassifierConfig",
    "Contrasts",
    "LabelledFeatures",
    "LikelihoodReference",
    "PairClassifier",
    "Parts",
    "PosteriorReference",
    "newton",
    "newton_step",
    "solve_last_layer",
]

Parts = tuple[Tensor, ...]  # inputs of the trunk, the products and the reference from one side of a pair
LabelledFeatures = tuple[Tensor, Tensor, Tensor]  # features (n, k), weights of numerator and reference (n,)

REFERENCES = ("posterior", "likelihood")
_SCALE_LIMIT = 12.0  # of the logs of inverse widths
_CLIP = 10.0  # of the standardised columns, in sd
_RIDGE = 1e-5  # keeps weights of the last layer that the rows do not determine
_NEWTON_STEPS = 12
NEAR, _WIDTHS = 0.5, (1.0, 2.0)  # share of the contrasts that come from the proposal, and how much it is widened


class Contrasts(NamedTuple):
    """Log odds of own pairs (n,) and of contrasts (n, K), and the log likelihood (n,) that the Gaussians are learned by.

    The log odds have no gradient with respect to the Gaussians; `learned` has one with respect to the Gaussians and their inputs alone.
    """

    joint: Tensor
    contrast: Tensor
    learned: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """Shape of the part of the network that sees pairs.   Raises: SettingError.

    Args: hidden: width of the trunk, 0 for none. n_blocks: its residual blocks. rank: number of products.
    theta_hidden, n_features: width of the perceptron of theta, and length of its summary.

    >>> import sbi_phys as sp
    >>> sp.ClassifierConfig(hidden=0, rank=16).n_features
    32
    """

    hidden: int = 64
    n_blocks: int = 1
    rank: int = 32
    theta_hidden: int = 64
    n_features: int = 32

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("classifier hidden", self.hidden, low=0)
        require_int("classifier theta_hidden", self.theta_hidden, low=1)
        require_int("classifier n_blocks", self.n_blocks, low=0)
        require_int("classifier n_features", self.n_features, low=1)
        require_int("classifier rank", self.rank, low=1)


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
        """Parameters u (m, dim), unchanged."""
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
        for i in range(d):  # row by row of the triangular matrix, because a small matrix product for each pair of a table is slow
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


class PairClassifier(nn.Module):
    """Log odds f(x, theta).

    Args: dim: of theta as the network sees it, 0 for none. x_shape: of one observation. network: of the pairs.
    embedding: shape of the perceptron, or a module (n, *x_shape) -> (n, k). seed: of the initial weights; the global torch
    generator is left as it was. reference: 'posterior', 'likelihood' or None, see the module.   Raises: ShapeError.
    """

    def __init__(
        self,
        dim: int,
        x_shape: tuple[int, ...],
        network: ClassifierConfig,
        embedding: EmbeddingConfig | nn.Module,
        *,
        seed: int,
        reference: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        with torch_seeded(seed_for(seed, "weights")):
            self.embedding, n_x = build_embedding(embedding, x_shape)
            self.trunk_x = nn.Linear(n_x, network.hidden) if network.hidden else None
            self.left = nn.Linear(n_x, network.rank)
            if dim:
                shape = EmbeddingConfig(hidden=network.theta_hidden, n_blocks=1, n_features=network.n_features)
                self.theta = ResidualMLP(dim, shape)
                self.trunk_theta = nn.Linear(network.n_features, network.hidden, bias=False) if network.hidden else None
                self.right = nn.Linear(network.n_features, network.rank)
            n_blocks = network.n_blocks if network.hidden else 0
            self.up = nn.ModuleList(nn.Linear(network.hidden, network.hidden) for _ in range(n_blocks))
            down = [nn.Linear(network.hidden, network.hidden) for _ in range(n_blocks)]
            self.down = nn.ModuleList(down)
            self.head = nn.Linear(network.hidden + network.rank, 1)
            self.proposal = None if reference is None else PosteriorReference(dim, n_x)
            self.likelihood = LikelihoodReference(dim, math.prod(x_shape)) if reference == "likelihood" else None
        for layer in (*down, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def reference(self) -> PosteriorReference | LikelihoodReference | None:
        """The log ratio of Gaussians that is part of f, if any."""
        return self.proposal if self.likelihood is None else self.likelihood

    def x_parts(self, x: Tensor) -> Parts:
        """Inputs of pairs from x (n, *x_shape): (n, hidden), (n, rank), and the reference's part (n, c)."""
        return self._x_parts(self.embedding(x), x)

    def _x_parts(self, h: Tensor, x: Tensor) -> Parts:
        trunk = h[:, :0] if self.trunk_x is None else self.trunk_x(h)
        return trunk, self.left(h), h[:, :0] if self.reference is None else self.reference.x_part(h, x)

    def theta_parts(self, u: Tensor) -> Parts:
        """Inputs of pairs from u (m, dim): (m, hidden), (m, rank), and the reference's part (m, c)."""
        t = self.theta(u)
        part = t[:, :0] if self.reference is None else self.reference.theta_part(u)
        return t[:, :0] if self.trunk_theta is None else self.trunk_theta(t), self.right(t), part

    def features(self, x: Parts, theta: Parts | None = None) -> Tensor:
        """Parts of x and theta, whose leading axes are broadcast against each other -> features (..., hidden + rank) of the last layer."""
        hidden, products = (x[0], x[1]) if theta is None else (x[0] + theta[0], x[1] * theta[1])
        for up, down in zip(self.up, self.down, strict=True):
            hidden = hidden + down(F.silu(up(F.silu(hidden))))
        return torch.cat([F.silu(hidden), products], dim=-1)

    def log_odds(self, x: Parts, theta: Parts | None = None) -> Tensor:
        """Log odds (...) of pairs given by their parts."""
        out: Tensor = self.head(self.features(x, theta)).squeeze(-1)
        return out if theta is None or self.reference is None else out + self.reference(x[2], theta[2])

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Observations x (n, *x_shape) and u (n, dim), row by row -> f(x, theta) (n,)."""
        return self.log_odds(self.x_parts(x), self.theta_parts(u) if self.dim else None)

    def table(self, x: Parts, theta: Parts) -> Tensor:
        """Log odds (m, e) of all pairs of m theta and e events; without a trunk this is a product of two matrices."""
        if self.trunk_x is None:
            out: Tensor = (theta[1] * self.head.weight[0]) @ x[1].T + self.head.bias
        else:
            out = self.head(self.features(tuple(part[None] for part in x), tuple(part[:, None] for part in theta))).squeeze(-1)
        return out if self.reference is None else out + self.reference.table(x[2], theta[2])

    def with_contrasts(
        self, x: Tensor, u: Tensor, n_contrasts: int, generator: torch.Generator | None = None, *, near: float = NEAR
    ) -> Contrasts:
        """Log odds of each row's own pair, and of its x with n_contrasts other theta, drawn as described in the module.

        x (n, *x_shape), u (n, dim), rows in random order. generator: None takes torch's global one. near: share of contrasts that are
        drawn near the posterior, for a network with a reference.
        """
        h = self.embedding(x)
        left, own = self._x_parts(h, x), self.theta_parts(u)
        context = None if self.proposal is None else self.proposal.x_part(h, x)
        others = self._draw(None if context is None or not near else context.detach(), u, n_contrasts, near, generator)
        drawn = [part.view(*others.shape[:2], -1) for part in self.theta_parts(others.flatten(0, 1))]
        right = [torch.cat([a[:, None], b], dim=1) for a, b in zip(own, drawn, strict=True)]
        out = self.log_odds((left[0][:, None], left[1][:, None], left[2][:, None].detach()), (right[0], right[1], right[2].detach()))
        if self.proposal is None or context is None:
            return Contrasts(out[:, 0], out[:, 1:], torch.zeros_like(out[:, 0]))
        learned = self.proposal(context, u)
        if self.likelihood is not None:
            learned = learned + self.likelihood(left[2], own[2])
        tilt = self._log_tilt(context.detach()[:, None], torch.cat([u[:, None], others], dim=1), near)
        return Contrasts(out[:, 0] - tilt[:, 0], out[:, 1:] - tilt[:, 1:], learned)

    @torch.no_grad()
    def _draw(self, context: Tensor | None, u: Tensor, k: int, near: float, generator: torch.Generator | None) -> Tensor:
        """Theta (n, k, dim) that contrast with rows u (n, dim): of other rows, or from the widened proposal."""
        n, d = u.shape
        steps = torch.randint(1, max(2, n), (n, k), generator=generator, device=u.device)
        others = u[(torch.arange(n, device=u.device)[:, None] + steps) % n]
        if context is None or self.proposal is None:
            return others
        noise = torch.randn(n, k, d, generator=generator, device=u.device)
        chosen = torch.rand(2, n, k, 1, generator=generator, device=u.device)
        proposed = self.proposal.draw(context, torch.where(chosen[0] < 0.5, _WIDTHS[0], _WIDTHS[1]) * noise)
        return torch.where(chosen[1] < near, proposed, others)

    @torch.no_grad()
    def _log_tilt(self, context: Tensor, u: Tensor, near: float) -> Tensor:
        """Log density of the contrasts over that of the prior, parts and u broadcast."""
        if self.proposal is None or not near:
            return torch.zeros_like(u[..., 0])
        logs = [self.proposal(context, u, width) + math.log(near / len(_WIDTHS)) for width in _WIDTHS]
        return torch.logsumexp(torch.stack([torch.full_like(logs[0], math.log1p(-near)), *logs]), dim=0)

    def difference_features(self, x: Tensor, u0: Tensor, u1: Tensor) -> Tensor:
        """Features of (x, theta0) less those of (x, theta1); without theta, the features of x."""
        parts = self.x_parts(x)
        if not self.dim:
            return self.features(parts)
        return self.features(parts, self.theta_parts(u0)) - self.features(parts, self.theta_parts(u1))

    def difference(self, x: Tensor, u0: Tensor, u1: Tensor) -> Tensor:
        """f(x, theta0) - f(x, theta1) (n,), or f(x) without theta: log p(x | theta0) / p(x | theta1)."""
        parts = self.x_parts(x)
        if not self.dim:
            return self.log_odds(parts)
        return self.log_odds(parts, self.theta_parts(u0)) - self.log_odds(parts, self.theta_parts(u1))


@torch.no_grad()
def solve_last_layer(
    head: nn.Linear, rows: Sequence[LabelledFeatures], valid: Sequence[LabelledFeatures], *, intercept: bool = True
) -> bool:
    """Set `head` to the optimum over `rows` of the mean of w1 log(1 + e^-f) + w0 log(1 + e^f), if `valid` agrees that it is better.

    Args: rows, valid: chunks. intercept: whether the constant is free; it stays as it is otherwise.
    Returns: whether the new weights were kept.
    """
    start = torch.cat([head.weight.view(-1), head.bias]).double()
    theta = _optimum([_with_constant(chunk, intercept) for chunk in rows], start)
    held_out = [_with_constant(chunk, intercept) for chunk in valid]
    if not bool(torch.isfinite(theta).all()) or _mean_loss(held_out, theta) > _mean_loss(held_out, start):
        return False
    head.weight.copy_(theta[:-1].view(1, -1).to(head.weight.dtype))
    head.bias.copy_(theta[-1:].to(head.bias.dtype))
    return True


def _with_constant(chunk: LabelledFeatures, intercept: bool) -> LabelledFeatures:
    h, w1, w0 = (t.double() for t in chunk)
    return torch.cat([h, h.new_full((len(h), 1), float(intercept))], dim=1), w1, w0


def _mean_loss(rows: Sequence[LabelledFeatures], theta: Tensor) -> float:
    total = sum(float((w1 * F.softplus(-(h @ theta)) + w0 * F.softplus(h @ theta)).sum()) for h, w1, w0 in rows)
    return total / sum(len(w1) for _, w1, _ in rows)


def _optimum(rows: Sequence[LabelledFeatures], start: Tensor) -> Tensor:
    n = sum(len(w1) for _, w1, _ in rows)

    def objective(theta: Tensor) -> float:
        return _mean_loss(rows, theta) + 0.5 * _RIDGE * float(((theta - start) ** 2).sum())

    def derivatives(theta: Tensor) -> tuple[Tensor, Tensor]:
        gradient = _RIDGE * (theta - start)
        hessian = _RIDGE * torch.eye(len(start), dtype=start.dtype, device=start.device)
        for h, w1, w0 in rows:
            p = torch.sigmoid(h @ theta)
            gradient += (w0 * p - w1 * (1 - p)) @ h / n
            hessian += (h * ((w0 + w1) * p * (1 - p))[:, None]).T @ h / n
        return gradient, hessian

    return newton(objective, derivatives, start, n_steps=_NEWTON_STEPS, gain=1e-12)


def newton(
    objective: Callable[[Tensor], float | Tensor],
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    n_steps: int,
    gain: float,
) -> Tensor:
    """Minimum (k,) of a convex function by at most n_steps damped Newton steps from start (k,); ends where a step gains less than `gain`.

    Args: derivatives: theta (k,) -> gradient (k,) and Hessian (k, k).
    """
    theta = start.clone()
    for _ in range(n_steps):
        moved, decrement = newton_step(objective, theta, *derivatives(theta))
        if moved is theta or decrement < gain:
            break
        theta = moved
    return theta


def newton_step(objective: Callable[[Tensor], float | Tensor], theta: Tensor, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, float]:
    """theta - s H^-1 g, s the largest of 1, 1/2, 1/4, ... that does not raise the objective, or theta itself, and g H^-1 g."""
    step = torch.linalg.solve(hessian, gradient)
    value, scale = objective(theta), 1.0
    while scale > 1e-3:
        moved = theta - scale * step
        if objective(moved) <= value:
            return moved, float(gradient @ step)
        scale /= 2
    return theta, float(gradient @ step)
