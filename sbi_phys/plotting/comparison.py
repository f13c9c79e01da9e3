"""Figures of the comparison of models: matplotlib's objects only, in the style of `calibration.plots`."""

from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.plotting.calibration import COLOURS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbi_phys.comparison.nested import NestedTest
    from sbi_phys.comparison.probabilities import ProbabilityCalibration

__all__ = ["null_distribution", "reliability_curve"]


def reliability_curve(result: "ProbabilityCalibration", ax: "Axes | None" = None) -> "Axes":
    """Observed share against predicted probability, one curve a model, with where 95 % of the shares lie if it is right."""
    ax = new_axes(ax)
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    # of two models the second curve is the first one turned round
    for j, name in enumerate(result.names[: 1 if len(result.names) == 2 else None]):
        ok = result.counts[j] > 0
        x, colour = result.predicted[j][ok], COLOURS[j % len(COLOURS)]
        bars = "95 % of shares, if right" if j == 0 else ""
        ax.vlines(x, result.band[j, ok, 0], result.band[j, ok, 1], color=colour, alpha=0.35, linewidth=4, label=bars)
        ax.plot(x, result.observed[j][ok], "o-", color=colour, markersize=4, linewidth=1, label=name)
    ax.set(xlabel="predicted probability", ylabel="share of data sets that are from the model", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.set_title(f"{result.verdict}, p = {result.pvalue:.2g}", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", fontsize="small", frameon=False)
    return ax


def null_distribution(result: "NestedTest", ax: "Axes | None" = None) -> "Axes":
    """Histogram of the statistic under the null, and the observation."""
    ax = new_axes(ax)
    high = max(float(result.toys.max()), result.statistic)
    low = min(float(result.toys.min()), result.statistic)
    ax.hist(
        result.toys,
        bins=np.linspace(low, high + 1e-9 * max(1.0, abs(high)), 41).tolist(),
        color="#BBBBBB",
        label=f"{result.toys.size} toys",
    )
    ax.axvline(result.statistic, color=COLOURS[1], label=f"observed, p = {result.pvalue:.2g} ({result.significance:.2f} sigma)")
    ax.set(xlabel="test statistic", ylabel="toys", yscale="log")
    ax.spines[["top", "right"]].set_visible(False)
    # the line of an unlikely observation runs where the legend has its place
    ax.legend(fontsize="small", facecolor="white", edgecolor="none", framealpha=1)
    return ax
