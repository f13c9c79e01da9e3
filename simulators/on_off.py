r"""On/off counting: a signal over a background that is measured in a second region.

    n_on ~ Pois(mu s + nu b),    n_off ~ Pois(tau nu b),    mu >= 0 the signal strength, nu the background's

The profile likelihood ratio has a closed form. With S = mu s and B = nu b, the background that maximises L at a given mu solves
(1 + tau) B^2 + ((1 + tau) S - n - m) B - m S = 0 for n_on = n, n_off = m; the best fit with mu >= 0 is B = m / tau, S = n - m / tau,
or S = 0 and B = (n + m) / (1 + tau) where n < m / tau.

At mu = 0 half of the experiments have their best fit on the boundary, and the ratio is not chi-square distributed, which makes this a
test case for confidence sets. The defaults s = 15, b = 70, tau = 1 are those of arXiv:2107.03920.

Source: Li & Ma 1983, ApJ 272, 317; Rolke, Lopez & Conrad 2005, arXiv:physics/0403059.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sbi_phys.priors import BoxPrior, Observable, Parameter
from simulators.counts import CountsBlock, CountsLayout
from simulators.errors import CountsError, require_number, require_range
from simulators.events import checked_theta, poisson_log_pmf

__all__ = ["OnOff"]

Array = NDArray[np.float64]
_LAYOUT = CountsLayout((CountsBlock("n_on", 0, 1, None), CountsBlock("n_off", 1, 1, None)))


class OnOff:
    """On/off counting experiment: theta = (mu, nu), x = (n_on, n_off) events.

    Priors: mu ~ U(0, mu_max), nu ~ U(nu_range).

    Args: s, b: expected signal and background in the on region at mu = nu = 1, events. tau: exposure of the off region over the
    on region's. mu_max, nu_range: ends of the priors, dimensionless.   Raises: SimulatorSettingError.

    >>> from simulators import OnOff
    >>> simulator = OnOff(s=15.0, b=70.0, tau=1.0)
    >>> simulator.expected([1.0, 1.0])  # mu = nu = 1
    array([[85., 70.]])
    >>> simulator.profile_ratio([85, 70], 0.0).round(2)  # twice the log likelihood ratio against mu = 0
    array([1.45])
    """

    def __init__(
        self, *, s: float = 15.0, b: float = 70.0, tau: float = 1.0, mu_max: float = 5.0, nu_range: Sequence[float] = (0.5, 1.5)
    ) -> None:
        self.s, self.b = require_number("s", s, 1e-6, 1e9), require_number("b", b, 1e-6, 1e9)
        self.tau = require_number("tau", tau, 1e-6, 1e6)
        low, high = require_range("nu_range", nu_range, 1e-9, 1e9)
        self.settings: dict[str, Any] = {
            "s": self.s, "b": self.b, "tau": self.tau, "mu_max": require_number("mu_max", mu_max, 1e-6, 1e6), "nu_range": [low, high],
        }  # fmt: skip
        self.prior = BoxPrior([Parameter("mu", 0.0, self.settings["mu_max"], "", r"\mu"), Parameter("nu", low, high, "", r"\nu")])
        self.observables: tuple[Observable, ...] = (
            Observable("n_on", 1, "", r"N_\mathrm{on}", "counts"),
            Observable("n_off", 1, "", r"N_\mathrm{off}", "counts"),
        )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The columns of theta."""
        return self.prior.parameters

    def expected(self, theta: ArrayLike) -> Array:
        """Mean of x at theta (n, 2) -> (n, 2), events.   Raises: ShapeError, NonFiniteError, SupportError of sbi_phys."""
        theta = checked_theta(self.prior, theta)
        background = theta[:, 1] * self.b
        return np.column_stack([theta[:, 0] * self.s + background, self.tau * background])

    def simulate(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw x (n, 2) at theta (n, 2).   Raises: as `expected`."""
        return rng.poisson(self.expected(theta)).astype(np.float64)

    def log_likelihood(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """Exact log p(x | theta) (n,) of x (2,) or (n, 2) at theta (n, 2).   Raises: CountsError, and as `expected`."""
        mean, counts = self.expected(theta), _LAYOUT.check(x)
        if counts.shape[0] not in (1, mean.shape[0]):
            raise CountsError(f"x has {counts.shape[0]} rows and theta {mean.shape[0]}; expected as many, or one x")
        return poisson_log_pmf(counts, mean).sum(axis=1)

    def best_fit(self, x: ArrayLike) -> Array:
        """(mu, nu) >= 0 of largest likelihood for x (2,) or (n, 2) -> (n, 2), without the priors' upper limits."""
        n, m = _LAYOUT.check(x).T
        above = n > m / self.tau
        signal = np.where(above, n - m / self.tau, 0.0)
        background = np.where(above, m / self.tau, (n + m) / (1 + self.tau))
        return np.column_stack([signal / self.s, background / self.b])

    def profiled(self, x: ArrayLike, mu: ArrayLike) -> Array:
        """The nu >= 0 of largest likelihood at signal strengths mu (n,) >= 0 or one number, for x (2,) or (n, 2) -> (n,)."""
        n, m = _LAYOUT.check(x).T
        signal = _strengths(mu) * self.s
        k = 1 + self.tau
        a = n + m - k * signal
        root = np.sqrt(a**2 + 4 * k * m * signal)
        # for each sign of a, the form without cancellation
        with np.errstate(invalid="ignore", divide="ignore"):
            background = np.where(a >= 0, (a + root) / (2 * k), np.where(m * signal > 0, 2 * m * signal / (root - a), 0.0))
        return np.asarray(background / self.b)

    def profile_ratio(self, x: ArrayLike, mu: ArrayLike) -> Array:
        """2 [max log L - max log L at mu] >= 0 for x (2,) or (n, 2) and mu (n,) or one number -> (n,).

        Read: against 1 and 2.71, the chi-square quantiles, its intervals do not cover near mu = 0.   Raises: CountsError.
        """
        counts = _LAYOUT.check(x)
        mu = _strengths(mu)
        best, nu = self.best_fit(counts), self.profiled(counts, mu)
        return np.maximum(2 * (self._log_rate(counts, best[:, 0], best[:, 1]) - self._log_rate(counts, mu, nu)), 0.0)

    def _log_rate(self, counts: Array, mu: Array, nu: Array) -> Array:
        background = nu * self.b
        return poisson_log_pmf(counts[:, 0], mu * self.s + background) + poisson_log_pmf(counts[:, 1], self.tau * background)


def _strengths(mu: ArrayLike) -> Array:
    array = np.atleast_1d(np.asarray(mu, dtype=np.float64))
    if array.ndim != 1 or not (array >= 0).all():
        raise CountsError(f"mu is {mu!r}; expected a signal strength >= 0, or (n,) of them")
    return array
