"""How far a campaign is: rows, gaps, failures by reason, bytes, rate and time left, read from the folder alone.

Nothing is asked of the process that writes: shards appear whole under their names, so that another terminal, or another
machine on the same file system, sees the same. The rate is that of the newest shards, from the times of their files; who
writes stands in the lock file. The lock itself is not touched: trying it could refuse a campaign that starts just then.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbi_phys.core.progress import seconds_text
from sbi_phys.store.check import ranges_text
from sbi_phys.store.index import Index
from sbi_phys.store.locks import writers
from sbi_phys.store.manifest import Manifest, list_shards, read_manifest

__all__ = ["Info", "store_info", "watch_store"]

_WINDOW = 64  # newest shards that the rate is taken from


@dataclass(frozen=True, slots=True)
class Info:
    """State of a store.

    Fields: rows on disk and asked for; shards there and asked for; missing, numbers of the others; n_failed rows; reasons,
    kind of reason -> rows; bytes on disk; rate, rows a second of the newest shards, and seconds_left, both None where nobody
    writes or too few shards are there; writer, the lock's holder or ''; the store's simulator, seed, dtype, shard_size.
    """

    path: str
    rows: int
    rows_asked: int
    shards: int
    shards_asked: int
    missing: tuple[int, ...]
    n_failed: int
    reasons: dict[str, int]
    bytes: int
    rate: float | None
    seconds_left: float | None
    writer: str
    simulator: str
    seed: int
    dtype: str
    shard_size: int
    theta: str

    @property
    def complete(self) -> bool:
        """Whether all rows are there."""
        return not self.missing

    def line(self) -> str:
        """One line for a log."""
        parts = [
            f"{self.rows}/{self.rows_asked} rows ({100 * self.rows / self.rows_asked:.0f} %)",
            f"{self.shards}/{self.shards_asked} shards",
        ]
        parts.append(f"{self.n_failed} failed")
        if self.rate is not None and self.seconds_left is not None:
            parts += [f"{self.rate:.3g} rows/s", f"left {seconds_text(self.seconds_left)}"]
        return ", ".join([*parts, "complete" if self.complete else self.writer or "nobody writes"])

    def text(self) -> str:
        """A short table."""
        share = 100 * self.n_failed / max(self.rows, 1)
        lines = [
            f"store      {self.path}",
            f"simulator  {self.simulator}, seed {self.seed}, theta {self.theta}",
            f"rows       {self.rows} of {self.rows_asked}, {self.n_failed} failed ({share:.2g} %)",
            f"shards     {self.shards} of {self.shards_asked}, {self.shard_size} rows each, {self.dtype}",
            f"bytes      {self.bytes} ({self.bytes / max(self.rows, 1):.0f} a row)",
        ]
        if self.missing:
            lines.append(f"missing    {ranges_text(self.missing)}")
        if self.rate is not None and self.seconds_left is not None:
            lines.append(f"rate       {self.rate:.3g} rows/s, left {seconds_text(self.seconds_left)}")
        lines.append(
            f"state      {'complete' if self.complete else 'written by ' + self.writer if self.writer else 'incomplete, nobody writes'}"
        )
        top = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"  {n:>8} x {reason}" for reason, n in top[:10]]
        if len(top) > 10:
            lines.append(f"  {sum(n for _, n in top[10:]):>8} x {len(top) - 10} other reasons")
        return "\n".join(lines)


def store_info(path: str | os.PathLike[str], *, index: Index | None = None, now: float | None = None) -> Info:
    """State of a store, also while another process writes it.

    Args: index, one that was kept from an earlier call, so that only new shards are opened; now, seconds since 1970.
    Raises: StoreError if there is no store, or a shard can not be read.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    index = index or Index(folder)
    present = [i for i in list_shards(folder) if manifest.rows(i)]
    entries = index.entries(present)
    reasons = index.reasons(present)
    missing = tuple(sorted(set(range(manifest.n_shards)) - set(present)))
    rows, writer = sum(map(manifest.rows, present)), writers(folder)
    rate = _rate(manifest, {i: entry[1] / 1e9 for i, entry in entries.items()}, now or time.time()) if writer and missing else None
    header = manifest.header
    return Info(
        path=str(folder), rows=rows, rows_asked=manifest.n, shards=len(present), shards_asked=manifest.n_shards, missing=missing,
        n_failed=sum(entry[3] for entry in entries.values()), reasons=dict(reasons), bytes=sum(entry[0] for entry in entries.values()),
        rate=rate, seconds_left=None if rate is None else (manifest.n - rows) / rate, writer=writer,
        simulator=str(header.simulator.get("class", "")), seed=header.seed, dtype=header.dtype,
        shard_size=header.shard_size, theta=header.theta,
    )  # fmt: skip


def watch_store(path: str | os.PathLike[str], *, interval_s: float = 2.0, sleep: Callable[[float], Any] = time.sleep) -> Iterator[Info]:
    """Yield the state every `interval_s` seconds until the store is complete; only new shards are opened each time.

    Raises: StoreError.
    """
    index = Index(Path(path))
    while True:
        info = store_info(path, index=index)
        yield info
        if info.complete:
            return
        sleep(interval_s)


def _rate(manifest: Manifest, times: dict[int, float], now: float) -> float | None:
    """Rows a second over the newest shards; a writer that has been silent for long is slower than its last shards say."""
    newest = sorted(times, key=lambda i: times[i])[-_WINDOW:]
    if len(newest) < 2:
        return None
    first, last = times[newest[0]], times[newest[-1]]
    # the oldest marks the start: its own rows were made before
    rows = sum(map(manifest.rows, newest[1:]))
    elapsed = last - first
    typical = elapsed / (len(newest) - 1)
    silent = now - last
    elapsed += silent if silent > 3 * typical else 0.0
    return rows / elapsed if elapsed > 0 else None
