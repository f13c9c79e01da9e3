r"""Repair of draws, rank by rank: a monotone recalibration of each parameter's levels.

z = Phi^-1(F(theta* | x)), the truth's normal score in q's marginal, is N(0, 1) if q is calibrated. Held-out simulations show the
distribution H that it has instead. A draw at level v among its fellows moves to q's own quantile at the level Phi(H^-1(v)): marginals
are repaired, and the order of the draws, hence the copula, is kept. With H^-1(k / (n + 1)) = the k-th smallest of n held-out scores,
exchangeability gives for a new pair (theta, x) and its recalibrated distribution function F'

    P(F'(theta) <= k / (n + 1)) = k / (n + 1),

exactly, for any q, averaged over x and over the held-out sets. Quantiles of q between draws are interpolated in (z, theta); beyond the
outermost draw they go on with the slope of the draws' sd.

It is an average over x: a posterior that is too narrow here and too wide there stays so.

Source: Kuleshov, Fenner & Ermon 2018, arXiv:1807.00263; exact levels (conformal predictive distributions): Vovk et al. 2017,
arXiv:1710.08894.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri
from scipy.stats import beta

from sbi_phys.calibration.bands import band_counts
from sbi_phys.calibration.bounded import check_bounds, from_line, to_line
from sbi_phys.calibration.inputs import ALPHA, check_names, check_pairs
from sbi_phys.core.checks import as_array, as_real, require_choice
from sbi_phys.core.errors import DataError
from sbi_phys.core.figures import figures
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RankRecalibration", "normal_scores", "recalibrate_ranks"]

LEVELS = np.arange(1, 100) / 100
METHODS = ("isotonic", "beta")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankRecalibration:
    r"""Monotone map of each parameter's levels, v -> the level of q at which a recalibrated v lies.

    scores (n, d), sorted normal scores of held-out truths in q. shape (d, 2), a and b of the beta CDF, NaN for 'isotonic'.
    level (99,), ecdf (99, d) of q's own PITs, band (99, 2), simultaneous 95 % band of a calibrated one. tolerance: with 95 %
    probability the recalibrated PITs' distribution is within this of uniform at all levels ('isotonic'). bounds (d, 2).
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    method: str
    scores: Array
    shape: Array
    n_draws: int
    level: Array
    ecdf: Array
    band: Array
    tolerance: float
    bounds: Array

    @property
    def n(self) -> int:
        """Number of held-out simulations."""
        return int(self.scores.shape[0])

    @property
    def repaired(self) -> bool:
        """True: a report marks what follows from this object as repaired."""
        return True

    @property
    def label(self) -> str:
        """Mark for tables and figures."""
        return "repaired: recalibrated ranks"

    def moved(self, score: ArrayLike) -> Array:
        """Normal score in q (m, d) at which the recalibrated normal score (m,) lies; increasing."""
        z = as_array("score", score, (None,))
        return np.stack([self._moved(z, j) for j in range(len(self.names))], axis=-1)

    def _moved(self, z: Array, j: int) -> Array:
        if self.method == "beta":
            a, b = self.shape[j]
            return np.where(z < 0, ndtri(betaincinv(a, b, ndtr(z))), -ndtri(betaincinv(b, a, ndtr(-z))))
        scores = self.scores[:, j]
        knots = ndtri(np.arange(1, self.n + 1) / (self.n + 1))
        beyond = np.maximum(z - knots[-1], 0) + np.minimum(z - knots[0], 0)
        return np.asarray(np.interp(z, knots, scores) + scores.std() * beyond, dtype=np.float64)

    def apply(self, draws: ArrayLike) -> Array:
        r"""Draws (m, l, d) of the recalibrated posterior: same order in every parameter, other values.

        Args: draws (m, l, d) of q for any observations; l >= 2, best as many as in the fit.
        Raises: ShapeError, NonFiniteError, DataError, SupportError (a draw outside `bounds`).
        """
        samples = as_real("draws", draws)
        if samples.ndim == 2 and len(self.names) == 1:
            return self.apply(samples[:, :, None])[:, :, 0]
        samples = as_array("draws", samples, (None, None, len(self.names)), note=f"columns {self.names}")
        if samples.shape[1] < 2:
            raise DataError(f"draws has {samples.shape[1]} draws per observation; expected at least 2")
        line = to_line("draws", samples, self.bounds)
        order = np.argsort(line, axis=1, kind="stable")
        ordered = np.take_along_axis(line, order, axis=1)
        places = _places(samples.shape[1])
        target = self.moved(places)
        out = np.empty_like(line)
        for j in range(line.shape[2]):
            moved = _quantiles(ordered[:, :, j], places, target[:, j])
            np.put_along_axis(out[:, :, j], order[:, :, j], moved, axis=1)
        return from_line(out, self.bounds)

    def summary(self) -> str:
        """Return the result in words: one line for all, one line per parameter with q's own shift and width."""
        how = (
            f"uniform within {self.tolerance:.3f} at all levels (95 %)"
            if self.method == "isotonic"
            else "uniform as far as a beta CDF fits"
        )
        lines = [f"Recalibrated ranks (repaired; {self.method}, {self.n} held-out simulations x {self.n_draws} draws): new ranks are {how}"]
        pad = max(map(len, self.names))
        for j, name in enumerate(self.names):
            shift, width = -self.scores[:, j].mean(), 1 / self.scores[:, j].std()
            lines.append(f"  {name:<{pad}}  undoes a shift of {shift:+.2f} sd and a width x{width:.2f}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the held-out PITs' ECDF, the map that is undone, with the band of a calibrated posterior."""
        return figures.calibration_repair.rank_map(self, ax)


def recalibrate_ranks(
    theta: ArrayLike,
    draws: ArrayLike,
    names: Sequence[str | Parameter] | None = None,
    *,
    method: str = "isotonic",
    bounds: ArrayLike | None = None,
) -> RankRecalibration:
    r"""Monotone recalibration of each parameter's PIT, F'(t) = R(F(t)) with R the PITs' own distribution.

    Args:
        theta: (n, d), truths of simulations q was not trained on; n >= 10, better 1000.
        draws: (n, l, d), draws of q for each.
        names: d names, or Parameters.
        method: 'isotonic', R is the PITs' ECDF (which is its own isotonic fit), with exact levels; 'beta', a beta CDF by maximum
            likelihood, smoother where n is small, right only as far as the PITs follow it.
        bounds: (d, 2), the prior's ends, +-inf where there is none: draws are moved on a logit or log scale and stay inside.

    Returns: RankRecalibration.   Raises: ShapeError, NonFiniteError, DataError, SettingError, SupportError.
    Source: Kuleshov, Fenner & Ermon 2018, arXiv:1807.00263.
    Read: marginals only, and on average over x; n held-out simulations leave an error of `tolerance`, about 1.5 / sqrt(n).
    """
    truth, samples = check_pairs(theta, draws)
    plain, labels = check_names(names, truth.shape[1])
    method = require_choice("method", method, METHODS)
    edges = check_bounds(bounds, truth.shape[1])
    scores = np.sort(normal_scores(to_line("theta", truth, edges), to_line("draws", samples, edges)), axis=0)
    n, dim = scores.shape
    shape = np.full((dim, 2), np.nan)
    if method == "beta":
        pit = np.clip(ndtr(scores), 1e-12, 1 - 1e-12)
        shape = np.array([beta.fit(column, floc=0, fscale=1)[:2] for column in pit.T])
    band = band_counts(n, LEVELS, 1 - ALPHA) / n
    return RankRecalibration(
        names=plain,
        labels=labels,
        method=method,
        scores=scores,
        shape=shape,
        n_draws=samples.shape[1],
        level=LEVELS,
        ecdf=np.stack([np.searchsorted(column, ndtri(LEVELS), side="right") / n for column in scores.T], axis=-1),
        band=band,
        tolerance=float(np.abs(band - LEVELS[:, None]).max()),
        bounds=edges,
    )


def normal_scores(theta: ArrayLike, draws: ArrayLike) -> Array:
    r"""Phi^-1 of each truth's level among its draws (n, d), interpolated between draws and continued beyond them by their sd.

    Args: theta (n, d). draws (n, l, d).   Raises: ShapeError, NonFiniteError, DataError (draws that are all equal).
    Read: N(0, 1) for a calibrated q, up to 1 / l.
    """
    truth, samples = check_pairs(theta, draws)
    ordered = np.sort(samples, axis=1)
    sd = _spread(ordered)
    n_draws = ordered.shape[1]
    places = _places(n_draws)
    right = np.clip((ordered < truth[:, None]).sum(axis=1), 1, n_draws - 1)[:, None]  # the draw at or above the truth
    low, high = (np.take_along_axis(ordered, i, axis=1)[:, 0] for i in (right - 1, right))
    share = np.clip((truth - low) / np.where(high > low, high - low, 1.0), 0, 1)
    inner = places[right[:, 0] - 1] * (1 - share) + places[right[:, 0]] * share
    beyond = np.maximum(truth - ordered[:, -1], 0) + np.minimum(truth - ordered[:, 0], 0)
    return np.asarray(inner + beyond / sd, dtype=np.float64)


def _places(n_draws: int) -> Array:
    return np.asarray(ndtri(np.arange(1, n_draws + 1) / (n_draws + 1)), dtype=np.float64)


def _spread(ordered: Array) -> Array:
    sd = ordered.std(axis=1)
    if not np.all(sd > 0):
        row, column = np.argwhere(~(sd > 0))[0]
        raise DataError(f"draws of row {row}, column {column} are all equal; expected draws that differ")
    return sd


def _quantiles(ordered: Array, places: Array, target: Array) -> Array:
    """Values (m, l) of ordered draws (m, l) at normal scores target (l,), the same for every row."""
    right = np.clip(np.searchsorted(places, target), 1, places.size - 1)
    share = np.clip((target - places[right - 1]) / (places[right] - places[right - 1]), 0, 1)
    inner = ordered[:, right - 1] * (1 - share) + ordered[:, right] * share
    beyond = np.maximum(target - places[-1], 0) + np.minimum(target - places[0], 0)
    return np.asarray(inner + _spread(ordered)[:, None] * beyond, dtype=np.float64)
