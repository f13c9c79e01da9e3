r"""Training data larger than memory: an epoch of shuffled batches from simulation stores, in bounded memory.

    with Stream("runs/spectra", prior, memory=2**30, seed=0) as stream:
        for epoch in range(100):
            for u, x in stream.epoch(epoch, n_batches=1000):
                ...

One pass over the shards transforms every row (u = prior.to_unbounded(theta), Anscombe's root on counts), sums up the
scaling of the training rows and leaves the rows in a flat cache (`cache`). An epoch permutes blocks of
neighbouring rows, reads as many as fill a buffer, shuffles the buffer's rows and cuts them into batches, while a thread
fills the next buffer. Every training row comes exactly once. The order follows from (seed, epoch, rank, memory) and never
from timing. The shuffle is complete within a buffer and by blocks between buffers: rows that were simulated side by side
may share a buffer but not, in general, a batch. Where the data fit into memory the one buffer is kept, and the shuffle is
complete.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import Observable, Prior
from sbi_phys.priors.parameters import observables_from_dicts
from sbi_phys.store.store import Store
from sbi_phys.training.stream_buffer import Budget, Slot
from sbi_phys.training.stream_cache import Job, Prepared, data_digest, prepare
from sbi_phys.training.stream_plan import Piece, Plan, require_shards, rows_at_rates
from sbi_phys.training.stream_rows import find_shards, open_stores, transform_for

__all__ = ["Stream"]

_CPU = torch.device("cpu")
_TILE = 32  # rows that are scaled as one long row: numpy's loop over a short one costs more than its arithmetic


class Stream:
    """Rows of one or several stores as float32 batches (u (b, d), x (b, k)[, label (b,) int64]), scaled, on the device.

    Args:
        stores: complete stores with the same parameters, prior and observables.
        prior: whose whitened space u the network learns in; theta must lie in its support.
        memory: bytes of rows that are held at once: validation rows, buffers, batches (on CUDA the buffers stand a second
            time on the device). It is part of what the order follows from.
        rates: relative shares of the stores. An epoch holds rate_i N rows of store i, N as large as the stores allow; of a
            store with more, epochs take turns through a seeded permutation of its blocks. None: all rows of all.
        labels: add the number of the row's store to each batch.
        cache: folder of the transformed rows; 'auto': `.cache` in the first store; None: none, shards are read and
            transformed in every epoch and twice at the start.
        seed: of split and order.
        validation_fraction: share of each store's good rows that is held out.
        x_transform: 'auto' (as the observables say), 'counts' or 'real'.
        observables: the blocks of x; default those of the store.
        device: where batches are wanted.
        rank, n_ranks: this process among those that train together: each reads its own shards, and validates on them.
        progress: of the pass at the start.
        cache_timeout_s: how long to wait for a cache that another process makes.

    Attributes:
        scaler: from all training rows of all stores (whatever the rates), as `XScaler.fit` would make it.
        validation: this rank's held-out rows, at the same rates, as (u, x[, label]). At most a quarter of `memory`: where
            there are more, a seeded part of them, as `note` says; the rest is not used.
        n: training rows of an epoch over all ranks; n_own: of this rank.

    Raises:
        SettingError: a setting out of range.
        SimulatorMismatchError: other parameters than the prior's.
        StoreError: a store that is incomplete, damaged or unlike the first; a cache that can not be written.
        DataError: too few rows, more ranks than shards, too little memory, negative counts.
        NonFiniteError, SupportError: naming file and row.
    """

    def __init__(
        self,
        stores: Store | str | Path | Sequence[Store | str | Path],
        prior: Prior,
        *,
        memory: int = 2**30,
        rates: Sequence[float] | None = None,
        labels: bool = False,
        cache: str | Path | None = "auto",
        seed: int = 0,
        validation_fraction: float = 0.1,
        x_transform: str = "auto",
        observables: Sequence[Observable] | None = None,
        device: torch.device = _CPU,
        rank: int = 0,
        n_ranks: int = 1,
        progress: Progress | None = None,
        cache_timeout_s: float = 3600.0,
    ) -> None:
        require_int("rank", rank, low=0, high=require_int("n_ranks", n_ranks, low=1) - 1)
        job = _job(stores, prior, x_transform, observables, cache)
        require_shards(job.shards, n_ranks)
        rows_at_rates([1] * len(job.folders), rates)  # checks them before the long pass
        self._budget = Budget(require_int("memory", memory, low=1), job.transform.width, bool(labels))
        made = prepare(
            job.with_settings(validation_fraction, seed, self._budget.pass_rows, rank=rank, wait_s=cache_timeout_s, progress=progress)
        )
        self._source, self._seed, self._rank, self.device = made.source, seed, rank, torch.device(device)
        self.scaler, self.note, self._labels, self._dim_u = made.scaler, "", bool(labels), made.transform.dim_u
        self._affine = _affine(made)
        self._busy, self._slots = False, list[Slot]()
        self._fingerprint = {
            "data": data_digest(job, made), "prior": prior.to_dict(), "counts": made.transform.counts.tolist(),
            "seed": seed, "validation_fraction": float(validation_fraction), "rates": None if rates is None else [float(r) for r in rates],
            "labels": self._labels, "n_ranks": n_ranks,
        }  # fmt: skip
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
        # where one process holds everything, the order is the same for every memory
        self._fingerprint["memory"] = None if self._resident and n_ranks == 1 and rates is None and not self.note else memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        buffers = "all in memory" if self._resident else f"buffers of {self._capacity} rows"
        return f"Stream({self.n_own} of {self.n} training rows, {len(self.validation[0])} validation rows, {buffers})"

    def close(self) -> None:
        """Let go of files and buffers; the cache stays for the next training."""
        self._source.close()
        self._slots, self._capacity = [], -1

    def fingerprint(self) -> Any:
        """JSON value that differs for other data or settings, and is the same on all ranks, with and without a cache.

        `memory` is part of it unless the data fit: what is read together decides the order.
        """
        return dict(self._fingerprint)

    def epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield exactly n_batches batches that hold each of this rank's rows once; their sizes differ by at most 1.

        Raises: SettingError, DataError (fewer rows than batches, a batch too large for the memory), StoreError (a file
        that has changed or disappeared); at a call while another epoch is being read: SettingError.
        """
        epoch, n_batches = require_int("epoch", epoch, low=0), require_int("n_batches", n_batches, low=1)
        if self._capacity < 0:
            raise SettingError("this stream is closed; expected epoch() before close()")
        if n_batches > self.n_own:
            raise DataError(
                f"n_batches is {n_batches}, and rank {self._rank} has {self.n_own} training rows; expected at most one batch a row"
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
                self._slots.append(Slot(self._capacity, self._budget.width, self._labels, self.device))
            with ThreadPoolExecutor(1, "stream") as thread:
                try:
                    yield from self._batches(self._filled(epoch, groups, thread, stop), n_batches)
                finally:
                    stop.set()  # the thread looks at it before every block
        finally:
            self._busy = False

    def _filled(self, epoch: int, groups: list[list[Piece]], thread: ThreadPoolExecutor, stop: threading.Event) -> Iterator[Slot]:
        """Yield the groups' buffers in order; the next one is filled while the caller uses the present one."""
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
        """(rows[, labels]) -> (u, x[, labels]); u and x are views of the rows."""
        return tensors[0][:, : self._dim_u], tensors[0][:, self._dim_u :], *tensors[1:]

    def _fill(self, epoch: int, number: int, group: list[Piece], stop: threading.Event) -> Slot:
        """Read the blocks of a group into a buffer and shuffle its rows. Runs in the thread: numpy and files alone."""
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
                    labels[at : at + n] = self._plan.store_of[block]
                if self._resident:
                    slot.loaded.add(block)
            slot.filled = max(slot.filled, at + n)
            chosen = np.flatnonzero(self._plan.training_mask(block))[low:high]
            order[slot.n : slot.n + chosen.size] = chosen + at
            slot.n += chosen.size
        rng_for(self._seed, "rows", epoch, number, self._rank).shuffle(order[: slot.n])
        slot.send()
        return slot

    def _read(self, block: int, out: NDArray[np.float32]) -> None:
        """Rows of a block, scaled."""
        self._source.read(*self._plan.blocks[block], out)
        width, whole = self._budget.width, len(out) // _TILE * _TILE
        for part in (out[:whole].reshape(-1, _TILE * width), out[whole:]):
            multiply, add = self._affine[:, : part.shape[1]]
            part *= multiply
            part += add

    def _read_validation(self, progress: Progress | None) -> tuple[Tensor, ...]:
        """One pass over the own rows, of which the validation rows are kept."""
        plan, total = self._plan, int(self._plan.n_validation.sum())
        plan.limit_validation(self._budget.validation_rows)
        kept = int(plan.n_validation.sum())
        if kept < total:
            self.note = f"{kept} of {total} validation rows are used: a quarter of memory = {self._budget.memory} bytes holds no more"
        block_rows = np.empty((self._budget.block_rows, self._budget.width), dtype=np.float32)
        rows, labels, at = np.empty((kept, self._budget.width), dtype=np.float32), np.empty(kept, dtype=np.int64), 0
        with or_none(progress).task("validation rows", plan.n_rows) as task:
            for block, chosen in plan.validation_rows():
                if chosen.size:
                    out = block_rows[: plan.rows[block]]
                    self._read(block, out)
                    rows[at : at + chosen.size], labels[at : at + chosen.size] = out[chosen], plan.store_of[block]
                    at += chosen.size
                task.advance(int(plan.rows[block]), self.note)
        tensors = [torch.from_numpy(rows).to(self.device)]
        return self._columns((*tensors, torch.from_numpy(labels).to(self.device)) if self._labels else tuple(tensors))


def _job(
    stores: Store | str | Path | Sequence[Store | str | Path],
    prior: Prior,
    x_transform: str,
    observables: Sequence[Observable] | None,
    cache: str | Path | None,
) -> Job:
    """What is to be read and how, checked without opening a shard."""
    if not isinstance(prior, Prior):
        raise SettingError(f"prior is a {type(prior).__name__}; expected a prior, e.g. BoxPrior([Parameter(...)])")
    folders, manifests = open_stores(stores)
    header = manifests[0].header
    blocks = observables if observables is not None else observables_from_dicts(header.observables)
    transform = transform_for(prior, header, x_transform, blocks, np.zeros(header.n_columns))
    pairs = enumerate(zip(folders, manifests, strict=True))
    shards = [shard for i, (folder, manifest) in pairs for shard in find_shards(folder, manifest, i)]
    folder = folders[0] / ".cache" if cache == "auto" else None if cache is None else Path(cache)
    return Job(folders, manifests, shards, transform, folder)


def _affine(made: Prepared) -> NDArray[np.float32]:
    """Factors and summands (2, 32 columns of a row) that scale rows (u | g(x) - shift); u stays as it is."""
    scaler, d = made.scaler, made.transform.dim_u
    multiply = np.concatenate([np.ones(d), 1 / scaler.scale])
    add = np.concatenate([np.zeros(d), (made.transform.shift - scaler.mean) / scaler.scale])
    return np.tile(np.stack([multiply, add]), (1, _TILE)).astype(np.float32)
