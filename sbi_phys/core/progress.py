"""Progress of long calls: a protocol, bars on a terminal, plain lines in a log; default none.

    with progress.task("simulate", total=n_rows) as task:
        for shard in todo:
            ...
            task.advance(shard.rows, text="3 failed")

Tasks nest (stages, then epochs within a stage) and may be advanced from several threads. A task is shown only inside its
`with` block; an exception closes the display before it leaves the block, so that the traceback is printed on a clean terminal.
The package rich is imported at the first drawing.
"""

import math
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO, runtime_checkable

from sbi_phys.core.checks import require_number
from sbi_phys.core.errors import SettingError

if TYPE_CHECKING:
    import rich.progress
    import rich.text

__all__ = ["NO_PROGRESS", "LineProgress", "NoProgress", "Progress", "RichProgress", "Task", "or_none", "seconds_text"]


class Task(Protocol):
    """A piece of work with a known or unknown total, in any unit: rows, epochs, steps."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def advance(self, n: float = 1, text: str = "") -> None:
        """Add `n` to the completed amount; `text` (a loss, a count of failures) replaces the last text unless empty."""

    def update(self, completed: float, text: str = "") -> None:
        """Set the completed amount, e.g. after a resume; `text` as in `advance`."""


@runtime_checkable
class Progress(Protocol):
    """An object that opens tasks."""

    def task(self, description: str, total: float | None) -> Task:
        """Return a task to be used in a `with` block; total None: unknown."""
        ...


class _NoTask:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def advance(self, n: float = 1, text: str = "") -> None:
        return None

    def update(self, completed: float, text: str = "") -> None:
        return None


class NoProgress:
    """Displays nothing."""

    def task(self, description: str, total: float | None) -> Task:
        """Return a task that does nothing."""
        return _NoTask()


NO_PROGRESS = NoProgress()


def or_none(progress: Progress | None) -> Progress:
    """Return `progress`, or `NO_PROGRESS` for None.   Raises: SettingError if it has no method `task`."""
    if progress is None:
        return NO_PROGRESS
    if isinstance(progress, type) or not isinstance(progress, Progress):
        raise SettingError(f"progress is {progress!r}; expected None or an object with task(description, total), e.g. RichProgress()")
    return progress


def seconds_text(seconds: float) -> str:
    """Return h:mm:ss or m:ss of a time in seconds, '-:--' if it is not finite."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# An update within this time after the start gives the work of an earlier run: it is completed, but not part of the rate.
_RESUME_S = 0.5


class _LineTask:
    """A task of `LineProgress`: counts under a lock and prints a line when one is due."""

    def __init__(self, owner: "LineProgress", description: str, total: float | None) -> None:
        self._owner, self._description, self._total = owner, description, total
        self._lock = threading.Lock()
        self._done, self._text, self._open = 0.0, "", False
        self._start = self._last = self._offset = 0.0

    def __enter__(self) -> Self:
        self._start = self._last = self._owner.clock()
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._open = False
            self._owner.line(self._describe(self._owner.clock(), f"stopped by {kind.__name__}" if kind else "done"))

    def advance(self, n: float = 1, text: str = "") -> None:
        with self._lock:
            self._set(self._done + n, text)

    def update(self, completed: float, text: str = "") -> None:
        with self._lock:
            if self._done == 0 and self._owner.clock() - self._start < _RESUME_S:
                self._offset = completed
            self._set(completed, text)

    def _set(self, done: float, text: str) -> None:
        self._done, self._text = done, text or self._text
        now = self._owner.clock()
        if self._open and now - self._last >= self._owner.interval_s:
            self._last = now
            self._owner.line(self._describe(now, ""))

    def _describe(self, now: float, state: str) -> str:
        elapsed = max(now - self._start, 1e-9)
        rate = (self._done - self._offset) / elapsed
        parts = []
        if self._total is not None or self._done:  # a task without steps has only its text
            parts.append(f"{self._done:.10g}" + (f"/{self._total:.10g}" if self._total is not None else ""))
        if self._total:
            parts[0] += f" ({100 * self._done / self._total:.0f} %)"
        elif self._total is None and not self._done:
            parts = []  # work without a count, such as a stage
        if rate > 0:
            parts.append(f"{rate:.3g}/s")
        parts.append(f"elapsed {seconds_text(elapsed)}")
        if self._total is not None and not state:
            parts.append(f"left {seconds_text((self._total - self._done) / rate if rate > 0 else math.inf)}")
        return f"{self._description}: " + ", ".join(parts + [p for p in (self._text, state) if p])


class LineProgress:
    """Plain lines for logs: for each task one line every `interval_s` seconds and one at its end, with rate and time left.

    Args: stream: default stderr. interval_s: >= 0, in seconds. clock: function that returns seconds.
    Raises: SettingError.

    >>> import io, sbi_phys as sp
    >>> log = io.StringIO()
    >>> with sp.LineProgress(log).task("simulate", total=200) as task:
    ...     task.advance(200)
    >>> log.getvalue().startswith("simulate: 200/200 (100 %)")
    True
    """

    def __init__(self, stream: TextIO | None = None, *, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval_s = require_number("interval_s", interval_s, low=0)
        self.clock = clock
        self._stream = stream
        self._lock = threading.Lock()

    def task(self, description: str, total: float | None) -> Task:
        """Return a task to be used in a `with` block."""
        return _LineTask(self, description, total)

    def line(self, text: str) -> None:
        """Write one line and flush it; lines of several threads do not mix."""
        with self._lock:
            print(text, file=self._stream or sys.stderr, flush=True)


class _RichTask:
    """A task of `RichProgress` on a terminal: a bar that is shown while its `with` block runs."""

    def __init__(self, owner: "RichProgress", description: str, total: float | None) -> None:
        self._owner, self._description, self._total = owner, description, total
        self._bars: rich.progress.Progress | None = None
        self._id: rich.progress.TaskID | None = None
        self._nested = False

    def __enter__(self) -> Self:
        self._bars, self._nested = self._owner.acquire()
        self._id = self._bars.add_task("  " * self._nested + self._description, total=self._total, text="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        bars, task_id, self._bars, self._id = self._bars, self._id, None, None
        if bars is None or task_id is None:
            return
        try:
            bars.stop_task(task_id)
            if kind is not None:
                bars.update(task_id, text=f"stopped by {kind.__name__}")
            elif self._nested:
                bars.remove_task(task_id)  # the bar of an epoch is removed, that of a stage stays
        finally:
            self._owner.release()

    def advance(self, n: float = 1, text: str = "") -> None:
        if self._bars is not None and self._id is not None:
            self._bars.advance(self._id, n)
            if text:
                self._bars.update(self._id, text=text)

    def update(self, completed: float, text: str = "") -> None:
        if self._bars is not None and self._id is not None:
            self._bars.update(self._id, completed=completed)
            if text:
                self._bars.update(self._id, text=text)


class RichProgress:
    """Bars on a terminal with elapsed time and time left; plain lines where the stream is not a terminal.

    Args: stream: default stderr. interval_s: seconds between lines without a terminal. terminal: whether the stream is a
    terminal, default as the stream says.
    Raises: SettingError.

    >>> import io, sbi_phys as sp
    >>> progress = sp.RichProgress(io.StringIO())
    >>> progress.is_terminal
    False
    """

    def __init__(self, stream: TextIO | None = None, *, interval_s: float = 10.0, terminal: bool | None = None) -> None:
        self._stream = stream
        self._lines = LineProgress(stream, interval_s=interval_s)
        self._terminal = terminal
        self._lock = threading.Lock()
        self._bars: rich.progress.Progress | None = None
        self._open = 0

    @property
    def is_terminal(self) -> bool:
        """Whether bars are drawn, not lines written."""
        return (self._stream or sys.stderr).isatty() if self._terminal is None else self._terminal

    def task(self, description: str, total: float | None) -> Task:
        """Return a task to be used in a `with` block."""
        return _RichTask(self, description, total) if self.is_terminal else self._lines.task(description, total)

    def acquire(self) -> tuple["rich.progress.Progress", bool]:
        """Return the live display, started by the first open task, and whether others are open (for tasks only)."""
        with self._lock:
            nested = self._open > 0
            if self._bars is None:
                self._bars = _make_bars(self._stream or sys.stderr, self._terminal)
                self._bars.start()
            self._open += 1
            return self._bars, nested

    def release(self) -> None:
        """Give the display back; the last task stops it, which restores the cursor (for tasks only)."""
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._bars is not None:
                bars, self._bars = self._bars, None
                bars.stop()


def _make_bars(stream: TextIO, terminal: bool | None) -> "rich.progress.Progress":
    from rich import progress as rp
    from rich.console import Console
    from rich.text import Text

    class Rate(rp.ProgressColumn):
        """Units a second."""

        def render(self, task: rp.Task) -> "rich.text.Text":
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.3g}/s" if speed else "", style="progress.data.speed")

    return rp.Progress(
        rp.TextColumn("{task.description}", markup=False),
        rp.BarColumn(),
        rp.TaskProgressColumn(),
        Rate(),
        rp.TimeElapsedColumn(),
        rp.TimeRemainingColumn(),
        rp.TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=stream, force_terminal=terminal),
        # output of the caller is not redirected
        redirect_stdout=False,
        redirect_stderr=False,
    )
