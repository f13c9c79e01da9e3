r"""Classifier two-sample test: how well a network tells two samples apart; 0.5 is not at all.

Definition used throughout: both samples z-scored with the reference's mean and sd; equal sizes; scikit-learn's MLP with two hidden
layers of 10 d units (ReLU, Adam, at most 1000 iterations); 5-fold cross-validation with a fixed seed; the mean accuracy.
At least 2000 draws each are needed for the number to be compared with others; fewer give a result marked as not `reliable`.

Copies of one draw (importance resampling, an MCMC chain with rejections) always share a fold: split over folds, the network would
recognise in the test what it was shown in training, and call equal samples different.

Time grows with n and is long where the samples are alike (the network then trains to its last iteration): about 0.7 ms a batch of 200.
Networks are trained in single precision on one BLAS thread each, which is faster for matrices this small and gives the same numbers
whatever the number of workers.

Source: Lopez-Paz & Oquab 2017, arXiv:1610.06545; in inference: Lueckmann et al. 2021, arXiv:2101.04653.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from sbi_phys.core.checks import as_array, require_int
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Integers, Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["C2ST", "c2st"]


N_FOLDS = 5
ENOUGH = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class C2ST:
    r"""Accuracy of telling n draws of a from n draws of the reference b; `float(result)` is the accuracy.

    accuracy, 0.5 = same distribution, 1 = disjoint. standard_error, sd of the fold accuracies / sqrt(5), not below the binomial one.
    fold_accuracies (5,). pvalue, one-sided, of accuracy <= 0.5, for independent draws. n, draws used from each.
    unique_fraction, the smaller share of distinct rows among the draws used. reliable, n >= 2000.
    """

    accuracy: float
    standard_error: float
    pvalue: float
    fold_accuracies: Array
    n: int
    dim: int
    unique_fraction: float
    reliable: bool

    def __float__(self) -> float:
        return self.accuracy

    def summary(self) -> str:
        """Return the result in words."""
        same = self.pvalue >= 0.05
        words = "no difference found" if same else "nearly the same" if self.accuracy < 0.55 else "different"
        few = "" if self.reliable else f"; only {self.n} draws each, {ENOUGH} are needed for a number to compare with"
        copies = (
            "" if self.unique_fraction > 0.9 else f"; {100 * (1 - self.unique_fraction):.0f} % of one sample are copies, p is too small"
        )
        return f"C2ST {self.accuracy:.3f} +- {self.standard_error:.3f} (p = {self.pvalue:.2g}, {self.n} draws each): {words}{few}{copies}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the fold accuracies with their mean against 0.5."""
        return figures.calibration.c2st_folds(self, ax)


def c2st(a: ArrayLike, b: ArrayLike, seed: int = 0, *, max_draws: int = 5000, workers: int = 1) -> C2ST:
    r"""Classifier two-sample test of a against the reference b, mean accuracy in 5-fold cross-validation.

    Args:
        a: (n, d), the draws to be judged.
        b: (m, d), the reference; its mean and sd scale both. Columns constant in a and b alike carry nothing and are left out;
            a column constant in b alone is scaled by a's sd.
        seed: of the subsample, the folds and the network.
        max_draws: most draws taken from each; min(n, m, max_draws) are drawn without repetition from each.
        workers: threads that train folds at the same time; the result does not depend on it.

    Returns: C2ST.   Raises: ShapeError, NonFiniteError, DataError (fewer than 10 draws, every column constant), SettingError.
    Source: Lopez-Paz & Oquab 2017, arXiv:1610.06545; settings: module docstring.
    Read: 0.5 perfect, above 0.6 visibly different; the p-value takes draws as independent, thin a chain by its tau first.
    """
    first, second = as_array("a", a, (None, None)), as_array("b", b, (None, None))
    if first.shape[1] != second.shape[1] or first.shape[1] == 0:
        raise ShapeError(f"a has shape {first.shape}, b has shape {second.shape}; expected the same number of columns, at least one")
    max_draws = require_int("max_draws", max_draws, low=2 * N_FOLDS)
    n = min(first.shape[0], second.shape[0], max_draws)
    if n < 2 * N_FOLDS:
        raise DataError(
            f"a has {first.shape[0]} and b {second.shape[0]} draws; expected at least {2 * N_FOLDS}, two in each of {N_FOLDS} folds"
        )
    rng = rng_for(seed, "c2st")
    first, second = _scaled(first, second)
    first, second = _subsample(first, n, rng), _subsample(second, n, rng)
    folds = np.concatenate([_folds(first, rng), _folds(second, rng)])
    x, y = np.concatenate([first, second]).astype(np.float32), np.repeat([0, 1], n)
    accuracies = _fold_accuracies(x, y, folds, seed, require_int("workers", workers, low=1))
    accuracy = float(accuracies.mean())
    binomial = float(np.sqrt(max(accuracy * (1 - accuracy), 1 / (2 * n)) / (2 * n)))
    unique = min(np.unique(s, axis=0).shape[0] for s in (first, second)) / n
    return C2ST(
        accuracy=accuracy,
        standard_error=max(float(accuracies.std(ddof=1)) / np.sqrt(N_FOLDS), binomial),
        pvalue=float(ndtr(-(accuracy - 0.5) / np.sqrt(0.25 / (2 * n)))),
        fold_accuracies=accuracies,
        n=n,
        dim=int(np.shape(a)[1]),
        unique_fraction=unique,
        reliable=n >= ENOUGH,
    )


def _scaled(a: Array, b: Array) -> tuple[Array, Array]:
    sd = b.std(axis=0)
    # a constant column has an sd of rounding errors; dividing by it would turn them into a signal
    tiny = 1e-12 * np.maximum(np.abs(b).max(axis=0), np.abs(a).max(axis=0))
    still = sd <= tiny
    both = still & (np.abs(a - b.mean(axis=0)).max(axis=0) <= tiny)
    if both.all():
        raise DataError("every column of a and b is constant and the same; expected at least one that varies")
    scale = np.where(still, np.maximum(np.sqrt(((a - b.mean(axis=0)) ** 2).mean(axis=0)), 1e-300), sd)
    keep = ~both
    return ((a - b.mean(axis=0)) / scale)[:, keep], ((b - b.mean(axis=0)) / scale)[:, keep]


def _subsample(x: Array, n: int, rng: np.random.Generator) -> Array:
    return x[rng.permutation(x.shape[0])[:n]]


def _folds(x: Array, rng: np.random.Generator) -> Integers:
    """Fold of each row, equal sizes up to one; copies of a row share a fold."""
    _, group = np.unique(x, axis=0, return_inverse=True)
    group = rng.permutation(int(group.max()) + 1)[group.reshape(-1)]
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], group)  # place of each row's first copy in the shuffled sequence
    folds = (starts * N_FOLDS) // x.shape[0]
    if np.unique(folds).size < N_FOLDS:
        raise DataError(
            f"copies of few rows make up a sample of {x.shape[0]} draws; expected draws that fill {N_FOLDS} folds without copies"
        )
    return folds


def _fold_accuracies(x: NDArray[np.float32], y: Integers, folds: Integers, seed: int, workers: int) -> Array:
    from joblib import Parallel, delayed

    # processes, not threads: the steps are so small that threads would wait for the interpreter
    jobs = (delayed(_accuracy)(x, y, folds == k, seed_for(seed, "c2st network", k) % 2**32) for k in range(N_FOLDS))
    return np.array(Parallel(n_jobs=workers)(jobs))


def _accuracy(x: NDArray[np.float32], y: Integers, test: Mask, seed: int) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    units = 10 * x.shape[1]
    network = MLPClassifier(hidden_layer_sizes=(units, units), activation="relu", solver="adam", max_iter=1000, random_state=seed)
    # 1000 iterations are part of the definition, so stopping there is no fault to report
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(x[~test], y[~test])
    right = network.predict(x[test]) == y[test]
    # the mean over the two classes: 0.5 stays the null value where copies make a fold's classes unequal
    return float(np.mean([right[y[test] == label].mean() for label in (0, 1)]))
