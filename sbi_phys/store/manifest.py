"""What is in a store's folder beside the rows: the manifest, the names of the shards, what killed runs left behind.

`store.json` is written aside and renamed, as shards are. The locks are in sbi_phys.store.locks.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sbi_phys.core.errors import StoreError
from sbi_phys.core.provenance import git_state, package_version
from sbi_phys.store.locks import LOCK_FILE, StoreLock, is_lock_file
from sbi_phys.store.shards import FORMAT, READABLE, SCHEMA, Header, shard_name, write_file

__all__ = ["MANIFEST", "Manifest", "StoreLock", "list_shards", "read_manifest", "remove_litter", "write_manifest"]

MANIFEST = "store.json"
_SHARD = re.compile(r"^shard-(\d{5,})\.h5$")
_LITTER = re.compile(r"^\.(shard-(\d{5,})\.h5|store\.json|\.index\.json)\.\d+\.tmp$")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of store.json: the shards' common header, rows asked for, and the SHA-256 of a given theta ('' if drawn)."""

    header: Header
    n: int
    theta_sha256: str = ""

    @property
    def n_shards(self) -> int:
        """Number of shards of the finished store."""
        return -(-self.n // self.header.shard_size)

    def rows(self, index: int) -> int:
        """Rows of shard `index` of the finished store; 0 past its end."""
        return max(0, min(self.header.shard_size, self.n - index * self.header.shard_size))


def list_shards(folder: Path) -> list[int]:
    """Return the numbers of the shard files in a folder, in order."""
    return sorted(int(m.group(1)) for name in os.listdir(folder) if (m := _SHARD.match(name)) and shard_name(int(m.group(1))) == name)


def remove_litter(folder: Path, shards: range | None = None) -> None:
    """Remove unfinished files that a killed run left behind; only to be called by who holds the lock.

    shards: those of an array job, beside which others may be at work: only what is left of these is removed.
    """
    for name in os.listdir(folder):
        litter = _LITTER.match(name)
        if shards is None:
            mine = litter is not None or (is_lock_file(name) and name != LOCK_FILE)
        else:
            mine = litter is not None and litter[2] is not None and int(litter[2]) in shards
        if mine:
            (folder / name).unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write store.json aside and rename it.   Raises: StoreError."""
    values = {
        "format": FORMAT,
        "schema": SCHEMA,
        "package_version": package_version(),
        "git": git_state(),
        "n": manifest.n,
        "theta_sha256": manifest.theta_sha256,
        **manifest.header.plain(),
    }
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(folder / MANIFEST, text)


def read_manifest(folder: Path) -> Manifest:
    """Read and check store.json.   Raises: StoreError."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; expected a store made by simulate")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise StoreError(f"{folder} has no {MANIFEST} ({len(list_shards(folder))} shards); expected a store made by simulate") from err
    except (OSError, ValueError) as err:
        raise StoreError(f"{path} can not be read: {err}; delete it and run the same simulate call again, which makes it anew") from err
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of a store; expected format {FORMAT!r}")
    if values.get("schema") not in READABLE:
        made, newest = values.get("package_version"), f"{READABLE[0]} to {SCHEMA}"
        raise StoreError(f"{path} has schema {values.get('schema')}, written by sbi_phys {made}; expected {newest}: update sbi_phys")
    if not isinstance(values.get("n"), int) or values["n"] < 1:
        raise StoreError(f"{path} has n = {values.get('n')!r}; expected the number of rows asked for")
    return Manifest(Header.from_plain(values, str(path)), values["n"], str(values.get("theta_sha256", "")))
