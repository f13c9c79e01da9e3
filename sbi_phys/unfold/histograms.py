"""Histograms of other libraries as input and output, through the Unified Histogram Interface (UHI).

    measured     counts, response, covariance and background of a binned method, checked
    counts_of    boost_histogram.Histogram, hist.Hist, or anything with axes, values() and variances() -> counts and covariance
    to_hist      edges, counts and covariance -> hist.Hist, or boost_histogram.Histogram where hist is not installed

The libraries are needed only to convert a result into one of their objects. Underflow and overflow lie outside the response's bins and
are not read.

Source: UHI, PlottableHistogram protocol, https://uhi.readthedocs.io.
"""

from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array, as_real
from sbi_phys.core.errors import DataError, SbiPhysError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold._inputs import bin_name, check_counts, check_covariance, check_edges, check_nonnegative, warn_few
from sbi_phys.unfold.response import Response, as_response

__all__ = ["counts_of", "edges_of", "is_histogram", "measured", "to_hist"]


CLOSE = 1e-9  # edges agree within this share of the axis' range: edges stored as float32 do not and are treated as different bins


def is_histogram(value: Any) -> bool:
    """Whether a value has axes, values() and variances(), as UHI requires."""
    return all(hasattr(value, name) for name in ("axes", "values", "variances")) and callable(value.values)


def edges_of(histogram: Any) -> Array:
    """Edges (n + 1,) of a one-dimensional histogram.   Raises: ShapeError (more axes), DataError (bins that are no intervals, or gaps)."""
    axes = tuple(histogram.axes)
    if len(axes) != 1:
        raise ShapeError(f"histogram has {len(axes)} axes; expected 1, project it first")
    bins = [axes[0][i] for i in range(len(axes[0]))]
    if any(not isinstance(b, tuple) or len(b) != 2 for b in bins):
        raise DataError(f"histogram has bins such as {bins[0]!r}; expected intervals (lower, upper), an axis of numbers and not of names")
    edges = np.array([b[0] for b in bins] + [bins[-1][1]], dtype=np.float64)
    apart = np.flatnonzero(np.array([b[1] for b in bins[:-1]], dtype=np.float64) != edges[1:-1])
    if apart.size:
        i = int(apart[0])
        raise DataError(f"histogram has a gap between bin {i} {bins[i]} and bin {i + 1} {bins[i + 1]}; expected bins that touch")
    return check_edges("edges of the histogram", edges)


def counts_of(value: Any, response: Response | None = None, *, covariance_given: bool = False) -> tuple[Any, Array | None]:
    r"""Counts and covariance of an array or a histogram.

    Args: value: an array, returned as it is, with covariance None; or a UHI histogram. response: its reco_edges must be the histogram's.
        covariance_given: the variances of the histogram are not needed.
    Returns: counts (r,); covariance (r, r), diagonal of the variances if they differ from the contents (a weighted histogram), else None
        = Poisson.
    Raises: ShapeError (axes, number of bins), DataError (other edges, a profile, weights without variances, weighted bins without
        variance: the bin is named).
    Source: UHI, https://uhi.readthedocs.io.
    """
    if not is_histogram(value):
        return value, None
    kind = getattr(value, "kind", "COUNT")
    if str(getattr(kind, "value", kind)) != "COUNT":
        raise DataError(f"histogram is of kind {kind}; expected COUNT, not a profile of means")
    edges = edges_of(value)
    counts = as_array("values of the histogram", value.values(), (edges.size - 1,))
    if response is not None:
        _require_edges(edges, response)
    if covariance_given:
        return counts, None
    variances = value.variances()
    if variances is None:
        raise DataError(
            "histogram was filled with weights or scaled, and its storage keeps no variances: Poisson errors would be wrong; expected a"
            " storage with variances, e.g. hist.storage.Weight(), or counts_covariance=..., or the plain array for Poisson counts"
        )
    if np.array_equal(as_real("variances of the histogram", variances), counts):
        return counts, None
    spread = as_array("variances of the histogram", variances, counts.shape)
    empty = np.flatnonzero(spread <= 0)
    if empty.size:
        place = bin_name("reco", int(empty[0]), edges)
        raise DataError(f"histogram has weights and variance {spread[empty[0]]:g} in {place}; expected > 0 in every bin, merge bins")
    return counts, np.diag(spread)


def _require_edges(edges: Array, response: Response) -> None:
    if edges.size - 1 != response.n_reco:
        raise ShapeError(f"histogram has {edges.size - 1} bins; expected {response.n_reco}, one for each row (reco bin) of the response")
    own = response.reco_edges
    if own is None:
        return
    off = np.flatnonzero(np.abs(edges - own) > CLOSE * (own[-1] - own[0]))
    if off.size:
        i = int(off[0])
        raise DataError(
            f"histogram has edge {i} at {edges[i]:.10g} where reco_edges has {own[i]:.10g} ({off.size} of {own.size} differ);"
            " expected the same bins, in the same unit"
        )


def measured(
    counts: ArrayLike, response: Response | ArrayLike, counts_covariance: ArrayLike | None, background: ArrayLike | None
) -> tuple[Response, Array, Array | None]:
    """Response with the background, counts (r,), and their covariance (r, r) or None = Poisson, as a binned method takes them.

    Raises: ShapeError, NonFiniteError, DataError, SettingError (background given twice).   Warns of fewer events than truth bins.
    """
    resp = as_response(response)
    if background is not None:
        b = check_nonnegative("background", background, (resp.n_reco,), "reco", resp.reco_edges)
        if resp.background.any():
            raise SettingError("background is given twice, here and in the response; expected one of them")
        resp = resp.with_background(b)
    values, own = counts_of(counts, resp, covariance_given=counts_covariance is not None)
    data = check_counts(values, resp.n_reco, resp.reco_edges)
    warn_few(data, resp.n_truth)
    given = own if counts_covariance is None else counts_covariance
    return resp, data, None if given is None else check_covariance("counts_covariance", given, resp.n_reco)


def to_hist(edges: ArrayLike | None, counts: ArrayLike, covariance: ArrayLike | None = None) -> Any:
    """Histogram object with weighted storage: contents and variances, the covariance's diagonal.

    Args: edges (n + 1,); counts (n,); covariance (n, n), None = variances 0.
    Returns: hist.Hist where hist is installed, else boost_histogram.Histogram (Hist is one, too).
    Raises: SettingError (no edges), ShapeError, NonFiniteError, DataError, SbiPhysError (neither library is installed).
    Read: the off-diagonal part of the covariance cannot be stored in such an object: keep the result for fits.
    """
    if edges is None:
        raise SettingError("the result has no truth edges; expected a Response with truth_edges, because a histogram needs an axis")
    bins = check_edges("edges", edges)
    contents = as_array("counts", counts, (bins.size - 1,))
    spread = np.zeros_like(contents) if covariance is None else np.diag(as_array("covariance", covariance, (contents.size,) * 2))
    try:
        import boost_histogram as bh
    except ImportError as err:
        raise SbiPhysError("to_hist needs boost-histogram, which is not installed; expected `pip install hist`") from err
    axis, storage = bh.axis.Variable(bins), bh.storage.Weight()
    try:
        import hist

        out: Any = hist.Hist(hist.axis.Variable(bins, name="truth", flow=True), storage=storage)
    except ImportError:
        out = bh.Histogram(axis, storage=storage)
    view = out.view(flow=False)
    view.value, view.variance = contents, spread
    return out
