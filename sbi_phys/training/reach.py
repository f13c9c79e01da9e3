r"""Where the training observations lie, and whether another one lies far outside: a network answers there without having learned anything.

Two distances of an observation, z (k,) in units of the training rows' widths:

    largest   max_j |z_j|,                      a single value that was never seen
    joint     |W z|,  W W' = covariance^-1,     values that were never seen together

The covariance comes from one half of the rows; the tails of both distances from the other half, as exceedances of a high quantile,

    P(d > t + e) = f (1 + xi e / sigma)^(-1/xi)        (generalised Pareto)

with xi at least that of an exponential tail and one standard error larger than fitted, so that tails of few rows are not taken as short.
An observation is far outside where this probability, times the number of distances and of observations asked at once, is below 3e-5.
A column that had one value in all rows must have it again.

Rows of more than 256 values, images and sets of events are described by numbers of each: mean, sd, smallest and largest value.

Source: Pickands 1975, Ann. Statist. 3, 119 (exceedances); Hosking & Wallis 1987, Technometrics 29, 339 (probability weighted moments).
"""

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbi_phys.core.types import Array, Mask

__all__ = ["Reach", "warn_far"]

_FAR = 3e-5
_MOST_COLUMNS = 256
_ROWS = 20_000  # that the tails are learned from
_FEW = 20
_FLOOR = 0.2  # of sigma, in units of the widths: the tail of values on a grid, or of bounded ones, is not taken as a wall
_SAME = 1e-5  # relative difference that float32 may make


@dataclass(frozen=True, slots=True)
class Reach:
    """Region of the training observations, as summary statistics.

    Args: mean, width (k,), and whiten (k, k), of the description of an observation; tails (2, 4): threshold, sigma, xi and share of both
    distances. fixed (k,): columns with one value in all rows, which is their mean.
    """

    mean: Array
    width: Array
    whiten: Array
    tails: Array
    fixed: Mask

    @classmethod
    def fit(cls, z: Tensor | NDArray[np.floating]) -> Self | None:
        """Learn from network inputs z (n, ...) of simulations; None for fewer than 20 rows."""
        rows = describe(z[:: -(-len(z) // _ROWS) or 1])
        n = len(rows)
        if n < _FEW:
            return None
        first, second = rows[::2], rows[1::2]
        mean, sd = first.mean(axis=0), first.std(axis=0)
        fixed = rows.max(axis=0) - rows.min(axis=0) <= _SAME * np.maximum(np.abs(mean), 1e-3)
        width = np.where(fixed, 1.0, np.maximum(sd, 0.05 * rows.std(axis=0)))
        width = np.where(width > 0, width, 1.0)
        free = np.where(fixed, 0.0, (first - mean) / width)
        blank = cls(mean, width, _whitening(free), np.zeros((2, 4)), fixed)
        return cls(mean, width, blank.whiten, np.stack([_tail(d) for d in blank.distances(second).T]), fixed)

    def distances(self, rows: Array) -> Array:
        """Both distances (n, 2) of described observations (n, k)."""
        z = np.where(self.fixed, 0.0, (rows - self.mean) / self.width)
        return np.stack([np.abs(z).max(axis=1, initial=0.0), np.sqrt(((z @ self.whiten) ** 2).sum(axis=1))], axis=1)

    def message(self, z: Tensor | NDArray[np.floating]) -> str:
        """Words with the distance of the observation of z (n, ...) that lies farthest outside, '' if none lies far outside."""
        rows = describe(z)
        if not len(rows):
            return ""
        moved = self.fixed & (np.abs(rows - self.mean) > 10 * _SAME * np.maximum(np.abs(self.mean), 1.0))
        if moved.any():
            i, j = (int(v) for v in np.argwhere(moved)[0])
            where = f"column {j}" if len(self.mean) == math.prod(z.shape[1:]) else "a number that describes it"
            return (
                f"observation {i} differs from all simulations in {where}: it had one value in the training, from which this one is"
                f" {abs(rows[i, j] - self.mean[j]):.4g} away (in the network's units)"
            )
        d = self.distances(rows)
        log_p = np.stack([_log_survival(d[:, k], self.tails[k]) for k in range(2)], axis=1)
        i, k = (int(v) for v in np.unravel_index(int(log_p.argmin()), log_p.shape))
        if log_p[i, k] + math.log(2 * len(rows)) > math.log(_FAR):
            return ""
        kind = ("in one value", "in all values together")[k]
        column = f" (column {int(np.abs((rows[i] - self.mean) / self.width).argmax())})" if k == 0 and z.ndim == 2 else ""
        return (
            f"observation {i} lies far outside the simulations: its distance from their mean is {d[i, k]:.4g} widths {kind}{column},"
            f" and that of 99 % of the simulations below {_quantile(self.tails[k], 0.01):.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Tensors for a model file."""
        return {name: torch.from_numpy(np.array(getattr(self, name))) for name in ("mean", "width", "whiten", "tails", "fixed")}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(*(state[name].numpy() for name in ("mean", "width", "whiten", "tails", "fixed")))


def warn_far(reach: Reach | None, z: Tensor | NDArray[np.floating]) -> None:
    """Warn of an observation z (n, ...), as network inputs, that lies far outside the training rows; at the caller outside the package."""
    words = "" if reach is None else reach.message(z)
    if words:
        warnings.warn(
            f"{words}; the network has learned nothing there, and its answer is not a posterior. Expected simulations that cover"
            " the observation, or another model",
            RuntimeWarning,
            stacklevel=_outside(),
        )


def _outside() -> int:
    """Level of the first frame outside this package, as `warnings.warn` in the calling function counts."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("sbi_phys."):
        level, frame = level + 1, frame.f_back
    return level


def describe(z: Tensor | NDArray[np.floating]) -> Array:
    """Rows (n, k) that describe network inputs (n, ...): the values themselves, or numbers of each column where there are many."""
    array = (z.detach().cpu().numpy() if isinstance(z, Tensor) else np.asarray(z)).astype(np.float64)
    n = len(array)
    if array.ndim == 2 and array.shape[1] <= _MOST_COLUMNS:
        return array
    slots = array if array.ndim == 3 else array.reshape(n, -1, 1)  # of sets the columns of events stay apart
    if slots.shape[2] > 8:
        slots = slots.reshape(n, -1, 1)
    return np.concatenate([slots.mean(axis=1), slots.std(axis=1), slots.min(axis=1), slots.max(axis=1)], axis=1)


def _whitening(z: Array) -> Array:
    """Matrix (k, k) to the right of rows that gives them the covariance 1; shrunk, more where there are few rows, and bounded."""
    n, k = z.shape
    share = min(1.0, k / n + 1e-6)
    covariance = (1 - share) * np.atleast_2d(np.cov(z, rowvar=False)) + share * np.eye(k)
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors / np.sqrt(np.maximum(values, 1e-6 * values.max())))


def _tail(d: Array) -> Array:
    """Threshold, sigma, xi and share of the exceedances of distances (n,)."""
    ordered, n = np.sort(d), len(d)
    m = int(min(max(10, 0.1 * n), 200, n // 2))
    threshold, e = float(ordered[-m - 1]), ordered[-m:] - ordered[-m - 1]
    b0, b1 = float(e.mean()), float(((m - 1 - np.arange(m)) / (m - 1) * e).mean())
    xi = 2 - b0 / (b0 - 2 * b1) if b0 > 2 * b1 > 0 else (0.0 if b0 == 0 else 1.0)
    xi = min(max(xi, 0.0), 1.0) + 1 / math.sqrt(m)
    sigma = max(b0 * (1 - min(xi, 0.9)), float(e.max()) * xi / ((m + 1.0) ** xi - 1), _FLOOR)
    return np.array([threshold, sigma, xi, m / n])


def _log_survival(d: Array, tail: Array) -> Array:
    threshold, sigma, xi, share = tail
    return np.where(d <= threshold, 0.0, math.log(share) - np.log1p(xi * np.maximum(d - threshold, 0.0) / sigma) / xi)


def _quantile(tail: Array, p: float) -> float:
    threshold, sigma, xi, share = (float(v) for v in tail)
    return threshold + sigma * ((share / p) ** xi - 1) / xi if p < share else threshold
