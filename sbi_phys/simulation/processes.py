"""Processes that simulate: how a simulator gets there, how many threads it has there, and when they end."""

import functools
import os
import pickle
import signal
import sys
import threading
from contextlib import AbstractContextManager
from typing import Any

from sbi_phys.core.errors import SettingError
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.store.identity import class_path

__all__ = [
    "die_with_parent",
    "event_reason",
    "limit_threads",
    "limit_threads_for_good",
    "pickle_simulator",
    "start_pool_worker",
    "start_worker",
    "unpickle_simulator",
]

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def limit_threads() -> AbstractContextManager[Any]:
    """One BLAS and OpenMP thread: as many as there are workers would fight over the cores, and sums would round differently."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(limits=1)


def start_worker() -> None:
    """Prepare a worker process of our own pool: leave Ctrl-C to the parent, one thread, and end when the parent is gone."""
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_threads_for_good()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # a parent that is killed can not stop its pool: without this its workers would wait for work for ever
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def start_pool_worker(parent: int) -> None:
    """Prepare a worker of a campaign's own pool: ready as by `start_worker`, tied to process `parent` as by `die_with_parent`."""
    start_worker()
    die_with_parent(parent)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, which must be one of process `parent` (Linux)."""
    if sys.platform != "linux":
        return
    import ctypes

    # a thread that waits for the parent gets no turn while a simulator computes without giving Python's lock back
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # gone before the kernel was asked
        os._exit(1)


def event_reason(err: BaseException) -> str:
    """Why an event failed, as the files say it."""
    return f"{type(err).__name__.lstrip('_')}: {err}"


@functools.cache
def limit_threads_for_good() -> AbstractContextManager[Any]:
    """Set the limit for the rest of this process's life."""
    return limit_threads()  # never left


def pickle_simulator(simulator: Simulator) -> bytes:
    """Pickle the simulator once, to be unpickled once a worker.   Raises: SettingError where that can not work."""
    module = type(simulator).__module__
    advice = "expected a class at the top of a module that workers can import, or workers=1"
    if module == "__main__" and not getattr(sys.modules["__main__"], "__file__", None):
        raise SettingError(
            f"the simulator {class_path(simulator)} is defined in a notebook or at a prompt, which workers can not import; {advice}"
        )
    try:
        return pickle.dumps(simulator, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as err:
        raise SettingError(
            f"the simulator {class_path(simulator)} can not be sent to worker processes: {type(err).__name__}: {err}; {advice}"
        ) from err


@functools.lru_cache(maxsize=2)
def unpickle_simulator(data: bytes) -> Simulator:
    """Rebuild the simulator once a worker, not once a shard."""
    try:
        return pickle.loads(data)  # bytes that the calling process made a moment ago, never a file
    except Exception as err:
        raise SettingError(
            f"the simulator can not be rebuilt in a worker process: {type(err).__name__}: {err}; "
            "expected a class at the top of a module that workers can import, or workers=1"
        ) from err
