"""How a response matrix is made: filled with simulated events, or integrated from a resolution."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from sbi_phys.core.checks import as_array, require_finite, require_same_rows
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold.inputs import bin_name, check_mask, check_nonnegative

__all__ = ["Filled", "fill", "integrate"]

Curve = Callable[[Array], ArrayLike]

ORDER = 12  # points of Gauss-Legendre in a panel of at most one sigma: exact to rounding for a smooth integrand
MAX_NODES = 20_000_000  # values of the integrand, 160 MB


class Filled(NamedTuple):
    """matrix (n_reco, n_truth); truth, n_simulated (n_truth,): weighted and effective counts; fakes (n_reco,): share."""

    matrix: Array
    truth: Array
    n_simulated: Array
    fakes: Array


def fill(
    truth: ArrayLike,
    reco: ArrayLike,
    truth_edges: Array,
    reco_edges: Array,
    weights: ArrayLike | None,
    reco_pass: ArrayLike | None,
    truth_pass: ArrayLike | None,
) -> Filled:
    """Histogram simulated events (n,) into the pieces of a response.   Raises: ShapeError, NonFiniteError, DataError."""
    t, r = as_array("truth", truth, (None,), finite=False), as_array("reco", reco, (None,), finite=False)
    n = require_same_rows(truth=t, reco=r)
    w = np.ones(n) if weights is None else check_nonnegative("weights", weights, (n,))
    has_truth, has_reco = check_mask("truth_pass", truth_pass, n), check_mask("reco_pass", reco_pass, n)
    require_finite("truth of events that pass", t[has_truth])
    require_finite("reco of events that pass", r[has_reco])
    # values of events that do not pass may be NaN: comparisons are False for them, without a warning
    in_truth = has_truth & (t >= truth_edges[0]) & (t <= truth_edges[-1])
    in_reco = has_reco & (r >= reco_edges[0]) & (r <= reco_edges[-1])
    both = in_truth & in_reco
    if not both.any():
        got = f"{in_truth.sum()} events lie within truth_edges, {in_reco.sum()} within reco_edges, none in both"
        raise DataError(f"no overlap: of {n} events {got}; expected some, check units (E or lg E?) and edges")
    total = np.histogram(t[in_truth], truth_edges, weights=w[in_truth])[0]
    squares = np.histogram(t[in_truth], truth_edges, weights=w[in_truth] ** 2)[0]
    if (total <= 0).any():
        place = bin_name("truth", int(np.flatnonzero(total <= 0)[0]), truth_edges)
        raise DataError(f"no simulated events in {place}, an empty column; expected some, simulate more, widen or drop the bin")
    joint = np.histogram2d(r[both], t[both], bins=[reco_edges, truth_edges], weights=w[both])[0]
    seen = np.histogram(r[in_reco], reco_edges, weights=w[in_reco])[0]
    # 1 - real/seen would leave rounding where there are no fakes at all
    fake = np.histogram(r[in_reco & ~in_truth], reco_edges, weights=w[in_reco & ~in_truth])[0]
    fakes = np.divide(fake, seen, out=np.zeros_like(seen), where=seen > 0)
    return Filled(joint / total, total, total**2 / squares, fakes)


def integrate(
    truth_edges: Array,
    reco_edges: Array,
    resolution: float | Curve,
    bias: float | Curve,
    efficiency: float | ArrayLike | Curve,
    index: float | None,
) -> tuple[Array, Array]:
    """Return matrix (n_reco, n_truth) and the power law's content of the truth bins (n_truth,), sum 1.

    Raises: ShapeError, NonFiniteError, DataError.
    """
    n_truth = truth_edges.size - 1
    # sigma at the ends and the middle of each bin decides how finely the bins are cut; then it is evaluated where it is used
    low, high = truth_edges[:-1], truth_edges[1:]
    probe = np.concatenate([low, (low + high) / 2, high])
    narrowest = _curve("resolution", resolution, probe, low=0).reshape(3, -1).min(axis=0)
    panels = int(np.ceil((np.diff(truth_edges) / narrowest).max()))
    if panels * ORDER * n_truth * reco_edges.size > MAX_NODES:
        raise DataError(f"resolution goes down to {narrowest.min():g}, {panels} times smaller than a truth bin; expected finer bins")
    x, w = _nodes(truth_edges, panels)
    sigma, shift = _curve("resolution", resolution, x.ravel(), low=0), _curve("bias", bias, x.ravel())
    if index is not None:
        w = w * 10.0 ** ((1 - index) * (x - truth_edges[0]))
    content = w.sum(axis=1)
    z = (reco_edges[:, None] - x.ravel() - shift) / sigma
    # in the upper tail 1 - Phi is the accurate one: difference of two values near 1 would lose all digits
    upper = z[:-1] > 0
    inside = np.where(upper, ndtr(-z[:-1]) - ndtr(-z[1:]), ndtr(z[1:]) - ndtr(z[:-1]))
    seen = inside.reshape(-1, *x.shape) * _efficiency(efficiency, x)
    return np.einsum("jmq,mq->jm", seen, w) / content, content / content.sum()


def _nodes(edges: Array, panels: int) -> tuple[Array, Array]:
    # Gauss-Legendre within each of `panels` equal parts of every bin: x, w (n_bins, panels * ORDER)
    u, weight = np.polynomial.legendre.leggauss(ORDER)
    starts = np.arange(panels)[:, None] / panels
    u01 = (starts + (u + 1) / (2 * panels)).ravel()
    width = np.diff(edges)[:, None]
    return edges[:-1, None] + width * u01, width * np.tile(weight / (2 * panels), panels)


def _curve(name: str, value: float | Curve, x: Array, *, low: float | None = None) -> Array:
    raw = value(x) if callable(value) else value
    array = np.asarray(raw, dtype=np.float64)
    if array.shape not in ((), x.shape):
        raise ShapeError(f"{name} gives shape {array.shape} for {x.size} points; expected one value for each, or a number")
    array = np.broadcast_to(array, x.shape)
    require_finite(name, array)
    if low is not None and (array <= low).any():
        raise DataError(f"{name} is {array.min():g} at {x[array.argmin()]:g}; expected > {low:g} everywhere")
    return array


def _efficiency(efficiency: float | ArrayLike | Curve, x: Array) -> Array:
    n_truth = x.shape[0]
    if callable(efficiency):
        return _shares(_curve("efficiency", efficiency, x.ravel()).reshape(x.shape), x)
    array = np.asarray(efficiency, dtype=np.float64)
    if array.shape not in ((), (n_truth,)):
        raise ShapeError(f"efficiency has shape {array.shape}; expected a number, ({n_truth},) = one per truth bin, or a function")
    require_finite("efficiency", array)
    return _shares(np.broadcast_to(array[..., None] if array.ndim else array, x.shape), x)


def _shares(values: Array, x: Array) -> Array:
    bad = (values < 0) | (values > 1)
    if bad.any():
        first = tuple(np.argwhere(bad)[0])
        raise DataError(f"efficiency is {values[first]:g} at {x[first]:g} (truth bin {first[0]}); expected a share in [0, 1]")
    return values
