"""Costs of a campaign in addition to the simulator: the scheduler with many shards, their folder, and the scaling from 1e4 to 1e7 rows.

    python benchmarks/scheduler_load.py [--n 100000] [--rows 1000000] [--only dask|pool|folder|rows] [--out FILE]

Shards of a no-op simulator go through a local Dask cluster (scheduler and two workers, processes that talk over TCP) and through a process
pool; memory and processor time of the scheduler and of the calling process are read from the system once a second. Then their folder
is opened, listed and continued. Rows of source_spectrum are simulated in growing numbers. Prints each number with its required
value, the rows of the tables in docs/scaling.md, writes JSON and exits with 1 if a requirement is not met.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
from benchmarks.campaign_toys import Rows
from benchmarks.campaigns import cluster
from benchmarks.suite.table import Numbers, arguments, fill, run_parts
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.clusters import cluster_executor
from sbi_phys.store.info import store_info
from sbi_phys.store.manifest import list_shards
from sbi_phys.store.store import Store
from simulators import SourceSpectrum

MB = 1e-6
ROWS_A_SHARD = 8
WORKERS, ALL_ROWS = 1000, 1e9  # workers and rows of the planned campaign


class Counting(Executor):
    """An executor that counts the shards in flight."""

    def __init__(self, inner: Executor) -> None:
        self._inner, self._client = inner, getattr(inner, "_client", None)
        self.now = self.most = 0
        self._lock = threading.Lock()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a job and count it."""
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        future = self._inner.submit(fn, *args, **kwargs)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future[Any]) -> None:
        with self._lock:
            self.now -= 1


class Watch(threading.Thread):
    """Memory of processes, once a second, and the processor time that they used."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        super().__init__(daemon=True)
        self.processes, self.stop = processes, threading.Event()
        self.memory: dict[str, list[float]] = {name: [] for name in processes}
        self.start_cpu = {name: self.cpu(p) for name, p in processes.items()}

    @staticmethod
    def cpu(process: psutil.Process) -> float:
        """Seconds, user and system."""
        times = process.cpu_times()
        return float(times.user + times.system)

    def run(self) -> None:
        """Sample once a second until stopped."""
        while not self.stop.wait(1.0):
            for name, process in self.processes.items():
                with suppress(psutil.NoSuchProcess):
                    self.memory[name].append(process.memory_info().rss * MB)

    def used(self, name: str) -> float:
        """Seconds of processor time since the start."""
        return self.cpu(self.processes[name]) - self.start_cpu[name]

    def grown(self, name: str) -> float:
        """MB by which memory grew from the first fifth of the time to the last."""
        seen = self.memory[name]
        fifth = max(1, len(seen) // 5)
        return max(seen[-fifth:]) - max(seen[:fifth]) if seen else 0.0


@contextmanager
def watched(processes: dict[str, psutil.Process]) -> Iterator[Watch]:
    watch = Watch(processes)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop.set()
        watch.join()


def through(name: str, n: int, folder: Path, inner: Executor, processes: dict[str, psutil.Process]) -> Numbers:
    """Time, processor time, memory and shards in flight of n no-op shards."""
    simulate(Rows(), 16 * ROWS_A_SHARD, folder.with_name("warm-" + folder.name), shard_size=ROWS_A_SHARD, executor=inner, workers=2)
    executor = Counting(inner)
    with watched({"caller": psutil.Process(), **processes}) as watch:
        begin = time.perf_counter()
        simulate(Rows(), n * ROWS_A_SHARD, folder, shard_size=ROWS_A_SHARD, executor=executor, workers=2)
        seconds = time.perf_counter() - begin
        used = {p: watch.used(p) for p in watch.processes}
    numbers: Numbers = {
        f"{name}: shards": (float(n), "", None),
        f"{name}: ms a shard, two workers": (1e3 * seconds / n, "<=", 10.0),
        f"{name}: most shards in flight, two workers": (float(executor.most), "<=", 4.0),
    }
    for p in watch.processes:
        numbers[f"{name}: {p}, ms of processor time a shard"] = (1e3 * used[p] / n, "", None)
        numbers[f"{name}: {p}, most memory, MB"] = (max(watch.memory[p], default=0.0), "", None)
        if p != "workers":
            numbers[f"{name}: {p}, memory it grew by, MB"] = (watch.grown(p), "<=", 100.0)
    return numbers


def dask(root: Path, n: int, rows: int) -> Numbers:
    """Shards over a Dask scheduler."""
    with cluster(root / "cluster") as address:
        port = int(address.rsplit(":", 1)[1])
        ours = psutil.Process().children(recursive=True)
        scheduler = next(p for p in ours if any(c.laddr.port == port and c.status == "LISTEN" for c in p.net_connections()))
        with cluster_executor(scheduler=address) as (executor, _):
            assert executor is not None
            executor._client.wait_for_workers(2, timeout=60)  # type: ignore[attr-defined]
            numbers = through("Dask", n, root / "dask", executor, {"scheduler": scheduler})
    busiest = max(numbers[f"Dask: {p}, ms of processor time a shard"][0] for p in ("scheduler", "caller"))
    return numbers | {
        "Dask: shards/s that the busier of scheduler and caller has time for": (1e3 / busiest, "", None),
        f"Dask: seconds that a shard must take for {WORKERS} workers to be half of that": (2 * WORKERS * busiest / 1e3, "", None),
    }


def pool(root: Path, n: int, rows: int) -> Numbers:
    """Shards over a process pool."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        return through("process pool", n, root / "pool", executor, {})


def folder(root: Path, n: int, rows: int) -> Numbers:
    """One folder with all those shards: listed, opened, described, continued."""
    path = next((root / name for name in ("pool", "dask") if (root / name).is_dir()), root / "made")
    simulate(Rows(), n * ROWS_A_SHARD, path, shard_size=ROWS_A_SHARD, workers=2)

    def seconds(job: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        job()
        return time.perf_counter() - begin

    def grow() -> None:
        simulate(Rows(), (n + 1) * ROWS_A_SHARD, path, shard_size=ROWS_A_SHARD, workers=1)

    size = sum(entry.stat().st_size for entry in os.scandir(path))
    return {
        f"folder of {n} shards: bytes a shard beside its rows": (size / n - ROWS_A_SHARD * (16 + 80 + 1), "", None),
        f"folder of {n} shards: s to list": (seconds(lambda: list_shards(path)), "", None),
        f"folder of {n} shards: s to open and see that it is complete": (seconds(lambda: Store(path).complete), "<=", 2.0),
        f"folder of {n} shards: s to describe at first": (seconds(lambda: store_info(path)), "", None),
        f"folder of {n} shards: s to describe again": (seconds(lambda: store_info(path)), "", None),
        f"folder of {n} shards: s to add one shard": (seconds(grow), "", None),
    }


class Timed:
    """A simulator that records its processor time."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds = inner, 0.0
        self.prior, self.parameters, self.observables, self.settings = inner.prior, inner.parameters, inner.observables, inner.settings

    def simulate(self, theta: Any, rng: Any) -> Any:
        """As the simulator itself."""
        begin = time.process_time()
        x = self.inner.simulate(theta, rng)
        self.seconds += time.process_time() - begin
        return x


def cost(name: str, simulator: Any, n: int, size: int, path: Path) -> Numbers:
    """Processor time and bytes of n rows, in all and outside the simulator."""
    simulate(simulator, 100, path.with_name("warm-" + path.name), workers=1)
    timed = Timed(simulator)
    begin, wall = time.process_time(), time.perf_counter()
    store = simulate(timed, n, path, shard_size=size, workers=1)
    used, wall = time.process_time() - begin, time.perf_counter() - wall
    bytes_a_row = sum(p.stat().st_size for p in path.glob("shard-*")) / n
    head = f"{name}, {n:.0e} rows".replace("e+0", "e")
    return {
        f"{head}: us of processor time a row": (1e6 * used / n, "", None),
        f"{head}: of it outside the simulator": (1e6 * (used - timed.seconds) / n, "", None),
        f"{head}: bytes a row": (bytes_a_row, "", None),
        f"{head}: rows/s, one worker": (n / wall, "", None),
        f"{head}: ms a shard outside the simulator": (1e3 * (used - timed.seconds) / store.n_shards, "", None),
    }


def rows(root: Path, n: int, rows: int) -> Numbers:
    """Cost of a row of source_spectrum and of a no-op simulator, from 1e4 rows on."""
    numbers: Numbers = {}
    for exponent in range(4, 8):
        if 10**exponent <= rows:
            numbers |= cost("source_spectrum", SourceSpectrum(), 10**exponent, 4096, root / f"source-{exponent}")
    for exponent in range(4, 8):
        numbers |= cost("no-op, 20 columns", Rows(), 10**exponent, 65536, root / f"noop-{exponent}")
    return numbers


PARTS: dict[str, Callable[[Path, int, int], Numbers]] = {"dask": dask, "pool": pool, "folder": folder, "rows": rows}


def tables(values: dict[str, float]) -> str:
    """The tables of docs/scaling.md."""
    lines = ["| rows of | rows | µs/row, processor | of it outside the simulator | bytes/row | rows/s, one worker |", "| --- " * 6 + "|"]
    for head in [name.removesuffix(": bytes a row") for name in values if name.endswith(": bytes a row")]:
        name, n = head.rsplit(", ", 1)
        keys = ("us of processor time a row", "of it outside the simulator", "bytes a row", "rows/s, one worker")
        lines.append(f"| {name} | {n.removesuffix(' rows')} | " + " | ".join(f"{values[f'{head}: {key}']:.3g}" for key in keys) + " |")
    lines += ["", "| shards over | number | ms/shard | scheduler, processor ms/shard | caller, processor ms/shard | most in flight |"]
    lines[-1] += " scheduler, MB | caller, MB |"
    lines.append("| --- " * 8 + "|")
    for name in ("Dask", "process pool"):
        keys = ("shards", "ms a shard, two workers", "scheduler, ms of processor time a shard", "caller, ms of processor time a shard",
                "most shards in flight, two workers", "scheduler, most memory, MB", "caller, most memory, MB")  # fmt: skip
        found = [values.get(f"{name}: {key}") for key in keys]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.0f}" if v >= 1000 else f"{v:.3g}" for v in found) + " |")
    lines += ["", "| one folder | |", "| --- | --- |"]
    lines += [f"| {name.removeprefix('folder of ')} | {v:.3g} |" for name, v in values.items() if name.startswith("folder of ")]
    lines += [f"| {name} | {v:.3g} |" for name, v in values.items() if name.startswith(("Dask: shards/s", "Dask: seconds that"))]
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, "scheduler_load")
    parser.add_argument("--n", type=int, default=100_000, help="shards")
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="most rows of source_spectrum (1e7 take half an hour of processor time)"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where the stores lie for a while")
    parser.add_argument("--page", type=Path, help="page whose tables are written anew, docs/scaling.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parts = {name: partial(part, Path(folder), options.n, options.rows) for name, part in PARTS.items()}
        met, found = run_parts(parts, options, {"n": options.n})
    fill(options.page, "scheduler_load", tables({row["name"]: row["value"] for row in found}))
    sys.exit(not met)


if __name__ == "__main__":
    main()
