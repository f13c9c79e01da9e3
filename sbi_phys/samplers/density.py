"""Log densities as the samplers evaluate them: checked and counted."""

from collections.abc import Callable

import numpy as np

from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.core.types import Array, Mask

__all__ = ["CheckedDensity", "CheckedGradient", "LogDensity", "LogDensityAndGrad", "require_log_density", "require_positive"]

LogDensity = Callable[[Array], Array]
LogDensityAndGrad = Callable[[Array], tuple[Array, Array]]


class CheckedDensity:
    """A log density (m, d) -> (m,), times `power`; checks and counts its values, and names the point in an error."""

    def __init__(self, log_prob: LogDensity, dim: int, *, name: str = "log_prob") -> None:
        """Take a log density of d = dim coordinates, and its name in errors."""
        self.log_prob, self.dim, self.n_evaluations, self.power, self.name = log_prob, dim, 0, 1.0, name

    def __call__(self, u: Array) -> Array:
        """Log density at u (m, d), times the power -> (m,).   Raises: ShapeError, NonFiniteError."""
        values = as_array(f"{self.name}(u)", self.log_prob(u), (u.shape[0],), finite=False)
        require_log_density(self.name, values, u)
        self.n_evaluations += values.size
        return self.power * values


class CheckedGradient:
    """A log density with its gradient, (m, d) -> (m,) and (m, d); checks and counts them, and names the point in an error."""

    def __init__(self, log_prob_and_grad: LogDensityAndGrad, dim: int) -> None:
        """Take the function of d = dim coordinates."""
        self.log_prob_and_grad, self.dim, self.n_evaluations = log_prob_and_grad, dim, 0

    def __call__(self, u: Array) -> tuple[Array, Array]:
        """Log density and gradient at u (m, d); the gradient is 0 where the density is.   Raises: ShapeError, NonFiniteError."""
        found = self.log_prob_and_grad(u)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ShapeError(f"log_prob_and_grad(u) gave a {type(found).__name__}; expected (log_prob (m,), gradient (m, d))")
        values = as_array("log_prob_and_grad(u)[0]", found[0], (u.shape[0],), finite=False)
        gradient = as_array("log_prob_and_grad(u)[1]", found[1], u.shape, finite=False)
        zero = np.isneginf(values)
        bad = np.isnan(values) | np.isposinf(values) | (~np.isfinite(gradient).all(axis=1) & ~zero)
        if bad.any():
            i = int(np.argmax(bad))
            raise NonFiniteError(
                f"log_prob is {values[i]} with gradient {gradient[i].tolist()} at u = {u[i].tolist()};"
                " expected a finite number, or -inf, and a finite gradient"
            )
        self.n_evaluations += values.size
        return values, np.where(zero[:, None], 0.0, gradient)


def require_log_density(name: str, values: Array, u: Array, *, zero: bool = True) -> None:
    """Raise NonFiniteError if values (m,) of a log density at u (m, d) hold NaN or +inf, or -inf unless `zero`."""
    bad: Mask = np.isnan(values) | np.isposinf(values) | (np.isneginf(values) & (not zero))
    if bad.any():
        i = int(np.argmax(bad))
        expected = "a finite number or -inf" if zero else "a finite number at the proposal's own draws"
        raise NonFiniteError(f"{name} is {values[i]} at u = {u[i].tolist()} ({int(bad.sum())} of {bad.size} points); expected {expected}")


def require_positive(values: Array, start: Array, what: str) -> None:
    """Raise DataError if log densities (m,) at the starting places (m, d) of chains hold -inf."""
    if np.isneginf(values).any():
        i = int(np.argmax(np.isneginf(values)))
        raise DataError(f"start has log_prob -inf at {what} {start[i].tolist()}; expected places of positive density, see spread_start")
