"""Product of independent priors, and priors from their descriptions in files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import Array, Mask
from sbi_phys.priors.base import Prior
from sbi_phys.priors.dirichlet import DirichletPrior
from sbi_phys.priors.independent import BoxPrior, LogUniformPrior, NormalPrior
from sbi_phys.priors.parameters import Parameter

__all__ = ["ProductPrior", "prior_from_dict"]


# Priors that a description can name; a new prior is added here.
_KINDS = (BoxPrior, LogUniformPrior, NormalPrior, DirichletPrior)


class ProductPrior(Prior):
    """Product of independent priors: theta = (theta_1, theta_2, ...), p = prod_i p_i, u = (u_1, u_2, ...).

    Args: blocks: priors, in the order of their columns.   Raises: SettingError.

    >>> import sbi_phys as sp
    >>> prior = sp.ProductPrior([sp.BoxPrior([sp.Parameter("gamma", 1, 3)]), sp.NormalPrior([sp.Parameter("bias")])])
    >>> prior.names, prior.to_unbounded([[2.0, 1.5]])
    (('gamma', 'bias'), array([[0. , 1.5]]))
    """

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


def prior_from_dict(description: dict[str, Any]) -> Prior:
    """Return the prior that `Prior.to_dict` describes.   Raises: DataError for any other description.

    >>> import sbi_phys as sp
    >>> prior = sp.BoxPrior([sp.Parameter("gamma", 1, 3)])
    >>> sp.priors.prior_from_dict(prior.to_dict()) == prior
    True
    """
    kinds: dict[str, type[Prior]] = {c.__name__: c for c in _KINDS}
    try:
        kind = description["kind"]
        if kind == "ProductPrior":
            return ProductPrior([prior_from_dict(b) for b in description["blocks"]])
        extra = {k: v for k, v in description.items() if k not in ("kind", "parameters")}
        parameters = [Parameter(**p) for p in description["parameters"]]
        return kinds[kind](parameters, **extra)
    except (KeyError, TypeError) as err:
        raise DataError(f"prior description {description!r} is not one of {', '.join([*kinds, 'ProductPrior'])}: {err!r}") from err
