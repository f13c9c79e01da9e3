r"""Running one external program: its time limit, what is kept of its output, and its end, also when this process is killed.

    done = run_program(["corsika", "card.txt"], folder, timeout=600.0, limit=2**20)

The program runs in a session of its own, so that the processes that it starts are killed with it: when it has ended, when it exceeds its
time limit or the limit of its output, and on every error. If this process itself is killed (kill -9, a time limit of its row, a signal
of the batch system), `_watcher`, one process for each process that runs programs, does the same and removes the working folder.

Of the standard output the first `limit` bytes are kept, of the error stream the last `_TAIL` bytes; the rest is read and dropped, because
a program whose pipe is full would wait.
"""

import atexit
import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from sbi_phys.simulation._watcher import end_program

__all__ = ["Done", "run_program"]

_MARK = "SBI_PHYS_PROGRAM"  # a variable in the environment of each program, by which its processes are found
_TAIL = 2**16
_CHUNK = 2**16
_LOOK_S = 0.1  # a program may end while processes that it started hold its output open


@dataclass(frozen=True, slots=True)
class Done:
    """How a program ended: its status (negative: a signal), output, whether the output was longer, and the end of its error stream."""

    status: int
    output: bytes
    too_long: bool
    errors: bytes


def run_program(command: Sequence[str], folder: Path, *, timeout: float | None = None, limit: int, stop: bool = False) -> Done:
    """Run a program in `folder` and wait for it.

    Args: timeout: seconds. limit: bytes of the standard output that are kept. stop: end the program when it writes more.
    Raises: TimeoutError; OSError if it cannot be started.
    """
    mark = f"{_MARK}={uuid4().hex}"
    with _WATCHER.watch(mark, folder) as started:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env={**os.environ, _MARK: mark.partition("=")[2]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        ended = False
        try:
            started(process.pid)
            output, errors = _collect(process, timeout, limit, stop)
            ended = process.poll() is not None
        finally:
            _end(process, None if ended else mark)
    return Done(process.returncode, bytes(output[:limit]), len(output) > limit, bytes(errors))


def _collect(process: subprocess.Popen[bytes], timeout: float | None, limit: int, stop: bool) -> tuple[bytearray, bytearray]:
    """Read both streams until the program has ended.   Returns: at most limit + 1 bytes of the first, the end of the second."""
    output, errors = bytearray(), bytearray()
    deadline = None if timeout is None else time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        assert process.stdout is not None and process.stderr is not None
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() or process.poll() is None:
            left = _LOOK_S if deadline is None else min(_LOOK_S, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"the program did not end within {timeout:g} s")
            over = process.poll() is not None
            ready = selector.select(0 if over else left) if selector.get_map() else _wait(process, left)
            for key, _ in ready:
                data = os.read(key.fd, _CHUNK)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    output += data[: limit + 1 - len(output)]
                else:
                    errors = (errors + data)[-_TAIL:]
            if (over and not ready) or (stop and len(output) > limit):
                break
    return output, errors


def _wait(process: subprocess.Popen[bytes], seconds: float) -> list[Any]:
    """Wait for a program that has closed both streams."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return []


def _end(process: subprocess.Popen[bytes], mark: str | None) -> None:
    """Kill what is left of a program: its group, and, given the mark, processes that left the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if mark is not None:
        end_program(mark, process.pid)
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


class _Watcher:
    """The watching process of this process, started when the first program runs and again after a fork or if it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._running: dict[int, list[Any]] = {}

    @contextlib.contextmanager
    def watch(self, mark: str, folder: Path) -> Any:
        """Have a program ended if this process dies within the block.   Yields: a function that takes its process group."""
        number = next(self._numbers)
        try:
            self._tell(number, [mark, str(folder.resolve()), None])
            yield lambda group: self._tell(number, [mark, str(folder.resolve()), group])
        finally:
            self._tell(number, None)

    def close(self) -> None:
        """End the watching process."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()

    def _tell(self, number: int, what: list[Any] | None) -> None:
        if self._owner != os.getpid():  # a fork: the other process has its own programs, and maybe held the lock
            self._owner, self._process, self._running, self._lock = os.getpid(), None, {}, threading.Lock()
        with self._lock:
            if what is None:
                self._running.pop(number, None)
            else:
                self._running[number] = what
            if self._process is not None and self._process.poll() is None:
                with contextlib.suppress(OSError):
                    self._send(number, what)
                    return
            if self._running:
                self._start()
                for known, text in self._running.items():
                    self._send(known, text)

    def _send(self, number: int, what: list[Any] | None) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, *(what or ())]).encode() + b"\n")

    def _start(self) -> None:
        old, script = self._process, Path(__file__).with_name("_watcher.py")
        if old is not None and old.stdin is not None:
            with contextlib.suppress(OSError):
                old.stdin.close()
        # its error stream stays that of this process, so that a failure to start is seen; unbuffered: a line is sent when it is written
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, bufsize=0
        )


_WATCHER = _Watcher()
atexit.register(_WATCHER.close)
