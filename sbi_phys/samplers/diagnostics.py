r"""Diagnostics of Markov chains, from arrays (n_chains, n_steps, d) alone.

Autocorrelation time of one parameter, from all chains together,

    tau = 1 + 2 sum_{s=1}^{M} rho_s,   rho_s = mean over chains of <(x_t - m)(x_{t+s} - m)> / variance,

with m and the variance pooled over ALL chains and M the first lag with M >= 5 tau. Pooling matters: chains that each sit in a mode
of their own look well mixed about their own means, but stay correlated for ever about the common one, so tau shows it.

Source: Sokal 1996 and emcee (arXiv:1202.3665) for the window; Vehtari et al. 2021, arXiv:1903.08008, for rank-normalised split R-hat.
"""

import numpy as np
from scipy.special import ndtri

from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import DataError
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["autocorrelation_time", "split_r_hat"]


def _chains(chains: ArrayLike, least: int) -> Array:
    x = as_array("chains", chains, (None, None, None))
    if x.shape[0] < 1 or x.shape[1] < least or x.shape[2] < 1:
        raise DataError(f"chains has shape {x.shape}; expected (n_chains, n_steps >= {least}, d)")
    return x


def autocorrelation_time(chains: ArrayLike, *, window: float = 5.0) -> Array:
    """Integrated autocorrelation time (d,), in steps, of chains (n_chains, n_steps, d), pooled mean and variance; at least 1.

    A parameter that never moves has tau = n_steps.
    Raises: ShapeError, NonFiniteError, DataError.   Source: Sokal 1996; arXiv:1202.3665.
    Read: n_chains n_steps / tau draws are effectively independent; not trustworthy for chains shorter than 50 tau.
    """
    x = _chains(chains, 2)
    n_steps = x.shape[1]
    out = np.empty(x.shape[2])
    size = 1 << (2 * n_steps - 1).bit_length()
    for j in range(x.shape[2]):
        centred = x[:, :, j] - x[:, :, j].mean()
        variance = float((centred**2).mean())
        if variance == 0:
            out[j] = n_steps
            continue
        power = np.zeros(size // 2 + 1)
        for part in np.array_split(centred, max(1, centred.shape[0] // 16)):  # in parts: the transforms are twice as long as the chains
            power += (np.abs(np.fft.rfft(part, n=size, axis=1)) ** 2).sum(axis=0)
        rho = np.fft.irfft(power, n=size)[:n_steps] / (n_steps * x.shape[0] * variance)
        tau = 2 * np.cumsum(rho) - 1
        stop = np.flatnonzero(np.arange(n_steps) >= window * tau)
        out[j] = tau[stop[0] if stop.size else -1]
    return np.maximum(out, 1.0)


def split_r_hat(chains: ArrayLike) -> Array:
    r"""Rank-normalised split R-hat (d,), the larger of that of location and of spread (folded).

    Args: chains (n_chains, n_steps >= 4, d), independent; a third part of each may be a whole group of walkers laid end to end.
    Raises: ShapeError, NonFiniteError, DataError.   Source: Vehtari et al. 2021, arXiv:1903.08008.
    Read: 1 = chains agree with each other and with their own halves; above 1.01 they have not converged.
    """
    x = _chains(chains, 4)
    half = x.shape[1] // 2
    halves = np.concatenate([x[:, :half], x[:, x.shape[1] - half :]])
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    return np.maximum(_r_hat(_normal_scores(halves)), _r_hat(_normal_scores(folded)))


def _normal_scores(x: Array) -> Array:
    from scipy.stats import rankdata  # scipy.stats takes longer to import than all the rest: only when used

    rank = rankdata(x.reshape(-1, x.shape[2]), axis=0)
    return ndtri((rank - 0.375) / (rank.shape[0] + 0.25)).reshape(x.shape)


def _r_hat(x: Array) -> Array:
    n = x.shape[1]
    within = x.var(axis=1, ddof=1).mean(axis=0)
    between = x.mean(axis=1).var(axis=0, ddof=1)
    # chains that never move have no variance within: equal ones agree (1), different ones never will (inf)
    ratio = np.divide(between, within, out=np.where(between > 0, np.inf, 1 / n), where=within > 0)
    return np.sqrt((n - 1) / n + ratio)
