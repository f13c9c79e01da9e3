r"""Repair of draws by one number, and mixtures of posteriors.

**Widening**, theta -> m(x) + s (theta - m(x)) about the draws' mean m(x): one factor s for all x and parameters (for a Gaussian
posterior this is tempering, q^(1/s^2)). D*^2 = (theta* - m)^T V^-1 (theta* - m) is the truth's squared Mahalanobis distance among the
draws, D_l^2 that of a draw among the others (left out of their mean and covariance): if q is calibrated, truth and draws are
exchangeable and both are distributed alike, whatever q's shape and however few the draws.

- by "coverage": the share of draws nearer than D* / s is 1/2 on average: ellipsoidal credible regions hold the truth as they should;
- by "score": s^2 = mean D*^2 / mean D_l^2, the maximum of the expected Gaussian log score of the widened posterior.

Errors are those of the finite number of held-out simulations. One number averages over x, shape, and parameters: a bias, a wrong
correlation, a width that is wrong only for some x stay.

**Mixtures** sum_k w_k q_k(theta | x): posteriors that err independently are together wider, and seldom overconfident.

Source: Dawid & Sebastiani 1999, Annals of Statistics 27, 65 (score); ensembles: Hermans et al. 2021, arXiv:2110.06581.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq

from sbi_phys.calibration.bounded import check_bounds, from_line, to_line
from sbi_phys.calibration.inputs import check_pairs
from sbi_phys.core.checks import as_array, as_real, require_choice, require_int
from sbi_phys.core.errors import ConvergenceError, DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Tempering", "mix_draws", "temper"]

CRITERIA = ("coverage", "score")
RANGE = (1e-2, 1e2)  # factors searched


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tempering:
    r"""Widening by a factor, with its standard error from n held-out simulations.

    by, 'coverage' or 'score'. grid (g,), factors; content (g,), mean share of draws nearer than the truth at each, 1/2 is right,
    with content_error (standard error at the chosen factor). raw, that share without widening. bounds (d, 2).
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
    def repaired(self) -> bool:
        """True: a report marks what follows from this object as repaired."""
        return True

    @property
    def label(self) -> str:
        """Mark for tables and figures."""
        return f"repaired: widened x{self.factor:.2f}"

    def apply(self, draws: ArrayLike) -> Array:
        """Draws (m, l, d), each observation's moved away from their mean by the factor.

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
        words = words if away > 2 else "no widening is called for"
        how = "mean coverage is right" if self.by == "coverage" else "the expected log score is largest"
        return (
            f"Widening (repaired): x{self.factor:.3f} +- {self.error:.3f} about the mean, where {how} ({self.n} held-out simulations x "
            f"{self.n_draws} draws): {words}"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the mean content at the truth against the factor.   Read: it crosses 1/2 where coverage is right."""
        return figures.calibration_repair.tempering_curve(self, ax)


def temper(theta: ArrayLike, draws: ArrayLike, *, by: str = "coverage", bounds: ArrayLike | None = None) -> Tempering:
    r"""Factor by which draws are moved away from their mean so that held-out truths lie among them as they should.

    Args:
        theta: (n, d), truths of simulations q was not trained on; n >= 10.
        draws: (n, l, d), draws of q for each; l >= d + 3.
        by: 'coverage' (default, robust against outliers) or 'score' (largest expected Gaussian log score).
        bounds: (d, 2), the prior's ends, +-inf where there is none: widened on a logit or log scale, draws stay inside.

    Returns: Tempering.
    Raises: ShapeError, NonFiniteError, DataError (too few draws, degenerate draws), SettingError, SupportError, ConvergenceError.
    Source: Dawid & Sebastiani 1999, Annals of Statistics 27, 65.
    Read: factor within two errors of 1 = nothing to repair; bias inflates the factor, look at SBC's shift first.
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
    """Mahalanobis distance of the truth from the draws (n,), and of each draw from the other draws (n, l)."""
    n_draws, dim = samples.shape[1:]
    if n_draws < dim + 3:
        raise DataError(f"draws has {n_draws} draws per simulation; expected at least {dim + 3} for the covariance of {dim} parameters")
    centred = samples - samples.mean(axis=1, keepdims=True)
    covariance = np.einsum("nlj,nlk->njk", centred, centred) / (n_draws - 1)
    scale = np.sqrt(np.einsum("njj->nj", covariance))
    if not np.all(scale > 0):
        row, column = np.argwhere(~(scale > 0))[0]
        raise DataError(f"draws of row {row}, column {column} are all equal; expected draws that differ")
    try:
        root = np.linalg.cholesky(covariance / (scale[:, :, None] * scale[:, None, :]))
    except np.linalg.LinAlgError as err:
        raise DataError("draws lie on a plane (one parameter follows from the others); expected free parameters, leave one out") from err
    both = np.concatenate([(truth - samples.mean(axis=1))[:, None], centred], axis=1) / scale[:, None]
    squared = (np.linalg.solve(root, both.swapaxes(1, 2)) ** 2).sum(axis=1)
    # a draw's distance from the other l - 1, from its distance from all l: their mean and covariance without it are rank-one updates
    own = squared[:, 1:]
    room = np.maximum(1 - n_draws * own / (n_draws - 1) ** 2, 1e-12)
    left_out = own * n_draws**2 * (n_draws - 2) / (n_draws - 1) ** 3 / room
    return np.sqrt(squared[:, 0]), np.sqrt(left_out)


def _content(ordered: Array, distance: Array) -> Array:
    """Share of ordered draws (n, l) nearer than a distance (n,)."""
    return np.asarray(((ordered < distance[:, None]).sum(axis=1) + 0.5) / (ordered.shape[1] + 1), dtype=np.float64)


def _half(contents: Callable[[float], Array]) -> float:
    low, high = np.log(RANGE)
    if not contents(low).mean() > 0.5 > contents(high).mean():
        raise ConvergenceError(f"no factor within {RANGE} puts the mean coverage at one half: the draws do not surround the truths at all")
    return float(brentq(lambda v: contents(v).mean() - 0.5, low, high, xtol=1e-6))


def mix_draws(posteriors: Sequence[ArrayLike], weights: ArrayLike | None = None, *, n_draws: int | None = None, seed: int = 0) -> Array:
    r"""Draws (n, l, d) of the mixture sum_k w_k q_k(theta | x) from draws of each member.

    Args:
        posteriors: K arrays (n, l_k, d), the same observations in the same order.
        weights: (K,), >= 0, default equal; normalised here.
        n_draws: l of the result, default the largest for which no draw is used twice.
        seed: of which draws are taken and of their order.

    Shares are w_k l rounded, the rounding at random per observation, so that each draw comes from member k with probability w_k.
    Raises: ShapeError, NonFiniteError, DataError, SettingError.   Source: Hermans et al. 2021, arXiv:2110.06581 (ensembles).
    Read: wider than its members where they disagree.
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
        # one random offset rounds all shares at once: member k gets w_k l up to one, and w_k l on average
        counts = np.diff(np.floor(edges + rng.random())).astype(int)
        row = np.concatenate([m[i, rng.permutation(m.shape[1])[:c]] for m, c in zip(members, counts, strict=True)])
        out[i] = row[rng.permutation(l_out)]
    return out
