r"""Density ratios from classifiers: r(x) = p_1(x) / p_0(x) by weighted binary cross entropy.

    minimise  sum_i [ w1_i log(1 + e^{-f(x_i)}) + w0_i log(1 + e^{f(x_i)}) ] ,   f*(x) = log( w1 at x / w0 at x )

Every row carries both weights. Two samples are stacked, each with weight zero in the other's place. One sample under two sets of weights
appears once, which halves the work and avoids the noise of two copies.

After the training the last layer is solved exactly by Newton's method: the loss is convex in its few weights, and stochastic steps do
not reach the optimum. There f is a quadratic form in x, linear at large |x|, plus the features g_k of the network:

    f(x) = a + b x + x C x + sum_k theta_k g_k(x) ,      theta ~ N(0, 1 / tau) .

tau is a weak ridge by default. With `smooth` it is the value for which the data are most probable (MacKay's evidence, for
N = 2 n_1 n_0 / (n_1 + n_0) effective events). Where the data support no more, log p_1 / p_0 is then quadratic, the log ratio of two normal
distributions, and continues as such where there are no rows. Densities smoothed by a penalty on the third derivative of their logarithm
have the same limit (Silverman). This suits distributions close to normal and is an assumption wherever rows are few. At the optimum the
constant, the inputs and their squares have the same mean in both samples, weighted by the classifier. Finally the ratio is scaled so that
sum w0 r = sum w1.

Source: Cranmer, Pavez & Louppe 2015, arXiv:1506.02169; MacKay 1992, Neural Computation 4, 720; Silverman 1982, Ann. Stat. 10, 795.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import rng_for, seed_for, torch_seeded
from sbi_phys.core.types import Array
from sbi_phys.nets.classifier import newton_step
from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP
from sbi_phys.training.loop import TrainConfig, fit

__all__ = ["RatioEstimator", "RatioFit", "RatioNet", "ratio_loss", "training_config"]


LOGIT_LIMIT = 10.0  # beyond e^10 the samples do not overlap, and the size of the ratio is not determined
_ROWS = 65536
_RIDGE = 1e-5  # regularises directions of the last layer that the rows do not determine
_NEWTON_STEPS, _NEWTON_GAIN = 30, 1e-10
_FAR_OUT = 4.0  # standard deviations beyond which squares go on as straight lines
_MOST_PAIRS = 16  # inputs beyond which there are squares but no products
_TAU = (1e-2, 1e7)


class RatioNet(nn.Module):
    """Log odds f(x): a linear map of [silu(residual perceptron of x), x, squares and products of x]; the ratio is one at the start.

    Squares are Huber's: u^2 / 2 up to 4, then a straight line. Products are squares of (x_i + x_j) / sqrt 2.

    Args: n_inputs. config: of the perceptron. seed: of the initial weights; the global torch generator is left as it was.
    """

    pairs: Tensor

    def __init__(self, n_inputs: int, config: EmbeddingConfig, *, seed: int) -> None:
        super().__init__()
        with torch_seeded(seed_for(seed, "weights")):
            self.body = ResidualMLP(n_inputs, config)
            pairs = torch.triu_indices(n_inputs, n_inputs) if n_inputs <= _MOST_PAIRS else torch.arange(n_inputs).repeat(2, 1)
            self.head = nn.Linear(config.n_features + n_inputs + pairs.shape[1], 1)
        self.n_features = config.n_features
        self.register_buffer("pairs", pairs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """Inputs x (n, k) -> inputs of the last layer (n, n_features + k + number of pairs)."""
        i, j = self.pairs
        u = (x[:, i] + x[:, j]) * torch.where(i == j, 0.5, 0.5**0.5)
        return torch.cat([F.silu(self.body(x)), x, F.huber_loss(u, torch.zeros_like(u), reduction="none", delta=_FAR_OUT)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """X (n, k) -> log odds (n,)."""
        out: Tensor = self.head(self.features(x))
        return out.squeeze(-1)


def ratio_loss(net: nn.Module, x: Tensor, w1: Tensor, w0: Tensor) -> Tensor:
    """Weighted cross entropy, one value per row: w1 log(1 + e^-f) + w0 log(1 + e^f)."""
    f: Tensor = net(x)
    return w1 * F.softplus(-f) + w0 * F.softplus(f)


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioFit:
    """Summary of one fit.

    separation: Jensen-Shannon divergence of the held-out rows, nats, 0 (alike) to log 2 (disjoint).
    norm: sum w0 r / sum w1 before it was set to 1. epochs: of the first member. n_effective: events that the evidence counted.
    """

    separation: float
    norm: float
    epochs: int
    n_effective: float


class RatioEstimator:
    """An ensemble of classifiers that can be trained repeatedly; each training continues from the previous one.

    Args: n_inputs. seed: of weights, splits and order. n_ensemble: the log ratio is the mean over the members.
    smooth: features beside the quadratic form are regularised by the evidence. network: of each member; n_features: its outputs, inputs
    of the last layer. config: of every training; None chooses batches and epochs from the number of rows, fewer epochs from the second
    training on.
    Raises: SettingError.
    """

    def __init__(
        self,
        n_inputs: int,
        *,
        seed: int,
        n_ensemble: int = 1,
        smooth: bool = False,
        network: EmbeddingConfig | None = None,
        config: TrainConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed, self.n_ensemble = require_int("seed", seed, low=0), require_int("n_ensemble", n_ensemble, low=1)
        network = network or EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
        for name, value, kind in (("network", network, EmbeddingConfig), ("config", config, TrainConfig)):
            if value is not None and not isinstance(value, kind):
                raise SettingError(f"{name} is a {type(value).__name__}; expected None or {kind.__name__}(...)")
        self.config, self.device, self.smooth = config, torch.device(device), smooth
        self._nets = [RatioNet(n_inputs, network, seed=seed_for(seed, "member", m)).to(self.device) for m in range(self.n_ensemble)]
        self._scale: tuple[Array, Array] | None = None
        self._offset, self._n_fits = 0.0, 0

    def fit(self, x: Array, w1: Array, w0: Array, *, done: Callable[[], None] | None = None, n_effective: float = math.inf) -> RatioFit:
        """Learn log(w1 / w0) as a function of x (n, k) from weights (n,) >= 0 each.

        Args: done: called after each member. n_effective: most events that the rows may count for, where the weights have noise of
        their own.   Raises: TrainingError.
        """
        keep = (w1 > 0) | (w0 > 0)  # rows without weight do not contribute
        x, w1, w0 = x[keep], w1[keep], w0[keep]
        if self._scale is None:
            # kept in later trainings, because the networks continue in these units
            share = 0.5 * (w1 / w1.sum() + w0 / w0.sum())
            mean = share @ x
            sd = np.sqrt(share @ (x - mean) ** 2)
            self._scale = mean, np.where(sd > 1e-12 * (1 + np.abs(x).max(axis=0)), sd, 1.0)
        n1, n0 = (float(w.sum() ** 2 / (w**2).sum()) for w in (w1, w0))
        n_effective = min(n_effective, 2 * n1 * n0 / (n1 + n0))
        rows = (self._inputs(x), self._tensor(w1 * (len(x) / w1.sum())), self._tensor(w0 * (len(x) / w0.sum())))
        epochs, rate = (14, 6e-3) if self._n_fits == 0 else (6, 3e-3)
        config = self.config or training_config(len(x), epochs=epochs, learning_rate=rate, largest_batch=2048)
        losses, epochs = [], 0
        for m, net in enumerate(self._nets):
            loss, n_epochs = self._fit_member(m, net, rows, config, n_effective)
            losses.append(loss)
            epochs = epochs or n_epochs
            if done is not None:
                done()
        self._n_fits += 1
        self._offset = 0.0
        balanced = float((rows[2].double() * self._logits(rows[0]).exp()).mean())
        self._offset = math.log(w1.sum() / w0.sum()) - math.log(balanced)
        separation = max(0.0, math.log(2) - float(np.mean(losses)) / 2)
        return RatioFit(separation=separation, norm=balanced, epochs=epochs, n_effective=n_effective)

    def _fit_member(self, m: int, net: RatioNet, rows: tuple[Tensor, ...], config: TrainConfig, n_effective: float) -> tuple[float, int]:
        n = len(rows[0])
        seed = seed_for(self.seed, "fit", m, self._n_fits)
        order = torch.from_numpy(rng_for(seed, "split").permutation(n)).to(self.device)
        n_valid = max(1, round(config.validation_fraction * n))
        valid, train = order[:n_valid], order[n_valid:]
        records = list(fit(ratio_loss, net, [t[train] for t in rows], [t[valid] for t in rows], config, seed=seed))
        _solve_last_layer(net, n_effective if self.smooth else None, *rows)
        return min(r.valid for r in records), len(records)

    def log_ratio(self, x: Array) -> Array:
        """log(w1 / w0) at x (n, k) -> (n,); the shapes' ratio is cut at e^+-10."""
        return self._logits(self._inputs(x)).cpu().numpy() + self._offset

    def state(self) -> dict[str, Any]:
        """Scaling and weights of a trained ratio, for a model file."""
        weights = [{k: v.cpu() for k, v in net.state_dict().items()} for net in self._nets]
        return {
            "scale": [torch.from_numpy(a) for a in self._require_fit()],
            "offset": self._offset,
            "n_fits": self._n_fits,
            "weights": weights,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`, of a ratio with the same settings."""
        mean, sd = (a.numpy() for a in state["scale"])
        self._scale, self._offset, self._n_fits = (mean, sd), state["offset"], state["n_fits"]
        for net, weights in zip(self._nets, state["weights"], strict=True):
            net.load_state_dict(weights)

    @torch.inference_mode()
    def _logits(self, x: Tensor) -> Tensor:
        """Mean log odds of balanced samples, double."""
        if len(x) == 0:
            return torch.zeros(0, dtype=torch.float64)
        parts = [torch.stack([net(part).double() for net in self._nets]).mean(dim=0) for part in x.split(_ROWS)]
        return torch.cat(parts).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def _inputs(self, x: Array) -> Tensor:
        mean, sd = self._require_fit()
        return self._tensor((x - mean) / sd)

    def _require_fit(self) -> tuple[Array, Array]:
        if self._scale is None:
            raise SettingError("this ratio is not trained; expected .fit(x, w1, w0) first")
        return self._scale

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(self.device)


def training_config(n: int, *, epochs: int, learning_rate: float, largest_batch: int = 1024) -> TrainConfig:
    """Training for n rows: about forty steps an epoch for few rows, more where a batch would be larger than the largest."""
    batch = int(np.clip(2 ** round(math.log2(n / 40)), 32, largest_batch))
    return TrainConfig(batch_size=batch, max_epochs=epochs, patience=epochs, learning_rate=learning_rate, weight_decay=1e-3)


@torch.no_grad()
def _solve_last_layer(net: RatioNet, n_effective: float | None, x: Tensor, w1: Tensor, w0: Tensor) -> None:
    """Newton steps to the optimum of the mean loss in the last layer's weights, all rows at once; with n_effective: tau by evidence."""
    g = torch.cat([net.features(part) for part in x.split(_ROWS)]).double()
    g = torch.cat([g, g.new_ones(len(g), 1)], dim=1)
    k, n = net.n_features, len(g)
    w1, w0 = w1.double(), w0.double()
    penalty = torch.full((g.shape[1],), _RIDGE, dtype=g.dtype, device=g.device)
    theta, tau = torch.zeros_like(penalty), 1.0

    def objective(theta: Tensor) -> Tensor:
        f = g @ theta
        return (w1 * F.softplus(-f) + w0 * F.softplus(f)).mean() + 0.5 * (penalty * theta**2).sum()

    for _ in range(_NEWTON_STEPS):
        if n_effective is not None:
            penalty[:k] = tau / n_effective
        p = torch.sigmoid(g @ theta)
        gradient = (w0 * p - w1 * (1 - p)) @ g / n + penalty * theta
        hessian = (g * ((w0 + w1) * p * (1 - p))[:, None]).T @ g / n + torch.diag(penalty)
        theta, decrement = newton_step(objective, theta, gradient, hessian)
        last = tau
        if n_effective is not None:
            # MacKay: number of features that the data determine, over their size; the covariance is 1 / (n_effective * hessian)
            determined = k - tau / n_effective * float(torch.linalg.inv(hessian).diagonal()[:k].sum())
            tau = min(max(determined / max(float((theta[:k] ** 2).sum()), 1e-12), _TAU[0]), _TAU[1])
        if decrement < _NEWTON_GAIN and abs(math.log(tau / last)) < 0.2:
            break
    net.head.weight.copy_(theta[:-1].view(1, -1).to(net.head.weight.dtype))
    net.head.bias.copy_(theta[-1:].to(net.head.bias.dtype))
