r"""Inspection of a simulator before a campaign: what would make its rows wrong, not reproducible, lost, or slow.

A test of the likelihood needs no posterior. Take two parameter values, draw x from one of them by the toss of a coin, y = 0 or 1, and let
s(x) = p(x | theta_1) / (p(x | theta_0) + p(x | theta_1)). With the right density s is the probability of y = 1 given x, so

    E[(y - s) g(s)] = 0,   Var[(y - s) g(s)] = E[s (1 - s) g(s)^2]   for every g,

and y contradicts an s below 1e-3 or above 1 - 1e-3 at most at the rate that these s state. The means with g = 1 - 2 s and with
theta_1 - theta_0 of each parameter, and the number of contradictions, are compared with that. A density that is too narrow, too wide or
shifted relative to the draws fails one of them.

Source: Spiegelhalter 1986, doi:10.1002/sim.4780050506 (g = 1 - 2 s).
"""

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from sbi_phys.core.checks import require_int, require_number, shortened
from sbi_phys.core.errors import DataError, SbiPhysError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import seconds_text
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array
from sbi_phys.priors.blocks import column_name, columns, fractional, missing_columns, to_rows
from sbi_phys.simulation.protocol import Simulator, check_output, check_simulator
from sbi_phys.simulation.rows import simulate_rows
from sbi_phys.store.identity import class_path
from sbi_phys.store.info import reason_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Finding", "Inspection", "inspect_simulator", "quick_check"]

_ALPHA = 1e-6  # p-value, over all columns, below which a difference is reported
_ALPHA_THETA = 1e-3  # below which failures depend on a parameter
_SURE = 1e-3  # probability of a label below which it counts as contradicted, if it occurs
_DECADES = 4.0
_EPS = float(np.finfo(np.float32).eps)
_TINY = float(np.finfo(np.float32).smallest_subnormal) / 2
_HUGE = float(np.finfo(np.float32).max)
_NAMED = 4  # columns named in a finding
_COLUMNS = 64  # columns, at equal distances, whose distributions are compared
_FAR = 0.5  # of the range of the simulations, beyond which an observation lies outside
_ALONE = 20  # calls with a single row
_CALLS = 8  # runs of n rows in all tests


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: kind ('error', 'warning' or 'note'), topic, and text that says what was got, what is expected and what to do.

    >>> from sbi_phys.simulation.inspection import Finding
    >>> print(Finding("error", "shape", "got (3,); expected (3, 1)"))
    error    shape: got (3,); expected (3, 1)
    """

    kind: str
    topic: str
    text: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.kind:8} {self.topic}: {self.text}"


@dataclass(frozen=True, slots=True)
class Inspection(Result):
    """Result of `inspect_simulator`.

    Fields: simulator, its class; n, rows looked at; findings; n_failed rows and reasons {kind: rows}; rate, rows a second in one
    process (None if no call ended well); blocks, for each observable its name, shape, lowest, median and highest value.

    >>> import sbi_phys as sp
    >>> found = sp.simulation.inspect_simulator(3)
    >>> found.ok, found.errors[0].topic
    (False, 'attributes')
    """

    simulator: str
    n: int
    findings: tuple[Finding, ...]
    n_failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    rate: float | None = None
    blocks: tuple[dict[str, Any], ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings with which no campaign should start."""
        return tuple(f for f in self.findings if f.kind == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that are probably not intended."""
        return tuple(f for f in self.findings if f.kind == "warning")

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return not self.errors

    def rows(self) -> Rows:
        """Return the table: one row for each finding."""
        return Rows(("kind", "topic", "text"), tuple((f.kind, f.topic, f.text) for f in self.findings))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the numbers of errors, warnings and notes."""
        kinds = Counter(f.kind for f in self.findings)
        return figures.results.bars({kind: kinds[kind] for kind in ("error", "warning", "note")}, ax, xlabel="findings")

    def summary(self) -> str:
        """A short table and the findings, errors first."""
        lines = [f"simulator  {self.simulator}", f"rows       {self.n}, {self.n_failed} failed"]
        lines += [f"  {n:>8} x {reason}" for reason, n in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))[:5]]
        if self.rate:
            lines.append(f"speed      {self.rate:.3g} rows/s in one process, {seconds_text(1e5 / self.rate)} for 1e5 rows")
        for b in self.blocks:
            values = f"{b['low']:.4g} to {b['high']:.4g}, median {b['median']:.4g}" if b["low"] is not None else "no finite value"
            lines.append(f"observable {b['name']} {tuple(b['shape'])} {b['kind']}, {b['dtype']}: {values}")
        rank = {"error": 0, "warning": 1, "note": 2}
        lines += [str(f) for f in sorted(self.findings, key=lambda f: rank[f.kind])]
        lines.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings" if self.findings else "no findings")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `ok` as JSON values."""
        return Result.to_dict(self) | {"ok": self.ok}


def inspect_simulator(simulator: Simulator, *, n: int = 1000, seed: int = 0, max_seconds: float = 60.0) -> Inspection:
    """Run a simulator on draws of its prior and report what would make a campaign wrong, not reproducible, lossy or slow.

    Tested: attributes and shapes (also of one row), random numbers (those of the generator handed in, and none of numpy's, Python's or
    torch's global ones), rows that fail and whether that depends on theta, changes of theta, files, independence of the rows, values
    (constant, fractional or negative counts, many decades, what float32 cannot hold), speed; where the simulator has them,
    `log_likelihood` against draws, `expected` against means, `observed` against the simulations.

    Args: n: rows of a run. seed: of the draws; global generators are restored. max_seconds: beyond it no further test begins.
    Returns: Inspection; `ok` is False if there are errors.   Raises: SettingError.

    >>> import sbi_phys as sp
    >>> from simulators import OnOff
    >>> found = sp.simulation.inspect_simulator(OnOff(), n=300)
    >>> found.ok, found.n_failed
    (True, 0)
    """
    n, seed = require_int("n", n, low=2), require_int("seed", seed, low=0)
    looking = _Inspector(simulator, n, seed, require_number("max_seconds", max_seconds, low=0, open_low=True))
    looking.run()
    return looking.result()


def quick_check(simulator: Simulator, *, seed: int = 0) -> Inspection:
    """Inspect a simulator in about half a second, or the time of its first call if that takes longer.

    >>> from sbi_phys.simulation.inspection import quick_check
    >>> from simulators import OnOff
    >>> quick_check(OnOff()).ok
    True
    """
    return inspect_simulator(simulator, n=100, seed=seed, max_seconds=0.5)


class _StopError(Exception):
    """An error after which further tests say nothing."""


class _Inspector:
    """The tests of one inspection, in order; each adds findings."""

    def __init__(self, simulator: Simulator, n: int, seed: int, max_seconds: float) -> None:
        self.simulator, self.n, self.seed = simulator, n, seed
        self.deadline = time.perf_counter() + max_seconds
        self.findings: list[Finding] = []
        self.facts: dict[str, Any] = {}
        self.call_s = self.row_s = 0.0
        self.in_place = False
        self.few_error = self.dtype = ""
        self.folders = {Path.cwd(), *_module_folder(simulator)}
        self.files = _files(self.folders)

    def add(self, kind: str, topic: str, text: str) -> None:
        self.findings.append(Finding(kind, topic, text))

    def result(self) -> Inspection:
        name = self.simulator.__name__ if isinstance(self.simulator, type) else class_path(self.simulator)
        return Inspection(name, self.facts.pop("n", 0), tuple(self.findings), **self.facts)

    def run(self) -> None:
        try:
            check_simulator(self.simulator)
        except SbiPhysError as err:
            self.add("error", "attributes", str(err))
            return
        with _global_state_kept(), suppress(_StopError):
            self.theta = self.simulator.prior.sample(self.n, rng_for(self.seed, "inspect theta"))
            self.few_rows()
            for test in (self.reproducible, self.values, self.mean, self.measured, self.likelihood, self.independent):
                if not self._in_time():
                    self.add("note", "time", f"tests from {test.__name__!r} on were left out: a row takes {self.row_s:.3g} s")
                    break
                test()
        if self.in_place:
            self.add("warning", "theta", "simulate changed the array theta that it was given; expected that it copies what it changes")

    def _in_time(self) -> bool:
        """Whether the time allows a further test, at first with fewer rows where there is less."""
        left = self.deadline - time.perf_counter()
        if "n" in self.facts:
            return 2 * (self.call_s + self.n * self.row_s) < left
        n = int(min(self.n, (left / _CALLS - self.call_s) / max(self.row_s, 1e-9)))
        if n < min(10, self.n):
            return False
        self.n, self.theta = n, self.theta[:n]
        return True

    def call(self, theta: Array, rng: np.random.Generator) -> Any:
        before = theta.copy()
        try:
            return self.simulator.simulate(theta, rng)
        finally:
            self.in_place |= not np.array_equal(theta, before)

    def rows(self, theta: Array, key: str) -> tuple[Array, dict[int, str]]:
        """Rows of x and reasons of failed ones.   Raises: _StopError after an error."""
        try:
            return simulate_rows(self.simulator, theta, rng_for(self.seed, "inspect", key), call=self.call)
        except (SbiPhysError, MemoryError) as err:
            topic = "failures" if isinstance(err, DataError) else "shape"
            self.add("error", topic, shortened(str(err) or type(err).__name__, 400))
            raise _StopError from err

    def few_rows(self) -> None:
        """Shape for a single row, time of a call and of a row."""
        seconds: list[float] = []
        for n in (1, 1, 16):
            if seconds and time.perf_counter() + n * seconds[-1] > self.deadline:
                break
            begin = time.perf_counter()
            try:
                got = self.call(self.theta[:n].copy(), rng_for(self.seed, "inspect", "few"))
            except Exception as err:  # whether all rows fail is seen later
                self.few_error = f"{type(err).__name__}: {err}" if n == 1 else self.few_error
                continue
            finally:
                seconds.append(time.perf_counter() - begin)
            try:
                self.dtype = str(check_output(self.simulator, got, min(n, self.n)).dtype)
            except SbiPhysError as err:
                self.add("error", "shape", shortened(f"for {n} row{'s' * (n > 1)} of theta: {err}", 400))
                raise _StopError from err
        self.call_s = seconds[min(1, len(seconds) - 1)]
        self.row_s = max(0.0, seconds[2] - self.call_s) / 15 if len(seconds) == 3 else self.call_s

    def _fails_alone(self) -> bool:
        """Whether single rows of theta fail for each of several generators, and not only by chance."""
        for i in range(_ALONE):
            row = i % len(self.theta)
            try:
                self.call(self.theta[row : row + 1].copy(), rng_for(self.seed, "inspect", "alone", i))
            except Exception:  # as above
                continue
            return False
        return True

    def reproducible(self) -> None:
        """The same generator gives the same rows whatever the global generators are; another generator gives others."""
        runs = []
        used: set[str] = set()
        for number in (1, 2):
            states = _seed_global(number)
            begin = time.perf_counter()
            runs.append(self.rows(self.theta, "x"))
            seconds = time.perf_counter() - begin
            used |= {name for name, state in _global_states().items() if states[name] not in (None, state)}
        new = sorted(_files(self.folders) - self.files)
        (self.x, self.reasons), again = runs
        self.facts |= {"n": self.n, "n_failed": len(self.reasons), "rate": self.n / max(seconds, 1e-9)}
        self.facts["reasons"] = dict(Counter(map(reason_kind, self.reasons.values())))
        if self.few_error and 0 not in self.reasons and self._fails_alone():
            text = f"simulate raised {shortened(self.few_error)} for a single row of theta, but not among {self.n}; expected (1, k)"
            self.add("error", "shape", text)
        names = ", ".join(sorted(used))
        if not np.array_equal(self.x, again[0], equal_nan=True):
            columns = np.flatnonzero(((self.x != again[0]) & ~(np.isnan(self.x) & np.isnan(again[0]))).any(axis=0))
            cause = f"it uses {names}" if used else "it seeds a generator from the time or the system, or keeps numbers between calls"
            self.add(
                "error",
                "random numbers",
                f"two calls with the same theta and generator gave other numbers in {self._named(columns)}: {cause}; expected all random "
                "numbers from the argument rng: rng.normal(...), rng.poisson(...), torch.Generator().manual_seed(int(rng.integers(2**63)))",
            )
        elif used:
            self.add(
                "warning",
                "random numbers",
                f"simulate used {names}, though x did not depend on it; expected random numbers from the argument rng alone",
            )
        if new:
            self.add(
                "warning",
                "files",
                f"files appeared while simulate ran: {shortened(', '.join(new))}; several workers would write the same ones: expected "
                "none, or files in a folder of tempfile.TemporaryDirectory()",
            )
        self.failures()
        other, _ = self.rows(self.theta, "other x")
        if np.array_equal(self.x, other, equal_nan=True):
            self.add(
                "warning",
                "random numbers",
                "x is the same for another generator: a simulator without noise has no likelihood; expected draws from rng",
            )

    def failures(self) -> None:
        """Share of failed rows, and whether it depends on theta."""
        n_failed = len(self.reasons)
        if not n_failed:
            return
        row, reason = next(iter(self.reasons.items()))
        share = f"{n_failed} of {self.n} rows failed ({100 * n_failed / self.n:.2g} %), row {row}: {shortened(reason)}"
        failed = np.zeros(self.n, dtype=bool)
        failed[list(self.reasons)] = True
        words = []
        if min(n_failed, self.n - n_failed) >= 5:
            for j, name in enumerate(self.simulator.prior.names):
                a, b = self.theta[failed, j], self.theta[~failed, j]
                if _ks(a, b) < _ALPHA_THETA / self.theta.shape[1]:
                    words.append(f"{name} (median {np.median(a):.4g} where it fails, {np.median(b):.4g} elsewhere)")
        if words:
            share += (
                f". Failures depend on {', '.join(words)}: failed rows are left out of a training, so the posterior is that of simulations "
                "that succeed; expected failures that do not depend on theta, a narrower prior, or a simulator mended there"
            )
        else:
            share += "; they are flagged in the store and left out of a training"
        self.add("warning", "failures", share)

    def values(self) -> None:
        """Range of the columns, and what float32 would lose of them."""
        observables = self.simulator.observables
        good = self.x[~np.isnan(self.x).all(axis=1)]
        blocks = []
        for o, block in zip(observables, columns(observables).values(), strict=True):
            part = good[:, block]
            seen = part[np.isfinite(part)]
            low, median, high = (float(v) for v in np.quantile(seen, [0, 0.5, 1])) if seen.size else (None, None, None)
            facts = {"name": o.name, "shape": list(o.shape), "kind": o.kind, "dtype": self.dtype, "low": low, "median": median}
            blocks.append({**facts, "high": high, "missing": float(np.isnan(part).mean()) if part.size else 0.0})
            self._counts(o, part) if o.kind == "counts" else self._decades(part, block.start)
        self.facts["blocks"] = tuple(blocks)
        if len(good) > 1:
            self._columns(good)

    def _counts(self, o: Any, part: Array) -> None:
        found = fractional(part, (o,))
        if found is not None:
            self.add(
                "error",
                "counts",
                f"{column_name((o,), found[1])} is {part[found]:g} in row {found[0]}; expected whole numbers, or kind='real'",
            )
        if (part < 0).any():
            row, column = (int(i) for i in np.argwhere(part < 0)[0])
            self.add(
                "error",
                "counts",
                f"{column_name((o,), column)} is {part[row, column]:g} in row {row}; expected counts >= 0, or kind='real'",
            )
        elif np.nanmax(part, initial=0) >= 2**24:
            self.add(
                "warning", "float32", f'counts of {o.name} reach {np.nanmax(part):.3g}, above 2^24; expected dtype="float64" of the store'
            )

    def _decades(self, part: Array, start: int) -> None:
        if not len(part):
            return
        ranked = np.sort(part, axis=0)  # NaN last
        n, at = np.isfinite(part).sum(axis=0), np.arange(part.shape[1])
        low, high = (ranked[np.maximum(0, (q * (n - 1)).astype(int)), at] for q in (0.01, 0.99))
        with np.errstate(divide="ignore", invalid="ignore"):
            decades = np.log10(high / np.where(low > 0, low, np.nan))
        wide = np.flatnonzero(decades > _DECADES)
        if wide.size:
            j = int(wide[0])
            self.add(
                "warning",
                "range",
                f"{self._named(wide + start)} of kind 'real' run over {decades[j]:.1f} decades ({low[j]:.3g} to {high[j]:.3g}); a network "
                "sees the largest values alone: expected the logarithm, or kind='counts' for numbers of events",
            )

    def _columns(self, x: Array) -> None:
        finite = np.isfinite(x)
        low, high = np.where(finite, x, np.inf).min(axis=0), np.where(finite, x, -np.inf).max(axis=0)
        constant = np.flatnonzero(low == high)
        if constant.size:
            still = set(constant.tolist())
            whole = any(still.issuperset(range(b.start, b.stop)) for b in columns(self.simulator.observables).values())
            self.add(
                "warning" if whole else "note",
                "constant",
                f"{self._named(constant)} did not vary ({low[constant[0]]:.4g} in all rows); expected columns that depend on theta",
            )
        largest = np.maximum(np.abs(low), np.abs(high))
        huge = np.flatnonzero(np.isfinite(largest) & (largest > _HUGE))
        filled = finite & (x != 0)
        faint = np.flatnonzero(2 * (filled & (np.abs(x) < _TINY)).sum(axis=0) > filled.sum(axis=0))
        with np.errstate(over="ignore", invalid="ignore"):
            sd = np.where(finite, x - low, 0.0).std(axis=0)
            flat = np.flatnonzero((low < high) & (largest <= _HUGE) & (_EPS * largest > 0.01 * sd))
        flat = np.setdiff1d(flat, faint)
        for which, what in (
            (huge, "exceed what float32 holds (3.4e38)"),
            (faint, "are mostly below what float32 holds (1e-45), which keeps 0"),
            (flat, "vary by less than 100 steps of float32 about a large offset"),
        ):
            if which.size:
                j = int(which[0])
                kind = "error" if which is not flat else "warning"
                self.add(
                    kind,
                    "float32",
                    f"{self._named(which)} {what} ({low[j]:.6g} to {high[j]:.6g}); expected other units, a difference from the offset, or "
                    'dtype="float64" of the store',
                )

    def mean(self) -> None:
        """`expected` against the means of draws."""
        expected = getattr(self.simulator, "expected", None)
        if not callable(expected):
            return
        good = ~np.isnan(self.x).all(axis=1)
        try:
            mu = np.asarray(expected(self.theta[good].copy()), dtype=np.float64)
        except Exception as err:
            self.add("error", "expected", f"expected(theta) raised {type(err).__name__}: {shortened(str(err))}; expected means (n, k)")
            return
        x = self.x[good]
        if mu.shape != x.shape:
            self.add("warning", "expected", f"expected(theta) has shape {mu.shape}; expected {x.shape}, the mean of each column of x")
            return
        variance = (x - mu).var(axis=0, ddof=1)
        for o, block in zip(self.simulator.observables, columns(self.simulator.observables).values(), strict=True):
            if o.kind == "counts":  # of rare counts the sample may hold none
                variance[block] = np.maximum(variance[block], mu[:, block].mean(axis=0))
        with np.errstate(invalid="ignore", divide="ignore"):
            z = np.nan_to_num((x - mu).mean(axis=0) / np.sqrt(variance / len(x)), nan=0.0)
        bad = np.flatnonzero(2 * stats.t.sf(np.abs(z), max(len(x) - 1, 1)) < _ALPHA / z.size)
        if bad.size:
            j = int(bad[np.argmax(np.abs(z[bad]))])
            self.add(
                "error",
                "expected",
                f"draws differ from expected(theta) in {self._named(bad)}: in {self._named([j])} the mean of draws "
                f"is {x[:, j].mean():.5g}, of expected {mu[:, j].mean():.5g} ({z[j]:.1f} standard errors); expected the same means",
            )

    def measured(self) -> None:
        """`observed` against the simulations."""
        observed = getattr(self.simulator, "observed", None)
        if not callable(observed):
            return
        observables = self.simulator.observables
        try:
            rows, _ = to_rows(observed(), observables, name="observed()")
        except Exception as err:
            self.add("error", "observed", shortened(f"{type(err).__name__}: {err}", 400))
            return
        x = np.asarray(rows, dtype=np.float64)
        bad = np.flatnonzero((~np.isfinite(x) & ~(np.isnan(x) & missing_columns(observables))).any(axis=0))
        if bad.size:
            self.add("error", "observed", f"observed() is {x[0, bad[0]]} in {self._named(bad)}; expected finite values")
        with np.errstate(invalid="ignore"):
            good = self.x[~np.isnan(self.x).all(axis=1)]
            low, high = np.where(np.isfinite(good), good, np.inf).min(axis=0), np.where(np.isfinite(good), good, -np.inf).max(axis=0)
            # of k columns a few lie beyond n simulations by chance, but not by half their range
            far = _FAR * (high - low)
            out = np.flatnonzero(((x < low - far) | (x > high + far)).any(axis=0))
        if out.size:
            j = int(out[0])
            self.add(
                "warning",
                "observed",
                f"observed() lies outside the {len(good)} simulations in {self._named(out)}: {x[0, j]:.5g}, simulations {low[j]:.5g} to "
                f"{high[j]:.5g}; expected the same units and a prior that covers the data",
            )

    def likelihood(self) -> None:
        """`log_likelihood` against draws (see the module)."""
        log_likelihood = getattr(self.simulator, "log_likelihood", None)
        if not callable(log_likelihood):
            return
        rng, prior = rng_for(self.seed, "inspect", "pairs"), self.simulator.prior
        u = prior.to_unbounded(prior.sample(2 * self.n, rng))
        step = 10.0 ** -rng.uniform(0, 2.5, size=(self.n, 1))
        change = step * (u[self.n :] - u[: self.n])
        pair = [prior.from_unbounded(u[: self.n]), prior.from_unbounded(u[: self.n] + change)]
        y = rng.random(self.n) < 0.5
        x, failed = self.rows(np.where(y[:, None], pair[1], pair[0]), "likelihood")
        good = np.setdiff1d(np.arange(self.n), list(failed))
        try:
            begin = time.perf_counter()
            log_likelihood(x[good[:4]], pair[0][good[:4]])
            seconds = (time.perf_counter() - begin) / 4
            affordable = int(max(0.0, self.deadline - time.perf_counter()) / (3 * seconds)) if seconds > 1e-3 else self.n
            if affordable < min(100, len(good)):
                self.add("note", "time", f"log_likelihood was not compared with draws: a row takes {seconds:.2g} s")
                return
            good = good[:affordable]
            values = [np.asarray(log_likelihood(x[good], theta[good].copy()), dtype=np.float64) for theta in pair]
        except Exception as err:
            text = f"log_likelihood(x, theta) raised {type(err).__name__}: {shortened(str(err))}; expected log p(x | theta) (n,)"
            self.add("error", "log_likelihood", text)
            return
        if any(v.shape != (len(good),) for v in values):
            self.add(
                "error", "log_likelihood", f"log_likelihood(x, theta) has shape {values[0].shape}; expected ({len(good)},), one per row"
            )
            return
        own = np.where(y[good], values[1], values[0])
        if not (np.isfinite(own).all() and not np.isnan(values).any()):
            bad = np.count_nonzero(~np.isfinite(own) | np.isnan(values).any(axis=0))
            text = (
                f"log_likelihood is not finite in {bad} of {len(good)} rows at the theta that they were drawn from; expected finite numbers"
            )
            self.add("error", "log_likelihood", text)
            return
        changes = {name: (pair[1] - pair[0])[good, j] for j, name in enumerate(prior.names)}
        pvalue, words = _label_test(values[1] - values[0], y[good], changes)
        if pvalue < _ALPHA:
            self.add(
                "error",
                "log_likelihood",
                f"draws do not belong to log_likelihood (p = {pvalue:.1g}): {words}; expected the density of the draws of simulate, "
                "with all constants that depend on theta",
            )

    def independent(self) -> None:
        """Rows at one theta have the same distribution, whatever the other rows of the batch are."""
        prior = self.simulator.prior
        far = prior.sample(64, rng_for(self.seed, "inspect", "far"))
        u = prior.to_unbounded(far)
        a, b = far[np.argmin(u.sum(axis=1))], far[np.argmax(u.sum(axis=1))]
        half = np.arange(self.n) % 2 == 1  # the first row is one of the others
        alone, failed = self.rows(np.tile(a, (self.n, 1)), "alone")
        mixed, failed_too = self.rows(np.where(half[:, None], a, b), "mixed")
        one = np.delete(alone, list(failed), axis=0)
        two = mixed[np.setdiff1d(np.flatnonzero(half), list(failed_too))]
        if min(len(one), len(two)) < 20:
            return
        varied, _ = self.rows(np.tile(a, (self.n, 1)), "alone again")
        if (one == one[0]).all() and not np.array_equal(np.nan_to_num(varied), np.nan_to_num(alone)):
            self.add(
                "error",
                "rows",
                f"all {len(one)} rows of a batch at one theta are equal: they share their noise; expected noise of each row's own",
            )
            return
        some = np.unique(np.linspace(0, one.shape[1] - 1, _COLUMNS).astype(int))
        bad = some[np.array([_ks(one[:, j], two[:, j]) for j in some]) < _ALPHA / some.size]
        if bad.size:
            j = int(bad[0])
            self.add(
                "error",
                "rows",
                f"rows at one theta differ with the other rows of the batch in {self._named(bad)} (median {np.nanmedian(one[:, j]):.4g}"
                f" alone, {np.nanmedian(two[:, j]):.4g} among others); expected that x[i] depends on theta[i] and rng alone",
            )

    def _named(self, found: Any) -> str:
        names = [column_name(self.simulator.observables, int(j)) for j in found[:_NAMED]]
        return ", ".join(names) + (f" and {len(found) - _NAMED} more columns" if len(found) > _NAMED else "")


def _ks(a: Array, b: Array) -> float:
    """P-value of the Kolmogorov-Smirnov test of two samples, 1 where one has no finite value."""
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    return float(stats.ks_2samp(a, b, method="asymp").pvalue) if a.size and b.size else 1.0


def _label_test(log_ratio: Array, y: Any, changes: dict[str, Array]) -> tuple[float, str]:
    """Return the p-value (Bonferroni) of labels y (n,) given log p(x | 1) - log p(x | 0), and the strongest contradiction in words.

    Args: changes: {parameter: theta_1 - theta_0 (n,)}, to which the change of the log ratio by a shifted density is proportional.
    """
    s = 1.0 / (1.0 + np.exp(-np.clip(log_ratio, -700, 700)))
    unsure = np.minimum(s, 1 - s) >= _SURE
    expected, wrong = float(np.minimum(s, 1 - s)[~unsure].sum()), int(np.count_nonzero((s > 0.5)[~unsure] != y[~unsure]))
    words = f"{wrong} draws have under {_SURE:g} times the density that another theta gives them, {expected:.2g} expected"
    tests = [(float(stats.poisson.sf(wrong - 1, max(expected, 1e-12))), words)]
    s, y = s[unsure], y[unsure]
    weights = {"likelihood ratios are too large or too small": 1 - 2 * s}
    weights |= {f"the likelihood is shifted in {name}": change[unsure] for name, change in changes.items()}
    for words, weight in weights.items():
        variance = weight**2 * s * (1 - s)
        if variance.sum() > 5 * variance.max(initial=0.0):  # enough rows for a normal law
            z = float((weight * (y - s)).sum() / np.sqrt(variance.sum()))
            tests.append((2 * float(stats.norm.sf(abs(z))), f"{words} ({abs(z):.1f} standard errors)"))
    p, words = min(tests)
    return min(1.0, (2 + len(changes)) * p), words


def _module_folder(simulator: object) -> list[Path]:
    file = getattr(sys.modules.get(type(simulator).__module__), "__file__", None)
    return [Path(file).resolve().parent] if file else []


def _files(folders: set[Path]) -> set[str]:
    """Names in some folders, without Python's own files."""
    found = set()
    for folder in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            found |= {str(folder / e.name) for e in entries if e.name != "__pycache__"}
    return found


def _torch() -> Any:
    """Return torch if the simulator, or anybody, has imported it: it is not imported for the test."""
    return sys.modules.get("torch")


def _global_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, Any] = {
        "numpy's global generator": (kind, np.asarray(keys).tobytes(), *rest),
        "Python's module random": random.getstate(),
    }
    if (torch := _torch()) is not None and hasattr(torch, "get_rng_state"):
        states["torch's global generator"] = torch.get_rng_state().numpy().tobytes()
    return states


def _seed_global(seed: int) -> dict[str, Any]:
    """Seed the global generators and return their states."""
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    if (torch := _torch()) is not None and hasattr(torch, "get_rng_state"):
        torch.default_generator.manual_seed(seed)
    states = _global_states()
    return {name: states.get(name) for name in (*states, "torch's global generator")}


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """Give the global generators back as they were."""
    torch = _torch()
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    torch_state = torch.get_rng_state() if torch is not None and hasattr(torch, "get_rng_state") else None
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        if torch_state is not None:
            torch.set_rng_state(torch_state)
