r"""Preparing arrays for training: checks, standardisation with the training rows only, and a seeded split into training and validation.

Counts are variance-stabilised by y = 2 sqrt(x + 3/8) (Anscombe 1948) before they are standardised: Poisson noise then has unit
width in every bin of a steep spectrum. The scale of a count column is at least this unit noise, so that a single event in a bin
that is almost always empty does not become a 20 sigma input.

Sets of events in padded slots (n, n_max, k + 1), with a mask in the last column, have one mean and one width per column for all
slots, computed from the real events, because events have no order. The mask is not scaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbi_phys.core.checks import as_real, require_choice, require_finite, require_int, require_number, require_same_rows
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Integers, Mask
from sbi_phys.priors import Observable, Prior

__all__ = ["XScaler", "prepare_simulations", "split_rows"]

TRANSFORMS = ("auto", "counts", "real")


@dataclass(frozen=True, slots=True)
class XScaler:
    """Elementwise map of observations to network inputs: z = (g(x) - mean) / scale, g Anscombe's root on count columns.

    Args: shape: of one observation. counts: mask of count columns; mean, scale: all of `shape`.
    """

    shape: tuple[int, ...]
    counts: Mask
    mean: Array
    scale: Array

    @classmethod
    def fit(cls, x: NDArray[np.floating], counts: Mask, *, chunk: int = 65536) -> Self:
        """Compute mean and scale of x (n, ...), after the root on counts, in one pass over chunks of rows."""
        n, shape = x.shape[0], x.shape[1:]
        blank = cls.identity(counts)
        shift = blank.stabilise(x[:1])[0]  # sums about the first row avoid cancellation for large offsets
        total, squares = np.zeros(shape), np.zeros(shape)
        for start in range(0, n, chunk):
            y = blank.stabilise(x[start : start + chunk]) - shift
            total += y.sum(axis=0)
            squares += np.einsum("n...,n...->...", y, y)
        if not counts.any() and _are_padded_sets(x):
            variance = np.maximum(squares / n - (total / n) ** 2, 0.0)
            return cls(shape, counts, *_moments_of_events(shift + total / n, variance))
        return cls.from_sums(counts, shift, n, total, squares)

    @classmethod
    def from_sums(cls, counts: Mask, shift: Array, n: int, total: Array, squares: Array) -> Self:
        """Scaler of n rows y from their sums about `shift`: total = sum (y - shift), squares = sum (y - shift)^2."""
        offset = total / n
        mean, sd = shift + offset, np.sqrt(np.maximum(squares / n - offset**2, 0.0))
        scale = np.where(counts, np.maximum(sd, 1.0), np.where(sd > 1e-12 * np.abs(mean), sd, 1.0))
        return cls(counts.shape, counts, mean, np.where(scale > 0, scale, 1.0))

    @classmethod
    def identity(cls, counts: Mask) -> Self:
        """Scaler that stabilises counts and leaves mean and scale as they are."""
        return cls(counts.shape, counts, np.zeros(counts.shape), np.ones(counts.shape))

    def apply(self, x: NDArray[np.floating]) -> Tensor:
        """Scale x (n, ...) -> float32 tensor of the same shape."""
        return torch.from_numpy(((self.stabilise(x) - self.mean) / self.scale).astype(np.float32))

    def invert(self, z: Tensor) -> Array:
        """Inverse of `apply`, to single precision; whole numbers on count columns."""
        y = z.detach().cpu().double().numpy() * self.scale + self.mean
        return np.where(self.counts, np.round((np.maximum(y, 0.0) / 2) ** 2 - 0.375), y)

    def check(self, name: str, x: Any) -> tuple[Array, bool]:
        """Return x as (n, ...) and whether a single observation was passed.

        Raises: ShapeError, NonFiniteError, DataError for negative counts.
        """
        array = as_real(name, x)
        single = array.shape == self.shape
        if single:
            array = array[None]
        if array.shape[1:] != self.shape or array.ndim != len(self.shape) + 1:
            want = ", ".join(str(s) for s in self.shape)
            raise ShapeError(f"{name} has shape {np.shape(x)}; expected ({want},) for one observation or (n, {want}) as in training")
        require_finite(name, array)
        if (array[:, self.counts] < 0).any():
            raise DataError(f"{name} has negative values where the training data are counts; expected counts >= 0")
        return array, single

    def stabilise(self, x: NDArray[np.floating]) -> Array:
        """Apply Anscombe's root to the count columns of x (n, ...), without standardising."""
        y = np.asarray(x, dtype=np.float64)
        if not self.counts.any():
            return y
        return np.where(self.counts, 2.0 * np.sqrt(np.where(self.counts, y, 0.0) + 0.375), y)

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and numbers for a model file."""
        arrays = {k: torch.from_numpy(np.array(getattr(self, k))) for k in ("counts", "mean", "scale")}
        return {"shape": list(self.shape), **arrays}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`."""
        return cls(tuple(state["shape"]), *(state[k].numpy() for k in ("counts", "mean", "scale")))


def _are_padded_sets(x: NDArray[np.floating]) -> bool:
    """Whether x is (n, n_max, k + 1) with k >= 1: ones then zeros in the last column, and zeros where that is zero."""
    if x.ndim != 3 or x.shape[2] < 2:
        return False
    mask = x[:, :, -1]
    real = mask == 1
    if not (real | (mask == 0)).all() or (real[:, 1:] & ~real[:, :-1]).any() or not real.any():
        return False
    return not any((x[:, :, j][~real] != 0).any() for j in range(x.shape[2] - 1))


def _moments_of_events(mean: Array, variance: Array) -> tuple[Array, Array]:
    """Mean and scale (n_max, k + 1), equal for all slots, from the moments of all slots; empty slots are zero and add nothing."""
    events = mean[:, -1].sum()  # mean number of events per set
    centre = mean[:, :-1].sum(axis=0) / events
    sd = np.sqrt(np.maximum((variance + mean**2)[:, :-1].sum(axis=0) / events - centre**2, 0.0))
    sd = np.where(sd > 1e-7 * np.abs(centre), sd, 1.0)
    return np.broadcast_to(np.append(centre, 0.0), mean.shape).copy(), np.broadcast_to(np.append(sd, 1.0), mean.shape).copy()


def prepare_simulations(prior: Prior, theta: Any, x: Any) -> tuple[Array, NDArray[np.floating]]:
    """Check a training set: theta (n, d) in the prior's support, x (n, ...), both finite, equal rows.

    Returns the whitened parameters u (n, free_dim) and x.   Raises: ShapeError, NonFiniteError, DataError, SupportError.
    """
    theta = as_real("theta", theta)
    if theta.ndim == 1 and prior.dim == 1:
        theta = theta[:, None]
    if theta.ndim != 2 or theta.shape[1] != prior.dim:
        raise ShapeError(f"theta has shape {theta.shape}; expected (n, {prior.dim}) = {prior.names}")
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    data = np.asarray(x) if isinstance(x, np.ndarray) and x.dtype == np.float32 else as_real("x", x)
    if data.ndim == 1:
        data = data[:, None]
    if data.ndim < 2 or 0 in data.shape[1:]:
        raise ShapeError(f"x has shape {data.shape}; expected (n, ...) with at least one value per simulation")
    require_same_rows(theta=theta, x=data)
    require_finite("theta", theta)
    require_finite("x", data)
    return prior.to_unbounded(theta), data


def count_columns(x: NDArray[np.floating], transform: str, observables: Sequence[Observable] | None) -> Mask:
    """Mask, of the shape of a row of x, of the columns that hold counts, from the observables or else from the values.

    With 'auto' and no observables, x holds counts if every value is a whole number >= 0 and some exceed 1.
    """
    require_choice("x_transform", transform, TRANSFORMS)
    shape = x.shape[1:]
    if transform != "auto":
        return np.full(shape, transform == "counts")
    if observables is not None:
        total = sum(o.size for o in observables)
        if shape != (total,):
            raise ShapeError(f"x has rows of shape {shape}; expected ({total},) = {[f'{o.name}: {o.size}' for o in observables]}")
        return np.concatenate([np.full(o.size, o.kind == "counts") for o in observables])
    whole = bool((x >= 0).all() and (x == np.round(x)).all() and x.max() > 1)
    return np.full(shape, whole)


def split_rows(n: int, validation_fraction: float, seed: int) -> tuple[Integers, Integers]:
    """Row numbers (training, validation) of a seeded random split, at least one row each.   Raises: DataError for n < 2."""
    require_int("n", n, low=0)
    require_number("validation_fraction", validation_fraction, low=0, high=1, open_low=True, open_high=True)
    if n < 2:
        raise DataError(f"{n} simulation(s); expected at least 2, one to train on and one to validate")
    n_valid = min(max(1, round(validation_fraction * n)), n - 1)
    order = rng_for(seed, "split").permutation(n)
    return np.sort(order[n_valid:]), np.sort(order[:n_valid])
