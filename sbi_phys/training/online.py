r"""Online training: theta ~ p(theta), x ~ p(x | theta) are simulated while the network trains, and each row is used once.

Because no row is used twice, the network cannot overfit, and the training loss is an unbiased estimate of the expected loss. Online
training pays off if a simulation takes no longer than a row's share of a training step; otherwise simulate to a store first.

Chunk i of epoch e is drawn from the generators (seed, "online theta", e, i) and (seed, "online x", e, i). The rows therefore do not
depend on the number of workers, and a resumed training uses the same rows as one without interruption.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import count
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import AnyArray, Array, Integers, Mask
from sbi_phys.priors import Prior, prior_from_dict
from sbi_phys.priors.parameters import observables_to_dicts
from sbi_phys.simulation.processes import available_cores, pickle_simulator, start_worker, unpickle_simulator, worker_context
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.simulation.workers import make_rows
from sbi_phys.store.identity import class_path, simulator_identity
from sbi_phys.store.shards import Header
from sbi_phys.training.failures import describe_failures
from sbi_phys.training.ranks import Ranks
from sbi_phys.training.scaling import XScaler, count_columns, prepare_simulations, require_counts

__all__ = ["OnlineBatches", "default_workers"]

_CHUNK = 2048  # rows a worker makes at once
_PILOT = "pilot"
_COMPARED = 100_000  # kept rows whose parameters are compared with those of failed ones
_CPU = torch.device("cpu")
Rows = tuple[Array, NDArray[np.floating]]


class OnlineBatches:
    """Batches of new rows in every epoch, simulated in the background (see `batches.Batches`).   A context manager.

    Args: simulator. prior: of theta. n: training rows per epoch. n_valid: validation rows; the same number of further rows sets the
    scaling. x_transform: as for an estimator. seed. workers: processes that simulate; 0 for a thread, for a simulator that cannot be
    sent to a process. device: of the batches. ranks. scaling: function (x, rows) -> map of x to the network's input; None takes `XScaler`,
    with `standardise`.
    Attributes: scaler. n_failed: rows that failed and were replaced. first_reason: of the first such row.
    Raises: SettingError, DataError (all rows of a chunk fail), SimulatorMismatchError.
    """

    def __init__(
        self,
        simulator: Simulator,
        prior: Prior,
        n: int,
        *,
        n_valid: int,
        x_transform: str = "auto",
        seed: int = 0,
        workers: int = 1,
        device: torch.device = _CPU,
        ranks: Ranks | None = None,
        scaling: Callable[[AnyArray, Integers | slice], Any] | None = None,
        standardise: str = "column",
    ) -> None:
        self._n = require_int("n", n, low=1)
        self._n_valid = require_int("n_valid", n_valid, low=2)
        self.ranks, self.device, self.seed = ranks or Ranks(), device, seed
        self._prior, self._simulator, self._x_transform, self._scaling = prior, simulator, x_transform, scaling
        self._standardise = standardise
        self.n_failed, self.first_reason = 0, ""
        self._compared: tuple[list[Array], list[Array]] = ([], [])  # theta of failed and of kept rows
        observables = observables_to_dicts(simulator.observables)
        self._header = Header(simulator_identity(simulator), prior.to_dict(), observables, seed, _CHUNK, "float64", "prior")
        workers = require_int("workers", workers, low=0)
        self._source: Simulator | bytes = pickle_simulator(simulator) if workers else simulator
        self._pool: Executor = (
            ProcessPoolExecutor(workers, mp_context=worker_context(), initializer=start_worker) if workers else ThreadPoolExecutor(1)
        )
        # two chunks per worker, so that no worker waits for the next one
        self._ahead = 2 * max(1, workers)
        self._begun: dict[tuple[int, int], Future[Any]] = {}
        try:
            self.scaler, self.validation = self._prepare()
        except BaseException:
            self._pool.shutdown(wait=True, cancel_futures=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers.   Warns: if rows failed, because p(theta | x) then is conditional on a successful simulation."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.n_failed:
            failed, self.n_failed = self.n_failed, 0
            bad, good = (np.concatenate(parts) for parts in self._compared)
            mask = np.arange(len(bad) + len(good)) < len(bad)
            words = describe_failures(np.concatenate([bad, good]), mask, self._prior.names)
            warnings.warn(
                f"{failed} simulations of {class_path(self._simulator)} failed and were replaced by others: {words}. "
                f"First: {self.first_reason}",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def n(self) -> int:
        """Training rows of one epoch, over all ranks."""
        return self._n

    def fingerprint(self) -> Any:
        """Settings that determine the rows."""
        plain = self._header.plain()
        return {
            "online": plain, "n": self._n, "n_valid": self._n_valid, "x_transform": self._x_transform,
            "standardise": self._standardise,
        }  # fmt: skip

    def epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield this rank's new rows of an epoch in exactly n_batches batches."""
        own = len(range(self.ranks.rank, self._n, self.ranks.size))
        sizes = [len(part) for part in np.array_split(np.empty(own, dtype=np.int8), n_batches)]
        chunks, left = self._chunks(epoch), (torch.empty(0), torch.empty(0))
        for size in sizes:
            while len(left[0]) < size:
                fresh = self._tensors(next(chunks))
                left = fresh if not len(left[0]) else (torch.cat([left[0], fresh[0]]), torch.cat([left[1], fresh[1]]))
            batch, left = tuple(t[:size] for t in left), (left[0][size:], left[1][size:])
            yield tuple(t.to(self.device, non_blocking=True) for t in batch)

    def _chunks(self, epoch: int) -> Iterator[Rows]:
        """Yield good rows of this rank's chunks of an epoch, without end; chunks of the next epoch are started before this one ends."""
        for key in [k for k in self._begun if k[0] != epoch]:
            self._begun.pop(key).cancel()
        expected = -(-self._n // (_CHUNK * self.ranks.size))
        for index in count():
            for i in range(index, index + self._ahead):
                # beyond the expected end of this epoch: chunks of the next, unless failed rows made this one longer
                key = (epoch, i) if i <= max(index, expected - 1) else (epoch + 1, i - max(index + 1, expected))
                if key not in self._begun:
                    self._begun[key] = self._submit(key[0], key[1] * self.ranks.size + self.ranks.rank)
            yield self._good(self._begun.pop((epoch, index)).result())

    def _submit(self, epoch: int | str, chunk: int, rows: int = _CHUNK) -> "Future[Any]":
        return self._pool.submit(_make_chunk, self._source, self._header, epoch, chunk, rows)

    def _good(self, made: tuple[Array, NDArray[np.floating], Mask, str]) -> Rows:
        theta, x, good, reason = made
        if sum(map(len, self._compared[1])) < _COMPARED:
            self._compared[0].append(theta[~good])
            self._compared[1].append(theta[good])
        if not good.all():
            self.n_failed += int((~good).sum())
            self.first_reason = self.first_reason or reason
            if not good.any():
                raise DataError(f"all {len(good)} simulations of a chunk failed in {class_path(self._simulator)}: {reason}")
            theta, x = theta[good], x[good]
        return theta, x

    def _prepare(self) -> tuple[Any, tuple[Tensor, Tensor]]:
        # rows for the scaling, then the validation rows; neither are used for training
        parts = [self._good(self._submit(_PILOT, k, self._n_valid).result()) for k in (0, 1)]
        observables = self._simulator.observables
        _, pilot = prepare_simulations(self._prior, *parts[0], observables)
        if self._scaling is not None:
            self.scaler = self._scaling(pilot, slice(None))
        else:
            counts = count_columns(pilot, self._x_transform, observables)
            require_counts("x", pilot, counts, observables)
            self.scaler = XScaler.fit(pilot, counts, observables=observables, standardise=self._standardise)
        u, x = self._tensors(parts[1])
        share = slice(self.ranks.rank, None, self.ranks.size)
        return self.scaler, (u[share].to(self.device), x[share].to(self.device))

    def _tensors(self, rows: Rows) -> tuple[Tensor, Tensor]:
        theta, x = rows
        return torch.from_numpy(self._prior.to_unbounded(theta).astype(np.float32)), self.scaler.apply(x)


def _make_chunk(
    source: Simulator | bytes, header: Header, epoch: int | str, chunk: int, rows: int
) -> tuple[Array, NDArray[np.floating], Mask, str]:
    """Simulate one chunk, in a worker -> theta, x, mask of the good rows, and the reason of the first failure."""
    simulator = unpickle_simulator(source) if isinstance(source, bytes) else source
    theta = prior_from_dict(header.prior, allow_import=True).sample(rows, rng_for(header.seed, "online theta", epoch, chunk))
    data = make_rows(simulator, theta, header, "online x", epoch, chunk)
    return data.theta, data.x, data.status == 0, next(iter(data.reasons.values()), "")


def default_workers() -> int:
    """Default number of processes that simulate during training: all cores but one."""
    return max(1, available_cores() - 1)
