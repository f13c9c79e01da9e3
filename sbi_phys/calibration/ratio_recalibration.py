r"""Isotonic recalibration of a learned ratio for one theta.

The score s = log r(x) of a network orders events better than it tells their ratio. Isotonic regression of the label (numerator or
reference) on s finds the levels of the best monotone function; neighbouring levels are joined until each block B holds enough events of
both samples. With the rates P_num(B), P_ref(B) of a block,

    log r_calibrated(s) = s + c(s),      c(s_B) = log P_num(B) / P_ref(B) - s_B,      s_B = log mean_ref[e^s | B],

c linear between the s_B and constant beyond. With s_B so defined the reference weighted with r_calibrated has the numerator's rate in
every block, and E_ref[r] = 1. Beyond the outer blocks, where levels of 0 or infinity are all that counts can say, the network's own shape
is kept.

The correction holds for the theta whose events it was made from.

Small blocks follow every bend and are noisy: 25 events of either sample leave 28 %, which a classifier that sees x can tell from a ratio
that was right. So the number of events in a block is chosen by cross-validation, with preference for large ones; a ratio in which no bend
can be shown is left with one block, a factor that makes E_ref[r] = 1.

Source: Cranmer, Pavez & Louppe 2015, arXiv:1506.02169; scikit-learn's IsotonicRegression.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import logsumexp

from sbi_phys.calibration.ratios import Reliability, reliability, single_ratio
from sbi_phys.core.checks import as_real, require_finite, require_int
from sbi_phys.core.errors import DataError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RatioCalibration", "recalibrate_ratio"]


FEWEST = 25  # events of either sample in a block
_RATIO = 4  # between the sizes of blocks that are tried
_FOLDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioCalibration:
    """Monotone correction of log r for one theta: log r + correction(log r), linear between b blocks, constant beyond them.

    score (b,), log of the mean r of the block's reference events; value (b,), log of the ratio of event rates in it, with error (b,);
    count (b, 2), numerator and reference events. before, the reliability that was repaired, on the same events; pvalue, its own: whether
    a repair was needed.
    """

    score: Array
    value: Array
    error: Array
    count: Integers
    before: Reliability
    pvalue: float

    def apply(self, log_r: ArrayLike) -> Array:
        """Calibrated log r, of any shape, nats. Beyond the outer blocks, where nothing was measured, the correction stays as it is.

        Raises: NonFiniteError.
        """
        array = as_real("log_r", log_r)
        require_finite("log_r", array)
        return array + np.interp(array, self.score, self.value - self.score)

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
        return figures.calibration_ratios.calibration(self, ax)


def recalibrate_ratio(log_r_numerator: ArrayLike, log_r_reference: ArrayLike, *, min_events: int | None = None) -> RatioCalibration:
    r"""Isotonic regression of the label on log r for one theta: the ratio of event rates in blocks of the score.

    Args:
        log_r_numerator: (n1,), log r of numerator events, nats, neither trained on nor checked on later.
        log_r_reference: (n0,), of reference events likewise.
        min_events: of either sample in a block; neighbouring blocks are joined until they have as many. None: as many as the events
            themselves ask for, by cross-validation; where r is right but for a factor that is one block.

    Returns: RatioCalibration, whose `apply` corrects log r.
    Raises: ShapeError, NonFiniteError, DataError (fewer events than min_events), SettingError.
    Source: arXiv:1506.02169.
    Read: the correction is as noisy as the blocks are small (`error`); a good reliability curve needs none.
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
    """Isotonic share of the numerator at each event, both samples of equal weight (n1 + n0,)."""
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
    """Events a block: the most whose cross entropy on events left out is not worse, by a standard error, than that of the best."""
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
    """Block of each event: levels joined from below until a block holds `least` events of either sample."""
    _, first = np.unique(level, return_inverse=True)
    counts = np.stack([np.bincount(first, label), np.bincount(first, 1 - label)], axis=1)
    to = np.zeros(len(counts), dtype=np.int64)
    held, current = np.zeros(2), 0
    for i, count in enumerate(counts):
        to[i] = current
        held = held + count
        if held.min() >= least:
            held, current = np.zeros(2), current + 1
    # what is left above the last full block belongs to it
    return np.minimum(to, max(current - 1, 0))[first]
