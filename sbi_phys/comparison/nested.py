r"""Nested hypotheses: the p-value of a test statistic under the null hypothesis, by simulated data sets (toys).

    p = (1 + #{toys with t >= t_obs}) / (n_toys + 1),      Z = Phi^-1(1 - p)

The observation counts as one of the toys, which makes the test valid for any number of them: P(p <= a | H0) <= a. With nuisance parameters
the null is composite, and the p-value is the largest over the given points of the null (the profiled ones, or a grid over a region). It is
exact if the true point is among them.

The error of p from the number of toys is binomial (Clopper & Pearson). Where Wilks' theorem holds, chi-square gives the same p-value
without toys; it does not hold on a boundary, or if a parameter is undefined under the null.

Source: Davison & Hinkley 1997, Bootstrap Methods, ch. 4; Gross & Vitells 2010, arXiv:1005.1891 (when Wilks fails).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv, chdtrc, ndtri

from sbi_phys.core.checks import as_array, as_matrix, as_real, require_finite, require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.results import Result
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.simulation.protocol import Simulator, check_simulator

__all__ = ["NestedTest", "nested_test"]

_CHUNK = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedTest(Result):
    """Result of `nested_test`: test of a null hypothesis.

    statistic, observed. pvalue, with interval, its central 68.3 % error from the number of toys. significance, one-sided Gaussian standard
    deviations, with significance_interval. null_theta (d,), the point of the null with the largest p-value; pvalues (m,) of all points.
    toys (n_toys,), the statistic at that point. wilks, the p-value by chi-square if dof was given, else None.

    >>> from types import SimpleNamespace
    >>> import sbi_phys as sp
    >>> prior = sp.BoxPrior([sp.Parameter("mu", 0, 9)])
    >>> facts = dict(prior=prior, parameters=prior.parameters, observables=(sp.Observable("n", 1),), settings={})
    >>> counts = SimpleNamespace(simulate=lambda theta, rng: rng.poisson(4 + theta), **facts)
    >>> result = sp.comparison.nested_test(counts, [14], lambda x: x[:, 0], [0.0], n_toys=500)  # 4 events expected
    >>> result.toys.shape, bool(result.pvalue < 0.01), bool(result.significance > 2.3)
    ((500,), True, True)
    """

    statistic: float
    pvalue: float
    interval: tuple[float, float]
    significance: float
    significance_interval: tuple[float, float]
    null_theta: Array
    pvalues: Array
    toys: Array
    wilks: float | None

    def summary(self) -> str:
        """Return the result in words."""
        low, high = self.significance_interval
        n = self.toys.size
        limit = " (no toy reaches the observation: an upper limit on p)" if self.pvalue <= 1 / (n + 1) else ""
        wilks = "" if self.wilks is None else f"; by Wilks' theorem p = {self.wilks:.3g}, {_sigma(self.wilks):.2f} sigma"
        return (
            f"Null hypothesis: t = {self.statistic:.4g}, p = {self.pvalue:.3g} from {n} toys, {self.significance:.2f} sigma "
            f"[{low:.2f}, {high:.2f}]{limit}{wilks}"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the statistic's distribution under the null and the observation."""
        return figures.calibration.nested_test(self, ax)


def nested_test(
    simulator: Simulator,
    x_obs: ArrayLike,
    statistic: Callable[[Array], ArrayLike],
    null_theta: ArrayLike,
    *,
    n_toys: int = 2000,
    dof: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> NestedTest:
    r"""p-value and significance of H0: theta in null_theta, rejected for large values of the statistic.

    Args:
        simulator: simulates the toys.
        x_obs: (k,), one observation.
        statistic: function x (n, k) -> t (n,), e.g. 2 [max log L - max log L under H0], applied to observation and toys.
        null_theta: (d,) or (m, d), the points of the null hypothesis.
        n_toys: at each point.
        dof: degrees of freedom for the p-value by Wilks' theorem.
        seed: of the toys.
        progress: default none.

    Raises: ShapeError, NonFiniteError (the statistic too), SupportError, DataError, SettingError, SimulatorMismatchError.
    Source: module docstring.   Read: 3 sigma is evidence, 5 sigma a discovery, not corrected for a look-elsewhere effect.

    >>> from types import SimpleNamespace
    >>> import sbi_phys as sp
    >>> prior = sp.BoxPrior([sp.Parameter("mu", 0, 9)])
    >>> facts = dict(prior=prior, parameters=prior.parameters, observables=(sp.Observable("n", 1),), settings={})
    >>> counts = SimpleNamespace(simulate=lambda theta, rng: rng.poisson(4 + theta), **facts)
    >>> bool(sp.comparison.nested_test(counts, [4], lambda x: x[:, 0], [0.0], n_toys=500).pvalue > 0.3)
    True
    """
    check_simulator(simulator)
    points = as_matrix("null_theta", null_theta, simulator.prior.dim, simulator.prior.names)
    simulator.prior.require_contains(points)
    n_toys = require_int("n_toys", n_toys, low=19)
    if not callable(statistic):
        raise SettingError(f"statistic is {statistic!r}; expected a function x (n, k) -> t (n,)")
    x = as_real("x_obs", x_obs)
    if x.ndim == 2 and x.shape[0] == 1:
        x = x[0]
    if x.ndim != 1:
        raise ShapeError(f"x_obs has shape {x.shape}; expected (k,), one observation")
    require_finite("x_obs", x)
    observed = float(_values(statistic, x[None])[0])
    toys = np.empty((len(points), n_toys))
    with or_none(progress).task("toys", total=toys.size) as task:
        for i, theta in enumerate(points):
            for start in range(0, n_toys, _CHUNK):
                size = min(_CHUNK, n_toys - start)
                drawn = simulator.simulate(np.tile(theta, (size, 1)), rng_for(seed, "toys", i, start))
                toys[i, start : start + size] = _values(statistic, np.asarray(drawn, dtype=np.float64))
                task.advance(size)
    above = (toys >= observed - 1e-9 * max(1.0, abs(observed))).sum(axis=1)
    worst = int(np.argmax(above))
    return _result(observed, above, worst, points[worst], toys[worst], dof)


def _result(observed: float, above: Integers, worst: int, theta: Array, toys: Array, dof: float | None) -> NestedTest:
    n, k = toys.size, int(above[worst])
    pvalues = (1 + above) / (n + 1)
    # Clopper-Pearson at 68.3 %: at the ends, k or more (k or fewer) toys have a probability of 15.9 %
    low = float(betaincinv(k, n - k + 1, 0.1587)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 0.8413)) if k < n else 1.0
    pvalue = float(pvalues[worst])
    return NestedTest(
        statistic=observed,
        pvalue=pvalue,
        interval=(low, high),
        significance=_sigma(pvalue),
        significance_interval=(_sigma(high), _sigma(low)),
        null_theta=theta,
        pvalues=pvalues,
        toys=toys,
        wilks=None if dof is None else float(chdtrc(dof, max(observed, 0.0))),
    )


def _values(statistic: Callable[[Array], ArrayLike], x: Array) -> Array:
    values = as_array("statistic(x)", statistic(x), (len(x),), finite=False)
    if not np.isfinite(values).all():
        raise DataError(f"statistic is {values[~np.isfinite(values)][0]} in {int((~np.isfinite(values)).sum())} of {len(x)} data sets")
    return values


def _sigma(pvalue: float) -> float:
    return float(-ndtri(pvalue))
