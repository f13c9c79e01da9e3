"""What a stage of a run was made from, and whether that is still so.

The record of a finished stage holds its inputs: the settings that it depends on, the hash of the observation, the fingerprint of the
simulator's code, and the hashes of the files of other stages that it reads, and the hashes of the files that it wrote. A stage is current
while all of them are as recorded. Otherwise `changes` names what differs, and the stage runs again; a stage that reads the same bytes as
before does not.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sbi_phys.core.errors import StoreError
from sbi_phys.core.types import Array
from sbi_phys.store.identity import fingerprint_difference
from sbi_phys.store.manifest import MANIFEST, list_shards, read_manifest
from sbi_phys.store.shards import open_shard, read_facts, shard_name

__all__ = ["changes", "digest_of", "digest_of_array", "store_digest"]

_NONE = "absent"
_known: dict[tuple[str, int, int], str] = {}  # (path, size, time of the last change) -> digest


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a store's checksums; 'absent' where there is neither."""
    if path.is_dir():
        return store_digest(path) if (path / MANIFEST).is_file() else _NONE
    return _digest(path, _file_digest)


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path, read: Callable[[Path], str]) -> str:
    """The digest of a file, read once while its size and its time of the last change stay the same."""
    try:
        state = path.stat()
    except OSError:
        return _NONE
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key not in _known:
        _known[key] = read(path)
    return _known[key]


def digest_of_array(x: Array) -> str:
    """SHA-256 of an array's shape and values."""
    return hashlib.sha256(repr(x.shape).encode() + x.astype("<f8").tobytes()).hexdigest()


def store_digest(path: Path, n: int | None = None) -> str:
    """SHA-256 over the checksums of a store's shards, only those that hold the first `n` rows if n is given; 'absent' if one is missing."""
    try:
        manifest = read_manifest(path)
        present = list_shards(path)
        last = manifest.n_shards if n is None else min(-(-n // manifest.header.shard_size), manifest.n_shards)
        parts = [_digest(path / shard_name(i), _shard_digest) for i in range(last)] if present[:last] == list(range(last)) else [_NONE]
    except StoreError:
        return _NONE
    return _NONE if _NONE in parts else hashlib.sha256(" ".join([manifest.header.digest(), *parts]).encode()).hexdigest()


def _shard_digest(path: Path) -> str:
    with open_shard(path) as file:
        return str(read_facts(file, path)[1]["checksum"])


def changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name every difference between the inputs in a record and those of now; [] if there is none.

    Args: recorded, now: {"settings": {key: value}, "observation": {"source", "sha256"}, "code": {"sha256", "parts"},
    "files": {name: sha256}}, each optional.
    """
    out = []
    old, new = recorded.get("settings", {}), now.get("settings", {})
    for key in sorted({*old, *new}):
        mine, theirs = _plain(new.get(key)), _plain(old.get(key))
        if mine != theirs:
            out.append(f"{key} was {_short(theirs)} and is {_short(mine)}")
    was, present = recorded.get("observation", {}), now.get("observation", {})
    if was.get("sha256") != present.get("sha256"):
        if not was or not present:
            out.append("there is an observation now" if present else "there is no observation now")
        elif was.get("source") == present.get("source"):
            out.append(f"the observation {present.get('source')} has other values than before")
        else:
            out.append(f"the observation was {was.get('source')} and is {present.get('source')}")
    was, present = recorded.get("code", {}), now.get("code", {})
    if was.get("sha256") != present.get("sha256"):
        out.append("the code of the simulator differs: " + fingerprint_difference(was, present))
    old, new = recorded.get("files", {}), now.get("files", {})
    out += [f"{name} differs" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return out


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
