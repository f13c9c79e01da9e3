"""Posterior SBC: is the inference right near the observed data, instead of on average over the prior?

Draw theta' ~ q(. | x_o), simulate x' ~ p(x | theta'), and rank theta' in the posterior given *both* x_o and x':

    p(theta | x_o, x') ~ q(theta | x_o) p(x' | theta) = q(theta | x_o) q(theta | x') / p(theta).

The augmented posterior is therefore the one at hand, reweighted: draws theta_m of q(. | x_o) get the weights
w_m = q(theta_m | x') / p(theta_m).

**The test is exact for any effective sample size.** Let every theta'_i be *chosen from the m draws themselves*, uniformly with
replacement. Given the draws and x'_i, Bayes' rule gives the probability w_ik / sum_m w_im that draw k was the chosen one, if q is right
at x'. With V uniform,

    U_i = (sum_{m: theta_m < theta'_i} w_im + V_i w_i,same) / sum_m w_im

is exactly uniform, and the U_i are independent given the draws. A small effective sample size reduces the power (U is then mostly V) but
not the validity. If theta' is not among the draws, U lacks the weight of the true value and all rows share one set of draws: the p-value
is then approximate and needs an effective sample size of about 20 n.

The test concerns q(. | x') for x' similar to the observed data. It does not test the draws of q(. | x_o) themselves, and a q that equals
the prior (all weights 1) passes.

Source: Sailynoja, Schmitt, Burkner & Vehtari 2025, arXiv:2502.03279.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from sbi_phys.calibration._results import ShapeTests
from sbi_phys.calibration.bands import band_counts, curve_pvalue
from sbi_phys.calibration.inputs import check_names
from sbi_phys.calibration.pvalues import ALPHA, combine
from sbi_phys.core.checks import as_array, as_real, require_finite
from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PosteriorSBC", "posterior_sbc"]
MIN_ROWS = 10
LOW_ESS = 50.0  # with fewer effective draws a rank is too coarse to show a width that is 20 % off
ENOUGH_PER_ROW = 20.0  # with so many effective draws per row, shared draws add less than 5 % to the variance of the curve


@dataclass(frozen=True, kw_only=True, slots=True)
class PosteriorSBC(ShapeTests):
    r"""Result of `posterior_sbc`: ranks of n replicated true values in their augmented posteriors, d parameters; dimensionless.

    pit (n, d), weighted ranks in (0, 1), uniform if calibrated. level (k,), ecdf (k, d), band (k, 2), simultaneous 95 %.
    ess (n,), effective number of the m draws for each rank. exact, whether the true values were chosen from the draws.
    shift, width (d,) with errors: posterior - true value in posterior sd, posterior sd over the right one (normal scores).
    pvalues by name; pvalue, smallest times d (Bonferroni).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> draws = rng.normal(size=(500, 1))
    >>> result = sp.calibration.posterior_sbc(draws[:50], draws, np.zeros((50, 500)))  # equal weights
    >>> result.exact, result.pit.shape, bool(np.allclose(result.ess, 500))
    (True, (50, 1), True)
    """

    n_draws: int
    pit: Array
    level: Array
    ecdf: Array
    band: Array
    ess: Array
    exact: bool

    @property
    def n(self) -> int:
        """Number of replications."""
        return int(self.pit.shape[0])

    @property
    def warning(self) -> str:
        """The consequence of a low effective sample size for this result, or ''."""
        median = float(np.median(self.ess))
        if not self.exact and median < ENOUGH_PER_ROW * self.n:
            return (
                f"the true values are not among the draws and the median effective sample size is {median:.0f}, below {ENOUGH_PER_ROW:.0f} "
                f"per replication ({ENOUGH_PER_ROW * self.n:.0f}): the p-value is too small; choose the true values from the draws"
            )
        if median < LOW_ESS:
            return (
                f"the median effective sample size is {median:.0f} of {self.n_draws} draws: the p-value is valid, but the ranks are coarse "
                "and the test has little power; take more draws given the observed data"
            )
        return ""

    def summary(self) -> str:
        """Return the result in words: one line for all, one line for each parameter, and a warning if the effective sample is small."""
        subject, failed = f"Posterior SBC, {self.n} replications, {self.n_draws} draws", "not calibrated near the observed data"
        lines = self._summary(subject, "no deviation near the observed data found", failed, self._shapes())
        lines.append(f"  effective sample size: median {np.median(self.ess):.0f}, smallest {self.ess.min():.1f}")
        return "\n".join(lines + ([f"  WARNING: {self.warning}"] if self.warning else []))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the ECDF minus the uniform one for all parameters, with the 95 % band.   Read: inside the band = calibrated."""
        return figures.calibration.rank_ecdf(self, ax)


def posterior_sbc(
    theta: ArrayLike,
    draws_obs: ArrayLike,
    log_ratio: ArrayLike,
    names: Sequence[str | Parameter] | None = None,
    *,
    seed: int = 0,
) -> PosteriorSBC:
    r"""Weighted rank of theta'_i in p(theta | x_o, x'_i), uniform if q is right near x_o.

    Args:
        theta: (n, d), theta' with which the replicated data x' were simulated, prior units; n >= 10. For an exact test choose them from
            the draws: draws_obs[rng.integers(m, size=n)].
        draws_obs: (m, d), independent draws of q(. | x_o), same units.
        log_ratio: (n, m), log q(theta_m | x'_i) - log p(theta_m), up to a constant per row; -inf is weight 0.
        names: d names, or Parameters.
        seed: of V, the position of the true value within its own weight.

    Returns: PosteriorSBC.
    Raises: ShapeError, NonFiniteError, DataError (few rows or draws, a constant parameter, a row without weight).
    Source: Sailynoja et al. 2025, arXiv:2502.03279; the exact weighted rank: module docstring.
    Read: p < 0.05 = wrong for data like the observed; read `warning` too.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> draws = rng.normal(size=(1000, 1))  # theta ~ N(0, 1) given the observation
    >>> theta = draws[:100]
    >>> x = theta + rng.normal(size=(100, 1))  # replicated data, x ~ N(theta, 1): the likelihood gives the weights
    >>> sp.calibration.posterior_sbc(theta, draws, -0.5 * (x - draws[:, 0]) ** 2).verdicts
    {'theta_0': 'calibrated'}
    """
    draws, weights, ess = _weights(draws_obs, log_ratio)
    truth = as_array("theta", theta, (None, draws.shape[1]), note="the columns of draws_obs")
    if truth.shape[0] != weights.shape[0]:
        raise ShapeError(f"theta has {truth.shape[0]} rows, log_ratio has {weights.shape[0]}; expected one row each per replication")
    if truth.shape[0] < MIN_ROWS:
        raise DataError(f"theta has {truth.shape[0]} rows; expected at least {MIN_ROWS} replications")
    plain, labels = check_names(names, draws.shape[1])
    pit = np.empty(truth.shape)
    for j, name in enumerate(plain):
        if draws[:, j].min() == draws[:, j].max():
            raise DataError(f"parameter {name!r} is constant ({draws[0, j]:g}) in draws_obs; expected a varying one, leave it out")
        pit[:, j] = _weighted_rank(truth[:, j], draws[:, j], weights, rng_for(seed, "posterior sbc", name))
    return _from_pit(pit, ess, _picked(truth, draws), plain, labels, draws.shape[0])


def _weights(draws_obs: ArrayLike, log_ratio: ArrayLike) -> tuple[Array, Array, Array]:
    """Draws (m, d), weights (n, m) that sum to 1 in each row, effective sample sizes (n,)."""
    draws = as_real("draws_obs", draws_obs)
    if draws.ndim != 2 or draws.shape[1] == 0:
        raise ShapeError(f"draws_obs has shape {draws.shape}; expected (m, d), draws given the observed data")
    require_finite("draws_obs", draws)
    if draws.shape[0] < 2:
        raise DataError(f"draws_obs has {draws.shape[0]} draws; expected at least 2 (10 000 to see tails)")
    logs = as_array("log_ratio", log_ratio, (None, draws.shape[0]), finite=False, note="(replications, rows of draws_obs)")
    bad = np.isnan(logs) | np.isposinf(logs)
    if bad.any():
        raise NonFiniteError(
            f"log_ratio has NaN or +Inf in {bad.any(axis=1).sum()} of {logs.shape[0]} rows; expected finite values or -Inf"
        )
    top = logs.max(axis=1, keepdims=True, initial=-np.inf)
    if np.isneginf(top).any():
        raise DataError(f"log_ratio is -Inf for every draw in {np.isneginf(top).sum()} rows; expected a draw inside the support of q(.|x')")
    weights = np.exp(logs - top)
    weights /= weights.sum(axis=1, keepdims=True)
    return draws, weights, 1 / (weights**2).sum(axis=1)


def _weighted_rank(truth: Array, draws: Array, weights: Array, rng: np.random.Generator) -> Array:
    order = np.argsort(draws, kind="stable")
    cumulated = np.concatenate([np.zeros((weights.shape[0], 1)), np.cumsum(weights[:, order], axis=1)], axis=1)
    rows = np.arange(truth.size)
    low = cumulated[rows, np.searchsorted(draws[order], truth, side="left")]
    high = cumulated[rows, np.searchsorted(draws[order], truth, side="right")]
    return np.clip(low + rng.random(truth.size) * (high - low), 0.0, 1.0)


def _picked(truth: Array, draws: Array) -> bool:
    """Whether every row of `truth` is one of the draws."""
    return bool(np.isin(_rows(truth), _rows(draws)).all())


def _rows(values: Array) -> NDArray[np.void]:
    whole = np.ascontiguousarray(values + 0.0)  # -0.0 becomes 0.0, so that equal numbers have equal bytes
    return whole.view([("", whole.dtype)] * whole.shape[1]).reshape(-1)


def _from_pit(pit: Array, ess: Array, exact: bool, names: tuple[str, ...], labels: tuple[str, ...], n_draws: int) -> PosteriorSBC:
    n = pit.shape[0]
    level = np.arange(1, 100) / 100
    counts = np.stack([np.searchsorted(np.sort(u), level, side="right") for u in pit.T], axis=-1)
    pvalues = {name: curve_pvalue(c, n, level) for name, c in zip(names, counts.T, strict=True)}
    scores = ndtri(np.clip(pit, 0.5 / n_draws, 1 - 0.5 / n_draws))
    spread = np.maximum(scores.std(axis=0, ddof=1), 1e-12)
    return PosteriorSBC(
        names=names,
        labels=labels,
        n_draws=n_draws,
        pit=pit,
        level=level,
        ecdf=counts / n,
        band=band_counts(n, level, 1 - ALPHA) / n,
        ess=ess,
        exact=exact,
        shift=-scores.mean(axis=0),
        shift_err=spread / np.sqrt(n),
        width=1 / spread,
        width_err=1 / spread / np.sqrt(2 * n),
        pvalues=pvalues,
        pvalue=combine(pvalues),
    )
