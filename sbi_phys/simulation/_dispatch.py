r"""Distributing the shards of a campaign: in this process, over a pool of worker processes, or over any `concurrent.futures.Executor`.

At most two shards per worker are in flight; the number follows a growing Dask cluster. A worker that dies (killed, out of memory,
crashed) is replaced and its shards are made again. After two crashes the simulator is assumed to be the cause, and every worker runs it
in a separate process (`_sandbox`), where the row that causes the crash is found and flagged.

Workers without access to the store's folder send their shards back, and this process writes them with the same bytes. It then holds at
most as many files as there are shards in flight.
"""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from sbi_phys.core.errors import SettingError, StoreError
from sbi_phys.core.files import sync_folder
from sbi_phys.core.progress import Progress, Task
from sbi_phys.core.types import Array
from sbi_phys.simulation.processes import available_cores, limit_threads, pickle_simulator, start_pool_worker, worker_context
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.simulation.workers import ShardResult, ShardTask, name_disk, run_shard
from sbi_phys.store.manifest import MANIFEST, Manifest, list_shards
from sbi_phys.store.shards import shard_name, write_file

__all__ = ["Campaign", "complete"]

# Work shorter than this is done in the calling process, because starting a pool takes about a second.
_TINY_S = 3.0
# Worker crashes after which the simulator runs in a separate process until the call ends: replacing a worker takes a second or more,
# replacing such a process takes milliseconds.
_CRASHES = 2
# Consecutive worker crashes tolerated without a finished shard, in addition to one per worker: before the first shard and afterwards.
_IN_VAIN, _IN_VAIN_LATER = 2, 10
_LARGE = 2**16  # bytes from which a simulator is sent to Dask's workers separately from the shards
_LOOK_S = 2.0  # interval between queries for the number of workers of a Dask cluster
_ANSWER_S = 10.0  # time for the answer
# Time after which a scheduler without an answer, or without a worker, is given up; the second for jobs that may wait in a queue.
_SILENT_S, _QUEUED_S = 300.0, 3600.0


@dataclass
class Campaign:
    """State of one call of `simulate`: the shards still to be made, and counts of those that are finished.

    Args: send_back: whether workers send shards back instead of writing them; None: those without access to the folder do.
    shards: the shards of an array job, finished or not; None: all shards of the store.
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
        """Return the task that makes a shard."""
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
        """Count a finished shard, and write it if it was sent back.   Raises: StoreError."""
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
    """Make the missing shards and display the progress of this call."""
    rows = run.manifest.rows
    total = run.manifest.n if run.shards is None else sum(map(rows, run.shards))
    with progress.task("simulate", total) as task, limit_threads():
        run.task = task
        task.update(total - sum(map(rows, run.todo)))
        _work(run, workers, executor)
    sync_folder(run.folder)


def _work(run: Campaign, workers: int | None, executor: Executor | None) -> None:
    """Make the remaining shards in this process, in a pool of worker processes, or in the caller's executor."""
    if not run.todo:
        return
    cores = available_cores()
    if executor is not None:
        with _token(run):
            _callers_executor(run, executor, _InFlight(executor, workers or int(getattr(executor, "_max_workers", 0) or 0) or cores))
    elif workers == 1 or (workers is None and _is_tiny(run, cores)):
        while run.todo:
            run.finished(run_shard(run.shard(run.todo.popleft())))
    else:
        try:
            run.payload = pickle_simulator(run.simulator)
        except SettingError as err:
            if workers is not None:
                raise
            warnings.warn(f"one process makes all shards: {err}", RuntimeWarning, stacklevel=2)
            while run.todo:
                run.finished(run_shard(run.shard(run.todo.popleft())))
            return
        _own_pool(run, min(workers or cores, len(run.todo)))


@contextmanager
def _token(run: Campaign) -> Iterator[None]:
    """Keep a file of a random name in the folder while workers run; a worker that finds it has access to the folder."""
    if run.send_back is not None:
        yield
        return
    # the name of an unfinished file, so that the next call removes it if this process is killed
    token = run.folder / f".{MANIFEST}.{uuid4().int}.tmp"
    try:
        token.touch()
    except OSError as err:
        raise StoreError(f"{token} cannot be created: {err.strerror}; expected a writable folder") from err
    run.token = token.name
    try:
        yield
    finally:
        token.unlink(missing_ok=True)


class _InFlight:
    """Number of shards allowed in flight: two per worker, counting the current workers of a Dask cluster, whose jobs start one by one.

    It also notices a Dask scheduler that no longer answers and one that has lost all workers: futures of either never end.
    """

    def __init__(self, executor: Executor | None, workers: int) -> None:
        self._client = getattr(executor, "_client", None)  # Dask's executor has it
        self._workers, self._next = workers, 0.0
        self._answered = self._worked = time.monotonic()

    def __call__(self) -> int:
        if self._client is not None and time.monotonic() >= self._next:
            self._look(self._client)
            self._next = time.monotonic() + _LOOK_S
        return 2 * self._workers

    def _look(self, client: Any) -> None:
        """Ask for the number of workers.   Raises: ClusterLostError after the time that is allowed without an answer or a worker."""
        try:
            workers = sum(client.nthreads(callback_timeout=_ANSWER_S).values())
        except Exception:
            # no error before the time is over: a scheduler under load answers late, and a restarted connection works again
            silent = time.monotonic() - self._answered
            if silent > _SILENT_S:
                raise ClusterLostError(f"the Dask scheduler has not answered for {silent:.0f} s (limit {_SILENT_S:g} s)") from None
            return
        self._answered = time.monotonic()
        if workers:
            self._worked, self._workers = self._answered, max(self._workers, workers)
        # jobs of a batch system may wait in its queue
        limit = _QUEUED_S if getattr(client, "cluster", None) is not None else _SILENT_S
        idle = self._answered - self._worked
        if idle > limit:
            raise ClusterLostError(f"the Dask scheduler has had no worker for {idle:.0f} s (limit {limit:g} s)")


def _callers_executor(run: Campaign, executor: Executor, in_flight: Callable[[], int]) -> None:
    """Make the shards in the caller's executor. A broken pool is an error; lost workers of a scheduler are replaced by it."""
    if not isinstance(executor, ThreadPoolExecutor):
        try:
            # as bytes it is rebuilt once per worker and not once per shard
            run.payload = pickle_simulator(run.simulator)
        except SettingError:
            if isinstance(executor, ProcessPoolExecutor):
                raise
            # Dask can also send a class defined in a notebook
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
                f"the scheduler cancelled the shards of {run.folder} or stopped; {_counts(run)}. Expected a scheduler that runs until "
                "the call ends"
            ) from err
        except ClusterLostError as err:
            raise StoreError(f"{err}; {_counts(run)}. Expected a running scheduler with workers") from err


def _submit(run: Campaign, executor: Executor) -> Callable[..., Future[ShardResult]]:
    """Return the function that submits a shard. A large simulator is sent to Dask's workers once and not with every shard."""
    client = getattr(executor, "_client", None)
    if client is None or run.payload is None or len(run.payload) < _LARGE:
        return executor.submit
    # created by a task and not scattered, so that Dask makes it again if its workers are lost
    shared = client.submit(bytes, run.payload, pure=False)
    return lambda function, task: executor.submit(function, replace(task, simulator=b""), shared)


class ClusterLostError(Exception):
    """A scheduler does not answer or has no workers."""


class WorkerLostError(BrokenExecutor):
    """A scheduler gave up a shard because several workers died with it."""


def _result(future: Future[ShardResult]) -> ShardResult:
    try:
        return future.result()
    except Exception as err:
        if type(err).__name__ == "KilledWorker":  # Dask's error after three workers died; not imported
            raise WorkerLostError(str(err).splitlines()[0]) from err
        raise


def _is_tiny(run: Campaign, cores: int) -> bool:
    """Make the first shard here, which measures the duration and shows early whether the simulator works."""
    start = time.perf_counter()
    run.finished(run_shard(run.shard(run.todo.popleft())))
    return cores == 1 or len(run.todo) < 2 or (time.perf_counter() - start) * len(run.todo) < _TINY_S


class _Member:
    """One worker process, as a pool of its own: a larger pool breaks as a whole when one process dies."""

    def __init__(self) -> None:
        self.given = 0
        self.pool = self._new()

    def replace(self) -> None:
        """Start a new process after a crash."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.given, self.pool = 0, self._new()

    def kill(self) -> None:
        """Kill the process."""
        for process in list((getattr(self.pool, "_processes", None) or {}).values()):
            process.kill()

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=worker_context(), initializer=start_pool_worker, initargs=(os.getpid(),))


def _own_pool(run: Campaign, workers: int) -> None:
    """Make the shards in worker processes; one that dies is replaced, and its shards, at most two, are made again."""
    members = [_Member() for _ in range(workers)]
    pending: dict[Future[ShardResult], tuple[int, _Member, ProcessPoolExecutor]] = {}
    done: SimpleQueue[Future[ShardResult]] = SimpleQueue()
    crashes = in_vain = n_finished = 0
    try:
        while run.todo or pending:
            while run.todo and (member := min(members, key=lambda m: m.given)).given < 2:
                # submitting fails if the worker died while idle
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
                if member.pool is pool:  # count the crash once, not for each of the worker's shards
                    crashes, in_vain = crashes + 1, in_vain + 1
                    if in_vain > workers + (_IN_VAIN_LATER if n_finished else _IN_VAIN):
                        raise _died(run, err) from err
                    run.isolate |= crashes >= _CRASHES
                    member.replace()
                continue
            in_vain, n_finished, member.given = 0, n_finished + 1, member.given - (member.pool is pool)
            run.finished(result)
    except BaseException:
        # after Ctrl-C or an error the unfinished shards are abandoned; the next call makes them again
        for member in members:
            member.kill()
        raise
    finally:
        for member in members:
            member.pool.shutdown(wait=True, cancel_futures=True)


def _drain(run: Campaign, submit: Callable[..., Future[ShardResult]], in_flight: Callable[[], int], *, wait_on_error: bool = False) -> None:
    """Submit the remaining shards, at most `in_flight()` at once. After a BrokenExecutor the lost shards are queued again, last."""
    pending: dict[Future[ShardResult], int] = {}
    # futures report through a queue, because searching all of them takes longer the more workers there are
    done: SimpleQueue[Future[ShardResult]] = SimpleQueue()
    try:
        while run.todo or pending:
            limit = in_flight()
            while run.todo and len(pending) < limit:
                future = submit(run_shard, run.shard(run.todo[0]))
                pending[future] = run.todo.popleft()
                future.add_done_callback(done.put)
            try:
                future = done.get(timeout=_LOOK_S)
            except Empty:
                continue  # and look whether the cluster is still there
            run.finished(_result(future))
            del pending[future]
    except BrokenExecutor:
        for future in wait(pending).done:
            if future.cancelled() or future.exception() is not None:
                run.todo.append(pending[future])
            else:
                run.finished(future.result())
        raise
    except ClusterLostError:
        # cancelling would wait for the scheduler, and so would the futures
        raise
    except BaseException:
        for future in pending:
            future.cancel()
        if wait_on_error:
            # the executor belongs to the caller, and its workers must not write after the lock is released
            wait(pending)
        raise


def _counts(run: Campaign) -> str:
    finished = len(list_shards(run.folder))
    return f"{finished} of {run.manifest.n_shards} shards are finished; the same call continues after them"


def _died(run: Campaign, err: BaseException) -> StoreError:
    missing = ", ".join(str(i) for i in sorted(run.todo)[:8])
    return StoreError(
        f"a worker process died while shards {missing} of {run.folder} were made ({err}). {_counts(run)}. "
        "Causes: out of memory (fewer workers, a smaller shard_size), a crash in compiled code (isolate=True)"
    )
