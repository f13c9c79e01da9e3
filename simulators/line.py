r"""A line on a falling spectrum, event by event: theta = (f, m), the share of signal events and the line's position.

    p(e | f, m) = f N(e; m, sigma) / [Phi((b-m)/sigma) - Phi((a-m)/sigma)] + (1 - f) B(e),      a <= e <= b

    exponential   B(e) proportional to exp(-e / scale)
    power         B(e) proportional to e^-index

The number of events is fixed, or varies between sets (log-uniform, independent of theta), or is Poisson with a known background and
then depends on f (extended likelihood):

    nu(f) = n_background / (1 - f)

The two background shapes are two models of the same data, with an exact `log_likelihood` for both.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from sbi_phys.priors import BoxPrior, Observable, Parameter
from simulators.errors import CountsError, SimulatorSettingError, require_choice, require_number, require_range
from simulators.events import EventLayout, checked_theta, draw_counts, poisson_log_pmf, require_count, slots_for, sum_over_sets

__all__ = ["LineSearch"]

Array = NDArray[np.float64]
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
_PAIRS = 100_000  # pairs of a theta and an event computed at once, few enough to stay in the processor's cache


class LineSearch:
    r"""Sets of events with a Gaussian line on a falling background.

    x holds one set: n_max slots of (energy, mask), see `events`. Priors: f ~ U(0, f_max), m ~ U(position_range).

    Args:
        n_events: events of a set, or two numbers between which sizes are log-uniform; with extended=True the expected background.
        extended: the number is Poisson with mean n_events / (1 - f).
        background: 'exponential' or 'power'; its scale in the energy's unit, or its index.
        shape: of the background: the scale or the index; default 2 and 2.7.
        energy_range: ends a < b of the spectrum, TeV; a > 0.
        sigma: resolution of the line, TeV.
        f_max: the largest share of signal, < 1.
        position_range: of the line, TeV; default the energy range.
        n_max: slots of a row; default as many as are needed.
    Raises: SimulatorSettingError.

    >>> import numpy as np
    >>> from simulators import LineSearch
    >>> simulator = LineSearch(n_events=50)
    >>> x = simulator.simulate([0.3, 4.0], np.random.default_rng(0))  # 30 % signal, line at 4 TeV
    >>> x.shape, simulator.log_likelihood(x, [[0.3, 4.0], [0.3, 8.0]]).shape
    ((1, 100), (2,))
    """

    def __init__(
        self,
        *,
        n_events: int | Sequence[int] = 100,
        extended: bool = False,
        background: str = "exponential",
        shape: float | None = None,
        energy_range: Sequence[float] = (1.0, 10.0),
        sigma: float = 0.4,
        f_max: float = 0.5,
        position_range: Sequence[float] | None = None,
        n_max: int | None = None,
    ) -> None:
        self.n_events = require_count("n_events", n_events)
        self.extended = bool(extended)
        if self.extended and not isinstance(self.n_events, int):
            raise SimulatorSettingError(f"n_events is {n_events!r} and extended is True; expected one number, the expected background")
        self.low, self.high = require_range("energy_range", energy_range, 1e-6, 1e9)
        place = require_range("position_range", (self.low, self.high) if position_range is None else position_range, self.low, self.high)
        self.background = require_choice("background", background, ("exponential", "power"))
        default = 2.0 if background == "exponential" else 2.7
        self.shape = require_number("shape", default if shape is None else shape, 1e-6, 1e6)
        self.sigma = require_number("sigma", sigma, 1e-6, 1e6)
        f_max = require_number("f_max", f_max, 1e-6, 0.999)
        needed = slots_for(self.n_events / (1 - f_max)) if self.extended else np.max(self.n_events)  # type: ignore[operator]
        if n_max is not None and n_max < needed:
            raise SimulatorSettingError(f"n_max is {n_max}; expected at least {needed} slots for these numbers of events")
        self.layout = EventLayout(("energy [TeV]",), int(needed if n_max is None else n_max))
        self.settings: dict[str, Any] = {
            "n_events": self.n_events if isinstance(self.n_events, int) else list(self.n_events), "extended": self.extended,
            "background": self.background, "shape": self.shape, "energy_range": [self.low, self.high], "sigma": self.sigma, "f_max": f_max,
            "position_range": list(place), "n_max": self.layout.n_max,
        }  # fmt: skip
        self.prior = BoxPrior([Parameter("f", 0.0, f_max, "", "f"), Parameter("position", *place, "TeV", r"E_\mathrm{line}")])
        self.observables: tuple[Observable, ...] = (self.layout.observable("E"),)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The columns of theta."""
        return self.prior.parameters

    def expected_events(self, theta: ArrayLike) -> Array:
        """Mean number of events nu at theta (n, 2) -> (n,).   Raises: SimulatorSettingError where it is not Poisson."""
        theta = checked_theta(self.prior, theta)
        if not self.extended or not isinstance(self.n_events, int):
            raise SimulatorSettingError("extended is False; expected a simulator with a Poisson number of events")
        return self.n_events / (1 - theta[:, 0])

    def simulate(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw sets x (n, 2 n_max) at theta (n, 2).   Raises: ShapeError, NonFiniteError, SupportError of sbi_phys."""
        theta = checked_theta(self.prior, theta)
        if self.extended:
            counts = rng.poisson(self.expected_events(theta)).astype(np.int64)
        else:
            counts = draw_counts(theta.shape[0], self.n_events, rng)
        return self.layout.pack(counts, self.sample_events(np.repeat(theta, counts, axis=0), rng))

    def sample_events(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw one event each (n, 1), TeV, at theta (n, 2).   Raises: as `simulate`."""
        theta = checked_theta(self.prior, theta)
        n = theta.shape[0]
        signal = rng.random((n,)) < theta[:, 0]
        v = rng.random((n,))
        # both are drawn by their inverse distribution functions on the range
        lower, upper = (ndtr((end - theta[:, 1]) / self.sigma) for end in (self.low, self.high))
        line = theta[:, 1] + self.sigma * ndtri(lower + v * (upper - lower))
        events = np.where(signal, line, self._background_quantile(v))
        return np.clip(events, self.low, self.high)[:, None]

    def event_log_density(self, events: ArrayLike, theta: ArrayLike) -> Array:
        """log p(e | theta), 1/TeV, of events (m,) or (m, 1) at theta (n, 2) -> (n, m).

        Raises: CountsError for an energy outside the range, and as `simulate`.
        """
        energy = self._energies(np.asarray(events, dtype=np.float64).reshape(-1))
        theta = checked_theta(self.prior, theta)
        return self._pairs(energy[None, :], theta[:, :1], theta[:, 1:])

    def log_likelihood(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """Exact log p(x | theta) (n,) of one set x, or of n sets, at theta (n, 2); with extended=True the extended likelihood.

        x: (2 n_max,), (n, 2 n_max), or slots (m, 2), (n, m, 2).   Raises: CountsError, and as `simulate`.
        """
        theta = checked_theta(self.prior, theta)
        counts, events = self.layout.unpack(x)
        self._energies(events[:, 0])
        if counts.size == 1 and theta.shape[0] > 1:
            total = self._one_set(events[:, 0], theta)
        else:
            total = sum_over_sets(lambda e, t: self._pairs(e[:, 0], t[:, 0], t[:, 1]), counts, events, theta)
        return total + poisson_log_pmf(counts, self.expected_events(theta)) if self.extended else total

    def _one_set(self, energy: Array, theta: Array) -> Array:
        """Sum over the events at many theta (n,); terms that depend on theta alone are computed once per theta."""
        step = max(1, _PAIRS // max(1, energy.size))
        parts = [theta[i : i + step, :, None] for i in range(0, theta.shape[0], step)]
        return np.concatenate([self._pairs(energy, part[:, 0], part[:, 1]).sum(axis=1) for part in parts])

    def _pairs(self, energy: Array, f: Array, position: Array) -> Array:
        z = (energy - position) / self.sigma
        inside = ndtr((self.high - position) / self.sigma) - ndtr((self.low - position) / self.sigma)
        with np.errstate(divide="ignore"):  # f = 0 has no signal: log 0
            log_signal = np.log(f) - 0.5 * z**2 - _LOG_ROOT_2PI - np.log(self.sigma * inside)
        return np.asarray(np.logaddexp(log_signal, np.log1p(-f) + self._background_log_density(energy)))

    def _background_log_density(self, energy: Array) -> Array:
        if self.background == "exponential":
            norm = self.shape * math.exp(-self.low / self.shape) * -math.expm1((self.low - self.high) / self.shape)
            return -energy / self.shape - math.log(norm)
        return -self.shape * np.log(energy) - math.log(self._power_integral(self.high))

    def _power_integral(self, end: float) -> float:
        """Integral of e^-index from the low end to `end`; also for index 1."""
        a, span = 1 - self.shape, math.log(end / self.low)
        return span * self.low**a if abs(a * span) < 1e-9 else self.low**a * math.expm1(a * span) / a

    def _background_quantile(self, v: Array) -> Array:
        if self.background == "exponential":
            return self.low - self.shape * np.log1p(v * math.expm1((self.low - self.high) / self.shape))
        a, span = 1 - self.shape, math.log(self.high / self.low)
        if abs(a * span) < 1e-9:
            return self.low * np.exp(v * span)
        return self.low * np.exp(np.log1p(v * math.expm1(a * span)) / a)

    def _energies(self, energy: Array) -> Array:
        slack = 1e-6 * self.high  # a store may hold energies in single precision
        bad = ~((energy >= self.low - slack) & (energy <= self.high + slack))
        if bad.any():
            raise CountsError(
                f"{int(bad.sum())} of {energy.size} events lie outside the spectrum, first {energy[bad][0]:g} TeV; "
                f"expected energies within [{self.low:g}, {self.high:g}] TeV"
            )
        return energy
