"""Checks of arguments: shapes, finite values, ranges. The wording of the errors is the same everywhere."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import AnyArray, Array

__all__ = [
    "as_array",
    "as_floating",
    "as_matrix",
    "as_real",
    "check_level",
    "check_levels",
    "column_labels",
    "did_you_mean",
    "find_name",
    "require_choice",
    "require_finite",
    "require_int",
    "require_known",
    "require_number",
    "require_plain",
    "require_same_rows",
    "shortened",
]


def as_real(name: str, value: Any, columns: Iterable[str] = ()) -> Array:
    """Return `value` (numpy, torch, list, table; any shape) as float64; integers, booleans and half precision are widened.

    Args: columns: names of the last axis, where they are known: a table with named columns (a data frame, a structured array) must have
    these, in any order, and is returned in their order.
    Raises: DataError for what would be lost in a plain array: masked values, a unit, columns of other names, whole numbers beyond 2^53;
    and for complex, object or text dtypes and for objects that numpy cannot read.
    """
    require_plain(name, value)
    if hasattr(value, "detach"):  # a torch tensor, on any device, without importing torch here
        value = _of_tensor(name, value)
    labels = column_labels(value)
    wanted = tuple(columns)
    if labels and wanted and set(labels) != set(wanted):
        raise DataError(_other_columns(name, labels, wanted))
    try:
        if labels and not hasattr(value, "to_numpy"):  # a structured array, or a table that numpy reads as one
            array = np.column_stack([as_real(f"{name}, column {label}", value[label]) for label in labels])
        else:
            array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as err:
        raise DataError(f"{name} is a {type(value).__name__} that numpy cannot read as an array: {_unequal(value) or err}") from err
    if array.dtype.kind == "V" and array.dtype.name.startswith(("bfloat16", "float8")):  # numbers of other libraries' formats
        array = array.astype(np.float64)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} has dtype {array.dtype}; expected real numbers (float, int or bool)")
    if labels and wanted:
        array = array[..., [labels.index(label) for label in wanted]]
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        _require_exact(name, array)
    return array.astype(np.float64, copy=False)


def as_floating(name: str, value: Any, columns: Iterable[str] = ()) -> NDArray[np.floating]:
    """Return `value` as `as_real` does, but a float32 array of numpy as it is, without a copy: for large simulations."""
    if type(value) is np.ndarray and value.dtype == np.float32:
        return value
    return as_real(name, value, columns)


def column_labels(value: Any) -> tuple[str, ...]:
    """Names of the columns of a data frame, a table or a structured array; () where they have none, or only numbers."""
    dtype = getattr(value, "dtype", None)
    found = getattr(dtype, "names", None) if dtype is not None else None
    if found is None and hasattr(value, "columns") and hasattr(value, "__getitem__") and not callable(value.columns):
        found = list(value.columns)
    if not found or not all(isinstance(label, str) for label in found):
        return ()
    return tuple(found)


def _other_columns(name: str, labels: Sequence[str], wanted: Sequence[str]) -> str:
    unknown = [label for label in labels if label not in wanted]
    missing = [label for label in wanted if label not in labels]
    parts = [f"{words} {', '.join(some)}" for words, some in (("unknown:", unknown), ("missing:", missing)) if some]
    hint = did_you_mean(unknown[0], missing) if unknown and missing else ""
    return (
        f"{name} is a table with columns {', '.join(labels)}; expected {', '.join(wanted)} in any order ({'; '.join(parts)}){hint};"
        " an array without names, e.g. table.to_numpy(), is taken by position"
    )


def require_plain(name: str, value: Any) -> None:
    """Raise DataError for a mask or a unit, which a plain array would lose without a word."""
    parts = value if isinstance(value, list | tuple) else ()
    labels = () if isinstance(value, np.ndarray) else column_labels(value)
    for label in labels:
        column = value[label]
        if getattr(column, "ndim", 1) != 1:
            raise DataError(f"{name} has several columns with the name {label!r}; expected different names")
        require_plain(f"{name}, column {label}", column)
    for i, part in enumerate(parts):
        if isinstance(part, np.ma.MaskedArray) or part is np.ma.masked or _unit(part):
            require_plain(f"{name}[{i}]", part)
    if isinstance(value, np.ma.MaskedArray):
        mask: AnyArray = np.ma.getmaskarray(value)  # of a structured array one for each of its columns
        n = sum(int(mask[k].sum()) for k in mask.dtype.names) if mask.dtype.names else int(mask.sum())
        if n:
            raise DataError(
                f"{name} has {n} masked values of {np.size(value)}; expected an array without a mask, because what lies behind it"
                " is no data: leave these rows out, or fill them, x.filled(...), with what they stand for"
            )
    unit = _unit(value)
    if unit:
        raise DataError(
            f"{name} has the unit {unit!r}; expected plain numbers in the unit of the parameter or observable: convert it and take the"
            " values, e.g. x.to_value(unit) of an astropy quantity, x.to(unit).magnitude of a pint quantity"
        )


def _unit(value: Any) -> str:
    """Unit of an object that has one (`unit`, `units`, or an attribute `units` of an xarray object), else ''; a plain number has none."""
    for key in ("unit", "units"):
        unit = getattr(value, key, None)
        if unit is not None and not callable(unit):
            text = str(unit).strip()
            return "" if text in ("", "dimensionless", "None") else text
    attributes = getattr(value, "attrs", None)
    text = str(attributes.get("units", "")) if isinstance(attributes, Mapping) and not hasattr(value, "file") else ""
    return "" if text in ("", "1", "dimensionless") else text


def _of_tensor(name: str, value: Any) -> AnyArray:
    try:
        value = value.detach().cpu()
        if str(value.dtype).removeprefix("torch.").startswith(("bfloat16", "float8")):  # numpy does not have these
            value = value.float()
        return np.asarray(value.resolve_conj().resolve_neg().numpy())
    except (TypeError, RuntimeError) as err:
        raise DataError(f"{name} is a {value.layout} tensor of {value.dtype} that numpy cannot read: {str(err).splitlines()[0]}") from err


def _unequal(value: Any) -> str:
    """Words for the first row of a list whose length differs from that of the first; '' if none does."""
    if not isinstance(value, list | tuple) or not value:
        return ""
    shapes = [np.shape(v) if not isinstance(v, list | tuple) else (len(v),) for v in value]
    i = next((i for i, s in enumerate(shapes) if s[:1] != shapes[0][:1]), None)
    if i is None:
        return ""
    got = [s[0] if s else "a number" for s in (shapes[0], shapes[i])]
    return f"row 0 has length {got[0]}, row {i} {got[1]}; expected rows of one length (sets of events: sp.pad_sets)"


def _require_exact(name: str, array: AnyArray) -> None:
    """Raise DataError if whole numbers of 64 bits change as float64."""
    if not array.size or -(2**53) <= int(array.min()) <= int(array.max()) <= 2**53:
        return
    changed = array.astype(np.float64).astype(array.dtype) != array
    if changed.any():
        raise DataError(
            f"{name} has {int(changed.sum())} whole numbers beyond 2^53 that float64 rounds, first {array[changed][0]};"
            " expected smaller ones: subtract an offset first"
        )


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
    columns = tuple(columns)
    array = as_real(name, value, columns)
    if array.ndim == 1 and array.shape[0] == dim:
        array = array[None, :]
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


def shortened(text: str, most: int = 200) -> str:
    """Return text in one line of at most `most` characters: its begin, '...', and its end."""
    text = " ".join(text.split())
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
