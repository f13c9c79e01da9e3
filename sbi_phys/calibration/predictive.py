"""Predictive checks: do data replicated from the posterior, or from the prior, look like the observed data?

For a statistic T and n replicas, with theta ~ p(theta | x_obs) and x_rep ~ p(x | theta),

    p_high = P(T(x_rep, theta) >= T(x_obs, theta)),   p_low = P(T(x_rep, theta) <= T(x_obs, theta)),

each estimated as (1 + #) / (n + 1), which is never 0. The two-sided p-value of a statistic is min(1, 2 min(p_high, p_low)), that of
several statistics is the smallest times their number.

The default statistics are functions of the pulls, (x - mean) / sd per column, with mean and sd over replicas AND data. The data are then
treated as one more replica, and the ranks of replicas and data are exchangeable if the model is right. For replicas from the prior the
p-value is therefore exact. For replicas from the posterior the data are used twice, so p is closer to 1/2 than a uniform variable:
the test is conservative.

Source: Gelman, Meng & Stern 1996, Statistica Sinica 6, 733 (posterior); Box 1980, J. R. Stat. Soc. A 143, 383 (prior).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.calibration.inputs import check_names
from sbi_phys.calibration.pvalues import ALPHA, combine, holm
from sbi_phys.core.checks import as_array, as_real
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PredictiveChecks", "PredictivePValue", "PriorPredictive", "predictive_checks", "predictive_pvalue", "prior_predictive_check"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictivePValue(Result):
    """Result of `predictive_pvalue`: pvalue with its binomial error, and the statistics t_rep (n,), t_obs (n,) or (1,), in their unit.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> result = sp.calibration.predictive_pvalue(np.arange(1.0, 100.0), 95.5)
    >>> result.n, round(result.pvalue, 2), round(result.error, 3)
    (99, 0.05, 0.022)
    """

    pvalue: float
    error: float
    t_rep: Array
    t_obs: Array

    @property
    def n(self) -> int:
        """Number of replicas."""
        return int(self.t_rep.size)

    def summary(self) -> str:
        """Return the result in words."""
        if self.pvalue < 0.05:
            words = "the data are more extreme than the replicas: the model does not describe this statistic"
        elif self.pvalue > 0.95:
            words = "the data are closer to the model than its replicas are: errors may be overstated"
        else:
            words = "the data look like the replicas of the model"
        return f"Posterior predictive p = {self.pvalue:.3f} +- {self.error:.3f} ({self.n} replicas): {words}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw replicas and observation: a histogram for one observed value, pairs with the diagonal otherwise."""
        return figures.calibration.predictive(self, ax)


def predictive_pvalue(t_rep: ArrayLike, t_obs: ArrayLike) -> PredictivePValue:
    r"""Posterior predictive p-value, P(T_rep >= T_obs).

    Args:
        t_rep: (n,), the statistic of replicated data, e.g. the deviance of x_rep_i at theta_i; n >= 10.
        t_obs: a number, or (n,) if the statistic depends on theta: that of the observed data at the same theta_i.

    Returns: PredictivePValue.   Raises: ShapeError, NonFiniteError, DataError.
    Source: Gelman, Meng & Stern 1996, Statistica Sinica 6, 733.
    Read: near 0 = the model does not describe this statistic. The test is conservative, because the data are used twice: p is closer to
        0.5 than a uniform variable.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> replicas = np.random.default_rng(0).chisquare(10, size=500)  # chi-square of replicated data with 10 bins
    >>> bool(sp.calibration.predictive_pvalue(replicas, 50.0).pvalue < 0.01)
    True
    """
    replicas = as_array("t_rep", t_rep, (None,))
    if replicas.size < 10:
        raise DataError(f"t_rep has {replicas.size} values; expected at least 10 replicas")
    observed = as_real("t_obs", t_obs)
    observed = as_array("t_obs", observed.reshape(1) if observed.ndim == 0 else observed, (replicas.size if observed.ndim else 1,))
    p = float((1 + (replicas >= observed).sum()) / (replicas.size + 1))
    return PredictivePValue(pvalue=p, error=float(np.sqrt(p * (1 - p) / (replicas.size + 1))), t_rep=replicas, t_obs=observed)


Statistic = Callable[..., ArrayLike]

MIN_REPLICAS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictiveChecks(Result):
    """Result of `predictive_checks`: predictive p-values of several statistics, from n replicas.

    checks {name: PredictivePValue} (one-sided, high), pvalues {name: p} (two-sided), pvalue (Bonferroni).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> replicas = np.random.default_rng(0).normal(size=(200, 6))
    >>> sorted(sp.calibration.predictive_checks(replicas, np.zeros(6)).checks)
    ['chi2', 'longest run', 'max |pull|', 'neighbours alike', 'total']
    """

    checks: dict[str, PredictivePValue]
    pvalues: dict[str, float]
    pvalue: float
    n: int

    @property
    def verdicts(self) -> dict[str, str]:
        """'like the replicas', or on which side the data lie, for each statistic; Holm's correction at 5 %."""
        adjusted = holm(self.pvalues)
        side = {name: "higher in the data" if check.pvalue < 0.5 else "lower in the data" for name, check in self.checks.items()}
        return {name: side[name] if adjusted[name] <= ALPHA else "like the replicas" for name in self.checks}

    def rows(self) -> Rows:
        """Return the table: one row for each statistic, with its observed value (the mean, if it depends on the draws)."""
        verdicts, checks = self.verdicts, self.checks.values()
        found = {"name": list(self.checks), "verdict": [verdicts[n] for n in self.checks], "pvalue": [self.pvalues[n] for n in self.checks]}
        return Rows.of(found | {"observed": [c.t_obs.mean() for c in checks], "predicted": [np.median(c.t_rep) for c in checks]})

    def summary(self) -> str:
        """Return the result in words: one line for all, one line for each statistic."""
        verdicts = self.verdicts
        bad = sum(v != "like the replicas" for v in verdicts.values())
        head = "the data look like the replicas" if not bad else f"{bad} of {len(verdicts)} statistics are unlike the replicas"
        lines = [f"Predictive checks, {self.n} replicas: {head} (p = {self.pvalue:.3g}, corrected for {len(verdicts)} tests)"]
        pad = max(map(len, self.checks))
        for name, check in self.checks.items():
            middle = f"median {np.median(check.t_obs):.4g} against {np.median(check.t_rep):.4g}"
            lines.append(f"  {name:<{pad}}  {verdicts[name]:<18}  p = {self.pvalues[name]:<8.3g}  {middle}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the position of the data among the replicas, one row for each statistic."""
        return figures.calibration.predictive_checks(self, ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorPredictive(Result):
    r"""Result of `prior_predictive_check`: the data compared with replicas from the prior.

    names of the k columns; observed (k,); quantiles (k, 5) of the replicas at 2.5, 16, 50, 84, 97.5 %. pvalues {name: p}, two-sided,
    one for each column; blocks {name: p}, joint, of each block of columns; joint, of all columns. pvalue, of columns, blocks and joint
    together. outside, names of columns in which the data lie outside all replicas.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> replicas = np.random.default_rng(0).normal(size=(200, 2))
    >>> sp.calibration.prior_predictive_check(replicas, [0.0, 9.0], ["counts", "slope"]).outside
    ('slope',)
    """

    names: tuple[str, ...]
    observed: Array
    quantiles: Array
    pvalues: dict[str, float]
    blocks: dict[str, float]
    joint: float
    pvalue: float
    outside: tuple[str, ...]
    n: int

    def rows(self) -> Rows:
        """Return the table: one row for each column of the data, with the quantiles of the replicas."""
        columns = dict(zip(("q025", "q16", "median", "q84", "q975"), self.quantiles.T, strict=True))
        found = {"name": self.names, "observed": self.observed, "pvalue": [self.pvalues[n] for n in self.names]}
        return Rows.of(found | columns, errors={"median": ("q16", "q84")})

    def summary(self) -> str:
        """Return the result in words."""
        head = "the prior produces such data" if self.pvalue > ALPHA else "the prior hardly produces such data"
        lines = [f"Prior predictive check, {self.n} replicas, {len(self.names)} columns: {head} (p = {self.pvalue:.3g}, corrected)"]
        lines.append(f"  all columns jointly  p = {self.joint:.3g}")
        lines += [f"  block {name}  p = {p:.3g}" for name, p in self.blocks.items()]
        bad = [name for name, p in holm(self.pvalues).items() if p <= ALPHA]
        if bad:
            lines.append(f"  columns unlike the replicas: {_some(bad)}")
        if self.outside:
            lines.append(f"  columns outside all replicas: {_some(self.outside)}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the 68 and 95 % bands of the replicas in each column, in sd about their median, and the data."""
        return figures.calibration.prior_predictive(self, ax)


def predictive_checks(
    x_rep: ArrayLike, x_obs: ArrayLike, statistics: Mapping[str, Statistic] | None = None, theta: ArrayLike | None = None
) -> PredictiveChecks:
    r"""Predictive p-values of several statistics, p = min(1, 2 min(P(T_rep >= T_obs), P(T_rep <= T_obs))).

    Args:
        x_rep: (n, k), replicas, row i from p(x | theta_i); n >= 20.
        x_obs: (k,), the data.
        statistics: {name: T}. T(x) takes (n, k) and returns (n,). With theta, T(theta, x) takes (n, d) and (n, k), and is evaluated for
            the data at every theta_i. Default: total (sum over columns), max |pull|, chi2 (sum of squared pulls), longest run
            (of neighbouring columns with pulls of one sign) and neighbours alike
            (mean product of neighbouring pulls); the last two with k >= 5.
        theta: (n, d), the parameters of the replicas, for statistics that depend on them.

    Returns: PredictiveChecks.
    Raises: ShapeError, NonFiniteError (also of a statistic's values), DataError (few replicas), SettingError (not callable).
    Source: Gelman, Meng & Stern 1996, Statistica Sinica 6, 733.
    Read: small p = the model does not describe this statistic; a long run or neighbours alike = a trend that the model lacks.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> replicas = np.random.default_rng(0).normal(size=(500, 6))
    >>> sp.calibration.predictive_checks(replicas, np.full(6, 3.0), {"mean": lambda x: x.mean(axis=1)}).verdicts
    {'mean': 'higher in the data'}
    """
    replicas, data = _replicas("x_rep", x_rep, x_obs)
    pairs: Mapping[str, tuple[Array, Array | float]] = _default_statistics(replicas, data)
    if statistics is not None:
        if not statistics:
            raise SettingError("statistics is empty; expected {name: function}, or None for the default ones")
        pairs = {str(name): _values(str(name), f, replicas, data, theta) for name, f in statistics.items()}
    checks = {name: predictive_pvalue(*pair) for name, pair in pairs.items()}
    pvalues = {
        name: min(1.0, 2 * min(checks[name].pvalue, predictive_pvalue(-t_rep, -t_obs).pvalue)) for name, (t_rep, t_obs) in pairs.items()
    }
    return PredictiveChecks(checks=checks, pvalues=pvalues, pvalue=combine(pvalues), n=len(replicas))


def prior_predictive_check(
    x_prior: ArrayLike,
    x_obs: ArrayLike,
    names: Sequence[str | Parameter] | None = None,
    blocks: Mapping[str, ArrayLike] | None = None,
) -> PriorPredictive:
    r"""Test whether the observation is among those that prior and simulator produce: by column, by block of columns, and jointly.

    The p-values of columns are two-sided ranks among the replicas. The joint ones rank sum_j pull_j^2 over the columns (or the block),
    whitened with the covariance of replicas and data together if n >= 20 k, else by the sd alone. The data are treated as one more row, so
    the ranks are exact.

    Args:
        x_prior: (n, k), x ~ p(x | theta), theta ~ p(theta); n >= 20.
        x_obs: (k,), the data.
        names: k names of columns.
        blocks: {name: indices of columns, or k booleans}, e.g. spectrum and composition bins.

    Returns: PriorPredictive.   Raises: ShapeError, NonFiniteError, DataError, SettingError (a block with no such column).
    Source: Box 1980, J. R. Stat. Soc. A 143, 383.
    Read: small p = prior and simulator hardly produce such data: widen the prior or correct the simulator before inference.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> replicas = np.random.default_rng(0).normal(size=(200, 2))
    >>> bool(sp.calibration.prior_predictive_check(replicas, [9.0, 9.0]).pvalue < 0.05)
    True
    """
    replicas, data = _replicas("x_prior", x_prior, x_obs)
    n, k = replicas.shape
    plain = tuple(f"x_{j}" for j in range(k)) if names is None else check_names(names, k)[0]
    above, below = (replicas >= data).sum(axis=0), (replicas <= data).sum(axis=0)
    p = np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / (n + 1))
    pvalues = dict(zip(plain, p.tolist(), strict=True))
    rows = np.concatenate([data[None], replicas])
    chosen = {str(name): _joint(rows[:, _columns(str(name), block, k)]) for name, block in (blocks or {}).items()}
    joint = _joint(rows)
    # all columns together count as one test, so that many columns do not outweigh the joint test
    return PriorPredictive(
        names=plain,
        observed=data,
        quantiles=np.quantile(replicas, [0.025, 0.16, 0.5, 0.84, 0.975], axis=0).T,
        pvalues=pvalues,
        blocks=chosen,
        joint=joint,
        pvalue=combine({"columns": combine(pvalues), "joint": joint, **{f"block {name}": q for name, q in chosen.items()}}),
        outside=tuple(name for name, a, b in zip(plain, above, below, strict=True) if min(a, b) == 0),
        n=n,
    )


def _replicas(name: str, x: ArrayLike, x_obs: ArrayLike) -> tuple[Array, Array]:
    replicas = as_array(name, x, (None, None))
    n, k = replicas.shape
    if k == 0:
        raise ShapeError(f"{name} has shape {replicas.shape}; expected at least one column")
    if n < MIN_REPLICAS:
        raise DataError(f"{name} has {n} rows; expected at least {MIN_REPLICAS} replicas")
    data = as_real("x_obs", x_obs)
    return replicas, as_array("x_obs", data.reshape(1) if data.ndim == 0 else data, (k,), note=f"the columns of {name}")


def _values(name: str, statistic: Statistic, replicas: Array, data: Array, theta: ArrayLike | None) -> tuple[Array, Array | float]:
    if not callable(statistic):
        raise SettingError(f"statistic {name!r} is a {type(statistic).__name__}; expected a function of x (n, k)")
    n = len(replicas)
    if theta is None:
        t_rep, t_obs = statistic(replicas), statistic(data[None])
        return as_array(f"statistic {name!r}", t_rep, (n,)), as_array(f"statistic {name!r} of the data", t_obs, (1,))[0]
    parameters = as_real("theta", theta)
    parameters = as_array("theta", parameters[:, None] if parameters.ndim == 1 else parameters, (n, None), note="one row per replica")
    t_rep, t_obs = statistic(parameters, replicas), statistic(parameters, np.repeat(data[None], n, axis=0))
    return as_array(f"statistic {name!r}", t_rep, (n,)), as_array(f"statistic {name!r} of the data", t_obs, (n,))


def _pulls(rows: Array) -> Array:
    centred = rows - rows.mean(axis=0)
    sd = centred.std(axis=0)
    varies = sd > 1e-12 * np.maximum(np.abs(rows).max(axis=0), 1e-300)
    # the pull of a column with the same value in replicas and data is 0
    return np.where(varies, centred, 0.0) / np.where(varies, sd, 1.0)


def _default_statistics(replicas: Array, data: Array) -> dict[str, tuple[Array, float]]:
    rows = np.concatenate([data[None], replicas])
    pulls = _pulls(rows)
    found = {"total": rows.sum(axis=1), "max |pull|": np.abs(pulls).max(axis=1), "chi2": (pulls**2).sum(axis=1)}
    if rows.shape[1] >= 5:
        found["longest run"] = _longest_run(pulls)
        found["neighbours alike"] = (pulls[:, 1:] * pulls[:, :-1]).mean(axis=1)
    return {name: (t[1:], float(t[0])) for name, t in found.items()}


def _longest_run(pulls: Array) -> Array:
    """Length of the longest run of neighbouring columns with pulls of one sign, per row (n,); a pull of 0 ends a run."""
    sign = np.sign(pulls)
    run = np.abs(sign[:, 0])
    longest = run
    for j in range(1, sign.shape[1]):
        run = np.where(sign[:, j] == 0, 0.0, np.where(sign[:, j] == sign[:, j - 1], run + 1, 1.0))
        longest = np.maximum(longest, run)
    return np.asarray(longest)


def _joint(rows: Array) -> float:
    """p-value of the first row among all by its distance from their mean."""
    n, k = rows.shape
    pulls = _pulls(rows)
    if n >= 20 * k:
        value, vector = np.linalg.eigh(pulls.T @ pulls / n)
        keep = value > 1e-10 * value.max()
        pulls = pulls @ (vector[:, keep] / np.sqrt(value[keep]))
    distance = (pulls**2).sum(axis=1)
    return float((distance >= distance[0] * (1 - 1e-9)).sum() / n)


def _columns(name: str, block: ArrayLike, k: int) -> Integers:
    chosen = np.asarray(block)
    if chosen.dtype == bool and chosen.shape == (k,):
        chosen = np.flatnonzero(chosen)
    if chosen.ndim != 1 or chosen.size == 0 or chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= k:
        raise SettingError(f"block {name!r} is {block!r}; expected indices of columns 0..{k - 1}, or {k} booleans")
    return np.unique(chosen).astype(np.int64)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
