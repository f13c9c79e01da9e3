r"""Is the observation one that the simulations could have made?

An amortised posterior is trained where simulations are; elsewhere it answers all the same. Features (summaries, or the network's
embedding) of one half of the simulations define three scores of strangeness, the other half ranks the observation:

    p = (1 + #{held-out score >= observed score}) / (n_held + 1),

which is exact for every score: under the hypothesis the observation is one more held-out simulation.

- **mahalanobis**, distance from the mean in whitened features: finds a step in a direction of little variance, hidden in every marginal.
- **neighbours**, mean distance to the k nearest simulations in whitened features: finds holes and curved manifolds.
- **density**, minus log density of a Gaussian mixture on whitened components, number of components by BIC: the learned score. (An
  isolation forest cuts along axes: it missed the points off a curved manifold that both this and neighbours find.)
- **span**, where simulations fill only a subspace (constant or exactly dependent columns): the distance from it.

Several observations of one origin are compared as a set as well: scores by the rank-sum test, the distance of their mean from the
simulations', and all of the set by MMD (from 5 observations on), each with its p-value from sharing the rows out anew; and the
strangest of them by itself. These p-values are combined by Bonferroni; those of one observation by ranking its smallest p among the
smallest p of held-out simulations, which is exact.

Source: Schmitt et al. 2021, arXiv:2112.08866 (MMD in summary space); rank p-values as in conformal anomaly detection,
Laxhammar & Falkman 2015, Ann. Math. Artif. Intell. 74, 67.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

from sbi_phys.calibration.distances import MIN_DRAWS, MMD, mmd
from sbi_phys.calibration.feature_space import feature_space
from sbi_phys.calibration.inputs import ALPHA, check_names, combine
from sbi_phys.core.checks import as_array, as_real, require_int
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Misspecification", "misspecification"]


MIN_SIMULATIONS = 40
MAX_PERMUTED = 500  # simulations in the MMD of a set
N_PERMUTATIONS = 999


@dataclass(frozen=True, kw_only=True, slots=True)
class Misspecification:
    r"""Observation(s) against simulations.

    scores {name: (m,)} of the observations and held_out {name: (n,)} of held-out simulations, larger is stranger.
    pvalues {name: p} of each score (a set: rank sum) and, of a set, 'mean', 'strangest' and 'mmd'. pvalue, of one observation the rank
    of its smallest p, of a set the smallest times their number. each (m,), p-value of every observation by itself.
    pulls (m, k), (feature - mean) / sd; conditional_pulls (m, k), the same given all other features (linear): where one is far out,
    that feature does not fit the others. n_fit, n_held, simulations in the two halves; n_mixture, Gaussians in the learned density.
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

    def summary(self) -> str:
        """Return the result in words."""
        what = "the observation is" if self.n == 1 else f"the {self.n} observations are"
        found = f"{what} {'unlike' if self.pvalue <= ALPHA else 'like'} the simulations"
        head = f"Misspecification, {self.n_fit} + {self.n_held} simulations, {len(self.names)} features: {found}"
        lines = [f"{head} (p = {self.pvalue:.3g}, of {len(self.pvalues)} tests together)"]
        lines += [f"  {name:<11}  p = {p:.3g}" for name, p in self.pvalues.items()]
        if self.n > 1:
            lines.append(
                f"  strangest by itself: number {int(np.argmin(self.each))}, p = {self.each.min():.3g} before correction for {self.n}"
            )
        if self.pvalue <= ALPHA:
            i = int(np.argmin(self.each))
            for words, pulls in (("by itself", self.pulls[i]), ("given the others", self.conditional_pulls[i])):
                j = int(np.argmax(np.abs(pulls)))
                lines.append(f"  farthest {words}: {self.names[j]}, {pulls[j]:+.1f} sd")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the scores of held-out simulations as normal quantiles, and the observations among them."""
        return figures.calibration_compare.misspecification(self, ax)


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
        n_neighbours: neighbours whose distance is averaged.
        max_simulations: most simulations used.
        seed: of the halves, the mixture and the permutations.

    Returns: Misspecification.   Raises: ShapeError, NonFiniteError, DataError (few rows, every feature constant), SettingError.
    Source: Schmitt et al. 2021, arXiv:2112.08866; see the module's docstring.
    Read: p < 0.05 = no simulation looks like this; posteriors at this observation are extrapolations. Counts over decades should be
    transformed (log, root) before: whitening is linear.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    simulated, observed = _features(features_sim, features_obs)
    n, k = simulated.shape
    plain = tuple(f"feature_{j}" for j in range(k)) if names is None else check_names(names, k)[0]
    order = rng_for(seed, "misspecification").permutation(n)
    fit, held = np.array_split(simulated[order[: require_int("max_simulations", max_simulations, low=MIN_SIMULATIONS)]], 2)
    n_neighbours = min(require_int("n_neighbours", n_neighbours, low=1), len(fit))
    with threadpool_limits(1):  # the same numbers on any machine
        space = feature_space(fit, seed)
        held_out, scores = space.scores(held, n_neighbours), space.scores(observed, n_neighbours)
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
        n_mixture=int(space.mixture.n_components),
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

    The observation and the held-out rows are ranked alike, so this is exact, where Bonferroni pays thrice for scores that agree.
    """
    found = []
    for own in scores.T:
        smallest = rankdata(-np.column_stack([own, held_out]), method="max", axis=1).min(axis=0)
        found.append((smallest <= smallest[0]).mean())
    return np.array(found)


def _set_pvalues(held_out: dict[str, Array], scores: dict[str, Array], whitened: Array, rng: np.random.Generator) -> dict[str, float]:
    """Exact p-values of a set, first in the pooled rows: which of them are the observed ones is drawn anew.

    'mean' is the distance of the set's mean from that of all; the others are one-sided rank sums of the scores.
    """
    total = len(whitened)
    m = next(iter(scores.values())).size
    picks = np.stack([np.arange(m), *(rng.choice(total, m, replace=False) for _ in range(N_PERMUTATIONS))])
    statistics = {name: rankdata(np.concatenate([scores[name], held_out[name]]))[picks].sum(axis=1) for name in scores}
    centred = whitened - whitened.mean(axis=0)
    statistics["mean"] = np.array([(centred[pick].sum(axis=0) ** 2).sum() for pick in picks])
    return {name: float((t >= t[0] * (1 - 1e-9)).mean()) for name, t in statistics.items()}
