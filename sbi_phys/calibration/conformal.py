"""Conformal highest-density regions: credible regions with guaranteed coverage for any q and any number of simulations.

A score e(theta, x) increases from the inside of the posterior outwards. Let t be its k-th smallest value over n held-out simulations,
k = ceil((n + 1) a). A new pair (theta, x) is exchangeable with the held-out ones, so

    P(e(theta, x) <= t) = k / (n + 1)  in [a, a + 1 / (n + 1)]

for any q. {theta: e(theta, x) <= t} is the repaired region of content a. Given the n simulations at hand, its true content has a
Beta(k, n + 1 - k) distribution.

Scores: "density", e = -log q(theta | x), one density threshold for all x; "hpd", e = content of the smallest highest-density region of
q(. | x) that contains theta, estimated from draws, which enlarges the region of each x. The content is interpolated between draws; beyond
the last draw it continues in units of the sd of log q over the draws, so that a posterior that is much too narrow still gets a threshold.

The guarantee is an average over x. If features of x are given, the a-quantile of e given x is learned first (gradient boosting with the
quantile loss) on one part of the simulations, and e minus that quantile is the score on the other part: the average is still guaranteed,
and the coverage at each x is as good as the learned quantile.

Source: Vovk et al. 2005; Lei et al. 2018, arXiv:1604.04173; features: Romano, Patterson & Candes 2019, arXiv:1905.03222.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import betaincinv

from sbi_phys.calibration._results import Repair
from sbi_phys.core.checks import as_array, as_real, require_choice, require_int, require_number, require_same_rows
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ConformalRegions", "conformal_regions", "hpd_content"]
SCORES = ("density", "hpd")
MIN_TRAINING = 50  # with fewer, a learned quantile is noise


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConformalRegions(Repair):
    r"""Result of `conformal_regions`: {theta: e(theta, x) <= threshold (+ learned quantile at x)}, with coverage `guarantee`.

    level, requested content. score, 'density' (nats) or 'hpd' (content, may exceed 1). threshold, of the score, or of its
    excess over the learned quantile. n, simulations that determine it. guarantee, k / (n + 1). interval (2,), 95 % range of the content
    given these n simulations. scores (n,), their scores (minus the quantile). raw, coverage of the regions of q of this content with
    its error (2,), NaN without draws. quantile, the learned quantile or None. n_features, 0 without features.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> log_q = -0.5 * np.random.default_rng(0).normal(size=199) ** 2
    >>> regions = sp.calibration.conformal_regions(log_q, level=0.9)
    >>> regions.n, round(regions.guarantee, 3), regions.contains([0.0, -9.0])
    (199, 0.9, array([ True, False]))
    """

    level: float
    score: str
    threshold: float
    n: int
    guarantee: float
    interval: tuple[float, float]
    scores: Array
    raw: tuple[float, float]
    quantile: Any
    n_features: int

    @property
    def label(self) -> str:
        """Mark for tables and figures."""
        return "repaired: conformal regions" + (", conditional on x" if self.n_features else "")

    def contains(self, log_prob: ArrayLike, log_prob_draws: ArrayLike | None = None, features: ArrayLike | None = None) -> Mask:
        """Whether points lie in the region of their observation.

        Args:
            log_prob: (m,) or (m, j), log q(theta | x) of one or j points for each of m observations; -inf is outside.
            log_prob_draws: (m, l), log q of draws for each observation; needed by score 'hpd'.
            features: (m, k) of the observations; needed when the regions were fitted with features.

        Returns: bool, shaped as log_prob.   Raises: ShapeError, NonFiniteError, DataError, SettingError.
        """
        points = _log_prob("log_prob", log_prob)
        flat = points.ndim == 1
        points = points[:, None] if flat else points
        if points.ndim != 2 or points.shape[0] == 0:
            raise ShapeError(f"log_prob has shape {points.shape}; expected (m,) or (m, j), a row per observation")
        inside = _score(self.score, points, log_prob_draws) <= self._cut(features, points.shape[0])[:, None]
        return inside[:, 0] if flat else inside

    def mass(self, log_prob_draws: ArrayLike, features: ArrayLike | None = None) -> Array:
        """Fraction of the mass of q in the region of each observation (m,), from log q of draws (m, l).

        Raises: as `contains`.   Read: above `level` if q is too narrow and the region had to grow, below if q is too wide.
        """
        return self.contains(log_prob_draws, log_prob_draws if self.score == "hpd" else None, features).mean(axis=1)

    def _cut(self, features: ArrayLike | None, m: int) -> Array:
        if (features is not None) != bool(self.n_features):
            wanted = f"(m, {self.n_features}), as in the fit" if self.n_features else "None: the regions were fitted without"
            raise SettingError(f"features is {'None' if features is None else 'given'}; expected {wanted}")
        if features is None:
            return np.full(m, self.threshold)
        return self.threshold + np.asarray(self.quantile.predict(as_array("features", features, (m, self.n_features))), dtype=np.float64)

    def summary(self) -> str:
        """Return the result in words."""
        kind = "one density threshold for all x" if self.score == "density" else "content of q adapted to each x"
        given = f", quantile learned from {self.n_features} features" if self.n_features else ""
        low, high = self.interval
        text = (
            f"Conformal {100 * self.level:.3g} % regions (repaired; {kind}{given}) from {self.n} held-out simulations: a new true value is "
            f"inside with probability {100 * self.guarantee:.1f} %, averaged over x; with these simulations between {100 * low:.1f} and "
            f"{100 * high:.1f} % (95 % range)"
        )
        if np.isfinite(self.raw[0]):
            text += f"; the regions of q contained {100 * self.raw[0]:.1f} +- {100 * self.raw[1]:.1f} %"
        if self.score == "hpd" and not self.n_features:
            beyond = self.threshold > 1
            text += "; they extend beyond all draws" if beyond else f"; they are the regions of q of content {100 * self.threshold:.1f} %"
        return text

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the distribution of held-out scores with the threshold.   Read: the curve reaches `level` at the threshold."""
        return figures.calibration.conformal_scores(self, ax)


def conformal_regions(
    log_prob_theta: ArrayLike,
    log_prob_draws: ArrayLike | None = None,
    *,
    level: float = 0.9,
    score: str = "density",
    features: ArrayLike | None = None,
    train_share: float = 0.5,
    n_trees: int = 100,
    seed: int = 0,
) -> ConformalRegions:
    r"""Conformal highest-density regions from held-out simulations, P(theta in region) >= level for any q.

    Args:
        log_prob_theta: (n,), log q(theta* | x) of simulations not used in training, normalised for score 'density'; -inf allowed.
        log_prob_draws: (n, l), log q of draws; needed by score 'hpd', else only for the coverage of q in the summary.
        level: content, in (0, 1); at least level / (1 - level) simulations are needed.
        score: 'density' or 'hpd', see the module docstring; for 'hpd' log q needs no normalisation for each x.
        features: (n, k), x or a summary of it: makes the regions conditional on x.
        train_share: with features, the fraction of simulations that learn the quantile; the others determine the threshold.
        n_trees: of the gradient boosting.
        seed: of the split and the trees.

    Returns: ConformalRegions.   Raises: ShapeError, NonFiniteError, DataError (too few simulations), SettingError.
    Source: Lei et al. 2018, arXiv:1604.04173; Romano et al. 2019, arXiv:1905.03222.
    Read: the guarantee is an average over the prior of the simulations. It repairs regions, not draws.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta, draws = rng.normal(size=999), 0.5 * rng.normal(size=(999, 50))  # q = N(0, 0.5^2) is too narrow for N(0, 1)
    >>> regions = sp.calibration.conformal_regions(-2 * theta**2, -2 * draws**2, level=0.9)
    >>> round(regions.guarantee, 2), bool(regions.raw[0] < 0.8)
    (0.9, True)
    """
    at_theta = _log_prob("log_prob_theta", log_prob_theta)
    if at_theta.ndim != 1:
        raise ShapeError(f"log_prob_theta has shape {at_theta.shape}; expected (n,)")
    level = require_number("level", level, low=0, high=1, open_low=True, open_high=True)
    score = require_choice("score", score, SCORES)
    values = _score(score, at_theta[:, None], log_prob_draws)[:, 0]
    quantile, n_features = None, 0
    if features is not None:
        table = as_array("features", features, (at_theta.size, None))
        chosen = _training_rows(at_theta.size, train_share, seed)
        quantile, n_features = _learn(table[chosen], values[chosen], level, n_trees, seed), table.shape[1]
        values = values[~chosen] - np.asarray(quantile.predict(table[~chosen]), dtype=np.float64)
    n = values.size
    k = int(np.ceil((n + 1) * level * (1 - 1e-12)))
    if k > n:
        raise DataError(
            f"{n} simulations are left for the threshold; expected at least {int(np.ceil(level / (1 - level)))} for level {level:g}"
        )
    threshold = float(np.sort(values)[k - 1])
    if not np.isfinite(threshold):
        share = 100 * np.isinf(values).mean()
        raise DataError(
            f"log_prob_theta is -inf for {share:.0f} % of true values; expected a q whose support contains at least {100 * level:g} %"
        )
    return ConformalRegions(
        level=level,
        score=score,
        threshold=threshold,
        n=n,
        guarantee=k / (n + 1),
        interval=(float(betaincinv(k, n + 1 - k, 0.025)), float(betaincinv(k, n + 1 - k, 0.975))),
        scores=values,
        raw=_raw_coverage(at_theta, log_prob_draws, level),
        quantile=quantile,
        n_features=n_features,
    )


def hpd_content(log_prob: ArrayLike, log_prob_draws: ArrayLike) -> Array:
    r"""Content of the smallest highest-density region that contains each point, interpolated between draws -> (n, j).

    Args: log_prob (n, j), log q of j points per observation; -inf gives +inf. log_prob_draws (n, l), log q of l >= 2 draws.
    Beyond the outermost and innermost draws it continues by the distance in log q over the sd of log q of the draws.
    Raises: ShapeError, NonFiniteError, DataError (fewer than 2 draws, a density that is the same for all draws of an x).
    Source: Hyndman 1996, The American Statistician 50, 120 (regions from the draws' densities).
    Read: uniform on (0, 1) for true values of a calibrated q, up to 1 / l.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> draws = np.random.default_rng(0).normal(size=(1, 9999))  # of N(0, 1): the 68 % region ends at 1 sd
    >>> np.round(sp.calibration.hpd_content([[-0.5]], -0.5 * draws**2), 1)
    array([[0.7]])
    """
    points, at_draws = _log_prob("log_prob", log_prob), as_array("log_prob_draws", log_prob_draws, (None, None))
    if points.ndim != 2:
        raise ShapeError(f"log_prob has shape {points.shape}; expected (n, j)")
    n = require_same_rows(log_prob=points, log_prob_draws=at_draws)
    n_draws = at_draws.shape[1]
    if n_draws < 2:
        raise DataError(f"log_prob_draws has {n_draws} draws per observation; expected at least 2")
    depth = np.sort(-at_draws, axis=1)  # innermost first
    unit = depth.std(axis=1)
    if not np.all(unit > 0):
        raise DataError(f"log_prob_draws is constant in row {int(np.argmin(unit))}; expected densities that differ between draws")
    content = np.arange(1, n_draws + 1) / (n_draws + 1)
    out = np.stack([np.interp(-points[i], depth[i], content) for i in range(n)])
    beyond = np.maximum(-points - depth[:, -1:], 0) - np.maximum(depth[:, :1] + points, 0)
    return np.asarray(out + beyond / unit[:, None], dtype=np.float64)


def _log_prob(name: str, value: ArrayLike) -> Array:
    array = as_real(name, value)
    if np.isnan(array).any() or np.isposinf(array).any():
        raise NonFiniteError(f"{name} has NaN or +Inf; expected log densities (finite or -Inf)")
    if array.size == 0:
        raise DataError(f"{name} is empty; expected at least one log density")
    return array


def _score(score: str, points: Array, log_prob_draws: ArrayLike | None) -> Array:
    if score == "density":
        return -points
    if log_prob_draws is None:
        raise SettingError("log_prob_draws is None; expected log q of draws (n, l) for score 'hpd'")
    return hpd_content(points, log_prob_draws)


def _raw_coverage(at_theta: Array, log_prob_draws: ArrayLike | None, level: float) -> tuple[float, float]:
    if log_prob_draws is None:
        return float("nan"), float("nan")
    p = float((hpd_content(at_theta[:, None], log_prob_draws) <= level).mean())
    return p, float(np.sqrt(max(p * (1 - p), 1 / at_theta.size) / at_theta.size))


def _training_rows(n: int, share: float, seed: int) -> Mask:
    share = require_number("train_share", share, low=0, high=1, open_low=True, open_high=True)
    n_train = round(share * n)
    if n_train < MIN_TRAINING:
        raise DataError(f"train_share leaves {n_train} of {n} simulations to learn the quantile; expected at least {MIN_TRAINING}")
    chosen = np.zeros(n, dtype=bool)
    chosen[rng_for(seed, "conformal split").permutation(n)[:n_train]] = True
    return chosen


def _learn(features: Array, values: Array, level: float, n_trees: int, seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingRegressor

    finite = np.isfinite(values)
    if not finite.any():
        raise DataError("log_prob_theta is -inf for every true value; expected a q with some density at true values")
    model = GradientBoostingRegressor(
        loss="quantile",
        alpha=level,
        n_estimators=require_int("n_trees", n_trees, low=1),
        max_depth=2,
        # each leaf must contain enough true values beyond its quantile
        min_samples_leaf=max(10, int(np.ceil(3 / min(level, 1 - level)))),
        random_state=seed_for(seed, "conformal quantile") % 2**32,
    )
    return model.fit(features, np.minimum(values, values[finite].max()))
