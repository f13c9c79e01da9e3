"""Two-sample tests: do two sets of draws come from the same distribution?

- **c2st** trains a neural network to separate the samples; its accuracy is 0.5 if they are equal. It finds the most and takes the longest.
- **mmd** is the squared maximum mean discrepancy with a Gaussian kernel and its permutation test.
- **marginal_ks** is the Kolmogorov-Smirnov test of each parameter, with the Wasserstein distance as a measure of size.

Definition of C2ST used throughout: both samples are standardised with the mean and sd of the reference and have equal size; the
classifier is scikit-learn's MLP with two hidden layers of 10 d units (ReLU, Adam, at most 1000 iterations); the result is the mean
accuracy of 5-fold cross-validation with a fixed seed. At least 2000 draws each are needed to compare the number with published ones;
with fewer the result is marked as not `reliable`. Copies of one draw (from importance resampling or a Markov chain with rejections)
always share a fold; otherwise the network would recognise training rows in the test rows and separate equal samples. Networks are
trained in single precision on one BLAS thread each, so that the numbers do not depend on the number of workers.

The permutation p-value of MMD is exact: under equal distributions all assignments of the pooled rows to the samples are equally likely,
and p = (1 + #{permuted >= observed}) / (P + 1). Columns are scaled by the pooled mean and sd, which a permutation does not change.

All p-values assume INDEPENDENT rows. Copies and autocorrelation make p too small: thin a chain by its autocorrelation time, and check
`unique_fraction`, the smaller fraction of distinct rows, before trusting a small p-value.

Source: Lopez-Paz & Oquab 2017, arXiv:1610.06545; Lueckmann et al. 2021, arXiv:2101.04653 (C2ST); Gretton et al. 2012, JMLR 13, 723 (MMD).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from sbi_phys.calibration._results import NamedTests
from sbi_phys.calibration.inputs import check_names
from sbi_phys.calibration.pvalues import ALPHA, combine
from sbi_phys.core.checks import as_array, as_real, require_int, require_number
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Integers, Mask
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["C2ST", "MMD", "MarginalKS", "c2st", "marginal_ks", "mmd"]
N_FOLDS = 5
ENOUGH = 2000  # draws of each sample from which C2ST is comparable with published numbers
MIN_DRAWS = 5
CHUNK = 4_000_000  # numbers in one block of the permutations


@dataclass(frozen=True, kw_only=True, slots=True)
class C2ST(Result):
    r"""Result of `c2st`: accuracy of separating n draws of a from n draws of the reference b; `float(result)` is the accuracy.

    accuracy, 0.5 = same distribution, 1 = disjoint. standard_error, sd of the fold accuracies / sqrt(5), not below the binomial one.
    fold_accuracies (5,). pvalue, one-sided, of accuracy <= 0.5, for independent draws. n, draws used from each.
    unique_fraction, the smaller fraction of distinct rows among the draws used. reliable, n >= 2000.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> result = sp.calibration.c2st(rng.normal(0, 1, (100, 1)), rng.normal(9, 1, (100, 1)), seed=1)
    >>> round(float(result), 1), result.n, result.reliable
    (1.0, 100, False)
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
        different = "nearly the same" if self.accuracy < 0.55 else "different"
        few = "" if self.reliable else f"; only {self.n} draws each, {ENOUGH} are needed for a comparable number"
        size = f"C2ST {self.accuracy:.3f} +- {self.standard_error:.3f} (p = {self.pvalue:.2g}, {self.n} draws each)"
        return f"{size}: {_words(self.pvalue, self.unique_fraction, different)}{few}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the fold accuracies with their mean against 0.5."""
        return figures.calibration.c2st_folds(self, ax)


def c2st(a: ArrayLike, b: ArrayLike, *, max_draws: int = 5000, seed: int = 0, workers: int = 1) -> C2ST:
    r"""Classifier two-sample test of a against the reference b, mean accuracy in 5-fold cross-validation.

    Args:
        a: (n, d), the draws to be tested.
        b: (m, d), the reference; its mean and sd scale both. Columns that are constant and equal in a and b are left out;
            a column constant in b alone is scaled by the sd of a.
        max_draws: maximum number of draws from each; min(n, m, max_draws) are taken without repetition.
        seed: of the subsample, the folds and the network.
        workers: processes that train folds at the same time; the result does not depend on their number.

    Returns: C2ST.   Raises: ShapeError, NonFiniteError, DataError (fewer than 10 draws, every column constant), SettingError.
    Source: Lopez-Paz & Oquab 2017, arXiv:1610.06545; settings: module docstring.
    Read: 0.5 perfect, above 0.6 visibly different; the p-value assumes independent draws: thin a chain by its autocorrelation time.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> a, b = np.random.default_rng(0).normal(size=(2, 100, 1))
    >>> bool(sp.calibration.c2st(a, b).pvalue > 1e-4), bool(sp.calibration.c2st(a + 9, b).pvalue > 1e-4)
    (True, False)
    """
    first, second = _pair(a, b, low=2 * N_FOLDS)
    max_draws = require_int("max_draws", max_draws, low=2 * N_FOLDS)
    n = min(first.shape[0], second.shape[0], max_draws)
    rng, dim = rng_for(seed, "c2st"), first.shape[1]
    first, second = _scaled(first, second)
    first, second = _subsample(first, n, rng), _subsample(second, n, rng)
    folds = np.concatenate([_folds(first, rng), _folds(second, rng)])
    x, y = np.concatenate([first, second]).astype(np.float32), np.repeat([0, 1], n)
    accuracies = _fold_accuracies(x, y, folds, seed, require_int("workers", workers, low=1))
    accuracy = float(accuracies.mean())
    binomial = float(np.sqrt(max(accuracy * (1 - accuracy), 1 / (2 * n)) / (2 * n)))

    return C2ST(
        accuracy=accuracy,
        standard_error=max(float(accuracies.std(ddof=1)) / np.sqrt(N_FOLDS), binomial),
        pvalue=float(ndtr(-(accuracy - 0.5) / np.sqrt(0.25 / (2 * n)))),
        fold_accuracies=accuracies,
        n=n,
        dim=dim,
        unique_fraction=_unique(first, second),
        reliable=n >= ENOUGH,
    )


def _scaled(a: Array, b: Array) -> tuple[Array, Array]:
    sd = b.std(axis=0)
    # the sd of a constant column consists of rounding errors, which a division by it would amplify
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
    starts = np.searchsorted(group[order], group)  # position of each row's first copy in the shuffled sequence
    folds = (starts * N_FOLDS) // x.shape[0]
    if np.unique(folds).size < N_FOLDS:
        raise DataError(
            f"a sample of {x.shape[0]} draws consists of copies of few rows; expected enough distinct rows to fill {N_FOLDS} folds"
        )
    return folds


def _fold_accuracies(x: NDArray[np.float32], y: Integers, folds: Integers, seed: int, workers: int) -> Array:
    from joblib import Parallel, delayed

    # processes, not threads: the steps are so short that threads would wait for the interpreter lock
    jobs = (delayed(_accuracy)(x, y, folds == k, seed_for(seed, "c2st network", k) % 2**32) for k in range(N_FOLDS))
    return np.array(Parallel(n_jobs=workers)(jobs))


def _accuracy(x: NDArray[np.float32], y: Integers, test: Mask, seed: int) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    units = 10 * x.shape[1]
    network = MLPClassifier(hidden_layer_sizes=(units, units), activation="relu", solver="adam", max_iter=1000, random_state=seed)
    # 1000 iterations are part of the definition, so the convergence warning is expected
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(x[~test], y[~test])
    right = network.predict(x[test]) == y[test]
    # mean over the two classes, so that the null value is 0.5 even if copies make the classes of a fold unequal
    return float(np.mean([right[y[test] == label].mean() for label in (0, 1)]))


@dataclass(frozen=True, kw_only=True, slots=True)
class MMD(Result):
    r"""Result of `mmd`: unbiased squared maximum mean discrepancy, kernel exp(-|a - b|^2 / (2 h^2)); `float(result)` is its value.

    mmd2, may be below 0; 0 = same distribution. bandwidth h, in pooled sd. null (p,), the values after permutation of the rows.
    pvalue, permutation. n_a, n_b, draws used. unique_fraction, the smaller fraction of distinct rows among them.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> a, b = np.random.default_rng(0).normal(size=(2, 100, 2))
    >>> result = sp.calibration.mmd(a, b, n_permutations=99)
    >>> result.null.shape, (result.n_a, result.n_b)
    ((99,), (100, 100))
    """

    mmd2: float
    bandwidth: float
    null: Array
    pvalue: float
    n_a: int
    n_b: int
    unique_fraction: float

    def __float__(self) -> float:
        return self.mmd2

    def summary(self) -> str:
        """Return the result in words."""
        size = f"MMD^2 {self.mmd2:.2e} (p = {self.pvalue:.2g}, {self.n_a} and {self.n_b} draws, bandwidth {self.bandwidth:.2g} sd)"
        return f"{size}: {_words(self.pvalue, self.unique_fraction)}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the value against its null distribution."""
        return figures.calibration.null_histogram(self.null, self.mmd2, self.pvalue, "squared MMD", ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginalKS(NamedTests):
    r"""Result of `marginal_ks`: Kolmogorov-Smirnov test and Wasserstein-1 distance of each parameter.

    ks (d,), largest difference of the ECDFs. wasserstein (d,), in sd of the reference b. shift (d,), mean of a - mean of b in sd of b;
    width (d,), sd of a over that of b. pvalues, KS, not corrected; pvalue, smallest times d. a, b, sorted columns, for the plot.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> a, b = np.random.default_rng(3).normal(size=(2, 500, 2))
    >>> sp.calibration.marginal_ks(a + [0, 1], b, ["mass", "energy"]).verdicts
    {'mass': 'same', 'energy': 'different'}
    """

    PASSED: ClassVar[str] = "same"

    ks: Array
    wasserstein: Array
    shift: Array
    width: Array
    a: Array
    b: Array
    unique_fraction: float

    def _fault(self, j: int) -> str:
        return "different"

    def _columns(self) -> dict[str, Any]:
        return {"ks": self.ks, "wasserstein": self.wasserstein, "shift": self.shift, "width": self.width}

    def summary(self) -> str:
        """Return the result in words: one line for all, one line per parameter."""
        sizes = zip(self.ks, self.wasserstein, self.shift, self.width, strict=True)
        details = [f"KS {ks:.3f}  W1 {w1:.3f} sd  shift {shift:+.2f} sd  width x{width:.2f}" for ks, w1, shift, width in sizes]
        subject, note = f"Marginals, {len(self.a)} and {len(self.b)} draws", f", corrected for {len(self.names)} tests"
        copies = _copies(self.unique_fraction)
        return "\n".join(self._summary(subject, f"no difference found{copies}", f"different{copies}", details, note))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the difference of the two ECDFs of each parameter against the quantiles of the reference."""
        return figures.calibration.marginal_ks(self, ax)


def mmd(
    a: ArrayLike, b: ArrayLike, *, n_permutations: int = 500, bandwidth: float | None = None, max_draws: int = 1000, seed: int = 0
) -> MMD:
    r"""Maximum mean discrepancy, MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b), and its permutation test.

    Args:
        a: (n, d), independent draws. Columns constant in both samples are left out.
        b: (m, d), independent draws of the other distribution.
        n_permutations: the smallest p is 1 / (n_permutations + 1).
        bandwidth: of the Gaussian kernel, in pooled sd; default the median distance of pooled rows.
        max_draws: maximum number of draws from each; time and memory grow with its square (1000: 2000 x 2000 kernel).
        seed: of the subsample and the permutations.

    Returns: MMD.   Raises: ShapeError, NonFiniteError, DataError (fewer than 5 draws, every column constant), SettingError.
    Source: Gretton et al. 2012, JMLR 13, 723, equation 3.
    Read: small p = different; the value itself depends on the bandwidth and can be compared only at equal bandwidth.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> a, b = np.random.default_rng(0).normal(size=(2, 100, 2))
    >>> round(sp.calibration.mmd(a, b + 1, n_permutations=99).pvalue, 2)
    0.01
    """
    first, second = _pair(a, b)
    rng = rng_for(seed, "mmd")
    first, second = _taken(first, second, require_int("max_draws", max_draws, low=MIN_DRAWS), rng)
    n_permutations = require_int("n_permutations", n_permutations, low=19)
    n, m = len(first), len(second)
    pooled = _pooled(first, second)
    square = (pooled**2).sum(axis=1)
    distance2 = np.maximum(square[:, None] + square - 2 * pooled @ pooled.T, 0)
    if bandwidth is None:
        median = float(np.sqrt(np.median(distance2[np.triu_indices(n + m, 1)])))
        bandwidth = median if median > 0 else 1.0  # the median is 0 if most rows are copies of one
    bandwidth = require_number("bandwidth", bandwidth, low=0, open_low=True)
    kernel = np.exp(-distance2 / (2 * bandwidth**2))
    np.fill_diagonal(kernel, 0)  # the unbiased estimate omits the kernel of a row with itself
    rows, total = kernel.sum(axis=1), float(kernel.sum())
    values = []
    for labels in _shares(n, m, n_permutations, rng):
        given = labels.astype(np.float64)
        inside = ((given @ kernel) * given).sum(axis=1)  # of a with a
        outgoing = given @ rows
        across = outgoing - inside
        values.append(inside / (n * (n - 1)) + (total - 2 * outgoing + inside) / (m * (m - 1)) - 2 * across / (n * m))
    null = np.concatenate(values)
    return MMD(
        mmd2=float(null[0]),
        bandwidth=bandwidth,
        null=null[1:],
        pvalue=_pvalue(null),
        n_a=n,
        n_b=m,
        unique_fraction=_unique(first, second),
    )


def marginal_ks(a: ArrayLike, b: ArrayLike, names: Sequence[str | Parameter] | None = None) -> MarginalKS:
    r"""Two-sample Kolmogorov-Smirnov test of every parameter, sup |F_a - F_b|, with the distance W1 in sd of the reference b.

    Args: a, b (n, d) and (m, d), independent draws.   names: d names, or Parameters.
    Returns: MarginalKS.
    Raises: ShapeError, NonFiniteError, DataError (fewer than 5 draws, a column constant in b but not in a).
    Source: Hodges 1958, Ark. Mat. 3, 469 (the exact two-sample distribution, scipy.stats.ks_2samp); Holm 1979.
    Read: W1 measures the size of a difference, p its significance; with ties p is too large. A column that is constant and equal in
    both has distance 0 and p = 1.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> a, b = np.random.default_rng(3).normal(size=(2, 500, 1))
    >>> bool(0.8 < sp.calibration.marginal_ks(a + 1, b).wasserstein[0] < 1.2)
    True
    """
    from scipy.stats import ks_2samp, wasserstein_distance

    first, second = _pair(a, b)
    plain, labels = check_names(names, first.shape[1])
    sd, other = second.std(axis=0), first.std(axis=0)
    tiny = 1e-12 * np.maximum(np.abs(first).max(axis=0), np.abs(second).max(axis=0))
    same = (sd <= tiny) & (other <= tiny) & (np.abs(first.mean(axis=0) - second.mean(axis=0)) <= tiny)
    if np.any((sd <= tiny) & ~same):
        bad = plain[int(np.flatnonzero((sd <= tiny) & ~same)[0])]
        raise DataError(f"parameter {bad!r} is constant in b but not the same in a; expected a reference with a width")
    scale = np.where(same, 1.0, sd)
    ks, distance, p = np.zeros(len(plain)), np.zeros(len(plain)), np.ones(len(plain))
    for j in np.flatnonzero(~same):
        with warnings.catch_warnings():  # scipy warns when it uses the asymptotic p-value
            warnings.simplefilter("ignore", RuntimeWarning)
            ks[j], p[j] = ks_2samp(first[:, j], second[:, j])
        distance[j] = wasserstein_distance(first[:, j], second[:, j]) / scale[j]
    pvalues = dict(zip(plain, p.tolist(), strict=True))
    return MarginalKS(
        names=plain,
        labels=labels,
        ks=ks,
        wasserstein=distance,
        shift=(first.mean(axis=0) - second.mean(axis=0)) / scale,
        width=np.where(same, 1.0, other / scale),
        pvalues=pvalues,
        pvalue=combine(pvalues),
        a=np.sort(first, axis=0),
        b=np.sort(second, axis=0),
        unique_fraction=_unique(first, second),
    )


def _words(p: float, unique: float, different: str = "different") -> str:
    return ("no difference found" if p > ALPHA else different) + _copies(unique)


def _copies(unique: float) -> str:
    return "" if unique > 0.9 else f"; {100 * (1 - unique):.0f} % of one sample are copies, p is too small"


def _pair(a: ArrayLike, b: ArrayLike, low: int = MIN_DRAWS) -> tuple[Array, Array]:
    first, second = as_real("a", a), as_real("b", b)
    if first.ndim == second.ndim == 1:
        first, second = first[:, None], second[:, None]
    first, second = as_array("a", first, (None, None)), as_array("b", second, (None, None))
    if first.shape[1] != second.shape[1] or first.shape[1] == 0:
        raise ShapeError(f"a has shape {first.shape}, b has shape {second.shape}; expected the same number of columns, at least one")
    if min(len(first), len(second)) < low:
        raise DataError(f"a has {len(first)} and b {len(second)} draws; expected at least {low} each")
    return first, second


def _taken(first: Array, second: Array, most: int, rng: np.random.Generator) -> tuple[Array, Array]:
    return first[rng.permutation(len(first))[:most]], second[rng.permutation(len(second))[:most]]


def _pooled(first: Array, second: Array) -> Array:
    pooled = np.concatenate([first, second])
    pooled = pooled - pooled.mean(axis=0)
    sd = pooled.std(axis=0)
    keep = sd > 1e-12 * np.maximum(np.abs(first).max(axis=0), np.abs(second).max(axis=0))
    if not keep.any():
        raise DataError("every column of a and b is constant and the same; expected at least one that varies")
    return np.asarray(pooled[:, keep] / sd[keep])


def _shares(n: int, m: int, n_permutations: int, rng: np.random.Generator) -> list[Mask]:
    """Blocks of rows (.., n + m), True where a pooled row is assigned to a: the observed assignment first, then random ones."""
    observed = np.arange(n + m) < n
    labels = np.concatenate([observed[None], rng.permuted(np.tile(observed, (n_permutations, 1)), axis=1)])
    size = max(CHUNK // (n + m), 1)
    return [labels[i : i + size] for i in range(0, len(labels), size)]


def _pvalue(values: Array) -> float:
    # equal assignments may differ by rounding; the margin is far below any real difference
    return float((1 + (values[1:] >= values[0] - 1e-12 * np.abs(values[0])).sum()) / values.size)


def _unique(first: Array, second: Array) -> float:
    return min(np.unique(s, axis=0).shape[0] / len(s) for s in (first, second))
