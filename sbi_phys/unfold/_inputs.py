"""Checks of the arguments of every unfolding: edges, counts, covariances, events and weights; errors name the bin or the row."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array, as_real, require_finite
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.types import Array, ArrayLike, Mask

__all__ = [
    "bin_name",
    "check_counts",
    "check_covariance",
    "check_edges",
    "check_mask",
    "check_nonnegative",
    "check_prior",
    "frozen",
    "warn_few",
]


def frozen(array: ArrayLike) -> Array:
    """Return a read-only copy as float64."""
    copy = np.array(array, dtype=np.float64)
    copy.setflags(write=False)
    return copy


def bin_name(kind: str, index: int, edges: Array | None = None) -> str:
    """Return the words for one bin, e.g. 'truth bin 3 [18.7, 18.8)'."""
    return f"{kind} bin {index}" + ("" if edges is None else f" [{edges[index]:g}, {edges[index + 1]:g})")


def check_edges(name: str, value: ArrayLike, n_bins: int | None = None) -> Array:
    """Return bin edges as float64 (n_bins + 1,), finite and strictly increasing.   Raises: ShapeError, NonFiniteError, DataError."""
    edges = as_array(name, value, (None if n_bins is None else n_bins + 1,), note="" if n_bins is None else f"edges of {n_bins} bins")
    if edges.size < 2:
        raise ShapeError(f"{name} has {edges.size} values; expected at least 2, the edges of one bin")
    falls = np.flatnonzero(np.diff(edges) <= 0)
    if falls.size:
        i = int(falls[0])
        raise DataError(f"{name} goes from {edges[i]:g} to {edges[i + 1]:g} at index {i}; expected strictly increasing edges")
    return edges


def check_nonnegative(name: str, value: ArrayLike, shape: Sequence[int | None], kind: str = "", edges: Array | None = None) -> Array:
    """Return a finite float64 array without negative values; `kind` and `edges` name the bin in the error.

    Raises: ShapeError, NonFiniteError, DataError.
    """
    array = as_array(name, value, shape)
    bad = np.argwhere(array < 0)
    if bad.size:
        index = tuple(int(i) for i in bad[0])
        place = bin_name(kind, index[0], edges) if kind else f"index {index if len(index) > 1 else index[0]}"
        raise DataError(f"{name} is {array[index]:g} at {place} ({len(bad)} negative in all); expected none below zero")
    return array


def check_counts(counts: ArrayLike, n_reco: int, edges: Array | None = None) -> Array:
    """Return measured counts (n_reco,), >= 0; fractions are allowed (weighted or expected counts).

    Raises: ShapeError (bins that do not match), NonFiniteError, DataError (negative counts, or no counts at all).
    """
    array = as_real("counts", counts)
    if array.shape != (n_reco,):
        raise ShapeError(f"counts has shape {array.shape}; expected ({n_reco},), one for each row (reco bin) of the response")
    array = check_nonnegative("counts", array, (n_reco,), "reco", edges)
    if array.sum() <= 0:
        raise DataError(f"counts are zero in all {n_reco} bins; expected at least one event")
    return array


def warn_few(counts: Array, n_truth: int) -> None:
    """Warn if whole-number counts have fewer events than truth bins: they do not determine a spectrum."""
    total = counts.sum()
    if total < n_truth and np.array_equal(counts, np.rint(counts)):
        warnings.warn(f"counts hold {total:g} events for {n_truth} truth bins; expected more events than bins", UserWarning, stacklevel=4)


def check_covariance(name: str, value: ArrayLike, n: int) -> Array:
    """Return a covariance (n, n), symmetric with no negative variance.   Raises: ShapeError, NonFiniteError, DataError."""
    covariance = as_array(name, value, (n, n))
    scale = max(float(np.abs(covariance).max()), 1e-300)
    if np.abs(covariance - covariance.T).max() > 1e-9 * scale:
        raise DataError(f"{name} is not symmetric; expected a covariance matrix ({n}, {n})")
    if np.linalg.eigvalsh(covariance)[0] < -1e-9 * scale:
        raise DataError(f"{name} has a negative eigenvalue; expected a covariance matrix, positive semidefinite")
    return covariance


def check_prior(prior: ArrayLike, n_truth: int, edges: Array | None = None) -> Array:
    """Return a prior spectrum (n_truth,), all above zero: iterations cannot fill a bin that starts at 0.

    Raises: ShapeError, NonFiniteError, DataError.
    """
    array = check_nonnegative("prior", prior, (n_truth,), "truth", edges)
    empty = np.flatnonzero(array == 0)
    if empty.size:
        raise DataError(
            f"prior is 0 at {bin_name('truth', int(empty[0]), edges)}; expected > 0, because iterations cannot fill an empty bin"
        )
    return array


def check_mask(name: str, value: ArrayLike | None, n: int) -> Mask:
    """Return a mask (n,) of booleans, all True for None.   Raises: ShapeError, DataError (anything but 0 and 1)."""
    if value is None:
        return np.ones(n, dtype=bool)
    array = as_array(name, value, (n,))
    if not np.isin(array, (0, 1)).all():
        raise DataError(f"{name} has values other than 0 and 1; expected booleans, one per event")
    return array.astype(bool)


MIN_EVENTS = 100  # fewer cannot train a classifier

_OUTSIDE_SHARE = 0.005  # share of the data outside the simulation's range above which a warning is given


def as_columns(name: str, value: ArrayLike, mask: Mask | None = None) -> Array:
    """Return `value` as (n, k); (n,) is one column. Rows where `mask` is False may hold anything; they become 0.

    Raises: ShapeError, DataError, NonFiniteError.
    """
    array = as_real(name, value)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] == 0:
        raise ShapeError(f"{name} has shape {np.shape(value)}; expected (n, k), one row per event and at least one column")
    if mask is not None and len(mask) == len(array):
        array = np.where(mask[:, None], array, 0.0)
    require_finite(name, array)
    return array


def as_mask(name: str, value: Any, n: int, partner: str) -> Mask:
    """Return a boolean (n,); None is True everywhere.   Raises: ShapeError, DataError."""
    if value is None:
        return np.ones(n, dtype=np.bool_)
    array = as_array(name, value, (n,), note=f"one per row of {partner}")
    odd = np.flatnonzero((array != 0) & (array != 1))
    if len(odd):
        raise DataError(f"{name} is {array[odd[0]]:g} at row {odd[0]}; expected True or False (1 or 0)")
    return array == 1


def as_weights(name: str, value: ArrayLike | None, n: int, partner: str) -> Array:
    """Return weights (n,) >= 0 with a positive sum; None is 1 everywhere.   Raises: ShapeError, NonFiniteError, DataError."""
    if value is None:
        return np.ones(n)
    array = as_array(name, value, (n,), note=f"one per row of {partner}")
    negative = np.flatnonzero(array < 0)
    if len(negative):
        raise DataError(
            f"{name} has {len(negative)} of {n} entries below 0, first {array[negative[0]]:g} at row {negative[0]}; expected >= 0; "
            "pass background events as `background` instead of subtracting them"
        )
    if n and array.sum() <= 0:
        raise DataError(f"{name} is 0 in all {n} rows; expected a positive sum")
    return array


def check_overlap(data: Array, reco: Array) -> None:
    """Compare the columns' ranges of data (m, k) and simulation (n, k).

    Raises: DataError if none of the data lies within the simulation's range in some column; warns, with the place, if 0.5 % do not.
    """
    for j in range(data.shape[1]):
        low, high = reco[:, j].min(), reco[:, j].max()
        outside = (data[:, j] < low) | (data[:, j] > high)
        values = data[outside, j]
        if outside.all():
            raise DataError(
                f"no overlap in reco column {j}: data within [{values.min():.4g}, {values.max():.4g}], "
                f"simulation within [{low:.4g}, {high:.4g}]; expected simulated events where the data are"
            )
        if outside.mean() > _OUTSIDE_SHARE:
            warnings.warn(
                f"{outside.sum()} of {len(outside)} data events lie outside the simulation's range [{low:.4g}, {high:.4g}] in reco "
                f"column {j}, within [{values.min():.4g}, {values.max():.4g}]; no weight of simulated events can describe them",
                RuntimeWarning,
                stacklevel=4,
            )
