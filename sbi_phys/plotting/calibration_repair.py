"""Figures of the repairs, in the style of `plots`: matplotlib's objects only."""

from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import ndtr, ndtri

from sbi_phys.plotting.calibration import BAND, COLOURS, STYLES, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbi_phys.calibration.conformal import ConformalRegions
    from sbi_phys.calibration.recalibration import RankRecalibration, Tempering

__all__ = ["conformal_scores", "rank_map", "tempering_curve"]


def conformal_scores(result: "ConformalRegions", ax: "Axes | None" = None) -> "Axes":
    """Distribution of held-out scores, the threshold at the content asked for, and where q's own region ends."""
    ax = new_axes(ax)
    values = np.sort(result.scores)
    shown = values[np.isfinite(values)]
    share = np.arange(1, values.size + 1) / values.size
    ax.axhspan(*result.interval, color=BAND, linewidth=0, label="true content, 95 % range")
    ax.plot(shown, share[: shown.size], drawstyle="steps-post", color=COLOURS[0], linewidth=1.4, label="held-out truths inside")
    label = f"threshold {result.threshold:.3g}"
    ax.plot([result.threshold] * 2, [0, result.level], color=COLOURS[1], linewidth=1.4, label=label)
    ax.axhline(result.level, color="black", linewidth=0.8)
    if result.score == "hpd" and not result.n_features:
        ax.plot([0, 1], [0, 1], color="#777777", linewidth=1.0, linestyle=":", label="calibrated posterior")
        name = "highest-density content of q at the truth"
    else:
        unit = "content" if result.score == "hpd" else r"$-\log q$ [nats]"
        name = f"{unit} less its learned quantile" if result.n_features else unit
    # a few truths far outside would squeeze the rest into a corner
    first = float(shown[0])
    last = max(float(np.quantile(shown, 0.97)), result.threshold + 0.15 * (result.threshold - first))
    ax.set(xlim=(first - 0.03 * (last - first), last + 0.05 * (last - first)), ylim=(0, 1.02), xlabel=name, ylabel="share of truths")
    return _finish(ax, "lower right")


def rank_map(result: "RankRecalibration", ax: "Axes | None" = None) -> "Axes":
    """ECDF of q's held-out PITs, the map that is undone; a calibrated posterior stays in the band."""
    several = len(result.names) > 5
    ax = new_axes(ax, width=6.2 if several else 4.6, height=4.4)
    level = np.concatenate([[0], result.level, [1]])
    band = np.concatenate([[[0, 0]], result.band, [[1, 1]]])
    ax.fill_between(level, band[:, 0], band[:, 1], color=BAND, linewidth=0, label="calibrated, 95 % band")
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    fine = np.linspace(0, 1, 401)[1:-1]
    moved = ndtr(result.moved(ndtri(fine)))
    for j, label in enumerate(result.labels):
        colour, line = COLOURS[j % len(COLOURS)], STYLES[(j // len(COLOURS)) % len(STYLES)]
        ax.plot(np.append(0, moved[:, j]), np.append(0, fine), linewidth=1.4, label=label, color=colour, linestyle=line)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level in the raw posterior", ylabel="recalibrated level", aspect="equal")
    if several:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
        return ax
    return _finish(ax, "upper left")


def tempering_curve(result: "Tempering", ax: "Axes | None" = None) -> "Axes":
    """Mean share of draws nearer than the truth against the widening, with the chosen factor and its error."""
    ax = new_axes(ax)
    low, high = result.content - result.content_error, result.content + result.content_error
    ax.fill_between(result.grid, low, high, color=BAND, linewidth=0, label="standard error")
    ax.plot(result.grid, result.content, color=COLOURS[0], linewidth=1.4, label="mean over simulations")
    ax.axhline(0.5, color="black", linewidth=0.8, label="right coverage")
    ax.axvspan(result.factor - result.error, result.factor + result.error, color=COLOURS[1], alpha=0.25, linewidth=0)
    ax.axvline(result.factor, color=COLOURS[1], linewidth=1.4, label=f"chosen x{result.factor:.3f} $\\pm$ {result.error:.3f}")
    ax.plot([1], [result.raw], "o", color="black", markersize=4, label="raw posterior")
    ax.set(
        xscale="log",
        xlim=(result.grid[0], result.grid[-1]),
        ylim=(0, 1),
        xlabel="widening factor",
        ylabel="share of draws nearer than the truth",
    )
    ticks = [t for t in (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if result.grid[0] <= t <= result.grid[-1]]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    return _finish(ax, "lower left")


def _finish(ax: "Axes", where: Literal["upper left", "lower left", "lower right"]) -> "Axes":
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc=where, fontsize="small", framealpha=0.85, edgecolor="none")
    return ax
