"""The corner plot: all one- and two-dimensional marginals of several overlaid sample sets.

The `corner` package is not used: it imports arviz (2 s, and a warning) and pyplot, and it has no smoothing with reflection at the
bounds of the prior that several overlaid sets share.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from sbi_phys.core.checks import as_matrix
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.numbers import MINUS, format_interval
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.plotting.style import COLOURS, MARKERS, house_style, new_figure
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "checked_sets", "corner_figure", "display_ranges", "log_axes", "marginal_density", "mass_levels", "set_scale", "set_value_ticks",
    "smoothed_density", "truth_values",
]  # fmt: skip

_MAX_DRAWS = 60_000  # more draws increase only the time
_LINES: tuple[dict[str, Any], ...] = (
    {"color": COLOURS["flow"], "linestyle": "solid", "linewidth": 1.0},
    {"color": COLOURS["reference"], "linestyle": "solid", "linewidth": 1.1},
    {"color": COLOURS["amortised"], "linestyle": (0, (3.5, 2.0)), "linewidth": 0.9},
    {"color": COLOURS["grey"], "linestyle": "dotted", "linewidth": 0.9},
)


def corner_figure(
    samples: Mapping[str, ArrayLike],
    parameters: Sequence[Parameter],
    truth: ArrayLike | Mapping[str, float] | None = None,
    published: Sequence[Mapping[str, Any]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    *,
    log: Sequence[str] = (),
) -> "Figure":
    """Corner plot of up to four sample sets {label: (n, d)}, in the parameters' units.

    The first set has filled 68 and 95 % regions of highest density, the second black lines (intended for exact MCMC), the third thin
    dashed lines (intended for the amortised posterior). `truth` is marked by dashed lines, `published` fits (dicts with label, source,
    theta) by markers; a value outside a panel is an arrow at the edge of the histogram of its column. `ranges` sets axis limits by
    parameter name; the others show the central 99.8 % of the draws within the prior. `log` names the parameters on a logarithmic axis;
    their densities are those of the logarithm.
    Raises: ShapeError, NonFiniteError, DataError, SettingError.
    >>> import numpy as np
    >>> from sbi_phys.plotting import corner_figure
    >>> from sbi_phys.priors import Parameter
    >>> parameters = [Parameter("mass", 0, 10), Parameter("rate", 0, 10)]
    >>> draws = np.random.default_rng(0).uniform(2, 8, (500, 2))
    >>> len(corner_figure({"posterior": draws}, parameters, truth={"mass": 5.0}).axes)
    3

    Read: filled regions that agree with the black lines: the first posterior is accurate; larger filled regions: it is underconfident.
    """
    sets = checked_sets(samples, parameters)
    if len(sets) > len(_LINES):
        raise SettingError(f"samples has {len(sets)} sets; expected at most {len(_LINES)} for one corner plot")
    scales = log_axes(sets, parameters, log)
    limits = display_ranges(sets, parameters, ranges, log=log)
    fits, marks = list(published or []), truth_values(truth, parameters)
    d = len(parameters)
    with house_style():
        side = max(1.3, 2.3 - 0.16 * d)
        height, extra = side * d + 1.15, 2.2 if d == 1 else 0.0  # without an empty triangle the legend is beside the panel
        width = height + extra
        fig = new_figure(width, height, constrained=False)
        grid = fig.subplots(d, d, squeeze=False)
        fig.subplots_adjust(
            left=0.8 / width, bottom=0.8 / height, right=1 - (0.28 + extra) / width, top=1 - 0.35 / height, wspace=0.06, hspace=0.06
        )
        small = 8.5
        for i in range(d):
            for j in range(d):
                ax = grid[i, j]
                if j > i:
                    ax.remove()
                    continue
                if i == j:
                    _diagonal(ax, sets, i, limits[i], marks, small, log=scales[i])
                else:
                    _panel(ax, sets, (j, i), (limits[j], limits[i]), marks, log=(scales[j], scales[i]))
                _mark_fits(ax, fits, parameters, (j, i), (limits[j], limits[i]))
                _set_ticks(ax, (i, j, d), parameters, small, side, scales)
        _legend(fig, grid, sets, fits, marks, d)
    return fig


def checked_sets(samples: Mapping[str, ArrayLike], parameters: Sequence[Parameter]) -> dict[str, Array]:
    """Sample sets as float64 (n, d) with at least 10 rows each, thinned evenly to at most 60 000 rows."""
    if not samples:
        raise DataError("samples is empty; expected {label: (n, d)} with at least one set")
    names = [p.name for p in parameters]
    out = {}
    for label, value in samples.items():
        theta = as_matrix(f"samples[{label!r}]", value, len(names), names)
        if theta.shape[0] < 10:
            raise DataError(f"samples[{label!r}] has {theta.shape[0]} rows; expected at least 10 for a figure")
        out[str(label)] = theta[:: max(1, math.ceil(theta.shape[0] / _MAX_DRAWS))]
    return out


def log_axes(sets: Mapping[str, Array], parameters: Sequence[Parameter], log: Sequence[str]) -> list[bool]:
    """Whether each parameter is on a logarithmic axis.   Raises: SettingError (unknown name), DataError (draws that are not positive)."""
    unknown = set(log) - {p.name for p in parameters}
    if unknown:
        raise SettingError(f"log has unknown parameters {sorted(unknown)}; expected some of {[p.name for p in parameters]}")
    for k, p in enumerate(parameters):
        lowest = min(float(theta[:, k].min()) for theta in sets.values())
        if p.name in log and lowest <= 0:
            raise DataError(f"draws of {p.name} are as low as {lowest:g}; expected values > 0 on a logarithmic axis")
    return [p.name in log for p in parameters]


def set_scale(ax: "Axes", x: bool, y: bool = False) -> None:
    """Make the axes logarithmic where asked."""
    if x:
        ax.set_xscale("log")
    if y:
        ax.set_yscale("log")


def set_value_ticks(axis: Any, n: int, log: bool, prune: Any = "both") -> None:
    """About n major ticks; a logarithmic axis of less than a decade and a half has plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if not log:
        axis.set_major_locator(MaxNLocator(n, prune=prune))
        return
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < 30 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 3 * low else MaxNLocator(n, prune=prune))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
        return
    axis.set_major_locator(LogLocator(numticks=n + 1))
    axis.set_major_formatter(LogFormatterSciNotation())


def display_ranges(
    sets: Mapping[str, Array],
    parameters: Sequence[Parameter],
    ranges: Mapping[str, tuple[float, float]] | None = None,
    *,
    log: Sequence[str] = (),
) -> list[tuple[float, float]]:
    """Axis limits: the union of the central 99.8 % intervals of the sets, widened by 6 %, within the range of the parameter."""
    unknown = set(ranges or {}) - {p.name for p in parameters}
    if unknown:
        raise SettingError(f"ranges has unknown parameters {sorted(unknown)}; expected some of {[p.name for p in parameters]}")
    out = []
    for k, p in enumerate(parameters):
        if ranges and p.name in ranges:
            low, high = (float(v) for v in ranges[p.name])
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise SettingError(f"ranges[{p.name!r}] is {ranges[p.name]}; expected finite low < high")
        else:
            ends = np.array([np.quantile(theta[:, k], [0.001, 0.999]) for theta in sets.values()])
            low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
            if p.name in log:
                factor = (high / low) ** 0.06 if high > low else 1.01
                bottom, top = max(p.low, low / factor), min(p.high, high * factor)
                out.append((bottom, top) if 0 < bottom < top else (low / factor, high * factor))
                continue
            pad = 0.06 * (high - low) or 0.01 * max(1.0, abs(high))
            low, high = max(p.low, low - pad), min(p.high, high + pad)
            if not low < high:  # all draws on a bound of the prior
                low, high = low - pad, high + pad
        out.append((low, high))
    return out


def mass_levels(density: ArrayLike, masses: Sequence[float]) -> list[float]:
    """Density levels whose superlevel sets contain the given masses, strictly ascending, for contour plots.

    Args: density (a, b) >= 0 on a regular grid; masses in (0, 1), e.g. (0.68, 0.95).   Returns: one level per mass.
    """
    flat = np.sort(np.asarray(density, dtype=np.float64).ravel())[::-1]
    mass = np.cumsum(flat)
    levels = sorted(float(flat[min(int(np.searchsorted(mass, m * mass[-1])), flat.size - 1)]) for m in masses)
    for k in range(1, len(levels)):  # contour plots need strictly ascending levels, also for degenerate samples
        levels[k] = max(levels[k], np.nextafter(levels[k - 1], np.inf))
    return levels


def truth_values(truth: ArrayLike | Mapping[str, float] | None, parameters: Sequence[Parameter]) -> list[float | None]:
    """The true value of each parameter, None where unknown."""
    if truth is None:
        return [None] * len(parameters)
    if isinstance(truth, Mapping):
        return [float(truth[p.name]) if p.name in truth else None for p in parameters]
    values = np.asarray(truth, dtype=np.float64)
    if values.shape != (len(parameters),):
        raise ShapeError(f"truth has shape {values.shape}; expected ({len(parameters)},) = {tuple(p.name for p in parameters)}")
    return [float(v) for v in values]


def _smooth_width(n: int, bins: int) -> float:
    # kernel width in bins with Scott's exponent for two dimensions: 1 of 40 bins for 20 000 draws
    return float(np.clip(bins / 40 * (20_000 / n) ** (1 / 6), 0.8, 4.0))


def smoothed_density(
    theta: Array, limits: tuple[tuple[float, float], tuple[float, float]], bins: int, log: tuple[bool, bool] = (False, False)
) -> tuple[Array, Array, Array]:
    """Smoothed histogram with its grid -> x (b,), y (b,), density (b, b) with first axis y; reflected at the limits to conserve mass.

    `log`: axes on which the density is that of the logarithm, and the grid equidistant in it.
    """
    (a, b), spans = theta.T, [np.log10(ends) if flag else np.array(ends) for ends, flag in zip(limits, log, strict=True)]
    a, b = np.log10(a) if log[0] else a, np.log10(b) if log[1] else b
    counts, x_edges, y_edges = np.histogram2d(a, b, bins=bins, range=[tuple(span) for span in spans])
    smooth = gaussian_filter(counts, _smooth_width(theta.shape[0], bins), mode="reflect")
    # add rows and columns at the limits, so that contours extend to the edge of the panel, not to the outermost bin centres
    padded = np.pad(smooth.T, 1, mode="edge")
    x, y = (np.concatenate([[e[0]], 0.5 * (e[1:] + e[:-1]), [e[-1]]]) for e in (x_edges, y_edges))
    return 10.0**x if log[0] else x, 10.0**y if log[1] else y, padded


def _panel(
    ax: "Axes",
    sets: Mapping[str, Array],
    pair: tuple[int, int],
    limits: tuple[tuple[float, float], tuple[float, float]],
    truth: Sequence[float | None],
    *,
    log: tuple[bool, bool],
) -> None:
    """Draw the 68 and 95 % regions of highest density of each set for one pair of parameters."""
    from matplotlib.colors import to_rgba

    set_scale(ax, *log)
    for k, theta in enumerate(sets.values()):
        x, y, density = smoothed_density(theta[:, list(pair)], limits, bins=44, log=log)
        low, high = mass_levels(density[1:-1, 1:-1], (0.95, 0.68))
        if k == 0:
            shades = [to_rgba(COLOURS["flow"], 0.28), to_rgba(COLOURS["flow"], 0.62)]
            top = max(float(density.max()), high) * 1.001
            ax.contourf(x, y, density, levels=[low, np.nextafter(high, np.inf), np.nextafter(top, np.inf)], colors=shades, antialiased=True)
        else:
            style = _LINES[k]
            ax.contour(
                x, y, density, levels=[low, high], colors=[style["color"]], linestyles=[style["linestyle"]], linewidths=style["linewidth"]
            )
    for value, line in ((truth[pair[0]], ax.axvline), (truth[pair[1]], ax.axhline)):
        if value is not None:
            line(value, color=COLOURS["truth"], linewidth=1.0, linestyle=(0, (5, 1.5)))
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])


def _diagonal(
    ax: "Axes",
    sets: Mapping[str, Array],
    k: int,
    limits: tuple[float, float],
    truth: Sequence[float | None],
    size: float,
    *,
    log: bool,
) -> None:
    """Draw the one-dimensional marginals of one parameter; the title has the median and 68 % interval of the first set."""
    set_scale(ax, log)
    top = 0.0
    for index, theta in enumerate(sets.values()):
        centres, density = marginal_density(theta[:, k], limits, log=log)
        top = max(top, float(density.max()))
        if index == 0:
            ax.fill_between(centres, density, color=COLOURS["flow"], alpha=0.35, linewidth=0)
        ax.plot(centres, density, **_LINES[index])
    value = truth[k]
    if value is not None:
        ax.axvline(value, color=COLOURS["truth"], linewidth=1.0, linestyle=(0, (5, 1.5)))
    ax.set_xlim(limits)
    ax.set_ylim(0, 1.22 * top if top > 0 else 1.0)
    low, median, high = np.quantile(next(iter(sets.values()))[:, k], [0.16, 0.5, 0.84])
    central, plus, minus = format_interval(median, low, high).replace(MINUS, "-").split(" ")
    ax.set_title(f"${central}^{{{plus}}}_{{{minus}}}$", fontsize=size + 1, pad=4)


def marginal_density(values: Array, limits: tuple[float, float], bins: int = 60, *, log: bool = False) -> tuple[Array, Array]:
    """Smoothed density of one marginal within the limits -> grid (b,), density (b,) per unit, or per decade; reflected at the limits."""
    if log:
        grid, density = marginal_density(np.log10(values), (math.log10(limits[0]), math.log10(limits[1])), bins)
        return 10.0**grid, density
    counts, edges = np.histogram(values, bins=bins, range=limits)
    width = float(np.clip(bins / 60 * 1.5 * (20_000 / values.size) ** 0.2, 0.8, 5.0))
    smooth = gaussian_filter1d(counts.astype(np.float64), width, mode="reflect")
    smooth /= values.size * (edges[1] - edges[0])
    grid = np.concatenate([[edges[0]], 0.5 * (edges[1:] + edges[:-1]), [edges[-1]]])
    return grid, np.pad(smooth, 1, mode="edge")


def _mark_fits(
    ax: "Axes",
    fits: Sequence[Mapping[str, Any]],
    parameters: Sequence[Parameter],
    pair: tuple[int, int],
    limits: tuple[tuple[float, float], tuple[float, float]],
) -> None:
    """Draw published values: markers in the two-dimensional panels, stems on the diagonal, arrows for values outside the limits."""
    for k, fit in enumerate(fits):
        x, y = (fit["theta"].get(parameters[index].name) for index in pair)
        marker, colour = MARKERS[k % len(MARKERS)], COLOURS["published"]
        (left, right), (bottom, top) = limits
        if pair[0] == pair[1]:
            if x is None:
                continue
            height = 0.94 - 0.085 * (k % 6)
            if left <= x <= right:
                across = ax.get_xaxis_transform()
                ax.plot([x, x], [0, height], color=colour, linewidth=0.6, alpha=0.6, transform=across, zorder=1)
                ax.plot(
                    [x],
                    [height],
                    marker,
                    color=colour,
                    markersize=7 if marker == "*" else 4.5,
                    mew=0,
                    transform=across,
                    clip_on=False,
                    zorder=5,
                )
            else:
                side, head = (0.035, "<") if x < left else (0.965, ">")
                ax.plot([side], [height], head, color=colour, markersize=4, mew=0, transform=ax.transAxes, zorder=5)
        elif x is not None and y is not None and left <= x <= right and bottom <= y <= top:
            size = 10.5 if marker == "*" else 6.5
            ax.plot([x], [y], marker, color=colour, markersize=size, mec="white", mew=0.5, clip_on=False, zorder=5)


def _set_ticks(
    ax: "Axes", place: tuple[int, int, int], parameters: Sequence[Parameter], size: float, side: float, scales: Sequence[bool]
) -> None:
    """Set ticks and labels of the panel in row i and column j of d; `side` is the size of a panel in inches."""
    from matplotlib.ticker import NullLocator

    i, j, d = place
    set_value_ticks(ax.xaxis, 3, scales[j])
    if i == j:
        ax.yaxis.set_major_locator(NullLocator())
    else:
        set_value_ticks(ax.yaxis, 3, scales[i])
    ax.tick_params(labelsize=size, length=2.5, labelbottom=i == d - 1, labelleft=j == 0 and i > 0)
    if i == d - 1:
        ax.tick_params(axis="x", labelrotation=40)
        ax.set_xlabel(parameters[j].label, fontsize=size + 2)
        ax.xaxis.set_label_coords(0.5, -0.46 / side)
    if j == 0 and i > 0:
        ax.tick_params(axis="y", labelrotation=40)
        ax.set_ylabel(parameters[i].label, fontsize=size + 2)
        ax.yaxis.set_label_coords(-0.5 / side, 0.5)


def _legend(
    fig: "Figure", grid: Any, sets: Mapping[str, Array], fits: Sequence[Mapping[str, Any]], truth: Sequence[float | None], d: int
) -> None:
    """Draw the legend in the empty upper triangle, or beside the panel for one parameter."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for k, label in enumerate(sets):
        if k == 0:
            handles.append(Patch(facecolor=COLOURS["flow"], alpha=0.5, label=f"{label} (68, 95 %)"))
        else:
            handles.append(Line2D([], [], label=label, **_LINES[k]))
    if any(t is not None for t in truth):
        handles.append(Line2D([], [], color=COLOURS["truth"], linestyle=(0, (5, 1.5)), linewidth=1.0, label="truth"))
    for k, fit in enumerate(fits):
        style: dict[str, Any] = {
            "marker": MARKERS[k % len(MARKERS)],
            "color": COLOURS["published"],
            "linestyle": "none",
            "markersize": 7 + 3 * (k % len(MARKERS) == 0),
        }
        handles.append(Line2D([], [], label=str(fit["label"]), **style))
    size = 14.0 if d > 5 else (10.5 if d > 3 else 8.0)
    box = grid[0, 0].get_position()
    if d < 3:
        fig.legend(handles=handles, loc="upper left", bbox_to_anchor=(box.x1 + 0.01, box.y1), fontsize=size, handlelength=2.0)
    else:
        fig.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.985, box.y1), fontsize=size, handlelength=2.2)
