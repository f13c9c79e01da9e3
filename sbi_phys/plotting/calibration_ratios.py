"""Figures of the checks of learned ratios, in the style of `plots`."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.plotting.calibration import BAND, COLOURS, _finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sbi_phys.calibration.ratios import MeanRatio, RatioCalibration, RatioCheck, Reliability, ReweightingAUC

__all__ = ["calibration", "check", "mean_ratio", "reliability", "reweighting_auc"]


_MARKERS = ("o", "s", "D")


def mean_ratio(result: "MeanRatio", ax: "Axes | None" = None) -> "Axes":
    """The three means with standard errors, side by side for every theta."""
    ax = new_axes(ax, width=max(4.2, 2.4 + 0.45 * len(result.names)), height=3.6)
    place = np.arange(len(result.names), dtype=np.float64)
    ax.axhline(1, color="black", linewidth=0.8)
    for j, name in enumerate(result.mean):
        label = name.replace("_ref", r"$_\mathrm{ref}$").replace("_num", r"$_\mathrm{num}$")
        shift = 0.18 * (j - 1)
        ax.errorbar(place + shift, result.mean[name], yerr=result.error[name], fmt=_MARKERS[j], markersize=4, color=COLOURS[j], label=label)
    ax.set(xticks=place, xlim=(-0.6, place[-1] + 0.6), ylabel="mean, 1 if the ratio is exact")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    ax.set_xticklabels(result.names)
    if _crowded(ax, result.names):
        ax.tick_params(axis="x", labelrotation=45)
        for text in ax.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    return _finish(ax, 3)


def _crowded(ax: "Axes", names: Sequence[str]) -> bool:
    """Whether the names, side by side below the axis, would leave less than a character and a half between them."""
    drawn = max(len(re.sub("[${}_^]", "", re.sub(r"\\[a-zA-Z]+", "o", name))) for name in names)
    place = ax.bbox.width / ax.figure.dpi / (len(names) + 0.2)  # inches
    return (drawn + 1.5) * 0.6 * float(ax.get_xticklabels()[0].get_fontsize()) / 72 > place


def reliability(result: "Reliability", ax: "Axes | None" = None) -> "Axes":
    """Observed against predicted share of numerator events, with the band of all bins together around the diagonal."""
    ax = new_axes(ax, width=4.6, height=4.4)
    ax.fill_between(result.predicted, result.band[:, 0], result.band[:, 1], color=BAND, linewidth=0, label="95 % of all bins")
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    ax.plot(result.predicted, result.observed, "o-", markersize=4, linewidth=1.0, color=COLOURS[0], label=f"p = {result.pvalue:.2g}")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="classifier output", ylabel="share of numerator events", aspect="equal")
    return _finish(ax, 2)


def reweighting_auc(result: "ReweightingAUC", ax: "Axes | None" = None) -> "Axes":
    """Areas with and without weights."""
    ax = new_axes(ax, width=4.6, height=2.4)
    rows = (("reweighted", result.auc, result.error, COLOURS[0]), ("not weighted", result.before, result.before_error, "#999999"))
    ax.axvline(0.5, color="black", linewidth=0.8)
    for y, (_, area, error, colour) in enumerate(rows):
        ax.errorbar(area, y, xerr=error, fmt="o", markersize=5, capsize=3, color=colour)
        ax.annotate(f"{area:.3f} $\\pm$ {error:.3f}", (area, y), (0, 8), textcoords="offset points", ha="center", fontsize="small")
    values = [0.5, *(area + s * error for _, area, error, _ in rows for s in (-1, 1))]
    margin = max(0.02, 0.2 * (max(values) - min(values)))
    ax.set(xlim=(min(values) - margin, max(values) + margin), ylim=(-0.6, 1.8), yticks=[0, 1], xlabel="area under the ROC curve")
    ax.set_yticklabels([name for name, *_ in rows])
    return _finish(ax, 0)


def calibration(result: "RatioCalibration", ax: "Axes | None" = None) -> "Axes":
    """Calibrated against learned log ratio."""
    ax = new_axes(ax, width=4.6, height=4.4)
    reach = result.score[[0, -1]] + 0.15 * np.ptp(result.score) * np.array([-1, 1]) + np.array([-0.1, 0.1])
    line = np.linspace(float(reach[0]), float(reach[1]), 400)
    ax.plot(line, line, color="black", linewidth=0.8, label="no correction")
    ax.plot(line, result.apply(line), linewidth=1.4, color=COLOURS[0], label="calibrated")
    ax.errorbar(result.score, result.value, yerr=result.error, fmt="o", markersize=3, linewidth=0.8, color=COLOURS[1], label="blocks")
    ax.set(xlim=reach, xlabel=r"learned $\ln r$", ylabel=r"calibrated $\ln r$")
    return _finish(ax, 3)


def check(result: "RatioCheck") -> "Figure":
    """Means, reliability curve and areas side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    mean_ratio(result.mean, axes[0])
    reliability(result.reliability, axes[1])
    reweighting_auc(result.auc, axes[2])
    for ax, p in zip(axes, (result.mean.pvalue, result.reliability.pvalue, result.auc.pvalue), strict=True):
        ax.set_title(f"p = {p:.2g}", fontsize="small")
    return figure
