"""The inputs that calibration tests share: simulated parameters, posterior draws, names and further quantities, checked in one place."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array, as_real, require_finite
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.priors import Parameter

__all__ = [
    "ALPHA",
    "check_names",
    "check_pairs",
    "check_quantities",
    "combine",
    "count_below",
    "draws_from_arviz",
    "holm",
    "require_varying",
    "verdict_words",
]


ALPHA = 0.05  # level at which results are put in words; the p-values themselves do not depend on it
MIN_ROWS = 10  # below this no test of uniformity has any power


def check_pairs(theta: ArrayLike, draws: ArrayLike) -> tuple[Array, Array]:
    """Return theta (n, d) and draws (n, l, d) as finite float64; theta (n,) with draws (n, l) is one parameter.

    Raises: ShapeError, NonFiniteError, DataError (complex or text dtype, fewer than 10 rows, fewer than 2 draws).
    """
    truth, samples = as_real("theta", theta), as_real("draws", draws)
    if truth.ndim == 1 and samples.ndim == 2:
        truth, samples = truth[:, None], samples[:, :, None]
    if truth.ndim != 2:
        raise ShapeError(f"theta has shape {truth.shape}; expected (n, d), one row per simulation")
    if samples.ndim != 3 or samples.shape[0] != truth.shape[0] or samples.shape[2] != truth.shape[1]:
        raise ShapeError(f"draws has shape {samples.shape}; expected (n, l, d) = ({truth.shape[0]}, l, {truth.shape[1]}) to match theta")
    if truth.shape[1] == 0:
        raise ShapeError(f"theta has shape {truth.shape}; expected at least one parameter")
    if truth.shape[0] < MIN_ROWS:
        raise DataError(f"theta has {truth.shape[0]} rows; expected at least {MIN_ROWS} simulations for a calibration test")
    if samples.shape[1] < 2:
        raise DataError(f"draws has {samples.shape[1]} draws per simulation; expected at least 2 (100 or more to see tails)")
    require_finite("theta", truth)
    require_finite("draws", samples)
    return truth, samples


def check_names(names: Sequence[str | Parameter] | str | Parameter | None, dim: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (names, labels for axes) of `dim` parameters; None gives theta_0, theta_1, ...

    Raises: ShapeError for the wrong number, SettingError for repeated names or something that is no name.
    """
    if names is None:
        return tuple(f"theta_{i}" for i in range(dim)), tuple(rf"$\theta_{{{i}}}$" for i in range(dim))
    if isinstance(names, str | Parameter):
        names = (names,)
    plain = tuple(p.name if isinstance(p, Parameter) else p for p in names)
    labels = tuple(
        f"${p.latex}$" if isinstance(p, Parameter) and p.latex else str(p.name if isinstance(p, Parameter) else p) for p in names
    )
    if any(not isinstance(p, str) for p in plain):
        raise SettingError(f"names is {names!r}; expected text or Parameter for each column of theta")
    if len(plain) != dim:
        raise ShapeError(f"names has {len(plain)} entries {plain}; expected {dim}, one per column of theta")
    if len(set(plain)) < dim:
        raise SettingError(f"names repeat: {plain}; expected distinct names")
    return plain, labels


def check_quantities(quantities: Mapping[str, tuple[ArrayLike, ArrayLike]] | None, n: int, n_draws: int) -> dict[str, tuple[Array, Array]]:
    """Return named quantities as {name: (values (n,), draw values (n, l))}.

    Infinite values keep their rank (a log density may be -inf); NaN is refused.   Raises: ShapeError, NonFiniteError, SettingError.
    """
    checked = {}
    for name, pair in (quantities or {}).items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise SettingError(f"quantity {name!r} is {type(pair).__name__}; expected (values (n,), draw_values (n, l))")
        values = as_array(f"values of quantity {name!r}", pair[0], (n,), finite=False)
        draw_values = as_array(f"draw values of quantity {name!r}", pair[1], (n, n_draws), finite=False)
        if np.isnan(values).any() or np.isnan(draw_values).any():
            raise NonFiniteError(f"quantity {name!r} has NaN; expected numbers (infinite values are ranked)")
        checked[str(name)] = (values, draw_values)
    return checked


def require_varying(name: str, values: Array, draw_values: Array) -> None:
    """Raise DataError if a quantity has one single value in truths and draws alike: there is nothing to rank."""
    if values.min() == values.max() == draw_values.min() == draw_values.max():
        raise DataError(f"parameter {name!r} is constant ({values[0]:g}) in theta and in every draw; expected a varying one, leave it out")


def count_below(values: Array, draw_values: Array, rng: np.random.Generator) -> Integers:
    """Rank of each value among its draws, 0..l: draws below it, and of the draws equal to it a random share.

    Args: values (n,). draw_values (n, l).
    With m ties the rank is uniform on the m + 1 places between, so ranks of a calibrated discrete quantity are uniform too.
    """
    below = (draw_values < values[:, None]).sum(axis=1)
    ties = (draw_values == values[:, None]).sum(axis=1)
    return (below + rng.integers(0, ties + 1)).astype(np.int64)


def holm(pvalues: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: reject where adjusted <= alpha and the family-wise error is at most alpha."""
    adjusted, running = {}, 0.0
    for i, (name, p) in enumerate(sorted(pvalues.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(pvalues) - i) * p))
        adjusted[name] = running
    return {name: adjusted[name] for name in pvalues}


def combine(pvalues: Mapping[str, float]) -> float:
    """One p-value for all: the smallest, times their number (Bonferroni; the same as Holm's smallest), valid under any dependence."""
    return min(1.0, len(pvalues) * min(pvalues.values()))


def verdict_words(shift: float, shift_err: float, width: float, width_err: float) -> str:
    """Put a rejected shape in words from the size of its shift (posterior - truth, in posterior sd) and its width (1 is right).

    Deviations under two standard errors are not named; where neither stands out the shape itself is wrong.
    """
    words = []
    if abs(shift) > 2 * shift_err:
        words.append("biased high" if shift > 0 else "biased low")
    if abs(width - 1) > 2 * width_err:
        words.append("overconfident" if width < 1 else "underconfident")
    return " and ".join(words) or "wrong shape"


def draws_from_arviz(data: Any, names: Sequence[str | Parameter] | None = None) -> Array:
    """Draws (n, l, d) from the posterior group of an ArviZ object (InferenceData or DataTree), chains joined.

    Args: data: with variables of dimensions (chain, draw, s), s running over the simulations. names: variables, in order.
    Raises: ShapeError, SettingError.
    """
    group = data["posterior"]
    wanted = [p.name if isinstance(p, Parameter) else str(p) for p in names] if names is not None else [str(v) for v in group.data_vars]
    missing = [name for name in wanted if name not in group.data_vars]
    if missing:
        raise SettingError(
            f"the posterior group has no variable {missing[0]!r}; expected {wanted}, it has {[str(v) for v in group.data_vars]}"
        )
    columns = []
    for name in wanted:
        variable = group[name]
        others = [d for d in variable.dims if d not in ("chain", "draw")]
        if "draw" not in variable.dims or len(others) != 1:
            raise ShapeError(f"variable {name!r} has dimensions {variable.dims}; expected (chain, draw, one for the simulations)")
        order = [others[0], *(d for d in ("chain", "draw") if d in variable.dims)]
        values = variable.transpose(*order).values
        columns.append(values.reshape(values.shape[0], -1))
    return np.stack(columns, axis=-1).astype(np.float64)
