"""Cells of equal numbers of rows over one or two quantities, and which values may define them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sbi_phys.calibration.inputs import check_names
from sbi_phys.core.checks import as_real, require_choice, require_finite, require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.types import AnyArray, Array, ArrayLike, Integers, Mask
from sbi_phys.priors import Parameter

__all__ = ["Cells", "candidate_ranks", "make_cells", "read_by"]

Names = tuple[tuple[str, ...], tuple[str, ...]]

MIN_ROWS_PER_CELL = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Cell of every value, index (n, 1) or, where each of the l + 1 values has its own, (n, l + 1); edges low, high (c, q)."""

    index: Integers
    low: Array
    high: Array

    @property
    def fixed(self) -> bool:
        """Whether a row's cell is the same whichever of its values is the truth."""
        return self.index.shape[1] == 1

    def sums(self, values: Array | Mask, candidate: int) -> AnyArray:
        """Sum of values (n,) over the rows of each cell -> (c,), with that candidate (0: the truth) of each row."""
        return np.bincount(self.index[:, candidate], weights=values, minlength=self.low.shape[0])


def read_by(
    by: ArrayLike | str | int | Sequence[str | int],
    truth: Array,
    samples: Array,
    names: Names,
    at: str,
    by_names: Sequence[str | Parameter] | None,
) -> tuple[Array, tuple[str, ...], tuple[str, ...], str]:
    """Values that define the cells, (n, 1 or l + 1, q), their names and labels, and 'posterior', 'truth' or 'given'.

    Raises: ShapeError, NonFiniteError, DataError, SettingError.
    """
    at = require_choice("at", at, ("posterior", "truth"))
    chosen = _columns(by, names[0])
    if chosen is None:
        if at == "truth":
            raise SettingError("at is 'truth' with an array `by`; expected names or columns of theta, whose true values are known")
        values, (plain, labels) = _given(by, truth, names[0], by_names)
        return values[:, None, :], plain, labels, "given"
    both = np.concatenate([truth[:, None, chosen], samples[:, :, chosen]], axis=1)
    values = both if at == "truth" else both.mean(axis=1, keepdims=True)
    return values, tuple(names[0][j] for j in chosen), tuple(names[1][j] for j in chosen), at


def _columns(by: object, names: tuple[str, ...]) -> list[int] | None:
    """Columns of theta that `by` names, or None if it is an array of values."""
    entries = [by] if isinstance(by, str | int | np.integer | Parameter) else list(by) if isinstance(by, list | tuple) else []
    if not entries or len(entries) > 2 or not all(isinstance(e, str | int | np.integer | Parameter) for e in entries):
        return None
    out = []
    for entry in entries:
        if isinstance(entry, str | Parameter):
            name = entry if isinstance(entry, str) else entry.name
            out.append(names.index(require_choice("by", name, names)))
        else:
            out.append(require_int("by", entry, low=0, high=len(names) - 1))
    if len(set(out)) < len(out):
        raise SettingError(f"by is {by!r}; expected two different parameters")
    return out


def _given(by: object, truth: Array, names: tuple[str, ...], by_names: Sequence[str | Parameter] | None) -> tuple[Array, Names]:
    values = as_real("by", by)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.shape[0] != truth.shape[0] or values.shape[1] not in (1, 2):
        raise ShapeError(
            f"by has shape {values.shape}; expected one or two names or columns of theta, or values (n,) or (n, 2), n = {len(truth)}"
        )
    require_finite("by", values)
    for j, name in enumerate(names):
        if any(np.array_equal(column, truth[:, j]) for column in values.T):
            raise DataError(f"by has the true values of {name!r}; no posterior is calibrated given the truth: use by={name!r}, at='truth'")
    if by_names is None:
        by_names = ("by",) if values.shape[1] == 1 else ("by_0", "by_1")
    return values, check_names(by_names, values.shape[1])


def make_cells(values: Array, n_bins: int | None) -> Cells:
    """Cut values (n, k, q) into n_bins cells of equal numbers per quantity; the second is cut anew within each slice of the first.

    Tied values share a cell, so that a discrete quantity may have fewer.   Raises: SettingError, DataError (a constant quantity).
    """
    n, _, q = values.shape
    if n_bins is None:
        n_bins = int(np.clip(n // 50, 2, 10)) if q == 1 else int(np.clip(np.sqrt(n / 25), 2, 8))
    n_bins = require_int("n_bins", n_bins, low=1)
    if n < MIN_ROWS_PER_CELL * n_bins**q:
        raise SettingError(f"n_bins is {n_bins} per quantity for {n} simulations; expected at least {MIN_ROWS_PER_CELL} rows in each cell")
    if np.any(values.min(axis=(0, 1)) == values.max(axis=(0, 1))):
        raise DataError("by is constant; expected a quantity that varies between simulations")
    corners: list[tuple[float, float, float, float]] = []
    first, edges = _cut(values[..., 0], np.ones(values.shape[:2], dtype=bool), n_bins)
    if q == 1:
        return Cells(index=first, low=edges[:-1, None], high=edges[1:, None])
    index = np.zeros_like(first)
    for i in range(edges.size - 1):
        second, inner = _cut(values[..., 1], first == i, n_bins)
        index = np.where(first == i, second + len(corners), index)
        corners += [(edges[i], inner[j], edges[i + 1], inner[j + 1]) for j in range(inner.size - 1)]
    box = np.array(corners)
    return Cells(index=index, low=box[:, :2], high=box[:, 2:])


def _cut(values: Array, chosen: Mask, n_bins: int) -> tuple[Integers, Array]:
    """Bin of every value (only those chosen count) and the edges (b + 1,), about equal numbers of the chosen in each."""
    inside = values[chosen]
    lowest = inside.min()
    cuts = np.quantile(inside, np.arange(1, n_bins) / n_bins, method="higher")
    if np.any(cuts == lowest) and inside.max() > lowest:  # ties at the lower end: cut above them, or nothing lies below
        cuts = np.where(cuts == lowest, inside[inside > lowest].min(), cuts)
    cuts = np.unique(cuts[cuts > lowest])
    return np.searchsorted(cuts, values, side="right").astype(np.int64), np.concatenate([[lowest], cuts, [inside.max()]])


def candidate_ranks(values: Array, rng: np.random.Generator) -> Integers:
    """Rank 0..l of each of the l + 1 values of every row among the others, ties in random order -> (n, l + 1)."""
    shuffle = rng.random(values.shape).argsort(axis=1)
    order = np.take_along_axis(values, shuffle, axis=1).argsort(axis=1, kind="stable")
    ranks = np.empty(values.shape, dtype=np.int64)
    np.put_along_axis(ranks, np.take_along_axis(shuffle, order, axis=1), np.arange(values.shape[1])[None], axis=1)
    return ranks
