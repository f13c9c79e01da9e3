r"""Injection at the sources and propagation to Earth.

Injection per nucleus A of charge Z, at fraction f_A [Auger combined fit, arXiv:1612.07155]:

    J_A(E) = J0 f_A (E/EeV)^-gamma f_cut,     f_cut = 1 if E < Z R_cut else exp(1 - E/(Z R_cut))

evaluated per logarithmic bin as E^(1-gamma) f_cut at the centre of the bin. Propagation is linear: the number of particles of a mass
group that arrive in an energy bin is a product with the matrix K[A, E_in, group, E_out], which `scripts/build_propagation.py` computes
from CRPropa 3 simulations by summing over distance and redshift. Two conventions of the fractions are available: 'fixed_energy' (f_A
above, ratio of J_A at one energy below every cutoff) and 'energy' (that of the 2022 fit: I_A, the share of A in the energy emitted above
a threshold, I_A proportional to f_A * integral E^(1-gamma) f_cut dE).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import exprel

from simulators.auger import DATA_FOLDER
from simulators.errors import SimulatorSettingError, TableError, require_choice

__all__ = [
    "CHARGES",
    "EBL_MODELS",
    "FRACTION_CONVENTIONS",
    "MASSES",
    "SPECIES",
    "Propagation",
    "energy_weights",
    "injection",
    "load_propagation",
]

Array = NDArray[np.float64]

SPECIES: Final = ("h", "he", "n", "si", "fe")
CHARGES: Final = (1, 2, 7, 14, 26)
MASSES: Final = (1, 4, 14, 28, 56)
EBL_MODELS: Final = ("Gilmore12", "Dominguez11", "Kneiske04")
FRACTION_CONVENTIONS: Final = ("fixed_energy", "energy")
_N_STORED = 125
_JOIN = 5  # columns averaged to continue the matrix below its grid


@dataclass(frozen=True, eq=False)
class Propagation:
    """Propagation matrix K (species 5, E_in, group 5, E_out) in Mpc on one grid of lg(E/eV) bins.

    Args: matrix, as above: arrivals per injected nucleus, weighted by distance. lg_edges (E_in + 1,), the bins' edges,
    the same for E_in and E_out. n_below: bins continued below the simulated grid. provenance: as recorded in the file.
    """

    matrix: Array
    lg_edges: Array
    n_below: int
    provenance: dict[str, object]

    @property
    def lg_centres(self) -> Array:
        """Bin centres, lg(E/eV)."""
        return 0.5 * (self.lg_edges[1:] + self.lg_edges[:-1])

    def arrive(self, injected: ArrayLike) -> Array:
        """Particles per bin at Earth (n, group 5, E_out) from the injection (n, species 5, E_in): one matrix product."""
        injected = np.asarray(injected, dtype=np.float64)
        size = self.matrix.shape[0] * self.matrix.shape[1]
        return (injected.reshape(-1, size) @ self.matrix.reshape(size, -1)).reshape(-1, *self.matrix.shape[2:])


def load_propagation(ebl: str = "Gilmore12", evolution: float = 0.0, n_below: int = 20, folder: Path | str | None = None) -> Propagation:
    """Read the propagation matrix of a background-light model and a source evolution (1+z)^m.

    Args: ebl, one of `EBL_MODELS`. evolution, m, one of the stored values. n_below: bins of 0.02 to continue below
    lg(E/eV) 18.5. Energy losses there change slowly with energy, so that K[E_in - k, E_out - k] = K[E_in, E_out]; they
    are needed only because the energy resolution and scale carry some particles from below 18.5 over the edge at 18.7.
    Raises: SimulatorSettingError for an unknown model or an evolution that is not stored; TableError for a bad file.
    """
    require_choice("ebl", ebl, EBL_MODELS)
    path = (DATA_FOLDER if folder is None else Path(folder)) / f"propagation_{ebl}.npz"
    _check_hash(path)
    with np.load(path, allow_pickle=False) as data:
        stored, edges = data["evolution"], data["lg_energy_edges"]
        match = np.flatnonzero(np.abs(stored - evolution) < 1e-9)
        if match.size == 0:
            values = [f"{m:g}" for m in stored]
            command = f"python scripts/build_propagation.py --ebl {ebl} --evolution {' '.join([*values, f'{evolution:g}'])}"
            raise SimulatorSettingError(
                f"evolution is {evolution:g}; expected one of {', '.join(values)}, as stored in {path.name} (others: {command})"
            )
        matrix = data["matrix"][match[0]].astype(np.float64)
        provenance = json.loads(data["provenance"].tobytes())
    return Propagation(_extend(matrix, n_below), _extend_edges(edges, n_below), n_below, provenance)


def _check_hash(path: Path) -> None:
    try:
        recorded = json.loads((path.parent / "propagation.json").read_text())[path.name]["sha256"]
        got = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError) as err:
        raise TableError(f"{path}: cannot be read or has no hash in propagation.json ({err!r}); run scripts/build_propagation.py") from err
    if got != recorded:
        raise TableError(f"{path}: got SHA-256 {got}; expected {recorded} as recorded in propagation.json (altered or truncated?)")


def _extend_edges(edges: Array, n_below: int) -> Array:
    step = (edges[-1] - edges[0]) / (edges.size - 1)
    return np.round(edges[0] - n_below * step + step * np.arange(edges.size + n_below), 6)


def _extend(matrix: Array, n_below: int) -> Array:
    n = n_below + _N_STORED
    out = np.zeros((5, n, 5, n))
    out[:, n_below:, :, n_below:] = matrix
    # the lowest column, moved along the diagonal; a few are averaged to reduce Monte Carlo noise
    column = np.zeros((5, _N_STORED, 5))
    for c in range(_JOIN):
        column[:, : _N_STORED - c] += matrix[:, c:, :, c] / _JOIN
    for k in range(1, n_below + 1):
        out[:, n_below - k : n - k, :, n_below - k] = column
    return out


def injection(gamma: ArrayLike, lg_rcut: ArrayLike, lg_energy: ArrayLike) -> Array:
    """Injected nuclei per logarithmic bin at unit fraction, (n, 5, k): (E/EeV)^(1-gamma) f_cut.

    Args: gamma (n,). lg_rcut (n,), lg(R_cut/V). lg_energy (k,), lg(E/eV), bin centres.
    """
    gamma, lg_rcut = np.atleast_1d(np.asarray(gamma, dtype=np.float64)), np.atleast_1d(np.asarray(lg_rcut, dtype=np.float64))
    lg_energy = np.asarray(lg_energy, dtype=np.float64)
    rigidity = (10.0 ** (lg_energy - 18) / np.array(CHARGES)[:, None]).ravel()  # E/Z in EV
    exponent = np.multiply.outer(-(10.0 ** (18 - lg_rcut)), rigidity)
    exponent += 1.0
    np.minimum(exponent, 0.0, out=exponent)
    out = exponent.reshape(-1, 5, lg_energy.size)
    out += ((1 - gamma)[:, None] * ((lg_energy - 18) * np.log(10)))[:, None, :]
    return np.exp(out, out=out)


_LAGUERRE_NODES, _LAGUERRE_WEIGHTS = np.polynomial.laguerre.laggauss(24)


def energy_weights(gamma: ArrayLike, lg_rcut: ArrayLike, lg_threshold: float) -> Array:
    r"""Energy emitted above a threshold per unit f_A, (n, 5), in EeV^(2-gamma):  integral_thr^inf E^(1-gamma) f_cut dE.

    The power law up to Z R_cut in closed form, the tail  e integral_1^inf t^(1-gamma) e^-t dt (Z R_cut)^(2-gamma)  by
    Gauss-Laguerre quadrature. I_A proportional to f_A times this; f_A proportional to I_A divided by it.

    Args: gamma (n,). lg_rcut (n,), >= lg_threshold. lg_threshold, lg(E/eV).
    """
    gamma, lg_rcut = np.atleast_1d(np.asarray(gamma, dtype=np.float64)), np.atleast_1d(np.asarray(lg_rcut, dtype=np.float64))
    s = (2 - gamma)[:, None]
    log_threshold = (lg_threshold - 18) * np.log(10)
    log_cut = (lg_rcut[:, None] - 18 + np.log10(CHARGES)) * np.log(10)
    below = np.exp(s * log_threshold) * (log_cut - log_threshold) * exprel(s * (log_cut - log_threshold))
    tail = ((1 + _LAGUERRE_NODES) ** (s - 1)) @ _LAGUERRE_WEIGHTS
    return below + np.exp(s * log_cut) * tail[:, None]
