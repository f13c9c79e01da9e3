"""Exact posterior on a grid, for one or two parameters: the reference for everything that is learned there.

The method is the midpoint rule on cells that are split where the mass is. It starts with a coarse grid over the box, drops the cells whose
density is far below the highest, splits the others, and repeats this until enough cells are left. Modes far apart are each
resolved, and a posterior that fills a millionth of the box costs no more than a wide one. Draws are uniform within a cell, so a
cell must hold little mass: the largest share is reported, and a share above a limit is an error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.core.checks import as_array, require_int
from sbi_phys.core.errors import ConvergenceError, NonFiniteError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows, draws_rows
from sbi_phys.core.types import Array, ArrayLike, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GridPosterior", "grid_posterior"]

_CHUNK = 20_000
# Cells so many nats below the highest are dropped. The first limits are wide, because the centre of a coarse cell may miss a narrow
# mode by many of its widths; cells below e^-25 at the end hold less than 1e-8 of the mass.
_KEEP = (1e4, 1e3, 100.0, 25.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GridPosterior(Result):
    """Normalised density on cells, returned by `grid_posterior`: centres (m, d), width (d,), log_density (m,), log_evidence in nats.

    max_cell_mass is the largest share of the mass within one cell, a measure of the grid's fineness.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> grid = sp.samplers.grid_posterior(lambda u: -0.5 * u[:, 0] ** 2, [-8], [8], n_cells=1000)
    >>> grid.sample(100, np.random.default_rng(0)).shape
    (100, 1)
    >>> grid.summary().split(":")[0]
    'Grid posterior, 1 parameter, log evidence 0.9189'
    """

    centres: Array
    width: Array
    log_density: Array
    log_evidence: float
    max_cell_mass: float

    @property
    def masses(self) -> Array:
        """Share of the mass in each cell (m,)."""
        mass = np.exp(self.log_density - self.log_density.max())
        return mass / mass.sum()

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw (n, d): a cell by its mass, uniform within it."""
        cell = rng.choice(len(self.centres), size=require_int("n", n, low=1), p=self.masses)
        return self.centres[cell] + (rng.random((n, len(self.width))) - 0.5) * self.width

    def rows(self) -> Rows:
        """Return the table: one row for each column, with mean, sd, median and central intervals."""
        return draws_rows(self.centres, [f"u_{j}" for j in range(self.centres.shape[1])], self.masses)

    def summary(self) -> str:
        """Return the result in words."""
        n = self.centres.shape[1]
        return (
            f"Grid posterior, {n} parameter{'s'[: n - 1]}, log evidence {self.log_evidence:.4f}: {len(self.centres)} cells,"
            f" the heaviest with {self.max_cell_mass:.2g} of the mass"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the marginals, in sd from their means."""
        return figures.results.marginals(self.centres, self.rows().column("name"), self.masses, ax)

    def mean(self) -> Array:
        """Posterior mean (d,)."""
        return self.masses @ self.centres


def grid_posterior(
    log_prob: Callable[[Array], Array], low: ArrayLike, high: ArrayLike, *, n_cells: int = 40_000, max_cell_mass: float = 0.02
) -> GridPosterior:
    """Normalise exp(log_prob) over a box.

    Args: log_prob: (n, d) -> (n,), unnormalised log density; -inf allowed. low, high (d,), d = 1 or 2.
    n_cells: evaluations at each level, about. max_cell_mass: refuse a coarser grid.
    Raises: ShapeError, NonFiniteError (NaN, or -inf everywhere), ConvergenceError (a mode is narrower than the cells).

    >>> import sbi_phys as sp
    >>> grid = sp.samplers.grid_posterior(lambda u: -0.5 * ((u - 1) ** 2).sum(axis=1), [-8, -8], [8, 8], n_cells=4000)
    >>> grid.mean().round(3).tolist(), round(grid.log_evidence, 3)
    ([1.0, 1.0], 1.838)
    """
    low, high = as_array("low", low, (None,)), as_array("high", high, (None,))
    if low.shape != high.shape or len(low) not in (1, 2) or not (low < high).all():
        raise ShapeError(f"box low={low.tolist()}, high={high.tolist()}; expected one or two axes with low < high")
    dim = len(low)
    side = int(require_int("n_cells", n_cells, low=100) ** (1 / dim))
    shape = np.full(dim, side)
    index = np.stack(np.meshgrid(*[np.arange(side)] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    for level in range(20):
        width = (high - low) / shape
        centres = low + (index + 0.5) * width
        values = _evaluate(log_prob, centres)
        kept = _with_neighbours(index[values > values.max() - _KEEP[min(level, len(_KEEP) - 1)]], shape)
        factor = int((n_cells / len(kept)) ** (1 / dim))
        if factor < 2 and level >= len(_KEEP) - 1:
            break
        factor = max(factor, 2)
        offsets = np.stack(np.meshgrid(*[np.arange(factor)] * dim, indexing="ij"), axis=-1).reshape(1, -1, dim)
        index, shape = (kept[:, None] * factor + offsets).reshape(-1, dim), shape * factor
    peak = values.max()
    mass = np.exp(values - peak)
    log_evidence = float(peak + math.log(mass.sum()) + np.log(width).sum())
    largest = float(mass.max() / mass.sum())
    if largest > max_cell_mass:
        raise ConvergenceError(
            f"one cell of the grid holds {largest:.2g} of the mass; expected at most {max_cell_mass}: raise n_cells = {n_cells}"
        )
    return GridPosterior(centres=centres, width=width, log_density=values - log_evidence, log_evidence=log_evidence, max_cell_mass=largest)


def _with_neighbours(index: Integers, shape: Integers) -> Integers:
    """Cells (m, d) and the cells that touch them, each once, because a neighbour may hold the edge of the mass."""
    dim = index.shape[1]
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * dim, indexing="ij"), axis=-1).reshape(1, -1, dim)
    cells = (index[:, None] + steps).reshape(-1, dim)
    cells = cells[((cells >= 0) & (cells < shape)).all(axis=1)]
    flat = np.unique(np.ravel_multi_index(tuple(cells.T), tuple(shape)))
    return np.stack(np.unravel_index(flat, tuple(shape)), axis=1)


def _evaluate(log_prob: Callable[[Array], Array], points: Array) -> Array:
    values = np.concatenate([log_prob(points[i : i + _CHUNK]) for i in range(0, len(points), _CHUNK)])
    if np.isnan(values).any() or not np.isfinite(values.max()):
        raise NonFiniteError("log_prob is NaN somewhere in the box, or -inf everywhere; expected a log density")
    return values
