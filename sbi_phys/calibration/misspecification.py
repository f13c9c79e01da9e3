"""Misspecification: could the simulations have produced the observation?

An amortised posterior is trained where simulations are; it returns an answer everywhere else too. Features (summaries, or the network's
embedding) of one half of the simulations define several scores of how unusual a row is. The other half ranks the observation:

    p = (1 + #{held-out score >= observed score}) / (n_held + 1).

This is exact for every score, because under the hypothesis the observation is one more held-out simulation. Features are standardised
and rotated onto principal components of unit variance ("whitened"). The scores are

- **mahalanobis**, the distance from the mean in whitened features: finds a shift in a direction of small variance that no marginal shows;
- **neighbours**, the mean distance to the k nearest simulations in whitened features: finds holes and curved manifolds;
- **density**, minus the log density of a Gaussian mixture, with the number of components chosen by BIC (an isolation forest divides along
  axes and missed points off a curved manifold that this score and the neighbours find);
- **span**, where simulations fill only a subspace (constant or exactly dependent columns, or more columns than rows): the distance from
  the subspace.

Several observations of the same origin are also compared as a set: by rank sums of the scores, the distance of their mean from that of the
simulations, and MMD (from 5 observations on), each with a permutation p-value, and by the most unusual one alone. These p-values are
combined by Bonferroni. For one observation its smallest p-value is ranked among the smallest p-values of held-out simulations, which is
exact.

Source: Schmitt et al. 2021, arXiv:2112.08866 (MMD in summary space); rank p-values as in conformal anomaly detection,
Laxhammar & Falkman 2015, Ann. Math. Artif. Intell. 74, 67.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import rankdata

from sbi_phys.calibration.inputs import check_names
from sbi_phys.calibration.pvalues import ALPHA, combine
from sbi_phys.calibration.two_sample import MIN_DRAWS, MMD, mmd
from sbi_phys.core.checks import as_array, as_real, require_int
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FeatureSpace", "Misspecification", "feature_space", "fit_mixture", "misspecification"]
MIN_SIMULATIONS = 40
MAX_PERMUTED = 500  # simulations in the MMD of a set
N_PERMUTATIONS = 999


@dataclass(frozen=True, kw_only=True, slots=True)
class Misspecification(Result):
    r"""Result of `misspecification`: observation(s) compared with simulations.

    scores {name: (m,)} of the observations and held_out {name: (n,)} of held-out simulations, larger is more unusual.
    pvalues {name: p} of each score (for a set: rank sum) and, for a set, 'mean', 'strangest' and 'mmd'. pvalue, for one observation the
    rank of its smallest p, for a set the smallest times their number. each (m,), p-value of every observation by itself.
    pulls (m, k), (feature - mean) / sd; conditional_pulls (m, k), the same given all other features (linear): a large value means that
    the feature does not fit the others. n_fit, n_held, simulations in the two halves; n_mixture, Gaussians in the learned density.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> features = np.random.default_rng(0).normal(size=(200, 2))
    >>> result = sp.calibration.misspecification(features, [0.0, 9.0], ["counts", "slope"])
    >>> sorted(result.scores), bool(result.pulls[0, 1] > 5)
    (['density', 'mahalanobis', 'neighbours'], True)
    """

    names: tuple[str, ...]
    scores: dict[str, Array]
    held_out: dict[str, Array]
    pvalues: dict[str, float]
    pvalue: float
    each: Array
    pulls: Array
    conditional_pulls: Array
    mmd: MMD | None
    n_mixture: int
    n_fit: int
    n_held: int

    @property
    def n(self) -> int:
        """Number of observations."""
        return int(self.pulls.shape[0])

    def rows(self) -> Rows:
        """Return the table: one row for each score, with its p-value."""
        return Rows.of({"name": list(self.pvalues), "pvalue": list(self.pvalues.values())})

    def summary(self) -> str:
        """Return the result in words."""
        what = "the observation is" if self.n == 1 else f"the {self.n} observations are"
        found = f"{what} {'unlike' if self.pvalue <= ALPHA else 'like'} the simulations"
        head = f"Misspecification, {self.n_fit} + {self.n_held} simulations, {len(self.names)} features: {found}"
        lines = [f"{head} (p = {self.pvalue:.3g}, of {len(self.pvalues)} tests together)"]
        lines += [f"  {name:<11}  p = {p:.3g}" for name, p in self.pvalues.items()]
        if self.n > 1:
            lines.append(
                f"  most unusual by itself: number {int(np.argmin(self.each))}, p = {self.each.min():.3g} before correction for {self.n}"
            )
        if self.pvalue <= ALPHA:
            i = int(np.argmin(self.each))
            for words, pulls in (("by itself", self.pulls[i]), ("given the others", self.conditional_pulls[i])):
                j = int(np.argmax(np.abs(pulls)))
                lines.append(f"  farthest {words}: {self.names[j]}, {pulls[j]:+.1f} sd")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the scores of the observations among those of held-out simulations, as normal quantiles."""
        return figures.calibration.misspecification(self, ax)


def misspecification(
    features_sim: ArrayLike,
    features_obs: ArrayLike,
    names: Sequence[str | Parameter] | None = None,
    *,
    n_neighbours: int = 10,
    max_simulations: int = 10_000,
    seed: int = 0,
) -> Misspecification:
    r"""Distance of an observation, or of a set, from the training simulations, with exact rank p-values.

    Args:
        features_sim: (n, k), features of simulations drawn from the prior (predictive), n >= 40; 1000 or more to find much.
        features_obs: (k,), or (m, k) for m independent observations.
        names: k names of features.
        n_neighbours: number of neighbours whose distances are averaged.
        max_simulations: maximum number of simulations used.
        seed: of the halves, the mixture and the permutations.

    Returns: Misspecification.   Raises: ShapeError, NonFiniteError, DataError (few rows, every feature constant), SettingError.
    Source: Schmitt et al. 2021, arXiv:2112.08866; see the module's docstring.
    Read: p < 0.05 = hardly any simulation is like this observation, and the posterior there is an extrapolation. Counts that span decades
        should be transformed first (log, square root), because whitening is linear.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> features = np.random.default_rng(0).normal(size=(200, 2))
    >>> [bool(sp.calibration.misspecification(features, x_obs).pvalue < 0.05) for x_obs in ([0.0, 0.0], [9.0, 0.0])]
    [False, True]
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    simulated, observed = _features(features_sim, features_obs)
    n, k = simulated.shape
    plain = tuple(f"feature_{j}" for j in range(k)) if names is None else check_names(names, k)[0]
    order = rng_for(seed, "misspecification").permutation(n)
    fit, held = np.array_split(simulated[order[: require_int("max_simulations", max_simulations, low=MIN_SIMULATIONS)]], 2)
    n_neighbours = min(require_int("n_neighbours", n_neighbours, low=1), len(fit))
    with threadpool_limits(1):  # the numbers must not depend on the number of BLAS threads
        space = feature_space(fit)
        mixture = fit_mixture(space.rows, seed)
        held_out, scores = (space.scores(x, n_neighbours, mixture) for x in (held, observed))
    each = _each(np.stack(list(held_out.values())), np.stack(list(scores.values())))
    pvalues, test = {name: _rank_pvalue(held_out[name], scores[name][0]) for name in scores}, None
    if len(observed) > 1:
        pvalues = _set_pvalues(held_out, scores, space.whiten(np.concatenate([observed, held])), rng_for(seed, "which rows"))
        pvalues["strangest"] = min(1.0, len(observed) * float(each.min()))
    if len(observed) >= MIN_DRAWS:
        test = mmd(space.whiten(observed), space.whiten(held), max_draws=MAX_PERMUTED, seed=seed)
        pvalues["mmd"] = test.pvalue
    pulls, conditional = space.pulls(observed)
    return Misspecification(
        names=plain,
        scores=scores,
        held_out=held_out,
        pvalues=pvalues,
        pvalue=combine(pvalues) if len(observed) > 1 else float(each[0]),
        each=each,
        pulls=pulls,
        conditional_pulls=conditional,
        mmd=test,
        n_mixture=int(mixture.n_components),
        n_fit=len(fit),
        n_held=len(held),
    )


def _features(features_sim: ArrayLike, features_obs: ArrayLike) -> tuple[Array, Array]:
    simulated, observed = as_array("features_sim", features_sim, (None, None)), as_real("features_obs", features_obs)
    n, k = simulated.shape
    if k == 0:
        raise ShapeError(f"features_sim has shape {simulated.shape}; expected at least one feature")
    note = "the columns of features_sim"
    observed = as_array("features_obs", observed[None] if observed.ndim == 1 else observed, (None, k), note=note)
    if n < MIN_SIMULATIONS or len(observed) == 0:
        raise DataError(f"features_sim has {n} rows, features_obs {len(observed)}; expected at least {MIN_SIMULATIONS} and 1")
    return simulated, observed


def _rank_pvalue(held_out: Array, observed: float) -> float:
    return float((1 + (held_out >= observed).sum()) / (held_out.size + 1))


def _each(held_out: Array, scores: Array) -> Array:
    """p-value (m,) of each observation over all scores (s, m): the rank of its smallest p among those of held-out rows (s, n).

    The observation and the held-out rows are ranked alike, so this is exact; Bonferroni would be conservative for correlated scores.
    """
    found = []
    for own in scores.T:
        smallest = rankdata(-np.column_stack([own, held_out]), method="max", axis=1).min(axis=0)
        found.append((smallest <= smallest[0]).mean())
    return np.array(found)


def _set_pvalues(held_out: dict[str, Array], scores: dict[str, Array], whitened: Array, rng: np.random.Generator) -> dict[str, float]:
    """Exact permutation p-values of a set, whose rows are the first of the pooled rows.

    'mean' is the distance of the mean of the set from that of all rows; the others are one-sided rank sums of the scores.
    """
    total = len(whitened)
    m = next(iter(scores.values())).size
    picks = np.stack([np.arange(m), *(rng.choice(total, m, replace=False) for _ in range(N_PERMUTATIONS))])
    statistics = {name: rankdata(np.concatenate([scores[name], held_out[name]]))[picks].sum(axis=1) for name in scores}
    centred = whitened - whitened.mean(axis=0)
    statistics["mean"] = np.array([(centred[pick].sum(axis=0) ** 2).sum() for pick in picks])
    return {name: float((t >= t[0] * (1 - 1e-9)).mean()) for name, t in statistics.items()}


MIXTURE_DIM = 20  # leading components used by the mixture, whose covariances have the square of that many entries
MIXTURES = (1, 2, 3, 5, 8, 12, 18)  # numbers of Gaussians that BIC chooses from
MIXTURE_ROWS = 5000
NO_WIDTH = 1e-6  # relative to the largest component: the sd below which a direction counts as constant


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpace:
    """Features (n, k) -> whitened components (n, c), distances, scores and pulls; `rows` (n, c) are the components of the simulations."""

    mean: Array
    scale: Array
    axes: Array
    empty: Array
    precision: Array
    rows: Array

    def _standard(self, x: Array) -> Array:
        return (x - self.mean) / self.scale

    def whiten(self, x: Array) -> Array:
        """Return the components, of unit variance over the simulations."""
        return np.asarray(self._standard(x) @ self.axes)

    def mahalanobis(self, x: Array) -> Array:
        """Return the distances (n,) from the mean of the simulations, in whitened features."""
        return np.asarray(np.sqrt((self.whiten(x) ** 2).sum(axis=1)))

    def scores(self, x: Array, n_neighbours: int, mixture: Any) -> dict[str, Array]:
        """Return {name: (n,)}, larger is more unusual: mahalanobis, neighbours, density, and span if the simulations lie in a subspace."""
        from sklearn.neighbors import NearestNeighbors

        w = self.whiten(x)
        near = NearestNeighbors(n_neighbors=n_neighbours).fit(self.rows).kneighbors(w)[0].mean(axis=1)
        density = -mixture.score_samples(w[:, :MIXTURE_DIM])
        found = {"mahalanobis": self.mahalanobis(x), "neighbours": near, "density": density}
        if self.empty.shape[1]:
            away = np.sqrt(((self._standard(x) @ self.empty) ** 2).sum(axis=1))
            # rows that lie in the subspace must not be ranked by rounding errors
            found["span"] = np.where(away < NO_WIDTH * np.sqrt(1 + (self._standard(x) ** 2).sum(axis=1)), 0.0, away)
        # equal rows get equal scores for any size of the block in which they are computed
        return {name: np.round(score, 9) for name, score in found.items()}

    def pulls(self, x: Array) -> tuple[Array, Array]:
        """Return (feature - mean) / sd (n, k), and the same given all other features, in units of the residual sd (linear)."""
        standard = self._standard(x)
        left = np.diag(self.precision)
        conditional = standard @ self.precision / np.sqrt(np.where(left > 0, left, 1.0))
        return standard, np.where(left > 0, conditional, standard)


def feature_space(fit: Array) -> FeatureSpace:
    """Mean and whitening of simulations' features (n, k).   Raises: DataError if no feature varies."""
    mean, sd = fit.mean(axis=0), fit.std(axis=0)
    varies = sd > 1e-12 * np.maximum(np.abs(fit).max(axis=0), 1e-300)
    if not varies.any():
        raise DataError("every feature is constant in the simulations; expected features that vary")
    # a constant column has no sd: deviations from it are measured in units of its value, or 1
    scale = np.where(varies, sd, np.where(mean != 0, np.abs(mean), 1.0))
    standard = np.where(varies, (fit - mean) / scale, 0.0)
    # singular values of the rows, because the covariance matrix would lose directions of relative sd below 1e-8
    _, size, vector = np.linalg.svd(standard, full_matrices=True) if fit.shape[0] < fit.shape[1] else _thin(standard)
    size = np.concatenate([size, np.zeros(fit.shape[1] - size.size)]) / np.sqrt(fit.shape[0])
    moves = size > NO_WIDTH * size[0]
    axes = vector[moves].T / size[moves]
    return FeatureSpace(
        mean=mean,
        scale=scale,
        axes=axes,
        empty=vector[~moves].T,
        precision=axes @ axes.T,
        rows=standard @ axes,
    )


def _thin(standard: Array) -> tuple[Array, Array, Array]:
    # the singular values and right vectors of a tall matrix are those of its R factor, a small square
    return np.linalg.svd(np.linalg.qr(standard, mode="r"))


def fit_mixture(rows: Array, seed: int) -> Any:
    """Gaussian mixture of whitened rows with the number of components of smallest BIC; the search ends when two in a row are worse."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    rows = rows[:MIXTURE_ROWS, :MIXTURE_DIM]
    n, dim = rows.shape
    best, lowest, worse = None, np.inf, 0
    for number in MIXTURES:
        if worse == 2 or (number > 1 and n < 5 * number * (dim + 1)):
            break
        mixture = GaussianMixture(number, reg_covar=1e-4, random_state=seed_for(seed, "mixture", number) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            bic = mixture.fit(rows).bic(rows)
        best, lowest, worse = (mixture, bic, 0) if bic < lowest else (best, lowest, worse + 1)
    return best
