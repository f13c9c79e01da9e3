r"""What to do about nuisances nu in a Neyman construction, from the same toys: critical values C(psi, nu) that make the sets cover.

q_jt is the statistic of toy t at (psi, nu_j), sorted R_j; nu_jt the nuisance that fits that toy best at psi. A set in psi holds data D if
q(D; psi) does not exceed the level-quantile of a reference distribution at (psi, nu(D; psi)). Three of them, for one psi at a time:

- **profiled** (plug-in), R_j itself: right as far as the distribution of q does not change within the error of nu. Where nu is hardly
  identified (a blurring without sources to be blurred), it is wrong to first order.
- **prepivoted** (Beran's double bootstrap): the plug-in p-value P_jt of toy jt at its own nu_jt would be uniform were the plug-in right.
  The distribution of u = 1 - P at (psi, nu_j) depends on nu less than that of q; so u takes the place of q, its sorted values that of R_j,
  and the p-value of the data is that of their u at nu(D). No further simulation is needed, and it can be done again: each round
  removes the error that the last one left to next order. Given nu, all of it is a monotone map of q, so there still is a critical value.
  The coverage is nominal at each nu, up to what the rounds leave; nothing guarantees more. Toys that are alike (counts are whole numbers)
  count as alike in each round, so discreteness only adds to the coverage.
- **supremum**: the largest quantile over nu_j. It covers at least as stated at every nu of the grid, and more than that at most.

Source: Beran 1987 Biometrika 74, 457; Beran 1988 JASA 83, 687 (prepivoting); Casella & Berger 2002, section 8.3 (supremum).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array
from sbi_phys.core.types import Array, ArrayLike, Integers

__all__ = ["NUISANCES", "Fixed", "back", "corners", "nuisances_of", "prepivot", "supremum", "tail"]


ALIKE = 1e-9  # values that differ by less, of 1 or of themselves, are the same but for rounding
NUISANCES = ("profiled", "prepivoted", "supremum", "projected")


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """A profile that gives the same nuisances (m,) for all data: where nothing depends on them."""

    nuisances: Array

    def __call__(self, data: Any, psi: Array) -> Array:
        """Nuisances (m,), one row that stands for all."""
        return self.nuisances


def nuisances_of(profile: Callable[[Any, Array], ArrayLike], data: Any, psi: Array, n: int, m: int) -> Array:
    """Nuisances (n, m) that fit each of n data sets best at psi.   Raises: ShapeError, NonFiniteError."""
    found = np.asarray(profile(data, psi), dtype=np.float64)
    if isinstance(profile, Fixed):
        found = np.broadcast_to(found, (n, m))
    elif found.ndim == 1 and m == 1:
        found = found[:, None]
    return as_array("the profiled nuisances", found, (n, m))


def corners(axes: tuple[Array, ...], points: Array) -> list[tuple[Array, tuple[Integers, ...]]]:
    """(weight (m,), index of a corner for each point) of the 2^d corners of the cells of a product grid that hold points (m, d)."""
    below, share = [], []
    for axis, value in zip(axes, points.T, strict=True):
        i = np.clip(np.searchsorted(axis, value, side="right") - 1, 0, axis.size - 2)
        below.append(i)
        share.append(np.clip((value - axis[i]) / (axis[i + 1] - axis[i]), 0, 1))
    found = []
    for step in product((0, 1), repeat=len(axes)):
        weight = np.prod([s if up else 1 - s for up, s in zip(step, share, strict=True)], axis=0)
        found.append((np.asarray(weight), tuple(i + up for i, up in zip(below, step, strict=True))))
    return found


def prepivot(toys: Array, best: Array, axes: tuple[Array, ...], rounds: int) -> tuple[Array, ...]:
    """Values that take the toys' place in each round, u = 1 - p (g1, .., gk, h1, .., hm, n), rising; one array per round.

    Args: toys (g1, .., gk, h1, .., hm, n), statistics in the order that they came; best (.., n, m), the nuisances that fit each of them
        best (beyond the grid they count as on its edge). axes: m axes of nuisances, (h1,), ...
    """
    sizes, n = tuple(a.size for a in axes), toys.shape[-1]
    q = toys.reshape(-1, int(np.prod(sizes)), n)
    nu = best.reshape(len(q), -1, len(axes))
    out = np.empty((rounds, *q.shape))
    for i in range(len(q)):
        cells = [(weight, np.ravel_multi_index(at, sizes)) for weight, at in corners(axes, nu[i])]
        value = q[i]
        for k in range(rounds):
            value = 1 - tail(np.sort(value, axis=-1), value.ravel(), cells).reshape(value.shape)
            out[k, i] = np.sort(value, axis=-1)
    return tuple(out.reshape(rounds, *toys.shape))


def tail(reference: Array, q: Array, cells: list[tuple[Array, Integers]]) -> Array:
    """p-values (m,) of q (m,): shares of the reference values (nodes, n) that are as large or larger, between nodes with their weights."""
    n, out = reference.shape[-1], np.zeros(q.size)
    q = q - ALIKE * np.maximum(1, np.abs(np.where(np.isfinite(q), q, 0.0)))
    for weight, flat in cells:
        used = np.flatnonzero(weight > 0)
        if not used.size:
            continue
        used = used[np.argsort(flat[used], kind="stable")]
        nodes, first = np.unique(flat[used], return_index=True)
        for node, here in zip(nodes, np.split(used, first[1:]), strict=True):
            above = n - np.searchsorted(reference[node], q[here], side="left")
            out[here] += weight[here] * (1 + above) / (1 + n)
    return out


def back(rounds: tuple[Array, ...], toys: Array, k: int) -> Array:
    """Value of q (..,) at each grid point that has the k-th smallest value of the last round: each round's map of q, turned round."""
    n = toys.shape[-1]
    place = np.full(toys.shape[:-1], float(k - 1))
    for values in (*rounds[::-1], toys):
        i = np.clip(np.rint(place).astype(np.int64), 0, n - 1)
        found = np.take_along_axis(values, i[..., None], axis=-1)[..., 0]
        place = found * (n + 1)
    return np.asarray(found)


def supremum(toys: Array, n_nuisances: int) -> Array:
    """Reference values (.., n) whose quantiles are the largest over the last `n_nuisances` axes before the toys'."""
    over = tuple(range(toys.ndim - 1 - n_nuisances, toys.ndim - 1))
    ordered = np.sort(toys, axis=-1)
    return np.broadcast_to(ordered.max(axis=over, keepdims=True), ordered.shape).copy()
