"""Figures of a report, from plain arrays: training, marginals, importance weights, published fits, distance of the data.

Every function returns a matplotlib Figure in the house style and changes nothing else; `save_figure` makes files of it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sbi_phys.core.checks import as_array, as_real, require_finite, require_number
from sbi_phys.core.errors import DataError
from sbi_phys.core.types import ArrayLike
from sbi_phys.plotting.corner import checked_sets, corner_figure, display_ranges, marginal_density, truth_values
from sbi_phys.plotting.style import COLOURS, MARKERS, house_style, new_figure, save_figure
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Plottable",
    "comparison_figure",
    "corner_figure",
    "loss_figure",
    "marginals_figure",
    "misfit_figure",
    "panels_figure",
    "save_figure",
    "step_time_figure",
    "weights_figure",
]

History = Sequence[Sequence[Mapping[str, Any]]]
_SET_COLOURS = (COLOURS["flow"], COLOURS["reference"], COLOURS["amortised"], COLOURS["grey"])
_SET_LINES: tuple[Any, ...] = ("solid", "solid", (0, (3.5, 2.0)), "dotted")
_MEMBER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#E69F00", "#56B4E9", "#6B6B6B")


class Plottable(Protocol):
    """Anything that draws itself into given axes, such as a calibration result."""

    def plot(self, ax: Any = None) -> Any:
        """Draw into `ax` and return it."""


def loss_figure(history: History) -> "Figure":
    """Loss (nats) against epoch for every ensemble member: training thin, validation thick, best epoch marked.

    Args: history, one list a member of dicts with epoch, train, valid and, if known, learning_rate.   Raises: DataError.
    Read: validation turning up while training falls is over-fitting; both still falling is too short a training.
    """
    members = [_columns(member, k) for k, member in enumerate(_members(history))]
    rates = any(np.isfinite(m["learning_rate"]).any() for m in members)
    with house_style():
        fig = new_figure(7.0, 4.9 if rates else 4.0)
        axes = fig.subplots(2 if rates else 1, 1, sharex=True, squeeze=False, height_ratios=[3.2, 1] if rates else [1])[:, 0]
        ax = axes[0]
        for k, m in enumerate(members):
            colour, tag = _MEMBER_COLOURS[k % len(_MEMBER_COLOURS)], f"member {k + 1}: " if len(members) > 1 else ""
            ax.plot(m["epoch"], m["train"], color=colour, linewidth=0.9, alpha=0.6, label="training (thin)" if k == 0 else None)
            ax.plot(m["epoch"], m["valid"], color=colour, linewidth=1.8, label="validation (thick)" if k == 0 else None)
            if np.isfinite(m["valid"]).any():
                best = int(np.nanargmin(m["valid"]))
                text = f"{tag}best {m['valid'][best]:.3f} at epoch {m['epoch'][best]:.0f}"
                ax.plot(m["epoch"][best], m["valid"][best], "o", color=colour, mec="white", mew=0.8, markersize=8, zorder=5, label=text)
            if rates:
                axes[1].plot(m["epoch"], m["learning_rate"], color=colour, linewidth=1.2)
        ax.set_ylim(_loss_limits([m[key] for m in members for key in ("train", "valid")]))
        ax.set_ylabel("loss per simulation [nats]")
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.legend(fontsize=8.5, loc="upper right")
        if rates:
            axes[1].set_yscale("log")
            axes[1].set_ylabel("learning rate")
            axes[1].grid(alpha=0.25, linewidth=0.6)
        axes[-1].set_xlabel("epoch")
    return fig


def step_time_figure(history: History) -> "Figure":
    """Seconds per epoch over the training, one line a member, with its median.   Raises: DataError.

    Read: a level line; a rise towards the end means that denormal numbers slow the arithmetic.
    """
    members = [_columns(member, k) for k, member in enumerate(_members(history))]
    if not any(np.isfinite(m["seconds"]).any() for m in members):
        raise DataError("history has no 'seconds'; expected it in each epoch's record for a figure of the step time")
    with house_style():
        fig = new_figure(7.0, 3.0)
        ax = fig.subplots()
        for k, m in enumerate(members):
            colour, median = _MEMBER_COLOURS[k % len(_MEMBER_COLOURS)], float(np.nanmedian(m["seconds"]))
            tag = f"member {k + 1}, " if len(members) > 1 else ""
            ax.plot(m["epoch"], m["seconds"], color=colour, marker=".", markersize=3, linewidth=1.0, label=f"{tag}median {median:.3g} s")
            ax.axhline(median, color=colour, linestyle="dashed", linewidth=0.8)
        ax.set_ylim(0, 1.15 * max(float(np.nanmax(m["seconds"])) for m in members))
        ax.set_xlabel("epoch")
        ax.set_ylabel("seconds per epoch")
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.legend(loc="lower right")
    return fig


def marginals_figure(
    samples: Mapping[str, ArrayLike],
    parameters: Sequence[Parameter],
    truth: ArrayLike | Mapping[str, float] | None = None,
    prior: ArrayLike | None = None,
) -> "Figure":
    """One panel a parameter: marginal densities of sample sets {label: (n, d)} with bars of the 68 and 95 % intervals below.

    `prior` (m, d) draws are shown in grey: where the posterior follows them the data say nothing.
    Raises: ShapeError, NonFiniteError, DataError.
    """
    sets, marks = checked_sets(samples, parameters), truth_values(truth, parameters)
    limits = display_ranges(sets, parameters)
    from matplotlib.ticker import MaxNLocator

    before = next(iter(checked_sets({"prior": prior}, parameters).values())) if prior is not None else None
    columns = min(3, len(parameters))
    rows = math.ceil(len(parameters) / columns)
    with house_style():
        fig = new_figure(3.1 * columns + 0.1, 2.35 * rows + 0.45)
        fig.get_layout_engine().set(wspace=0.04, hspace=0.03)  # type: ignore[union-attr,call-arg]
        axes = fig.subplots(rows, columns, squeeze=False).ravel()
        for k, p in enumerate(parameters):
            _marginal(axes[k], sets, k, limits[k], marks[k], None if before is None else before[:, k])
            axes[k].set_xlabel(p.label)
            axes[k].xaxis.set_major_locator(MaxNLocator(5, prune="both"))
        for ax in axes[len(parameters) :]:
            ax.remove()
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return fig


def weights_figure(log_weights: ArrayLike, *, pareto_k: float | None = None) -> "Figure":
    """Importance weights: histogram of lg(w / mean w), and the share of the total that the heaviest draws carry.

    Args: log_weights (n,), natural logarithm, any constant added; -inf for draws outside the support.
    Raises: ShapeError, DataError.   Read: ESS/n near 1 and Pareto k < 0.7 = trust the refined posterior (arXiv:1507.02646).
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
        right.set_xlabel("share of draws, heaviest first")
        right.set_ylabel("share of total weight")
        note = f"n = {logs.size}\nESS = {ess:.0f} ({100 * ess / logs.size:.1f} %)\nheaviest: {100 * ordered[0]:.2g} %"
        if pareto_k is not None and math.isfinite(pareto_k):
            note += f"\nPareto k = {pareto_k:.2f} ({'reliable' if pareto_k < 0.7 else 'NOT reliable'})"
        right.text(0.96, 0.06, note, transform=right.transAxes, ha="right", va="bottom", fontsize=9)
    return fig


def comparison_figure(
    samples: Mapping[str, ArrayLike],
    parameters: Sequence[Parameter],
    published: Sequence[Mapping[str, Any]],
    truth: ArrayLike | Mapping[str, float] | None = None,
) -> "Figure":
    """Forest plot: for each parameter the median, 68 and 95 % intervals of sample sets above the published values.

    Args: published, dicts with label, source, theta {name: value}, and, if known, errors {name: (below, above)} >= 0.
    Raises: ShapeError, NonFiniteError, DataError.
    """
    sets, marks = checked_sets(samples, parameters), truth_values(truth, parameters)
    labels = [*sets, *(str(fit["label"]) for fit in published)]
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(parameters))
    rows = math.ceil(len(parameters) / columns)
    with house_style():
        fig = new_figure(2.9 * columns + 1.6, (0.26 * len(labels) + 0.85) * rows)
        axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
        for k, ax in enumerate(axes.ravel()):
            if k >= len(parameters):
                ax.set_visible(False)
                continue
            _forest(ax, sets, published, parameters[k], k)
            if marks[k] is not None:
                ax.axvline(marks[k], color=COLOURS["truth"], linestyle=(0, (5, 1.5)), linewidth=1.0)
            ax.set_xlabel(parameters[k].label)
            ax.xaxis.set_major_locator(MaxNLocator(5, prune="both"))
            ax.set_yticks(range(len(labels)), labels=labels)
            ax.tick_params(axis="y", length=0)
            ax.set_ylim(len(labels) - 0.4, -0.6)
            ax.axhline(len(sets) - 0.5, color=COLOURS["grey"], linewidth=0.6)
    return fig


def misfit_figure(distances: ArrayLike, d_obs: float, *, label: str = "distance to the nearest simulations") -> "Figure":
    """Histogram of distances (n,) of held-out simulations, and where the observation d_obs falls among them.

    Raises: ShapeError, NonFiniteError, DataError, SettingError.
    Read: an observation far to the right is unlike everything the network was trained on, and its posterior is an extrapolation.
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
    """Several results that draw themselves, e.g. {'SBC ranks': sbc, 'Expected coverage': coverage}, as one figure.   Raises: DataError."""
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


def _members(history: History) -> History:
    if not history or not all(len(member) for member in history):
        raise DataError(f"history has {len(history)} members, some without epochs; expected one non-empty list of records a member")
    if isinstance(history[0], Mapping):
        raise DataError("history is a list of records; expected one list of records for each ensemble member")
    return history


def _columns(member: Sequence[Mapping[str, Any]], k: int) -> dict[str, np.ndarray]:
    missing = [key for key in ("epoch", "train", "valid") if key not in member[0]]
    if missing:
        raise DataError(f"history of member {k} has no {missing}; expected records with epoch, train and valid")
    keys = ("epoch", "train", "valid", "learning_rate", "seconds")
    return {key: np.array([float(record.get(key, math.nan)) for record in member]) for key in keys}


def _loss_limits(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """Limits that show the plateau: the steep first epochs may leave the frame at the top."""
    finite = np.concatenate([c[np.isfinite(c)] for c in curves])
    if not finite.size:
        raise DataError("history has no finite loss; expected at least one")
    low, middle, high = float(finite.min()), float(np.median(finite)), float(finite.max())
    top = min(high, low + 5 * (middle - low)) if middle > low else high
    margin = 0.06 * (top - low) or 0.5
    return low - margin, top + margin


def _marginal(ax: "Axes", sets: Mapping[str, np.ndarray], k: int, limits: tuple[float, float], truth: float | None, prior: Any) -> None:
    """One marginal: densities, and below zero the intervals."""
    top = 0.0
    if prior is not None:
        grid, density = marginal_density(prior, limits)
        ax.fill_between(grid, density, color=COLOURS["prior"], alpha=0.3, linewidth=0, label="prior")
    for index, (label, theta) in enumerate(sets.items()):
        grid, density = marginal_density(theta[:, k], limits)
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
    """Intervals of the sets, then one marker a published fit."""
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
