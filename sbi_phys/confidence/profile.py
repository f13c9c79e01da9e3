r"""Maximum likelihood and profile likelihood with iminuit, for any log likelihood, exact or learned; asymptotic intervals, limits and CLs.

**Fit.** `fit` minimises

    -ln L(theta) + sum_k (theta_k - m_k)^2 / (2 s_k^2)

where the sum is over nuisance parameters k that were measured elsewhere as m_k +- s_k. Hesse errors follow from the curvature at the
minimum. Minos errors follow from the profile likelihood ratio

    q(psi) = 2 [ln L(theta_hat) - max_nu ln L(psi, nu)]

where it reaches 1. In large samples and away from limits of the parameters q has a chi-square distribution with one degree of freedom
per parameter of interest (Wilks), so that {q <= chi2_level} covers. Close to a limit, or with few events, it does not: use `neyman`.

**Scans.** `profile` and `contour` fit the nuisance parameters at each point. Each fit starts at
nu_hat + V_{nu psi} V_{psi psi}^-1 (psi - psi_hat), V being the covariance of the global fit: exact for a Gaussian likelihood.

**Impacts.** The impact of nu_k on psi is the shift of psi_hat when nu_k is fixed one error above or below its best value and all other
parameters are fitted again. For a Gaussian likelihood it is V_{psi k} / sqrt(V_kk). The statistical error of psi is its error with all
constrained parameters fixed.

**Asymptotic formulae**, with z_p = Phi^-1(p):

    interval        q(mu) <= chi2_level(1)
    upper limit     q_mu = q(mu) for mu_hat <= mu, else 0;   p = 1 - Phi(sqrt q_mu);   limit where q = z_level^2
    discovery       q_0 = q(0) for mu_hat >= 0, else 0;      p = 1 - Phi(sqrt q_0),    Z = sqrt q_0
    CLs             CLs(mu) = p_mu / P(q_mu >= q_obs | no signal), a limit where it is 1 - level

The second probability of CLs needs q_A, which is q of the Asimov data set (the expected data without signal). With mu_hat >= 0 imposed
(a limit of the parameter at 0):

    q <= q_A:  p_mu = 1 - Phi(sqrt q),                   CL_b = Phi(sqrt q_A - sqrt q)
    q >  q_A:  p_mu = 1 - Phi((q + q_A) / (2 sqrt q_A)),  CL_b = 1 - Phi((q - q_A) / (2 sqrt q_A))

The expected CLs limit for data N sd from the median is sigma (Phi^-1(1 - alpha Phi(N)) + N), alpha = 1 - level, sigma = mu / sqrt(q_A).
At a limit of the parameter the nominal 68.3 % covers 84.1 %, and 90 % covers 95 %.

Source: James & Roos 1975 (Minuit); Cowan, Cranmer, Gross & Vitells 2011, arXiv:1007.1727; Read 2002 (CLs); impacts and pulls as in
ATLAS, arXiv:1408.7084, figure 4.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, ndtri

from sbi_phys.calibration.inputs import check_names
from sbi_phys.confidence._inputs import frozen, point_words
from sbi_phys.core.checks import as_array, as_real, check_level, find_name, require_finite, require_int, require_number
from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SbiPhysError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Contour",
    "Cost",
    "Discovery",
    "Fit",
    "Impacts",
    "LogLikelihood",
    "Profile",
    "asymptotic_interval",
    "asymptotic_limit",
    "cls_limit",
    "cls_value",
    "conditional",
    "contour",
    "crossing",
    "discovery",
    "fit",
    "impacts",
    "minimise",
    "profile",
]

LogLikelihood = Callable[[Array], ArrayLike]

IMPOSSIBLE = 1e30  # replaces +Inf, which Minuit cannot compare


class Cost:
    r"""-ln L(theta) + sum_k (theta_k - m_k)^2 / (2 s_k^2), k the constrained parameters; counts its calls.

    log_likelihood: theta (m, d) -> (m,). constraints {name: (m, s)}. A log likelihood of -Inf is a theta that is impossible.
    Raises: NonFiniteError (NaN or +Inf, naming theta), ShapeError, SettingError.
    """

    def __init__(
        self,
        log_likelihood: LogLikelihood,
        names: tuple[str, ...],
        constraints: Mapping[str, tuple[float, float]],
        *,
        strategy: int,
        precision: float | None,
    ) -> None:
        self.log_likelihood, self.names = log_likelihood, names
        self.strategy, self.precision = strategy, precision
        self.calls = 0
        self.constraints: dict[str, tuple[float, float]] = {}
        for name, pair in constraints.items():
            find_name(name, names)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise SettingError(f"constraint of {name!r} is {pair!r}; expected (mean, standard deviation)")
            mean = require_number(f"mean of the constraint of {name!r}", pair[0])
            self.constraints[name] = (mean, require_number(f"sd of the constraint of {name!r}", pair[1], low=0, open_low=True))
        self._at = [find_name(name, names) for name in self.constraints]
        terms = np.array(list(self.constraints.values())).reshape(-1, 2)
        self._mean, self._sd = terms[:, 0], terms[:, 1]

    def batch(self, theta: Array) -> Array:
        """Values (m,) at theta (m, d)."""
        self.calls += theta.shape[0]
        value = np.asarray(self.log_likelihood(theta))
        value = as_array("log_likelihood(theta (m, d))", value[None] if value.ndim == 0 else value, (theta.shape[0],), finite=False)
        bad = np.isnan(value) | np.isposinf(value)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise NonFiniteError(f"log_likelihood is {value[i]} at {point_words(self.names, theta[i])}; expected a number, or -Inf where "
                                 "theta is impossible")  # fmt: skip
        pull = (theta[:, self._at] - self._mean) / self._sd
        return np.minimum(0.5 * (pull**2).sum(axis=1) - value, IMPOSSIBLE)

    def __call__(self, theta: Array) -> float:
        """Value at one theta (d,)."""
        point = np.asarray(theta, dtype=np.float64)
        if not np.isfinite(point).all():
            raise ConvergenceError(f"the fit did not converge, it diverged to {point.tolist()}; expected a log likelihood with a maximum, "
                                   "or limits")  # fmt: skip
        return float(self.batch(point[None, :])[0])


def minimise(cost: Cost, start: Array, step: Array, limits: Array, fixed: Mask, what: str) -> Any:
    """Minimise over the free parameters and return the Minuit object; start (d,), step (d,) > 0, limits (d, 2).

    Raises: ConvergenceError, naming where it ended and why; NonFiniteError; SbiPhysError (iminuit is not installed).
    """
    try:
        from iminuit import Minuit
    except ImportError as err:
        raise SbiPhysError(f"{what} needs iminuit, which is not installed; expected `pip install iminuit`") from err
    # the gradient of Minuit's transform vanishes at a limit: a fit that starts there would not move
    room = np.minimum(0.1 * step, 0.1 * np.diff(limits, axis=1)[:, 0])
    start = np.where(fixed, start, np.clip(start, limits[:, 0] + room, limits[:, 1] - room))
    if cost(start) >= IMPOSSIBLE:
        raise NonFiniteError(
            f"{what}: log_likelihood is -Inf at the start, {point_words(cost.names, start)}; expected a start that is possible"
        )
    fit: Any = Minuit(cost, start, name=cost.names)
    fit.errordef = Minuit.LIKELIHOOD
    fit.strategy = cost.strategy
    if cost.precision is not None:
        fit.precision = cost.precision
    fit.errors = step
    fit.limits = limits
    fit.fixed = fixed
    if fixed.all():
        return fit
    fit.migrad(ncall=20_000)
    if not fit.valid:
        fit.simplex(ncall=20_000)
        fit.migrad(ncall=20_000)
    if not fit.valid or not np.isfinite(fit.fval) or fit.fval >= IMPOSSIBLE:
        reason = "the number of calls ran out" if fit.fmin.has_reached_call_limit else f"distance to the minimum {fit.fmin.edm:.2g}"
        raise ConvergenceError(
            f"{what} did not converge ({reason}), it ended at {point_words(cost.names, np.array(fit.values))}; expected a start near "
            "the answer, limits, or `precision` (about 1e-6) for a log likelihood in single precision"
        )
    return fit


Limits = Mapping[str, tuple[float | None, float | None]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit(Result):
    r"""Best fit of d parameters, in their own units.

    values (d,); errors (d,), Hesse; covariance (d, d); minos (d, 2), (-, +), NaN where a side was not found, None if not asked for.
    nll, -ln L at the minimum with constraint terms. limits (d, 2), +-inf where there are none. constraints {name: (mean, sd)}.
    at_limit, parameters that ended at a limit; their Hesse errors are not valid.

    >>> from sbi_phys.confidence import fit
    >>> best = fit(lambda theta: -2 * (theta[:, 0] - 3) ** 2, [0.0], ["mu"])  # a Gaussian of width 0.5 around 3
    >>> [round(end, 2) for end in best.interval("mu", 0.683)]
    [2.5, 3.5]
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
        """Pull ((fit - mean) / sd) and width (error / sd) of each constrained parameter.

        Read: a width well below 1 means that the data constrain the parameter more than the external measurement does.
        """
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
        """Profile likelihood of one parameter; see `profile`."""
        return profile(self, name, grid)

    def contour(self, x: str, y: str, *, n_points: int = 25) -> "Contour":
        """Joint profile likelihood of two parameters; see `scans.contour`."""
        return contour(self, x, y, n_points=n_points)

    def impacts(self, name: str) -> "Impacts":
        """Pulls and impacts of all other parameters on `name`; see `impacts`."""
        return impacts(self, name)

    def interval(self, name: str, level: float = 0.9) -> tuple[float, float]:
        """Interval {q(psi) <= chi2_level(1)} of one parameter; see `asymptotic_interval`."""
        return asymptotic_interval(self, name, check_level(level))

    def rows(self) -> Rows:
        """Return the table: one row for each parameter."""
        pulls, none = self.pulls, (np.nan, np.nan)
        sides = {} if self.minos is None else {"minos_down": self.minos[:, 0], "minos_up": self.minos[:, 1]}
        found = {"name": self.names, "value": self.values, "value_err": self.errors} | sides
        found |= {"pull": [pulls.get(n, none)[0] for n in self.names], "pull_err": [pulls.get(n, none)[1] for n in self.names]}
        return Rows.of(found | {"at_limit": [n in self.at_limit for n in self.names]})

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
        log_likelihood: theta (m, d) -> (m,), natural logarithm; exact, or learned by a network.
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

    >>> from sbi_phys.confidence import fit
    >>> best = fit(lambda theta: -2 * ((theta - [1, 2]) ** 2).sum(axis=1), [0, 0], ["a", "b"])
    >>> round(best.value("a"), 2), round(best.error("a"), 2)
    (1.0, 0.5)
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
        raise ConvergenceError("the curvature at the minimum is not positive; expected parameters that the data determine")
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


DEEPER = 0.02  # largest negative q that is attributed to the tolerance of the minimisation


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Profile(Result):
    """Profile likelihood along one parameter: grid (m,), q (m,) >= 0, conditional fit values (m, d); best, its fitted value, and error.

    >>> from sbi_phys.confidence import fit
    >>> best = fit(lambda theta: -2 * ((theta - [1, 2]) ** 2).sum(axis=1), [0, 0], ["a", "b"])
    >>> scan = best.profile("a")
    >>> scan.grid.shape, scan.values.shape
    ((31,), (31, 2))
    """

    name: str
    label: str
    names: tuple[str, ...]
    grid: Array
    q: Array
    values: Array
    best: float
    error: float

    def rows(self) -> Rows:
        """Return the table: one row for each point of the grid, with the conditional fit of all parameters."""
        others = {f"fitted {name}": self.values[:, j] for j, name in enumerate(self.names) if name != self.name}
        return Rows.of({self.name: self.grid, "q": self.q} | others)

    def summary(self) -> str:
        """Return the result in words."""
        ends = f"{self.grid[0]:.4g} to {self.grid[-1]:.4g}, q up to {self.q.max():.3g}"
        return f"profile likelihood of {self.name}: {self.best:.5g} +- {self.error:.3g}, {self.grid.size} points from {ends}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw q over the parabola that follows from the Hesse error.   Read: where they differ, the error is not Gaussian."""
        return figures.confidence.profile(self, ax)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contour(Result):
    """Joint profile likelihood of two parameters: x (m,), y (m,), q (m, m) with the first index along x; best (2,).

    >>> from sbi_phys.confidence import fit
    >>> best = fit(lambda theta: -2 * ((theta - [1, 2]) ** 2).sum(axis=1), [0, 0], ["a", "b"])
    >>> region = best.contour("a", "b", n_points=5).inside(0.9)
    >>> bool(region[2, 2]), bool(region[0, 0])
    (True, False)
    """

    names: tuple[str, str]
    labels: tuple[str, str]
    x: Array
    y: Array
    q: Array
    best: Array

    @staticmethod
    def threshold(level: float) -> float:
        """q at the edge of a joint region of content `level`: chi-square with two degrees of freedom."""
        return float(chdtri(2, 1 - level))

    def inside(self, level: float) -> Mask:
        """Whether each point (m, m) lies in the asymptotic region."""
        return self.q <= self.threshold(level)

    def rows(self) -> Rows:
        """Return the table: one row for each point of the grid."""
        i, j = (index.ravel() for index in np.indices(self.q.shape))
        return Rows.of({self.names[0]: self.x[i], self.names[1]: self.y[j], "q": self.q.ravel()})

    def summary(self) -> str:
        """Return the result in words."""
        x, y = self.names
        inside = ", ".join(f"{100 * level:.4g} %: {int(self.inside(level).sum())}" for level in (0.683, 0.954))
        return (
            f"joint profile likelihood of {x} and {y}: best at {self.best[0]:.5g} and {self.best[1]:.5g}; "
            f"of {self.q.size} points within the region of {inside}"
        )

    def plot(self, ax: "Axes | None" = None, *, levels: tuple[float, ...] = (0.683, 0.954)) -> "Axes":
        """Draw the contours of these contents and the best fit."""
        return figures.confidence.contour(self, ax, levels)


def conditional(fit: Fit, fixed: Mapping[str, float]) -> tuple[float, Array]:
    """Minimum of -ln L with some parameters fixed: (nll, values (d,)).

    Raises: ConvergenceError (also for a deeper minimum than that of `fit`), SettingError (unknown name, outside of its limits).
    """
    at = np.array([find_name(name, fit.names) for name in fixed], dtype=np.intp)
    wanted = np.array([float(v) for v in fixed.values()])
    low, high = fit.limits[at].T
    if (wanted < low).any() or (wanted > high).any():
        i = int(np.flatnonzero((wanted < low) | (wanted > high))[0])
        raise SettingError(
            f"{list(fixed)[i]} = {wanted[i]:g} lies outside of its limits [{low[i]:g}, {high[i]:g}]; expected a value within"
        )
    free = np.setdiff1d(np.arange(len(fit.names)), at)
    values = np.array(fit.values)
    values[at] = wanted
    if free.size == 0:
        return _checked(fit, fit.cost(values), values)
    guess = fit.values[free] + fit.covariance[np.ix_(free, at)] @ np.linalg.solve(fit.covariance[np.ix_(at, at)], wanted - fit.values[at])
    values[free] = np.clip(guess, *fit.limits[free].T)
    if fit.cost(values) >= IMPOSSIBLE:  # the linear prediction may lie outside of the support
        values[free] = fit.values[free]
    mask = np.isin(np.arange(len(fit.names)), at)
    # fixed parameters have no limits here: Minuit's transform would move a value that lies on a limit
    limits = np.where(mask[:, None], [-np.inf, np.inf], fit.limits)
    best = minimise(fit.cost, values, 0.3 * np.maximum(fit.errors, 1e-12), limits, mask, f"the fit at {point_words(tuple(fixed), wanted)}")
    return _checked(fit, float(best.fval), np.array(best.values))


def _checked(fit: Fit, nll: float, values: Array) -> tuple[float, Array]:
    if nll < fit.nll - DEEPER / 2:
        raise ConvergenceError(
            f"there is a deeper minimum at {point_words(fit.names, values)} (-ln L lower by {fit.nll - nll:.3g}); expected a fit that "
            "starts there"
        )
    return nll, values


def profile(fit: Fit, name: str, grid: ArrayLike | None = None) -> Profile:
    r"""Profile likelihood q(psi) of one parameter.

    Args: fit: the global one. name: the parameter. grid: its values (m,), default 31 from -3 to +3 errors, within its limits.
    Returns: Profile.   Raises: ConvergenceError, SettingError, ShapeError, NonFiniteError.

    >>> from sbi_phys.confidence import fit, profile
    >>> best = fit(lambda theta: -2 * ((theta - [1, 2]) ** 2).sum(axis=1), [0, 0], ["a", "b"])
    >>> profile(best, "a", [1.5, 2.0]).q.round(2).tolist()
    [1.0, 4.0]
    """
    i = find_name(name, fit.names)
    if grid is None:
        low, high = np.clip(fit.values[i] + np.array([-3, 3]) * fit.errors[i], *fit.limits[i])
        points = np.linspace(low, high, 31)
    else:
        points = as_array("grid", np.atleast_1d(np.asarray(grid)), (None,))
    found = [conditional(fit, {name: float(v)}) for v in points]
    return Profile(
        name=name,
        label=fit.labels[i],
        names=fit.names,
        grid=frozen(points),
        q=frozen([max(2 * (nll - fit.nll), 0.0) for nll, _ in found]),
        values=frozen([v for _, v in found]),
        best=float(fit.values[i]),
        error=float(fit.errors[i]),
    )


def contour(fit: Fit, x: str, y: str, *, n_points: int = 25) -> Contour:
    r"""Joint profile likelihood of two parameters on n_points x n_points values, +-3.2 errors around the best fit, within limits.

    Raises: ConvergenceError, SettingError (x = y, unknown), NonFiniteError.

    >>> from sbi_phys.confidence import contour, fit
    >>> best = fit(lambda theta: -2 * ((theta - [1, 2]) ** 2).sum(axis=1), [0, 0], ["a", "b"])
    >>> contour(best, "a", "b", n_points=5).q.shape
    (5, 5)
    """
    if x == y:
        raise SettingError(f"x and y are both {x!r}; expected two parameters")
    i, j = find_name(x, fit.names), find_name(y, fit.names)
    m = require_int("n_points", n_points, low=5)
    axes = []
    for k in (i, j):
        low, high = np.clip(fit.values[k] + np.array([-3.2, 3.2]) * fit.errors[k], *fit.limits[k])
        axes.append(np.linspace(low, high, m))
    if len(fit.names) == 2:  # no other parameter to fit: one call suffices
        theta = np.empty((m * m, 2))
        theta[:, i], theta[:, j] = (g.ravel() for g in np.meshgrid(*axes, indexing="ij"))
        nll = fit.cost.batch(theta)
        k = int(nll.argmin())
        _checked(fit, float(nll[k]), theta[k])
        nll = nll.reshape(m, m)
    else:
        nll = np.array([[conditional(fit, {x: float(a), y: float(b)})[0] for b in axes[1]] for a in axes[0]])
    return Contour(
        names=(x, y),
        labels=(fit.labels[i], fit.labels[j]),
        x=frozen(axes[0]),
        y=frozen(axes[1]),
        q=frozen(np.maximum(2 * (nll - fit.nll), 0.0)),
        best=frozen(fit.values[[i, j]]),
    )


def crossing(fit: Fit, name: str, target: float, side: int) -> float:
    """Value above (side +1) or below (-1) the best fit where q = target; the limit if q stays below up to there.

    Raises: ConvergenceError (q stays below over 10^4 errors: the parameter is not bounded by the data).
    """
    i = find_name(name, fit.names)
    best, error = float(fit.values[i]), float(max(fit.errors[i], 1e-12))
    limit = float(fit.limits[i, 1 if side > 0 else 0])

    def beyond(v: float) -> float:
        return 2 * (conditional(fit, {name: v})[0] - fit.nll) - target

    inside, step = best, error * max(np.sqrt(target), 1e-3)
    while True:
        trial = inside + side * step
        if side * (trial - limit) >= 0:
            if beyond(limit) <= 0:
                return limit
            trial = limit
        if beyond(trial) > 0:
            return float(brentq(beyond, inside, trial, xtol=1e-6 * error)) if inside != trial else trial
        if abs(trial - best) > 1e4 * error:
            raise ConvergenceError(f"q of {name} stays below {target:.3g} up to {trial:g}; expected data that bound it, or a limit")
        inside, step = trial, 1.5 * step


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Impacts(Result):
    """Ranking for parameter `name`: names of the k others, largest impact first.

    down, up (k,): shift of psi, in its unit, when nu_k moves by -1 and +1 error. pull, pull_error (k,), NaN where not constrained.
    error of psi, and `statistical`, its error with the constrained parameters fixed.

    >>> from sbi_phys.confidence import fit
    >>> best = fit(lambda t: -0.5 * (t[:, 0] - t[:, 1]) ** 2, [1, 1], ["mu", "nu"], constraints={"nu": (0, 1)})
    >>> ranking = best.impacts("mu")
    >>> round(ranking.error, 2), round(ranking.statistical, 2)
    (1.41, 1.0)
    """

    name: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    down: Array
    up: Array
    pull: Array
    pull_error: Array
    error: float
    statistical: float

    def rows(self) -> Rows:
        """Return the table: one row for each other parameter, the largest impact first."""
        found = {"name": self.names, "down": self.down, "up": self.up, "pull": self.pull, "pull_err": self.pull_error}
        return Rows.of(found)

    def summary(self) -> str:
        """Return the ranking in words."""
        lines = [f"impacts on {self.name}: error {self.error:.4g}, statistical {self.statistical:.4g}"]
        pad = max(map(len, self.names))
        for i, name in enumerate(self.names):
            pull = "" if np.isnan(self.pull[i]) else f"  pull {self.pull[i]:+.2f} +- {self.pull_error[i]:.2f}"
            lines.append(f"  {name:<{pad}}  {self.down[i]:+.3g} {self.up[i]:+.3g}{pull}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw impacts as bars and pulls as points, the largest on top."""
        return figures.confidence.impacts(self, ax)


def impacts(fit: Fit, name: str) -> Impacts:
    """Impact of every other parameter on `name`, by fits with it fixed at its value -+ one Hesse error, within limits.

    Raises: SettingError (unknown, or no other parameter), ConvergenceError.

    >>> from sbi_phys.confidence import fit, impacts
    >>> best = fit(lambda t: -0.5 * (t[:, 0] - t[:, 1]) ** 2, [1, 1], ["mu", "nu"], constraints={"nu": (0, 1)})
    >>> impacts(best, "mu").up.round(2).tolist()
    [1.0]
    """
    at = find_name(name, fit.names)
    others = [i for i in range(len(fit.names)) if i != at]
    if not others:
        raise SettingError(f"{name} is the only parameter; expected others that may have an impact on it")
    shifts = np.zeros((len(others), 2))
    for row, i in enumerate(others):
        for column, sign in enumerate((-1, 1)):
            moved = float(np.clip(fit.values[i] + sign * fit.errors[i], *fit.limits[i]))
            shifts[row, column] = conditional(fit, {fit.names[i]: moved})[1][at] - fit.values[at]
    order = np.argsort(-np.abs(shifts).max(axis=1), kind="stable")
    pulls = [fit.pulls.get(fit.names[others[r]], (np.nan, np.nan)) for r in order]
    return Impacts(
        name=name,
        names=tuple(fit.names[others[r]] for r in order),
        labels=tuple(fit.labels[others[r]] for r in order),
        down=frozen(shifts[order, 0]),
        up=frozen(shifts[order, 1]),
        pull=frozen([p for p, _ in pulls]),
        pull_error=frozen([w for _, w in pulls]),
        error=float(fit.errors[at]),
        statistical=_statistical(fit, at),
    )


def _statistical(fit: Fit, at: int) -> float:
    held = np.array([n in fit.constraints and i != at for i, n in enumerate(fit.names)])
    if not held.any():
        return float(fit.errors[at])
    best = minimise(fit.cost, np.array(fit.values), 0.3 * np.maximum(fit.errors, 1e-12), fit.limits, held, "the fit with nuisances fixed")
    best.hesse()
    return float(best.errors[at])


BANDS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovery(Result):
    """Test of `name` = null against larger values: q0, its significance Z = sqrt(q0) in sd and one-sided p-value.

    >>> from sbi_phys.confidence import discovery, fit
    >>> best = fit(lambda theta: -2 * (theta[:, 0] - 3) ** 2, [0.0], ["mu"])
    >>> print(discovery(best, "mu").summary())
    mu > 0: 6.00 sigma (p = ..., asymptotic)
    """

    name: str
    null: float
    q0: float
    significance: float
    pvalue: float

    def summary(self) -> str:
        """Return the result in words."""
        return f"{self.name} > {self.null:g}: {self.significance:.2f} sigma (p = {self.pvalue:.3g}, asymptotic)"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the distribution of sqrt(q0) under the null hypothesis and the observed value."""
        return figures.results.discovery(self, ax)


def asymptotic_interval(fit: Fit, name: str, level: float = 0.9) -> tuple[float, float]:
    """Profile likelihood interval {q <= chi2_level(1)}; it ends at a limit where q stays below up to there.

    Raises: SettingError, ConvergenceError.   Source: Wilks 1938; arXiv:1007.1727, section 3.

    >>> from sbi_phys.confidence import asymptotic_interval, fit
    >>> best = fit(lambda theta: -2 * (theta[:, 0] - 3) ** 2, [0.0], ["mu"])
    >>> [round(end, 2) for end in asymptotic_interval(best, "mu", 0.9)]
    [2.18, 3.82]
    """
    target = float(chdtri(1, 1 - check_level(level)))
    return crossing(fit, name, target, -1), crossing(fit, name, target, 1)


def asymptotic_limit(fit: Fit, name: str, level: float = 0.9, *, kind: str = "upper") -> float:
    """One-sided limit where q = Phi^-1(level)^2, kind 'upper' or 'lower'; level > 0.5.

    Raises: SettingError, ConvergenceError.   Source: arXiv:1007.1727, section 2.4, equation 68.

    >>> from sbi_phys.confidence import asymptotic_limit, fit
    >>> best = fit(lambda theta: -2 * (theta[:, 0] - 3) ** 2, [0.0], ["mu"])
    >>> round(asymptotic_limit(best, "mu", 0.95, kind="upper"), 2)
    3.82
    """
    if check_level(level) <= 0.5:
        raise SettingError(f"level is {level:g}; expected more than 0.5 for a one-sided limit")
    if kind not in ("upper", "lower"):
        raise SettingError(f"kind is {kind!r}; expected upper or lower")
    return crossing(fit, name, float(ndtri(level)) ** 2, 1 if kind == "upper" else -1)


def discovery(fit: Fit, name: str, null: float = 0.0) -> Discovery:
    """Significance of a signal, Z = sqrt(q_0); 0 where the fit lies below `null`.

    Raises: SettingError, ConvergenceError.   Source: arXiv:1007.1727, equations 12 and 52.

    >>> from sbi_phys.confidence import discovery, fit
    >>> best = fit(lambda theta: -2 * (theta[:, 0] - 3) ** 2, [0.0], ["mu"])
    >>> round(discovery(best, "mu", null=1.0).significance, 2)
    4.0
    """
    above = fit.value(name) > null
    q0 = max(2 * (conditional(fit, {name: null})[0] - fit.nll), 0.0) if above else 0.0
    z = float(np.sqrt(q0))
    return Discovery(name=name, null=float(null), q0=q0, significance=z, pvalue=float(ndtr(-z)))


def cls_value(q: ArrayLike, q_asimov: ArrayLike) -> Array:
    """CLs = p_mu / CL_b of the statistic with mu_hat >= 0 imposed, from q_mu >= 0 of the data and of the Asimov data set (> 0).

    Raises: NonFiniteError, DataError.   Source: arXiv:1007.1727, equations 65 and 66.

    >>> from sbi_phys.confidence import cls_value
    >>> round(float(cls_value(1.0, 1.0)), 3)  # (1 - Phi(1)) / Phi(0)
    0.317
    """
    data, asimov = as_real("q", q), as_real("q_asimov", q_asimov)
    require_finite("q", data)
    require_finite("q_asimov", asimov)
    if (data < 0).any() or (asimov <= 0).any():
        raise DataError(f"q is {data.min():g} and q_asimov {asimov.min():g} at least; expected q >= 0 and q_asimov > 0")
    root, root_a = np.sqrt(data), np.sqrt(asimov)
    small = data <= asimov
    p_mu = np.where(small, ndtr(-root), ndtr(-(data + asimov) / (2 * root_a)))
    cl_b = np.where(small, ndtr(root_a - root), ndtr(-(data - asimov) / (2 * root_a)))
    return np.asarray(p_mu / np.maximum(cl_b, 1e-300))


def cls_limit(fit: Fit, asimov: Fit, name: str, level: float = 0.9) -> tuple[float, Array]:
    """Upper limit where CLs = 1 - level, and the expected ones without signal, (5,) at -2, -1, 0, 1, 2 sd.

    Args: fit: to the data, with 0 as lower limit of `name`. asimov: the same to the expected data without signal.
    Raises: SettingError, ConvergenceError.   Source: arXiv:1007.1727, equation 89 for the bands.

    >>> import numpy as np
    >>> from sbi_phys.confidence import cls_limit, fit
    >>> def counted(n):  # n events over a background of 100
    ...     return fit(lambda t: n * np.log(t[:, 0] + 100) - t[:, 0], [5.0], ["mu"], {"mu": (0, None)}, minos=False)
    >>> observed, expected = cls_limit(counted(110), counted(100), "mu", 0.95)
    >>> bool(observed > expected[2]), expected.shape
    (True, (5,))
    """
    alpha = 1 - check_level(level)

    def excess(mu: float) -> float:
        q = max(2 * (conditional(fit, {name: mu})[0] - fit.nll), 0.0) if fit.value(name) <= mu else 0.0
        q_a = max(2 * (conditional(asimov, {name: mu})[0] - asimov.nll), 1e-12)
        return float(cls_value(q, q_a)) - alpha

    low = max(fit.value(name), asimov.value(name))
    step = max(fit.error(name), asimov.error(name))
    inside, high = low + 1e-3 * step, low + 2 * step
    while excess(high) > 0:
        inside, step = high, 1.5 * step
        high += step
        if step > 1e4 * max(fit.error(name), asimov.error(name)):
            raise ConvergenceError(f"CLs of {name} stays above {alpha:.3g} up to {high:g}; expected data that bound it")
    observed = float(brentq(excess, inside, high, xtol=1e-6 * step)) if excess(inside) > 0 else inside
    return observed, _expected(asimov, name, alpha)


def _expected(asimov: Fit, name: str, alpha: float) -> Array:
    # sigma = mu / sqrt(q_A(mu)) is taken at the limit itself, which is found by iteration
    out = []
    for n in BANDS:
        factor = float(ndtri(1 - alpha * ndtr(n))) + n
        limit = factor * asimov.error(name)
        for _ in range(8):
            q_a = max(2 * (conditional(asimov, {name: limit})[0] - asimov.nll), 1e-12)
            limit = factor * limit / np.sqrt(q_a)
        out.append(limit)
    return np.array(out)
