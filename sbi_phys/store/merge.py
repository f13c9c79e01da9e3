"""Several stores of one simulator and prior as one: shards of one campaign made in several places, or campaigns with other seeds.

Of the *same* campaign (equal headers), shards are copied under their own numbers: what is missing in all of them stays
missing, and the same simulate call makes it. Of *different* campaigns (other seeds), rows are laid end to end in the order
of the stores and cut into new shards; such a store says so in `origin`, and simulate does not continue it. Every shard is
verified on the way. Rows that two stores share are refused: they would count twice in everything that is learned.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import SettingError, StoreError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.store.manifest import Manifest, list_shards, read_manifest, write_manifest
from sbi_phys.store.shards import Header, shard_name, verify_shard
from sbi_phys.store.writer import Folder, StoreWriter, read_shard, require_complete

__all__ = ["merge_stores"]


def merge_stores(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    shard_size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make one new store at `out` from several; it appears whole or not at all, and the sources stay as they are.

    Args: paths, at least two; out, a folder that is not there yet; shard_size of the result, default that of the first
    (stores of the same campaign keep theirs).
    Raises: SettingError; StoreError where stores differ in simulator, prior, observables, dtype or layout, where one is
    damaged (or incomplete, with different seeds), where two share a shard or rows, or `out` exists.
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
    if all(m.header == first for m in manifests) and not first.origin:
        if shard_size is not None and shard_size != first.shard_size:
            raise SettingError(f"shard_size is {shard_size}; expected {first.shard_size}, as the stores are of one campaign (or None)")
        _same_campaign(folders, manifests, Path(out), progress)
    else:
        size = first.shard_size if shard_size is None else require_int("shard_size", shard_size, low=1)
        _other_seeds(folders, manifests, Path(out), size, progress)
    return Path(out)


def _same_campaign(folders: list[Path], manifests: list[Manifest], out: Path, progress: Progress | None) -> None:
    hashes = {m.theta_sha256 for m in manifests}
    if len(hashes) > 1:
        raise StoreError(f"{folders[0]} and the others were made at different given theta; expected the same theta, or other seeds")
    total = max(manifests, key=lambda m: m.n)
    taken: dict[int, Path] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        for index in list_shards(folder):
            # a last shard that was short when its store was is made anew, as simulate itself does when a store grows
            if not manifest.rows(index) or manifest.rows(index) != total.rows(index):
                continue
            if index in taken:
                raise StoreError(
                    f"{folder} and {taken[index]} both hold {shard_name(index)}; expected every shard once: remove one of the two"
                )
            taken[index] = folder
    if not taken:
        raise StoreError(f"none of {[str(f) for f in folders]} has a shard; expected some")
    with Folder(out) as made, or_none(progress).task("merge", len(taken)) as task:
        for index, folder in sorted(taken.items()):
            target = made.aside / shard_name(index)
            _copy(folder / shard_name(index), target)
            verify_shard(target, total.header, index, total.rows(index))
            task.advance(1)
        write_manifest(made.aside, total)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as err:
        raise StoreError(f"{source} can not be copied to {target}: {err.strerror}; the sources are intact") from err


def _other_seeds(folders: list[Path], manifests: list[Manifest], out: Path, size: int, progress: Progress | None) -> None:
    drawn = all(m.header.theta in ("prior", "merged", "split") for m in manifests)
    sources = [_source(m.header, m.n) for m in manifests]
    theta = "merged" if drawn else "merged given"
    header = replace(manifests[0].header, shard_size=size, theta=theta, origin={"kind": "merged", "sources": sources})
    seen: dict[bytes, Path] = {}
    with StoreWriter(out, header) as writer, or_none(progress).task("merge", sum(m.n_shards for m in manifests)) as task:
        for folder, manifest in zip(folders, manifests, strict=True):
            for index in require_complete(folder, manifest):
                path = folder / shard_name(index)
                verify_shard(path, manifest.header, index, manifest.rows(index))
                data = read_shard(folder, manifest, index)
                # a shard that was cut otherwise still begins with the same theta, though its x may be other draws; theta that
                # were given may well be the same in both
                key = data.theta[0].tobytes() + (b"" if drawn else data.x[0].tobytes())
                if key in seen:
                    raise StoreError(f"{path} has rows that are in {seen[key]} too; expected stores made with different seeds")
                seen[key] = path
                writer.add(data)
                task.advance(1)


def _source(header: Header, n: int) -> dict[str, Any]:
    return {"seed": header.seed, "rows": n, "theta": header.theta} | ({"origin": header.origin} if header.origin else {})
