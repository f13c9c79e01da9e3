"""Figures of the classical methods: response, spectra, scans; matplotlib's objects only, never pyplot's global state."""

from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.core.types import Array
from sbi_phys.plotting.calibration import BAND, COLOURS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbi_phys.unfold.folding import ForwardFold
    from sbi_phys.unfold.ibu import IBU, Stopping
    from sbi_phys.unfold.response import Response
    from sbi_phys.unfold.tikhonov import Tikhonov, TikhonovScan

__all__ = ["flux", "response", "scan", "spectrum", "stopping"]


def _edges(edges: Array | None, n: int) -> Array:
    return np.arange(n + 1, dtype=np.float64) if edges is None else edges


def _finish(ax: "Axes", **labels: Any) -> "Axes":
    ax.set(**labels)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", fontsize="small", framealpha=0.85, edgecolor="none")
    return ax


def response(result: "Response", ax: "Axes | None" = None) -> "Axes":
    """Matrix in logarithmic shades over four decades, and the efficiency on an axis of its own."""
    from matplotlib.colors import LogNorm

    ax = new_axes(ax, width=5.4, height=4.4)
    x, y = _edges(result.truth_edges, result.n_truth), _edges(result.reco_edges, result.n_reco)
    top = float(result.matrix.max())
    shown = np.ma.masked_less(result.matrix, 1e-4 * top)
    mesh = ax.pcolormesh(x, y, shown, cmap="viridis", norm=LogNorm(1e-4 * top, top))
    ax.figure.colorbar(mesh, ax=ax, label="P(reconstructed | truth)", pad=0.12)
    beside = ax.twinx()
    beside.stairs(result.efficiency, x, baseline=None, color=COLOURS[1], linewidth=1.6)
    beside.set(ylim=(0, 1.05), ylabel="efficiency (line)")
    ax.set(xlabel="truth", ylabel="reconstructed", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    return ax


def spectrum(result: "IBU | Tikhonov", ax: "Axes | None" = None, prior: Array | None = None) -> "Axes":
    """Unfolded counts with errors of the data (thick) and of everything (thin), measured counts, prior; logarithmic where it fits."""
    ax = new_axes(ax)
    x, y = _edges(result.truth_edges, result.counts.size), _edges(result.reco_edges, result.measured.size)
    centre = (x[1:] + x[:-1]) / 2
    data = np.sqrt(np.diag(result.covariance_data))
    ax.stairs(result.measured, y, baseline=None, color="#999999", linewidth=1.2, label="measured")
    if prior is not None:
        ax.stairs(prior, x, baseline=None, color=COLOURS[1], linestyle="--", linewidth=1.0, label="prior")
    ax.errorbar(centre, result.counts, result.errors, fmt="none", ecolor=COLOURS[0], elinewidth=0.8)
    ax.errorbar(centre, result.counts, data, fmt="o", markersize=3, color=COLOURS[0], elinewidth=1.8, label="unfolded")
    if (result.counts > 0).all():
        ax.set_yscale("log")
    return _finish(ax, xlabel="truth bin" if result.truth_edges is None else "truth", ylabel="events per bin", xlim=(x[0], x[-1]))


def stopping(result: "Stopping", ax: "Axes | None" = None) -> "Axes":
    """Worst-bin coverage and worst |mean pull| against iterations, with what the rule asks for."""
    ax = new_axes(ax)
    k = result.iterations
    ax.plot(k, result.coverage.min(axis=1), "o-", markersize=3, color=COLOURS[0], label="coverage, worst bin")
    ax.plot(k, np.abs(result.mean_pull).max(axis=1), "s-", markersize=3, color=COLOURS[1], label="|mean pull|, worst bin")
    ax.axhline(0.683, color="black", linewidth=0.8)
    ax.axhline(result.rule.coverage, color=COLOURS[0], linewidth=0.8, linestyle=":")
    ax.axhline(result.rule.bias, color=COLOURS[1], linewidth=0.8, linestyle=":")
    ax.axvline(result.chosen, color="#555555", linewidth=0.8, linestyle="--", label=f"stopped at {result.chosen}")
    top = max(1.0, 1.05 * float(np.abs(result.mean_pull).max(axis=1)[-1]))
    return _finish(ax, xscale="log", xlabel="iterations", ylabel="coverage; |mean pull|", ylim=(0, top))


def scan(result: "TikhonovScan", ax: "Axes | None" = None) -> "Axes":
    """Curve of curvature penalty against chi-square over the strengths, the chosen one marked."""
    ax = new_axes(ax)
    ax.plot(result.chi2, result.penalty, ".-", markersize=4, linewidth=1.0, color=COLOURS[0])
    at = result.chosen
    words = f"strength {result.strength[at]:.3g} by {result.method}"
    ax.plot(result.chi2[at], result.penalty[at], "o", markersize=7, color=COLOURS[1], label=words)
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
    ax.plot(fine, curve * lift, color=COLOURS[1], linewidth=1.2)
    error_flux = np.sqrt(np.diag(result.flux_covariance))
    ax.errorbar(centre, result.flux * scale, error_flux * scale, fmt="o", markersize=3, color=COLOURS[0], label="corrected data")
    ax.set_yscale("log")
    unit = rf"$E^{{{power:g}}}J$ / (eV$^{{{power - 1:g}}}$ km$^{{-2}}$ sr$^{{-1}}$ yr$^{{-1}}$)"
    return _finish(ax, xlabel="lg(E/eV)", ylabel=unit)
