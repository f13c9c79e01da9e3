r"""The classifier behind Bayes factors: log p(x | M_k) up to a common constant, for K models at once.

    minimise  -sum_i w_i log softmax(f(x_i))_{k_i},   sum of w equal for all models,     f_k*(x) - f_j*(x) = log p(x | M_k) / p(x | M_j)

The last layer sees [q(x), silu(h)]: features h of the observation, and all its products q = (x_i, x_i x_j) where it has few columns, else
a few learned linear combinations with their squares. Between two Gaussian models, conjugate ones for instance, log p(x | M_1) / p(x | M_0)
is a quadratic form in x: that part costs the network nothing, and it is right in the tails, where no simulation of the other
model has ever been.

After the training the last layer is solved for exactly, by Newton's method: a convex problem in few numbers. It is solved with and without
the network's features, on the training rows, and the simpler one is taken where its held-out loss is within one standard error of the
other's (the one-standard-error rule): features that are not needed only add noise to every Bayes factor.

Source: Radev et al. 2021, arXiv:2004.10629; Hastie, Tibshirani & Friedman 2009, The Elements of Statistical Learning, sec. 7.10 (the rule).
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.errors import ShapeError
from sbi_phys.nets.embed import EmbeddingConfig, ResidualMLP
from sbi_phys.rng import seed_for

__all__ = ["ModelNet", "finish", "model_loss", "solve_last_layer"]

N_SQUARES = 8
N_PRODUCTS = 12  # columns up to which all products are taken
_ROWS = 16384
_RIDGE = 1e-6  # holds the last layer where the rows say nothing
_NEWTON_STEPS = 15
_MOST_WEIGHTS = 1500  # of the last layer, beyond which its Hessian is too large to be worth it


class ModelNet(nn.Module):
    """Scores f (n, K) of K models, f_0 = 0; all are zero at the start.

    Args: n_models K. x_shape: of one observation. embedding: shape of the perceptron, or a module (n, *x_shape) -> (n, k).
    seed: of the initial weights; the global torch generator is left as it was.   Raises: ShapeError.
    """

    def __init__(self, n_models: int, x_shape: tuple[int, ...], embedding: EmbeddingConfig | nn.Module, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_for(seed, "weights"))
            self.plain = not isinstance(embedding, nn.Module)
            if isinstance(embedding, nn.Module):
                self.embedding: nn.Module = copy.deepcopy(embedding)
            else:
                self.embedding = ResidualMLP(math.prod(x_shape), embedding)
            n_features = self._n_features(x_shape)
            n_inputs = math.prod(x_shape) if self.plain else n_features
            few = self.plain and n_inputs <= N_PRODUCTS
            self.combine = None if few else nn.Linear(n_inputs, min(N_SQUARES, n_inputs))
            self.n_simple = n_inputs * (n_inputs + 3) // 2 if self.combine is None else 2 * self.combine.out_features
            self.head = nn.Linear(self.n_simple + n_features, n_models - 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _n_features(self, x_shape: tuple[int, ...]) -> int:
        mode = self.embedding.training
        self.embedding.eval()
        with torch.no_grad():
            out = self.embedding(torch.zeros(2, *x_shape))
        self.embedding.train(mode)
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != 2:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(f"embedding maps x of shape (2, {', '.join(map(str, x_shape))}) to {got}; expected (2, n_features)")
        return int(out.shape[1])

    def features(self, x: Tensor) -> Tensor:
        """X (n, ...) -> what the last layer sees (n, k)."""
        h = self.embedding(x)
        z = torch.flatten(x, start_dim=1) if self.plain else h
        if self.combine is None:
            i, j = torch.triu_indices(z.shape[1], z.shape[1], device=z.device)
            products = z[:, i] * z[:, j]
        else:
            z = self.combine(z)
            products = z * z
        return torch.cat([z, products, F.silu(h)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """X (n, ...) -> scores (n, K)."""
        return F.pad(self.head(self.features(x)), (1, 0))


def model_loss(net: nn.Module, x: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross entropy, one value per row: -w log softmax(f(x))_k."""
    return weight * F.cross_entropy(net(x), label, reduction="none")


@torch.no_grad()
def finish(net: ModelNet, train: Sequence[Tensor], valid: Sequence[Tensor]) -> bool:
    """Solve for the last layer, with or without the network's features -> whether they are used.

    Args: train, valid: rows x, label, weight. The choice is made on the held-out rows, the solution on all of them.
    """
    rows = [torch.cat(pair) for pair in zip(train, valid, strict=True)]
    if not net.plain:
        solve_last_layer(net, *rows)
        return True
    losses = []
    for simple in (True, False):
        trial = copy.deepcopy(net)
        solve_last_layer(trial, *train, simple=simple)
        losses.append(torch.cat([model_loss(trial, *part) for part in zip(*(t.split(_ROWS) for t in valid), strict=True)]).double())
    worse = losses[0] - losses[1]
    used = bool(worse.mean() > worse.std() / len(worse) ** 0.5)
    solve_last_layer(net, *rows, simple=not used)
    return used


@torch.no_grad()
def solve_last_layer(net: ModelNet, x: Tensor, label: Tensor, weight: Tensor, *, simple: bool = False) -> None:
    """Newton steps to the optimum of the mean loss in the last layer's weights, all rows at once.

    Args: simple: without the network's features.
    """
    k = net.head.out_features
    start = torch.cat([net.head.weight, net.head.bias[:, None]], dim=1).double()  # (k, features + 1)
    h = torch.cat([net.features(part) for part in x.split(_ROWS)]).double()
    h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
    if simple:
        start[:, net.n_simple : -1] = 0
        h[:, net.n_simple : -1] = 0
    if h.shape[1] * k > _MOST_WEIGHTS:
        return
    target = F.one_hot(label, k + 1).double()[:, 1:]
    w = weight.double() / weight.double().sum()

    def objective(theta: Tensor) -> Tensor:
        scores = F.pad(h @ theta.T, (1, 0))
        return (w * F.cross_entropy(scores, label, reduction="none")).sum() + 0.5 * _RIDGE * ((theta - start) ** 2).sum()

    theta, value = start.clone(), objective(start)
    for _ in range(_NEWTON_STEPS):
        p = F.pad(h @ theta.T, (1, 0)).softmax(dim=1)[:, 1:]
        gradient = ((w[:, None] * (p - target)).T @ h + _RIDGE * (theta - start)).flatten()
        step = torch.linalg.solve(_hessian(h, p, w), gradient)
        scale = 1.0
        while scale > 1e-3 and not objective(theta - scale * step.view_as(theta)) <= value:
            scale /= 2
        if scale <= 1e-3 or float(gradient @ step) < 1e-14:
            break
        theta = theta - scale * step.view_as(theta)
        value = objective(theta)
    net.head.weight.copy_(theta[:, :-1].to(net.head.weight.dtype))
    net.head.bias.copy_(theta[:, -1].to(net.head.bias.dtype))


def _hessian(h: Tensor, p: Tensor, w: Tensor) -> Tensor:
    k, f = p.shape[1], h.shape[1]
    out = h.new_zeros(k, f, k, f)
    for i in range(k):
        for j in range(i, k):
            curvature = w * p[:, i] * ((1.0 if i == j else 0.0) - p[:, j])
            block = (h * curvature[:, None]).T @ h
            out[i, :, j], out[j, :, i] = block, block  # a block is symmetric itself
    return out.view(k * f, k * f) + _RIDGE * torch.eye(k * f, dtype=h.dtype, device=h.device)
