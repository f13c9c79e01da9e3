"""p-values: correction for several tests, and exact p-values from a simulated null distribution.

If the null hypothesis holds, the observed row of statistics and the B rows simulated under it are exchangeable. Any function that is
computed from all B + 1 rows in the same way is exchangeable too. `smallest_pvalue` takes the smallest of several p-values of each
row and ranks it once more among the rows, which gives one exact p-value for several dependent statistics.

Source: Phipson & Smyth 2010, arXiv:1603.05766 ((1 + #)/(B + 1)); Westfall & Young 1993 (the smallest of several, calibrated jointly);
Holm 1979, Scand. J. Stat. 6, 65.
"""

from collections.abc import Mapping

import numpy as np

from sbi_phys.core.types import Array

__all__ = ["ALPHA", "chunks", "combine", "holm", "smallest_pvalue"]
ALPHA = 0.05  # significance level of the verdicts in words; p-values do not depend on it


def holm(pvalues: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: rejecting where adjusted <= alpha keeps the family-wise error at alpha."""
    adjusted, running = {}, 0.0
    for i, (name, p) in enumerate(sorted(pvalues.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(pvalues) - i) * p))
        adjusted[name] = running
    return {name: adjusted[name] for name in pvalues}


def combine(pvalues: Mapping[str, float]) -> float:
    """One p-value for all: the smallest times their number (Bonferroni, equal to Holm's smallest), valid under any dependence."""
    return min(1.0, len(pvalues) * min(pvalues.values()))


def smallest_pvalue(observed: Array, simulated: Array, tail: float = 1.0) -> float:
    """One p-value for s statistics whose large values are extreme, exact under the null.

    Args:
        observed: (s,).
        simulated: (b, s), rows of the same statistics under the null, with the same dependence as the observed ones.
        tail: an analytic p-value. It replaces a larger p-value if no simulated row exceeds the observed one in its best statistic, about
            s/(b + 1), so that it only affects p-values too small for the simulations.

    Returns: p, never 0.
    Read: as powerful as the best statistic, apart from a correction for their number that is smaller than Bonferroni's.
    """
    rows = np.concatenate([observed[None], simulated])
    total = rows.shape[0]
    smallest = np.full(total, total, dtype=np.int64)
    for column in rows.T:
        at_least = total - np.searchsorted(np.sort(column), column, side="left")  # number of rows at least as extreme as this one
        smallest = np.minimum(smallest, at_least)
    pvalue = float((smallest <= smallest[0]).sum() / total)
    return pvalue if smallest[0] > 1 else float(np.clip(tail, 1e-300, pvalue))


def chunks(n_simulated: int, n: int, values: int = 2_000_000) -> list[int]:
    """Sizes of portions of the simulated rows, each of n numbers, so that about `values` numbers are in memory at a time."""
    size = max(1, min(n_simulated, values // n))
    return [min(size, n_simulated - start) for start in range(0, n_simulated, size)]
