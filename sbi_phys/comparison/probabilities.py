"""Probabilities of models: prior probabilities, and the calibration of a classifier's probabilities.

A classifier is calibrated if, among data sets to which it assigns probability p for a model, a fraction p comes from that model. Under the
null hypothesis the label of data set i is drawn from the probabilities it was given, k_i ~ Categorical(p_i). Simulating these labels gives
the null distribution of both statistics below for any bins and any number of data sets:

    calibration error   ECE = mean over models k of sum_b (n_b / n) |fraction of k in bin b - mean p_k in bin b|,  bins of equal content
    log score           S = mean_i -log p_i,k_i, whose mean under the null is the mean entropy of the p_i

The first is sensitive to any deviation of the reliability curve, the second (two-sided) to a general over- or underconfidence. The ECE of
exact probabilities is not zero; its mean under the null is reported as well. p-value: the smaller of the two, times two.

Source: Guo et al. 2017, arXiv:1706.04599 (ECE); Vaicenavicius et al. 2019, arXiv:1902.06977 (its null distribution).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sbi_phys.calibration.pvalues import ALPHA, combine
from sbi_phys.core.checks import as_array, require_choice, require_int, require_known, require_number
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ProbabilityCalibration", "check_probabilities", "prior_probabilities", "require_names"]

Labels = Integers

ECE, LOG_SCORE = "calibration error", "log score"

_FLOOR = 1e-12  # smallest probability in the log score, which would be infinite for probability zero

MIN_ROWS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbabilityCalibration(Result):
    """Result of `check_probabilities`: reliability of the probabilities of K models in n data sets; dimensionless.

    names (K,). predicted, observed (K, b): mean probability and fraction from the model in each bin, NaN where a bin is empty.
    band (K, b, 2): central 95 % of the fractions if the probabilities are right, for each bin. counts (K, b).
    ece, with its mean null_ece and 95 % quantile under the null; log_score and its mean under the null, nats.
    pvalues by test; pvalue, the smallest times their number.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> p = rng.uniform(size=500)
    >>> result = sp.comparison.check_probabilities(np.column_stack([1 - p, p]), rng.uniform(size=500) < p, ["a", "b"])
    >>> result.verdict, result.predicted.shape
    ('calibrated', (2, 10))
    """

    names: tuple[str, ...]
    n: int
    predicted: Array
    observed: Array
    band: Array
    counts: Labels
    ece: float
    null_ece: float
    null_ece_95: float
    log_score: float
    null_log_score: float
    pvalues: dict[str, float]
    pvalue: float

    @property
    def verdict(self) -> str:
        """'calibrated', 'overconfident', 'underconfident' or 'wrong shape', at 5 %."""
        if self.pvalue > ALPHA:
            return "calibrated"
        if self.pvalues[LOG_SCORE] > ALPHA:
            return "wrong shape"
        return "overconfident" if self.log_score > self.null_log_score else "underconfident"

    def rows(self) -> Rows:
        """Return the table: one row for each model and bin of its probability."""
        k, b = (index.ravel() for index in np.indices(self.predicted.shape))
        found = {"name": [self.names[j] for j in k], "n": self.counts[k, b], "predicted": self.predicted[k, b]}
        return Rows.of(found | {"observed": self.observed[k, b], "low": self.band[k, b, 0], "high": self.band[k, b, 1]})

    def summary(self) -> str:
        """Return the result in words."""
        return (
            f"Probabilities of {', '.join(self.names)} in {self.n} data sets: {self.verdict} (p = {self.pvalue:.3g}); "
            f"calibration error {self.ece:.4f}, expected {self.null_ece:.4f} and below {self.null_ece_95:.4f} in 95 % if calibrated; "
            f"log score {self.log_score:.4f}, expected {self.null_log_score:.4f}"
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        # NaN is None in the content
        arrays: dict[str, Any] = {name: np.array(content[name], dtype=np.float64) for name in ("predicted", "observed", "band")}
        arrays["counts"] = np.array(content["counts"], dtype=np.int64)
        return cls(**(content | arrays | {"names": tuple(content["names"])}))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw observed fractions against predicted probabilities.   Read: on the diagonal, within the bars = calibrated."""
        return figures.calibration.model_reliability(self, ax)


def check_probabilities(
    probabilities: ArrayLike,
    labels: ArrayLike,
    names: Sequence[str] | None = None,
    *,
    n_bins: int = 10,
    n_toys: int = 1000,
    seed: int = 0,
) -> ProbabilityCalibration:
    r"""Test of the calibration of probabilities p (n, K) with true labels k (n,) in 0..K-1.

    Args:
        probabilities: (n, K), rows sum to 1.
        labels: (n,), integers, of data sets that were not used in training.
        names: K names.
        n_bins: bins of equal content.
        n_toys: draws of the labels under the null; the p-value is at least 1 / (n_toys + 1).
        seed: of these draws.

    Raises: ShapeError, NonFiniteError, DataError (rows that do not sum to 1, labels out of range, fewer than 50 rows), SettingError.
    Source: Vaicenavicius et al. 2019, arXiv:1902.06977.   Read: p < 0.05 = not calibrated.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> p = rng.uniform(size=2000)
    >>> sharp = p**3 / (p**3 + (1 - p) ** 3)  # probabilities too close to 0 and 1
    >>> sp.comparison.check_probabilities(np.column_stack([1 - sharp, sharp]), rng.uniform(size=2000) < p).verdict
    'overconfident'
    """
    p, k = _checked(probabilities, labels)
    n, n_models = p.shape
    plain = tuple(names) if names is not None else tuple(f"model {i}" for i in range(n_models))
    if len(plain) != n_models:
        raise ShapeError(f"names has {len(plain)} entries; expected {n_models}, one per column of probabilities")
    n_bins, n_toys = require_int("n_bins", n_bins, low=2), require_int("n_toys", n_toys, low=19)
    if n < 5 * n_bins:
        raise SettingError(f"n_bins is {n_bins} for {n} data sets; expected n >= 5 n_bins")
    bins = np.stack([_bins(column, n_bins) for column in p.T])
    counts = np.stack([np.bincount(b, minlength=n_bins) for b in bins])
    predicted = np.stack([np.bincount(b, weights=c, minlength=n_bins) for b, c in zip(bins, p.T, strict=True)])
    found = _sums(k, bins, n_bins)
    log_p = np.log(np.maximum(p, _FLOOR))
    rng, cumulative = rng_for(seed, "null labels"), np.cumsum(p, axis=1)
    toys = np.empty((n_toys, n_models, n_bins))
    score = np.empty(n_toys)
    for t in range(n_toys):
        drawn = (rng.random((n,))[:, None] > cumulative[:, :-1]).sum(axis=1)
        toys[t] = _sums(drawn, bins, n_bins)
        score[t] = -log_p[np.arange(n), drawn].mean()
    errors = np.abs(toys - predicted).sum(axis=2).mean(axis=1) / n
    ece = float(np.abs(found - predicted).sum(axis=1).mean() / n)
    observed_score = float(-log_p[np.arange(n), k].mean())
    pvalues = {ECE: _upper(errors, ece), LOG_SCORE: min(1.0, 2 * min(_upper(score, observed_score), _upper(-score, -observed_score)))}
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = [np.where(counts > 0, a / counts, np.nan) for a in (predicted, found, *np.quantile(toys, [0.025, 0.975], axis=0))]
    return ProbabilityCalibration(
        names=plain,
        n=n,
        predicted=shares[0],
        observed=shares[1],
        band=np.stack(shares[2:], axis=-1),
        counts=counts,
        ece=ece,
        null_ece=float(errors.mean()),
        null_ece_95=float(np.quantile(errors, 0.95)),
        log_score=observed_score,
        null_log_score=float(score.mean()),
        pvalues=pvalues,
        pvalue=combine(pvalues),
    )


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, Labels]:
    p = as_array("probabilities", probabilities, (None, None))
    k = as_array("labels", labels, (p.shape[0],), note="one per row of probabilities")
    if p.shape[1] < 2:
        raise ShapeError(f"probabilities has shape {p.shape}; expected (n, K) with at least two models")
    if p.shape[0] < MIN_ROWS:
        raise DataError(f"probabilities has {p.shape[0]} rows; expected at least {MIN_ROWS}")
    if (p < 0).any() or not np.allclose(p.sum(axis=1), 1, atol=1e-6):
        raise DataError("probabilities has rows that are negative or do not sum to 1; expected probabilities of all models")
    if (k != np.round(k)).any() or (k < 0).any() or (k >= p.shape[1]).any():
        raise DataError(f"labels run from {k.min():g} to {k.max():g}; expected whole numbers 0 to {p.shape[1] - 1}")
    return p, k.astype(np.int64)


def _bins(p: Array, n_bins: int) -> Labels:
    """Bin of each probability, of about equal content; equal probabilities share a bin."""
    edges = np.quantile(p, np.arange(1, n_bins) / n_bins)
    return np.searchsorted(np.unique(edges), p, side="right").astype(np.int64)


def _sums(labels: Labels, bins: Labels, n_bins: int) -> Array:
    """Number of data sets of each model in each of its bins (K, n_bins)."""
    return np.stack([np.bincount(b[labels == m], minlength=n_bins) for m, b in enumerate(bins)]).astype(np.float64)


def _upper(toys: Array, value: float) -> float:
    # equal sums may differ by rounding
    return float((1 + (toys >= value - 1e-12).sum()) / (toys.size + 1))


def require_names(name: str, names: Sequence[str]) -> int:
    """Index of a model among the names.   Raises: SettingError with the nearest name."""
    return list(names).index(require_choice("model", name, names))


def prior_probabilities(names: Sequence[str], prior: Mapping[str, float] | None) -> Array:
    """Probabilities (K,) that sum to 1 from positive numbers per name; None: equal.   Raises: SettingError."""
    if prior is None:
        return np.full(len(names), 1 / len(names))
    require_known("prior", prior, names)
    missing = [n for n in names if n not in prior]
    if missing:
        raise SettingError(f"prior has no number for {', '.join(missing)}; expected one for each of {', '.join(names)}")
    values = np.array([require_number(f"prior of {n}", prior[n], low=0, open_low=True) for n in names])
    return values / values.sum()
