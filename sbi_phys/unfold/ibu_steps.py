r"""One iteration of Bayesian unfolding after the other, each with its exact derivatives.

With f = P n / (1 - phi) + b (see `response`) and r_j = N_j / f_j an iteration is n'_mu = n_mu T_mu, T_mu = (1/eps_mu) sum_j P[j, mu] r_j:
fakes and background take their share of the counts inside the Bayes sum, as one more cause, so nothing is ever subtracted from data.

Derivatives follow from dn' = T dn + n dT. With G = diag(T) - diag(n/eps) P^T diag(r/f) A, A = P / (1 - phi), q_j = r_j / (f_j (1 - phi_j)):

    data      dn'_mu/dN_j          = (G dn/dN)_{mu j}         + n_mu P[j, mu] / (eps_mu f_j)
    prior     dn'_mu/dn0_nu        = (G dn/dn0)_{mu nu}
    response  dn'_mu/dP[j, rho]    = (G dn/dP)_{mu, j rho}    + delta_{mu rho} n_mu (r_j - T_mu) / eps_mu - n_mu P[j, mu] q_j n_rho / eps_mu

The prior is a shape: it starts scaled to the counts that are left after the background, and that scale is differentiated too.
Between iterations (not after the last) the ratio n / n0 may be smoothed with a kernel: linear, so it passes through the derivatives.

Source: D'Agostini 1995, NIM A 362, 487; Jacobian in the data: Adye 2011, arXiv:1105.1160, with the efficiency in its last term.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import Array
from sbi_phys.unfold.inputs import bin_name
from sbi_phys.unfold.response import Response

__all__ = ["Iterate", "bayes_step", "iterations", "scaled_prior", "smoothing_kernel"]


MAX_ELEMENTS = 20_000_000  # of dn/dP, n_truth^2 n_reco: 160 MB
SIGNAL_FLOOR = 0.05  # share of the counts that the prior starts with at least, where background is as large as the data


class Iterate(NamedTuple):
    """counts (t,) and their derivatives by data (t, r), by the prior (t, t) and by the response (t, r, t) or None."""

    counts: Array
    by_data: Array
    by_prior: Array
    by_response: Array | None


def bayes_step(counts: Array, truth: Array, response: Response) -> Array:
    """One iteration without derivatives: counts (..., n_reco), truth (..., n_truth) -> (..., n_truth)."""
    folded = response.fold(truth)
    ratio = np.divide(counts, folded, out=np.zeros(np.broadcast_shapes(counts.shape, folded.shape)), where=folded > 0)
    return np.asarray(truth * (ratio @ response.matrix) / response.efficiency)


def smoothing_kernel(n: int, strength: float) -> Array:
    """Matrix (n, n) = (1 - s) 1 + s (1/4, 1/2, 1/4), reflected at the ends: rows sum to 1, nothing turns negative."""
    kernel = (1 - strength / 2) * np.eye(n)
    kernel += strength / 4 * (np.eye(n, k=1) + np.eye(n, k=-1))
    kernel[0, 0] += strength / 4
    kernel[-1, -1] += strength / 4
    return kernel


def _signal(counts: Array, response: Response) -> tuple[Array, float]:
    # counts above background over all bins (for a batch too), and its derivative by the number of counts
    total, background = counts.sum(axis=-1), response.background.sum()
    plain = total - background
    floor = SIGNAL_FLOOR * total
    slope = 1.0 if np.all(plain > floor) else SIGNAL_FLOOR
    return np.maximum(plain, floor), slope


def scaled_prior(counts: Array, prior: Array, response: Response) -> Array:
    """Prior shape (n_truth,) scaled to the counts (..., n_reco) above background: where the iteration starts."""
    signal, _ = _signal(counts, response)
    return np.asarray(signal[..., None] * prior / (response.fold(prior) - response.background).sum())


def iterations(counts: Array, response: Response, prior: Array, smoothing: float = 0.0, *, by_response: bool = False) -> Iterator[Iterate]:
    """Yield iterates 1, 2, ... without end.

    Args: counts (n_reco,). prior (n_truth,) > 0, any scale. smoothing, 0 to 1. by_response: dn/dP as well.
    Raises: DataError (counts where nothing can come from), SettingError (dn/dP too large for memory).
    """
    matrix, eff, real = response.matrix, response.efficiency, 1 - response.fakes
    n_reco, n_truth = matrix.shape
    a = matrix / real[:, None]
    n = scaled_prior(counts, prior, response)
    d_data, d_prior, d_resp = _start(counts, response, prior, n, by_response=by_response)
    kernel = smoothing_kernel(n_truth, smoothing)
    every = np.arange(n_truth)
    while True:
        f = a @ n + response.background
        _require_source(counts, f, response)
        inverse = np.divide(1, f, out=np.zeros(n_reco), where=f > 0)
        r = counts * inverse
        t = (r @ matrix) / eff
        causes = (n / eff)[:, None] * matrix.T
        g = -(causes * (r * inverse)) @ a
        g[every, every] += t
        d_data = g @ d_data + causes * inverse
        d_prior = g @ d_prior
        if d_resp is not None:
            d_resp = (g @ d_resp.reshape(n_truth, -1)).reshape(d_resp.shape)
            d_resp -= (causes * (r * inverse / real))[:, :, None] * n
            d_resp[every, :, every] += (n / eff)[:, None] * (r - t[:, None])
        n = n * t
        yield Iterate(n, d_data, d_prior, d_resp)
        if smoothing > 0:
            change = prior[:, None] * kernel / prior
            d_prior = change @ d_prior + np.diag(kernel @ (n / prior)) - change * (n / prior)
            n, d_data = change @ n, change @ d_data
            d_resp = None if d_resp is None else (change @ d_resp.reshape(n_truth, -1)).reshape(d_resp.shape)


def _start(counts: Array, response: Response, prior: Array, n: Array, *, by_response: bool) -> tuple[Array, Array, Array | None]:
    # derivatives of the scaled prior n = s p / sum(A p): by the counts, by p and by P
    n_reco, n_truth = response.matrix.shape
    signal, slope = _signal(counts, response)
    real = 1 - response.fakes
    reach = (1 / real) @ response.matrix
    total = reach @ prior
    by_data = np.repeat((n * slope / signal)[:, None], n_reco, axis=1)
    by_prior = signal / total * (np.eye(n_truth) - np.outer(prior, reach) / total)
    if not by_response:
        return by_data, by_prior, None
    if n_truth**2 * n_reco > MAX_ELEMENTS:
        raise SettingError(
            f"the derivative by the response has {n_truth}^2 x {n_reco} elements; expected at most {MAX_ELEMENTS}, use fewer bins"
        )
    return by_data, by_prior, -n[:, None, None] / total * (prior / real[:, None])


def _require_source(counts: Array, folded: Array, response: Response) -> None:
    orphan = np.flatnonzero((counts > 0) & (folded <= 0))
    if orphan.size:
        j = int(orphan[0])
        place = bin_name("reco", j, response.reco_edges)
        raise DataError(f"counts are {counts[j]:g} in {place}, where the response expects none: no overlap of data and simulation there")
