"""Figures of the proof of an unfolding; matplotlib's objects only, never pyplot's global state.

Several methods stand side by side in every bin, with one colour and one marker each. Grey bands are what is asked, or what chance
allows a right method; black lines are the truth or the nominal value.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration.bands import band_counts
from sbi_phys.calibration.pvalues import ALPHA
from sbi_phys.core.files import open_aside
from sbi_phys.core.types import Array
from sbi_phys.plotting.calibration import BAND, COLOURS
from sbi_phys.unfold.checks import ONE_SIGMA, TWO_SIGMA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sbi_phys.unfold.checks import Scan
    from sbi_phys.unfold.validation import MethodValidation, Validation

__all__ = ["closure", "correlation", "coverage", "figures", "pulls", "regularisation", "save", "stress"]


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TRUTH_LINE: dict[str, Any] = {"color": "black", "linewidth": 0.9}


def figures(result: "Validation") -> "dict[str, Figure]":
    """All figures by name."""
    made = {"closure": closure(result)}
    if any(m.stress for m in result.methods.values()):
        made["stress"] = stress(result)
    made |= {"pulls": pulls(result), "coverage": coverage(result), "correlation": correlation(result)}
    if any(m.scan is not None for m in result.methods.values()):
        made["regularisation"] = regularisation(result)
    if result.events is not None:
        figure = _figure(5.6, 4.2)
        result.events.plot(figure.add_subplot())
        made["events"] = figure
    return made


def save(figure: "Figure", folder: Path, name: str) -> None:
    """Write <name>.png and <name>.pdf, each written atomically.   Raises: WriteError."""
    kinds: dict[str, dict[str, Any]] = {"png": {"dpi": 160}, "pdf": {"metadata": {"CreationDate": None}}}
    for suffix, options in kinds.items():
        with open_aside(folder / f"{name}.{suffix}", sync=True) as file:
            figure.savefig(file, format=suffix, **options)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _edges(result: "Validation") -> Array:
    edges = result.response.truth_edges
    return np.arange(result.truth.size + 1, dtype=np.float64) if edges is None else edges


def _places(result: "Validation") -> list[tuple["MethodValidation", Array, dict[str, Any]]]:
    """Every method with where its points stand, side by side within the bins, and how they look."""
    edges = _edges(result)
    centre, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    k = len(result.methods)
    out = []
    for i, m in enumerate(result.methods.values()):
        look = {"fmt": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "markersize": 3.2, "elinewidth": 1.1}
        out.append((m, centre + width * 0.6 * ((i + 0.5) / k - 0.5), look))
    return out


def _finish(ax: "Axes", result: "Validation", *, bottom: bool = True, legend: bool = True, **labels: Any) -> None:
    edges = _edges(result)
    name = "truth bin" if result.response.truth_edges is None else "truth"
    below: dict[str, Any] = {"xlabel": name} if bottom else {"xticklabels": []}
    ax.set(xlim=(edges[0], edges[-1]), **below, **labels)
    ax.spines[["top", "right"]].set_visible(False)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", fontsize="small", framealpha=0.85, edgecolor="none")


def closure(result: "Validation") -> "Figure":
    """Answers to the folded truth without noise, and their ratio to it.   Read: points on the line = no bias."""
    figure = _figure(6.2, 5.2)
    top, low = figure.subplots(2, 1, height_ratios=(2, 1))
    edges, truth = _edges(result), result.truth
    top.stairs(truth, edges, baseline=None, label="truth", **TRUTH_LINE)
    low.axhline(1, **TRUTH_LINE)
    for m, x, look in _places(result):
        top.errorbar(x, m.closure.counts, m.closure.errors, label=m.name, **look)
        low.errorbar(x, m.closure.counts / truth, m.closure.errors / truth, **look)
    if all((m.closure.counts > 0).all() for m in result.methods.values()):
        top.set_yscale("log")
    low.set_ylim(*_limits([(m.closure.counts / truth, m.closure.errors / truth) for m in result.methods.values()]))
    _finish(top, result, bottom=False, ylabel="events / bin", title="Closure: the folded truth, unfolded without noise")
    _finish(low, result, ylabel="unfolded / truth")
    return figure


def _limits(parts: list[tuple[Array, Array]]) -> tuple[float, float]:
    # every point is seen; the bar of a last bin with an error of its own size must not flatten the others
    moved, reach = (np.concatenate([np.abs(v - 1) + f * e for v, e in parts]) for f in (0, 1))
    half = max(1.15 * float(moved.max()), min(1.3 * float(np.quantile(reach, 0.9)), 1.5), 1e-3)
    return 1 - half, 1 + half


def stress(result: "Validation") -> "Figure":
    """Bias for other truths than the expected one, in quoted errors; grey: what is asked."""
    names = list(next(iter(result.methods.values())).stress)
    figure = _figure(6.2, 1.2 + 1.7 * len(names))
    panels = np.atleast_1d(figure.subplots(len(names), 1))
    for ax, name in zip(panels, names, strict=True):
        bound = result.asked.stress
        ax.axhspan(-bound, bound, color=BAND, linewidth=0)
        ax.axhline(0, **TRUTH_LINE)
        for m, x, look in _places(result):
            ax.errorbar(x, np.clip(m.stress[name].pull, -1e3, 1e3), 1.0, label=m.name, **look)
        ax.set_title(name, fontsize="medium", loc="left")
        _finish(ax, result, bottom=name == names[-1], legend=name == names[0], ylabel=r"bias / $\sigma$")
    figure.suptitle("Stress closure: other truths, the same prior", fontsize="large")
    return figure


def pulls(result: "Validation") -> "Figure":
    """Mean pull over toys with its error and, thin, one standard deviation of the pulls; grey: what is asked of the mean."""
    figure = _figure(6.2, 4.2)
    ax = figure.add_subplot()
    bound = result.asked.bias
    ax.axhspan(-bound, bound, color=BAND, linewidth=0, label=rf"|mean| $\leq$ {bound:g}")
    ax.axhline(0, **TRUTH_LINE)
    for one in (-1, 1):
        ax.axhline(one, color="black", linewidth=0.7, linestyle=":")
    for m, x, look in _places(result):
        spread = m.toys.pulls.std(axis=0, ddof=1)
        ax.errorbar(x, m.toys.mean_pull, spread, fmt="none", ecolor=look["color"], elinewidth=0.7, alpha=0.6)
        ax.errorbar(x, m.toys.mean_pull, m.toys.mean_pull_err, label=m.name, **(look | {"elinewidth": 2.0}))
    top = max(2.0, *(float(np.quantile(np.abs(m.toys.mean_pull) + m.toys.pulls.std(axis=0), 0.95)) for m in result.methods.values()))
    _finish(
        ax,
        result,
        ylabel=r"pull, (answer $-$ truth) / $\sigma$",
        ylim=(-1.15 * top, 1.15 * top),
        title=f"Pulls over {result.n_toys} toys: mean and, thin, width",
    )
    return figure


def coverage(result: "Validation") -> "Figure":
    """Coverage of the intervals of 68 and 95 % by bin; grey: all bins of a right method, in 95 % of calls; dotted: what is asked."""
    figure = _figure(6.2, 4.6)
    ax = figure.add_subplot()
    n, t = result.n_toys, result.truth.size
    for level, asked in ((ONE_SIGMA, result.asked.coverage), (0.95, result.asked.coverage_95)):
        low, high = band_counts(n, [level], 1 - ALPHA / t)[0] / n
        ax.axhspan(low, high, color=BAND, linewidth=0)
        ax.axhline(level, **TRUTH_LINE)
        ax.axhline(asked, color=COLOURS[1], linewidth=0.8, linestyle=":")
    for m, x, look in _places(result):
        for width, label in ((1.0, m.name), (TWO_SIGMA, None)):
            share = m.toys.covered(width).mean(axis=0)
            ax.errorbar(x, share, np.sqrt(share * (1 - share) / n), label=label, **(look | ({} if label else {"markerfacecolor": "white"})))
    _finish(
        ax,
        result,
        ylim=(0, 1.04),
        ylabel="share of toys that hold the truth",
        title=f"Coverage over {n} toys: 68 % filled, 95 % open",
    )
    return figure


def correlation(result: "Validation") -> "Figure":
    """Correlation of the quoted covariance and that of the answers over toys.   Read: the two rows should look alike."""
    k = len(result.methods)
    figure = _figure(1.2 + 3.0 * k, 6.0)
    panels = np.reshape(figure.subplots(2, k), (2, k))
    edges = _edges(result)
    mesh = None
    for column, m in zip(panels.T, result.methods.values(), strict=True):
        error = np.sqrt(np.diag(m.closure.covariance))
        scale = np.outer(error, error)
        quoted = np.divide(m.closure.covariance, scale, out=np.zeros_like(scale), where=scale > 0)
        for ax, matrix, words in zip(column, (quoted, m.toys.correlation), ("quoted", f"{result.n_toys} toys"), strict=True):
            mesh = ax.pcolormesh(edges, edges, matrix, cmap="RdBu_r", vmin=-1, vmax=1)
            ax.set_title(f"{m.name}, {words}", fontsize="medium")
            ax.set_aspect("equal")
    if mesh is not None:
        figure.colorbar(mesh, ax=list(panels.ravel()), label="correlation", shrink=0.8)
    return figure


def regularisation(result: "Validation") -> "Figure":
    """Bias, spread and quoted error against the strength.   Read: useful where the bias lies well below the quoted error."""
    scans: list[tuple[str, Scan]] = [(m.name, m.scan) for m in result.methods.values() if m.scan is not None]
    figure = _figure(0.6 + 4.4 * len(scans), 4.0)
    panels = np.atleast_1d(figure.subplots(1, len(scans), sharey=True))
    for ax, (name, scan) in zip(panels, scans, strict=True):
        bias, sd, quoted = scan.sizes()
        ax.plot(scan.strength, bias, "o-", markersize=3, color=COLOURS[1], label="bias, worst of all truths")
        ax.plot(scan.strength, sd, "s-", markersize=3, color=COLOURS[0], label="spread of toys")
        ax.plot(scan.strength, quoted, "--", color=COLOURS[2], label="quoted error")
        ax.plot(scan.strength, np.hypot(bias, sd), "-", color="black", linewidth=0.8, label="bias and spread together")
        if (scan.strength > 0).all():
            ax.set_xscale("log")
        ax.set(yscale="log", xlabel="strength", title=name)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("rms over bins, in root of true counts")
    panels[0].legend(fontsize="small", framealpha=0.85, edgecolor="none")
    return figure
