"""Figures of a training: loss and time of each epoch."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.core.errors import DataError
from sbi_phys.plotting.style import PALETTE, house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["loss_figure", "step_time_figure"]

History = Sequence[Sequence[Mapping[str, Any]]]


def loss_figure(history: History) -> "Figure":
    """Loss (nats) against epoch for every ensemble member: training thin, validation thick, best epoch marked.

    Args: history, one list a member of dicts with epoch, train, valid and, if known, learning_rate.   Raises: DataError.
    >>> from sbi_phys.plotting import loss_figure
    >>> member = [{"epoch": k, "train": 1 / k, "valid": 1.1 / k} for k in range(1, 9)]
    >>> loss_figure([member]).axes[0].get_ylabel()
    'loss per simulation [nats]'

    Read: validation turning up while training falls is over-fitting; both still falling is too short a training.
    """
    members = [_columns(member, k) for k, member in enumerate(_members(history))]
    rates = any(np.isfinite(m["learning_rate"]).any() for m in members)
    from matplotlib.ticker import MaxNLocator

    with house_style():
        fig = new_figure(7.0, 4.9 if rates else 4.0)
        axes = fig.subplots(2 if rates else 1, 1, sharex=True, squeeze=False, height_ratios=[3.2, 1] if rates else [1])[:, 0]
        ax = axes[0]
        for k, m in enumerate(members):
            colour, tag = PALETTE[k % len(PALETTE)], f"member {k + 1}: " if len(members) > 1 else ""
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
        axes[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
    return fig


def step_time_figure(history: History) -> "Figure":
    """Seconds per epoch over the training, one line per member, with its median.   Raises: DataError.

    >>> from sbi_phys.plotting import step_time_figure
    >>> member = [{"epoch": k, "train": 1.0, "valid": 1.0, "seconds": 0.5} for k in range(1, 9)]
    >>> step_time_figure([member]).axes[0].get_ylabel()
    'seconds per epoch'

    Read: a level line; a rise towards the end means that denormal numbers slow the arithmetic.
    """
    members = [_columns(member, k) for k, member in enumerate(_members(history))]
    if not any(np.isfinite(m["seconds"]).any() for m in members):
        raise DataError("history has no 'seconds'; expected it in each epoch's record for a figure of the step time")
    with house_style():
        fig = new_figure(7.0, 3.0)
        ax = fig.subplots()
        for k, m in enumerate(members):
            colour, median = PALETTE[k % len(PALETTE)], float(np.nanmedian(m["seconds"]))
            tag = f"member {k + 1}, " if len(members) > 1 else ""
            ax.plot(m["epoch"], m["seconds"], color=colour, marker=".", markersize=3, linewidth=1.0, label=f"{tag}median {median:.3g} s")
            ax.axhline(median, color=colour, linestyle="dashed", linewidth=0.8)
        ax.set_ylim(0, 1.15 * max(float(np.nanmax(m["seconds"])) for m in members))
        ax.set_xlabel("epoch")
        ax.set_ylabel("seconds per epoch")
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.legend(loc="lower right")
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
    """Axis limits around the plateau; losses of the first epochs may be above the axis range."""
    finite = np.concatenate([c[np.isfinite(c)] for c in curves])
    if not finite.size:
        raise DataError("history has no finite loss; expected at least one")
    low, middle, high = float(finite.min()), float(np.median(finite)), float(finite.max())
    top = min(high, low + 5 * (middle - low)) if middle > low else high
    margin = 0.06 * (top - low) or 0.5
    return low - margin, top + margin
