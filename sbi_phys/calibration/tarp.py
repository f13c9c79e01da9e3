"""TARP (tests of accuracy with random points): is the true parameter as far from a reference point as the posterior's draws are?

For a reference r(x) that is chosen without knowledge of theta*, let f = #{l: |theta_l - r| < |theta* - r|}. Given x, theta* and the
draws are exchangeable if q(theta | x) is right, so f is uniform on 0..L. The fraction of simulations with f < k is the coverage of the
balls around r that contain k of the L + 1 values: the expected coverage of all parameters together, without densities.

The integers f are tested for uniformity exactly (`bands`). A KS test between two grids of credibility and coverage, which is often
used, does not detect a width that is 20 % too small.

**References depend on x by default.** With references drawn independently of x, a posterior that equals the prior passes, because theta*
and draws from the prior are then equally distributed around r. Here r(x) = m(x) + c s(x) e + s g(x)/2: m is a ridge regression of theta
on x and |x - <x>| with prediction error s; s(x) is a second regression, of |theta - m(x)| on the same features; e is one random direction
for all rows, so that a bias does not cancel between references on opposite sides; g is a bounded random nonlinear function of x. If q
is the prior, theta* lies closer to m(x) than its draws do. Where x changes only the spread of theta, as with two modes at +-a(x), half
of the true values lie next to r(x).

The reference of row i must not depend on theta*_i. The regression for row i is therefore fitted only to rows that precede it in a seeded
random order (in blocks that double in size). Given everything used before, f_i is uniform, so the f are exactly *independent* and
uniform; with ordinary cross-fitting, where fold A predicts B and B predicts A, they would not be independent. The first block uses m = 0.
Distances are in units of the interquartile range of true values and draws together, which also treats both alike.

Source: Lemos et al. 2023, arXiv:2302.03026; the band: Sailynoja et al. 2022, arXiv:2103.10522.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.calibration._covariates import check_x, random_features, standardised
from sbi_phys.calibration.bands import band_counts, count_curves, curve_pvalue, rank_grid
from sbi_phys.calibration.inputs import check_pairs, count_below, require_varying
from sbi_phys.calibration.pvalues import ALPHA
from sbi_phys.core.checks import as_array, require_choice
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TARP", "tarp"]
OFFSET = 1.0  # c, in units of the regression's error: large enough to detect a bias, small enough to detect a wrong width
WOBBLE = 0.5  # size of g in the same units: it makes r depend on x where the mean of theta does not
FIRST_BLOCK = 50  # rows whose references use no regression
RIDGE = np.logspace(-3, 5, 17)
FROM_X, GIVEN, INDEPENDENT = "functions of x", "given", "independent of x"


@dataclass(frozen=True, kw_only=True, slots=True)
class TARP(Result):
    r"""Result of `tarp`: coverage of balls around reference points, n simulations with l draws of d parameters.

    ranks (n,), f, integers 0..l. level (k,), multiples of 1/(l+1). observed (k,), fraction of true values in balls of that content (the
    ECDF of f). band (k, 2), simultaneous 95 %. references (n, d), parameters' units; reference_kind, their origin.
    mean, of (f + 1/2)/(l + 1), 0.5 is right, with its standard error mean_err under calibration. pvalue, exact ECDF test.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> result = sp.calibration.tarp(rng.normal(size=(200, 2)), rng.normal(size=(200, 50, 2)))
    >>> result.reference_kind, result.references.shape
    ('independent of x', (200, 2))
    """

    ranks: Integers
    n_draws: int
    dim: int
    level: Array
    observed: Array
    band: Array
    references: Array
    reference_kind: str
    mean: float
    mean_err: float
    pvalue: float

    @property
    def n(self) -> int:
        """Number of simulations."""
        return int(self.ranks.shape[0])

    @property
    def labels(self) -> tuple[str, ...]:
        """Label of the one curve."""
        return (f"TARP, {self.dim} parameter{'s' * (self.dim > 1)}",)

    @property
    def ecdf(self) -> Array:
        """Observed coverage as a column (k, 1)."""
        return self.observed[:, None]

    @property
    def verdict(self) -> str:
        """'calibrated', or what is wrong."""
        if self.pvalue > ALPHA:
            return "calibrated"
        if abs(self.mean - 0.5) > 2 * self.mean_err:
            if self.mean > 0.5:
                return "true values farther from the references than the draws are: overconfident or biased"
            return "true values nearer to the references than the draws are: underconfident (equal to the prior, if by much) or biased"
        f = (self.ranks + 0.5) / (self.n_draws + 1)
        excess = float(np.mean((f - 0.5) ** 2)) - 1 / 12
        if abs(excess) > 2 / np.sqrt(180 * self.n):  # the variance of (U - 1/2)^2 is 1/180
            return (
                "true values too often among the nearest and farthest: overconfident or biased"
                if excess > 0
                else "true values too often in between: underconfident"
            )
        return "wrong shape"

    def summary(self) -> str:
        """Return the result in words, with the level at which the coverage deviates most."""
        head = (
            f"TARP, {self.n} simulations x {self.n_draws} draws, references {self.reference_kind}: {self.verdict} (p = {self.pvalue:.3g})"
        )
        worst = int(np.argmax(np.abs(self.observed - self.level)))
        level, got = self.level[worst], self.observed[worst]
        error = np.sqrt(level * (1 - level) / self.n)
        lines = [
            head,
            f"  largest deviation: regions of {100 * level:.0f} % contain {100 * got:.1f} % (+- {100 * error:.1f} if calibrated)",
        ]
        if self.reference_kind == INDEPENDENT:
            lines.append("  these references cannot detect a posterior that equals the prior: pass x, or references that depend on x")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, kind: str = "coverage") -> "Axes":
        """Draw kind 'coverage' (observed against level) or 'ecdf' (their difference), with the 95 % band.

        Raises: SettingError.   Read: below the diagonal, or below 0 = true values farther from the references than the draws are.
        """
        draw = {"coverage": figures.calibration.tarp_coverage, "ecdf": figures.calibration.rank_ecdf}
        return draw[require_choice("kind", kind, tuple(draw))](self, ax)


def tarp(theta: ArrayLike, draws: ArrayLike, x: ArrayLike | None = None, references: ArrayLike | None = None, *, seed: int = 0) -> TARP:
    r"""Coverage test with random points, f = #{l: |theta_l - r(x)| < |theta* - r(x)|} ~ U{0..L}.

    Args:
        theta: (n, d), true parameters of the simulations, prior units; n >= 10.
        draws: (n, l, d), independent posterior draws for each simulation, same units; l >= 2.
        x: (n, ...), the observations (or any summary of them), from which references are made, see the module's docstring.
        references: (n, d), your own, in theta's units: functions of x and of independent noise, never of theta* of the same row.
            Without x and references they are random and independent of x: a posterior that equals the prior then passes.
        seed: of the references and for breaking ties at random.

    Returns: TARP.
    Raises: ShapeError, NonFiniteError, DataError (few rows, one draw, constant parameter, constant x), SettingError (x and references).
    Source: Lemos et al. 2023, arXiv:2302.03026.
    Read: p < 0.05 = not calibrated. All parameters are tested together, including correlations that SBC does not see. The power is low
        for a bias perpendicular to the random direction e: SBC is the better test for a shift of one parameter.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta = rng.normal(size=(300, 1))
    >>> x = theta + 0.3 * rng.normal(size=(300, 1))
    >>> prior_draws = rng.normal(size=(300, 50, 1))  # a posterior that equals the prior
    >>> bool(sp.calibration.tarp(theta, prior_draws, x).pvalue < 1e-6), bool(sp.calibration.tarp(theta, prior_draws).pvalue > 1e-6)
    (True, True)
    """
    truth, samples = check_pairs(theta, draws)
    n, n_draws, dim = samples.shape
    for j in range(dim):
        require_varying(f"theta_{j}", truth[:, j], samples[:, :, j])
    if x is not None and references is not None:
        raise SettingError("x and references are both given; expected one: references replace those that are made from x")
    centre, scale = _scale(truth, samples)
    rng = rng_for(seed, "tarp references")
    if references is not None:
        points, kind = _given(references, truth), GIVEN
    elif x is not None:
        points, kind = centre + scale * _from_x(check_x(x, n), (truth - centre) / scale, rng), FROM_X
    else:
        points, kind = centre + scale * rng.standard_normal((n, dim)), INDEPENDENT
    to_truth = (((truth - points) / scale) ** 2).sum(axis=-1)
    to_draws = np.zeros((n, n_draws))
    for j in range(dim):  # one parameter at a time: no copy of all draws
        to_draws += ((samples[:, :, j] - points[:, j, None]) / scale[j]) ** 2
    return _from_ranks(count_below(to_truth, to_draws, rng_for(seed, "tarp ties")), n_draws, points, kind)


def _scale(truth: Array, samples: Array) -> tuple[Array, Array]:
    """Median and interquartile range (scaled to a normal sd) of true values and draws together; the same if the two are exchanged."""
    centre, scale = np.empty(truth.shape[1]), np.empty(truth.shape[1])
    for j in range(truth.shape[1]):
        pooled = np.concatenate([truth[:, j], samples[:, :, j].ravel()])
        low, centre[j], high = np.quantile(pooled, [0.25, 0.5, 0.75])
        scale[j] = (high - low) / 1.349 if high > low else pooled.std()  # the interquartile range of a discrete parameter may be 0
    return centre, scale


def _given(references: ArrayLike, truth: Array) -> Array:
    points = as_array("references", references, truth.shape, note="one row per row of theta")
    if np.mean(np.all(points == truth, axis=1)) > 0.5:
        raise DataError("references equal theta; expected functions of x that do not use the true value of their row")
    return points


def _from_x(x: Array, truth: Array, rng: np.random.Generator) -> Array:
    """References (n, d) in standardised units, each from its x and from the rows before it in a random order."""
    n, dim = truth.shape
    plain = standardised(x)
    features = np.hstack([plain, standardised(np.abs(plain))])
    direction = rng.standard_normal(dim)
    step, wobble = OFFSET * direction / np.linalg.norm(direction), WOBBLE * random_features(plain, dim, rng)
    order = rng.permutation(n)
    points = np.empty((n, dim))
    first = min(FIRST_BLOCK, n)
    points[order[:first]] = step + wobble[order[:first]]
    while first < n:
        before, block = order[:first], order[first : 2 * first]
        if np.all(features[before] == features[before[0]]):
            points[block] = step + wobble[block]
        else:
            mean, error = _ridge(features[before], truth[before])
            residual = np.abs(truth[before] - mean(features[before]))
            spread, _ = _ridge(features[before], residual)
            # |residual| of a normal is 0.8 sd on average; far from the data the linear prediction of the spread is limited
            width = np.clip(spread(features[block]) / 0.8, 0.2 * error, 5 * error)
            points[block] = mean(features[block]) + width * step + error * wobble[block]
        first *= 2
    return points


def _ridge(features: Array, values: Array) -> tuple[Callable[[Array], Array], Array]:
    """Ridge regression of values (m, d) on features: the prediction and its leave-one-out error (d,)."""
    from sklearn.linear_model import RidgeCV

    dim = values.shape[1]
    fit = RidgeCV(alphas=RIDGE, alpha_per_target=dim > 1).fit(features, values if dim > 1 else values[:, 0])
    return lambda rows: fit.predict(rows).reshape(-1, dim), np.sqrt(np.maximum(-np.atleast_1d(fit.best_score_), 1e-12))


def _from_ranks(ranks: Integers, n_draws: int, points: Array, kind: str) -> TARP:
    n, dim = points.shape
    k = rank_grid(n_draws)
    level = k / (n_draws + 1)
    counts = count_curves(ranks[:, None], k)[:, 0]
    return TARP(
        ranks=ranks,
        n_draws=n_draws,
        dim=dim,
        level=level,
        observed=counts / n,
        band=band_counts(n, level, 1 - ALPHA) / n,
        references=points,
        reference_kind=kind,
        mean=float((ranks + 0.5).mean() / (n_draws + 1)),
        # for a uniform distribution on 0..l
        mean_err=float(np.sqrt(((n_draws + 1) ** 2 - 1) / (12 * n)) / (n_draws + 1)),
        pvalue=curve_pvalue(counts, n, level),
    )
