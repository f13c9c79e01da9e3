"""On/off counting in closed form: n_on ~ Pois(mu s + nu b), n_off ~ Pois(tau nu b); theta = (mu, nu), data (n, 2) = (n_on, n_off)."""

import numpy as np
from scipy.special import gammaln, xlogy

S, B, TAU = 15.0, 70.0, 1.0


def simulate(theta, n, rng):
    mu, nu = theta
    return np.stack([rng.poisson(mu * S + nu * B, n), rng.poisson(TAU * nu * B, n)], axis=1).astype(float)


def log_likelihood(theta, data):
    """(m, 2), (n, 2) -> (n, m)."""
    mean = np.stack([theta[:, 0] * S + theta[:, 1] * B, TAU * theta[:, 1] * B], axis=1)
    k = np.asarray(data)[:, None, :]
    return (xlogy(k, mean) - mean - gammaln(k + 1)).sum(axis=2)


def nu_hat(mu, data):
    """nu (n,) that fits best at mu: the positive root of a quadratic equation."""
    on, off = np.asarray(data).T
    s = float(np.atleast_1d(mu)[0]) * S
    # d/dnu: on b/(s + nu b) + off/nu - (1 + tau) b = 0
    a, p, c = (1 + TAU) * B**2, (1 + TAU) * B * s - (on + off) * B, -off * s
    return (-p + np.sqrt(p**2 - 4 * a * c)) / (2 * a)


def profiled(psi, data):
    """Profile log likelihood (n, m) at mu (m, 1)."""
    columns = []
    for mu in np.asarray(psi)[:, 0]:
        nu = nu_hat(mu, data)
        means = np.stack([mu * S + nu * B, TAU * nu * B], axis=1)
        columns.append((xlogy(data, means) - means - gammaln(np.asarray(data) + 1)).sum(axis=1))
    return np.stack(columns, axis=1)


def maximum(data):
    """mu_hat >= 0 (n, 1) and the log likelihood there (n,)."""
    on, off = np.asarray(data).T
    mu = np.maximum((on - off / TAU) / S, 0.0)
    nu = np.where(mu > 0, off / (TAU * B), (on + off) / ((1 + TAU) * B))
    means = np.stack([mu * S + nu * B, TAU * nu * B], axis=1)
    return mu[:, None], (xlogy(data, means) - means - gammaln(np.asarray(data) + 1)).sum(axis=1)
