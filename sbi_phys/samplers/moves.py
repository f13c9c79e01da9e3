r"""Moves of an ensemble sampler in emcee's interface: local ones, and independent draws from a mixture fitted beforehand.

Local: a walker x moves with the help of walkers z, z1, z2 of the other half of the ensemble, which stand still meanwhile:

- differential evolution: x' = x + g (z1 - z2), g = 2.38 / sqrt(2 d), the best scale for a Gaussian;
- mode jump: the same with g = 1, which carries a walker from one mode to the matching place of another;
- snooker: along the line through z, x' = x + 1.7 e (e . (z1 - z2)), e = (x - z) / |x - z|, accepted with the Jacobian
  of radial moves, (|x' - z| / |x - z|)^(d - 1);
- stretch: x' = z + s (x - z), affine-invariant.

The snooker move is written here because that of emcee 3.1.6 leaves the wrong distribution behind: it divides by sqrt(|x - z|)
and takes half of the Jacobian's exponent (on a standard normal in 8 dimensions E[x^2] comes out as 0.63 instead of 1; put right in
emcee's repository, pull request 531, after that release).

Independent: x' is drawn from a fixed density q whatever x is, and accepted with probability min(1, p(x') q(x) / (p(x) q(x'))), Hastings'
rule, so p stays as it is for any q. How good q is decides only how often x' is accepted: on curved posteriors, where straight
local steps crawl, a mixture of Gaussians that follows the curve cuts the autocorrelation time by an order of magnitude.

Source: ter Braak & Vrugt 2008, Stat. Comput. 18, 435; Nelson et al. 2014, arXiv:1311.5229; Goodman & Weare 2010; independence
sampler: Tierney 1994, Ann. Statist. 22, 1701; defensive component: Hesterberg 1995, Technometrics 37, 185.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaln, logsumexp

from sbi_phys.core.errors import SettingError
from sbi_phys.core.types import Array, Integers, Mask

__all__ = ["Independence", "Mixture", "default_moves", "fit_mixture", "in_groups", "snooker_proposal"]


_TRIED = (1, 2, 4, 8, 16)  # numbers of components
_MOST = 8000  # draws that a fit uses: more take longer and no longer help
_INFLATE = 1.3  # a proposal wider than its target makes walkers stick in tails less than one that is as wide
_TAIL, _WIDE = 0.25, 0.1  # weights of the heavy-tailed components
_FREEDOM = 5.0  # their degrees of freedom
_TAIL_COMPONENTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    r"""q(u) = sum_{k < n} w_k N(u; m_k, C_k) + sum_{k >= n} w_k t_5(u; m_k, C_k): Gaussians for the bulk, then Student t for the tails.

    weights (k,); means (k, d); factors (k, d, d), lower Cholesky factors of the C; n_components, the number n of Gaussians.
    """

    weights: Array
    means: Array
    factors: Array
    n_components: int

    def log_prob(self, u: Array) -> Array:
        """Normalised log density (n,) of u (n, d)."""
        d, nu = u.shape[1], _FREEDOM
        terms = np.empty((u.shape[0], self.weights.size))
        for k, inverse in enumerate(np.linalg.inv(self.factors)):
            square = (((u - self.means[k]) @ inverse.T) ** 2).sum(axis=1)
            if k < self.n_components:
                terms[:, k] = -0.5 * square - 0.5 * d * math.log(2 * math.pi)
            else:
                norm = gammaln((nu + d) / 2) - gammaln(nu / 2) - 0.5 * d * math.log(nu * math.pi)
                terms[:, k] = norm - 0.5 * (nu + d) * np.log1p(square / nu)
        log_det = np.log(np.diagonal(self.factors, axis1=1, axis2=2)).sum(axis=1)
        return np.asarray(logsumexp(terms - log_det + np.log(self.weights), axis=1))

    def sample(self, n: int, random: Any) -> Array:
        """Draw (n, d) with a numpy RandomState, emcee's kind of generator."""
        which = random.choice(self.weights.size, size=n, p=self.weights)
        normal = random.standard_normal((n, self.means.shape[1]))
        stretch = np.where(which < self.n_components, 1.0, np.sqrt(_FREEDOM / random.chisquare(_FREEDOM, size=n)))
        return self.means[which] + np.einsum("nij,nj->ni", self.factors[which], normal) * stretch[:, None]


def fit_mixture(parts: list[Array], rng: np.random.Generator, tails: Array | None = None) -> Mixture:
    r"""Fit a mixture to draws of several chains, parts (n_i, d) each, and to `tails` (m, d), places farther out (default: the draws).

    Bulk: 1 to 16 Gaussians, as many as, fitted to all parts but the last, predict the last best: draws of a chain are correlated, so
    criteria that count draws (BIC) take too many. Covariances are widened by 1.3. Tails: up to 16 Student t around `tails`, and one
    with twice the covariance of all draws: where q is far below the target, walkers stick, and a target's tails may be curved too.
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
    return Mixture(weights=np.concatenate(weights), means=means_, factors=factors, n_components=weights[0].size)


def _best_fit(parts: list[Array], seed: int) -> Any:
    """Gaussians fitted to all parts, their number chosen on the last; None if none can be fitted."""
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
    """Fit k Gaussians with scikit-learn; None where it finds no positive definite covariance."""
    from sklearn.exceptions import ConvergenceWarning  # scikit-learn takes a second to import: only when used
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # any fit will do, and a better one only takes longer
        try:
            # not init_params="kmeans", whose sums depend on the order in which threads finish
            return GaussianMixture(k, init_params="k-means++", random_state=seed, max_iter=100).fit(x)
        except ValueError:
            return None


def snooker_proposal(x: Array, others: Array, rng: Any, gamma: float = 1.7) -> tuple[Array, Array]:
    """Propose along the lines through other walkers -> (x' (n, d), log acceptance factor (n,)).

    Args: x (n, d). others (m >= 3, d). rng: a numpy RandomState, emcee's.   Source: ter Braak & Vrugt 2008.
    """
    # three different helpers each: sort keys of a random matrix, first three places
    picks = np.argsort(rng.rand(x.shape[0], others.shape[0]), axis=1)[:, :3]
    z, z1, z2 = others[picks[:, 0]], others[picks[:, 1]], others[picks[:, 2]]
    away = x - z
    distance = np.maximum(np.linalg.norm(away, axis=1), 1e-300)
    direction = away / distance[:, None]
    moved = x + gamma * direction * ((z1 - z2) * direction).sum(axis=1, keepdims=True)
    after = np.maximum(np.linalg.norm(moved - z, axis=1), 1e-300)
    return moved, (x.shape[1] - 1.0) * (np.log(after) - np.log(distance))


def default_moves() -> list[tuple[Any, float]]:
    """Return emcee moves with their probabilities: 0.65 differential evolution, 0.1 mode jump, 0.1 snooker, 0.15 stretch."""
    from emcee import moves

    class Snooker(moves.RedBlueMove):
        """Snooker move with two halves (vectorised)."""

        def get_proposal(self, sample: Array, complement: list[Array], random: Any) -> tuple[Array, Array]:
            """Propose for one half from the other."""
            return snooker_proposal(sample, np.concatenate(complement), random)

    return [(moves.DEMove(), 0.65), (moves.DEMove(gamma0=1.0), 0.1), (Snooker(), 0.1), (moves.StretchMove(), 0.15)]


def in_groups(move: Any, group: Integers) -> Any:
    """Return an emcee move that works within groups of walkers, group (n_walkers,), and asks for all their densities at once.

    Each group is split into halves of its own, and a walker is helped by its own group only, so groups stay independent chains;
    one call for all groups instead of one each is several times faster where a call costs more than a row.
    A move without helpers (MHMove, Independence) is returned as it is.   Raises: SettingError for any other.
    """
    from emcee import State, moves

    if isinstance(move, moves.MHMove | Independence):
        return move
    if not isinstance(move, moves.RedBlueMove):
        raise SettingError(f"moves has {move!r}; expected emcee's RedBlueMove or MHMove, or a class derived from them")
    members = [np.flatnonzero(group == g) for g in np.unique(group)]

    class InGroups(moves.Move):
        """The move with its halves taken within groups."""

        def propose(self, model: Any, state: Any) -> tuple[Any, Mask]:
            """Move the first halves of all groups, then the second ones."""
            accepted = np.zeros(group.size, dtype=bool)
            move.setup(state.coords)
            halves = [np.array_split(model.random.permutation(m), 2) for m in members]
            for first in (0, 1):
                made = [move.get_proposal(state.coords[h[first]], [state.coords[h[1 - first]]], model.random) for h in halves]
                rows, factor = np.concatenate([h[first] for h in halves]), np.concatenate([f for _, f in made])
                order = np.argsort(rows)  # emcee updates with a mask, in the order of walkers
                rows, moved = rows[order], np.concatenate([q for q, _ in made])[order]
                values, blobs = model.compute_log_prob_fn(moved)
                log_ratio = factor[order] + values - state.log_prob[rows]
                accepted[rows] = np.log(model.random.rand(rows.size)) < log_ratio
                mask = np.zeros(group.size, dtype=bool)
                mask[rows] = True
                state = self.update(state, State(moved, log_prob=values, blobs=blobs), accepted, mask)
            return state, accepted

    return InGroups()


class Independence:
    """Metropolis-Hastings move whose proposals are draws of a fixed mixture, wherever the walker stands; counts what it does.

    The mixture never changes, so the chain is Markov with the target as its stationary distribution.   Source: Tierney 1994.
    """

    def __init__(self, mixture: Mixture) -> None:
        """Take the mixture."""
        from emcee import moves

        self.mixture, self.n_tried, self.n_accepted = mixture, 0, 0
        self._rule = moves.MHMove(self.proposal)

    def proposal(self, x: Array, random: Any) -> tuple[Array, Array]:
        """Propose from x (n, d) -> (x' (n, d), log q(x) - log q(x') (n,))."""
        moved = self.mixture.sample(x.shape[0], random)
        log_q = self.mixture.log_prob(np.concatenate([x, moved]))
        return moved, log_q[: x.shape[0]] - log_q[x.shape[0] :]

    def propose(self, model: Any, state: Any) -> tuple[Any, Mask]:
        """Move all walkers at once (emcee calls this) -> (state, accepted (n,))."""
        state, accepted = self._rule.propose(model, state)
        self.n_tried, self.n_accepted = self.n_tried + accepted.size, self.n_accepted + int(accepted.sum())
        return state, accepted

    def tune(self, state: Any, accepted: Mask) -> None:
        """Change nothing: emcee offers every move to learn from its steps, and this one must not."""
