r"""Rows that a training leaves out since their simulation failed, and how their parameters differ from those of the others.

A network that is trained on the simulations that did not fail learns p(theta | x) for the prior

    p(theta | simulation did not fail) = p(theta) (1 - f(theta)) / integral p(theta) (1 - f(theta)) dtheta,      f the rate of failures:

the posterior changes where f depends on theta. Each parameter is tested by the two-sample Kolmogorov-Smirnov statistic of failed against
kept rows; p-values are multiplied by the number of parameters (Bonferroni), and rates are stated in tenths of the rows.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from sbi_phys.core.types import Array, Mask
from sbi_phys.store.store import Store

__all__ = ["describe_failures", "warn_of_failures"]

_ALPHA = 0.01  # of the test, after the correction
_ROWS = 1_000_000  # of a store whose parameters are compared
_NAMED = 3  # parameters that a message names
_CONSEQUENCE = "the posterior is that of p(theta | simulation did not fail)"


def describe_failures(theta: Array, failed: Mask, names: Sequence[str]) -> str:
    """How the parameters theta (n, d) of the failed rows (n,) differ from those of the others, in words."""
    from scipy.stats import ks_2samp  # takes long to import: only when used

    if not failed.any() or failed.all():
        return _CONSEQUENCE
    p = np.array([ks_2samp(theta[failed, j], theta[~failed, j], method="asymp").pvalue for j in range(len(names))]) * len(names)
    found = [int(j) for j in np.argsort(p) if p[j] < _ALPHA]
    if not found:
        return (
            f"their parameters are distributed as those of the others (smallest p = {min(1.0, float(p.min())):.2g} after correction for "
            f"{len(names)} parameters); {_CONSEQUENCE}"
        )
    words = [_where(theta[:, j], failed, names[j]) for j in found[:_NAMED]]
    first, others = words[0], [f"also {place}: {rate}" for place, rate in words[1:]]
    share = _percent(float(failed.mean()))
    return f"rows fail more often {'; '.join([f'{first[0]}: {share} of all, {first[1]}', *others])}; {_CONSEQUENCE}"


def _where(values: Array, failed: Mask, name: str) -> tuple[str, str]:
    """Where in a parameter rows fail most, and the rate there."""
    edges = np.quantile(values, np.linspace(0, 1, 11))
    tenth = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, 9)
    rates = np.bincount(tenth, failed, minlength=10) / np.maximum(np.bincount(tenth, minlength=10), 1)
    k = next((k for k in (9, 0) if rates[k] > 0.9 * rates.max()), int(rates.argmax()))
    rate = _percent(float(rates[k]))
    if k in (0, 9):
        high = k == 9
        return f"at {'high' if high else 'low'} {name}", f"{rate} in the {'highest' if high else 'lowest'} tenth"
    return f"around {name} = {(edges[k] + edges[k + 1]) / 2:.4g}", f"{rate} between {edges[k]:.4g} and {edges[k + 1]:.4g}"


def _percent(share: float) -> str:
    return f"{float(f'{100 * share:.2g}'):g} %"


def warn_of_failures(stores: Sequence[Store], names: Sequence[str], *, stacklevel: int = 2) -> None:
    """Warn with counts, and how parameters differ, if rows of the stores failed and are left out of a training."""
    n, n_failed = sum(s.n_rows for s in stores), sum(s.n_failed for s in stores)
    if not n_failed:
        return
    thetas, flags, reason = [], [], ""
    for store in stores:
        theta, status = store.theta(n_rows=_ROWS // len(stores))
        thetas.append(theta)
        flags.append(status != 0)
        if store.n_failed and not reason:
            reason = store.failures(n=1)[0].reason
    words = describe_failures(np.concatenate(thetas), np.concatenate(flags), names)
    warnings.warn(
        f"{n_failed} of {n} simulations failed and are left out of the training: {words}. First: {reason:.200}",
        RuntimeWarning,
        stacklevel=stacklevel,
    )
