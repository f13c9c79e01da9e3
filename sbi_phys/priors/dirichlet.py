"""Dirichlet prior of fractions that sum to 1, mapped to a standard normal by stick breaking."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import betainc, betaincinv, gammaln, log_ndtr, ndtr, ndtri

from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import SettingError
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.priors.base import Prior
from sbi_phys.priors.parameters import Parameter

__all__ = ["DirichletPrior"]

_TINY = 2.3e-308  # fractions below the normal numbers of float64 are this number, so that densities stay finite


class DirichletPrior(Prior):
    r"""Dirichlet on the simplex f_k >= 0, sum f_k = 1, by stick breaking.

    v_k = f_k / (1 - sum_{j<k} f_j) ~ Beta(a_k, sum_{j>k} a_j) independently; u_k = Phi^-1(F_Beta(v_k)), k < K.
    The density is per unit volume of the first K - 1 columns, as in scipy.stats.dirichlet.

    Args: concentration: number or (K,), > 0; default 1, uniform on the simplex.   Raises: SettingError, ShapeError.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> prior = sp.DirichletPrior([sp.Parameter("f_p"), sp.Parameter("f_he"), sp.Parameter("f_fe")])
    >>> theta = prior.sample(100, np.random.default_rng(0))
    >>> theta.shape, prior.free_dim, bool(np.allclose(theta.sum(axis=1), 1))
    ((100, 3), 2, True)
    """

    def __init__(self, parameters: Sequence[Parameter], concentration: ArrayLike = 1.0) -> None:
        super().__init__([Parameter(p.name, 0.0, 1.0, p.unit, p.latex) for p in parameters])
        if self.dim < 2:
            raise SettingError(f"DirichletPrior has {self.dim} parameter; expected at least 2")
        full = np.broadcast_to(concentration, (self.dim,)) if np.ndim(concentration) == 0 else concentration
        self.concentration = as_array("concentration", full, (self.dim,))
        if (self.concentration <= 0).any():
            raise SettingError(f"DirichletPrior has concentration={self.concentration.tolist()}; expected values > 0")
        self._a = self.concentration[:-1]
        self._b = np.cumsum(self.concentration[::-1])[::-1][1:]

    @property
    def free_dim(self) -> int:
        """K - 1."""
        return self.dim - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain description, with the concentration."""
        return {**super().to_dict(), "concentration": self.concentration.tolist()}

    def _explain(self, row: Array) -> str:
        return (
            f"{', '.join(self.names)} = {np.round(row, 6).tolist()} sums to {row.sum():.6g}, expected values >= 0 that sum to 1 within 1e-6"
        )

    def _contains(self, theta: Array) -> Mask:
        return np.all(theta >= 0, axis=1) & (np.abs(theta.sum(axis=1) - 1) < 1e-6)

    def _log_prob(self, theta: Array) -> Array:
        norm = gammaln(self.concentration.sum()) - gammaln(self.concentration).sum()
        with np.errstate(divide="ignore"):
            logs = np.log(np.where(self.concentration == 1, 1.0, np.maximum(theta, _TINY)))
            terms = np.where(self.concentration == 1, 0.0, (self.concentration - 1) * logs)
        return norm + terms.sum(axis=1)

    def _to_unbounded(self, theta: Array) -> Array:
        # the remaining stick, summed from the last fraction: no cancellation where the first fractions are nearly 1
        left = np.cumsum(theta[:, ::-1], axis=1)[:, ::-1]
        stick = np.where(left[:, :-1] > 0, left[:, :-1], 1.0)
        v, rest = theta[:, :-1] / stick, left[:, 1:] / stick
        out = np.empty_like(v)
        for k, (a, b) in enumerate(zip(self._a, self._b, strict=True)):
            out[:, k] = _beta_to_normal(v[:, k], rest[:, k], a, b)
        # where no stick remains, every value describes the same point; the median keeps the map finite
        return np.where(left[:, :-1] > 0, out, 0.0)

    def _from_unbounded(self, u: Array) -> Array:
        theta = np.empty((u.shape[0], self.dim))
        left = np.ones(u.shape[0])
        for k, (a, b) in enumerate(zip(self._a, self._b, strict=True)):
            v, rest = _normal_to_beta(u[:, k], a, b)
            theta[:, k] = left * v
            left = left * rest
        theta[:, -1] = left
        return np.maximum(theta, _TINY)


def _beta_to_normal(v: Array, rest: Array, a: float, b: float) -> Array:
    """Phi^-1(F_Beta(a,b)(v)) with rest = 1 - v; each tail is computed from its own small number, which keeps its digits."""
    if a == 1.0:
        with np.errstate(divide="ignore"):  # v = 1 gives log 0 = -inf and lower = 1, which is correct
            lower, upper = -np.expm1(b * np.log1p(-np.minimum(v, 1.0))), rest**b
    else:
        # a value below the smallest number of float64 is kept as that number: it stands for all smaller ones, and for their median
        low, high = betainc(a, b, np.maximum(v, _TINY)), betainc(b, a, np.maximum(rest, _TINY))
        low, high = np.where(v <= _TINY, 0.5 * low, low), np.where(rest <= _TINY, 0.5 * high, high)
        small = v < rest
        lower, upper = np.where(small, low, 1 - high), np.where(small, 1 - low, high)
    return np.where(lower < 0.5, ndtri(lower), -ndtri(upper))


def _normal_to_beta(u: Array, a: float, b: float) -> tuple[Array, Array]:
    """Inverse of `_beta_to_normal` -> (v, 1 - v)."""
    if a == 1.0:
        log_rest = log_ndtr(-u) / b
        return -np.expm1(log_rest), np.exp(log_rest)
    # both from their own small number: for small a and b nearly all of v or of 1 - v lies below any rounding error
    v, rest = betaincinv(a, b, ndtr(u)), betaincinv(b, a, ndtr(-u))
    return np.where(v < rest, v, 1 - rest), np.where(v < rest, 1 - v, rest)
