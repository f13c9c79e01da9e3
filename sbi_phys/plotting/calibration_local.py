"""Figures of TARP, local coverage, PIT regression, pulls and posterior SBC, in the style of `plots`."""

from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy.stats import binom

from sbi_phys.core.types import Array
from sbi_phys.plotting.calibration import BAND, COLOURS, _finish, _style, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbi_phys.calibration.local import LocalCoverage
    from sbi_phys.calibration.pit import PITRegression
    from sbi_phys.calibration.pulls import Pulls
    from sbi_phys.calibration.tarp import TARP

__all__ = ["coverage_line", "coverage_map", "ecdf_difference", "pit_line", "pull_rows", "tarp_coverage"]


class Curves(Protocol):
    """What `ecdf_difference` draws: level (k,), ecdf (k, d), band (k, 2), labels (d)."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def level(self) -> Array: ...
    @property
    def ecdf(self) -> Array: ...
    @property
    def band(self) -> Array: ...


def ecdf_difference(result: Curves, ax: "Axes | None" = None) -> "Axes":
    """Difference between ECDF and uniform, with the simultaneous 95 % band."""
    ax = new_axes(ax, width=5.2 if len(result.labels) <= 5 else 6.6)
    level = np.concatenate([[0], result.level, [1]])
    band = np.concatenate([[[0, 0]], result.band, [[1, 1]]]) - level[:, None]
    ax.fill_between(level, band[:, 0], band[:, 1], color=BAND, linewidth=0, label="95 % simultaneous")
    ax.axhline(0, color="black", linewidth=0.8)
    for j, label in enumerate(result.labels):
        ax.plot(level, np.concatenate([[0], result.ecdf[:, j], [1]]) - level, linewidth=1.4, label=label, **_style(j))
    limit = 1.15 * max(np.abs(band).max(), np.abs(result.ecdf - result.level[:, None]).max())
    ax.set(xlim=(0, 1), ylim=(-limit, limit), xlabel="rank of the truth / number of draws", ylabel="ECDF - uniform")
    return _finish(ax, len(result.labels))


def tarp_coverage(result: "TARP", ax: "Axes | None" = None) -> "Axes":
    """Share of truths in balls around the references against the balls' content, with the simultaneous 95 % band."""
    ax = new_axes(ax, width=4.6, height=4.4)
    level = np.concatenate([[0], result.level, [1]])
    band = np.concatenate([[[0, 0]], result.band, [[1, 1]]])
    ax.fill_between(level, band[:, 0], band[:, 1], color=BAND, linewidth=0, label="95 % simultaneous")
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    ax.plot(level, np.concatenate([[0], result.observed, [1]]), linewidth=1.4, label=result.labels[0], **_style(0))
    ax.text(0.97, 0.05, "truths farther out", transform=ax.transAxes, ha="right", fontsize="small", color="#555555")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="credible level", ylabel="expected coverage", aspect="equal")
    ax.legend(
        loc="upper left",
        fontsize="small",
        framealpha=0.85,
        edgecolor="none",
        title=f"references {result.reference_kind}",
        title_fontsize="small",
    )
    return _finish(ax, 0)


def _of(result: "LocalCoverage", q: int) -> str:
    return {"posterior": "posterior mean of ", "truth": "true ", "given": ""}[result.at] + result.by_labels[q]


def coverage_line(result: "LocalCoverage", m: int, r: int, ax: "Axes | None" = None) -> "Axes":
    """Coverage in each cell of one quantity with its error, against what is expected and the band of all cells together."""
    ax = new_axes(ax)
    low, high = result.cell_low[:, 0], result.cell_high[:, 0]
    expected, rows = result.expected[:, m, r], np.maximum(result.count, 1)
    alpha = 0.05 / result.count.size
    edges = np.append(low, high[-1])
    bottom, top = binom.ppf(alpha / 2, rows, expected) / rows, binom.ppf(1 - alpha / 2, rows, expected) / rows
    ax.stairs(top, edges, baseline=bottom, fill=True, color=BAND, label="95 % of all cells")
    ax.stairs(expected, edges, color="black", linewidth=0.8, baseline=None)
    centre, observed = (low + high) / 2, result.observed[:, m, r]
    errors = np.abs(np.stack([observed - result.low[:, m, r], result.high[:, m, r] - observed]))
    label = f"{100 * result.level[m]:.0f} % {'regions' if len(result.labels) == 1 else f'intervals of {result.labels[r]}'}"
    ax.errorbar(centre, observed, yerr=errors, xerr=(high - low) / 2, fmt="o", markersize=4, linewidth=1.2, color=COLOURS[0], label=label)
    smallest = min(float(bottom.min()), float(result.low[:, m, r].min()))
    ax.set(xlabel=_of(result, 0), ylabel="coverage", ylim=(max(-0.02, smallest - 0.08), 1.02))
    return _finish(ax, 1)


def coverage_map(result: "LocalCoverage", m: int, r: int, ax: "Axes | None" = None) -> "Axes":
    """Heat map of the coverage over two quantities: colour, its distance from what is expected; number, the coverage in per cent."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    ax = new_axes(ax, width=5.6, height=4.2)
    observed, difference = result.observed[:, m, r], result.observed[:, m, r] - result.expected[:, m, r]
    limit = max(0.1, float(np.abs(difference).max()))
    colours = ScalarMappable(Normalize(-100 * limit, 100 * limit), "RdBu")
    worst = int(np.argmin(result.cell_pvalues[:, m, r]))
    for c in [*(i for i in range(result.count.size) if i != worst), worst]:  # the worst last: its frame lies on top
        corner, size = result.cell_low[c], result.cell_high[c] - result.cell_low[c]
        frame, width = ("black", 2.0) if c == worst else ("white", 0.8)
        colour = colours.to_rgba(100 * difference[c])
        ax.add_patch(Rectangle((corner[0], corner[1]), size[0], size[1], facecolor=colour, edgecolor=frame, linewidth=width))
        middle = corner + size / 2
        ink = "white" if abs(difference[c]) > 0.65 * limit else "black"  # the ends of the colour scale are dark
        ax.text(middle[0], middle[1], f"{100 * observed[c]:.0f}", ha="center", va="center", fontsize="x-small", color=ink)
    low, high = result.cell_low.min(axis=0), result.cell_high.max(axis=0)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=_of(result, 0), ylabel=_of(result, 1))
    ax.figure.colorbar(colours, ax=ax, label="observed - expected [%]")
    what = "regions" if len(result.labels) == 1 else f"intervals of {result.labels[r]}"
    ax.set_title(f"per cent held by {100 * result.level[m]:.0f} % {what}; framed: worst", fontsize="small")
    return ax


def pit_line(result: "PITRegression", j: int, ax: "Axes | None" = None) -> "Axes":
    """Width and shift of parameter j's posterior in bins of the column of x with the largest correlation, with one-sigma errors."""
    ax = new_axes(ax)
    column, scores = result.x[:, result.column[j]], result.scores[:, j]
    n_bins = int(np.clip(result.n // 50, 2, 10))
    edges = np.unique(np.quantile(column, np.linspace(0, 1, n_bins + 1)))
    index = np.searchsorted(edges[1:-1], column, side="right")
    used = [c for c in range(max(edges.size - 1, 1)) if (index == c).sum() > 2]
    centre = np.array([np.median(column[index == c]) for c in used])
    count = np.array([(index == c).sum() for c in used])
    spread = np.maximum([scores[index == c].std(ddof=1) for c in used], 1e-12)
    shift = -np.array([scores[index == c].mean() for c in used])
    for offset, value, error, label, k in (
        (1.0, 1 / spread, 1 / spread / np.sqrt(2 * count), "width / right width", 0),
        (0.0, shift, spread / np.sqrt(count), "posterior - truth [sd]", 1),
    ):
        ax.axhline(offset, color="black", linewidth=0.8)
        ax.errorbar(centre, value, yerr=error, fmt="os"[k], markersize=4, linewidth=1.2, color=COLOURS[k], label=label)
    name = result.x_names[result.column[j]]
    ax.set(xlabel=name, ylabel=f"posterior of {result.labels[j]}")
    bottom, top = ax.get_ylim()
    ax.set_ylim(min(bottom, -0.5), max(top, 1.6))
    return _finish(ax, 2)


def pull_rows(result: "Pulls", ax: "Axes | None" = None) -> "Axes":
    """Mean and width of every parameter's pulls with errors, one row each."""
    d = len(result.names)
    ax = new_axes(ax, height=1.4 + 0.35 * d)
    y = np.arange(d)
    for at in (0, 1):
        ax.axvline(at, color="black", linewidth=0.8)
    ax.errorbar(result.mean, y, xerr=2 * result.mean_err, fmt="o", markersize=5, color=COLOURS[0], label="mean (right: 0)")
    width, error = result.width / result.width_expected, result.width_err / result.width_expected
    ax.errorbar(width, y, xerr=2 * error, fmt="s", markersize=5, color=COLOURS[1], label="width (right: 1)")
    ends = np.concatenate([result.mean - 2 * result.mean_err, width + 2 * error, [-0.3, 1.4]])
    ax.set(yticks=y, yticklabels=result.labels, ylim=(d - 0.5, -0.5), xlim=(ends.min() - 0.1, ends.max() + 0.1))
    ax.set_xlabel("pull (truth - posterior mean) / sd, two standard errors")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize="small", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
