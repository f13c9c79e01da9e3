"""The inputs that calibration tests share: simulated parameters, posterior draws, names and further quantities, checked in one place."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array, as_real, require_finite
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.priors import Parameter

__all__ = [
    "check_log_probs",
    "check_names",
    "check_pairs",
    "check_quantities",
    "count_below",
    "draws_from_arviz",
    "require_varying",
    "wrong_order",
]


MIN_ROWS = 10  # with fewer, no test of uniformity has power


def check_pairs(theta: ArrayLike, draws: ArrayLike) -> tuple[Array, Array]:
    """Return theta (n, d) and draws (n, l, d) as finite float64; theta (n,) with draws (n, l) means one parameter.

    Raises: ShapeError, NonFiniteError, DataError (complex or text dtype, fewer than 10 rows, fewer than 2 draws).
    """
    truth, samples = as_real("theta", theta), as_real("draws", draws)
    if truth.ndim == 1 and samples.ndim == 2:
        truth, samples = truth[:, None], samples[:, :, None]
    if truth.ndim != 2:
        raise ShapeError(f"theta has shape {truth.shape}; expected (n, d), one row per simulation")
    if samples.ndim != 3 or samples.shape[0] != truth.shape[0] or samples.shape[2] != truth.shape[1]:
        other = samples.ndim == 3 and samples.shape[1:] == truth.shape
        hint = "; the axes seem to be (l, n, d): draws.transpose(1, 0, 2) has the right order" if other else ""
        raise ShapeError(
            f"draws has shape {samples.shape}; expected (n, l, d) = ({truth.shape[0]}, l, {truth.shape[1]}) to match theta{hint}"
        )
    if truth.shape[1] == 0:
        raise ShapeError(f"theta has shape {truth.shape}; expected at least one parameter")
    if truth.shape[0] < MIN_ROWS:
        raise DataError(f"theta has {truth.shape[0]} rows; expected at least {MIN_ROWS} simulations for a calibration test")
    if samples.shape[1] < 2:
        raise DataError(f"draws has {samples.shape[1]} draws per simulation; expected at least 2 (100 or more to see tails)")
    require_finite("theta", truth)
    require_finite("draws", samples)
    hint = wrong_order(truth, samples)
    if hint:
        warnings.warn(hint, UserWarning, stacklevel=3)
    return truth, samples


def wrong_order(theta: Array, draws: Array) -> str:
    """Words if the draws (n, l, d) look as if their axes or rows were not in the order of theta (n, d), else ''.

    As many draws as simulations: the axes may be (l, n, d). Found where the means of the draws over the first axis, and not over the
    second, are correlated with theta. The correlation of independent columns is below 5 / sqrt(n) but for one in a million.
    """
    if draws.shape[0] != draws.shape[1]:
        return ""
    right, swapped = (_largest_correlation(theta, draws.mean(axis=axis)) for axis in (1, 0))
    if swapped < 5 / math.sqrt(len(theta)) or right > 0.5 * swapped:
        return ""
    return (
        f"draws has shape {draws.shape}, and its axes seem to be (draws, simulations, d): theta is correlated with the means over the first"
        f" axis (r = {swapped:.2f}) and not over the second (r = {right:.2f}); expected (simulations, draws, d): draws.transpose(1, 0, 2)"
    )


def _largest_correlation(theta: Array, means: Array) -> float:
    """Largest absolute correlation of a column of theta (n, d) with that of means (n, d)."""
    a, b = theta - theta.mean(axis=0), means - means.mean(axis=0)
    norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return float(np.abs((a * b).sum(axis=0)[norm > 0] / norm[norm > 0]).max(initial=0.0))


def check_names(names: Sequence[str | Parameter] | str | Parameter | None, dim: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (names, labels for axes) of `dim` parameters; None gives theta_0, theta_1, ...

    Raises: ShapeError for the wrong number, SettingError for repeated names or an entry that is not a name.
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

    Infinite values are ranked (a log density may be -inf); NaN is refused.   Raises: ShapeError, NonFiniteError, SettingError.
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


def check_log_probs(log_prob_theta: ArrayLike | None, log_prob_draws: ArrayLike | None, n: int, n_draws: int) -> tuple[Array, Array] | None:
    """Return log densities of true values (n,) and draws (n, l), or None if neither is given; -inf is allowed.

    Raises: SettingError (only one of them), ShapeError, NonFiniteError, DataError (all values equal).
    """
    if log_prob_theta is None and log_prob_draws is None:
        return None
    if log_prob_theta is None or log_prob_draws is None:
        missing = "log_prob_draws" if log_prob_draws is None else "log_prob_theta"
        raise SettingError(f"{missing} is None; expected both log_prob_theta (n,) and log_prob_draws (n, l), or neither")
    at_truth = as_array("log_prob_theta", log_prob_theta, (n,), finite=False)
    at_draws = as_array("log_prob_draws", log_prob_draws, (n, n_draws), finite=False)
    for name, array in (("log_prob_theta", at_truth), ("log_prob_draws", at_draws)):
        bad = np.isnan(array) | np.isposinf(array)
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise NonFiniteError(f"{name} has NaN or +Inf, first in row {row}; expected log densities (finite or -Inf)")
    if at_draws.min() == at_draws.max() == at_truth.min() == at_truth.max():
        raise DataError(f"log_prob_theta and log_prob_draws are constant ({at_truth[0]:g}); expected densities that differ between draws")
    return at_truth, at_draws


def require_varying(name: str, values: Array, draw_values: Array) -> None:
    """Raise DataError if a quantity has the same value in all true values and draws, so that ranks are undefined."""
    if values.min() == values.max() == draw_values.min() == draw_values.max():
        raise DataError(f"parameter {name!r} is constant ({values[0]:g}) in theta and in every draw; expected a varying one, leave it out")


def count_below(values: Array, draw_values: Array, rng: np.random.Generator) -> Integers:
    """Rank of each value among its draws, 0..l: the number of draws below it, with ties broken at random.

    Args: values (n,). draw_values (n, l).
    With m ties the rank is uniform on m + 1 positions, so ranks of a calibrated discrete quantity are uniform too.
    """
    below = (draw_values < values[:, None]).sum(axis=1)
    ties = (draw_values == values[:, None]).sum(axis=1)
    return (below + rng.integers(0, ties + 1)).astype(np.int64)


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
    shapes = {name: column.shape for name, column in zip(wanted, columns, strict=True)}
    if len(set(shapes.values())) > 1:
        raise ShapeError(f"variables have (simulations, draws) = {shapes}; expected the same for all")
    return np.stack(columns, axis=-1).astype(np.float64)
