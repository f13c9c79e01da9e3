r"""Figures of an observation among simulations: each block of its columns, drawn by what the block holds.

A block is a histogram, a vector, an image, a trace or a set of events (`block_kind`). `predictive_figure` compares it with replicas of the
posterior predictive, p(x | x_obs) = int p(x | theta) p(theta | x_obs) dtheta, and shows the pulls

    pull_j = (x_obs,j - mean_j) / sd_j,   mean and sd over the replicas.

`prior_predictive_figure` compares it with simulations of the prior, and shows the fraction of them below the observation, 0 to 1.
`features_figure` shows what a network receives. Columns without a value (NaN) are left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.core.checks import as_array, as_real
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.plotting.style import COLOURS, PALETTE, house_style, new_figure
from sbi_phys.priors import Observable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["block_kind", "block_shape", "features_figure", "predictive_figure", "prior_predictive_figure"]

MIN_ROWS = 20  # simulations below which quantiles of 95 % do not exist
_LONG = 60  # columns from which a vector is drawn as a line
SMALL = 9  # columns up to which a vector has one panel for each
_CHANNELS = 4  # channels of a trace or an image that are shown
_MARGINALS = 5  # columns of a set of events that are shown
_SETS = 400  # sets of events whose histograms make the band
_LEVELS = (0.025, 0.16, 0.5, 0.84, 0.975)
_OUT = PALETTE[1]  # of values outside all simulations, or with pulls over 5
_FAR = 5.0


@dataclass(frozen=True, slots=True)
class _Look:
    """The words and colours of one of the two comparisons."""

    words: str
    wide: str
    narrow: str
    line: str
    prior: bool


_POSTERIOR = _Look("posterior predictive", "#C6DDF0", "#8DBBDF", COLOURS["flow"], prior=False)
_PRIOR = _Look("prior predictive", "#E3E3E3", "#C2C2C2", COLOURS["grey"], prior=True)


def block_shape(observable: Observable) -> tuple[int, ...]:
    """Shape of one observation of the block; (size,) where none is declared.

    >>> from sbi_phys.plotting import block_shape
    >>> from sbi_phys.priors import Observable
    >>> block_shape(Observable("spectrum", 20))
    (20,)
    """
    return tuple(getattr(observable, "shape", None) or ()) or (observable.size,)


def block_kind(observable: Observable, x: ArrayLike | None = None) -> str:
    """What a block is drawn as: 'histogram', 'image', 'trace', 'set' or 'vector'.

    A block with edges, or of whole numbers in one dimension, is a histogram. Of two dimensions, padded slots of events with a mask in the
    last column (seen in x, (n, size)) are a set, fewer than 8 rows of samples a trace with channels, all others an image; three dimensions
    are an image with channels first. In one dimension, 60 columns or more are a trace.   Raises: ShapeError.

    >>> from sbi_phys.plotting import block_kind
    >>> from sbi_phys.priors import Observable
    >>> [block_kind(Observable("n", 3, kind="counts")), block_kind(Observable("x", 3)), block_kind(Observable("x", 500))]
    ['histogram', 'vector', 'trace']
    """
    shape = block_shape(observable)
    kind = str(observable.kind)
    if kind in ("set", "events"):
        return "set"
    if len(shape) == 1:
        if observable.edges or kind == "counts":
            return "histogram"
        return "trace" if shape[0] >= _LONG else "vector"
    if len(shape) == 2 and x is not None and _is_set(_rows(observable, "x", x).reshape(-1, *shape)):
        return "set"
    if len(shape) == 2 and shape[0] < 8 and shape[1] > shape[0]:
        return "trace"
    return "image"


def predictive_figure(observable: Observable, x_obs: ArrayLike, replicas: ArrayLike) -> "Figure":
    """Data of one block against replicas of the posterior predictive: central 68 and 95 % bands, and the pulls below.

    Args: x_obs (size,). replicas (n, size), n >= 20. NaN: no value.   Raises: ShapeError, DataError.
    Read: data within the bands: the model describes them; pulls of one sign in neighbouring columns: it lacks a trend.

    >>> import numpy as np
    >>> from sbi_phys.plotting import predictive_figure
    >>> from sbi_phys.priors import Observable
    >>> spectrum = Observable("spectrum", 12, kind="counts", edges=tuple(range(13)), edges_unit="TeV")
    >>> replicas = np.random.default_rng(0).poisson(9.0, (50, 12))
    >>> predictive_figure(spectrum, np.full(12, 9), replicas).axes[1].get_xlabel()
    'spectrum bins [TeV]'
    """
    return _figure(observable, x_obs, replicas, _POSTERIOR)


def prior_predictive_figure(observable: Observable, x_obs: ArrayLike, simulated: ArrayLike) -> "Figure":
    """Data of one block against simulations of the prior: central 68 and 95 % bands, and the fraction of simulations below the data.

    Args: x_obs (size,). simulated (n, size), n >= 20. NaN: no value.   Raises: ShapeError, DataError.
    Read: data outside all simulations (red) are unlike what the network has seen.

    >>> import numpy as np
    >>> from sbi_phys.plotting import prior_predictive_figure
    >>> from sbi_phys.priors import Observable
    >>> simulated = np.random.default_rng(0).normal(size=(50, 12))
    >>> prior_predictive_figure(Observable("x", 12), np.zeros(12), simulated).axes[1].get_ylabel()
    'fraction below'
    """
    return _figure(observable, x_obs, simulated, _PRIOR)


def features_figure(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike]], marks: Mapping[str, Sequence[tuple[str, int]]] | None = None
) -> "Figure":
    """Values of the observation among those of simulations, column by column: {title: (observed (k,), simulated (n, k))}, one panel each.

    Grey: the central 95 % and the range of the simulations, minus their mean, in their sd. Columns outside the range are red.
    `marks` {title: [(name, first column), ...]} divides a panel into blocks.   Raises: ShapeError, DataError.
    Read: a red column is an input that the network has not seen in training.

    >>> import numpy as np
    >>> from sbi_phys.plotting import features_figure
    >>> simulated = np.random.default_rng(0).normal(size=(50, 3))
    >>> features_figure({"inputs": ([0.0, 0.1, 9.0], simulated)}).axes[0].get_title(loc="right")
    '1 of 3 outside all 50 simulations'
    """
    if not panels:
        raise DataError("panels is empty; expected {title: (observed, simulated)} with at least one entry")
    with house_style():
        fig = new_figure(7.6, 2.6 * len(panels) + 0.4)
        axes = fig.subplots(len(panels), 1, squeeze=False)[:, 0]
        for ax, (title, (observed, simulated)) in zip(axes, panels.items(), strict=True):
            rows = as_array(f"simulated of {title!r}", simulated, (None, None))
            row = as_array(f"observed of {title!r}", observed, (rows.shape[1],))
            _require_rows(title, rows)
            _features(ax, title, row, rows, (marks or {}).get(title, ()))
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper center", ncols=4)
    return fig


def _figure(observable: Observable, x_obs: ArrayLike, simulated: ArrayLike, look: _Look) -> "Figure":
    rows = _rows(observable, "replicas", simulated)
    data = as_real("x_obs", x_obs).reshape(-1)
    if data.shape != (observable.size,):
        raise ShapeError(f"x_obs has shape {np.shape(x_obs)}; expected ({observable.size},) as observable {observable.name}")
    _require_rows(observable.name, rows)
    kind, shape = block_kind(observable, rows), block_shape(observable)
    with house_style():
        if kind == "image":
            return _image(observable, data.reshape(shape), rows.reshape(-1, *shape), look)
        if kind == "set":
            return _sets(observable, data.reshape(shape), rows.reshape(-1, *shape), look)
        if kind == "trace":
            return _traces(observable, data.reshape(-1, shape[-1]), rows.reshape(len(rows), -1, shape[-1]), look)
        if kind == "vector" and observable.size <= SMALL:
            return _columns(observable, data, rows, look)
        return _histogram(observable, data, rows, look, binned=kind == "histogram")


def _rows(observable: Observable, name: str, x: ArrayLike) -> Array:
    """Simulations of the block as (n, size), whatever the axes of a row are."""
    rows = as_real(name, x)
    if rows.ndim < 2 or math.prod(rows.shape[1:]) != observable.size:
        raise ShapeError(f"{name} has shape {rows.shape}; expected (n, {observable.size}) as observable {observable.name}")
    return rows.reshape(len(rows), -1)


def _require_rows(name: str, rows: Array) -> None:
    if len(rows) < MIN_ROWS:
        raise DataError(f"{name} has {len(rows)} simulations; expected at least {MIN_ROWS} for a band of 95 %")


def _is_set(x: Array) -> bool:
    """Whether the slots x (n, n_max, k + 1) hold events: ones then zeros in the last column, and zeros in the empty slots."""
    if x.shape[2] < 2:
        return False
    mask = x[:, :, -1]
    real = mask == 1
    if not (real | (mask == 0)).all() or (real[:, 1:] & ~real[:, :-1]).any() or not real.any():
        return False
    return not (x[:, :, :-1][~real] != 0).any()


def _quantiles(rows: Array) -> Array:
    """Quantiles (5, k) at 2.5, 16, 50, 84 and 97.5 % of rows (n, k), of the values that exist; NaN for a column without any."""
    some = np.isfinite(rows).any(axis=0)
    out = np.full((len(_LEVELS), rows.shape[1]), np.nan)
    out[:, some] = np.nanquantile(rows[:, some], _LEVELS, axis=0)
    return out


def _moments(rows: Array) -> tuple[Array, Array]:
    """Mean and sd (k,) of the values that exist."""
    held = np.isfinite(rows)
    n = np.maximum(held.sum(axis=0), 1)
    mean = np.where(held, rows, 0.0).sum(axis=0) / n
    sd = np.sqrt((np.where(held, rows - mean, 0.0) ** 2).sum(axis=0) / n)
    none = ~held.any(axis=0)
    sd[sd <= 1e-12 * np.abs(mean)] = 0.0
    return np.where(none, np.nan, mean), np.where(none, np.nan, sd)


def _pulls(data: Array, rows: Array) -> Array:
    """(x_obs - mean) / sd (k,); NaN where the replicas are constant and equal to the data, infinite where they are constant and differ."""
    mean, sd = _moments(rows)
    away = data - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((sd == 0) & (np.abs(away) <= 1e-9 * np.abs(mean)), np.nan, away / sd)


def _below(data: Array, rows: Array) -> tuple[Array, Mask]:
    """Fraction of the simulations below the data, half of the equal ones included, and whether the data lie outside all of them."""
    held = np.isfinite(rows)
    n = np.maximum(held.sum(axis=0), 1)
    with np.errstate(invalid="ignore"):
        under, equal = (rows < data).sum(axis=0), (rows == data).sum(axis=0)
    known = np.isfinite(data) & held.any(axis=0)
    return np.where(known, (under + 0.5 * equal) / n, np.nan), known & (equal == 0) & ((under == 0) | (under == held.sum(axis=0)))


def _name(observable: Observable) -> str:
    """Name of the values, with their unit."""
    symbol = f"${observable.latex}$" if observable.latex else observable.name
    return f"{symbol} [{observable.unit}]" if observable.unit else symbol


def _pair(fig: "Figure", grid: Any, column: int = 0, row: int = 0) -> tuple["Axes", "Axes"]:
    """Two panels with one abscissa: the data, and below them the comparison."""
    top = fig.add_subplot(grid[2 * row, column])
    bottom = fig.add_subplot(grid[2 * row + 1, column], sharex=top)
    top.tick_params(labelbottom=False)
    return top, bottom


def _stairs(ax: "Axes", edges: Array, quantiles: Array, look: _Look) -> None:
    """The 95 and 68 % bands and the median in bins."""
    low, lower, middle, upper, high = quantiles  # NaN leaves a gap
    ax.stairs(high, edges, baseline=np.nan_to_num(low), fill=True, color=look.wide, label=f"95 % of the {look.words}")
    ax.stairs(upper, edges, baseline=np.nan_to_num(lower), fill=True, color=look.narrow, label="68 %")
    ax.stairs(middle, edges, baseline=None, color=look.line, linewidth=1.2, label="median")


def _compare(ax: "Axes", at: Array, data: Array, rows: Array, look: _Look, edges: Array | None = None) -> None:
    """The lower panel: pulls, or the fraction of simulations below the data."""
    many = len(at) > _LONG
    size, sides = (2.0 if many else 3.5), (float(at[0]), float(at[-1])) if edges is None else (float(edges[0]), float(edges[-1]))
    if look.prior:
        value, out = _below(data, rows)
        for low, high, colour in ((0.025, 0.975, look.wide), (0.16, 0.84, look.narrow)):
            ax.fill_between(sides, low, high, color=colour, linewidth=0)
        ax.axhline(0.5, color=look.line, linewidth=1.0)
        ax.set(ylim=(-0.06, 1.06), yticks=[0, 0.5, 1], ylabel="fraction below")
        known = np.isfinite(value)
        ax.plot(at[known & ~out], value[known & ~out], "o", color="black", markersize=size)
        ax.plot(at[out], value[out], "o", color=_OUT, markersize=size + 1.5, zorder=4)
        return
    pull = _pulls(data, rows)
    for height, colour in ((2, look.wide), (1, look.narrow)):
        ax.fill_between(sides, -height, height, color=colour, linewidth=0)
    ax.axhline(0, color=look.line, linewidth=1.0)
    finite = pull[np.isfinite(pull)]
    limit = min(max(3.4, 1.15 * float(np.abs(finite).max()) if finite.size else 0.0), 1.6 * _FAR)
    ax.set(ylim=(-limit, limit), ylabel="pull")
    shown = np.clip(pull, -0.94 * limit, 0.94 * limit)
    beyond = np.abs(pull) > 0.94 * limit
    far = np.abs(pull) > _FAR
    for chosen, colour in ((~far & np.isfinite(pull), "black"), (far & ~beyond, _OUT)):
        ax.plot(at[chosen], shown[chosen], "o", color=colour, markersize=size)
    for side, marker in ((1, "^"), (-1, "v")):  # beyond the axis
        chosen = beyond & (np.sign(pull) == side)
        ax.plot(at[chosen], shown[chosen], marker, color=_OUT, markersize=5)


def _finite_edges(edges: Sequence[float], size: int) -> tuple[Array, bool, bool]:
    """Edges with the open ones replaced by the width of the bin beside, and whether the first and the last were open."""
    e: Array = np.array(edges if len(edges) else np.arange(size + 1) - 0.5, dtype=np.float64)
    below, above = not math.isfinite(e[0]), not math.isfinite(e[-1])
    inner = e[np.isfinite(e)]
    width = float(np.diff(inner).mean()) if inner.size > 1 else 1.0
    if below:
        e[0] = (inner[0] if inner.size else 0.0) - (inner[1] - inner[0] if inner.size > 1 else width)
    if above:
        e[-1] = (inner[-1] if inner.size else 0.0) + (inner[-1] - inner[-2] if inner.size > 1 else width)
    return e, below, above


def _is_geometric(edges: Array) -> bool:
    """Whether bins are wider in proportion to their place, as those of a logarithmic axis are."""
    if len(edges) < 4 or edges[0] <= 0:
        return False
    steps = np.diff(np.log(edges))
    return bool(edges[-1] / edges[0] > 5 and steps.std() < 0.2 * steps.mean())


def _histogram(observable: Observable, data: Array, rows: Array, look: _Look, *, binned: bool) -> "Figure":
    """Bins, or the columns of a vector, over the bands; values of incomparable size relative to the median in half the 68 % range."""
    edges, below, above = _finite_edges(observable.edges, observable.size)
    quantiles = _quantiles(rows)
    fig = new_figure(7.2, 4.6)
    top, bottom = _pair(fig, fig.add_gridspec(2, 1, height_ratios=[2.4, 1]))
    geometric = _is_geometric(edges)
    at = np.sqrt(edges[1:] * edges[:-1]) if geometric else 0.5 * (edges[1:] + edges[:-1])
    label, shown = _name(observable), data
    if not binned and not _comparable(quantiles):
        low, lower, middle, upper, high = quantiles
        scale = np.where(upper > lower, (upper - lower) / 2, np.where(high > low, (high - low) / 4, 1.0))
        quantiles, shown = (quantiles - middle) / scale, (data - middle) / scale
        label = f"{observable.name}: (x - median) / half 68 % range"
    _stairs(top, edges, quantiles, look)
    if binned:
        _count_axis(top, shown, quantiles, observable.kind == "counts")
    top.plot(at, np.maximum(shown, top.get_ylim()[0]) if binned else shown, "o", color="black", markersize=3.5 if len(at) <= _LONG else 2,
             label="data", clip_on=not binned, zorder=5)  # fmt: skip
    top.set_ylabel(label if not binned or observable.kind != "counts" or observable.unit else f"{label} per bin")
    _compare(bottom, at, data, rows, look, edges)
    if geometric:
        top.set_xscale("log")
    top.set_xlim(edges[0], edges[-1])
    open_ends = " (open at both ends)" if below and above else " (first bin open)" if below else " (last bin open)" if above else ""
    if observable.edges:
        bottom.set_xlabel(f"{observable.name} bins" + (f" [{observable.edges_unit}]" if observable.edges_unit else "") + open_ends)
    else:
        bottom.set_xlabel(f"{'bin' if binned else 'column'} of {observable.name}")
        _whole_ticks(bottom)
    _legend(fig, top)
    return fig


def _comparable(quantiles: Array) -> bool:
    """Whether the columns can share one axis: none is narrower than a hundredth of what all of them span."""
    low, _, _, _, high = quantiles
    width = (high - low)[np.isfinite(high) & (high > low)]
    return bool(width.size == 0 or ((np.nanmax(high) - np.nanmin(low)) < 30 * float(np.median(width)) and width.max() < 30 * width.min()))


def _count_axis(ax: "Axes", data: Array, quantiles: Array, counts: bool) -> None:
    """Logarithmic where the values fall over more than two decades; counts begin at 0 or, on a logarithmic axis, at 0.3."""
    values = np.concatenate([data, quantiles[2], quantiles[4]])
    largest = float(np.nanmax(values))
    middle = quantiles[2][np.isfinite(quantiles[2]) & (quantiles[2] > 0)]
    if largest > 0 and middle.size and not (np.nanmin(np.append(data, quantiles[0])) < 0) and largest > 100 * max(float(middle.min()), 0.5):
        ax.set_yscale("log")
        bottom = 0.3 if counts else max(0.3 * float(middle.min()), 1e-6 * largest)
        ax.set_ylim(bottom, 2.5 * largest)
    elif counts:
        ax.set_ylim(0, 1.08 * largest if largest > 0 else 1.0)


def _whole_ticks(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))


def _legend(fig: "Figure", ax: "Axes", extra: Sequence[Any] = ()) -> None:
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda k: labels[k] != "data")
    fig.legend([*(handles[k] for k in order), *extra], [*(labels[k] for k in order), *(h.get_label() for h in extra)],
               loc="outside upper center", ncols=5)  # fmt: skip


def _columns(observable: Observable, data: Array, rows: Array, look: _Look) -> "Figure":
    """A short vector: one panel for each column, the histogram of the replicas with the 95 and 68 % ranges, and the data."""
    n = observable.size
    across = min(3, n)
    fig = new_figure(2.6 * across + 0.2, 2.2 * math.ceil(n / across) + 0.4)
    axes = fig.subplots(math.ceil(n / across), across, squeeze=False).ravel()
    pull, (below, out) = _pulls(data, rows), _below(data, rows)
    unit = f" [{observable.unit}]" if observable.unit else ""
    for j in range(n):
        bad = bool(out[j]) if look.prior else bool(np.abs(pull[j]) > _FAR)
        note = "no value" if np.isnan(data[j]) else _note(look, below[j], pull[j])
        _marginal(axes[j], data[j], rows[:, j], look, note, bad)
        axes[j].set_xlabel(_name(observable) if n == 1 else f"{observable.name}[{j}]{unit}")
    for ax in axes[n:]:
        ax.remove()
    _legend(fig, axes[0])
    return fig


def _note(look: _Look, below: float, pull: float) -> str:
    """The comparison of one value in words."""
    if look.prior:
        return f"{100 * below:.3g} % below"
    if np.isfinite(pull):
        return f"pull {pull:+.2f}".replace("-", "−")
    return "constant in the replicas" if np.isnan(pull) else "unlike the replicas' constant"


def _marginal(ax: "Axes", value: float, values: Array, look: _Look, note: str, bad: bool) -> None:
    """Histogram of simulated values, shaded by the central 95 and 68 %, with the data as a line."""
    values = values[np.isfinite(values)]
    whole = bool(values.size and (values == np.round(values)).all())
    low, high = (float(np.quantile(values, q)) for q in (0.002, 0.998)) if values.size else (0.0, 1.0)
    if np.isfinite(value):
        low, high = min(low, float(value)), max(high, float(value))
    if whole and high - low < 60:
        edges = np.arange(math.floor(low) - 0.5, math.ceil(high) + 1.5)
    else:
        pad = 0.04 * (high - low) or 0.5 * max(abs(high), 1.0) * 1e-2 or 0.5
        edges = np.linspace(low - pad, high + pad, 31)
    counts, _ = np.histogram(values, edges)
    centre = 0.5 * (edges[1:] + edges[:-1])
    ends = np.quantile(values, _LEVELS) if values.size else np.zeros(5)
    inner = (centre >= ends[1]) & (centre <= ends[3])
    wide = (centre >= ends[0]) & (centre <= ends[4])
    ax.stairs(np.where(wide, counts, 0), edges, fill=True, color=look.wide, label=f"95 % of the {look.words}")
    ax.stairs(np.where(inner, counts, 0), edges, fill=True, color=look.narrow, label="68 %")
    ax.stairs(counts, edges, color=look.line, linewidth=0.9)
    if np.isfinite(value):
        ax.axvline(float(value), color=_OUT if bad else "black", linewidth=1.6, label="data")
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.12 * max(float(counts.max()), 1.0)), yticks=[])
    ax.set_title(note, fontsize=9, color=_OUT if bad else "black")


def _traces(observable: Observable, data: Array, rows: Array, look: _Look) -> "Figure":
    """Channels (c, samples): the data as a line over the bands, and the comparison below each."""
    n = min(len(data), _CHANNELS)
    fig = new_figure(7.4, 3.2 * n + 0.8)
    grid = fig.add_gridspec(2 * n, 1, height_ratios=[2.2, 1] * n)
    edges, _, _ = _finite_edges(observable.edges, data.shape[-1])
    at = 0.5 * (edges[1:] + edges[:-1])
    bottom = None
    for c in range(n):
        top, bottom = _pair(fig, grid, row=c)
        low, lower, middle, upper, high = _quantiles(rows[:, c])
        top.fill_between(at, low, high, color=look.wide, linewidth=0, label=f"95 % of the {look.words}")
        top.fill_between(at, lower, upper, color=look.narrow, linewidth=0, label="68 %")
        top.plot(at, middle, color=look.line, linewidth=1.0, label="median")
        top.plot(at, data[c], color="black", linewidth=0.9, label="data", zorder=5)
        top.set_ylabel(_name(observable) if len(data) == 1 else f"{_name(observable)}\nchannel {c}")
        top.margins(x=0)
        top.set_xlim(at[0], at[-1])
        _compare(bottom, at, data[c], rows[:, c], look)
        if c == 0:
            first = top
    rest = f"; channels 0 to {n - 1} of {len(data)}" if n < len(data) else ""
    assert bottom is not None
    bottom.set_xlabel((f"[{observable.edges_unit}]" if observable.edges and observable.edges_unit else "sample") + rest)
    _legend(fig, first)
    return fig


def _image(observable: Observable, data: Array, rows: Array, look: _Look) -> "Figure":
    """Channels (c, h, w) or one (h, w): data, mean (or median) of the simulations, and pulls (or the fraction below)."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    pictures, stack = (data[None], rows[:, None]) if data.ndim == 2 else (data, rows)
    if pictures.ndim != 3:
        raise ShapeError(f"observable {observable.name} has shape {data.shape}; expected at most three dimensions for a picture")
    n, (height, width) = min(len(pictures), _CHANNELS), pictures.shape[1:]
    tall = float(np.clip(2.55 * height / width, 1.2, 5.0))
    fig = new_figure(10.0, n * (tall + 0.55) + 0.35)
    axes = fig.subplots(n, 3, squeeze=False)
    fixed_any = out_any = False
    for c in range(n):
        flat, d = stack[:, c].reshape(len(stack), -1), pictures[c].ravel()
        mean, sd = _moments(flat)
        middle = _quantiles(flat)[2] if look.prior else mean
        below, out = _below(d, flat)
        pull = _pulls(d, flat)
        fixed = (sd == 0) & ~(np.isinf(pull) | out)
        out = out if look.prior else np.isinf(pull) | (np.abs(pull) > _FAR)
        both = np.concatenate([d[np.isfinite(d)], middle[np.isfinite(middle)]])
        ends = {"vmin": float(both.min()), "vmax": float(both.max())} if both.size else {}
        compared = np.where(fixed, np.nan, below if look.prior else np.clip(pull, -1e3, 1e3))
        limit = float(np.clip(np.nanmax(np.abs(compared)) if np.isfinite(compared).any() else 3, 3, _FAR))
        colours: dict[str, Any] = {"cmap": "RdBu_r", **({"vmin": 0, "vmax": 1} if look.prior else {"vmin": -limit, "vmax": limit})}
        values_of: dict[str, Any] = {"cmap": "viridis", **ends}
        maps = (
            ("data", d, values_of, _name(observable)),
            (f"{'median' if look.prior else 'mean'} of the {look.words}", middle, values_of, _name(observable)),
            ("fraction of simulations below" if look.prior else "pull", compared, colours, ""),
        )
        for ax, (title, values, options, label) in zip(axes[c], maps, strict=True):
            ax.set_facecolor("#BDBDBD")  # seen where a pixel has no value
            aspect = "equal" if 0.2 < height / width < 5 else "auto"
            shown = np.ma.masked_invalid(values.reshape(height, width))
            picture = ax.imshow(shown, origin="lower", interpolation="nearest", aspect=aspect, **options)
            fig.colorbar(picture, ax=ax, shrink=0.9, label=label)
            ax.set_title(title if c == 0 else "", fontsize=10)
            ax.tick_params(top=False, right=False, direction="out", length=2.5)
            _whole_ticks(ax)
        if len(pictures) > 1:
            axes[c, 0].set_ylabel(f"channel {c}")
        y, x = np.divmod(np.flatnonzero(out), width)
        axes[c, 2].plot(x, y, "x", color="black", markersize=5, mew=1.2)
        fixed_any, out_any = fixed_any or bool(fixed.any() or np.isnan(compared).any()), out_any or bool(out.any())
    marks: list[Any] = []
    if out_any:
        words = "outside all simulations" if look.prior else f"|pull| > {_FAR:g}"
        marks.append(Line2D([], [], color="black", marker="x", linestyle="none", label=words))
    if fixed_any:
        marks.append(Patch(facecolor="#BDBDBD", label="constant or without a value"))
    if marks:
        fig.legend(handles=marks, loc="outside lower center", ncols=2)
    return fig


def _sets(observable: Observable, data: Array, rows: Array, look: _Look) -> "Figure":
    """Slots (n_max, k + 1) of events: histogram of each column over all events, and the number of events."""
    columns = min(data.shape[1] - 1, _MARGINALS)
    present = np.isfinite(rows[:, :, -1]) & (rows[:, :, -1] > 0.5)
    mine = data[np.isfinite(data[:, -1]) & (data[:, -1] > 0.5)]
    across = min(3, columns + 1)
    down = math.ceil((columns + 1) / across)
    fig = new_figure(3.2 * across + 0.2, 2.7 * down + 0.4)
    axes = fig.subplots(down, across, squeeze=False).ravel()
    some, some_present = rows[:_SETS], present[:_SETS]
    for j in range(columns):
        values = np.concatenate([rows[:, :, j][present], mine[:, j]])
        values = values[np.isfinite(values)]
        low, high = (float(np.quantile(values, q)) for q in (0.001, 0.999)) if values.size else (0.0, 1.0)
        if len(mine):
            low, high = min(low, float(np.nanmin(mine[:, j]))), max(high, float(np.nanmax(mine[:, j])))
        edges = np.linspace(low, high if high > low else low + 1.0, int(np.clip(round(2 * math.sqrt(max(len(mine), 1))), 8, 30)) + 1)
        counts = np.stack([np.histogram(x[m], edges)[0] for x, m in zip(some[:, :, j], some_present, strict=True)]).astype(np.float64)
        ax = axes[j]
        _stairs(ax, edges, _quantiles(counts), look)
        seen = np.histogram(mine[:, j], edges)[0]
        ax.plot(0.5 * (edges[1:] + edges[:-1]), seen, "o", color="black", markersize=3.5, label="data", zorder=5)
        ax.set(xlabel=f"{observable.name}, column {j}", ylabel="events per bin", xlim=(edges[0], edges[-1]))
        ax.set_ylim(0, 1.08 * max(float(seen.max()), float(np.quantile(counts, 0.975, axis=0).max()), 1.0))
    sizes = present.sum(axis=1).astype(np.float64)
    below, out = _below(np.array([float(len(mine))]), sizes[:, None])
    pull = _pulls(np.array([float(len(mine))]), sizes[:, None])
    _marginal(axes[columns], float(len(mine)), sizes, look, _note(look, below[0], pull[0]), bool(out[0]))
    rest = data.shape[1] - 1 - columns
    axes[columns].set_xlabel("number of events" + (f" ({rest} further columns not shown)" if rest else ""))
    for ax in axes[columns + 1 :]:
        ax.remove()
    _legend(fig, axes[0])
    return fig


def _features(ax: "Axes", title: str, observed: Array, rows: Array, marks: Sequence[tuple[str, int]]) -> None:
    mean, sd = _moments(rows)
    scale = np.where(sd > 0, sd, 1.0)
    z, simulated = (observed - mean) / scale, (rows - mean) / scale
    _, out = _below(observed, rows)
    k = len(z)
    edges = np.arange(k + 1) - 0.5
    low, high = np.quantile(simulated, [0.025, 0.975], axis=0)
    limit = float(np.clip(1.1 * max(np.abs(z).max(), np.quantile(np.abs(simulated), 0.999)), 3.0, 8.0))
    ax.stairs(np.clip(simulated.max(axis=0), -limit, limit), edges, baseline=np.clip(simulated.min(axis=0), -limit, limit), fill=True,
              color=_PRIOR.wide, label="all simulations")  # fmt: skip
    ax.stairs(high, edges, baseline=low, fill=True, color=_PRIOR.narrow, label="95 %")
    at, size = np.arange(k), 3.5 if k <= _LONG else 2.0
    shown, beyond = np.clip(z, -0.96 * limit, 0.96 * limit), np.abs(z) > limit
    ax.plot(at[~out & ~beyond], shown[~out & ~beyond], "o", color="black", markersize=size, label="observation")
    if out.any():
        ax.plot(at[out & ~beyond], shown[out & ~beyond], "o", color=_OUT, markersize=size + 1.5, label="outside", zorder=4)
    for side, marker in ((1, "^"), (-1, "v")):
        for which, colour in ((out, _OUT), (~out, "black")):
            chosen = beyond & which & (np.sign(z) == side)
            ax.plot(at[chosen], shown[chosen], marker, color=colour, markersize=5, zorder=4)
    for name, start in marks:
        if start:
            ax.axvline(start - 0.5, color=COLOURS["grey"], linewidth=0.8, linestyle="dotted")
        ax.text(start - 0.3, 0.97 * limit, name, va="top", fontsize=8, color=COLOURS["grey"])
    ax.set(xlim=(-0.5, k - 0.5), ylim=(-limit, limit), xlabel="column", ylabel="(value - mean) / sd")
    _whole_ticks(ax)
    ax.set_title(title, fontsize=10, loc="left")
    words = f"{int(out.sum())} of {k} outside all {len(rows)} simulations" if out.any() else f"all {k} within the simulations"
    ax.set_title(words, fontsize=9, loc="right", color=_OUT if out.any() else "black")
