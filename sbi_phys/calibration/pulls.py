"""Pulls, posterior contraction, and the bias of the posterior mean.

    pull = (theta* - mean_l theta_l) / sd_l theta_l        contraction = 1 - E[var(theta | x)] / var(theta)

A pull is standard normal only if the posterior is normal, and for finite L its variance is only approximately 1. The *test* assumes
neither. If q is right, theta* and the L draws are exchangeable given x. Standardise the L + 1 values z_k together,
u_k = (z_k - mean)/sd: the true value is any of the u_k with equal probability, so E[u] = 0 and E[u^2] = 1 hold exactly for every shape
and every L. The null distribution of mean(u) and var(u) over n simulations is simulated by choosing one of the L + 1 values at
random in every row. The size of the test is exact for skewed, heavy-tailed and bimodal posteriors; a t test of mean(pull^2) = 1 has no
exact size there.

The result reports the usual pulls, which are not bounded by sqrt(L) as u is, and next to their width the width expected from the same
draws if they are right.

A contraction near 0 means that the posterior is as wide as the prior, which SBC and pulls do not detect: either x carries no information
or q has not learned it.

Source: Demortier & Lyons 2002, CDF/ANAL/PUBLIC/5776 (pulls); Betancourt 2018, arXiv:1803.08393 (contraction).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtr

from sbi_phys.calibration._results import NamedTests, fault_words
from sbi_phys.calibration.inputs import check_names, check_pairs, require_varying
from sbi_phys.calibration.pvalues import chunks, combine, smallest_pvalue
from sbi_phys.core.errors import DataError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Pulls", "pulls"]
MIN_DRAWS = 10  # pulls with a standard deviation from fewer draws have no meaningful variance
N_NULL = 999


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulls(NamedTests):
    r"""Result of `pulls` for n simulations with l draws and d parameters; (d,) and dimensionless unless stated.

    pull (n, d), (true value - posterior mean) / posterior sd. mean, width (sd) of the pulls with errors that assume no shape;
    width_expected, the width expected from the same draws if they are right (1 for many draws).
    contraction with error, 1 = x determines theta, 0 = as wide as the prior. bias, mean of (posterior mean - true value), with error, and
    rmse, in the parameters' units. pvalues_mean, pvalues_width, pvalues (both together) by name; pvalue, smallest times d.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta = rng.normal(size=(300, 1))
    >>> x = theta + rng.normal(size=(300, 1))
    >>> result = sp.calibration.pulls(theta, (x / 2)[:, None] + np.sqrt(0.5) * rng.normal(size=(300, 50, 1)))  # the exact posterior
    >>> result.pull.shape, bool(abs(result.contraction[0] - 0.5) < 0.2)
    ((300, 1), True)
    """

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

    @property
    def n(self) -> int:
        """Number of simulations."""
        return int(self.pull.shape[0])

    def _fault(self, j: int) -> str:
        width = self.width_expected[j] / self.width[j]  # of the posterior, over the right one
        return fault_words(-self.mean[j], self.mean_err[j], width, width * self.width_err[j] / self.width[j])

    def _columns(self) -> dict[str, Any]:
        shown = ("mean", "mean_err", "width", "width_err", "width_expected", "contraction", "contraction_err", "bias", "bias_err", "rmse")
        return {name: getattr(self, name) for name in shown}

    def summary(self) -> str:
        """Return the result in words: one line for all, one or two lines for each parameter."""
        details = [
            f"pull {self.mean[j]:+.2f} +- {self.mean_err[j]:.2f}  width {self.width[j]:.2f} +- {self.width_err[j]:.2f}"
            f" (right: {self.width_expected[j]:.2f})  bias {self.bias[j]:+.3g} +- {self.bias_err[j]:.2g}"
            f"  contraction {self.contraction[j]:.2f} +- {self.contraction_err[j]:.2f}"
            for j in range(len(self.names))
        ]
        subject, note = f"Pulls, {self.n} simulations x {self.n_draws} draws", f", corrected for {len(self.names)} tests"
        head, *rows = self._summary(subject, "no deviation found", "not calibrated", details, note)
        lines, pad = [head], max(map(len, self.names))
        for j, row in enumerate(rows):
            lines.append(row)
            if self.contraction[j] < 3 * self.contraction_err[j]:
                words = f"as wide as the prior: x contains little information on {self.names[j]}, or the posterior has not learned it"
                lines.append(f"  {'':<{pad}}  {words}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw mean and width of the pulls with errors, one row for each parameter.

        Read: mean left of 0 = posterior too high; width right of 1 = overconfident.
        """
        return figures.calibration.pull_rows(self, ax)


def pulls(theta: ArrayLike, draws: ArrayLike, names: Sequence[str | Parameter] | None = None, *, seed: int = 0) -> Pulls:
    r"""Pulls (theta* - m)/s of the posterior mean, tested for mean 0 and the width expected from the draws.

    Args:
        theta: (n, d), true parameters of the simulations, prior units; n >= 10.
        draws: (n, l, d), independent posterior draws for each simulation, same units; l >= 10.
        names: d names, or Parameters.
        seed: of the simulated null distribution.

    Returns: Pulls.
    Raises: ShapeError, NonFiniteError, DataError (few rows or draws, a constant parameter, equal draws in a row).
    Source: Demortier & Lyons 2002, CDF/ANAL/PUBLIC/5776; contraction: Betancourt 2018, arXiv:1803.08393.
    Read: mean +0.3 = the posterior lies 0.3 of its sd too low; width 1.25 = its sd is 1/1.25 = 0.8 of the right one.
        A true value outside all draws is a large pull, not an error.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta = rng.normal(size=(300, 1))
    >>> x = theta + rng.normal(size=(300, 1))
    >>> draws = (x / 2)[:, None] + 0.5 * rng.normal(size=(300, 50, 1))  # sd 0.5 instead of 0.71
    >>> sp.calibration.pulls(theta, draws, ["energy"]).verdicts
    {'energy': 'overconfident'}
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
    # linearised error of a ratio of two means over the same n rows
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
    # The pull of value k against the other L follows from u_k alone, because leaving it out changes mean and sum of squares by known
    # amounts. The only value that differs from the rest has no pull (u^2 = L); the median over rows is not affected by such rows.
    square = np.minimum(u**2 / n_draws, 1 - 1e-9)
    pull_square = u**2 * (n_draws**2 - 1) / (n_draws**2 * (1 - square))
    return float(np.sqrt(np.median(pull_square.mean(axis=1))))


def _test(truth: Array, samples: Array, rng: np.random.Generator) -> tuple[float, float, float]:
    """p-values of the mean, of the width, and of both together."""
    u = _together(truth, samples)
    n = truth.size
    null = (u[np.arange(n), rng.integers(0, u.shape[1], (rows, n))] for rows in chunks(N_NULL, n))  # any value may be the true one
    simulated = np.concatenate([_deviations(picked.mean(axis=1), picked.var(axis=1), n) for picked in null])
    observed = _deviations(u[:, :1].T.mean(axis=1), u[:, :1].T.var(axis=1), n)[0]
    # standard deviations under the null, for p-values too small for the simulations
    errors = np.array([1 / np.sqrt(n), np.sqrt(np.sum((u**4).mean(axis=1) - 1)) / n])
    tails = 2 * ndtr(-observed / errors)
    mean, width = (smallest_pvalue(observed[[i]], simulated[:, [i]], float(tails[i])) for i in range(2))
    return mean, width, smallest_pvalue(observed, simulated, float(2 * tails.min()))


def _deviations(mean: Array, variance: Array, n: int) -> Array:
    return np.stack([np.abs(mean), np.abs(variance - (1 - 1 / n))], axis=-1)
