"""Minus the log likelihood as iminuit wants it, with constraint terms, and minimisation that either converges or says so."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sbi_phys.confidence.inputs import find_name, point_words
from sbi_phys.core.checks import as_array, require_number
from sbi_phys.core.errors import ConvergenceError, NonFiniteError, SbiPhysError, SettingError
from sbi_phys.core.types import Array, ArrayLike, Mask

__all__ = ["Cost", "LogLikelihood", "minimise"]

LogLikelihood = Callable[[Array], ArrayLike]

IMPOSSIBLE = 1e30  # stands for +Inf, which Minuit cannot compare


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
            raise ConvergenceError(f"the fit did not converge, it ran away to {point.tolist()}; expected a log likelihood with a maximum, "
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
    # at a limit Minuit's transform has no slope, and the fit would stay there
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
