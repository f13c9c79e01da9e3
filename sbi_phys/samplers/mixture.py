r"""Mixtures of Gaussians and Student t distributions as proposal densities: fitted to draws of chains, or to weighted draws.

The Student t components keep the proposal above the target in its tails (defensive mixture): without them, importance weights are
unbounded, and the walkers of a chain stick there.   Source: Hesterberg 1995, Technometrics 37, 185.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaln, logsumexp

from sbi_phys.core.types import Array

__all__ = ["Mixture", "fit_mixture"]

_TRIED = (1, 2, 4, 8, 16)  # numbers of Gaussians
_MOST = 8000  # draws used in a fit; more improve nothing
_INFLATE = 1.3  # widens the covariances: walkers stick in the target's tails less with a wider proposal
_TAIL, _WIDE = 0.25, 0.1  # weights of the heavy-tailed components
_FREEDOM = 5.0  # their degrees of freedom
_TAIL_COMPONENTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    r"""Mixture density q(u) = sum_{k < n} w_k N(u; m_k, C_k) + sum_{k >= n} w_k t_5(u; m_k, C_k): Gaussians, then Student t for the tails.

    weights (k,), which sum to 1; means (k, d); factors (k, d, d), lower triangular with C = F F^T; n_tails, the number of Student t
    distributions of 5 degrees of freedom, which come last. It is a `Proposal` of importance sampling.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> q = sp.samplers.Mixture(weights=np.array([0.5, 0.5]), means=np.array([[-3.0], [3.0]]), factors=np.ones((2, 1, 1)))
    >>> q.sample(100, np.random.default_rng(0)).shape
    (100, 1)
    >>> float(q.log_prob(np.array([[3.0]]))[0].round(3))
    -1.612
    """

    weights: Array
    means: Array
    factors: Array
    n_tails: int = 0

    @property
    def n_gaussians(self) -> int:
        """Number of Gaussians."""
        return self.weights.size - self.n_tails

    def log_prob(self, u: Array) -> Array:
        """Normalised log density (n,) of u (n, d)."""
        d, nu = u.shape[1], _FREEDOM
        terms = np.empty((u.shape[0], self.weights.size))
        for k, inverse in enumerate(np.linalg.inv(self.factors)):
            square = (((u - self.means[k]) @ inverse.T) ** 2).sum(axis=1)
            if k < self.n_gaussians:
                terms[:, k] = -0.5 * square - 0.5 * d * math.log(2 * math.pi)
            else:
                norm = gammaln((nu + d) / 2) - gammaln(nu / 2) - 0.5 * d * math.log(nu * math.pi)
                terms[:, k] = norm - 0.5 * (nu + d) * np.log1p(square / nu)
        log_det = np.log(np.abs(np.diagonal(self.factors, axis1=1, axis2=2))).sum(axis=1)
        return np.asarray(logsumexp(terms - log_det + np.log(self.weights), axis=1))

    def sample(self, n: int, rng: Any) -> Array:
        """Draw u (n, d) with a numpy Generator, or with a RandomState as emcee has it."""
        which = rng.choice(self.weights.size, size=n, p=self.weights)
        normal = rng.standard_normal((n, self.means.shape[1]))
        stretch = np.where(which < self.n_gaussians, 1.0, np.sqrt(_FREEDOM / rng.chisquare(_FREEDOM, size=n)))
        return self.means[which] + np.einsum("nij,nj->ni", self.factors[which], normal) * stretch[:, None]


def fit_mixture(parts: list[Array], rng: np.random.Generator, tails: Array | None = None) -> Mixture:
    r"""Fit a mixture to draws of several chains, parts (n_i, d) each; its tails to points `tails` (m, d) farther out (default: the draws).

    Bulk: 1 to 16 Gaussians with covariances widened by 1.3. Their number is the one which, fitted to all parts but the last, predicts the
    last part best; criteria that count draws, as BIC, would choose too many, because the draws of a chain are correlated. Tails: up to 16
    Student t fitted to `tails`, and one with twice the covariance of all draws. Walkers stick where q is far below the target density.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> q = sp.samplers.fit_mixture([rng.standard_normal((500, 2)) for _ in range(2)], rng)
    >>> q.n_gaussians >= 1 and q.means.shape == (q.weights.size, 2)
    True
    """
    share = max(_MOST // len(parts), 2)
    thin = [p[rng.permutation(p.shape[0])[:share]] for p in parts]
    every = np.concatenate(thin)
    centre, scale = every.mean(axis=0), np.where(np.ptp(every, axis=0) > 0, every.std(axis=0), 1.0)
    white = [(t - centre) / scale for t in thin]
    seed = int(rng.integers(2**31))
    bulk = _best_fit(white, seed)
    outer = np.concatenate(white) if tails is None else (tails[rng.permutation(tails.shape[0])[:_MOST]] - centre) / scale
    tail = _gaussians(outer, max(1, min(_TAIL_COMPONENTS, outer.shape[0] // (10 * (centre.size + 1)))), seed)
    wide = np.atleast_2d(np.cov(np.concatenate(white).T)) + 1e-9 * np.eye(centre.size)
    weights, means, covariances = [np.array([_WIDE])], [np.zeros((1, centre.size))], [2 * wide[None]]
    for model, weight, factor in ((tail, _TAIL, 1.0), (bulk, 1 - _TAIL - _WIDE, _INFLATE)):
        found = (
            (np.ones(1), np.zeros((1, centre.size)), wide[None]) if model is None else (model.weights_, model.means_, model.covariances_)
        )
        weights.insert(0, weight * found[0] / found[0].sum())
        means.insert(0, found[1])
        covariances.insert(0, factor * found[2])
    factors = scale[:, None] * np.linalg.cholesky(np.concatenate(covariances))
    means_ = centre + scale * np.concatenate(means)
    return Mixture(weights=np.concatenate(weights), means=means_, factors=factors, n_tails=sum(len(w) for w in weights[1:]))


def _best_fit(parts: list[Array], seed: int) -> Any:
    """Gaussians fitted to all parts, their number chosen on the last part; None if no fit succeeds."""
    train, held = (np.concatenate(parts[:-1]), parts[-1]) if len(parts) > 1 else (parts[0][::2], parts[0][1::2])
    best, best_score = 1, -math.inf
    for k in _TRIED:
        if train.shape[0] < 10 * k * (train.shape[1] + 1):
            break
        model = _gaussians(train, k, seed)
        score = -math.inf if model is None else float(model.score(held))
        if score <= best_score:
            break
        best, best_score = k, score
    return _gaussians(np.concatenate(parts), best, seed)


def _gaussians(x: Array, k: int, seed: int) -> Any:
    """Fit k Gaussians with scikit-learn; None if it finds no positive definite covariance."""
    from sklearn.exceptions import ConvergenceWarning  # imported here because it takes a second
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an unfinished fit is good enough for a proposal
        try:
            # init_params="kmeans" is not reproducible: its sums depend on the order in which threads finish
            return GaussianMixture(k, init_params="k-means++", random_state=seed, max_iter=100).fit(x)
        except ValueError:
            return None
