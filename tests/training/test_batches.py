"""Batches of rows in memory: every row once an epoch, an order that (seed, epoch) alone decide, and shares of ranks."""

import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from sbi_phys.core.errors import DataError
from sbi_phys.training.batches import MemoryBatches
from sbi_phys.training.ranks import Ranks
from tests.training.stream_helpers import flat

N = 23
U = torch.arange(N, dtype=torch.float32)
X = torch.stack([10 * U, -U], dim=1)
VALID = (torch.arange(5.0), torch.arange(10.0).reshape(5, 2))


def make(seed: int = 3, ranks: Ranks | None = None) -> MemoryBatches:
    return MemoryBatches((U, X), VALID, seed=seed, ranks=ranks)


def order(batches: MemoryBatches, epoch: int, n_batches: int = 4) -> list[list[int]]:
    return [u.int().tolist() for u, _ in batches.epoch(epoch, n_batches)]


def test_an_epoch_has_every_row_once_with_its_own_columns() -> None:
    batches = make()
    found = list(batches.epoch(0, 4))
    assert batches.n == N and [len(u) for u, _ in found] == [6, 6, 6, 5]
    assert sorted(torch.cat([u for u, _ in found]).tolist()) == U.tolist()
    for u, x in found:
        assert torch.equal(x, torch.stack([10 * u, -u], dim=1))


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    batches = make()
    first = order(batches, 0)
    assert order(batches, 5) != first and order(make(seed=4), 0) != first
    assert order(batches, 0) == first == order(make(), 0)  # whatever was read before
    # the number of batches divides the same order
    assert flat(order(batches, 0, 7)) == flat(first)


@pytest.mark.parametrize("size", [2, 3])
def test_the_batches_of_all_ranks_are_those_of_a_single_process(size: int) -> None:
    whole = order(make(), 1)
    parts = [order(make(ranks=Ranks(rank, size)), 1) for rank in range(size)]
    for i, batch in enumerate(whole):
        for rank in range(size):
            assert parts[rank][i] == batch[rank::size]
    shares = [make(ranks=Ranks(rank, size)).validation for rank in range(size)]
    assert sorted(torch.cat([u for u, _ in shares]).tolist()) == VALID[0].tolist()
    assert all(len(u) == len(x) for u, x in shares)


def test_one_row_and_more_batches_than_rows() -> None:
    one = MemoryBatches((U[:1],), (U[:1],), seed=0)
    assert [u.tolist() for (u,) in one.epoch(0, 1)] == [[0.0]]
    assert [len(u) for (u,) in one.epoch(0, 3)] == [1, 0, 0]


def test_the_fingerprint_is_the_checksum_of_all_rows() -> None:
    expected = [zlib.crc32(np.ascontiguousarray(t.numpy()).tobytes()) for t in (U, X, *VALID)]
    assert make().fingerprint() == expected == make(seed=9).fingerprint() == make(ranks=Ranks(1, 2)).fingerprint()
    changed = (VALID[0].clone(), VALID[1])
    changed[0][4] += 1
    other = MemoryBatches((U, X), changed, seed=3).fingerprint()
    assert [a == b for a, b in zip(other, expected, strict=True)] == [True, True, False, True]
    # a transposed view has the same values in memory in another order
    view = torch.stack([10 * U, -U]).T
    assert MemoryBatches((U, view), VALID, seed=3).fingerprint() == expected


@pytest.mark.parametrize(
    ("train", "valid", "words"),
    [
        ((U, X[:-1]), VALID, r"training tensors have \[23, 22\] rows; expected the same number, at least one"),
        ((U[:0],), VALID, r"training tensors have \[0\] rows"),
        ((), VALID, r"training tensors have \[\] rows"),
        ((U, X), (U[:2], X[:3]), r"validation tensors have \[2, 3\] rows"),
        ((U, X), (U[:0], X[:0]), r"validation tensors have \[0, 0\] rows"),
    ],
)
def test_bad_rows(train: tuple[Tensor, ...], valid: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        MemoryBatches(train, valid, seed=0)
