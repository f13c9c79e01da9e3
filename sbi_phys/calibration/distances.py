r"""Distances between two samples, each with a test: kernel (MMD), sliced Wasserstein, and one parameter at a time.

`c2st` trains a network and finds what these may miss; these take seconds, say how far, and their p-values are exact: under equal
distributions all ways to share the pooled rows out are equally likely, and p = (1 + #{shared out anew >= observed}) / (P + 1).
To keep that exact, columns are scaled by the mean and sd of both samples pooled, which sharing out does not change.

Exact for INDEPENDENT rows. Copies (importance resampling, rejected steps of a chain) and autocorrelation make p too small: thin a
chain by its autocorrelation time, and read `unique_fraction`, the smaller share of distinct rows, before believing a small p.

Source: Gretton et al. 2012, JMLR 13, 723 (MMD); Bonneel et al. 2015, J. Math. Imaging Vis. 51, 22 (sliced Wasserstein).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.calibration.inputs import ALPHA, check_names, combine, holm
from sbi_phys.core.checks import as_array, as_real, require_int, require_number
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MMD", "MarginalKS", "SlicedWasserstein", "marginal_ks", "mmd", "sliced_wasserstein"]


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
