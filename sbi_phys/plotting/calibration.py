"""Figures of the calibration tests, of ratios and recalibration, and of model comparison.

A function takes a result and Axes, or None for a new figure, and returns the Axes. Grey band: the range expected under the
hypothesis; black: the ideal; vermilion: the observation.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from sbi_phys.core.types import Array
from sbi_phys.plotting.style import BAND, MUTED, PALETTE, finish, house_style, line_style, new_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sbi_phys.calibration.conformal import ConformalRegions
    from sbi_phys.calibration.coverage import Coverage
    from sbi_phys.calibration.lc2st import LC2ST
    from sbi_phys.calibration.local import LocalCoverage
    from sbi_phys.calibration.misspecification import Misspecification
    from sbi_phys.calibration.pit import PITRegression
    from sbi_phys.calibration.predictive import PredictiveChecks, PredictivePValue, PriorPredictive
    from sbi_phys.calibration.pulls import Pulls
    from sbi_phys.calibration.ratios import MeanRatio, RatioCalibration, RatioCheck, Reliability, ReweightingAUC
    from sbi_phys.calibration.recalibration import RankRecalibration, Tempering
    from sbi_phys.calibration.sbc import SBC
    from sbi_phys.calibration.tarp import TARP
    from sbi_phys.calibration.two_sample import C2ST, MarginalKS
    from sbi_phys.comparison.nested import NestedTest
    from sbi_phys.comparison.probabilities import ProbabilityCalibration

__all__ = [
    "c2st_folds",
    "conformal_scores",
    "coverage_curve",
    "coverage_line",
    "coverage_map",
    "lc2st_map",
    "lc2st_null",
    "marginal_ks",
    "mean_ratio",
    "misspecification",
    "model_reliability",
    "nested_test",
    "null_histogram",
    "pit_line",
    "predictive",
    "predictive_checks",
    "prior_predictive",
    "pull_rows",
    "rank_ecdf",
    "rank_figure",
    "rank_histogram",
    "rank_map",
    "ratio_calibration",
    "ratio_check",
    "reliability",
    "reweighting_auc",
    "tarp_coverage",
    "tempering_curve",
]


_MANY = 40  # number of columns from which on the markers are smaller
_WIDE, _NARROW = "#E8E8E8", "#C4C4C4"  # 95 and 68 % of replicas


class RankCurves(Protocol):
    """Input of `rank_ecdf`: level (k,), ecdf (k, d), band (k, 2), labels (d)."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def level(self) -> Array: ...
    @property
    def ecdf(self) -> Array: ...
    @property
    def band(self) -> Array: ...


def _with_ends(level: Array, band: Array) -> tuple[Array, Array]:
    """Levels and band with the points (0, 0) and (1, 1) added."""
    return np.concatenate([[0], level, [1]]), np.concatenate([[[0, 0]], band, [[1, 1]]])


def _diagonal(ax: "Axes", level: Array, band: Array, label: str = "95 % simultaneous") -> Array:
    """Draw the diagonal with its band and return the levels from 0 to 1."""
    level, band = _with_ends(level, band)
    ax.fill_between(level, band[:, 0], band[:, 1], color=BAND, linewidth=0, label=label)
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    return level


def rank_ecdf(result: RankCurves, ax: "Axes | None" = None, only: int | None = None) -> "Axes":
    """Difference between the ranks' ECDF and the uniform one, with the simultaneous 95 % band; `only`: one parameter's column."""
    ax = new_axes(ax, width=5.2 if len(result.labels) <= 5 else 6.6)
    level, band = _with_ends(result.level, result.band)
    band = band - level[:, None]
    ax.fill_between(level, band[:, 0], band[:, 1], color=BAND, linewidth=0, label="95 % simultaneous")
    ax.axhline(0, color="black", linewidth=0.8)
    shown = range(len(result.labels)) if only is None else [only]
    for j in shown:
        curve = np.concatenate([[0], result.ecdf[:, j], [1]]) - level
        ax.plot(level, curve, linewidth=1.4, label=result.labels[j], **line_style(j if only is None else 0))
    limit = 1.15 * max(np.abs(band).max(), np.abs(result.ecdf[:, list(shown)] - result.level[:, None]).max())
    ax.set(xlim=(0, 1), ylim=(-limit, limit), xlabel="rank of the truth / number of draws", ylabel="ECDF - uniform")
    return finish(ax, legend="auto" if only is None else "none")


def rank_histogram(result: "SBC", ax: "Axes | None" = None, only: int | None = None) -> "Axes":
    """Histogram of ranks divided by the expected counts, with the simultaneous 95 % band."""
    ax = new_axes(ax, width=5.2 if len(result.names) <= 5 else 6.6)
    edges = result.bin_edges / (result.n_draws + 1)
    scale = result.expected
    low, high = (result.histogram_band / scale[:, None]).T
    ax.stairs(high, edges, baseline=low, fill=True, color=BAND, label="95 % simultaneous")
    ax.axhline(1, color="black", linewidth=0.8)
    for j in range(len(result.names)) if only is None else [only]:
        style = line_style(j if only is None else 0)
        ax.stairs(result.histogram[:, j] / scale, edges, baseline=None, linewidth=1.4, label=result.labels[j], **style)
    top = max(float(high.max()), float((result.histogram / scale[:, None]).max()))
    ax.set(xlim=(0, 1), ylim=(0, 1.1 * top), xlabel="rank of the truth / number of draws", ylabel="simulations / expected")
    return finish(ax, legend="auto" if only is None else "none")


def rank_figure(result: "SBC", kind: str) -> "Figure":
    """One panel per parameter, kind 'ecdf' or 'histogram', with its p-value and verdict."""
    d = len(result.names)
    columns = min(d, 3)
    rows = -(-d // columns)
    with house_style():
        figure = new_figure(2.9 * columns + 0.4, 2.35 * rows + 0.3)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in panels[d:]:
        ax.remove()
    draw = rank_ecdf if kind == "ecdf" else rank_histogram
    verdicts = result.verdicts
    for j, name in enumerate(result.names):
        ax = draw(result, panels[j], only=j)
        ax.set_title(f"{result.labels[j]}: {verdicts[name]}\np = {result.pvalues[name]:.2g}", fontsize="small")
        ax.set(xlabel="rank / draws" if j + columns >= d else "", ylabel=ax.get_ylabel() if j % columns == 0 else "")
    return figure


def coverage_curve(result: "Coverage", ax: "Axes | None" = None) -> "Axes":
    """Observed coverage against credible level, with the simultaneous 95 % band around the diagonal."""
    several = len(result.names) > 5
    ax = new_axes(ax, width=6.2 if several else 4.6, height=4.4)
    level = _diagonal(ax, result.level, result.band)
    curves: Array = np.atleast_2d(result.observed.T)
    for j, curve in enumerate(curves):
        ax.plot(level, np.concatenate([[0], curve, [1]]), linewidth=1.4, label=result.labels[j], **line_style(j))
    ax.text(0.97, 0.05, "overconfident", transform=ax.transAxes, ha="right", fontsize="small", color=PALETTE[7])
    if len(curves) > 5:
        ax.text(0.03, 0.93, "underconfident", transform=ax.transAxes, fontsize="small", color=PALETTE[7])
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="credible level", ylabel="observed coverage", aspect="equal")
    return finish(ax)


def c2st_folds(result: "C2ST", ax: "Axes | None" = None) -> "Axes":
    """Accuracy of each fold, the mean with its error, and 0.5."""
    ax = new_axes(ax, height=3.2)
    folds = np.arange(1, result.fold_accuracies.size + 1)
    low, high = result.accuracy - result.standard_error, result.accuracy + result.standard_error
    ax.axhspan(low, high, color=BAND, linewidth=0, label=f"mean {result.accuracy:.3f} $\\pm$ {result.standard_error:.3f}")
    ax.axhline(0.5, color="black", linewidth=0.8, label="same distribution")
    ax.plot(folds, result.fold_accuracies, "o", color=PALETTE[0], label="fold")
    spread = max(0.06, 1.3 * float(np.abs(result.fold_accuracies - 0.5).max()))
    ax.set(xticks=folds, xlabel="fold", ylabel="classifier accuracy", ylim=(max(0.5 - spread, 0), min(0.5 + spread, 1.02)))
    return finish(ax)


def predictive(result: "PredictivePValue", ax: "Axes | None" = None) -> "Axes":
    """Replicated and observed statistic: a histogram, or pairs with the diagonal if the observed statistic depends on theta."""
    ax = new_axes(ax)
    words = f"p = {result.pvalue:.3f} $\\pm$ {result.error:.3f}"
    if result.t_obs.size == 1:
        observed = float(result.t_obs[0])
        counts, edges = np.histogram(result.t_rep, bins="auto")
        ax.stairs(counts, edges, fill=True, color=BAND)
        above = edges[1:] > observed
        if above.any():
            ax.stairs(
                counts[above], np.append(np.maximum(edges[:-1][above], observed), edges[-1]), fill=True, color=PALETTE[5], label=words
            )
        ax.axvline(observed, color=PALETTE[1], linewidth=1.6, label="observed" if above.any() else f"observed, {words}")
        ax.set(xlabel="statistic of replicated data", ylabel="replicas")
        return finish(ax)
    above = result.t_rep >= result.t_obs
    for chosen, colour, label in ((above, PALETTE[0], f"replica beyond data, {words}"), (~above, MUTED, "data beyond replica")):
        ax.plot(result.t_obs[chosen], result.t_rep[chosen], ".", markersize=3, color=colour, label=label, rasterized=True)
    both = np.concatenate([result.t_obs, result.t_rep])
    ends = (float(both.min()), float(both.max()))
    ax.plot(ends, ends, color="black", linewidth=0.8)
    ax.set(xlabel="statistic of the data", ylabel="statistic of replicated data")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize="small", frameon=False, markerscale=3)
    return ax


def tarp_coverage(result: "TARP", ax: "Axes | None" = None) -> "Axes":
    """Fraction of true parameters in balls around the references against the credible level, with the simultaneous 95 % band."""
    ax = new_axes(ax, width=4.6, height=4.4)
    level = _diagonal(ax, result.level, result.band)
    ax.plot(level, np.concatenate([[0], result.observed, [1]]), linewidth=1.4, label=result.labels[0], **line_style(0))
    ax.text(0.97, 0.05, "truths farther out", transform=ax.transAxes, ha="right", fontsize="small", color=PALETTE[7])
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="credible level", ylabel="expected coverage", aspect="equal")
    place: dict[str, Any] = {"loc": "upper left", "fontsize": "small", "framealpha": 0.85, "edgecolor": "none"}
    ax.legend(title=f"references {result.reference_kind}", title_fontsize="small", frameon=True, **place)
    return ax


def _quantity_label(result: "LocalCoverage", q: int) -> str:
    return {"posterior": "posterior mean of ", "truth": "true ", "given": ""}[result.at] + result.by_labels[q]


def coverage_line(result: "LocalCoverage", m: int, r: int, ax: "Axes | None" = None) -> "Axes":
    """Coverage in each cell of one quantity with its error, the expected coverage, and the simultaneous 95 % band of all cells."""
    ax = new_axes(ax)
    low, high = result.cell_low[:, 0], result.cell_high[:, 0]
    expected, rows = result.expected[:, m, r], np.maximum(result.count, 1)
    alpha = 0.05 / result.count.size
    edges = np.append(low, high[-1])
    bottom, top = binom.ppf(alpha / 2, rows, expected) / rows, binom.ppf(1 - alpha / 2, rows, expected) / rows
    ax.stairs(top, edges, baseline=bottom, fill=True, color=BAND, label="95 % simultaneous")
    ax.stairs(expected, edges, color="black", linewidth=0.8, baseline=None)
    centre, observed = (low + high) / 2, result.observed[:, m, r]
    errors = np.abs(np.stack([observed - result.low[:, m, r], result.high[:, m, r] - observed]))
    label = f"{100 * result.level[m]:.0f} % {'regions' if len(result.labels) == 1 else f'intervals of {result.labels[r]}'}"
    ax.errorbar(centre, observed, yerr=errors, xerr=(high - low) / 2, fmt="o", markersize=4, linewidth=1.2, color=PALETTE[0], label=label)
    smallest = min(float(bottom.min()), float(result.low[:, m, r].min()))
    ax.set(xlabel=_quantity_label(result, 0), ylabel="coverage", ylim=(max(-0.02, smallest - 0.08), 1.02))
    return finish(ax)


def coverage_map(result: "LocalCoverage", m: int, r: int, ax: "Axes | None" = None) -> "Axes":
    """Heat map over two quantities: colour, observed minus expected coverage; number, the coverage in per cent."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    ax = new_axes(ax, width=5.6, height=4.2)
    observed, difference = result.observed[:, m, r], result.observed[:, m, r] - result.expected[:, m, r]
    limit = max(0.1, float(np.abs(difference).max()))
    colours = ScalarMappable(Normalize(-100 * limit, 100 * limit), "RdBu")
    worst = int(np.argmin(result.cell_pvalues[:, m, r]))
    for c in [*(i for i in range(result.count.size) if i != worst), worst]:  # the worst cell last, so that its frame is on top
        corner, size = result.cell_low[c], result.cell_high[c] - result.cell_low[c]
        frame, width = ("black", 2.0) if c == worst else ("white", 0.8)
        colour = colours.to_rgba(100 * difference[c])
        ax.add_patch(Rectangle((corner[0], corner[1]), size[0], size[1], facecolor=colour, edgecolor=frame, linewidth=width))
        middle = corner + size / 2
        ink = "white" if abs(difference[c]) > 0.65 * limit else "black"  # the ends of the colour scale are dark
        ax.text(middle[0], middle[1], f"{100 * observed[c]:.0f}", ha="center", va="center", fontsize="x-small", color=ink)
    low, high = result.cell_low.min(axis=0), result.cell_high.max(axis=0)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=_quantity_label(result, 0), ylabel=_quantity_label(result, 1))
    ax.figure.colorbar(colours, ax=ax, label="observed - expected [%]")
    what = "regions" if len(result.labels) == 1 else f"intervals of {result.labels[r]}"
    ax.set_title(f"coverage [%] of {100 * result.level[m]:.0f} % {what}; framed: worst cell", fontsize="small")
    return ax


def pit_line(result: "PITRegression", j: int, ax: "Axes | None" = None) -> "Axes":
    """Width and shift of parameter j's posterior in bins of the column of x with the largest correlation, with one-sigma errors."""
    ax = new_axes(ax)
    column, scores = result.x[:, result.column[j]], result.scores[:, j]
    n_bins = int(np.clip(result.n // 50, 2, 10))
    edges = np.unique(np.quantile(column, np.linspace(0, 1, n_bins + 1)))
    index = np.searchsorted(edges[1:-1], column, side="right")
    used = [c for c in range(max(edges.size - 1, 1)) if (index == c).sum() > 2]
    centre = np.array([np.median(column[index == c]) for c in used])
    count = np.array([(index == c).sum() for c in used])
    spread = np.maximum([scores[index == c].std(ddof=1) for c in used], 1e-12)
    shift = -np.array([scores[index == c].mean() for c in used])
    for offset, value, error, label, k in (
        (1.0, 1 / spread, 1 / spread / np.sqrt(2 * count), "width / calibrated width", 0),
        (0.0, shift, spread / np.sqrt(count), "posterior - truth [sd]", 1),
    ):
        ax.axhline(offset, color="black", linewidth=0.8)
        ax.errorbar(centre, value, yerr=error, fmt="os"[k], markersize=4, linewidth=1.2, color=PALETTE[k], label=label)
    name = result.x_names[result.column[j]]
    ax.set(xlabel=name, ylabel=f"posterior of {result.labels[j]}")
    bottom, top = ax.get_ylim()
    ax.set_ylim(min(bottom, -0.5), max(top, 1.6))
    return finish(ax)


def pull_rows(result: "Pulls", ax: "Axes | None" = None) -> "Axes":
    """Mean and width of the pulls of each parameter, with two standard errors."""
    d = len(result.names)
    ax = new_axes(ax, height=1.4 + 0.35 * d)
    y = np.arange(d)
    for at in (0, 1):
        ax.axvline(at, color="black", linewidth=0.8)
    ax.errorbar(result.mean, y, xerr=2 * result.mean_err, fmt="o", markersize=5, color=PALETTE[0], label="mean (expected: 0)")
    width, error = result.width / result.width_expected, result.width_err / result.width_expected
    ax.errorbar(width, y, xerr=2 * error, fmt="s", markersize=5, color=PALETTE[1], label="width (expected: 1)")
    ends = np.concatenate([result.mean - 2 * result.mean_err, width + 2 * error, [-0.3, 1.4]])
    ax.set(yticks=y, yticklabels=result.labels, ylim=(d - 0.5, -0.5), xlim=(ends.min() - 0.1, ends.max() + 0.1))
    ax.set_xlabel("pull (truth - posterior mean) / sd, two standard errors")
    return finish(ax, legend="above", columns=2)


def null_histogram(null: Array, observed: float, pvalue: float, label: str, ax: "Axes | None" = None) -> "Axes":
    """Histogram of the null distribution, its 95 % quantile and the observed value; `label` of the x axis."""
    ax = new_axes(ax, height=3.2)
    edges = np.histogram_bin_edges(null, bins=int(np.clip(np.sqrt(null.size), 8, 40)))
    ax.hist(null, bins=list(edges), color=BAND, label=f"null ({null.size})")
    ax.axvline(float(np.quantile(null, 0.95)), color="black", linewidth=0.8, linestyle="--", label="95 % of the null")
    ax.axvline(observed, color=PALETTE[1], linewidth=1.8, label=f"observed, p = {pvalue:.2g}")
    ax.set(xlabel=label, ylabel="number")
    ax.locator_params(axis="x", nbins=6)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4), useMathText=True)
    return finish(ax, legend="above", columns=3)


def lc2st_null(result: "LC2ST", ax: "Axes | None" = None) -> "Axes":
    """Statistic of L-C2ST and its null distribution."""
    return null_histogram(result.null, result.statistic, result.pvalue, "L-C2ST statistic T(x_obs)", ax)


def lc2st_map(result: "LC2ST", ax: "Axes | None", pair: tuple[int, int]) -> "Axes":
    """Classifier output d at the draws: against one parameter with the band of the null, or as colour over a pair of parameters."""
    if len(result.names) > 1:
        return _lc2st_pair(result, ax, pair)
    ax = new_axes(ax, height=3.4)
    order = np.argsort(result.points[:, 0])
    place = result.points[order, 0]
    ax.fill_between(place, result.band[order, 0], result.band[order, 1], color=BAND, linewidth=0, label="95 % of the null")
    ax.axhline(0.5, color="black", linewidth=0.8)
    ax.plot(place, result.probability[order], color=PALETTE[1], linewidth=1.6, label="classifier at x_obs")
    limit = 1.1 * max(float(np.abs(result.probability - 0.5).max()), float(np.abs(result.band - 0.5).max()), 0.02)
    low, high = np.quantile(place, [0.001, 0.999])
    ax.set(xlim=(low, high), ylim=(0.5 - limit, 0.5 + limit), xlabel=result.labels[0], ylabel="d  (> 1/2: too little mass)")
    return finish(ax, legend="above", columns=2)


def _lc2st_pair(result: "LC2ST", ax: "Axes | None", pair: tuple[int, int]) -> "Axes":
    from matplotlib.colors import LinearSegmentedColormap

    ax = new_axes(ax, width=5.4, height=4.2)
    colours = LinearSegmentedColormap.from_list("mass", [PALETTE[0], "#EEEEEE", PALETTE[1]])
    limit = max(float(np.quantile(np.abs(result.probability - 0.5), 0.99)), 0.02)
    i, j = pair
    shown = ax.scatter(
        result.points[:, i],
        result.points[:, j],
        c=result.probability,
        cmap=colours,
        vmin=0.5 - limit,
        vmax=0.5 + limit,
        s=9,
        linewidths=0.2,
        edgecolors="#888888",
        rasterized=True,
    )
    bar = ax.figure.colorbar(shown, ax=ax)
    bar.set_label("d  (< 1/2: too much mass, > 1/2: too little)")
    ax.set(xlabel=result.labels[i], ylabel=result.labels[j], title=f"p = {result.pvalue:.2g}")
    return ax


def marginal_ks(result: "MarginalKS", ax: "Axes | None" = None) -> "Axes":
    """F_a - F_b at the quantiles of the pooled rows, one curve per parameter, with the 95 % range of the maximum of one curve."""
    several = len(result.names) > 5
    ax = new_axes(ax, width=6.6 if several else 5.2)
    n, m = len(result.a), len(result.b)
    allowed = 1.358 * np.sqrt((n + m) / (n * m))  # asymptotic 95 % of the two-sample KS distance
    ax.axhspan(-allowed, allowed, color=BAND, linewidth=0, label="95 %, one parameter")
    ax.axhline(0, color="black", linewidth=0.8)
    for k, label in enumerate(result.labels):
        both = np.sort(np.concatenate([result.a[:, k], result.b[:, k]]))
        first = np.searchsorted(result.a[:, k], both, side="right") / n
        second = np.searchsorted(result.b[:, k], both, side="right") / m
        ax.plot(second, first - second, linewidth=1.4, label=label, **line_style(k))
    limit = 1.15 * max(allowed, float(result.ks.max()))
    ax.set(xlim=(0, 1), ylim=(-limit, limit), xlabel="ECDF of the reference b", ylabel="ECDF of a - ECDF of b")
    return finish(ax, legend="beside" if several else "above")


def misspecification(result: "Misspecification", ax: "Axes | None" = None) -> "Axes":
    """Scores as normal quantiles of the held-out simulations: bars, range of the simulations; points, observations."""
    names = list(result.scores)
    ax = new_axes(ax, height=0.9 + 0.55 * len(names))
    rows = np.arange(len(names))[::-1]
    for row, name in zip(rows, names, strict=True):
        held, own = np.sort(result.held_out[name]), result.scores[name]
        places = ndtri((np.searchsorted(held, own, side="left") + 0.5) / (held.size + 1))
        edge = float(ndtri(1 - 0.5 / (held.size + 1)))
        ax.barh(row, 2 * edge, left=-edge, height=0.5, color="#EFEFEF")
        ax.barh(row, float(ndtri(0.95)) + edge, left=-edge, height=0.5, color=BAND)
        beyond = own > held[-1]
        shift = np.linspace(-0.14, 0.14, own.size) if own.size > 1 else np.zeros(1)
        ax.plot(places[~beyond], row + shift[~beyond], "o", color=PALETTE[0], markersize=4, linestyle="none")
        ax.plot(places[beyond], row + shift[beyond], ">", color=PALETTE[1], markersize=7, linestyle="none")
        ax.text(edge + 0.25, row, f"p = {result.pvalues[name]:.2g}", va="center", fontsize="small")
    edge = float(ndtri(1 - 0.5 / (result.n_held + 1)))
    ax.set(yticks=rows, yticklabels=names, xlim=(-edge - 0.1, edge + 1.9), ylim=(-0.6, len(names) - 0.4))
    ax.set(xlabel="score as a normal quantile of held-out simulations [sd]", xticks=range(-int(edge), int(edge) + 1))
    ax.set_title("dark: 95 % of simulations; arrow: larger than all of them", fontsize="small")
    return ax


def predictive_checks(result: "PredictiveChecks", ax: "Axes | None" = None) -> "Axes":
    """One row per statistic: central 68 and 95 % of the replicas relative to their median, in sd of the replicas, and the data."""
    names = list(result.checks)
    ax = new_axes(ax, width=5.6, height=0.9 + 0.5 * len(names))
    rows = np.arange(len(names))[::-1]
    verdicts = result.verdicts
    for row, name in zip(rows, names, strict=True):
        check = result.checks[name]
        # if the statistic depends on theta, the test is of the difference between replicas and data
        replicas = check.t_rep - (check.t_obs if check.t_obs.size > 1 else 0.0)
        data = 0.0 if check.t_obs.size > 1 else float(check.t_obs[0])
        middle, sd = float(np.median(replicas)), float(replicas.std()) or 1.0
        low, lower, upper, high = (np.quantile(replicas, [0.025, 0.16, 0.84, 0.975]) - middle) / sd
        ax.barh(row, high - low, left=low, height=0.5, color=_WIDE)
        ax.barh(row, upper - lower, left=lower, height=0.5, color=_NARROW)
        place = (data - middle) / sd
        inside = float(np.clip(place, -5, 5))
        marker = "D" if place == inside else ">" if place > 0 else "<"
        ax.plot(inside, row, marker, color=PALETTE[0] if verdicts[name] == "like the replicas" else PALETTE[1], markersize=6)
        ax.text(5.6, row, f"p = {result.pvalues[name]:.2g}", va="center", fontsize="small")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(yticks=rows, yticklabels=names, xlim=(-5.4, 8.2), xticks=range(-5, 6), ylim=(-0.6, len(names) - 0.4))
    ax.set(xlabel="statistic - replicas' median, in sd of replicas")
    return ax


def prior_predictive(result: "PriorPredictive", ax: "Axes | None" = None) -> "Axes":
    """Central 68 and 95 % of the replicas and the data by column, relative to the median, in units of half the 68 % range."""
    k = len(result.names)
    ax = new_axes(ax, width=6.4 if k > 12 else 5.2, height=3.6)
    low, lower, middle, upper, high = result.quantiles.T
    scale = np.where(upper > lower, (upper - lower) / 2, np.where(high > low, (high - low) / 4, 1.0))
    place = np.arange(k)
    for bottom, top, colour, words in ((low, high, _WIDE, "95 % of replicas"), (lower, upper, _NARROW, "68 %")):
        edges = np.arange(k + 1) - 0.5
        ax.stairs((top - middle) / scale, edges, baseline=(bottom - middle) / scale, fill=True, color=colour, label=words)
    ax.axhline(0, color="black", linewidth=0.8)
    data = (result.observed - middle) / scale
    limit = max(4.0, float(np.quantile(np.abs([low - middle, high - middle]) / scale, 0.98)) * 1.5)
    shown = np.clip(data, -limit, limit)
    inside = shown == data
    size = 4 if k < _MANY else 2.5
    outside = np.isin(result.names, result.outside)
    ax.plot(place[inside & ~outside], shown[inside & ~outside], "o", color=PALETTE[0], markersize=size, label="data")
    if (inside & outside).any():
        ax.plot(place[inside & outside], shown[inside & outside], "o", color=PALETTE[1], markersize=size + 1, label="outside all replicas")
    for side, marker in ((1, "^"), (-1, "v")):
        off = ~inside & (np.sign(data) == side)
        ax.plot(place[off], shown[off], marker, color=PALETTE[1], markersize=6, label="outside the axis range" if off.any() else None)
    ax.set(xlim=(-0.6, k - 0.4), ylim=(-1.08 * limit, 1.08 * limit), ylabel="(x - median) / half 68 % range")
    if k <= 12:
        ax.set_xticks(place, result.names, rotation=45 if max(map(len, result.names)) > 4 else 0, ha="right" if k > 3 else "center")
    else:
        ax.set_xlabel("column")
    return finish(ax, legend="above")


def mean_ratio(result: "MeanRatio", ax: "Axes | None" = None) -> "Axes":
    """The three means with standard errors for each theta."""
    ax = new_axes(ax, width=max(4.2, 2.4 + 0.45 * len(result.names)), height=3.6)
    place = np.arange(len(result.names), dtype=np.float64)
    ax.axhline(1, color="black", linewidth=0.8)
    for j, name in enumerate(result.mean):
        label = name.replace("_ref", r"$_\mathrm{ref}$").replace("_num", r"$_\mathrm{num}$")
        shift = 0.18 * (j - 1)
        ax.errorbar(place + shift, result.mean[name], yerr=result.error[name], fmt="osD"[j], markersize=4, color=PALETTE[j], label=label)
    ax.set(xticks=place, xlim=(-0.6, place[-1] + 0.6), ylabel="mean, 1 if the ratio is exact")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    ax.set_xticklabels(result.names)
    if _crowded(ax, result.names):
        ax.tick_params(axis="x", labelrotation=45)
        for text in ax.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    return finish(ax)


def _crowded(ax: "Axes", names: Sequence[str]) -> bool:
    """Whether horizontal tick labels would have gaps of less than 1.5 characters."""
    drawn = max(len(re.sub("[${}_^]", "", re.sub(r"\\[a-zA-Z]+", "o", name))) for name in names)
    place = ax.bbox.width / ax.figure.dpi / (len(names) + 0.2)  # inches
    return (drawn + 1.5) * 0.6 * float(ax.get_xticklabels()[0].get_fontsize()) / 72 > place


def reliability(result: "Reliability", ax: "Axes | None" = None) -> "Axes":
    """Observed against predicted fraction of numerator events, with the simultaneous 95 % band around the diagonal."""
    ax = new_axes(ax, width=4.6, height=4.4)
    ax.fill_between(result.predicted, result.band[:, 0], result.band[:, 1], color=BAND, linewidth=0, label="95 % simultaneous")
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    ax.plot(result.predicted, result.observed, "o-", markersize=4, linewidth=1.0, color=PALETTE[0], label=f"p = {result.pvalue:.2g}")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="classifier output", ylabel="fraction of numerator events", aspect="equal")
    return finish(ax)


def reweighting_auc(result: "ReweightingAUC", ax: "Axes | None" = None) -> "Axes":
    """Area under the ROC curve with and without weights."""
    ax = new_axes(ax, width=4.6, height=2.4)
    rows = (("reweighted", result.auc, result.error, PALETTE[0]), ("unweighted", result.before, result.before_error, MUTED))
    ax.axvline(0.5, color="black", linewidth=0.8)
    for y, (_, area, error, colour) in enumerate(rows):
        ax.errorbar(area, y, xerr=error, fmt="o", markersize=5, capsize=3, color=colour)
        ax.annotate(f"{area:.3f} $\\pm$ {error:.3f}", (area, y), (0, 8), textcoords="offset points", ha="center", fontsize="small")
    values = [0.5, *(area + s * error for _, area, error, _ in rows for s in (-1, 1))]
    margin = max(0.02, 0.2 * (max(values) - min(values)))
    ax.set(xlim=(min(values) - margin, max(values) + margin), ylim=(-0.6, 1.8), yticks=[0, 1], xlabel="area under the ROC curve")
    ax.set_yticklabels([name for name, *_ in rows])
    return ax


def ratio_calibration(result: "RatioCalibration", ax: "Axes | None" = None) -> "Axes":
    """Calibrated against learned log ratio, with the blocks of the fit."""
    ax = new_axes(ax, width=4.6, height=4.4)
    reach = result.score[[0, -1]] + 0.15 * np.ptp(result.score) * np.array([-1, 1]) + np.array([-0.1, 0.1])
    line = np.linspace(float(reach[0]), float(reach[1]), 400)
    ax.plot(line, line, color="black", linewidth=0.8, label="no correction")
    ax.plot(line, result.apply(line), linewidth=1.4, color=PALETTE[0], label="calibrated")
    ax.errorbar(result.score, result.value, yerr=result.error, fmt="o", markersize=3, linewidth=0.8, color=PALETTE[1], label="blocks")
    ax.set(xlim=reach, xlabel=r"learned $\ln r$", ylabel=r"calibrated $\ln r$")
    return finish(ax)


def ratio_check(result: "RatioCheck") -> "Figure":
    """Mean ratios, reliability curve and areas under the ROC curve in one figure."""
    with house_style():
        figure = new_figure(12.0, 3.8)
        axes = figure.subplots(1, 3)
    mean_ratio(result.mean, axes[0])
    reliability(result.reliability, axes[1])
    reweighting_auc(result.auc, axes[2])
    for ax, p in zip(axes, (result.mean.pvalue, result.reliability.pvalue, result.auc.pvalue), strict=True):
        ax.set_title(f"p = {p:.2g}", fontsize="small")
    return figure


def conformal_scores(result: "ConformalRegions", ax: "Axes | None" = None) -> "Axes":
    """ECDF of the held-out scores, the threshold at the level, and the diagonal of a calibrated posterior."""
    ax = new_axes(ax)
    values = np.sort(result.scores)
    shown = values[np.isfinite(values)]
    share = np.arange(1, values.size + 1) / values.size
    ax.axhspan(*result.interval, color=BAND, linewidth=0, label="true content, 95 % range")
    ax.plot(shown, share[: shown.size], drawstyle="steps-post", color=PALETTE[0], linewidth=1.4, label="held-out simulations")
    label = f"threshold {result.threshold:.3g}"
    ax.plot([result.threshold] * 2, [0, result.level], color=PALETTE[1], linewidth=1.4, label=label)
    ax.axhline(result.level, color="black", linewidth=0.8)
    if result.score == "hpd" and not result.n_features:
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=":", label="calibrated posterior")
        name = "highest-density content of q at the truth"
    else:
        unit = "content" if result.score == "hpd" else r"$-\log q$ [nats]"
        name = f"{unit} minus its learned quantile" if result.n_features else unit
    # the axis range excludes a few true parameters far outside
    first = float(shown[0])
    last = max(float(np.quantile(shown, 0.97)), result.threshold + 0.15 * (result.threshold - first))
    ax.set(
        xlim=(first - 0.03 * (last - first), last + 0.05 * (last - first)), ylim=(0, 1.02), xlabel=name, ylabel="fraction of simulations"
    )
    return finish(ax, legend="lower right")


def rank_map(result: "RankRecalibration", ax: "Axes | None" = None) -> "Axes":
    """ECDF of the held-out PITs of q, which the recalibration inverts; a calibrated posterior is within the band."""
    several = len(result.names) > 5
    ax = new_axes(ax, width=6.2 if several else 4.6, height=4.4)
    _diagonal(ax, result.level, result.band, "calibrated, 95 % band")
    fine = np.linspace(0, 1, 401)[1:-1]
    moved = ndtr(result.moved(ndtri(fine)))
    for j, label in enumerate(result.labels):
        ax.plot(np.append(0, moved[:, j]), np.append(0, fine), linewidth=1.4, label=label, **line_style(j))
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level in the raw posterior", ylabel="recalibrated level", aspect="equal")
    return finish(ax, legend="beside" if several else "upper left")


def tempering_curve(result: "Tempering", ax: "Axes | None" = None) -> "Axes":
    """Mean fraction of draws closer than the true parameters against the widening factor, with the chosen factor and its error."""
    ax = new_axes(ax)
    low, high = result.content - result.content_error, result.content + result.content_error
    ax.fill_between(result.grid, low, high, color=BAND, linewidth=0, label="standard error")
    ax.plot(result.grid, result.content, color=PALETTE[0], linewidth=1.4, label="mean over simulations")
    ax.axhline(0.5, color="black", linewidth=0.8, label="calibrated")
    ax.axvspan(result.factor - result.error, result.factor + result.error, color=PALETTE[1], alpha=0.25, linewidth=0)
    ax.axvline(result.factor, color=PALETTE[1], linewidth=1.4, label=f"chosen x{result.factor:.3f} $\\pm$ {result.error:.3f}")
    ax.plot([1], [result.raw], "o", color="black", markersize=4, label="raw posterior")
    ax.set(
        xscale="log",
        xlim=(result.grid[0], result.grid[-1]),
        ylim=(0, 1),
        xlabel="widening factor",
        ylabel="fraction of draws closer than the truth",
    )
    ticks = [t for t in (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if result.grid[0] <= t <= result.grid[-1]]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    return finish(ax, legend="lower left")


def model_reliability(result: "ProbabilityCalibration", ax: "Axes | None" = None) -> "Axes":
    """Observed fraction against predicted probability, one curve per model, with the 95 % range if the probabilities are calibrated."""
    ax = new_axes(ax)
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    # for two models the second curve is the first one reflected
    for j, name in enumerate(result.names[: 1 if len(result.names) == 2 else None]):
        ok = result.counts[j] > 0
        x, colour = result.predicted[j][ok], PALETTE[j % len(PALETTE)]
        bars = "95 %, if calibrated" if j == 0 else ""
        ax.vlines(x, result.band[j, ok, 0], result.band[j, ok, 1], color=colour, alpha=0.35, linewidth=4, label=bars)
        ax.plot(x, result.observed[j][ok], "o-", color=colour, markersize=4, linewidth=1, label=name)
    ax.set(xlabel="predicted probability", ylabel="fraction of data sets from the model", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.set_title(f"{result.verdict}, p = {result.pvalue:.2g}", fontsize="medium")
    return finish(ax, legend="upper left")


def nested_test(result: "NestedTest", ax: "Axes | None" = None) -> "Axes":
    """Histogram of the statistic over toys of the null hypothesis, and the observed value."""
    ax = new_axes(ax)
    high = max(float(result.toys.max()), result.statistic)
    low = min(float(result.toys.min()), result.statistic)
    ax.hist(
        result.toys,
        bins=np.linspace(low, high + 1e-9 * max(1.0, abs(high)), 41).tolist(),
        color=BAND,
        label=f"{result.toys.size} toys",
    )
    ax.axvline(result.statistic, color=PALETTE[1], label=f"observed, p = {result.pvalue:.2g} ({result.significance:.2f} sigma)")
    ax.set(xlabel="test statistic", ylabel="toys", yscale="log")
    return finish(ax)
