"""Check of a store, file by file, and repair without the loss of a good row.

`check_store` reads every file once and compares it with the checksums. `repair_store` moves broken files into a subfolder
`broken`; the same `simulate` call then makes these shards again, with the same bytes.
"""

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sbi_phys.core.errors import StoreError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.results import Result, Rows
from sbi_phys.store._encoding import MARK, read_ahead
from sbi_phys.store.locks import StoreLock, is_lock_file
from sbi_phys.store.manifest import MANIFEST, Manifest, list_shards, read_manifest, remove_litter, write_manifest
from sbi_phys.store.shards import open_shard, read_facts, shard_name, verify_shard

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Check", "Finding", "Repair", "check_store", "ranges_text", "repair_store"]

BROKEN = "broken"
_HDF5 = b"\x89HDF\r\n\x1a\n"
# words in a message of `verify_shard` and the kind of finding that they mean; the first match counts
_KINDS = (
    ("is missing", "missing"),
    ("lies past the end", "surplus"),
    ("is not a shard", "foreign"),
    ("was made with another", "foreign"),
    ("holds shard", "misplaced"),
    ("has schema", "schema"),
    ("is damaged", "damaged"),
    ("cannot be read", "truncated"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of a store.

    Fields: kind: 'missing', 'truncated', 'damaged', 'foreign' (of another store, or not a shard), 'misplaced' (another number),
    'duplicate' (same rows as another shard), 'surplus' (past the end) or 'schema' (another version); file: its name;
    shard: its number; what: a sentence.

    >>> import sbi_phys as sp
    >>> sp.store.Finding("missing", "shard-00003.h5", 3, "shard-00003.h5 is missing").kind
    'missing'
    """

    kind: str
    file: str
    shard: int
    what: str


@dataclass(frozen=True, slots=True)
class Check(Result):
    """Result of `check_store`.

    Fields: findings; n_shards of the finished store; n_whole, shards without a fault; n_bytes read; seconds; strays, files in
    the folder that do not belong to the store (no fault).

    >>> import sbi_phys as sp
    >>> check = sp.store.Check((), n_shards=8, n_whole=8, n_bytes=10**6, seconds=0.1, strays=())
    >>> check.ok, check.summary()
    (True, '8 of 8 shards are intact (10 MB/s)')
    """

    findings: tuple[Finding, ...]
    n_shards: int
    n_whole: int
    n_bytes: int
    seconds: float
    strays: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not self.findings

    def rows(self) -> Rows:
        """Return the table: one row for each finding."""
        names = ("kind", "file", "shard", "what")
        return Rows(names, tuple(tuple(getattr(f, name) for name in names) for f in self.findings))

    def summary(self) -> str:
        """One line for each finding, then one line of totals."""
        lines = [f"{f.kind:<10} {f.file}: {f.what}" for f in self.findings]
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(f.kind for f in self.findings).items()))
        rate = self.n_bytes / max(self.seconds, 1e-9) / 1e6
        lines.append(f"{self.n_whole} of {self.n_shards} shards are intact{'; ' + kinds if kinds else ''} ({rate:.0f} MB/s)")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the number of intact shards, and of findings of each kind."""
        return figures.results.bars({"intact": self.n_whole} | dict(Counter(f.kind for f in self.findings)), ax, xlabel="shards")


@dataclass(frozen=True, slots=True)
class Repair:
    """Result of `repair_store`: moved, the files now in the folder `broken`; to_make, shards for simulate to make; notes.

    >>> import sbi_phys as sp
    >>> sp.store.Repair(moved=("broken/shard-00003.h5",), to_make=(3,), notes=()).to_make
    (3,)
    """

    moved: tuple[str, ...]
    to_make: tuple[int, ...]
    notes: tuple[str, ...]


def check_store(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Check:
    """Read every file of a store and compare it with the manifest and the checksums, also while another process writes.

    Raises: StoreError if the folder is missing or its manifest cannot be read (`repair_store` rebuilds it).

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10)])
    >>> store = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> sp.store.check_store(store).ok
    True
    """
    folder, start = Path(path), time.perf_counter()
    manifest = read_manifest(folder)
    present = list_shards(folder)
    findings, seen, size = [], dict[str, int](), 0
    with or_none(progress).task("verify", manifest.n_shards) as task:
        for index in sorted({*range(manifest.n_shards), *present}):
            file = folder / shard_name(index)
            read_ahead(folder / shard_name(index + 1))  # the disk reads the next file while this one is checked
            found = _check_shard(file, manifest, index, seen)
            size += file.stat().st_size if file.exists() else 0
            if found is not None:
                findings.append(found)
            task.advance(1, f"{len(findings)} found" if findings else "")
    bad = sum(f.shard < manifest.n_shards for f in findings)
    known = {MANIFEST, ".index.json", ".cache", BROKEN, *map(shard_name, present)}
    strays = tuple(sorted(name for name in os.listdir(folder) if name not in known and not is_lock_file(name)))
    return Check(tuple(findings), manifest.n_shards, manifest.n_shards - bad, size, time.perf_counter() - start, strays)


def _check_shard(path: Path, manifest: Manifest, index: int, seen: dict[str, int]) -> Finding | None:
    try:
        if index >= manifest.n_shards:
            raise StoreError(f"{path} lies past the end of the store ({manifest.n} rows, {manifest.n_shards} shards)")
        content = verify_shard(path, manifest.header, index, manifest.rows(index))
    except StoreError as err:
        return Finding(_kind(path, str(err)), path.name, index, str(err))
    first = seen.setdefault(content, index)
    if first != index:
        what = f"{path} holds the same rows as {shard_name(first)}; expected every row once"
        return Finding("duplicate", path.name, index, what)
    return None


def _kind(path: Path, what: str) -> str:
    kind = next((kind for text, kind in _KINDS if text in what), "damaged")
    if kind == "truncated" and not _is_hdf5(path):
        return "foreign"
    return kind


def _is_hdf5(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(len(MARK))
    except OSError:
        return False
    # an empty file, or one cut within its first bytes, counts as truncated too
    return start[:8] == _HDF5 or _HDF5.startswith(start) or MARK.startswith(start)


def repair_store(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Repair:
    """Move broken files aside and rebuild a damaged manifest, so that the same simulate call makes the missing shards.

    Good shards stay as they are; only unfinished temporary files are deleted. Files of another schema are left alone.
    Raises: StoreError if the folder is missing, is being written, or has neither a manifest nor a shard that can be read.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10)])
    >>> store = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)], shard_size=20)
    >>> _ = (store / "shard-00001.h5").write_bytes(b"")  # damage
    >>> sp.store.repair_store(store).to_make
    (1,)
    """
    folder, notes = Path(path), list[str]()
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; expected a store made by simulate")
    with StoreLock(folder):
        remove_litter(folder)
        moved = _repair_manifest(folder, notes)
        found = check_store(folder, progress=progress)
        for finding in found.findings:
            if finding.kind == "schema":
                notes.append(finding.what)
            elif finding.kind != "missing":
                moved.append(_move_aside(folder, finding.file))
        manifest, present = read_manifest(folder), set(list_shards(folder))
    return Repair(tuple(moved), tuple(i for i in range(manifest.n_shards) if i not in present), tuple(notes))


def _repair_manifest(folder: Path, notes: list[str]) -> list[str]:
    """Where store.json cannot be read, write it anew from the header that most shards have."""
    try:
        read_manifest(folder)
        return []
    except StoreError as err:
        if "has schema" in str(err):
            raise
        reason = str(err)
    headers, rows = [], dict[int, int]()
    for index in list_shards(folder):
        try:
            with open_shard(folder / shard_name(index)) as file:
                header, facts = read_facts(file, folder / shard_name(index))
        except StoreError:
            continue
        headers.append(header)
        rows[index] = int(facts["rows"]) if facts["shard"] == index else 0
    if not headers:
        raise StoreError(f"{folder} has neither a manifest nor a shard that can be read; expected one of them: {reason}")
    texts = [repr(header.plain()) for header in headers]
    header = headers[texts.index(Counter(texts).most_common(1)[0][0])]
    moved = [_move_aside(folder, MANIFEST)] if (folder / MANIFEST).exists() else []
    last = max(rows)
    manifest = Manifest(header, last * header.shard_size + max(rows[last], 1))
    write_manifest(folder, manifest)
    notes.append(f"{MANIFEST} was rebuilt from {len(headers)} shards for {manifest.n} rows ({reason})")
    return moved


def _move_aside(folder: Path, name: str) -> str:
    """Move a file into the folder `broken`, under a name that is not in use there."""
    try:
        (folder / BROKEN).mkdir(exist_ok=True)
        target, number = folder / BROKEN / name, 1
        while target.exists():
            target, number = folder / BROKEN / f"{name}.{number}", number + 1
        os.rename(folder / name, target)
    except OSError as err:
        raise StoreError(f"{folder / name} cannot be moved aside: {err.strerror}; expected a writable folder") from err
    return str(target.relative_to(folder))


def ranges_text(numbers: Sequence[int], most: int = 8) -> str:
    """Return numbers as ranges, '0-3, 7', at most `most` of them."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:most])
    return text + (f" and {len(runs) - most} more ranges" if len(runs) > most else "")
