"""Figures of fits, critical values, confidence sets, coverage and limits.

Most functions take a result and axes, and return the axes; `limits_figure` and `coverage_figure` return a Figure.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import chdtri

from sbi_phys.confidence.coverage_map import CoverageMap
from sbi_phys.core.checks import find_name
from sbi_phys.core.errors import DataError
from sbi_phys.core.types import Array
from sbi_phys.plotting.style import BAND, COLOURS, MUTED, PALETTE, finish, house_style, new_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sbi_phys.confidence.lf2i import LF2I
    from sbi_phys.confidence.limits import ExpectedLimits
    from sbi_phys.confidence.neyman import Neyman
    from sbi_phys.confidence.profile import Contour, Impacts, Profile
    from sbi_phys.confidence.sets import Region

__all__ = [
    "contour",
    "coverage_figure",
    "coverage_map",
    "critical_values",
    "expected",
    "impacts",
    "learned_critical_values",
    "limits_figure",
    "profile",
    "region",
]

GREEN, YELLOW = "#8FD19E", "#F6E58D"
SHOWN = 5  # largest number of lines in one figure


def _finish(ax: "Axes", **settings: Any) -> "Axes":
    ax.set(**settings)
    return finish(ax)


def profile(result: "Profile", ax: "Axes | None" = None) -> "Axes":
    """Profile likelihood over the parabola of the Hesse error, with the 68.3 and 95.4 % heights."""
    ax = new_axes(ax)
    parabola = ((result.grid - result.best) / result.error) ** 2
    ax.plot(result.grid, result.q, color=PALETTE[0], linewidth=1.6, label="profile")
    ax.plot(result.grid, parabola, color=MUTED, linewidth=1.2, linestyle="--", label="parabola (Hesse)")
    top = min(1.1 * float(result.q.max()), 12.0)
    for height, words in ((1.0, "68.3 %"), (4.0, "95.4 %")):
        if height < top:
            ax.axhline(height, color="black", linewidth=0.6)
            ax.text(result.grid[-1], height, words, ha="right", va="bottom", fontsize="small")
    return _finish(ax, xlabel=result.label, ylabel=r"$2\,\Delta \ln L$", ylim=(0, max(top, 1.5)), xlim=(result.grid[0], result.grid[-1]))


def contour(result: "Contour", ax: "Axes | None" = None, levels: tuple[float, ...] = (0.683, 0.954)) -> "Axes":
    """Joint confidence regions at the given levels, and the best fit."""
    ax = new_axes(ax, width=4.8, height=4.2)
    for i, level in enumerate(sorted(levels)):
        colour = PALETTE[i % len(PALETTE)]
        ax.contour(result.x, result.y, result.q.T, levels=[result.threshold(level)], colors=[colour], linewidths=1.6)
        ax.plot([], [], color=colour, linewidth=1.6, label=f"{100 * level:.1f} %")
    ax.plot(*result.best, "+", color="black", markersize=9, label="best fit")
    return _finish(ax, xlabel=result.labels[0], ylabel=result.labels[1])


def impacts(result: "Impacts", ax: "Axes | None" = None, most: int = 15) -> "Axes":
    """Impacts as bars (lower axis) and pulls as points (upper axis), sorted by size; at most `most` rows."""
    n = min(len(result.names), most)
    ax = new_axes(ax, width=5.6, height=1.4 + 0.32 * n)
    rows = np.arange(n)[::-1]
    ax.barh(rows, result.up[:n], height=0.5, color=PALETTE[0], alpha=0.75, label="+1 sd")
    ax.barh(rows, result.down[:n], height=0.5, color=PALETTE[5], alpha=0.75, label="-1 sd")
    extent = 1.15 * max(float(np.abs(result.up[:n]).max()), float(np.abs(result.down[:n]).max()), 1e-12)
    ax.set(yticks=rows, yticklabels=result.labels[:n], xlim=(-extent, extent), ylim=(-0.7, n - 0.3), xlabel=f"shift of {result.name}")
    known = np.isfinite(result.pull[:n])
    if known.any():
        above = ax.twiny()
        above.errorbar(
            result.pull[:n][known], rows[known], xerr=result.pull_error[:n][known], fmt="o", markersize=4, color="black", label="pull"
        )
        reach = max(2.0, 1.15 * float((np.abs(result.pull[:n][known]) + result.pull_error[:n][known]).max()))
        above.set(xlim=(-reach, reach), xlabel="pull (points)")
        for x in (-1, 1):
            above.axvline(x, color=MUTED, linewidth=0.6, linestyle=":")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    return ax


def critical_values(result: "Neyman", ax: "Axes | None" = None, level: int = 0) -> "Axes":
    """Critical values with Monte Carlo errors against the first parameter, for some values of the second, and the value by Wilks."""
    ax = new_axes(ax)
    x = result.axes[0]
    # further parameters are at the middle of their grids
    at = tuple(a.size // 2 for a in result.axes[2:])
    values, errors = result.critical_values[level], result.critical_errors[level]
    if result.dim == 1:
        ax.errorbar(x, values, errors, fmt="o-", markersize=3, linewidth=1.2, color=PALETTE[0], label="toys")
    else:
        shown = np.unique(np.linspace(0, result.axes[1].size - 1, min(SHOWN, result.axes[1].size)).round().astype(int))
        for colour, j in zip(PALETTE, shown, strict=False):
            words = f"{result.names[1]} = {result.axes[1][j]:.3g}"
            place = (slice(None), j, *at)
            ax.errorbar(x, values[place], errors[place], fmt="o-", markersize=3, linewidth=1.2, color=colour, label=words)
    return _wilks(ax, result.levels[level], result.interest, result.labels[0])


def learned_critical_values(result: "LF2I", ax: "Axes | None" = None, level: int = 0) -> "Axes":
    """Learned critical values against the first parameter, for three values of the second; further parameters at the middle."""
    ax = new_axes(ax)
    x = np.linspace(result.low[0], result.high[0], 300)
    middle = (result.low + result.high) / 2
    second = [None] if result.dim == 1 else list(np.linspace(result.low[1], result.high[1], 3))
    for colour, v in zip(PALETTE, second, strict=False):
        theta = np.tile(middle, (x.size, 1))
        theta[:, 0] = x
        words = "learned"
        if v is not None:
            theta[:, 1] = v
            words = f"{result.names[1]} = {v:.3g}"
        ax.plot(x, result.critical(theta, result.levels[level]), linewidth=1.6, color=colour, label=words)
    return _wilks(ax, result.levels[level], result.interest, result.labels[0])


def _wilks(ax: "Axes", level: float, interest: int, label: str) -> "Axes":
    ax.axhline(float(chdtri(interest, 1 - level)), color="black", linewidth=0.9, linestyle="--", label="Wilks")
    return _finish(ax, xlabel=label, ylabel=f"critical value, {100 * level:.4g} %", ylim=(0, None))


def region(result: "Region", ax: "Axes | None" = None, data_set: int = 0) -> "Axes":
    """Joint confidence set of one data set, filled."""
    ax = new_axes(ax, width=4.8, height=4.2)
    margin = result.margin[data_set]
    shown = np.where(np.isfinite(margin), margin, np.nanmax(np.where(np.isfinite(margin), margin, np.nan)))
    x, y = result.axes
    if (shown <= 0).any():
        ax.contourf(x, y, shown.T, levels=[min(float(shown.min()), -1e-9) * 1.01, 0], colors=[PALETTE[5]], alpha=0.5)
        if (shown > 0).any():
            ax.contour(x, y, shown.T, levels=[0], colors=[PALETTE[0]], linewidths=1.6)
    ax.plot([], [], color=PALETTE[0], linewidth=1.6, label=f"{100 * result.level:.4g} % set")
    return _finish(ax, xlabel=result.names[0], ylabel=result.names[1], xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))


def coverage_map(result: "CoverageMap", ax: "Axes | None" = None, name: str | None = None) -> "Axes":
    """Coverage: a curve with band and binned points for one parameter; a map for two, white at the nominal level, worst region framed."""
    if len(result.names) == 2 and name is None:
        return _coverage_plane(result, ax)
    i = 0 if name is None else find_name(name, result.names)
    ax = new_axes(ax)
    x = np.linspace(result.low[i], result.high[i], 200)
    theta = np.tile((result.low + result.high) / 2, (x.size, 1))
    theta[:, i] = x
    c, error = result.at(theta)
    ax.fill_between(
        x, np.maximum(c - 2 * error, 0), np.minimum(c + 2 * error, 1), color=BAND, linewidth=0, label=r"smooth map, $\pm 2$ errors"
    )
    ax.plot(x, c, color=PALETTE[0], linewidth=1.4)
    own = [b for b in result.bins if set(b.box) == {result.names[i]}]
    if own:
        ends = np.array([b.box[result.names[i]] for b in own])
        ax.errorbar(
            ends.mean(axis=1), [b.coverage for b in own], [b.error for b in own], np.diff(ends, axis=1)[:, 0] / 2,
            fmt="o", markersize=3, color=PALETTE[1], label="bins",
        )  # fmt: skip
    ax.axhline(result.level, color="black", linewidth=0.9, linestyle="--", label=f"nominal, {100 * result.level:.4g} %")
    return _finish(ax, xlabel=result.labels[i], ylabel="coverage", xlim=(x[0], x[-1]))


def _coverage_plane(result: "CoverageMap", ax: "Axes | None") -> "Axes":
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    ax = new_axes(ax, width=5.6, height=4.4)
    axes = [np.linspace(a, b, 80) for a, b in zip(result.low, result.high, strict=True)]
    grid = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=-1)
    c = result.at(grid)[0].reshape(80, 80)
    # white at the nominal level; the scale is asymmetric, because no coverage exceeds 1
    norm = TwoSlopeNorm(result.level, min(result.level - 0.05, float(c.min())), max(float(c.max()), (1 + result.level) / 2))
    mesh = ax.pcolormesh(*axes, c.T, cmap="RdBu", norm=norm, shading="nearest", rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label=f"coverage (white: {100 * result.level:.4g} %)")
    (a, b), (e, f) = (result.worst.box[n] for n in result.names)
    ax.add_patch(
        Rectangle((a, e), b - a, f - e, fill=False, color="black", linewidth=1.4, label=f"worst: {100 * result.worst.coverage:.1f} %")
    )
    return _finish(ax, xlabel=result.labels[0], ylabel=result.labels[1])


def expected(result: "ExpectedLimits", ax: "Axes | None" = None, observed: float | None = None) -> "Axes":
    """Histogram of the limits of toys, their 68.3 and 95.4 % bands and median, and the observed limit."""
    ax = new_axes(ax)
    b = result.bands
    ax.axvspan(b[0], b[4], color=YELLOW, linewidth=0, label="95.4 %")
    ax.axvspan(b[1], b[3], color=GREEN, linewidth=0, label="68.3 %")
    counts, edges = np.histogram(result.values, bins=min(40, max(np.unique(result.values).size, 10)))
    ax.stairs(counts, edges, color=PALETTE[7], linewidth=1.2)
    ax.axvline(b[2], color="black", linestyle="--", linewidth=1.2, label=f"median {b[2]:.3g}")
    if observed is not None:
        ax.axvline(observed, color=PALETTE[1], linewidth=1.8, label=f"observed {observed:.3g}")
    return _finish(ax, xlabel=f"{100 * result.level:.4g} % {result.kind} limit on {result.name}", ylabel="toys without signal")


_LEVEL_COLOURS = (COLOURS["flow"], COLOURS["amortised"], COLOURS["truth"], COLOURS["published"])
_PLANE = 80
UNKNOWN = 0.1  # error of the coverage above which the map is grey


def limits_figure(
    axes: Sequence[Array],
    q: Array,
    critical: Mapping[float, Array],
    wilks: Mapping[float, float],
    labels: Sequence[str],
    *,
    title: str = "",
) -> "Figure":
    """The test statistic of the observation with critical values by level, and the sets {q <= C}; for two parameters, contours of the sets.

    Args: axes: one (m,) or two. q (m,) or (m1, m2). critical {level: as q}. wilks {level: number}. labels of the axes.
    Raises: DataError.   Read: theta is in the set where q is below the line; dashed: critical values by Wilks' theorem.
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
    # the axis range is limited to q below about twice the largest critical value
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
    """Coverage against theta by level, of the sets with its error and of Wilks': maps for two parameters, else curves against the first.

    Raises: DataError.   Read: white, or a band that includes the dashed line: nominal coverage; grey: error above 0.1.
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
    ax.axhline(own.level, color="black", linestyle="dashed", linewidth=0.9, label=f"nominal, {100 * own.level:.4g} %")
    ax.set(xlabel=own.labels[0], ylabel="coverage", xlim=(x[0], x[-1]), title=f"{own.n} simulations, p = {own.pvalue:.2g}")
    ax.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none")


def _planes(row: Sequence["Axes"], own: CoverageMap, wilks: CoverageMap) -> None:
    from matplotlib.colors import TwoSlopeNorm

    axes = [np.linspace(a, b, _PLANE) for a, b in zip(own.low, own.high, strict=True)]
    grid = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=-1)
    (mine, error), (theirs, other) = own.at(grid), wilks.at(grid)
    known = [np.where(e <= UNKNOWN, c, np.nan) for c, e in ((mine, error), (theirs, other))]
    # one colour scale for both maps, no narrower than the noise
    reach = max(0.03, 2.5 * float(np.median(error)))
    ends = [v for c in known for v in (np.nanmin(c), np.nanmax(c)) if np.isfinite(c).any()] or [own.level]
    norm = TwoSlopeNorm(own.level, max(0.0, min(own.level - reach, *ends)), max(min(own.level + reach, (1 + own.level) / 2), *ends))
    level, scale = f"{100 * own.level:.4g} %", "coverage (white: nominal)"
    both: dict[str, Any] = {"cmap": "RdBu", "norm": norm}
    for ax, values, style, title, label in (
        (row[0], known[0], both, f"sets of {level}: {100 * own.overall:.1f} % on average, p = {own.pvalue:.2g}", scale),
        (
            row[1],
            error,
            {"cmap": "viridis", "vmin": 0.0, "vmax": UNKNOWN},
            f"error of the coverage, {own.n} simulations",
            "error of the coverage",
        ),
        (row[2], known[1], both, f"Wilks, {level}: {100 * wilks.overall:.1f} % on average, p = {wilks.pvalue:.2g}", scale),
    ):
        mesh = ax.pcolormesh(*axes, values.reshape(_PLANE, _PLANE).T, shading="nearest", rasterized=True, **style)
        ax.set_facecolor("#D0D0D0")
        ax.figure.colorbar(mesh, ax=ax, label=label, extend="max" if values is error and error.max() > UNKNOWN else "neither")
        ax.set(xlabel=own.labels[0], ylabel=own.labels[1])
        ax.set_title(title, fontsize=9)
