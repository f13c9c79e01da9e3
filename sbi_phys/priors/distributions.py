r"""Parameters, observables and priors, each prior with its map to an unbounded space.

Every prior whitens itself: `to_unbounded` is the Rosenblatt transform u_k = Phi^-1(F_k(theta_k | theta_<k)), so that
theta ~ prior becomes u ~ N(0, I) *exactly*, whatever the prior. Three things follow:

- the Jacobian needs no code of its own: |du/dtheta| = p(theta) / N(u; 0, I), hence
  log q(theta) = log q(u) + log p(theta) - log N(u; 0, I);
- a network that learns in u starts at the prior and needs no scaling of its targets;
- a posterior that piles up on an edge of a box has a Gaussian tail in u, which is a flow's own tail
  (with a logit it would be exponential, which a flow with a normal base can not follow).

This module needs numpy and scipy alone: simulators and worker processes import it without torch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.special import betainc, betaincc, betaincinv, gammaln, log_ndtr, ndtr, ndtri

from sbi_phys.core.checks import as_array, as_matrix, require_int
from sbi_phys.core.errors import DataError, SettingError, SupportError
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.priors.parameters import Observable, Parameter

__all__ = [
    "BoxPrior",
    "DirichletPrior",
    "LogUniformPrior",
    "NormalPrior",
    "Observable",
    "Parameter",
    "Prior",
    "ProductPrior",
    "prior_from_dict",
    "standard_normal_log_prob",
]


# The unbounded coordinate is held within +-8.2, where Phi(u) is still distinct from 0 and 1 in float64:
# a parameter handed in exactly on an edge of its box maps there instead of to infinity.
_U_MAX = 8.2
_U_SEEN = 4.0  # the largest of some ten thousand draws: no network has seen more of a bounded parameter's ends, 3e-5 of its range


class Prior(ABC):
    """A prior over `dim` named parameters with `free_dim` degrees of freedom and a whitening map to R^free_dim.

    theta always has shape (n, dim) in the parameters' units; u has shape (n, free_dim), no unit. A subclass gives
    the four methods that are abstract here; checks of what a user passes are made once, in the public methods.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = tuple(parameters)
        if not self.parameters:
            raise SettingError(f"{type(self).__name__} got no parameters; expected at least one Parameter")
        for p in self.parameters:
            if not isinstance(p, Parameter):
                raise SettingError(f"{type(self).__name__} got a {type(p).__name__}; expected Parameter(name, low, high, ...)")
        if len(set(self.names)) < self.dim:
            raise SettingError(f"parameter names repeat: {self.names}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of theta."""
        return tuple(p.name for p in self.parameters)

    @property
    def dim(self) -> int:
        """Number of columns of theta."""
        return len(self.parameters)

    @property
    def free_dim(self) -> int:
        """Degrees of freedom, the number of columns of u (a simplex has one fewer than it has columns)."""
        return self.dim

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw theta (n, dim) from the prior.   Raises: SettingError."""
        n = require_int("n", n, low=0)
        if not isinstance(rng, np.random.Generator):
            raise SettingError(f"rng is {rng!r}; expected a numpy Generator, e.g. sbi_phys.core.rng.rng_for(seed)")
        return self._from_unbounded(rng.standard_normal((n, self.free_dim)))

    def contains(self, theta: ArrayLike) -> Mask:
        """Whether each row of theta (n, dim) lies in the support, edges included -> (n,) bool."""
        return self._contains(as_matrix("theta", theta, self.dim, self.names))

    def log_prob(self, theta: ArrayLike) -> Array:
        """Log density of theta (n, dim) -> (n,), -inf outside the support. A simplex: density in its first K-1 columns."""
        theta = as_matrix("theta", theta, self.dim, self.names)
        inside = self._contains(theta)
        out = np.full(theta.shape[0], -np.inf)
        out[inside] = self._log_prob(theta[inside])
        return out

    def to_unbounded(self, theta: ArrayLike) -> Array:
        """Whitening map theta (n, dim) -> u (n, free_dim); prior draws become N(0, I).   Raises: SupportError."""
        theta = as_matrix("theta", theta, self.dim, self.names)
        self.require_contains(theta)
        return np.clip(self._to_unbounded(theta), -_U_MAX, _U_MAX)

    def to_network(self, theta: ArrayLike) -> Array:
        """`to_unbounded` with bounded parameters held within +-4, (n, free_dim): asked on an edge, a network answers for just inside."""
        u = self.to_unbounded(theta)
        return np.where(self._bounded(), np.clip(u, -_U_SEEN, _U_SEEN), u)

    def _bounded(self) -> Mask:
        return np.array([math.isfinite(p.low) and math.isfinite(p.high) for p in self.parameters[: self.free_dim]])

    def from_unbounded(self, u: ArrayLike) -> Array:
        """Inverse map u (n, free_dim) -> theta (n, dim), always inside the support."""
        return self._from_unbounded(as_matrix("u", u, self.free_dim))

    def require_contains(self, theta: Array) -> None:
        """Raise SupportError naming the first row and parameter outside the support."""
        inside = self._contains(theta)
        if inside.all():
            return
        row = int(np.flatnonzero(~inside)[0])
        raise SupportError(
            f"theta has {int((~inside).sum())} of {inside.size} rows outside the prior; the first is row {row}: {self._explain(theta[row])}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain description from which `prior_from_dict` builds the same prior."""
        return {"kind": type(self).__name__, "parameters": [_parameter_to_dict(p) for p in self.parameters]}

    def __eq__(self, other: object) -> bool:
        """Equal description, equal prior."""
        return isinstance(other, Prior) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        """Hash of the names: equal priors have equal names."""
        return hash((type(self).__name__, self.names))

    def __repr__(self) -> str:
        """Class and parameter names."""
        return f"{type(self).__name__}({', '.join(self.names)})"

    def _explain(self, row: Array) -> str:
        for value, p in zip(row, self.parameters, strict=True):
            if not p.low <= value <= p.high:
                return f"{p.name} = {value:g}{' ' + p.unit if p.unit else ''}, expected within [{p.low:g}, {p.high:g}]"
        return f"{dict(zip(self.names, row.tolist(), strict=True))}"

    @abstractmethod
    def _contains(self, theta: Array) -> Mask: ...

    @abstractmethod
    def _log_prob(self, theta: Array) -> Array: ...

    @abstractmethod
    def _to_unbounded(self, theta: Array) -> Array: ...

    @abstractmethod
    def _from_unbounded(self, u: Array) -> Array: ...


class BoxPrior(Prior):
    """Uniform on a box: p(theta) = prod_k 1 / (high_k - low_k);   u = Phi^-1((theta - low) / (high - low))."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(parameters)
        self._low = np.array([p.low for p in self.parameters])
        self._high = np.array([p.high for p in self.parameters])
        for p in self.parameters:
            if not (math.isfinite(p.low) and math.isfinite(p.high)):
                raise SettingError(f"{type(self).__name__} parameter {p.name} has range [{p.low}, {p.high}]; expected finite bounds")

    def _contains(self, theta: Array) -> Mask:
        return np.all((theta >= self._low) & (theta <= self._high), axis=1)

    def _log_prob(self, theta: Array) -> Array:
        return np.full(theta.shape[0], -np.log(self._high - self._low).sum())

    def _to_unbounded(self, theta: Array) -> Array:
        return ndtri((theta - self._low) / (self._high - self._low))

    def _from_unbounded(self, u: Array) -> Array:
        return np.clip(self._low + (self._high - self._low) * ndtr(u), self._low, self._high)


class LogUniformPrior(BoxPrior):
    """Uniform in ln theta on [low, high], low > 0:   p(theta) = prod_k 1 / (theta_k ln(high_k / low_k))."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(parameters)
        for p in self.parameters:
            if p.low <= 0:
                raise SettingError(f"LogUniformPrior parameter {p.name} has low={p.low}; expected low > 0")
        self._width = np.log(self._high / self._low)

    def _log_prob(self, theta: Array) -> Array:
        return -np.log(theta).sum(axis=1) - np.log(self._width).sum()

    def _to_unbounded(self, theta: Array) -> Array:
        return ndtri(np.log(theta / self._low) / self._width)

    def _from_unbounded(self, u: Array) -> Array:
        return np.clip(self._low * np.exp(self._width * ndtr(u)), self._low, self._high)


class NormalPrior(Prior):
    """Independent normals N(mean_k, sd_k^2);   u = (theta - mean) / sd. The parameters must be unbounded.

    Args: mean, sd: numbers or (dim,), in the parameters' units; default 0 and 1.
    """

    def __init__(self, parameters: Sequence[Parameter], mean: ArrayLike = 0.0, sd: ArrayLike = 1.0) -> None:
        super().__init__(parameters)
        self.mean = as_array("mean", np.broadcast_to(mean, (self.dim,)) if np.ndim(mean) == 0 else mean, (self.dim,))
        self.sd = as_array("sd", np.broadcast_to(sd, (self.dim,)) if np.ndim(sd) == 0 else sd, (self.dim,))
        if (self.sd <= 0).any():
            raise SettingError(f"NormalPrior has sd={self.sd.tolist()}; expected sd > 0")
        for p in self.parameters:
            if math.isfinite(p.low) or math.isfinite(p.high):
                raise SettingError(
                    f"NormalPrior parameter {p.name} has bounds [{p.low}, {p.high}]; expected none (use BoxPrior for a bounded range)"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain description, with mean and sd."""
        return {**super().to_dict(), "mean": self.mean.tolist(), "sd": self.sd.tolist()}

    def _contains(self, theta: Array) -> Mask:
        return np.ones(theta.shape[0], dtype=bool)

    def _log_prob(self, theta: Array) -> Array:
        return standard_normal_log_prob((theta - self.mean) / self.sd) - np.log(self.sd).sum()

    def _to_unbounded(self, theta: Array) -> Array:
        return (theta - self.mean) / self.sd

    def _from_unbounded(self, u: Array) -> Array:
        return self.mean + self.sd * u


class DirichletPrior(Prior):
    r"""Dirichlet on the simplex f_k >= 0, sum f_k = 1, by stick breaking.

    v_k = f_k / (1 - sum_{j<k} f_j) ~ Beta(a_k, sum_{j>k} a_j) independently; u_k = Phi^-1(F_Beta(v_k)), k < K.
    The density is per unit volume of the first K - 1 columns, as in scipy.stats.dirichlet.

    Args: concentration: number or (K,), > 0; default 1, uniform on the simplex.
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
            terms = np.where(self.concentration == 1, 0.0, (self.concentration - 1) * np.log(np.where(self.concentration == 1, 1.0, theta)))
        return norm + terms.sum(axis=1)

    def _to_unbounded(self, theta: Array) -> Array:
        # the stick that is left, summed from the far end: no cancellation where the first fractions take nearly all
        left = np.cumsum(theta[:, ::-1], axis=1)[:, ::-1]
        stick = np.where(left[:, :-1] > 0, left[:, :-1], 1.0)
        v, rest = theta[:, :-1] / stick, left[:, 1:] / stick
        out = np.empty_like(v)
        for k, (a, b) in enumerate(zip(self._a, self._b, strict=True)):
            out[:, k] = _beta_to_normal(v[:, k], rest[:, k], a, b)
        # where nothing is left to break, any value describes the same point; the median keeps the map finite
        return np.where(left[:, :-1] > 0, out, 0.0)

    def _from_unbounded(self, u: Array) -> Array:
        theta = np.empty((u.shape[0], self.dim))
        left = np.ones(u.shape[0])
        for k, (a, b) in enumerate(zip(self._a, self._b, strict=True)):
            v, rest = _normal_to_beta(u[:, k], a, b)
            theta[:, k] = left * v
            left = left * rest
        theta[:, -1] = left
        return theta


class ProductPrior(Prior):
    """Independent blocks side by side: theta = (theta_1, theta_2, ...), p = prod p_i, u = (u_1, u_2, ...)."""

    def __init__(self, blocks: Sequence[Prior]) -> None:
        self.blocks = tuple(blocks)
        for block in self.blocks:
            if not isinstance(block, Prior):
                raise SettingError(f"ProductPrior got a {type(block).__name__}; expected priors")
        super().__init__([p for block in self.blocks for p in block.parameters])
        self._theta_cuts = np.cumsum([b.dim for b in self.blocks])[:-1].tolist()
        self._u_cuts = np.cumsum([b.free_dim for b in self.blocks])[:-1].tolist()

    @property
    def free_dim(self) -> int:
        """Sum over the blocks."""
        return sum(b.free_dim for b in self.blocks)

    def _bounded(self) -> Mask:
        return np.concatenate([b._bounded() for b in self.blocks])

    def to_dict(self) -> dict[str, Any]:
        """Plain description of every block."""
        return {"kind": "ProductPrior", "blocks": [b.to_dict() for b in self.blocks]}

    def _split(self, theta: Array) -> list[tuple[Prior, Array]]:
        return list(zip(self.blocks, np.split(theta, self._theta_cuts, axis=1), strict=True))

    def _explain(self, row: Array) -> str:
        return next(b._explain(part[0]) for b, part in self._split(row[None]) if not b._contains(part)[0])

    def _contains(self, theta: Array) -> Mask:
        return np.logical_and.reduce([b._contains(part) for b, part in self._split(theta)])

    def _log_prob(self, theta: Array) -> Array:
        return np.add.reduce([b._log_prob(part) for b, part in self._split(theta)])

    def _to_unbounded(self, theta: Array) -> Array:
        return np.concatenate([b._to_unbounded(part) for b, part in self._split(theta)], axis=1)

    def _from_unbounded(self, u: Array) -> Array:
        return np.concatenate([b._from_unbounded(p) for b, p in zip(self.blocks, np.split(u, self._u_cuts, axis=1), strict=True)], axis=1)


def standard_normal_log_prob(u: ArrayLike) -> Array:
    """log N(u; 0, I) of u (n, d) -> (n,)."""
    u = np.asarray(u, dtype=np.float64)
    return -0.5 * np.einsum("...k,...k->...", u, u) - 0.5 * u.shape[-1] * math.log(2 * math.pi)


def prior_from_dict(description: dict[str, Any]) -> Prior:
    """Build the prior that `Prior.to_dict` described.   Raises: DataError for anything else."""
    kinds: dict[str, type[Prior]] = {c.__name__: c for c in (BoxPrior, LogUniformPrior, NormalPrior, DirichletPrior)}
    try:
        kind = description["kind"]
        if kind == "ProductPrior":
            return ProductPrior([prior_from_dict(b) for b in description["blocks"]])
        extra = {k: v for k, v in description.items() if k not in ("kind", "parameters")}
        parameters = [_parameter_from_dict(p) for p in description["parameters"]]
        return kinds[kind](parameters, **extra)
    except (KeyError, TypeError) as err:
        raise DataError(f"prior description {description!r} is not one of {', '.join([*kinds, 'ProductPrior'])}: {err!r}") from err


def _parameter_to_dict(p: Parameter) -> dict[str, Any]:
    # JSON has no infinity: unbounded ends are left out
    return {k: v for k, v in asdict(p).items() if not (isinstance(v, float) and math.isinf(v))}


def _parameter_from_dict(description: dict[str, Any]) -> Parameter:
    return Parameter(**description)


def _beta_to_normal(v: Array, rest: Array, a: float, b: float) -> Array:
    """Phi^-1(F_Beta(a,b)(v)) with rest = 1 - v; each tail through its own small number, so that neither is lost."""
    if a == 1.0:
        with np.errstate(divide="ignore"):  # v = 1 gives log 0 = -inf and lower = 1, as it should
            lower, upper = -np.expm1(b * np.log1p(-np.minimum(v, 1.0))), rest**b
    else:
        lower, upper = betainc(a, b, v), betaincc(a, b, v)
    return np.where(lower < 0.5, ndtri(lower), -ndtri(upper))


def _normal_to_beta(u: Array, a: float, b: float) -> tuple[Array, Array]:
    """Inverse of `_beta_to_normal` -> (v, 1 - v)."""
    if a == 1.0:
        log_rest = log_ndtr(-u) / b
        return -np.expm1(log_rest), np.exp(log_rest)
    # each tail through its own small number here too: 1 - v ~ Beta(b, a) at the upper end
    v_low, rest_high = betaincinv(a, b, ndtr(np.minimum(u, 0))), betaincinv(b, a, ndtr(-np.maximum(u, 0)))
    v = np.where(u < 0, v_low, 1 - rest_high)
    return v, np.where(u < 0, 1 - v_low, rest_high)
