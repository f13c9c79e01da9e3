r"""Dispatching shards: in this process, in a pool of our own, or over any `concurrent.futures.Executor`.

Never more shards are in flight than twice the workers, whatever the campaign's length. A pool whose worker died (killed, out of memory,
crashed) is replaced and its shards are made again; those that were in work at two deaths are made with the simulator in a process of its
own (`sandbox`), where the row that kills it is found by halving and flagged.
"""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbi_phys.errors import SettingError, StoreError
from sbi_phys.processes import limit_threads, pickle_simulator, start_worker
from sbi_phys.progress import Progress, Task
from sbi_phys.protocol import Simulator
from sbi_phys.shards import sync_folder
from sbi_phys.store import Manifest
from sbi_phys.workers import ShardResult, ShardTask, run_shard

__all__ = ["Campaign", "complete"]

# Work that would take less than this is done in the calling process: starting a pool takes about a second.
_TINY_S = 3.0
# Deaths of a worker in a row that bring no shard home: after two of them the shards in work are isolated, and get one more chance.
_DEATHS = 2


@dataclass
class Campaign:
    """One call at work: what is left to do, and what has been done."""

    folder: Path
    manifest: Manifest
    simulator: Simulator
    given: NDArray[np.float64] | None
    todo: deque[int]
    n_failed: int = 0
    n_done: int = 0
    task: Task | None = None
    payload: bytes | None = field(default=None, repr=False)
    timeout: float | None = None
    isolate: bool = False
    at_work: set[int] = field(default_factory=set)
    suspects: set[int] = field(default_factory=set)

    def shard(self, index: int) -> ShardTask:
        """What a worker needs to make a shard."""
        rows = self.manifest.rows(index)
        first = index * self.manifest.header.shard_size
        theta = None if self.given is None else self.given[first : first + rows]
        isolate = self.isolate or index in self.suspects
        if isolate and self.payload is None:
            self.payload = pickle_simulator(self.simulator)
        simulator: Simulator | bytes = self.simulator if self.payload is None else self.payload
        only = self.manifest.n_shards == 1
        return ShardTask(str(self.folder.resolve()), index, rows, self.manifest.header, simulator, theta, only, isolate, self.timeout)

    def finished(self, result: ShardResult) -> None:
        """Count a shard that has been made."""
        self.n_done += 1
        self.n_failed += result.n_failed
        if self.task is not None:
            self.task.advance(result.rows, f"{self.n_failed} failed" if self.n_failed else "")


def complete(run: Campaign, workers: int | None, executor: Executor | None, progress: Progress) -> None:
    """Make the missing shards, with a display."""
    manifest = run.manifest
    with progress.task("simulate", manifest.n) as task, limit_threads():
        run.task = task
        task.update(manifest.n - sum(manifest.rows(i) for i in run.todo))
        _work(run, workers, executor)
    sync_folder(run.folder)


def _work(run: Campaign, workers: int | None, executor: Executor | None) -> None:
    """Do what is left to do, here, in a pool of our own, or in the caller's executor."""
    if not run.todo:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if executor is not None:
        _callers_executor(run, executor, 2 * (workers or int(getattr(executor, "_max_workers", 0) or 0) or cores))
    elif workers == 1 or (workers is None and _is_tiny(run, cores)):
        while run.todo:
            run.finished(run_shard(run.shard(run.todo.popleft())))
    else:
        run.payload = pickle_simulator(run.simulator)
        _own_pool(run, min(workers or cores, len(run.todo)))


def _callers_executor(run: Campaign, executor: Executor, in_flight: int) -> None:
    """Work over an executor that is not ours: a pool that broke is not ours to replace, but a scheduler's workers come back."""
    if not isinstance(executor, ThreadPoolExecutor):
        try:
            # as bytes it is rebuilt once a worker, not once a shard
            run.payload = pickle_simulator(run.simulator)
        except SettingError:
            if isinstance(executor, ProcessPoolExecutor):
                raise
            # Dask's pickler also sends what is defined in a notebook
    while run.todo:
        before = run.n_done
        try:
            _drain(run, executor.submit, in_flight, wait_on_error=True)
        except BrokenExecutor as err:
            if not isinstance(err, WorkerLostError) or (run.n_done == before and run.at_work <= run.suspects):
                raise _died(run, err) from err
            run.suspects |= run.at_work


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


def _own_pool(run: Campaign, workers: int) -> None:
    """Work in a process pool; one whose worker died is replaced, and shards that were in work at two deaths are isolated."""
    in_vain, at_death = 0, set[int]()
    while run.todo:
        before = run.n_done
        # spawn: a fork copies the locks of torch's and BLAS's threads without the threads that would release them
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker)
        try:
            _drain(run, pool.submit, 2 * workers)
        except BrokenExecutor as err:
            in_vain = 0 if run.n_done > before else in_vain + 1
            if in_vain > _DEATHS:
                raise _died(run, err) from err
            run.suspects |= at_death & run.at_work
            at_death |= run.at_work
        except BaseException:
            # Ctrl-C or an error: what is half done is made again by the next call, so nobody has to wait for it
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _drain(run: Campaign, submit: Callable[..., Future[ShardResult]], in_flight: int, *, wait_on_error: bool = False) -> None:
    """Submit what is to do, never more than `in_flight` at once. A BrokenExecutor puts the shards it took with it last in line."""
    pending: dict[Future[ShardResult], int] = {}
    try:
        while run.todo or pending:
            while run.todo and len(pending) < in_flight:
                pending[submit(run_shard, run.shard(run.todo[0]))] = run.todo[0]
                run.todo.popleft()
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                run.finished(_result(future))
                del pending[future]
    except BrokenExecutor:
        run.at_work = set()
        for future in wait(pending).done:
            if future.cancelled() or future.exception() is not None:
                run.todo.append(pending[future])
                run.at_work.add(pending[future])
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


def _died(run: Campaign, err: BaseException) -> StoreError:
    missing = ", ".join(str(i) for i in sorted(run.todo)[:8])
    return StoreError(
        f"a worker process died while shards {missing} of {run.folder} were made ({err}). {run.manifest.n_shards - len(run.todo)} of "
        f"{run.manifest.n_shards} shards are finished; the same call continues after them. Causes: out of memory (fewer workers, a smaller "
        'shard_size), a crash in compiled code (try workers=1), a script without `if __name__ == "__main__":`'
    )
