r"""Amortised Bayes factors: one classifier, trained on simulations of the models, gives the Bayes factors of any data set.

Draw theta ~ p(theta | M_k) and x ~ p(x | theta, M_k), equally often from each model. The optimal classifier has

    f_k(x) - f_j(x) = log p(x | M_k) / p(x | M_j),     p(x | M) = int p(x | theta, M) p(theta | M) dtheta,

the log of the Bayes factor. The simulation itself integrates over the parameters, and no likelihood is needed. With prior probabilities
P(M_k), P(M_k | x) is proportional to p(x | M_k) P(M_k); they do not enter the training and can be changed after it.

The trained classifier is tested on new simulations: among those to which it assigns probability p for a model, is the fraction from that
model equal to p (`probabilities`)?

Source: Radev et al. 2021, arXiv:2004.10629; Cranmer, Pavez & Louppe 2015, arXiv:1506.02169. Network: `network`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import nn

from sbi_phys.comparison.network import ModelNet, finish, model_loss
from sbi_phys.comparison.probabilities import ProbabilityCalibration, check_probabilities, prior_probabilities, require_names
from sbi_phys.core.checks import as_floating, require_finite, require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError, SimulatorMismatchError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.results import Result, Rows, plain
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.estimators.base import BaseEstimator, Shared
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.priors import Observable
from sbi_phys.simulation.protocol import Simulator, check_output, check_simulator
from sbi_phys.training.batches import Batches, MemoryBatches
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.scaling import XScaler, count_columns
from sbi_phys.training.sources import InMemory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ModelComparison", "model_comparison"]

MIN_SIMULATIONS = 100
_ROWS = 16384
_SIMULATE = 10_000


class ModelComparison(BaseEstimator, Result):
    """Trained comparison of K models: Bayes factors and probabilities of any data set. Returned by `model_comparison`.

    names (K,). prior (K,), prior probabilities of the models. calibration: of the probabilities on new simulations, with equal prior
    probabilities, or None. x_obs and probability (K,): the data set passed to `model_comparison` and its probabilities, or None.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> x = np.random.default_rng(0).normal(size=(2, 300, 1)) * [[[1.0]], [[3.0]]]
    >>> settings = dict(n_check=100, n_ensemble=1, config=sp.TrainConfig(max_epochs=1), embedding=sp.EmbeddingConfig(hidden=8))
    >>> trained = sp.model_comparison({"narrow": x[0], "wide": x[1]}, [9.0], **settings)
    >>> trained.log_bayes_factor([[0.0], [9.0]], "wide", "narrow").shape, bool(trained.probability[1] > 0.5)
    ((2,), True)
    """

    default_embedding = EmbeddingConfig(hidden=64, n_blocks=1, n_features=32)
    _nets: list[ModelNet]

    def __init__(self, names: Sequence[str], **shared: Unpack[Shared]) -> None:
        super().__init__(**shared)
        self.names, self.n_train = tuple(names), 0
        self.prior = np.full(len(self.names), 1 / len(self.names))
        self.calibration: ProbabilityCalibration | None = None
        self.x_obs: Array | None = None
        self.probability: Array | None = None

    def build(self, scaler: Any, seed: int) -> ModelNet:
        """Classifier of the models."""
        return ModelNet(len(self.names), scaler.shape, self.embedding, seed=seed, scaler=scaler)

    def finish(self, net: ModelNet, batches: Batches) -> None:
        """Solve for the last layer."""
        assert isinstance(batches, MemoryBatches)
        finish(net, batches.train, batches.valid)

    def _fit(self, samples: list[NDArray[np.floating]], checkpoint: str | Path | None, progress: Progress | None) -> None:
        """Train all members on simulations (n, ...) of each model."""
        x, sizes = np.concatenate(samples), np.array([len(s) for s in samples])
        label = np.repeat(np.arange(len(samples)), sizes)
        shares = torch.from_numpy((len(x) / (len(samples) * sizes))[label]).float()
        scaler = XScaler.fit(x, count_columns(x, self.x_transform, self.observables), standardise=self.standardise)
        rows = (scaler.apply(x), torch.from_numpy(label), shares)
        config = self.config or _config(len(x))
        self._train(InMemory(rows, scaler, config, seed=self.seed, device=self.device), model_loss, checkpoint, or_none(progress))
        self.n_train = len(x)

    def state(self) -> dict[str, Any]:
        """Prior, number of simulations, calibration."""
        calibration = None if self.calibration is None else self.calibration.to_dict()
        return {"prior": torch.from_numpy(self.prior), "n_train": self.n_train, "calibration": calibration}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.prior, self.n_train = state["prior"].numpy(), state["n_train"]
        self.calibration = None if state["calibration"] is None else ProbabilityCalibration.from_dict(state["calibration"])

    def log_evidence_ratios(self, x: ArrayLike) -> Array:
        """log p(x | M_k) up to a constant for each x: (K,) for one data set, (b, K) for a batch; nats, with mean zero over k.

        Raises: ShapeError, NonFiniteError, DataError.
        """
        array, single = self._require_fit().check("x", x)
        scores = self._scores(array)
        return scores[0] if single else scores

    def log_bayes_factor(self, x: ArrayLike, model: str, against: str) -> Any:
        """log p(x | model) - log p(x | against), nats: a number for one data set, (b,) for a batch.   Raises: SettingError too."""
        i, j = require_names(model, self.names), require_names(against, self.names)
        scores = self.log_evidence_ratios(x)
        out = scores[..., i] - scores[..., j]
        return float(out) if out.ndim == 0 else out

    def probabilities(self, x: ArrayLike, prior: Mapping[str, float] | None = None) -> Array:
        """P(M_k | x): (K,) for one data set, (b, K) for a batch.

        Args: prior: prior probabilities of the models, in place of those passed to `model_comparison`.
        Raises: as `log_evidence_ratios`.
        """
        before = self.prior if prior is None else prior_probabilities(self.names, prior)
        return np.asarray(np.exp(log_softmax(self.log_evidence_ratios(x) + np.log(before), axis=-1)))

    def rows(self) -> Rows:
        """Return the table: one row for each model, with its prior probability and, of an observation, its probability."""
        found = {} if self.probability is None else {"probability": self.probability}
        return Rows.of({"name": self.names, "prior": self.prior} | found)

    def to_dict(self) -> dict[str, Any]:
        """Return names, prior, calibration and, of an observation, its probabilities as JSON values; `save` keeps the networks."""
        shown = ("names", "prior", "n_train", "calibration", "x_obs", "probability")
        return {name: plain(getattr(self, name)) for name in shown}

    def summary(self) -> str:
        """Return the result in words."""
        lines = [f"Comparison of {', '.join(self.names)}, trained on {self.n_train} simulations"]
        if self.probability is not None:
            shown = "  ".join(f"{n}: {p:.4f}" for n, p in zip(self.names, self.probability, strict=True))
            lines.append(f"  probabilities of the observation  {shown}")
        if self.calibration is not None:
            lines.append(f"  {self.calibration.summary()}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the reliability of the probabilities.   Raises: SettingError without a calibration."""
        if self.calibration is None:
            raise SettingError("n_check was 0: there is no calibration; expected model_comparison(..., n_check=2000)")
        return self.calibration.plot(ax)

    def _look_at(self, x_obs: ArrayLike) -> None:
        array, single = self._scaler.check("x_obs", x_obs)
        if not single and len(array) != 1:
            raise ShapeError(f"x_obs has {len(array)} data sets; expected one; use .probabilities(x) for many")
        self.x_obs, self.probability = array[0], self.probabilities(array)[0]

    @torch.inference_mode()
    def _scores(self, x: Array) -> Array:
        parts = []
        for start in range(0, len(x), _ROWS):
            inputs = self._scaler.apply(x[start : start + _ROWS]).to(self.device)
            parts.append(torch.stack([net(inputs).double() for net in self._nets]).mean(dim=0))
        scores = torch.cat(parts) if parts else torch.zeros(0, len(self.names), dtype=torch.float64)
        return np.asarray((scores - scores.mean(dim=1, keepdim=True)).cpu().numpy())


def model_comparison(
    models: Mapping[str, Simulator | ArrayLike],
    x_obs: ArrayLike | None = None,
    *,
    n_simulations: int = 20_000,
    prior: Mapping[str, float] | None = None,
    n_ensemble: int = 2,
    embedding: EmbeddingConfig | nn.Module | None = None,
    x_transform: str = "auto",
    n_check: int = 2000,
    config: TrainConfig | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> ModelComparison:
    r"""Learn the Bayes factors between models from simulations.

    Args:
        models: {name: simulator}, or {name: x (n, k)} with existing simulations, theta drawn from each model's prior; all with the same
            observables.
        x_obs: one data set, whose probabilities are reported in the result.
        n_simulations: for each model, if simulators are given.
        prior: prior probabilities of the models, any positive numbers; default equal.
        n_ensemble: number of networks, whose scores are averaged.
        embedding: as for an NPE; `sbi_phys.nets` has embeddings of event sets.
        x_transform: as for an NPE.
        n_check: simulations of each model for the test of calibration, 0 for none; of arrays, that many of the last rows are kept.
        config: training settings; default about 3000 steps.
        device: where to train.
        seed: of simulations, weights and order.
        checkpoint: path prefix; an interrupted training continues from there.
        progress: default none.

    Returns: ModelComparison: `log_bayes_factor(x, model, against)`, `probabilities(x)`, `calibration`, `summary()`, `plot()`.
    Raises: SettingError, SimulatorMismatchError (other observables), ShapeError, NonFiniteError, DataError, TrainingError.
    Source: Radev et al. 2021, arXiv:2004.10629.
    Read: a log Bayes factor of 1 is weak evidence, 5 decisive, given the priors of the parameters. Do not trust the probabilities if
        calibration.pvalue < 0.05.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> x = np.random.default_rng(0).normal(size=(2, 300, 1)) * [[[1.0]], [[3.0]]]
    >>> settings = dict(n_check=100, n_ensemble=1, config=sp.TrainConfig(max_epochs=1), embedding=sp.EmbeddingConfig(hidden=8))
    >>> trained = sp.model_comparison({"narrow": x[0], "wide": x[1]}, **settings)
    >>> trained.names, trained.probabilities([[0.0], [9.0]]).shape
    (('narrow', 'wide'), (2, 2))
    """
    names = _checked_names(models)
    before = prior_probabilities(names, prior)
    n, n_check = require_int("n_simulations", n_simulations, low=MIN_SIMULATIONS), require_int("n_check", n_check, low=0)
    out = ModelComparison(
        names,
        seed=seed,
        embedding=embedding,
        n_ensemble=n_ensemble,
        device=device,
        x_transform=x_transform,
        observables=_observables(names, models),
        config=config,
    )
    out.prior = before
    samples = [_draw(name, models[name], n + n_check, seed, progress) for name in names]
    train = [s[: len(s) - n_check] for s in samples]
    _check_samples(names, train)
    out._fit(train, checkpoint, progress)
    if n_check:
        out.calibration = _calibration(out, [s[len(s) - n_check :] for s in samples], seed_for(seed, "check"))
    if x_obs is not None:
        out._look_at(x_obs)
    return out


def _checked_names(models: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(models, Mapping):
        raise SettingError(f"models is a {type(models).__name__}; expected {{name: simulator}}")
    if len(models) < 2:
        raise SettingError(f"models has {len(models)} entries; expected at least two to compare")
    if not all(isinstance(name, str) and name for name in models):
        raise SettingError(f"models has the names {list(models)}; expected text")
    return tuple(models)


def _draw(name: str, model: Any, n: int, seed: int, progress: Progress | None) -> NDArray[np.floating]:
    """Simulations (n, ...) of one model, finite."""
    if not hasattr(model, "simulate"):
        x = as_floating(f"simulations of {name}", model)
        x = x[:, None] if x.ndim == 1 else x
        require_finite(f"simulations of {name}", x)
        return np.asarray(x)
    check_simulator(model)
    parts = []
    with or_none(progress).task(f"simulate {name}", total=n) as task:
        for start in range(0, n, _SIMULATE):
            size = min(_SIMULATE, n - start)
            theta = model.prior.sample(size, rng_for(seed, "theta", name, start))
            parts.append(check_output(model, model.simulate(theta, rng_for(seed, "x", name, start)), size).astype(np.float32))
            task.advance(size)
    x = np.concatenate(parts)
    require_finite(f"simulations of {name}", x)
    return x


def _check_samples(names: tuple[str, ...], samples: list[NDArray[np.floating]]) -> None:
    for name, x in zip(names, samples, strict=True):
        if x.ndim < 2 or x.shape[1:] != samples[0].shape[1:]:
            raise ShapeError(f"simulations of {name} have shape {x.shape}; expected (n, {', '.join(map(str, samples[0].shape[1:]))})")
        if len(x) < MIN_SIMULATIONS:
            raise DataError(
                f"{name} has {len(x)} simulations to train on; expected at least {MIN_SIMULATIONS} in addition to those of n_check"
            )


def _observables(names: tuple[str, ...], models: Mapping[str, Any]) -> tuple[Observable, ...] | None:
    found = [(name, tuple(models[name].observables)) for name in names if hasattr(models[name], "simulate")]
    for name, observables in found:
        if [(o.size, o.kind) for o in observables] != [(o.size, o.kind) for o in found[0][1]]:
            got, expected = ({o.name: (o.size, o.kind) for o in seen} for seen in (observables, found[0][1]))
            raise SimulatorMismatchError(f"{name} has observables {got}; expected those of {found[0][0]}, {expected}")
    return found[0][1] if len(found) == len(names) else None


def _calibration(trained: ModelComparison, fresh: list[NDArray[np.floating]], seed: int) -> ProbabilityCalibration:
    """Test of the probabilities on equally many simulations of each model that were not used in training."""
    p = trained.probabilities(np.concatenate(fresh), dict.fromkeys(trained.names, 1.0))
    return check_probabilities(p, np.repeat(np.arange(len(fresh)), [len(x) for x in fresh]), trained.names, seed=seed)


def _config(n: int) -> TrainConfig:
    """Settings for about 3000 steps with a batch size that grows with the number of rows."""
    batch = int(np.clip(2 ** round(math.log2(n / 60)), 64, 1024))
    epochs = int(np.clip(round(3000 * batch / n), 8, 60))
    return TrainConfig(batch_size=batch, max_epochs=epochs, patience=epochs, learning_rate=4e-3)
