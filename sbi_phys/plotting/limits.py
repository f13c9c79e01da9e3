"""Confidence sets of one observation, and the coverage of such sets over parameter space beside Wilks'.

Every function takes plain arrays or results and returns a matplotlib Figure in the house style.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.confidence.coverage_map import CoverageMap
from sbi_phys.core.errors import DataError
from sbi_phys.core.types import Array
from sbi_phys.plotting.style import COLOURS, house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["coverage_figure", "limits_figure"]


_LEVEL_COLOURS = (COLOURS["flow"], COLOURS["amortised"], COLOURS["truth"], COLOURS["published"])
_PLANE = 80
UNKNOWN = 0.1  # a coverage that is known no better than that is left grey


def limits_figure(
    axes: Sequence[Array],
    q: Array,
    critical: Mapping[float, Array],
    wilks: Mapping[float, float],
    labels: Sequence[str],
    *,
    title: str = "",
) -> "Figure":
    """The test statistic of the observation with critical values by level, and the sets {q <= C}; over two parameters, the sets' edges.

    Args: axes: one (m,) or two. q (m,) or (m1, m2). critical {level: as q}. wilks {level: number}. labels of the axes.
    Raises: DataError.   Read: where q lies below a line, theta is in the set; dashed is Wilks' chi-square.
    """
    if len(axes) not in (1, 2) or q.shape != tuple(a.size for a in axes):
        raise DataError(f"q has shape {q.shape} over {len(axes)} axes; expected one value at each point of one or two")
    with house_style():
        fig = new_figure(6.6, 4.2) if len(axes) == 1 else new_figure(5.6, 4.8)
        ax = fig.subplots()
        if len(axes) == 1:
            _line(ax, axes[0], q, critical, wilks)
            ax.set(xlabel=labels[0], ylabel="test statistic of the observation", title=title)
        else:
            _regions(ax, axes, q, critical, wilks)
            ax.set(xlabel=labels[0], ylabel=labels[1], title=title)
    return fig


def _line(ax: "Axes", x: Array, q: Array, critical: Mapping[float, Array], wilks: Mapping[float, float]) -> None:
    # what the sets leave out by far is not looked at: the picture is as wide as three of the widest set
    top = 2.2 * max(max(float(c.max()) for c in critical.values()), max(wilks.values()))
    near = x[q <= top]
    view = (x[0], x[-1]) if near.size < 2 else (near.min(), near.max())
    pad = 0.05 * (view[1] - view[0])
    ax.plot(x, q, color="black", linewidth=1.6, label="q of the observation")
    for colour, (level, c) in zip(_LEVEL_COLOURS, sorted(critical.items()), strict=False):
        ax.plot(x, c, color=colour, label=f"critical value, {100 * level:.4g} %")
        ax.axhline(wilks[level], color=colour, linestyle="dashed", linewidth=0.9, label=f"Wilks, {100 * level:.4g} %")
        ax.fill_between(x, 0, top, where=list(q <= c), color=colour, alpha=0.13, linewidth=0)
    ax.set(xlim=(max(x[0], view[0] - pad), min(x[-1], view[1] + pad)), ylim=(0, top))
    ax.legend(fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none", loc="upper center", ncols=2)


def _regions(ax: "Axes", axes: Sequence[Array], q: Array, critical: Mapping[float, Array], wilks: Mapping[float, float]) -> None:
    widest = max(critical)
    inside = q <= np.maximum(critical[widest], wilks[widest])
    for colour, (level, c) in zip(_LEVEL_COLOURS, sorted(critical.items()), strict=False):
        for margin, style, words in ((q - c, "solid", "set"), (q - wilks[level], "dashed", "Wilks")):
            if (margin <= 0).any() and (margin > 0).any():
                ax.contour(*axes, margin.T, levels=[0.0], colors=[colour], linestyles=[style], linewidths=1.5)
            ax.plot([], [], color=colour, linestyle=style, label=f"{words}, {100 * level:.4g} %")
    for set_limits, axis, across in ((ax.set_xlim, axes[0], 1), (ax.set_ylim, axes[1], 0)):
        held = axis[inside.any(axis=across)]
        if held.size:
            step = axis[1] - axis[0]
            pad = max(3 * step, 0.6 * float(np.ptp(held)))
            set_limits(max(axis[0], held.min() - pad), min(axis[-1], held.max() + pad))
    ax.legend(fontsize=8.5)


def coverage_figure(own: Mapping[float, CoverageMap], wilks: Mapping[float, CoverageMap]) -> "Figure":
    """Coverage over theta by level: of the sets, its error, and of Wilks'; curves for one parameter, maps for two, the first of more.

    Raises: DataError.   Read: white, or a band that holds the dashed line, is what was stated; grey is known to no better than 0.1.
    """
    if not own or set(own) != set(wilks):
        raise DataError(f"levels are {sorted(own)} and {sorted(wilks)}; expected the same, one at least")
    levels = sorted(own)
    with house_style():
        if len(own[levels[0]].names) == 2:
            fig = new_figure(12.6, 3.7 * len(levels))
            for row, level in zip(fig.subplots(len(levels), 3, squeeze=False), levels, strict=True):
                _planes(row, own[level], wilks[level])
            return fig
        fig = new_figure(5.6 * len(levels), 4.0)
        for ax, level in zip(fig.subplots(1, len(levels), squeeze=False)[0], levels, strict=True):
            _curves(ax, own[level], wilks[level])
    return fig


def _curves(ax: "Axes", own: CoverageMap, wilks: CoverageMap) -> None:
    x = np.linspace(own.low[0], own.high[0], 200)
    theta = np.tile((own.low + own.high) / 2, (x.size, 1))
    theta[:, 0] = x
    for found, colour, words in ((wilks, "#7F7F7F", "Wilks"), (own, COLOURS["flow"], "sets")):
        c, error = found.at(theta)
        ax.fill_between(x, c - 2 * error, np.minimum(c + 2 * error, 1), color=colour, alpha=0.2, linewidth=0)
        ax.plot(x, c, color=colour, label=f"{words}, {100 * found.overall:.1f} % on average")
        bins = [b for b in found.bins if set(b.box) == {own.names[0]}]
        ends = np.array([b.box[own.names[0]] for b in bins])
        ax.errorbar(
            ends.mean(axis=1), [b.coverage for b in bins], [b.error for b in bins], fmt="o", markersize=3, linewidth=0.9, color=colour
        )
    ax.axhline(own.level, color="black", linestyle="dashed", linewidth=0.9, label=f"stated, {100 * own.level:.4g} %")
    ax.set(xlabel=own.labels[0], ylabel="coverage", xlim=(x[0], x[-1]), title=f"{own.n} simulations, p = {own.pvalue:.2g}")
    ax.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none")


def _planes(row: Sequence["Axes"], own: CoverageMap, wilks: CoverageMap) -> None:
    from matplotlib.colors import TwoSlopeNorm

    axes = [np.linspace(a, b, _PLANE) for a, b in zip(own.low, own.high, strict=True)]
    grid = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=-1)
    (mine, error), (theirs, other) = own.at(grid), wilks.at(grid)
    known = [np.where(e <= UNKNOWN, c, np.nan) for c, e in ((mine, error), (theirs, other))]
    # one scale for both, so that the colours can be compared; and no strong colour for what is noise
    reach = max(0.03, 2.5 * float(np.median(error)))
    ends = [v for c in known for v in (np.nanmin(c), np.nanmax(c)) if np.isfinite(c).any()] or [own.level]
    norm = TwoSlopeNorm(own.level, max(0.0, min(own.level - reach, *ends)), max(min(own.level + reach, (1 + own.level) / 2), *ends))
    level, stated = f"{100 * own.level:.4g} %", "coverage (white: as stated)"
    both: dict[str, Any] = {"cmap": "RdBu", "norm": norm}
    for ax, values, style, title, label in (
        (row[0], known[0], both, f"sets of {level}: {100 * own.overall:.1f} % on average, p = {own.pvalue:.2g}", stated),
        (
            row[1],
            error,
            {"cmap": "viridis", "vmin": 0.0, "vmax": UNKNOWN},
            f"error of that map, {own.n} simulations",
            "error of the coverage",
        ),
        (row[2], known[1], both, f"Wilks, {level}: {100 * wilks.overall:.1f} % on average, p = {wilks.pvalue:.2g}", stated),
    ):
        mesh = ax.pcolormesh(*axes, values.reshape(_PLANE, _PLANE).T, shading="nearest", rasterized=True, **style)
        ax.set_facecolor("#D0D0D0")
        ax.figure.colorbar(mesh, ax=ax, label=label, extend="max" if values is error and error.max() > UNKNOWN else "neither")
        ax.set(xlabel=own.labels[0], ylabel=own.labels[1])
        ax.set_title(title, fontsize=9)
