"""Speed of simulation stores: writing compared with bare h5py, opening 10,000 shards, verifying compared with a plain read, compression.

    python benchmarks/store_speed.py [--rows 400000] [--shards 10000] [--folder DIR] [--out benchmarks/results/store_speed.json]

Both times of a ratio are measured alternately in the same run, and the shortest time of each counts, because other load on the
machine only lengthens times. "CPU" is processor time of this process, system calls included. Checksums
are zlib's, or isal's where that is installed (the same numbers, faster). Prints each number with its required value, writes
JSON and exits with 1 if a requirement is not met.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.suite.table import Numbers, Part, arguments, run
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.check import check_store
from sbi_phys.store.info import store_info
from sbi_phys.store.layout import Layout
from sbi_phys.store.manifest import Manifest, write_manifest
from sbi_phys.store.shards import Header, ShardData, shard_name, write_shard
from sbi_phys.store.store import Store

PRIOR = BoxPrior([Parameter("a", -3, 3), Parameter("b", -3, 3)])
COLUMNS = 20


class Nothing:
    """A simulator with negligible cost."""

    prior, parameters, settings = PRIOR, PRIOR.parameters, dict[str, Any]()
    observables = (Observable("x", COLUMNS),)

    def __init__(self) -> None:
        self._x = np.ones((65536, COLUMNS), dtype=np.float32)

    def simulate(self, theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows of ones."""
        return self._x[: len(theta)]


def header(rows: int, layout: Layout | None = None, dtype: str = "float32") -> Header:
    observables = [{"name": "x", "size": COLUMNS, "unit": "", "latex": "", "kind": "real", "edges": [], "edges_unit": ""}]
    simulator = {"class": "benchmarks.store_speed:Nothing", "settings": {}}
    return Header(simulator, PRIOR.to_dict(), observables, 0, rows, dtype, "prior", (layout or Layout()).plain())


def shard(rows: int, seed: int = 0) -> ShardData:
    rng = rng_for(seed, "rows")
    x = rng.standard_normal((rows, COLUMNS), dtype=np.float32)
    return ShardData(PRIOR.sample(rows, rng), x, np.zeros(rows, dtype=np.uint8), {})


def bare(path: Path, data: ShardData, sync: bool) -> None:
    """The same arrays by h5py alone."""
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for name in ("theta", "x", "status"):
            file.create_dataset(name, data=getattr(data, name))
    if sync:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def turns(n: int, *jobs: Callable[[], Any]) -> list[tuple[float, float]]:
    """Best wall and CPU seconds of each job, taken in turns."""
    best = [(np.inf, np.inf)] * len(jobs)
    for _ in range(n):
        for i, job in enumerate(jobs):
            wall, cpu = time.perf_counter(), time.process_time()
            job()
            best[i] = min(best[i][0], time.perf_counter() - wall), min(best[i][1], time.process_time() - cpu)
    return best


def writing(folder: Path, total: int) -> Numbers:
    """Rows a second of write_shard, synced and not, compared with bare h5py writing the same arrays to as many files."""
    numbers: Numbers = {}
    for rows in (4096, 65536):
        count, data, head = max(1, total // rows), shard(rows), header(rows)

        def write(ours: bool, synced: bool, count: int = count, data: ShardData = data, head: Header = head) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            sync = os.fsync
            os.fsync = sync if synced else lambda handle: None  # type: ignore[assignment]
            try:
                for i in range(count):
                    path = folder / shard_name(i)
                    write_shard(path, head, i, data) if ours else bare(path, data, synced)
            finally:
                os.fsync = sync

        found = turns(3, *(lambda a=a, b=b: write(a, b) for a in (True, False) for b in (True, False)))
        (ours, ours_cpu), (ours_free, free_cpu), (h5py_s, _), (h5py_free, h5py_cpu) = found
        n, name = count * rows, f"shards of {rows}"
        asked = rows > 4096
        numbers[f"{name}: rows/s"] = (n / ours, ">=" if asked else "", 2e6 if asked else None)
        numbers[f"{name}: rows/s a CPU second"] = (n / ours_cpu, "", None)
        numbers[f"{name}: times bare h5py, both synced"] = (ours / h5py_s, "<=", 2.0)
        numbers[f"{name}: times bare h5py, neither synced"] = (ours_free / h5py_free, "<=" if asked else "", 2.0 if asked else None)
        numbers[f"{name}: times bare h5py, neither synced, CPU"] = (free_cpu / h5py_cpu, "", None)
        numbers[f"{name}: ms a shard for fsync"] = (1e3 * (ours - ours_free) / count, "", None)
    return numbers


def campaign(folder: Path, total: int) -> Numbers:
    """Rows a second of a whole `simulate` call with a simulator of negligible cost: theta drawn, x checked, all of it written."""
    numbers: Numbers = {}
    for rows in (4096, 65536):
        n = max(1, total // rows) * rows

        def go(rows: int = rows, n: int = n) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            simulate(Nothing(), n, folder, workers=1, shard_size=rows)

        ((wall, cpu),) = turns(3, go)
        numbers[f"simulate, no-op, shards of {rows}: rows/s"] = (n / wall, ">=" if rows > 4096 else "", 2e6 if rows > 4096 else None)
        numbers[f"simulate, no-op, shards of {rows}: rows/s a CPU second"] = (n / cpu, "", None)
    return numbers


def opening(folder: Path, n_shards: int) -> Numbers:
    """Seconds until rows, gaps and failures of a store of many shards are known, at first and with its index."""
    head, data = header(8), shard(8)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_shard(folder / shard_name(0), head, 0, data)
    for i in range(1, n_shards):
        shutil.copyfile(folder / shard_name(0), folder / shard_name(i))
    write_manifest(folder, Manifest(head, 8 * n_shards))

    def look() -> None:
        store = Store(folder)
        assert (store.n_ok, store.complete) == (8 * n_shards, True)

    start = time.perf_counter()
    look()
    first = time.perf_counter() - start
    (wall, _), (info, _) = turns(3, look, lambda: store_info(folder))
    name = f"{n_shards} shards"
    return {
        f"{name}: open and count, s": (wall, "<=", 1.0),
        f"{name}: store info, s": (info, "", None),
        f"{name}: the very first count, without an index, s": (first, "<=", 1.0),
    }


def verifying(folder: Path, total: int) -> Numbers:
    """MB/s of check_store and of reading the same files completely: from the page cache, and from the disk after dropping it."""
    numbers: Numbers = {}
    for rows in (4096, 65536):
        count, name = max(1, total // rows), f"verify, shards of {rows}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for i in range(count):
            write_shard(folder / shard_name(i), header(rows), i, shard(rows, seed=i))
        write_manifest(folder, Manifest(header(rows), count * rows))
        size = sum(p.stat().st_size for p in folder.glob("shard-*"))

        def check() -> None:
            assert check_store(folder).ok

        def plain() -> None:
            for path in folder.glob("shard-*"):
                path.read_bytes()

        def forget() -> None:
            for path in folder.glob("shard-*"):
                handle = os.open(path, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)

        (wall, cpu), (read, _) = turns(3, check, plain)
        _, (cold, _), _, (cold_read, _) = turns(6, forget, check, forget, plain)
        numbers[f"{name}: MB/s"] = (size / wall / 1e6, ">=", 500.0)
        numbers[f"{name}: MB a CPU second"] = (size / cpu / 1e6, "", None)
        numbers[f"{name}: plain read of the same files from memory, MB/s"] = (size / read / 1e6, "", None)
        numbers[f"{name}: from the disk, MB/s"] = (size / cold / 1e6, "", None)
        numbers[f"{name}: from the disk, times a plain read"] = (cold / cold_read, "<=", 1.5)
    return numbers


def compressing(folder: Path) -> Numbers:
    """Bytes a row and rows/s written and read, for noise and for counts, by layout."""
    numbers: Numbers = {}
    rows = 65536
    kinds = {"noise": shard(rows), "counts": shard(rows)}
    kinds["counts"] = replace(kinds["counts"], x=rng_for(1, "counts").poisson(3.0, (rows, COLUMNS)).astype(np.float32))
    layouts = {"none": Layout(), "float16": Layout(dtypes={"x": "float16"})}
    layouts |= {name: Layout(compression=name) for name in ("lzf", "gzip:1", "gzip:4", "gzip:9")}
    for kind, data in kinds.items():
        plain: tuple[float, float] | None = None
        for name, layout in layouts.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            head = header(rows, layout)
            path = folder / shard_name(0)
            write_manifest(folder, Manifest(head, rows))
            (wrote, _), (read, _) = turns(2, lambda p=path, h=head, d=data: write_shard(p, h, 0, d), lambda: Store(folder).read())  # type: ignore[misc]
            numbers[f"{kind}, {name}: bytes/row"] = (path.stat().st_size / rows, "", None)
            numbers[f"{kind}, {name}: rows/s written"] = (rows / wrote, "", None)
            numbers[f"{kind}, {name}: rows/s read"] = (rows / read, "", None)
            plain = plain or (wrote, read)
            numbers[f"{kind}, {name}: times the time to write of none"] = (wrote / plain[0], "", None)
            numbers[f"{kind}, {name}: times the time to read of none"] = (read / plain[1], "", None)
    return numbers


def main() -> None:
    parser = arguments(__doc__, "store_speed")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        parts: dict[str, Part] = {
            "writing": lambda: writing(root / "w", options.rows),
            "campaign": lambda: campaign(root / "s", options.rows),
            "verifying": lambda: verifying(root / "v", options.rows),
            "compressing": lambda: compressing(root / "c"),
            "opening": lambda: opening(root / "o", options.shards),
        }
        sys.exit(run(parts, options, {"rows_written": options.rows}))


if __name__ == "__main__":
    main()
