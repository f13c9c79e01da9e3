"""New stores from existing ones: merged, some rows, a random split, or another layout.

Stores of the *same* campaign (equal headers) are merged shard by shard: what is missing in all of them stays missing, and the
same simulate call makes it. Of stores with *different* seeds, the rows follow each other in the order of the stores and are cut
into new shards; `origin` records this, and simulate does not continue such a store. Every shard is verified. Rows that are in two
stores are refused, because they would count twice.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import require_int, require_known, require_number
from sbi_phys.core.errors import DataError, SettingError, StoreError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.store._writer import Folder, StoreWriter, require_complete, take_rows
from sbi_phys.store.layout import Layout
from sbi_phys.store.manifest import Manifest, join_codes, list_shards, read_manifest, read_shard, write_manifest
from sbi_phys.store.shards import Header, shard_name, verify_shard

__all__ = ["merge_stores", "repack_store", "split_store", "subset_store"]


def merge_stores(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    shard_size: int | None = None,
    accept_code_change: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the rows of several stores to one new store -> its path; the sources stay as they are.

    Args: paths: at least two stores. out: a folder that does not exist yet. shard_size: of the new store, default that of the
    first (stores of the same campaign keep theirs). accept_code_change: merge rows of different code of the simulator.
    Raises: SettingError; StoreError where stores differ in simulator, its code, prior, observables, dtype or layout, where one is
    damaged (or incomplete, with different seeds), where two share a shard or rows, or `out` exists.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10, unit="EeV")])
    >>> for name, rows in (("a", slice(0, 25)), ("b", slice(25, 50))):
    ...     np.savez(name, energy=np.linspace(1, 9, 50)[rows], signal=np.arange(50.0)[rows])
    ...     _ = sp.store.import_store(f"{name}.npz", name, prior=prior, observables=[sp.Observable("signal", 1)])
    >>> sp.Store(sp.store.merge_stores(["a", "b"], "both")).n_rows
    50
    """
    folders = [Path(p) for p in paths]
    if len(folders) < 2:
        raise SettingError(f"merge got {len(folders)} stores; expected at least two")
    if len({f.resolve() for f in folders}) < len(folders):
        raise SettingError(f"merge got a store twice: {[str(f) for f in folders]}; expected every store once")
    manifests = [read_manifest(f) for f in folders]
    first = manifests[0].header
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        other = manifest.header
        shared = replace(first, seed=other.seed, shard_size=other.shard_size, theta=other.theta, origin=other.origin)
        shared.require_equal(other, f"{folder}, to be merged with {folders[0]},")
    code = join_codes(folders, manifests, accept_code_change)
    if all(m.header == first for m in manifests) and not first.origin:
        if shard_size is not None and shard_size != first.shard_size:
            raise SettingError(f"shard_size is {shard_size}; expected {first.shard_size}, as the stores are of one campaign (or None)")
        _same_campaign(folders, manifests, Path(out), code, progress)
    else:
        size = first.shard_size if shard_size is None else require_int("shard_size", shard_size, low=1)
        _other_seeds(folders, manifests, Path(out), size, code, progress)
    return Path(out)


Codes = tuple[dict[str, Any], ...]


def _same_campaign(folders: list[Path], manifests: list[Manifest], out: Path, code: Codes, progress: Progress | None) -> None:
    hashes = {m.theta_sha256 for m in manifests}
    if len(hashes) > 1:
        raise StoreError(f"{folders[0]} and the others were made at different given theta; expected the same theta, or other seeds")
    total = max(manifests, key=lambda m: m.n)
    taken: dict[int, Path] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        for index in list_shards(folder):
            # a short last shard of a shorter store is made again by simulate, as when a store grows
            if not manifest.rows(index) or manifest.rows(index) != total.rows(index):
                continue
            if index in taken:
                raise StoreError(
                    f"{folder} and {taken[index]} both hold {shard_name(index)}; expected every shard once: remove one of the two"
                )
            taken[index] = folder
    if not taken:
        raise StoreError(f"none of {[str(f) for f in folders]} has a shard; expected at least one")
    with Folder(out) as made, or_none(progress).task("merge", len(taken)) as task:
        for index, folder in sorted(taken.items()):
            target = made.aside / shard_name(index)
            _copy(folder / shard_name(index), target)
            verify_shard(target, total.header, index, total.rows(index))
            task.advance(1)
        write_manifest(made.aside, replace(total, code=code))


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as err:
        raise StoreError(f"{source} cannot be copied to {target}: {err.strerror}; the sources are intact") from err


def _other_seeds(folders: list[Path], manifests: list[Manifest], out: Path, size: int, code: Codes, progress: Progress | None) -> None:
    drawn = all(m.header.theta in ("prior", "merged", "split") for m in manifests)
    sources = [_source(m.header, m.n) for m in manifests]
    theta = "merged" if drawn else "merged given"
    header = replace(manifests[0].header, shard_size=size, theta=theta, origin={"kind": "merged", "sources": sources})
    seen: dict[bytes, Path] = {}
    with StoreWriter(out, header, code) as writer, or_none(progress).task("merge", sum(m.n_shards for m in manifests)) as task:
        for folder, manifest in zip(folders, manifests, strict=True):
            for index in require_complete(folder, manifest):
                path = folder / shard_name(index)
                verify_shard(path, manifest.header, index, manifest.rows(index))
                data = read_shard(folder, manifest, index)
                # shards of another size begin with the same theta, though their x may be other draws; given theta may be
                # the same in both stores
                key = data.theta[0].tobytes() + (b"" if drawn else data.x[0].tobytes())
                if key in seen:
                    raise StoreError(f"{path} has rows that are in {seen[key]} too; expected stores made with different seeds")
                seen[key] = path
                writer.add(data)
                task.advance(1)


def _source(header: Header, n: int) -> dict[str, Any]:
    return {"seed": header.seed, "rows": n, "theta": header.theta} | ({"origin": header.origin} if header.origin else {})


def subset_store(
    folder: Path,
    path: str | os.PathLike[str],
    *,
    rows: ArrayLike | None = None,
    where: Mapping[str, tuple[float, float]] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write some rows to a new store -> its path; see `Store.subset`."""
    manifest = read_manifest(folder)
    if rows is None and not where:
        raise SettingError("subset got neither rows nor where; expected row numbers, a mask, or {parameter: (low, high)}")
    wanted = np.ones(manifest.n, dtype=bool) if rows is None else _mask(rows, manifest.n)
    inside = _ranges(manifest, where or {})
    origin: dict[str, Any] = {
        "kind": "subset",
        "of_rows": manifest.n,
        "where": {k: [float(a), float(b)] for k, (a, b) in (where or {}).items()},
    }
    if rows is not None:
        origin["rows_sha256"] = hashlib.sha256(np.packbits(wanted).tobytes()).hexdigest()
    _write_parts(folder, manifest, [path], [origin], wanted.astype(np.int8) - 1, inside, progress)
    return Path(path)


def split_store(
    folder: Path,
    paths: Sequence[str | os.PathLike[str]],
    fractions: Sequence[float],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write disjoint random parts of a store to new stores -> their paths; see `Store.split`."""
    manifest = read_manifest(folder)
    shares = [require_number(f"fractions[{i}]", f, low=0, high=1, open_low=True) for i, f in enumerate(fractions)]
    if len(shares) != len(paths) or not shares or len(shares) > 127 or sum(shares) > 1 + 1e-9:
        raise SettingError(f"fractions are {list(fractions)} for {len(paths)} paths; expected one each, at most 127, that sum to at most 1")
    if len({os.path.abspath(p) for p in paths}) < len(paths):
        raise SettingError(f"paths are {[str(p) for p in paths]}; expected a folder for each part")
    ends = [round(manifest.n * share) for share in np.cumsum(shares)]
    if min(np.diff([0, *ends])) < 1:
        raise DataError(f"{manifest.n} rows leave a part of {shares} empty; expected at least one row in each")
    order = rng_for(seed, "store split").permutation(manifest.n)
    part = np.full(manifest.n, -1, dtype=np.int8)
    for k, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        part[order[a:b]] = k
    origins = [{"kind": "split", "of_rows": manifest.n, "fractions": shares, "part": k, "split_seed": seed} for k in range(len(shares))]
    _write_parts(folder, manifest, paths, origins, part, lambda theta: np.ones(len(theta), dtype=bool), progress)
    return [Path(p) for p in paths]


def _write_parts(
    folder: Path,
    manifest: Manifest,
    paths: Sequence[str | os.PathLike[str]],
    origins: Sequence[dict[str, Any]],
    part: NDArray[np.int8],
    inside: Callable[[Array], Mask],
    progress: Progress | None,
) -> None:
    """Read every shard that is needed once, and write each row to the store that `part` names (-1: to none)."""
    size, kind = manifest.header.shard_size, "split" if len(paths) > 1 else origins[0]["kind"]
    with ExitStack() as stack:
        writers = []
        for path, origin in zip(paths, origins, strict=True):
            history = {"from": manifest.header.origin} if manifest.header.origin else {}
            header = replace(manifest.header, theta=_theta(manifest.header.theta, kind, origin), origin=origin | history)
            writers.append(stack.enter_context(StoreWriter(path, header, manifest.code)))
        with or_none(progress).task(kind, manifest.n_shards) as task:
            for index in require_complete(folder, manifest):
                mine = part[index * size : (index + 1) * size]
                if (mine >= 0).any():
                    data = read_shard(folder, manifest, index)
                    ok = inside(data.theta)
                    for k, writer in enumerate(writers):
                        rows = np.flatnonzero((mine == k) & ok)
                        if rows.size:
                            writer.add(take_rows(data, rows))
                task.advance(1)


def _theta(before: str, kind: str, origin: Mapping[str, Any]) -> str:
    """Return the kind of theta: random parts are still draws from the prior, chosen rows are not."""
    random = kind == "split" and before in ("prior", "merged", "split")
    return "split" if random else "subset"


def _mask(rows: ArrayLike, n: int) -> Mask:
    array = np.asarray(rows)
    if array.dtype == bool:
        if array.shape != (n,):
            raise SettingError(f"rows is a mask of shape {array.shape}; expected ({n},), one for each row")
        return array
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        raise SettingError(f"rows has shape {array.shape} and dtype {array.dtype}; expected row numbers (m,) or a mask ({n},)")
    if array.min() < 0 or array.max() >= n:
        raise SettingError(f"rows run from {array.min()} to {array.max()}; expected 0 to {n - 1}")
    mask = np.zeros(n, dtype=bool)
    mask[array] = True
    if np.count_nonzero(mask) < array.size:
        raise SettingError(f"rows names {array.size - np.count_nonzero(mask)} rows twice; expected every row once")
    return mask


def _ranges(manifest: Manifest, where: Mapping[str, tuple[float, float]]) -> Callable[[Array], Mask]:
    names = [p["name"] for p in manifest.header.parameters]
    require_known("where", where, names)
    bounds = []
    for name, ends in where.items():
        if not isinstance(ends, tuple | list) or len(ends) != 2 or not float(ends[0]) <= float(ends[1]):
            raise SettingError(f"where[{name!r}] is {ends!r}; expected (low, high)")
        bounds.append((names.index(name), float(ends[0]), float(ends[1])))

    def inside(theta: Array) -> Mask:
        ok = np.ones(len(theta), dtype=bool)
        for column, low, high in bounds:
            ok &= (theta[:, column] >= low) & (theta[:, column] <= high)
        return ok

    return inside


def repack_store(
    path: str | os.PathLike[str], out: str | os.PathLike[str], layout: Layout, *, dtype: str | None = None, progress: Progress | None = None
) -> Path:
    """Write all rows of a store to a new store with another layout, and dtype of x if given -> its path.

    `simulate` continues the original store, not the new one.
    Raises: StoreError, SettingError for a layout that does not fit, DataError for a number that a narrower dtype cannot hold.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10, unit="EeV")])
    >>> store = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> small = sp.Store(sp.store.repack_store(store, "small", sp.Layout(compression="lzf")))
    >>> small.layout.compression, small.n_rows
    ('lzf', 50)
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    header = replace(manifest.header, layout=layout.plain(), dtype=dtype or manifest.header.dtype)
    with StoreWriter(out, header, manifest.code) as writer, or_none(progress).task("repack", manifest.n_shards) as task:
        for index in require_complete(folder, manifest):
            writer.add(read_shard(folder, manifest, index))
            task.advance(1)
    return Path(out)
