"""Figures of Bayesian and forward unfolding; matplotlib's objects only, never pyplot's global state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.plotting.calibration import BAND, COLOURS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbi_phys.unfold.bayes import BayesianUnfold
    from sbi_phys.unfold.omnifold_weights import OmniFold

__all__ = ["spectra"]


def spectra(result: "BayesianUnfold", ax: "Axes | None" = None) -> "Axes":
    """Median with 68 % and 95 % intervals of each truth bin, measured counts, and what the posterior mean folds to."""
    ax = new_axes(ax)
    x = np.arange(result.counts.size + 1.0) if result.truth_edges is None else result.truth_edges
    y = np.arange(result.measured.size + 1.0) if result.reco_edges is None else result.reco_edges
    wide, narrow = result.intervals(0.95), result.intervals()
    ax.stairs(wide[:, 1], x, baseline=wide[:, 0], fill=True, color=BAND, linewidth=0, label="95 %")
    ax.stairs(narrow[:, 1], x, baseline=narrow[:, 0], fill=True, color=COLOURS[0], alpha=0.45, linewidth=0, label="68 %")
    ax.stairs(result.median, x, baseline=None, color=COLOURS[0], linewidth=1.4, label="unfolded, median")
    ax.stairs(result.refolded, y, baseline=None, color=COLOURS[1], linewidth=1.0, linestyle="--", label="refolded")
    centre = (y[1:] + y[:-1]) / 2
    ax.plot(centre, np.where(result.measured > 0, result.measured, np.nan), "o", markersize=3, color="black", label="measured")
    ax.set_yscale("log")
    positive = result.measured[result.measured > 0]
    low = min(float(positive.min()), float(result.median.min()))
    ax.set_ylim(0.3 * low, 2 * max(float(wide.max()), float(positive.max())))
    ax.set(xlabel="truth bin" if result.truth_edges is None else "truth", ylabel="events per bin", xlim=(x[0], x[-1]))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="best", fontsize="small", framealpha=0.85, edgecolor="none")
    return ax


def omnifold_column(result: "OmniFold", column: int, bins: int | Sequence[float], ax: "Axes | None" = None) -> "Axes":
    """One column of the truth under the nominal and the unfolded weights."""
    ax = new_axes(ax)
    values = result.truth[result.truth_pass, column]
    edges = np.histogram_bin_edges(values, bins)
    for weights, label, colour in ((result.nominal, "simulation, scaled", COLOURS[7]), (result.weights, "unfolded", COLOURS[0])):
        own = weights[result.truth_pass]
        counts = np.histogram(values, edges, weights=own)[0]
        error = np.sqrt(np.histogram(values, edges, weights=own**2)[0])
        ax.stairs(counts, edges, color=colour, linewidth=1.4, label=label)
        ax.errorbar(0.5 * (edges[1:] + edges[:-1]), counts, error, fmt="none", ecolor=colour, linewidth=0.8)
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, None), xlabel=f"truth, column {column}", ylabel="events / bin")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return ax
