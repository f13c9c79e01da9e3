"""Some rows of a store as a new store: by number, by parameter range, or a random split into disjoint parts."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import require_known, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.store.manifest import Manifest, read_manifest
from sbi_phys.store.writer import StoreWriter, read_shard, require_complete, take_rows

__all__ = ["split_store", "subset_store"]


def subset_store(
    folder: Path,
    path: str | os.PathLike[str],
    *,
    rows: ArrayLike | None = None,
    where: Mapping[str, tuple[float, float]] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the rows with these numbers, and with theta within these ranges, to a new store; see `Store.subset`."""
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
    """Write disjoint random parts of a store to new stores; see `Store.split`."""
    manifest = read_manifest(folder)
    shares = [require_number(f"fractions[{i}]", f, low=0, high=1, open_low=True) for i, f in enumerate(fractions)]
    if len(shares) != len(paths) or not shares or len(shares) > 127 or sum(shares) > 1 + 1e-9:
        raise SettingError(f"fractions are {list(fractions)} for {len(paths)} paths; expected one each, at most 127, that sum to at most 1")
    if len({os.path.abspath(p) for p in paths}) < len(paths):
        raise SettingError(f"paths are {[str(p) for p in paths]}; expected every part in a folder of its own")
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
    """Read every shard that is needed once, and give each row to the store that `part` names (-1: to none)."""
    size, kind = manifest.header.shard_size, "split" if len(paths) > 1 else origins[0]["kind"]
    with ExitStack() as stack:
        writers = []
        for path, origin in zip(paths, origins, strict=True):
            history = {"from": manifest.header.origin} if manifest.header.origin else {}
            header = replace(manifest.header, theta=_theta(manifest.header.theta, kind, origin), origin=origin | history)
            writers.append(stack.enter_context(StoreWriter(path, header)))
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
    """Random parts are still draws from the prior; chosen ones are not."""
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
