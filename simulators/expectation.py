r"""Expected observables of `SourceSpectrum`: theta -> probabilities of the energy bins and of the Xmax bins, vectorised.

Injection, propagation, energy resolution and binning are linear, so one matrix maps the injected spectra to expected counts in windows of
measured energy. The energy scale shifts the windows: counts are tabulated for windows of 0.1 in lgE that begin every 0.02, and their
logarithm, smoothed by the resolution, is interpolated at degree 5. The Xmax scale shifts templates that are tabulated every 1 g/cm2 and
interpolated linearly. Probabilities are accurate to 1e-3, and to 2e-3 in the corners of the prior (tested). Likelihood and simulator call
the same function, so the likelihood is exact for the simulator.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulators.auger import AugerData
from simulators.detector import DetectorResponse
from simulators.propagation import CHARGES, MASSES, Propagation, energy_weights
from simulators.xmax import gumbel_parameters, smeared_fraction

__all__ = ["ENERGY_SCALE", "FLOOR", "LG_EDGES", "MAX_PULL", "EnergyWindows", "SpectrumTable", "XmaxTable"]

Array = NDArray[np.float64]

LG_EDGES = np.round(np.arange(18.7, 20.25, 0.1), 6)  # 15 energy bins
N_XMAX_WINDOWS = 13  # windows of 0.1 from 18.7 to 20.0: eight histograms of one, the last of five
ENERGY_SCALE = np.log10(1.14)  # 1 sigma in lgE
MAX_PULL = 5.0  # nuisances beyond +-5 sigma act as +-5 sigma (prior probability 6e-7)
FLOOR = 1e-12  # probability added to every bin, so that no log-likelihood is -inf: 6e-8 events in all the spectrum
_STEP, _PER_BIN = 0.02, 5  # spacing of the windows that the energy scale slides over: finer than the resolution, 0.034 at best
_NODES = np.arange(-2, 4)  # neighbours in the interpolation, of degree 5
_TINY = 1e-300
_N_STORED_SHIFT = 72  # g/cm2, more than 5 sigma of the Xmax scale and of the energy scale together


@dataclass(frozen=True, eq=False)
class EnergyWindows:
    """Windows of 0.1 in measured lgE whose starts are interpolated: matrix blocks from injection to window counts.

    Args: blocks: matrices (inputs, n_starts), one per output row. first: species at which the inputs of each begin
    (a group gets nothing from lighter nuclei). n_bins windows from 18.7 on. sliding: whether starts are tabulated for
    an energy scale, or only where the bins begin.
    """

    blocks: tuple[Array, ...]
    first: tuple[int, ...]
    n_bins: int
    sliding: bool

    @staticmethod
    def build(propagation: Propagation, response: DetectorResponse, n_bins: int, *, by_group: bool, sliding: bool) -> "EnergyWindows":
        """Fold the propagation matrix with the detector's response, for the total or for each mass group."""
        starts = _starts(n_bins, sliding)
        edges = np.round(np.append(starts, starts[-1] + (_STEP * np.arange(1, _PER_BIN + 1) if sliding else 0.1)), 6)
        n_sub, centres = 8, propagation.lg_edges[:-1, None]
        points = centres + np.diff(propagation.lg_edges)[:, None] * (np.arange(n_sub) + 0.5) / n_sub
        above = response.survival(points.ravel(), edges).reshape(points.shape[0], n_sub, -1).mean(axis=1)
        width = _PER_BIN if sliding else 1
        window = above[:, :-width] - above[:, width:]
        folded = np.einsum("aigo,ow->aigw", propagation.matrix, window, optimize=True)
        folded[folded < 1e-150] = 0.0  # far Gaussian tails: their products would be denormal numbers
        n_in = folded.shape[1]
        if not by_group:
            return EnergyWindows((np.ascontiguousarray(folded.sum(axis=2).reshape(5 * n_in, -1)),), (0,), n_bins, sliding)
        blocks = tuple(np.ascontiguousarray(folded[g:, :, g].reshape((5 - g) * n_in, -1)) for g in range(5))
        return EnergyWindows(blocks, tuple(range(5)), n_bins, sliding)

    def counts(self, injected: Array, shift: Array | None) -> Array:
        """Relative counts (rows, n_blocks, n_bins) from the injection (rows, species * E_in) at shifts of lgE (rows,)."""
        rows, n_in = injected.shape[0], injected.shape[1] // 5
        n_starts = self.blocks[0].shape[1]
        table = np.empty((rows, len(self.blocks), n_starts))
        for i, (block, first) in enumerate(zip(self.blocks, self.first, strict=True)):
            table[:, i] = injected[:, first * n_in :] @ block
        if shift is None:
            return table
        table += _TINY
        np.log(table, out=table)
        return np.exp(_slide(table, shift, self.n_bins))


def _starts(n_bins: int, sliding: bool) -> Array:
    if not sliding:
        return LG_EDGES[0] + 0.1 * np.arange(n_bins)
    margin = int(np.ceil(MAX_PULL * ENERGY_SCALE / _STEP)) + 2
    return LG_EDGES[0] + _STEP * np.arange(-margin, _PER_BIN * (n_bins - 1) + margin + 1)


def _slide(table: Array, shift: Array, n_bins: int) -> Array:
    """Interpolate table (rows, blocks, starts) at the starts 18.7 + 0.1 k - shift -> (rows, blocks, n_bins), by Lagrange's formula."""
    rows, n_blocks, n_starts = table.shape
    margin = (n_starts - _PER_BIN * (n_bins - 1) - 1) // 2
    position = margin - shift / _STEP
    node = np.clip(np.floor(position).astype(np.intp), -_NODES[0], n_starts - 1 - _NODES[-1] - _PER_BIN * (n_bins - 1))
    t = position - node
    base = (np.arange(rows * n_blocks) * n_starts).reshape(rows, n_blocks, 1) + node[:, None, None] + _PER_BIN * np.arange(n_bins)
    flat = table.reshape(-1)
    out = np.zeros(base.shape)
    for j in _NODES:
        others = _NODES[j != _NODES]
        weight = np.prod(t[:, None] - others, axis=1) / np.prod(j - others)
        out += weight[:, None, None] * flat.take(base + j)
    return out


class SpectrumTable:
    """Injected spectra of all species on the propagation grid from (gamma, R_cut, fractions).

    Args: lg_energy (E_in,), lg(E/eV). convention of the fractions; lg_threshold, lg(E/eV), of the energy fractions.
    """

    def __init__(self, lg_energy: Array, convention: str, lg_threshold: float) -> None:
        self.convention, self.lg_threshold = convention, lg_threshold
        self._minus_rigidity = -(10.0 ** (lg_energy - 18) / np.array(CHARGES)[:, None]).ravel()  # E/Z in EV
        self._log_energy = (lg_energy - 18) * np.log(10)

    def injected(self, gamma: Array, lg_rcut: Array, fractions: Array) -> Array:
        """Injection (rows, species * E_in): the same as `propagation.injection` times the fractions at fixed energy."""
        out = np.multiply.outer(10.0 ** (18 - lg_rcut), self._minus_rigidity)
        out += 1.0
        # the cutoff is limited to e^-300, because denormal numbers slow the matrix product by a factor of ten
        np.clip(out, -300.0, 0.0, out=out)
        cube = out.reshape(gamma.size, 5, -1)
        cube += ((1 - gamma)[:, None] * self._log_energy)[:, None, :]
        np.exp(out, out=out)
        cube *= self.at_fixed_energy(gamma, lg_rcut, fractions)[:, :, None]
        return out

    def at_fixed_energy(self, gamma: Array, lg_rcut: Array, fractions: Array) -> Array:
        """Fractions at fixed energy (rows, 5), up to a factor, from fractions in this table's convention."""
        if self.convention == "fixed_energy":
            return fractions
        share = fractions / energy_weights(gamma, lg_rcut, self.lg_threshold)
        return share / share.sum(axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class XmaxTable:
    """Smeared Xmax templates of 9 histograms x 5 mass groups on the histogram bins, on a grid of shifts of the Xmax scale.

    Args: single (8, n_shifts, 10, n_bins) and last (n_shifts, 50, n_bins): accepted fractions per bin, at a shift and,
    in the second half of the axis before the last, at the next shift. accepted (13, 5): sums over the bins.
    up, low (9,): g/cm2 per +1 and -1 sigma. per_lg_energy (9,): d<Xmax>/dlgE in g/cm2. n_events (9,).
    """

    single: Array
    last: Array
    up: Array
    low: Array
    per_lg_energy: Array
    n_events: NDArray[np.int64]
    edges: Array

    @staticmethod
    def build(data: AugerData, model: str, edges: Array, first: int) -> "XmaxTable":
        """Smear the Gumbel distributions of `model`; `first` is the row of the histogram at lgE 18.7."""
        low, high = int(edges[0]) - _N_STORED_SHIFT - 1, int(edges[-1]) + _N_STORED_SHIFT + 1
        shifts = np.arange(-_N_STORED_SHIFT, _N_STORED_SHIFT + 1)
        inner = np.round(edges[1:-1]).astype(int)
        templates = np.empty((N_XMAX_WINDOWS, shifts.size, 5, edges.size - 1))
        slope = np.empty((N_XMAX_WINDOWS, 5))
        for w in range(N_XMAX_WINDOWS):
            row, lg_energy = first + min(w, 8), 18.75 + 0.1 * w
            for g, mass in enumerate(MASSES):
                below, accepted = smeared_fraction(lg_energy, mass, model, data.acceptance[row], data.resolution[row], low, high)
                # the first and the last bin include all showers beyond them
                at = np.concatenate(
                    [np.zeros((shifts.size, 1)), below[inner - shifts[:, None] - low], np.full((shifts.size, 1), accepted)], axis=1
                )
                templates[w, :, g] = np.maximum(np.diff(at, axis=1), 0.0)
                slope[w, g] = gumbel_parameters(lg_energy + 0.05, mass, model)[0] - gumbel_parameters(lg_energy - 0.05, mass, model)[0]
        pairs = np.concatenate([templates[:, :-1], templates[:, 1:]], axis=2)
        last = np.concatenate([templates[8:, :-1], templates[8:, 1:]], axis=2).transpose(1, 0, 2, 3)
        rows = slice(first, first + 9)
        return XmaxTable(
            single=np.ascontiguousarray(pairs[:8], dtype=np.float32),
            last=np.ascontiguousarray(last.reshape(shifts.size - 1, 50, -1), dtype=np.float32),
            up=data.systematics[rows, 0].copy(),
            low=data.systematics[rows, 1].copy(),
            per_lg_energy=np.append(slope[:8].mean(axis=1), slope[8:].mean()) / 0.1,
            n_events=data.xmax_counts[rows].sum(axis=1),
            edges=edges,
        )

    def shift(self, energy_shift: Array | None, pull: Array | None, rows: int) -> Array | None:
        """Shift of the measured Xmax (rows, 9) in g/cm2; None where no nuisance is on.

        If energies are overestimated by a shift of lgE, the showers of a bin have lower energies and are less deep.
        """
        if energy_shift is None and pull is None:
            return None
        out = np.zeros((rows, 9))
        if energy_shift is not None:
            out -= energy_shift[:, None] * self.per_lg_energy
        if pull is not None:
            held = np.clip(pull, -MAX_PULL, MAX_PULL)[:, None]
            out += np.where(held > 0, held * self.up, held * self.low)
        return out

    def probabilities(self, groups: Array, shift: Array | None) -> Array:
        """Probabilities of the bins (rows, 9, n_bins) from group counts per energy window (rows, 5, 13)."""
        weights = np.ascontiguousarray(groups.transpose(0, 2, 1), dtype=np.float64)
        # the total of a histogram cancels; it is divided out before the conversion to single precision
        total = np.append(weights[:, :8].sum(axis=2), weights[:, 8:].sum(axis=(1, 2))[:, None], axis=1)
        total = np.maximum(total, _TINY)
        weights[:, :8] /= total[:, :8, None]
        weights[:, 8:] /= total[:, 8:, None]
        weights += 1e-30  # no denormals in single precision
        rows = weights.shape[0]
        if shift is None:
            node, t = np.full((rows, 9), _N_STORED_SHIFT), np.zeros((rows, 9))
        else:
            position = shift + _N_STORED_SHIFT
            node = np.clip(np.floor(position).astype(np.intp), 0, self.last.shape[0] - 1)
            t = position - node
        out = np.empty((rows, 9, self.single.shape[-1]))
        first = weights[:, :8]
        both = np.concatenate([first * (1 - t[:, :8, None]), first * t[:, :8, None]], axis=2).astype(np.float32)
        out[:, :8] = np.matmul(both[:, :, None, :], self.single[np.arange(8), node[:, :8]])[:, :, 0]
        rest = weights[:, 8:]
        both_last = np.concatenate([rest * (1 - t[:, 8, None, None]), rest * t[:, 8, None, None]], axis=2).reshape(rows, 1, 50)
        out[:, 8] = np.matmul(both_last.astype(np.float32), self.last[node[:, 8]])[:, 0]
        out /= out.sum(axis=2, keepdims=True)
        return with_floor(out)


def with_floor(probability: Array) -> Array:
    """(p + FLOOR) / sum over the last axis, a probability that is nowhere 0."""
    probability += FLOOR
    probability /= probability.sum(axis=-1, keepdims=True)
    return probability
