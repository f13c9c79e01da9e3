r"""Tempered densities p^b, 0 <= b <= 1: they place the starting points of chains, and lead from the prior to the posterior.

In a space where the prior is N(0, I), the densities p_b(u) = L(u)^b N(u; 0, I) lead from the prior (b = 0) to the posterior (b = 1).
`temper` starts with draws of the prior and repeats three steps: raise b as far as the weights p_b / q of the draws keep an effective
size of a quarter of them; fit a mixture q to the weighted draws (`mixture.fit_mixture`); draw anew from q. A likelihood a millionth as
wide as the prior takes about ten rounds. A mode is lost only if no draw of the prior was near it while b was small. The result is a
proposal, not the posterior: importance sampling from it, or chains started there, give the posterior and judge the result.

Source: population Monte Carlo: Cappe et al. 2004, J. Comput. Graph. Stat. 13, 907; tempering by effective size: Jasra et al. 2011,
Scand. J. Stat. 38, 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.results import Result, Rows, draws_rows
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.density import CheckedDensity, LogDensity
from sbi_phys.samplers.importance import effective_size, resample_indices
from sbi_phys.samplers.mixture import Mixture, fit_mixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Tempered", "spread_start", "temper"]

MAX_ROUNDS = 60
_WANTED = 0.25  # effective size of a round, as a share of its draws
_FEW = 1000  # draws used in the fits before the last one, which can be coarse
_STALLS = 6  # rounds at one power after which the tempering stops


@dataclass(frozen=True, kw_only=True, slots=True)
class Tempered(Result):
    """Where the mass of a posterior is.

    u (m, d), draws of the last mixture but one. proposal, the last mixture. efficiency, effective size of u at the power reached, as a
    share of m. power, 1 if the posterior itself was reached. n_rounds.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> found = sp.samplers.temper(lambda u: -0.5 * ((u - 1) ** 2).sum(axis=1) / 0.01, 2, np.random.default_rng(0))
    >>> found.summary().startswith("Tempering reached power 1 ")
    True
    """

    u: Array
    proposal: Mixture
    efficiency: float
    power: float
    n_rounds: int

    def rows(self) -> Rows:
        """Return the table: one row for each column of u, with mean, sd, median and central intervals."""
        return draws_rows(self.u, [f"u_{j}" for j in range(self.u.shape[1])])

    def summary(self) -> str:
        """Return the result in words."""
        return (
            f"Tempering reached power {self.power:.2g} of the likelihood after {self.n_rounds} rounds, with a mixture of"
            f" {self.proposal.weights.size} components: effective size {100 * self.efficiency:.0f} % of the draws"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the marginals of u, in sd from their means."""
        return figures.results.marginals(self.u, self.rows().column("name"), None, ax)


def temper(
    log_likelihood: LogDensity, dim: int, rng: np.random.Generator, *, n_draws: int | None = None, progress: Progress | None = None
) -> Tempered:
    """Find a mixture that covers the posterior exp(log_likelihood(u)) N(u; 0, I).

    Args:
        log_likelihood: u (m, d) -> (m,), -inf allowed.
        dim: d.
        rng: generator of all draws.
        n_draws: of a round; default 400 d, at least 1000, at most 4000.
        progress: shows rounds and powers.

    Raises: SettingError, ShapeError, NonFiniteError (NaN or +inf, naming the point), DataError (the likelihood is zero at every draw of the
    prior).   Source: Cappe et al. 2004; Jasra et al. 2011.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> found = sp.samplers.temper(lambda u: -0.5 * ((u - 1) ** 2).sum(axis=1) / 0.01, 2, np.random.default_rng(0))
    >>> found.power, bool(abs(found.u.mean() - 1) < 0.1)
    (1.0, True)
    """
    dim = require_int("dim", dim, low=1)
    n = min(4000, max(1000, 400 * dim)) if n_draws is None else require_int("n_draws", n_draws, low=10)
    density = CheckedDensity(log_likelihood, dim, name="log_likelihood")
    u = rng.standard_normal((4 * n, dim))
    log_l, log_q = density(u), standard_normal_log_prob(u)
    if np.isneginf(log_l).all():
        raise DataError(f"the likelihood is zero at all of {4 * n} draws of the prior; expected data that some theta can produce")
    power, stalls, rounds = 0.0, 0, 0
    with or_none(progress).task("tempering", total=None) as task:
        while True:
            rounds += 1
            raised = _next_power(log_l, standard_normal_log_prob(u) - log_q, power)
            stalls = stalls + 1 if raised == power else 0
            last = (power >= 1.0 and stalls >= 1) or stalls >= _STALLS or rounds >= MAX_ROUNDS
            power = raised
            log_w = _tempered(log_l, power) + standard_normal_log_prob(u) - log_q
            mixture = _fit(u, log_w, n if last else min(n, _FEW), rng)
            task.update(0.0, text=f"round {rounds}, power {power:.2g}")
            if last:
                efficiency = effective_size(log_w) / len(u)
                return Tempered(u=u, proposal=mixture, efficiency=efficiency, power=power, n_rounds=rounds)
            u = mixture.sample(n, rng)
            log_l, log_q = density(u), mixture.log_prob(u)


def _tempered(log_l: Array, power: float) -> Array:
    return np.where(np.isneginf(log_l), -np.inf, power * np.where(np.isneginf(log_l), 0.0, log_l))


def _next_power(log_l: Array, log_ratio: Array, power: float) -> float:
    """Largest power in [power, 1] at which the weights keep their effective size; `power` itself if they have lost it."""

    def share(b: float) -> float:
        return effective_size(_tempered(log_l, b) + log_ratio) / len(log_l)

    if share(1.0) >= _WANTED:
        return 1.0
    now = share(power)
    if now < 0.4 * _WANTED:  # the mixture fits badly: a new fit at the same power
        return power
    return max(power, _largest_power(share, min(_WANTED, 0.5 * now), math.log(max(power, 1e-12))))


def _largest_power(size: Callable[[float], float], wanted: float, log_low: float) -> float:
    """Largest power b in (exp log_low, 1) at which size(b), which falls with b, is at least `wanted`, by bisection in log b."""
    low, high = log_low, 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if size(math.exp(middle)) >= wanted else (low, middle)
    return math.exp(low)


def _fit(u: Array, log_w: Array, n: int, rng: np.random.Generator) -> Mixture:
    """Fit a mixture to weighted draws, in two halves without common draws, so that one can judge the number of components."""
    order = rng.permutation(len(u))
    parts = []
    for half in (order[::2], order[1::2]):
        top = log_w[half].max()
        if np.isfinite(top):
            parts.append(u[half][resample_indices(np.exp(log_w[half] - top), n // 2, rng)])
    return fit_mixture(parts, rng)


def spread_start(
    log_prob: LogDensity, candidates: ArrayLike, n_walkers: int, rng: np.random.Generator, *, random_share: float = 0.25
) -> Array:
    r"""Choose n_walkers different starting places (n_walkers, d) among candidates (m, d), by their tempered density and at random.

    Places are drawn without repetition with weights p^b, where b <= 1 is the largest power that leaves an effective number of
    4 n_walkers candidates (or half of all): modes that lie tens of nats lower are then still populated. A share `random_share` of the
    places is uniform among the candidates of positive density. Candidates: draws of the prior, of a network's posterior, or both.

    Raises: ShapeError, NonFiniteError, SettingError, DataError (fewer candidates of positive density than walkers).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> start = sp.samplers.spread_start(lambda u: -0.5 * (u**2).sum(axis=1), rng.standard_normal((500, 2)), 32, rng)
    >>> start.shape
    (32, 2)
    """
    points = as_array("candidates", candidates, (None, None))
    n_walkers = require_int("n_walkers", n_walkers, low=1)
    share = require_number("random_share", random_share, low=0, high=1)
    if not isinstance(rng, np.random.Generator):
        raise SettingError(f"rng is {rng!r}; expected a numpy Generator, e.g. sbi_phys.core.rng.rng_for(seed)")
    points = np.unique(points, axis=0)
    values = CheckedDensity(log_prob, points.shape[1])(points)
    points, values = points[np.isfinite(values)], values[np.isfinite(values)]
    if points.shape[0] < n_walkers:
        raise DataError(f"candidates has {points.shape[0]} different points of positive density; expected at least n_walkers = {n_walkers}")
    wanted = min(4.0 * n_walkers, 0.5 * points.shape[0])
    relative = values - values.max()
    enough = effective_size(relative) >= wanted
    beta = 1.0 if enough else _largest_power(lambda b: effective_size(b * relative), wanted, -60.0)
    n_random = round(share * n_walkers)
    # Gumbel's trick: the largest of log weight + Gumbel noise are draws without repetition
    by_weight = np.argsort(-(beta * values + rng.gumbel(size=values.size)))[: n_walkers - n_random]
    rest = rng.permutation(np.setdiff1d(np.arange(values.size), by_weight))[:n_random]
    return points[rng.permutation(np.concatenate([by_weight, rest]))]
