r"""Energies of single events from sources with a rigidity cutoff, smeared by the detector: an exact density per event.

theta = (gamma, lg R_cut [, lg_n]): injection J_A = f_A (E/EeV)^-gamma f_cut(E / Z R_cut) (`propagation.injection`), then with
propagation=True the matrix collapsed from CRPropa 3, then the resolution of Auger's surface detector, Gaussian in y = lg(E/eV):

    p(y | theta) = sum_i F_i(theta) k_i(y) / sum_i F_i(theta) P_i,    y > threshold
    k_i(y) = mean_j N(y; t_ij, s_ij),   P_i = mean_j Phi((t_ij - threshold) / s_ij),   s = sigma_E / (E ln 10)

F_i is the number of particles that arrive in bin i of width 0.02 in lgE. The true energies within a bin take four values t_ij, 0.005
apart, with equal probability; the resolution, 0.034 at best, is seven times wider. The simulator draws from the same mixture, so the
likelihood is exact.

Source: arXiv:1612.07155 (injection), 2008.06486 (resolution).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from sbi_phys.priors import BoxPrior, Observable, Parameter
from simulators.detector import AUGER_SD
from simulators.errors import CountsError, SimulatorSettingError, require_fractions, require_number, require_range
from simulators.events import EventLayout, checked_theta, draw_counts, poisson_log_pmf, require_count, slots_for, sum_over_sets
from simulators.propagation import injection, load_propagation

__all__ = ["EventSpectrum"]

Array = NDArray[np.float64]
_N_SUB = 4
_LG_STEP = 0.02
_CTG_FRACTIONS = (0.6794, 0.31, 0.01, 0.0006, 0.0)  # Auger combined fit, CTG, 1st minimum, arXiv:1612.07155
_CHUNK = 4096


class EventSpectrum:
    """Sets of measured energies of cosmic rays, lg(E/eV) of each event, with the exact likelihood.

    x holds n_max slots of (lg E, mask), see `events`. Priors: gamma ~ U(-3, 2.5), lg(R_cut/V) ~ U(17.8, 20), and where extended
    lg_n ~ U(lg_n_range), the decimal logarithm of the expected number.

    Args:
        n_events: of a set, or two numbers between which sizes are log-uniform; not used where extended.
        extended: whether the number is Poisson, its mean a third parameter.
        lg_n_range: ends of its prior.
        propagation: whether particles are propagated to Earth; else the spectrum is that of the sources.
        fractions: five fractions of H, He, N, Si, Fe at fixed energy; default: CTG, 1st minimum, of arXiv:1612.07155.
        threshold: lowest measured lg(E/eV).
        n_max: slots of a row; default as many as are needed.
    Raises: SimulatorSettingError.

    >>> import numpy as np
    >>> from simulators import EventSpectrum
    >>> simulator = EventSpectrum(n_events=50)
    >>> x = simulator.simulate([0.5, 18.6], np.random.default_rng(0))
    >>> x.shape, simulator.log_likelihood(x, [[0.5, 18.6]]).shape
    ((1, 100), (1,))
    """

    def __init__(
        self,
        *,
        n_events: int | Sequence[int] = 1000,
        extended: bool = False,
        lg_n_range: Sequence[float] = (2.5, 3.0),
        propagation: bool = True,
        fractions: Sequence[float] | None = None,
        threshold: float = 18.7,
        n_max: int | None = None,
    ) -> None:
        self.n_events, self.extended = require_count("n_events", n_events), bool(extended)
        low, high = require_range("lg_n_range", lg_n_range, 0, 6)
        share = require_fractions(_CTG_FRACTIONS if fractions is None else fractions)
        needed = slots_for(10.0**high) if self.extended else int(np.max(self.n_events))
        if n_max is not None and n_max < needed:
            raise SimulatorSettingError(f"n_max is {n_max}; expected at least {needed} slots")
        self.layout = EventLayout(("lg(E/eV)",), int(n_max or needed))
        self.threshold = require_number("threshold", threshold, 18.5, 20.0)
        self.settings: dict[str, Any] = {
            "n_events": self.n_events if isinstance(self.n_events, int) else list(self.n_events), "extended": self.extended,
            "lg_n_range": [low, high], "propagation": bool(propagation), "fractions": share.tolist(), "threshold": self.threshold,
            "n_max": self.layout.n_max,
        }  # fmt: skip
        parameters = [
            Parameter("gamma", -3.0, 2.5, "", r"\gamma"),
            Parameter("lg_rcut", 17.8, 20.0, "lg V", r"\lg(R_\mathrm{cut}/\mathrm{V})"),
            *([Parameter("lg_n", low, high, "", r"\lg N")] if self.extended else []),
        ]
        self.prior = BoxPrior(parameters)
        self.observables: tuple[Observable, ...] = (self.layout.observable(r"\lg E"),)
        self._build_tables(share)

    def _build_tables(self, share: Array) -> None:
        table = load_propagation()
        self._lg_in = table.lg_centres
        size = self._lg_in.size
        # arrivals (n_bins,) per injected nucleus of (species, E_in); without propagation the identity
        matrix = table.matrix.sum(axis=2) if self.settings["propagation"] else np.broadcast_to(np.eye(size), (5, size, size))
        self._arrivals = np.ascontiguousarray((share[:, None, None] * matrix).reshape(5 * size, size))
        offsets = (np.arange(_N_SUB) + 0.5) / _N_SUB - 0.5
        self._true = table.lg_centres[:, None] + _LG_STEP * offsets
        self._sigma = AUGER_SD.resolution(10.0 ** (self._true - 18)) / np.log(10)
        self._above = ndtr((self._true - self.threshold) / self._sigma)
        self._passing = self._above.mean(axis=1)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The columns of theta."""
        return self.prior.parameters

    def arriving(self, theta: ArrayLike) -> Array:
        """Share of each bin of true lgE among the particles measured above the threshold (n, n_bins), sums to 1.

        Raises: ShapeError, NonFiniteError, SupportError of sbi_phys.
        """
        flux = self._flux(checked_theta(self.prior, theta)) * self._passing
        return flux / flux.sum(axis=1, keepdims=True)

    def simulate(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw sets x (n, 2 n_max) at theta (n, d).   Raises: as `arriving`."""
        theta = checked_theta(self.prior, theta)
        n = theta.shape[0]
        counts = rng.poisson(10 ** theta[:, 2]).astype(np.int64) if self.extended else draw_counts(n, self.n_events, rng)
        cumulative = np.cumsum(self.arriving(theta), axis=1)
        owner, v = np.repeat(np.arange(n), counts), rng.random(int(counts.sum()))
        # one search for all rows: row r uses [r, r + 1)
        flat = (cumulative / cumulative[:, -1:] + np.arange(n)[:, None]).ravel()
        bins = np.clip(np.searchsorted(flat, owner + v, side="right") - owner * cumulative.shape[1], 0, cumulative.shape[1] - 1)
        return self.layout.pack(counts, self._smeared(bins, rng)[:, None])

    def event_log_density(self, events: ArrayLike, theta: ArrayLike) -> Array:
        """log p(y | theta) per unit of lgE of events (m,) or (m, 1) at theta (n, d) -> (n, m).

        Raises: CountsError for an energy below the threshold, and as `arriving`.
        """
        events = np.asarray(events, dtype=np.float64).reshape(-1)
        return _log(self._density_rows(checked_theta(self.prior, theta)) @ self._kernel(events).T)

    def log_likelihood(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """Exact log p(x | theta) (n,) of one set x, or of n sets, at theta (n, d); with extended=True the extended likelihood.

        x: (2 n_max,), (n, 2 n_max), or slots (m, 2), (n, m, 2).   Raises: CountsError, and as `arriving`.
        """
        theta = checked_theta(self.prior, theta)
        counts, events = self.layout.unpack(x)
        if counts.size == 1:
            kernel, total = self._kernel(events[:, 0]), np.empty(theta.shape[0])
            for start in range(0, theta.shape[0], _CHUNK):
                rows = slice(start, start + _CHUNK)
                total[rows] = _log(self._density_rows(theta[rows]) @ kernel.T).sum(axis=1)
        else:
            # the density of an event is linear in the arrivals of its own set
            density = self._density_rows(theta)
            index = np.arange(theta.shape[0], dtype=np.float64)[:, None]
            total = sum_over_sets(
                lambda e, i: _log(np.einsum("ek,ek->e", self._kernel(e[:, 0]), density[i[:, 0].astype(np.intp)])),
                counts,
                events,
                index,
                chunk=20_000,
            )
        return total + poisson_log_pmf(counts, 10 ** theta[:, 2]) if self.extended else total

    def _flux(self, theta: Array) -> Array:
        out = np.empty((theta.shape[0], self._lg_in.size))
        for start in range(0, theta.shape[0], _CHUNK):
            part = theta[start : start + _CHUNK]
            out[start : start + _CHUNK] = injection(part[:, 0], part[:, 1], self._lg_in).reshape(part.shape[0], -1) @ self._arrivals
        return out

    def _density_rows(self, theta: Array) -> Array:
        """F_i / sum_j F_j P_j (n, n_bins): the density of an event is this times its kernel."""
        flux = self._flux(theta)
        return flux / (flux @ self._passing)[:, None]

    def _kernel(self, y: Array) -> Array:
        """k_i(y) (m, n_bins)."""
        if not (y >= self.threshold - 1e-6).all():
            raise CountsError(f"events have lg(E/eV) down to {y.min():g}; expected at least the threshold {self.threshold:g}")
        out = np.zeros((y.size, self._lg_in.size))
        for j in range(_N_SUB):
            z = (y[:, None] - self._true[:, j]) / self._sigma[:, j]
            out += np.exp(-0.5 * z**2) / self._sigma[:, j]
        return out / (_N_SUB * np.sqrt(2 * np.pi))

    def _smeared(self, bins: NDArray[np.intp], rng: np.random.Generator) -> Array:
        """A measured energy above the threshold for a particle of each bin."""
        weight = np.cumsum(self._above, axis=1) / self._above.sum(axis=1, keepdims=True)
        sub = (rng.random(bins.size)[:, None] > weight[bins, :-1]).sum(axis=1)
        true, sigma, above = self._true[bins, sub], self._sigma[bins, sub], self._above[bins, sub]
        # through the survival function, which is accurate in the upper tail
        return np.maximum(true - sigma * ndtri(above * (1 - rng.random(bins.size))), self.threshold)


def _log(density: Array) -> Array:
    with np.errstate(divide="ignore"):  # energies beyond every cutoff
        return np.asarray(np.log(density))
