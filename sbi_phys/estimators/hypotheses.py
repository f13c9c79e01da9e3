r"""Ratio of two hypotheses: log r(x | theta0, theta1) = log p(x | theta0) - log p(x | theta1), parametrised or fixed.

A classifier separates events drawn from theta0 (numerator) from events drawn from theta1 (reference). The pair (theta0, theta1) may vary
from row to row and is an input of the classifier:

    minimise  mean_0 log(1 + e^-f) + mean_1 log(1 + e^f),      f = g(x, theta0) - g(x, theta1),      f* = log r

Every exact log ratio is such a difference of one function g. Learned in this form, r(x | a, b) r(x | b, c) = r(x | a, c) and
r(x | a, b) = 1 / r(x | b, a) hold exactly, and training against one fixed theta1 is enough for the ratio of any two theta0. Two
hypotheses without parameters have f = g(x). Afterwards the last layer is solved exactly for rows in memory (`nets.classifier`).

Rows (theta_i, x_i) of a store or of a simulator become pairs within a batch: theta0 = theta_i, and theta1 is the theta of another row.
theta0 and theta1 are then exchangeable, and f(x, theta0, theta1) = -f(x, theta1, theta0): the loss is mean log(1 + e^-f), and f* = log r.

Source: Cranmer, Pavez & Louppe 2015, arXiv:1506.02169.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import as_matrix, as_real, require_finite
from sbi_phys.core.errors import DataError, SettingError, ShapeError, SimulatorMismatchError, SupportError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for, torch_rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.estimators.base import BaseEstimator, Shared
from sbi_phys.nets.classifier import ClassifierConfig, LabelledFeatures, PairClassifier, solve_last_layer
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.priors import Prior, prior_from_dict
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.store.store import Store
from sbi_phys.training.batches import Batches, MemoryBatches
from sbi_phys.training.loop import Loss, TrainConfig
from sbi_phys.training.scaling import XScaler, count_columns, split_rows
from sbi_phys.training.sources import InMemory, Rows, Settings, checked_weights, from_simulator, from_stores, stores_of

__all__ = ["Events", "HypothesisRatio", "TwoHypotheses", "as_events", "cross_entropy", "solve_head", "standard_units"]


MIN_EVENTS = 20
_ROWS = 16384


@dataclass(frozen=True, slots=True)
class Events:
    """Training rows: x (n, ...), the thetas of both hypotheses (n, d) (d = 0 for none), and what a loss needs besides, (n, ...) each."""

    x: Array
    theta0: Array
    theta1: Array
    extra: tuple[Array, ...]


class RatioShared(Shared, total=False):
    """Keyword arguments of every `HypothesisRatio`."""

    network: ClassifierConfig | None


class HypothesisRatio(BaseEstimator):
    """Common part of all estimators of log r(x | theta0, theta1): scaling, training, evaluation; `fit` is theirs.

    Args: network: as of `NRE`. n_ensemble: the log ratio is the mean over the networks, so that it stays a difference.
    config: of the training loop; None chooses from the number of rows. Others as `BaseEstimator`.
    Raises: SettingError.
    """

    default_embedding = EmbeddingConfig(hidden=64, n_blocks=1, n_features=32)
    _nets: list[PairClassifier]

    def __init__(self, *, network: ClassifierConfig | None = None, **shared: Unpack[Shared]) -> None:
        super().__init__(**shared)
        if network is not None and not isinstance(network, ClassifierConfig):
            raise SettingError(f"network is a {type(network).__name__}; expected None or ClassifierConfig(...)")
        self.network = network or ClassifierConfig()
        self._centre, self._width = np.zeros(0), np.ones(0)
        self._boxes: list[tuple[Array, Array]] = []
        self._prior: Prior | None = None  # of a store or simulator, whose map replaces centre and width

    @property
    def dim(self) -> int:
        """Number of parameters, 0 for two fixed hypotheses."""
        return len(self._centre) if self._prior is None else self._prior.dim

    def build(self, scaler: Any, seed: int) -> PairClassifier:
        """Classifier that is given both hypotheses."""
        dim = self.dim if self._prior is None else self._prior.free_dim
        return PairClassifier(dim, scaler.shape, self.network, self.embedding, seed=seed)

    def _fit_events(
        self,
        events: Events,
        loss: Loss,
        *,
        weights: ArrayLike | None,
        checkpoint: str | Path | None,
        progress: Progress | None,
    ) -> None:
        """Scale, train every member, keep the result."""
        config = self.config or _default_config(len(events.x))
        first, _ = split_rows(len(events.x), config.validation_fraction, seed_for(self.seed, "member", 0))
        counts = count_columns(events.x, self.x_transform, self.observables)
        scaler = XScaler.fit(events.x[first], counts, standardise=self.standardise)
        if (scaler.counts & (events.x < 0).any(axis=0)).any():
            raise DataError("x has negative values in columns declared as counts; expected counts >= 0")
        self._prior, self._boxes = None, [_box(t) for t in (events.theta0, events.theta1)]
        self._centre, self._width = standard_units(np.concatenate([events.theta0, events.theta1]))
        columns = list(events.extra) if weights is None else [*events.extra, checked_weights(weights, len(events.x))]
        rows = [scaler.apply(events.x), self._theta_inputs(events.theta0), self._theta_inputs(events.theta1)]
        rows += [torch.from_numpy(e.astype(np.float32)) for e in columns]
        data = InMemory(rows, scaler, config, seed=self.seed, device=self.device, weighted=weights is not None)
        self._train(data, loss, checkpoint, or_none(progress))

    def _theta_inputs(self, theta: Array) -> Tensor:
        if self._prior is not None:
            return torch.from_numpy(self._prior.to_network(theta).astype(np.float32))
        return torch.from_numpy(((theta - self._centre) / self._width).astype(np.float32))

    def log_ratio(self, x: ArrayLike, theta0: ArrayLike | None = None, theta1: ArrayLike | None = None) -> Array:
        """Log p(x | theta0) - log p(x | theta1), nats -> (m,).

        Args: x (k,) or (m, k); theta0, theta1 (d,) or (m, d), None where the hypotheses have no parameters. One row serves for all m.
        Raises: SupportError (a theta outside the ranges that were trained on), ShapeError, NonFiniteError, DataError, SettingError.
        """
        scaler = self._require_fit()
        array, _ = scaler.check("x", x)
        thetas = [self._checked_theta(name, value) for name, value in (("theta0", theta0), ("theta1", theta1))]
        sizes = {"x": len(array), "theta0": len(thetas[0]), "theta1": len(thetas[1])}
        m = max(sizes.values())
        if min(sizes.values()) == 0:
            raise DataError(f"{', '.join(f'{k} has {v} rows' for k, v in sizes.items())}; expected at least one")
        if any(n not in (1, m) for n in sizes.values()):
            raise ShapeError(f"rows differ: {', '.join(f'{k} has {v}' for k, v in sizes.items())}; expected the same number, or one")
        rows = [t.expand(m, *t.shape[1:]) for t in (scaler.apply(array), *map(self._theta_inputs, thetas))]
        return self._evaluate(rows)

    @torch.inference_mode()
    def _evaluate(self, rows: Sequence[Tensor]) -> Array:
        parts = []
        for chunk in zip(*(t.split(_ROWS) for t in rows), strict=True):
            moved = [t.to(self.device) for t in chunk]
            parts.append(torch.stack([net.difference(*moved).double() for net in self._nets]).mean(dim=0).cpu())
        return torch.cat(parts).numpy()

    def _checked_theta(self, name: str, value: ArrayLike | None) -> Array:
        if (value is None) != (self.dim == 0):
            expected = "none, the hypotheses have no parameters" if self.dim == 0 else f"an array of {self.dim} columns"
            raise SettingError(f"{name} is {'None' if value is None else 'given'}; expected {expected}")
        if value is None:
            return np.zeros((1, 0))
        theta = as_matrix(name, value, self.dim)
        inside = np.any([np.all((theta >= low) & (theta <= high), axis=1) for low, high in self._boxes], axis=0)
        if not inside.all():
            i = int(np.argmin(inside))
            ranges = " or ".join(f"{np.round(low, 6).tolist()} to {np.round(high, 6).tolist()}" for low, high in self._boxes)
            raise SupportError(
                f"{name} has {int((~inside).sum())} of {len(theta)} rows outside what was trained on; "
                f"the first is row {i}: {theta[i].tolist()}, expected {ranges}"
            )
        return theta

    def state(self) -> dict[str, Any]:
        """Units and ranges of theta."""
        ranges = {"centre": self._centre, "width": self._width, "boxes": np.array(self._boxes)}
        prior = None if self._prior is None else json.dumps(self._prior.to_dict())
        return {"prior": prior} | {name: torch.from_numpy(np.array(value)) for name, value in ranges.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self._centre, self._width, boxes = (state[name].numpy() for name in ("centre", "width", "boxes"))
        self._boxes = [(low, high) for low, high in boxes]
        self._prior = prior_from_dict(json.loads(state["prior"])) if state.get("prior") else None


def solve_head(net: PairClassifier, train: Sequence[Tensor], valid: Sequence[Tensor]) -> None:
    """Solve the last layer of a cross entropy exactly; rows hold x, both theta, both weights[, weight of the row]."""

    @torch.no_grad()
    def labelled(rows: Sequence[Tensor]) -> list[LabelledFeatures]:
        found = []
        for x, u0, u1, w1, w0, *w in zip(*(t.split(_ROWS) for t in rows), strict=True):
            found.append((net.difference_features(x, u0, u1), w1 * w[0] if w else w1, w0 * w[0] if w else w0))
        return found

    # the constant cancels in a difference
    solve_last_layer(net.head, labelled(train), labelled(valid), intercept=net.dim == 0)


class TwoHypotheses(HypothesisRatio):
    """Classifier of events from theta0 against events from theta1: log r(x | theta0, theta1).

    Args: as `HypothesisRatio`.   Raises: SettingError.

    >>> import numpy as np, sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> signal, background = rng.normal(1.0, 1.0, 300), rng.normal(0.0, 1.0, 300)
    >>> ratio = sp.TwoHypotheses(seed=0, config=sp.TrainConfig(max_epochs=2)).fit(None, signal, None, background)
    >>> bool(ratio.log_ratio([3.0]) > ratio.log_ratio([-3.0]))
    True
    """

    def fit(
        self,
        theta0: ArrayLike | Store | str | Path | Sequence[Store | str | Path] | None = None,
        x0: ArrayLike | Store | str | Path | None = None,
        theta1: ArrayLike | None = None,
        x1: ArrayLike | None = None,
        *,
        weights: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        simulator: Simulator | None = None,
        online: bool = False,
        n: int | None = None,
        memory: int | None = None,
        workers: int | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on events x0 (n0, ...) ~ p(x | theta0) and x1 (n1, ...) ~ p(x | theta1), on stores, or on a simulator.

        Args: theta0, theta1: None for two hypotheses without parameters; (d,) for a fixed one; (n0, d), (n1, d) for one theta per event.
        Row i of theta0 and of theta1 are a pair of hypotheses, so that n0 = n1 if both vary; if only one varies, its values are
        also given, in random order, to the other's events. The priors of the two classes are equal whatever n0 and n1 are.
        In place of the arrays, fit(store), fit(store0, store1) or fit([store0, store1, ...]): stores (or paths) of one simulator and
        prior, with theta from the prior or given to `simulate`. Every row is an event of its own theta, compared with the theta of
        another row of any of the stores. Or fit(simulator=..., online=True, n=...): n fresh simulations with theta from the simulator's
        prior, paired in the same way. Stores and simulators have parameters; hypotheses without parameters are arrays in memory.
        weights: (n0,) and (n1,), > 0, of the events of each hypothesis; of stores, (n,), one per successful row, in their order.
        memory, workers, checkpoint: as of `Estimator.fit`.
        Raises: ShapeError, NonFiniteError, DataError (fewer than 20 events, mixed None), TrainingError, StoreError, SettingError,
        SimulatorMismatchError (stores of different simulators).
        """
        given, progress = (theta0, x0, theta1, x1), or_none(progress)
        present = [value for value in given if value is not None]
        stores = stores_of(theta0 if len(present) == 1 else present)
        if online or simulator is not None:
            simulator = self._online_simulator(simulator, online, given, weights)
            settings = self._pair_settings(simulator.prior, n or 0, [simulator.prior.sample(_ROWS, rng_for(self.seed, "range"))])
            rows = from_simulator(simulator, n, settings, workers)
        elif stores is not None:
            rows = self._stored_pairs(stores, weights, memory, progress)
        elif x0 is None or x1 is None:
            missing = "x0" if x0 is None else "x1"
            raise DataError(f"{missing} is missing; expected fit(theta0, x0, theta1, x1), fit(store) or fit(store0, store1)")
        else:
            return self._fit_arrays(theta0, x0, theta1, x1, weights, checkpoint, progress)
        with rows:
            self._train(rows, self.row_loss, checkpoint, progress)
        return self

    def _stored_pairs(self, stores: list[Store], weights: Any, memory: int | None, progress: Progress) -> Rows:
        for store in stores[1:]:
            if (store.identity, store.prior.to_dict()) != (stores[0].identity, stores[0].prior.to_dict()):
                raise SimulatorMismatchError(
                    f"{store!r} has another simulator or prior than {stores[0]!r}; expected stores of one simulator and prior, "
                    "or arrays: fit(None, x0, None, x1)"
                )
        self.identity = self.identity or stores[0].identity
        self.observables = self.observables or stores[0].observables
        ends = [[f(t, axis=0) for t, _, _ in store.shards(valid_only=True) if len(t) for f in (np.min, np.max)] for store in stores]
        n = sum(store.n_ok for store in stores)
        settings = self._pair_settings(stores[0].prior, n, [np.array(e) for e in ends if e])
        return from_stores(stores, settings, memory, progress, weights)

    def _pair_settings(self, prior: Prior, n: int, thetas: Sequence[Array]) -> Settings:
        """Settings of n rows (theta, x); the prior and the ranges of theta are kept."""
        self._prior, self._boxes = prior, [_box(theta) for theta in thetas]
        config = self.config or _default_config(max(n, MIN_EVENTS))
        return Settings(prior, self.seed, config, self.device, self.x_transform, self.observables, standardise=self.standardise)

    def row_loss(self, net: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        """Cross entropy of pairs made of rows (u, x)."""
        return cross_entropy(net, *_pairs(u, x))

    def member_batches(self, net: Any, batches: Batches, config: TrainConfig, seed: int, progress: Progress) -> tuple[Batches, TrainConfig]:
        """Shuffle validation rows (u, x[, weight]), which would otherwise be paired within the same part of a store."""
        if self._prior is not None:
            order = torch.randperm(len(batches.validation[0]), generator=torch_rng_for(seed, "pairs")).to(self.device)
            cast(Any, batches).validation = tuple(t[order] for t in batches.validation)
        return batches, config

    def _fit_arrays(self, theta0: Any, x0: Any, theta1: Any, x1: Any, weights: Any, checkpoint: Any, progress: Progress) -> Self:
        first, second = as_events("x0", x0), as_events("x1", x1)
        if first.shape[1:] != second.shape[1:]:
            raise ShapeError(f"x0 has rows of shape {first.shape[1:]}, x1 of {second.shape[1:]}; expected the same")
        n0, n1 = len(first), len(second)
        a, b = self._thetas(theta0, theta1, n0, n1)
        numerator = np.repeat([1.0, 0.0], [n0, n1])
        shares = (numerator * (n0 + n1) / (2 * n0), (1 - numerator) * (n0 + n1) / (2 * n1))
        given = None
        if weights is not None:
            own = [checked_weights(w, n) for w, n in zip(weights, (n0, n1), strict=True)]
            given = np.concatenate([w / w.mean() for w in own])
        events = Events(np.concatenate([first, second]), a, b, shares)
        self._fit_events(events, cross_entropy, weights=given, checkpoint=checkpoint, progress=progress)
        return self

    def finish(self, net: PairClassifier, batches: Batches) -> None:
        """Solve the last layer exactly for rows in memory."""
        if self._prior is None:
            solve_head(net, cast(MemoryBatches, batches).train, cast(MemoryBatches, batches).valid)
        elif isinstance(batches, MemoryBatches):
            solve_head(net, *(_pairs(*rows) for rows in (batches.train, batches.valid)))

    def _thetas(self, theta0: ArrayLike | None, theta1: ArrayLike | None, n0: int, n1: int) -> tuple[Array, Array]:
        """Both hypotheses of all n0 + n1 events."""
        if (theta0 is None) != (theta1 is None):
            raise DataError(f"theta{0 if theta0 is None else 1} is None and the other is not; expected both or neither")
        if theta0 is None or theta1 is None:
            return np.zeros((n0 + n1, 0)), np.zeros((n0 + n1, 0))
        a, b = _parameters("theta0", theta0, n0), _parameters("theta1", theta1, n1)
        if a.shape[1] != b.shape[1]:
            raise ShapeError(f"theta0 has {a.shape[1]} columns and theta1 has {b.shape[1]}; expected the same")
        if len(a) > 1 and len(b) > 1:
            if n0 != n1:
                raise ShapeError(f"theta0 has {n0} rows and theta1 has {n1}; expected the same number where both vary")
            return np.concatenate([a, a]), np.concatenate([b, b])
        rng = rng_for(self.seed, "thetas")
        return _spread(a, n0, n1, rng), _spread(b, n1, n0, rng)[np.r_[n1 : n0 + n1, 0:n1]]


def _pairs(u: Tensor, x: Tensor, *weight: Tensor) -> tuple[Tensor, ...]:
    """Rows (x, own theta, that of the row half the batch further on, 1, 0[, weight]) of `cross_entropy`."""
    return x, u, u.roll(len(u) // 2, dims=0), torch.ones_like(u[:, 0]), torch.zeros_like(u[:, 0]), *weight


def _spread(theta: Array, own: int, other: int, rng: np.random.Generator) -> Array:
    """Theta of its own events, then for the others', (own + other, d)."""
    if len(theta) == 1:
        return np.repeat(theta, own + other, axis=0)
    turns = math.ceil(other / own)
    drawn = np.concatenate([rng.permutation(own) for _ in range(turns)])[:other]
    return np.concatenate([theta, theta[drawn]])


def _box(theta: Array) -> tuple[Array, Array]:
    """Range (d,) of theta (n, d), wider by 1 % on either side: the ends of a prior are not reached by its draws."""
    low, high = theta.min(axis=0), theta.max(axis=0)
    margin = 0.01 * (high - low) + 1e-9 * (1 + np.abs(theta).max(axis=0))
    return low - margin, high + margin


def standard_units(theta: Array) -> tuple[Array, Array]:
    """Mean and sd (d,) of theta (n, d); a column that does not vary keeps its unit."""
    centre, width = theta.mean(axis=0), theta.std(axis=0)
    return centre, np.where(width > 1e-12 * (1 + np.abs(centre)), width, 1.0)


def as_events(name: str, x: Any) -> Array:
    """Return x as finite (n, ...) float64; (n,) is one column.   Raises: ShapeError, NonFiniteError, DataError (fewer than 20 rows)."""
    array = as_real(name, x)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ShapeError(f"{name} has shape {array.shape}; expected (n, ...) with at least one value per event")
    if len(array) < MIN_EVENTS:
        raise DataError(f"{name} has {len(array)} events; expected at least {MIN_EVENTS}")
    require_finite(name, array)
    return array


def _parameters(name: str, value: ArrayLike, n: int) -> Array:
    """Theta as (n, d) or, of one fixed hypothesis, (1, d); (n,) is one column."""
    array = as_real(name, value)
    if array.ndim == 0 or (array.ndim == 1 and len(array) != n):
        array = array.reshape(1, -1)
    elif array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] == 0 or len(array) not in (1, n):
        raise ShapeError(f"{name} has shape {np.shape(value)}; expected ({n}, d), one row per event, or (d,) for all")
    require_finite(name, array)
    return array


def _default_config(n: int) -> TrainConfig:
    """About eighty steps an epoch, until batches would be too large."""
    batch = int(np.clip(2 ** round(math.log2(n / 80)), 32, 1024))
    return TrainConfig(batch_size=min(batch, max(1, n // 2)), max_epochs=12, patience=12)


def cross_entropy(net: nn.Module, x: Tensor, u0: Tensor, u1: Tensor, w1: Tensor, w0: Tensor) -> Tensor:
    """Weighted cross entropy of the difference, one value per row."""
    assert isinstance(net, PairClassifier)
    f = net.difference(x, u0, u1)
    return w1 * F.softplus(-f) + w0 * F.softplus(f)
