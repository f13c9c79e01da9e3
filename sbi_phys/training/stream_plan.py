r"""The order of an epoch: who reads which shards, which rows of which store, in which blocks, in which groups.

Everything follows from (seed, epoch, rank) and the sizes; nothing here reads a file. A *block* is a run of neighbouring
good rows of one shard, small enough to read at once. A *piece* is the part [low, high) of a block's training rows that
an epoch uses, which is all of it unless `rates` leave rows of an abundant store to later epochs. Pieces are permuted and
cut into *groups* that fill a buffer; rows are shuffled within a group.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Integers, Mask
from sbi_phys.training.stream_rows import CELL, Shard, Split

__all__ = ["Piece", "Plan", "require_shards", "rows_at_rates"]

Ints = Integers
Piece = tuple[int, int, int]  # block, low, high


def rows_at_rates(available: Sequence[int], rates: Sequence[float] | None) -> list[int]:
    """Rows of each store, rate_i N with the largest N that exceeds no store; all rows for None.   Raises: SettingError."""
    if rates is None:
        return list(available)
    if len(rates) != len(available):
        raise SettingError(f"rates has {len(rates)} numbers; expected {len(available)}, one for each store")
    weights = [require_number(f"rates[{i}]", r, low=0, open_low=True) for i, r in enumerate(rates)]
    total = min(n / w for n, w in zip(available, weights, strict=True))
    # the small addition: 3 * (1 / 3) must give 1
    return [min(n, int(w * total + 1e-6)) for n, w in zip(available, weights, strict=True)]


def _own_shards(shards: Sequence[Shard], n_stores: int, seed: int, rank: int, n_ranks: int) -> list[int]:
    """Numbers of the shards of one rank: every n_ranks-th of a permutation within each store, so that all get of all stores."""
    order: list[int] = []
    for store in range(n_stores):
        members = np.array([i for i, s in enumerate(shards) if s.store == store])
        order += members[rng_for(seed, "ranks", store).permutation(members.size)].tolist()
    return sorted(order[rank::n_ranks])


def require_shards(shards: Sequence[Shard], n_ranks: int) -> None:
    """Raise DataError where there are more ranks than shards."""
    if n_ranks > len(shards):
        raise DataError(f"{n_ranks} ranks share {len(shards)} shards; expected at least one shard for each: use fewer processes")


class Plan:
    """Blocks of one rank's shards and their order in every epoch.

    `n`: training rows of one epoch over all ranks; `n_own`: this rank's; `n_validation`: its validation rows, by store.
    Raises: DataError where a rank has no shard, no training or no validation rows; SettingError for bad rates.
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
        # a bit a row says whether it is for training: drawing the split again for every block would take longer than reading
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
        """Bytes of the bits that tell training rows from validation rows."""
        return sum(bits.nbytes for bits in self._bits.values())

    @property
    def n_rows(self) -> int:
        """Good rows of all own blocks, validation rows included."""
        return int(self.rows.sum())

    def pieces(self, epoch: int) -> list[Piece]:
        """What an epoch uses, in the order of the shards.

        Of a store with more rows than its share, epoch e takes the e-th stretch of a fixed permutation of its blocks, round
        and round: no row twice in an epoch, and every row equally often in the long run.
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

    def _stretch(self, members: Ints, first: int, last: int) -> list[Piece]:
        """Training rows first to last of blocks laid end to end."""
        counts = self.training[members]
        starts = np.cumsum(counts) - counts
        low, high = np.clip(first - starts, 0, counts), np.clip(last - starts, 0, counts)
        inside = np.flatnonzero(high > low)
        return list(zip(members[inside].tolist(), low[inside].tolist(), high[inside].tolist(), strict=True))

    def groups(self, epoch: int, capacity: int) -> list[list[Piece]]:
        """Pieces of an epoch in its order, cut into groups of about equal size, none of more than `capacity` rows to read."""
        pieces = self.pieces(epoch)
        order = rng_for(self._seed, "order", epoch, self._rank).permutation(len(pieces))
        pieces = [pieces[j] for j in order.tolist()]
        rows = self.rows[[p[0] for p in pieces]]
        ends = np.cumsum(rows)
        # a group reaches past its share by less than a block
        n_groups = -(-int(ends[-1]) // (capacity - int(rows.max()) + 1))
        group = (ends - rows) * n_groups // int(ends[-1])
        cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(pieces)]
        return [pieces[a:b] for a, b in pairwise(cuts)]

    def limit_validation(self, rows: int) -> None:
        """Keep at most `rows` validation rows of this rank, in proportion from each store."""
        total = int(self.n_validation.sum())
        if rows < total:
            ends = np.cumsum(self.n_validation) * rows // total
            self.n_validation = np.diff(ends, prepend=0)

    def validation_rows(self) -> Iterator[tuple[int, Ints]]:
        """For every block, which of its rows are kept for validation: spread evenly over the rank's validation rows."""
        seen = np.zeros_like(self._valid)
        for number, store in enumerate(self.store_of.tolist()):
            rows = np.flatnonzero(~self.training_mask(number))
            keep, total = int(self.n_validation[store]), max(1, int(self._valid[store]))
            before, after = keep * int(seen[store]) // total, keep * (int(seen[store]) + rows.size) // total
            seen[store] += rows.size
            if after - before < rows.size:
                rows = rng_for(self._seed, "validation", self._rank, number).choice(rows, after - before, replace=False, shuffle=False)
            yield number, np.sort(rows)


def _share(per_store: Sequence[int], available: Ints, rank: int) -> Ints:
    """Split each store's rows over the ranks in proportion to what they have (ranks, stores) -> this rank's (stores,)."""
    ends = np.cumsum(available, axis=0)
    total = np.maximum(ends[-1], 1)
    cut = np.asarray(per_store, dtype=np.int64) * np.vstack([np.zeros_like(total), ends]) // total
    return np.asarray(cut[rank + 1] - cut[rank])


def _pack(split: Split, shard: int, rows: int) -> NDArray[np.uint8]:
    """Training mask of a shard's good rows, eight to a byte."""
    bits = np.empty((rows + 7) // 8, dtype=np.uint8)
    step = 16 * CELL  # whole cells, and whole bytes
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        bits[start // 8 : (stop + 7) // 8] = np.packbits(split.training(shard, start, stop))
    return bits
