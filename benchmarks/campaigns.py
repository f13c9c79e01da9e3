"""Campaigns that are disturbed: killed workers, killed parents, a full disk, rows that crash or hang; and Dask over TCP.

    python benchmarks/campaigns.py [--only kills|parents|disk|failures|batches|dask|pool] [--quick] [--page docs/scaling.md] [--out FILE]

Every disturbed campaign is compared, file by file, with an undisturbed one. Prints each number with its required value, writes JSON and
exits with 1 if a requirement is not met. Both times of a ratio are measured alternately in the same run; other load on the machine makes
them less precise. The full disk is a small tmpfs mount; where mounting is refused, fsync is made to report a full disk.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)

# ruff: noqa: E402
from benchmarks.campaign_toys import CRASHES, HANGS, NANS, Events, Rows, Work
from benchmarks.suite.table import Numbers, Part, arguments, fill, run_parts, table
from sbi_phys.core.errors import StoreError
from sbi_phys.simulation._dispatch import Campaign
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.clusters import cluster_executor
from sbi_phys.store.manifest import list_shards
from sbi_phys.store.store import Store
from simulators import SourceSpectrum

SHARDS, ROWS, SECONDS = 200, 50, 0.15  # shards, rows per shard and seconds per shard of the campaigns that are killed


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def undisturbed(folder: Path) -> dict[str, str]:
    """Hashes of an undisturbed campaign, run by threads, which sleep at the same time."""
    with ThreadPoolExecutor(40) as threads:
        simulate(Rows(SECONDS), SHARDS * ROWS, folder, seed=7, shard_size=ROWS, executor=threads, workers=40)
    return hashes(folder)


def start(folder: Path) -> psutil.Popen:
    """The campaign as a program of its own, with two workers."""
    return psutil.Popen([sys.executable, __file__, "--child", str(folder)], stderr=subprocess.PIPE, text=True)


def child(folder: Path) -> None:
    simulate(Rows(SECONDS), SHARDS * ROWS, folder, seed=7, shard_size=ROWS, workers=2)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Everything that a campaign has started, except multiprocessing's tracker of names, which does no work."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for p in process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "resource_tracker" not in " ".join(p.cmdline()):
                    found.append(p)
    return found


def once_each(folder: Path) -> float:
    """1 if every row is there once: complete, whole, and no theta twice."""
    store = Store(folder)
    store.verify()
    theta, _ = store.read(valid_only=False)
    return float(store.complete and store.n_rows == SHARDS * ROWS == len({row.tobytes() for row in theta}))


def compare(name: str, folder: Path, want: dict[str, str]) -> Numbers:
    got = hashes(folder)
    differ = sorted(k for k in got | want if got.get(k) != want.get(k))
    if differ:
        print(f"  {name}: {', '.join(differ)} differ; {Store(folder).n_failed} rows failed")
    return {
        f"{name}: every row once": (once_each(folder), "==", 1.0),
        f"{name}: files that differ from an undisturbed run": (float(len(differ)), "==", 0.0),
    }


def kills(root: Path, quick: bool) -> Numbers:
    """Kill a random process of the campaign by SIGKILL every few seconds."""
    want, rng, n = undisturbed(root / "want"), random.Random(1), 0
    begin, process = time.perf_counter(), start(root / "kills")
    pause = time.monotonic() + 4.0
    while process.poll() is None:
        time.sleep(0.05)
        if time.monotonic() >= pause and (alive := descendants(process)):
            victim = rng.choice(alive)
            with suppress(psutil.NoSuchProcess):
                victim.kill()
                n += 1
            pause = time.monotonic() + rng.uniform(2.0, 4.0)
    seconds, error = time.perf_counter() - begin, process.stderr.read()
    numbers: Numbers = {
        "killed workers: exit status": (float(process.returncode), "==", 0.0),
        "killed workers: kills": (float(n), ">=", 3.0),
        f"killed workers: seconds (at least {SHARDS * SECONDS / 2:.0f} without kills)": (seconds, "", None),
    }
    if process.returncode:
        print(error)
        return numbers
    return numbers | compare("killed workers", root / "kills", want)


def parents(root: Path, quick: bool) -> Numbers:
    """Kill the calling process by SIGKILL, and run the same command again."""
    want, rng, folder = undisturbed(root / "want"), random.Random(2), root / "parents"
    n, slowest = 0, 0.0

    def shards() -> list[int]:
        return list_shards(folder) if folder.is_dir() else []

    while True:
        # after some progress, independent of the speed of the machine
        process, until = start(folder), len(shards()) + rng.randint(15, 50)
        while process.poll() is None and len(shards()) < until:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        orphans = descendants(process)
        process.kill()
        killed, n = time.monotonic(), n + 1
        process.wait()
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in orphans) and time.monotonic() < killed + 20:
            time.sleep(0.01)
        slowest = max(slowest, time.monotonic() - killed)
    if process.returncode:
        print(process.stderr.read())
    return {
        "killed parents: exit status of the last": (float(process.returncode), "==", 0.0),
        "killed parents: kills": (float(n), ">=", 3.0),
        "killed parents: seconds until their workers are gone": (slowest, "<=", 2.0),
    } | compare("killed parents", folder, want)


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None] | None]:
    """A disk of 3 MB at a folder, given with a call that makes it larger; None where mounting is refused."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def refused_after(calls: int) -> Iterator[None]:
    """Emulate a full disk: fsync fails after some calls."""
    sync, left = os.fsync, calls

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    os.fsync = fsync  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = sync


def disk(root: Path, quick: bool) -> Numbers:
    """Run on a disk that fills up during the campaign and is enlarged afterwards."""

    def run(folder: Path, workers: int) -> Store:
        return simulate(Rows(), 40 * 1000, folder, seed=7, shard_size=1000, workers=workers)

    want = hashes(run(root / "want", 1).path)
    message = ""
    with small_disk(root / "disk") as enlarge:
        folder = root / "disk" / "store"
        try:
            if enlarge is None:
                with refused_after(20):
                    run(folder, 1)
            else:
                run(folder, 2)
        except StoreError as err:
            message = str(err)
        print(f"  {'a tmpfs mount' if enlarge else 'a stub'}: {message}")
        done = [name for name in hashes(folder) if name.startswith("shard")]
        wrong = sum(value != want[name] for name, value in hashes(folder).items() if name.startswith("shard"))
        left = sum(name.endswith(".tmp") for name in hashes(folder))
        if enlarge is not None:
            enlarge()
        run(folder, 2).verify()
        differ = sum(hashes(folder).get(k) != want[k] for k in want)
        mount = str(root / "disk") if enlarge is not None else "mounted at"
    return {
        "full disk: the error names it": (float("is full" in message and mount in message), "==", 1.0),
        "full disk: shards of 40 that were finished": (float(len(done)), ">=", 5.0),
        "full disk: of them, shards that are not whole": (float(wrong), "==", 0.0),
        "full disk: half-written files left": (float(left), "==", 0.0),
        "full disk: files that differ after the next call": (float(differ), "==", 0.0),
    }


def failures(root: Path, quick: bool) -> Numbers:
    """1 % of rows crash, 1 % are NaN, 0.1 % hang: what is flagged, what is left, and how long it takes, one event at a time."""
    return log_of("one event at a time", Events, root / "events", 1500 if quick else 4000, limit=1.5)


def batches(root: Path, quick: bool) -> Numbers:
    """The same with a simulator that is given whole batches."""
    return log_of("a batch at a time", Work, root / "batches", 500 if quick else 1500, limit=None)


def log_of(name: str, simulator: type[Work], root: Path, n: int, *, limit: float | None) -> Numbers:
    timeout, seconds, stores = 0.5, {}, {}
    for bad in (False, True):
        begin = time.perf_counter()
        stores[bad] = simulate(simulator(5.0, bad), n, root / str(bad), seed=3, shard_size=100, workers=2, timeout=timeout)
        seconds[bad] = time.perf_counter() - begin
    theta, x = stores[False].read()
    u = theta[:, 0]
    expected = {int(i): "SandboxDiedError: the simulating process died: " for i in (u < CRASHES).nonzero()[0]}
    expected |= {int(i): "non-finite x in 1 of 20 columns" for i in ((u >= CRASHES) & (u < NANS)).nonzero()[0]}
    expected |= {int(i): "RowTimeoutError: no answer within" for i in ((u >= NANS) & (u < HANGS)).nonzero()[0]}
    found = {f.row: f.reason for f in stores[True].failures()}
    theta_bad, x_bad = stores[True].read(valid_only=False)
    good = [i for i in range(n) if i not in expected]
    hang = float(((u >= NANS) & (u < HANGS)).sum())
    waiting = hang * timeout
    numbers: Numbers = {
        f"failures, {name}: rows": (float(n), "", None),
        f"failures, {name}: rows that crash, hang or are NaN": (float(len(expected)), "", None),
        f"failures, {name}: of them, hang": (hang, "", None),
        f"failures, {name}: rows flagged wrongly, or not, or with another reason": (
            float(sum(not found.get(i, "").startswith(expected.get(i, "none")) for i in found | expected)),
            "==",
            0.0,
        ),
        f"failures, {name}: good rows that are not there": (
            float((theta_bad[good] != theta[good]).any(1).sum() + (~(x_bad[good] < float("inf")).all(1)).sum()), "==", 0.0),
        f"failures, {name}: seconds of a clean run": (seconds[False], "", None),
        f"failures, {name}: seconds": (seconds[True], "", None),
        f"failures, {name}: seconds less half the timeouts, over those of a clean run": (
            (seconds[True] - waiting / 2) / seconds[False], "<=" if limit else "", limit),
    }  # fmt: skip
    if limit:
        numbers[f"failures, {name}: good rows that differ from those of a clean run"] = (
            float((x_bad[good] != x[good]).any(1).sum()), "==", 0.0)  # fmt: skip
    return numbers


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """A scheduler and two workers of one thread, three processes that talk over TCP; gives the scheduler's address."""
    folder.mkdir(parents=True)
    file = folder / "scheduler.json"
    worker = ["dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard"]
    commands = [
        ["dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
        [*worker, "--name", "0"],
        [*worker, "--name", "1"],
    ]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with open(folder / "log", "wb") as log:
        started = []
        try:
            for name, *options in commands:
                command = [sys.executable, "-m", f"distributed.cli.{name}", *options]
                started.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True))
                while name == "dask_scheduler" and not (file.is_file() and file.read_text().strip()):
                    time.sleep(0.05)
            yield json.loads(file.read_text())["address"]
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)  # each with the processes it has started
                process.wait()


def seconds_of(simulator: Any, shards: int, rows: int, folder: Path, executor: Executor | None, workers: int) -> float:
    begin = time.perf_counter()
    simulate(simulator, shards * rows, folder, seed=1, shard_size=rows, executor=executor, workers=workers)
    return time.perf_counter() - begin


def speed_up(root: Path, shards: int, turns: int, one: Executor, two: Executor) -> tuple[float, float, float]:
    """Seconds of a real campaign on one worker and on two, and in this process, the best of some turns."""
    simulator, best = SourceSpectrum(), [float("inf")] * 3
    for turn in range(turns):
        for i, (executor, workers) in enumerate([(one, 1), (two, 2), (None, 1)]):
            best[i] = min(best[i], seconds_of(simulator, shards, 2000, root / f"{turn}-{i}", executor, workers))
    return best[0], best[1], best[2]


def dask(root: Path, quick: bool) -> Numbers:
    """A scheduler and two workers over TCP: cost of a shard of a no-op simulator, and gain by the second worker."""
    with cluster(root / "cluster") as address, cluster_executor(scheduler=address) as (executor, _):
        client: Any = executor._client  # type: ignore[union-attr]
        client.wait_for_workers(2, timeout=60)
        # one shard in flight at a time on one named worker, and both
        one = client.get_executor(pure=False, workers=[next(iter(client.nthreads()))])
        for i, warm in enumerate((one, executor)):
            seconds_of(SourceSpectrum(), 8, 50, root / f"warm{i}", warm, 2)
            seconds_of(Rows(), 8, 10, root / f"warm-noop{i}", warm, 2)
        count, turns = (200, 1) if quick else (1000, 2)
        here = min(seconds_of(Rows(), count, 10, root / f"here{i}", None, 1) for i in range(turns))
        on_one = min(seconds_of(Rows(), count, 10, root / f"noop-one{i}", one, 1) for i in range(turns))
        on_two = min(seconds_of(Rows(), count, 10, root / f"noop-two{i}", executor, 2) for i in range(turns))
        back = min(returned(count, root / f"back{i}", executor) for i in range(turns))
        first, second, _ = speed_up(root / "real", 8 if quick else 24, turns, one, executor)  # type: ignore[arg-type]
    return {
        "Dask over TCP: ms a shard of a no-op simulator, two workers": (1e3 * on_two / count, "<=", 10.0),
        "Dask over TCP: ms a shard of a no-op simulator, one worker": (1e3 * on_one / count, "", None),
        "Dask over TCP: ms a shard in this process": (1e3 * here / count, "", None),
        "Dask over TCP: overhead, ms a shard, one worker": (1e3 * (on_one - here) / count, "<=", 10.0),
        "Dask over TCP: ms a shard that is sent back, two workers": (1e3 * back / count, "", None),
        "Dask over TCP: seconds of source_spectrum on one worker": (first, "", None),
        "Dask over TCP: times as fast with two workers": (first / second, ">=", 1.7),
    }


def returned(shards: int, folder: Path, executor: Executor | None) -> float:
    """Seconds of a campaign whose workers do not see the folder."""
    shard = Campaign.shard
    Campaign.shard = lambda run, index: replace(shard(run, index), folder="/nowhere")  # type: ignore[method-assign]
    try:
        return seconds_of(Rows(), shards, 10, folder, executor, 2)
    finally:
        Campaign.shard = shard  # type: ignore[method-assign]


def pool(root: Path, quick: bool) -> Numbers:
    """Gain by the second worker of a process pool, after the processes have started."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as one, ProcessPoolExecutor(2, mp_context=spawn) as two:
        for i, warm in enumerate((one, two)):
            seconds_of(SourceSpectrum(), 8, 50, root / f"warm{i}", warm, 2)
        first, second, here = speed_up(root / "real", 8 if quick else 96, 1 if quick else 2, one, two)
        count = 200 if quick else 1000
        noop = seconds_of(Rows(), count, 10, root / "noop", two, 2)
    return {
        "process pool: seconds of source_spectrum in this process": (here, "", None),
        "process pool: seconds of source_spectrum on one worker": (first, "", None),
        "process pool: times as fast with two workers": (first / second, ">=", 1.8),
        "process pool: ms a shard of a no-op simulator": (1e3 * noop / count, "", None),
    }


PARTS: dict[str, Callable[[Path, bool], Numbers]] = {
    "kills": kills, "parents": parents, "disk": disk, "failures": failures, "batches": batches, "dask": dask, "pool": pool,
}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, "campaigns")
    parser.add_argument("--quick", action="store_true", help="fewer rows and turns")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores lie for a while")
    parser.add_argument("--page", type=Path, help="page whose table is written anew, docs/scaling.md")
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return

    def part(name: str) -> Part:
        def in_a_folder() -> Numbers:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                return PARTS[name](Path(folder), options.quick)

        return in_a_folder

    met, rows = run_parts({name: part(name) for name in PARTS}, options, {"quick": options.quick})
    fill(options.page, "campaigns", table(rows))
    sys.exit(not met)


if __name__ == "__main__":
    main()
