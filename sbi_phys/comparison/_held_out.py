"""Held-out simulations and the log score of the true parameters, as the comparisons of networks use them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_real, require_same_rows
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Observable
from sbi_phys.priors.blocks import to_rows
from sbi_phys.store.store import Store

__all__ = ["Simulations", "log_score", "read_pairs"]

Simulations = Store | str | os.PathLike[str] | tuple[ArrayLike, Any]


def read_pairs(name: str, simulations: Simulations, n: int | None, observables: Sequence[Observable] | None) -> tuple[Array, Array]:
    """theta (n, d) and x (n, ...) of at most n good rows of a store, its path, or (theta, x).

    Raises: SettingError for anything else, ShapeError, NonFiniteError (theta), DataError (no rows), StoreError.
    """
    if isinstance(simulations, str | os.PathLike):
        simulations = Store(Path(simulations))
    if isinstance(simulations, Store):
        return _read_store(simulations, n)
    if not isinstance(simulations, tuple | list) or len(simulations) != 2:
        raise SettingError(f"{name} is a {type(simulations).__name__}; expected a store, its path, or (theta, x)")
    theta, x = as_real(f"theta of {name}", simulations[0]), simulations[1]
    if isinstance(x, Mapping):
        if observables is None:
            raise SettingError(f"x of {name} is a dict of blocks and the observables are not known; expected an array (n, ...)")
        x = to_rows(x, observables, name=f"x of {name}")[0]
    x = as_real(f"x of {name}", x)
    if theta.ndim != 2 or x.ndim < 1:
        raise ShapeError(f"theta of {name} has shape {theta.shape} and x {x.shape}; expected (n, d) and (n, ...)")
    if require_same_rows(theta=theta, x=x) == 0:
        raise DataError(f"{name} has no rows; expected simulations")
    if not np.isfinite(theta).all():
        raise NonFiniteError(f"theta of {name} has NaN or Inf; expected finite parameters")
    return theta[:n], x[:n]


def _read_store(store: Store, n: int | None) -> tuple[Array, Array]:
    if n is None:
        theta, x = store.read()
        return theta, x.astype(np.float64)
    parts: list[tuple[Array, Array]] = []
    rows = 0
    for theta, x, _ in store.shards(valid_only=True):
        parts.append((theta, x.astype(np.float64)))
        rows += len(theta)
        if rows >= n:
            break
    if not rows:
        raise DataError(f"{store.path} has no good rows; expected simulations")
    return np.concatenate([t for t, _ in parts])[:n], np.concatenate([x for _, x in parts])[:n]


def log_score(name: str, estimator: Any, theta: Array, x: Array) -> Array:
    """log q(theta | x) of each pair (n,), nats; -inf where q has no density.

    Raises: SettingError (no `log_prob`), ShapeError, NonFiniteError (NaN or +Inf).
    """
    if not callable(getattr(estimator, "log_prob", None)):
        raise SettingError(f"{name} is a {type(estimator).__name__} without log_prob(theta, x); expected a posterior with a density (NPE)")
    values = as_real(f"log_prob of {name}", estimator.log_prob(theta, x))
    if values.shape != (len(theta),):
        raise ShapeError(f"log_prob of {name} has shape {values.shape}; expected ({len(theta)},), one value per pair")
    bad = np.isnan(values) | np.isposinf(values)
    if bad.any():
        raise NonFiniteError(f"log_prob of {name} is {values[bad][0]} in row {int(np.flatnonzero(bad)[0])}; expected finite values or -Inf")
    return values
