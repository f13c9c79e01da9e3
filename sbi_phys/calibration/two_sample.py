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
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from sbi_phys.calibration.inputs import ALPHA, check_names, combine, holm
from sbi_phys.core.checks import as_array, as_real, require_int, require_number
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Integers, Mask
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["C2ST", "MMD", "MarginalKS", "SlicedWasserstein", "c2st", "marginal_ks", "mmd", "sliced_wasserstein"]

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


MIN_DRAWS = 5

CHUNK = 4_000_000  # numbers in one block of the permutations


@dataclass(frozen=True, kw_only=True, slots=True)
class MMD:
    r"""Squared maximum mean discrepancy, Gaussian kernel exp(-|a - b|^2 / (2 h^2)), unbiased; `float(result)` is it.

    mmd2, may be below 0; 0 = same distribution. bandwidth h, in pooled sd. null (p,), its values with rows shared out anew.
    pvalue, permutation. n_a, n_b, draws used. unique_fraction, the smaller share of distinct rows among them.
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
        return figures.calibration_compare.null_histogram(self.null, self.mmd2, self.pvalue, "squared MMD", ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlicedWasserstein:
    r"""Mean Wasserstein-1 distance of projections, in pooled sd; `float(result)` is it.

    distance, and noise, its median under equal distributions: with n draws it is never 0. per_projection (k,), null (p,).
    pvalue, permutation. n_a, n_b, draws used. unique_fraction, the smaller share of distinct rows among them.
    """

    distance: float
    noise: float
    per_projection: Array
    null: Array
    pvalue: float
    n_a: int
    n_b: int
    unique_fraction: float

    def __float__(self) -> float:
        return self.distance

    def summary(self) -> str:
        """Return the result in words."""
        size = f"Sliced Wasserstein {self.distance:.3g} sd, equal samples give {self.noise:.2g} (p = {self.pvalue:.2g}"
        return f"{size}, {self.n_a} and {self.n_b} draws): {_words(self.pvalue, self.unique_fraction)}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the value against its null distribution."""
        return figures.calibration_compare.null_histogram(self.null, self.distance, self.pvalue, "sliced Wasserstein distance / sd", ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginalKS:
    r"""Two-sample Kolmogorov-Smirnov test and Wasserstein-1 distance, per parameter.

    ks (d,), largest difference of the ECDFs. wasserstein (d,), in sd of the reference b. shift (d,), mean of a - mean of b in sd of b;
    width (d,), sd of a over that of b. pvalues, KS, not corrected; pvalue, smallest times d. curves: sorted columns of a and b, to plot.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    ks: Array
    wasserstein: Array
    shift: Array
    width: Array
    pvalues: dict[str, float]
    pvalue: float
    a: Array
    b: Array
    unique_fraction: float

    @property
    def different(self) -> tuple[str, ...]:
        """Parameters whose marginals differ, by Holm's correction at 5 %."""
        return tuple(name for name, p in holm(self.pvalues).items() if p <= ALPHA)

    def summary(self) -> str:
        """Return the result in words: one line for all, one line per parameter."""
        head = f"Marginals, {len(self.a)} and {len(self.b)} draws (p = {self.pvalue:.3g}, corrected for {len(self.names)} tests)"
        lines = [f"{head}: {_words(self.pvalue, self.unique_fraction)}"]
        pad = max(map(len, self.names))
        for j, name in enumerate(self.names):
            size = f"W1 {self.wasserstein[j]:.3f} sd  shift {self.shift[j]:+.2f} sd  width x{self.width[j]:.2f}"
            word = "different" if name in self.different else "same"
            lines.append(f"  {name:<{pad}}  {word:<9}  KS {self.ks[j]:.3f}  p = {self.pvalues[name]:<8.3g}  {size}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the difference of the two ECDFs per parameter, against the reference's quantiles."""
        return figures.calibration_compare.marginal_ks(self, ax)


def mmd(
    a: ArrayLike, b: ArrayLike, *, n_permutations: int = 500, bandwidth: float | None = None, max_draws: int = 1000, seed: int = 0
) -> MMD:
    r"""Maximum mean discrepancy, MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b), and its permutation test.

    Args:
        a: (n, d), independent draws. Columns constant in both samples are left out.
        b: (m, d), independent draws of the other.
        n_permutations: the smallest p is 1 / (n_permutations + 1).
        bandwidth: of the Gaussian kernel, in pooled sd; default the median distance of pooled rows.
        max_draws: most draws taken from each; time and memory grow with its square (1000: 2000 x 2000 kernel).
        seed: of the subsample and the permutations.

    Returns: MMD.   Raises: ShapeError, NonFiniteError, DataError (fewer than 5 draws, every column constant), SettingError.
    Source: Gretton et al. 2012, JMLR 13, 723, equation 3.
    Read: small p = different; the value itself depends on the bandwidth and compares only at equal bandwidth.
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
        bandwidth = median if median > 0 else 1.0  # most rows are copies of one
    bandwidth = require_number("bandwidth", bandwidth, low=0, open_low=True)
    kernel = np.exp(-distance2 / (2 * bandwidth**2))
    np.fill_diagonal(kernel, 0)  # the unbiased estimate leaves a row's kernel with itself out
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


def sliced_wasserstein(
    a: ArrayLike, b: ArrayLike, n_projections: int = 50, seed: int = 0, *, n_permutations: int = 200, max_draws: int = 2000
) -> SlicedWasserstein:
    r"""Sliced Wasserstein distance, E_v W1(v.a, v.b) over directions v on the unit sphere, and its permutation test.

    Args:
        a: (n, d), independent draws. Columns constant in both samples are left out.
        b: (m, d), independent draws of the other.
        n_projections: random directions k; with d = 1 there is one.
        seed: of the directions, the subsample and the permutations.
        n_permutations: the smallest p is 1 / (n_permutations + 1).
        max_draws: most draws taken from each.

    Returns: SlicedWasserstein.   Raises: ShapeError, NonFiniteError, DataError, SettingError.
    Source: Bonneel et al. 2015, J. Math. Imaging Vis. 51, 22.
    Read: compare the distance with `noise`; 0.1 above it = marginals about 0.1 sd apart on average over directions.
    """
    first, second = _pair(a, b)
    rng = rng_for(seed, "sliced wasserstein")
    first, second = _taken(first, second, require_int("max_draws", max_draws, low=MIN_DRAWS), rng)
    n_projections = require_int("n_projections", n_projections, low=1)
    n_permutations = require_int("n_permutations", n_permutations, low=19)
    n, m = len(first), len(second)
    pooled = _pooled(first, second)
    directions = rng.standard_normal((pooled.shape[1], n_projections if pooled.shape[1] > 1 else 1))
    projected = pooled @ (directions / np.linalg.norm(directions, axis=0))
    shared = list(_shares(n, m, n_permutations, rng))
    distances = np.empty((n_permutations + 1, projected.shape[1]))
    for k, column in enumerate(projected.T):
        order = np.argsort(column, kind="stable")
        gaps = np.diff(column[order])
        start = 0
        for labels in shared:
            # W1 = integral |F_a - F_b|; F_a steps by 1/n at a's rows, F_b by 1/m at b's
            steps = np.where(labels[:, order], 1 / n, -1 / m)
            distances[start : start + len(labels), k] = np.abs(np.cumsum(steps, axis=1)[:, :-1]) @ gaps
            start += len(labels)
    null = distances.mean(axis=1)
    return SlicedWasserstein(
        distance=float(null[0]),
        noise=float(np.median(null[1:])),
        per_projection=distances[0],
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
    Read: W1 says whether a difference matters, p whether it is there; with ties p errs towards 1. A column constant and equal in both
    has distance 0 and p = 1.
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
        with warnings.catch_warnings():  # scipy falls back to the asymptotic p by itself and says so
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


def _words(p: float, unique: float) -> str:
    words = "no difference found" if p > ALPHA else "different"
    return words + ("" if unique > 0.9 else f"; {100 * (1 - unique):.0f} % of one sample are copies, p is too small")


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    first, second = as_real("a", a), as_real("b", b)
    if first.ndim == second.ndim == 1:
        first, second = first[:, None], second[:, None]
    first, second = as_array("a", first, (None, None)), as_array("b", second, (None, None))
    if first.shape[1] != second.shape[1] or first.shape[1] == 0:
        raise ShapeError(f"a has shape {first.shape}, b has shape {second.shape}; expected the same number of columns, at least one")
    if min(len(first), len(second)) < MIN_DRAWS:
        raise DataError(f"a has {len(first)} and b {len(second)} draws; expected at least {MIN_DRAWS} each")
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
    """Blocks of rows (.., n + m), True where a pooled row is given to a: the observed sharing first, then random ones."""
    observed = np.arange(n + m) < n
    labels = np.concatenate([observed[None], rng.permuted(np.tile(observed, (n_permutations, 1)), axis=1)])
    size = max(CHUNK // (n + m), 1)
    return [labels[i : i + size] for i in range(0, len(labels), size)]


def _pvalue(values: Array) -> float:
    # rounding may tell equal sharings apart; the margin is far below any real difference
    return float((1 + (values[1:] >= values[0] - 1e-12 * np.abs(values[0])).sum()) / values.size)


def _unique(first: Array, second: Array) -> float:
    return min(np.unique(s, axis=0).shape[0] / len(s) for s in (first, second))
