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
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration._results import NamedTests
from sbi_phys.calibration.bands import band_counts, count_curves, curve_pvalue, rank_grid
from sbi_phys.calibration.inputs import check_log_probs, check_names, check_pairs, count_below, require_varying
from sbi_phys.calibration.pvalues import ALPHA, combine
from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import SettingError
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
class Coverage(NamedTests):
    r"""Result of `coverage`: coverage curves of n simulations with l draws; dimensionless.

    kind, which regions. level (m,), contents, multiples of 1/(l+1). observed, fraction of true values inside: (m,) for highest-density
    regions, (m, d) for the central intervals of d parameters. band (m, 2), simultaneous 95 % band of one curve. ranks (n,) or (n, d),
    position of the true value from the innermost outwards, 0..l. pvalues by name; pvalue, the smallest times their number (Bonferroni).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> result = sp.calibration.coverage(rng.normal(size=(400, 1)), rng.normal(size=(400, 99, 1)))
    >>> result.kind, bool(abs(result.at(0.9)[0] - 0.9) < 0.1)
    ('central intervals', True)
    """

    kind: str
    level: Array
    observed: Array
    band: Array
    ranks: Integers
    n_draws: int

    @property
    def n(self) -> int:
        """Number of simulations."""
        return int(self.ranks.shape[0])

    @property
    def excess(self) -> Array:
        """Mean of observed - level over the curve -> (d,); 0 is right, negative overconfident."""
        return np.atleast_2d(self.observed.T).mean(axis=1) - self.level.mean()

    def _fault(self, j: int) -> str:
        # for a calibrated posterior the mean of a curve over levels has the sd of the mean of n uniform values, 1 / sqrt(12 n)
        if abs(self.excess[j]) <= 2 / np.sqrt(12 * self.n):
            return "wrong shape"
        return "overconfident" if self.excess[j] < 0 else "underconfident"

    def at(self, level: float) -> Array:
        """Observed coverage (d,) at the nearest computed level; level in (0, 1)."""
        return np.atleast_2d(self.observed.T)[:, int(np.argmin(np.abs(self.level - level)))]

    def _columns(self) -> dict[str, Any]:
        return {"kind": self.kind} | {f"observed at {level:.2g}": self.at(level) for level in (0.5, 0.68, 0.9, 0.95)}

    def summary(self) -> str:
        """Return the result in words: one line for all, one line for each curve with the coverage at 50, 68, 90 and 95 %."""
        subject = f"Coverage of {self.kind}, {self.n} simulations x {self.n_draws} draws"
        shown = [level for level in (0.5, 0.68, 0.9, 0.95) if np.min(np.abs(self.level - level)) < 0.02]
        details = []
        for j in range(len(self.names)):
            got = {level: float(self.at(level)[j]) for level in shown}
            error = {level: np.sqrt(max(p * (1 - p), 1 / self.n) / self.n) for level, p in got.items()}
            details.append("  ".join(f"{100 * level:.0f} %: {100 * got[level]:.1f} +- {100 * error[level]:.1f}" for level in shown))
        return "\n".join(self._summary(subject, "no deviation found", "not calibrated", details))

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
        theta: (n, d), true parameters of the simulations, prior units; n >= 10.
        draws: (n, l, d), independent posterior draws for each simulation; l >= 2.
        log_prob_theta: (n,), log q(theta* | x), up to a constant for each x; -inf where theta* is outside the support of q.
        log_prob_draws: (n, l), log q(theta_l | x). With both: highest-density regions; with neither: central intervals.
        levels: contents in (0, 1); default at most 99, evenly spaced. Each is moved to a multiple of 1/(l+1).
        names: d names, or Parameters, for central intervals.
        seed: for breaking ties at random; without ties the result does not depend on it.

    Returns: Coverage: level (m,), observed (m,) or (m, d), band (m, 2).
    Raises: ShapeError, NonFiniteError, DataError, SettingError.
    Source: Hermans et al. 2021, arXiv:2110.06581.
    Read: observed below level = overconfident. Only averages over x are tested, and a posterior equal to the prior passes.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta, draws = rng.normal(size=(200, 1)), 0.6 * rng.normal(size=(200, 99, 1))  # draws that are too narrow
    >>> sp.calibration.coverage(theta, draws, names=["energy"]).verdicts
    {'energy': 'overconfident'}
    """
    truth, samples = check_pairs(theta, draws)
    n, n_draws, dim = samples.shape
    plain, labels = check_names(names, dim)
    densities = check_log_probs(log_prob_theta, log_prob_draws, n, n_draws)
    k = rank_grid(n_draws) if levels is None else level_steps("levels", levels, n_draws)
    if densities is not None:
        ranks = count_below(-densities[0], -densities[1], rng_for(seed, "coverage ties"))[:, None]
        plain, labels, kind = (HPD,), (HPD,), HPD
    else:
        ranks, kind = _central_ranks(truth, samples, plain, seed), CENTRAL
    level = k / (n_draws + 1)
    counts = count_curves(ranks, k)
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


def level_steps(name: str, level: ArrayLike, n_draws: int) -> Integers:
    """Requested contents as multiples k of 1 / (l + 1), increasing, 1 <= k <= l.   Raises: SettingError, ShapeError."""
    wanted = as_array(name, np.atleast_1d(np.asarray(level)), (None,))
    if wanted.size == 0 or np.any((wanted <= 0) | (wanted >= 1)):
        raise SettingError(f"{name} is {wanted.tolist()}; expected contents within (0, 1)")
    return np.unique(np.clip(np.rint(wanted * (n_draws + 1)), 1, n_draws).astype(np.int64))


def from_the_middle(rank: Integers, n_draws: int) -> Integers:
    """Ranks 0..l numbered from the median outwards, so that uniform ranks stay uniform."""
    return np.where(2 * rank >= n_draws, 2 * rank - n_draws, n_draws - 2 * rank - 1)


def _central_ranks(truth: Array, samples: Array, names: tuple[str, ...], seed: int) -> Integers:
    out = []
    for j, name in enumerate(names):
        require_varying(name, truth[:, j], samples[:, :, j])
        rank = count_below(truth[:, j], samples[:, :, j], rng_for(seed, "coverage ties", name))
        out.append(from_the_middle(rank, samples.shape[1]))
    return np.stack(out, axis=-1)
