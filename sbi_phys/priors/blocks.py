r"""Two forms of observations: rows x (n, k), as stores and files hold them, and named blocks in their shapes.

    rows      x (n, k), the blocks side by side in the order of the observables, each flattened in the order of C
    blocks    {name: array (n, *shape)}, one entry for each observable

One observation has no first axis: (k,), or {name: array (shape)}. With a single observable, its array needs no name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import as_floating, column_labels, did_you_mean
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.types import AnyArray, Mask
from sbi_phys.priors.parameters import Observable

__all__ = ["column_name", "column_names", "columns", "failed_rows", "fractional", "missing_columns", "to_blocks", "to_rows"]


def columns(observables: Sequence[Observable]) -> dict[str, slice]:
    """Return the columns of x of each observable, by name."""
    ends = np.cumsum([0, *(o.size for o in observables)]).tolist()
    return {o.name: slice(a, b) for o, a, b in zip(observables, ends[:-1], ends[1:], strict=True)}


def column_name(observables: Sequence[Observable], column: int) -> str:
    """Name of a column of x for messages: 'image[3, 4]', or 'mass' for an observable of one value."""
    for o, block in zip(observables, columns(observables).values(), strict=True):
        if column < block.stop:
            index = ", ".join(str(int(i)) for i in np.unravel_index(column - block.start, o.shape))
            return f"{o.name}[{index}]"
    return f"column {column}"


def column_names(observables: Sequence[Observable]) -> tuple[str, ...]:
    """Names (k,) of the columns of x as a table has them: 'mass' for an observable of one value, else 'spectrum[0]', 'spectrum[1]', ..."""
    return tuple(o.name if o.size == 1 else column_name((o,), i) for o in observables for i in range(o.size))


def _as_array(name: str, x: Any, observables: Sequence[Observable]) -> NDArray[np.floating]:
    """Array of x; a table with named columns is read by the names of the observables, 'spectrum_0' and 'spectrum[0]' alike."""
    labels, names = column_labels(x), column_names(observables)
    plain = [n.replace("[", "_").replace("]", "").replace(", ", "_") for n in names]
    return as_floating(name, x, plain if labels and set(labels) == set(plain) else names)


def missing_columns(observables: Sequence[Observable]) -> Mask:
    """Mask (k,) of the columns whose values may be missing, i.e. NaN."""
    return np.concatenate([np.full(o.size, o.missing) for o in observables])


def failed_rows(x: AnyArray, observables: Sequence[Observable]) -> Mask:
    """Mask (n,) of the rows x (n, k) that hold Inf, or NaN in an observable without `missing`, or no value at all."""
    finite = np.isfinite(x)
    if finite.all():
        return np.zeros(len(x), dtype=bool)
    bad = ~(finite | (np.isnan(x) & missing_columns(observables)))
    return np.asarray(bad.any(axis=1) | ~finite.any(axis=1))


def fractional(x: AnyArray, observables: Sequence[Observable]) -> tuple[int, int] | None:
    """Row and column of the first value of x (n, k) that is not whole in an observable of kind 'counts', None if there is none."""
    for o, block in zip(observables, columns(observables).values(), strict=True):
        if o.kind == "counts":
            part = x[:, block]
            bad = (part != np.rint(part)) & np.isfinite(part)
            if bad.any():
                row, column = (int(i) for i in np.argwhere(bad)[0])
                return row, block.start + column
    return None


def to_rows(x: Any, observables: Sequence[Observable], *, name: str = "x") -> tuple[NDArray[np.floating], bool]:
    """Rows (n, k) of observations in any form, and whether x is one observation.

    Args: x: (k,) or (n, k); or, where there is one observable, its array (shape) or (n, *shape); or a dictionary {name: array} with an
    array for each observable, (shape) or (n, *shape). Nothing else is accepted: an array is never read in another shape. name: of x in
    messages.
    Raises: ShapeError, DataError (a block is missing or unknown).

    >>> import numpy as np, sbi_phys as sp
    >>> blocks = [sp.Observable("image", shape=(2, 2)), sp.Observable("time", 1)]
    >>> sp.to_rows({"image": np.ones((5, 2, 2)), "time": np.zeros((5, 1))}, blocks)[0].shape
    (5, 5)
    >>> sp.to_rows([[1.0, 2.0], [3.0, 4.0]], blocks[:1])
    (array([[1., 2., 3., 4.]]), True)
    """
    if not isinstance(x, Mapping):
        return _array(name, x, observables)
    names = [o.name for o in observables]
    for key in x:
        if key not in names:
            raise DataError(f"{name} has a block {key!r}{did_you_mean(key, names)}; expected {', '.join(names)}")
    missing = [n for n in names if n not in x]
    if missing:
        raise DataError(f"{name} has no block {missing[0]!r}; expected {', '.join(names)}")
    parts = [_array(f"{name}[{o.name!r}]", x[o.name], (o,)) for o in observables]
    counts = {o.name: "one observation" if single else f"{len(part)} rows" for o, (part, single) in zip(observables, parts, strict=True)}
    if len({(len(part), single) for part, single in parts}) > 1:
        raise ShapeError(f"blocks of {name} have {counts}; expected the same number of observations in each")
    return np.concatenate([part for part, _ in parts], axis=1), parts[0][1]


def _array(name: str, x: Any, observables: Sequence[Observable]) -> tuple[NDArray[np.floating], bool]:
    """Rows of an array (k,), (n, k), or of one observable (shape), (n, *shape)."""
    array = _as_array(name, x, observables)
    k = sum(o.size for o in observables)
    if array.shape == (k,):
        return array[None], True
    if array.ndim == 2 and array.shape[1] == k:
        return array, False
    shape = observables[0].shape if len(observables) == 1 else (k,)
    if array.shape == shape:
        return array.reshape(1, k), True
    if array.ndim == len(shape) + 1 and array.shape[1:] == shape:
        return array.reshape(len(array), k), False
    forms = [f"({k},) for one observation", f"(n, {k}) for several"]
    if len(shape) > 1:
        forms += [f"{shape}", f"(n, {', '.join(map(str, shape))})"]
    blocks = ", ".join(f"{o.name}: {o.shape if len(o.shape) > 1 else o.size}" for o in observables)
    hint = ", or a dictionary of blocks" if len(observables) > 1 else ""
    raise ShapeError(f"{name} has shape {array.shape}; expected {', '.join(forms)}{hint}; the observables are {blocks}")


def to_blocks(x: Any, observables: Sequence[Observable]) -> dict[str, Any]:
    """Blocks {name: (n, *shape)} of rows x (n, k), or {name: (shape)} of one observation (k,); of a torch tensor, tensors.

    Raises: ShapeError.

    >>> import numpy as np, sbi_phys as sp
    >>> blocks = [sp.Observable("image", shape=(2, 2)), sp.Observable("time", 1)]
    >>> {name: block.shape for name, block in sp.to_blocks(np.zeros((3, 5)), blocks).items()}
    {'image': (3, 2, 2), 'time': (3, 1)}
    """
    k = sum(o.size for o in observables)
    if hasattr(x, "detach"):
        rows: Any = x
        if rows.ndim not in (1, 2) or rows.shape[-1] != k:
            raise ShapeError(f"x has shape {tuple(rows.shape)}; expected ({k},) or (n, {k})")
    else:
        rows, single = to_rows(x, observables)
        rows = rows[0] if single else rows
    cuts = columns(observables)
    return {o.name: rows[..., cuts[o.name]].reshape(*rows.shape[:-1], *o.shape) for o in observables}
