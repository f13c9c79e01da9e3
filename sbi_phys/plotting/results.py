"""Figures that results of several folders share: values with errors, intervals, p-values, chains, weights, marginals.

A function takes Axes, or None for a new figure, and returns the Axes.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.plotting.style import BAND, MUTED, PALETTE, finish, house_style, line_style, new_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sbi_phys.comparison.learning_curve import LearningCurve
    from sbi_phys.comparison.observations import PosteriorComparison
    from sbi_phys.confidence.profile import Discovery
    from sbi_phys.samplers.importance import ImportanceResult
    from sbi_phys.store.info import Info

__all__ = [
    "bars",
    "chains",
    "compared_panels",
    "compared_rows",
    "discovery",
    "forest",
    "importance_weights",
    "intervals",
    "learning_curve",
    "marginals",
    "pvalue_rows",
    "store_rows",
    "trace",
]

_MOST_ROWS = 40  # of a forest plot; more rows are not labelled
_ROW = 0.32  # inches


def forest(
    names: Sequence[str],
    values: ArrayLike,
    errors: ArrayLike | None = None,
    ax: "Axes | None" = None,
    *,
    line: float | None = None,
    xlabel: str = "",
    label: str = "",
) -> "Axes":
    """Values (k,) with errors (k,) or (k, 2) (below, above), one row each, the first on top; `line`: a value to compare with."""
    ax = new_axes(ax, height=1.2 + _ROW * min(len(names), _MOST_ROWS))
    x = np.asarray(values, dtype=np.float64)
    y = np.arange(len(x))[::-1]
    spread = None if errors is None else np.nan_to_num(np.abs(np.asarray(errors, dtype=np.float64)).T)
    if line is not None:
        ax.axvline(line, color="black", linewidth=0.8)
    ax.errorbar(x, y, xerr=spread, fmt="o", color=PALETTE[0], markersize=4, linewidth=1.2, capsize=2, label=label or None)
    return _rows(ax, names, xlabel)


def intervals(
    low: ArrayLike, high: ArrayLike, names: Sequence[str], ax: "Axes | None" = None, *, xlabel: str = "", bands: Array | None = None
) -> "Axes":
    """Intervals (k,), one row each; an open side is an arrow, an empty interval a cross. bands (5,): expected limits, shaded."""
    ax = new_axes(ax, height=1.2 + _ROW * min(len(names), _MOST_ROWS))
    a, b = (np.asarray(v, dtype=np.float64) for v in (low, high))
    known = np.concatenate([v[np.isfinite(v)] for v in (a, b, np.asarray([] if bands is None else bands))])
    first, last = (known.min(), known.max()) if known.size else (0.0, 1.0)
    margin = 0.15 * (last - first) or max(0.15 * abs(last), 0.15)
    if bands is not None:
        ax.axvspan(bands[0], bands[4], color="#F6E58D", linewidth=0, label="expected, 95 %")
        ax.axvspan(bands[1], bands[3], color="#8FD19E", linewidth=0, label="expected, 68 %")
        ax.axvline(bands[2], color="black", linewidth=0.8, linestyle="--", label="expected median")
    for y, (start, stop) in zip(np.arange(len(a))[::-1], zip(a, b, strict=True), strict=True):
        if np.isnan(start) or np.isnan(stop):
            ax.plot((first + last) / 2, y, "x", color=PALETTE[1])
            continue
        ends = (start if np.isfinite(start) else first - margin, stop if np.isfinite(stop) else last + margin)
        ax.plot(ends, (y, y), color=PALETTE[0], linewidth=1.6, solid_capstyle="butt")
        for at, finite, arrow in ((ends[0], np.isfinite(start), "<"), (ends[1], np.isfinite(stop), ">")):
            ax.plot(at, y, "|" if finite else arrow, color=PALETTE[0], markersize=7)
    ax.set_xlim(first - 1.3 * margin, last + 1.3 * margin)
    finish(ax)
    return _rows(ax, names, xlabel)


def pvalue_rows(pvalues: Mapping[str, float], ax: "Axes | None" = None, *, alpha: float = 0.05, xlabel: str = "p-value") -> "Axes":
    """P-values by name on a logarithmic axis; the grey area is that of rejection at `alpha`."""
    ax = new_axes(ax, height=1.2 + _ROW * min(len(pvalues), _MOST_ROWS))
    p = np.maximum(np.array(list(pvalues.values()), dtype=np.float64), 1e-300)
    least = min(1e-3, 0.3 * float(p.min(initial=1.0)))
    y = np.arange(len(p))[::-1]
    ax.axvspan(least, alpha, color=BAND, linewidth=0)
    rejected = p <= alpha
    for chosen, colour in ((~rejected, PALETTE[0]), (rejected, PALETTE[1])):
        ax.plot(p[chosen], y[chosen], "o", color=colour, markersize=5)
    ax.set_xscale("log")
    ax.set_xlim(least, 2.0)
    return _rows(ax, list(pvalues), xlabel)


def bars(values: Mapping[str, float], ax: "Axes | None" = None, *, xlabel: str = "") -> "Axes":
    """Numbers by name as horizontal bars."""
    ax = new_axes(ax, height=1.2 + _ROW * len(values))
    ax.barh(np.arange(len(values))[::-1], list(values.values()), height=0.6, color=PALETTE[0])
    return _rows(ax, list(values), xlabel)


def chains(positions: Array, group: ArrayLike | None = None, ax: "Axes | None" = None) -> "Axes":
    """Means of groups of chains (n_chains, n_steps, d) in up to 100 blocks of steps, in sd of each column, columns one above the other.

    Read: lines without a trend that cross each other = converged; lines that stay apart = separate modes.
    """
    n_chains, n_steps, d = positions.shape
    groups = np.arange(n_chains) % 4 if group is None else np.asarray(group)
    ax = new_axes(ax, height=1.6 + 0.6 * d)
    edges = np.unique(np.linspace(0, n_steps, min(100, n_steps) + 1).astype(int))
    flat = positions.reshape(-1, d)
    scale = np.where(flat.std(axis=0) > 0, flat.std(axis=0), 1.0)
    z = (positions - flat.mean(axis=0)) / scale
    for g in np.unique(groups):
        mean = z[groups == g].mean(axis=0)
        blocks = np.add.reduceat(mean, edges[:-1], axis=0) / np.diff(edges)[:, None]
        for j in range(d):
            ax.plot((edges[:-1] + edges[1:]) / 2, blocks[:, j] + 3 * (d - 1 - j), linewidth=0.9, color=PALETTE[int(g) % len(PALETTE)])
    ax.set_yticks([3 * (d - 1 - j) for j in range(d)], [f"column {j}" for j in range(d)])
    ax.set(xlabel="step", ylabel="mean of a group [sd]", xlim=(0, n_steps))
    return ax


def importance_weights(result: "ImportanceResult", ax: "Axes | None" = None) -> "Axes":
    """Share of draws whose weight, in units of the mean weight, exceeds w, on logarithmic axes.

    Read: a steep fall just above 1 = a good proposal; a straight tail that reaches the number of draws = a few draws are the result.
    """
    ax = new_axes(ax)
    w = np.sort(result.weights[result.weights > 0] * result.weights.size)[::-1]
    ax.plot(w, np.arange(1, w.size + 1) / result.weights.size, color=PALETTE[0])
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="weight / mean weight", ylabel="share of draws above", xlim=(max(1e-3, 0.5 * w[-1]), 2 * w[0]))
    ax.set_title(f"effective share {100 * result.ess_fraction:.3g} %, Pareto k = {result.pareto_k:.2f}", fontsize="small")
    return ax


def marginals(theta: Array, names: Sequence[str], weights: Array | None = None, ax: "Axes | None" = None) -> "Axes":
    """Marginals of draws (n, d), in sd from the mean of each column, over the standard normal."""
    ax = new_axes(ax)
    w = np.full(len(theta), 1 / len(theta)) if weights is None else weights
    mean = w @ theta
    sd = np.sqrt(w @ (theta - mean) ** 2)
    edges = np.linspace(-4, 4, 41)
    centres = (edges[:-1] + edges[1:]) / 2
    normal = np.exp(-0.5 * centres**2) / np.sqrt(2 * np.pi)
    ax.fill_between(centres, normal, color=BAND, linewidth=0, label="normal")
    for j, name in enumerate(names):
        if sd[j] > 0:
            density = np.histogram((theta[:, j] - mean[j]) / sd[j], edges, weights=w)[0] / np.diff(edges)
            ax.stairs(density, edges, label=name, linewidth=1.2, **line_style(j))
    ax.set(xlabel="(value - mean) / sd", ylabel="density", xlim=(-4, 4), ylim=(0, None))
    return finish(ax)


def trace(
    values: ArrayLike, ax: "Axes | None" = None, *, at: ArrayLike | None = None, xlabel: str = "iteration", ylabel: str = ""
) -> "Axes":
    """Values (n,) over `at` (n,), or over their number as points."""
    ax = new_axes(ax)
    y = np.asarray(values, dtype=np.float64)
    x = np.arange(y.size) if at is None else np.asarray(at)
    ax.plot(x, y, marker="o" if at is None else None, markersize=3, color=PALETTE[0])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def discovery(result: "Discovery", ax: "Axes | None" = None) -> "Axes":
    """Density of sqrt(q0) under the null, half a normal beside the mass at zero, the tail of the p-value shaded, and the observed value."""
    ax = new_axes(ax)
    z = np.linspace(0, max(4.0, 1.2 * result.significance), 400)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    ax.plot(z, density, color="black", linewidth=1.2, label="null hypothesis")
    beyond = z >= result.significance
    ax.fill_between(z[beyond], density[beyond], color=PALETTE[1], linewidth=0, label=f"p = {result.pvalue:.2g}")
    ax.axvline(result.significance, color=PALETTE[1], label=f"observed {result.significance:.2f}")
    ax.set_yscale("log")
    ax.set(xlabel=r"$\sqrt{q_0}$", ylabel="density", ylim=(1e-8, 1))
    return finish(ax)


def store_rows(result: "Info", ax: "Axes | None" = None) -> "Axes":
    """Rows of a store: good, failed and not yet made."""
    ax = new_axes(ax, height=1.8)
    parts = {
        "good": (result.n_rows - result.n_failed, PALETTE[0]),
        "failed": (result.n_failed, PALETTE[1]),
        "not made": (max(result.n_requested - result.n_rows, 0), MUTED),
    }
    start = 0
    for name, (n, colour) in parts.items():
        ax.barh([0], [n], left=[start], height=0.6, color=colour, label=f"{name}: {n}")
        start += n
    ax.set(xlabel="rows", ylim=(-0.6, 0.9), yticks=[])
    return finish(ax, legend="above")


def _rows(ax: "Axes", names: Sequence[str], xlabel: str) -> "Axes":
    """Label the rows from top to bottom."""
    n = len(names)
    if n <= _MOST_ROWS:
        ax.set_yticks(np.arange(n)[::-1], list(names))
    settings: dict[str, Any] = {"ylim": (-0.7, n - 0.3)}
    ax.set(xlabel=xlabel, **settings)
    ax.tick_params(axis="y", length=0)
    return ax


def compared_rows(result: "PosteriorComparison", ax: "Axes | None" = None) -> "Axes":
    """Medians and intervals of all parameters and observations, in mean sd from the mean median of each parameter."""
    n_obs, d = result.median.shape
    ax = new_axes(ax, height=1.2 + 0.22 * n_obs * d)
    centre, scale = result.median.mean(axis=0), np.maximum(result.sd.mean(axis=0), 1e-300)
    for k in range(n_obs):
        y = np.arange(d)[::-1] + 0.7 * (0.5 - (k + 0.5) / n_obs)
        ends = np.abs(np.stack([result.low[k], result.high[k]]) - result.median[k]) / scale
        style: dict[str, Any] = {"color": PALETTE[k % len(PALETTE)], "markersize": 4, "linewidth": 1.2}
        ax.errorbar((result.median[k] - centre) / scale, y, xerr=ends, fmt="o", label=result.observations[k], **style)
    ax.axvline(0, color="black", linewidth=0.6)
    finish(ax, legend="above")
    return _rows(ax, result.labels, "(value - mean) / mean sd")


def compared_panels(result: "PosteriorComparison") -> "Figure":
    """One panel for each parameter: medians and intervals of the observations in its unit."""
    d = len(result.names)
    columns = min(d, 3)
    rows = -(-d // columns)
    with house_style():
        figure = new_figure(3.4 * columns + 0.6, (0.9 + _ROW * min(len(result.observations), _MOST_ROWS)) * rows + 0.3)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in panels[d:]:
        ax.remove()
    for j in range(d):
        ends = np.stack([result.median[:, j] - result.low[:, j], result.high[:, j] - result.median[:, j]], axis=1)
        label = result.labels[j] + (f" [{result.units[j]}]" if result.units[j] else "")
        ax = forest(result.observations, result.median[:, j], ends, panels[j], xlabel=label)
        if j % columns:
            ax.set_yticklabels([])
    return figure


def learning_curve(result: "LearningCurve", ax: "Axes | None" = None) -> "Axes":
    """Scores of all trainings, their means with errors, the fit up to twice the largest size, and its asymptote."""
    ax = new_axes(ax)
    first, last = float(result.sizes[0]), float(result.sizes[-1])
    ax.axhspan(
        result.asymptote - result.asymptote_err,
        result.asymptote + result.asymptote_err,
        color=BAND,
        linewidth=0,
        label="unlimited simulations",
    )
    grid = np.geomspace(first, 2 * last, 100)
    ax.plot(grid, result.fitted(grid), color="black", linewidth=1.0, label=r"fit, $a - b\,n^{-c}$")
    if result.score.shape[1] > 1:
        ax.plot(np.repeat(result.sizes, result.score.shape[1]), result.score.ravel(), ".", color=MUTED, markersize=4, label="trainings")
    ax.errorbar(result.sizes, result.mean, yerr=result.error, fmt="o", color=PALETTE[0], markersize=4, capsize=2, label="held-out score")
    at = float(result.fitted(2 * last))
    ax.errorbar([2 * last], [at], yerr=[result.gain_err], fmt="s", color=PALETTE[1], markersize=4, capsize=2, label="doubled, predicted")
    ax.set_xscale("log")
    ax.set(xlabel="simulations trained on", ylabel="mean log score [nats]")
    return finish(ax)
