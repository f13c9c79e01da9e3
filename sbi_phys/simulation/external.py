r"""Simulators made of a Python function or a command line program that produces one event per call.

    FunctionSimulator("showers:one_event", prior, [Observable("signal", 64)])
    CommandSimulator(["corsika", "--energy", "{energy}", "--seed", "{seed}"], prior, [Observable("signal", 64)], timeout=600)

Both follow the `Simulator` protocol. Every event has its own generator or seed. An event that fails is flagged with the reason; the other
events are kept and nothing is simulated twice. A program that exceeds its time limit is killed together with the processes it started, and
so is one whose worker or campaign is killed. Of its output only what the event needs is kept. A function that crashes or hangs loses only
its own event if it runs isolated: simulate(..., isolate=True) or timeout=.
"""

import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checks import require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import Array
from sbi_phys.priors import Observable, Parameter, Prior, prior_from_dict
from sbi_phys.priors.blocks import to_rows
from sbi_phys.priors.parameters import observables_from_dicts, observables_to_dicts
from sbi_phys.simulation._programs import run_program
from sbi_phys.simulation.protocol import RowsFailedError, event_reason, require_foreign

__all__ = ["CommandSimulator", "FunctionSimulator"]


_STDERR_LINES = 5
# Text that an event may have: some for other words than its values, which are refused then with their own reason, and 64 bytes a value.
_OUTPUT_BYTES, _VALUE_BYTES = 2**20, 64
_FIELD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


class _Described:
    """Prior and observables, given as objects or as the dictionaries that files hold."""

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
    def code_sources(self) -> tuple[Any, ...]:
        """What the events come from, for the fingerprint that stores keep: the function, or the program's files."""
        raise NotImplementedError

    @property
    def n_columns(self) -> int:
        """Values per event."""
        return sum(o.size for o in self.observables)

    def described(self) -> dict[str, Any]:
        """Return prior and observables as JSON values."""
        return {"prior": self.prior.to_dict(), "observables": observables_to_dicts(self.observables)}

    def event(self, values: Any) -> Array:
        """One event as (k,), from any array of k values or from {name: array} with one for each observable.   Raises: DataError."""
        if isinstance(values, Mapping):
            return np.asarray(to_rows(values, self.observables, name="event")[0][0], dtype=np.float64)
        size = np.size(values)
        if size != self.n_columns:
            names = ", ".join(f"{o.name} ({o.size})" for o in self.observables)
            raise DataError(f"an event has {size} values; expected {self.n_columns}: {names}")
        return np.array(values, dtype=np.float64).ravel()


class FunctionSimulator(_Described):
    """A simulator made of a Python function of one event, function(theta, rng) -> values.

    The function is called with theta as a dict {name: value}, in the parameters' units, and its own numpy generator.

    Args: function: 'package.module:name', from which files and the command line rebuild the simulator; or the function itself, also one
    of a notebook or a lambda. prior, observables: of the simulator.   Raises: SettingError.

    >>> import sys, types
    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> def one_event(theta, rng):
    ...     return [rng.exponential(theta["lifetime"])]
    >>> sys.modules["decay"] = types.SimpleNamespace(one_event=one_event)  # in place of a file decay.py
    >>> prior = sp.BoxPrior([sp.Parameter("lifetime", 0.5, 5.0, unit="us")])
    >>> simulator = sp.FunctionSimulator("decay:one_event", prior, [sp.Observable("time", 1, unit="us")])
    >>> simulator.simulate(np.array([[1.0], [2.0]]), np.random.default_rng(0)).shape
    (2, 1)
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        prior: Prior | Mapping[str, Any],
        observables: Sequence[Observable | Mapping[str, Any]],
    ) -> None:
        super().__init__(prior, observables)
        if callable(function):
            kind = function if hasattr(function, "__qualname__") else type(function)
            self._function, self.function = function, f"{kind.__module__}:{kind.__qualname__}"
            return
        module, colon, name = str(function).partition(":")
        if not colon:
            raise SettingError(f"function is {function!r}; expected 'package.module:name'")
        require_foreign(f"function {function!r}", module)
        try:
            self._function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as err:
            raise SettingError(f"function {function!r} cannot be found: {err}; expected 'package.module:name'") from err
        if not callable(self._function):
            raise SettingError(f"function {function!r} is a {type(self._function).__name__}; expected a function (theta, rng) -> values")
        self.function = str(function)

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments that rebuild the simulator."""
        return {"function": self.function, **self.described()}

    @property
    def code_sources(self) -> tuple[Any, ...]:
        """The function, with its module."""
        return (self._function,)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name, so that a worker imports the function; where it cannot, with the function."""
        module, _, name = self.function.partition(":")
        found = None if module == "__main__" else getattr(sys.modules.get(module), name, None)
        return _rebuild, (
            type(self),
            self.settings if found is self._function else {**self.settings, "function": self._function},
            self.function,
        )

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Draw events x (n, k) at theta (n, d), one call per event.   Raises: RowsFailedError."""
        return _one_by_one(theta, rng, self.n_columns, self.one_event)

    def one_event(self, theta: Array, rng: np.random.Generator) -> Array:
        """Draw one event x (k,) at theta (d,).   Raises: DataError (wrong number of values), and any error of the function."""
        return self.event(self._function({p.name: float(v) for p, v in zip(self.parameters, theta, strict=True)}, rng))


class CommandSimulator(_Described):
    r"""A simulator made of a command line program that runs once per event, each time in its own empty folder.

    Args:
        command: program and arguments, with fields: {name} is the value of a parameter, {name:.3e} the same with a format,
            {seed} a number below 2^31 drawn from the event's generator, {folder} the working folder; {{ and }} are braces.
        prior, observables: of the simulator.
        output: file in the working folder with the event's values (.npy, or text separated by white space or commas), or 'stdout'.
            Text above 1 MiB plus 64 bytes for each value is refused; what else the program writes to stdout is dropped.
        files: {name: text} of input files to write into the working folder, with the same fields.
        timeout: seconds allowed per event; None for no limit.
        retries: further runs, with the same seed, if the program ends with a status other than 0 or leaves no output.
    Raises: SettingError.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 1.0, 10.0, unit="TeV")])
    >>> simulator = sp.CommandSimulator(["echo", "{energy:.1f}", "2.0"], prior, [sp.Observable("signal", 2)])
    >>> simulator.simulate(np.array([[3.0]]), np.random.default_rng(0))
    array([[3., 2.]])
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
            raise SettingError(f"command is {command!r}; expected a list of strings beginning with the program; no shell is used")
        self.command, self.output, self.files = list(command), str(output), dict(files or {})
        self.timeout = None if timeout is None else require_number("timeout", timeout, low=0, open_low=True)
        self.retries = require_int("retries", retries, low=0)
        known = {*(p.name for p in self.parameters), "seed", "folder"}
        for text in (*self.command, *self.files.values()):
            for field in _FIELD.findall(text.replace("{{", "").replace("}}", "")):
                if field[0] not in known:
                    raise SettingError(f"{{{field[0]}}} in {text!r} is not a parameter; expected one of {', '.join(sorted(known))}")

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments that rebuild the simulator."""
        own = {"command": self.command, "output": self.output, "files": self.files, "timeout": self.timeout, "retries": self.retries}
        return {**own, **self.described()}

    @property
    def code_sources(self) -> tuple[Any, ...]:
        """The program, unless it belongs to the system, and the files that its arguments name; the command itself is in `settings`."""
        found = shutil.which(self.command[0])
        paths = [Path(found)] if found and not Path(found).resolve().is_relative_to("/usr") else []
        paths += [Path(part) for part in self.command[1:] if os.sep in part and Path(part).is_file()]
        return tuple(p for p in paths if not p.resolve().is_relative_to(sys.base_prefix))

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Draw events x (n, k) at theta (n, d), one run of the program per event.   Raises: RowsFailedError."""
        return _one_by_one(theta, rng, self.n_columns, self.one_event)

    def one_event(self, theta: Array, rng: np.random.Generator) -> Array:
        """Draw one event x (k,) at theta (d,).   Raises: TimeoutError, DataError, RuntimeError with the program's status and output."""
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
        from_stdout, limit = self.output == "stdout", _OUTPUT_BYTES + _VALUE_BYTES * self.n_columns
        try:
            done = run_program(command, folder, timeout=self.timeout, limit=limit, stop=from_stdout)
        except TimeoutError as late:
            raise TimeoutError(f"{self.command[0]} did not end within the timeout of {self.timeout:g} s") from late
        if from_stdout and done.too_long:
            raise DataError(f"{self.command[0]} wrote more than {limit} bytes to stdout; expected {self.n_columns} values")
        words = " | ".join(done.errors.decode(errors="replace").replace(str(folder), "{folder}").strip().splitlines()[-_STDERR_LINES:])
        if done.status:
            how = f"signal {-done.status}" if done.status < 0 else f"status {done.status}"
            raise _RunError(f"{self.command[0]} ended with {how}: {words or 'nothing on stderr'}")
        return self.event(self._read(folder, done.output, words))

    def _read(self, folder: Path, out: bytes, words: str) -> Any:
        if self.output == "stdout":
            text = out.decode(errors="replace")
        else:
            path = folder / self.output
            if not path.is_file():
                raise _RunError(f"{self.command[0]} left no {self.output}: {words or 'nothing on stderr'}")
            if path.suffix == ".npy":
                # mapped, so that an array of another size takes no memory before it is refused
                return np.load(path, mmap_mode="r", allow_pickle=False)
            size, limit = path.stat().st_size, _OUTPUT_BYTES + _VALUE_BYTES * self.n_columns
            if size > limit:
                raise DataError(f"{self.command[0]} wrote {size} bytes to {self.output}; expected {self.n_columns} values, below {limit}")
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            return [float(word) for word in text.replace(",", " ").split()]
        except ValueError as err:
            raise _RunError(f"{self.command[0]} wrote a value to {self.output} that is not a number: {err}") from err


class _RunError(RuntimeError):
    """A run failed and can be repeated."""


def _rebuild(kind: type[FunctionSimulator], settings: dict[str, Any], name: str) -> FunctionSimulator:
    simulator = kind(**settings)
    simulator.function = name
    return simulator


def _one_by_one(theta: Array, rng: np.random.Generator, n_columns: int, event: Any) -> Array:
    """Draw events (n, k), each with its own generator; raise RowsFailedError at the end if some failed."""
    x = np.full((len(theta), n_columns), np.nan)
    reasons: dict[int, str] = {}
    for i, (row, own) in enumerate(zip(theta, rng.spawn(len(theta)), strict=True)):
        try:
            x[i] = event(row, own)
        except MemoryError:
            raise  # a property of the machine, not of the event
        except (Exception, SystemExit) as err:
            reasons[i] = event_reason(err)
    if reasons:
        raise RowsFailedError(x, reasons)
    return x
