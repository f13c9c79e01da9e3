r"""Simulating in a process of its own, so that a crash or a hang costs rows and not the campaign.

A simulator in compiled code can do what no `except` catches: a segmentation fault, an exit, a loop without end, memory
until the kernel kills it. `Sandbox` keeps a child process that simulates; one that dies, or that takes longer than it may, is
replaced, and the caller gets an exception like any other: `make_rows` then divides the batch until the rows at fault are alone
and flags them with the reason. The replacement is forked from a process that has rebuilt the simulator once (`child`).

A simulator with a method `one_event(theta (d,), rng) -> (k,)` says that simulate(theta, rng) is one_event(theta_i, rng_i) row by
row, rng_i = rng.spawn(n)[i]. Then rows come home one at a time, a death costs its own row alone, and the timeout is the row's.

A death may also come from outside (another program took all memory, an operator typed kill): the same call is tried once
more from the same state of the generator before it counts as the rows' fault. So an unlucky kill leaves no trace in the bytes.
A batch that ends by itself (an exit, a segmentation fault) is divided at once: the second try would cost as much as the first.
"""

import contextlib
import math
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sbi_phys.core.errors import StoreError
from sbi_phys.core.types import Array
from sbi_phys.simulation.protocol import RowsFailedError
from sbi_phys.simulation.sandbox_child import Child

__all__ = ["RowTimeoutError", "Sandbox", "SandboxDiedError"]

_ATTEMPTS = 2
_PROBES, _PATIENCE = 3, 20.0
_OWN_FAULTS = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE, -signal.SIGABRT, -signal.SIGSYS, -signal.SIGTRAP}


class RowTimeoutError(Exception):
    """A call took longer than its rows may take."""


class SandboxDiedError(Exception):
    """The child process ended in the middle of a call.   outside: whether that may have come from outside, as a kill does."""

    def __init__(self, text: str, outside: bool = True) -> None:
        super().__init__(text)
        self.outside = outside


class Sandbox:
    """A child process that runs `simulator.simulate`.   A context manager.

    Args: simulator: its pickle, made by `pickle_simulator`. timeout: seconds that a row alone may take, None without limit. A
    batch may take 20 times as long as its rows at the pace of the quickest call so far, and `timeout` more: the limit must find
    rows that hang without cutting short a batch that is merely slow, whose rows would be drawn anew.
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
        """End the child."""
        self._child.close()

    def simulate(self, theta: Array, rng: np.random.Generator) -> Any:
        """What `simulator.simulate(theta, rng)` returns or raises, computed by the child.

        Raises: RowTimeoutError, SandboxDiedError, RowsFailedError (of a simulator with one_event), StoreError (the simulator can
            not be rebuilt, or dies whatever it is given), and the simulator's own.
        """
        # dividing down to one row at fault, each range tried twice, takes half of the deaths in a row that end in an error
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
            raise StoreError(f"{err}, {self._deaths} times in a row; expected a simulator that works for some rows") from err

    def _limit(self, theta: Array) -> float | None:
        """Seconds that a call may take; where the pace is not known yet, single rows are tried first."""
        if self._timeout is None or len(theta) == 1:
            return self._timeout
        # several: the first call of a process may take much longer than the others, and the limit follows the quickest
        for row in theta[:_PROBES] if self._pace is None else ():
            with contextlib.suppress(Exception):
                # numbers that nobody keeps: the caller's generator is left as it is
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
        """Rows one at a time; after a death or a hang the next child goes on where the last one stopped."""
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
            # without the seconds that it took: the text stands in the file, whose bytes are the same everywhere
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
