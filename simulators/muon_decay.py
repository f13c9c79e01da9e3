r"""The lifetime of the muon: decay times of cosmic-ray muons that stop in a detector, counted in bins over a flat background.

theta = (lifetime, n_muons, background)  ->  expected counts mu_i in the bin from t_i to t_i+1  ->  x_i ~ Poisson(mu_i)

    mu_i = n_muons [exp(-t_i / lifetime) - exp(-t_i+1 / lifetime)] + background

    log p(x | theta) = sum_i [x_i log mu_i - mu_i - log x_i!]

This is the shortest complete simulator and the example of CONTRIBUTING.md. Source: the lifetime is 2.197 us (Particle Data Group).
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sbi_phys.priors import BoxPrior, Observable, Parameter
from simulators.counts import CountsBlock, CountsLayout
from simulators.errors import require_number
from simulators.events import checked_theta

__all__ = ["MuonDecay"]

Array = NDArray[np.float64]


class MuonDecay:
    r"""Decay times of stopped muons in bins: theta = (lifetime, n_muons, background), x = counts (n_bins,).

    Priors: lifetime ~ U(1, 4) us, n_muons ~ U(100, 2000), background ~ U(1, 20) per bin.

    Args: n_bins: time bins. t_max: end of the last bin, us.   Raises: SimulatorSettingError.

    >>> import numpy as np
    >>> from simulators import MuonDecay
    >>> simulator = MuonDecay(n_bins=5)
    >>> theta = np.array([[2.2, 1000.0, 5.0]])
    >>> simulator.expected(theta).round().astype(int)
    array([[602, 246, 102,  44,  21]])
    >>> simulator.simulate(theta, np.random.default_rng(0)).shape
    (1, 5)
    """

    def __init__(self, *, n_bins: int = 20, t_max: float = 10.0) -> None:
        n_bins, t_max = int(require_number("n_bins", n_bins, 1, 10_000)), require_number("t_max", t_max, 0.1, 100)
        self.settings: dict[str, Any] = {"n_bins": n_bins, "t_max": t_max}
        self.edges = np.linspace(0, t_max, n_bins + 1)
        self.prior = BoxPrior(
            [
                Parameter("lifetime", 1.0, 4.0, "us", r"\tau"),
                Parameter("n_muons", 100.0, 2000.0, "", "N"),
                Parameter("background", 1.0, 20.0, "", "b"),
            ]
        )
        self.parameters = self.prior.parameters
        self.observables: tuple[Observable, ...] = (Observable("n", n_bins, "", "n", "counts", tuple(self.edges), "us"),)
        self.layout = CountsLayout((CountsBlock("n", 0, n_bins, None),))

    def expected(self, theta: ArrayLike) -> Array:
        """Mean of x at theta (n, 3) -> (n, n_bins).   Raises: ShapeError, NonFiniteError, SupportError of sbi_phys."""
        lifetime, n_muons, background = checked_theta(self.prior, theta).T[:, :, None]
        return -n_muons * np.diff(np.exp(-self.edges / lifetime), axis=1) + background

    def simulate(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw counts x (n, n_bins) at theta (n, 3).   Raises: as `expected`."""
        return self.layout.sample(self.expected(theta), rng)

    def log_likelihood(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """Exact log p(x | theta) (n,) of x (n_bins,) or (n, n_bins) at theta (n, 3).   Raises: CountsError, and as `expected`."""
        return self.layout.log_likelihood(self.layout.check(x), self.expected(theta))
