"""Expected coverage: how often credible regions of content a contain the true parameters, averaged over x.

With log densities, the highest-density region of content a contains theta* if log q(theta* | x) is among the largest fraction a of the
values log q(theta_l | x) of the draws. r = #{l: log q(theta_l) > log q(theta*)} is uniform on 0..L for a calibrated q.

Without log densities, the central interval of each parameter is used. The positions 0..L of theta* among the draws are numbered from
the middle outwards, f = |2 rank - L| (less one on the lower side), which maps uniform ranks to uniform f. The interval of the k
innermost positions contains theta* if f < k.

In both cases the number of true values inside at content k / (L + 1) is exactly Binomial(n, k / (L + 1)), so bands and p-value are those
of `bands`, without a continuous approximation. Requested levels are moved to the nearest multiple of 1 / (L + 1).

Source: Hermans et al. 2021, arXiv:2110.06581; the band: Sailynoja et al. 2022, arXiv:2103.10522.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.calibration.bands import band_counts, curve_pvalue, rank_grid
from sbi_phys.calibration.inputs import ALPHA, check_names, check_pairs, combine, count_below, holm, require_varying
from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Coverage", "coverage"]


HPD = "highest-density regions"
CENTRAL = "central intervals"


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    r"""Coverage curve of n simulations with l draws. All without unit.

    kind, which regions. level (m,), contents, multiples of 1/(l+1). observed, share of truths inside: (m,) for highest-density
    regions, (m, d) for the central intervals of d parameters. band (m, 2), simultaneous 95 % band of one curve. ranks (n,) or (n, d),
    place of the truth from the innermost outwards, 0..l. pvalues by name; pvalue, the smallest times their number (Bonferroni).
    """

    kind: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    level: Array
    observed: Array
    band: Array
    ranks: Integers
    n_draws: int
    pvalues: dict[str, float]
    pvalue: float

    @property
    def n(self) -> int:
        """Number of simulations."""
        return int(self.ranks.shape[0])

    @property
    def excess(self) -> Array:
        """Mean of observed - level over the curve -> (d,); 0 is right, negative overconfident."""
        return np.atleast_2d(self.observed.T).mean(axis=1) - self.level.mean()

    @property
    def verdicts(self) -> dict[str, str]:
        """'calibrated', or what is wrong, per curve; Holm's correction keeps the family-wise error at 5 %."""
        adjusted = holm(self.pvalues)
        # under calibration the mean over levels of a curve has the sd of a uniform's mean, 1 / sqrt(12 n)
        large = 2 / np.sqrt(12 * self.n)
        out = {}
        for name, excess in zip(self.names, self.excess, strict=True):
            shape = "wrong shape" if abs(excess) <= large else "overconfident" if excess < 0 else "underconfident"
            out[name] = shape if adjusted[name] <= ALPHA else "calibrated"
        return out

    def at(self, content: float) -> Array:
        """Observed coverage (d,) at the level nearest to `content`, in (0, 1)."""
        return np.atleast_2d(self.observed.T)[:, int(np.argmin(np.abs(self.level - content)))]

    def summary(self) -> str:
        """Return the result in words: one line for all, one line per curve with the coverage at 50, 68, 90 and 95 %."""
        verdicts = self.verdicts
        bad = sum(v != "calibrated" for v in verdicts.values())
        head = "no deviation found" if not bad else f"{bad} of {len(verdicts)} not calibrated"
        lines = [f"Coverage of {self.kind}, {self.n} simulations x {self.n_draws} draws: {head} (p = {self.pvalue:.3g})"]
        pad = max(map(len, self.names))
        shown = [c for c in (0.5, 0.68, 0.9, 0.95) if np.min(np.abs(self.level - c)) < 0.02]
        for j, name in enumerate(self.names):
            parts = []
            for content in shown:
                got = float(self.at(content)[j])
                parts.append(f"{100 * content:.0f} %: {100 * got:.1f} +- {100 * np.sqrt(max(got * (1 - got), 1 / self.n) / self.n):.1f}")
            lines.append(f"  {name:<{pad}}  {verdicts[name]:<14}  p = {self.pvalues[name]:<8.3g}  " + "  ".join(parts))
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw observed against credible level with the 95 % band.   Read: below the diagonal = overconfident."""
        return figures.calibration.coverage_curve(self, ax)


def coverage(
    theta: ArrayLike,
    draws: ArrayLike,
    log_prob_theta: ArrayLike | None = None,
    log_prob_draws: ArrayLike | None = None,
    levels: ArrayLike | None = None,
    *,
    names: Sequence[str | Parameter] | None = None,
    seed: int = 0,
) -> Coverage:
    r"""Expected coverage of credible regions, E[1{theta in C_a(x)}].

    Args:
        theta: (n, d), the values the simulations were made with, prior units; n >= 10.
        draws: (n, l, d), independent posterior draws for each simulation; l >= 2.
        log_prob_theta: (n,), log q(theta* | x), any constant per x; -inf where theta* is outside q's support.
        log_prob_draws: (n, l), log q(theta_l | x). With both: highest-density regions; with neither: central intervals.
        levels: contents in (0, 1); default at most 99, evenly spread. Each is moved to a multiple of 1/(l+1).
        names: d names, or Parameters, for central intervals.
        seed: of the random places given to ties; without ties the result does not depend on it.

    Returns: Coverage: level (m,), observed (m,) or (m, d), band (m, 2).
    Raises: ShapeError, NonFiniteError, DataError, SettingError.
    Source: Hermans et al. 2021, arXiv:2110.06581.
    Read: observed below level = overconfident. Only averages over x are seen, and a posterior equal to the prior passes.
    """
    truth, samples = check_pairs(theta, draws)
    n, n_draws, dim = samples.shape
    plain, labels = check_names(names, dim)
    if (log_prob_theta is None) != (log_prob_draws is None):
        missing = "log_prob_draws" if log_prob_draws is None else "log_prob_theta"
        raise SettingError(f"{missing} is None; expected both log_prob_theta (n,) and log_prob_draws (n, l), or neither")
    k = _steps(levels, n_draws)
    if log_prob_theta is not None and log_prob_draws is not None:
        ranks = _density_ranks(log_prob_theta, log_prob_draws, n, n_draws, seed)[:, None]
        plain, labels, kind = (HPD,), (HPD,), HPD
    else:
        ranks, kind = _central_ranks(truth, samples, plain, seed), CENTRAL
    level = k / (n_draws + 1)
    counts = np.stack([np.searchsorted(np.sort(r), k, side="left") for r in ranks.T], axis=-1)
    pvalues = {name: curve_pvalue(c, n, level) for name, c in zip(plain, counts.T, strict=True)}
    flat = kind == HPD
    return Coverage(
        kind=kind,
        names=plain,
        labels=labels,
        level=level,
        observed=(counts[:, 0] if flat else counts) / n,
        band=band_counts(n, level, 1 - ALPHA) / n,
        ranks=ranks[:, 0] if flat else ranks,
        n_draws=n_draws,
        pvalues=pvalues,
        pvalue=combine(pvalues),
    )


def _steps(levels: ArrayLike | None, n_draws: int) -> Integers:
    if levels is None:
        return rank_grid(n_draws)
    wanted = np.atleast_1d(as_array("levels", np.atleast_1d(np.asarray(levels)), (None,)))
    if wanted.size == 0 or np.any((wanted <= 0) | (wanted >= 1)):
        raise SettingError(f"levels is {wanted.tolist()}; expected contents within (0, 1)")
    return np.unique(np.clip(np.rint(wanted * (n_draws + 1)), 1, n_draws).astype(np.int64))


def _density_ranks(log_prob_theta: ArrayLike, log_prob_draws: ArrayLike, n: int, n_draws: int, seed: int) -> Integers:
    at_truth = as_array("log_prob_theta", log_prob_theta, (n,), finite=False)
    at_draws = as_array("log_prob_draws", log_prob_draws, (n, n_draws), finite=False)
    for name, array in (("log_prob_theta", at_truth), ("log_prob_draws", at_draws)):
        if np.isnan(array).any() or np.isposinf(array).any():
            row = int(np.argwhere(np.isnan(array) | np.isposinf(array))[0][0])
            raise NonFiniteError(f"{name} has NaN or +Inf, first in row {row}; expected log densities (finite or -Inf)")
    if at_draws.min() == at_draws.max() == at_truth.min() == at_truth.max():
        raise DataError(f"log_prob_theta and log_prob_draws are constant ({at_truth[0]:g}); expected densities that differ between draws")
    return count_below(-at_truth, -at_draws, rng_for(seed, "coverage ties"))


def _central_ranks(truth: Array, samples: Array, names: tuple[str, ...], seed: int) -> Integers:
    out = []
    for j, name in enumerate(names):
        require_varying(name, truth[:, j], samples[:, :, j])
        rank = count_below(truth[:, j], samples[:, :, j], rng_for(seed, "coverage ties", name))
        n_draws = samples.shape[1]
        out.append(np.where(2 * rank >= n_draws, 2 * rank - n_draws, n_draws - 2 * rank - 1))
    return np.stack(out, axis=-1)
