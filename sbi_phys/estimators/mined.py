r"""Ratios and scores from mined gold: a simulator that knows its latent z hands out what x alone does not show.

    r(x, z | theta0, theta1) = p(x, z | theta0) / p(x, z | theta1)      joint ratio
    t(x, z | theta) = grad_theta log p(x, z | theta)                     joint score

are exact per event where p(x | theta) itself is out of reach, and noisy without bias: E[r(x, z) | x, theta1] = r(x) and
E[t(x, z | theta) | x, theta] = t(x | theta). Regression on them needs far fewer events than labels alone. With y = 1 for events drawn
from theta0, y = 0 from theta1, s the logistic function and f = log r(x | theta0, theta1) as in `two_hypotheses`:

    ROLR     (1 - y) (r(x, z) - e^f)^2 + y (1 / r(x, z) - e^-f)^2                        arXiv:1805.00013
    ALICE    cross entropy with the soft label s(log r(x, z)) in place of y               arXiv:1808.00973
    RASCAL   ROLR  + alpha |grad_theta f - t(x, z | theta)|^2 at the event's own theta    arXiv:1805.00020
    ALICES   ALICE + alpha |grad_theta f - t(x, z | theta)|^2                             arXiv:1808.00973
    SALLY    |t^(x) - t(x, z | theta_ref)|^2: the locally optimal statistic               arXiv:1805.00013

ROLR's targets are ratios themselves, which are heavy-tailed where the hypotheses lie apart; ALICE's stay between 0 and 1. ALICE needs as
many events of theta0 as of theta1. All events enter the score term: f = g(x, theta0) - g(x, theta1), so that
grad g at the event's own theta is what t is compared with, whichever side it was drawn from.

Source: Brehmer, Cranmer, Louppe & Pavez 2018, arXiv:1805.00013, 1805.00020; Stoye et al. 2018, arXiv:1808.00973.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import as_array, as_real, require_choice, require_int, require_number
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.estimators.fitting import History, fit_ensemble, train_member
from sbi_phys.estimators.hypotheses import Events, HypothesisRatio, as_events, cross_entropy, standard_units
from sbi_phys.estimators.model_file import FILE, common_content, common_settings, with_weights
from sbi_phys.nets.classifier import ClassifierConfig, PairClassifier
from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP
from sbi_phys.priors import Observable
from sbi_phys.training.batches import MemoryBatches
from sbi_phys.training.checkpoint import write_file
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.ranks import current_ranks
from sbi_phys.training.scaling import XScaler, count_columns, split_rows

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

    Args: loss: 'alice', 'alices', 'rolr' or 'rascal'. alpha: weight of the score term, for scores in units of their own sd.
    Others as `HypothesisRatio`.   Raises: SettingError.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        loss: str = "alice",
        alpha: float = 1.0,
        network: ClassifierConfig | None = None,
        embedding: EmbeddingConfig | nn.Module | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        x_transform: str = "auto",
        observables: Sequence[Observable] | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        super().__init__(
            seed,
            network=network,
            embedding=embedding,
            n_ensemble=n_ensemble,
            device=device,
            x_transform=x_transform,
            observables=observables,
            config=config,
        )
        self.loss = require_choice("loss", loss, _LOSSES)
        self.alpha = require_number("alpha", alpha, low=0)

    def _own_settings(self) -> dict[str, Any]:
        return {"loss": self.loss, "alpha": self.alpha}

    def fit(
        self,
        theta0: ArrayLike,
        theta1: ArrayLike,
        x: ArrayLike,
        y: ArrayLike,
        log_r_joint: ArrayLike,
        score: ArrayLike | None = None,
        *,
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
            progress: shows epochs and losses.

        Raises: ShapeError, NonFiniteError, DataError (y not 0 or 1, all of one kind, no scores), TrainingError.
        """
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
            self._train(Events(events, a, b, (soft, 1 - soft)), cross_entropy, progress, solve=True)
            return self
        self._train(Events(events, a, b, extra), _GoldLoss(self.loss, self.alpha, np.concatenate([a, b])), progress)
        return self


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


class SALLY:
    r"""Score regression at one reference point: t^(x) -> E[t(x, z | theta_ref) | x] = grad_theta log p(x | theta) at theta_ref.

    Close to theta_ref, log r(x | theta, theta_ref) = t(x) . (theta - theta_ref) + ...: no other statistic of x tells theta apart better.

    Args: seed, embedding (of the perceptron x -> t), n_ensemble (mean of the members), device, x_transform, observables, config: as for
    `HypothesisRatio`.   Raises: SettingError.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        embedding: EmbeddingConfig | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        x_transform: str = "auto",
        observables: Sequence[Observable] | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        if embedding is not None and not isinstance(embedding, EmbeddingConfig):
            raise SettingError(f"embedding is a {type(embedding).__name__}; expected None or EmbeddingConfig(...)")
        self.seed = require_int("seed", seed, low=0)
        self.embedding = embedding or EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
        self.n_ensemble = require_int("n_ensemble", n_ensemble, low=1)
        self.device = resolve_device(device)
        self.x_transform = x_transform
        self.observables = tuple(observables) if observables is not None else None
        self.config = config
        self.history: list[History] = []
        self._scaler: XScaler | None = None
        self._scale = np.ones(0)
        self._nets: list[ResidualMLP] = []

    def fit(self, x: ArrayLike, score: ArrayLike, *, progress: Progress | None = None) -> Self:
        """Train on events x (n, ...) ~ p(x | theta_ref) and their joint scores (n, d), one over the parameters' units.

        Raises: ShapeError, NonFiniteError, DataError, TrainingError.
        """
        events = as_events("x", x)
        target = as_array("score", _column("score", score), (len(events), None), note="one row per event")
        n = len(events)
        config = self.config or TrainConfig(batch_size=int(np.clip(2 ** round(math.log2(n / 80)), 16, 1024)), max_epochs=30, patience=30)
        first, _ = split_rows(n, config.validation_fraction, seed_for(self.seed, "member", 0))
        scaler = XScaler.fit(events[first], count_columns(events, self.x_transform, self.observables))
        spread = np.sqrt((target[first] ** 2).mean(axis=0))
        scale = np.where(spread > 0, spread, 1.0)
        rows = [scaler.apply(events), torch.from_numpy((target / scale).astype(np.float32))]
        nets, history = fit_ensemble(self.n_ensemble, lambda k: self._fit_member(k, rows, config, or_none(progress)))
        self._scaler, self._scale, self._nets, self.history = scaler, scale, nets, history
        return self

    def _fit_member(self, k: int, rows: Sequence[Tensor], config: TrainConfig, progress: Progress) -> tuple[ResidualMLP, History]:
        seed = seed_for(self.seed, "member", k)
        parts = split_rows(len(rows[0]), config.validation_fraction, seed)
        train, valid = ([t[torch.from_numpy(chosen)].to(self.device) for t in rows] for chosen in parts)
        net = self._new_net(k, tuple(rows[0].shape[1:]), rows[1].shape[1])
        batches = MemoryBatches(train, valid, seed=seed, ranks=current_ranks())
        return net, train_member(_squared_error, net, batches, config, seed=self.seed, member=(k, self.n_ensemble), progress=progress)

    def _new_net(self, k: int, x_shape: tuple[int, ...], dim: int) -> ResidualMLP:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_for(seed_for(self.seed, "member", k), "weights"))
            shape = EmbeddingConfig(hidden=self.embedding.hidden, n_blocks=self.embedding.n_blocks, n_features=dim)
            return ResidualMLP(math.prod(x_shape), shape).to(self.device)

    @torch.inference_mode()
    def score(self, x: ArrayLike) -> Array:
        """t^(x): (d,) for one event, (n, d) for n, one over the parameters' units.

        For independent events the statistics add up.   Raises: ShapeError, NonFiniteError, DataError, SettingError.
        """
        if self._scaler is None:
            raise SettingError("this SALLY is not trained; expected .fit(x, score) first")
        array, single = self._scaler.check("x", x)
        if len(array) == 0:
            raise DataError(f"x has shape {array.shape}, no events; expected at least one")
        inputs = self._scaler.apply(array).to(self.device)
        parts = [torch.stack([net(part).double() for net in self._nets]).mean(dim=0).cpu() for part in inputs.split(_ROWS)]
        out: Array = torch.cat(parts).numpy() * self._scale
        return out[0] if single else out

    def save(self, path: str | Path) -> None:
        """Write the model: weights, scaling, settings and history; `sp.load` reads it.   Raises: ModelFileError, SettingError."""
        if self._scaler is None:
            raise SettingError("this SALLY is not trained; expected .fit(x, score) first")
        content = common_content(self) | {"scaler": self._scaler.to_dict(), "scale": torch.from_numpy(np.array(self._scale))}
        write_file(path, *FILE, content)

    @classmethod
    def _from_content(cls, path: Path, content: dict[str, Any], embedding: nn.Module | None, device: str | torch.device) -> Self:
        model = cls(**common_settings(path, content, embedding), device=device)
        model._scaler, model._scale = XScaler.from_dict(content["scaler"]), content["scale"].numpy()
        model.history = content["history"]
        nets = [model._new_net(k, model._scaler.shape, len(model._scale)) for k in range(model.n_ensemble)]
        model._nets = with_weights(nets, content)
        return model

    def information(self, x: ArrayLike) -> Array:
        """Fisher information per event, E[t t^T] (d, d), from events x (n, ...) ~ p(x | theta_ref), not those trained on.

        Read: the best variance that any unbiased estimate from N events can have is the inverse of N times this.
        """
        t = np.atleast_2d(self.score(x))
        return t.T @ t / len(t)


def _squared_error(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over parameters, one value per row."""
    error: Tensor = net(x) - target
    return (error**2).sum(dim=1)


def _column(name: str, value: ArrayLike) -> Array:
    """(n,) as one column."""
    array = as_real(name, value)
    return array[:, None] if array.ndim == 1 else array
