"""The base of the learned unfolders: settings, an ensemble of conditional flows q(target | condition), scaling, and argument checks."""

import numpy as np
import torch
from torch import Tensor, nn

from sbi_phys.core.checks import require_int
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import PosteriorNet, log_prob_nets
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.unfold._inputs import MIN_EVENTS, as_columns, as_mask, as_weights
from sbi_phys.unfold.classifier import training_config

__all__ = ["LearnedUnfolder", "weighted_loss"]


def weighted_loss(net: nn.Module, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """-w log q(u | x), one value per row."""
    return -w * net.log_prob(u, x)  # type: ignore[operator]


class LearnedUnfolder:
    """Settings and networks of an unfolder; a subclass chooses which of truth and reco is the target and which the condition."""

    def __init__(
        self,
        *,
        flow: str | FlowConfig = "spline",
        embedding: EmbeddingConfig | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        config: TrainConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.seed = require_int("seed", seed, low=0)
        self.flow = FlowConfig(kind=flow, n_layers=3, hidden=48) if isinstance(flow, str) else flow
        self.embedding = EmbeddingConfig(hidden=64, n_blocks=1, n_features=32) if embedding is None else embedding
        self.n_ensemble = require_int("n_ensemble", n_ensemble, low=1)
        self.device = resolve_device(device)
        self.config = config
        self._nets: list[PosteriorNet] = []
        self._truth_scale: tuple[Array, Array] = (np.empty(0), np.empty(0))
        self._reco_scale: tuple[Array, Array] = (np.empty(0), np.empty(0))

    def _pairs(
        self, truth: ArrayLike, reco: ArrayLike, reco_pass: ArrayLike | None, weights: ArrayLike | None
    ) -> tuple[Array, Array, Mask, Array, Mask]:
        """Truth (n, d), reco (n, k), reconstructed (n,), weights (n,), and the events to train on (n,); sets the two scales."""
        t = as_columns("truth", truth)
        seen = as_mask("reco_pass", reco_pass, len(t), "truth")
        r, own = as_columns("reco", reco, seen), as_weights("weights", weights, len(t), "truth")
        if len(r) != len(t):
            raise ShapeError(f"truth has {len(t)} rows and reco {len(r)}; expected the same events in both, row by row")
        keep = seen & (own > 0)
        if keep.sum() < MIN_EVENTS:
            raise DataError(f"{keep.sum()} of {len(t)} simulated events are reconstructed, with weight; expected at least {MIN_EVENTS}")
        self._truth_scale, self._reco_scale = _scale(t[keep]), _scale(r[keep])
        return t, r, seen, own, keep

    def _new_net(self, m: int, n_target: int, n_condition: int) -> PosteriorNet:
        return PosteriorNet(n_target, (n_condition,), self.flow, self.embedding, seed=seed_for(self.seed, "member", m)).to(self.device)

    def _train(self, net: PosteriorNet, target: Tensor, condition: Tensor, w: Array, seed: int, epochs: int, learning_rate: float) -> float:
        """Train a network further; return the best held-out loss."""
        config = self.config or training_config(len(w), epochs=epochs, learning_rate=learning_rate)
        order = torch.from_numpy(rng_for(seed, "split").permutation(len(w)))
        n_valid = max(1, round(config.validation_fraction * len(w)))
        rows = (target, condition, self._tensor(w / w.mean()))
        valid, train = ([a[part.to(self.device)] for a in rows] for part in (order[:n_valid], order[n_valid:]))
        return min(record.valid for record in fit(weighted_loss, net, train, valid, config, seed=seed))

    def _log_prob(self, target: Array, target_scale: tuple[Array, Array], condition: Tensor) -> Array:
        """log q(target | condition) (n,) of paired rows, in the units of the target."""
        return log_prob_nets(self._nets, self._tensor(target, target_scale), condition) - np.log(target_scale[1]).sum()

    def _check(self, name: str, value: ArrayLike, scale: tuple[Array, Array]) -> Array:
        """Columns as in the training.   Raises: SettingError (not trained), ShapeError, NonFiniteError."""
        self._require_trained()
        x = as_columns(name, value)
        if x.shape[1] != len(scale[0]):
            raise ShapeError(f"{name} has {x.shape[1]} columns; expected {len(scale[0])}, as in the training")
        return x

    def _require_trained(self) -> None:
        if not self._nets:
            raise SettingError(f"this {type(self).__name__} is not trained; expected .fit(truth, reco) first")

    def _tensor(self, array: Array, scale: tuple[Array, Array] | None = None) -> Tensor:
        values = array if scale is None else (array - scale[0]) / scale[1]
        return torch.from_numpy(values.astype(np.float32)).to(self.device)


def _scale(x: Array) -> tuple[Array, Array]:
    sd = x.std(axis=0)
    return x.mean(axis=0), np.where(sd > 1e-12 * (1 + np.abs(x).max(axis=0)), sd, 1.0)
