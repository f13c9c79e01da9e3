"""Figures of fits, critical values, sets, coverage and limits; matplotlib's objects only, never pyplot's global state."""

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import chdtri

from sbi_phys.core.checks import find_name
from sbi_phys.plotting.style import BAND, MUTED, PALETTE, finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbi_phys.confidence.coverage_map import CoverageMap
    from sbi_phys.confidence.lf2i import LF2I
    from sbi_phys.confidence.limits import ExpectedLimits
    from sbi_phys.confidence.neyman import Neyman
    from sbi_phys.confidence.profile import Contour, Impacts, Profile
    from sbi_phys.confidence.sets import Region

__all__ = ["contour", "coverage_map", "critical_values", "expected", "impacts", "learned_critical_values", "profile", "region"]


GREEN, YELLOW = "#8FD19E", "#F6E58D"
SHOWN = 5  # lines in one picture


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
    """Joint regions of the given contents and the best fit."""
    ax = new_axes(ax, width=4.8, height=4.2)
    for i, level in enumerate(sorted(levels)):
        colour = PALETTE[i % len(PALETTE)]
        ax.contour(result.x, result.y, result.q.T, levels=[result.threshold(level)], colors=[colour], linewidths=1.6)
        ax.plot([], [], color=colour, linewidth=1.6, label=f"{100 * level:.1f} %")
    ax.plot(*result.best, "+", color="black", markersize=9, label="best fit")
    return _finish(ax, xlabel=result.labels[0], ylabel=result.labels[1])


def impacts(result: "Impacts", ax: "Axes | None" = None, most: int = 15) -> "Axes":
    """Impacts as bars (lower axis) and pulls as points (upper axis), the largest on top; at most `most` rows."""
    n = min(len(result.names), most)
    ax = new_axes(ax, width=5.6, height=1.4 + 0.32 * n)
    rows = np.arange(n)[::-1]
    ax.barh(rows, result.up[:n], height=0.5, color=PALETTE[0], alpha=0.75, label="+1 error")
    ax.barh(rows, result.down[:n], height=0.5, color=PALETTE[5], alpha=0.75, label="-1 error")
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
    """Critical values with Monte Carlo errors along the first parameter, for some values of the second, over Wilks' value."""
    ax = new_axes(ax)
    x = result.axes[0]
    # further parameters stay at the middle of their grids
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
    """Learned critical values along the first parameter; the others at the middle, and the second at three values."""
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
    """Joint set of one data set, filled."""
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
    """Curve with band and binned points along one parameter; colours over two, white = as stated, the worst region framed."""
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
    ax.axhline(result.level, color="black", linewidth=0.9, linestyle="--", label=f"stated, {100 * result.level:.4g} %")
    return _finish(ax, xlabel=result.labels[i], ylabel="coverage", xlim=(x[0], x[-1]))


def _coverage_plane(result: "CoverageMap", ax: "Axes | None") -> "Axes":
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    ax = new_axes(ax, width=5.6, height=4.4)
    axes = [np.linspace(a, b, 80) for a, b in zip(result.low, result.high, strict=True)]
    grid = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=-1)
    c = result.at(grid)[0].reshape(80, 80)
    # white at the level, however little room there is above it: no coverage exceeds 1
    norm = TwoSlopeNorm(result.level, min(result.level - 0.05, float(c.min())), max(float(c.max()), (1 + result.level) / 2))
    mesh = ax.pcolormesh(*axes, c.T, cmap="RdBu", norm=norm, shading="nearest", rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label=f"coverage (white: {100 * result.level:.4g} %)")
    (a, b), (e, f) = (result.worst.box[n] for n in result.names)
    ax.add_patch(
        Rectangle((a, e), b - a, f - e, fill=False, color="black", linewidth=1.4, label=f"worst: {100 * result.worst.coverage:.1f} %")
    )
    return _finish(ax, xlabel=result.labels[0], ylabel=result.labels[1])


def expected(result: "ExpectedLimits", ax: "Axes | None" = None, observed: float | None = None) -> "Axes":
    """Histogram of the toys' limits over the 68.3 and 95.4 % bands, with the median and the observed one."""
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
