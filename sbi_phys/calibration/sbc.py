"""Simulation-based calibration (SBC): the rank of the true parameter among posterior draws is uniform.

If theta* ~ p(theta), x ~ p(x | theta*) and theta_1..theta_L ~ p(theta | x), then theta* and the draws are exchangeable given x,
so r = #{l: theta_l < theta*} is uniform on the integers 0..L, for every parameter and every function f(theta, x).

Ranks are integers, and a test against the continuous uniform distribution rejects calibrated posteriors when L is small. The ECDF is
therefore evaluated at multiples of 1/(L+1), where its counts are exactly binomial (`bands`), and the histogram's bins have the exact
probabilities of the discrete uniform distribution, also where L + 1 is not a multiple of the number of bins.

The p-value of a parameter is that of the ECDF test with simultaneous band. At N = 500 and L = 1000 it detects a width of x0.9 in two
of three repetitions (chi-square on 10 bins: one of two) and a shift of 0.15 sd in 79 % (59 %). Chi-square is reported as well.

SBC tests marginals only, and a posterior equal to the prior passes. To detect that, rank a quantity that depends on x, such as the log
likelihood, with the argument `quantities` (Modrak et al. 2023, arXiv:2211.02383).

Source: Talts et al. 2018, arXiv:1804.06788; Sailynoja et al. 2022, arXiv:2103.10522.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import chdtrc, ndtri

from sbi_phys.calibration._results import ShapeTests
from sbi_phys.calibration.bands import band_counts, count_curves, curve_pvalue, pointwise_level, rank_grid
from sbi_phys.calibration.inputs import check_names, check_pairs, check_quantities, count_below, require_varying
from sbi_phys.calibration.pvalues import ALPHA, combine
from sbi_phys.core.checks import require_choice, require_int
from sbi_phys.core.errors import SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SBC", "sbc"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SBC(ShapeTests):
    r"""Result of `sbc`: ranks of n true values among l draws for d parameters (and quantities), with their tests; dimensionless.

    ranks (n, d), integers 0..l. level (k,), multiples of 1/(l+1). ecdf (k, d), fraction of ranks below each level.
    band (k, 2), simultaneous 95 % band of the ecdf of one parameter. histogram (b, d), counts; expected (b,), exact.
    histogram_band (b, 2), simultaneous by Bonferroni. shift (d,) and width (d,), with errors: posterior - true value in posterior sd, and
    posterior sd over the right one, from normal scores of the ranks (exact where posteriors are Gaussian).
    pvalues, ECDF test; pvalues_chi2, chi-square on the bins. pvalue, smallest of pvalues times d (Bonferroni).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> result = sp.calibration.sbc(rng.normal(size=(200, 1)), rng.normal(size=(200, 99, 1)), ["energy"])
    >>> result.ranks.shape, result.verdicts
    ((200, 1), {'energy': 'calibrated'})
    """

    ranks: Integers
    n_draws: int
    level: Array
    ecdf: Array
    band: Array
    pointwise_level: float
    bin_edges: Integers
    histogram: Integers
    expected: Array
    histogram_band: Integers
    pvalues_chi2: dict[str, float]

    @property
    def n(self) -> int:
        """Number of simulations."""
        return int(self.ranks.shape[0])

    def summary(self) -> str:
        """Return the result in words: one line for all, one line for each parameter."""
        subject, note = f"SBC, {self.n} simulations x {self.n_draws} draws", f", corrected for {len(self.names)} tests"
        return "\n".join(self._summary(subject, "no deviation from uniform ranks found", "not calibrated", self._shapes(), note))

    def plot(self, ax: "Axes | None" = None, *, kind: str = "ecdf") -> "Axes":
        """Draw all parameters into one set of axes: kind 'ecdf' (difference from uniform) or 'histogram', with the 95 % band.

        Raises: SettingError.   Read: inside the shaded band = calibrated; a curve that falls, then rises = overconfident.
        """
        draw = {"ecdf": figures.calibration.rank_ecdf, "histogram": figures.calibration.rank_histogram}[
            require_choice("kind", kind, ("ecdf", "histogram"))
        ]
        return draw(self, ax)

    def figure(self, *, kind: str = "histogram") -> "Figure":
        """Draw one panel per parameter; kind as in `plot`.   Raises: SettingError."""
        return figures.calibration.rank_figure(self, require_choice("kind", kind, ("ecdf", "histogram")))


def sbc(
    theta: ArrayLike,
    draws: ArrayLike,
    names: Sequence[str | Parameter] | None = None,
    quantities: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    *,
    n_bins: int | None = None,
    seed: int = 0,
) -> SBC:
    r"""Rank test of calibration, r = #{l: theta_l < theta*} ~ U{0..L}.

    Args:
        theta: (n, d), true parameters of the simulations, prior units; n >= 10.
        draws: (n, l, d), independent posterior draws for each simulation, same units; l >= 2.
        names: d names, or Parameters (their LaTeX labels the axes).
        quantities: further quantities to rank, {name: (values (n,), draw values (n, l))}, e.g. the log likelihood.
        n_bins: bins of the histogram and of chi-square; default about n/25, from 2 to 20.
        seed: for breaking ties at random; without ties the result does not depend on it.

    Returns: SBC.
    Raises: ShapeError, NonFiniteError, DataError (few rows, one draw, constant parameter), SettingError (n < 5 n_bins).
    Source: Talts et al. 2018, arXiv:1804.06788; band and test: Sailynoja et al. 2022, arXiv:2103.10522.
    Read: p < 0.05 = not calibrated. A true value outside all draws has rank 0 or l, which is valid.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta, draws = rng.normal(size=(200, 1)), 0.6 * rng.normal(size=(200, 99, 1))  # draws that are too narrow
    >>> sp.calibration.sbc(theta, draws, ["energy"]).verdicts
    {'energy': 'overconfident'}
    """
    truth, samples = check_pairs(theta, draws)
    n, n_draws, dim = samples.shape
    plain, labels = check_names(names, dim)
    columns = {name: (truth[:, j], samples[:, :, j]) for j, name in enumerate(plain)}
    extra = check_quantities(quantities, n, n_draws)
    if set(extra) & set(plain):
        raise SettingError(f"quantities repeat names of parameters: {sorted(set(extra) & set(plain))}; expected other names")
    columns |= extra
    for name, pair in columns.items():
        require_varying(name, *pair)
    ranks = np.stack([count_below(*pair, rng_for(seed, "sbc ties", name)) for name, pair in columns.items()], axis=-1)
    return _from_ranks(ranks, n_draws, tuple(columns), (*labels, *extra), _bins(n, n_draws, n_bins))


def _bins(n: int, n_draws: int, n_bins: int | None) -> Integers:
    if n_bins is None:
        n_bins = min(int(np.clip(n // 25, 2, 20)), n_draws + 1)
    n_bins = require_int("n_bins", n_bins, low=2, high=n_draws + 1)
    if n < 5 * n_bins:
        raise SettingError(f"n_bins is {n_bins} for {n} simulations; expected n >= 5 n_bins, or the chi-square p-value is not valid")
    return np.asarray(np.arange(n_bins + 1) * (n_draws + 1) // n_bins, dtype=np.int64)


def _from_ranks(ranks: Integers, n_draws: int, names: tuple[str, ...], labels: tuple[str, ...], edges: Integers) -> SBC:
    n = ranks.shape[0]
    k = rank_grid(n_draws)
    level = k / (n_draws + 1)
    counts = count_curves(ranks, k)
    histogram = np.stack([np.histogram(r, bins=edges - 0.5)[0] for r in ranks.T], axis=-1)
    probability = np.diff(edges) / (n_draws + 1)
    expected = n * probability
    statistic = ((histogram - expected[:, None]) ** 2 / expected[:, None]).sum(axis=0)
    bin_bands = np.concatenate([band_counts(n, [q], 1 - ALPHA / probability.size) for q in probability])
    pvalues = {name: curve_pvalue(c, n, level) for name, c in zip(names, counts.T, strict=True)}
    shift, shift_err, width, width_err = _shape(ranks, n_draws)
    return SBC(
        names=names,
        labels=labels,
        ranks=ranks,
        n_draws=n_draws,
        level=level,
        ecdf=counts / n,
        band=band_counts(n, level) / n,
        pointwise_level=pointwise_level(n, level),
        bin_edges=edges,
        histogram=histogram,
        expected=expected,
        histogram_band=bin_bands,
        pvalues=pvalues,
        pvalues_chi2={name: float(p) for name, p in zip(names, chdtrc(probability.size - 1, statistic), strict=True)},
        pvalue=combine(pvalues),
        shift=shift,
        shift_err=shift_err,
        width=width,
        width_err=width_err,
    )


def _shape(ranks: Integers, n_draws: int) -> tuple[Array, Array, Array, Array]:
    # Normal scores: for Gaussian posteriors Phi^-1(PIT) = (theta* - m)/s, so its mean is the bias in posterior sd and
    # 1/sd is the width over the right one. Dividing by the sd of uniform ranks removes the effect of finite l.
    n = ranks.shape[0]
    reference = ndtri((np.arange(n_draws + 1) + 0.5) / (n_draws + 1))
    scores = ndtri((ranks + 0.5) / (n_draws + 1)) / reference.std()
    spread = scores.std(axis=0, ddof=1)
    kurtosis = (reference**4).mean() / reference.var() ** 2
    width = 1 / np.maximum(spread, 1e-12)
    return -scores.mean(axis=0), spread / np.sqrt(n), width, width * np.sqrt((kurtosis - 1) / (4 * n))
