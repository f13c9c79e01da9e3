r"""The vertical Auger spectrum of 2020 as an unfolding problem: raw counts, response, exposure, and the published result.

    P(E_meas > e | E, zenith) = eff(E, zenith) Phi( ((1 + b(E, zenith)) E - e) / (s(E) E) ),    s(E) = 0.078 + 0.16 exp(-E / 6.6 EeV)

The true bins extend below the first measured bin, because a steep spectrum moves many events from there upwards. Two descriptions of the
detector are available:

"full"         trigger efficiency and energy bias near threshold, averaged over zenith angles up to 60 degrees (flat in cos^2):
               eff = [1 + erf((lgE - p0) / 0.373)] / 2,   p0 = 18.63 - 3.18 c^2 + 4.38 c^4 - 1.87 c^6,   c = cos(zenith),
               b = (0.20 + 0.59 exp(-10 (c - 1/2))) (18.4 - lgE) below lgE = 18.4, else 0.
"resolution"   eff = 1, b = 0: only the resolution.

The resolution is published. Form and constants of efficiency and bias have not been checked against the text of the paper. With the
published flux they reproduce all published corrections to 1 % and the three lowest to 0.5 %; either of the two alone misses these by 5 %,
and a fit with both reproduces the published spectral indices. The bias is positive because upward fluctuations trigger more often. Their
influence is measured by `variations`: p0 by 0.02 in lgE, the width 0.373 by 10 %, b by 20 %. Each changes the first correction by 0.7 to
1.4 %, more than its present difference from the published one.

Source: Phys. Rev. D 102, 062005 (2020), arXiv:2008.06486.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, ndtr

from simulators.auger import load_auger
from simulators.detector import AUGER_SD
from simulators.errors import SimulatorSettingError, require_choice, require_number

__all__ = ["DETECTORS", "Auger2020", "trigger_bias", "trigger_efficiency"]

Array = NDArray[np.float64]

DETECTORS = ("full", "resolution")
# the published fit: lg J0 at 10^18.5 eV, indices, breaks at 5.0, 13 and 46 EeV
_FIT = (np.log10(1.315e-18), 3.29, 2.51, 3.05, 5.1, np.log10(5.0e18), np.log10(13e18), np.log10(46e18))
_ZENITHS = 24  # points in cos^2, from 1/4 to 1: averages to 1e-4
_POINTS = 6  # in each true bin


def trigger_efficiency(lg_energy: ArrayLike, cos_zenith: ArrayLike, later: float = 0.0, wider: float = 1.0) -> Array:
    """Probability that a shower of true lg(E/eV) and cos(zenith) is recorded; shapes broadcast.   Source: see the module.

    Args: later: added to p0. wider: factor of the width.
    """
    c2 = np.asarray(cos_zenith, dtype=np.float64) ** 2
    middle = later + 18.63 - 3.18 * c2 + 4.38 * c2**2 - 1.87 * c2**3
    return np.asarray(0.5 * (1 + erf((np.asarray(lg_energy) - middle) / (0.373 * wider))), dtype=np.float64)


def trigger_bias(lg_energy: ArrayLike, cos_zenith: ArrayLike) -> Array:
    """Relative bias of the reconstructed energy below 10^18.4 eV, 0 above; shapes broadcast.   Source: see the module."""
    slope = 0.20 + 0.59 * np.exp(-10 * (np.asarray(cos_zenith, dtype=np.float64) - 0.5))
    return np.asarray(slope * np.maximum(18.4 - np.asarray(lg_energy), 0), dtype=np.float64)


class Auger2020:
    """Auger's vertical spectrum above 10^18.4 eV, 215 030 events, to be unfolded.

    Args: detector: "full" or "resolution" (see the module). lg_below, lg_above: decades of true energy beyond the measured bins. later,
    wider: of the trigger's efficiency (`trigger_efficiency`); bias: factor of the energy's bias; all three with "full" alone.
    Raises: SimulatorSettingError, TableError.

    counts (18,), events. reco_edges (19,) and truth_edges (m,), lg(E/eV), the first among the second. exposure, km2 sr yr.
    start: lg J0, indices and lg breaks of the published flux, a starting point for fits. published: flux and its errors, 1/(km2 sr yr eV),
    and correction = unfolded / raw, (18,) each. target: lgE range and relative tolerance within which our corrections must agree.
    variations: settings with one constant of the detector changed.
    """

    name = "auger"
    title = "The Auger 2020 vertical spectrum"
    source = "Phys. Rev. D 102, 062005 (2020), arXiv:2008.06486"
    unit = "km$^{-2}$ sr$^{-1}$ yr$^{-1}$ eV$^{-1}$"
    n_breaks = 3
    start = np.array(_FIT)
    target = (18.5, 19.7, 0.02)
    note = (
        "Near threshold showers are missed, and of those that trigger more have fluctuated up: efficiency and bias act on the lowest three "
        "bins, where the resolution alone is not enough. Their form and constants are quoted from memory of the paper and not checked "
        "against its text; that they give the published corrections, and neither alone does, is their test."
    )

    def __init__(
        self,
        detector: str = "full",
        lg_below: float = 0.4,
        lg_above: float = 0.2,
        later: float = 0.0,
        wider: float = 1.0,
        bias: float = 1.0,
    ) -> None:
        self.detector = require_choice("detector", detector, DETECTORS)
        below = require_number("lg_below", lg_below, 0.1, 1.0)
        above = require_number("lg_above", lg_above, 0.1, 1.0)
        for name, value in (("lg_below", below), ("lg_above", above)):
            if abs(value - round(value, 1)) > 1e-9:
                raise SimulatorSettingError(f"{name} is {value}; expected a multiple of 0.1, the width of a bin")
        self.settings: dict[str, Any] = {"detector": self.detector, "lg_below": below, "lg_above": above}
        self.trigger = (require_number("later", later, -0.3, 0.3), require_number("wider", wider, 0.3, 3.0))
        self.bias = require_number("bias", bias, -1.0, 3.0)
        changed = (*self.trigger, self.bias) != (0.0, 1.0, 1.0)
        if changed and self.detector == "resolution":
            raise SimulatorSettingError("later, wider or bias is given with detector 'resolution'; expected 'full', which has them")
        data = load_auger()
        self.counts = data.spectrum_counts
        self.reco_edges = data.spectrum_edges
        low, high = float(self.reco_edges[0]) - below, float(self.reco_edges[-1]) + above
        self.truth_edges = np.round(np.linspace(low, high, round((high - low) / 0.1) + 1), 6)
        self.exposure = data.exposure
        self.published = {
            "flux": data.flux,
            "flux_error_low": data.flux_err_low,
            "flux_error_high": data.flux_err_high,
            "correction": data.unfolding_correction,
        }
        # another description of the detector, for comparison
        nominal = detector == "full" and not changed
        self.alternatives = {"with the resolution alone": {**self.settings, "detector": "resolution"}} if nominal else {}
        # the same description with constants changed by their uncertainty, for a systematic error
        changes = {
            "the efficiency rises 0.02 later in lgE": {"later": 0.02},
            "it rises over a range wider by 10 %": {"wider": 1.1},
            "the bias is larger by 20 %": {"bias": 1.2},
        }
        self.variations = {words: {**self.settings, **change} for words, change in changes.items()} if nominal else {}

    def response(self, truth_edges: ArrayLike) -> Array:
        """P(measured bin | true bin), (18, n), for true bins with edges (n + 1,) in lg(E/eV), flat in lgE within each.

        Read: columns sum to the share that is recorded within the measured bins; use bins of 0.02 or less, the spectrum is steep.
        """
        edges = np.asarray(truth_edges, dtype=np.float64)
        if self.detector == "resolution":
            return AUGER_SD.migration_matrix(edges, self.reco_edges, _POINTS).T
        steps = (np.arange(_POINTS) + 0.5) / _POINTS
        lg = (edges[:-1, None] + np.diff(edges)[:, None] * steps).ravel()
        energy, measured = 10.0 ** (lg - 18), 10.0 ** (self.reco_edges - 18)
        sigma = AUGER_SD.resolution(energy) * energy
        cos = np.sqrt(0.25 + 0.75 * (np.arange(_ZENITHS) + 0.5) / _ZENITHS)[:, None]
        mean = energy * (1 + self.bias * trigger_bias(lg, cos))
        pull = (mean[..., None] - measured) / sigma[:, None]
        above = (trigger_efficiency(lg, cos, *self.trigger)[..., None] * ndtr(pull)).mean(axis=0)
        above = above.reshape(edges.size - 1, _POINTS, -1).mean(axis=1)
        return np.asarray((above[:, :-1] - above[:, 1:]).T)
