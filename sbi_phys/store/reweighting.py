r"""Importance weights of a store's rows for another prior or spectrum: w_i = p_new(theta_i) / p_old(theta_i).

Simulations x_i ~ p(x | theta_i), theta_i ~ p_old, with these weights represent p_new(theta) p(x | theta): the mean of f over
the new population is sum_i w_i f_i / sum_i w_i. Its precision is that of

    n_eff = (sum_i w_i)^2 / sum_i w_i^2

unweighted rows (Kish 1965). Where the new prior is narrow or lies in the tail of the old prior, few rows carry all of the weight.
Weights cannot replace rows that were not simulated: a new prior that reaches outside the support of the old prior is refused.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError, SimulatorMismatchError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.priors import Prior
from sbi_phys.store.manifest import read_manifest
from sbi_phys.store.shards import open_intact, shard_name
from sbi_phys.store.store import Store

__all__ = ["ReweightWarning", "Reweighted", "reweight"]

LogDensity = Callable[[Array], ArrayLike]
_PROBES = 20_000
_RANDOM = ("prior", "merged", "split")


class ReweightWarning(UserWarning):
    """Few rows carry most of the weight of a reweighted store."""


@dataclass(frozen=True, slots=True)
class Reweighted:
    """Weights of the good rows of a store, in the order of `Store.read()`; result of `reweight`.

    Fields: weights (n,), mean 1; ess, effective sample size; largest, share of the total weight in one row.
    Read: ess / n is the share of the store that the new population uses.

    >>> import numpy as np, sbi_phys as sp
    >>> result = sp.store.Reweighted(weights=np.array([1.5, 0.5]), ess=1.6, largest=0.75)
    >>> result.efficiency, result.resample(5, seed=0).shape
    (0.8, (5,))
    """

    weights: Array
    ess: float
    largest: float

    @property
    def efficiency(self) -> float:
        """ess / n."""
        return self.ess / self.weights.size

    def resample(self, n: int, *, seed: int) -> Integers:
        """Return row numbers (n,) drawn with replacement in proportion to the weights.   Raises: SettingError."""
        p = self.weights / self.weights.sum()
        return rng_for(seed, "resample").choice(p.size, require_int("n", n, low=1), p=p)


def reweight(
    store: Store | str | os.PathLike[str],
    new: Prior | LogDensity,
    *,
    old: Prior | LogDensity | None = None,
    warn_below: float = 0.01,
) -> Reweighted:
    r"""Return weights p_new(theta) / p_old(theta) of the good rows of a store, and their effective sample size.

    Args:
        store: a complete store; only its theta and status are read.
        new: another prior of the same parameters, or a function theta (n, d) -> log density (n,), up to a constant, -inf
            outside; e.g. `lambda theta: -2.7 * np.log(theta[:, 0])` for a spectrum E^-2.7.
        old: density that theta were drawn from; default the store's prior. Required where theta were given.
        warn_below: warn if ess / n is less than this, or ess below 100.

    Returns: Reweighted: weights (n,), mean 1.
    Raises: SupportError where a new prior reaches outside the support of the old prior (not checked for functions),
    SimulatorMismatchError for other parameters, SettingError, ShapeError, DataError if no row has weight.
    Source: Kish, Survey Sampling (1965); importance weights.   Read: `Reweighted`.

    >>> import numpy as np, sbi_phys as sp
    >>> np.savez("events.npz", energy=np.linspace(1, 9, 50), signal=np.arange(50.0))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0, 10, unit="EeV")])
    >>> store = sp.store.import_store("events.npz", "run", prior=prior, observables=[sp.Observable("signal", 1)], drawn=True)
    >>> result = sp.reweight(store, sp.BoxPrior([sp.Parameter("energy", 2, 8)]))
    >>> result.weights.size, 30 < result.ess < 40
    (50, True)
    """
    store = store if isinstance(store, Store) else Store(Path(store))
    header_theta = store.theta_kind
    if old is None and header_theta not in _RANDOM:
        raise SettingError(
            f"theta of {store.path} are {header_theta!r}, not drawn from its prior; expected old=, the density that they were drawn from"
        )
    before = store.prior if old is None else old
    if isinstance(new, Prior):
        _require_inside(new, before, store)
    theta = _good_theta(store)
    log_w = _log_density("new", new, theta, allow_zero=True) - _log_density("old", before, theta, allow_zero=False)
    top = log_w.max()
    if not np.isfinite(top):
        raise DataError(f"no row of {store.path} has weight under the new density; expected a density that overlaps with the store")
    w = np.exp(log_w - top)
    ess = float(w.sum() ** 2 / (w @ w))
    found = Reweighted(w / w.mean(), ess, float(w.max() / w.sum()))
    if ess < max(warn_below * w.size, min(100, w.size / 2)):
        warnings.warn(
            f"the effective sample size of the {w.size} weighted rows of {store.path} is {ess:.1f}, one row has "
            f"{100 * found.largest:.2g} % of the weight; expected a new density closer to the old one, or a larger store",
            ReweightWarning,
            stacklevel=2,
        )
    return found


def _require_inside(new: Prior, old: Prior | LogDensity, store: Store) -> None:
    """Refuse a new prior with mass outside the support of the old prior, tested by draws and by the ends of its ranges."""
    if new.names != store.prior.names:
        raise SimulatorMismatchError(f"the new prior has parameters {new.names}; expected those of {store.path}, {store.prior.names}")
    probes = new.sample(_PROBES, rng_for(0, "support"))
    inside = old.contains(probes) if isinstance(old, Prior) else np.isfinite(np.asarray(old(probes), dtype=np.float64))
    outside = 1 - inside.mean()
    ends = _past_ends(new, old) if isinstance(old, Prior) else ""
    if outside > 0 or ends:
        row = dict(zip(new.names, probes[int(np.argmin(inside))].tolist(), strict=True)) if outside > 0 else ends
        raise SupportError(
            f"the new prior reaches outside of what {store.path} was drawn from: {100 * outside:.2g} % of its draws, e.g. {row}; expected "
            "a prior within the old one's support, because weights cannot replace rows that were not simulated"
        )


def _past_ends(new: Prior, old: Prior) -> str:
    for mine, theirs in zip(new.parameters, old.parameters, strict=True):
        # an unbounded prior may have all of its mass inside; a bounded prior reaches its ends
        bounded = np.isfinite(mine.low) and np.isfinite(mine.high)
        if bounded and (mine.low < theirs.low or mine.high > theirs.high):
            return f"{mine.name} within [{mine.low:g}, {mine.high:g}], the old one within [{theirs.low:g}, {theirs.high:g}]"
    return ""


def _good_theta(store: Store) -> Array:
    """Return theta of the good rows; x is not read."""
    if store.missing:
        store.status()  # raises an error that names the missing shards
    parts: list[Any] = []
    manifest = read_manifest(store.path)
    for index in range(manifest.n_shards):
        with open_intact(store.path / shard_name(index), manifest.header, index, manifest.rows(index)) as file:
            parts.append(file["theta"][:][file["status"][:] == 0])
    theta = np.concatenate(parts)
    if not theta.size:
        raise DataError(f"{store.path} has no good rows; expected at least one")
    return theta


def _log_density(name: str, density: Prior | LogDensity, theta: Array, *, allow_zero: bool) -> Array:
    if isinstance(density, Prior):
        value = density.log_prob(theta)
    elif callable(density):
        value = np.asarray(density(theta), dtype=np.float64)
    else:
        raise SettingError(f"{name} is {density!r}; expected a Prior or a function of theta")
    if value.shape != (theta.shape[0],):
        raise ShapeError(f"{name} returned shape {value.shape} for {theta.shape[0]} rows; expected ({theta.shape[0]},) log densities")
    if np.isnan(value).any() or (value == np.inf).any() or (not allow_zero and not np.isfinite(value).all()):
        row = int(np.flatnonzero(np.isnan(value) | (value == np.inf) | (~np.isfinite(value) & (not allow_zero)))[0])
        raise DataError(
            f"{name} has log density {value[row]} at theta = {theta[row].tolist()}; expected a finite number{' or -inf' * allow_zero}"
        )
    return value
