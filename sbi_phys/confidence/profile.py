r"""Maximum likelihood and profile likelihood of any log likelihood, exact or learned, with iminuit.

    theta_hat = argmin [-ln L(theta) + sum_k (theta_k - m_k)^2 / (2 s_k^2)]

the second part for nuisances k that were measured elsewhere as m_k +- s_k. Errors are those of Hesse, from the curvature, and of Minos,
where the profile likelihood

    q(psi) = 2 [ln L(theta_hat) - max_nu ln L(psi, nu)]

reaches 1. In large samples q is distributed as chi-square with one degree of freedom per parameter of interest (Wilks), away from any
limit: then {q <= chi2_level} covers. Close to a limit, or with few events, it does not: that is what `neyman` is for.

Source: James & Roos 1975 (Minuit); Cowan et al. 2011, arXiv:1007.1727; pulls and impacts as in ATLAS, arXiv:1408.7084 (figure 4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration.inputs import check_names
from sbi_phys.confidence.inputs import check_level, find_name, frozen
from sbi_phys.confidence.minimise import Cost, LogLikelihood, minimise
from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import ConvergenceError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbi_phys.confidence.impacts import Impacts
    from sbi_phys.confidence.scans import Contour, Profile

__all__ = ["Fit", "fit"]

Limits = Mapping[str, tuple[float | None, float | None]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    r"""Best fit of d parameters, in their own units, and what is needed to go on from it.

    values (d,); errors (d,), Hesse; covariance (d, d); minos (d, 2), (-, +), NaN where a side was not found, None if not asked for.
    nll, -ln L at the minimum with constraint terms. limits (d, 2), +-inf where there are none. constraints {name: (mean, sd)}.
    at_limit, parameters that ended at a limit: their Hesse errors mean nothing.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    values: Array
    errors: Array
    covariance: Array
    minos: Array | None
    nll: float
    limits: Array
    constraints: dict[str, tuple[float, float]]
    at_limit: tuple[str, ...]
    n_calls: int
    cost: Cost = field(repr=False)

    @property
    def correlation(self) -> Array:
        """Correlation matrix (d, d)."""
        scale = np.sqrt(np.diag(self.covariance))
        return np.asarray(self.covariance / np.outer(scale, scale))

    @property
    def pulls(self) -> dict[str, tuple[float, float]]:
        """Pull ((fit - mean) / sd) and width (error / sd) of each constrained parameter. Read: width well below 1: the data know better."""
        out = {}
        for name, (mean, sd) in self.constraints.items():
            i = find_name(name, self.names)
            out[name] = (float((self.values[i] - mean) / sd), float(self.errors[i] / sd))
        return out

    def value(self, name: str) -> float:
        """Fitted value of one parameter.   Raises: SettingError (no such name)."""
        return float(self.values[find_name(name, self.names)])

    def error(self, name: str) -> float:
        """Hesse error of one parameter.   Raises: SettingError (no such name)."""
        return float(self.errors[find_name(name, self.names)])

    def profile(self, name: str, grid: ArrayLike | None = None) -> "Profile":
        """Profile likelihood of one parameter; see `scans.profile`."""
        from sbi_phys.confidence.scans import profile

        return profile(self, name, grid)

    def contour(self, x: str, y: str, *, points: int = 25) -> "Contour":
        """Joint profile likelihood of two parameters; see `scans.contour`."""
        from sbi_phys.confidence.scans import contour

        return contour(self, x, y, points=points)

    def impacts(self, name: str) -> "Impacts":
        """Pulls and impacts of all other parameters on `name`; see `impacts.impacts`."""
        from sbi_phys.confidence.impacts import impacts

        return impacts(self, name)

    def interval(self, name: str, level: float = 0.683) -> tuple[float, float]:
        """Interval {q(psi) <= chi2_level(1)} of one parameter; see `asymptotic.asymptotic_interval`."""
        from sbi_phys.confidence.asymptotic import asymptotic_interval

        return asymptotic_interval(self, name, check_level(level))

    def summary(self) -> str:
        """Return the result in words: one line per parameter, with pulls where constrained."""
        lines = [f"maximum likelihood: -ln L = {self.nll:.6g}, {self.n_calls} calls"]
        pad, pulls = max(map(len, self.names)), self.pulls
        for i, name in enumerate(self.names):
            minos = "" if self.minos is None else f"  Minos {self.minos[i, 0]:+.3g} {self.minos[i, 1]:+.3g}"
            pull = "" if name not in pulls else f"  pull {pulls[name][0]:+.2f} +- {pulls[name][1]:.2f}"
            edge = "  AT ITS LIMIT: use the profile, not the error" if name in self.at_limit else ""
            lines.append(f"  {name:<{pad}}  {self.values[i]:.6g} +- {self.errors[i]:.3g}{minos}{pull}{edge}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, name: str | None = None) -> "Axes":
        """Draw the profile likelihood of one parameter (default: the first) over its parabola."""
        return self.profile(self.names[0] if name is None else name).plot(ax)


def fit(
    log_likelihood: LogLikelihood,
    start: ArrayLike,
    names: Sequence[str | Parameter] | None = None,
    limits: Limits | None = None,
    *,
    constraints: Mapping[str, tuple[float, float]] | None = None,
    minos: bool = True,
    strategy: int = 1,
    precision: float | None = None,
) -> Fit:
    r"""Maximise ln L(theta) - sum_k (theta_k - m_k)^2 / (2 s_k^2).

    Args:
        log_likelihood: theta (m, d) -> (m,), natural logarithm; one learned by a network does as well as an exact one.
        start: (d,), where the fit begins, the parameters' own units.
        names: d names or Parameters.
        limits: {name: (low or None, high or None)}; Parameters bring their own.
        constraints: {name: (mean, sd)}, Gaussian terms for nuisances; leave them out where the likelihood has them already.
        minos: asymmetric errors from the profile likelihood too.
        strategy: of Minuit, 0 (few calls) to 2 (careful).
        precision: relative precision of log_likelihood, None = double; about 1e-6 for a network.

    Returns: Fit.
    Raises: ConvergenceError (not converged, curvature not positive, Minos found a deeper minimum), NonFiniteError (NaN, or -Inf at the
        start), ShapeError, SettingError (start outside limits, unknown names).
    Source: iminuit; arXiv:1007.1727 for what follows from it.
    """
    theta0 = np.atleast_1d(as_array("start", np.atleast_1d(np.asarray(start)), (None,)))
    plain, labels = check_names(names, theta0.size)
    table = _limits(limits, names, plain, theta0)
    require_int("strategy", strategy, low=0, high=2)
    if precision is not None:
        require_number("precision", precision, low=0, high=0.1, open_low=True)
    cost = Cost(log_likelihood, plain, constraints or {}, strategy=strategy, precision=precision)
    best = minimise(cost, theta0, _steps(cost, theta0, table), table, np.zeros(theta0.size, dtype=bool), "the fit")
    best.hesse()
    if best.covariance is None or not best.accurate or not np.isfinite(np.array(best.errors)).all():
        raise ConvergenceError("the curvature at the minimum is not positive; expected parameters that the data can tell apart")
    values, errors = np.array(best.values), np.array(best.errors)
    edge = (np.abs(values[:, None] - table) < 1e-3 * errors[:, None]).tolist()
    limits_minos = _minos(best, plain, values, table) if minos else None
    return Fit(
        names=plain,
        labels=labels,
        values=frozen(values),
        errors=frozen(errors),
        covariance=frozen(np.array(best.covariance)),
        minos=None if limits_minos is None else frozen(limits_minos),
        nll=float(best.fval),
        limits=frozen(table),
        constraints=dict(cost.constraints),
        at_limit=tuple(n for n, touched in zip(plain, edge, strict=True) if any(touched)),
        n_calls=cost.calls,
        cost=cost,
    )


def _steps(cost: Cost, start: Array, limits: Array) -> Array:
    own = {name: 0.3 * sd for name, (_, sd) in cost.constraints.items()}
    step = np.array([own.get(n, 0.05 * max(abs(v), 1.0)) for n, v in zip(cost.names, start, strict=True)])
    return np.minimum(step, 0.1 * np.diff(limits, axis=1)[:, 0])


def _limits(limits: Limits | None, names: Any, plain: tuple[str, ...], start: Array) -> Array:
    table = np.tile([-np.inf, np.inf], (start.size, 1))
    for i, given in enumerate([names] if isinstance(names, str | Parameter) else names or ()):
        if isinstance(given, Parameter):
            table[i] = given.low, given.high
    for name, pair in (limits or {}).items():
        i = find_name(name, plain)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ShapeError(f"limits of {name!r} is {pair!r}; expected (low or None, high or None)")
        table[i] = (-np.inf if pair[0] is None else float(pair[0]), np.inf if pair[1] is None else float(pair[1]))
    for i, name in enumerate(plain):
        low, high = table[i]
        if not low < high:
            raise SettingError(f"limits of {name!r} are [{low:g}, {high:g}]; expected low < high")
        if not low <= start[i] <= high:
            raise SettingError(f"start of {name!r} is {start[i]:g}, outside of its limits [{low:g}, {high:g}]; expected one within")
    return table


def _minos(best: Any, names: tuple[str, ...], values: Array, limits: Array) -> Array:
    best.minos()
    out = np.full((values.size, 2), np.nan)
    for i, name in enumerate(names):
        found = best.merrors[name]
        if found.lower_new_min or found.upper_new_min:
            raise ConvergenceError(f"Minos found a deeper minimum along {name}; expected a start nearer to it than {values.tolist()}")
        if found.lower_valid or found.at_lower_limit:
            out[i, 0] = found.lower if found.lower_valid else limits[i, 0] - values[i]
        if found.upper_valid or found.at_upper_limit:
            out[i, 1] = found.upper if found.upper_valid else limits[i, 1] - values[i]
    return out
