"""Errors of the simulators, all ValueErrors, and checks of settings."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CountsError",
    "SimulatorError",
    "SimulatorSettingError",
    "TableError",
    "require_choice",
    "require_flag",
    "require_fractions",
    "require_number",
    "require_range",
]


class SimulatorError(ValueError):
    """Base class of all errors that the simulators raise on purpose."""


class SimulatorSettingError(SimulatorError):
    """A setting of a simulator has an unknown name or a value outside its range."""


class TableError(SimulatorError):
    """A data file is missing, truncated or malformed."""


class CountsError(SimulatorError):
    """An observation does not fit the simulator: shape, whole non-negative counts, or totals."""


def require_choice(name: str, value: Any, options: Iterable[str]) -> str:
    """Return `value` if it is one of `options`, else raise SimulatorSettingError with the nearest one."""
    known = tuple(options)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SimulatorSettingError(f"{name} is {value!r}; expected one of {', '.join(known)}{hint}")
    return str(value)


def require_flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False, else raise SimulatorSettingError."""
    if not isinstance(value, bool):
        raise SimulatorSettingError(f"{name} is {value!r}; expected True or False")
    return value


def require_number(name: str, value: Any, low: float, high: float) -> float:
    """Return `value` as a float within [low, high], else raise SimulatorSettingError."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or not low <= value <= high:
        raise SimulatorSettingError(f"{name} is {value!r}; expected a number within [{low:g}, {high:g}]")
    return float(value)


def require_range(name: str, value: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Return two numbers low <= first < last <= high, else raise SimulatorSettingError."""
    try:
        first, last = (float(v) for v in value)
    except (TypeError, ValueError):
        first = last = np.nan
    if not low <= first < last <= high:
        raise SimulatorSettingError(f"{name} is {value!r}; expected two numbers in order within [{low:g}, {high:g}]")
    return first, last


def require_fractions(value: Sequence[float]) -> NDArray[np.float64]:
    """Return five fractions (5,) of H, He, N, Si, Fe, normalised to 1, else raise SimulatorSettingError."""
    share = np.asarray(value, dtype=np.float64)
    if share.shape != (5,) or not (share >= 0).all() or not 0.99 < share.sum() < 1.01:
        raise SimulatorSettingError(f"fractions are {value!r}; expected five values >= 0 for H, He, N, Si, Fe that sum to 1")
    return share / share.sum()
