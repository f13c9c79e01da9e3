r"""From the prior to the posterior by tempering: where the mass is, and a mixture that covers it.

In a space where the prior is N(0, I), the densities p_b(u) = L(u)^b N(u; 0, I) lead from the prior (b = 0) to the posterior (b = 1).
Start with many draws of the prior. Then again and again: raise b as far as the weights p_b / q of the draws keep an effective size of
a quarter of them; fit a mixture q (`moves.fit_mixture`) to the weighted draws; draw afresh from it. A likelihood a millionth as wide as the
prior takes some ten rounds, and modes are lost only if no draw of the prior came near them while b was small.

The result is a proposal, not a posterior: importance sampling, or chains that start there, make it one and judge it.

Source: population Monte Carlo: Cappe et al. 2004, J. Comput. Graph. Stat. 13, 907; tempering by effective size: Jasra et al. 2011,
Scand. J. Stat. 38, 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sbi_phys.core.errors import DataError
from sbi_phys.core.progress import Task
from sbi_phys.core.types import Array
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.importance import effective_size, resample_indices
from sbi_phys.samplers.moves import Mixture, fit_mixture

__all__ = ["Explored", "MixtureProposal", "explore"]


MAX_ROUNDS = 60
_WANTED = 0.25  # effective size of a round, as a share of its draws
_FEW = 1000  # draws that the fits on the way use: they need not be fine
_STALLS = 6  # rounds at one power before the explorer gives up


class MixtureProposal:
    """A fitted mixture as a proposal for importance sampling."""

    def __init__(self, mixture: Mixture) -> None:
        """Take the mixture."""
        self.mixture = mixture

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw u (n, d)."""
        return self.mixture.sample(n, rng)

    def log_prob(self, u: Array) -> Array:
        """Log density of u (n, d) -> (n,)."""
        return self.mixture.log_prob(u)


@dataclass(frozen=True, kw_only=True, slots=True)
class Explored:
    """Where the mass is: u (m, d), draws of the last mixture but one; proposal; efficiency, ESS share of u at the power reached.

    power: 1 if the posterior itself was reached. n_rounds.
    """

    u: Array
    proposal: MixtureProposal
    efficiency: float
    power: float
    n_rounds: int


def explore(log_likelihood: Callable[[Array], Array], dim: int, rng: np.random.Generator, task: Task, *, n: int | None = None) -> Explored:
    """Temper from N(0, I) to exp(log_likelihood) N(0, I).

    Args: log_likelihood, u (m, d) -> (m,), checked, -inf allowed. n, draws a round; default 400 d, at least 1000, at most 4000.
    Raises: DataError if the likelihood is zero at every draw of the prior.
    """
    n = min(4000, max(1000, 400 * dim)) if n is None else n
    u = rng.standard_normal((4 * n, dim))
    log_l, log_q = log_likelihood(u), standard_normal_log_prob(u)
    if np.isneginf(log_l).all():
        raise DataError(f"the likelihood is zero at all of {4 * n} draws of the prior; expected data that some theta can produce")
    power, stalls, rounds = 0.0, 0, 0
    while True:
        rounds += 1
        raised = _next_power(log_l, standard_normal_log_prob(u) - log_q, power)
        stalls = stalls + 1 if raised == power else 0
        last = (power >= 1.0 and stalls >= 1) or stalls >= _STALLS or rounds >= MAX_ROUNDS
        power = raised
        log_w = _tempered(log_l, power) + standard_normal_log_prob(u) - log_q
        mixture = _fit(u, log_w, n if last else min(n, _FEW), rng)
        task.update(0.0, text=f"tempering, round {rounds}, power {power:.2g}")
        if last:
            efficiency = effective_size(log_w) / len(u)
            return Explored(u=u, proposal=MixtureProposal(mixture), efficiency=efficiency, power=power, n_rounds=rounds)
        u = mixture.sample(n, rng)
        log_l, log_q = log_likelihood(u), mixture.log_prob(u)


def _tempered(log_l: Array, power: float) -> Array:
    return np.where(np.isneginf(log_l), -np.inf, power * np.where(np.isneginf(log_l), 0.0, log_l))


def _next_power(log_l: Array, log_ratio: Array, power: float) -> float:
    """Largest power in [power, 1] at which the weights keep their effective size; the same again if they have lost it."""

    def size(b: float) -> float:
        return effective_size(_tempered(log_l, b) + log_ratio) / len(log_l)

    if size(1.0) >= _WANTED:
        return 1.0
    now = size(power)
    if now < 0.4 * _WANTED:  # the mixture fits badly: the same power again, with what these draws say
        return power
    mark = min(_WANTED, 0.5 * now)
    low, high = math.log(max(power, 1e-12)), 0.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if size(math.exp(middle)) >= mark else (low, middle)
    return max(power, math.exp(low))


def _fit(u: Array, log_w: Array, n: int, rng: np.random.Generator) -> Mixture:
    """Fit a mixture to weighted draws, in halves that share none, so that the number of components is judged on others."""
    order = rng.permutation(len(u))
    parts = []
    for half in (order[::2], order[1::2]):
        top = log_w[half].max()
        if np.isfinite(top):
            parts.append(u[half][resample_indices(np.exp(log_w[half] - top), n // 2, rng)])
    return fit_mixture(parts, rng)
