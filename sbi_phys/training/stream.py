r"""Training on stores larger than memory: epochs of shuffled batches, in bounded memory.

    with Stream("runs/spectra", prior, memory=2**30, seed=0) as stream:
        for epoch in range(100):
            for u, x in stream.epoch(epoch, n_batches=1000):
                ...

One pass over the shards transforms every row (u = prior.to_unbounded(theta), Anscombe's root on counts), computes the scaling of
the training rows and writes the rows to a cache (`_stream_rows`). An epoch permutes blocks of neighbouring rows (`Plan`), reads as
many as fill a buffer (`Slot`), shuffles the rows of the buffer and cuts them into batches, while a thread fills the next buffer.
Every training row is used exactly once per epoch. The order depends on (seed, epoch, rank, memory) and not on timing. The shuffle
is complete within a buffer and by blocks between buffers. Data that fit into memory stay in a single buffer, and their shuffle is
complete.
"""

import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import ArrayLike, Integers, Mask
from sbi_phys.priors import Observable, Prior
from sbi_phys.priors.parameters import observables_from_dicts
from sbi_phys.store.store import Store
from sbi_phys.training._stream_rows import CELL, Job, Prepared, Shard, Split, data_digest, find_shards, open_stores, prepare, transform_for

__all__ = ["Budget", "Plan", "Slot", "Stream", "rows_at_rates"]

# ---- the order of an epoch

Piece = tuple[int, int, int]  # block, low, high


def rows_at_rates(available: Sequence[int], rates: Sequence[float] | None) -> list[int]:
    """Rows of each store, rate_i N with the largest possible N; all rows for None.   Raises: SettingError."""
    if rates is None:
        return list(available)
    if len(rates) != len(available):
        raise SettingError(f"rates has {len(rates)} numbers; expected {len(available)}, one for each store")
    weights = [require_number(f"rates[{i}]", r, low=0, open_low=True) for i, r in enumerate(rates)]
    total = min(n / w for n, w in zip(available, weights, strict=True))
    # the small addition makes 3 * (1 / 3) give 1
    return [min(n, int(w * total + 1e-6)) for n, w in zip(available, weights, strict=True)]


def _own_shards(shards: Sequence[Shard], n_stores: int, seed: int, rank: int, n_ranks: int) -> list[int]:
    """Numbers of one rank's shards: every n_ranks-th of a permutation within each store, so that each rank has shards of each store."""
    order: list[int] = []
    for store in range(n_stores):
        members = np.array([i for i, s in enumerate(shards) if s.store == store])
        order += members[rng_for(seed, "ranks", store).permutation(members.size)].tolist()
    return sorted(order[rank::n_ranks])


def require_shards(shards: Sequence[Shard], n_ranks: int) -> None:
    """Raise DataError where there are more ranks than shards."""
    if n_ranks > len(shards):
        raise DataError(f"{n_ranks} ranks share {len(shards)} shards; expected at least one shard per rank: use fewer processes")


class Plan:
    """The order of an epoch: blocks of one rank's shards, and the groups of blocks that fill a buffer.

    Everything depends on (seed, epoch, rank) and on sizes; no file is read. A *block* is a run of neighbouring good rows of one shard,
    small enough to read at once. A *piece* is the part [low, high) of a block's training rows that an epoch uses, all of it unless
    `rates` leave rows of a larger store to later epochs. Pieces are permuted and cut into *groups* that fill a buffer.

    Attributes: n, n_own: training rows of one epoch, over all ranks and of this one. n_validation: its validation rows, by store.
    Raises: DataError if a rank has no training or no validation rows; SettingError for bad rates.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        split: Split,
        *,
        block_rows: int,
        rates: Sequence[float] | None,
        seed: int,
        rank: int,
        n_ranks: int,
    ) -> None:
        n_stores = len(split.n_good)
        self._seed, self._rank = seed, rank
        training, validation = np.zeros((n_ranks, n_stores), dtype=np.int64), np.zeros((n_ranks, n_stores), dtype=np.int64)
        for r in range(n_ranks):
            for i in _own_shards(shards, n_stores, seed, r, n_ranks):
                valid = split.validation_of(i)
                validation[r, shards[i].store] += valid
                training[r, shards[i].store] += shards[i].n_ok - valid
        per_store = rows_at_rates(split.n_training, rates)
        self.n = sum(per_store)
        self._use = _share(per_store, training, rank)
        self.n_own = int(self._use.sum())
        self.n_validation = _share(rows_at_rates(split.n_validation, rates), validation, rank)
        self._valid = validation[rank]
        if not self.n_own or not self.n_validation.sum():
            raise DataError(
                f"rank {rank} of {n_ranks} has {self.n_own} training and {self.n_validation.sum()} validation rows; expected some of each: "
                "use fewer processes, more simulations or a larger validation_fraction"
            )
        self.shards = _own_shards(shards, n_stores, seed, rank, n_ranks)
        self._make_blocks(shards, split, block_rows)

    def _make_blocks(self, shards: Sequence[Shard], split: Split, block_rows: int) -> None:
        # one bit per row marks training rows; drawing the split again for every block would take longer than reading
        self._bits = {i: _pack(split, i, shards[i].n_ok) for i in self.shards}
        cuts = [(i, a, min(a + block_rows, shards[i].n_ok)) for i in self.shards for a in range(0, shards[i].n_ok, block_rows)]
        self.blocks: list[tuple[int, int, int]] = cuts  # shard, first and last + 1 of its good rows
        self.store_of = np.array([shards[i].store for i, _, _ in cuts], dtype=np.int64)
        self.rows = np.array([b - a for _, a, b in cuts], dtype=np.int64)
        self.training = np.array([np.count_nonzero(self.training_mask(b)) for b in range(len(cuts))], dtype=np.int64)

    def training_mask(self, block: int) -> Mask:
        """Which rows of a block are for training."""
        i, start, stop = self.blocks[block]
        skip = start % 8
        return np.unpackbits(self._bits[i][start // 8 : (stop + 7) // 8], count=skip + stop - start)[skip:].view(np.bool_)

    @property
    def held_bytes(self) -> int:
        """Bytes of the bit masks of training rows."""
        return sum(bits.nbytes for bits in self._bits.values())

    @property
    def n_rows(self) -> int:
        """Good rows of all own blocks, validation rows included."""
        return int(self.rows.sum())

    def pieces(self, epoch: int) -> list[Piece]:
        """Return the pieces of an epoch, in the order of the shards.

        Of a store with more rows than its share, epoch e uses the e-th section of a fixed cyclic permutation of its blocks: no row
        twice in an epoch, and every row equally often on average.
        """
        found: list[Piece] = []
        for store, use in enumerate(self._use.tolist()):
            members = np.flatnonzero(self.store_of == store)
            total = int(self.training[members].sum())
            if use == total:
                found += [(b, 0, n) for b, n in zip(members.tolist(), self.training[members].tolist(), strict=True) if n]
                continue
            members = members[rng_for(self._seed, "cycle", store, self._rank).permutation(members.size)]
            first = epoch * use % total
            for a, b in ((first, min(first + use, total)), (0, first + use - total)):
                found += self._stretch(members, a, b)
        return sorted(found)

    def _stretch(self, members: Integers, first: int, last: int) -> list[Piece]:
        """Return training rows first to last of the concatenated blocks."""
        counts = self.training[members]
        starts = np.cumsum(counts) - counts
        low, high = np.clip(first - starts, 0, counts), np.clip(last - starts, 0, counts)
        inside = np.flatnonzero(high > low)
        return list(zip(members[inside].tolist(), low[inside].tolist(), high[inside].tolist(), strict=True))

    def groups(self, epoch: int, capacity: int) -> list[list[Piece]]:
        """Return the permuted pieces of an epoch in groups of about equal size, of at most `capacity` rows each."""
        pieces = self.pieces(epoch)
        order = rng_for(self._seed, "order", epoch, self._rank).permutation(len(pieces))
        pieces = [pieces[j] for j in order.tolist()]
        rows = self.rows[[p[0] for p in pieces]]
        ends = np.cumsum(rows)
        # a group exceeds its share by less than a block
        n_groups = -(-int(ends[-1]) // (capacity - int(rows.max()) + 1))
        group = (ends - rows) * n_groups // int(ends[-1])
        cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(pieces)]
        return [pieces[a:b] for a, b in pairwise(cuts)]

    def limit_validation(self, rows: int) -> None:
        """Keep at most `rows` validation rows of this rank, in proportion for each store."""
        total = int(self.n_validation.sum())
        if rows < total:
            ends = np.cumsum(self.n_validation) * rows // total
            self.n_validation = np.diff(ends, prepend=0)

    def validation_rows(self) -> Iterator[tuple[int, Integers]]:
        """Yield for every block the rows kept for validation, spread evenly over the rank's validation rows."""
        seen = np.zeros_like(self._valid)
        for number, store in enumerate(self.store_of.tolist()):
            rows = np.flatnonzero(~self.training_mask(number))
            keep, total = int(self.n_validation[store]), max(1, int(self._valid[store]))
            before, after = keep * int(seen[store]) // total, keep * (int(seen[store]) + rows.size) // total
            seen[store] += rows.size
            if after - before < rows.size:
                rows = rng_for(self._seed, "validation", self._rank, number).choice(rows, after - before, replace=False, shuffle=False)
            yield number, np.sort(rows)


def _share(per_store: Sequence[int], available: Integers, rank: int) -> Integers:
    """Share of one rank (stores,) of each store's rows, in proportion to the rows available (ranks, stores)."""
    ends = np.cumsum(available, axis=0)
    total = np.maximum(ends[-1], 1)
    cut = np.asarray(per_store, dtype=np.int64) * np.vstack([np.zeros_like(total), ends]) // total
    return np.asarray(cut[rank + 1] - cut[rank])


def _pack(split: Split, shard: int, rows: int) -> NDArray[np.uint8]:
    """Training mask of a shard's good rows, eight rows per byte."""
    bits = np.empty((rows + 7) // 8, dtype=np.uint8)
    step = 16 * CELL  # whole cells, and whole bytes
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        bits[start // 8 : (stop + 7) // 8] = np.packbits(split.training(shard, start, stop))
    return bits


# ---- memory and buffers

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Budget:
    """Division of `memory` bytes between validation rows, batches and buffers.

    At most 1/4 for validation rows, 1/8 for batches (two at a time), 1/16 for memory that the allocator keeps, 12 blocks for the
    transform (a block is 1 MiB, or memory / 128 if that is less), and the rest for one buffer with all rows or two alternating buffers.
    Raises: DataError if the memory does not hold 128 rows.
    """

    memory: int
    width: int
    labels: bool

    def __post_init__(self) -> None:
        """Check the memory."""
        least = 128 * self.held_bytes
        if self.memory < least:
            raise DataError(f"memory is {self.memory} bytes, and a row takes {self.held_bytes}; expected at least {least} bytes (128 rows)")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk and in a batch."""
        return 4 * self.width

    @property
    def held_bytes(self) -> int:
        """Bytes of a row in a buffer, with its order index and label."""
        return self.row_bytes + 8 + 8 * self.labels

    @property
    def block_rows(self) -> int:
        """Rows of a block, which are read at once."""
        return max(1, min(_MIB, self.memory // 128) // self.row_bytes)

    @property
    def pass_rows(self) -> int:
        """Rows read at once in the first pass, when the buffers are not there yet."""
        return max(1, min(_MIB, self.memory // 16) // self.row_bytes)

    @property
    def validation_rows(self) -> int:
        """Largest number of validation rows."""
        return max(1, self.memory // 4 // (self.row_bytes + 8 * self.labels))

    def capacity(self, n_rows: int, n_validation: int, held: int) -> tuple[int, bool]:
        """Rows of a buffer, given `held` bytes of other data, and whether one buffer holds all n_rows.   Raises: DataError."""
        if self.memory < 4 * held:
            raise DataError(f"memory is {self.memory} bytes for {n_rows} rows; expected at least {4 * held} bytes")
        free = self.memory - held - self.memory // 8 - self.memory // 16 - 12 * self.block_rows * self.row_bytes
        free -= n_validation * (self.row_bytes + 8 * self.labels)
        if n_rows * self.held_bytes <= free:
            return n_rows, True
        return free // (2 * self.held_bytes), False

    def require_batch(self, rows: int) -> None:
        """Raise DataError if two batches of this size exceed their share of the memory."""
        least = 16 * rows * self.held_bytes
        if least > self.memory:
            raise DataError(
                f"memory is {self.memory} bytes, and a batch has {rows} rows of {self.held_bytes} bytes; expected at least {least} bytes "
                "(16 batches), or more batches per epoch"
            )


class Slot:
    """One buffer: rows, the order in which training rows are emitted, and their labels or weights (of type `extra`).

    On a CPU it is one float32 matrix. On CUDA it is a pinned matrix on the host and a copy on the device, sent on its own CUDA stream;
    events keep either side from overwriting rows that the other still reads.
    """

    def __init__(self, capacity: int, width: int, extra: torch.dtype | None, device: torch.device) -> None:
        cuda = device.type == "cuda"
        tensors = [torch.empty(capacity, width, pin_memory=cuda), torch.empty(capacity, dtype=torch.int64, pin_memory=cuda)]
        if extra is not None:
            tensors.append(torch.empty(capacity, dtype=extra, pin_memory=cuda))
        self.n = 0  # rows to emit
        self.filled = 0  # rows of the buffer that are filled
        self.loaded: set[int] = set()  # blocks that stay in the buffer if it holds all rows
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
        """Wait, before filling, until the previous contents are copied."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Start, after filling, the copy to the device, once the previous contents are no longer used."""
        if self._stream is None or self._sent is None or self._used is None:
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used)
            for target, source, n in zip(self._device, self._host, (self.filled, self.n, self.filled), strict=False):
                target[:n].copy_(source[:n], non_blocking=True)
            self._sent.record(self._stream)

    def begin(self) -> None:
        """Wait, before batches are taken, until the copy is complete."""
        if self._sent is not None:
            torch.cuda.current_stream(self._device[0].device).wait_event(self._sent)

    def end(self) -> None:
        """Record, after the last batch, that the contents were used."""
        if self._used is not None:
            self._used.record(torch.cuda.current_stream(self._device[0].device))

    def take(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return rows start to stop of the order as new tensors (rows[, labels])."""
        sources = (0, 2)[: len(self._host) - 1]
        if self._stream is not None:
            return tuple(self._device[k].index_select(0, self._device[1][start:stop]) for k in sources)
        chosen = self.order[start:stop]
        found = tuple(self._host[k].new_empty((stop - start, *self._host[k].shape[1:])) for k in sources)
        for k, t in zip(sources, found, strict=True):
            # several times faster than torch's index_select for short rows; mode 'clip' avoids a second buffer
            np.take(self._host[k].numpy(), chosen, axis=0, out=t.numpy(), mode="clip")
        return found


# ---- the stream

_CPU = torch.device("cpu")
_TILE = 32  # rows scaled as one long row, because numpy's loop over short rows costs more than the arithmetic


class Stream:
    """Scaled rows of one or several stores as float32 batches (u (b, d), x (b, k)[, label (b,) int64]) on the device.

    Args:
        stores: complete stores with the same parameters, prior and observables.
        prior: theta must lie in its support; u = prior.to_unbounded(theta).
        memory: bytes for validation rows, buffers and batches together (on CUDA the device holds a second copy of the
            buffers). The order of the rows depends on it.
        rates: relative shares of the stores. An epoch has rate_i N rows of store i, with the largest N that the stores allow;
            successive epochs use successive parts of a larger store. None: all rows of all stores.
        labels: whether batches contain the number of each row's store.
        weights: one per good row, in the order of stores and shards: batches contain them as float32, with mean one; not with labels.
        cache: folder of the transformed rows; 'auto': `.cache` in the first store; None: no cache, the shards are read and
            transformed in every epoch and twice at the start.
        seed: of the split and the order.
        validation_fraction: share of each store's good rows that is held out.
        x_transform: 'auto' (as the observables say), 'counts' or 'real'.
        observables: blocks of columns of x; default those of the store. A missing value is NaN in the batches: `scaler.arrange` makes
            network inputs of them.
        standardise: 'column', 'block' or 'none', see `training.scaling`.
        device: of the batches.
        rank, n_ranks: of this process in a training with several; each process reads and validates on its own shards.
        progress: display of the first pass.
        cache_timeout_s: seconds to wait for a cache that another process writes.

    Attributes:
        scaler: from all training rows of all stores, for any rates; equal to that of `XScaler.fit`.
        validation: held-out rows of this rank, at the same rates, as (u, x[, label]). They take at most a quarter of `memory`;
            if there are more, a random part is used, and `note` says so.
        n, n_own: training rows of an epoch over all ranks, and of this rank.

    Raises:
        SettingError: a setting out of range.
        SimulatorMismatchError: other parameters than the prior's.
        StoreError: a store that is incomplete, damaged or different from the first; a cache that cannot be written.
        DataError: too few rows, more ranks than shards, too little memory, negative counts.
        NonFiniteError, SupportError: naming file and row.

    >>> import sbi_phys as sp
    >>> from simulators import OnOff
    >>> simulator = OnOff()
    >>> store = sp.simulate(simulator, 500, "on_off")
    >>> with sp.Stream(store, simulator.prior, memory=2**20) as stream:
    ...     batches = [u.shape[0] for u, x in stream.epoch(0, n_batches=5)]
    >>> stream.n, batches
    (450, [90, 90, 90, 90, 90])
    """

    def __init__(
        self,
        stores: Store | str | Path | Sequence[Store | str | Path],
        prior: Prior,
        *,
        memory: int = 2**30,
        rates: Sequence[float] | None = None,
        labels: bool = False,
        weights: ArrayLike | None = None,
        cache: str | Path | None = "auto",
        seed: int = 0,
        validation_fraction: float = 0.1,
        x_transform: str = "auto",
        observables: Sequence[Observable] | None = None,
        standardise: str = "column",
        device: torch.device = _CPU,
        rank: int = 0,
        n_ranks: int = 1,
        progress: Progress | None = None,
        cache_timeout_s: float = 3600.0,
    ) -> None:
        require_int("rank", rank, low=0, high=require_int("n_ranks", n_ranks, low=1) - 1)
        require_number("validation_fraction", validation_fraction, low=0, high=1, open_low=True, open_high=True)
        require_int("seed", seed, low=0)
        require_number("cache_timeout_s", cache_timeout_s, low=0)
        job = _job(
            stores, prior, x_transform, observables, cache, standardise,
            validation_fraction=validation_fraction, seed=seed, rank=rank, wait_s=cache_timeout_s, progress=progress,
        )  # fmt: skip
        require_shards(job.shards, n_ranks)
        rows_at_rates([1] * len(job.folders), rates)  # checks the rates before the long pass
        if labels and weights is not None:
            raise SettingError("labels=True and weights are both given; expected one of them")
        self._budget = Budget(require_int("memory", memory, low=1), job.transform.width, labels or weights is not None)
        made = prepare(replace(job, block_rows=self._budget.pass_rows))
        self._source, self._seed, self._rank, self.device = made.source, seed, rank, torch.device(device)
        self.scaler, self.note, self._labels, self._dim_u = made.scaler, "", bool(labels), made.transform.dim_u
        self._affine = _affine(made)
        self._first_row = np.cumsum([0, *(shard.n_ok for shard in made.shards)])
        self._weights = None if weights is None else as_array("weights", weights, (int(self._first_row[-1]),), note="one per good row")
        if self._weights is not None:
            self._weights = self._weights / self._weights.mean()
        self._busy, self._slots = False, list[Slot]()
        self._fingerprint = {
            "data": data_digest(job, made), "prior": prior.to_dict(), "counts": made.transform.counts.tolist(),
            "seed": seed, "validation_fraction": float(validation_fraction), "rates": None if rates is None else [float(r) for r in rates],
            "labels": self._labels, "n_ranks": n_ranks,
        }  # fmt: skip
        if self._weights is not None:
            self._fingerprint["weights"] = zlib.crc32(self._weights.tobytes())
        try:
            block_rows = self._budget.block_rows
            self._plan = Plan(made.shards, made.split, block_rows=block_rows, rates=rates, seed=seed, rank=rank, n_ranks=n_ranks)
            self.n, self.n_own = self._plan.n, self._plan.n_own
            self.validation = self._read_validation(progress)
            self._capacity, self._resident = self._budget.capacity(self._plan.n_rows, len(self.validation[0]), self._plan.held_bytes)
        except BaseException:
            self._source.close()
            raise
        self._offset = np.cumsum(self._plan.rows) - self._plan.rows
        # the order does not depend on the memory if one process holds all rows
        self._fingerprint["memory"] = None if self._resident and n_ranks == 1 and rates is None and not self.note else memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        buffers = "all in memory" if self._resident else f"buffers of {self._capacity} rows"
        return f"Stream({self.n_own} of {self.n} training rows, {len(self.validation[0])} validation rows, {buffers})"

    def close(self) -> None:
        """Close files and release buffers; the cache remains for the next training."""
        self._source.close()
        self._slots, self._capacity = [], -1

    def fingerprint(self) -> Any:
        """JSON value that identifies data and settings; it is the same on all ranks, with and without a cache.

        It contains `memory` unless all data fit, because the order of the rows depends on it.
        """
        return dict(self._fingerprint)

    def epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield exactly n_batches batches that contain each of this rank's rows once; their sizes differ by at most 1.

        Raises: SettingError (a bad number, or another epoch is still being read), DataError (fewer rows than batches, or a batch
        too large for the memory), StoreError (a file that has changed or disappeared).
        """
        epoch, n_batches = require_int("epoch", epoch, low=0), require_int("n_batches", n_batches, low=1)
        if self._capacity < 0:
            raise SettingError("this stream is closed; expected epoch() before close()")
        if n_batches > self.n_own:
            raise DataError(
                f"n_batches is {n_batches}, and rank {self._rank} has {self.n_own} training rows; expected at most one batch per row"
            )
        self._budget.require_batch(-(-self.n_own // n_batches))
        return self._epoch(epoch, n_batches)

    def _epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        if self._busy:
            raise SettingError("another epoch of this stream is being read; expected it to be read to its end or closed first")
        self._busy = True
        stop = threading.Event()
        try:
            self._source.check(self._plan.shards)
            groups = [self._plan.pieces(epoch)] if self._resident else self._plan.groups(epoch, self._capacity)
            while len(self._slots) < min(2, len(groups)):
                self._slots.append(Slot(self._capacity, self._budget.width, self._extra, self.device))
            with ThreadPoolExecutor(1, "stream") as thread:
                try:
                    yield from self._batches(self._filled(epoch, groups, thread, stop), n_batches)
                finally:
                    stop.set()  # the thread checks it before every block
        finally:
            self._busy = False

    def _filled(self, epoch: int, groups: list[list[Piece]], thread: ThreadPoolExecutor, stop: threading.Event) -> Iterator[Slot]:
        """Yield the filled buffer of each group in order, while a thread fills the next one."""
        future = thread.submit(self._fill, epoch, 0, groups[0], stop)
        for number in range(len(groups)):
            slot = future.result()
            if number + 1 < len(groups):
                future = thread.submit(self._fill, epoch, number + 1, groups[number + 1], stop)
            slot.begin()
            yield slot
            slot.end()

    def _batches(self, slots: Iterator[Slot], n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        small, extra = divmod(self.n_own, n_batches)
        number, parts, need = 0, list[tuple[Tensor, ...]](), small + (extra > 0)
        for slot in slots:
            at = 0
            while at < slot.n:
                take = min(need, slot.n - at)
                parts.append(slot.take(at, at + take))
                at, need = at + take, need - take
                if need == 0:
                    yield self._columns(parts[0] if len(parts) == 1 else tuple(torch.cat(t) for t in zip(*parts, strict=True)))
                    number, parts = number + 1, []
                    need = small + (number < extra)

    def _columns(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Split (rows[, labels]) into (u, x[, labels]); u and x are views of the rows."""
        return tensors[0][:, : self._dim_u], tensors[0][:, self._dim_u :], *tensors[1:]

    def _fill(self, epoch: int, number: int, group: list[Piece], stop: threading.Event) -> Slot:
        """Read the blocks of a group into a buffer and shuffle its rows. Runs in the thread, with numpy only."""
        slot = self._slots[number % 2]
        slot.wait()
        rows, order, labels = slot.rows, slot.order, slot.labels
        slot.n = slot.filled = 0
        for block, low, high in group:
            if stop.is_set():
                raise CancelledError
            at, n = int(self._offset[block]) if self._resident else slot.filled, int(self._plan.rows[block])
            if block not in slot.loaded:
                self._read(block, rows[at : at + n])
                if labels is not None:
                    labels[at : at + n] = self._extra_column(block)
                if self._resident:
                    slot.loaded.add(block)
            slot.filled = max(slot.filled, at + n)
            chosen = np.flatnonzero(self._plan.training_mask(block))[low:high]
            order[slot.n : slot.n + chosen.size] = chosen + at
            slot.n += chosen.size
        rng_for(self._seed, "rows", epoch, number, self._rank).shuffle(order[: slot.n])
        slot.send()
        return slot

    @property
    def _extra(self) -> torch.dtype | None:
        """Type of the column beside u and x, None if there is none."""
        return torch.float32 if self._weights is not None else torch.int64 if self._labels else None

    def _extra_column(self, block: int) -> Any:
        """Weights of the rows of a block, or the number of its store."""
        if self._weights is None:
            return self._plan.store_of[block]
        shard, start, stop = self._plan.blocks[block]
        return self._weights[self._first_row[shard] + start : self._first_row[shard] + stop]

    def _read(self, block: int, out: NDArray[np.float32]) -> None:
        """Read the scaled rows of a block."""
        self._source.read(*self._plan.blocks[block], out)
        width, whole = self._budget.width, len(out) // _TILE * _TILE
        for part in (out[:whole].reshape(-1, _TILE * width), out[whole:]):
            multiply, add = self._affine[:, : part.shape[1]]
            part *= multiply
            part += add

    def _read_validation(self, progress: Progress | None) -> tuple[Tensor, ...]:
        """Read this rank's rows once and keep the validation rows."""
        plan, total = self._plan, int(self._plan.n_validation.sum())
        plan.limit_validation(self._budget.validation_rows)
        kept = int(plan.n_validation.sum())
        if kept < total:
            self.note = f"{kept} of {total} validation rows are used, as many as fit into a quarter of memory = {self._budget.memory} bytes"
        block_rows = np.empty((self._budget.block_rows, self._budget.width), dtype=np.float32)
        rows, labels, at = np.empty((kept, self._budget.width), dtype=np.float32), np.empty(kept), 0
        with or_none(progress).task("validation rows", plan.n_rows) as task:
            for block, chosen in plan.validation_rows():
                if chosen.size:
                    out = block_rows[: plan.rows[block]]
                    self._read(block, out)
                    extra = np.broadcast_to(self._extra_column(block), len(out))[chosen]
                    rows[at : at + chosen.size], labels[at : at + chosen.size] = out[chosen], extra
                    at += chosen.size
                task.advance(int(plan.rows[block]), self.note)
        tensors = [torch.from_numpy(rows).to(self.device)]
        if self._extra is not None:
            tensors.append(torch.from_numpy(labels).to(self.device, self._extra))
        return self._columns(tuple(tensors))


def _job(
    stores: Store | str | Path | Sequence[Store | str | Path],
    prior: Prior,
    x_transform: str,
    observables: Sequence[Observable] | None,
    cache: str | Path | None,
    standardise: str,
    **settings: Any,
) -> Job:
    """Describe what to read and how; checks everything that needs no shard to be opened."""
    if not isinstance(prior, Prior):
        raise SettingError(f"prior is a {type(prior).__name__}; expected a prior, e.g. BoxPrior([Parameter(...)])")
    folders, manifests = open_stores(stores)
    header = manifests[0].header
    blocks = observables if observables is not None else observables_from_dicts(header.observables)
    transform = transform_for(prior, header, x_transform, blocks, np.zeros(header.n_columns), standardise)
    pairs = enumerate(zip(folders, manifests, strict=True))
    shards = [shard for i, (folder, manifest) in pairs for shard in find_shards(folder, manifest, i)]
    folder = folders[0] / ".cache" if cache == "auto" else None if cache is None else Path(cache)
    return Job(folders, manifests, shards, transform, folder, **settings)


def _affine(made: Prepared) -> NDArray[np.float32]:
    """Factors and summands (2, 32 rows) that scale rows (u | g(x) - shift); u is not changed."""
    scaler, d = made.scaler, made.transform.dim_u
    multiply = np.concatenate([np.ones(d), 1 / scaler.scale])
    add = np.concatenate([np.zeros(d), (made.transform.shift - scaler.mean) / scaler.scale])
    return np.tile(np.stack([multiply, add]), (1, _TILE)).astype(np.float32)
