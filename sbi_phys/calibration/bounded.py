r"""Parameters between bounds, moved to the whole line and back: what is widened or mapped there never leaves its bounds.

both ends: t = log((theta - a) / (b - theta));   one end: t = +-log(|theta - end|);   none: t = theta
"""

import numpy as np
from scipy.special import expit

from sbi_phys.core.checks import as_real
from sbi_phys.core.errors import NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["check_bounds", "from_line", "to_line"]


def check_bounds(bounds: ArrayLike | None, dim: int) -> Array:
    """Return bounds (d, 2), low and high; None is none at all.   Raises: ShapeError, NonFiniteError, SettingError (low >= high)."""
    if bounds is None:
        return np.tile([-np.inf, np.inf], (dim, 1))
    edges = as_real("bounds", bounds)
    if edges.shape != (dim, 2):
        raise ShapeError(f"bounds has shape {edges.shape}; expected ({dim}, 2): low and high of each parameter, +-inf for none")
    if np.isnan(edges).any():
        raise NonFiniteError("bounds has NaN; expected numbers, +-inf for none")
    if not np.all(edges[:, 0] < edges[:, 1]):
        raise SettingError(f"bounds is {edges.tolist()}; expected low < high for each parameter")
    return edges


def to_line(name: str, values: Array, bounds: Array) -> Array:
    """Map values (..., d) to the whole line.   Raises: SupportError for a value at or beyond its bounds."""
    out = np.array(values, dtype=np.float64)
    for j, (low, high) in enumerate(bounds):
        column = values[..., j]
        if not np.all((column > low) & (column < high)):
            bad = float(column[~((column > low) & (column < high))][0])
            raise SupportError(f"{name} has {bad:g} in column {j}; expected values inside its bounds ({low:g}, {high:g})")
        if np.isfinite(low) and np.isfinite(high):
            out[..., j] = np.log(column - low) - np.log(high - column)
        elif np.isfinite(low):
            out[..., j] = np.log(column - low)
        elif np.isfinite(high):
            out[..., j] = -np.log(high - column)
    return out


def from_line(values: Array, bounds: Array) -> Array:
    """Map values (..., d) back between their bounds."""
    out = np.array(values, dtype=np.float64)
    for j, (low, high) in enumerate(bounds):
        column = values[..., j]
        if np.isfinite(low) and np.isfinite(high):
            out[..., j] = low + (high - low) * expit(column)
        elif np.isfinite(low):
            out[..., j] = low + np.exp(column)
        elif np.isfinite(high):
            out[..., j] = high - np.exp(-column)
    return out
