r"""Buffers of rows between a prefetch thread that fills them and a training loop that takes shuffled batches out of them.

On a CPU a buffer is one float32 matrix. On CUDA it is a pinned one on the host and a copy on the device, sent on a stream
of its own; events keep either side from writing what the other still reads.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sbi_phys.core.errors import DataError

__all__ = ["Budget", "Slot"]

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Budget:
    """How `memory` bytes are shared out.

    1/4 at most: validation rows. 1/8: batches (two at a time). 1/16: what the allocator does not give back. 12 blocks: scratch
    of the transform, a block being 1 MiB, or memory / 128 where that is less. The rest: one buffer that holds everything, or
    two that take turns.
    Raises: DataError where the memory does not hold 128 rows.
    """

    memory: int
    width: int
    labels: bool

    def __post_init__(self) -> None:
        """Check the least memory."""
        least = 128 * self.held_bytes
        if self.memory < least:
            raise DataError(f"memory is {self.memory} bytes, and a row takes {self.held_bytes}; expected at least {least} bytes (128 rows)")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk and in a batch."""
        return 4 * self.width

    @property
    def held_bytes(self) -> int:
        """Bytes of a row in a buffer: with its place in the order and its label."""
        return self.row_bytes + 8 + 8 * self.labels

    @property
    def block_rows(self) -> int:
        """Rows of a block, what is read at once."""
        return max(1, min(_MIB, self.memory // 128) // self.row_bytes)

    @property
    def pass_rows(self) -> int:
        """Rows read at once in the pass at the start, which has the memory for itself."""
        return max(1, min(_MIB, self.memory // 16) // self.row_bytes)

    @property
    def validation_rows(self) -> int:
        """Most validation rows."""
        return max(1, self.memory // 4 // (self.row_bytes + 8 * self.labels))

    def capacity(self, n_rows: int, n_validation: int, held: int) -> tuple[int, bool]:
        """Rows of a buffer beside `held` bytes of other things, and whether one buffer holds all n_rows.   Raises: DataError."""
        if self.memory < 4 * held:
            raise DataError(f"memory is {self.memory} bytes for {n_rows} rows; expected at least {4 * held} bytes")
        free = self.memory - held - self.memory // 8 - self.memory // 16 - 12 * self.block_rows * self.row_bytes
        free -= n_validation * (self.row_bytes + 8 * self.labels)
        if n_rows * self.held_bytes <= free:
            return n_rows, True
        return free // (2 * self.held_bytes), False

    def require_batch(self, rows: int) -> None:
        """Raise DataError if two batches of so many rows do not fit into their share."""
        least = 16 * rows * self.held_bytes
        if least > self.memory:
            raise DataError(
                f"memory is {self.memory} bytes, and a batch has {rows} rows of {self.held_bytes} bytes; expected at least {least} bytes "
                "(16 batches), or more batches an epoch"
            )


class Slot:
    """One buffer: rows, the order in which the chosen ones are emitted, and their labels."""

    def __init__(self, capacity: int, width: int, labels: bool, device: torch.device) -> None:
        cuda = device.type == "cuda"
        tensors = [torch.empty(capacity, width, pin_memory=cuda), torch.empty(capacity, dtype=torch.int64, pin_memory=cuda)]
        if labels:
            tensors.append(torch.empty(capacity, dtype=torch.int64, pin_memory=cuda))
        self.n = 0  # rows to emit
        self.filled = 0  # rows of the buffer that hold something
        self.loaded: set[int] = set()  # blocks that stay in place, where the buffer holds everything
        self._host = tensors
        self._device = [torch.empty_like(t, device=device) for t in tensors] if cuda else tensors
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._sent = torch.cuda.Event() if cuda else None
        self._used = torch.cuda.Event() if cuda else None

    @property
    def rows(self) -> np.ndarray:
        """Rows (capacity, width) float32, to be filled."""
        return self._host[0].numpy()

    @property
    def order(self) -> np.ndarray:
        """Numbers of rows of this buffer (capacity,), the first n of which are emitted."""
        return self._host[1].numpy()

    @property
    def labels(self) -> np.ndarray | None:
        """Store of each row (capacity,), or None."""
        return self._host[2].numpy() if len(self._host) > 2 else None

    def wait(self) -> None:
        """Called before filling: the copy of what was here before must be done."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Called after filling: start the copy to the device, behind the last use of what is there."""
        if self._stream is None or self._sent is None or self._used is None:
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used)
            for target, source, n in zip(self._device, self._host, (self.filled, self.n, self.filled), strict=False):
                target[:n].copy_(source[:n], non_blocking=True)
            self._sent.record(self._stream)

    def begin(self) -> None:
        """Called before batches are taken."""
        if self._sent is not None:
            torch.cuda.current_stream(self._device[0].device).wait_event(self._sent)

    def end(self) -> None:
        """Called after the last batch was taken."""
        if self._used is not None:
            self._used.record(torch.cuda.current_stream(self._device[0].device))

    def take(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Rows number start to stop of the order, as new tensors: (rows,) or (rows, labels)."""
        sources = (0, 2)[: len(self._host) - 1]
        if self._stream is not None:
            return tuple(self._device[k].index_select(0, self._device[1][start:stop]) for k in sources)
        chosen = self.order[start:stop]
        found = tuple(self._host[k].new_empty((stop - start, *self._host[k].shape[1:])) for k in sources)
        for k, t in zip(sources, found, strict=True):
            # several times faster than torch's index_select for short rows; 'clip' spares a second buffer
            np.take(self._host[k].numpy(), chosen, axis=0, out=t.numpy(), mode="clip")
        return found
