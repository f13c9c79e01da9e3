"""Figures of a posterior, from arrays: marginals, methods and the exact posterior, learned ratios, importance weights, published fits.

Every function returns a matplotlib Figure in the style of the package; `save_figure` writes it to files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sbi_phys.calibration.ratios import Reliability
from sbi_phys.core.checks import as_array, as_real, require_finite, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.plotting.corner import (
    checked_sets,
    display_ranges,
    log_axes,
    marginal_density,
    mass_levels,
    set_scale,
    set_value_ticks,
    smoothed_density,
    truth_values,
)  # fmt: skip
from sbi_phys.plotting.style import COLOURS, MARKERS, house_style, new_figure
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PairRatios",
    "Plottable",
    "comparison_figure",
    "marginals_figure",
    "methods_figure",
    "misfit_figure",
    "panels_figure",
    "ratios_figure",
    "weights_figure",
]

_SET_COLOURS = (COLOURS["flow"], COLOURS["reference"], COLOURS["amortised"], COLOURS["grey"])
_SET_LINES: tuple[Any, ...] = ("solid", "solid", (0, (3.5, 2.0)), "dotted")


class Plottable(Protocol):
    """An object with a method `plot`, such as a calibration result."""

    def plot(self, ax: Any = None) -> Any:
        """Draw into `ax` and return it."""


def marginals_figure(
    samples: Mapping[str, ArrayLike],
    parameters: Sequence[Parameter],
    truth: ArrayLike | Mapping[str, float] | None = None,
    prior: ArrayLike | None = None,
    *,
    log: Sequence[str] = (),
) -> "Figure":
    """One panel a parameter: marginal densities of sample sets {label: (n, d)} with bars of the 68 and 95 % intervals below.

    `prior` (m, d) draws are shown in grey: a posterior equal to the prior means that the data have no information. `log` names the
    parameters on a logarithmic axis; their densities are those of the logarithm.
    Raises: ShapeError, NonFiniteError, DataError.

    >>> import numpy as np
    >>> from sbi_phys.plotting import marginals_figure
    >>> from sbi_phys.priors import Parameter
    >>> parameters = [Parameter("mass", 0, 10), Parameter("rate", 0, 10)]
    >>> draws = np.random.default_rng(0).uniform(2, 8, (500, 2))
    >>> [ax.get_xlabel() for ax in marginals_figure({"posterior": draws}, parameters).axes]
    ['mass', 'rate']
    """
    sets, marks = checked_sets(samples, parameters), truth_values(truth, parameters)
    limits, scales = display_ranges(sets, parameters, log=log), log_axes(sets, parameters, log)
    before = next(iter(checked_sets({"prior": prior}, parameters).values())) if prior is not None else None
    columns = min(3, len(parameters))
    rows = math.ceil(len(parameters) / columns)
    with house_style():
        fig = new_figure(3.1 * columns + 0.1, 2.35 * rows + 0.45)
        fig.get_layout_engine().set(wspace=0.04, hspace=0.03)  # type: ignore[union-attr,call-arg]
        axes = fig.subplots(rows, columns, squeeze=False).ravel()
        for k, p in enumerate(parameters):
            _marginal(axes[k], sets, k, limits[k], marks[k], None if before is None else before[:, k], log=scales[k])
            axes[k].set_xlabel(p.label)
            set_value_ticks(axes[k].xaxis, 5, scales[k])
        for ax in axes[len(parameters) :]:
            ax.remove()
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return fig


def weights_figure(log_weights: ArrayLike, *, pareto_k: float | None = None) -> "Figure":
    """Importance weights: histogram of lg(w / mean w), and the cumulative fraction of the total weight.

    Args: log_weights (n,), natural logarithm, any constant added; -inf for draws outside the support.
    >>> from sbi_phys.plotting import weights_figure
    >>> figure = weights_figure([0.0, 0.0, -1.0, -2.0], pareto_k=0.2)
    >>> figure.axes[1].texts[0].get_text().splitlines()[1]
    'ESS = 3 (72.7 %)'

    Raises: ShapeError, DataError.   Read: with ESS/n near 1 and Pareto k < 0.7 the refined posterior is reliable (arXiv:1507.02646).
    """
    logs = as_array("log_weights", log_weights, (None,), finite=False)
    if not logs.size or np.isnan(logs).any() or np.isposinf(logs).any() or not np.isfinite(logs).any():
        raise DataError(f"log_weights has {logs.size} entries with NaN, +Inf or nothing finite; expected numbers or -Inf, some finite")
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    ess = 1.0 / float(np.sum(weights**2))
    ordered = np.sort(weights)[::-1]
    relative = np.log10(weights[weights > 0] * weights.size)
    with house_style():
        fig = new_figure(7.6, 3.4)
        left, right = fig.subplots(1, 2)
        floor = max(float(relative.min()), -6.0)
        left.hist(np.maximum(relative, floor), bins=60, color=COLOURS["flow"], alpha=0.75)
        left.axvline(0.0, color=COLOURS["reference"], linewidth=1.0, label="mean weight")
        left.set_yscale("log")
        left.set_xlabel(r"$\lg(w / \langle w \rangle)$" + (" (clipped at the left)" if floor > relative.min() else ""))
        left.set_ylabel("draws")
        left.set_ylim(top=4 * left.get_ylim()[1])
        left.legend(loc="upper left")
        share = np.arange(1, ordered.size + 1) / ordered.size
        right.plot(share, np.cumsum(ordered), color=COLOURS["flow"])
        right.plot([0, 1], [0, 1], color=COLOURS["grey"], linestyle="dashed", linewidth=0.9)
        right.set_xlim(0, 1)
        right.set_ylim(0, 1.02)
        right.set_xlabel("fraction of draws, by decreasing weight")
        right.set_ylabel("fraction of total weight")
        note = f"n = {logs.size}\nESS = {ess:.0f} ({100 * ess / logs.size:.1f} %)\nlargest weight: {100 * ordered[0]:.2g} %"
        if pareto_k is not None and math.isfinite(pareto_k):
            note += f"\nPareto k = {pareto_k:.2f} ({'reliable' if pareto_k < 0.7 else 'NOT reliable'})"
        right.text(0.96, 0.06, note, transform=right.transAxes, ha="right", va="bottom", fontsize=9)
    return fig


def comparison_figure(
    samples: Mapping[str, ArrayLike],
    parameters: Sequence[Parameter],
    published: Sequence[Mapping[str, Any]],
    truth: ArrayLike | Mapping[str, float] | None = None,
    *,
    log: Sequence[str] = (),
) -> "Figure":
    """Forest plot: for each parameter the median, 68 and 95 % intervals of sample sets above the published values.

    Args: published, dicts with label, source, theta {name: value}, and, if known, errors {name: (below, above)} >= 0. log: names
    of parameters on a logarithmic axis.
    Raises: ShapeError, NonFiniteError, DataError.

    >>> import numpy as np
    >>> from sbi_phys.plotting import comparison_figure
    >>> from sbi_phys.priors import Parameter
    >>> parameters = [Parameter("mass", 0, 10), Parameter("rate", 0, 10)]
    >>> draws = np.random.default_rng(0).uniform(2, 8, (500, 2))
    >>> fits = [{"label": "fit of 2020", "source": "journal", "theta": {"mass": 5.0}}]
    >>> figure = comparison_figure({"posterior": draws}, parameters, fits)
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['posterior', 'fit of 2020']
    """
    sets, marks = checked_sets(samples, parameters), truth_values(truth, parameters)
    scales, labels = log_axes(sets, parameters, log), [*sets, *(str(fit["label"]) for fit in published)]
    columns = min(3, len(parameters))
    rows = math.ceil(len(parameters) / columns)
    with house_style():
        fig = new_figure(2.9 * columns + 1.6, (0.26 * len(labels) + 0.85) * rows)
        axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
        for k, ax in enumerate(axes.ravel()):
            if k >= len(parameters):
                ax.set_visible(False)
                continue
            set_scale(ax, scales[k])
            _forest(ax, sets, published, parameters[k], k)
            if marks[k] is not None:
                ax.axvline(marks[k], color=COLOURS["truth"], linestyle=(0, (5, 1.5)), linewidth=1.0)
            ax.set_xlabel(parameters[k].label)
            set_value_ticks(ax.xaxis, 5, scales[k])
            ax.set_yticks(range(len(labels)), labels=labels)
            ax.tick_params(axis="y", length=0)
            ax.set_ylim(len(labels) - 0.4, -0.6)
            ax.axhline(len(sets) - 0.5, color=COLOURS["grey"], linewidth=0.6)
    return fig


def misfit_figure(distances: ArrayLike, d_obs: float, *, label: str = "distance to the nearest simulations") -> "Figure":
    """Histogram of distances (n,) of simulations, and the distance d_obs of the observation.

    >>> import numpy as np
    >>> from sbi_phys.plotting import misfit_figure
    >>> figure = misfit_figure(np.linspace(0, 1, 99), 0.95)
    >>> figure.legends[0].get_texts()[1].get_text()
    'observation: 6 % lie further out'

    Raises: ShapeError, NonFiniteError, DataError, SettingError.
    Read: an observation far to the right is outside the training distribution, and its posterior is an extrapolation.
    """
    values, observed = as_array("distances", distances, (None,)), require_number("d_obs", d_obs)
    if values.size < 10:
        raise DataError(f"distances has {values.size} entries; expected at least 10 simulations")
    beyond = (1 + int(np.sum(values >= observed))) / (values.size + 1)
    right_end = max(float(np.quantile(values, 0.998)), observed)
    left_end = min(float(values.min()), observed)
    margin = 0.05 * (right_end - left_end) or 1.0
    with house_style():
        fig = new_figure(6.4, 3.4)
        ax = fig.subplots()
        ax.hist(values, bins=50, range=(left_end, right_end), color=COLOURS["prior"], alpha=0.7, label=f"{values.size} simulations")
        for level in (0.68, 0.95):
            at = float(np.quantile(values, level))
            ax.axvline(at, color=COLOURS["grey"], linewidth=0.9, linestyle="dotted")
            ax.text(at, 0.985, f" {100 * level:.0f} %", transform=ax.get_xaxis_transform(), va="top", fontsize=8, color=COLOURS["grey"])
        ax.axvline(observed, color=COLOURS["amortised"], linewidth=2.0, label=f"observation: {100 * beyond:.2g} % lie further out")
        ax.set_xlim(left_end - margin, right_end + margin)
        ax.set_ylim(0, 1.12 * ax.get_ylim()[1])
        ax.set_xlabel(label)
        ax.set_ylabel("simulations")
        fig.legend(loc="outside upper center", ncols=2)
    return fig


def panels_figure(panels: Mapping[str, Plottable], *, columns: int = 2, width: float = 4.2, height: float = 3.4) -> "Figure":
    """Several results with a method `plot`, e.g. {'SBC ranks': sbc, 'Expected coverage': coverage}, as one figure.

    Raises: DataError.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> ranks = sp.calibration.sbc(np.zeros((50, 1)), np.random.default_rng(0).normal(size=(50, 99, 1)), names=["mass"])
    >>> len(sp.plotting.panels_figure({"ranks": ranks}).axes)
    1
    """
    if not panels:
        raise DataError("panels is empty; expected {title: result with .plot(ax)}")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    with house_style():
        fig = new_figure(width * columns, height * rows)
        axes = fig.subplots(rows, columns, squeeze=False).ravel()
        for ax, (title, result) in zip(axes, panels.items(), strict=False):
            result.plot(ax=ax)
            ax.set_title(title)
        for ax in axes[len(panels) :]:
            ax.remove()
    return fig


def _marginal(
    ax: "Axes", sets: Mapping[str, np.ndarray], k: int, limits: tuple[float, float], truth: float | None, prior: Any, *, log: bool
) -> None:
    """Densities of one marginal, with the intervals below zero."""
    set_scale(ax, log)
    top = 0.0
    if prior is not None:
        grid, density = marginal_density(prior, limits, log=log)
        ax.fill_between(grid, density, color=COLOURS["prior"], alpha=0.3, linewidth=0, label="prior")
    for index, (label, theta) in enumerate(sets.items()):
        grid, density = marginal_density(theta[:, k], limits, log=log)
        top = max(top, float(density.max()))
        colour = _SET_COLOURS[index % len(_SET_COLOURS)]
        ax.plot(grid, density, color=colour, linestyle=_SET_LINES[index % len(_SET_LINES)], label=label)
        if index == 0:
            ax.fill_between(grid, density, color=colour, alpha=0.2, linewidth=0)
    step = 0.075 * top
    for index, theta in enumerate(sets.values()):
        q025, q16, q50, q84, q975 = np.quantile(theta[:, k], [0.025, 0.16, 0.5, 0.84, 0.975])
        colour, y = _SET_COLOURS[index % len(_SET_COLOURS)], -step * (index + 1)
        ax.plot([q025, q975], [y, y], color=colour, linewidth=1.0)
        ax.plot([q16, q84], [y, y], color=colour, linewidth=3.0, solid_capstyle="butt")
        ax.plot([q50], [y], "o", color="white", mec=colour, mew=1.0, markersize=3.8, zorder=4)
    if truth is not None:
        ax.axvline(truth, color=COLOURS["truth"], linestyle=(0, (5, 1.5)), linewidth=1.0, label="truth")
    ax.axhline(0, color=COLOURS["grey"], linewidth=0.6)
    ax.set_xlim(limits)
    ax.set_ylim(-step * (len(sets) + 1), 1.1 * top)
    ax.set_yticks([])


def _forest(ax: "Axes", sets: Mapping[str, np.ndarray], published: Sequence[Mapping[str, Any]], p: Parameter, k: int) -> None:
    """Intervals of the sets, then one marker per published fit."""
    for row, theta in enumerate(sets.values()):
        q025, q16, q50, q84, q975 = np.quantile(theta[:, k], [0.025, 0.16, 0.5, 0.84, 0.975])
        colour = _SET_COLOURS[row % len(_SET_COLOURS)]
        ax.plot([q025, q975], [row, row], color=colour, linewidth=1.2)
        ax.plot([q16, q84], [row, row], color=colour, linewidth=4.0, solid_capstyle="butt")
        ax.plot([q50], [row], "o", color="white", mec=colour, mew=1.2, markersize=5, zorder=4)
        if row == 0:
            ax.axvspan(q16, q84, color=colour, alpha=0.12, linewidth=0)
    for index, fit in enumerate(published):
        if p.name not in fit["theta"]:
            continue
        value, row = float(fit["theta"][p.name]), len(sets) + index
        error = as_real("errors", (fit.get("errors") or {}).get(p.name, (0.0, 0.0)))
        require_finite("errors", error)
        if error.any():
            ax.errorbar([value], [row], xerr=error.reshape(2, 1), color=COLOURS["published"], linewidth=1.2, capsize=2)
        marker = MARKERS[index % len(MARKERS)]
        ax.plot([value], [row], marker, color=COLOURS["published"], markersize=11 if marker == "*" else 6.5, mec="white", mew=0.5)


_METHOD_LINES: tuple[dict[str, Any], ...] = (
    {"color": COLOURS["flow"], "linestyle": "solid"},
    {"color": COLOURS["amortised"], "linestyle": (0, (5.0, 1.6))},
    {"color": COLOURS["truth"], "linestyle": (0, (4.0, 1.4, 1.0, 1.4))},
    {"color": COLOURS["published"], "linestyle": (0, (1.4, 1.2))},
)
_SHADES = ("#E2E2E2", "#B5B5B5")
_MOST_AWAY = 0.5  # fraction of draws outside the axes above which a method has no contours


def methods_figure(
    samples: Mapping[str, ArrayLike],
    parameters: Sequence[Parameter],
    exact: tuple[str, ArrayLike] | None = None,
    *,
    shown: tuple[int, int] = (0, 1),
    truth: ArrayLike | Mapping[str, float] | None = None,
    log: Sequence[str] = (),
) -> "Figure":
    """Regions of 68 and 95 % of two parameters by up to four methods {label: (n, d)}, over the exact ones in grey, with both marginals.

    Args: exact: its label and draws (n, d). shown: columns of theta; one parameter has a marginal alone. truth: marked by a cross.
    log: names of parameters on a logarithmic axis.
    The axes are limited to the surroundings of the exact draws; the legend has the fraction of draws outside. A method with most of its
    draws outside has no contours.
    Raises: ShapeError, NonFiniteError, DataError, SettingError.   Read: contours that agree with the grey regions: the method is accurate.

    >>> import numpy as np
    >>> from sbi_phys.plotting import methods_figure
    >>> from sbi_phys.priors import Parameter
    >>> parameters = [Parameter("mass", 0, 10), Parameter("rate", 0, 10)]
    >>> draws = np.random.default_rng(0).uniform(2, 8, (500, 2))
    >>> methods_figure({"NPE": draws}, parameters, ("exact", draws)).axes[0].get_xlabel()
    'mass'
    """
    if len(samples) > len(_METHOD_LINES):
        raise SettingError(f"samples has {len(samples)} sets; expected at most {len(_METHOD_LINES)}")
    sets = checked_sets({**({exact[0]: exact[1]} if exact else {}), **samples}, parameters)
    limits, marks = _view(sets, parameters, exact is not None, log), truth_values(truth, parameters)
    scales = log_axes(sets, parameters, log)
    lines = ([None] if exact else []) + list(_METHOD_LINES[: len(samples)])
    with house_style():
        if len(parameters) == 1:
            fig = new_figure(5.6, 3.6)
            ax = fig.subplots()
            _method_marginal(ax, sets, lines, 0, limits[0], marks[0], log=scales[0])
            ax.set(xlabel=parameters[0].label, yticks=[], ylabel="density")
            _legend(ax, _labels(sets, limits, (0,)), lines, marks[0] is not None, loc="best")
            return fig
        i, j = shown
        fig = new_figure(6.4, 5.6)
        grid = fig.add_gridspec(2, 2, width_ratios=[3.2, 1.25], height_ratios=[1.25, 3.2])
        ax = fig.add_subplot(grid[1, 0])
        top, right, corner = fig.add_subplot(grid[0, 0], sharex=ax), fig.add_subplot(grid[1, 1], sharey=ax), fig.add_subplot(grid[0, 1])
        _plane(ax, sets, lines, (i, j), (limits[i], limits[j]), (marks[i], marks[j]), (scales[i], scales[j]))
        ax.set(xlabel=parameters[i].label, ylabel=parameters[j].label)
        _method_marginal(top, sets, lines, i, limits[i], marks[i], log=scales[i])
        _method_marginal(right, sets, lines, j, limits[j], marks[j], upright=True, log=scales[j])
        for axis, flag in ((ax.xaxis, scales[i]), (ax.yaxis, scales[j])):
            if flag:
                set_value_ticks(axis, 4, flag)
        top.tick_params(labelbottom=False)
        right.tick_params(labelleft=False)
        top.set_yticks([])
        right.set_xticks([])
        corner.axis("off")
        _legend(corner, _labels(sets, limits, (i, j)), lines, marks[i] is not None, loc="center left")
    return fig


def _view(sets: Mapping[str, Array], parameters: Sequence[Parameter], around_first: bool, log: Sequence[str]) -> list[tuple[float, float]]:
    """Axis limits of all sets, within one width of those of the first set, so that a distant mode does not dominate the range."""
    limits = display_ranges(sets, parameters, log=log)
    if not around_first:
        return limits
    first = display_ranges(dict([next(iter(sets.items()))]), parameters, log=log)
    wider = [
        (low * low / high, high * high / low) if p.name in log else (low - (high - low), high + (high - low))
        for p, (low, high) in zip(parameters, first, strict=True)
    ]
    near = [(max(a, low), min(b, high)) for (a, b), (low, high) in zip(limits, wider, strict=True)]
    every = range(len(parameters))
    others = list(sets.values())[1:]
    return limits if others and all(_away(theta, near, every) > _MOST_AWAY for theta in others) else near  # all other sets are outside


def _away(theta: Array, limits: Sequence[tuple[float, float]], shown: Sequence[int]) -> float:
    """Fraction of the draws outside the limits."""
    return float(np.any([(theta[:, k] < limits[k][0]) | (theta[:, k] > limits[k][1]) for k in shown], axis=0).mean())


def _labels(sets: Mapping[str, Array], limits: Sequence[tuple[float, float]], shown: Sequence[int]) -> list[str]:
    """Labels with the fraction of draws outside the axes, if it is at least one per cent."""
    out = []
    for label, theta in sets.items():
        away = _away(theta, limits, shown)
        out.append(label if away < 0.01 else f"{label}\n({100 * away:.0f} % outside the axes)")
    return out


def _plane(
    ax: "Axes", sets: Mapping[str, Array], lines: Sequence[Any], pair: tuple[int, int], limits: Any, marks: Any, log: tuple[bool, bool]
) -> None:
    set_scale(ax, *log)
    for theta, line in zip(sets.values(), lines, strict=True):
        if _away(theta[:, list(pair)], limits, (0, 1)) > _MOST_AWAY:
            continue
        x, y, density = smoothed_density(theta[:, list(pair)], limits, bins=44, log=log)
        low, high = mass_levels(density[1:-1, 1:-1], (0.95, 0.68))
        if line is None:
            ax.contourf(x, y, density, levels=[low, high, max(float(density.max()), high) * 1.001], colors=list(_SHADES))
        else:
            ax.contour(x, y, density, levels=[low, high], colors=[line["color"]], linestyles=[line["linestyle"]], linewidths=1.4)
    if marks[0] is not None and marks[1] is not None:
        ax.plot(*marks, "+", color="black", markersize=10, markeredgewidth=1.4)
    ax.set(xlim=limits[0], ylim=limits[1])


def _method_marginal(
    ax: "Axes",
    sets: Mapping[str, Array],
    lines: Sequence[Any],
    k: int,
    limits: tuple[float, float],
    mark: float | None,
    *,
    log: bool,
    upright: bool = False,
) -> None:
    set_scale(ax, log and not upright, log and upright)
    highest = 0.0
    for theta, line in zip(sets.values(), lines, strict=True):
        if _away(theta[:, [k]], [limits], (0,)) > _MOST_AWAY:
            continue
        x, density = marginal_density(theta[:, k], limits, log=log)
        highest = max(highest, float(density.max()))
        if line is None:
            (ax.fill_betweenx if upright else ax.fill_between)(x, density, color=_SHADES[1], linewidth=0)
        else:
            ax.plot(*((density, x) if upright else (x, density)), **line, linewidth=1.4)
    if mark is not None:
        (ax.axhline if upright else ax.axvline)(mark, color="black", linewidth=0.9, linestyle="dotted")
    (ax.set_xlim if upright else ax.set_ylim)(0, 1.08 * highest if highest > 0 else 1)
    (ax.set_ylim if upright else ax.set_xlim)(limits)


def _legend(ax: "Axes", labels: Sequence[str], lines: Sequence[Any], marked: bool, loc: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=_SHADES[1], label=label) if line is None else Line2D([], [], label=label, linewidth=1.4, **line)
        for label, line in zip(labels, lines, strict=True)
    ]
    if marked:
        handles.append(Line2D([], [], color="black", marker="+", linestyle="none", markersize=9, label="truth"))
    ax.legend(handles=handles, loc=loc, fontsize=8.5, borderaxespad=0.2)


@dataclass(frozen=True, slots=True, eq=False)
class PairRatios:
    """Exact and learned log ratios, nats, of n joint pairs (n,) and of marginal ones (m,), m may be 0; and their reliability, if known.

    >>> import numpy as np
    >>> from sbi_phys.plotting import PairRatios
    >>> none = np.zeros(0)
    >>> PairRatios(np.array([1.0, 2.0]), np.array([1.5, 2.5]), none, none).rms
    0.5
    """

    exact: Array
    learned: Array
    exact_marginal: Array
    learned_marginal: Array
    reliability: Reliability | None = None

    @property
    def rms(self) -> float:
        """Root mean square of learned - exact over the joint pairs, nats."""
        return float(np.sqrt(np.mean((self.learned - self.exact) ** 2)))


def ratios_figure(found: Mapping[str, PairRatios], *, difference: bool = False) -> "Figure":
    """Learned against exact log ratio, one panel per method, and the reliability curves where available.

    Args: found, {label: PairRatios}. difference: the ratios are between two parameters instead of p(x | theta) / p(x).
    Raises: DataError, ShapeError, NonFiniteError.   Read: an accurate ratio has points on the diagonal and a curve within its band.

    >>> import numpy as np
    >>> from sbi_phys.plotting import PairRatios, ratios_figure
    >>> exact, none = np.linspace(-1, 1, 20), np.zeros(0)
    >>> ratios_figure({"NRE": PairRatios(exact, exact + 0.1, none, none)}).axes[0].get_title()
    'NRE'
    """
    if not found:
        raise DataError("found is empty; expected {label: PairRatios} with at least one method")
    curves = {label: pairs.reliability for label, pairs in found.items() if pairs.reliability is not None}
    with house_style():
        n = len(found) + bool(curves)
        fig = new_figure(4.1 * n, 3.9)
        axes = fig.subplots(1, n, squeeze=False)[0]
        for k, (ax, (label, pairs)) in enumerate(zip(axes, found.items(), strict=False)):
            _scatter(ax, label, pairs, _METHOD_LINES[(k + 1) % len(_METHOD_LINES)]["color"], difference)
        if curves:
            _reliability(axes[-1], curves)
    return fig


def _scatter(ax: "Axes", label: str, pairs: PairRatios, colour: str, difference: bool) -> None:
    exact, learned = (as_array(name, getattr(pairs, name), (None,)) for name in ("exact", "learned"))
    width = max(float(np.ptp(exact)), 1.0)
    # pairs far from the diagonal are shown as arrows at the edge
    margin = float(np.clip(1.5 * np.quantile(np.abs(learned - exact), 0.9), 0.1 * width, 2 * width))
    low, high = float(exact.min()) - margin, float(exact.max()) + margin
    low -= 0.5 * width if pairs.exact_marginal.size else 0.0  # ratios of marginal pairs have no lower bound
    ax.plot([low, high], [low, high], color="black", linewidth=0.8)
    if pairs.exact_marginal.size:
        inside = (pairs.exact_marginal > low) & (pairs.learned_marginal > low)
        words = f"marginal pairs, {int(inside.sum())} of {inside.size} within the axes"
        x, y = pairs.exact_marginal[inside], pairs.learned_marginal[inside]
        ax.plot(x, y, "s", markersize=3, mfc="none", mew=0.7, color=COLOURS["grey"], label=words)
    ax.plot(exact, learned, "o", markersize=3, alpha=0.6, mew=0, color=colour, label=f"joint pairs, rms {pairs.rms:.2f} nats")
    step = 0.012 * (high - low)
    for beyond, marker, place in ((learned < low, "v", low + step), (learned > high, "^", high - step)):
        if beyond.any():
            ax.plot(
                exact[beyond],
                np.full(beyond.sum(), place),
                marker,
                markersize=5,
                color=colour,
                label=f"{int(beyond.sum())} outside the axes",
            )
    name = r"\Delta \ln L" if difference else r"\ln r"
    ax.set(xlim=(low, high), ylim=(low, high), xlabel=f"exact ${name}$", ylabel=f"learned ${name}$", title=label, aspect="equal")
    ax.legend(loc="upper left", fontsize=8)


def _reliability(ax: "Axes", curves: Mapping[str, Reliability]) -> None:
    for k, (label, curve) in enumerate(curves.items()):
        line = _METHOD_LINES[(k + 1) % len(_METHOD_LINES)]
        ax.fill_between(curve.predicted, curve.band[:, 0], curve.band[:, 1], color=line["color"], alpha=0.15, linewidth=0)
        ax.plot(
            curve.predicted,
            curve.observed,
            "o-",
            markersize=3.5,
            linewidth=1.0,
            color=line["color"],
            label=f"{label}: p = {curve.pvalue:.2g}",
        )
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="classifier output",
        ylabel="fraction of joint pairs",
        title="reliability, 95 % bands",
        aspect="equal",
    )
    ax.legend(loc="upper left", fontsize=8)
