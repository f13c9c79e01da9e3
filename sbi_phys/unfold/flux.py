r"""Flux models of forward folding: a power law, and power laws joined by smooth breaks.

    J(E) = J0 (E / E0)^-g1  prod_{i=1..b} [1 + (E / E_i)^(1/w)]^((g_i - g_{i+1}) w)

E0 = 10^18.5 eV, w the width of the transitions (0.05: about a tenth of a decade), theta = (lg J0, g_1 .. g_{b+1}, lg E_1 .. lg E_b).

Source: Pierre Auger Collaboration 2020, Phys. Rev. D 102, 062005, arXiv:2008.06486.
"""

from collections.abc import Callable

import numpy as np

from sbi_phys.core.types import Array

__all__ = ["LG_E0", "bin_integral", "broken_power_law", "parameter_names"]

Flux = Callable[[Array, Array], Array]

LG_E0 = 18.5
WIDTH = 0.05
POINTS, PANELS = 8, 2  # Gauss-Legendre in each half of a bin: a break of width 0.05 is resolved


def parameter_names(n_breaks: int) -> tuple[str, ...]:
    """Return the names of theta for b smooth breaks (0 = power law): lg_j0, gamma_1 .., lg_e_1 .."""
    return ("lg_j0", *(f"gamma_{i + 1}" for i in range(n_breaks + 1)), *(f"lg_e_{i + 1}" for i in range(n_breaks)))


def broken_power_law(lg_energy: Array, theta: Array) -> Array:
    """J(E) of theta (2 + 2 b,) at lg(E/eV) (n,), in the unit of J0 (1/(eV km2 sr yr)).

    Source: arXiv:2008.06486.
    """
    n_breaks = theta.size // 2 - 1
    gammas, breaks = theta[1 : n_breaks + 2], theta[n_breaks + 2 :]
    ln_j = np.log(10) * (theta[0] - gammas[0] * (lg_energy - LG_E0))
    for i, at in enumerate(breaks):
        # logaddexp: (E/E_i)^20 overflows nowhere, and far below the break the factor is exactly 1
        ln_j = ln_j + (gammas[i] - gammas[i + 1]) * WIDTH * np.logaddexp(0, np.log(10) * (lg_energy - at) / WIDTH)
    return np.asarray(np.exp(np.clip(ln_j, -600, 600)))


def bin_integral(flux: Flux, edges: Array, theta: Array) -> Array:
    """Integral of J dE over bins with edges in lg(E/eV), (n,) = int J(E) E ln10 dlgE."""
    u, w = np.polynomial.legendre.leggauss(POINTS)
    cuts = np.linspace(edges[:-1], edges[1:], PANELS + 1).T
    low, high = cuts[:, :-1, None], cuts[:, 1:, None]
    x = (low + high) / 2 + (high - low) / 2 * u
    values = flux(x.ravel(), theta).reshape(x.shape) * 10.0**x * np.log(10)
    return np.asarray((values * w * (high - low) / 2).sum(axis=(1, 2)))
