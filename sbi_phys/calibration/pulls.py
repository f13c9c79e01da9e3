"""Pulls, posterior contraction, and the bias of the posterior mean.

    pull = (theta* - mean_l theta_l) / sd_l theta_l        contraction = 1 - E[var(theta | x)] / var(theta)

A pull is standard normal only if the posterior is normal, and for finite L its variance is only approximately 1. The *test* assumes
neither. If q is right, theta* and the L draws are exchangeable given x. Standardise the L + 1 values z_k together,
u_k = (z_k - mean)/sd: the true value is any of the u_k with equal probability, so E[u] = 0 and E[u^2] = 1 hold exactly for every shape
and every L. The null distribution of mean(u) and var(u) over n simulations is simulated by choosing one of the L + 1 values at
random in every row. The size of the test is exact for skewed, heavy-tailed and bimodal posteriors; a t test of mean(pull^2) = 1 has no
exact size there.

The result reports the usual pulls, which are not bounded by sqrt(L) as u is, and beside their width the width expected from the same
draws if they are right.

A contraction near 0 means that the posterior is as wide as the prior, which SBC and pulls do not detect: either x carries no information
or q has not learned it.

Source: Demortier & Lyons 2002, CDF/ANAL/PUBLIC/5776 (pulls); Betancourt 2018, arXiv:1803.08393 (contraction).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr

from sbi_phys.calibration.inputs import ALPHA, check_names, check_pairs, combine, holm, require_varying, verdict_words
from sbi_phys.calibration.pvalues import chunks, smallest_pvalue
from sbi_phys.core.errors import DataError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Pulls", "pulls"]


MIN_DRAWS = 10  # a standard deviation from fewer makes pulls with no variance to speak of
N_NULL = 999


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulls:
    r"""Pulls of n simulations with l draws and d parameters; (d,) unless said, without unit unless said.

    pull (n, d), (truth - posterior mean) / posterior sd. mean, width (sd) of the pulls with errors that assume no shape;
    width_expected, the width that the same draws would show if they were right (1 for many draws).
    contraction with error, 1 = x tells everything, 0 = as wide as the prior. bias, mean of (posterior mean - truth), with error, and
    rmse, in the parameters' units. pvalues_mean, pvalues_width, pvalues (both together) by name; pvalue, smallest times d.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    n_draws: int
    pull: Array
    mean: Array
    mean_err: Array
    width: Array
    width_err: Array
    width_expected: Array
    contraction: Array
    contraction_err: Array
    bias: Array
    bias_err: Array
    rmse: Array
    pvalues_mean: dict[str, float]
    pvalues_width: dict[str, float]
    pvalues: dict[str, float]
    pvalue: float

    @property
    def n(self) -> int:
        """Number of simulations."""
        return int(self.pull.shape[0])

    @property
    def verdicts(self) -> dict[str, str]:
        """'calibrated', or what is wrong, per parameter; Holm's correction keeps the family-wise error at 5 %."""
        adjusted = holm(self.pvalues)
        width = self.width_expected / self.width  # of the posterior, over the right one
        sizes = zip(-self.mean, self.mean_err, width, width * self.width_err / self.width, strict=True)
        return {n: verdict_words(*s) if adjusted[n] <= ALPHA else "calibrated" for n, s in zip(self.names, sizes, strict=True)}

    def summary(self) -> str:
        """Return the result in words: one line for all, one line per parameter."""
        verdicts = self.verdicts
        bad = sum(v != "calibrated" for v in verdicts.values())
        head = "no deviation found" if not bad else f"{bad} of {len(verdicts)} not calibrated"
        lines = [f"Pulls, {self.n} simulations x {self.n_draws} draws: {head} (p = {self.pvalue:.3g}, corrected for {len(verdicts)} tests)"]
        pad = max(map(len, self.names))
        for j, name in enumerate(self.names):
            lines.append(
                f"  {name:<{pad}}  {verdicts[name]:<14}  p = {self.pvalues[name]:<8.3g}  "
                f"pull {self.mean[j]:+.2f} +- {self.mean_err[j]:.2f}  width {self.width[j]:.2f} +- {self.width_err[j]:.2f}"
                f" (right: {self.width_expected[j]:.2f})  bias {self.bias[j]:+.3g} +- {self.bias_err[j]:.2g}"
                f"  contraction {self.contraction[j]:.2f} +- {self.contraction_err[j]:.2f}"
            )
            if self.contraction[j] < 3 * self.contraction_err[j]:
                lines.append(f"  {'':<{pad}}  as wide as the prior: x says little about {name}, or the posterior has not learned it")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw mean and width of the pulls with errors, one row per parameter.

        Read: mean left of 0 = posterior too high; width right of 1 = overconfident.
        """
        return figures.calibration_local.pull_rows(self, ax)


def pulls(theta: ArrayLike, draws: ArrayLike, names: Sequence[str | Parameter] | None = None, *, seed: int = 0) -> Pulls:
    r"""Pulls (theta* - m)/s of the posterior mean, tested for mean 0 and the width that the draws imply.

    Args:
        theta: (n, d), the values the simulations were made with, prior units; n >= 10.
        draws: (n, l, d), independent posterior draws for each simulation, same units; l >= 10.
        names: d names, or Parameters.
        seed: of the simulated null distribution.

    Returns: Pulls.
    Raises: ShapeError, NonFiniteError, DataError (few rows or draws, a constant parameter, draws of a row that are all equal).
    Source: Demortier & Lyons 2002, CDF/ANAL/PUBLIC/5776; contraction: Betancourt 2018, arXiv:1803.08393.
    Read: mean +0.3 = the posterior lies 0.3 of its sd too low; width 1.25 = it is 1/1.25 = 0.8 of what it should be.
        A truth outside all draws is a large pull, not an error.
    """
    truth, samples = check_pairs(theta, draws)
    n_draws, dim = samples.shape[1:]
    plain, labels = check_names(names, dim)
    if n_draws < MIN_DRAWS:
        raise DataError(f"draws has {n_draws} draws per simulation; expected at least {MIN_DRAWS} for a pull's standard deviation")
    found: dict[str, list[float | Array]] = {}
    tests: dict[str, tuple[float, float, float]] = {}
    for j, name in enumerate(plain):
        require_varying(name, truth[:, j], samples[:, :, j])
        _require_spread(name, samples[:, :, j])
        for key, value in _sizes(truth[:, j], samples[:, :, j]).items():
            found.setdefault(key, []).append(value)
        tests[name] = _test(truth[:, j], samples[:, :, j], rng_for(seed, "pulls null"))
    pvalues = {name: p[2] for name, p in tests.items()}
    return Pulls(
        names=plain,
        labels=labels,
        n_draws=n_draws,
        pvalues_mean={name: p[0] for name, p in tests.items()},
        pvalues_width={name: p[1] for name, p in tests.items()},
        pvalues=pvalues,
        pvalue=combine(pvalues),
        **{key: np.stack([np.asarray(v) for v in values], axis=-1) for key, values in found.items()},
    )


def _require_spread(name: str, samples: Array) -> None:
    flat = samples.max(axis=1) == samples.min(axis=1)
    if flat.any():
        raise DataError(
            f"draws of {name!r} are all equal in {flat.sum()} of {flat.size} rows, first row {int(np.argmax(flat))}; "
            "expected a posterior with a width"
        )


def _sizes(truth: Array, samples: Array) -> dict[str, float | Array]:
    n, n_draws = samples.shape
    centre, variance = samples.mean(axis=1), samples.var(axis=1, ddof=1)
    pull = (truth - centre) / np.sqrt(variance)
    mean, width = pull.mean(), pull.std(ddof=1)
    fourth = float(np.mean((pull - mean) ** 4))
    prior = truth.var(ddof=1)
    ratio = variance.mean() / prior if prior > 0 else np.nan
    # a ratio of two means of the same n rows, linearised
    slope = (variance - ratio * (truth - truth.mean()) ** 2) / prior if prior > 0 else np.full(n, np.nan)
    error = centre - truth
    return {
        "pull": pull,
        "mean": float(mean),
        "mean_err": float(width / np.sqrt(n)),
        "width": float(max(width, 1e-300)),
        "width_err": float(np.sqrt(max(fourth - width**4, 0.0) / n) / (2 * max(width, 1e-300))),
        "width_expected": _expected_width(_together(truth, samples), n_draws),
        "contraction": float(1 - ratio),
        "contraction_err": float(slope.std(ddof=1) / np.sqrt(n)),
        "bias": float(error.mean()),
        "bias_err": float(error.std(ddof=1) / np.sqrt(n)),
        "rmse": float(np.sqrt(np.mean(error**2))),
    }


def _together(truth: Array, samples: Array) -> Array:
    """Truth (first column) and draws of each row in units of their common mean and sd -> u (n, l + 1)."""
    values = np.concatenate([truth[:, None], samples], axis=1)
    values = values - values.mean(axis=1, keepdims=True)
    return values / values.std(axis=1, keepdims=True)


def _expected_width(u: Array, n_draws: int) -> float:
    # The pull of value k against the other L follows from u_k alone: leaving it out moves mean and sum of squares by known amounts.
    # A value that alone differs from the rest has no pull (u^2 = L); the median over rows passes over such rows.
    square = np.minimum(u**2 / n_draws, 1 - 1e-9)
    pull_square = u**2 * (n_draws**2 - 1) / (n_draws**2 * (1 - square))
    return float(np.sqrt(np.median(pull_square.mean(axis=1))))


def _test(truth: Array, samples: Array, rng: np.random.Generator) -> tuple[float, float, float]:
    """p-values of the mean, of the width, and of both together."""
    u = _together(truth, samples)
    n = truth.size
    null = (u[np.arange(n), rng.integers(0, u.shape[1], (rows, n))] for rows in chunks(N_NULL, n))  # any value may be the truth
    simulated = np.concatenate([_deviations(picked.mean(axis=1), picked.var(axis=1), n) for picked in null])
    observed = _deviations(u[:, :1].T.mean(axis=1), u[:, :1].T.var(axis=1), n)[0]
    # standard deviations under the null, for p-values below what the simulations resolve
    errors = np.array([1 / np.sqrt(n), np.sqrt(np.sum((u**4).mean(axis=1) - 1)) / n])
    tails = 2 * ndtr(-observed / errors)
    mean, width = (smallest_pvalue(observed[[i]], simulated[:, [i]], float(tails[i])) for i in range(2))
    return mean, width, smallest_pvalue(observed, simulated, float(2 * tails.min()))


def _deviations(mean: Array, variance: Array, n: int) -> Array:
    return np.stack([np.abs(mean), np.abs(variance - (1 - 1 / n))], axis=-1)
