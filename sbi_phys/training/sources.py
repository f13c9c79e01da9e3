r"""Sources of training rows: converts what a user passes to `fit` (arrays, stores or a simulator) into batches for the training loop.

Arrays and small stores are held in memory, larger stores are streamed from disk, and a simulator produces rows during training.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbi_phys.core.checks import as_array, require_int
from sbi_phys.core.errors import DataError, SettingError, SimulatorMismatchError
from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import AnyArray, Array, Integers
from sbi_phys.priors import Observable, Prior
from sbi_phys.simulation.protocol import Simulator, check_simulator
from sbi_phys.store.store import Store
from sbi_phys.training.batches import Batches, MemoryBatches
from sbi_phys.training.failures import warn_of_failures
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.online import OnlineBatches, default_workers
from sbi_phys.training.ranks import current_ranks
from sbi_phys.training.scaling import XScaler, count_columns, prepare_simulations, require_counts, split_rows
from sbi_phys.training.stream import Stream

__all__ = ["InMemory", "Rows", "Scaling", "Settings", "from_arrays", "from_simulator", "from_stores", "needs_streaming", "stores_of"]

MIN_SIMULATIONS = 20
_EPOCHS_ONLINE = 40
_PILOT_ROWS = 50_000  # of a streamed store, that a scaling of the estimator's own is learned from


class Scaling(Protocol):
    """A map of observations to network inputs: `XScaler`, or an estimator's own."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""

    def apply(self, x: NDArray[np.floating]) -> Tensor:
        """Network inputs of x (n, *shape)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of an estimator that every source of rows needs.

    scaling: function (x (n, ...), training rows) -> Scaling, where the estimator has one of its own; None takes `XScaler`.
    standardise: 'column', 'block' or 'none' (`training.scaling`).
    """

    prior: Prior
    seed: int
    config: TrainConfig
    device: torch.device
    x_transform: str
    observables: tuple[Observable, ...] | None
    scaling: Callable[[AnyArray, Integers | slice], Scaling] | None = None
    standardise: str = "column"


class Rows:
    """Training rows of an ensemble: one scaling for all members, and batches for each member.   A context manager.

    Args: scaler: from the training rows of the first member. config: of the training, including settings made by the source.
    weighted: whether the last column of a batch holds weights, of mean one.
    """

    def __init__(
        self, scaler: Any, config: TrainConfig, owner: AbstractContextManager[Any] | None = None, *, weighted: bool = False
    ) -> None:
        self.scaler, self.config, self._owner, self.weighted = scaler, config, owner or nullcontext(), weighted

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *error: Any) -> None:
        self._owner.__exit__(*error)

    def member(self, k: int) -> tuple[Batches, Sequence[Tensor]]:
        """Batches of member k, and rows (u, x, ...) from which its network may be initialised."""
        raise NotImplementedError


class InMemory(Rows):
    """Rows that fit into memory: tensors with equal rows; each member has a split of its own.

    Args: tensors: columns of a batch; where weighted, the last holds weights, which each part of the split is normalised by.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        scaler: Any,
        config: TrainConfig,
        *,
        seed: int,
        device: str | torch.device,
        weighted: bool = False,
    ) -> None:
        super().__init__(scaler, config, weighted=weighted)
        self._tensors, self._seed, self._device = tuple(tensors), seed, device

    def member(self, k: int) -> tuple[MemoryBatches, Sequence[Tensor]]:
        """Batches of a separate split for each member."""
        seed = seed_for(self._seed, "member", k)
        parts = [torch.from_numpy(rows) for rows in split_rows(len(self._tensors[0]), self.config.validation_fraction, seed)]
        train, valid = ([t[rows].to(self._device) for t in self._tensors] for rows in parts)
        if self.weighted:
            train[-1], valid[-1] = train[-1] / train[-1].mean(), valid[-1] / valid[-1].mean()
        return MemoryBatches(train, valid, seed=seed, ranks=current_ranks()), train


class _Streamed(Rows):
    """Rows from a stream or a simulator: members share the validation rows and use different epochs of the same source."""

    def __init__(self, source: Any, config: TrainConfig, *, weighted: bool = False, batches: Any = None) -> None:
        super().__init__((batches or source).scaler, config, source, weighted=weighted)
        self._batches = batches or source

    def member(self, k: int) -> tuple[Batches, Sequence[Tensor]]:
        """Batches of the source, beginning at another epoch for each member."""
        return _Later(self._batches, k * _MEMBER_EPOCHS), self._batches.validation


class _Mapped:
    """Batches of a stream whose x is mapped once more, on the device.

    Args: x_map: of scaled rows (n, k), as the stream yields them, to network inputs. scaler: of x to these inputs.
    """

    def __init__(self, stream: Stream, scaler: Scaling, device: torch.device, x_map: Callable[[Tensor], Tensor]) -> None:
        self.source, self.scaler, self._device, self._map = stream, scaler, device, x_map
        self.validation = self._mapped(stream.validation)

    @property
    def n(self) -> int:
        """Training rows of one epoch."""
        return self.source.n

    def epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        """Those of the stream."""
        for batch in self.source.epoch(epoch, n_batches):
            yield self._mapped(batch)

    def fingerprint(self) -> Any:
        """That of the stream."""
        return self.source.fingerprint()

    def _mapped(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        u, x, *rest = rows
        return u.to(self._device), self._map(x).to(self._device), *(t.to(self._device) for t in rest)


_MEMBER_EPOCHS = 1_000_000  # more than any training has


@dataclass
class _Later:
    """Batches of a source, beginning at epoch `first`."""

    source: Any
    first: int
    validation: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.validation = self.source.validation

    @property
    def n(self) -> int:
        """Training rows of one epoch."""
        return int(self.source.n)

    def epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches of epoch first + epoch of the source."""
        yield from self.source.epoch(self.first + epoch, n_batches)

    def fingerprint(self) -> Any:
        """Fingerprint of the source, and the first epoch."""
        return [self.source.fingerprint(), self.first]


def from_arrays(theta: Any, x: Any, settings: Settings, weights: Any = None) -> Rows:
    """Rows from arrays theta (n, d), x (n, ...) and weights (n,) > 0.   Raises: ShapeError, NonFiniteError, SupportError, DataError."""
    u, data = prepare_simulations(settings.prior, theta, x, settings.observables)
    if len(u) < MIN_SIMULATIONS:
        raise DataError(f"{len(u)} simulations; expected at least {MIN_SIMULATIONS}")
    given = [] if weights is None else [torch.from_numpy(checked_weights(weights, len(u)).astype(np.float32))]
    first, _ = split_rows(len(u), settings.config.validation_fraction, seed_for(settings.seed, "member", 0))
    scaler: Scaling
    if settings.scaling is not None:
        scaler = settings.scaling(data, first)
    else:
        counts = count_columns(data, settings.x_transform, settings.observables)
        require_counts("x", data, counts, settings.observables)
        scaler = XScaler.fit(data[first], counts, observables=settings.observables, standardise=settings.standardise)
    tensors = (torch.from_numpy(u.astype(np.float32)), scaler.apply(data), *given)
    return InMemory(tensors, scaler, settings.config, seed=settings.seed, device=settings.device, weighted=bool(given))


def checked_weights(weights: Any, n: int) -> Array:
    """Return weights (n,), finite and positive.   Raises: ShapeError, NonFiniteError, DataError."""
    array = as_array("weights", weights, (n,), note="one weight per row")
    bad = array <= 0
    if bad.any():
        i = int(np.argmax(bad))
        raise DataError(f"weights has {int(bad.sum())} of {n} values that are not > 0, the first is {array[i]:g} in row {i}; expected > 0")
    return array


def stores_of(value: Any, prior: Prior | None = None) -> list[Store] | None:
    """Stores, if the value is a store, a path, or a sequence of these; None if it is data.

    Args: prior: whose parameters they must have; None: those of the first store's.   Raises: SimulatorMismatchError.
    """
    if isinstance(value, str | Path | Store):
        value = [value]
    if not isinstance(value, Sequence) or not value or not all(isinstance(v, str | Path | Store) for v in value):
        return None
    stores = [v if isinstance(v, Store) else Store(v) for v in value]
    names = (prior or stores[0].prior).names
    for store in stores:
        if store.prior.names != names:
            raise SimulatorMismatchError(f"{store!r} has parameters {store.prior.names}; expected {names}")
    return stores


def needs_streaming(stores: Sequence[Store], memory: int | None) -> bool:
    """Whether the rows, as arrays and as tensors, take more than `memory` bytes; None: half of the machine's."""
    if memory is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    columns = sum(o.size for o in stores[0].observables)
    # theta and u in double precision, x as stored and in single precision, and both again in the split
    row = 24 * len(stores[0].parameters) + columns * (stores[0].dtype.itemsize + 8)
    return sum(store.n_rows for store in stores) * row > require_int("memory", memory, low=1)


def from_stores(stores: Sequence[Store], settings: Settings, memory: int | None, progress: Progress, weights: Any = None) -> Rows:
    """Rows from simulation stores: in memory if they fit, streamed otherwise.   Raises: StoreError, DataError, SettingError.

    Args: weights: one per successful row, in the order of the stores.
    Warns: where rows failed and are left out, with how their parameters differ (`training.failures`).
    """
    if current_ranks().rank == 0:
        warn_of_failures(stores, settings.prior.names, stacklevel=5)
    if len(stores) == 1 and not needs_streaming(stores, memory):
        return from_arrays(*stores[0].read(), settings, weights)
    ranks, own = current_ranks(), settings.scaling
    pilot = None if own is None else own(_first_rows(stores), slice(None))
    stream = Stream(
        stores,
        settings.prior,
        memory=2**30 if memory is None else memory,
        seed=settings.seed,
        validation_fraction=settings.config.validation_fraction,
        x_transform=settings.x_transform if own is None else "auto",
        observables=settings.observables,
        standardise=settings.standardise if own is None else "column",
        device=settings.device if own is None else torch.device("cpu"),
        rank=ranks.rank,
        n_ranks=ranks.size,
        progress=progress,
        weights=None if weights is None else checked_weights(weights, sum(store.n_ok for store in stores)),
    )
    weighted = weights is not None
    try:
        if pilot is not None:
            batches = _Mapped(stream, pilot, settings.device, lambda z: pilot.apply(stream.scaler.invert(z)))
        elif stream.scaler.shape != stream.scaler.x_shape:
            batches = _Mapped(stream, stream.scaler, settings.device, stream.scaler.arrange)
        else:
            return _Streamed(stream, settings.config, weighted=weighted)
        return _Streamed(stream, settings.config, weighted=weighted, batches=batches)
    except BaseException:
        stream.close()
        raise


def _first_rows(stores: Sequence[Store]) -> AnyArray:
    """Observations of the first rows of all stores, the same number of each."""
    parts: list[AnyArray] = []
    for store in stores:
        left = _PILOT_ROWS // len(stores)
        for _, x, _ in store.shards(valid_only=True):
            parts.append(x[:left])
            left -= len(parts[-1])
            if left <= 0:
                break
    return np.concatenate(parts)


def from_simulator(simulator: Simulator, n: int | None, settings: Settings, workers: int | None) -> Rows:
    """Rows simulated during training, n in total at most, each used once.   Raises: SettingError, SimulatorMismatchError, DataError."""
    if n is None:
        raise SettingError("n is None; expected the number of simulations to train on: fit(simulator=..., online=True, n=...)")
    check_simulator(simulator)
    if simulator.prior.names != settings.prior.names:
        raise SimulatorMismatchError(f"the simulator has parameters {simulator.prior.names}; expected {settings.prior.names}")
    config, n = settings.config, require_int("n", n, low=MIN_SIMULATIONS)
    batch, _ = config.for_rows(n)
    # an epoch is the interval between two validations; rows are not repeated, so training does not stop early
    # (an epoch is one batch at least, so n rows have n // batch epochs at most)
    epochs = min(config.max_epochs or _EPOCHS_ONLINE, n // batch)
    per_epoch = n // epochs
    source = OnlineBatches(
        simulator,
        settings.prior,
        per_epoch,
        n_valid=max(2, min(round(config.validation_fraction * n), 10_000)),
        x_transform=settings.x_transform,
        seed=settings.seed,
        workers=_workers(simulator) if workers is None else workers,
        device=settings.device,
        ranks=current_ranks(),
        scaling=settings.scaling,
        standardise=settings.standardise,
    )
    changed = {"batch_size": batch, "max_epochs": epochs, "patience": epochs}
    return _Streamed(source, TrainConfig(**{name: changed.get(name, getattr(config, name)) for name in config.__slots__}))


def _workers(simulator: Simulator) -> int:
    """Default number of processes that simulate; 0 for a simulator with `in_process`, such as a network."""
    return 0 if getattr(simulator, "in_process", False) else default_workers()
