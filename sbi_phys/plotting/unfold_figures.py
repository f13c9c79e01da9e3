"""Figures of an unfolded spectrum, from plain arrays: flux of all methods, corrections, refolded counts, correlations.

Every function returns a matplotlib Figure in the house style and changes nothing else. Methods keep colour and marker in all figures;
where several share a bin their points stand side by side within it.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import DataError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.plotting.style import COLOURS, house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["corrections_figure", "correlations_figure", "flux_figure", "refolded_figure"]


_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#AA3377", "#E69F00", "#56B4E9", "#7F6000", "#6B6B6B")
_MARKERS = ("D", "o", "s", "^", "v", "P", "X", "*")
_BAND = "#E4E4E4"
_LG = r"$\lg(E/\mathrm{eV})$"


def flux_figure(
    edges: ArrayLike,
    flux: Mapping[str, tuple[ArrayLike, ArrayLike]],
    published: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    unit: str = "",
    limits: tuple[float, float] = (0.93, 1.07),
) -> "Figure":
    """E^3 J of every method above, its ratio to the published flux below (to the first method's without one).

    Args: edges (r + 1,), lg(E/eV). flux, {method: (J (r,), errors (2, r) below and above)}. published likewise. unit, of J. limits of the
    ratio: a point beyond is an arrow at the edge.   Raises: ShapeError, NonFiniteError, DataError.
    Read: in each bin from left to right in the order of the legend; grey: published, with its statistical errors.
    """
    x, widths, centre = _bins(edges)
    shown = {name: _with_errors(name, value, centre.size) for name, value in _some(flux).items()}
    reference = next(iter(shown.values())) if published is None else _with_errors("published", published, centre.size)
    scale = 10.0 ** (3 * (centre - 18.5))
    with house_style():
        fig = new_figure(8.4, 7.0)
        top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(2.6, 1.6))
        if published is not None:
            _boxes(top, x, reference[0] * scale, reference[1] * scale)
            _boxes(bottom, x, np.ones_like(centre), reference[1] / np.where(reference[0] > 0, reference[0], np.nan))
            top.plot([], [], color="#9A9A9A", linewidth=6, alpha=0.6, label="published")
        for k, (name, (j, errors)) in enumerate(shown.items()):
            at = centre + _offset(k, len(shown)) * widths
            style = _style(k)
            top.errorbar(at, j * scale, errors * scale, **style, label=name)
            ratio = np.divide(j, reference[0], out=np.full_like(j, np.nan), where=reference[0] > 0)
            relative = np.divide(errors, reference[0], out=np.full_like(errors, np.nan), where=reference[0] > 0)
            _clipped(bottom, at, ratio, relative, limits, style)
        bottom.axhline(1, color="black", linewidth=0.8)
        positive = np.concatenate([j[j > 0] * scale[j > 0] for j, _ in shown.values()])
        top.set(yscale="log", ylim=(0.35 * positive.min(), 1.5 * positive.max()))
        top.set_ylabel(r"$J\,(E\,/\,10^{18.5}\,\mathrm{eV})^3$" + (f"  [{unit}]" if unit else ""))
        bottom.set(ylim=limits, xlim=(x[0], x[-1]), xlabel=_LG)
        bottom.set_ylabel("ratio to published" if published is not None else f"ratio to {next(iter(shown))}")
        top.legend(ncols=2, loc="lower left")
        bottom.grid(axis="y", alpha=0.3, linewidth=0.6)
        fig.align_ylabels()
    return fig


def corrections_figure(
    edges: ArrayLike,
    corrections: Mapping[str, ArrayLike],
    published: ArrayLike | None = None,
    *,
    others: Mapping[str, ArrayLike] | None = None,
    target: tuple[float, float, float] | None = None,
) -> "Figure":
    """Correction factors unfolded / raw of every method, and below how far from the published ones, in percent.

    Args: edges (r + 1,). corrections {method: (r,)}, NaN where nothing was measured. published (r,) or None. others: curves for comparison,
    as lines. target: lgE from, to, and the relative tolerance of the band.   Raises: ShapeError, DataError.
    """
    x, widths, centre = _bins(edges)
    shown = {name: as_array(name, value, (centre.size,), finite=False) for name, value in _some(corrections).items()}
    lines = {name: as_array(name, value, (centre.size,)) for name, value in (others or {}).items()}
    given = None if published is None else as_array("published", published, (centre.size,))
    with house_style():
        fig = new_figure(8.4, 6.6 if given is not None else 4.4)
        axes = fig.subplots(
            2 if given is not None else 1, 1, sharex=True, squeeze=False, height_ratios=(1.3, 1)[: 2 if given is not None else 1]
        )
        top = axes[0, 0]
        if given is not None:
            top.stairs(given, x, baseline=None, color="#9A9A9A", linewidth=3.0, label="published")
        for k, (name, value) in enumerate(lines.items()):
            top.plot(centre, value, color="black", linewidth=1.1, linestyle=("-", "--", ":", "-.")[k % 4], label=name)
        for k, (name, value) in enumerate(shown.items()):
            top.plot(centre + _offset(k, len(shown)) * widths, value, **_points(k), label=name)
        finite = np.concatenate([v[np.isfinite(v)] for v in (*shown.values(), *lines.values())])
        low, high = np.quantile(finite, [0.02, 0.98])
        top.set_ylim(low - 0.12 * (high - low) - 0.01, high + 0.25 * (high - low) + 0.02)
        top.set_ylabel("unfolded / raw counts")
        top.legend(ncols=3, fontsize=8, loc="upper left")
        if given is not None:
            _away(axes[1, 0], x, centre, widths, shown, lines, given, target)
        axes[-1, 0].set(xlim=(x[0], x[-1]), xlabel=_LG)
        fig.align_ylabels()
    return fig


def _away(
    ax: "Axes",
    x: Array,
    centre: Array,
    widths: Array,
    shown: Mapping[str, Array],
    lines: Mapping[str, Array],
    given: Array,
    target: tuple[float, float, float] | None,
) -> None:
    if target is not None:
        low, high, tolerance = target
        ax.fill_between([low, high], -100 * tolerance, 100 * tolerance, color=_BAND, linewidth=0, label=f"within {100 * tolerance:g} %")
    for k, value in enumerate(lines.values()):
        ax.plot(centre, 100 * (value / given - 1), color="black", linewidth=1.1, linestyle=("-", "--", ":", "-.")[k % 4])
    limit = 6.0
    for k, value in enumerate(shown.values()):
        away = 100 * (value / given - 1)
        _clipped(ax, centre + _offset(k, len(shown)) * widths, away, None, (-limit, limit), _points(k))
    ax.axhline(0, color="#9A9A9A", linewidth=1.5)
    ax.set(ylim=(-limit, limit), ylabel="over published $-$ 1  [%]")
    if target is not None:
        ax.legend(loc="lower left", fontsize=8)


def refolded_figure(
    edges: ArrayLike, counts: ArrayLike, refolded: Mapping[str, ArrayLike], chi2: Mapping[str, str] | None = None
) -> "Figure":
    """Measured counts against those that each unfolded spectrum folds back to: (N - f) / sqrt(f) by bin.

    Args: counts (r,). refolded {method: (r,)} > 0. chi2: words for the legend, by method.   Raises: ShapeError, DataError.
    Read: within +-2 nearly everywhere; all near 0 means that the answer follows every fluctuation of the data.
    """
    x, widths, centre = _bins(edges)
    n = as_array("counts", counts, (centre.size,))
    with house_style():
        fig = new_figure(8.4, 3.8)
        ax = fig.subplots()
        for height, colour in ((2, "#F0F0F0"), (1, "#DEDEDE")):
            ax.axhspan(-height, height, color=colour, linewidth=0)
        largest = 2.4
        for k, (name, value) in enumerate(_some(refolded).items()):
            f = np.maximum(as_array(name, value, (centre.size,)), 1e-9)
            pull = (n - f) / np.sqrt(f)
            largest = max(largest, 1.1 * float(np.abs(pull).max()))
            words = f"{name}: {chi2[name]}" if chi2 and name in chi2 else name
            ax.plot(centre + _offset(k, len(refolded)) * widths, pull, **_points(k), label=words)
        ax.axhline(0, color="black", linewidth=0.8)
        limit = min(largest, 6.0)
        ax.set(ylim=(-limit, 1.75 * limit), xlim=(x[0], x[-1]), xlabel=_LG, ylabel=r"(measured $-$ refolded) / $\sqrt{\mathrm{refolded}}$")
        ax.legend(ncols=2, fontsize=8.5, loc="upper left")
    return fig


def correlations_figure(edges: ArrayLike, correlations: Mapping[str, ArrayLike]) -> "Figure":
    """Correlation matrix (r, r) of every method's unfolded bins, on one scale from -1 to 1.   Raises: ShapeError, DataError.

    Read: neighbours are anticorrelated where little is regularised, correlated where much is.
    """
    x, _, centre = _bins(edges)
    shown = {name: as_array(name, value, (centre.size, centre.size)) for name, value in _some(correlations).items()}
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    with house_style():
        fig = new_figure(2.9 * columns + 0.9, 2.75 * rows + 0.3)
        axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        mesh: Any = None
        for ax, (name, value) in zip(axes.ravel(), shown.items(), strict=False):
            mesh = ax.pcolormesh(x, x, value, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
            ax.set_title(name)
            ax.set_aspect("equal")
        for ax in axes.ravel()[len(shown) :]:
            ax.set_axis_off()
        for ax in axes.ravel()[max(0, len(shown) - columns) : len(shown)]:
            ax.set_xlabel(_LG)
            ax.tick_params(labelbottom=True)  # also above an empty place
        for ax in axes[:, 0]:
            ax.set_ylabel(_LG)
        fig.colorbar(mesh, ax=axes, label="correlation", shrink=0.75)
    return fig


def _bins(edges: ArrayLike) -> tuple[Array, Array, Array]:
    x = as_array("edges", edges, (None,))
    if x.size < 2 or (np.diff(x) <= 0).any():
        raise DataError(f"edges has {x.size} values; expected at least 2, increasing")
    return x, np.diff(x), (x[1:] + x[:-1]) / 2


def _some(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if not values:
        raise DataError("there is no method to draw; expected at least one")
    return values


def _with_errors(name: str, value: tuple[ArrayLike, ArrayLike], n: int) -> tuple[Array, Array]:
    centre, errors = value
    return as_array(name, centre, (n,)), np.maximum(as_array(f"errors of {name}", errors, (2, n)), 0.0)


def _offset(k: int, n: int) -> float:
    return 0.11 * (k - (n - 1) / 2)


def _style(k: int) -> dict[str, Any]:
    colour = _COLOURS[k % len(_COLOURS)]
    return {"fmt": _MARKERS[k % len(_MARKERS)], "color": colour, "markersize": 4, "elinewidth": 1.1, "mec": "white", "mew": 0.4}


def _points(k: int) -> dict[str, Any]:
    colour = _COLOURS[k % len(_COLOURS)]
    return {"linestyle": "", "marker": _MARKERS[k % len(_MARKERS)], "color": colour, "markersize": 5, "mec": "white", "mew": 0.4}


def _boxes(ax: "Axes", x: Array, y: Array, errors: Array) -> None:
    """Grey boxes y - below to y + above over each bin, with the value as a line."""
    low, high = y - errors[0], y + errors[1]
    ax.fill_between(x, np.append(low, low[-1]), np.append(high, high[-1]), step="post", color="#C8C8C8", linewidth=0)
    ax.hlines(y, x[:-1], x[1:], color=COLOURS["grey"], linewidth=1.0)


def _clipped(ax: "Axes", at: Array, y: Array, errors: Array | None, limits: tuple[float, float], style: dict[str, Any]) -> None:
    """Points with errors; those outside of the limits as arrows at the edge."""
    inside = np.isfinite(y) & (y > limits[0]) & (y < limits[1])
    if errors is None:
        ax.plot(at[inside], y[inside], **style)
    else:
        ax.errorbar(at[inside], y[inside], errors[:, inside], **style)
    edge = 0.03 * (limits[1] - limits[0])
    for beyond, place, marker in ((y >= limits[1], limits[1] - edge, 6), (y <= limits[0], limits[0] + edge, 7)):
        ax.plot(at[beyond], np.full(int(beyond.sum()), place), linestyle="", marker=marker, color=style["color"], markersize=5)
