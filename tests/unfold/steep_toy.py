"""The steep toy: 2e5 events of index 2.7 in 20 bins of 0.1 dex, resolution 0.1 in lgE, efficiency that turns on at lgE 18.7."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from sbi_phys.core.rng import rng_for
from sbi_phys.unfold.response import Response

Array = NDArray[np.float64]

EDGES = np.linspace(18.5, 20.5, 21)
EVENTS = 200_000


def turn_on(lg_energy: Array) -> Array:
    return np.asarray(expit((lg_energy - 18.7) / 0.1))


def power_law(index: float, events: float = EVENTS) -> Array:
    """Expected events per bin of dN/dE ~ E^-index."""
    edge = 10.0 ** ((1 - index) * (EDGES - EDGES[0]))
    content = edge[:-1] - edge[1:]
    return np.asarray(events * content / content.sum())


def response(**extra: Any) -> Response:
    return replace(Response.from_resolution(EDGES, EDGES, 0.1, efficiency=turn_on, spectrum_index=2.7), **extra)


def toys(n: int, expected: Array, seed: int, unfold: Callable[[Any], Any]) -> tuple[Array, list[Any]]:
    """Pulls (n, bins) and results of `unfold(counts)` over toys of the true index 2.7."""
    truth = power_law(2.7)
    results = [unfold(rng_for(seed, "steep", i).poisson(expected)) for i in range(n)]
    pulls = np.array([(r.counts - truth) / r.errors for r in results])
    return pulls, results


def coverage(pulls: Array) -> Array:
    """Share of toys within one standard error, per bin."""
    return np.asarray((np.abs(pulls) < 1).mean(axis=0))
