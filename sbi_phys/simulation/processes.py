"""Worker processes of campaigns and online training: sending a simulator to them, their threads, and ending with the parent."""

import functools
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from sbi_phys.core.checks import shortened
from sbi_phys.core.errors import SettingError
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.store.identity import class_path

__all__ = [
    "available_cores",
    "die_with_parent",
    "limit_threads",
    "limit_threads_for_good",
    "main_hidden",
    "pickle_simulator",
    "start_pool_worker",
    "start_worker",
    "unpickle_simulator",
    "worker_context",
]

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def available_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads() -> AbstractContextManager[Any]:
    """Use one BLAS and OpenMP thread: several per worker compete for the cores, and sums depend on their number by rounding."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(limits=1)


def start_worker() -> None:
    """Prepare a worker process of a pool: ignore Ctrl-C, use one thread, and end with the parent."""
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_threads_for_good()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # a parent that is killed cannot stop its pool; without this thread the workers would wait for work forever
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def start_pool_worker(parent: int) -> None:
    """Prepare a worker of a campaign's pool: `start_worker`, then `die_with_parent`."""
    start_worker()
    die_with_parent(parent)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the thread of process `parent` that started it ends (Linux only)."""
    if sys.platform != "linux":
        return
    import ctypes

    # needed because a watching thread does not run while compiled code holds Python's lock
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the request
        os._exit(1)


@functools.cache
def limit_threads_for_good() -> AbstractContextManager[Any]:
    """Limit the threads until the process ends."""
    return limit_threads()


def pickle_simulator(simulator: Simulator) -> bytes:
    """Pickle the simulator for worker processes: classes and functions of modules by their name, others by their code.

    The latter are those of a script or notebook, which no worker imports, those defined within functions, and lambdas.
    Raises: SettingError if it cannot be pickled, e.g. where it holds an open file.
    """
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(simulator, protocol=pickle.HIGHEST_PROTOCOL))
    except Exception as err:
        raise SettingError(
            f"the simulator {class_path(simulator)} cannot be sent to worker processes: {type(err).__name__}: {shortened(str(err))}; "
            "expected attributes that can be pickled (no open files, locks or connections), or workers=1"
        ) from err


_HIDING = threading.Lock()


@contextmanager
def main_hidden() -> Iterator[None]:
    """Start processes that do not import the calling script, which then needs no `if __name__ == "__main__":`."""
    main = sys.modules["__main__"]
    with _HIDING:
        kept: dict[str, Any] = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
        main.__dict__.pop("__file__", None)
        main.__spec__ = None
        try:
            yield
        finally:
            vars(main).update(kept)


class _Worker(SpawnProcess):
    """A new interpreter that does not import the calling script."""

    def start(self) -> None:
        """Start the process."""
        with main_hidden():
            super().start()


class _WorkerContext(SpawnContext):
    Process = _Worker


def worker_context() -> SpawnContext:
    """Return the context in which worker processes start: new interpreters, without the calling script.

    Not forks, which copy locks held by threads of torch and BLAS without the threads that release them.
    """
    return _WorkerContext()


@functools.lru_cache(maxsize=2)
def unpickle_simulator(data: bytes) -> Simulator:
    """Rebuild the simulator; cached, so that a worker does it once and not for every shard."""
    try:
        return pickle.loads(data)  # bytes from the calling process, never from a file
    except Exception as err:
        raise SettingError(
            f"the simulator cannot be rebuilt in a worker process: {type(err).__name__}: {err}; "
            "expected a class at the top of a module that workers can import, or workers=1"
        ) from err
