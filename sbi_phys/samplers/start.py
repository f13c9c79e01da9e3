r"""Where chains start, and the log density that they are asked about: checked, counted, and if need be flattened."""

import math
from collections.abc import Callable

import numpy as np

from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["Checked", "LogDensity", "spread_start"]

LogDensity = Callable[[Array], Array]


class Checked:
    """A log density (m, d) -> (m,), to a power, whose answers are checked and counted; an error names the point."""

    def __init__(self, log_prob: LogDensity, dim: int) -> None:
        """Take a log density of d = dim coordinates."""
        self.log_prob, self.dim, self.n_evaluations, self.power = log_prob, dim, 0, 1.0

    def __call__(self, u: Array) -> Array:
        """Log density at u (m, d), times the power -> (m,).   Raises: ShapeError, NonFiniteError."""
        values = as_array("log_prob(u)", self.log_prob(u), (u.shape[0],), finite=False)
        bad = np.isnan(values) | np.isposinf(values)
        if bad.any():
            i = int(np.argmax(bad))
            raise NonFiniteError(f"log_prob is {values[i]} at u = {np.asarray(u)[i].tolist()}; expected a finite number or -inf")
        self.n_evaluations += values.size
        return self.power * values


def spread_start(
    log_prob: LogDensity, candidates: ArrayLike, n_walkers: int, rng: np.random.Generator, *, random_share: float = 0.25
) -> Array:
    r"""Choose n_walkers different starting places (n_walkers, d) among candidates (m, d): the likely ones, flattened, and some at random.

    Places are drawn without repetition with weights p^beta, where beta <= 1 is the largest power that leaves an effective number of
    4 n_walkers candidates (or half of all): modes that lie tens of nats lower are then still populated. A share `random_share` of places
    is uniform among the candidates of positive density. Candidates: draws of the prior, of a network's posterior, or both.

    Raises: ShapeError, NonFiniteError, SettingError, DataError (fewer candidates of positive density than walkers).
    """
    points = as_array("candidates", candidates, (None, None))
    n_walkers = require_int("n_walkers", n_walkers, low=1)
    share = require_number("random_share", random_share, low=0, high=1)
    if not isinstance(rng, np.random.Generator):
        raise SettingError(f"rng is {rng!r}; expected a numpy Generator, e.g. sbi_phys.core.rng.rng_for(seed)")
    points = np.unique(points, axis=0)
    values = Checked(log_prob, points.shape[1])(points)
    points, values = points[np.isfinite(values)], values[np.isfinite(values)]
    if points.shape[0] < n_walkers:
        raise DataError(f"candidates has {points.shape[0]} different points of positive density; expected at least n_walkers = {n_walkers}")
    wanted = min(4.0 * n_walkers, 0.5 * points.shape[0])
    beta = _power(values - values.max(), wanted)
    n_random = round(share * n_walkers)
    # Gumbel's trick: the largest of log weight + Gumbel noise are draws without repetition
    by_weight = np.argsort(-(beta * values + rng.gumbel(size=values.size)))[: n_walkers - n_random]
    rest = rng.permutation(np.setdiff1d(np.arange(values.size), by_weight))[:n_random]
    return points[rng.permutation(np.concatenate([by_weight, rest]))]


def _power(log_weights: Array, wanted: float) -> float:
    def size(beta: float) -> float:
        w = np.exp(beta * log_weights)
        return float(w.sum() ** 2 / (w**2).sum())

    if size(1.0) >= wanted:
        return 1.0
    low, high = -60.0, 0.0  # log beta
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if size(math.exp(middle)) >= wanted else (low, middle)
    return math.exp(low)
