"""Posteriors with exact answers, and the same posteriors made wrong in known ways: what tests of calibration are tested on.

    theta, x, draws, log_q, log_q_draws = oracles.gaussian(rng, dim=2, scale=0.8)

Each row is one simulation: theta (n, d) ~ prior, x (n, k) ~ p(x | theta), draws (n, l, d) of q(theta | x), and the normalised log q of
theta (n,) and of the draws (n, l). q is the exact posterior unless it is told otherwise:

    scale       width times this, about the posterior mean (for Poisson-Gamma, whose theta is positive: the normal score times this)
    shift       moved by this many posterior sd in every parameter (for Poisson-Gamma: the normal score plus this)
    like_prior  q is the prior, whatever x
    local       too narrow where x_0 is below its median, too wide elsewhere, and right on average over x

'local' is exactly right on average: q's quantile at level v is the exact posterior's at h(v) = v +- a sin(2 pi v) / (2 pi), + where q is
narrow, - where it is wide, and a = LOCAL, so that the truth's level in q has the distribution h, whose mean over the halves is uniform,
in every parameter (the copula is kept). Widths x0.7 and x1.45 about the mean, say, would not do: no widening of one half brings back the
truths beyond 2 sd that the narrow half loses, and SBC at N = 500 sees that. Central 90 % regions hold 81 and 99 %, 50 % regions 21 and 79.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammainc, gammaincc, gammainccinv, gammaincinv, gammaln, logsumexp, ndtr, ndtri
from scipy.stats import nbinom

Array = NDArray[np.float64]

LOCAL = 0.9
LOG_2PI = float(np.log(2 * np.pi))


class Pairs(NamedTuple):
    """Truths, observations, draws and log densities of one set of simulations."""

    theta: Array
    x: Array
    draws: Array
    log_prob_theta: Array
    log_prob_draws: Array


class Oracle(Protocol):
    """A model whose posterior is known; t (n, m, d) are m points for each of n observations x (n, k)."""

    dim: int

    def simulate(self, n: int, rng: np.random.Generator) -> tuple[Array, Array]: ...

    def prior_draws(self, shape: tuple[int, int], rng: np.random.Generator) -> Array: ...

    def log_prior(self, t: Array) -> Array: ...

    def posterior_draws(self, x: Array, n_draws: int, rng: np.random.Generator) -> Array: ...

    def log_posterior(self, t: Array, x: Array) -> Array: ...

    def is_low(self, x: Array) -> NDArray[np.bool_]:
        """Whether x_0 lies below its median, (n,)."""
        ...

    def stretch(self, t: Array, x: Array, scale: float, shift: float) -> Array:
        """Move points of the exact posterior to where they lie in one of another width and place."""
        ...

    def log_stretched(self, t: Array, x: Array, scale: float, shift: float) -> Array:
        """Log density of that posterior."""
        ...

    def bend(self, t: Array, x: Array, strength: Array) -> Array:
        """Move points of the exact posterior to where they lie in one that is right on average; strength (n,), > 0 is narrow."""
        ...

    def log_bent(self, t: Array, x: Array, strength: Array) -> Array:
        """Log density of that posterior."""
        ...


class _Bent:
    """Distortion of levels, v -> v + a sin(2 pi v) / (2 pi), in terms of normal scores of each marginal; d = 1 here."""

    def score(self, t: Array, x: Array) -> Array:
        """Normal scores Phi^-1(F_j(t_j | x)), shaped as t."""
        raise NotImplementedError

    def from_score(self, z: Array, x: Array) -> Array:
        raise NotImplementedError

    def log_posterior(self, t: Array, x: Array) -> Array:
        raise NotImplementedError

    def bend(self, t: Array, x: Array, strength: Array) -> Array:
        z = self.score(t, x)
        below = ndtr(-np.abs(z))  # the map is odd about 1/2: the lower half keeps all digits
        return self.from_score(np.copysign(ndtri(_moved_level(below, strength[:, None, None])), z), x)

    def log_bent(self, t: Array, x: Array, strength: Array) -> Array:
        _, slope = self._before(self.score(t, x), strength[:, None, None])
        return self.log_posterior(t, x) - np.log(slope)[..., 0]

    @staticmethod
    def _before(z: Array, strength: Array) -> tuple[Array, Array]:
        """Scores that the map takes to z, and the map's slope h' there."""
        target = ndtr(-np.abs(z))
        low, high = np.zeros_like(target), np.full_like(target, 0.5)
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = _moved_level(middle, strength) > target
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return np.copysign(ndtri(0.5 * (low + high)), z), 1 + strength * np.cos(2 * np.pi * low)


def _moved_level(v: Array, strength: Array) -> Array:
    return v + strength * np.sin(2 * np.pi * v) / (2 * np.pi)


class _Affine(_Bent):
    """Distortion t -> mean + shift sd + scale (t - mean)."""

    dim: int

    def moments(self, x: Array) -> tuple[Array, Array]:
        """Posterior mean and sd, (n, 1, d) each."""
        raise NotImplementedError

    def is_low(self, x: Array) -> NDArray[np.bool_]:
        return x[:, 0] < 0  # x_0 is symmetric about 0

    def stretch(self, t: Array, x: Array, scale: float, shift: float) -> Array:
        mean, sd = self.moments(x)
        return mean + shift * sd + scale * (t - mean)

    def log_stretched(self, t: Array, x: Array, scale: float, shift: float) -> Array:
        mean, sd = self.moments(x)
        return self.log_posterior(mean + (t - shift * sd - mean) / scale, x) - self.dim * np.log(scale)


class Gaussian(_Affine):
    r"""theta ~ N(0, I_d), x = theta + N(0, noise^2 R), R_ij = rho^|i-j|: posterior N(S N^-1 x, S), S = (I + N^-1)^-1."""

    def __init__(self, dim: int = 1, noise: float = 0.5, rho: float = 0.6) -> None:
        self.dim = dim
        lag = np.abs(np.arange(dim)[:, None] - np.arange(dim))
        self.noise = noise**2 * rho**lag
        precision = np.linalg.inv(self.noise)
        self.covariance = np.linalg.inv(np.eye(dim) + precision)
        self.gain = self.covariance @ precision
        self.root = np.linalg.cholesky(self.covariance)

    def simulate(self, n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        theta = rng.standard_normal((n, self.dim))
        return theta, theta + rng.standard_normal((n, self.dim)) @ np.linalg.cholesky(self.noise).T

    def prior_draws(self, shape: tuple[int, int], rng: np.random.Generator) -> Array:
        return rng.standard_normal((*shape, self.dim))

    def log_prior(self, t: Array) -> Array:
        return -0.5 * (t**2).sum(axis=-1) - 0.5 * self.dim * LOG_2PI

    def moments(self, x: Array) -> tuple[Array, Array]:
        mean = (x @ self.gain.T)[:, None]
        return mean, np.broadcast_to(np.sqrt(np.diag(self.covariance)), mean.shape)

    def posterior_draws(self, x: Array, n_draws: int, rng: np.random.Generator) -> Array:
        return self.moments(x)[0] + rng.standard_normal((x.shape[0], n_draws, self.dim)) @ self.root.T

    def log_posterior(self, t: Array, x: Array) -> Array:
        z = (t - self.moments(x)[0]) @ np.linalg.inv(self.root).T
        return -0.5 * (z**2).sum(axis=-1) - 0.5 * self.dim * LOG_2PI - float(np.log(np.diag(self.root)).sum())

    def score(self, t: Array, x: Array) -> Array:
        mean, sd = self.moments(x)
        return (t - mean) / sd

    def from_score(self, z: Array, x: Array) -> Array:
        mean, sd = self.moments(x)
        return mean + sd * z

    def log_bent(self, t: Array, x: Array, strength: Array) -> Array:
        after = self.score(t, x)
        before, slope = self._before(after, strength[:, None, None])
        jacobian = 0.5 * (before**2 - after**2) - np.log(slope)  # log d before / d after
        return self.log_posterior(self.from_score(before, x), x) + jacobian.sum(axis=-1)


class Bimodal(_Affine):
    r"""theta ~ N(m, 1), x = +-theta + noise N(0, 1), the sign a fair coin: two Gaussians in theta, at (noise^2 m +- x) / (1 + noise^2).

    Their weights are as N(x; +-m, 1 + noise^2), their variance noise^2 / (1 + noise^2).
    """

    dim = 1

    def __init__(self, mean: float = 0.3, noise: float = 0.3) -> None:
        self.mean, self.noise = mean, noise
        self.variance = noise**2 / (1 + noise**2)

    def simulate(self, n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        theta = self.mean + rng.standard_normal((n, 1))
        return theta, rng.choice([-1.0, 1.0], (n, 1)) * theta + self.noise * rng.standard_normal((n, 1))

    def prior_draws(self, shape: tuple[int, int], rng: np.random.Generator) -> Array:
        return self.mean + rng.standard_normal((*shape, 1))

    def log_prior(self, t: Array) -> Array:
        return -0.5 * (t[..., 0] - self.mean) ** 2 - 0.5 * LOG_2PI

    def components(self, x: Array) -> tuple[Array, Array]:
        """Weight and mean of the two Gaussians, (n, 2) each."""
        sign = np.array([-1.0, 1.0])
        plus = 1 / (1 + np.exp(-2 * self.mean * x / (1 + self.noise**2)))
        return np.concatenate([1 - plus, plus], axis=1), (self.noise**2 * self.mean + sign * x) / (1 + self.noise**2)

    def moments(self, x: Array) -> tuple[Array, Array]:
        weight, centre = self.components(x)
        mean = (weight * centre).sum(axis=1)
        variance = self.variance + (weight * centre**2).sum(axis=1) - mean**2
        return mean[:, None, None], np.sqrt(variance)[:, None, None]

    def posterior_draws(self, x: Array, n_draws: int, rng: np.random.Generator) -> Array:
        weight, centre = self.components(x)
        chosen = np.where(rng.random((x.shape[0], n_draws)) < weight[:, 1:], centre[:, 1:], centre[:, :1])
        return (chosen + np.sqrt(self.variance) * rng.standard_normal(chosen.shape))[:, :, None]

    def log_posterior(self, t: Array, x: Array) -> Array:
        weight, centre = self.components(x)
        each = -0.5 * (t - centre[:, None]) ** 2 / self.variance
        return logsumexp(each, b=weight[:, None], axis=-1) - 0.5 * np.log(2 * np.pi * self.variance)

    def _tail(self, t: Array, x: Array, sign: float) -> Array:
        weight, centre = self.components(x)
        each = ndtr(sign * (t - centre[:, None]) / np.sqrt(self.variance))
        return (weight[:, None] * each).sum(axis=-1, keepdims=True)

    def score(self, t: Array, x: Array) -> Array:
        below = self._tail(t, x, 1.0)
        return np.where(below < 0.5, ndtri(below), -ndtri(self._tail(t, x, -1.0)))

    def from_score(self, z: Array, x: Array) -> Array:
        centre = self.components(x)[1]
        reach = 10 * np.sqrt(self.variance)
        low = np.broadcast_to(centre.min(axis=1)[:, None, None] - reach, z.shape)
        high = np.broadcast_to(centre.max(axis=1)[:, None, None] + reach, z.shape)
        for _ in range(50):
            middle = 0.5 * (low + high)
            above = self.score(middle, x) > z
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return 0.5 * (low + high)


class PoissonGamma(_Bent):
    r"""theta ~ Gamma(shape, rate), x ~ Poisson(exposure theta): posterior Gamma(shape + x, rate + exposure)."""

    dim = 1

    def __init__(self, shape: float = 2.0, rate: float = 0.5, exposure: float = 4.0) -> None:
        self.shape, self.rate, self.exposure = shape, rate, exposure
        self.median = float(nbinom.median(shape, rate / (rate + exposure)))

    def simulate(self, n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        theta = rng.gamma(self.shape, 1 / self.rate, (n, 1))
        return theta, rng.poisson(self.exposure * theta).astype(np.float64)

    def prior_draws(self, shape: tuple[int, int], rng: np.random.Generator) -> Array:
        return rng.gamma(self.shape, 1 / self.rate, (*shape, 1))

    def log_prior(self, t: Array) -> Array:
        return _log_gamma_density(t[..., 0], np.asarray(self.shape), self.rate)

    def is_low(self, x: Array) -> NDArray[np.bool_]:
        return x[:, 0] < self.median

    def posterior_draws(self, x: Array, n_draws: int, rng: np.random.Generator) -> Array:
        return rng.gamma((self.shape + x)[:, :, None], 1 / (self.rate + self.exposure), (x.shape[0], n_draws, 1))

    def log_posterior(self, t: Array, x: Array) -> Array:
        return _log_gamma_density(t[..., 0], self.shape + x, self.rate + self.exposure)

    def score(self, t: Array, x: Array) -> Array:
        shape, scaled = (self.shape + x)[:, None], (self.rate + self.exposure) * t
        below = gammainc(shape, scaled)
        return np.where(below < 0.5, ndtri(below), -ndtri(gammaincc(shape, scaled)))  # the upper half keeps its digits, too

    def from_score(self, z: Array, x: Array) -> Array:
        shape = (self.shape + x)[:, None]
        return np.where(z < 0, gammaincinv(shape, ndtr(z)), gammainccinv(shape, ndtr(-z))) / (self.rate + self.exposure)

    def stretch(self, t: Array, x: Array, scale: float, shift: float) -> Array:
        return self.from_score(shift + scale * self.score(t, x), x)

    def log_stretched(self, t: Array, x: Array, scale: float, shift: float) -> Array:
        z = self.score(t, x)[..., 0]
        return self.log_posterior(t, x) + 0.5 * (z**2 - ((z - shift) / scale) ** 2) - np.log(scale)


def _log_gamma_density(t: Array, shape: Array, rate: float) -> Array:
    return shape * np.log(rate) + (shape - 1) * np.log(t) - rate * t - gammaln(shape)


def pairs(
    oracle: Oracle,
    rng: np.random.Generator,
    *,
    n: int = 500,
    n_draws: int = 100,
    scale: float = 1.0,
    shift: float = 0.0,
    like_prior: bool = False,
    local: bool = False,
) -> Pairs:
    """Simulations of an oracle with draws of its exact posterior, or of one made wrong as the module docstring says (one way at a time)."""
    theta, x = oracle.simulate(n, rng)
    at = theta[:, None]
    if like_prior:
        draws = oracle.prior_draws((n, n_draws), rng)
        return Pairs(theta, x, draws, oracle.log_prior(theta), oracle.log_prior(draws))
    draws = oracle.posterior_draws(x, n_draws, rng)
    if local:
        strength = np.where(oracle.is_low(x), LOCAL, -LOCAL)
        draws = oracle.bend(draws, x, strength)
        return Pairs(theta, x, draws, oracle.log_bent(at, x, strength)[:, 0], oracle.log_bent(draws, x, strength))
    if scale != 1 or shift != 0:
        draws = oracle.stretch(draws, x, scale, shift)
        return Pairs(theta, x, draws, oracle.log_stretched(at, x, scale, shift)[:, 0], oracle.log_stretched(draws, x, scale, shift))
    return Pairs(theta, x, draws, oracle.log_posterior(at, x)[:, 0], oracle.log_posterior(draws, x))


def gaussian(
    rng: np.random.Generator, *, n: int = 500, n_draws: int = 100, dim: int = 1,
    scale: float = 1.0, shift: float = 0.0, like_prior: bool = False, local: bool = False,
) -> Pairs:  # fmt: skip
    """Conjugate Gaussian; parameters and noise are correlated for dim > 1."""
    return pairs(Gaussian(dim), rng, n=n, n_draws=n_draws, scale=scale, shift=shift, like_prior=like_prior, local=local)


def bimodal(
    rng: np.random.Generator, *, n: int = 500, n_draws: int = 100,
    scale: float = 1.0, shift: float = 0.0, like_prior: bool = False, local: bool = False,
) -> Pairs:  # fmt: skip
    """Sign-ambiguous Gaussian, d = 1: two modes of unequal weight."""
    return pairs(Bimodal(), rng, n=n, n_draws=n_draws, scale=scale, shift=shift, like_prior=like_prior, local=local)


def poisson_gamma(
    rng: np.random.Generator, *, n: int = 500, n_draws: int = 100,
    scale: float = 1.0, shift: float = 0.0, like_prior: bool = False, local: bool = False,
) -> Pairs:  # fmt: skip
    """Counts with a conjugate prior, d = 1, theta > 0, x whole numbers."""
    return pairs(PoissonGamma(), rng, n=n, n_draws=n_draws, scale=scale, shift=shift, like_prior=like_prior, local=local)


ORACLES: Mapping[str, Callable[..., Pairs]] = {
    "Gaussian, d = 1": partial(gaussian, dim=1),
    "Gaussian, d = 2": partial(gaussian, dim=2),
    "Gaussian, d = 10": partial(gaussian, dim=10),
    "bimodal": bimodal,
    "Poisson-Gamma": poisson_gamma,
}
WRONG: Mapping[str, Mapping[str, Any]] = {
    "exact": {},
    "width x0.8": {"scale": 0.8},
    "width x1.25": {"scale": 1.25},
    "shift 0.3 sd": {"shift": 0.3},
    "prior": {"like_prior": True},
    "local": {"local": True},
}
