r"""Bootstrap of unfolded event weights: the covariance of any statistic of the weights, split by source.

In a replica each event of a Poisson-distributed sample is counted Poisson(1) times, so that the totals fluctuate as well. Replicas of
the data with the simulation fixed, of the simulation (and background) with the data fixed, and of the networks' seeds with both fixed
give

    V_data, V_simulation, V_training  of any statistic of the weights ,   V = V_data + V_simulation .

Every replica trains its own networks, so V_data and V_simulation each contain V_training, and V is not too small. Where V_training is a
large part of them, more networks (n_ensemble) reduce it.

Source: Efron 1979, Ann. Statist. 7, 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sbi_phys.core.checks import as_array, as_real, require_finite
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Mask

__all__ = ["SOURCES", "Sample", "StatisticCovariance", "WeightReplicas", "bootstrap"]


SOURCES = ("data", "simulation", "training")


class Sample(NamedTuple):
    """Weights of all events: simulation (n,), data (m,), background (b,)."""

    simulation: Array
    data: Array
    background: Array


def bootstrap(
    unfold: Callable[[Sample, int], Array],
    sample: Sample,
    n_replicas: int,
    seed: int,
    draw_key: tuple[str, ...],
    seed_key: tuple[str, ...],
) -> dict[str, Array]:
    """Weights (n_replicas, n) that `unfold(sample, seed)` gives for replicas with one source varied, by source.

    Args: draw_key, seed_key: first entries of the keys of the event counts and of the networks' seeds.
    """

    def varied(source: str, b: int) -> Sample:
        rng = rng_for(seed, *draw_key, source, b)
        if source == "data":
            return sample._replace(data=sample.data * rng.poisson(1.0, len(sample.data)))
        if source == "simulation":
            own = sample.simulation * rng.poisson(1.0, len(sample.simulation))
            return sample._replace(simulation=own, background=sample.background * rng.poisson(1.0, len(sample.background)))
        return sample

    return {
        source: np.stack([unfold(varied(source, b), seed_for(seed, *seed_key, source, b)) for b in range(n_replicas)]) for source in SOURCES
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticCovariance:
    """A statistic (q,) of the unfolded weights with its covariances (q, q), by source.

    values (q,), with all events. data, simulation, training (q, q). total = data + simulation, either with a training's noise in it.

    >>> import numpy as np
    >>> from sbi_phys.unfold import WeightReplicas
    >>> varied = np.random.default_rng(1).poisson(1.0, (10, 100)).astype(float)
    >>> replicas = WeightReplicas(
    ...     weights=np.ones(100), truth_pass=np.ones(100, dtype=bool), data=varied, simulation=varied, training=varied
    ... )
    >>> found = replicas.histogram(np.linspace(0, 1, 100), [0, 0.5, 1])
    >>> found.values, found.error.shape
    (array([50., 50.]), (2,))
    """

    values: Array
    data: Array
    simulation: Array
    training: Array

    @property
    def total(self) -> Array:
        """Covariance (q, q) of data and simulation together."""
        return self.data + self.simulation

    @property
    def error(self) -> Array:
        """Standard errors (q,), the root of the total's diagonal."""
        return np.sqrt(np.diag(self.total))


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightReplicas:
    """Unfolded weights of simulated truths, of all events and of all replicas.

    weights (n,), with all events. truth_pass (n,): has a truth. data, simulation, training (n_replicas, n): one source varied.
    A simulated event that a replica left out has weight 0 there.

    >>> import numpy as np
    >>> from sbi_phys.unfold import WeightReplicas
    >>> varied = np.random.default_rng(1).poisson(1.0, (10, 100)).astype(float)
    >>> replicas = WeightReplicas(
    ...     weights=np.ones(100), truth_pass=np.ones(100, dtype=bool), data=varied, simulation=varied, training=varied
    ... )
    >>> replicas.n_replicas, replicas.covariance(np.sum).total.shape
    (10, (1, 1))
    """

    weights: Array
    truth_pass: Mask
    data: Array
    simulation: Array
    training: Array

    @property
    def n_replicas(self) -> int:
        """Replicas of each kind."""
        return int(self.data.shape[0])

    def covariance(self, statistic: Callable[[Array], ArrayLike]) -> StatisticCovariance:
        """Covariances of statistic(weights (n,)) -> number or (q,).   Raises: ShapeError, NonFiniteError.

        Read: with b replicas an error is known to 1 / sqrt(2 (b - 1)) of itself, and a covariance has rank b - 1 at most.
        """

        def applied(name: str, weights: Array) -> Array:
            value = np.atleast_1d(as_real(name, statistic(weights)))
            if value.ndim != 1:
                raise ShapeError(f"{name} has shape {value.shape}; expected a number or (q,)")
            require_finite(name, value)
            return value

        def spread(replicas: Array) -> Array:
            found = [applied("statistic of a replica", w) for w in replicas]
            if other := next((v.shape for v in found if v.shape != values.shape), None):
                raise ShapeError(f"statistic of a replica has shape {other}; expected {values.shape}, as with all events")
            return np.atleast_2d(np.cov(np.stack(found), rowvar=False))

        values = applied("statistic", self.weights)
        return StatisticCovariance(
            values=values, data=spread(self.data), simulation=spread(self.simulation), training=spread(self.training)
        )

    def histogram(self, values: ArrayLike, edges: ArrayLike) -> StatisticCovariance:
        """Unfolded counts of `values` (n,), e.g. a column of the truth, in bins (q + 1,) of increasing edges, with covariances.

        Raises: ShapeError, NonFiniteError, DataError.
        """
        own = np.where(self.truth_pass, as_array("values", values, (self.weights.size,), finite=False), 0.0)
        require_finite("values", own)
        bins = as_array("edges", edges, (None,))
        if bins.size < 2 or (np.diff(bins) <= 0).any():
            raise DataError(
                f"edges has {bins.size} entries, smallest step {np.diff(bins).min(initial=0):g}; expected two or more, increasing"
            )
        return self.covariance(lambda weights: np.histogram(own, bins, weights=np.where(self.truth_pass, weights, 0.0))[0])
