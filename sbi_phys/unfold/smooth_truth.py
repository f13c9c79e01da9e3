r"""The smoothest truth that describes the counts: n_mu = p_mu exp(sum_d theta_d L_d(u_mu)), Legendre in the bin number, u in [-1, 1].

A log-linear Poisson model seen through the response, fitted by Fisher scoring. A further degree must lower the deviance by 6
(2.4 sigma): AIC's 2 lets noise in, and toys drawn from a wiggly truth ask for more iterations than the data do.
"""

import numpy as np
from scipy.special import chdtrc, xlogy

from sbi_phys.core.types import Array
from sbi_phys.unfold.ibu_steps import bayes_step, scaled_prior
from sbi_phys.unfold.response import Response

__all__ = ["deviance", "smooth_truth"]


MAX_DEGREE = 7
GAIN = 6.0  # of deviance that a degree costs
LATE = 150  # iterations of Bayesian unfolding where no polynomial describes the data; fewer would hide the bias of what is tested
REFUSED = 1e-3  # p-value of the polynomial below which it does not


def deviance(counts: Array, folded: Array) -> float:
    """Poisson deviance 2 sum(f - N + N ln(N/f)), chi-square like; bins with no expectation and no counts add nothing."""
    safe = np.where(folded > 0, folded, 1.0)
    terms = folded - counts + xlogy(counts, np.where(counts > 0, counts, 1.0) / safe)
    return float(2 * terms.sum())


def smooth_truth(counts: Array, response: Response, prior: Array) -> Array:
    """Return the spectrum (n_truth,) of the best degree from 1 to 7, or a late iterate if none describes the counts (p < 0.001)."""
    u = np.linspace(-1, 1, response.n_truth)
    start = scaled_prior(counts, prior, response)
    best, best_score, best_p = start, np.inf, 0.0
    theta = np.zeros(1)
    for degree in range(1, min(MAX_DEGREE, response.n_truth - 1, response.n_reco - 1) + 1):
        basis = np.asarray(np.polynomial.legendre.legvander(u, degree), dtype=np.float64)
        theta = _fit(counts, response, start, basis, np.append(theta, 0.0))
        n = start * np.exp(basis @ theta)
        distance = deviance(counts, response.fold(n))
        score = distance + GAIN * degree
        if score < best_score:
            ndf = max(response.n_reco - degree - 1, 1)
            best, best_score, best_p = n, score, float(chdtrc(ndf, max(distance, 0.0)))
    if best_p >= REFUSED:
        return best
    n = start
    for _ in range(LATE):
        n = bayes_step(counts, n, response)
    # a bin that the data empty altogether gives toys nothing to unfold
    return np.maximum(n, 1e-6 * n.max())


def _fit(counts: Array, response: Response, start: Array, basis: Array, theta: Array) -> Array:
    a = response.matrix / (1 - response.fakes)[:, None]
    current = deviance(counts, response.fold(start * np.exp(basis @ theta)))
    for _ in range(50):
        n = start * np.exp(basis @ theta)
        f = np.maximum(response.fold(n), 1e-300)
        slope = (a * n) @ basis
        fisher = slope.T @ (slope / f[:, None])
        step = np.linalg.lstsq(fisher, slope.T @ (counts / f - 1), rcond=1e-12)[0]
        size = 1.0
        while size > 1e-4:
            trial = theta + size * step
            reached = deviance(counts, response.fold(start * np.exp(np.clip(basis @ trial, -50, 50))))
            if reached <= current + 1e-12:
                break
            size /= 2
        else:
            return theta
        theta, gain, current = trial, current - reached, reached
        if gain < 1e-8:
            break
    return theta
