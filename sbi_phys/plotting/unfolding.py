"""Figures of unfolding: results of one method, the report of `validate`, and several methods side by side on a measured spectrum.

Figures of one result take it and Axes or None, and return the Axes. Figures of a validation and those of several methods return a
Figure; every method has one colour and one marker, and points in the same bin are offset horizontally. Grey bands: criteria or ranges of
statistical fluctuations; black lines: the truth or the nominal value.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration.bands import band_counts
from sbi_phys.calibration.pvalues import ALPHA
from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import DataError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.plotting.style import BAND, MUTED, PALETTE, POINTS, finish, house_style, new_axes, new_figure
from sbi_phys.unfold.checks import ONE_SIGMA, TWO_SIGMA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sbi_phys.unfold.bayes import BayesianUnfold
    from sbi_phys.unfold.checks import Scan
    from sbi_phys.unfold.folding import ForwardFold
    from sbi_phys.unfold.ibu import IBU, Stopping
    from sbi_phys.unfold.omnifold_weights import OmniFold
    from sbi_phys.unfold.response import Response
    from sbi_phys.unfold.tikhonov import Tikhonov, TikhonovScan
    from sbi_phys.unfold.validation import MethodValidation, Validation

__all__ = [
    "closure",
    "corrections_figure",
    "correlation",
    "correlations_figure",
    "coverage",
    "flux",
    "flux_figure",
    "omnifold_column",
    "pulls",
    "refolded_figure",
    "regularisation",
    "response",
    "scan",
    "spectra",
    "spectrum",
    "stopping",
    "stress",
    "validation",
]


def _edges(edges: Array | None, n: int) -> Array:
    return np.arange(n + 1, dtype=np.float64) if edges is None else edges


def _finish(ax: "Axes", *, legend: bool = True, **labels: Any) -> "Axes":
    ax.set(**labels)
    return finish(ax, legend="best" if legend else "none")


def response(result: "Response", ax: "Axes | None" = None) -> "Axes":
    """Response matrix on a logarithmic colour scale over four decades, and the efficiency on a separate axis."""
    from matplotlib.colors import LogNorm

    ax = new_axes(ax, width=5.4, height=4.4)
    x, y = _edges(result.truth_edges, result.n_truth), _edges(result.reco_edges, result.n_reco)
    top = float(result.matrix.max())
    shown = np.ma.masked_less(result.matrix, 1e-4 * top)
    mesh = ax.pcolormesh(x, y, shown, cmap="viridis", norm=LogNorm(1e-4 * top, top))
    ax.figure.colorbar(mesh, ax=ax, label="P(reconstructed | truth)", pad=0.12)
    beside = ax.twinx()
    beside.stairs(result.efficiency, x, baseline=None, color=PALETTE[1], linewidth=1.6)
    beside.set(ylim=(0, 1.05), ylabel="efficiency (line)")
    ax.set(xlabel="truth", ylabel="reconstructed", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    return ax


def spectrum(result: "IBU | Tikhonov", ax: "Axes | None" = None, prior: Array | None = None) -> "Axes":
    """Unfolded counts with statistical (thick) and total errors (thin), measured counts, prior; logarithmic if all counts are positive."""
    ax = new_axes(ax)
    x, y = _edges(result.truth_edges, result.counts.size), _edges(result.reco_edges, result.measured.size)
    centre = (x[1:] + x[:-1]) / 2
    data = np.sqrt(np.diag(result.covariance_data))
    ax.stairs(result.measured, y, baseline=None, color=MUTED, linewidth=1.2, label="measured")
    if prior is not None:
        ax.stairs(prior, x, baseline=None, color=PALETTE[1], linestyle="--", linewidth=1.0, label="prior")
    ax.errorbar(centre, result.counts, result.errors, fmt="none", ecolor=PALETTE[0], elinewidth=0.8)
    ax.errorbar(centre, result.counts, data, fmt="o", markersize=3, color=PALETTE[0], elinewidth=1.8, label="unfolded")
    if (result.counts > 0).all():
        ax.set_yscale("log")
    return _finish(ax, xlabel="truth bin" if result.truth_edges is None else "truth", ylabel="events per bin", xlim=(x[0], x[-1]))


def stopping(result: "Stopping", ax: "Axes | None" = None) -> "Axes":
    """Coverage and |mean pull| of the worst bin against iterations, with the thresholds of the stopping rule."""
    ax = new_axes(ax)
    k = result.iterations
    ax.plot(k, result.coverage.min(axis=1), "o-", markersize=3, color=PALETTE[0], label="coverage, worst bin")
    ax.plot(k, np.abs(result.mean_pull).max(axis=1), "s-", markersize=3, color=PALETTE[1], label="|mean pull|, worst bin")
    ax.axhline(0.683, color="black", linewidth=0.8)
    ax.axhline(result.rule.coverage, color=PALETTE[0], linewidth=0.8, linestyle=":")
    ax.axhline(result.rule.bias, color=PALETTE[1], linewidth=0.8, linestyle=":")
    ax.axvline(result.chosen, color="#555555", linewidth=0.8, linestyle="--", label=f"stopped at {result.chosen}")
    top = max(1.0, 1.05 * float(np.abs(result.mean_pull).max(axis=1)[-1]))
    return _finish(ax, xscale="log", xlabel="iterations", ylabel="coverage; |mean pull|", ylim=(0, top))


def scan(result: "TikhonovScan", ax: "Axes | None" = None) -> "Axes":
    """Curvature penalty against chi-square for all regularisation strengths, with the chosen one marked."""
    ax = new_axes(ax)
    ax.plot(result.chi2, result.penalty, ".-", markersize=4, linewidth=1.0, color=PALETTE[0])
    at = result.chosen
    words = f"strength {result.strength[at]:.3g} by {result.method}"
    ax.plot(result.chi2[at], result.penalty[at], "o", markersize=7, color=PALETTE[1], label=words)
    positive = bool((result.chi2 > 0).all() and (result.penalty > 0).all())
    return _finish(
        ax, xscale="log" if positive else "linear", yscale="log" if positive else "linear", xlabel="chi2", ylabel="curvature penalty"
    )


def flux(result: "ForwardFold", ax: "Axes | None" = None, power: float = 3.0) -> "Axes":
    """E^power J(E) of the corrected data, and the fitted flux with its one sigma band."""
    ax = new_axes(ax)
    centre = (result.reco_edges[1:] + result.reco_edges[:-1]) / 2
    scale = 10.0 ** (power * centre)
    fine = np.linspace(result.reco_edges[0], result.reco_edges[-1], 200)
    curve, error = result.band(fine)
    lift = 10.0 ** (power * fine)
    ax.fill_between(fine, (curve - error) * lift, (curve + error) * lift, color=BAND, linewidth=0, label="fit")
    ax.plot(fine, curve * lift, color=PALETTE[1], linewidth=1.2)
    error_flux = np.sqrt(np.diag(result.flux_covariance))
    ax.errorbar(centre, result.flux * scale, error_flux * scale, fmt="o", markersize=3, color=PALETTE[0], label="corrected data")
    ax.set_yscale("log")
    unit = rf"$E^{{{power:g}}}J$ / (eV$^{{{power - 1:g}}}$ km$^{{-2}}$ sr$^{{-1}}$ yr$^{{-1}}$)"
    return _finish(ax, xlabel="lg(E/eV)", ylabel=unit)


def spectra(result: "BayesianUnfold", ax: "Axes | None" = None) -> "Axes":
    """Median with 68 % and 95 % intervals of each truth bin, measured counts, and the refolded posterior mean."""
    ax = new_axes(ax)
    x, y = _edges(result.truth_edges, result.counts.size), _edges(result.reco_edges, result.measured.size)
    wide, narrow = result.intervals(0.95), result.intervals(ONE_SIGMA)
    ax.stairs(wide[:, 1], x, baseline=wide[:, 0], fill=True, color=BAND, linewidth=0, label="95 %")
    ax.stairs(narrow[:, 1], x, baseline=narrow[:, 0], fill=True, color=PALETTE[0], alpha=0.45, linewidth=0, label="68 %")
    ax.stairs(result.median, x, baseline=None, color=PALETTE[0], linewidth=1.4, label="unfolded, median")
    ax.stairs(result.refolded, y, baseline=None, color=PALETTE[1], linewidth=1.0, linestyle="--", label="refolded")
    centre = (y[1:] + y[:-1]) / 2
    ax.plot(centre, np.where(result.measured > 0, result.measured, np.nan), "o", markersize=3, color="black", label="measured")
    ax.set_yscale("log")
    positive = result.measured[result.measured > 0]
    low = min(float(positive.min()), float(result.median.min()))
    ax.set_ylim(0.3 * low, 2 * max(float(wide.max()), float(positive.max())))
    return _finish(ax, xlabel="truth bin" if result.truth_edges is None else "truth", ylabel="events per bin", xlim=(x[0], x[-1]))


def omnifold_column(result: "OmniFold", column: int, bins: int | Sequence[float], ax: "Axes | None" = None) -> "Axes":
    """Histogram of one column of the truth with the nominal and the unfolded weights."""
    ax = new_axes(ax)
    values = result.truth[result.truth_pass, column]
    edges = np.histogram_bin_edges(values, bins)
    for weights, label, colour in ((result.nominal, "simulation, scaled", PALETTE[7]), (result.weights, "unfolded", PALETTE[0])):
        own = weights[result.truth_pass]
        counts = np.histogram(values, edges, weights=own)[0]
        error = np.sqrt(np.histogram(values, edges, weights=own**2)[0])
        ax.stairs(counts, edges, color=colour, linewidth=1.4, label=label)
        ax.errorbar(0.5 * (edges[1:] + edges[:-1]), counts, error, fmt="none", ecolor=colour, linewidth=0.8)
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, None), xlabel=f"truth, column {column}", ylabel="events / bin")
    return finish(ax)


TRUTH_LINE: dict[str, Any] = {"color": "black", "linewidth": 0.9}


@house_style()
def validation(result: "Validation") -> "dict[str, Figure]":
    """All figures by name."""
    made = {"closure": closure(result)}
    if any(m.stress for m in result.methods.values()):
        made["stress"] = stress(result)
    made |= {"pulls": pulls(result), "coverage": coverage(result), "correlation": correlation(result)}
    if any(m.scan is not None for m in result.methods.values()):
        made["regularisation"] = regularisation(result)
    if result.events is not None:
        figure = new_figure(5.6, 4.2)
        result.events.plot(figure.add_subplot())
        made["events"] = figure
    return made


def _validation_edges(result: "Validation") -> Array:
    return _edges(result.response.truth_edges, result.truth.size)


def _places(result: "Validation") -> list[tuple["MethodValidation", Array, dict[str, Any]]]:
    """Each method with the positions of its points, offset within the bins, and their style."""
    edges = _validation_edges(result)
    centre, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    k = len(result.methods)
    out = []
    for i, m in enumerate(result.methods.values()):
        look = {"fmt": POINTS[i % len(POINTS)], "color": PALETTE[i % len(PALETTE)], "markersize": 3.2, "elinewidth": 1.1}
        out.append((m, centre + width * 0.6 * ((i + 0.5) / k - 0.5), look))
    return out


def _finish_validation(ax: "Axes", result: "Validation", *, bottom: bool = True, legend: bool = True, **labels: Any) -> None:
    edges = _validation_edges(result)
    name = "truth bin" if result.response.truth_edges is None else "truth"
    below: dict[str, Any] = {"xlabel": name} if bottom else {"xticklabels": []}
    _finish(ax, legend=legend, xlim=(edges[0], edges[-1]), **below, **labels)


@house_style()
def closure(result: "Validation") -> "Figure":
    """Results for the folded truth without noise, and their ratio to the truth.   Read: points on the line: no bias."""
    figure = new_figure(6.2, 5.2)
    top, low = figure.subplots(2, 1, height_ratios=(2, 1))
    edges, truth = _validation_edges(result), result.truth
    top.stairs(truth, edges, baseline=None, label="truth", **TRUTH_LINE)
    low.axhline(1, **TRUTH_LINE)
    for m, x, look in _places(result):
        top.errorbar(x, m.closure.counts, m.closure.errors, label=m.name, **look)
        low.errorbar(x, m.closure.counts / truth, m.closure.errors / truth, **look)
    if all((m.closure.counts > 0).all() for m in result.methods.values()):
        top.set_yscale("log")
    low.set_ylim(*_limits([(m.closure.counts / truth, m.closure.errors / truth) for m in result.methods.values()]))
    _finish_validation(top, result, bottom=False, ylabel="events / bin", title="Closure: the folded truth, unfolded without noise")
    _finish_validation(low, result, ylabel="unfolded / truth")
    return figure


def _limits(parts: list[tuple[Array, Array]]) -> tuple[float, float]:
    # all points are within the limits; error bars may extend beyond them
    moved, reach = (np.concatenate([np.abs(v - 1) + f * e for v, e in parts]) for f in (0, 1))
    half = max(1.15 * float(moved.max()), min(1.3 * float(np.quantile(reach, 0.9)), 1.5), 1e-3)
    return 1 - half, 1 + half


@house_style()
def stress(result: "Validation") -> "Figure":
    """Bias for truths that differ from the prior, in units of the quoted error; grey: the criterion."""
    names = list(next(iter(result.methods.values())).stress)
    figure = new_figure(6.2, 1.2 + 1.7 * len(names))
    panels = np.atleast_1d(figure.subplots(len(names), 1))
    for ax, name in zip(panels, names, strict=True):
        bound = result.criteria.stress
        ax.axhspan(-bound, bound, color=BAND, linewidth=0)
        ax.axhline(0, **TRUTH_LINE)
        for m, x, look in _places(result):
            ax.errorbar(x, np.clip(m.stress[name].pull, -1e3, 1e3), 1.0, label=m.name, **look)
        ax.set_title(name, fontsize="medium", loc="left")
        _finish_validation(ax, result, bottom=name == names[-1], legend=name == names[0], ylabel=r"bias / $\sigma$")
    figure.suptitle("Stress closure: other truths, the same prior", fontsize="large")
    return figure


@house_style()
def pulls(result: "Validation") -> "Figure":
    """Mean pull over toys with its error (thick) and the standard deviation of the pulls (thin); grey: the criterion of the mean."""
    figure = new_figure(6.2, 4.2)
    ax = figure.add_subplot()
    bound = result.criteria.bias
    ax.axhspan(-bound, bound, color=BAND, linewidth=0, label=rf"|mean| $\leq$ {bound:g}")
    ax.axhline(0, **TRUTH_LINE)
    for one in (-1, 1):
        ax.axhline(one, color="black", linewidth=0.7, linestyle=":")
    for m, x, look in _places(result):
        spread = m.toys.pulls.std(axis=0, ddof=1)
        ax.errorbar(x, m.toys.mean_pull, spread, fmt="none", ecolor=look["color"], elinewidth=0.7, alpha=0.6)
        ax.errorbar(x, m.toys.mean_pull, m.toys.mean_pull_err, label=m.name, **(look | {"elinewidth": 2.0}))
    top = max(2.0, *(float(np.quantile(np.abs(m.toys.mean_pull) + m.toys.pulls.std(axis=0), 0.95)) for m in result.methods.values()))
    _finish_validation(
        ax,
        result,
        ylabel=r"pull, (unfolded $-$ truth) / $\sigma$",
        ylim=(-1.15 * top, 1.15 * top),
        title=f"Pulls over {result.n_toys} toys: mean (thick) and width (thin)",
    )
    return figure


@house_style()
def coverage(result: "Validation") -> "Figure":
    """Coverage of the intervals of 68 and 95 % by bin; grey: simultaneous 95 % range of a correct method; dotted: criteria."""
    figure = new_figure(6.2, 4.6)
    ax = figure.add_subplot()
    n, t = result.n_toys, result.truth.size
    for level, bound in ((ONE_SIGMA, result.criteria.coverage), (0.95, result.criteria.coverage_95)):
        low, high = band_counts(n, [level], 1 - ALPHA / t)[0] / n
        ax.axhspan(low, high, color=BAND, linewidth=0)
        ax.axhline(level, **TRUTH_LINE)
        ax.axhline(bound, color=PALETTE[1], linewidth=0.8, linestyle=":")
    for m, x, look in _places(result):
        for width, label in ((1.0, m.name), (TWO_SIGMA, None)):
            share = m.toys.covered(width).mean(axis=0)
            ax.errorbar(x, share, np.sqrt(share * (1 - share) / n), label=label, **(look | ({} if label else {"markerfacecolor": "white"})))
    _finish_validation(
        ax,
        result,
        ylim=(0, 1.04),
        ylabel="fraction of toys with the truth in the interval",
        title=f"Coverage over {n} toys: 68 % filled, 95 % open",
    )
    return figure


@house_style()
def correlation(result: "Validation") -> "Figure":
    """Correlation of the quoted covariance and of the results over toys.   Read: the two rows should agree."""
    k = len(result.methods)
    figure = new_figure(1.2 + 3.0 * k, 6.0)
    panels = np.reshape(figure.subplots(2, k), (2, k))
    edges = _validation_edges(result)
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


@house_style()
def regularisation(result: "Validation") -> "Figure":
    """Bias, spread and quoted error against the strength.   Read: a strength is suitable if the bias is well below the quoted error."""
    scans: list[tuple[str, Scan]] = [(m.name, m.scan) for m in result.methods.values() if m.scan is not None]
    figure = new_figure(0.6 + 4.4 * len(scans), 4.0)
    panels = np.atleast_1d(figure.subplots(1, len(scans), sharey=True))
    for ax, (name, scan) in zip(panels, scans, strict=True):
        bias, sd, quoted = scan.sizes()
        ax.plot(scan.strength, bias, "o-", markersize=3, color=PALETTE[1], label="bias, worst of all truths")
        ax.plot(scan.strength, sd, "s-", markersize=3, color=PALETTE[0], label="sd over toys")
        ax.plot(scan.strength, quoted, "--", color=PALETTE[2], label="quoted error")
        ax.plot(scan.strength, np.hypot(bias, sd), "-", color="black", linewidth=0.8, label="bias and sd in quadrature")
        if (scan.strength > 0).all():
            ax.set_xscale("log")
        ax.set(yscale="log", xlabel="strength", title=name)
        panels[0].set_ylabel("rms over bins, in square root of true counts")
    finish(panels[0], legend="best")
    return figure


_LG = r"$\lg(E/\mathrm{eV})$"


@house_style()
def flux_figure(
    edges: ArrayLike,
    flux: Mapping[str, tuple[ArrayLike, ArrayLike]],
    published: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    unit: str = "",
    limits: tuple[float, float] = (0.93, 1.07),
) -> "Figure":
    """E^3 J of every method above, its ratio to the published flux below (without it, to that of the first method).

    Args: edges (r + 1,), lg(E/eV). flux, {method: (J (r,), errors (2, r) below and above)}. published likewise. unit, of J. limits of the
    ratio: a point outside is an arrow at the edge.   Raises: ShapeError, NonFiniteError, DataError.
    Read: in each bin from left to right in the order of the legend; grey: published, with its statistical errors.
    """
    x, widths, centre = _bins(edges)
    shown = {name: _with_errors(name, value, centre.size) for name, value in _some(flux).items()}
    reference = next(iter(shown.values())) if published is None else _with_errors("published", published, centre.size)
    scale = 10.0 ** (3 * (centre - 18.5))
    fig = new_figure(8.4, 7.0)
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(2.6, 1.6))
    if published is not None:
        _boxes(top, x, reference[0] * scale, reference[1] * scale)
        _boxes(bottom, x, np.ones_like(centre), reference[1] / np.where(reference[0] > 0, reference[0], np.nan))
        top.plot([], [], color="#9A9A9A", linewidth=6, alpha=0.6, label="published")
    for k, (name, (j, errors)) in enumerate(shown.items()):
        at = centre + _offset(k, len(shown)) * widths
        style = _points(k, markersize=4, elinewidth=1.1)
        top.errorbar(at, j * scale, errors * scale, **style, label=name)
        ratio = np.divide(j, reference[0], out=np.full_like(j, np.nan), where=reference[0] > 0)
        relative = np.divide(errors, reference[0], out=np.full_like(errors, np.nan), where=reference[0] > 0)
        _clipped(bottom, at, ratio, relative, limits, style)
    bottom.axhline(1, color="black", linewidth=0.8)
    positive = np.concatenate([j[j > 0] * scale[j > 0] for j, _ in shown.values()])
    top.set(yscale="log", ylim=(0.35 * positive.min(), 1.5 * positive.max()))
    top.set_ylabel(r"$J\,(E\,/\,10^{18.5}\,\mathrm{eV})^3$" + (f"  [{unit}]" if unit else ""))
    bottom.set(ylim=limits, xlim=(x[0], x[-1]), xlabel=_LG)
    bottom.set_ylabel("ratio to published" if published is not None else f"ratio to {next(iter(shown))}")
    top.legend(ncols=2, loc="lower left")
    bottom.grid(axis="y", alpha=0.3, linewidth=0.6)
    fig.align_ylabels()
    return fig


@house_style()
def corrections_figure(
    edges: ArrayLike,
    corrections: Mapping[str, ArrayLike],
    published: ArrayLike | None = None,
    *,
    others: Mapping[str, ArrayLike] | None = None,
    target: tuple[float, float, float] | None = None,
) -> "Figure":
    """Correction factors unfolded / raw of every method, and below their differences from the published ones, in per cent.

    Args: edges (r + 1,). corrections {method: (r,)}, NaN where nothing was measured. published (r,) or None. others: curves for comparison,
    as lines. target: lgE from, to, and the relative tolerance of the band.   Raises: ShapeError, DataError.
    """
    x, widths, centre = _bins(edges)
    shown = {name: as_array(name, value, (centre.size,), finite=False) for name, value in _some(corrections).items()}
    lines = {name: as_array(name, value, (centre.size,)) for name, value in (others or {}).items()}
    given = None if published is None else as_array("published", published, (centre.size,))
    fig = new_figure(8.4, 6.6 if given is not None else 4.4)
    axes = fig.subplots(
        2 if given is not None else 1, 1, sharex=True, squeeze=False, height_ratios=(1.3, 1)[: 2 if given is not None else 1]
    )
    top = axes[0, 0]
    if given is not None:
        top.stairs(given, x, baseline=None, color="#9A9A9A", linewidth=3.0, label="published")
    for k, (name, value) in enumerate(lines.items()):
        top.plot(centre, value, color="black", linewidth=1.1, linestyle=("-", "--", ":", "-.")[k % 4], label=name)
    for k, (name, value) in enumerate(shown.items()):
        top.plot(centre + _offset(k, len(shown)) * widths, value, **_points(k), label=name)
    finite = np.concatenate([v[np.isfinite(v)] for v in (*shown.values(), *lines.values())])
    low, high = np.quantile(finite, [0.02, 0.98])
    top.set_ylim(low - 0.12 * (high - low) - 0.01, high + 0.25 * (high - low) + 0.02)
    top.set_ylabel("unfolded / raw counts")
    top.legend(ncols=3, fontsize=8, loc="upper left")
    if given is not None:
        _away(axes[1, 0], x, centre, widths, shown, lines, given, target)
    axes[-1, 0].set(xlim=(x[0], x[-1]), xlabel=_LG)
    fig.align_ylabels()
    return fig


def _away(
    ax: "Axes",
    x: Array,
    centre: Array,
    widths: Array,
    shown: Mapping[str, Array],
    lines: Mapping[str, Array],
    given: Array,
    target: tuple[float, float, float] | None,
) -> None:
    if target is not None:
        low, high, tolerance = target
        ax.fill_between([low, high], -100 * tolerance, 100 * tolerance, color=BAND, linewidth=0, label=f"within {100 * tolerance:g} %")
    for k, value in enumerate(lines.values()):
        ax.plot(centre, 100 * (value / given - 1), color="black", linewidth=1.1, linestyle=("-", "--", ":", "-.")[k % 4])
    limit = 6.0
    for k, value in enumerate(shown.values()):
        away = 100 * (value / given - 1)
        _clipped(ax, centre + _offset(k, len(shown)) * widths, away, None, (-limit, limit), _points(k))
    ax.axhline(0, color="#9A9A9A", linewidth=1.5)
    ax.set(ylim=(-limit, limit), ylabel="over published $-$ 1  [%]")
    if target is not None:
        ax.legend(loc="lower left", fontsize=8)


@house_style()
def refolded_figure(
    edges: ArrayLike, counts: ArrayLike, refolded: Mapping[str, ArrayLike], chi2: Mapping[str, str] | None = None
) -> "Figure":
    """Pulls of the measured counts N from the refolded counts f of each method: (N - f) / sqrt(f) by bin.

    Args: counts (r,). refolded {method: (r,)} > 0. chi2 {method: text for the legend}.   Raises: ShapeError, DataError.
    Read: most pulls should be within +-2; all near 0 means that the result follows the fluctuations of the data.
    """
    x, widths, centre = _bins(edges)
    n = as_array("counts", counts, (centre.size,))
    fig = new_figure(8.4, 3.8)
    ax = fig.subplots()
    for height, colour in ((2, "#F0F0F0"), (1, "#DEDEDE")):
        ax.axhspan(-height, height, color=colour, linewidth=0)
    largest = 2.4
    for k, (name, value) in enumerate(_some(refolded).items()):
        f = np.maximum(as_array(name, value, (centre.size,)), 1e-9)
        pull = (n - f) / np.sqrt(f)
        largest = max(largest, 1.1 * float(np.abs(pull).max()))
        words = f"{name}: {chi2[name]}" if chi2 and name in chi2 else name
        ax.plot(centre + _offset(k, len(refolded)) * widths, pull, **_points(k), label=words)
    ax.axhline(0, color="black", linewidth=0.8)
    limit = min(largest, 6.0)
    ax.set(ylim=(-limit, 1.75 * limit), xlim=(x[0], x[-1]), xlabel=_LG, ylabel=r"(measured $-$ refolded) / $\sqrt{\mathrm{refolded}}$")
    ax.legend(ncols=2, fontsize=8.5, loc="upper left")
    return fig


@house_style()
def correlations_figure(edges: ArrayLike, correlations: Mapping[str, ArrayLike]) -> "Figure":
    """Correlation matrix (r, r) of every method's unfolded bins, on one scale from -1 to 1.   Raises: ShapeError, DataError.

    Read: neighbouring bins are anticorrelated for weak regularisation and correlated for strong regularisation.
    """
    x, _, centre = _bins(edges)
    shown = {name: as_array(name, value, (centre.size, centre.size)) for name, value in _some(correlations).items()}
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    fig = new_figure(2.9 * columns + 0.9, 2.75 * rows + 0.3)
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    mesh: Any = None
    for ax, (name, value) in zip(axes.ravel(), shown.items(), strict=False):
        mesh = ax.pcolormesh(x, x, value, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
        ax.set_title(name)
        ax.set_aspect("equal")
    for ax in axes.ravel()[len(shown) :]:
        ax.set_axis_off()
    for ax in axes.ravel()[max(0, len(shown) - columns) : len(shown)]:
        ax.set_xlabel(_LG)
        ax.tick_params(labelbottom=True)  # also above an empty panel
    for ax in axes[:, 0]:
        ax.set_ylabel(_LG)
    fig.colorbar(mesh, ax=axes, label="correlation", shrink=0.75)
    return fig


def _bins(edges: ArrayLike) -> tuple[Array, Array, Array]:
    x = as_array("edges", edges, (None,))
    if x.size < 2 or (np.diff(x) <= 0).any():
        raise DataError(f"edges has {x.size} values; expected at least 2, increasing")
    return x, np.diff(x), (x[1:] + x[:-1]) / 2


def _some(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if not values:
        raise DataError("there is no method to draw; expected at least one")
    return values


def _with_errors(name: str, value: tuple[ArrayLike, ArrayLike], n: int) -> tuple[Array, Array]:
    centre, errors = value
    return as_array(name, centre, (n,)), np.maximum(as_array(f"errors of {name}", errors, (2, n)), 0.0)


def _offset(k: int, n: int) -> float:
    return 0.11 * (k - (n - 1) / 2)


def _points(k: int, **changes: Any) -> dict[str, Any]:
    """Style of the points of method k, for plot."""
    look = {"linestyle": "", "marker": POINTS[k % len(POINTS)], "color": PALETTE[k % len(PALETTE)], "markersize": 5}
    return look | {"mec": "white", "mew": 0.4} | changes


def _boxes(ax: "Axes", x: Array, y: Array, errors: Array) -> None:
    """Grey boxes y - below to y + above over each bin, with the value as a line."""
    low, high = y - errors[0], y + errors[1]
    ax.fill_between(x, np.append(low, low[-1]), np.append(high, high[-1]), step="post", color="#C8C8C8", linewidth=0)
    ax.hlines(y, x[:-1], x[1:], color="#6B6B6B", linewidth=1.0)


def _clipped(ax: "Axes", at: Array, y: Array, errors: Array | None, limits: tuple[float, float], style: dict[str, Any]) -> None:
    """Draw points with errors, and arrows at the edge for points outside the limits."""
    inside = np.isfinite(y) & (y > limits[0]) & (y < limits[1])
    if errors is None:
        ax.plot(at[inside], y[inside], **style)
    else:
        ax.errorbar(at[inside], y[inside], errors[:, inside], **style)
    edge = 0.03 * (limits[1] - limits[0])
    for beyond, place, marker in ((y >= limits[1], limits[1] - edge, 6), (y <= limits[0], limits[0] + edge, 7)):
        ax.plot(at[beyond], np.full(int(beyond.sum()), place), linestyle="", marker=marker, color=style["color"], markersize=5)
