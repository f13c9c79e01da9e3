r"""Likelihood ratio with the maximum found by a search that narrows, for densities that are evaluated row by row; nuisances profiled.

    q(D; psi) = 2 [ max_{psi', nu} ln L(D; psi', nu) - max_nu ln L(D; psi, nu) ]

over the box low..high, psi one or two parameters of interest. With one or two parameters to vary the search begins on a grid over the box
and then looks at points around the best place so far, three to each side, at a third of the distance each time the best of them is not
at the rim (a narrow ridge is climbed along before it is resolved). With more, the grid gives way to points spread evenly over the box, and
the looks to Newton steps from the best of them (`climb`); the conditional maxima at psi begin at the nuisances of the global one as well.
All data sets go through it at once, so a learned ratio is asked in few large batches; a grid over the whole box would have to be finer
than the narrowest likelihood. It finds the highest peak that the first points can see: first^2 points over d parameters see peaks that are
wider than about first^(-2/d) of the box, and narrower ones by their slopes.

Any rule that depends on the data alone gives a statistic whose sets cover: an imperfect maximum costs size, not coverage.

Source: Feldman & Cousins 1998, arXiv:physics/9711021; Cowan et al. 2011, arXiv:1007.1727, section 2 (profiling, one-sided statistics).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats.qmc import Halton

from sbi_phys.confidence.climb import climb
from sbi_phys.confidence.inputs import frozen, require_within
from sbi_phys.confidence.statistics import KINDS
from sbi_phys.core.checks import as_array, as_real, require_choice, require_finite, require_int
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike, Integers

__all__ = ["RefinedLRT"]

Rows = Callable[[Any, Array], ArrayLike]

MOST_WANTED = 2  # sets are looked at on a grid of the parameters of interest
REACH = 3  # points to each side of the best place in each further look
FINER = 4  # times that their distance becomes a third
MOST_LOOKS = 14
BLOCK = 1 << 17  # (data set, theta) pairs handed over at once


@dataclass(frozen=True, kw_only=True, eq=False)
class RefinedLRT:
    r"""Profile likelihood ratio over a box of any number of parameters; the first `interest` of them, one or two, are wanted.

    Args: log_likelihood: (data of n sets, theta (n, d)) -> (n,), row by row, -inf allowed; data are indexed by rows. low, high (d,): the
        box. interest: 1 or 2. kind: 'two-sided', 'upper' (0 where psi_hat > psi), 'lower'. first: points per parameter of the first grid
        where at most two vary; its square is the number of first points where more do.
    Called with (data, psi (interest,) or (n, interest)) -> (n,); `.nuisance(data, psi)` is the `profile` that `lf2i` takes.
    Raises: SettingError (interest), ShapeError, NonFiniteError, SupportError (psi outside the box), DataError.
    """

    log_likelihood: Rows
    low: ArrayLike
    high: ArrayLike
    names: tuple[str, ...]
    interest: int = 1
    kind: str = "two-sided"
    first: int = 24

    def __post_init__(self) -> None:
        """Check the box."""
        for name in ("low", "high"):
            object.__setattr__(self, name, frozen(as_array(name, getattr(self, name), (len(self.names),))))
        if not (self._box[0] < self._box[1]).all():
            raise SettingError(f"low is {self._box[0].tolist()} and high {self._box[1].tolist()}; expected low < high")
        require_int("interest", self.interest, low=1, high=min(len(self.names), MOST_WANTED))
        require_choice("kind", self.kind, KINDS)
        require_int("first", self.first, low=3)

    @property
    def _box(self) -> tuple[Array, Array]:
        return np.asarray(self.low, dtype=np.float64), np.asarray(self.high, dtype=np.float64)

    def prepare(self, data: Any) -> "Maximised":
        """Find the maximum of each data set once, for any number of psi."""
        best, at = self._search(data, None)
        return Maximised(data, best, at)

    def __call__(self, data: Any, psi: ArrayLike) -> Array:
        """Values (n,) of the statistic at psi (interest,), or row by row (n, interest); further columns are left out."""
        found = data if isinstance(data, Maximised) else self.prepare(data)
        points = self._points(psi, found.best.size)
        value, _ = self._search(found.data, points, found.at)
        q = 2 * np.maximum(found.best - value, 0.0)
        if self.kind == "two-sided":
            return q
        sign = 1.0 if self.kind == "upper" else -1.0
        return np.where(sign * (found.at[:, 0] - points[:, 0]) > 0, 0.0, q)

    def repeated(self, data: Any, m: int) -> "Maximised":
        """One data set m times, its maximum found once: for values at many psi (m, interest)."""
        one = self.prepare(data)
        if one.best.size != 1:
            raise ShapeError(f"data has {one.best.size} sets; expected one")
        return Maximised(np.repeat(one.data, m, axis=0), np.repeat(one.best, m), np.repeat(one.at, m, axis=0))

    def nuisance(self, data: Any, psi: ArrayLike) -> Array:
        """Nuisances (n, d - interest) that fit each data set best at psi."""
        found, near = (data.data, data.at) if isinstance(data, Maximised) else (data, None)
        _, at = self._search(found, self._points(psi, len(found)), near)
        return at[:, self.interest :]

    def _points(self, psi: ArrayLike, n: int) -> Array:
        array = np.atleast_1d(as_real("psi", psi))
        require_finite("psi", array)
        if array.shape[-1] < self.interest or array.ndim > 2 or (array.ndim == 2 and len(array) != n):
            raise ShapeError(f"psi has shape {array.shape}; expected ({self.interest},), or ({n}, {self.interest}) with one row a data set")
        points = np.broadcast_to(array[..., : self.interest], (n, self.interest))
        low, high = self._box
        require_within("theta", points, low[: self.interest], high[: self.interest], self.names[: self.interest])
        return points

    def _search(self, data: Any, fixed: Array | None, near: Array | None = None) -> tuple[Array, Array]:
        """Maxima (n,) and where (n, d), over the box, or over the nuisances at `fixed` psi (n, interest); near (n, d), a first guess."""
        start = 0 if fixed is None else self.interest
        low, high = (side[start:] for side in self._box)
        if low.size == 0:  # nothing to vary
            assert fixed is not None
            return self._values(data, fixed[:, None, :])[:, 0], np.array(fixed)
        if low.size <= 2:
            best, at = self._narrowed(data, fixed, low, high)
        else:
            best, at = self._climbed(data, fixed, None if near is None else near[:, start:], low, high)
        if fixed is None and np.isneginf(best).any():
            i = int(np.argmax(np.isneginf(best)))
            raise DataError(f"data set {i} has ln L = -Inf at all places of the search; expected one that is possible")
        return best, at if fixed is None else np.concatenate([fixed, at], axis=1)

    def _climbed(self, data: Any, fixed: Array | None, near: Array | None, low: Array, high: Array) -> tuple[Array, Array]:
        """Maxima over three free parameters or more: points spread over the box, and Newton steps from the best of them."""
        n, d = len(data), low.size
        # with a first guess few others will do
        points = Halton(d, scramble=False).random(self.first**2 if near is None else 8 * d)[1:]
        tried = np.broadcast_to(low + points * (high - low), (n, len(points), d))
        tried = tried if near is None else np.concatenate([near[:, None, :], tried], axis=1)

        def values(rows: Integers, theta: Array) -> Array:
            parts = np.array_split(np.arange(rows.size), max(1, rows.size * theta.shape[1] // BLOCK))
            return np.concatenate([self._values(data[rows[part]], _joined(fixed, rows[part], theta[part])) for part in parts])

        first = values(np.arange(n), tried)
        place = first.argmax(axis=1)
        each = np.arange(n)
        return climb(values, tried[each, place], first[each, place], low, high)

    def _narrowed(self, data: Any, fixed: Array | None, low: Array, high: Array) -> tuple[Array, Array]:
        """Maxima over one or two free parameters, by a grid that narrows."""
        n = len(data)
        best, at = np.full(n, -np.inf), np.tile((low + high) / 2, (n, 1))
        spacing = (high - low) / (self.first - 1)
        finer = np.zeros(n)  # times that the distance of a data set's points has become a third
        for look in range(MOST_LOOKS):
            half = (self.first - 1) / 2 if look == 0 else REACH
            steps = np.arange(-half, half + 0.5)
            mesh = np.stack([g.ravel() for g in np.meshgrid(*[steps] * low.size, indexing="ij")], axis=-1)
            rim = np.abs(mesh).max(axis=1) == half
            todo = np.flatnonzero(finer <= FINER)
            for rows in np.array_split(todo, max(1, todo.size * len(mesh) // BLOCK)):
                tried = np.clip(at[rows, None, :] + mesh * spacing * 3.0 ** -finer[rows, None, None], low, high)
                values = self._values(data[rows], _joined(fixed, rows, tried))
                each = np.arange(len(rows))
                place = values.argmax(axis=1)
                better = values[each, place] > best[rows]
                best[rows] = np.where(better, values[each, place], best[rows])
                at[rows] = np.where(better[:, None], tried[each, place], at[rows])
                finer[rows] += 1.0 if look == 0 else ~(better & rim[place])
            if (finer > FINER).all():
                break
        return best, at

    def _values(self, data: Any, theta: Array) -> Array:
        """Values (n, m) of theta (n, m, d)."""
        n, m, d = theta.shape
        values = as_array("log_likelihood(data, theta)", self.log_likelihood(np.repeat(data, m, axis=0), theta.reshape(-1, d)), (n * m,),
                          finite=False)  # fmt: skip
        bad = np.isnan(values) | np.isposinf(values)
        if bad.any():
            i = int(np.argmax(bad))
            raise NonFiniteError(f"log_likelihood is {values[i]} at theta = {theta.reshape(-1, d)[i].tolist()}; expected numbers or -Inf")
        return values.reshape(n, m)


def _joined(fixed: Array | None, rows: Integers, tried: Array) -> Array:
    """Whole theta (n, m, d) of fixed psi and the nuisances tried (n, m, d - interest)."""
    if fixed is None:
        return tried
    return np.concatenate([np.broadcast_to(fixed[rows, None, :], (*tried.shape[:2], fixed.shape[1])), tried], axis=-1)


@dataclass(frozen=True, eq=False)
class Maximised:
    """Data with the largest ln L (n,) found and where, (n, d)."""

    data: Any
    best: Array
    at: Array
