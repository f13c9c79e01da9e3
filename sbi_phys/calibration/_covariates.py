"""The observations x as covariates of a calibration test: checked, standardised, and mapped to smooth functions of x."""

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from sbi_phys.core.checks import as_real, require_finite
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["check_x", "normal_scores", "random_features", "standardised"]
CLIP = 4.0  # z-scores are clipped at this value, because larger ones belong to a heavy tail; the normal score keeps their order


def check_x(x: ArrayLike, n: int) -> Array:
    """Return x as finite float64 (n, k), further axes flattened; (n,) is one column.

    Raises: ShapeError, NonFiniteError, DataError (complex or text dtype, every column constant).
    """
    values = as_real("x", x)
    if values.ndim == 0 or values.shape[0] != n or values.size == 0:
        raise ShapeError(f"x has shape {values.shape}; expected (n, k) with n = {n} rows, one per row of theta")
    values = values.reshape(n, -1)
    require_finite("x", values)
    if np.all(values == values[0]):
        raise DataError("x is constant in every column; expected observations that vary between simulations")
    return values


def normal_scores(x: Array) -> Array:
    """Phi^-1((rank - 1/2) / n) of every column, mean 0 and variance 1, ties at their mean rank: independent of scale and tails.

    A constant column becomes 0.
    """
    scores = ndtri((rankdata(x, axis=0) - 0.5) / x.shape[0])
    return _unit(scores)


def standardised(x: Array) -> Array:
    """z-scores and normal scores of the columns that vary, side by side (n, 2 k); the latter suit counts that span decades."""
    x = x[:, x.max(axis=0) > x.min(axis=0)]
    # scaling by the largest value first keeps squares of 1e200 and of 1e-200 finite
    plain = _unit(x / np.maximum(np.abs(x).max(axis=0), 1e-300))
    return np.concatenate([np.clip(plain, -CLIP, CLIP), normal_scores(x)], axis=1)


def random_features(scores: Array, n_features: int, rng: np.random.Generator) -> Array:
    r"""Smooth random functions of x, sqrt(2) cos(w . scores / sqrt(k) + b), w ~ N(0, 1), b uniform; mean 0 and variance 1 -> (n, f).

    Source: Rahimi & Recht 2007, "Random features for large-scale kernel machines".
    """
    k = max(scores.shape[1], 1)
    weights = rng.standard_normal((scores.shape[1], n_features)) * 1.5 / np.sqrt(k)
    return _unit(np.cos(scores @ weights + rng.uniform(0, 2 * np.pi, n_features)))


def _unit(values: Array) -> Array:
    centred = values - values.mean(axis=0)
    sd = centred.std(axis=0)
    # the sd of a constant column consists of rounding errors, which a division by it would amplify
    still = sd <= 1e-12 * np.maximum(np.abs(values).max(axis=0), 1e-300)
    return np.where(still, 0.0, centred / np.where(still, 1.0, sd))
