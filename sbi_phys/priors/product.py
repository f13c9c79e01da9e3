"""Product of independent priors, and priors from their descriptions in files."""

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array
from sbi_phys.core.classes import call_class, find_class, source_hash, spec_of
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Mask
from sbi_phys.priors.base import Prior, standard_normal_log_prob
from sbi_phys.priors.dirichlet import DirichletPrior
from sbi_phys.priors.independent import BoxPrior, LogUniformPrior, NormalPrior
from sbi_phys.priors.parameters import Parameter

__all__ = ["ProductPrior", "prior_from_dict", "require_rebuilt", "same_prior"]


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


def prior_from_dict(description: dict[str, Any], *, allow_import: bool = False) -> Prior:
    """Return the prior that `Prior.to_dict` describes.

    A class of the user's own is found by its name; nothing of it is called before it is known to be a `Prior`.
    Args: allow_import: import the module of such a class; without it the module must have been imported.
    Raises: DataError for any other description, or a class that is not found. A class whose source has changed is warned of.

    >>> import sbi_phys as sp
    >>> prior = sp.BoxPrior([sp.Parameter("gamma", 1, 3)])
    >>> sp.priors.prior_from_dict(prior.to_dict()) == prior
    True
    """
    kinds: dict[str, type[Prior]] = {c.__name__: c for c in _KINDS}
    try:
        kind = description["kind"]
        if kind == "ProductPrior" and "class" not in description:
            return ProductPrior([prior_from_dict(b, allow_import=allow_import) for b in description["blocks"]])
        extra = {k: v for k, v in description.items() if k not in ("kind", "class", "source", "parameters")}
        parameters = [Parameter(**p) for p in description["parameters"]]
        if "class" in description:
            return _own(description, parameters, extra, allow_import)
        return kinds[kind](parameters, **extra)
    except (KeyError, TypeError) as err:
        raise DataError(f"prior description {description!r} is not one of {', '.join([*kinds, 'ProductPrior'])}: {err!r}") from err


def _own(description: dict[str, Any], parameters: list[Parameter], extra: dict[str, Any], allow_import: bool) -> Prior:
    """A prior of the user's own class, Class(parameters, **extra)."""
    kind = find_class(
        "the class of the prior",
        description["class"],
        Prior,  # type: ignore[type-abstract]
        allow_import=allow_import,
        error=DataError,
        otherwise="sp.load(path, prior=...) for a model",
    )
    try:
        prior = call_class("prior", kind, extra, parameters)
    except SettingError as err:
        raise DataError(str(err)) from err
    now = source_hash(kind)
    if description.get("source") and now and description["source"] != now:
        warnings.warn(
            f"the prior's class {spec_of(kind)} has changed since it was saved (source {description['source']}, now {now});"
            " expected the same map and density",
            UserWarning,
            stacklevel=4,
        )
    return prior


def same_prior(where: object, description: dict[str, Any], prior: Prior) -> Prior:
    """Return `prior` if it describes itself as `description` does, apart from the place and source of its class.   Raises: DataError."""
    if not isinstance(prior, Prior):
        raise DataError(f"prior is a {type(prior).__name__}; expected a Prior")
    theirs, ours = ({k: v for k, v in d.items() if k not in ("class", "source")} for d in (description, _plain(prior)))
    if ours != theirs:
        key = next(k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k))
        raise DataError(f"{where} was trained with another prior: {key} is {theirs.get(key)!r}; got {ours.get(key)!r}")
    return prior


def require_rebuilt(prior: Prior) -> None:
    """Refuse a prior of a class of the user's own that no file could hold, or whose map and density do not belong together.

    Compared on 64 points u: the prior rebuilt from `to_dict` has the same map and density; the map and its inverse agree; draws lie in the
    support; the density is the Jacobian's, p(theta) = N(u; 0, I) |du/dtheta|, within 0.05 in its log (median of the points).
    Priors of this package are not looked at.   Raises: SettingError.
    """
    own = _own_class(prior)
    if own is None:
        return
    advice = (
        f"expected a class {own.__name__}(parameters, **settings) at the top of a module, which calls super().__init__(parameters) and"
        " whose to_dict() returns {**super().to_dict(), **settings}, plain values (a file whose class has moved:"
        " sp.load(path, prior=...))"
    )
    try:
        again = prior_from_dict(_plain(prior))
    except (DataError, TypeError, ValueError) as err:
        raise SettingError(f"prior {prior!r} cannot be saved: {err}; {advice}") from err
    u = rng_for(0, "prior").standard_normal((64, prior.free_dim))
    theta = as_array(f"{own.__name__}._from_unbounded(u)", prior._from_unbounded(u), (64, prior.dim))
    if not np.allclose(again._from_unbounded(u), theta, rtol=1e-9, atol=0) or not np.allclose(
        again.log_prob(theta), prior.log_prob(theta), rtol=1e-9, atol=1e-9
    ):
        raise SettingError(f"prior {prior!r} cannot be saved: the one rebuilt from its to_dict() gives other numbers; {advice}")
    _require_map(prior, own.__name__, u, theta)


def _require_map(prior: Prior, name: str, u: Array, theta: Array) -> None:
    inside = prior.contains(theta)
    if not inside.all():
        row = theta[int(np.argmin(inside))].tolist()
        raise SettingError(
            f"prior {name}: {int((~inside).sum())} of 64 draws lie outside its support, as {row}; expected _contains to be True"
        )
    back = as_array(f"{name}._to_unbounded(theta)", prior._to_unbounded(theta), u.shape)
    off = np.abs(back - u).max()
    if off > 1e-4:
        raise SettingError(f"prior {name}: _to_unbounded(_from_unbounded(u)) is off by {off:.3g}; expected u, within 1e-4")
    if prior.free_dim != prior.dim:
        return
    steps = 1e-5 * np.eye(prior.dim)
    slopes = np.stack([(prior._from_unbounded(u + h) - prior._from_unbounded(u - h)) / 2e-5 for h in steps], axis=2)
    expected = standard_normal_log_prob(u) - np.linalg.slogdet(slopes)[1]
    wrong = float(np.median(prior.log_prob(theta) - expected))
    if not abs(wrong) <= 0.05:
        raise SettingError(
            f"prior {name}: log_prob differs by {wrong:.3g} (median of 64 draws) from that of its draws, log N(u; 0, I) + log |du/dtheta|;"
            " expected a normalised log density that belongs to the map"
        )


def _own_class(prior: Prior) -> type[Prior] | None:
    """The first class of a prior, or of its blocks, that is not of this package."""
    if not type(prior).__module__.startswith("sbi_phys."):
        return type(prior)
    return next((found for block in getattr(prior, "blocks", ()) if (found := _own_class(block)) is not None), None)


def _plain(prior: Prior) -> dict[str, Any]:
    """The description as a file gives it back.   Raises: TypeError, ValueError (not JSON)."""
    plain: dict[str, Any] = json.loads(json.dumps(prior.to_dict(), allow_nan=False))
    return plain
