r"""Simulating in a separate process, so that a crash or a hang costs single rows and not the campaign.

Compiled code can fail in ways that no `except` catches: a segmentation fault, an exit, an endless loop, memory use until the kernel kills
the process. `Sandbox` runs the simulator in a child process. If the child dies or exceeds its time limit, it is replaced and the caller
gets an ordinary exception; `make_rows` then divides the batch until the failing rows are alone, and flags them with the reason.

A simulator with a method `one_event(theta (d,), rng) -> (k,)` declares that simulate(theta, rng) equals one_event(theta_i, rng_i) for each
row, with rng_i = rng.spawn(n)[i]. Rows are then received one at a time, a crash affects its own row only, and the time limit is per row.

A process can also be killed from outside (by the kernel when another program uses all memory, or by an operator). Every call is therefore
tried a second time from the same state of the generator before its rows are considered at fault, and such a kill leaves no trace in the
results. A batch that ends the process (an exit, a segmentation fault) is divided at once: a second try would cost as much as the first.

**Starting children.** Starting a Python process that imports a simulator and reads its tables takes a second or more. The simulator is
therefore rebuilt once, in a server process that never simulates, and every child is a fork of the server:

    worker -- control --> server: forks a child on request, reports how it ended
       '----- pipe -----> child: answers (theta, rng, first) with rows

A fork copies one thread only. A server that has threads of its own, or that runs on a system other than Linux, therefore does not fork: it
answers calls itself and is restarted after a crash. A child ends with its server, and the server with its worker, also after kill -9.
"""

import contextlib
import math
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
from sbi_phys.core.types import Array
from sbi_phys.simulation.processes import die_with_parent, limit_threads_for_good, main_hidden, start_worker, unpickle_simulator
from sbi_phys.simulation.protocol import RowsFailedError, Simulator, event_reason

__all__ = ["Child", "RowTimeoutError", "Sandbox", "SandboxDiedError"]

_ATTEMPTS = 2
_PROBES, _PATIENCE = 3, 20.0
_OWN_FAULTS = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE, -signal.SIGABRT, -signal.SIGSYS, -signal.SIGTRAP}
# Time limit for rebuilding the simulator: importing its modules can take long on a slow disk and is no fault of a row.
_START_S = 300.0
_END_S = 10.0
_RESTART_S = 2.0
_STARTING = threading.Lock()  # starting changes the environment of the whole process, and workers of a scheduler may have several threads
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class RowTimeoutError(Exception):
    """A call exceeded the time limit of its rows."""


class SandboxDiedError(Exception):
    """The child process ended during a call.   outside: whether another process may have killed it."""

    def __init__(self, text: str, outside: bool = True) -> None:
        super().__init__(text)
        self.outside = outside


class Sandbox:
    """A child process that runs `simulator.simulate`.   A context manager.

    Args: simulator: pickle made by `pickle_simulator`. timeout: seconds allowed for a single row, None for no limit. A batch is
    allowed `timeout` plus 20 times the duration expected from the fastest call so far: the limit must find rows that hang, but
    must not interrupt a slow batch, whose rows would then be drawn again with other random numbers.
    """

    def __init__(self, simulator: bytes, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._pace: float | None = None
        self._deaths, self._rows = 0, 1
        self._child = Child(simulator)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the child process."""
        self._child.close()

    def simulate(self, theta: Array, rng: np.random.Generator) -> Any:
        """Return or raise what `simulator.simulate(theta, rng)` does, computed in the child.

        Raises: RowTimeoutError, SandboxDiedError, RowsFailedError (a simulator with one_event), StoreError (the simulator cannot
            be rebuilt, or crashes for all rows), and the simulator's own errors.
        """
        # the largest batch sets the limit on consecutive crashes: twice the number needed to isolate one failing row
        self._rows = max(self._rows, len(theta))
        self._child.pipe()
        if self._child.columns is not None:
            return self._events(theta, rng, self._child.columns)
        for attempt in range(_ATTEMPTS):
            try:
                return self._call(theta, rng, self._limit(theta))
            except SandboxDiedError as err:
                self._count(err)
                if attempt + 1 == _ATTEMPTS or (len(theta) > 1 and not err.outside):
                    raise
        raise AssertionError("unreachable")

    def _count(self, err: SandboxDiedError) -> None:
        self._deaths += 1
        if self._deaths > 4 * (1 + math.log2(self._rows)):
            raise StoreError(f"{err}, {self._deaths} times in a row; expected a simulator that succeeds for some rows") from err

    def _limit(self, theta: Array) -> float | None:
        """Seconds allowed for a call; a few single rows are run first if no duration is known yet."""
        if self._timeout is None or len(theta) == 1:
            return self._timeout
        # several rows, because the first call of a process may take much longer than the others; the fastest sets the limit
        for row in theta[:_PROBES] if self._pace is None else ():
            with contextlib.suppress(Exception):
                # the results are discarded and the caller's generator is not advanced
                self._call(row[None], np.random.default_rng(0), self._timeout)
        return self._timeout * len(theta) if self._pace is None else self._timeout + _PATIENCE * len(theta) * self._pace

    def _call(self, theta: Array, rng: np.random.Generator, limit: float | None) -> Any:
        pipe, begin = self._child.pipe(), time.perf_counter()
        try:
            pipe.send((theta, rng, 0))
            worked, answer = self._receive(pipe, limit)
        except (EOFError, OSError) as err:
            raise self._died() from err
        self._deaths = 0
        if not worked:
            raise answer
        pace = (time.perf_counter() - begin) / len(theta)
        self._pace = pace if self._pace is None else min(self._pace, pace)
        return answer

    def _events(self, theta: Array, rng: np.random.Generator, columns: int) -> Array:
        """Receive rows one at a time; after a crash or a timeout a new child continues with the next row."""
        x = np.full((len(theta), columns), np.nan)
        reasons: dict[int, str] = {}
        at = deaths = 0
        while at < len(theta):
            try:
                pipe = self._child.pipe()
                pipe.send((theta, rng, at))
                while at < len(theta):
                    worked, answer = self._receive(pipe, self._timeout)
                    if isinstance(answer, Exception):
                        raise answer
                    if worked:
                        x[at] = answer
                    else:
                        reasons[at] = answer
                    at, deaths, self._deaths = at + 1, 0, 0
            except RowTimeoutError as err:
                reasons[at], at, deaths = f"RowTimeoutError: {err}", at + 1, 0
            except (EOFError, OSError):
                died, deaths = self._died(), deaths + 1
                self._count(died)
                if deaths == _ATTEMPTS:
                    reasons[at], at, deaths = f"SandboxDiedError: {died}", at + 1, 0
        if reasons:
            raise RowsFailedError(x, reasons)
        return x

    def _receive(self, pipe: Connection, limit: float | None) -> tuple[bool, Any]:
        if not pipe.poll(limit):
            self._child.end(now=True)
            # the message omits the elapsed time, so that the bytes of the store are the same everywhere
            raise RowTimeoutError(f"no answer within the timeout of {self._timeout:g} s")
        answer: tuple[bool, Any] = pipe.recv()
        return answer

    def _died(self) -> SandboxDiedError:
        code = self._child.end()
        if code is None:
            how = "no exit status"
        elif code < 0:
            how = f"signal {-code} ({signal.Signals(-code).name})" if -code in set(signal.Signals) else f"signal {-code}"
        else:
            how = f"exit status {code}"
        return SandboxDiedError(f"the simulating process died: {how}", outside=code is None or (code < 0 and code not in _OWN_FAULTS))


class Child:
    """The worker's end of the connection to a child process.

    Args: simulator: its pickle.   Attributes: columns: number of columns of x if the simulator has `one_event`, else None.
    """

    def __init__(self, simulator: bytes) -> None:
        self._simulator = simulator
        self._server: Any = None
        self._control: Connection | None = None
        self._pipe: Connection | None = None
        self._forks = False
        self.columns: int | None = None

    def pipe(self) -> Connection:
        """Return a connection to a running child, starting one if needed.   Raises: StoreError; others would count as a row's fault."""
        wait, why = 0.05, ""
        while self._pipe is None:
            try:
                if self._control is None:
                    self._start()
                self._pipe = self._fork() if self._forks else self._control
            except (OSError, EOFError) as err:
                # the server or multiprocessing's own fork server was killed; the latter restarts by itself
                why = f"{type(err).__name__}: {err}"
                self.close()
                if wait > _RESTART_S:
                    raise StoreError(f"no process can be started for the simulator ({why}); expected memory for two copies of it") from err
                time.sleep(wait)
                wait *= 2
        return self._pipe

    def end(self, *, now: bool = False) -> int | None:
        """End the child, immediately if `now`, and return its exit status (negative: a signal), None if unknown."""
        code: int | None = None
        with contextlib.suppress(EOFError, OSError):
            if self._forks and self._control is not None:
                self._control.send("kill" if now else "end")
                if self._control.poll(2 * _END_S):
                    code = self._control.recv()
        if not self._forks and self._server is not None:
            if now:
                self._server.kill()
            self._server.join(_END_S)
            code = self._server.exitcode
        if code is None or not self._forks:
            self.close()
        elif self._pipe is not None:
            self._pipe.close()
        self._pipe = None
        return code

    def close(self) -> None:
        """End the child and its server."""
        for connection in {self._pipe, self._control} - {None}:
            connection.close()  # type: ignore[union-attr]
        if self._server is not None:
            if self._forks:
                self._server.join(_END_S)  # it kills its child, and the programs that this started, when the connection closes
            self._server.kill()
            self._server.join()
            self._server.close()
        self._server = self._pipe = self._control = None

    def _fork(self) -> Connection:
        assert self._control is not None
        ours, theirs = multiprocessing.Pipe()
        try:
            self._control.send("fork")
            reduction.send_handle(self._control, theirs.fileno(), None)
            if not self._control.poll(2 * _END_S) or self._control.recv() is not None:
                raise OSError("the server does not answer")
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
        self._server = context.Process(target=_server, args=(theirs, self._simulator, environment), daemon=True)
        try:
            with _STARTING, _single_thread(environment), _allowed_children(), main_hidden():
                self._server.start()
        except BaseException:
            self._server = None
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
            self._server.join(_END_S)
            raise EOFError(f"the process ended while the simulator was rebuilt, exit status {self._server.exitcode}") from err
        if error is not None:
            self.close()
            raise StoreError(f"the simulator cannot be rebuilt in a separate process: {error}") from error


def _context() -> Any:
    """Use multiprocessing's fork server, with this module imported, where it exists; else spawn."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextlib.contextmanager
def _allowed_children() -> Iterator[None]:
    """Allow a daemonic process, such as a Dask worker, to start a child; ours ends by itself with its parent."""
    config = getattr(multiprocessing.current_process(), "_config", {})
    daemonic = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemonic is not None:
            config["daemon"] = daemonic


def _server(control: Connection, data: bytes, environment: dict[str, str | None]) -> None:
    """Rebuild the simulator, then fork children and report how they ended until the worker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # output of a simulator must not mix with the parent's standard output, which may be a table or JSON
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
                server = os.getpid()
                child = os.fork()
                if child == 0:
                    _child(server, control, handle, simulator, columns)
                _lead_group(child)
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
    """Send; return False if the worker has ended."""
    with contextlib.suppress(OSError):
        control.send(what)
        return True
    return False


@contextlib.contextmanager
def _single_thread(environment: dict[str, str | None]) -> Iterator[None]:
    """Prevent libraries loaded in this block from starting threads, then restore the given environment.

    The restored environment is the one that programs started by a simulator see. A process with threads cannot be forked safely.
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
    """Whether this process can be forked safely: Linux, and a single thread by the kernel's count."""
    return sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1


def _child(server: int, control: Connection, handle: int, simulator: Simulator, columns: int | None) -> None:
    code = 1
    try:
        die_with_parent(server)
        _lead_group(0)
        control.close()
        _answer(Connection(handle), simulator, columns)
        code = 0
    finally:
        # skip the exit handlers inherited from the server
        os._exit(code)


def _lead_group(child: int) -> None:
    """Make a child the leader of a process group; called by both processes, since either may come first."""
    with contextlib.suppress(OSError):
        os.setpgid(child, child)


def _reap(child: int, *, now: bool) -> int | None:
    """Wait for a child to end, kill it after a while or immediately if `now`, and return its exit status.

    Processes that the simulator started, and that are still in the child's group, are killed with it.
    """
    try:
        return _wait(child, now=now)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)


def _wait(child: int, *, now: bool) -> int | None:
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
    """Answer calls (theta, rng, first) until the pipe closes, with all rows at once or one at a time beginning at `first`."""
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
    """Return (True, event), (False, reason of failure), or (False, error that ends the call)."""
    try:
        x = one_event(row, rng)
    except MemoryError as err:
        return False, err
    except (Exception, SystemExit) as err:
        return False, event_reason(err)
    if np.shape(x) != (columns,):
        return False, SimulatorMismatchError(f"one_event returned shape {np.shape(x)}; expected ({columns},)")
    return True, x


def _send(pipe: Connection, worked: bool, answer: Any) -> None:
    try:
        pipe.send((worked, answer))
    except (TypeError, ValueError, AttributeError) as err:
        kind = type(answer).__name__
        pipe.send((False, SimulatorMismatchError(f"simulate returned a {kind} that cannot be sent between processes: {err}")))
