"""Checks of a learned ratio r(x) = p_num(x) / p_ref(x) with events of both samples, and its recalibration.

- **mean_ratio**: E_ref[r] = 1 and E_num[1/r] = 1 hold for the exact ratio. r has heavy tails where the samples lie apart, so the p-value
  is that of the mean with its skewness transformed away (Hall 1992), and the number of events that dominate the mean is reported. If few
  events dominate, the sample has not reached the tail that determines the mean, and the sample mean is nearly always below 1; then
  only a mean that is too large counts, by its standard error or by 1 / mean (Markov's bound for any r >= 0). Third, with
  d = r / (1 + r), E_num[d] + E_ref[d] = 1 (the balance of arXiv:2208.13624); its terms lie in (0, 1) and never have heavy tails.
- **reliability**: among events to which the classifier assigns probability p, a fraction p comes from the numerator; exact binomial bands.
- **reweighting_auc**: the reference weighted with r must have the distribution of the numerator. A second classifier (gradient-boosted
  trees) that sees x is trained on half of the events (at most 1e5) to separate them; on the others its area under the ROC curve is 0.5,
  with a variance that follows from the ranks (DeLong, with weights). Only this check detects an r that is a calibrated function of too
  little of x.

All events must be held out: neither used in training nor in a recalibration. The numerator of a likelihood-to-evidence ratio at one theta
are events of p(x | theta), the reference events of p(x); over all theta they are joint and marginal pairs (theta, x).

**recalibrate_ratio** repairs the ratio for one theta. The score s = log r(x) of a network orders events better than it estimates their
ratio. Isotonic regression of the label (numerator or reference) on s gives the best monotone function; neighbouring levels are joined until
each block B contains enough events of both samples. With the rates P_num(B), P_ref(B) of a block,

    log r_calibrated(s) = s + c(s),      c(s_B) = log P_num(B) / P_ref(B) - s_B,      s_B = log mean_ref[e^s | B],

with c linear between the s_B and constant beyond them. With this s_B the reference weighted with r_calibrated has the rate of the
numerator in every block, and E_ref[r] = 1. Beyond the outer blocks, where counts alone would give 0 or infinity, the shape of the
network's ratio is kept. Small blocks follow every detail and are noisy (25 events of either sample leave an error of 28 %), so the
number of events in a block is chosen by cross-validation with preference for large blocks. If no deviation can be shown, one block
remains: a factor that makes E_ref[r] = 1.

Source: Cranmer, Pavez & Louppe 2015, arXiv:1506.02169; Hermans et al. 2021, arXiv:2110.06581; Hall 1992, J. R. Stat. Soc. B 54, 221;
DeLong et al. 1988, Biometrics 44, 837; scikit-learn's IsotonicRegression.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit, logsumexp, ndtr
from scipy.stats import binom, skew

from sbi_phys.calibration.pvalues import ALPHA, combine
from sbi_phys.core.checks import as_array, as_real, require_finite, require_int
from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "MeanRatio",
    "RatioCalibration",
    "RatioCheck",
    "Reliability",
    "ReweightingAUC",
    "check_ratio",
    "mean_ratio",
    "recalibrate_ratio",
    "reliability",
    "reweighting_auc",
]

MIN_EVENTS = 20

REFERENCE, NUMERATOR, BALANCE = "E_ref[r]", "E_num[1/r]", "E_num[d] + E_ref[d]"

MOST_TRAINED = 100_000  # maximum number of events of a sample for training the trees; more take time without effect
FEW = 50  # with fewer effective events a mean of r has little meaning


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanRatio(Result):
    """Result of `mean_ratio`: means that are 1 for the exact ratio, for m values of theta (m = 1 for one ratio); dimensionless.

    names (m,). mean {quantity: (m,)} with error {quantity: (m,)}, standard errors, for 'E_ref[r]', 'E_num[1/r]' and
    'E_num[d] + E_ref[d]', d = r / (1 + r). n_effective (m, 2), (sum r)^2 / sum r^2 of the reference, and of 1/r of the numerator.
    each {quantity: (m,)}, p-values; pvalues, the smallest of each quantity times m; pvalue, of all.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 500)) + [[1.0], [0.0]]
    >>> result = sp.calibration.mean_ratio(numerator - 0.5, reference - 0.5)  # log r = x - 1/2 of N(1, 1) and N(0, 1)
    >>> list(result.mean), bool(abs(result.mean["E_ref[r]"][0] - 1) < 0.3)
    (['E_ref[r]', 'E_num[1/r]', 'E_num[d] + E_ref[d]'], True)
    """

    names: tuple[str, ...]
    mean: dict[str, Array]
    error: dict[str, Array]
    n_effective: Array
    each: dict[str, Array]
    pvalues: dict[str, float]
    pvalue: float
    n_numerator: int
    n_reference: int

    def rows(self) -> Rows:
        """Return the table: one row for each quantity and value of theta."""
        shown = [(q, j) for q in self.mean for j in range(len(self.names))]
        found: dict[str, Any] = {"name": [self.names[j] for _, j in shown], "quantity": [q for q, _ in shown]}
        numbers = {"mean": self.mean, "mean_err": self.error, "pvalue": self.each}
        return Rows.of(found | {k: [values[q][j] for q, j in shown] for k, values in numbers.items()})

    def summary(self) -> str:
        """Return the result in words."""
        words = "no deviation found" if self.pvalue > ALPHA else "the means are NOT 1"
        lines = [f"Mean ratio, {self.n_numerator} numerator and {self.n_reference} reference events: {words} (p = {self.pvalue:.3g})"]
        pad = max(map(len, self.names))
        for i, name in enumerate(self.names):
            parts = [f"{q} = {self.mean[q][i]:.4f} +- {self.error[q][i]:.4f}" for q in self.mean]
            few = f"  (only {self.n_effective[i].min():.0f} events dominate a mean)" if self.n_effective[i].min() < FEW else ""
            lines.append(f"  {name:<{pad}}  " + "  ".join(parts) + few)
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the three means with their errors around 1, one position for each theta."""
        return figures.calibration.mean_ratio(self, ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability(Result):
    """Result of `reliability`: reliability curve of a classifier in b bins of about equal numbers of events.

    predicted (b,), mean of p in the bin; observed (b,), fraction of numerator events; band (b, 2), of that fraction, 95 % for all bins
    together, exact binomial. count (b,), events. error, mean |observed - predicted| over events. each (b,), p-values; pvalue, the smallest
    times b.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 1000)) + [[1.0], [0.0]]
    >>> result = sp.calibration.reliability(numerator - 0.5, reference - 0.5, n_bins=5)
    >>> result.verdict, result.predicted.shape
    ('calibrated', (5,))
    """

    predicted: Array
    observed: Array
    band: Array
    count: Integers
    error: float
    each: Array
    pvalue: float

    @property
    def verdict(self) -> str:
        """'calibrated', 'overconfident' (outputs too far from one half), 'underconfident' or 'biased'."""
        if self.pvalue > ALPHA:
            return "calibrated"
        outwards = self.count * (self.observed - self.predicted) * np.sign(self.predicted - 0.5)
        if abs(outwards.sum()) < 0.5 * np.abs(outwards).sum():
            return "biased"
        return "overconfident" if outwards.sum() < 0 else "underconfident"

    def rows(self) -> Rows:
        """Return the table: one row for each bin."""
        found = {"predicted": self.predicted, "observed": self.observed, "low": self.band[:, 0], "high": self.band[:, 1]}
        return Rows.of(found | {"n": self.count, "pvalue": self.each})

    def summary(self) -> str:
        """Return the result in words."""
        worst = int(np.argmin(self.each))
        return (
            f"Reliability, {self.count.sum()} events in {self.count.size} bins: {self.verdict} (p = {self.pvalue:.3g}); mean deviation"
            f" {self.error:.4f}, worst bin {self.observed[worst]:.3f} where {self.predicted[worst]:.3f} is predicted"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the observed fraction against the predicted one.   Read: flatter than the diagonal = overconfident."""
        return figures.calibration.reliability(self, ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReweightingAUC(Result):
    """Result of `reweighting_auc`: how well a second classifier separates reweighted reference and numerator; `float(result)` is the area.

    auc with error, 0.5 = equal. before with before_error, without weights. pvalue, one-sided, of auc <= 0.5; 1 if fewer than 50
    effective events (of few test events, a quarter of them) dominate the weight, because these cannot look like the numerator for any r.
    n_numerator, n_reference, test events; n_effective, (sum r)^2 / sum r^2 of the reference.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 1000, 1)) + [[[1.0]], [[0.0]]]
    >>> result = sp.calibration.reweighting_auc(numerator, reference, reference[:, 0] - 0.5)
    >>> bool(result.before > 0.65), bool(float(result) < 0.6)
    (True, True)
    """

    auc: float
    error: float
    before: float
    before_error: float
    pvalue: float
    n_numerator: int
    n_reference: int
    n_effective: float

    def __float__(self) -> float:
        return self.auc

    def summary(self) -> str:
        """Return the result in words."""
        words = "no difference found" if self.pvalue > ALPHA else "different"
        few = f"; only {self.n_effective:.0f} reference events dominate the weight" if self.n_effective < FEW else ""
        words = "not tested" if self.n_effective < min(FEW, self.n_reference / 4) else words
        return (
            f"Reweighting AUC {self.auc:.4f} +- {self.error:.4f} (p = {self.pvalue:.3g}), {self.before:.4f} without weights, "
            f"{self.n_numerator} numerator and {self.n_reference} reference events: {words}{few}"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the areas with and without weights, with errors, and 0.5."""
        return figures.calibration.reweighting_auc(self, ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioCheck(Result):
    """Result of `check_ratio`: all checks of one ratio. pvalue: the smallest of the three, times three.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 1000)) + [[1.0], [0.0]]
    >>> result = sp.calibration.check_ratio(numerator - 0.5, reference - 0.5, numerator[:, None], reference[:, None])
    >>> result.reliability.verdict, bool(result.pvalue > 0.001)
    ('calibrated', True)
    """

    mean: MeanRatio
    reliability: Reliability
    auc: ReweightingAUC
    pvalue: float

    def rows(self) -> Rows:
        """Return the table: one row for each check."""
        pvalues = {"mean": self.mean.pvalue, "reliability": self.reliability.pvalue, "auc": self.auc.pvalue}
        return Rows.of({"name": list(pvalues), "pvalue": list(pvalues.values())})

    def summary(self) -> str:
        """Return the results in words, one check after the other."""
        return "\n".join([self.mean.summary(), self.reliability.summary(), self.auc.summary()])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the reliability curve; `figure` draws all checks."""
        return self.reliability.plot(ax)

    def figure(self) -> "Figure":
        """Draw the checks side by side."""
        return figures.calibration.ratio_check(self)


def mean_ratio(log_r_numerator: ArrayLike, log_r_reference: ArrayLike, *, names: Sequence[str] | None = None) -> MeanRatio:
    r"""Test E_ref[r] = 1, E_num[1/r] = 1 and E_num[d] + E_ref[d] = 1, d = r / (1 + r).

    Args:
        log_r_numerator: (n1,) or, for m values of theta, (m, n1), log r of events drawn from the numerator, nats.
        log_r_reference: (n0,) or (m, n0), of events drawn from the reference; -inf where the numerator is impossible.
        names: m names, e.g. of the theta.

    Returns: MeanRatio.   Raises: ShapeError, NonFiniteError, DataError (fewer than 20 events).
    Source: arXiv:1506.02169, 2208.13624; p-values: Hall 1992.
    Read: E_ref[r] > 1 means that r is too large somewhere. A mean dominated by few events (`n_effective`) can only be found too large;
        use the third mean then.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 500)) + [[1.0], [0.0]]
    >>> bool(sp.calibration.mean_ratio(numerator, reference).pvalue < 1e-4)  # log r = x is too large by 1/2
    True
    """
    one, zero = log_ratios("log_r_numerator", log_r_numerator), log_ratios("log_r_reference", log_r_reference, low=True)
    if len(one) != len(zero):
        raise ShapeError(f"log_r_numerator has {len(one)} rows, log_r_reference {len(zero)}; expected one row for each theta in both")
    plain = tuple(f"theta {i}" for i in range(len(one))) if names is None and len(one) > 1 else tuple(names or ("r",))
    if len(plain) != len(one):
        raise ShapeError(f"names has {len(plain)} entries; expected {len(one)}, one for each theta")
    found: dict[str, Array] = {
        REFERENCE: np.array([_mean(_exp(row)) for row in zero]),
        NUMERATOR: np.array([_mean(_exp(-row)) for row in one]),
        BALANCE: np.array([_balance(expit(a), expit(b)) for a, b in zip(one, zero, strict=True)]),
    }
    each = {q: values[:, 2] for q, values in found.items()}
    pvalues = {q: float(min(1.0, p.size * p.min())) for q, p in each.items()}
    return MeanRatio(
        names=plain,
        mean={q: values[:, 0] for q, values in found.items()},
        error={q: values[:, 1] for q, values in found.items()},
        n_effective=np.array([[_effective(_exp(b)), _effective(_exp(-a))] for a, b in zip(one, zero, strict=True)]),
        each=each,
        pvalues=pvalues,
        pvalue=combine(pvalues),
        n_numerator=one.shape[1],
        n_reference=zero.shape[1],
    )


def reliability(log_r_numerator: ArrayLike, log_r_reference: ArrayLike, n_bins: int = 20) -> Reliability:
    r"""Reliability curve of p(x) = n1 r / (n1 r + n0), the probability that an event of the pooled sample comes from the numerator.

    Args:
        log_r_numerator: (n1,), log r of held-out numerator events, nats.
        log_r_reference: (n0,), of held-out reference events; -inf allowed.
        n_bins: bins of equal numbers of events (fewer if p takes few values).

    Returns: Reliability.   Raises: ShapeError, NonFiniteError, DataError, SettingError.
    Source: arXiv:1506.02169; bands: binomial, Bonferroni over bins.
    Read: observed closer to one half than predicted = overconfident. A correct curve means that r is right for the information that the
        network uses; whether it uses all information in x is tested by `reweighting_auc`.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 1000)) + [[1.0], [0.0]]
    >>> sp.calibration.reliability(3 * (numerator - 0.5), 3 * (reference - 0.5)).verdict  # log r is x - 1/2
    'overconfident'
    """
    one, zero = single_ratio("log_r_numerator", log_r_numerator), single_ratio("log_r_reference", log_r_reference, low=True)
    n_bins = require_int("n_bins", n_bins, low=2)
    label = np.repeat([1.0, 0.0], [one.size, zero.size])
    p = expit(np.concatenate([one, zero]) + np.log(one.size / zero.size))
    edges = np.unique(np.quantile(p, np.linspace(0, 1, n_bins + 1)[1:-1]))
    cell = np.searchsorted(edges, p, side="right")
    used, cell = np.unique(cell, return_inverse=True)
    count = np.bincount(cell)
    predicted, hits = np.bincount(cell, p) / count, np.bincount(cell, label)
    clipped = np.clip(predicted, 1e-15, 1 - 1e-15)
    # the sum of unequal Bernoulli variables is narrower than the binomial of their mean: the test is conservative
    tails = np.minimum(binom.cdf(hits, count, clipped), binom.sf(hits - 1, count, clipped))
    each = np.minimum(1.0, 2 * tails)
    share = ALPHA / (2 * used.size)
    band = np.stack([binom.ppf(share, count, clipped), binom.isf(share, count, clipped)], axis=1) / count[:, None]
    observed = hits / count
    return Reliability(
        predicted=predicted,
        observed=observed,
        band=band,
        count=count.astype(np.int64),
        error=float((count * np.abs(observed - predicted)).sum() / count.sum()),
        each=each,
        pvalue=float(min(1.0, each.size * each.min())),
    )


def reweighting_auc(x_numerator: ArrayLike, x_reference: ArrayLike, log_r_reference: ArrayLike, *, seed: int = 0) -> ReweightingAUC:
    r"""Area under the ROC curve of a classifier of numerator events against reference events with weights r(x).

    Args:
        x_numerator: (n1, k), held-out numerator events (with theta among the columns, if r depends on it).
        x_reference: (n0, k), held-out reference events.
        log_r_reference: (n0,), log r of these, nats; -inf is weight 0. Only ratios of weights matter.
        seed: of the halves and the trees.

    Returns: ReweightingAUC.   Raises: ShapeError, NonFiniteError, DataError (fewer than 20 events, no weight).
    Source: arXiv:1506.02169, section 3; variance: DeLong et al. 1988 with weights.
    Read: 0.5 = the trees cannot separate the reweighted reference from the numerator; p small = they can.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 1000, 1)) + [[[1.0]], [[0.0]]]
    >>> bool(sp.calibration.reweighting_auc(numerator, reference, np.zeros(1000), seed=1).pvalue < 1e-4)  # r = 1 is wrong
    True
    """
    one, zero = (as_array(name, x, (None, None)) for name, x in (("x_numerator", x_numerator), ("x_reference", x_reference)))
    if one.shape[1] != zero.shape[1] or one.shape[1] == 0:
        raise ShapeError(f"x_numerator has shape {one.shape}, x_reference {zero.shape}; expected the same number of columns, at least one")
    log_w = single_ratio("log_r_reference", log_r_reference, low=True)
    if log_w.size != len(zero):
        raise ShapeError(f"log_r_reference has {log_w.size} values; expected {len(zero)}, one for each row of x_reference")
    if len(one) < MIN_EVENTS or np.isneginf(log_w).all():
        raise DataError(
            f"x_numerator has {len(one)} events, {np.isfinite(log_w).sum()} of the reference have weight; expected {MIN_EVENTS}"
        )
    w = np.exp(log_w - log_w.max())
    rng = rng_for(seed, "reweighting halves")
    halves = [rng.permutation(n) for n in (len(one), len(zero))]
    train = [h[: min(len(h) // 2, MOST_TRAINED)] for h in halves]
    test = [h[len(t) :] for h, t in zip(halves, train, strict=True)]
    areas = []
    for name, weight in (("weighted", w), ("plain", np.ones_like(w))):
        if not weight[train[1]].sum() > 0 or not weight[test[1]].sum() > 0:
            raise DataError("one half of the reference events has no weight; expected more reference events with log_r above -inf")
        predict = _trees(one[train[0]], zero[train[1]], weight[train[1]], seed_for(seed, "trees", name) % 2**32)
        areas.append(_weighted_auc(predict(one[test[0]]), predict(zero[test[1]]), weight[test[1]]))
    (auc, error), (before, before_error) = areas
    n_effective = _effective(w[test[1]])
    judged = n_effective >= min(FEW, len(test[1]) / 4)
    return ReweightingAUC(
        auc=auc,
        error=error,
        before=before,
        before_error=before_error,
        pvalue=(float(ndtr(-(auc - 0.5) / error)) if error > 0 else float(auc <= 0.5)) if judged else 1.0,
        n_numerator=len(test[0]),
        n_reference=len(test[1]),
        n_effective=n_effective,
    )


def check_ratio(
    log_r_numerator: ArrayLike, log_r_reference: ArrayLike, x_numerator: ArrayLike, x_reference: ArrayLike, *, seed: int = 0
) -> RatioCheck:
    """All checks of one ratio: `mean_ratio`, `reliability` and `reweighting_auc`.

    Args: log_r_numerator (n1,), log_r_reference (n0,), nats; x_numerator (n1, k), x_reference (n0, k), the same events; seed.
    Raises: ShapeError, NonFiniteError, DataError.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 1000)) + [[1.0], [0.0]]
    >>> log_r = lambda x: 2 * (x - 0.5)  # the exact one is x - 1/2
    >>> result = sp.calibration.check_ratio(log_r(numerator), log_r(reference), numerator[:, None], reference[:, None])
    >>> bool(result.pvalue < 1e-3)
    True
    """
    mean, curve = mean_ratio(log_r_numerator, log_r_reference), reliability(log_r_numerator, log_r_reference)
    auc = reweighting_auc(x_numerator, x_reference, log_r_reference, seed=seed)
    return RatioCheck(mean=mean, reliability=curve, auc=auc, pvalue=min(1.0, 3 * min(mean.pvalue, curve.pvalue, auc.pvalue)))


def log_ratios(name: str, value: ArrayLike, *, low: bool = False) -> Array:
    """Log ratios as (m, n), finite, or -inf if `low`."""
    array = as_real(name, value)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] == 0:
        raise ShapeError(f"{name} has shape {np.shape(value)}; expected (n,) or (m, n), one row for each theta")
    if array.shape[1] < MIN_EVENTS:
        raise DataError(f"{name} has {array.shape[1]} events; expected at least {MIN_EVENTS}")
    bad = ~np.isfinite(array) & ~(low & np.isneginf(array))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise NonFiniteError(f"{name} is {array[where]} at {where}, {bad.sum()} in all; expected finite values{' or -inf' if low else ''}")
    return array


def single_ratio(name: str, value: ArrayLike, *, low: bool = False) -> Array:
    """One log ratio for each event, (n,), checked as in `log_ratios`.   Raises: ShapeError, NonFiniteError, DataError."""
    if np.ndim(value) != 1:
        raise ShapeError(f"{name} has shape {np.shape(value)}; expected (n,), one ratio at a time")
    return log_ratios(name, value, low=low)[0]


def _exp(log_r: Array) -> Array:
    """e^log_r, limited so that its cube does not overflow; such a large term fails every check anyway."""
    return np.exp(np.minimum(log_r, 200.0))


def _mean(values: Array) -> tuple[float, float, float]:
    """Mean, standard error and p-value of mean 1: by Hall's transformation, or one-sided if few events dominate the mean."""
    n, mean, sd = values.size, float(values.mean()), float(values.std(ddof=1))
    if sd <= 1e-12 * abs(mean):
        return mean, 0.0, float(abs(mean - 1) < 1e-9)
    if _effective(values) < min(2 * FEW, 0.5 * n):
        error = sd / np.sqrt(n)
        return mean, error, min(1.0, 2 * min(2 * float(ndtr(-(mean - 1) / error)), 1 / mean)) if mean > 1 else 1.0
    u, g = (mean - 1) / sd, float(skew(values))
    z = np.sqrt(n) * (u + g * u**2 / 3 + g**2 * u**3 / 27 + g / (6 * n))
    return mean, sd / np.sqrt(n), float(2 * ndtr(-abs(z)))


def _balance(d_numerator: Array, d_reference: Array) -> tuple[float, float, float]:
    mean = float(d_numerator.mean() + d_reference.mean())
    error = float(np.sqrt(d_numerator.var(ddof=1) / d_numerator.size + d_reference.var(ddof=1) / d_reference.size))
    return mean, error, float(2 * ndtr(-abs(mean - 1) / error)) if error > 1e-12 else float(abs(mean - 1) < 1e-9)


def _effective(weights: Array) -> float:
    return float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0


def _trees(one: Array, zero: Array, weight: Array, seed: int) -> Callable[[Array], Array]:
    """Probability of the numerator learned by boosted trees, as a function of rows."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    model = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=15, early_stopping=False, random_state=seed)
    weights = np.concatenate([np.full(len(one), 1.0), weight * (len(one) / weight.sum())])
    with threadpool_limits(1):
        model.fit(np.concatenate([one, zero]), np.repeat([1, 0], [len(one), len(zero)]), sample_weight=weights)
    return lambda rows: np.asarray(model.predict_proba(rows)[:, 1])


def _weighted_auc(one: Array, zero: Array, weight: Array) -> tuple[float, float]:
    """Area under the ROC curve of scores (ties count one half), reference events weighted, and its standard error."""
    order = np.argsort(zero)
    ranked, total = zero[order], np.concatenate([[0.0], np.cumsum(weight[order])])
    below, upto = (np.searchsorted(ranked, one, side=side) for side in ("left", "right"))
    above_zero = (total[below] + total[upto]) / (2 * total[-1])  # of each numerator event: weight of the reference below it
    ordered = np.sort(one)
    above_one = 1 - (np.searchsorted(ordered, zero, side="left") + np.searchsorted(ordered, zero, side="right")) / (2 * one.size)
    auc = float(above_zero.mean())
    variance = above_zero.var(ddof=1) / one.size + float((weight**2 * (above_one - auc) ** 2).sum()) / total[-1] ** 2
    return auc, float(np.sqrt(variance))


FEWEST = 25  # smallest number of events of either sample in a block
_RATIO = 4  # between the sizes of blocks that are tried
_FOLDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioCalibration(Result):
    """Result of `recalibrate_ratio`: log r + correction(log r) for one theta, linear between b blocks, constant beyond them.

    score (b,), log of the mean r of the block's reference events; value (b,), log of the ratio of event rates in it, with error (b,);
    count (b, 2), numerator and reference events. before, the reliability before the repair, on the same events; pvalue, of that
    reliability: whether a repair was needed.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 1000)) + [[1.0], [0.0]]
    >>> repair = sp.calibration.recalibrate_ratio(numerator, reference)  # log r = x is too large by 1/2
    >>> repair.apply([0.0, 1.0]).shape, int(repair.count.sum())
    ((2,), 2000)
    """

    score: Array
    value: Array
    error: Array
    count: Integers
    before: Reliability
    pvalue: float

    def apply(self, log_r: ArrayLike) -> Array:
        """Calibrated log r, of any shape, nats. The correction is constant beyond the outer blocks.

        Raises: NonFiniteError.
        """
        array = as_real("log_r", log_r)
        require_finite("log_r", array)
        return array + np.interp(array, self.score, self.value - self.score)

    def rows(self) -> Rows:
        """Return the table: one row for each block of events."""
        counts = {"n_numerator": self.count[:, 0], "n_reference": self.count[:, 1]}
        return Rows.of({"score": self.score, "value": self.value, "value_err": self.error} | counts)

    def summary(self) -> str:
        """Return the result in words."""
        n1, n0 = self.count.sum(axis=0)
        largest = float(np.abs(self.value - self.score).max())
        return (
            f"Isotonic calibration from {n1} numerator and {n0} reference events, {self.score.size} blocks: log r moved by up to"
            f" {largest:.3f}; before: {self.before.verdict} (p = {self.pvalue:.3g})"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw calibrated against learned log r, with the blocks' errors and the diagonal."""
        return figures.calibration.ratio_calibration(self, ax)


def recalibrate_ratio(log_r_numerator: ArrayLike, log_r_reference: ArrayLike, *, min_events: int | None = None) -> RatioCalibration:
    r"""Isotonic regression of the label on log r for one theta: the ratio of event rates in blocks of the score.

    Args:
        log_r_numerator: (n1,), log r of numerator events, nats, used neither in training nor in a later check.
        log_r_reference: (n0,), log r of reference events, likewise.
        min_events: of either sample in a block; neighbouring blocks are joined until they have as many. None: chosen by cross-validation;
            if r is right up to a factor this gives one block.

    Returns: RatioCalibration, whose `apply` corrects log r.
    Raises: ShapeError, NonFiniteError, DataError (fewer events than min_events), SettingError.
    Source: arXiv:1506.02169.
    Read: the correction is noisier for smaller blocks (`error`); a good reliability curve needs no correction.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> numerator, reference = np.random.default_rng(0).normal(size=(2, 1000)) + [[1.0], [0.0]]
    >>> repair = sp.calibration.recalibrate_ratio(numerator, reference)  # log r = x is too large by 1/2
    >>> bool(abs(repair.apply([0.5])[0]) < 0.25)
    True
    """
    one, zero = single_ratio("log_r_numerator", log_r_numerator), single_ratio("log_r_reference", log_r_reference)
    least = FEWEST if min_events is None else require_int("min_events", min_events, low=1)
    if min(one.size, zero.size) < least:
        raise DataError(f"{one.size} numerator and {zero.size} reference events; expected at least min_events = {least} of each")
    if min_events is None:
        least = _chosen(one, zero)
    score, value, count = _blocks(one, zero, _levels(one, zero), least)
    before = reliability(one, zero)
    return RatioCalibration(
        score=score, value=value, error=np.sqrt((1 / count).sum(axis=1)), count=count.astype(np.int64), before=before, pvalue=before.pvalue
    )


def _levels(one: Array, zero: Array) -> Array:
    """Isotonic fraction of the numerator at each event, both samples of equal weight (n1 + n0,)."""
    from sklearn.isotonic import IsotonicRegression

    score, label = np.concatenate([one, zero]), np.repeat([1.0, 0.0], [one.size, zero.size])
    weight = np.where(label == 1, 1 / one.size, 1 / zero.size)
    return np.asarray(IsotonicRegression().fit_transform(score, label, sample_weight=weight), dtype=np.float64)


def _blocks(one: Array, zero: Array, level: Array, least: int) -> tuple[Array, Array, Array]:
    """Scores and values (b,) of blocks, and their events (b, 2)."""
    label = np.repeat([1.0, 0.0], [one.size, zero.size])
    block = _joined(level, label, least)
    n1, n0 = np.bincount(block, label), np.bincount(block, 1 - label)
    of_zero = block[one.size :]
    score = np.array([logsumexp(zero[of_zero == b]) for b in range(n0.size)]) - np.log(n0)
    return score, np.log(n1 / one.size) - np.log(n0 / zero.size), np.stack([n1, n0], axis=1)


def _chosen(one: Array, zero: Array) -> int:
    """Events per block: the largest number whose held-out cross entropy is within one standard error of the best."""
    sizes = [min(one.size, zero.size)]
    while sizes[-1] > _RATIO * FEWEST:
        sizes.append(sizes[-1] // _RATIO)
    sizes.append(FEWEST)
    rng = rng_for(0, "folds of a calibration")
    folds = [rng.permutation(n) % _FOLDS for n in (one.size, zero.size)]
    losses = [np.empty((len(sizes), n)) for n in (one.size, zero.size)]
    for k in range(_FOLDS):
        inside, outside = ([x[(f == k) == left] for x, f in zip((one, zero), folds, strict=True)] for left in (False, True))
        level = _levels(inside[0], inside[1])
        for j, size in enumerate(sizes):
            score, value, _ = _blocks(inside[0], inside[1], level, size)
            for loss, fold, x, sign in zip(losses, folds, outside, (-1, 1), strict=True):
                loss[j, fold == k] = np.logaddexp(0, sign * (x + np.interp(x, score, value - score)))
    best = int(np.argmin(sum(loss.mean(axis=1) for loss in losses)))
    for j, size in enumerate(sizes):
        excess = [loss[j] - loss[best] for loss in losses]
        if sum(e.mean() for e in excess) <= np.sqrt(sum(e.var() / e.size for e in excess)):
            return size
    return FEWEST


def _joined(level: Array, label: Array, least: int) -> Integers:
    """Block of each event: levels joined from below until a block contains `least` events of each sample."""
    _, first = np.unique(level, return_inverse=True)
    counts = np.stack([np.bincount(first, label), np.bincount(first, 1 - label)], axis=1)
    to = np.zeros(len(counts), dtype=np.int64)
    held, current = np.zeros(2), 0
    for i, count in enumerate(counts):
        to[i] = current
        held = held + count
        if held.min() >= least:
            held, current = np.zeros(2), current + 1
    # events above the last complete block belong to it
    return np.minimum(to, max(current - 1, 0))[first]
