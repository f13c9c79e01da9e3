r"""Dispatching shards: in this process, in a pool of our own, or over any `concurrent.futures.Executor`.

Never more shards are in flight than twice the workers, whatever the campaign's length, and as many more as a Dask cluster grows. A worker
that died (killed, out of memory, crashed) is replaced and its shards are made again. After two deaths the simulator is taken to be
the cause, and gets a process of its own beside every worker (`sandbox`), where the row that kills it is found and flagged.

Workers of an executor that do not see the store's folder send their shards back, and they are written here: the same bytes. So this
process holds at most as many files as are in flight.
"""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from uuid import uuid4

from sbi_phys.core.errors import SettingError, StoreError
from sbi_phys.core.files import sync_folder
from sbi_phys.core.progress import Progress, Task
from sbi_phys.core.types import Array
from sbi_phys.simulation.processes import limit_threads, pickle_simulator, start_pool_worker
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.simulation.workers import ShardResult, ShardTask, name_disk, run_shard
from sbi_phys.store.manifest import MANIFEST, Manifest, list_shards
from sbi_phys.store.shards import shard_name, write_file

__all__ = ["Campaign", "complete"]

# Work that would take less than this is done in the calling process: starting a pool takes about a second.
_TINY_S = 3.0
# Deaths after which the simulator gets a process of its own for the rest of the call: a worker takes a second or more to replace, such a
# process milliseconds.
_DEATHS = 2
# Deaths in a row, beside one a worker, that may bring no shard home: before the first one (nothing works) and later (somebody kills).
_IN_VAIN, _IN_VAIN_LATER = 2, 10
_LARGE = 2**16  # bytes of a simulator that is sent to Dask's workers apart from the shards
_LOOK_S = 2.0  # how often a Dask cluster is asked how many workers it has


@dataclass
class Campaign:
    """One call at work: what is left to do, and what has been done.

    send_back: whether workers send shards back instead of writing them; None: those do that do not see the folder. shards: all that the
    call is about, made already or not, of an array job; None: all of the store.
    """

    folder: Path
    manifest: Manifest
    simulator: Simulator
    given: Array | None
    todo: deque[int]
    n_failed: int = 0
    n_done: int = 0
    task: Task | None = None
    payload: bytes | None = field(default=None, repr=False)
    timeout: float | None = None
    isolate: bool = False
    send_back: bool | None = None
    shards: range | None = None
    token: str = ""

    def shard(self, index: int) -> ShardTask:
        """What a worker needs to make a shard."""
        rows = self.manifest.rows(index)
        first = index * self.manifest.header.shard_size
        theta = None if self.given is None else self.given[first : first + rows]
        if self.isolate and self.payload is None:
            self.payload = pickle_simulator(self.simulator)
        simulator: Simulator | bytes = self.simulator if self.payload is None else self.payload
        only = self.manifest.n_shards == 1
        return ShardTask(
            str(self.folder.resolve()),
            index,
            rows,
            self.manifest.header,
            simulator,
            theta,
            only,
            self.isolate,
            self.timeout,
            token=self.token,
            send_back=bool(self.send_back),
        )

    def finished(self, result: ShardResult) -> None:
        """Count a shard that has been made, and write it if it was sent back.   Raises: StoreError."""
        data = result.file
        if data is not None:
            path = self.folder / shard_name(result.index)
            try:
                write_file(path, data)
            except StoreError as err:
                raise name_disk(err, path) from err.__cause__
        self.n_done += 1
        self.n_failed += result.n_failed
        if self.task is not None:
            self.task.advance(result.rows, f"{self.n_failed} failed" if self.n_failed else "")


def complete(run: Campaign, workers: int | None, executor: Executor | None, progress: Progress) -> None:
    """Make the missing shards, with a display of those that this call is about."""
    rows = run.manifest.rows
    total = run.manifest.n if run.shards is None else sum(map(rows, run.shards))
    with progress.task("simulate", total) as task, limit_threads():
        run.task = task
        task.update(total - sum(map(rows, run.todo)))
        _work(run, workers, executor)
    sync_folder(run.folder)


def _work(run: Campaign, workers: int | None, executor: Executor | None) -> None:
    """Do what is left to do, here, in a pool of our own, or in the caller's executor."""
    if not run.todo:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if executor is not None:
        with _token(run):
            _callers_executor(run, executor, _InFlight(executor, workers or int(getattr(executor, "_max_workers", 0) or 0) or cores))
    elif workers == 1 or (workers is None and _is_tiny(run, cores)):
        while run.todo:
            run.finished(run_shard(run.shard(run.todo.popleft())))
    else:
        run.payload = pickle_simulator(run.simulator)
        _own_pool(run, min(workers or cores, len(run.todo)))


@contextmanager
def _token(run: Campaign) -> Iterator[None]:
    """A file of a random name in the folder while the workers work: who finds it sees the folder itself."""
    if run.send_back is not None:
        yield
        return
    # a name that is cleared away as unfinished if this process is killed
    token = run.folder / f".{MANIFEST}.{uuid4().int}.tmp"
    try:
        token.touch()
    except OSError as err:
        raise StoreError(f"{token} can not be made: {err.strerror}; expected a folder that may be written") from err
    run.token = token.name
    try:
        yield
    finally:
        token.unlink(missing_ok=True)


class _InFlight:
    """How many shards may be in flight: twice the workers, of a Dask cluster those that it has by now, since jobs start one by one."""

    def __init__(self, executor: Executor | None, workers: int) -> None:
        self._client = getattr(executor, "_client", None)  # of Dask's executor
        self._workers, self._next = workers, 0.0

    def __call__(self) -> int:
        if self._client is not None and time.monotonic() >= self._next:
            # a scheduler that is away for a moment is no reason to stop: the shards in flight will tell
            with suppress(Exception):
                self._workers = max(self._workers, sum(self._client.nthreads().values()))
            self._next = time.monotonic() + _LOOK_S
        return 2 * self._workers


def _callers_executor(run: Campaign, executor: Executor, in_flight: Callable[[], int]) -> None:
    """Work over an executor that is not ours: a pool that broke is not ours to replace, but a scheduler's workers come back."""
    if not isinstance(executor, ThreadPoolExecutor):
        try:
            # as bytes it is rebuilt once a worker, not once a shard
            run.payload = pickle_simulator(run.simulator)
        except SettingError:
            if isinstance(executor, ProcessPoolExecutor):
                raise
            # Dask's pickler also sends what is defined in a notebook
    submit = _submit(run, executor)
    while run.todo:
        before, isolated = run.n_done, run.isolate
        try:
            _drain(run, submit, in_flight, wait_on_error=True)
        except BrokenExecutor as err:
            if not isinstance(err, WorkerLostError) or (isolated and run.n_done == before):
                raise _died(run, err) from err
            run.isolate = True
        except CancelledError as err:
            raise StoreError(
                f"the scheduler gave up the shards of {run.folder}, or was lost itself; {_counts(run)}. Expected a scheduler that runs "
                "until the call ends"
            ) from err


def _submit(run: Campaign, executor: Executor) -> Callable[..., Future[ShardResult]]:
    """How a shard is submitted: a simulator with large tables goes once to Dask's workers, who pass it on, not with every shard."""
    client = getattr(executor, "_client", None)
    if client is None or run.payload is None or len(run.payload) < _LARGE:
        return executor.submit
    # made by a task, not scattered: a copy that is lost with its workers is made again
    shared = client.submit(bytes, run.payload, pure=False)
    return lambda function, task: executor.submit(function, replace(task, simulator=b""), shared)


class WorkerLostError(BrokenExecutor):
    """A scheduler gave a shard up because its workers died again and again."""


def _result(future: Future[ShardResult]) -> ShardResult:
    try:
        return future.result()
    except Exception as err:
        if type(err).__name__ == "KilledWorker":  # Dask's: three workers died with this shard. Named, not imported
            raise WorkerLostError(str(err).splitlines()[0]) from err
        raise


def _is_tiny(run: Campaign, cores: int) -> bool:
    """Make the first shard here, to see how long the others would take, and whether the simulator works at all."""
    start = time.perf_counter()
    run.finished(run_shard(run.shard(run.todo.popleft())))
    return cores == 1 or len(run.todo) < 2 or (time.perf_counter() - start) * len(run.todo) < _TINY_S


class _Member:
    """One worker process of ours. A pool of one: a pool of several is broken as a whole when one of them dies."""

    def __init__(self) -> None:
        self.given = 0
        self.pool = self._new()

    def replace(self) -> None:
        """Start anew after a death."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.given, self.pool = 0, self._new()

    def kill(self) -> None:
        """End the process now."""
        for process in list((getattr(self.pool, "_processes", None) or {}).values()):
            process.kill()

    def _new(self) -> ProcessPoolExecutor:
        # spawn: a fork copies the locks of torch's and BLAS's threads without the threads that would release them
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=spawn, initializer=start_pool_worker, initargs=(os.getpid(),))


def _own_pool(run: Campaign, workers: int) -> None:
    """Work in processes of our own; one that dies is replaced, and costs the two shards that it had."""
    members = [_Member() for _ in range(workers)]
    pending: dict[Future[ShardResult], tuple[int, _Member, ProcessPoolExecutor]] = {}
    done: SimpleQueue[Future[ShardResult]] = SimpleQueue()
    deaths = in_vain = came_home = 0
    try:
        while run.todo or pending:
            while run.todo and (member := min(members, key=lambda m: m.given)).given < 2:
                # a worker that died while it had nothing to do is found now
                with suppress(BrokenExecutor):
                    future = member.pool.submit(run_shard, run.shard(run.todo[0]))
                    pending[future] = run.todo.popleft(), member, member.pool
                    member.given += 1
                    future.add_done_callback(done.put)
                    continue
                member.replace()
            future = done.get()
            index, member, pool = pending.pop(future)
            try:
                result = future.result()
            except BrokenExecutor as err:
                run.todo.append(index)
                if member.pool is pool:  # the first of its shards to say so
                    deaths, in_vain = deaths + 1, in_vain + 1
                    if in_vain > workers + (_IN_VAIN_LATER if came_home else _IN_VAIN):
                        raise _died(run, err) from err
                    run.isolate |= deaths >= _DEATHS
                    member.replace()
                continue
            in_vain, came_home, member.given = 0, came_home + 1, member.given - (member.pool is pool)
            run.finished(result)
    except BaseException:
        # Ctrl-C or an error: what is half done is made again by the next call, so nobody has to wait for it
        for member in members:
            member.kill()
        raise
    finally:
        for member in members:
            member.pool.shutdown(wait=True, cancel_futures=True)


def _drain(run: Campaign, submit: Callable[..., Future[ShardResult]], in_flight: Callable[[], int], *, wait_on_error: bool = False) -> None:
    """Submit what is to do, never more than `in_flight` at once. A BrokenExecutor puts the shards it took with it last in line."""
    pending: dict[Future[ShardResult], int] = {}
    # each future brings itself: to look through all of them for the one that is done would take longer the more workers there are
    done: SimpleQueue[Future[ShardResult]] = SimpleQueue()
    try:
        while run.todo or pending:
            limit = in_flight()
            while run.todo and len(pending) < limit:
                future = submit(run_shard, run.shard(run.todo[0]))
                pending[future] = run.todo.popleft()
                future.add_done_callback(done.put)
            future = done.get()
            run.finished(_result(future))
            del pending[future]
    except BrokenExecutor:
        for future in wait(pending).done:
            if future.cancelled() or future.exception() is not None:
                run.todo.append(pending[future])
            else:
                run.finished(future.result())
        raise
    except BaseException:
        for future in pending:
            future.cancel()
        if wait_on_error:
            # these workers are not ours to stop, and must not write once the lock is given back
            wait(pending)
        raise


def _counts(run: Campaign) -> str:
    there = len(list_shards(run.folder))
    return f"{there} of {run.manifest.n_shards} shards are finished; the same call continues after them"


def _died(run: Campaign, err: BaseException) -> StoreError:
    missing = ", ".join(str(i) for i in sorted(run.todo)[:8])
    return StoreError(
        f"a worker process died while shards {missing} of {run.folder} were made ({err}). {_counts(run)}. "
        "Causes: out of memory (fewer workers, a smaller shard_size), a crash in compiled code (isolate=True), "
        'a script without `if __name__ == "__main__":`'
    )
