r"""Posterior predictive p-value: does the model, at its posterior, make data as extreme as the observed ones?

    p = P(T(x_rep, theta) >= T(x_obs, theta)),   theta ~ p(theta | x_obs),  x_rep ~ p(x | theta)

estimated from n pairs as (1 + #{T_rep >= T_obs}) / (n + 1), which is never 0.

Source: Gelman, Meng & Stern 1996, Statistica Sinica 6, 733 (realised discrepancies).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.core.checks import as_array, as_real
from sbi_phys.core.errors import DataError
from sbi_phys.core.figures import figures
from sbi_phys.core.types import Array, ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PredictivePValue", "predictive_pvalue"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictivePValue:
    """Result of `predictive_pvalue`: pvalue with its binomial error, and the statistics t_rep (n,), t_obs (n,) or (1,), their unit."""

    pvalue: float
    error: float
    t_rep: Array
    t_obs: Array

    @property
    def n(self) -> int:
        """Number of replicas."""
        return int(self.t_rep.size)

    def summary(self) -> str:
        """Return the result in words."""
        if self.pvalue < 0.05:
            words = "the data are more extreme than the model makes them: the model does not describe this statistic"
        elif self.pvalue > 0.95:
            words = "the data lie closer to the model than its own replicas do: errors may be overstated"
        else:
            words = "the data look like the model's own"
        return f"Posterior predictive p = {self.pvalue:.3f} +- {self.error:.3f} ({self.n} replicas): {words}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw replicas against observation: a histogram for one observed value, pairs with the diagonal otherwise."""
        return figures.calibration.predictive(self, ax)


def predictive_pvalue(t_rep: ArrayLike, t_obs: ArrayLike) -> PredictivePValue:
    r"""Posterior predictive p-value, P(T_rep >= T_obs).

    Args:
        t_rep: (n,), the statistic of replicated data, e.g. the deviance of x_rep_i at theta_i; n >= 10.
        t_obs: a number, or (n,) where the statistic depends on theta: that of the observed data at the same theta_i.

    Returns: PredictivePValue.   Raises: ShapeError, NonFiniteError, DataError.
    Source: Gelman, Meng & Stern 1996, Statistica Sinica 6, 733.
    Read: near 0 = the model fails at this statistic; it is conservative (data are used twice): 0.5 is its centre, not uniform.
    """
    replicas = as_array("t_rep", t_rep, (None,))
    if replicas.size < 10:
        raise DataError(f"t_rep has {replicas.size} values; expected at least 10 replicas")
    observed = as_real("t_obs", t_obs)
    observed = as_array("t_obs", observed.reshape(1) if observed.ndim == 0 else observed, (replicas.size if observed.ndim else 1,))
    p = float((1 + (replicas >= observed).sum()) / (replicas.size + 1))
    return PredictivePValue(pvalue=p, error=float(np.sqrt(p * (1 - p) / (replicas.size + 1))), t_rep=replicas, t_obs=observed)
