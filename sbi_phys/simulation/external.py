r"""Simulators that are Python functions or command line programs, one event at a time.

    FunctionSimulator("showers:one_event", prior, [Observable("signal", 64)])
    CommandSimulator(["corsika", "--energy", "{energy}", "--seed", "{seed}"], prior, [Observable("signal", 64)], timeout=600)

Both fit the `Simulator` protocol. Every event has a generator, or a seed, of its own, and an event that fails is flagged with the reason
while the others stand: nothing is simulated twice. A program that hangs is killed with all that it has started; a function that crashes its
process, or hangs, costs its event alone in a `sandbox` (simulate(..., isolate=True) or timeout=).
"""

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checks import require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import Array
from sbi_phys.priors import Observable, Parameter, Prior, prior_from_dict
from sbi_phys.priors.parameters import observables_from_dicts, observables_to_dicts
from sbi_phys.simulation.processes import event_reason
from sbi_phys.simulation.protocol import RowsFailedError

__all__ = ["CommandSimulator", "FunctionSimulator"]


_STDERR_LINES = 5
_FIELD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


class _Described:
    """Prior and observables, given as objects or, from a file, as their descriptions."""

    def __init__(self, prior: Prior | Mapping[str, Any], observables: Sequence[Observable | Mapping[str, Any]]) -> None:
        self.prior = prior if isinstance(prior, Prior) else prior_from_dict(dict(prior))
        given = [observables_to_dicts((o,))[0] if isinstance(o, Observable) else dict(o) for o in observables]
        self.observables = observables_from_dicts(given)
        if not self.observables:
            raise SettingError("observables is empty; expected at least one Observable(name, size)")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Columns of theta."""
        return self.prior.parameters

    @property
    def n_columns(self) -> int:
        """Numbers of an event."""
        return sum(o.size for o in self.observables)

    def described(self) -> dict[str, Any]:
        """Return both as JSON values."""
        return {"prior": self.prior.to_dict(), "observables": observables_to_dicts(self.observables)}

    def event(self, values: Any) -> Array:
        """One event as (k,).   Raises: DataError."""
        x = np.asarray(values, dtype=np.float64).ravel()
        if x.size != self.n_columns:
            raise DataError(f"{x.size} numbers; expected {self.n_columns}: {', '.join(f'{o.name} ({o.size})' for o in self.observables)}")
        return x


class FunctionSimulator(_Described):
    """A Python function of one event, function(theta, rng) -> numbers.

    Args: function: 'package.module:name', so that workers and stores can find it again. prior, observables: of the simulator.
    The function gets theta as a dict {name: value} in the parameters' units, and a numpy generator of its own.
    Raises: SettingError.
    """

    def __init__(self, function: str, prior: Prior | Mapping[str, Any], observables: Sequence[Observable | Mapping[str, Any]]) -> None:
        super().__init__(prior, observables)
        module, colon, name = str(function).partition(":")
        if not colon:
            raise SettingError(f"function is {function!r}; expected 'package.module:name'")
        try:
            self._function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as err:
            raise SettingError(f"function {function!r} can not be found: {err}; expected 'package.module:name'") from err
        if not callable(self._function):
            raise SettingError(f"function {function!r} is a {type(self._function).__name__}; expected a function (theta, rng) -> numbers")
        self.function = str(function)

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments that rebuild it."""
        return {"function": self.function, **self.described()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild by name: functions of a script's own module are found there."""
        return _rebuild, (type(self), self.settings)

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Events x (n, k) at theta (n, d), one call each.   Raises: RowsFailedError."""
        return _one_by_one(theta, rng, self.n_columns, self.one_event)

    def one_event(self, theta: Array, rng: np.random.Generator) -> Array:
        """One event x (k,) at theta (d,).   Raises: DataError (another number of numbers), and what the function raises."""
        return self.event(self._function({p.name: float(v) for p, v in zip(self.parameters, theta, strict=True)}, rng))


class CommandSimulator(_Described):
    r"""A command line program, run once an event in an empty folder of its own.

    Args:
        command: program and arguments. {name} is the value of a parameter, {name:.3e} with a format, {seed} a number below 2^31 that
            follows from the event's generator, {folder} the working folder; braces are doubled to stand for themselves.
        prior, observables: of the simulator.
        output: file, in the working folder, with the event's numbers (text, white space or commas between them, or .npy); 'stdout'.
        files: {name: text} of files that the program finds in its folder, with the same fields.
        timeout: seconds that an event may take; None without limit.
        retries: more runs, with the same seed, of a program that ended with another status than 0 or left no output.
    Raises: SettingError.
    """

    def __init__(
        self,
        command: Sequence[str],
        prior: Prior | Mapping[str, Any],
        observables: Sequence[Observable | Mapping[str, Any]],
        *,
        output: str = "stdout",
        files: Mapping[str, str] | None = None,
        timeout: float | None = None,
        retries: int = 0,
    ) -> None:
        super().__init__(prior, observables)
        if isinstance(command, str) or not command or not all(isinstance(part, str) for part in command):
            raise SettingError(f"command is {command!r}; expected a list of strings, the program first: no shell reads it")
        self.command, self.output, self.files = list(command), str(output), dict(files or {})
        self.timeout = None if timeout is None else require_number("timeout", timeout, low=0, open_low=True)
        self.retries = require_int("retries", retries, low=0)
        known = {*(p.name for p in self.parameters), "seed", "folder"}
        for text in (*self.command, *self.files.values()):
            for field in _FIELD.findall(text.replace("{{", "").replace("}}", "")):
                if field[0] not in known:
                    raise SettingError(f"{{{field[0]}}} in {text!r} is no parameter; expected some of {', '.join(sorted(known))}")

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments that rebuild it."""
        own = {"command": self.command, "output": self.output, "files": self.files, "timeout": self.timeout, "retries": self.retries}
        return {**own, **self.described()}

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Events x (n, k) at theta (n, d), one run of the program each.   Raises: RowsFailedError."""
        return _one_by_one(theta, rng, self.n_columns, self.one_event)

    def one_event(self, theta: Array, rng: np.random.Generator) -> Array:
        """One event x (k,) at theta (d,).   Raises: TimeoutError, DataError, RuntimeError with the program's status and last words."""
        values: dict[str, Any] = {p.name: float(v) for p, v in zip(self.parameters, theta, strict=True)}
        values["seed"] = int(rng.integers(2**31))
        for attempt in range(self.retries + 1):
            with tempfile.TemporaryDirectory(prefix="sbi_phys_event_") as folder:
                try:
                    return self._run(Path(folder), values | {"folder": folder})
                except _RunError:
                    if attempt == self.retries:
                        raise
        raise AssertionError("unreachable")

    def _run(self, folder: Path, values: dict[str, Any]) -> Array:
        for name, text in self.files.items():
            (folder / name).write_text(text.format(**values), encoding="utf-8")
        command = [part.format(**values) for part in self.command]
        # a session of its own, so that what the program starts is found and ended with it
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            out, err = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired as late:
            raise TimeoutError(f"{self.command[0]} did not end within the timeout of {self.timeout:g} s") from late
        finally:
            _end_group(process)
        words = " | ".join(err.decode(errors="replace").replace(str(folder), "{folder}").strip().splitlines()[-_STDERR_LINES:])
        if process.returncode:
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
            raise _RunError(f"{self.command[0]} ended with {how}: {words or 'nothing on stderr'}")
        return self.event(self._read(folder, out, words))

    def _read(self, folder: Path, out: bytes, words: str) -> Any:
        if self.output == "stdout":
            text = out.decode(errors="replace")
        else:
            path = folder / self.output
            if not path.is_file():
                raise _RunError(f"{self.command[0]} left no {self.output}: {words or 'nothing on stderr'}")
            if path.suffix == ".npy":
                return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            return [float(word) for word in text.replace(",", " ").split()]
        except ValueError as err:
            raise _RunError(f"{self.command[0]} wrote to {self.output} what is no number: {err}") from err


class _RunError(RuntimeError):
    """A run that ended badly, and may be tried again."""


def _rebuild(kind: type[FunctionSimulator], settings: dict[str, Any]) -> FunctionSimulator:
    return kind(**settings)


def _one_by_one(theta: Array, rng: np.random.Generator, n_columns: int, event: Any) -> Array:
    """Events (n, k), each with a generator of its own; those that fail are named at the end."""
    x = np.full((len(theta), n_columns), np.nan)
    reasons: dict[int, str] = {}
    for i, (row, own) in enumerate(zip(theta, rng.spawn(len(theta)), strict=True)):
        try:
            x[i] = event(row, own)
        except MemoryError:
            raise  # says something about the machine, nothing about the event
        except (Exception, SystemExit) as err:
            reasons[i] = event_reason(err)
    if reasons:
        raise RowsFailedError(x, reasons)
    return x


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what a program has left behind, and the program."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
