r"""Counts: validation of an observation, exact log-likelihoods and deviances of multinomial and Poisson blocks.

multinomial   log L = ln N! - sum_k ln n_k! + sum_k n_k ln p_k            deviance = 2 sum_k n_k ln(n_k / (N p_k))
Poisson       log L = sum_k (n_k ln mu_k - mu_k - ln n_k!)                deviance = 2 sum_k (n_k ln(n_k/mu_k) + mu_k - n_k)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, xlogy

from simulators.errors import CountsError

__all__ = ["CountsBlock", "CountsLayout"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CountsBlock:
    """A block of columns of x: name, first column, number of columns, and the total that is conditioned on (None: Poisson)."""

    name: str
    start: int
    size: int
    total: int | None

    @property
    def columns(self) -> slice:
        """The block's columns of x."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class CountsLayout:
    """All blocks of x, in order."""

    blocks: tuple[CountsBlock, ...]

    @property
    def size(self) -> int:
        """Number of columns of x."""
        return sum(b.size for b in self.blocks)

    def check(self, x: ArrayLike) -> Array:
        """Return x as float64 (n, k); a single observation (k,) becomes (1, k).

        Raises: CountsError for a wrong shape, NaN, negative or fractional counts, or totals that differ from those that the
        likelihood is conditioned on.
        """
        array = np.asarray(x)
        if array.dtype.kind not in "fiub":
            raise CountsError(f"x has dtype {array.dtype}; expected counts")
        array = np.atleast_2d(array.astype(np.float64))
        if array.ndim != 2 or array.shape[1] != self.size:
            blocks = " + ".join(f"{b.size} {b.name}" for b in self.blocks)
            raise CountsError(f"x has shape {np.shape(x)}; expected (n, {self.size}) or ({self.size},), that is {blocks}")
        bad = ~(array >= 0) | (array != np.floor(array)) | ~np.isfinite(array)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            block = next(b for b in self.blocks if b.start <= column < b.start + b.size)
            where = f"row {row}, column {column} ({block.name}[{column - block.start}])"
            raise CountsError(f"x has {array[row, column]:g} in {where}; expected a whole number >= 0")
        for block in self.blocks:
            if block.total is not None:
                totals = array[:, block.columns].sum(axis=1)
                wrong = np.flatnonzero(totals != block.total)
                if wrong.size:
                    raise CountsError(
                        f"x has {totals[wrong[0]]:g} events in {block.name} (row {wrong[0]}); "
                        f"expected {block.total}, the observed number that the likelihood is conditioned on"
                    )
        return array

    def log_constant(self, x: Array) -> Array:
        """Part of log L that depends on x (n, k) alone -> (n,): ln N! - sum ln n! of each block."""
        out = -gammaln(x + 1).sum(axis=1)
        return out + sum(float(gammaln(b.total + 1)) for b in self.blocks if b.total is not None)

    def log_likelihood(self, x: Array, expected: Array) -> Array:
        """Exact log-likelihood of x (n or 1, k) under expected counts (n, k), all > 0 -> (n,)."""
        out = self.log_constant(x)
        for b in self.blocks:
            mu = expected[:, b.columns]
            rate = mu if b.total is None else mu / b.total
            out = out + xlogy(x[:, b.columns], rate).sum(axis=1)
            if b.total is None:
                out = out - mu.sum(axis=1)
        return out

    def deviance(self, x: Array, expected: Array) -> Array:
        """2 (log L of the saturated model - log L) of x (n or 1, k) under expected counts (n, k), >= 0 -> (n,)."""
        out = np.zeros(expected.shape[0])
        for b in self.blocks:
            n, mu = x[:, b.columns], expected[:, b.columns]
            out = out + 2 * xlogy(n, n / mu).sum(axis=1)
            if b.total is None:
                out = out + 2 * (mu - n).sum(axis=1)
        return np.maximum(out, 0.0)

    def sample(self, expected: Array, rng: np.random.Generator) -> Array:
        """Draw counts (n, k): block after block, row after row."""
        out = np.empty(expected.shape)
        for b in self.blocks:
            mu = expected[:, b.columns]
            if b.total is None:
                out[:, b.columns] = rng.poisson(mu)
            else:
                p = mu / mu.sum(axis=1, keepdims=True)
                out[:, b.columns] = rng.multinomial(b.total, p)
        return out
