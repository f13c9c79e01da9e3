"""The folder of a store: the manifest `store.json`, the names of the shards, and what a simulate call has to make.

An array job is given some of the shards. It joins the store in the folder or starts it; several jobs may plan at once, one after
the other (`ArrayLock.planning`), and the first writes the manifest. The bytes of a shard follow from the header and its
number, so the shards of all jobs together are those of one call.
"""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checksums import require_seal, seal
from sbi_phys.core.errors import SettingError, StoreError
from sbi_phys.core.provenance import git_state
from sbi_phys.core.types import Array
from sbi_phys.core.version import __version__
from sbi_phys.store._encoding import read_label
from sbi_phys.store.identity import fingerprint_difference
from sbi_phys.store.locks import LOCK_FILE, array_jobs, is_lock_file
from sbi_phys.store.shards import (
    FORMAT,
    SCHEMA,
    Header,
    ShardData,
    open_intact,
    open_shard,
    read_arrays,
    read_facts,
    shard_name,
    write_file,
)

__all__ = [
    "MANIFEST",
    "Manifest",
    "Plan",
    "existing_header",
    "join_codes",
    "list_shards",
    "plan_store",
    "read_manifest",
    "read_shard",
    "remove_litter",
    "shard_range",
    "write_manifest",
]

MANIFEST = "store.json"
_FIELDS = ("format", "schema", "package_version", "git", "n", "theta_sha256", "code")
_MOST_SHARDS = 10**7
_RANGE = re.compile(r"^(\d+)(?:([:/])(\d+))?$")
_SHARD = re.compile(r"^shard-(\d{5,})\.h5$")
_LITTER = re.compile(r"^\.(shard-(\d{5,})\.h5|store\.json|\.index\.json)\.\d+\.tmp$")


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of store.json.

    Fields: header of all shards; n, rows asked for; theta_sha256 of given theta ('' if drawn); code, fingerprints of the simulator's
    code: that of the first rows, then those of accepted changes.
    """

    header: Header
    n: int
    theta_sha256: str = ""
    code: tuple[dict[str, Any], ...] = ()

    @property
    def n_shards(self) -> int:
        """Number of shards of the finished store."""
        return -(-self.n // self.header.shard_size)

    def rows(self, index: int) -> int:
        """Return the rows of shard `index` of the finished store; 0 past its end."""
        return max(0, min(self.header.shard_size, self.n - index * self.header.shard_size))


def list_shards(folder: Path) -> list[int]:
    """Return the numbers of the shard files in a folder, in order."""
    return sorted(int(m.group(1)) for name in os.listdir(folder) if (m := _SHARD.match(name)) and shard_name(int(m.group(1))) == name)


def remove_litter(folder: Path, shards: range | None = None) -> None:
    """Remove unfinished files of a killed run; only the holder of the lock may call it.

    Args: shards: those of an array job; only its own files are removed, since other jobs may be running.
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
    """Write store.json.   Raises: StoreError."""
    values = seal({
        "format": FORMAT,
        "schema": SCHEMA,
        "package_version": __version__,
        "git": git_state(),
        "n": manifest.n,
        "theta_sha256": manifest.theta_sha256,
        **({"code": list(manifest.code)} if manifest.code else {}),
        **manifest.header.plain(),
    })  # fmt: skip
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(folder / MANIFEST, text)


def read_manifest(folder: Path) -> Manifest:
    """Read and check store.json.   Raises: StoreError."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; expected a store made by simulate")
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise StoreError(f"{path} is no file; expected the manifest of a store")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise StoreError(f"{folder} has no {MANIFEST} ({len(list_shards(folder))} shards); expected a store made by simulate") from err
    except (OSError, ValueError, RecursionError) as err:
        raise StoreError(f"{path} cannot be read: {err}; delete it and run the same simulate call again, which makes it anew") from err
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of a store; expected format {FORMAT!r}")
    if values.get("schema") != SCHEMA:
        made = values.get("package_version")
        raise StoreError(f"{path} has schema {values.get('schema')}, written by sbi_phys {made}; expected {SCHEMA}: update sbi_phys")
    n = values.get("n")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise StoreError(f"{path} has n = {n!r:.100}; expected the number of rows asked for")
    header = Header.from_plain(values, str(path))
    advice = "; delete it and run the same simulate call again, which makes it anew"
    require_seal(values, str(path), unsealed=(*_FIELDS, *Header.__slots__), error=StoreError, advice=advice)
    if n > header.shard_size * _MOST_SHARDS:
        raise StoreError(f"{path} has n = {n!r:.100}; expected at most {_MOST_SHARDS} shards of {header.shard_size} rows")
    code = values.get("code", [])
    if not isinstance(code, list) or not all(isinstance(c, dict) and isinstance(c.get("parts"), dict) for c in code):
        raise StoreError(f"{path} has code = {str(code)[:80]}; expected a list of fingerprints")
    return Manifest(header, n, str(values.get("theta_sha256", "")), tuple(code))


def read_shard(folder: Path, manifest: Manifest, index: int) -> ShardData:
    """Check that a shard belongs to a store and is undamaged -> its rows.   Raises: StoreError."""
    path, rows = folder / shard_name(index), manifest.rows(index)
    with open_intact(path, manifest.header, index, rows) as file:
        return read_arrays(file, path, manifest.header, rows)


@dataclass(frozen=True, slots=True)
class Plan:
    """Work of a simulate call: the manifest, which is on disk, the shards of the call, and those that are to be made."""

    manifest: Manifest
    shards: range
    todo: deque[int]


def shard_range(shards: range | str | int, n_shards: int) -> range:
    """Return the shards of a range, '0:64' (the last not included), '7', or '3/100' (the fourth of a hundred equal parts).

    Raises: SettingError for another form, for none, and for shards past the end.
    """
    match = _RANGE.match(shards.strip()) if isinstance(shards, str) else None
    if isinstance(shards, range) and shards.step == 1:
        start, stop = shards.start, shards.stop
    elif isinstance(shards, int) and not isinstance(shards, bool):
        start, stop = shards, shards + 1
    elif match is None:
        raise SettingError(
            f"shards is {shards!r}; expected a range, 'START:STOP' such as '0:64', one number, or 'PART/PARTS' such as '3/100'"
        )
    elif match[2] == "/":
        part, parts = int(match[1]), int(match[3])
        if part >= parts:
            raise SettingError(f"shards is {shards!r}; expected parts that count from 0, below {parts}")
        start, stop = part * n_shards // parts, (part + 1) * n_shards // parts
    else:
        start = int(match[1])
        stop = start + 1 if match[3] is None else int(match[3])
    if start >= stop:
        raise SettingError(f"shards {shards!r} names none of the {n_shards} shards; expected START below STOP, or fewer parts")
    if start < 0 or stop > n_shards:
        raise SettingError(f"shards {shards!r} runs past the end; expected within 0:{n_shards}, as the store has {n_shards} shards")
    return range(start, stop)


def existing_header(folder: Path) -> Header | None:
    """Return the header of the store in a folder, None if there is no store.   Raises: StoreError."""
    if (folder / MANIFEST).exists():
        return read_manifest(folder).header
    shards = list_shards(folder)
    if not shards:
        return None
    path = folder / shard_name(shards[0])
    with open_shard(path) as file:
        return read_facts(file, path)[0]


def plan_store(
    folder: Path,
    header: Header,
    n: int,
    given: Array | None,
    shards: range | str | int | None = None,
    *,
    code: dict[str, Any] | None = None,
    accept_code_change: bool = False,
) -> Plan:
    """Compare the folder with what is asked for, and write the manifest.

    Args: code: fingerprint of the simulator; accept_code_change: whether rows of other code may be in the store.
    Raises: StoreError for a shard of other settings or one that cannot be read, and for other code; SettingError for a wrong range.
    """
    before = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if before is not None:
        header.require_equal(before.header, str(folder / MANIFEST))
    codes = _codes(folder, before, code, accept_code_change)
    sha256 = "" if given is None else hashlib.sha256(np.ascontiguousarray(given, dtype="<f8").tobytes()).hexdigest()
    if shards is not None and before is not None:
        _require_joinable(folder, before, n, sha256)
        # shards of other jobs are not read; the last shard may have to grow
        mine = {*shard_range(shards, Manifest(header, max(n, before.n)).n_shards), before.n_shards - 1}
    else:
        mine = None
    there = [i for i in list_shards(folder) if mine is None or i in mine]
    digest = header.digest()
    rows = {index: _rows_there(folder / shard_name(index), header, digest, index, given) for index in there}
    last = max(rows, default=-1)
    n_there = last * header.shard_size + rows[last] if rows else 0
    if given is not None and n_there > n:
        raise StoreError(f"{folder} holds {n_there} rows; expected at most the {n} rows of theta")
    manifest = Manifest(header, max(n, n_there, 0 if mine is None or before is None else before.n), sha256, codes)
    chosen = range(manifest.n_shards) if shards is None else shard_range(shards, manifest.n_shards)
    for index, got in rows.items():
        if got != manifest.rows(index):
            (folder / shard_name(index)).unlink()  # a short last shard; removed before the manifest is written, so that no reader finds it
    if manifest != before:
        write_manifest(folder, manifest)
    return Plan(manifest, chosen, deque(i for i in chosen if rows.get(i) != manifest.rows(i)))


def _codes(folder: Path, before: Manifest | None, code: dict[str, Any] | None, accept: bool) -> tuple[dict[str, Any], ...]:
    """Return the fingerprints of the store's code with that of this call.   Raises: StoreError if it differs and is not accepted."""
    known = () if before is None else before.code
    if code is None:
        return known
    if not known:
        return (code if before is None else {**code, "note": "rows of before were made when stores did not keep the code"},)
    if what := fingerprint_difference(known[-1], code):
        if not accept:
            raise StoreError(
                f"{folder} was made with other code of the simulator: {what}; expected the same code, since a store must not mix the two. "
                "Simulate into another folder, or, if the change does not alter the simulations, accept it: accept_code_change=True "
                "(command line: --accept-code-change)"
            )
        return (*known, code)
    return known


def join_codes(folders: Sequence[Path], manifests: Sequence[Manifest], accept: bool) -> tuple[dict[str, Any], ...]:
    """Return the fingerprints of several stores, each once.   Raises: StoreError if their last ones differ and this is not accepted."""
    found: dict[str, dict[str, Any]] = {}
    last: tuple[Path, dict[str, Any]] | None = None
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.code:
            if last is not None and not accept and (what := fingerprint_difference(last[1], manifest.code[-1])):
                raise StoreError(
                    f"{folder} was made with other code of the simulator than {last[0]}: {what}; expected the same code, or "
                    "accept_code_change=True (command line: --accept-code-change) if the change does not alter the simulations"
                )
            last = last or (folder, manifest.code[-1])
            found |= {str(c.get("sha256")): c for c in manifest.code if str(c.get("sha256")) not in found}
    return tuple(found.values())


def _require_joinable(folder: Path, before: Manifest, n: int, sha256: str) -> None:
    """Raise StoreError unless an array job may join the store: same theta, and not more rows while other jobs run."""
    if before.theta_sha256 != sha256:
        raise StoreError(f"{folder} was made at other theta; expected the same theta in every array job of a store")
    if n > before.n and (jobs := array_jobs(folder)):
        shards, holder = jobs[0]
        raise StoreError(
            f"{folder} has {before.n} rows to make, and array jobs are running ({holder}, shards {shards.start}:{shards.stop}); "
            f"expected the same n in all of them, got {n}"
        )


def _rows_there(path: Path, header: Header, digest: str, index: int, given: Array | None) -> int:
    """Check that a shard belongs to the store -> its rows.   Raises: StoreError."""
    label = read_label(path)
    if given is None and label is not None and (label.header, label.shard) == (digest, index) and label.rows <= header.shard_size:
        return label.rows
    with open_shard(path) as file:
        got, facts = read_facts(file, path)
        header.require_equal(got, str(path))
        rows = int(facts["rows"])
        if facts["shard"] != index or not 1 <= rows <= header.shard_size:
            raise StoreError(
                f"{path} holds shard {facts['shard']} with {rows} rows; expected shard {index}, at most {header.shard_size} rows"
            )
        if given is not None:
            first = index * header.shard_size
            mine = given[first : first + rows]
            if not np.array_equal(file["theta"][: mine.shape[0]], mine):
                raise StoreError(f"{path} was made at other theta; expected rows {first} to {first + rows} of the theta that is given")
        return rows
