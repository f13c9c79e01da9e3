r"""OmniFold and the event-wise flow on a spectrum of which only bins are published.

Both work on events. Data and simulation are therefore treated alike: an event is where its bin is, at the centre, and nothing is
assumed of where in the bin it lies. The simulation is drawn from the response itself, quasi-random in (truth, reconstructed), so that
its own noise is below that of the data; half of it evenly in lgE, with weights, or the highest energies would have no events to learn
from.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.errors import ConvergenceError
from sbi_phys.core.progress import or_none
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Mask
from sbi_phys.unfold import forward_fold
from sbi_phys.unfold.folding import bin_integral, broken_power_law
from sbi_phys.unfold.measurement import Measurement
from sbi_phys.workflow.unfold_tasks import Answer, Task

__all__ = ["Pairs", "networks", "simulate_pairs", "weighting"]


_LATTICE = (0.7548776662466927, 0.5698402909980532)  # additive recurrence of the plastic number: even in two dimensions
_ROWS_PER_BIN = 200  # of data rows that share the weight of a bin: enough for batches and for a split
_UNSEEN = 1e-4  # share of the measured events whose true energies are too low to be simulated: nearly all of them would be missed


class Pairs(NamedTuple):
    """Simulated events: truth (n,) lgE, reco (n,) centre of the measured bin (0 where missed), reco_pass (n,), weights (n,)."""

    truth: Array
    reco: Array
    reco_pass: Mask
    weights: Array


def simulate_pairs(m: Measurement, spectrum: Array, n: int, rng: np.random.Generator) -> Pairs:
    """Draw n events of the fine true bins (f,) and pass them through the response: half after the spectrum, half evenly in lgE.

    Both halves times the root of the efficiency: far below the first bin nearly all would be missed. Weights make it the spectrum: their
    sum over the events of a true bin is its expected counts, up to the lattice's error.
    """
    k, shift = np.arange(n)[:, None], rng.random(2)
    u = np.mod(k * np.array(_LATTICE) + shift, 1.0)
    widths = np.diff(m.fine_edges)
    folded = np.cumsum(m.fine.efficiency * spectrum)
    seldom = np.where(folded > _UNSEEN * folded[-1], np.sqrt(m.fine.efficiency), 0.0)
    drawn = 0.5 * (spectrum * seldom / (spectrum @ seldom) + widths * seldom / (widths @ seldom))
    cumulative = np.append(0.0, np.cumsum(drawn))
    bins = np.clip(np.searchsorted(cumulative, u[:, 0] * cumulative[-1], side="right") - 1, 0, drawn.size - 1)
    truth = m.fine_edges[bins] + widths[bins] * np.clip(
        (u[:, 0] * cumulative[-1] - cumulative[bins]) / np.maximum(drawn[bins], 1e-300), 0, 1
    )
    reached = np.cumsum(m.fine.matrix, axis=0).T[bins]  # (n, r)
    where = (u[:, 1][:, None] >= reached).sum(axis=1)
    seen = where < m.counts.size
    reco = np.where(seen, m.centres[np.minimum(where, m.counts.size - 1)], 0.0)
    return Pairs(truth, reco, seen, spectrum[bins] / drawn[bins] / n)


def _data_rows(m: Measurement) -> tuple[Array, NDArray[np.intp]]:
    """Rows (r * k,) of measured events, at the centres of their bins, and the bin of each."""
    bins = np.repeat(np.arange(m.counts.size), _ROWS_PER_BIN)
    return m.centres[bins], bins


def _from_weights(task: Task, pairs: Pairs, run: Callable[[Array, Array, int], Array], n_replicas: int, name: str) -> Answer:
    """Unfolded counts of run(counts (r,), weights (n,), seed) -> (n,), with the covariance of Poisson replicas of the counts.

    For every replica the flux is fitted, the simulation reweighted to it, and the networks are trained anew.
    """
    m = task.measurement
    fine_bin = np.clip(np.searchsorted(m.fine_edges, pairs.truth, side="right") - 1, 0, m.fine_edges.size - 2)

    def histograms(counts: Array, seed: int) -> Array:
        change = _refitted(task, counts) / task.spectrum
        return np.histogram(pairs.truth, m.fine_edges, weights=run(counts, pairs.weights * change[fine_bin], seed))[0]

    with or_none(task.progress).task(f"{name}: replicas of the data", n_replicas + 1) as bar:
        fine = histograms(m.counts, task.seed(name))
        bar.advance()
        replicas = []
        for b in range(n_replicas):
            counts = rng_for(task.settings.seed, "unfold", name, "replica", b).poisson(m.counts).astype(np.float64)
            replicas.append(m.coarse(histograms(counts, task.seed(name, b)))[m.inner])
            bar.advance()
    return Answer(
        counts=m.coarse(fine)[m.inner],
        covariance=np.cov(np.array(replicas), rowvar=False),
        refolded=m.fine.fold(fine),
        numbers={"n_replicas": n_replicas, "n_simulated": pairs.truth.size},
        arrays={"replicas": np.array(replicas)},
    )


def _refitted(task: Task, counts: Array) -> Array:
    """Spectrum (f,) of the flux fitted to other counts; the task's own where that does not converge."""
    m = task.measurement
    if task.theta.size == 0 or np.array_equal(counts, m.counts):
        return task.spectrum
    try:
        theta = forward_fold(counts, m.fine, n_breaks=task.theta.size // 2 - 1, start=task.theta).values
    except ConvergenceError:
        return task.spectrum
    return m.exposure * bin_integral(broken_power_law, m.fine_edges, theta)


def weighting(task: Task) -> Answer:
    """OmniFold on events at the centres of their bins."""
    from sbi_phys.unfold.omnifold_weights import omnifold

    m, s = task.measurement, task.settings
    pairs = simulate_pairs(m, task.spectrum, s.n_simulated, rng_for(s.seed, "unfold", "pairs"))
    rows, bins = _data_rows(m)
    shares: list[float] = []

    def run(counts: Array, weights: Array, seed: int) -> Array:
        found = omnifold(
            pairs.truth,
            pairs.reco,
            rows,
            s.omnifold_iterations,
            pairs.reco_pass,
            weights=weights,
            data_weights=counts[bins] / _ROWS_PER_BIN,
            seed=seed,
            device="cpu",
        )
        shares.append(found.effective_sample_size)
        return found.weights

    answer = _from_weights(task, pairs, run, s.omnifold_replicas, "omnifold")
    words = f"OmniFold, {s.omnifold_iterations} iterations, {s.n_simulated} simulated events, {s.omnifold_replicas} replicas of the data"
    numbers = answer.numbers | {"n_iterations": s.omnifold_iterations, "effective_sample_size": shares[0]}
    return replace(answer, words=words, numbers=numbers)


def networks(task: Task) -> Answer:
    """Event-wise flow, reweighted to the unfolded data."""
    from sbi_phys.unfold.flow import FlowUnfolder

    m, s = task.measurement, task.settings
    pairs = simulate_pairs(m, task.spectrum, s.n_simulated, rng_for(s.seed, "unfold", "pairs"))
    rows, bins = _data_rows(m)

    def run(counts: Array, weights: Array, seed: int) -> Array:
        unfolder = FlowUnfolder(seed=seed, device="cpu").fit(
            pairs.truth,
            pairs.reco,
            rows,
            s.flow_iterations,
            reco_pass=pairs.reco_pass,
            weights=weights,
            data_weights=counts[bins] / _ROWS_PER_BIN,
        )
        return unfolder.weights

    answer = _from_weights(task, pairs, run, s.flow_replicas, "flow")
    words = f"event-wise flow, {s.flow_iterations} iterations, {s.n_simulated} simulated events, {s.flow_replicas} replicas of the data"
    return replace(answer, words=words, numbers=answer.numbers | {"n_iterations": s.flow_iterations})
