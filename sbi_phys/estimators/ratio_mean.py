r"""The mean of a learned ratio over the prior, which is one for the exact ratio, at every x.

    integral p(theta) r(x | theta) dtheta = integral p(theta) p(x | theta) dtheta / p(x) = 1

A learned r has a mean m(x) = E_prior[r(x | theta)] instead, and r(x | theta) / m(x) obeys the identity. A factor of x alone moves no
posterior, but it is what a network learns worst: in the exact log ratio it is -log p(x), which says how well x fits the model at all,
a steep function of all columns. So it is computed, not learned.

Where posteriors are narrow, draws of the prior would hardly ever fall where r is large. Importance sampling in whitened space, for many
x at once: the first round draws from the prior and from Gaussians, wide and narrow, that the caller has for each x; each further round
adds Gaussians fitted to the weighted draws so far, for those x that need it. All draws of an x are weighted with the mixture of all
that they were drawn from,

    w_i = r(x | u_i) N(u_i; 0, I) / q(u_i),     q = sum_j (n_j / n) q_j,     m = mean(w),     n_eff = (sum w)^2 / sum w^2,

and rounds end at `WANTED` effective draws; where sixteen do not come near, tempering (`samplers.tempering`) finds a mixture. Points of a
round are a Sobol sequence, shifted at random for each x, so that the error quoted, that of independent draws,
sqrt((1 / n_eff - 1 / n) n / (n - 1)), is on the safe side. A mode near which neither one of the caller's Gaussians nor a draw of the
prior falls is not seen: the Gaussians should be learned by maximum likelihood, so that they cover all modes.

Source: adaptive multiple importance sampling: Cornuet et al. 2012, arXiv:0907.1254.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp, ndtri

from sbi_phys.core.errors import ConvergenceError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Integers
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.importance import effective_size
from sbi_phys.samplers.mixture import Mixture
from sbi_phys.samplers.tempering import temper

__all__ = ["LEAST", "WANTED", "Gaussians", "PriorMean", "joined", "mean_over_prior"]

Rows = Integers
Gaussians = tuple[Array, Array]  # means (n, k, d), lower triangular factors (n, k, d, d), k of them for each x

# effective draws at which rounds end, below which tempering has a go after the last of them, and below which a mean is not trusted
WANTED, ENOUGH, LEAST = 400.0, 100.0, 50.0
_FROM_PRIOR = 0.25  # share of the first round
_WIDTHS = (1.1, 2.0)
_ROUNDS = 16
_FIT = 12.0  # effective draws that a Gaussian is fitted to, if need be with tempered weights


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorMean:
    """Mean of a ratio over the prior for n observations: log_mean (n,), nats, with error (n,); n_effective (n,) of n_draws (n,) draws."""

    log_mean: Array
    error: Array
    n_effective: Array
    n_draws: Rows

    def summary(self) -> str:
        """Return the result in words."""
        rms = float(np.sqrt((self.log_mean**2).mean()))
        return (
            f"log of the mean ratio over the prior, {len(self.log_mean)} observations: rms {rms:.3g} nats, largest"
            f" {np.abs(self.log_mean).max():.3g} (0 if the ratio is exact); Monte Carlo error at most {self.error.max():.2g},"
            f" at least {self.n_effective.min():.0f} effective draws"
        )


def mean_over_prior(
    log_ratio: Callable[[Array, Rows], Array], start: Gaussians, *, n_draws: int, seed: int, first: int = 0, wanted: float = WANTED
) -> PriorMean:
    """Mean over N(u; 0, I) of exp(log_ratio) for n observations.

    Args: log_ratio: u (m, k, d) and which observations (m,) -> log r (m, k), nats; -inf allowed. start: Gaussians near the posteriors.
    n_draws: of a round, a power of two. seed; first: number of the first observation, whose draws follow from (seed, number).
    wanted: effective draws at which an observation is done.
    Raises: ConvergenceError (fewer than `LEAST` effective draws: where the ratio has its mass was not found), DataError (r is 0).
    """
    from scipy.stats.qmc import Sobol  # takes long to import: only when used

    n, _, d = start[0].shape
    states = [_State(d, [(start[0][i], width * start[1][i]) for width in _WIDTHS]) for i in range(n)]
    todo = np.arange(n)
    for turn in range(_ROUNDS):
        unit = Sobol(d, seed=rng_for(seed, "mean ratio", turn)).random_base2(n_draws.bit_length() - 1)
        shift = np.stack([rng_for(seed, "shift", turn, first + int(i)).random(d) for i in todo])
        z = ndtri(np.clip((unit + shift[:, None]) % 1.0, 1e-12, 1 - 1e-12))
        u = np.stack([states[i].draw(z_i) for i, z_i in zip(todo, z, strict=True)])
        for i, u_i, value in zip(todo, u, log_ratio(u, todo), strict=True):
            states[i].add(u_i, value)
        todo = np.array([i for i in todo if states[i].n_effective < wanted], dtype=np.int64)
        if not len(todo):
            break
    log_w = [s.log_w for s in states]
    for i in (i for i in todo if effective_size(log_w[i]) < ENOUGH):
        other = _by_tempering(log_ratio, int(i), d, _ROUNDS * n_draws, rng_for(seed, "tempering", first + int(i)))
        log_w[i] = max(log_w[i], other, key=effective_size)
        if effective_size(log_w[i]) < LEAST:
            raise ConvergenceError(
                f"the mean of the ratio over the prior at observation {first + i}: {len(log_w[i])} draws are worth"
                f" {effective_size(log_w[i]):.1f}; expected at least {LEAST:g}: the ratio has narrow peaks that no Gaussians follow"
            )
    size, ess = np.array([len(w) for w in log_w]), np.array([effective_size(w) for w in log_w])
    return PriorMean(
        log_mean=np.array([logsumexp(w) - math.log(len(w)) for w in log_w]),
        error=np.sqrt(np.maximum(1 / ess - 1 / size, 0.0) * size / (size - 1)),
        n_effective=ess,
        n_draws=size.astype(np.int64),
    )


def _by_tempering(log_ratio: Callable[[Array, Rows], Array], i: int, dim: int, n: int, rng: np.random.Generator) -> Array:
    """Log weights (n,) of draws of a mixture that tempering finds: for peaks that a single Gaussian does not follow."""

    def log_r(u: Array) -> Array:
        return log_ratio(u[None], np.array([i]))[0]

    proposal = temper(log_r, dim, rng).proposal
    u = proposal.sample(n, rng)
    return log_r(u) + standard_normal_log_prob(u) - proposal.log_prob(u)


def joined(parts: Sequence[PriorMean]) -> PriorMean:
    """Results of parts of the observations, one after the other."""
    return PriorMean(
        log_mean=np.concatenate([p.log_mean for p in parts]),
        error=np.concatenate([p.error for p in parts]),
        n_effective=np.concatenate([p.n_effective for p in parts]),
        n_draws=np.concatenate([p.n_draws for p in parts]),
    )


class _State:
    """Draws of one observation, and the mixture that they are from."""

    def __init__(self, dim: int, start: list[tuple[Array, Array]]) -> None:
        self.dim, self.start = dim, start  # components of the first round: means (k, d) and factors (k, d, d)
        self.u = np.empty((0, dim))
        self.log_target = np.empty(0)  # log r + log N(u; 0, I)
        self.components: list[tuple[float, Array, Array]] = []  # number of draws, mean (d,), factor (d, d)
        self.log_w = np.empty(0)  # log of target over mixture
        self.n_effective = 0.0

    def draw(self, z: Array) -> Array:
        """Draws of the round (m, d) from standard normal points z (m, d)."""
        if not self.components or self.n_effective == 0:
            parts = [(np.zeros(self.dim), np.eye(self.dim))]
            parts += [(m, f) for means, factors in self.start for m, f in zip(means, factors, strict=True)]
            from_prior = int(_FROM_PRIOR * len(z))
        else:
            mean, factor = _fitted(self.u, self.log_w)
            parts, from_prior = [(mean, width * factor) for width in _WIDTHS], 0
        sizes = [len(a) for a in np.array_split(z[from_prior:], len(parts) - (from_prior > 0))]
        sizes = [from_prior, *sizes] if from_prior else sizes
        chunks = np.split(z, np.cumsum(sizes)[:-1])
        self.components += [(float(len(c)), m, f) for c, (m, f) in zip(chunks, parts, strict=True)]
        return np.concatenate([m + c @ f.T for c, (m, f) in zip(chunks, parts, strict=True)])

    def add(self, u: Array, log_ratio: Array) -> None:
        """Take in log r (m,) of draws (m, d)."""
        self.u = np.concatenate([self.u, u])
        self.log_target = np.concatenate([self.log_target, log_ratio + standard_normal_log_prob(u)])
        counts, means, factors = (np.array(part, dtype=np.float64) for part in zip(*self.components, strict=True))
        self.log_w = self.log_target - Mixture(weights=counts / counts.sum(), means=means, factors=factors).log_prob(self.u)
        self.n_effective = effective_size(self.log_w)


def _fitted(u: Array, log_w: Array) -> tuple[Array, Array]:
    """Mean (d,) and Cholesky factor (d, d) of weighted draws, the weights tempered until `_FIT` draws count."""
    log_w = np.where(np.isneginf(log_w), log_w[np.isfinite(log_w)].min() - 1e3, log_w)
    power = 1.0
    while effective_size(power * log_w) < min(_FIT, 0.5 * len(log_w)):
        power *= 0.7
    w = np.exp(power * (log_w - log_w.max()))
    w /= w.sum()
    mean = w @ u
    covariance = (u - mean).T @ ((u - mean) * w[:, None])
    scale = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    correlation = covariance / np.outer(scale, scale) + 1e-6 * np.eye(len(mean))
    return mean, scale[:, None] * np.linalg.cholesky(correlation)
