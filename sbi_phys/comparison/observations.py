r"""Observations compared by their posteriors: medians and intervals side by side, and shifts between each two in standard deviations.

For observations i and j with medians m and standard deviations s of one parameter, shift_ij = (m_i - m_j) / sqrt(s_i^2 + s_j^2). If both
observations have the same true value, the errors are independent and the posteriors about normal, it is a standard normal number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.core.checks import as_matrix, check_level
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PosteriorComparison", "compare_posteriors"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PosteriorComparison(Result):
    """Result of `compare_posteriors`: K observations, d parameters in their own units.

    observations (K,). names, labels, units (d,). median, mean, sd, low, high (K, d), the last two the central interval of content `level`.
    shift (K, K, d), (median_i - median_j) / sqrt(sd_i^2 + sd_j^2), NaN where both sd are 0.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> a = np.random.default_rng(0).normal(size=(1000, 1))
    >>> found = sp.comparison.compare_posteriors({"crab": a, "vela": a + 3 * a.std(ddof=1)}, [sp.Parameter("flux", unit="Jy")])
    >>> found.shift[1, 0].round(2).tolist()  # 3 / sqrt(2)
    [2.12]
    """

    observations: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    units: tuple[str, ...]
    level: float
    median: Array
    mean: Array
    sd: Array
    low: Array
    high: Array
    shift: Array

    def rows(self) -> Rows:
        """Return the table: one row for each parameter and observation, with the largest shift to another observation."""
        j, k = (index.ravel() for index in np.indices((len(self.names), len(self.observations))))
        found: dict[str, object] = {"parameter": [self.names[i] for i in j], "observation": [self.observations[i] for i in k]}
        found |= {"unit": [self.units[i] for i in j]} if any(self.units) else {}
        found |= {name: getattr(self, name)[k, j] for name in ("median", "low", "high", "mean", "sd")}
        largest, other = self._largest()
        found |= {"largest_shift": largest[k, j], "shift_from": [self.observations[other[a, b]] for a, b in zip(k, j, strict=True)]}
        return Rows.of(found, errors={"median": ("low", "high")})

    def _largest(self) -> tuple[Array, Array]:
        """The shift (K, d) that is largest in size, and the number of the other observation."""
        size = np.abs(np.nan_to_num(self.shift))
        size[np.arange(len(size)), np.arange(len(size))] = -1
        other = size.argmax(axis=1)
        return np.take_along_axis(self.shift, other[:, None], axis=1)[:, 0], other

    def summary(self) -> str:
        """Return the result in words: for each parameter the intervals, and the two observations that differ most."""
        lines = [f"{len(self.observations)} observations, medians and {100 * self.level:.4g} % intervals"]
        pad = max(map(len, self.observations))
        for j, name in enumerate(self.names):
            unit = f" [{self.units[j]}]" if self.units[j] else ""
            a, b = np.unravel_index(int(np.argmax(np.abs(np.nan_to_num(self.shift[:, :, j])))), self.shift.shape[:2])
            largest = f"largest shift {abs(self.shift[a, b, j]):.2f} sd, between {self.observations[a]} and {self.observations[b]}"
            lines.append(f"{name}{unit}: " + (largest if a != b else "no shifts"))
            for k, observation in enumerate(self.observations):
                lines.append(f"  {observation:<{pad}}  {self.median[k, j]:.5g}  [{self.low[k, j]:.5g}, {self.high[k, j]:.5g}]")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw all intervals in one panel, in mean sd from the mean median of each parameter; `figure` draws them in units."""
        return figures.results.compared_rows(self, ax)

    def figure(self) -> "Figure":
        """Draw one panel for each parameter, in its unit.   Read: intervals that do not overlap = different."""
        return figures.results.compared_panels(self)


def compare_posteriors(posteriors: Mapping[str, ArrayLike], parameters: Sequence[Parameter], *, level: float = 0.9) -> PosteriorComparison:
    """Compare observations by draws of their posteriors.

    Args: posteriors, {name of the observation: draws (n, d)}, any number of draws; parameters (d,); level of the central intervals.
    Raises: SettingError (fewer than two), ShapeError, NonFiniteError, DataError (fewer than 2 draws).
    Read: a shift above 3 sd of independent observations = different true values; observations that share errors shift less.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> draws = np.linspace(0, 1, 101)[:, None]
    >>> found = sp.comparison.compare_posteriors({"first": draws, "second": draws}, [sp.Parameter("mass", 0, 1)])
    >>> found.median.tolist(), found.shift[0, 1].tolist()
    ([[0.5], [0.5]], [0.0])
    """
    if not isinstance(posteriors, Mapping) or len(posteriors) < 2:
        raise SettingError(f"posteriors has {len(posteriors)} entries; expected {{name: draws}} of at least two observations")
    level = check_level(level)
    names = [p.name for p in parameters]
    draws = {str(name): as_matrix(f"draws of {name}", value, len(names), names) for name, value in posteriors.items()}
    for name, theta in draws.items():
        if len(theta) < 2:
            raise DataError(f"{name} has {len(theta)} draws; expected at least 2")
    low, median, high = (
        np.array([np.quantile(theta, q, axis=0) for theta in draws.values()]) for q in ((1 - level) / 2, 0.5, (1 + level) / 2)
    )
    sd = np.array([theta.std(axis=0, ddof=1) for theta in draws.values()])
    scale = np.sqrt(sd[:, None] ** 2 + sd[None] ** 2)
    shift = np.full(scale.shape, np.nan)
    np.divide(median[:, None] - median[None], scale, out=shift, where=scale > 0)
    return PosteriorComparison(
        observations=tuple(draws),
        names=tuple(names),
        labels=tuple(f"${p.latex}$" if p.latex else p.name for p in parameters),
        units=tuple(p.unit for p in parameters),
        level=level,
        median=median,
        mean=np.array([theta.mean(axis=0) for theta in draws.values()]),
        sd=sd,
        low=low,
        high=high,
        shift=shift,
    )
