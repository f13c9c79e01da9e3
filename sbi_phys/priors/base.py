r"""The prior interface: every prior maps its parameters to a standard normal distribution.

`to_unbounded` is the Rosenblatt transform u_k = Phi^-1(F_k(theta_k | theta_<k)): theta ~ prior becomes u ~ N(0, I) exactly. Therefore

- the Jacobian follows from the density: |du/dtheta| = p(theta) / N(u; 0, I), hence
  log q(theta) = log q(u) + log p(theta) - log N(u; 0, I);
- a network that learns in u starts at the prior, and its targets need no scaling;
- a posterior at the edge of a box has a Gaussian tail in u, as a flow with a normal base has
  (a logit would give an exponential tail, which such a flow cannot represent).

This folder needs numpy and scipy only: simulators and worker processes import it without torch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_matrix, require_int
from sbi_phys.core.classes import source_hash, spec_of
from sbi_phys.core.errors import SettingError, SupportError
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.priors.parameters import Parameter

__all__ = ["Prior", "standard_normal_log_prob"]


# Phi(u) still differs from 0 and 1 in float64 within +-8.2: a parameter exactly on an edge of its range maps there, not to infinity.
_U_MAX = 8.2
# The largest of some ten thousand draws: networks are not trained on the outermost 3e-5 of a bounded parameter's range.
_U_SEEN = 4.0


class Prior(ABC):
    """A prior over `dim` named parameters with `free_dim` degrees of freedom and a map to the standard normal N(0, I).

    theta has shape (n, dim), in the parameters' units; u has shape (n, free_dim), without unit. A subclass defines the four
    abstract methods; the public methods check their arguments.

    >>> import sbi_phys as sp
    >>> prior = sp.BoxPrior([sp.Parameter("gamma", -3, 2.5), sp.Parameter("lg_rcut", 17.8, 20, unit="lg V")])
    >>> prior.names, prior.log_prob([[0.0, 19.0], [0.0, 25.0]]).round(3)
    (('gamma', 'lg_rcut'), array([-2.493,   -inf]))
    >>> prior.from_unbounded([[0.0, 0.0]]).round(6)  # the centre of the box
    array([[-0.25, 18.9 ]])
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
        """`to_unbounded` with bounded parameters clipped to +-4, (n, free_dim): for theta on an edge, a network answers for just inside."""
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
        """Plain description from which `prior_from_dict` builds the same prior; of a class of your own with its place and a source hash.

        A subclass with further arguments adds them: {**super().to_dict(), "rho": self.rho} is rebuilt as Class(parameters, rho=rho).
        """
        kind = type(self)
        own = {} if kind.__module__.startswith("sbi_phys.") else {"class": spec_of(kind), "source": source_hash(kind)}
        return {"kind": kind.__name__, **own, "parameters": [_parameter_to_dict(p) for p in self.parameters]}

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


def standard_normal_log_prob(u: ArrayLike) -> Array:
    """Return log N(u; 0, I) of u (n, d) -> (n,).

    >>> import sbi_phys as sp
    >>> sp.priors.standard_normal_log_prob([[0.0, 0.0]]).round(4)
    array([-1.8379])
    """
    u = np.asarray(u, dtype=np.float64)
    return -0.5 * np.einsum("...k,...k->...", u, u) - 0.5 * u.shape[-1] * math.log(2 * math.pi)


def _parameter_to_dict(p: Parameter) -> dict[str, Any]:
    # JSON has no infinity: unbounded ends are left out
    return {k: v for k, v in asdict(p).items() if not (isinstance(v, float) and math.isinf(v))}
