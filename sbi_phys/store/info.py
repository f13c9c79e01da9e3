"""Counts of a store and the state of a campaign, read from the folder alone, also while another process writes it.

Counts are cached in `.index.json`: for each shard the size, time and inode of its file and what was found in it. An entry is
valid only while the file has the same three; shards are replaced by a rename, never changed in place. A copied folder is read
anew, from the labels of the shards (sbi_phys.store.shards), with one short read each. The cache needs no lock (each file is
written whole, the last writer wins) and is not written where the folder is read-only.

The rate of a campaign is that of its newest shards, from the times of their files. Who writes stands in the lock files, which
are only read: trying a lock could refuse a campaign that starts at that moment.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbi_phys.core.checksums import require_seal, seal
from sbi_phys.core.errors import SbiPhysError, StoreError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import seconds_text
from sbi_phys.core.results import Result
from sbi_phys.store._encoding import read_label, reason_kind
from sbi_phys.store.check import ranges_text
from sbi_phys.store.locks import writers
from sbi_phys.store.manifest import Manifest, list_shards, read_manifest
from sbi_phys.store.shards import open_shard, shard_name, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["INDEX", "Index", "Info", "reason_kind", "store_info", "watch_store"]

INDEX = ".index.json"
_VERSION = 2
_MANY = 512  # shards opened before the index is written
_WINDOW = 64  # newest shards that the rate is taken from

Entry = tuple[int, int, int, int, dict[str, int]]  # size, mtime_ns, inode, failed rows, how many for which kind of reason


class Index:
    """Counts of the shards in a folder; a shard is read again only when its file has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[int, Entry] | None = None
        self._opened = 0

    def n_failed(self, shards: Iterable[int]) -> int:
        """Failed rows in these shards.   Raises: StoreError naming a shard that is missing or cannot be read."""
        return sum(entry[3] for entry in self.entries(shards).values())

    def reasons(self, shards: Iterable[int]) -> Counter[str]:
        """Number of failed rows by kind of reason (numbers within it written as #).   Raises: StoreError."""
        found: Counter[str] = Counter()
        for entry in self.entries(shards).values():
            found.update(entry[4])
        return found

    def entries(self, shards: Iterable[int]) -> dict[int, Entry]:
        """Size, time of change, failed rows and reasons of these shards.   Raises: StoreError."""
        known = self._load()
        found = {}
        for shard in shards:
            path = self.folder / shard_name(shard)
            try:
                stat = os.stat(path)
            except FileNotFoundError as err:
                raise StoreError(f"{path} is missing") from err
            entry = known.get(shard)
            if entry is None or entry[:3] != (stat.st_size, stat.st_mtime_ns, stat.st_ino):
                entry = known[shard] = _read(path, stat)
                self._opened += 1
            found[shard] = entry
        if self._opened >= _MANY:
            self.save()
        return found

    def save(self) -> None:
        """Write the index, if the folder may be written."""
        self._opened = 0
        values = seal({"version": _VERSION, "shards": {str(shard): list(entry) for shard, entry in sorted(self._load().items())}})
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))

        # without the cache reading is slower, so a read-only folder or a full disk is not an error here
        with suppress(StoreError):
            write_file(self.folder / INDEX, text)

    def _load(self) -> dict[int, Entry]:
        if self._entries is None:
            self._entries = _parse(self.folder / INDEX)
        return self._entries


def _parse(path: Path) -> dict[int, Entry]:
    """Entries of an index file; none if it is missing or has another format."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        require_seal(values, str(path))
        if values["version"] != _VERSION:
            return {}
        rows = values["shards"].items()
        return {int(k): (int(v[0]), int(v[1]), int(v[2]), int(v[3]), {str(r): int(n) for r, n in v[4].items()}) for k, v in rows}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, SbiPhysError):
        return {}


def _read(path: Path, stat: os.stat_result) -> Entry:
    label = read_label(path)
    if label is not None and label.kinds is not None and label.size == stat.st_size:
        return stat.st_size, stat.st_mtime_ns, stat.st_ino, label.n_failed, dict(sorted(label.kinds.items()))
    with open_shard(path) as file:
        n_failed = int(file.attrs["n_failed"])
        texts = file["reason"][:].tolist() if n_failed else []
    kinds = Counter(reason_kind(bytes(text).decode("utf-8", "replace")) for text in texts)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, n_failed, dict(sorted(kinds.items()))


@dataclass(frozen=True, slots=True)
class Info(Result):
    """State of a store.

    Fields: n_rows on disk; n_requested, rows asked for; n_present, shards on disk; n_shards of the finished store; missing,
    numbers of the other shards; n_failed rows; reasons, kind of reason -> rows; n_bytes on disk; rate, rows a second of the newest
    shards, and seconds_left, both None where no process writes or too few shards exist; writer, the process that writes, or '';
    simulator, seed, dtype, shard_size and theta of the store; code, SHA-256 of the simulator's code of the first rows and of
    accepted changes.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10)])
    >>> store = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> sp.store.store_info(store).line()
    '50/50 rows (100 %), 1/1 shards, 0 failed, complete'
    """

    path: str
    n_rows: int
    n_requested: int
    n_present: int
    n_shards: int
    missing: tuple[int, ...]
    n_failed: int
    reasons: dict[str, int]
    n_bytes: int
    rate: float | None
    seconds_left: float | None
    writer: str
    simulator: str
    seed: int
    dtype: str
    shard_size: int
    theta: str
    code: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all rows are on disk."""
        return not self.missing

    def line(self) -> str:
        """One line for a log."""
        parts = [
            f"{self.n_rows}/{self.n_requested} rows ({100 * self.n_rows / self.n_requested:.0f} %)",
            f"{self.n_present}/{self.n_shards} shards",
            f"{self.n_failed} failed",
        ]
        if self.rate is not None and self.seconds_left is not None:
            parts += [f"{self.rate:.3g} rows/s", f"left {seconds_text(self.seconds_left)}"]
        return ", ".join([*parts, "complete" if self.complete else self.writer or "no process writes"])

    def summary(self) -> str:
        """A short table."""
        share = 100 * self.n_failed / max(self.n_rows, 1)
        lines = [
            f"store      {self.path}",
            f"simulator  {self.simulator}, seed {self.seed}, theta {self.theta}",
            f"rows       {self.n_rows} of {self.n_requested}, {self.n_failed} failed ({share:.2g} %)",
            f"shards     {self.n_present} of {self.n_shards}, {self.shard_size} rows each, {self.dtype}",
            f"bytes      {self.n_bytes} ({self.n_bytes / max(self.n_rows, 1):.0f} a row)",
        ]
        if self.code:
            lines.append(f"code       {', accepted change to '.join(c[:12] or 'unreadable' for c in self.code)}")
        if self.missing:
            lines.append(f"missing    {ranges_text(self.missing)}")
        if self.rate is not None and self.seconds_left is not None:
            lines.append(f"rate       {self.rate:.3g} rows/s, left {seconds_text(self.seconds_left)}")
        lines.append(
            f"state      {'complete' if self.complete else 'written by ' + self.writer if self.writer else 'incomplete, no process writes'}"
        )
        top = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"  {n:>8} x {reason}" for reason, n in top[:10]]
        if len(top) > 10:
            lines.append(f"  {sum(n for _, n in top[10:]):>8} x {len(top) - 10} other reasons")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the numbers of good, failed and missing rows."""
        return figures.results.store_rows(self, ax)


def store_info(path: str | os.PathLike[str], *, index: Index | None = None, now: float | None = None) -> Info:
    """Return the state of a store, also while another process writes it.

    Args: index: that of an earlier call, so that only new shards are opened. now: seconds since 1970, default the present.
    Raises: StoreError if there is no store, or a shard cannot be read.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10)])
    >>> store = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)], shard_size=20)
    >>> info = sp.store.store_info(store)
    >>> info.n_rows, info.n_shards, info.complete
    (50, 3, True)
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
        path=str(folder), n_rows=rows, n_requested=manifest.n, n_present=len(present), n_shards=manifest.n_shards, missing=missing,
        n_failed=sum(entry[3] for entry in entries.values()), reasons=dict(reasons), n_bytes=sum(entry[0] for entry in entries.values()),
        rate=rate, seconds_left=None if rate is None else (manifest.n - rows) / rate, writer=writer,
        simulator=str(header.simulator.get("class", "")), seed=header.seed, dtype=header.dtype,
        shard_size=header.shard_size, theta=header.theta, code=tuple(str(c.get("sha256", "")) for c in manifest.code),
    )  # fmt: skip


def watch_store(path: str | os.PathLike[str], *, interval_s: float = 2.0, sleep: Callable[[float], Any] = time.sleep) -> Iterator[Info]:
    """Yield the state every `interval_s` seconds until the store is complete; only new shards are opened each time.

    Raises: StoreError.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10)])
    >>> store = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> [info.n_rows for info in sp.store.watch_store(store)]
    [50]
    """
    index = Index(Path(path))
    while True:
        info = store_info(path, index=index)
        yield info
        if info.complete:
            return
        sleep(interval_s)


def _rate(manifest: Manifest, times: dict[int, float], now: float) -> float | None:
    """Rows a second over the newest shards, less where no shard was finished for a long time."""
    newest = sorted(times, key=lambda i: times[i])[-_WINDOW:]
    if len(newest) < 2:
        return None
    first, last = times[newest[0]], times[newest[-1]]
    # the oldest shard marks the start of the time: its own rows were made before
    rows = sum(map(manifest.rows, newest[1:]))
    elapsed = last - first
    typical = elapsed / (len(newest) - 1)
    silent = now - last
    elapsed += silent if silent > 3 * typical else 0.0
    return rows / elapsed if elapsed > 0 else None
