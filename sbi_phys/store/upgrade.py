"""Stores of older schemas: they are read as they are, and may be brought to the present schema in place.

Schema 1 had one checksum over everything in a file; schema 2 has one for each dataset, says which commit made it, and
knows layouts (sbi_phys.store.layout). `repack` writes a store anew with another layout: compression, chunks, dtypes, shapes.
"""

import os
from dataclasses import replace
from pathlib import Path

from sbi_phys.core.progress import Progress, or_none
from sbi_phys.store.layout import Layout
from sbi_phys.store.manifest import StoreLock, list_shards, read_manifest, write_manifest
from sbi_phys.store.shards import SCHEMA, open_shard, shard_name, verify_shard, write_shard
from sbi_phys.store.writer import StoreWriter, read_shard, require_complete

__all__ = ["repack_store", "upgrade_store"]


def upgrade_store(path: str | os.PathLike[str], *, progress: Progress | None = None) -> int:
    """Rewrite the shards of an older schema, one after the other, and return how many there were.

    Each is verified, written aside and renamed; a kill in between leaves a store of both schemas, which is read as well as
    any, and the same call goes on. Rows do not change.   Raises: StoreError for a damaged shard (repair first), or a locked store.
    """
    folder, count = Path(path), 0
    manifest = read_manifest(folder)
    with StoreLock(folder):
        indices = [i for i in list_shards(folder) if i < manifest.n_shards]
        with or_none(progress).task("upgrade", len(indices)) as task:
            for index in indices:
                file = folder / shard_name(index)
                with open_shard(file) as shard:
                    old = int(shard.attrs["schema"]) < SCHEMA
                if old:
                    verify_shard(file, manifest.header, index, manifest.rows(index))
                    write_shard(file, manifest.header, index, read_shard(folder, manifest, index))
                    count += 1
                task.advance(1)
        write_manifest(folder, manifest)
    return count


def repack_store(
    path: str | os.PathLike[str], out: str | os.PathLike[str], layout: Layout, *, dtype: str | None = None, progress: Progress | None = None
) -> Path:
    """Write all rows of a store to a new one with another layout (and dtype of x).

    simulate continues neither, as its own stores have no layout; keep the original for that.
    Raises: StoreError, SettingError for a layout that does not fit, DataError for a number that a narrower dtype can not hold.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    header = replace(manifest.header, layout=layout.plain(), dtype=dtype or manifest.header.dtype)
    with StoreWriter(out, header) as writer, or_none(progress).task("repack", manifest.n_shards) as task:
        for index in require_complete(folder, manifest):
            writer.add(read_shard(folder, manifest, index))
            task.advance(1)
    return Path(out)
