"""Descriptions of the columns of theta and x: named parameters and blocks of observables, with units and labels."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sbi_phys.core.checks import require_choice, require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError

__all__ = ["Observable", "Parameter", "observables_from_dicts", "observables_to_dicts"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A named parameter: range, unit and LaTeX label.

    Args: name, a plain identifier; low < high, in `unit`, infinite where unbounded; unit, '' if dimensionless;
    latex, without dollar signs, the name if empty.   Raises: SettingError.

    >>> import sbi_phys as sp
    >>> sp.Parameter("lg_rcut", 17.8, 20.0, unit="lg V", latex="R_{cut}").label
    '$R_{cut}$ [lg V]'
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    latex: str = ""

    def __post_init__(self) -> None:
        """Check the name and the range."""
        if not self.name or not str(self.name).replace("_", "a").isalnum():
            raise SettingError(f"parameter name is {self.name!r}; expected letters, digits and underscores")
        if not self.low < self.high:
            raise SettingError(f"parameter {self.name} has low={self.low}, high={self.high}; expected low < high")
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    @property
    def label(self) -> str:
        """Axis label: LaTeX and the unit in brackets."""
        symbol = f"${self.latex}$" if self.latex else self.name
        return f"{symbol} [{self.unit}]" if self.unit else symbol


@dataclass(frozen=True, slots=True)
class Observable:
    """A named block of `size` columns of x: shape, unit, LaTeX label, kind and, for histograms, the bin edges.

    Args: size, the number of columns, which is the product of `shape`; either may be left out.
    kind, 'counts' (whole numbers, whose variance is stabilised before they enter a network) or 'real';
    edges (size + 1,), in `edges_unit`, or () where the columns are not bins; shape of an image or a trace, e.g. (16, 16), default
    (size,): x holds the values flattened in the order of C; missing, whether NaN stands for a value that was not measured. A NaN of an
    observable without `missing` is a failed simulation, and so is a row without any value.   Raises: SettingError, ShapeError.

    >>> import sbi_phys as sp
    >>> sp.Observable("spectrum", 2, kind="counts", edges=(18.0, 19.0, 20.0), edges_unit="lg eV").edges
    (18.0, 19.0, 20.0)
    >>> sp.Observable("image", shape=(16, 16), missing=True).size
    256
    """

    name: str
    size: int = 0
    unit: str = ""
    latex: str = ""
    kind: str = "real"
    edges: tuple[float, ...] = ()
    edges_unit: str = ""
    shape: tuple[int, ...] = ()
    missing: bool = False

    def __post_init__(self) -> None:
        """Check size, shape, kind and edges."""
        if self.shape != () and not self.size:
            object.__setattr__(self, "size", math.prod(require_shape(f"shape of observable {self.name}", self.shape)))
        require_int(f"size of observable {self.name}", self.size, low=1)
        object.__setattr__(self, "shape", require_shape(f"shape of observable {self.name}", self.shape or (self.size,)))
        if math.prod(self.shape) != self.size:
            raise ShapeError(f"observable {self.name} has shape {self.shape}, {math.prod(self.shape)} values; expected size = {self.size}")
        if not isinstance(self.missing, bool):
            raise SettingError(f"missing of observable {self.name} is {self.missing!r}; expected True or False")
        require_choice(f"kind of observable {self.name}", self.kind, ("counts", "real"))
        if self.edges and len(self.edges) != self.size + 1:
            raise ShapeError(f"observable {self.name} has {len(self.edges)} edges; expected size + 1 = {self.size + 1}")
        object.__setattr__(self, "edges", tuple(float(e) for e in self.edges))


def require_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple of whole numbers >= 1.   Raises: SettingError."""
    if isinstance(shape, str) or not isinstance(shape, Sequence) or not shape:
        raise SettingError(f"{name} is {shape!r}; expected whole numbers, e.g. (16, 16)")
    return tuple(require_int(name, s, low=1) for s in shape)


def observables_to_dicts(observables: Sequence[Observable]) -> list[dict[str, Any]]:
    """Plain JSON values of observables; infinite edges become the text 'inf', since JSON has no infinity."""
    out = []
    for o in observables:
        plain = asdict(o)
        plain["edges"] = [e if math.isfinite(e) else str(e) for e in o.edges]
        # left out where they say nothing, so that descriptions without them stay equal
        if (shape := plain.pop("shape")) != (o.size,):
            plain["shape"] = list(shape)
        if not plain["missing"]:
            del plain["missing"]
        out.append(plain)
    return out


def observables_from_dicts(dicts: list[dict[str, Any]]) -> tuple[Observable, ...]:
    """Inverse of `observables_to_dicts`.   Raises: DataError."""
    try:
        return tuple(Observable(**{**d, "edges": tuple(float(e) for e in d.get("edges", ()))}) for d in dicts)
    except (TypeError, ValueError, AttributeError) as err:
        raise DataError(f"observables {dicts!r} are not a list of descriptions of Observable: {err}") from err
