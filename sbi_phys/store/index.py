"""Counts of every shard, so that a store of 10,000 files is opened without opening 10,000 files.

`.index.json` holds, for each shard, size, time of change and inode of the file that was read and what was found in it. An
entry counts only while the file has all three: shards are never changed in place but replaced by a rename, which gives
another inode and time, so an entry that still fits is true. In a copy of the folder none fits, and it is made anew, from
the labels of the shards (sbi_phys.store.encoding): a short read each; only files without a label are opened. The index is a
cache: it is written aside and renamed by whoever counted many shards, needs no lock (the last writer wins, each file is
whole), and a folder that may not be written does without.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sbi_phys.core.errors import StoreError
from sbi_phys.store.encoding import read_label, reason_kind
from sbi_phys.store.shards import open_shard, shard_name, write_file

__all__ = ["INDEX", "Index", "reason_kind"]

INDEX = ".index.json"
_VERSION = 1
_MANY = 512  # shards that had to be opened before the index is worth a file

Entry = tuple[int, int, int, int, dict[str, int]]  # size, mtime_ns, inode, failed rows, how many for which kind of reason


class Index:
    """Facts of the shards in a folder, each read once as long as its file stays as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[int, Entry] | None = None
        self._opened = 0

    def n_failed(self, shards: Iterable[int]) -> int:
        """Failed rows in these shards.   Raises: StoreError naming a shard that is missing or can not be read."""
        return sum(entry[3] for entry in self.entries(shards).values())

    def reasons(self, shards: Iterable[int]) -> Counter[str]:
        """How many rows failed for which kind of reason (numbers within it written as #).   Raises: StoreError."""
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
        values = {"version": _VERSION, "shards": {str(shard): list(entry) for shard, entry in sorted(self._load().items())}}
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))

        # a cache: that the folder is read-only, or the disk full, is none of the reader's business
        with suppress(StoreError):
            write_file(self.folder / INDEX, text)

    def _load(self) -> dict[int, Entry]:
        if self._entries is None:
            self._entries = _parse(self.folder / INDEX)
        return self._entries


def _parse(path: Path) -> dict[int, Entry]:
    """Entries of an index file; none if there is no such file or it is not one of ours."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != _VERSION:
            return {}
        rows = values["shards"].items()
        return {int(k): (int(v[0]), int(v[1]), int(v[2]), int(v[3]), {str(r): int(n) for r, n in v[4].items()}) for k, v in rows}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
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
