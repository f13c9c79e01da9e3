"""What every unfolding takes: edges, counts, weights and masks, checked once, with the bin at fault named in the error."""

import warnings
from collections.abc import Sequence

import numpy as np

from sbi_phys.core.checks import as_array, as_real
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
    """Return a copy as float64 that cannot be written to: results and responses are shared."""
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

    Raises: ShapeError (bins that do not match), NonFiniteError, DataError (negative, or nothing measured at all).
    """
    array = as_real("counts", counts)
    if array.shape != (n_reco,):
        raise ShapeError(f"counts has shape {array.shape}; expected ({n_reco},), one for each row (reco bin) of the response")
    array = check_nonnegative("counts", array, (n_reco,), "reco", edges)
    if array.sum() <= 0:
        raise DataError(f"counts are zero in all {n_reco} bins; expected at least one event")
    return array


def warn_few(counts: Array, n_truth: int) -> None:
    """Warn if whole-number counts have fewer events than there are bins to unfold into: no method has an answer then."""
    total = counts.sum()
    if total < n_truth and np.array_equal(counts, np.rint(counts)):
        warnings.warn(f"counts hold {total:g} events for {n_truth} truth bins; expected more events than bins", UserWarning, stacklevel=3)


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
    """Return a prior spectrum (n_truth,), all above zero: a bin that starts empty stays empty whatever the data say.

    Raises: ShapeError, NonFiniteError, DataError.
    """
    array = check_nonnegative("prior", prior, (n_truth,), "truth", edges)
    empty = np.flatnonzero(array == 0)
    if empty.size:
        raise DataError(f"prior is 0 at {bin_name('truth', int(empty[0]), edges)}; expected > 0, for the bin would stay empty for ever")
    return array


def check_mask(name: str, value: ArrayLike | None, n: int) -> Mask:
    """Return a mask (n,) of booleans, all True for None.   Raises: ShapeError, DataError (anything but 0 and 1)."""
    if value is None:
        return np.ones(n, dtype=bool)
    array = as_array(name, value, (n,))
    if not np.isin(array, (0, 1)).all():
        raise DataError(f"{name} has values other than 0 and 1; expected booleans, one per event")
    return array.astype(bool)
