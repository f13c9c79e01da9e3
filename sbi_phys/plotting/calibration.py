"""Figures of the calibration results: one style for all tests; matplotlib's objects only, never pyplot's global state.

Every function takes the result and Axes or None (then it makes a Figure) and returns the Axes. Colours are those of Okabe & Ito,
told apart with any colour vision; from the ninth curve on the line style changes as well. Bands are grey, the ideal is a black line.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.core.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sbi_phys.calibration.coverage import Coverage
    from sbi_phys.calibration.predictive import PredictivePValue
    from sbi_phys.calibration.sbc import SBC
    from sbi_phys.calibration.two_sample import C2ST

__all__ = ["c2st_folds", "coverage_curve", "new_axes", "predictive", "sbc_ecdf", "sbc_figure", "sbc_histogram"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000", "#555555")
STYLES = ("-", "--", ":", "-.")
BAND = "#D9D9D9"


def new_axes(ax: "Axes | None", *, width: float = 5.2, height: float = 4.0) -> "Axes":
    """Return `ax`, or the Axes of a new Figure (inches) that belongs to no window and no global state."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _style(j: int) -> dict[str, Any]:
    return {"color": COLOURS[j % len(COLOURS)], "linestyle": STYLES[(j // len(COLOURS)) % len(STYLES)]}


def _finish(ax: "Axes", n_curves: int) -> "Axes":
    ax.spines[["top", "right"]].set_visible(False)
    if n_curves > 0:
        if n_curves > 5:  # beside the axes: no curve is hidden
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
        else:
            ax.legend(loc="best", fontsize="small", framealpha=0.85, edgecolor="none")
    return ax


def sbc_ecdf(result: "SBC", ax: "Axes | None" = None, only: int | None = None) -> "Axes":
    """Difference between the ranks' ECDF and the uniform one, with the simultaneous 95 % band; `only`: one parameter's column."""
    ax = new_axes(ax, width=5.2 if len(result.names) <= 5 else 6.6)
    level = np.concatenate([[0], result.level, [1]])
    band = np.concatenate([[[0, 0]], result.band, [[1, 1]]]) - level[:, None]
    ax.fill_between(level, band[:, 0], band[:, 1], color=BAND, linewidth=0, label="95 % simultaneous")
    ax.axhline(0, color="black", linewidth=0.8)
    shown = range(len(result.names)) if only is None else [only]
    for j in shown:
        curve = np.concatenate([[0], result.ecdf[:, j], [1]]) - level
        ax.plot(level, curve, linewidth=1.4, label=result.labels[j], **_style(j if only is None else 0))
    limit = 1.15 * max(np.abs(band).max(), np.abs(result.ecdf[:, list(shown)] - result.level[:, None]).max())
    ax.set(xlim=(0, 1), ylim=(-limit, limit), xlabel="rank / number of draws", ylabel="ECDF - uniform")
    return _finish(ax, len(result.names) if only is None else 0)


def sbc_histogram(result: "SBC", ax: "Axes | None" = None, only: int | None = None) -> "Axes":
    """Histogram of ranks over what is expected, with the 95 % band of all bins together."""
    ax = new_axes(ax, width=5.2 if len(result.names) <= 5 else 6.6)
    edges = result.bin_edges / (result.n_draws + 1)
    scale = result.expected
    low, high = (result.histogram_band / scale[:, None]).T
    ax.stairs(high, edges, baseline=low, fill=True, color=BAND, label="95 % of all bins")
    ax.axhline(1, color="black", linewidth=0.8)
    for j in range(len(result.names)) if only is None else [only]:
        style = _style(j if only is None else 0)
        ax.stairs(result.histogram[:, j] / scale, edges, baseline=None, linewidth=1.4, label=result.labels[j], **style)
    top = max(float(high.max()), float((result.histogram / scale[:, None]).max()))
    ax.set(xlim=(0, 1), ylim=(0, 1.1 * top), xlabel="rank / number of draws", ylabel="simulations / expected")
    return _finish(ax, len(result.names) if only is None else 0)


def sbc_figure(result: "SBC", kind: str) -> "Figure":
    """One panel per parameter, kind 'ecdf' or 'histogram', with its p-value and verdict."""
    from matplotlib.figure import Figure

    d = len(result.names)
    columns = min(d, 3)
    rows = -(-d // columns)
    figure = Figure(figsize=(2.9 * columns + 0.4, 2.35 * rows + 0.3), layout="constrained")
    draw = sbc_ecdf if kind == "ecdf" else sbc_histogram
    verdicts = result.verdicts
    for j, name in enumerate(result.names):
        ax = draw(result, figure.add_subplot(rows, columns, j + 1), only=j)
        ax.set_title(f"{result.labels[j]}: {verdicts[name]}\np = {result.pvalues[name]:.2g}", fontsize="small")
        ax.set(xlabel="rank / draws" if j + columns >= d else "", ylabel=ax.get_ylabel() if j % columns == 0 else "")
    return figure


def coverage_curve(result: "Coverage", ax: "Axes | None" = None) -> "Axes":
    """Observed coverage against credible level, with the simultaneous 95 % band around the diagonal."""
    several = len(result.names) > 5
    ax = new_axes(ax, width=6.2 if several else 4.6, height=4.4)
    level = np.concatenate([[0], result.level, [1]])
    band = np.concatenate([[[0, 0]], result.band, [[1, 1]]])
    ax.fill_between(level, band[:, 0], band[:, 1], color=BAND, linewidth=0, label="95 % simultaneous")
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    curves: Array = np.atleast_2d(result.observed.T)
    for j, curve in enumerate(curves):
        ax.plot(level, np.concatenate([[0], curve, [1]]), linewidth=1.4, label=result.labels[j], **_style(j))
    ax.text(0.97, 0.05, "overconfident", transform=ax.transAxes, ha="right", fontsize="small", color="#555555")
    if len(curves) > 5:
        ax.text(0.03, 0.93, "underconfident", transform=ax.transAxes, fontsize="small", color="#555555")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="credible level", ylabel="observed coverage", aspect="equal")
    return _finish(ax, len(curves))


def c2st_folds(result: "C2ST", ax: "Axes | None" = None) -> "Axes":
    """Accuracy of each fold, the mean with its error, and 0.5."""
    ax = new_axes(ax, height=3.2)
    folds = np.arange(1, result.fold_accuracies.size + 1)
    low, high = result.accuracy - result.standard_error, result.accuracy + result.standard_error
    ax.axhspan(low, high, color=BAND, linewidth=0, label=f"mean {result.accuracy:.3f} $\\pm$ {result.standard_error:.3f}")
    ax.axhline(0.5, color="black", linewidth=0.8, label="same distribution")
    ax.plot(folds, result.fold_accuracies, "o", color=COLOURS[0], label="fold")
    spread = max(0.06, 1.3 * float(np.abs(result.fold_accuracies - 0.5).max()))
    ax.set(xticks=folds, xlabel="fold", ylabel="classifier accuracy", ylim=(max(0.5 - spread, 0), min(0.5 + spread, 1.02)))
    return _finish(ax, 3)


def predictive(result: "PredictivePValue", ax: "Axes | None" = None) -> "Axes":
    """Replicas against observation: a histogram for one observed value, pairs with the diagonal where it depends on theta."""
    ax = new_axes(ax)
    words = f"p = {result.pvalue:.3f} $\\pm$ {result.error:.3f}"
    if result.t_obs.size == 1:
        observed = float(result.t_obs[0])
        counts, edges = np.histogram(result.t_rep, bins="auto")
        ax.stairs(counts, edges, fill=True, color=BAND)
        above = edges[1:] > observed
        if above.any():
            ax.stairs(
                counts[above], np.append(np.maximum(edges[:-1][above], observed), edges[-1]), fill=True, color=COLOURS[5], label=words
            )
        ax.axvline(observed, color=COLOURS[1], linewidth=1.6, label="observed" if above.any() else f"observed, {words}")
        ax.set(xlabel="statistic of replicated data", ylabel="replicas")
        return _finish(ax, 1)
    above = result.t_rep >= result.t_obs
    for chosen, colour, label in ((above, COLOURS[0], f"replica beyond data, {words}"), (~above, "#999999", "data beyond replica")):
        ax.plot(result.t_obs[chosen], result.t_rep[chosen], ".", markersize=3, color=colour, label=label, rasterized=True)
    both = np.concatenate([result.t_obs, result.t_rep])
    ends = (float(both.min()), float(both.max()))
    ax.plot(ends, ends, color="black", linewidth=0.8)
    ax.set(xlabel="statistic of the data", ylabel="statistic of replicated data")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize="small", frameon=False, markerscale=3)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
