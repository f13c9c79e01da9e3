r"""Pulls of nuisance parameters and their impacts on a parameter of interest, ranked.

Impact of nu_k: the shift of psi_hat when nu_k is fixed one fitted error above or below its best value and everything else is fitted
again. For a Gaussian likelihood it is the correlation times the error of psi, V_{psi k} / sqrt(V_kk). What is left of the error of psi
with all constrained parameters fixed is the statistical part.

Source: ATLAS, arXiv:1408.7084, figure 4, and common use since.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.confidence.inputs import find_name, frozen
from sbi_phys.confidence.minimise import minimise
from sbi_phys.confidence.profile import Fit
from sbi_phys.confidence.scans import conditional
from sbi_phys.core.errors import SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Impacts", "impacts"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Impacts:
    """Ranking for parameter `name`: names of the k others, largest impact first.

    down, up (k,): shift of psi, in its unit, when nu_k moves by -1 and +1 error. pull, pull_error (k,), NaN where not constrained.
    error of psi, and `statistical`, the part of it that is left with the constrained parameters fixed.
    """

    name: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    down: Array
    up: Array
    pull: Array
    pull_error: Array
    error: float
    statistical: float

    def summary(self) -> str:
        """Return the ranking in words."""
        lines = [f"impacts on {self.name}: error {self.error:.4g}, statistical {self.statistical:.4g}"]
        pad = max(map(len, self.names))
        for i, name in enumerate(self.names):
            pull = "" if np.isnan(self.pull[i]) else f"  pull {self.pull[i]:+.2f} +- {self.pull_error[i]:.2f}"
            lines.append(f"  {name:<{pad}}  {self.down[i]:+.3g} {self.up[i]:+.3g}{pull}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw impacts as bars and pulls as points, the largest on top."""
        return figures.confidence.impacts(self, ax)


def impacts(fit: Fit, name: str) -> Impacts:
    """Impact of every other parameter on `name`, by fits with it fixed at its value -+ one Hesse error, within limits.

    Raises: SettingError (unknown, or no other parameter), ConvergenceError.
    """
    at = find_name(name, fit.names)
    others = [i for i in range(len(fit.names)) if i != at]
    if not others:
        raise SettingError(f"{name} is the only parameter; expected others that may have an impact on it")
    shifts = np.zeros((len(others), 2))
    for row, i in enumerate(others):
        for column, sign in enumerate((-1, 1)):
            moved = float(np.clip(fit.values[i] + sign * fit.errors[i], *fit.limits[i]))
            shifts[row, column] = conditional(fit, {fit.names[i]: moved})[1][at] - fit.values[at]
    order = np.argsort(-np.abs(shifts).max(axis=1), kind="stable")
    pulls = [fit.pulls.get(fit.names[others[r]], (np.nan, np.nan)) for r in order]
    return Impacts(
        name=name,
        names=tuple(fit.names[others[r]] for r in order),
        labels=tuple(fit.labels[others[r]] for r in order),
        down=frozen(shifts[order, 0]),
        up=frozen(shifts[order, 1]),
        pull=frozen([p for p, _ in pulls]),
        pull_error=frozen([w for _, w in pulls]),
        error=float(fit.errors[at]),
        statistical=_statistical(fit, at),
    )


def _statistical(fit: Fit, at: int) -> float:
    held = np.array([n in fit.constraints and i != at for i, n in enumerate(fit.names)])
    if not held.any():
        return float(fit.errors[at])
    best = minimise(fit.cost, np.array(fit.values), 0.3 * np.maximum(fit.errors, 1e-12), fit.limits, held, "the fit with nuisances fixed")
    best.hesse()
    return float(best.errors[at])
