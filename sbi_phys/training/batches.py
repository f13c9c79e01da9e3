r"""The interface of training batches, and batches of rows in memory. `stream` reads batches from disk, `online` simulates them.

An epoch has `n_batches` batches whose sizes differ by at most one. The result of `epoch(e, n_batches)` depends on the settings and e
alone, so a resumed training uses the same rows in the same order without any stored generator state.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sbi_phys.core.errors import DataError
from sbi_phys.core.rng import torch_rng_for
from sbi_phys.training.ranks import Ranks

__all__ = ["Batches", "MemoryBatches"]


class Batches(Protocol):
    """Training rows in batches, and validation rows."""

    @property
    def n(self) -> int:
        """Training rows of one epoch, over all ranks."""

    @property
    def validation(self) -> tuple[Tensor, ...]:
        """This rank's validation rows, on the device."""

    def epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        """This rank's rows of an epoch, in exactly n_batches batches on the device."""

    def fingerprint(self) -> Any:
        """A JSON value that identifies the rows; a checkpoint is refused for other rows."""


class MemoryBatches:
    """Batches of rows in memory or on the device, in a random order that depends on (seed, epoch).

    Args: train, valid: tensors on the device, each group with equal numbers of rows. seed: of the order. ranks: each takes every
    size-th row of a batch.   Raises: DataError.
    """

    def __init__(self, train: Sequence[Tensor], valid: Sequence[Tensor], *, seed: int, ranks: Ranks | None = None) -> None:
        self.train, self.seed, self.ranks = tuple(train), seed, ranks or Ranks()
        for name, rows in (("training", train), ("validation", valid)):
            if len({len(t) for t in rows}) != 1 or not len(rows[0]):
                raise DataError(f"{name} tensors have {[len(t) for t in rows]} rows; expected the same number, at least one")
        self.valid = tuple(valid)  # of all ranks
        self.validation = tuple(t[self.ranks.rank :: self.ranks.size] for t in valid)

    @property
    def n(self) -> int:
        """Training rows of one epoch, over all ranks."""
        return self.train[0].shape[0]

    def epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield this rank's share of a new permutation of all rows."""
        order = torch.randperm(self.n, generator=torch_rng_for(self.seed, "order", epoch))
        order = order.to(self.train[0].device)
        for rows in order.tensor_split(n_batches):
            # the batches of all ranks together are those of a single process
            own = rows[self.ranks.rank :: self.ranks.size]
            yield tuple(t.index_select(0, own) for t in self.train)

    def fingerprint(self) -> list[int]:
        """Checksum of every tensor."""
        return [zlib.crc32(t.detach().cpu().contiguous().numpy().tobytes()) for t in (*self.train, *self.valid)]
