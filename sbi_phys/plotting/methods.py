"""Several methods on one observation: contours over the exact posterior, learned ratios against exact ones, confidence sets.

Every function takes plain arrays and returns a matplotlib Figure in the house style; `figures.save_figure` makes files of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration.ratios import Reliability
from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.plotting.corner import checked_sets, display_ranges, marginal_density, mass_levels, smoothed_density, truth_values
from sbi_phys.plotting.style import COLOURS, house_style, new_figure
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PairRatios", "methods_figure", "ratios_figure"]


_LINES: tuple[dict[str, Any], ...] = (
    {"color": COLOURS["flow"], "linestyle": "solid"},
    {"color": COLOURS["amortised"], "linestyle": (0, (5.0, 1.6))},
    {"color": COLOURS["truth"], "linestyle": (0, (4.0, 1.4, 1.0, 1.4))},
    {"color": COLOURS["published"], "linestyle": (0, (1.4, 1.2))},
)
_SHADES = ("#E2E2E2", "#B5B5B5")
_MOST_AWAY = 0.5  # share of the draws out of view above which a method has no line: contours of a few stray draws would be noise


def methods_figure(
    samples: Mapping[str, ArrayLike],
    parameters: Sequence[Parameter],
    exact: tuple[str, ArrayLike] | None = None,
    *,
    shown: tuple[int, int] = (0, 1),
    truth: ArrayLike | Mapping[str, float] | None = None,
) -> "Figure":
    """Regions of 68 and 95 % of two parameters by up to four methods {label: (n, d)}, over the exact ones in grey, with both marginals.

    Args: exact: its label and draws (n, d). shown: columns of theta; one parameter has a marginal alone. truth: marked by a cross.
    What lies far from the exact draws is left out of view, and the legend says how much that is; a method with most of its draws there
    has no line.
    Raises: ShapeError, NonFiniteError, DataError, SettingError.   Read: lines on the edges of the grey regions = the method is right.
    """
    if len(samples) > len(_LINES):
        raise SettingError(f"samples has {len(samples)} sets; expected at most {len(_LINES)}")
    sets = checked_sets({**({exact[0]: exact[1]} if exact else {}), **samples}, parameters)
    limits, marks = _view(sets, parameters, exact is not None), truth_values(truth, parameters)
    lines = ([None] if exact else []) + list(_LINES[: len(samples)])
    with house_style():
        if len(parameters) == 1:
            fig = new_figure(5.6, 3.6)
            ax = fig.subplots()
            _marginal(ax, sets, lines, 0, limits[0], marks[0])
            ax.set(xlabel=parameters[0].label, yticks=[], ylabel="density")
            _legend(ax, _labels(sets, limits, (0,)), lines, marks[0] is not None, loc="best")
            return fig
        i, j = shown
        fig = new_figure(6.4, 5.6)
        grid = fig.add_gridspec(2, 2, width_ratios=[3.2, 1.25], height_ratios=[1.25, 3.2])
        ax = fig.add_subplot(grid[1, 0])
        top, right, corner = fig.add_subplot(grid[0, 0], sharex=ax), fig.add_subplot(grid[1, 1], sharey=ax), fig.add_subplot(grid[0, 1])
        _plane(ax, sets, lines, (i, j), (limits[i], limits[j]), (marks[i], marks[j]))
        ax.set(xlabel=parameters[i].label, ylabel=parameters[j].label)
        _marginal(top, sets, lines, i, limits[i], marks[i])
        _marginal(right, sets, lines, j, limits[j], marks[j], upright=True)
        top.tick_params(labelbottom=False)
        right.tick_params(labelleft=False)
        top.set_yticks([])
        right.set_xticks([])
        corner.axis("off")
        _legend(corner, _labels(sets, limits, (i, j)), lines, marks[i] is not None, loc="center left")
    return fig


def _view(sets: Mapping[str, Array], parameters: Sequence[Parameter], around_first: bool) -> list[tuple[float, float]]:
    """Axis limits: of all sets, but no further from the first one's than its width: a mode elsewhere would leave no room for it."""
    limits = display_ranges(sets, parameters)
    if not around_first:
        return limits
    first = display_ranges(dict([next(iter(sets.items()))]), parameters)
    near = [(max(a, low - (high - low)), min(b, high + (high - low))) for (a, b), (low, high) in zip(limits, first, strict=True)]
    every = range(len(parameters))
    others = list(sets.values())[1:]
    return limits if others and all(_away(theta, near, every) > _MOST_AWAY for theta in others) else near  # nothing else to see near it


def _away(theta: Array, limits: Sequence[tuple[float, float]], shown: Sequence[int]) -> float:
    """Share of the draws out of view."""
    return float(np.any([(theta[:, k] < limits[k][0]) | (theta[:, k] > limits[k][1]) for k in shown], axis=0).mean())


def _labels(sets: Mapping[str, Array], limits: Sequence[tuple[float, float]], shown: Sequence[int]) -> list[str]:
    """Labels with the share of draws out of view, where that is more than a percent."""
    out = []
    for label, theta in sets.items():
        away = _away(theta, limits, shown)
        out.append(label if away < 0.01 else f"{label}\n({100 * away:.0f} % out of view)")
    return out


def _plane(ax: "Axes", sets: Mapping[str, Array], lines: Sequence[Any], pair: tuple[int, int], limits: Any, marks: Any) -> None:
    for theta, line in zip(sets.values(), lines, strict=True):
        if _away(theta[:, list(pair)], limits, (0, 1)) > _MOST_AWAY:
            continue
        x, y, density = smoothed_density(theta[:, list(pair)], limits, bins=44)
        low, high = mass_levels(density[1:-1, 1:-1], (0.95, 0.68))
        if line is None:
            ax.contourf(x, y, density, levels=[low, high, max(float(density.max()), high) * 1.001], colors=list(_SHADES))
        else:
            ax.contour(x, y, density, levels=[low, high], colors=[line["color"]], linestyles=[line["linestyle"]], linewidths=1.4)
    if marks[0] is not None and marks[1] is not None:
        ax.plot(*marks, "+", color="black", markersize=10, markeredgewidth=1.4)
    ax.set(xlim=limits[0], ylim=limits[1])


def _marginal(
    ax: "Axes",
    sets: Mapping[str, Array],
    lines: Sequence[Any],
    k: int,
    limits: tuple[float, float],
    mark: float | None,
    upright: bool = False,
) -> None:
    highest = 0.0
    for theta, line in zip(sets.values(), lines, strict=True):
        if _away(theta[:, [k]], [limits], (0,)) > _MOST_AWAY:
            continue
        x, density = marginal_density(theta[:, k], limits)
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
    """Exact and learned log ratios, nats, of n joint pairs (n,) and of marginal ones (m,), m may be 0; and their reliability, if known."""

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
    """Learned against exact log ratio, one panel a method, and the reliability curves of those that have one.

    Args: found, {label: PairRatios}. difference: the ratios are between two parameters instead of p(x | theta) / p(x).
    Raises: DataError, ShapeError, NonFiniteError.   Read: points on the diagonal; a curve within its band.
    """
    if not found:
        raise DataError("found is empty; expected {label: PairRatios} with at least one method")
    curves = {label: pairs.reliability for label, pairs in found.items() if pairs.reliability is not None}
    with house_style():
        n = len(found) + bool(curves)
        fig = new_figure(4.1 * n, 3.9)
        axes = fig.subplots(1, n, squeeze=False)[0]
        for k, (ax, (label, pairs)) in enumerate(zip(axes, found.items(), strict=False)):
            _scatter(ax, label, pairs, _LINES[(k + 1) % len(_LINES)]["color"], difference)
        if curves:
            _reliability(axes[-1], curves)
    return fig


def _scatter(ax: "Axes", label: str, pairs: PairRatios, colour: str, difference: bool) -> None:
    exact, learned = (as_array(name, getattr(pairs, name), (None,)) for name in ("exact", "learned"))
    width = max(float(np.ptp(exact)), 1.0)
    # a single pair that is far off would leave no room for the others: it is shown at the rim
    margin = float(np.clip(1.5 * np.quantile(np.abs(learned - exact), 0.9), 0.1 * width, 2 * width))
    low, high = float(exact.min()) - margin, float(exact.max()) + margin
    low -= 0.5 * width if pairs.exact_marginal.size else 0.0  # marginal pairs reach down for ever
    ax.plot([low, high], [low, high], color="black", linewidth=0.8)
    if pairs.exact_marginal.size:
        inside = (pairs.exact_marginal > low) & (pairs.learned_marginal > low)
        words = f"marginal pairs, {int(inside.sum())} of {inside.size} in view"
        x, y = pairs.exact_marginal[inside], pairs.learned_marginal[inside]
        ax.plot(x, y, "s", markersize=3, mfc="none", mew=0.7, color="#6B6B6B", label=words)
    ax.plot(exact, learned, "o", markersize=3, alpha=0.6, mew=0, color=colour, label=f"joint pairs, rms {pairs.rms:.2f} nats")
    step = 0.012 * (high - low)
    for beyond, marker, place in ((learned < low, "v", low + step), (learned > high, "^", high - step)):
        if beyond.any():
            ax.plot(exact[beyond], np.full(beyond.sum(), place), marker, markersize=5, color=colour, label=f"{int(beyond.sum())} beyond")
    name = r"\Delta \ln L" if difference else r"\ln r"
    ax.set(xlim=(low, high), ylim=(low, high), xlabel=f"exact ${name}$", ylabel=f"learned ${name}$", title=label, aspect="equal")
    ax.legend(loc="upper left", fontsize=8)


def _reliability(ax: "Axes", curves: Mapping[str, Reliability]) -> None:
    for k, (label, curve) in enumerate(curves.items()):
        line = _LINES[(k + 1) % len(_LINES)]
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
        xlim=(0, 1), ylim=(0, 1), xlabel="classifier output", ylabel="share of joint pairs", title="reliability, 95 % bands", aspect="equal"
    )
    ax.legend(loc="upper left", fontsize=8)
