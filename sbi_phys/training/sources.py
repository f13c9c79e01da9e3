r"""Sources of training rows: converts what a user passes to `fit` (arrays, stores or a simulator) into batches for the training loop.

Arrays and small stores are held in memory, larger stores are streamed from disk, and a simulator produces rows during training.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, SettingError, SimulatorMismatchError
from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import seed_for
from sbi_phys.priors import Observable, Prior
from sbi_phys.simulation.protocol import Simulator, check_simulator
from sbi_phys.store.store import Store
from sbi_phys.training.batches import Batches, MemoryBatches
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.online import OnlineBatches, default_workers
from sbi_phys.training.ranks import current_ranks
from sbi_phys.training.scaling import XScaler, count_columns, prepare_simulations, split_rows
from sbi_phys.training.stream import Stream

__all__ = ["Rows", "Settings", "from_arrays", "from_simulator", "from_stores", "needs_streaming", "stores_of"]

MIN_SIMULATIONS = 20
_EPOCHS_ONLINE = 40


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of an estimator that every source of rows needs."""

    prior: Prior
    seed: int
    config: TrainConfig
    device: torch.device
    x_transform: str
    observables: tuple[Observable, ...] | None


class Rows:
    """Training rows of an ensemble: one scaling for all members, and batches for each member.   A context manager.

    Args: scaler: from the training rows of the first member. config: of the training, including settings made by the source.
    """

    def __init__(self, scaler: XScaler, config: TrainConfig, owner: AbstractContextManager[Any] | None = None) -> None:
        self.scaler, self.config, self._owner = scaler, config, owner or nullcontext()

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *error: Any) -> None:
        self._owner.__exit__(*error)

    def member(self, k: int) -> tuple[Batches, Tensor]:
        """Batches of member k, and parameters u (m, d) from which its Gaussian layer is initialised."""
        raise NotImplementedError


class _InMemory(Rows):
    def __init__(self, tensors: tuple[Tensor, Tensor], scaler: XScaler, settings: Settings) -> None:
        super().__init__(scaler, settings.config)
        self._tensors, self._settings = tensors, settings

    def member(self, k: int) -> tuple[Batches, Tensor]:
        """Batches of a separate split for each member."""
        settings = self._settings
        seed = seed_for(settings.seed, "member", k)
        parts = [torch.from_numpy(rows) for rows in split_rows(len(self._tensors[0]), settings.config.validation_fraction, seed)]
        train, valid = ([t[rows].to(settings.device) for t in self._tensors] for rows in parts)
        return MemoryBatches(train, valid, seed=seed, ranks=current_ranks()), train[0]


class _Streamed(Rows):
    """Rows from a stream or a simulator: members share the validation rows and use different epochs of the same source."""

    def __init__(self, source: Any, config: TrainConfig) -> None:
        super().__init__(source.scaler, config, source)
        self._source = source

    def member(self, k: int) -> tuple[Batches, Tensor]:
        """Batches of the source, beginning at another epoch for each member."""
        return _Later(self._source, k * _MEMBER_EPOCHS), self._source.validation[0]


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


def from_arrays(theta: Any, x: Any, settings: Settings) -> Rows:
    """Rows from arrays theta (n, d) and x (n, ...).   Raises: ShapeError, NonFiniteError, SupportError, DataError."""
    u, data = prepare_simulations(settings.prior, theta, x)
    if len(u) < MIN_SIMULATIONS:
        raise DataError(f"{len(u)} simulations; expected at least {MIN_SIMULATIONS}")
    counts = count_columns(data, settings.x_transform, settings.observables)
    first, _ = split_rows(len(u), settings.config.validation_fraction, seed_for(settings.seed, "member", 0))
    scaler = XScaler.fit(data[first], counts)
    if (scaler.counts & (data < 0).any(axis=0)).any():
        raise DataError("x has negative values in columns declared as counts; expected counts >= 0")
    return _InMemory((torch.from_numpy(u.astype(np.float32)), scaler.apply(data)), scaler, settings)


def stores_of(value: Any, prior: Prior) -> list[Store] | None:
    """Stores, if the value is a store, a path, or a sequence of these; None if it is data.   Raises: SimulatorMismatchError."""
    if isinstance(value, str | Path | Store):
        value = [value]
    if not isinstance(value, Sequence) or not value or not all(isinstance(v, str | Path | Store) for v in value):
        return None
    stores = [v if isinstance(v, Store) else Store(v) for v in value]
    for store in stores:
        if store.prior.names != prior.names:
            raise SimulatorMismatchError(f"{store!r} has parameters {store.prior.names}; expected {prior.names}")
    return stores


def needs_streaming(stores: Sequence[Store], memory: int | None) -> bool:
    """Whether the rows, as arrays and as tensors, take more than `memory` bytes; None: half of the machine's."""
    if memory is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    columns = sum(o.size for o in stores[0].observables)
    # theta and u in double precision, x as stored and in single precision, and both again in the split
    row = 24 * len(stores[0].parameters) + columns * (stores[0].dtype.itemsize + 8)
    return sum(store.n_rows for store in stores) * row > require_int("memory", memory, low=1)


def from_stores(stores: Sequence[Store], settings: Settings, memory: int | None, progress: Progress) -> Rows:
    """Rows from simulation stores: in memory if they fit, streamed otherwise.   Raises: StoreError, DataError, SettingError."""
    if len(stores) == 1 and not needs_streaming(stores, memory):
        return from_arrays(*stores[0].read(), settings)
    ranks = current_ranks()
    stream = Stream(
        stores,
        settings.prior,
        memory=2**30 if memory is None else memory,
        seed=settings.seed,
        validation_fraction=settings.config.validation_fraction,
        x_transform=settings.x_transform,
        observables=settings.observables,
        device=settings.device,
        rank=ranks.rank,
        n_ranks=ranks.size,
        progress=progress,
    )
    return _Streamed(stream, settings.config)


def from_simulator(simulator: Simulator, n: int | None, settings: Settings, workers: int | None) -> Rows:
    """Rows simulated during training, n in total, each used once.   Raises: SettingError, SimulatorMismatchError, DataError."""
    if n is None:
        raise SettingError("n is None; expected the number of simulations to train on: fit(simulator=..., online=True, n=...)")
    check_simulator(simulator)
    if simulator.prior.names != settings.prior.names:
        raise SimulatorMismatchError(f"the simulator has parameters {simulator.prior.names}; expected {settings.prior.names}")
    config, n = settings.config, require_int("n", n, low=MIN_SIMULATIONS)
    batch, _ = config.for_rows(n)
    # an epoch is the interval between two validations; rows are not repeated, so training does not stop early
    epochs = config.max_epochs or max(1, min(_EPOCHS_ONLINE, n // batch))
    per_epoch = max(batch, n // epochs)
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
    )
    changed = {"batch_size": batch, "max_epochs": epochs, "patience": epochs}
    return _Streamed(source, TrainConfig(**{name: changed.get(name, getattr(config, name)) for name in config.__slots__}))


def _workers(simulator: Simulator) -> int:
    """Default number of processes that simulate; 0 for a simulator with `in_process`, such as a network."""
    return 0 if getattr(simulator, "in_process", False) else default_workers()
