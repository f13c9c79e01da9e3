"""Running a simulator of which some rows fail: a batch that raises is divided until the failing rows are alone.

A simulator that knows which of its rows failed raises `RowsFailedError` with the other rows; then nothing is simulated twice.
"""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from sbi_phys.core.errors import DataError, StoreError
from sbi_phys.core.types import Array
from sbi_phys.priors.blocks import column_name, failed_rows, missing_columns
from sbi_phys.simulation.protocol import RowsFailedError, Simulator, check_output
from sbi_phys.store.identity import class_path

__all__ = ["failure_reason", "non_finite_reason", "simulate_parts", "simulate_rows"]

# Number of parts into which a failed batch is divided. Two parts need the fewest calls; more parts repeat fewer rows and crash fewer
# processes: with one failing row in a hundred, sixteen parts take half the time of two.
_PARTS = 16
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")

Part = tuple[int, int, Any, dict[int, str]]  # start, stop, output of the simulator or None, reasons of failed rows by their number


def simulate_parts(call: Callable[..., Any], theta: Array, rng_of: Callable[[int, int], np.random.Generator]) -> Iterator[Part]:
    """Call call(theta, rng) on all rows theta (n, d), and on parts of them where it raises -> (start, stop, output, reasons).

    Args: rng_of: function (start, stop) -> generator of these rows.   Raises: MemoryError and StoreError of the call.
    """
    todo = [(0, len(theta))]
    while todo:
        start, stop = todo.pop()
        try:
            # copied, because a simulator that works in place must not change the stored theta
            part: Part = start, stop, call(theta[start:stop].copy(), rng_of(start, stop)), {}
        except RowsFailedError as err:
            part = start, stop, err.x, {start + row: _ADDRESS.sub("0x...", text) for row, text in err.reasons.items()}
        except (MemoryError, StoreError):
            raise  # depends on the machine and not on the row
        except (Exception, SystemExit) as err:
            if stop - start > 1:
                n_parts = min(_PARTS, stop - start)
                edges = [start + (stop - start) * i // n_parts for i in range(n_parts + 1)]
                todo += reversed(list(pairwise(edges)))
                continue
            part = start, stop, None, {start: failure_reason(err)}
        yield part


def simulate_rows(
    simulator: Simulator, theta: Array, rng: np.random.Generator, *, call: Callable[..., Any] | None = None
) -> tuple[Array, dict[int, str]]:
    """Return x (n, k) for theta (n, d), with NaN in rows that failed, and {failed row: reason}.

    A row fails if the simulator raises for it, or if its x is not finite (NaN where an observable may have missing values does not
    count). The generator is that of `simulate` unless rows raise, which are then simulated with generators spawned from it.

    Args: call: function used in place of simulator.simulate.
    Raises: SimulatorMismatchError (wrong shape or dtype), DataError (all rows fail).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> class Decay:
    ...     settings = {}
    ...     prior = sp.BoxPrior([sp.Parameter("lifetime", 0.5, 5.0, unit="us")])
    ...     parameters = prior.parameters
    ...     observables = (sp.Observable("time", 1, unit="us"),)
    ...     def simulate(self, theta, rng):
    ...         if (theta > 4).any():
    ...             raise ValueError("no decay in the window")
    ...         return 2 * theta
    >>> sp.simulation.simulate_rows(Decay(), np.array([[1.0], [4.5], [3.0]]), np.random.default_rng(0))
    (array([[ 2.],
           [nan],
           [ 6.]]), {1: 'ValueError: no decay in the window'})
    """
    n, observables = len(theta), simulator.observables
    x = np.full((n, sum(o.size for o in observables)), np.nan)
    reasons: dict[int, str] = {}
    for start, stop, got, failed in simulate_parts(
        call or simulator.simulate, theta, lambda start, stop: rng if stop - start == n else rng.spawn(1)[0]
    ):
        if got is not None:
            x[start:stop] = check_output(simulator, got, stop - start)
        reasons |= failed
    raised = sorted(reasons)
    for row in map(int, np.flatnonzero(failed_rows(x, observables))):
        if row not in reasons:
            reasons[row] = non_finite_reason(simulator, x[row])
    if n and len(reasons) == n:
        row = raised[0] if raised else 0
        raise DataError(f"all {n} rows of {class_path(simulator)}.simulate failed, row {row}: {reasons[row]:.200}; expected good rows")
    x[list(reasons)] = np.nan
    return x, dict(sorted(reasons.items()))


def failure_reason(err: BaseException) -> str:
    """Reason of a failed row as stores keep it: without memory addresses, which differ between runs."""
    return _ADDRESS.sub("0x...", f"{type(err).__name__}: {err}")


def non_finite_reason(simulator: Simulator, x: Any) -> str:
    """Reason of a row x (k,) that is not finite."""
    missing = missing_columns(simulator.observables)
    bad = np.flatnonzero(~(np.isfinite(x) | (np.isnan(x) & missing)))
    if not bad.size:
        return f"all {x.size} values of x are missing"
    return f"non-finite x in {bad.size} of {x.size} columns, first {x[bad[0]]} in {column_name(simulator.observables, int(bad[0]))}"
