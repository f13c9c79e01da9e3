r"""Detector response: efficiency, bias, resolution, exposure and live time in one object that folds spectra and samples events.

    P(E_meas > e | E) = eff(E) * Phi( ((1 + b) E - e) / (s(E) E) ),      s(E) = relative resolution at the true energy E

The expected counts in measured bins are  mu_j = exposure * live * sum_i R_ij n_i  with the migration matrix R.

A simulation and its unfolding should use the same detector. `DetectorResponse.arrays` returns the arrays of a binned response
(`sbi_phys.unfold.Response(**detector.arrays(...))`), and `BinnedDetector` draws events from any object with the attributes of
`BinnedResponse`.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from simulators.errors import SimulatorSettingError

__all__ = [
    "AUGER_FD",
    "AUGER_SD",
    "BinnedDetector",
    "BinnedResponse",
    "CalorimeterResolution",
    "ConstantResolution",
    "DetectorResponse",
    "ExponentialResolution",
    "Resolution",
    "auger_flux",
]

Array = NDArray[np.float64]


class Resolution(Protocol):
    """Relative energy resolution sigma/E of the true energy in EeV, same shape."""

    def __call__(self, energy_eev: Array) -> Array:
        """sigma/E, dimensionless."""
        ...


@dataclass(frozen=True)
class ExponentialResolution:
    """sigma/E = a + b exp(-E / scale), E and scale in EeV.   Source: Auger surface detector, arXiv:2008.06486."""

    a: float = 0.078
    b: float = 0.16
    scale: float = 6.6

    def __call__(self, energy_eev: Array) -> Array:
        """sigma/E at energies in EeV."""
        return self.a + self.b * np.exp(-energy_eev / self.scale)


@dataclass(frozen=True)
class ConstantResolution:
    """sigma/E = a at every energy."""

    a: float

    def __call__(self, energy_eev: Array) -> Array:
        """sigma/E at energies in EeV."""
        return np.full_like(energy_eev, self.a)


@dataclass(frozen=True)
class CalorimeterResolution:
    """sigma/E = a/sqrt(E) (+) b/E (+) c in quadrature: stochastic, noise and constant term; E in the unit of a^2 and b."""

    a: float
    b: float
    c: float

    def __call__(self, energy_eev: Array) -> Array:
        """sigma/E at the given energies."""
        return np.sqrt(self.a**2 / energy_eev + (self.b / energy_eev) ** 2 + self.c**2)


@dataclass(frozen=True, kw_only=True)
class DetectorResponse:
    """A detector's response to the energy of a particle.

    Args: resolution, sigma/E of the true energy in EeV. exposure, km2 sr yr. bias, relative shift of the mean energy.
    lg_efficiency_50, lg(E/eV) of half efficiency, -inf for full efficiency; efficiency_width, of its error function in lgE.
    live_fraction, 1 - dead time / running time.   Raises: SimulatorSettingError.

    >>> import numpy as np
    >>> from simulators import DetectorResponse
    >>> detector = DetectorResponse(resolution=lambda energy_eev: np.full_like(energy_eev, 0.1), lg_efficiency_50=18.5)
    >>> detector.efficiency([18.5, 19.0]).round(2)
    array([0.5, 1. ])
    >>> detector.fold([0, 1000, 0], [18.8, 19.0, 19.2, 19.4], [18.8, 19.0, 19.2, 19.4]).round(-1)
    array([ 90., 830.,  80.])
    """

    resolution: Resolution
    exposure: float = 1.0
    bias: float = 0.0
    lg_efficiency_50: float = -np.inf
    efficiency_width: float = 0.1
    live_fraction: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, ok, expected in (
            ("exposure", self.exposure > 0, "> 0 km2 sr yr"),
            ("bias", abs(self.bias) < 1, "within (-1, 1)"),
            ("efficiency_width", self.efficiency_width > 0, "> 0"),
            ("live_fraction", 0 < self.live_fraction <= 1, "within (0, 1]"),
        ):
            if not ok:
                raise SimulatorSettingError(f"{name} is {getattr(self, name)}; expected {expected}")

    def efficiency(self, lg_energy: ArrayLike) -> Array:
        """Probability that a particle of true lg(E/eV) is recorded, same shape."""
        lg_energy = np.asarray(lg_energy, dtype=np.float64)
        return ndtr((lg_energy - self.lg_efficiency_50) / self.efficiency_width)

    def survival(self, lg_energy: ArrayLike, lg_edges: ArrayLike) -> Array:
        """P(recorded and E_meas > edge | E): true lg(E/eV) (n,), measured edges (k,) -> (n, k)."""
        lg_energy = np.atleast_1d(np.asarray(lg_energy, dtype=np.float64))
        energy = 10.0 ** (lg_energy - 18)
        edges = 10.0 ** (np.atleast_1d(np.asarray(lg_edges, dtype=np.float64)) - 18)
        sigma = self.resolution(energy) * energy
        pull = (energy[:, None] * (1 + self.bias) - edges) / sigma[:, None]
        return self.efficiency(lg_energy)[:, None] * ndtr(pull)

    def migration_matrix(self, true_edges: ArrayLike, measured_edges: ArrayLike, n_sub: int = 8) -> Array:
        """R (n_true, n_measured): probability that a particle of a true bin is recorded in a measured bin.

        Args: true_edges (n_true + 1,), measured_edges (n_measured + 1,), lg(E/eV). n_sub points, equally spaced in lgE,
        average over each true bin.   Read: rows sum to the efficiency, less what falls outside the measured bins.
        """
        edges = np.asarray(true_edges, dtype=np.float64)
        steps = (np.arange(n_sub) + 0.5) / n_sub
        points = edges[:-1, None] + np.diff(edges)[:, None] * steps
        above = self.survival(points.ravel(), measured_edges).reshape(edges.size - 1, n_sub, -1).mean(axis=1)
        return above[:, :-1] - above[:, 1:]

    def arrays(self, true_edges: ArrayLike, measured_edges: ArrayLike, n_sub: int = 8) -> dict[str, Any]:
        """The numbers of a binned response: matrix (n_measured, n_true), edges in lg(E/eV), exposure in km2 sr yr of live time.

        Read: keyword arguments of `sbi_phys.unfold.Response`; within a true bin the spectrum is taken flat in lgE, so choose narrow ones.
        """
        return {
            "matrix": self.migration_matrix(true_edges, measured_edges, n_sub).T,
            "truth_edges": np.asarray(true_edges, dtype=np.float64),
            "reco_edges": np.asarray(measured_edges, dtype=np.float64),
            "exposure": self.exposure * self.live_fraction,
        }

    def fold(self, counts: ArrayLike, true_edges: ArrayLike, measured_edges: ArrayLike) -> Array:
        """Expected counts in measured bins (..., n_measured) from particles per true bin (..., n_true): counts @ R."""
        return np.asarray(counts, dtype=np.float64) @ self.migration_matrix(true_edges, measured_edges)

    def sample(self, lg_energy: ArrayLike, rng: np.random.Generator) -> Array:
        """Measured lg(E/eV) of particles of true lg(E/eV), same shape; NaN where a particle is not recorded."""
        lg_energy = np.asarray(lg_energy, dtype=np.float64)
        energy = 10.0 ** (lg_energy - 18)
        measured = energy * (1 + self.bias + self.resolution(energy) * rng.standard_normal(energy.shape))
        seen = (rng.random(energy.shape) < self.efficiency(lg_energy)) & (measured > 0)
        return np.where(seen, 18 + np.log10(np.where(seen, measured, 1.0)), np.nan)

    def varied(
        self,
        *,
        resolution: Resolution | None = None,
        bias: float | None = None,
        exposure_factor: float = 1.0,
        lg_efficiency_50: float | None = None,
        live_fraction: float | None = None,
    ) -> "DetectorResponse":
        """Return a copy with some properties changed; None keeps a property."""
        return replace(
            self,
            resolution=self.resolution if resolution is None else resolution,
            bias=self.bias if bias is None else bias,
            exposure=self.exposure * exposure_factor,
            lg_efficiency_50=self.lg_efficiency_50 if lg_efficiency_50 is None else lg_efficiency_50,
            live_fraction=self.live_fraction if live_fraction is None else live_fraction,
        )


class BinnedResponse(Protocol):
    """Attributes that `BinnedDetector` needs of a response; `sbi_phys.unfold.Response` has them."""

    @property
    def matrix(self) -> Array:
        """P(measured bin j | true bin i), (n_measured, n_true); column sums are the efficiency."""
        ...

    @property
    def truth_edges(self) -> Array | None:
        """Edges (n_true + 1,)."""
        ...

    @property
    def reco_edges(self) -> Array | None:
        """Edges (n_measured + 1,)."""
        ...

    def fold(self, truth_counts: ArrayLike) -> Array:
        """Expected measured counts (..., n_measured) of (..., n_true), with fakes and background."""
        ...

    def sample(self, truth_counts: ArrayLike, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw measured counts (n_measured,) of whole numbers of true particles (n_true,)."""
        ...


@dataclass(frozen=True)
class BinnedDetector:
    """A detector given as a response matrix; it folds and samples with the object that the unfolding uses.

    Args: response, with true and measured edges in one unit, such as lg(E/eV).   Raises: SimulatorSettingError.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> from simulators import BinnedDetector
    >>> edges = [18.0, 18.5, 19.0]
    >>> detector = BinnedDetector(sp.unfold.Response([[0.8, 0.1], [0.2, 0.9]], truth_edges=edges, reco_edges=edges))
    >>> detector.fold([100.0, 10.0])
    array([81., 29.])
    >>> detector.sample(np.full(3, 18.2), np.random.default_rng(0)).shape
    (3,)
    """

    response: BinnedResponse

    def __post_init__(self) -> None:
        """Check that the response has what is needed."""
        missing = [name for name in ("matrix", "truth_edges", "reco_edges", "fold", "sample") if not hasattr(self.response, name)]
        if missing:
            raise SimulatorSettingError(
                f"response is a {type(self.response).__name__} without {', '.join(missing)}; expected a binned response"
            )
        for name in ("truth_edges", "reco_edges"):
            if getattr(self.response, name) is None:
                raise SimulatorSettingError(f"response has no {name}; expected the edges of its bins")

    def fold(self, truth_counts: ArrayLike) -> Array:
        """Expected counts (..., n_measured) from expected particles (..., n_true), with fakes and background."""
        return self.response.fold(truth_counts)

    def sample_counts(self, truth_counts: ArrayLike, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw counts (..., n_measured): Poisson particles around expected ones (..., n_true), each moved by the matrix.

        Fakes and background of the response are drawn too.
        """
        particles = rng.poisson(np.asarray(truth_counts, dtype=np.float64))
        rows = [self.response.sample(row, rng) for row in particles.reshape(-1, particles.shape[-1])]
        return np.array(rows, dtype=np.int64).reshape(*particles.shape[:-1], -1)

    def sample(self, lg_energy: ArrayLike, rng: np.random.Generator) -> Array:
        """Measured values of true ones, same shape: a bin drawn from the column of the matrix, and uniform within the bin.

        NaN if a particle is not recorded in any measured bin or lies outside the true bins. Without fakes and background.
        Read: a matrix has no information on the position within a bin; choose narrow measured bins.
        """
        truth = np.asarray(lg_energy, dtype=np.float64)
        true_edges, edges = np.asarray(self.response.truth_edges), np.asarray(self.response.reco_edges)
        column = np.searchsorted(true_edges, truth, side="right") - 1
        column = np.where(truth == true_edges[-1], true_edges.size - 2, column)
        inside = (column >= 0) & (column < true_edges.size - 1)
        up_to = np.cumsum(self.response.matrix, axis=0).T[np.clip(column, 0, true_edges.size - 2)]
        row = (rng.random(truth.shape)[..., None] >= up_to).sum(axis=-1)
        share = rng.random(truth.shape)
        seen = inside & (row < edges.size - 1)
        row = np.minimum(row, edges.size - 2)
        return np.where(seen, edges[row] + share * (edges[row + 1] - edges[row]), np.nan)


# Surface detector, vertical events: fully efficient above 10^18.4 eV.
AUGER_SD = DetectorResponse(resolution=ExponentialResolution(), exposure=60425.7)
# Fluorescence detector: a constant 8 % approximates its slowly varying resolution, which only determines the energies in an
# Xmax histogram; using that of the surface detector changes <Xmax> by less than 1 g/cm2.
AUGER_FD = DetectorResponse(resolution=ConstantResolution(0.08))


def auger_flux(lg_energy: ArrayLike) -> Array:
    """Published flux at lg(E/eV), km-2 sr-1 yr-1 eV-1: a power law with three smooth breaks.

    J = J0 (E/E0)^-g1 prod_i [(1 + (E/E_i)^(1/w)) / (1 + (E0/E_i)^(1/w))]^((g_i - g_(i+1)) w), w = 0.05, E0 = 10^18.5 eV.
    Source: arXiv:2008.06486: g = 3.29, 2.51, 3.05, 5.1; E_i = 5.0, 13, 46 EeV; J0 = 1.315e-18.
    """
    lg_energy = np.asarray(lg_energy, dtype=np.float64)
    index, breaks, width, lg_reference = (3.29, 2.51, 3.05, 5.1), np.log10([5.0, 13.0, 46.0]) + 18, 0.05, 18.5
    log10_flux = np.log10(1.315e-18) - index[0] * (lg_energy - lg_reference)
    for before, after, lg_break in zip(index[:-1], index[1:], breaks, strict=True):
        term = np.logaddexp(0, np.log(10) * (lg_energy - lg_break) / width) - np.logaddexp(
            0, np.log(10) * (lg_reference - lg_break) / width
        )
        log10_flux = log10_flux + (before - after) * width * term / np.log(10)
    return 10.0**log10_flux
