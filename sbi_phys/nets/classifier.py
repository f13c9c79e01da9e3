r"""Networks whose log odds are log density ratios of pairs (x, theta).

    f(x, theta) = w . [ silu(trunk(A h + B t)),  (L h + l) * (R t + r) ] + b,     h = embedding(x),  t = perceptron(u)

The second half of the features is a sum of products, one factor of x alone and one of theta alone: the log density of an exponential
family, Poisson counts or a Gaussian say, has just that form, and the trunk is left with what does not factorise. Everything of x
alone or theta alone is computed once per row (`x_parts`, `theta_parts`); a pair costs the trunk and a product. That is what makes
many contrasts per row, millions of events against thousands of theta, or one x against all theta cheap. Without a trunk (hidden = 0)
all pairs of a batch are one product of matrices, so that every row can have all others as contrasts: where the posterior is much
narrower than the prior, few contrasts lie where they teach anything, and their number is what counts.

Where u ~ N(0, I) over the prior (`gaussian`), f has one more term, log N(u; mu(x), S(x)) - log N(u; 0, I): the log ratio of the best
Gaussian posterior, mean and full covariance functions of x as in `nets.layers.GaussianLayer`. It is learned by its own maximum
likelihood and held fixed for the classifier's loss, which has only what is not Gaussian left to find: contrasts drawn from the prior
say little about a narrow posterior's place and width, which its own theta says directly.

With dim = 0 there is no theta: f(x) is the log ratio of two fixed hypotheses. At the start w = 0, so that every ratio is one.

`solve_last_layer` finds the optimum of the weighted cross entropy in (w, b) exactly, by Newton's method on all rows: the loss is convex
in them, and what stochastic steps leave undone there is gone. At that optimum the mean of the classifier's output over both samples
equals the share of the numerator, which is the balance E_num[d] + E_ref[d] = 1 that a calibrated ratio must have.

Source: Cranmer, Pavez & Louppe 2015, arXiv:1506.02169; Hermans, Begy & Louppe 2019, arXiv:1903.04057.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.checks import require_int
from sbi_phys.errors import ShapeError
from sbi_phys.nets.embed import EmbeddingConfig, ResidualMLP
from sbi_phys.rng import seed_for

__all__ = ["ClassifierConfig", "LabelledFeatures", "PairClassifier", "Parts", "solve_last_layer"]

Parts = tuple[Tensor, ...]  # what the trunk, the products and the Gaussian take from one side of a pair
LabelledFeatures = tuple[Tensor, Tensor, Tensor]  # features (n, k), weights of numerator and reference (n,)

_RIDGE = 1e-5  # holds the last layer where the rows say nothing
_NEWTON_STEPS = 12
_SCALE_LIMIT = 12.0  # of the log inverse widths of the Gaussian
_BLOCK = 256  # rows whose contrasts are computed at a time without a trunk


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """Shape of the part of the network that sees pairs.   Raises: SettingError.

    Args: hidden: width of the trunk, 0 for none. n_blocks: its residual blocks. rank: number of products.
    theta_hidden, n_features: width of the perceptron of theta, and length of its summary.
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


class PairClassifier(nn.Module):
    """Log odds f(x, theta).

    Args: dim: of theta as the network sees it, 0 for none. x_shape: of one observation. network: of the pairs.
    embedding: shape of the perceptron, or a module (n, *x_shape) -> (n, k). seed: of the initial weights; the global torch
    generator is left as it was. gaussian: whether f has the Gaussian term.   Raises: ShapeError.
    """

    def __init__(
        self,
        dim: int,
        x_shape: tuple[int, ...],
        network: ClassifierConfig,
        embedding: EmbeddingConfig | nn.Module,
        *,
        seed: int,
        gaussian: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_for(seed, "weights"))
            if isinstance(embedding, nn.Module):
                self.embedding: nn.Module = copy.deepcopy(embedding)
            else:
                self.embedding = ResidualMLP(math.prod(x_shape), embedding)
            n_x = _n_features(self.embedding, x_shape)
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
            self.context = nn.Linear(n_x, 2 * dim + dim * (dim - 1) // 2) if gaussian else None
        for layer in (*down, self.head, *([] if self.context is None else [self.context])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def x_parts(self, x: Tensor) -> Parts:
        """What pairs need of x (n, *x_shape): (n, hidden), (n, rank), and the Gaussian's context (n, c)."""
        h = self.embedding(x)
        trunk = h[:, :0] if self.trunk_x is None else self.trunk_x(h)
        return trunk, self.left(h), h[:, :0] if self.context is None else self.context(h)

    def theta_parts(self, u: Tensor) -> Parts:
        """What pairs need of u (m, dim): (m, hidden), (m, rank) and u."""
        t = self.theta(u)
        return t[:, :0] if self.trunk_theta is None else self.trunk_theta(t), self.right(t), u

    def features(self, x: Parts, theta: Parts | None = None) -> Tensor:
        """Parts of x and theta, whose leading axes are broadcast against each other -> what the last layer sees, (..., hidden + rank)."""
        hidden, products = (x[0], x[1]) if theta is None else (x[0] + theta[0], x[1] * theta[1])
        for up, down in zip(self.up, self.down, strict=True):
            hidden = hidden + down(F.silu(up(F.silu(hidden))))
        return torch.cat([F.silu(hidden), products], dim=-1)

    def log_odds(self, x: Parts, theta: Parts | None = None) -> Tensor:
        """Log odds (...) of pairs given by their parts."""
        out: Tensor = self.head(self.features(x, theta)).squeeze(-1)
        return out if theta is None else out + self._gaussian(x[2], theta[2])

    def _gaussian(self, context: Tensor, u: Tensor) -> Tensor | float:
        """log N(u; mu, S) - log N(u; 0, I) of contexts (..., c) and u (..., dim), broadcast."""
        if self.context is None:
            return 0.0
        d = self.dim
        mean, raw, lower = context.split([d, d, d * (d - 1) // 2], dim=-1)
        log_scale = _SCALE_LIMIT * torch.tanh(raw / _SCALE_LIMIT)
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

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """X (n, *x_shape) and u (n, dim), row by row -> f(x, theta) (n,)."""
        return self.log_odds(self.x_parts(x), self.theta_parts(u) if self.dim else None)

    def table(self, x: Parts, theta: Parts) -> Tensor:
        """Log odds (m, e) of every one of m theta with every one of e events; without a trunk this is a product of two matrices."""
        events, thetas = tuple(part[None] for part in x), tuple(part[:, None] for part in theta)
        if self.trunk_x is None:
            products = (theta[1] * self.head.weight[0]) @ x[1].T + self.head.bias
            return products + self._gaussian(events[2], thetas[2])
        return self.log_odds(events, thetas)

    def with_contrasts(self, x: Tensor, u: Tensor, n_contrasts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log odds of each row's own pair (n,), of its x with the theta of the next n_contrasts rows (n, K), and the Gaussian's own (n,).

        The last alone has a gradient with respect to the Gaussian: minus its mean is the loss that this is learned by.

        The rows of a batch are in a random order that follows from the seed, so the neighbours' theta are draws of the marginal; nothing
        is drawn here. K is n_contrasts, or n - 1 where the batch is smaller (one row alone is its own contrast).
        """
        n = len(u)
        k = max(1, min(n_contrasts, n - 1))
        left, right = self.x_parts(x), self.theta_parts(u)
        gaussian = torch.zeros_like(left[1][:, 0]) + self._gaussian(left[2], u)
        left = (left[0], left[1], left[2].detach())
        if self.trunk_x is not None:
            moved = tuple(torch.stack([part.roll(-s, 0) for s in range(k + 1)], dim=1) for part in right)
            out = self.log_odds(tuple(part[:, None] for part in left), moved)
            return out[:, 0], out[:, 1:], gaussian
        blocks = []
        for start in range(0, n, _BLOCK):
            rows = torch.arange(start, min(start + _BLOCK, n), device=u.device)
            used = torch.arange(start, start + len(rows) + k, device=u.device) % n
            block = self.table(tuple(part[rows] for part in left), tuple(part[used] for part in right)).T
            own = torch.arange(len(rows), device=u.device)[:, None]
            blocks.append(block.gather(1, own + torch.arange(k + 1, device=u.device)))
        out = torch.cat(blocks)
        return out[:, 0], out[:, 1:], gaussian

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


def _n_features(embedding: nn.Module, x_shape: tuple[int, ...]) -> int:
    mode = embedding.training
    embedding.eval()
    with torch.no_grad():
        out = embedding(torch.zeros(2, *x_shape))
    embedding.train(mode)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(f"embedding maps x of shape (2, {', '.join(map(str, x_shape))}) to {got}; expected (2, n_features)")
    return int(out.shape[1])


@torch.no_grad()
def solve_last_layer(
    head: nn.Linear, rows: Sequence[LabelledFeatures], valid: Sequence[LabelledFeatures], *, intercept: bool = True
) -> bool:
    """Set `head` to the optimum over `rows` of the mean of w1 log(1 + e^-f) + w0 log(1 + e^f), if `valid` agrees that it is better.

    Args: rows, valid: chunks. intercept: whether the constant is free; it stays as it is otherwise.
    Returns: whether the new weights were kept.
    """
    start = torch.cat([head.weight.view(-1), head.bias]).double()
    theta = _newton([_with_constant(chunk, intercept) for chunk in rows], start)
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


def _newton(rows: Sequence[LabelledFeatures], start: Tensor) -> Tensor:
    n = sum(len(w1) for _, w1, _ in rows)

    def objective(theta: Tensor) -> float:
        return _mean_loss(rows, theta) + 0.5 * _RIDGE * float(((theta - start) ** 2).sum())

    theta, value = start.clone(), objective(start)
    for _ in range(_NEWTON_STEPS):
        gradient = _RIDGE * (theta - start)
        hessian = _RIDGE * torch.eye(len(start), dtype=start.dtype, device=start.device)
        for h, w1, w0 in rows:
            p = torch.sigmoid(h @ theta)
            gradient += (w0 * p - w1 * (1 - p)) @ h / n
            hessian += (h * ((w0 + w1) * p * (1 - p))[:, None]).T @ h / n
        step = torch.linalg.solve(hessian, gradient)
        scale = 1.0
        while scale > 1e-3 and not objective(theta - scale * step) <= value:
            scale /= 2
        if scale <= 1e-3 or float(gradient @ step) < 1e-12:
            break
        theta = theta - scale * step
        value = objective(theta)
    return theta
