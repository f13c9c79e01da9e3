"""Stores with rows of known content, and what a stream made of them: for the tests of streaming."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.priors import NormalPrior, Observable, Parameter, Prior
from sbi_phys.priors.parameters import observables_to_dicts
from sbi_phys.store.manifest import Manifest, write_manifest
from sbi_phys.store.shards import Header, ShardData, shard_name, write_shard
from sbi_phys.store.store import Store
from sbi_phys.training.stream import Stream

PRIOR = NormalPrior([Parameter("a"), Parameter("b")], mean=[1.0, -2.0], sd=[0.5, 3.0])
OBSERVABLES = (Observable("number", 1), Observable("n", 2, kind="counts"))


def make_store(
    folder: Path,
    n: int,
    *,
    shard_size: int = 100,
    failed: Iterable[int] = (),
    first: int = 0,
    prior: Prior = PRIOR,
    observables: Sequence[Observable] = OBSERVABLES,
    dtype: str = "float64",
    offset: float = 0.0,
    theta: NDArray[Any] | None = None,
    x: NDArray[Any] | None = None,
) -> Store:
    """Store whose first column of x is first + row number + offset, with counts beside it; failed rows hold NaN."""
    rng = np.random.default_rng(first)
    theta = prior.sample(n, rng) if theta is None else theta
    if x is None:
        k = sum(o.size for o in observables)
        x = np.column_stack([first + offset + np.arange(n), rng.poisson(20.0, (n, k - 1))]).astype(dtype)
    status = np.zeros(n, dtype=np.uint8)
    status[list(failed)] = 1
    x = np.where(status[:, None] == 0, x, np.nan).astype(dtype)
    settings = {"class": "tests:Rows", "settings": {"first": first}}
    header = Header(settings, prior.to_dict(), observables_to_dicts(observables), first, shard_size, dtype, "given")
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, Manifest(header, n))
    for index, start in enumerate(range(0, n, shard_size)):
        part = slice(start, min(start + shard_size, n))
        reasons = {int(row): "no shower" for row in np.flatnonzero(status[part])}
        write_shard(folder / shard_name(index), header, index, ShardData(theta[part], x[part], status[part], reasons))
    return Store(folder)


def numbers(stream: Stream, x: Any) -> list[int]:
    """Row numbers that scaled rows carry in their first column."""
    values = x[:, 0].double().numpy() * stream.scaler.scale[0] + stream.scaler.mean[0]
    assert np.abs(values - np.round(values)).max(initial=0) < 0.05
    return np.round(values).astype(int).tolist()


def epoch_numbers(stream: Stream, epoch: int, n_batches: int) -> list[list[int]]:
    """Row numbers of every batch of an epoch."""
    return [numbers(stream, batch[1]) for batch in stream.epoch(epoch, n_batches)]


def flat(batches: Iterable[list[int]]) -> list[int]:
    """All batches end to end."""
    return [number for batch in batches for number in batch]
