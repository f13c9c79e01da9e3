"""Repair of posterior draws with held-out simulations: recalibrated ranks, one widening factor, and mixtures.

**recalibrate_ranks.** z = Phi^-1(F(theta* | x)), the normal score of the true value in the marginal of q, is N(0, 1) if q is calibrated.
Held-out simulations show its actual distribution H. A draw at level v among the draws of its observation moves to the quantile of q at
the level Phi(H^-1(v)): marginals are repaired, and the order of the draws, hence the copula, is kept. With H^-1(k / (n + 1)) the k-th
smallest of n held-out scores, exchangeability gives for a new pair (theta, x) and its recalibrated distribution function F'

    P(F'(theta) <= k / (n + 1)) = k / (n + 1),

exactly, for any q, averaged over x and over the held-out sets. Quantiles of q between draws are interpolated in (z, theta); beyond the
outermost draw they continue with the slope given by the sd of the draws.

**temper** moves draws away from their mean m(x), theta -> m(x) + s (theta - m(x)), with one factor s for all x and parameters (for a
Gaussian posterior this is tempering, q^(1/s^2)). Let D*^2 = (theta* - m)^T V^-1 (theta* - m) be the squared Mahalanobis distance of
the true value among the draws and D_l^2 that of one draw among the others. If q is calibrated, both have the same distribution, for any
shape of q and any number of draws. The factor is fixed by "coverage", the mean fraction of draws closer than D* / s is 1/2, or by
"score", s^2 = mean D*^2 / mean D_l^2, the maximum of the expected Gaussian log score of the widened posterior.

**mix_draws** draws from the mixture sum_k w_k q_k(theta | x): posteriors with independent errors are wider together and rarely
overconfident.

All repairs are averages over x: a posterior that is too narrow for some x and too wide for others stays so. One factor repairs neither a
bias nor a wrong correlation.

Source: Kuleshov, Fenner & Ermon 2018, arXiv:1807.00263 (recalibration); exact levels (conformal predictive distributions): Vovk et al.
2017, arXiv:1710.08894; Dawid & Sebastiani 1999, Annals of Statistics 27, 65 (score); ensembles: Hermans et al. 2021, arXiv:2110.06581.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import betaincinv, betaln, digamma, expit, ndtr, ndtri

from sbi_phys.calibration._results import Repair
from sbi_phys.calibration.bands import band_counts
from sbi_phys.calibration.inputs import check_names, check_pairs
from sbi_phys.calibration.pvalues import ALPHA
from sbi_phys.core.checks import as_array, as_real, require_choice, require_int
from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Rows
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "RankRecalibration",
    "Tempering",
    "check_bounds",
    "from_line",
    "mix_draws",
    "normal_scores",
    "recalibrate_ranks",
    "temper",
    "to_line",
]

LEVELS = np.arange(1, 100) / 100
METHODS = ("isotonic", "beta")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankRecalibration(Repair):
    r"""Result of `recalibrate_ranks`: monotone map of each parameter's levels, v -> the level of q at which a recalibrated v lies.

    scores (n, d), sorted normal scores of held-out true values in q. shape (d, 2), a and b of the beta CDF, NaN for 'isotonic'.
    level (99,), ecdf (99, d) of the PITs of q, band (99, 2), simultaneous 95 % band of a calibrated posterior. tolerance: with 95 %
    probability the distribution of the recalibrated PITs is within this of uniform at all levels ('isotonic'). bounds (d, 2).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> repair = sp.calibration.recalibrate_ranks(rng.normal(size=(500, 1)), 0.5 * rng.normal(size=(500, 50, 1)))
    >>> repair.apply(0.5 * rng.normal(size=(3, 50, 1))).shape, repair.repaired, repair.label
    ((3, 50, 1), True, 'repaired: recalibrated ranks')
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
        r"""Draws (m, l, d) of the recalibrated posterior, in the same order in every parameter.

        Args: draws (m, l, d) of q for any observations; l >= 2, preferably as many as in the fit.
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

    def rows(self) -> Rows:
        """Return the table: one row for each parameter, with the shape of its map ('beta')."""
        found = {"name": self.names, "method": self.method, "n": self.n, "tolerance": self.tolerance}
        return Rows.of(found | {"a": self.shape[:, 0], "b": self.shape[:, 1]})

    def summary(self) -> str:
        """Return the result in words: one line for all, one line for each parameter with the shift and width of q."""
        how = f"within {self.tolerance:.3f} at all levels (95 %)" if self.method == "isotonic" else "if a beta CDF fits"
        what = f"repaired; {self.method}, {self.n} held-out simulations x {self.n_draws} draws"
        lines = [f"Recalibrated ranks ({what}): new ranks are uniform {how}"]
        pad = max(map(len, self.names))
        for j, name in enumerate(self.names):
            shift, width = -self.scores[:, j].mean(), 1 / self.scores[:, j].std()
            lines.append(f"  {name:<{pad}}  corrects a shift of {shift:+.2f} sd and a width x{width:.2f}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the ECDF of the held-out PITs, which the map inverts, with the band of a calibrated posterior."""
        return figures.calibration.rank_map(self, ax)


def recalibrate_ranks(
    theta: ArrayLike,
    draws: ArrayLike,
    names: Sequence[str | Parameter] | None = None,
    *,
    method: str = "isotonic",
    bounds: ArrayLike | None = None,
) -> RankRecalibration:
    r"""Monotone recalibration of each parameter's PIT, F'(t) = R(F(t)) with R the distribution of the PITs.

    Args:
        theta: (n, d), true parameters of simulations not used in training; n >= 10, better 1000.
        draws: (n, l, d), draws of q for each.
        names: d names, or Parameters.
        method: 'isotonic', R is the ECDF of the PITs, with exact levels; 'beta', a beta CDF by maximum likelihood, smoother for small n,
            right only if the PITs follow it.
        bounds: (d, 2), the ends of the prior, +-inf for none: draws are moved on a logit or log scale and stay inside.

    Returns: RankRecalibration.   Raises: ShapeError, NonFiniteError, DataError, SettingError, SupportError.
    Source: Kuleshov, Fenner & Ermon 2018, arXiv:1807.00263.
    Read: repairs marginals only, on average over x; n held-out simulations leave an error of `tolerance`, about 1.5 / sqrt(n).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta, draws = rng.normal(size=(1000, 1)), 0.5 * rng.normal(size=(1000, 50, 1))  # N(0, 0.5^2) in place of N(0, 1)
    >>> repair = sp.calibration.recalibrate_ranks(theta, draws)
    >>> bool(0.8 < repair.apply(draws).std() < 1.2)
    True
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
        shape = np.array([_beta_shape(column) for column in pit.T])
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


def _beta_shape(pit: Array) -> Array:
    """Maximum-likelihood a and b of a beta density of values (n,) in (0, 1); the problem is convex in (a, b)."""
    left, right = np.log(pit).mean(), np.log1p(-pit).mean()

    def loss(log_shape: Array) -> tuple[float, Array]:
        a, b = np.exp(log_shape)
        gradient = digamma([a, b]) - digamma(a + b) - (left, right)
        return float(betaln(a, b) - a * left - b * right), gradient * (a, b)

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-10, 10)] * 2, options={"ftol": 1e-14, "gtol": 1e-9})
    return np.exp(found.x)


def normal_scores(theta: ArrayLike, draws: ArrayLike) -> Array:
    r"""Phi^-1 of the level of each true value among its draws (n, d), interpolated between draws, continued beyond them by their sd.

    Args: theta (n, d). draws (n, l, d).   Raises: ShapeError, NonFiniteError, DataError (draws that are all equal).
    Read: N(0, 1) for a calibrated q, up to 1 / l.
    """
    truth, samples = check_pairs(theta, draws)
    ordered = np.sort(samples, axis=1)
    sd = _spread(ordered)
    n_draws = ordered.shape[1]
    places = _places(n_draws)
    right = np.clip((ordered < truth[:, None]).sum(axis=1), 1, n_draws - 1)[:, None]  # the draw at or above the true value
    low, high = (np.take_along_axis(ordered, i, axis=1)[:, 0] for i in (right - 1, right))
    share = np.clip((truth - low) / np.where(high > low, high - low, 1.0), 0, 1)
    inner = places[right[:, 0] - 1] * (1 - share) + places[right[:, 0]] * share
    beyond = np.maximum(truth - ordered[:, -1], 0) + np.minimum(truth - ordered[:, 0], 0)
    return np.asarray(inner + beyond / sd, dtype=np.float64)


def _places(n_draws: int) -> Array:
    return np.asarray(ndtri(np.arange(1, n_draws + 1) / (n_draws + 1)), dtype=np.float64)


def _spread(ordered: Array) -> Array:
    return _require_width(ordered.std(axis=1))


def _require_width(sd: Array) -> Array:
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


CRITERIA = ("coverage", "score")
RANGE = (1e-2, 1e2)  # range of factors


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tempering(Repair):
    r"""Result of `temper`: widening by a factor, with its standard error from n held-out simulations.

    by, 'coverage' or 'score'. grid (g,), factors; content (g,), mean fraction of draws closer than the true value at each, 1/2 is right,
    with content_error (standard error at the chosen factor). raw, that fraction without widening. bounds (d, 2).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> repair = sp.calibration.temper(rng.normal(size=(500, 1)), 0.5 * rng.normal(size=(500, 50, 1)))
    >>> repair.apply(rng.normal(size=(3, 50, 1))).shape, repair.repaired, bool(repair.error < 0.3)
    ((3, 50, 1), True, True)
    """

    factor: float
    error: float
    by: str
    n: int
    n_draws: int
    grid: Array
    content: Array
    content_error: float
    raw: float
    bounds: Array

    @property
    def label(self) -> str:
        """Mark for tables and figures."""
        return f"repaired: widened x{self.factor:.2f}"

    def apply(self, draws: ArrayLike) -> Array:
        """Draws (m, l, d), moved away from the mean of each observation by the factor.

        Raises: ShapeError, NonFiniteError, SupportError (a draw outside `bounds`).
        """
        samples = as_real("draws", draws)
        if samples.ndim == 2 and self.bounds.shape[0] == 1:
            return self.apply(samples[:, :, None])[:, :, 0]
        line = to_line("draws", as_array("draws", samples, (None, None, self.bounds.shape[0])), self.bounds)
        mean = line.mean(axis=1, keepdims=True)
        return from_line(mean + self.factor * (line - mean), self.bounds)

    def summary(self) -> str:
        """Return the result in words."""
        away = abs(self.factor - 1) / self.error
        words = "q is too narrow" if self.factor > 1 else "q is too wide"
        words = words if away > 2 else "no widening is needed"
        how = "mean coverage is right" if self.by == "coverage" else "the expected log score is largest"
        return (
            f"Widening (repaired): x{self.factor:.3f} +- {self.error:.3f} about the mean, where {how} ({self.n} held-out simulations x "
            f"{self.n_draws} draws): {words}"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the mean content at the true value against the factor.   Read: it crosses 1/2 where coverage is right."""
        return figures.calibration.tempering_curve(self, ax)


def temper(theta: ArrayLike, draws: ArrayLike, *, by: str = "coverage", bounds: ArrayLike | None = None) -> Tempering:
    r"""Factor by which draws are moved away from their mean to give held-out true values the right coverage.

    Args:
        theta: (n, d), true parameters of simulations not used in training; n >= 10.
        draws: (n, l, d), draws of q for each; l >= d + 3.
        by: 'coverage' (default, robust against outliers) or 'score' (largest expected Gaussian log score).
        bounds: (d, 2), the ends of the prior, +-inf for none: draws are moved on a logit or log scale and stay inside.

    Returns: Tempering.
    Raises: ShapeError, NonFiniteError, DataError (too few draws, degenerate draws), SettingError, SupportError, ConvergenceError.
    Source: Dawid & Sebastiani 1999, Annals of Statistics 27, 65.
    Read: factor within two errors of 1 = nothing to repair. A bias increases the factor: check the shift from SBC first.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta, draws = rng.normal(size=(1000, 1)), 0.5 * rng.normal(size=(1000, 50, 1))  # N(0, 0.5^2) in place of N(0, 1)
    >>> bool(abs(sp.calibration.temper(theta, draws).factor - 2) < 0.4)
    True
    """
    truth, samples = check_pairs(theta, draws)
    by = require_choice("by", by, CRITERIA)
    edges = check_bounds(bounds, truth.shape[1])
    at_truth, at_draws = _distances(to_line("theta", truth, edges), to_line("draws", samples, edges))
    n = at_truth.size
    ordered = np.sort(at_draws, axis=1)

    def contents(log_factor: float) -> Array:
        return _content(ordered, at_truth / np.exp(log_factor))

    def error_at(log_factor: float) -> float:
        return float(contents(log_factor).std(ddof=1) / np.sqrt(n))

    if by == "coverage":
        log_factor = _half(contents)
        step = 0.1
        slope = (contents(log_factor - step).mean() - contents(log_factor + step).mean()) / (2 * step)
        relative = error_at(log_factor) / max(float(slope), 1e-12)
    else:
        ratio = at_truth**2 / (at_draws**2).mean()
        log_factor = float(np.log(ratio.mean()) / 2)
        relative = float(ratio.std(ddof=1) / np.sqrt(n) / (2 * ratio.mean()))
    factor = float(np.exp(log_factor))
    grid = np.exp(np.linspace(min(log_factor, 0) - 0.7, max(log_factor, 0) + 0.7, 61))
    return Tempering(
        factor=factor,
        error=factor * relative,
        by=by,
        n=n,
        n_draws=samples.shape[1],
        grid=grid,
        content=np.array([contents(v).mean() for v in np.log(grid)]),
        content_error=error_at(log_factor),
        raw=float(contents(0.0).mean()),
        bounds=edges,
    )


def _distances(truth: Array, samples: Array) -> tuple[Array, Array]:
    """Mahalanobis distance of the true value from the draws (n,), and of each draw from the other draws (n, l)."""
    n_draws, dim = samples.shape[1:]
    if n_draws < dim + 3:
        raise DataError(f"draws has {n_draws} draws per simulation; expected at least {dim + 3} for the covariance of {dim} parameters")
    centred = samples - samples.mean(axis=1, keepdims=True)
    covariance = np.einsum("nlj,nlk->njk", centred, centred) / (n_draws - 1)
    scale = _require_width(np.sqrt(np.einsum("njj->nj", covariance)))
    try:
        root = np.linalg.cholesky(covariance / (scale[:, :, None] * scale[:, None, :]))
    except np.linalg.LinAlgError as err:
        raise DataError(
            "draws lie on a plane (one parameter is a function of the others); expected independent parameters, leave one out"
        ) from err
    both = np.concatenate([(truth - samples.mean(axis=1))[:, None], centred], axis=1) / scale[:, None]
    squared = (np.linalg.solve(root, both.swapaxes(1, 2)) ** 2).sum(axis=1)
    # the distance of a draw from the other l - 1 follows from its distance from all l by a rank-one update of mean and covariance
    own = squared[:, 1:]
    room = np.maximum(1 - n_draws * own / (n_draws - 1) ** 2, 1e-12)
    left_out = own * n_draws**2 * (n_draws - 2) / (n_draws - 1) ** 3 / room
    return np.sqrt(squared[:, 0]), np.sqrt(left_out)


def _content(ordered: Array, distance: Array) -> Array:
    """Fraction of ordered draws (n, l) closer than a distance (n,)."""
    return np.asarray(((ordered < distance[:, None]).sum(axis=1) + 0.5) / (ordered.shape[1] + 1), dtype=np.float64)


def _half(contents: Callable[[float], Array]) -> float:
    low, high = np.log(RANGE)
    if not contents(low).mean() > 0.5 > contents(high).mean():
        raise ConvergenceError(f"no factor within {RANGE} gives a mean coverage of one half: the draws do not surround the true values")
    return float(brentq(lambda v: contents(v).mean() - 0.5, low, high, xtol=1e-6))


def mix_draws(posteriors: Sequence[ArrayLike], weights: ArrayLike | None = None, *, n_draws: int | None = None, seed: int = 0) -> Array:
    r"""Draws (n, l, d) of the mixture sum_k w_k q_k(theta | x) from draws of each member.

    Args:
        posteriors: K arrays (n, l_k, d), the same observations in the same order.
        weights: (K,), >= 0, default equal; normalised here.
        n_draws: l of the result, default the largest for which no draw is used twice.
        seed: of the selection and order of draws.

    Member k contributes w_k l draws, rounded at random for each observation, so that each draw comes from member k with probability w_k.
    Raises: ShapeError, NonFiniteError, DataError, SettingError.   Source: Hermans et al. 2021, arXiv:2110.06581 (ensembles).
    Read: wider than its members where they disagree.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> a, b = np.zeros((3, 40, 1)), np.ones((3, 40, 1))
    >>> sp.calibration.mix_draws([a, b], n_draws=20).sum(axis=1).ravel()
    array([10., 10., 10.])
    """
    members = [as_array(f"posteriors[{k}]", p, (None, None, None)) for k, p in enumerate(posteriors)]
    if not members:
        raise DataError("posteriors is empty; expected at least one array (n, l, d)")
    for k, member in enumerate(members):
        if (member.shape[0], member.shape[2]) != (members[0].shape[0], members[0].shape[2]):
            raise ShapeError(f"posteriors[{k}] has shape {member.shape}, posteriors[0] {members[0].shape}; expected equal n and d")
    share = np.ones(len(members)) if weights is None else as_array("weights", weights, (len(members),))
    if np.any(share < 0) or share.sum() <= 0:
        raise SettingError(f"weights is {share.tolist()}; expected numbers >= 0 with a positive sum")
    share = share / share.sum()
    sizes = np.array([m.shape[1] for m in members])
    most = int(np.min(np.floor(np.maximum(sizes - 1, 0)[share > 0] / share[share > 0]))) if len(members) > 1 else int(sizes[0])
    l_out = require_int("n_draws", most if n_draws is None else n_draws, low=1, high=most)
    rng = rng_for(seed, "mix draws")
    out = np.empty((members[0].shape[0], l_out, members[0].shape[2]))
    edges = np.concatenate([[0.0], np.cumsum(share)]) * l_out
    edges[-1] = l_out
    for i in range(out.shape[0]):
        # one random offset rounds all numbers at once: member k gets w_k l up to one, and w_k l on average
        counts = np.diff(np.floor(edges + rng.random())).astype(int)
        row = np.concatenate([m[i, rng.permutation(m.shape[1])[:c]] for m, c in zip(members, counts, strict=True)])
        out[i] = row[rng.permutation(l_out)]
    return out


def check_bounds(bounds: ArrayLike | None, dim: int) -> Array:
    """Return bounds (d, 2), low and high; None means no bounds.   Raises: ShapeError, NonFiniteError, SettingError (low >= high)."""
    if bounds is None:
        return np.tile([-np.inf, np.inf], (dim, 1))
    edges = as_real("bounds", bounds)
    if edges.shape != (dim, 2):
        raise ShapeError(f"bounds has shape {edges.shape}; expected ({dim}, 2): low and high of each parameter, +-inf for none")
    if np.isnan(edges).any():
        raise NonFiniteError("bounds has NaN; expected numbers, +-inf for none")
    if not np.all(edges[:, 0] < edges[:, 1]):
        raise SettingError(f"bounds is {edges.tolist()}; expected low < high for each parameter")
    return edges


def to_line(name: str, values: Array, bounds: Array) -> Array:
    """Map values (..., d) between their bounds to the real line: log((t - a) / (b - t)), or +-log|t - end| with one end.

    Raises: SupportError for a value at or beyond its bounds.
    """
    out = np.array(values, dtype=np.float64)
    for j, (low, high) in enumerate(bounds):
        column = values[..., j]
        if not np.all((column > low) & (column < high)):
            bad = float(column[~((column > low) & (column < high))][0])
            raise SupportError(f"{name} has {bad:g} in column {j}; expected values inside its bounds ({low:g}, {high:g})")
        if np.isfinite(low) and np.isfinite(high):
            out[..., j] = np.log(column - low) - np.log(high - column)
        elif np.isfinite(low):
            out[..., j] = np.log(column - low)
        elif np.isfinite(high):
            out[..., j] = -np.log(high - column)
    return out


def from_line(values: Array, bounds: Array) -> Array:
    """Map values (..., d) from the real line back between their bounds; inverse of `to_line`."""
    out = np.array(values, dtype=np.float64)
    for j, (low, high) in enumerate(bounds):
        column = values[..., j]
        if np.isfinite(low) and np.isfinite(high):
            out[..., j] = low + (high - low) * expit(column)
        elif np.isfinite(low):
            out[..., j] = low + np.exp(column)
        elif np.isfinite(high):
            out[..., j] = high - np.exp(-column)
    return out
