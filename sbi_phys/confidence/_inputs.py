"""Checks of arguments that the constructions share: levels, points in parameter space, axes of a grid, values of a test statistic."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array, as_matrix, as_real, check_level, require_finite
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

__all__ = [
    "KINDS",
    "Bounds",
    "as_points",
    "check_axes",
    "check_bounds",
    "check_statistic",
    "frozen",
    "nearest_level",
    "point_words",
]

KINDS = ("interval", "upper", "lower")
Bounds = Sequence[tuple[float | None, float | None]]


def frozen(array: ArrayLike) -> Array:
    """Return a copy as float64 that cannot be written to: results are shared."""
    copy = np.array(array, dtype=np.float64)
    copy.setflags(write=False)
    return copy


def nearest_level(level: float | None, levels: tuple[float, ...]) -> int:
    """Index of `level` among the levels of the critical values; None = the only level, or the highest.

    Raises: SettingError for a level without critical values.
    """
    if level is None:
        return len(levels) - 1
    wanted = check_level(level)
    found = int(np.argmin(np.abs(np.array(levels) - wanted)))
    if abs(levels[found] - wanted) > 1e-9:
        raise SettingError(f"level is {wanted:g}; expected one that critical values were made for: {', '.join(f'{v:g}' for v in levels)}")
    return found


def as_points(name: str, value: ArrayLike, dim: int, names: Sequence[str] = ()) -> Array:
    """Return points in parameter space as finite (m, dim); a number or (dim,) is one point, (m,) many if dim is 1.

    Raises: ShapeError, NonFiniteError, DataError (no points).
    """
    array = as_real(name, value)
    if array.ndim == 0 and dim == 1:
        array = array[None, None]
    elif array.ndim == 1 and dim == 1:
        array = array[:, None]
    points = as_matrix(name, array, dim, names)
    if points.shape[0] == 0:
        raise DataError(f"{name} has no rows; expected at least one point ({dim} parameters)")
    return points


def check_axes(
    grid: "ArrayLike | Sequence[ArrayLike] | Mapping[str, ArrayLike]", names: Sequence[str | Parameter] | None
) -> tuple[tuple[Array, ...], Sequence[str | Parameter] | None]:
    """Return (axes of the grid, names): one array (g,), one array per parameter, or {name: array}.

    Raises: ShapeError, NonFiniteError, DataError, SettingError (values that do not rise, fewer than 2; names given twice).
    """
    if isinstance(grid, Mapping):
        if names is not None:
            raise SettingError(f"names is {tuple(names)!r} and the grid has names too; expected only one of them")
        names, columns = tuple(grid), list(grid.values())
    elif isinstance(grid, np.ndarray) and grid.ndim == 1:
        columns = [grid]
    else:
        rows = list(grid) if isinstance(grid, Sequence | np.ndarray) else [grid]
        columns = [np.asarray(rows)] if rows and all(np.ndim(r) == 0 for r in rows) else rows
    if not columns:
        raise DataError("grid is empty; expected one rising axis per parameter")
    axes = []
    for i, column in enumerate(columns):
        axis = as_array(f"axis {i} of the grid", column, (None,))
        if axis.size < 2 or np.any(np.diff(axis) <= 0):
            raise SettingError(
                f"axis {i} of the grid has {axis.size} values {np.round(axis[:4], 6).tolist()}...; expected 2 or more, rising"
            )
        axes.append(frozen(axis))
    return tuple(axes), names


def check_bounds(bounds: "Bounds | None", low: Array, high: Array) -> tuple[tuple[float | None, float | None], ...]:
    """Return physical bounds (low or None, high or None) of each parameter; None = none has any.

    Raises: ShapeError, SettingError (a bound inside of the grid: the grid would hold unphysical values).
    """
    if bounds is None:
        return ((None, None),) * low.size
    rows = tuple(bounds)
    if len(rows) != low.size or any(not isinstance(r, Sequence) or len(r) != 2 for r in rows):
        raise ShapeError(f"bounds is {bounds!r}; expected (low or None, high or None) for each of {low.size} parameters")
    for i, (a, b) in enumerate(rows):
        below, above = a is not None and low[i] < a - 1e-12, b is not None and high[i] > b + 1e-12
        if below or above:
            raise SettingError(f"bounds of parameter {i} are {(a, b)} but the grid spans [{low[i]:g}, {high[i]:g}]; expected a grid within")
    return tuple((None if a is None else float(a), None if b is None else float(b)) for a, b in rows)


def check_statistic(value: Any, n: int | None, where: str) -> Array:
    """Return values (n,) of a test statistic; +Inf is allowed (theta is impossible), NaN and -Inf are not.

    Raises: ShapeError, NonFiniteError, DataError.
    """
    array = as_array(f"the test statistic {where}", value, (n,), finite=False)
    if array.size == 0:
        raise DataError(f"the test statistic {where} has no values; expected one for each data set")
    bad = np.isnan(array) | np.isneginf(array)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise NonFiniteError(f"the test statistic {where} is {array[i]} for {int(bad.sum())} of {array.size} data sets, first {i}; "
                             "expected numbers (+Inf where theta is impossible)")  # fmt: skip
    return array


def point_words(names: Sequence[str], theta: ArrayLike) -> str:
    """Return a point in words, 'mu = 1.5, nu = 0.8'."""
    values = np.atleast_1d(np.asarray(theta, dtype=np.float64))
    require_finite("theta", values)
    return ", ".join(f"{n} = {v:.4g}" for n, v in zip(names, values, strict=False))
