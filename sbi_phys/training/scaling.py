r"""Preparing arrays for training: checks, standardisation with the training rows only, and a seeded split into training and validation.

Counts are variance-stabilised by y = 2 sqrt(x + 3/8) (Anscombe 1948) before they are standardised: Poisson noise then has unit
width in every bin of a steep spectrum. The scale of a count column is at least this unit noise, so that a single event in a bin
that is almost always empty does not become a 20 sigma input.

`standardise` says what a network receives: "column" has a mean and a width for each column, "block" one for each observable, which
keeps the relative sizes within an image or a trace, and "none" leaves the values as they are (Anscombe's root remains where x are counts).

Missing values. A value that was not measured is NaN (`Observable(..., missing=True)`). Mean and width come from the values that are
present; the network receives 0 for a missing value, i.e. the mean, and an indicator, 1 where the value is present, 0 where it is missing:

    rows (n, k)                       the k columns, then one indicator for each column that may be missing
    an observable of shape (h, w)     (n, h, w), and (n, 2, h, w) with values and indicators if it may be missing

The second form is for a single observable of two or more axes; several observables come as rows.

Sets of events in padded slots (n, n_max, k + 1), with a mask in the last column, have one mean and one width per column for all
slots, computed from the real events, because events have no order. The mask is not scaled.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from sbi_phys.core.checks import (
    as_floating,
    as_real,
    column_labels,
    require_choice,
    require_finite,
    require_int,
    require_number,
    require_same_rows,
)
from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Integers, Mask
from sbi_phys.priors import Observable, Prior, to_rows
from sbi_phys.priors.blocks import column_name, columns, failed_rows, fractional, missing_columns
from sbi_phys.priors.parameters import observables_from_dicts, observables_to_dicts

__all__ = ["XScaler", "prepare_simulations", "split_rows"]

TRANSFORMS = ("auto", "counts", "real")
_EDGE = 5.0  # in u: prior draws lie beyond in 6e-7 of the cases
STANDARDISE = ("column", "block", "none")


@dataclass(frozen=True, slots=True)
class XScaler:
    """Map of observations to network inputs: z = (g(x) - mean) / scale, g Anscombe's root on count columns, arranged by the observables.

    Args: x_shape: of one observation, (k,) where observables are given. counts: mask of count columns; mean, scale: all of `x_shape`.
    observables: blocks of the columns, () where they are not known.
    Attributes: shape: of one network input, see the module.
    """

    x_shape: tuple[int, ...]
    counts: Mask
    mean: Array
    scale: Array
    observables: tuple[Observable, ...] = ()

    @classmethod
    def fit(
        cls,
        x: NDArray[np.floating],
        counts: Mask,
        *,
        observables: Sequence[Observable] | None = None,
        standardise: str = "column",
        chunk: int = 65536,
    ) -> Self:
        """Compute mean and scale of x (n, ...), after the root on counts, in one pass over chunks of rows.

        Args: observables: of rows x (n, k); where they are given, NaN is a missing value.
        """
        n, shape = x.shape[0], x.shape[1:]
        blank = cls.identity(counts)
        padded = not counts.any() and _are_padded_sets(x)
        if padded and standardise == "none":
            return blank
        shift = blank.stabilise(x[:1])[0]  # sums about the first row avoid cancellation for large offsets
        if np.isnan(shift).any():
            shift = _first_present(blank.stabilise(x))
        sums = Sums(shift)
        for start in range(0, n, chunk):
            sums.add(blank.stabilise(x[start : start + chunk]) - shift)
        if padded:
            variance = np.maximum(sums.squares / n - (sums.total / n) ** 2, 0.0)
            return cls(shape, counts, *_moments_of_events(shift + sums.total / n, variance))
        return cls.from_sums(counts, sums, observables=observables, standardise=standardise)

    @classmethod
    def from_sums(cls, counts: Mask, sums: "Sums", *, observables: Sequence[Observable] | None = None, standardise: str = "column") -> Self:
        """Scaler of rows y from their sums."""
        known = tuple(observables or ())
        mean, sd = sums.moments()
        if require_choice("standardise", standardise, STANDARDISE) == "none":
            return cls(counts.shape, counts, np.zeros(counts.shape), np.ones(counts.shape), known)
        if standardise == "block":
            mean, sd = _moments_of_blocks(mean, sd, np.broadcast_to(sums.n, counts.shape), known)
        scale = np.where(counts, np.maximum(sd, 1.0), np.where(sd > 1e-12 * np.abs(mean), sd, 1.0))
        return cls(counts.shape, counts, mean, np.where(scale > 0, scale, 1.0), known)

    @classmethod
    def identity(cls, counts: Mask) -> Self:
        """Scaler that stabilises counts and leaves mean and scale as they are."""
        return cls(counts.shape, counts, np.zeros(counts.shape), np.ones(counts.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one network input."""
        if not self.observables:
            return self.x_shape
        first = self.observables[0]
        if self._shaped:
            return (2, *first.shape) if first.missing else first.shape
        return (self.x_shape[0] + int(self.missing.sum()),)

    @property
    def missing(self) -> Mask:
        """Which columns may be missing, of `x_shape`."""
        return missing_columns(self.observables) if self.observables else np.zeros(self.x_shape, dtype=bool)

    @property
    def _shaped(self) -> bool:
        """Whether inputs have the shape of the only observable."""
        return len(self.observables) == 1 and len(self.observables[0].shape) > 1

    def apply(self, x: NDArray[np.floating]) -> Tensor:
        """Network inputs (n, *shape) float32 of x (n, *x_shape)."""
        return self.arrange(torch.from_numpy(((self.stabilise(x) - self.mean) / self.scale).astype(np.float32)))

    def arrange(self, z: Tensor) -> Tensor:
        """Network inputs (n, *shape) of scaled rows z (n, k), in which NaN is a missing value."""
        if not self.observables:
            return z
        missing = self.missing
        if not missing.any():
            return z.reshape(len(z), *self.shape)
        gone = torch.isnan(z)
        values, present = torch.where(gone, torch.zeros_like(z), z), (~gone).to(z.dtype)
        if self._shaped:
            return torch.stack([values, present], dim=1).reshape(len(z), *self.shape)
        return torch.cat([values, present[:, torch.from_numpy(missing).to(z.device)]], dim=1)

    def invert(self, z: Tensor) -> Array:
        """Inverse of the scaling, x of z (n, *x_shape) that is not arranged, to single precision; whole numbers on count columns."""
        y = z.detach().cpu().double().numpy() * self.scale + self.mean
        return np.where(self.counts, np.round((np.maximum(y, 0.0) / 2) ** 2 - 0.375), y)

    def check(self, name: str, x: Any) -> tuple[Array, bool]:
        """Return x as (n, *x_shape) and whether a single observation was passed.

        Args: x: where the observables are known, in any form that `priors.to_rows` takes.
        Raises: ShapeError, NonFiniteError, DataError for negative counts, and for fractions where observables say counts.
        """
        if self.observables:
            rows, single = to_rows(x, self.observables, name=name)
            array = np.asarray(rows, dtype=np.float64)
            require_values(name, array, self.observables)
            require_counts(name, array, self.counts, self.observables)
            return array, single
        if isinstance(x, Mapping):
            raise DataError(f"{name} is a dictionary of blocks, and the observables are not known; expected an array as in training")
        array = as_real(name, x)
        single = array.shape == self.x_shape
        if single:
            array = array[None]
        if array.shape[1:] != self.x_shape or array.ndim != len(self.x_shape) + 1:
            want = ", ".join(str(s) for s in self.x_shape)
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
        known = json.dumps(observables_to_dicts(self.observables))
        return {"shape": list(self.x_shape), **arrays, **({"observables": known} if self.observables else {})}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`."""
        known = observables_from_dicts(json.loads(state.get("observables", "[]")))
        counts, mean, scale = (state[k].numpy() for k in ("counts", "mean", "scale"))
        return cls(tuple(state["shape"]), counts, mean, scale, known)


def require_counts(name: str, x: NDArray[np.floating], counts: Mask, observables: Sequence[Observable] | None) -> None:
    """Raise DataError for negative values in columns of counts of x (n, ...), and for fractions in observables of kind 'counts'."""
    if not counts.any():
        return
    if (x[:, counts] < 0).any():
        raise DataError(f"{name} has negative values in columns declared as counts; expected counts >= 0")
    found = fractional(x, observables) if observables else None
    if observables and found is not None:
        raise DataError(
            f"{name} has {x[found]:g} in {column_name(observables, found[1])} of row {found[0]}, of kind 'counts'; expected whole numbers, "
            "or kind='real'"
        )


class Sums:
    """Sums over rows y - shift (n, ...), column by column, from which mean and width follow; NaN is a missing value and adds nothing.

    Attributes: n: number of values, one number or one for each column. total, squares: sums of y - shift and of its square.
    """

    def __init__(self, shift: Array) -> None:
        self.shift, self.total, self.squares = shift, np.zeros(shift.shape), np.zeros(shift.shape)
        self.n: int | Integers = 0

    def add(self, y: Array) -> None:
        """Add rows from which `shift` was taken off (n, ...)."""
        gone = np.isnan(y)
        if gone.any():
            y = np.where(gone, 0.0, y)
            self.n = self.n + (~gone).sum(axis=0)
        else:
            self.n = self.n + len(y)
        self.total += y.sum(axis=0)
        self.squares += np.einsum("n...,n...->...", y, y)

    def moments(self) -> tuple[Array, Array]:
        """Mean and standard deviation of each column; shift and 0 for a column without values."""
        n = np.maximum(self.n, 1)
        offset = self.total / n
        return self.shift + offset, np.sqrt(np.maximum(self.squares / n - offset**2, 0.0))


def _first_present(y: Array) -> Array:
    """The first value of each column that is not missing, 0 if there is none."""
    present = ~np.isnan(y)
    return np.where(present.any(axis=0), np.take_along_axis(y, present.argmax(axis=0)[None], axis=0)[0], 0.0)


def _moments_of_blocks(mean: Array, sd: Array, n: Integers, observables: Sequence[Observable]) -> tuple[Array, Array]:
    """Mean and sd of all values of each observable, or of all columns, from those of the columns, each with n values."""
    cuts = list(columns(observables).values()) if observables else [slice(None)]
    flat_mean, flat_sd, weight = (np.array(a, dtype=np.float64).reshape(-1) for a in (mean, sd, n))
    for cut in cuts:
        total = max(float(weight[cut].sum()), 1.0)
        centre = float((weight[cut] * flat_mean[cut]).sum() / total)
        square = float((weight[cut] * (flat_sd[cut] ** 2 + (flat_mean[cut] - centre) ** 2)).sum() / total)
        flat_mean[cut], flat_sd[cut] = centre, math.sqrt(square)
    return flat_mean.reshape(mean.shape), flat_sd.reshape(sd.shape)


def require_values(name: str, x: NDArray[np.floating], observables: Sequence[Observable] | None) -> None:
    """Raise NonFiniteError for Inf in rows x (n, ...), NaN that no observable declares as missing, and rows without any value."""
    if not observables:
        require_finite(name, x)
        return
    bad = failed_rows(x, observables)
    if not bad.any():
        return
    row = int(np.argmax(bad))
    wrong = np.flatnonzero(~np.isfinite(x[row]) & ~(np.isnan(x[row]) & missing_columns(observables)))
    if not wrong.size:
        raise NonFiniteError(f"{name} has no value in {int(bad.sum())} of {len(x)} rows, first in row {row}; expected at least one a row")
    column = int(wrong[0])
    raise NonFiniteError(
        f"{name} has NaN or Inf in {int(bad.sum())} of {len(x)} rows, first {x[row, column]} at index ({row}, {column}), "
        f"{column_name(observables, column)}; expected finite values, and NaN only where Observable(..., missing=True) says so"
    )


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


def prepare_simulations(
    prior: Prior, theta: Any, x: Any, observables: Sequence[Observable] | None = None
) -> tuple[Array, NDArray[np.floating]]:
    """Check a training set: theta (n, d) in the prior's support, x (n, ...), both finite, equal rows.

    Args: observables: of x, which then has any form that `priors.to_rows` takes, with NaN where values are missing.
    Returns the whitened parameters u (n, free_dim) and x, rows (n, k) where observables are given.
    Raises: ShapeError, NonFiniteError, DataError, SupportError.
    """
    theta = as_real("theta", theta, prior.names)
    if theta.ndim == 1 and prior.dim == 1:
        theta = theta[:, None]
    if theta.ndim != 2 or theta.shape[1] != prior.dim:
        raise ShapeError(f"theta has shape {theta.shape}; expected (n, {prior.dim}) = {prior.names}")
    data = _x_rows(x, observables)
    if data.ndim < 2 or 0 in data.shape[1:]:
        raise ShapeError(f"x has shape {data.shape}; expected (n, ...) with at least one value per simulation")
    require_same_rows(theta=theta, x=data)
    require_finite("theta", theta)
    require_values("x", data, observables)
    _require_varying(prior, theta)
    return _off_the_edges(prior, prior.to_unbounded(theta)), data


def _require_varying(prior: Prior, theta: Array) -> None:
    """Raise DataError for a parameter with one value in all simulations: its density has no width, and hides the others."""
    if len(theta) < 20:
        return
    fixed = np.flatnonzero(np.ptp(theta, axis=0) <= 1e-12 * np.abs(theta).max(axis=0))
    if fixed.size:
        name, value = prior.names[int(fixed[0])], theta[0, int(fixed[0])]
        raise DataError(
            f"theta has {name} = {value:g} in all {len(theta)} rows; expected draws of the prior, or a prior without {name}, which is then"
            " a constant of the simulator"
        )


def _off_the_edges(prior: Prior, u: Array) -> Array:
    """Parameters u (n, d) with those on an edge of the prior moved to the median of their share.   Warns: of more than 0.1 % on the edges.

    An edge lies at infinity in u. A share f of the rows on it, as simulations on a grid have, stands for the outermost share f of the
    prior, whose median is at Phi^-1(f / 2). Rows in the tail of the prior, which have values of their own, stay as they are.
    """
    for sign in (-1, 1):
        furthest = (sign * u).max(axis=0)
        beyond = (sign * u >= furthest) & (furthest > _EDGE)
        beyond &= beyond.sum(axis=0) > 1
        share = beyond.mean(axis=0)
        u = np.where(beyond, np.minimum(_EDGE, -ndtri(np.maximum(share / 2, 1e-12))) * sign, u)
        if (share > max(1e-3, 2 / len(u))).any():
            j = int(share.argmax())
            name = prior.names[j] if prior.free_dim == prior.dim else f"degree of freedom {j}"
            warnings.warn(
                f"theta has {100 * share[j]:.3g} % of the rows on the {'upper' if sign > 0 else 'lower'} edge of {name}: simulations on"
                " a grid are no draws of the prior. They count as its outermost share; the posterior has the prior of the grid",
                UserWarning,
                stacklevel=2,
            )
    return u


def _x_rows(x: Any, observables: Sequence[Observable] | None) -> NDArray[np.floating]:
    """Observations (n, ...); rows (n, k) where observables are given.   Raises: ShapeError, DataError."""
    if isinstance(x, Mapping):
        if not observables:
            raise DataError("x is a dictionary of blocks, and the observables are not known; expected observables=[...] of the estimator")
        return to_rows(x, observables)[0]
    if observables and column_labels(x):
        return to_rows(x, observables)[0]
    data = as_floating("x", x)
    if data.ndim == 1:
        data = data[:, None]
    return to_rows(data, observables)[0] if observables else data


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
