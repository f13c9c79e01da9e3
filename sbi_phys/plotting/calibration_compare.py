"""Figures of local tests, distances and predictive checks, in the style of `plots`: Axes in or a new Figure, Axes out.

Grey is what the hypothesis allows, vermilion is what was observed, blue and vermilion on a map are too much and too little mass.
"""

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtri

from sbi_phys.core.types import Array
from sbi_phys.plotting.calibration import BAND, COLOURS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbi_phys.calibration.lc2st import LC2ST
    from sbi_phys.calibration.misspecification import Misspecification
    from sbi_phys.calibration.predictive import PredictiveChecks, PriorPredictive
    from sbi_phys.calibration.two_sample import MarginalKS

__all__ = ["lc2st_map", "lc2st_null", "marginal_ks", "misspecification", "null_histogram", "predictive_checks", "prior_predictive"]


DATA = COLOURS[1]
MANY = 40  # columns from which on names no longer fit under an axis


def _bare(ax: "Axes") -> "Axes":
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def null_histogram(null: Array, observed: float, pvalue: float, label: str, ax: "Axes | None" = None) -> "Axes":
    """Null distribution as a histogram with the observed value; `label` goes under the axis."""
    ax = new_axes(ax, height=3.2)
    edges = np.histogram_bin_edges(null, bins=int(np.clip(np.sqrt(null.size), 8, 40)))
    ax.hist(null, bins=list(edges), color=BAND, label=f"null ({null.size})")
    ax.axvline(float(np.quantile(null, 0.95)), color="black", linewidth=0.8, linestyle="--", label="95 % of the null")
    ax.axvline(observed, color=DATA, linewidth=1.8, label=f"observed, p = {pvalue:.2g}")
    ax.set(xlabel=label, ylabel="number")
    ax.locator_params(axis="x", nbins=6)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4), useMathText=True)
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize="small", frameon=False, columnspacing=1.0, handlelength=1.4)
    return _bare(ax)


def lc2st_null(result: "LC2ST", ax: "Axes | None" = None) -> "Axes":
    """Statistic of L-C2ST against its null."""
    return null_histogram(result.null, result.statistic, result.pvalue, "L-C2ST statistic T(x_obs)", ax)


def lc2st_map(result: "LC2ST", ax: "Axes | None", pair: tuple[int, int]) -> "Axes":
    """d at the draws: over the one parameter with the null's band, or as colour over a pair of parameters."""
    if len(result.names) > 1:
        return _lc2st_pair(result, ax, pair)
    ax = new_axes(ax, height=3.4)
    order = np.argsort(result.points[:, 0])
    place = result.points[order, 0]
    ax.fill_between(place, result.band[order, 0], result.band[order, 1], color=BAND, linewidth=0, label="95 % of the null")
    ax.axhline(0.5, color="black", linewidth=0.8)
    ax.plot(place, result.probability[order], color=DATA, linewidth=1.6, label="classifier at x_obs")
    limit = 1.1 * max(float(np.abs(result.probability - 0.5).max()), float(np.abs(result.band - 0.5).max()), 0.02)
    low, high = np.quantile(place, [0.001, 0.999])
    ax.set(xlim=(low, high), ylim=(0.5 - limit, 0.5 + limit), xlabel=result.labels[0], ylabel="d,  > 1/2: too little mass")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize="small", frameon=False)
    return _bare(ax)


def _lc2st_pair(result: "LC2ST", ax: "Axes | None", pair: tuple[int, int]) -> "Axes":
    from matplotlib.colors import LinearSegmentedColormap

    ax = new_axes(ax, width=5.4, height=4.2)
    colours = LinearSegmentedColormap.from_list("mass", [COLOURS[0], "#EEEEEE", COLOURS[1]])
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
    bar.set_label("d: too much mass < 1/2 < too little")
    ax.set(xlabel=result.labels[i], ylabel=result.labels[j], title=f"p = {result.pvalue:.2g}")
    return _bare(ax)


def marginal_ks(result: "MarginalKS", ax: "Axes | None" = None) -> "Axes":
    """F_a - F_b at the quantiles of the pooled rows, one curve per parameter, with the pointwise 95 % range of one largest difference."""
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
        style = ("-", "--", ":", "-.")[(k // len(COLOURS)) % 4]
        ax.plot(second, first - second, linewidth=1.4, color=COLOURS[k % len(COLOURS)], linestyle=style, label=label)
    limit = 1.15 * max(allowed, float(result.ks.max()))
    ax.set(xlim=(0, 1), ylim=(-limit, limit), xlabel="ECDF of the reference b", ylabel="ECDF of a - ECDF of b")
    if several:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
    else:
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize="small", frameon=False, columnspacing=1.0)
    return _bare(ax)


def misspecification(result: "Misspecification", ax: "Axes | None" = None) -> "Axes":
    """Each score on the scale of held-out simulations (their normal quantiles): grey is where they lie, points are observations."""
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
        ax.plot(places[~beyond], row + shift[~beyond], "o", color=COLOURS[0], markersize=4, linestyle="none")
        ax.plot(places[beyond], row + shift[beyond], ">", color=DATA, markersize=7, linestyle="none")
        ax.text(edge + 0.25, row, f"p = {result.pvalues[name]:.2g}", va="center", fontsize="small")
    edge = float(ndtri(1 - 0.5 / (result.n_held + 1)))
    ax.set(yticks=rows, yticklabels=names, xlim=(-edge - 0.1, edge + 1.9), ylim=(-0.6, len(names) - 0.4))
    ax.set(xlabel="strangeness among held-out simulations / sd", xticks=range(-int(edge), int(edge) + 1))
    ax.set_title("dark: 95 % of simulations; arrow: beyond all of them", fontsize="small")
    return _bare(ax)


def predictive_checks(result: "PredictiveChecks", ax: "Axes | None" = None) -> "Axes":
    """One row per statistic: 68 and 95 % of replicas about their median, in their sd, and the data."""
    names = list(result.checks)
    ax = new_axes(ax, width=5.6, height=0.9 + 0.5 * len(names))
    rows = np.arange(len(names))[::-1]
    verdicts = result.verdicts
    for row, name in zip(rows, names, strict=True):
        check = result.checks[name]
        # where the statistic depends on theta the data have a range too; their difference is what is tested
        replicas = check.t_rep - (check.t_obs if check.t_obs.size > 1 else 0.0)
        data = 0.0 if check.t_obs.size > 1 else float(check.t_obs[0])
        middle, sd = float(np.median(replicas)), float(replicas.std()) or 1.0
        low, lower, upper, high = (np.quantile(replicas, [0.025, 0.16, 0.84, 0.975]) - middle) / sd
        ax.barh(row, high - low, left=low, height=0.5, color="#E8E8E8")
        ax.barh(row, upper - lower, left=lower, height=0.5, color="#C4C4C4")
        place = (data - middle) / sd
        inside = float(np.clip(place, -5, 5))
        marker = "D" if place == inside else ">" if place > 0 else "<"
        ax.plot(inside, row, marker, color=COLOURS[0] if verdicts[name] == "like the replicas" else DATA, markersize=6)
        ax.text(5.6, row, f"p = {result.pvalues[name]:.2g}", va="center", fontsize="small")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(yticks=rows, yticklabels=names, xlim=(-5.4, 8.2), xticks=range(-5, 6), ylim=(-0.6, len(names) - 0.4))
    ax.set(xlabel="statistic - replicas' median, in sd of replicas")
    return _bare(ax)


def prior_predictive(result: "PriorPredictive", ax: "Axes | None" = None) -> "Axes":
    """Bands of the replicas per column, about the median in units of half the 68 % range, and the data."""
    k = len(result.names)
    ax = new_axes(ax, width=6.4 if k > 12 else 5.2, height=3.6)
    low, lower, middle, upper, high = result.quantiles.T
    scale = np.where(upper > lower, (upper - lower) / 2, np.where(high > low, (high - low) / 4, 1.0))
    place = np.arange(k)
    for bottom, top, colour, words in ((low, high, "#E8E8E8", "95 % of replicas"), (lower, upper, "#C4C4C4", "68 %")):
        edges = np.arange(k + 1) - 0.5
        ax.stairs((top - middle) / scale, edges, baseline=(bottom - middle) / scale, fill=True, color=colour, label=words)
    ax.axhline(0, color="black", linewidth=0.8)
    data = (result.observed - middle) / scale
    limit = max(4.0, float(np.quantile(np.abs([low - middle, high - middle]) / scale, 0.98)) * 1.5)
    shown = np.clip(data, -limit, limit)
    inside = shown == data
    size = 4 if k < MANY else 2.5
    outside = np.isin(result.names, result.outside)
    ax.plot(place[inside & ~outside], shown[inside & ~outside], "o", color=COLOURS[0], markersize=size, label="data")
    if (inside & outside).any():
        ax.plot(place[inside & outside], shown[inside & outside], "o", color=DATA, markersize=size + 1, label="beyond all replicas")
    for side, marker in ((1, "^"), (-1, "v")):
        off = ~inside & (np.sign(data) == side)
        ax.plot(place[off], shown[off], marker, color=DATA, markersize=6, label="off the axis" if off.any() else None)
    ax.set(xlim=(-0.6, k - 0.4), ylim=(-1.08 * limit, 1.08 * limit), ylabel="(x - median) / half 68 % range")
    if k <= 12:
        ax.set_xticks(place, result.names, rotation=45 if max(map(len, result.names)) > 4 else 0, ha="right" if k > 3 else "center")
    else:
        ax.set_xlabel("column")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize="small", frameon=False, columnspacing=1.0, handlelength=1.2)
    return _bare(ax)
