r"""Scans of the profile likelihood, q(psi) = 2 [ln L(theta_hat) - max_nu ln L(psi, nu)], along one parameter and over two.

Each conditional fit begins where the covariance of the global one expects its answer,
nu(psi) = nu_hat + V_{nu psi} V_{psi psi}^-1 (psi - psi_hat), which is exact for a Gaussian likelihood.

Source: arXiv:1007.1727, section 2.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri

from sbi_phys.confidence.inputs import find_name, frozen, point_words
from sbi_phys.confidence.minimise import IMPOSSIBLE, minimise
from sbi_phys.confidence.profile import Fit
from sbi_phys.core.checks import as_array, require_int
from sbi_phys.core.errors import ConvergenceError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.types import Array, ArrayLike, Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Contour", "Profile", "conditional", "contour", "crossing", "profile"]


DEEPER = 0.02  # by this much q may be negative: what minimisation leaves


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Profile:
    """Profile likelihood along one parameter: grid (m,), q (m,) >= 0, conditional fit values (m, d); best, its fitted value, and error."""

    name: str
    label: str
    names: tuple[str, ...]
    grid: Array
    q: Array
    values: Array
    best: float
    error: float

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw q over the parabola that the Hesse error draws.   Read: where they part, the error is not Gaussian."""
        return figures.confidence.profile(self, ax)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contour:
    """Joint profile likelihood of two parameters: x (m,), y (m,), q (m, m) with the first index along x; best (2,)."""

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
    if fit.cost(values) >= IMPOSSIBLE:  # the straight line may lead out of the support
        values[free] = fit.values[free]
    mask = np.isin(np.arange(len(fit.names)), at)
    # a fixed parameter needs no limits, and Minuit's transform of them would move a value that lies on one
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


def contour(fit: Fit, x: str, y: str, *, points: int = 25) -> Contour:
    r"""Joint profile likelihood of two parameters on points x points values, +-3.2 errors around the best fit, within limits.

    Raises: ConvergenceError, SettingError (x = y, unknown), NonFiniteError.
    """
    if x == y:
        raise SettingError(f"x and y are both {x!r}; expected two parameters")
    i, j = find_name(x, fit.names), find_name(y, fit.names)
    m = require_int("points", points, low=5)
    axes = []
    for k in (i, j):
        low, high = np.clip(fit.values[k] + np.array([-3.2, 3.2]) * fit.errors[k], *fit.limits[k])
        axes.append(np.linspace(low, high, m))
    if len(fit.names) == 2:  # nothing to fit: one call
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
