r"""Confidence sets from a test statistic and its critical values: {theta: q(D; theta) <= C_level(theta)}.

q is large where theta describes the data D badly (-2 ln of a likelihood ratio, or WALDO). The set holds the true theta with probability
`level` if C is the level-quantile of q(D; theta) for D ~ p(D | theta), at every theta. `neyman` finds C by toys on a grid, `lf2i` by
quantile regression; `Construction` is what both share.

Parameters are ordered (psi, nu): first those of interest, then nuisance parameters. With nuisance parameters there are two ways to a
set in psi:

- with a `profile` nu(D; psi), the nuisances that fit D best: {psi: q(D; psi) <= C(psi, nu(D; psi))}. It covers as far as C varies little
  with nu, or as far as C was corrected for that (see `neyman`).
- without: the projection {psi: q(D; psi, nu) <= C(psi, nu) for some nu of the grid}. It covers at least the level.

Source: Feldman & Cousins 1998, arXiv:physics/9711021; Dalmasso et al. 2021, arXiv:2107.03920.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.confidence._inputs import check_statistic, nearest_level, point_words
from sbi_phys.core.checks import as_array, require_choice, require_int
from sbi_phys.core.errors import SettingError, ShapeError, SupportError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.types import Array, ArrayLike, Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Construction", "Fixed", "Interval", "Region", "Statistic", "hull", "nuisances_of", "require_within"]

Statistic = Callable[[Array, Any], ArrayLike]
Profile = Callable[[Array, Any], ArrayLike]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Interval(Result):
    """Intervals for one parameter and n data sets: low (n,), high (n,), +-inf where a side was left open, NaN where the set is empty.

    >>> from sbi_phys.confidence import FeldmanCousins
    >>> found = FeldmanCousins(background=3.0).interval([0, 12], level=0.9)
    >>> found.covers(5.0).tolist()
    [False, True]
    """

    name: str
    level: float
    low: Array
    high: Array
    method: str

    @property
    def empty(self) -> Mask:
        """Whether no value is in the set, (n,): all of the grid is excluded."""
        return np.isnan(self.low)

    def covers(self, value: float) -> Mask:
        """Whether the interval holds `value`, (n,); an empty one does not."""
        return (self.low <= value) & (value <= self.high)

    def rows(self) -> Rows:
        """Return the table: one row for each data set."""
        fixed = {"name": self.name, "level": self.level}
        return Rows.of({"data_set": np.arange(self.low.size)} | fixed | {"low": self.low, "high": self.high})

    def summary(self) -> str:
        """Return the result in words: each interval for up to ten data sets, else the median of the ends."""
        head = f"{100 * self.level:.4g} % intervals for {self.name} ({self.method})"
        if self.low.size <= 10:
            return "\n".join([head, *(f"  [{a:.4g}, {b:.4g}]" for a, b in zip(self.low, self.high, strict=True))])
        if self.empty.all():
            return f"{head}: {self.low.size} data sets, all empty"
        ends = f"median [{np.nanmedian(self.low):.4g}, {np.nanmedian(self.high):.4g}]"
        return f"{head}: {self.low.size} data sets, {ends}, {int(self.empty.sum())} empty"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the intervals, one row for each data set."""
        return figures.results.intervals(self.low, self.high, [str(i) for i in range(self.low.size)], ax, xlabel=self.name)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Region(Result):
    """Joint set of two parameters on a grid: axes (m1,), (m2,); margin (n, m1, m2) <= 0 inside, q - C, or 1 - level - p if prepivoted.

    >>> import numpy as np
    >>> from sbi_phys.confidence import neyman
    >>> grid = {"a": [-1.0, 0.0, 1.0], "b": [-1.0, 0.0, 1.0]}
    >>> sets = neyman(lambda t, n, rng: rng.normal(t, 0.2, (n, 2)), lambda t, x: ((x - t) ** 2).sum(axis=1), grid, n_toys=100)
    >>> region = sets.region(np.array([[0.0, 0.0]]), n_points=5)
    >>> region.inside.shape, bool(region.inside[0, 2, 2]), bool(region.inside[0, 0, 0])
    ((1, 5, 5), True, False)
    """

    names: tuple[str, str]
    level: float
    axes: tuple[Array, Array]
    margin: Array

    @property
    def inside(self) -> Mask:
        """Whether each point is in the set, (n, m1, m2)."""
        return self.margin <= 0

    def rows(self) -> Rows:
        """Return the table: one row for each data set and point of the grid."""
        d, i, j = (index.ravel() for index in np.indices(self.margin.shape))
        axes = {self.names[0]: self.axes[0][i], self.names[1]: self.axes[1][j]}
        return Rows.of({"data_set": d} | axes | {"margin": self.margin.ravel(), "inside": self.inside.ravel()})

    def summary(self) -> str:
        """Return the result in words: for up to ten data sets the range of each parameter within the set."""
        lines = [f"{100 * self.level:.4g} % regions of {' and '.join(self.names)}, {len(self.margin)} data sets"]
        for inside in self.inside[:10]:
            ends = [axis[inside.any(axis=1 - k)] for k, axis in enumerate(self.axes)]
            words = [f"{name} [{a.min():.4g}, {a.max():.4g}]" for name, a in zip(self.names, ends, strict=True) if a.size]
            lines.append("  " + (" x ".join(words) if words else "empty"))
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, data_set: int = 0) -> "Axes":
        """Draw the set of one data set as a filled contour."""
        return figures.confidence.region(self, ax, data_set)


@dataclass(frozen=True, kw_only=True, eq=False)
class Construction(ABC):
    """Base class of `Neyman` and `LF2I`.

    names (d,), the first `interest` of them of interest; low, high (d,), the simulated box; bounds, physical ones.

    >>> from sbi_phys.confidence import Construction, neyman
    >>> sets = neyman(lambda t, n, rng: rng.normal(t[0], 1, n), lambda t, x: (x - t[0]) ** 2, [0, 1, 2], n_toys=200)
    >>> isinstance(sets, Construction), bool(sets.pvalue([4.5], 1.0)[0] < 0.05)
    (True, True)
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    interest: int
    levels: tuple[float, ...]
    low: Array
    high: Array
    bounds: tuple[tuple[float | None, float | None], ...]
    statistic: Statistic
    profile: Profile | None
    method: str

    @property
    def dim(self) -> int:
        """Number of parameters, nuisances included."""
        return len(self.names)

    @abstractmethod
    def critical(self, theta: ArrayLike, level: float | None = None) -> Array:
        """Critical values C_level (m,) at theta (m, d).   Raises: SupportError beyond the simulated box, SettingError (level)."""

    @abstractmethod
    def _tail(self, q: Array, theta: Array) -> Array:
        """P(Q >= q | theta) for rows q (n,), theta (n, d)."""

    @abstractmethod
    def _nuisances(self) -> Array:
        """Points (k, d - interest) over which a set without a profile is projected."""

    def contains(self, data: Any, theta: ArrayLike, level: float | None = None) -> Mask:
        """Whether the set of each of n data sets holds theta, (n,).

        Args: data: n data sets, as the statistic takes them. theta: (interest,), or all parameters (d,), then nuisances are as given.
        Raises: SupportError (theta, or the profiled nuisances, beyond what was simulated), SettingError, NonFiniteError.
        """
        point = self._point(theta)
        return self._margin(self._prepare(data), point, nearest_level(level, self.levels)) <= 0

    def pvalue(self, data: Any, theta: ArrayLike) -> Array:
        """p-value of theta for each of n data sets, (n,): P(Q >= q(D; theta) | theta); the largest over nuisances without a profile.

        Raises: SupportError, NonFiniteError.   Read: 1 - p is the lowest level whose set leaves theta out.
        """
        point, prepared = self._point(theta), self._prepare(data)
        best: Array | None = None
        for full, q in self._tests(prepared, point):
            p = self._tail(q, full)
            best = p if best is None else np.maximum(best, p)
        assert best is not None
        return best

    def interval(self, data: Any, level: float | None = None, *, n_points: int = 200, on_edge: str = "raise") -> Interval:
        """Interval (hull of the set) for the one parameter of interest.

        Args: data: n data sets. level: one that the critical values were made for. n_points: values of the parameter that are tried; ends
            are interpolated linearly between them. on_edge: 'raise' if a set reaches an end of the grid that is no physical bound, or
            'open': that end becomes infinite, because there are no simulations beyond it.
        Returns: Interval, low (n,) and high (n,).
        Raises: SupportError, SettingError (two parameters of interest: see `region`), NonFiniteError.
        """
        require_choice("on_edge", on_edge, ("raise", "open"))
        if self.interest != 1:
            raise SettingError(f"there are {self.interest} parameters of interest, {self.names[: self.interest]}; expected 1, see region()")
        chosen = nearest_level(level, self.levels)
        axis = self._scan_axis(0, require_int("n_points", n_points, low=3))
        prepared = self._prepare(data)
        margin = np.stack([self._margin(prepared, np.array([v]), chosen) for v in axis], axis=-1)
        return self.interval_of(axis, margin, self.levels[chosen], on_edge=on_edge)

    def interval_of(self, axis: Array, margin: Array, level: float | None = None, *, on_edge: str = "raise") -> Interval:
        """Interval from margins q - C (n, m) that were found along an axis (m,) of the one parameter of interest; see `interval`.

        Raises: SupportError, SettingError, ShapeError.
        """
        require_choice("on_edge", on_edge, ("raise", "open"))
        margin = as_array("margin", margin, (None, len(axis)), finite=False)
        low, high = hull(axis, margin)
        low, high = self._open_edges(margin, low, high, on_edge)
        level = self.levels[nearest_level(level, self.levels)]
        return Interval(name=self.names[0], level=level, low=low, high=high, method=self.method)

    def region(self, data: Any, level: float | None = None, *, n_points: int = 40) -> Region:
        """Joint set of the two parameters of interest on a grid of n_points x n_points.   Raises: SettingError, SupportError."""
        if self.interest != 2:
            raise SettingError(f"there are {self.interest} parameters of interest; expected 2 for a region, see interval()")
        chosen = nearest_level(level, self.levels)
        axes = tuple(self._scan_axis(i, require_int("n_points", n_points, low=3)) for i in (0, 1))
        prepared = self._prepare(data)
        margin = [[self._margin(prepared, np.array([a, b]), chosen) for b in axes[1]] for a in axes[0]]
        together = np.moveaxis(np.array(margin), -1, 0)
        return Region(names=(self.names[0], self.names[1]), level=self.levels[chosen], axes=(axes[0], axes[1]), margin=together)

    def _scan_axis(self, i: int, points: int) -> Array:
        return np.linspace(self.low[i], self.high[i], points)

    def _prepare(self, data: Any) -> Any:
        data = np.asarray(data) if isinstance(data, list | tuple) else data
        prepare = getattr(self.statistic, "prepare", None)
        # quantities that do not depend on theta (maximum of the likelihood, posterior moments) are computed once
        return _Prepared(data, data if prepare is None else prepare(data))

    def _point(self, theta: ArrayLike) -> Array:
        point = np.atleast_1d(np.asarray(theta, dtype=np.float64))
        if point.shape not in ((self.interest,), (self.dim,)):
            raise ShapeError(f"theta has shape {point.shape}; expected ({self.interest},) = {self.names[: self.interest]}"
                             + (f", or ({self.dim},) with nuisances" if self.dim > self.interest else ""))  # fmt: skip
        return point

    def _tests(self, data: "_Prepared", point: Array) -> "list[tuple[Array, Array]]":
        """[(full theta (n, d), q (n,))]: theta = point is in the set if one of these tests accepts it."""
        k = self.interest
        wanted: list[tuple[Array, Array | None]]
        if self.dim == k:
            wanted = [(point, None)]
        elif self.profile is not None:
            nu = point[k:] if point.size == self.dim else None
            wanted = [(point[:k], nu)]
        else:
            nuisances = point[None, k:] if point.size == self.dim else self._nuisances()
            wanted = [(np.append(point[:k], v), None) for v in nuisances]
        tests = []
        for seen, nu in wanted:
            q = check_statistic(self.statistic(seen, data.reduced), None, f"at {point_words(self.names, seen)}")
            if seen.size == self.dim:
                full = np.broadcast_to(seen, (q.size, self.dim))
            else:
                full = np.concatenate([np.broadcast_to(seen, (q.size, k)), self._profiled(data.raw, seen, nu, q.size)], axis=1)
            require_within("theta", full, self.low, self.high, self.names)
            tests.append((full, q))
        return tests

    def _profiled(self, data: Any, psi: Array, nu: Array | None, n: int) -> Array:
        if nu is not None:
            return np.broadcast_to(nu, (n, nu.size))
        assert self.profile is not None
        return nuisances_of(self.profile, data, psi, n, self.dim - self.interest)

    def _margin(self, data: "_Prepared", point: Array, chosen: int) -> Array:
        """q - C (n,), <= 0 inside the set; the smallest over nuisances without a profile."""
        found: Array | None = None
        for full, q in self._tests(data, point):
            same = bool((full == full[0]).all())
            margin = q - self.critical(full[:1] if same else full, self.levels[chosen])
            found = margin if found is None else np.minimum(found, margin)
        assert found is not None
        return found

    def _open_edges(self, margin: Array, low: Array, high: Array, on_edge: str) -> tuple[Array, Array]:
        kind = getattr(self.statistic, "kind", "interval")
        for column, side, infinite, ends in ((0, 0, -np.inf, low), (-1, 1, np.inf, high)):
            edge = (self.low, self.high)[side][0]
            physical = self.bounds[0][side]
            touched = margin[:, column] <= 0
            if kind == ("upper", "lower")[side]:  # a one-sided statistic: the set extends to infinity on this side
                ends[touched] = infinite if physical is None else physical
                continue
            if (physical is not None and abs(edge - physical) <= 1e-9 * max(1.0, abs(edge))) or not touched.any():
                continue
            if on_edge == "raise":
                raise SupportError(
                    f"the set of {int(touched.sum())} of {touched.size} data sets reaches the end of the simulated grid at "
                    f"{self.names[0]} = {edge:g}; critical values are not extrapolated: expected a wider grid, a physical bound there "
                    "(bounds=), or on_edge='open'"
                )
            ends[touched] = infinite
        return low, high


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """Data as given, and in the form that the statistic takes."""

    raw: Any
    reduced: Any


def hull(axis: Array, margin: Array) -> tuple[Array, Array]:
    """Ends (n,) of {axis: margin (n, m) <= 0}, linear between the points; NaN where the set is empty."""
    inside = margin <= 0
    rows = np.arange(margin.shape[0])
    first, last = inside.argmax(axis=1), axis.size - 1 - inside[:, ::-1].argmax(axis=1)
    ends = []
    for at, beyond in ((first, np.maximum(first - 1, 0)), (last, np.minimum(last + 1, axis.size - 1))):
        here, there = margin[rows, at], margin[rows, beyond]
        # there > 0 >= here, or both are the same point; with an infinite margin the end is the last point inside
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(at == beyond, 0.0, -here / (there - here))
        ends.append(np.where(inside.any(axis=1), axis[at] + np.nan_to_num(share) * (axis[beyond] - axis[at]), np.nan))
    return ends[0], ends[1]


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """A profile that gives the same nuisances (m,) for all data, for critical values that do not depend on them."""

    nuisances: Array

    def __call__(self, psi: Array, data: Any) -> Array:
        """Nuisances (m,), one row for all data sets."""
        return self.nuisances


def nuisances_of(profile: Profile, data: Any, psi: Array, n: int, m: int) -> Array:
    """Nuisances (n, m) that fit each of n data sets best at psi.   Raises: ShapeError, NonFiniteError."""
    found = np.asarray(profile(psi, data), dtype=np.float64)
    if isinstance(profile, Fixed):
        found = np.broadcast_to(found, (n, m))
    elif found.ndim == 1 and m == 1:
        found = found[:, None]
    return as_array("the profiled nuisances", found, (n, m))


def require_within(what: str, theta: Array, low: Array, high: Array, names: Sequence[str]) -> None:
    """Raise SupportError if a row of theta (m, d) lies outside of the simulated box [low, high], where critical values are not known."""
    slack = 1e-9 * (high - low)
    outside = (theta < low - slack) | (theta > high + slack)
    if not outside.any():
        return
    row, column = (int(i) for i in np.argwhere(outside)[0])
    count = int(outside.any(axis=1).sum())
    raise SupportError(
        f"{what}: {names[column]} = {theta[row, column]:g} lies beyond what was simulated, [{low[column]:g}, {high[column]:g}] "
        f"({count} of {theta.shape[0]} points do); critical values are not extrapolated, expected a wider grid"
    )
