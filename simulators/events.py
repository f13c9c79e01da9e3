r"""Sets of events in rows of fixed width, and the exact likelihood of a set from the density of an event.

A set of m events with k columns is stored in n_max slots of k + 1 columns; the last column is a mask, 1 for an event and 0 for an empty
slot, which is all zeros. The events fill the first slots. A row is finite and flat, so that any store can hold it:

    x = [e_11 ... e_1k 1 | e_21 ... e_2k 1 | ... | 0 ... 0 0],      x.reshape(n_max, k + 1)

Likelihood of a set of independent events, as an ordered list:

    fixed number      log p(x | theta) = sum_e log p(e | theta)
    Poisson number    log p(x | theta) = m log nu(theta) - nu(theta) - log m! + sum_e log p(e | theta)      (extended)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, xlogy

from sbi_phys.priors import Observable, Prior
from simulators.errors import CountsError, SimulatorSettingError

__all__ = ["EventLayout", "checked_theta", "draw_counts", "poisson_log_pmf", "require_count", "slots_for", "sum_over_sets"]

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
PairDensity = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class EventLayout:
    """Layout of a set of events in a row.   Args: columns: of an event, with their units. n_max: slots."""

    columns: tuple[str, ...]
    n_max: int

    @property
    def width(self) -> int:
        """Columns of a slot: those of an event and the mask."""
        return len(self.columns) + 1

    @property
    def size(self) -> int:
        """Columns of a row."""
        return self.n_max * self.width

    def observable(self, latex: str = "") -> Observable:
        """The row as one block of columns."""
        return Observable("events", self.size, latex=latex)

    def pack(self, counts: Counts, events: Array) -> Array:
        """Rows x (n, size) from set sizes (n,) and all events (sum of sizes, k), set after set.   Raises: CountsError."""
        if counts.size and counts.max() > self.n_max:
            row = int(np.argmax(counts))
            raise CountsError(f"set {row} has {counts[row]} events; expected at most {self.n_max}, the slots of a row (n_max)")
        out = np.zeros((counts.size, self.n_max, self.width))
        filled = np.arange(self.n_max) < counts[:, None]
        out[filled] = np.column_stack([events.reshape(-1, self.width - 1), np.ones(int(counts.sum()))])
        return out.reshape(counts.size, self.size)

    def unpack(self, x: ArrayLike) -> tuple[Counts, Array]:
        """Set sizes (n,) and all events (sum of sizes, k), from x flat or in slots: (size,), (n, size), (m, k+1) or (n, m, k+1).

        Raises: CountsError for another shape, NaN, or a mask that is not 0 or 1.
        """
        array = np.asarray(x)
        if array.dtype.kind not in "fiub":
            raise CountsError(f"x has dtype {array.dtype}; expected numbers")
        array = array.astype(np.float64, copy=False)
        slots = self._in_slots(array)
        if not np.isfinite(slots).all():
            raise CountsError("x has NaN or Inf; expected finite values")
        mask = slots[:, :, -1]
        if not ((mask == 0) | (mask == 1)).all():
            bad = mask[(mask != 0) & (mask != 1)][0]
            raise CountsError(f"x has {bad:g} in the mask, the last column of a slot; expected 1 (event) or 0 (empty)")
        real = mask == 1
        return real.sum(axis=1).astype(np.int64), slots[real][:, :-1]

    def _in_slots(self, x: Array) -> Array:
        if x.ndim in (2, 3) and x.shape[-1] == self.width and x.shape[-1] != self.size:
            return x[None] if x.ndim == 2 else x
        if x.ndim in (1, 2) and x.shape[-1] == self.size:
            return x.reshape(-1, self.n_max, self.width)
        expected = f"({self.size},) or (n, {self.size}), or slots (m, {self.width}) or (n, m, {self.width}): {(*self.columns, 'mask')}"
        raise CountsError(f"x has shape {x.shape}; expected {expected}")


def sum_over_sets(pairs: PairDensity, counts: Counts, events: Array, theta: Array, *, chunk: int = 400_000) -> Array:
    """Sum over each set's events of log p(e | theta) -> (n,), for one set at n thetas or n sets at their thetas.

    Args: pairs: log density of event rows (m, k) at theta rows (m, d) -> (m,). counts, events: as of `EventLayout.unpack`.
    chunk: pairs of an event and a theta at a time, which bounds the memory.
    Raises: CountsError for another number of sets.
    """
    n, m = theta.shape[0], events.shape[0]
    if counts.size == 1 and n != 1:
        out = np.zeros(n)
        step = max(1, chunk // max(m, 1))
        for start in range(0, n, step):
            rows = theta[start : start + step]
            values = pairs(np.tile(events, (rows.shape[0], 1)), np.repeat(rows, m, axis=0))
            out[start : start + step] = values.reshape(rows.shape[0], m).sum(axis=1)
        return out
    if counts.size != n:
        raise CountsError(f"x has {counts.size} sets and theta {n} rows; expected as many, or one set")
    owner = np.repeat(np.arange(n), counts)
    parts = [pairs(events[i : i + chunk], theta[owner[i : i + chunk]]) for i in range(0, m, chunk)]
    return np.bincount(owner, weights=np.concatenate([*parts, np.zeros(0)]), minlength=n).astype(np.float64)


def poisson_log_pmf(counts: ArrayLike, mean: ArrayLike) -> Array:
    """log Pois(m | nu) of counts at means > 0, broadcast."""
    m, nu = np.asarray(counts, dtype=np.float64), np.asarray(mean, dtype=np.float64)
    return np.asarray(xlogy(m, nu) - nu - gammaln(m + 1))


def draw_counts(n: int, n_events: int | tuple[int, int], rng: np.random.Generator) -> Counts:
    """Set sizes (n,) independent of theta: all n_events, or log-uniform over the whole numbers of [low, high]."""
    if isinstance(n_events, int):
        return np.full(n, n_events, dtype=np.int64)
    low, high = n_events
    return np.floor(low * ((high + 1) / low) ** rng.random(n)).astype(np.int64).clip(low, high)


def slots_for(mean: float) -> int:
    """Number of slots that a Poisson number of the given mean exceeds with a probability below 1e-9."""
    return int(np.ceil(mean + 6.5 * np.sqrt(mean) + 12))


def require_count(name: str, value: Any, low: int = 1) -> int | tuple[int, int]:
    """Return a whole number >= low, or a pair low <= a < b as a tuple, else raise SimulatorSettingError."""

    def whole(v: Any) -> bool:
        return isinstance(v, int | np.integer) and not isinstance(v, bool) and bool(v >= low)

    if whole(value):
        return int(value)
    if isinstance(value, list | tuple) and len(value) == 2 and all(whole(v) for v in value) and value[0] < value[1]:
        return int(value[0]), int(value[1])
    raise SimulatorSettingError(f"{name} is {value!r}; expected a whole number >= {low}, or two of them in order, e.g. [10, 1000]")


def checked_theta(prior: Prior, theta: ArrayLike) -> Array:
    """Return theta as (n, d) in the prior's support.   Raises: ShapeError, NonFiniteError or SupportError of sbi_phys."""
    if hasattr(theta, "detach"):  # a torch tensor, without importing torch
        theta = theta.detach().cpu().numpy()
    inside = prior.contains(theta)
    array = np.atleast_2d(np.asarray(theta, dtype=np.float64))
    if not inside.all():
        prior.require_contains(array)
    return array
