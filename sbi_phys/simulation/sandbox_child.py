r"""A child process that simulates and may die at any moment; the next one is there within milliseconds.

Starting a Python process that has imported a simulator and read its tables takes a second or more, and at a simulator that crashes in
one row of a hundred that would be most of the time. So the simulator is rebuilt once, in a process that never simulates (the
nursery), and each child is a fork of it:

    worker -- control --> nursery: forks a child on demand, says how it ended
       '----- pipe -----> child: answers (theta, rng, first) with rows

A fork copies one thread alone, so that a nursery with threads of its own (or on a system without Linux's means) does not fork: it answers
calls itself, and is started anew after a death. A child ends with its nursery, the nursery with its worker, also by kill -9.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sbi_phys.core.errors import SimulatorMismatchError, StoreError
from sbi_phys.simulation.processes import die_with_parent, event_reason, limit_threads_for_good, start_worker, unpickle_simulator
from sbi_phys.simulation.protocol import Simulator

__all__ = ["Child"]

# The nursery imports the simulator's modules before it can answer: seconds on a cold disk, and no fault of a row.
_START_S = 300.0
_END_S = 10.0
_PATIENCE_S = 2.0
_STARTING = threading.Lock()  # what it changes belongs to the process: workers of a scheduler may have several threads
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Child:
    """The worker's side.   Args: simulator, its pickle.   columns: k of x where the simulator makes one event at a time, else None."""

    def __init__(self, simulator: bytes) -> None:
        self._simulator = simulator
        self._nursery: Any = None
        self._control: Connection | None = None
        self._pipe: Connection | None = None
        self._forks = False
        self.columns: int | None = None

    def pipe(self) -> Connection:
        """Connection to a child that is there.   Raises: StoreError, never another error: it would be taken for the rows' fault."""
        wait, why = 0.05, ""
        while self._pipe is None:
            try:
                if self._control is None:
                    self._start()
                self._pipe = self._fork() if self._forks else self._control
            except (OSError, EOFError) as err:
                # the nursery was killed, or multiprocessing's server of forks, which starts again by itself
                why = f"{type(err).__name__}: {err}"
                self.close()
                if wait > _PATIENCE_S:
                    raise StoreError(
                        f"no process can be started for the simulator ({why}); expected one that can be rebuilt, and room for two of it"
                    ) from err
                time.sleep(wait)
                wait *= 2
        return self._pipe

    def end(self, *, now: bool = False) -> int | None:
        """Exit status of the child (negative: the signal), which is gone after that, at once if `now`; None if nobody knows."""
        code: int | None = None
        with contextlib.suppress(EOFError, OSError):
            if self._forks and self._control is not None:
                self._control.send("kill" if now else "end")
                if self._control.poll(2 * _END_S):
                    code = self._control.recv()
        if not self._forks and self._nursery is not None:
            if now:
                self._nursery.kill()
            self._nursery.join(_END_S)
            code = self._nursery.exitcode
        if code is None or not self._forks:
            self.close()
        elif self._pipe is not None:
            self._pipe.close()
        self._pipe = None
        return code

    def close(self) -> None:
        """End the child and the nursery."""
        if self._nursery is not None:
            self._nursery.kill()  # its child goes with it
            self._nursery.join()
            self._nursery.close()
        for connection in {self._pipe, self._control} - {None}:
            connection.close()  # type: ignore[union-attr]
        self._nursery = self._pipe = self._control = None

    def _fork(self) -> Connection:
        assert self._control is not None
        ours, theirs = multiprocessing.Pipe()
        try:
            self._control.send("fork")
            reduction.send_handle(self._control, theirs.fileno(), None)
            if not self._control.poll(2 * _END_S) or self._control.recv() is not None:
                raise OSError("the nursery does not answer")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    def _start(self) -> None:
        context = _context()
        ours, theirs = context.Pipe()
        environment = {name: os.environ.get(name) for name in _THREADS}
        self._nursery = context.Process(target=_nursery, args=(theirs, self._simulator, environment), daemon=True)
        try:
            with _STARTING, _single_thread(environment), _allowed_children():
                self._nursery.start()
        except BaseException:
            self._nursery = None
            ours.close()
            raise
        finally:
            theirs.close()
        self._control = ours
        if not ours.poll(_START_S):
            self.close()
            raise StoreError(f"the simulator was not rebuilt within {_START_S:g} s; expected modules that import faster")
        try:
            error, self._forks, self.columns = ours.recv()
        except EOFError as err:
            self._nursery.join(_END_S)
            raise EOFError(f"it died while the simulator was rebuilt, exit status {self._nursery.exitcode}") from err
        if error is not None:
            self.close()
            raise StoreError(f"the simulator can not be rebuilt in a process of its own: {error}") from error


def _context() -> Any:
    """Processes forked from a small server where there is one, which has made the package's own imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextlib.contextmanager
def _allowed_children() -> Iterator[None]:
    """Let a daemonic process (Dask's workers are) start a child; ours ends by itself when its parent is gone."""
    config = getattr(multiprocessing.current_process(), "_config", {})
    daemonic = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemonic is not None:
            config["daemon"] = daemonic


def _nursery(control: Connection, data: bytes, environment: dict[str, str | None]) -> None:
    """Rebuild the simulator; then fork children and say how they ended, until the worker is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # what a simulator prints must not mix with the parent's output, which may be a table or JSON
    os.dup2(sys.stderr.fileno(), 1)
    try:
        with _single_thread(environment):
            limit_threads_for_good()
            simulator = unpickle_simulator(data)
            columns = sum(o.size for o in simulator.observables) if callable(getattr(simulator, "one_event", None)) else None
    except Exception as err:
        _tell(control, (err, False, None))
        return
    forks = _may_fork()
    if not forks:
        start_worker()
    if not _tell(control, (None, forks, columns)):
        return
    if not forks:
        _answer(control, simulator, columns)
        return
    child = 0
    while True:
        try:
            order = control.recv()
            if order == "fork":
                handle = reduction.recv_handle(control)
                nursery = os.getpid()
                child = os.fork()
                if child == 0:
                    _child(nursery, control, handle, simulator, columns)
                os.close(handle)
                control.send(None)
            else:
                control.send(_reap(child, now=order == "kill"))
                child = 0
        except (EOFError, OSError):
            if child:
                _reap(child, now=True)
            return


def _tell(control: Connection, what: Any) -> bool:
    """Send, if the worker is still there."""
    with contextlib.suppress(OSError):
        control.send(what)
        return True
    return False


@contextlib.contextmanager
def _single_thread(environment: dict[str, str | None]) -> Iterator[None]:
    """Have libraries that are loaded now start no threads; afterwards the environment is the one that is given.

    The programs that a simulator runs get that one. Without it the server of forks, which loads numpy, would hand threads to every fork.
    """
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _may_fork() -> bool:
    """Whether a fork of this process is whole: one thread, as the kernel counts them."""
    return sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1


def _child(nursery: int, control: Connection, handle: int, simulator: Simulator, columns: int | None) -> None:
    code = 1
    try:
        die_with_parent(nursery)
        control.close()
        _answer(Connection(handle), simulator, columns)
        code = 0
    finally:
        # nothing of the nursery's is to be cleaned up twice
        os._exit(code)


def _reap(child: int, *, now: bool) -> int | None:
    """Exit status of a child, once it has ended, or has been ended after a while."""
    deadline = time.monotonic() + (0.0 if now else _END_S)
    while True:
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        else:
            found, status = os.waitpid(child, os.WNOHANG)
            if not found:
                time.sleep(0.0005)
                continue
        return os.waitstatus_to_exitcode(status)


def _answer(pipe: Connection, simulator: Simulator, columns: int | None) -> None:
    """Answer calls (theta, rng, first) until the pipe closes: with all rows at once, or with one at a time from `first` on."""
    while True:
        try:
            theta, rng, first = pipe.recv()
        except (EOFError, OSError):
            return
        if columns is not None:
            one_event: Any = simulator.one_event  # type: ignore[attr-defined]
            for row, own in zip(theta[first:], rng.spawn(len(theta))[first:], strict=True):
                _send(pipe, *_event(one_event, row, own, columns))
            continue
        answer: tuple[bool, Any]
        try:
            answer = (True, simulator.simulate(theta, rng))
        except (Exception, SystemExit) as err:
            answer = (False, err if isinstance(err, Exception) else RuntimeError(f"SystemExit: {err}"))
        _send(pipe, *answer)


def _event(one_event: Any, row: Any, rng: np.random.Generator, columns: int) -> tuple[bool, Any]:
    """One event, the reason why there is none, or the error that ends the call."""
    try:
        x = one_event(row, rng)
    except MemoryError as err:
        return False, err
    except (Exception, SystemExit) as err:
        return False, event_reason(err)
    if np.shape(x) != (columns,):
        return False, SimulatorMismatchError(f"one_event gave shape {np.shape(x)}; expected ({columns},)")
    return True, x


def _send(pipe: Connection, worked: bool, answer: Any) -> None:
    try:
        pipe.send((worked, answer))
    except (TypeError, ValueError, AttributeError) as err:
        kind = type(answer).__name__
        pipe.send((False, SimulatorMismatchError(f"simulate gave a {kind} that can not be sent between processes: {err}")))
