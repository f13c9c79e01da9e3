"""Figures of `SourceSpectrum`: spectrum, Xmax moments and Xmax histograms with posterior-predictive bands.

Only this module imports matplotlib, through its object interface, without pyplot and global settings. The colours are those of Okabe
and Ito, which are distinguishable for people with colour blindness.
"""

from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator
from numpy.typing import NDArray
from scipy.special import chdtri

from sbi_phys.priors import Observable
from simulators.auger import AugerData
from simulators.detector import AUGER_SD
from simulators.expectation import ENERGY_SCALE, LG_EDGES

__all__ = ["poisson_interval", "source_figures", "xmax_moments"]

Array = NDArray[np.float64]
Entry = tuple[str, str, str, Figure]

_GROUPS = ("H", "He", "N", "Si", "Fe")
_COLOURS = ("#D55E00", "#E69F00", "#009E73", "#56B4E9", "#0072B2")
_BAND95, _BAND68 = "#DCDCDC", "#AFAFAF"
_MAX_ROWS = 2000
_LEVELS = (2.5, 16.0, 50.0, 84.0, 97.5)


class SourceModel(Protocol):
    """What the figures need of a simulator; `SourceSpectrum` has it."""

    settings: dict[str, Any]
    observables: tuple[Observable, ...]
    data: AugerData

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Draw x (n, k)."""
        ...

    def group_counts(self, theta: Array) -> Array:
        """Expected counts per mass group and energy bin (n, 5, 15)."""
        ...

    def pure_groups(self, theta: Array) -> tuple[Array, Array]:
        """Mean lg(E/eV) (9,) and the shape of the Xmax histograms (5, 9, n_bins) of pure mass groups."""
        ...


def poisson_interval(counts: Array) -> tuple[Array, Array]:
    """Central 68.3 % interval of a Poisson mean given counts (k,) -> low (k,), high (k,) (Garwood 1936)."""
    tail = 0.5 * (1 - 0.6827)
    low = np.where(counts > 0, 0.5 * chdtri(2 * np.maximum(counts, 1), 1 - tail), 0.0)
    return low, 0.5 * chdtri(2 * (counts + 1), tail)


def xmax_moments(counts: Array, edges: Array) -> tuple[Array, Array, Array, Array]:
    """Mean and standard deviation of histograms (..., n_bins), g/cm2, and the statistical error of each -> four (...)."""
    centres = 0.5 * (edges[1:] + edges[:-1])
    n = np.maximum(counts.sum(axis=-1), 1)
    mean = (counts * centres).sum(axis=-1) / n
    away = centres - mean[..., None]
    second = (counts * away**2).sum(axis=-1) / n
    fourth = (counts * away**4).sum(axis=-1) / n
    sd = np.sqrt(second)
    sd_error = np.sqrt(np.maximum(fourth - second**2, 0) / n) / (2 * np.maximum(sd, 1e-9))
    return mean, sd, sd / np.sqrt(n), sd_error


def source_figures(simulator: SourceModel, theta: Array, x_obs: Array, *, seed: int) -> list[Entry]:
    """All figures of the simulator: (name, title, caption, figure). See `SourceSpectrum.figures`."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    rows = theta if theta.shape[0] <= _MAX_ROWS else theta[rng.choice(theta.shape[0], _MAX_ROWS, replace=False)]
    replicas = simulator.simulate(rows, rng)
    figures = [_spectrum(simulator, rows, replicas, x_obs)]
    if len(simulator.observables) > 1:
        figures += [_moments(simulator, rows, replicas, x_obs), _histograms(simulator, replicas, x_obs)]
    return figures


def _steps(ax: Axes, edges: Array, low: Array, high: Array, colour: str) -> None:
    ax.fill_between(edges, np.append(low, low[-1]), np.append(high, high[-1]), step="post", color=colour, linewidth=0)


def _spectrum(simulator: SourceModel, theta: Array, replicas: Array, x_obs: Array) -> Entry:
    k = LG_EDGES.size - 1
    centres = 0.5 * (LG_EDGES[1:] + LG_EDGES[:-1])
    scale = 10.0 ** (3 * centres) / (AUGER_SD.exposure * np.diff(10.0**LG_EDGES)) / 1e37
    band = np.percentile(replicas[:, :k], _LEVELS, axis=0)
    observed = x_obs[:k]
    low, high = poisson_interval(observed)
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    floor = scale[-1] * 0.4
    _steps(top, LG_EDGES, np.maximum(band[0] * scale, floor / 10), np.maximum(band[4] * scale, floor / 10), _BAND95)
    _steps(top, LG_EDGES, np.maximum(band[1] * scale, floor / 10), np.maximum(band[3] * scale, floor / 10), _BAND68)
    groups = np.median(simulator.group_counts(theta), axis=0) * scale
    for name, colour, style, curve in zip(_GROUPS, _COLOURS, ("-", "--", "-.", ":", (0, (5, 1))), groups, strict=True):
        if (curve > floor).any():
            top.plot(centres, np.maximum(curve, 1e-6 * floor), color=colour, linestyle=style, linewidth=1.6, label=f"{name} at Earth")
    seen = observed > 0
    errors = np.stack([observed - low, high - observed])[:, seen] * scale[seen]
    top.errorbar(centres[seen], (observed * scale)[seen], errors, fmt="o", color="black", markersize=4, linewidth=1.2, zorder=5)
    top.set_yscale("log")
    top.set_ylim(floor, 8 * np.max(observed * scale))
    top.set_ylabel(r"$E^3\,J(E)$  [$10^{37}$ eV$^2$ km$^{-2}$ sr$^{-1}$ yr$^{-1}$]")
    _energy_arrow(top, 20.03, float(0.45 * np.max(observed * scale)))
    handles, labels = top.get_legend_handles_labels()
    handles = [Line2D([], [], marker="o", color="black", markersize=4), Patch(color=_BAND68), Patch(color=_BAND95), *handles]
    names = ["data (raw counts)", "68 % predictive", "95 % predictive", *labels]
    top.legend(handles, names, ncols=3, fontsize="small", frameon=False, loc="upper left")
    mean, sd = replicas[:, :k].mean(axis=0), replicas[:, :k].std(axis=0)
    pull = (observed - mean) / np.maximum(sd, 1e-9)
    bottom.axhspan(-2, 2, color=_BAND95, linewidth=0)
    bottom.axhspan(-1, 1, color=_BAND68, linewidth=0)
    bottom.axhline(0, color="white", linewidth=0.8)
    bottom.plot(centres, pull, "o", color="black", markersize=4)
    limit = max(3.2, 1.15 * float(np.abs(pull).max()))
    bottom.set(ylim=(-limit, limit), ylabel="pull [sd]", xlabel=r"$\lg(E/\mathrm{eV})$", xlim=(LG_EDGES[0], LG_EDGES[-1]))
    figure.align_ylabels()
    caption = (
        "Flux times E³ against energy, as measured: raw counts over exposure and bin width, not unfolded, with central 68 % Poisson "
        "intervals, against spectra folded with the energy resolution. Bands: posterior-predictive counts per bin, sampling noise "
        "included. Curves: median contribution of each mass group at Earth. The arrow is the shift by the energy-scale "
        "systematic, ±14 %, which moves a point along the diagonal. Below: (observed − mean) / standard deviation of the predictive counts."
    )
    return "spectrum", "Energy spectrum and its posterior prediction", caption, figure


def _energy_arrow(ax: Axes, lg_energy: float, y: float) -> None:
    """E -> s E at fixed counts moves E^3 J by s^2."""
    s = 10.0**ENERGY_SCALE
    ends = ((lg_energy - ENERGY_SCALE, y / s**2), (lg_energy + ENERGY_SCALE, y * s**2))
    ax.annotate(
        "", xy=ends[1], xytext=ends[0], arrowprops={"arrowstyle": "<->", "color": "black", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    )
    ax.text(lg_energy, y * 1.9, "energy scale ±14 %", ha="center", va="bottom", fontsize="small")


def _moments(simulator: SourceModel, theta: Array, replicas: Array, x_obs: Array) -> Entry:
    edges = np.array(simulator.observables[1].edges)
    start, size = LG_EDGES.size - 1, edges.size - 1
    mean, sd, mean_error, sd_error = xmax_moments(x_obs[start:].reshape(9, size), edges)
    mean_rep, sd_rep, _, _ = xmax_moments(replicas[:, start:].reshape(-1, 9, size), edges)
    lg_edges = np.append(LG_EDGES[:9], 20.0)
    centres, pure = simulator.pure_groups(theta)
    mean_pure, sd_pure, _, _ = xmax_moments(pure, edges)
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    panels = (
        (mean, mean_error, mean_rep, mean_pure, r"$\langle X_\mathrm{max}\rangle$"),
        (sd, sd_error, sd_rep, sd_pure, r"$\sigma(X_\mathrm{max})$"),
    )
    for ax, (value, error, replica, lines, label) in zip(axes, panels, strict=True):
        band = np.percentile(replica, _LEVELS, axis=0)
        _steps(ax, lg_edges, band[0], band[4], _BAND95)
        _steps(ax, lg_edges, band[1], band[3], _BAND68)
        for g in (0, 1, 2, 4):
            ax.plot(centres, lines[g], color=_COLOURS[g], linewidth=1.6)
            ax.annotate(
                _GROUPS[g].replace("H", "p", 1) if g == 0 else _GROUPS[g],
                (centres[-1], lines[g, -1]),
                xytext=(5, 0),
                textcoords="offset points",
                color=_COLOURS[g],
                va="center",
                fontweight="bold",
            )
        spread = np.stack([centres - lg_edges[:-1], lg_edges[1:] - centres])
        ax.errorbar(centres, value, error, spread, fmt="o", color="black", markersize=4, linewidth=1.2, zorder=5)
        ax.set(xlabel=r"$\lg(E/\mathrm{eV})$", ylabel=f"{label}  [g/cm$^2$]", xlim=(18.66, 20.04))
    _scale_arrow(axes[0], 19.87, float(mean_pure[4, 0]), simulator.data.systematics[-1])
    handles = [Line2D([], [], marker="o", color="black", markersize=4), Patch(color=_BAND68), Patch(color=_BAND95)]
    axes[0].legend(handles, ["data", "68 % predictive", "95 % predictive"], fontsize="small", frameon=False, loc="upper left")
    model = simulator.settings["hadronic_model"]
    caption = (
        f"Mean and standard deviation of the measured Xmax against energy. Points: data with statistical errors, at the mean energy of "
        f"the bin. Bands: posterior prediction, sampling noise included. Lines: pure proton, helium, nitrogen and iron in {model}, at "
        "the nominal Xmax scale; the arrow is the range of its systematic error (last bin), by which points and bands may move together. "
        "Points, bands and lines all include acceptance, resolution and the range of the histograms, so they compare with each other "
        "and not with moments that are corrected for the detector."
    )
    return "xmax_moments", "Mean and spread of the depth of shower maximum", caption, figure


def _scale_arrow(ax: Axes, lg_energy: float, y: float, systematics: Array) -> None:
    up, low = systematics
    ax.annotate(
        "",
        xy=(lg_energy, y + up + low),
        xytext=(lg_energy, y),
        arrowprops={"arrowstyle": "<->", "color": "black", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0},
    )
    ax.text(20.02, y + up + low + 2, f"scale +{up:.0f} −{low:.0f} g/cm$^2$", ha="right", va="bottom", fontsize="small")


def _histograms(simulator: SourceModel, replicas: Array, x_obs: Array) -> Entry:
    edges = np.array(simulator.observables[1].edges)
    start, size = LG_EDGES.size - 1, edges.size - 1
    observed = x_obs[start:].reshape(9, size)
    bands = np.percentile(replicas[:, start:].reshape(-1, 9, size), _LEVELS, axis=0)
    centres = 0.5 * (edges[1:] + edges[:-1])
    lg_edges = np.append(LG_EDGES[:9], 20.0)
    figure = Figure(figsize=(9.6, 7.4), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True)
    for i, ax in enumerate(axes.ravel()):
        _steps(ax, edges, bands[0, i], bands[4, i], _BAND95)
        _steps(ax, edges, bands[1, i], bands[3, i], _BAND68)
        low, high = poisson_interval(observed[i])
        seen = observed[i] > 0
        errors = np.stack([observed[i] - low, high - observed[i]])[:, seen]
        ax.errorbar(centres[seen], observed[i][seen], errors, fmt="o", color="black", markersize=3, linewidth=1.0)
        text = f"{lg_edges[i]:.1f} < lg(E/eV) < {lg_edges[i + 1]:.1f}\n{observed[i].sum():.0f} events"
        ax.text(0.97, 0.95, text, transform=ax.transAxes, ha="right", va="top", fontsize="small")
        ax.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.3 * max(float(high.max()), float(bands[4, i].max()))))
        ax.xaxis.set_major_locator(_locator(edges))
    figure.supxlabel(r"$X_\mathrm{max}$  [g/cm$^2$]", fontsize="medium")
    figure.supylabel(r"events per 20 g/cm$^2$", fontsize="medium")
    handles = [Line2D([], [], marker="o", color="black", markersize=3), Patch(color=_BAND68), Patch(color=_BAND95)]
    figure.legend(
        handles, ["data", "68 % predictive", "95 % predictive"], ncols=3, loc="outside upper center", frameon=False, fontsize="small"
    )
    caption = (
        "Measured Xmax distributions in nine energy bins, with central 68 % Poisson intervals (bins without events carry no point), and "
        "posterior-predictive bands, sampling noise included. The first and the last bin take all events beyond them."
    )
    return "xmax_histograms", "Distributions of the depth of shower maximum", caption, figure


def _locator(edges: Array) -> MultipleLocator:
    return MultipleLocator(100 if edges[-1] - edges[0] <= 500 else 200)
