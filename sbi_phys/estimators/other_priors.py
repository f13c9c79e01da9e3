r"""Parameters that come from another distribution than the prior: in training, and at inference.

Training. theta_i drawn from a proposal pi~ instead of the prior pi train the posterior under pi~. With weights

    w_i = pi(theta_i) / pi~(theta_i)

the expected loss is that of draws of the prior. Without a proposal, theta are tested against the prior: u = prior.to_unbounded(theta) are
independent standard normals for draws of it. The largest distance of each column's empirical distribution from Phi has Kolmogorov's
limit law, with Stephens' finite-n factor sqrt(n) + 0.12 + 0.11 / sqrt(n); the correlation r of two columns has
atanh(r) sqrt(n - 3) ~ N(0, 1). The smallest of all p-values times their number is compared with 1e-6: a false alarm once in a million
trainings.

Inference. The posterior under another prior pi' follows from that under pi by the weights pi'(theta) / pi(theta) of its draws, as long as
pi' has no mass outside pi. Their effective number and the shape k of their tail say whether the draws suffice.

Source: Stephens 1970, JRSS B 32, 115 (the factor); Vehtari et al., arXiv:1507.02646 (k).
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from scipy.special import kolmogorov, log_ndtr, ndtr
from scipy.special import logsumexp as log_sum

from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import ConvergenceError, DataError, SettingError, SimulatorMismatchError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.priors import Prior
from sbi_phys.samplers.importance import effective_size, pareto_smooth, resample_indices

__all__ = [
    "LEVEL", "Density", "MixedPriors", "as_theta", "independent_normals", "prior_weights", "require_within", "reweighted",
    "warn_unlike_prior",
]  # fmt: skip

LEVEL = 1e-6
_DRAWS = 4096  # of a prior, that its support is compared on
_POOR = 0.05  # share of effective simulations below which the weights are warned of
_OVERSAMPLE, _TRIES = 1.5, 40  # effective draws per draw returned, most draws per draw returned


class Density(Protocol):
    """A density of theta: `log_prob(theta (n, d)) -> (n,)`, up to a constant. Every `Prior` is one."""

    def log_prob(self, theta: Array) -> Array:
        """Log density (n,)."""
        ...


class MixedPriors:
    """Density of rows of several stores together, sum_i n_i pi_i / n."""

    def __init__(self, priors: Sequence[Prior], rows: Sequence[int]) -> None:
        self.priors, self.shares = tuple(priors), np.log(np.asarray(rows, dtype=np.float64) / sum(rows))

    def log_prob(self, theta: Array) -> Array:
        """Log density (n,)."""
        return np.asarray(log_sum([p.log_prob(theta) + s for p, s in zip(self.priors, self.shares, strict=True)], axis=0))


def warn_unlike_prior(prior: Prior, theta: Array) -> None:
    """Warn if theta (n, d), within the support, do not look like independent draws of the prior, with the number that shows it."""
    pvalue, words = independent_normals(prior.to_unbounded(theta))
    if pvalue >= LEVEL:
        return
    names = _column_names(prior)
    warnings.warn(
        f"theta do not look like draws of the prior: of n = {len(theta)}, {words.format(*names)} (p = {pvalue:.1g}); the posterior will be"
        " that for the distribution of theta. Expected draws of the prior, or fit(..., proposal=...) with the density that they are from",
        UserWarning,
        stacklevel=4,
    )


def _column_names(prior: Prior) -> list[str]:
    """Names of the columns of u: those of theta where they are as many."""
    return list(prior.names) if prior.free_dim == prior.dim else [f"u{k}" for k in range(prior.free_dim)]


def independent_normals(u: Array) -> tuple[float, str]:
    """p-value of independent standard normals u (n, d), the smallest of all tests times their number, and what it found.

    The words have places {k} for the names of the columns.
    """
    n, d = u.shape
    number = d + d * (d - 1) // 2
    found: list[tuple[float, str]] = []
    after = np.arange(1, n + 1) / n
    for k in range(d):
        cdf = ndtr(np.sort(u[:, k]))
        distance = float(max((after - cdf).max(), (cdf - after + 1 / n).max()))
        pvalue = float(kolmogorov(distance * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))))
        found.append((pvalue, f"the distribution of {{{k}}} is off by {distance:.3f}"))
    if n > 3 and d > 1 and (u.std(axis=0) > 0).all():
        r = np.atleast_2d(np.corrcoef(u.T))
        for i, j in itertools.combinations(range(d), 2):
            z = math.atanh(min(abs(float(r[i, j])), 1 - 1e-12)) * math.sqrt(n - 3)
            found.append((2 * math.exp(float(log_ndtr(-z))), f"{{{i}}} and {{{j}}} have the correlation {r[i, j]:.3f}"))
    pvalue, words = min(found)
    return min(1.0, number * pvalue), words


def prior_weights(prior: Prior, proposal: Density, theta: Array) -> Array | None:
    """Weights pi / pi~ (n,) of theta (n, d) drawn from the proposal, of mean one; None where all are equal.

    A proposal that leaves part of the prior empty, or weights worth few simulations, are warned of.
    Raises: SettingError (no log_prob), SimulatorMismatchError (other parameters), DataError (no density at a theta).
    """
    if not callable(getattr(proposal, "log_prob", None)):
        raise SettingError(f"proposal is a {type(proposal).__name__}; expected a prior, or an object with log_prob(theta) -> (n,)")
    if isinstance(proposal, Prior) and proposal.names != prior.names:
        raise SimulatorMismatchError(f"proposal has parameters {proposal.names}; expected those of the prior, {prior.names}")
    log_q = as_array("proposal.log_prob(theta)", proposal.log_prob(theta), (len(theta),), finite=False)
    bad = ~np.isfinite(log_q)
    if bad.any():
        row = int(np.argmax(bad))
        where = dict(zip(prior.names, theta[row].tolist(), strict=True))
        raise DataError(
            f"the proposal has log density {log_q[row]} at {int(bad.sum())} of {len(theta)} theta, the first is row {row}: {where};"
            " expected a finite number at every theta that was drawn from it"
        )
    log_w = prior.log_prob(theta) - log_q
    if np.ptp(log_w) < 1e-9:
        return None
    if isinstance(proposal, Prior | MixedPriors):
        draws = prior.sample(_DRAWS, rng_for(0, "support"))
        empty = float(np.isneginf(proposal.log_prob(draws)).mean())
        if empty > 0:
            _warn(
                f"the proposal leaves {empty:.1%} of the prior without simulations, where nothing is learned; expected one that covers it"
            )
    ess = effective_size(log_w)
    if ess < _POOR * len(theta):
        _warn(f"the weights prior / proposal are worth {ess:.0f} of {len(theta)} simulations; expected a proposal nearer to the prior")
    return np.exp(log_w - log_sum(log_w) + math.log(len(theta)))


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)


def require_within(prior: Prior, other: Any) -> Prior:
    """Return `other`, a prior of the same parameters without mass outside `prior`, where nothing was learned.

    Raises: SettingError, SimulatorMismatchError, SupportError (by 4096 draws).
    """
    if not isinstance(other, Prior):
        raise SettingError(f"prior is a {type(other).__name__}; expected a prior, e.g. BoxPrior([Parameter(...)])")
    if other.names != prior.names:
        raise SimulatorMismatchError(f"prior has parameters {other.names}; expected those of the training, {prior.names}")
    draws = other.sample(_DRAWS, rng_for(0, "support"))
    outside = ~prior.contains(draws)
    if outside.any():
        row = draws[int(np.argmax(outside))]
        raise SupportError(
            f"prior has {outside.mean():.2%} of its mass outside the prior of the training, as {prior._explain(row)}; expected none:"
            " nothing was learned there"
        )
    return other


def reweighted(
    draw: Callable[[int, int], Array], prior: Prior, other: Prior, n: int, *, seed: int
) -> tuple[Array, Array, float, float, float]:
    """Draws (n, d) of the posterior under `other` from draws under `prior`.

    Args: draw: (number, round) -> theta (number, d), draws under `prior`.
    Returns: theta, log weights (n,), and of all weights the effective number, Pareto k and the log of their mean, which is the log ratio
    of the evidences under the two priors.
    Raises: ConvergenceError (fewer than n effective draws out of 40 n, or k >= 0.7), DataError (no draw in the support).
    """
    size = max(1000, math.ceil(2 * n))
    parts: list[Array] = []
    logs: list[Array] = []
    ess = 0.0
    while ess < _OVERSAMPLE * n and sum(map(len, parts)) < max(_TRIES * n, 20_000):
        theta = draw(size, len(parts))
        parts.append(theta)
        logs.append(other.log_prob(theta) - prior.log_prob(theta))
        ess = effective_size(np.concatenate(logs))
    theta, log_w = np.concatenate(parts), np.concatenate(logs)
    inside = np.isfinite(log_w)
    if not inside.any():
        raise DataError(f"none of {len(theta)} draws of the posterior lie in the support of the other prior; expected some of them")
    k = pareto_smooth(log_w[inside])[1]
    if ess < n or k >= 0.7:
        raise ConvergenceError(
            f"the posterior under the other prior did not converge: {len(theta)} draws are worth {ess:.0f}, Pareto k {k:.2f}; expected at"
            f" least {n} and k < 0.7: fewer draws, a prior nearer to that of the training, or a training with this prior"
        )
    rows: Integers = resample_indices(np.exp(log_w - log_w.max()), n, rng_for(seed, "other prior"))
    return theta[rows], log_w[rows], ess, k, float(log_sum(log_w)) - math.log(len(log_w))


def as_theta(prior: Prior, theta: ArrayLike) -> Array | None:
    """theta (n, d) as a matrix; None where `fit` will refuse it."""
    array = np.asarray(theta.detach().cpu() if hasattr(theta, "detach") else theta, dtype=np.float64)
    if array.ndim == 1 and prior.dim == 1:
        array = array[:, None]
    good = array.ndim == 2 and array.shape[1] == prior.dim and len(array) > 0 and np.isfinite(array).all()
    return array if good and prior.contains(array).all() else None
