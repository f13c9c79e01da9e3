"""The base of the learned unfolders: an estimator whose networks are conditional flows q(target | condition) of truth and reco."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.estimators.base import BaseEstimator, History
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import PosteriorNet, log_prob_nets
from sbi_phys.nets.spline import arithmetic
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.training.scaling import XScaler
from sbi_phys.unfold._inputs import MIN_EVENTS, as_columns, as_mask, as_weights
from sbi_phys.unfold.classifier import training_config

__all__ = ["LearnedUnfolder", "PairScaler"]


@dataclass(frozen=True, slots=True)
class PairScaler:
    """Standardisation of truth and of reco."""

    truth: XScaler
    reco: XScaler

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and numbers for a model file."""
        return {"truth": self.truth.to_dict(), "reco": self.reco.to_dict()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`."""
        return cls(XScaler.from_dict(state["truth"]), XScaler.from_dict(state["reco"]))


class LearnedUnfolder(BaseEstimator):
    """Settings and networks of an unfolder; in `build` a subclass chooses which of truth and reco is the target and which the condition."""

    scaler_class = PairScaler
    default_embedding = EmbeddingConfig(hidden=64, n_blocks=1, n_features=32)
    _scaler: PairScaler
    _nets: list[PosteriorNet]

    def __init__(
        self,
        *,
        flow: str | FlowConfig = "spline",
        embedding: EmbeddingConfig | nn.Module | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        config: TrainConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed, embedding=embedding, n_ensemble=n_ensemble, device=device, config=config)
        self.flow = FlowConfig.of(flow, n_layers=3, hidden=48)

    def row_loss(self, net: nn.Module, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """-w log q(u | x), one value per row."""
        return -w * net.log_prob(u, x)  # type: ignore[operator]

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """An unfolder whose `fit` fails stays as it was."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _pairs(
        self, truth: ArrayLike, reco: ArrayLike, reco_pass: ArrayLike | None, weights: ArrayLike | None
    ) -> tuple[Array, Array, Mask, Array, Mask]:
        """Truth (n, d), reco (n, k), reconstructed (n,), weights (n,), and the events to train on (n,); sets the scaling."""
        t = as_columns("truth", truth)
        seen = as_mask("reco_pass", reco_pass, len(t), "truth")
        r, own = as_columns("reco", reco, seen), as_weights("weights", weights, len(t), "truth")
        if len(r) != len(t):
            raise ShapeError(f"truth has {len(t)} rows and reco {len(r)}; expected the same events in both, row by row")
        keep = seen & (own > 0)
        if keep.sum() < MIN_EVENTS:
            raise DataError(f"{keep.sum()} of {len(t)} simulated events are reconstructed, with weight; expected at least {MIN_EVENTS}")
        self._scaler = PairScaler(_standardised(t[keep]), _standardised(r[keep]))
        return t, r, seen, own, keep

    def _train_further(
        self,
        net: PosteriorNet,
        rows: tuple[Tensor, Tensor],
        w: Array,
        default: tuple[int, float],
        checkpoint: str | Path | None,
        *key: int,
    ) -> History:
        """Train a network further on rows (target, condition), scaled, with weights w (n,).

        Args: default: epochs and learning rate without a `config`. checkpoint: path prefix. key: of the training, for seed and file.
        """
        seed = seed_for(self.seed, "fit", *key)
        path = None if checkpoint is None else ".".join(map(str, (checkpoint, *key)))
        config = self.config or training_config(len(w), epochs=default[0], learning_rate=default[1])
        order = torch.from_numpy(rng_for(seed, "split").permutation(len(w)))
        n_valid = max(1, round(config.validation_fraction * len(w)))
        columns = [a.to(self.device) for a in (*rows, torch.from_numpy((w / w.mean()).astype(np.float32)))]
        valid, train = ([a[part.to(self.device)] for a in columns] for part in (order[:n_valid], order[n_valid:]))
        computed = arithmetic(torch.device(self.device), config.precision)
        records = fit(self.row_loss, net, train, valid, config, seed=seed, checkpoint=path, arithmetic=computed)
        return [asdict(record) for record in records]

    def _log_prob(self, target: Array, scaler: XScaler, condition: Tensor) -> Array:
        """log q(target | condition) (n,) of paired rows, in the units of the target."""
        return log_prob_nets(self._nets, scaler.apply(target).to(self.device), condition) - np.log(scaler.scale).sum()

    def _check(self, name: str, value: ArrayLike, kind: str) -> tuple[Array, Tensor]:
        """Columns of `kind` ('truth' or 'reco') as in the training, and the same scaled.

        Raises: SettingError (not trained), ShapeError, NonFiniteError.
        """
        scaler: XScaler = getattr(self._require_fit(), kind)
        x = as_columns(name, value)
        if x.shape[1:] != scaler.shape:
            raise ShapeError(f"{name} has {x.shape[1]} columns; expected {scaler.shape[0]}, as in the training")
        return x, scaler.apply(x).to(self.device)


def _standardised(x: Array) -> XScaler:
    sd = x.std(axis=0)
    scale = np.where(sd > 1e-12 * (1 + np.abs(x).max(axis=0)), sd, 1.0)
    return XScaler(x.shape[1:], np.zeros(x.shape[1:], dtype=bool), x.mean(axis=0), scale)
