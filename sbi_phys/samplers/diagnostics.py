r"""Convergence of Markov chains: diagnostics of arrays (n_chains, n_steps, d), and the loop that runs chains until they have converged.

Autocorrelation time of one parameter, from all chains together,

    tau = 1 + 2 sum_{s=1}^{M} rho_s,   rho_s = mean over chains of <(x_t - m)(x_{t+s} - m)> / variance,

with m and the variance pooled over ALL chains, and M the first lag with M >= 5 tau. The pooling matters: chains that each stay in a mode
of their own look well mixed about their own means, but remain correlated about the common mean, so that tau becomes large.

Chains have converged if they are longer than 50 tau, hold as many effectively independent draws (chains x steps / tau) as were asked for,
and have a split R-hat of at most 1.01 (`judge`). `run_until_converged` lengthens them until they have, or up to a number of steps.

Source: Sokal 1996 and emcee (arXiv:1202.3665) for the window; Vehtari et al. 2021, arXiv:1903.08008, for rank-normalised split R-hat.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.special import ndtri

from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import ConvergenceError, DataError
from sbi_phys.core.progress import Task
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["Verdict", "autocorrelation_time", "judge", "require_converged", "run_until_converged", "split_r_hat", "thinned"]

LENGTH_IN_TAU = 50
R_HAT_MAX = 1.01


def _chains(chains: ArrayLike, least: int) -> Array:
    x = as_array("chains", chains, (None, None, None))
    if x.shape[0] < 1 or x.shape[1] < least or x.shape[2] < 1:
        raise DataError(f"chains has shape {x.shape}; expected (n_chains, n_steps >= {least}, d)")
    return x


def autocorrelation_time(chains: ArrayLike, *, window: float = 5.0) -> Array:
    """Integrated autocorrelation time (d,), in steps, of chains (n_chains, n_steps, d), pooled mean and variance; at least 1.

    A parameter that never moves has tau = n_steps.
    Raises: ShapeError, NonFiniteError, DataError.   Source: Sokal 1996; arXiv:1202.3665.
    Read: n_chains n_steps / tau draws are effectively independent; not reliable for chains shorter than 50 tau.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> draws = np.random.default_rng(0).standard_normal((4, 500, 1))
    >>> bool(sp.samplers.autocorrelation_time(draws)[0] < 1.5)
    True
    >>> bool(sp.samplers.autocorrelation_time(draws.repeat(3, axis=1))[0] > 2.5)
    True
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
        for part in np.array_split(
            centred, max(1, centred.shape[0] // 16)
        ):  # in parts, to bound the memory: the transforms are twice as long as the chains
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

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> chains = np.random.default_rng(0).standard_normal((4, 500, 1))
    >>> bool(sp.samplers.split_r_hat(chains)[0] < 1.02)
    True
    >>> bool(sp.samplers.split_r_hat(chains + np.arange(4)[:, None, None])[0] > 1.5)
    True
    """
    x = _chains(chains, 4)
    half = x.shape[1] // 2
    halves = np.concatenate([x[:, :half], x[:, x.shape[1] - half :]])
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    return np.maximum(_r_hat(_normal_scores(halves)), _r_hat(_normal_scores(folded)))


def _normal_scores(x: Array) -> Array:
    from scipy.stats import rankdata  # imported here because scipy.stats takes long

    rank = rankdata(x.reshape(-1, x.shape[2]), axis=0)
    return ndtri((rank - 0.375) / (rank.shape[0] + 0.25)).reshape(x.shape)


def _r_hat(x: Array) -> Array:
    n = x.shape[1]
    within = x.var(axis=1, ddof=1).mean(axis=0)
    between = x.mean(axis=1).var(axis=0, ddof=1)
    # chains that never move have no variance within: R-hat is 1 if they are equal, inf if not
    ratio = np.divide(between, within, out=np.where(between > 0, np.inf, 1 / n), where=within > 0)
    return np.sqrt((n - 1) / n + ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the criteria of convergence say of chains.

    autocorr_time (d,), steps. r_hat (d,). n_effective, chains x steps / largest tau. n_needed, steps of a chain that would suffice.
    converged. message, the numbers in words.
    """

    autocorr_time: Array
    r_hat: Array
    n_effective: float
    n_needed: float
    converged: bool
    message: str


AnyVerdict = TypeVar("AnyVerdict", bound=Verdict)


def judge(chains: Array, n_draws: int, r_hat: Array, between: str) -> Verdict:
    """Apply the criteria to chains (n_chains, n_steps, d) that shall hold n_draws independent draws.

    Args: r_hat (d,), between chains or groups of chains, whose name `between` is.
    """
    n_chains, n_steps, _ = chains.shape
    tau = autocorrelation_time(chains)
    longest = float(tau.max())
    n_effective = n_chains * n_steps / longest
    needed = max(LENGTH_IN_TAU * longest, n_draws * longest / n_chains)
    text = (
        f"{n_steps} steps are {n_steps / longest:.0f} tau (tau = {longest:.1f}, {LENGTH_IN_TAU} tau wanted),"
        f" {n_effective:.0f} effective draws ({n_draws} wanted), R-hat {r_hat.max():.4f} between {between} (<= {R_HAT_MAX})"
    )
    good = bool(n_steps >= needed and r_hat.max() <= R_HAT_MAX)
    return Verdict(autocorr_time=tau, r_hat=r_hat, n_effective=n_effective, n_needed=needed, converged=good, message=text)


def run_until_converged(
    advance: Callable[[int], None], verdict: Callable[[], AnyVerdict], task: Task, *, first: int, max_steps: int, piece: int = 20
) -> AnyVerdict:
    """Lengthen chains until they have converged -> the last verdict.

    Args: advance(n) makes n more steps. verdict() judges all steps so far. task shows the progress. first: steps before the first verdict.
    max_steps: most steps. piece: steps of one call of `advance`, so that the progress moves and Ctrl-C takes effect.
    """
    done, target = 0, min(first, max_steps)
    while True:
        while done < target:
            n = min(piece, target - done)
            advance(n)
            done += n
            task.update(0.99 * done / target, text=f"{done} of about {target} steps")
        found = verdict()
        if found.converged or done >= max_steps:
            task.update(1.0, text=f"{done} steps, tau {found.autocorr_time.max():.1f}, R-hat {found.r_hat.max():.3f}")
            return found
        longer = 1.1 * found.n_needed if done <= found.n_needed else 1.5 * done
        # short chains underestimate tau, and a small gain is not worth a verdict: between 1.3 and 3 times as long
        target = min(math.ceil(min(max(longer, 1.3 * done), 3 * done)), max_steps)


def require_converged(name: str, verdict: Verdict, max_steps: int) -> None:
    """Raise ConvergenceError with the numbers unless the chains have converged."""
    if not verdict.converged:
        raise ConvergenceError(f"{name} did not converge: {verdict.message}; expected convergence within max_steps = {max_steps}")


def thinned(chains: Array, log_prob: Array, n_draws: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draws (n, d) of chains (n_chains, n_steps, d), thinned to n_draws at most and in random order, with their log_prob (n,)."""
    n_chains, n_steps, dim = chains.shape
    thin = max(1, n_steps // math.ceil(n_draws / n_chains))
    x, values = chains[:, thin - 1 :: thin].reshape(-1, dim), log_prob[:, thin - 1 :: thin].reshape(-1)
    order = rng.permutation(x.shape[0])[:n_draws]
    return x[order], values[order]
