r"""Simulating in a process of its own, so that a crash or a hang costs rows and not the campaign.

A simulator in compiled code can do what no `except` catches: a segmentation fault, an exit, a loop without end, memory
until the kernel kills it. `Sandbox` keeps one child process that simulates; a child that dies, or that takes longer than it
may, is replaced, and the caller gets an exception like any other: `make_rows` then halves the batch until the rows at fault
are alone and flags them with the reason.

A death may also come from outside (another program took all memory, an operator typed kill): the same call is tried once
more from the same state of the generator before it counts as the rows' fault. So an unlucky kill leaves no trace in the bytes.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.errors import SimulatorMismatchError, StoreError
from sbi_phys.processes import start_worker, unpickle_simulator
from sbi_phys.protocol import Simulator

__all__ = ["RowTimeoutError", "Sandbox", "SandboxDiedError"]

# The child imports the simulator's modules before it can answer: seconds on a cold disk, and no fault of a row.
_START_S = 300.0
_ATTEMPTS = 2
_PROBES, _PATIENCE = 3, 20.0


class RowTimeoutError(Exception):
    """A call took longer than its rows may take."""


class SandboxDiedError(Exception):
    """The child process ended in the middle of a call, twice."""


class Sandbox:
    """One child process that runs `simulator.simulate`.   A context manager.

    Args: simulator: its pickle, made by `pickle_simulator`. timeout: seconds that a row alone may take, None without limit. A
    batch may take 20 times as long as its rows at the pace of the quickest call so far, and `timeout` more: the limit must find
    rows that hang without cutting short a batch that is merely slow, whose rows would be drawn anew.
    """

    def __init__(self, simulator: bytes, timeout: float | None = None) -> None:
        self._simulator, self._timeout = simulator, timeout
        self._pace: float | None = None
        self._deaths, self._rows = 0, 1
        self._process: Any = None
        self._pipe: Connection | None = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def simulate(self, theta: NDArray[np.float64], rng: np.random.Generator) -> Any:
        """What `simulator.simulate(theta, rng)` returns or raises, computed by the child.

        Raises: RowTimeoutError, SandboxDiedError, StoreError (the simulator can not be rebuilt, or dies whatever it is given),
            and the simulator's own.
        """
        # halving down to one row at fault, each range tried twice, takes half of the deaths in a row that end in an error
        self._rows = max(self._rows, len(theta))
        for attempt in range(_ATTEMPTS):
            try:
                return self._call(theta, rng, self._limit(theta))
            except SandboxDiedError as err:
                self._deaths += 1
                if self._deaths > 4 * (1 + math.log2(self._rows)):
                    raise StoreError(f"{err}, {self._deaths} times in a row; expected a simulator that works for some rows") from err
                if attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _limit(self, theta: NDArray[np.float64]) -> float | None:
        """Seconds that a call may take; where the pace is not known yet, single rows are tried first."""
        if self._timeout is None or len(theta) == 1:
            return self._timeout
        for row in theta[:_PROBES]:
            if self._pace is not None:
                return self._timeout + _PATIENCE * len(theta) * self._pace
            with contextlib.suppress(Exception):
                # numbers that nobody keeps: the caller's generator is left as it is
                self._call(row[None], np.random.default_rng(0), self._timeout)
        return self._timeout * len(theta) if self._pace is None else self._timeout + _PATIENCE * len(theta) * self._pace

    def _call(self, theta: NDArray[np.float64], rng: np.random.Generator, limit: float | None) -> Any:
        pipe, begin = self._started(), time.perf_counter()
        try:
            pipe.send((theta, rng))
            if not pipe.poll(limit):
                self.close()
                # without the seconds that it took: the text stands in the file, whose bytes are the same everywhere
                raise RowTimeoutError(f"no answer within the timeout of {self._timeout:g} s")
            worked, answer = pipe.recv()
        except (EOFError, OSError) as err:
            raise SandboxDiedError(f"the simulating process died: {self._end()}") from err
        self._deaths = 0
        if not worked:
            raise answer
        pace = (time.perf_counter() - begin) / len(theta)
        self._pace = pace if self._pace is None else min(self._pace, pace)
        return answer

    def _started(self) -> Connection:
        if self._process is not None and self._process.is_alive() and self._pipe is not None:
            return self._pipe
        self.close()
        context = _context()
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._simulator), daemon=True)
        with _allowed_children():
            self._process.start()
        theirs.close()
        self._pipe = ours
        try:
            if not ours.poll(_START_S):
                self.close()
                raise StoreError(f"the simulator was not rebuilt within {_START_S:g} s; expected modules that import faster")
            error = ours.recv()
        except (EOFError, OSError) as err:
            raise StoreError(f"the simulator can not be rebuilt in a process of its own, which died: {self._end()}") from err
        if error is not None:
            raise error
        return ours

    def _end(self) -> str:
        """How the child ended, in words; it is gone after that."""
        self._process.join(10)
        code = self._process.exitcode
        self.close()
        if code is None:
            return "no exit status"
        if code < 0:
            return f"signal {-code} ({signal.Signals(-code).name})" if -code in set(signal.Signals) else f"signal {-code}"
        return f"exit status {code}"


def _context() -> Any:
    """Processes forked from a small server where there is one: a hundredth of a second each, once it has made the imports."""
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


def _serve(pipe: Connection, data: bytes) -> None:
    """Child: rebuild the simulator, then answer calls until the pipe closes."""
    start_worker()
    # what a simulator prints must not mix with the parent's output, which may be a table or JSON
    os.dup2(sys.stderr.fileno(), 1)
    try:
        simulator: Simulator = unpickle_simulator(data)
    except Exception as err:
        pipe.send(err)
        return
    pipe.send(None)
    while True:
        try:
            theta, rng = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[bool, Any]
        try:
            answer = (True, simulator.simulate(theta, rng))
        except (Exception, SystemExit) as err:
            answer = (False, err if isinstance(err, Exception) else RuntimeError(f"SystemExit: {err}"))
        try:
            pipe.send(answer)
        except (TypeError, ValueError, AttributeError) as err:
            kind = type(answer[1]).__name__
            pipe.send((False, SimulatorMismatchError(f"simulate gave a {kind} that can not be sent between processes: {err}")))
