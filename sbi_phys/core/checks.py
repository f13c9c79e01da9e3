"""Checks of arguments: shapes, finite values, ranges. The wording of the errors is the same everywhere."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import AnyArray, Array

__all__ = [
    "as_array",
    "as_matrix",
    "as_real",
    "check_level",
    "check_levels",
    "did_you_mean",
    "find_name",
    "require_choice",
    "require_finite",
    "require_int",
    "require_known",
    "require_number",
    "require_same_rows",
    "shortened",
]


def as_real(name: str, value: Any) -> Array:
    """Return `value` (numpy, torch, list; any shape) as float64; integers and booleans are widened.

    Raises: DataError for complex, object or text dtypes and for objects that numpy cannot read.
    """
    if hasattr(value, "detach"):  # a torch tensor, on any device, without importing torch here
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as err:
        raise DataError(f"{name} is a {type(value).__name__} that numpy cannot read as an array: {err}") from err
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} has dtype {array.dtype}; expected real numbers (float, int or bool)")
    return array.astype(np.float64, copy=False)


def require_finite(name: str, array: AnyArray) -> None:
    """Raise NonFiniteError if `array` holds NaN or Inf; the message counts the bad rows and names the first."""
    ok = np.isfinite(array)
    if ok.all():
        return
    where = np.argwhere(~ok)
    rows = np.unique(where[:, 0]).size if array.ndim else 1
    total = array.shape[0] if array.ndim else 1
    first = tuple(int(i) for i in where[0]) if array.ndim else ()
    got = array[first] if array.ndim else array
    raise NonFiniteError(f"{name} has NaN or Inf in {rows} of {total} rows, first {got} at index {first}; expected finite values")


def as_array(name: str, value: Any, shape: Sequence[int | None], *, finite: bool = True, note: str = "") -> Array:
    """Return `value` as float64 of the given shape; None stands for any length.

    Raises: ShapeError, NonFiniteError, DataError.
    """
    array = as_real(name, value)
    if array.ndim != len(shape) or any(want is not None and got != want for got, want in zip(array.shape, shape, strict=True)):
        wanted = "(" + ", ".join("n" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ShapeError(f"{name} has shape {array.shape}; expected {wanted}{' = ' + note if note else ''}")
    if finite:
        require_finite(name, array)
    return array


def as_matrix(name: str, value: Any, dim: int, columns: Iterable[str] = (), *, finite: bool = True) -> Array:
    """Return `value` as an (n, dim) float64 matrix; a single row (dim,) becomes (1, dim)."""
    array = as_real(name, value)
    if array.ndim == 1 and array.shape[0] == dim:
        array = array[None, :]
    columns = tuple(columns)
    note = f"columns {columns}" if columns and len(columns) <= 16 else ""
    return as_array(name, array, (None, dim), finite=finite, note=note)


def require_same_rows(**arrays: AnyArray) -> int:
    """Return the common number of rows of the named arrays, or raise ShapeError; zero rows raise DataError."""
    counts = {name: int(a.shape[0]) for name, a in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ShapeError("rows differ: " + ", ".join(f"{k} has {v}" for k, v in counts.items()) + "; expected one row each per simulation")
    n = next(iter(counts.values()))
    if n == 0:
        raise DataError(f"{', '.join(counts)}: no rows; expected at least one")
    return n


def require_int(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """Return `value` as int within [low, high], or raise SettingError. Booleans and fractions are refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise SettingError(f"{name} is {value!r} ({type(value).__name__}); expected an integer")
    if (low is not None and value < low) or (high is not None and value > high):
        raise SettingError(f"{name} is {value}; expected {_range(low, high)}")
    return int(value)


def require_number(
    name: str, value: Any, *, low: float | None = None, high: float | None = None, open_low: bool = False, open_high: bool = False
) -> float:
    """Return `value` as a finite float within the range (open ends exclude the bound), or raise SettingError."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise SettingError(f"{name} is {value!r} ({type(value).__name__}); expected a number")
    number = float(value)
    bad = not np.isfinite(number)
    bad |= low is not None and (number <= low if open_low else number < low)
    bad |= high is not None and (number >= high if open_high else number > high)
    if bad:
        raise SettingError(f"{name} is {value}; expected {_range(low, high, open_low, open_high)}")
    return number


def require_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return `value` if it is among `choices`, else raise SettingError that lists them and suggests the nearest."""
    options = tuple(choices)
    if value not in options:
        raise SettingError(f"{name} is {value!r}; expected one of {', '.join(options)}{did_you_mean(value, options)}")
    return str(value)


def require_known(what: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise SettingError for the first unknown key, suggesting the nearest."""
    options = tuple(known)
    for key in keys:
        if key not in options:
            raise SettingError(f"{what} has an unknown key {key!r}; expected some of {', '.join(options)}{did_you_mean(key, options)}")


def check_level(level: float) -> float:
    """Return a confidence level within (0, 1).   Raises: SettingError."""
    return require_number("level", level, low=0, high=1, open_low=True, open_high=True)


def check_levels(level: float | Sequence[float]) -> tuple[float, ...]:
    """Return one level or several as a rising tuple within (0, 1).   Raises: SettingError."""
    several = tuple(level) if isinstance(level, Sequence | np.ndarray) else (level,)
    if not several:
        raise SettingError("level is empty; expected one confidence level or several within (0, 1)")
    return tuple(sorted({check_level(v) for v in several}))


def find_name(name: str, names: Sequence[str]) -> int:
    """Index of a parameter's name.   Raises: SettingError."""
    if name not in names:
        raise SettingError(f"there is no parameter {name!r}; expected one of {', '.join(names)}{did_you_mean(name, names)}")
    return list(names).index(name)


def shortened(value: Any, most: int = 200) -> str:
    """Return text, or the representation of another value, in one line of at most `most` characters: its begin, '...', and its end."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 3]}...{text[-end:]}"


def did_you_mean(got: Any, options: Iterable[str]) -> str:
    """Return '; did you mean ...?' for a near miss, else ''."""
    near = difflib.get_close_matches(str(got), tuple(options), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _range(low: float | None, high: float | None, open_low: bool = False, open_high: bool = False) -> str:
    parts = []
    if low is not None:
        parts.append(f"{'>' if open_low else '>='} {low}")
    if high is not None:
        parts.append(f"{'<' if open_high else '<='} {high}")
    return "a finite number" + (" " + " and ".join(parts) if parts else "")
