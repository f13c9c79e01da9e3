r"""The classifier for Bayes factors: log p(x | M_k) up to a common constant, for K models at once.

    minimise  -sum_i w_i log softmax(f(x_i))_{k_i},   sum of w equal for all models,     f_k*(x) - f_j*(x) = log p(x | M_k) / p(x | M_j)

The inputs of the last layer are [t(x), q(x), silu(h)]: features h of the observation, and all products q = (x_i, x_i x_j) if there are few
columns, else a few learned linear combinations and their squares. Between two Gaussian models, for instance conjugate ones,
log p(x | M_1) / p(x | M_0) is a quadratic form in x. The network need not learn that part, and it is right in the tails, where there are
no simulations of the other model. If all of x are counts, functions of their total T are added,
t = (T / m, log(1 + T), log(m + T), sqrt((3/8 + T) / m)), with m its typical value. Between two gamma priors of one Poisson rate,

    log p(x | M_1) / p(x | M_0) = log Gamma(a_1 + T) / Gamma(a_0 + T) - T log((b_1 + n) / (b_0 + n)) + constant,

which a combination of these functions approximates to a few hundredths, for few counts and for many.

After the training the last layer is solved exactly by Newton's method, a convex problem with few unknowns. It is solved on the training
rows with t alone, with t and q, and with all features. The simplest choice whose held-out loss is within one standard error of the best is
used (the one-standard-error rule), because unnecessary features add noise to every Bayes factor.

Source: Radev et al. 2021, arXiv:2004.10629; Hastie, Tibshirani & Friedman 2009, The Elements of Statistical Learning, sec. 7.10 (the rule).
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.rng import seed_for, torch_seeded
from sbi_phys.nets.classifier import newton
from sbi_phys.nets.embedding_vector import EmbeddingConfig, build_embedding, is_own
from sbi_phys.training.scaling import XScaler

__all__ = ["ModelNet", "finish", "model_loss", "solve_last_layer"]

N_SQUARES = 8
N_PRODUCTS = 12  # columns up to which all products are taken
N_TOTALS = 4
_ROWS = 16384
_RIDGE = 1e-6  # keeps weights near the trained ones where the rows do not determine them
_RIDGE_TOTALS = 1e-10  # smaller, because these features are nearly collinear and may need large weights
_NEWTON_STEPS = 15
_MOST_WEIGHTS = 1500  # of the last layer, above which its Hessian takes too long


class ModelNet(nn.Module):
    """Scores f (n, K) of K models, f_0 = 0; all are zero at the start.

    Args: n_models K. x_shape: of one observation. embedding: shape of the perceptron, or a module (n, *x_shape) -> (n, k).
    seed: of the initial weights; the global torch generator is not changed. scaler: of the observations, which marks counts; None:
    no counts.   Raises: ShapeError.
    """

    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        n_models: int,
        x_shape: tuple[int, ...],
        embedding: EmbeddingConfig | nn.Module,
        *,
        seed: int,
        scaler: XScaler | None = None,
    ) -> None:
        super().__init__()
        self.counts = scaler is not None and bool(scaler.counts.all()) and not is_own(embedding)
        if scaler is not None and self.counts:  # to undo the standardisation of the square roots
            self.register_buffer("centre", torch.from_numpy(scaler.mean.ravel()), persistent=False)
            self.register_buffer("scale", torch.from_numpy(scaler.scale.ravel()), persistent=False)
        with torch_seeded(seed_for(seed, "weights")):
            self.plain = not is_own(embedding)
            self.embedding, n_features = build_embedding(embedding, x_shape)
            n_inputs = math.prod(x_shape) if self.plain else n_features
            few = self.plain and n_inputs <= N_PRODUCTS
            self.combine = None if few else nn.Linear(n_inputs, min(N_SQUARES, n_inputs))
            n_products = n_inputs * (n_inputs + 3) // 2 if self.combine is None else 2 * self.combine.out_features
            n_totals = N_TOTALS if self.counts else 0
            ends = [n_totals, n_totals + n_products] if self.plain else []
            # number of features of each choice of last layer, in increasing order
            self.stages = tuple(k for k in (*ends, n_totals + n_products + n_features) if k)
            self.head = nn.Linear(self.stages[-1], n_models - 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """X (n, ...) -> inputs of the last layer (n, k)."""
        h = self.embedding(x)
        z = torch.flatten(x, start_dim=1) if self.plain else h
        if self.combine is None:
            i, j = torch.triu_indices(z.shape[1], z.shape[1], device=z.device)
            products = z[:, i] * z[:, j]
        else:
            z = self.combine(z)
            products = z * z
        return torch.cat([*([self._totals(x)] if self.counts else []), z, products, F.silu(h)], dim=1)

    def _totals(self, x: Tensor) -> Tensor:
        """T / m, log(1 + T), log(m + T), sqrt((3/8 + T) / m), each about zero at T = m, of standardised rows -> (n, 4)."""
        m = (self.centre**2 / 4).sum().clamp(min=1.0)
        root = torch.flatten(x, start_dim=1).double() * self.scale + self.centre
        total = (root**2 / 4 - 0.375).sum(dim=1).clamp(min=0.0)
        ratios = (total / m - 1, torch.log((1 + total) / (1 + m)), torch.log((m + total) / (2 * m)), ((total + 0.375) / m).sqrt() - 1)
        return torch.stack(ratios, dim=1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X (n, ...) -> scores (n, K)."""
        return F.pad(self.head(self.features(x)), (1, 0))


def model_loss(net: nn.Module, x: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross entropy, one value per row: -w log softmax(f(x))_k."""
    return weight * F.cross_entropy(net(x), label, reduction="none")


@torch.no_grad()
def finish(net: ModelNet, train: Sequence[Tensor], valid: Sequence[Tensor]) -> int:
    """Solve for the last layer with the simplest sufficient features -> the number of features used.

    Args: train, valid: rows x, label, weight. The choice is made on the held-out rows, the solution on all of them.
    """
    rows = [torch.cat(pair) for pair in zip(train, valid, strict=True)]
    losses = []
    solvable = net.head.weight.numel() + net.head.bias.numel() <= _MOST_WEIGHTS  # else the trained weights stay, of all features
    for n_columns in net.stages if solvable and len(net.stages) > 1 else ():
        trial = copy.deepcopy(net)
        solve_last_layer(trial, *train, n_columns=n_columns)
        losses.append(torch.cat([model_loss(trial, *part) for part in zip(*(t.split(_ROWS) for t in valid), strict=True)]).double())
    chosen = net.stages[-1]
    if losses:
        best = min(losses, key=lambda loss: float(loss.mean()))
        worse = [loss - best for loss in losses]
        chosen = next(k for k, d in zip(net.stages, worse, strict=True) if float(d.mean()) <= float(d.std()) / len(d) ** 0.5)
    solve_last_layer(net, *rows, n_columns=chosen)
    return chosen


@torch.no_grad()
def solve_last_layer(net: ModelNet, x: Tensor, label: Tensor, weight: Tensor, *, n_columns: int | None = None) -> None:
    """Newton steps to the optimum of the mean loss in the last layer's weights, all rows at once.

    Args: n_columns: the first so many features alone, the others get no weight; None: all.
    """
    k = net.head.out_features
    start = torch.cat([net.head.weight, net.head.bias[:, None]], dim=1).double()  # (k, features + 1)
    if start.numel() > _MOST_WEIGHTS:
        return
    used = list(range(start.shape[1] - 1 if n_columns is None else n_columns))
    start = start[:, [*used, -1]]
    h = torch.cat([net.features(part)[:, : len(used)] for part in x.split(_ROWS)]).double()
    h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
    target = F.one_hot(label, k + 1).double()[:, 1:]
    w = weight.double() / weight.double().sum()
    ridge = torch.full_like(start, _RIDGE)
    ridge[:, : min(len(used), N_TOTALS if net.counts else 0)] = _RIDGE_TOTALS

    def scores(theta: Tensor) -> Tensor:
        return F.pad(h @ theta.view_as(start).T, (1, 0))

    def objective(theta: Tensor) -> Tensor:
        penalty = (ridge * (theta.view_as(start) - start) ** 2).sum()
        return (w * F.cross_entropy(scores(theta), label, reduction="none")).sum() + 0.5 * penalty

    def derivatives(theta: Tensor) -> tuple[Tensor, Tensor]:
        p = scores(theta).softmax(dim=1)[:, 1:]
        gradient = (w[:, None] * (p - target)).T @ h + ridge * (theta.view_as(start) - start)
        return gradient.flatten(), _hessian(h, p, w) + torch.diag(ridge.flatten())

    theta = newton(objective, derivatives, start.flatten(), n_steps=_NEWTON_STEPS, gain=1e-14).view_as(start)
    net.head.weight.zero_()
    net.head.weight[:, : len(used)] = theta[:, :-1].to(net.head.weight.dtype)
    net.head.bias.copy_(theta[:, -1].to(net.head.bias.dtype))


def _hessian(h: Tensor, p: Tensor, w: Tensor) -> Tensor:
    k, f = p.shape[1], h.shape[1]
    out = h.new_zeros(k, f, k, f)
    for i in range(k):
        for j in range(i, k):
            curvature = w * p[:, i] * ((1.0 if i == j else 0.0) - p[:, j])
            block = (h * curvature[:, None]).T @ h
            out[i, :, j], out[j, :, i] = block, block  # a block is symmetric itself
    return out.view(k * f, k * f)
