"""p-values: correction for several tests, and exact p-values from a simulated null distribution.

If the null hypothesis holds, the observed row of statistics and the B rows simulated under it are exchangeable. Any function that is
computed from all B + 1 rows in the same way is exchangeable too. `smallest_pvalue` takes the smallest of several p-values of each
row and ranks it once more among the rows, which gives one exact p-value for several dependent statistics.

Source: Phipson & Smyth 2010, arXiv:1603.05766 ((1 + #)/(B + 1)); Westfall & Young 1993 (the smallest of several, calibrated jointly);
Holm 1979, Scand. J. Stat. 6, 65.
"""

import numpy as np

from sbi_phys.core.types import Array

__all__ = ["chunks", "smallest_pvalue"]


def smallest_pvalue(observed: Array, simulated: Array, tail: float = 1.0) -> float:
    """One p-value for s statistics of which large values are extreme, exact under the null.

    Args:
        observed: (s,).
        simulated: (b, s), rows of the same statistics under the null, dependent among themselves as the observed are.
        tail: an analytic p-value; it replaces a larger one where no simulated row beats the observed in its best statistic, about
            s/(b + 1), so that only the size of p-values too small for the simulations depends on it.

    Returns: p, never 0.
    Read: as powerful as the best statistic but for the price of having looked at all, which is less than Bonferroni's.
    """
    rows = np.concatenate([observed[None], simulated])
    total = rows.shape[0]
    smallest = np.full(total, total, dtype=np.int64)
    for column in rows.T:
        at_least = total - np.searchsorted(np.sort(column), column, side="left")  # how many rows are as extreme as this one
        smallest = np.minimum(smallest, at_least)
    pvalue = float((smallest <= smallest[0]).sum() / total)
    return pvalue if smallest[0] > 1 else float(np.clip(tail, 1e-300, pvalue))


def chunks(n_simulated: int, n: int, values: int = 2_000_000) -> list[int]:
    """Sizes of portions of the simulated rows, n numbers each, that keep about `values` numbers in memory at a time."""
    size = max(1, min(n_simulated, values // n))
    return [min(size, n_simulated - start) for start in range(0, n_simulated, size)]
