"""What OmniFold takes, checked once: pairs with their masks and weights, data, background; and warnings that name the place."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array, as_real, require_finite
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.types import Array, ArrayLike, Mask

__all__ = ["Events", "as_columns", "as_mask", "as_weights", "check_events", "check_overlap", "lowest_efficiency"]


MIN_EVENTS = 100  # fewer cannot train a classifier
_OUTSIDE_SHARE = 0.005  # share of the data outside the simulation's range that is worth a word
_HOLE_BINS, _HOLE_EVENTS = 20, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Events:
    """Simulated pairs, data and background, checked.

    truth (n, d), reco (n, k); reco_pass, truth_pass (n,); weights (n,), nominal, in units of the data's counts: those that pass, with
    the background, add up to the data. scale: what the given weights were multiplied by. data (m, k), data_weights (m,).
    background (b, k), background_weights (b,), expected counts.
    """

    truth: Array
    reco: Array
    reco_pass: Mask
    truth_pass: Mask
    weights: Array
    scale: float
    data: Array
    data_weights: Array
    background: Array
    background_weights: Array


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
            "subtract nothing from the data: pass background events as `background`"
        )
    if n and array.sum() <= 0:
        raise DataError(f"{name} is 0 in all {n} rows; expected a positive sum")
    return array


def check_events(
    truth: ArrayLike,
    reco: ArrayLike,
    data: ArrayLike,
    reco_pass: ArrayLike | None,
    truth_pass: ArrayLike | None,
    data_weights: ArrayLike | None,
    weights: ArrayLike | None,
    background: ArrayLike | None,
    background_weights: ArrayLike | None,
) -> Events:
    """Check everything that is passed to OmniFold; order and shapes are those of `omnifold` and of `Events`.

    Raises: ShapeError, NonFiniteError, DataError (too few events, negative weights, efficiency 0, more background than data, no overlap).
    Warns, with the place: data outside the simulation, stretches of the truth without efficiency.
    """
    rows = {name: np.shape(as_real(name, a))[:1] for name, a in (("truth", truth), ("reco", reco))}
    if rows["truth"] != rows["reco"] or rows["truth"] == ():
        raise ShapeError(f"truth has rows {rows['truth']}, reco has {rows['reco']}; expected the same events in both, row by row")
    n = rows["truth"][0]
    seen, true = as_mask("reco_pass", reco_pass, n, "reco"), as_mask("truth_pass", truth_pass, n, "truth")
    own = as_weights("weights", weights, n, "truth")
    _require_events(seen, true, own)
    measured = as_columns("data", data)
    simulated = as_columns("reco", reco, seen)
    extra = np.empty((0, simulated.shape[1])) if background is None else as_columns("background", background)
    for name, a in (("data", measured), ("background", extra)):
        if a.shape[1] != simulated.shape[1]:
            raise ShapeError(f"{name} has {a.shape[1]} columns and reco {simulated.shape[1]}; expected the same quantities")
    counts = as_weights("data_weights", data_weights, len(measured), "data")
    if background is None and background_weights is not None:
        raise DataError("background_weights was given without background; expected both or neither")
    expected = as_weights("background_weights", background_weights, len(extra), "background")
    if (counts > 0).sum() < MIN_EVENTS:
        raise DataError(f"data has {(counts > 0).sum()} events; expected at least {MIN_EVENTS} to train on")
    if expected.sum() >= counts.sum():
        raise DataError(f"background adds up to {expected.sum():g} and data to {counts.sum():g}; expected less background than data")
    check_overlap(measured, np.concatenate([simulated[seen], extra]))
    scale = float((counts.sum() - expected.sum()) / own[seen].sum())
    events = Events(
        truth=as_columns("truth", truth, true),
        reco=simulated,
        reco_pass=seen,
        truth_pass=true,
        weights=scale * own,
        scale=scale,
        data=measured,
        data_weights=counts,
        background=extra,
        background_weights=expected,
    )
    _warn_holes(events)
    return events


def _require_events(seen: Mask, true: Mask, weights: Array) -> None:
    n = len(seen)
    if not (true & (weights > 0)).any():
        raise DataError(f"truth_pass is False (or the weight 0) in all {n} rows; expected true events")
    both = int((seen & true & (weights > 0)).sum())
    if both == 0:
        raise DataError(
            f"reco_pass is False in all {int(true.sum())} rows with a truth: the efficiency is 0; expected events that pass both"
        )
    if both < MIN_EVENTS:
        raise DataError(f"{both} of {n} simulated events pass reco_pass and truth_pass with weight; expected at least {MIN_EVENTS}")


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


def lowest_efficiency(events: Events) -> float:
    """Smallest efficiency of a twentieth of the true events, cut in one column, over the mean efficiency."""
    true, seen = events.truth[events.truth_pass], events.reco_pass[events.truth_pass]
    lowest = 1.0
    for column in true.T:
        edges = np.unique(np.quantile(column, np.linspace(0, 1, _HOLE_BINS + 1)))
        place = np.clip(np.searchsorted(edges, column, side="right") - 1, 0, max(len(edges) - 2, 0))
        total, passed = np.bincount(place), np.bincount(place, weights=seen)
        lowest = min(lowest, float((passed[total > 0] / total[total > 0]).min() / seen.mean()))
    return lowest


def _warn_holes(events: Events) -> None:
    """Warn where a stretch of a truth column, a twentieth of the events, has none that is reconstructed: weights are extrapolated."""
    true, seen = events.truth[events.truth_pass], events.reco_pass[events.truth_pass]
    for j in range(true.shape[1]):
        edges = np.unique(np.quantile(true[:, j], np.linspace(0, 1, _HOLE_BINS + 1)))
        if len(edges) < 3:
            continue
        place = np.clip(np.searchsorted(edges, true[:, j], side="right") - 1, 0, len(edges) - 2)
        total = np.bincount(place, minlength=len(edges) - 1)
        passed = np.bincount(place[seen], minlength=len(edges) - 1)
        empty = np.flatnonzero((passed == 0) & (total >= _HOLE_EVENTS))
        if len(empty):
            where = ", ".join(f"[{edges[b]:.4g}, {edges[b + 1]:.4g}]" for b in empty[:4])
            warnings.warn(
                f"the efficiency is 0 in truth column {j} within {where}: {total[empty].sum()} events, none reconstructed; "
                "their weights are extrapolated from the neighbourhood",
                RuntimeWarning,
                stacklevel=4,
            )
