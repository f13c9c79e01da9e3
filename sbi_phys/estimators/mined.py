r"""Ratios and scores learned from the joint ratios and scores of a simulator whose latent variables z are known.

The joint ratio and the joint score,

    r(x, z | theta0, theta1) = p(x, z | theta0) / p(x, z | theta1)      joint ratio
    t(x, z | theta) = grad_theta log p(x, z | theta)                     joint score

are known exactly for each event even where p(x | theta) is intractable. They are unbiased estimates of the ratio and the score of x,
E[r(x, z) | x, theta1] = r(x) and E[t(x, z | theta) | x, theta] = t(x | theta) ("mining gold"), and regression on them needs far fewer
events than classification with labels alone. With y = 1 for events drawn
from theta0, y = 0 from theta1, s the logistic function and f = log r(x | theta0, theta1) as in `hypotheses`:

    ROLR     (1 - y) (r(x, z) - e^f)^2 + y (1 / r(x, z) - e^-f)^2                        arXiv:1805.00013
    ALICE    cross entropy with the soft label s(log r(x, z)) in place of y               arXiv:1808.00973
    RASCAL   ROLR  + alpha |grad_theta f - t(x, z | theta)|^2 at the event's own theta    arXiv:1805.00020
    ALICES   ALICE + alpha |grad_theta f - t(x, z | theta)|^2                             arXiv:1808.00973
    SALLY    |t^(x) - t(x, z | theta_ref)|^2: the locally optimal statistic               arXiv:1805.00013

The targets of ROLR are the ratios themselves, which have heavy tails where the hypotheses differ strongly; those of ALICE lie between 0
and 1. ALICE needs as many events of theta0 as of theta1. The score term uses all events: since f = g(x, theta0) - g(x, theta1), t is
compared with grad g at the event's own theta, from whichever hypothesis the event was drawn.

Source: Brehmer, Cranmer, Louppe & Pavez 2018, arXiv:1805.00013, 1805.00020; Stoye et al. 2018, arXiv:1808.00973.
"""

import math
from pathlib import Path
from typing import Any, Self, Unpack, cast

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import as_array, as_real, require_choice, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import seed_for, torch_seeded
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.estimators.base import BaseEstimator, Shared
from sbi_phys.estimators.hypotheses import Events, HypothesisRatio, RatioShared, as_events, cross_entropy, solve_head, standard_units
from sbi_phys.nets.classifier import PairClassifier
from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.training.batches import Batches, MemoryBatches
from sbi_phys.training.loop import Loss, TrainConfig
from sbi_phys.training.scaling import XScaler, count_columns, split_rows
from sbi_phys.training.sources import InMemory, checked_weights, stores_of

__all__ = ["SALLY", "MinedRatio", "alice_loss", "rolr_loss"]


_LIMIT = 12.0  # of the log ratio within ROLR's exponentials
_LOSSES = ("alice", "alices", "rolr", "rascal")
_ROWS = 16384


def rolr_loss(log_r: Tensor, gold: Tensor, y: Tensor) -> Tensor:
    """Squared error of the ratio for events of theta1 (y = 0), of its inverse for those of theta0 (y = 1): (n,) each -> (n,)."""
    f, target = log_r.clamp(-_LIMIT, _LIMIT), gold.clamp(-_LIMIT, _LIMIT)
    return (1 - y) * (target.exp() - f.exp()) ** 2 + y * ((-target).exp() - (-f).exp()) ** 2


def alice_loss(log_r: Tensor, gold: Tensor) -> Tensor:
    """Cross entropy with soft labels r / (1 + r) of the joint ratio: log_r (n,), gold = log r(x, z) (n,) -> (n,)."""
    return F.softplus(log_r) - torch.sigmoid(gold) * log_r


class MinedRatio(HypothesisRatio):
    """log r(x | theta0, theta1) learned from joint ratios and, for 'alices' and 'rascal', joint scores.

    The rows are arrays in memory: they belong to two hypotheses and to latent variables z, and neither a store nor a simulator gives
    the joint ratio of a row.

    Args: loss: 'alice', 'alices', 'rolr' or 'rascal'. alpha: weight of the score term, for scores in units of their own sd.
    Others as `HypothesisRatio`.   Raises: SettingError.

    >>> import numpy as np, sbi_phys as sp
    >>> rng, y = np.random.default_rng(0), np.arange(400) % 2
    >>> theta0, theta1 = rng.uniform(-2, 2, (2, 400, 1))
    >>> z = np.where(y[:, None] == 1, theta0, theta1) + rng.standard_normal((400, 1))
    >>> log_r = ((z - theta1) ** 2 - (z - theta0) ** 2)[:, 0] / 2  # log p(x, z | theta0) / p(x, z | theta1)
    >>> ratio = sp.MinedRatio(seed=0, config=sp.TrainConfig(max_epochs=2))
    >>> ratio = ratio.fit(theta0, theta1, z + rng.standard_normal((400, 1)), y, log_r)
    >>> ratio.log_ratio([1.0], [0.5], [-0.5]).shape
    (1,)
    """

    def __init__(self, *, loss: str = "alice", alpha: float = 1.0, **shared: Unpack[RatioShared]) -> None:
        super().__init__(**shared)
        self.loss = require_choice("loss", loss, _LOSSES)
        self.alpha = require_number("alpha", alpha, low=0)

    def fit(
        self,
        theta0: ArrayLike | None = None,
        theta1: ArrayLike | None = None,
        x: ArrayLike | None = None,
        y: ArrayLike | None = None,
        log_r_joint: ArrayLike | None = None,
        score: ArrayLike | None = None,
        *,
        weights: ArrayLike | None = None,
        simulator: Simulator | None = None,
        online: bool = False,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on n events.

        Args:
            theta0: (n, d), the hypothesis above, one row per event.
            theta1: (n, d), the hypothesis below.
            x: (n, ...), the events.
            y: (n,), 1 where x was drawn from theta0, 0 where from theta1.
            log_r_joint: (n,), log p(x, z | theta0) - log p(x, z | theta1), nats.
            score: (n, d), gradient of log p(x, z | theta) with respect to theta at the theta that the event was drawn from, one over
                the parameters' units; needed by 'alices' and 'rascal'.
            weights: (n,), > 0.
            simulator: refused, as a store is, with what to do instead.
            online: refused as well.
            checkpoint: path prefix, as of `Estimator.fit`.
            progress: shows epochs and losses.

        Raises: ShapeError, NonFiniteError, DataError (y not 0 or 1, all of one kind, no scores), TrainingError, SettingError.
        """
        rows = {"theta0": theta0, "theta1": theta1, "x": x, "y": y, "log_r_joint": log_r_joint}
        _require_arrays("MinedRatio", "joint ratios", rows, simulator, online)
        events = as_events("x", x)
        n = len(events)
        a = as_array("theta0", _column("theta0", theta0), (n, None), note="one row per event")
        b = as_array("theta1", _column("theta1", theta1), (n, a.shape[1]), note="one row per event")
        label, gold = as_array("y", y, (n,)), as_array("log_r_joint", log_r_joint, (n,))
        if not np.isin(label, (0, 1)).all() or label.min() == label.max():
            raise DataError(f"y has values {np.unique(label)[:5].tolist()}; expected 0 and 1, both of them")
        if self.loss in ("alice", "alices") and abs(label.mean() - 0.5) > 0.05:
            raise DataError(f"{100 * label.mean():.0f} % of the events are from theta0; expected half, which {self.loss!r} relies on")
        extra: tuple[Array, ...] = (label, gold)
        if self.loss in ("alices", "rascal"):
            if score is None:
                raise DataError(f"score is None; expected (n, {a.shape[1]}) joint scores for loss {self.loss!r}, or loss 'alice' or 'rolr'")
            t = as_array("score", _column("score", score), a.shape)
            spread = np.sqrt((t**2).mean(axis=0))
            own = np.where(label[:, None] == 1, a, b)
            extra += (t, np.broadcast_to(np.where(spread > 0, spread, 1.0), t.shape), own)
        if self.loss == "alice":  # a cross entropy with weights, whose last layer can be solved for
            soft = expit(gold)
            training, loss = Events(events, a, b, (soft, 1 - soft)), cast(Loss, cross_entropy)
        else:
            training, loss = Events(events, a, b, extra), _GoldLoss(self.loss, self.alpha, np.concatenate([a, b]))
        self._fit_events(training, loss, weights=weights, checkpoint=checkpoint, progress=progress)
        return self

    def finish(self, net: PairClassifier, batches: Batches) -> None:
        """Solve the last layer exactly where the loss is a cross entropy."""
        if self.loss == "alice":
            solve_head(net, cast(MemoryBatches, batches).train, cast(MemoryBatches, batches).valid)


class _GoldLoss:
    """loss(net, x, u0, u1, y, gold[, score, spread, own theta]), one value per row."""

    def __init__(self, loss: str, alpha: float, theta: Array) -> None:
        self.kind, self.alpha = loss, alpha
        self.centre, self.width = standard_units(theta)

    def __call__(self, net: nn.Module, x: Tensor, u0: Tensor, u1: Tensor, y: Tensor, gold: Tensor, *score: Tensor) -> Tensor:
        assert isinstance(net, PairClassifier)
        f = net.difference(x, u0, u1)
        loss = alice_loss(f, gold) if self.kind == "alices" else rolr_loss(f, gold, y)
        return loss + self.alpha * self._score_error(net, x, *score) if score else loss

    def _score_error(self, net: PairClassifier, x: Tensor, score: Tensor, spread: Tensor, own: Tensor) -> Tensor:
        """Squared error of grad_theta g(x, theta) at the event's own theta, in units of the scores' sd, summed over parameters."""
        centre, width = (torch.from_numpy(a).to(own) for a in (self.centre, self.width))
        training = torch.is_grad_enabled()
        with torch.enable_grad():  # the loop validates without gradients, and here one is the prediction itself
            u = ((own - centre) / width).requires_grad_()
            g = net(x, u)
            slope = torch.autograd.grad(g.sum(), u, create_graph=training)[0]
        return (((slope / width - score) / spread) ** 2).sum(dim=1)


class SALLY(BaseEstimator):
    r"""Score regression at one reference point: t^(x) -> E[t(x, z | theta_ref) | x] = grad_theta log p(x | theta) at theta_ref.

    Close to theta_ref, log r(x | theta, theta_ref) = t(x) . (theta - theta_ref) + ...: no other statistic of x tells theta apart better.
    The rows are arrays in memory: neither a store nor a simulator gives the joint score of a row, which depends on latent variables z.

    Args: embedding: an EmbeddingConfig, of the perceptron x -> t. n_ensemble: networks, whose mean is taken. config: of the training loop;
    None chooses from the number of rows. Others as `BaseEstimator`.   Raises: SettingError.

    >>> import numpy as np, sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> z = rng.standard_normal((300, 1))  # latent, ~ N(theta, 1) at theta = 0: its score is z
    >>> sally = sp.SALLY(seed=0, config=sp.TrainConfig(max_epochs=2)).fit(z + rng.standard_normal((300, 1)), z)
    >>> sally.score([0.3]).shape
    (1,)
    """

    default_embedding = EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
    _nets: list[ResidualMLP]

    def __init__(self, **shared: Unpack[Shared]) -> None:
        super().__init__(**shared)
        if not isinstance(self.embedding, EmbeddingConfig) or self.embedding.spec:
            got = self.embedding.spec if isinstance(self.embedding, EmbeddingConfig) else f"a {type(self.embedding).__name__}"
            raise SettingError(f"embedding is {got}; expected None or the EmbeddingConfig(...) of a perceptron")
        self._scale = np.ones(0)

    def fit(
        self,
        x: ArrayLike | None = None,
        score: ArrayLike | None = None,
        *,
        weights: ArrayLike | None = None,
        simulator: Simulator | None = None,
        online: bool = False,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on events x (n, ...) ~ p(x | theta_ref) and their joint scores (n, d), one over the parameters' units.

        Args: weights: (n,), > 0. checkpoint: path prefix, as of `Estimator.fit`. simulator, online: refused, as a store is, with what to
        do instead.
        Raises: ShapeError, NonFiniteError, DataError, TrainingError, SettingError.
        """
        _require_arrays("SALLY", "joint scores", {"x": x, "score": score}, simulator, online)
        events = as_events("x", x)
        target = as_array("score", _column("score", score), (len(events), None), note="one row per event")
        n = len(events)
        config = self.config or TrainConfig(batch_size=int(np.clip(2 ** round(math.log2(n / 80)), 16, 1024)), max_epochs=30, patience=30)
        first, _ = split_rows(n, config.validation_fraction, seed_for(self.seed, "member", 0))
        counts = count_columns(events, self.x_transform, self.observables)
        scaler = XScaler.fit(events[first], counts, standardise=self.standardise)
        spread = np.sqrt((target[first] ** 2).mean(axis=0))
        self._scale = np.where(spread > 0, spread, 1.0)
        rows = [scaler.apply(events), torch.from_numpy((target / self._scale).astype(np.float32))]
        if weights is not None:
            rows.append(torch.from_numpy(checked_weights(weights, n).astype(np.float32)))
        data = InMemory(rows, scaler, config, seed=self.seed, device=self.device, weighted=weights is not None)
        self._train(data, self.row_loss, checkpoint, or_none(progress))
        return self

    def build(self, scaler: Any, seed: int) -> ResidualMLP:
        """Perceptron x -> t."""
        assert isinstance(self.embedding, EmbeddingConfig)
        with torch_seeded(seed_for(seed, "weights")):
            shape = EmbeddingConfig(hidden=self.embedding.hidden, n_blocks=self.embedding.n_blocks, n_features=len(self._scale))
            return ResidualMLP(math.prod(scaler.shape), shape)

    def row_loss(self, net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Squared error summed over parameters."""
        error: Tensor = net(x) - target
        return (error**2).sum(dim=1)

    @torch.inference_mode()
    def score(self, x: ArrayLike) -> Array:
        """t^(x): (d,) for one event, (n, d) for n, one over the parameters' units.

        For independent events the statistics add up.   Raises: ShapeError, NonFiniteError, DataError, SettingError.
        """
        inputs, single = self._inputs(x)
        if len(inputs) == 0:
            raise DataError(f"x has shape {np.shape(x)}, no events; expected at least one")
        parts = [torch.stack([net(part).double() for net in self._nets]).mean(dim=0).cpu() for part in inputs.split(_ROWS)]
        out: Array = torch.cat(parts).numpy() * self._scale
        return out[0] if single else out

    def state(self) -> dict[str, Any]:
        """Units of the scores."""
        return {"scale": torch.from_numpy(np.array(self._scale))}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self._scale = state["scale"].numpy()

    def information(self, x: ArrayLike) -> Array:
        """Fisher information per event, E[t t^T] (d, d), from events x (n, ...) ~ p(x | theta_ref), not those trained on.

        Read: the best variance that any unbiased estimate from N events can have is the inverse of N times this.
        """
        t = np.atleast_2d(self.score(x))
        return t.T @ t / len(t)


def _require_arrays(name: str, learned: str, rows: dict[str, Any], simulator: Simulator | None, online: bool) -> None:
    """Raise SettingError for a store or a simulator, DataError for a missing array."""
    if simulator is not None or online or any(stores_of(value) is not None for value in rows.values()):
        raise SettingError(
            f"{name} learns from {learned}, which neither a store nor a simulator gives; expected arrays in memory: simulate x, compute "
            f"the {learned} of the same events from their latent variables, and call fit({', '.join(rows)})"
        )
    missing = [key for key, value in rows.items() if value is None]
    if missing:
        raise DataError(f"{', '.join(missing)} missing; expected fit({', '.join(rows)})")


def _column(name: str, value: Any) -> Array:
    """(n,) as one column."""
    array = as_real(name, value)
    return array[:, None] if array.ndim == 1 else array
