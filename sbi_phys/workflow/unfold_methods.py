r"""Unfolding methods on one measured spectrum, in one form: counts in the measured bins with covariance, and the refolded counts.

Forward folding comes first. Its flux is used where its form hardly matters: as the spectrum within a bin, and for what migrates in from
outside. The prior of iterative Bayes, Tikhonov and the posterior is the single power law that describes the counts best: it uses two
numbers of the data and has no breaks. The simulation of the learned methods (OmniFold, event-wise flow) is drawn from the fitted flux;
started from a power law, their networks smooth the breaks away. The flux is fitted again for each replica of the data.

The learned methods work on events, and only bins are published: every event, measured or simulated, is put at the centre of its bin. The
simulation is quasi-random in (truth, reconstructed), so that its own noise is below that of the data; half of it is even in lgE, with
weights, to have events at the highest energies.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import require_choice
from sbi_phys.core.errors import ConvergenceError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, Mask
from sbi_phys.unfold import StoppingRule, forward_fold, ibu, tikhonov
from sbi_phys.unfold.folding import bin_integral, broken_power_law
from sbi_phys.unfold.ibu import deviance
from sbi_phys.unfold.measurement import Measurement
from sbi_phys.unfold.response import Response
from sbi_phys.workflow.settings import UnfoldSettings

__all__ = [
    "METHODS",
    "TITLES",
    "Answer",
    "Task",
    "chi2_of",
    "networks",
    "require_methods",
    "simulate_pairs",
    "starting_values",
    "weighting",
]


TITLES = {
    "folding": "forward folding",
    "ibu": "iterative Bayes",
    "tikhonov": "Tikhonov",
    "bayes": "Bayesian posterior",
    "omnifold": "OmniFold",
    "flow": "event-wise flow",
}
_INDEX_BELOW = 0.2  # change of the spectral index below the first bin, for what migrates in from there
_LATTICE = (0.7548776662466927, 0.5698402909980532)  # additive recurrence of the plastic number: even in two dimensions
_ROWS_PER_BIN = 200  # of data rows that share the weight of a bin: enough for batches and for a split
_UNSEEN = 1e-4  # share of the measured events whose true energies are too low to be simulated, because nearly all would be missed


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Result of a method in the r measured bins.

    counts (r,), true events. covariance (r, r), all sources; parts, by source. refolded (r,), expected counts.
    effective: number of parameters that the fit uses, None if unknown. samples (n, r): draws of the spectrum, or None. words: summary.
    numbers: plain values; arrays: further ones, by name. figures: matplotlib Axes, by name.
    """

    counts: Array
    covariance: Array
    refolded: Array
    parts: dict[str, Array] = field(default_factory=dict)
    effective: float | None = None
    samples: Array | None = None
    words: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method gets: measurement, settings, spectrum (f,) of the fit in fine true bins with the responses it makes, prior (f,).

    theta (p,): parameters of the fitted flux; empty: the spectrum comes from elsewhere and is not fitted to replicas.
    """

    measurement: Measurement
    settings: UnfoldSettings
    spectrum: Array
    prior: Array
    theta: Array = field(default_factory=lambda: np.zeros(0))
    progress: Progress | None = None

    @property
    def extended(self) -> Response:
        """Response of all true bins."""
        return self.measurement.extended(self.spectrum)

    @property
    def within(self) -> Response:
        """Response of the measured bins, the rest as a share of each."""
        return self.measurement.within(self.spectrum)

    @property
    def start(self) -> Array:
        """Prior in the true bins (t,)."""
        return self.measurement.coarse(self.prior)

    def seed(self, *key: str | int) -> int:
        """Seed of a step, named by its key."""
        return seed_for(self.settings.seed, "unfold", *key)


def starting_values(m: Measurement, n_breaks: int) -> tuple[int, Array | None]:
    """Number of breaks (-1: the problem's own) and where the fit begins; None for a power law without breaks.

    Without values of the problem's own the breaks start evenly spaced, on the power law that describes the counts best.
    """
    n = m.n_breaks if n_breaks < 0 else n_breaks
    if n == 0 or (m.start is not None and n == m.n_breaks):
        return n, m.start if n else None
    plain = forward_fold(m.counts, m.fine).values
    breaks = np.linspace(m.reco_edges[0], m.reco_edges[-1], n + 2)[1:-1]
    return n, np.concatenate([plain[:1], np.full(n + 1, plain[1]), breaks])


def folding(task: Task) -> Answer:
    """Forward folding of broken power laws, corrections by other descriptions of the detector, and the effect of its constants."""
    m = task.measurement
    n, start = starting_values(m, task.settings.n_breaks)
    found = forward_fold(m.counts, m.fine, n_breaks=n, start=start)
    power_law = found if n == 0 else forward_fold(m.counts, m.fine)
    arrays = {
        "power_law": power_law.values,
        "parameters": found.values,
        "parameter_errors": found.errors,
        "correction_errors": found.correction_errors,
    }
    if m.start is not None and n == m.n_breaks:
        arrays["correction_at_start"] = _corrections(m, m.start)
    for i, other in enumerate(m.alternatives.values()):
        arrays[f"correction_alternative_{i}"] = forward_fold(other.counts, other.fine, n_breaks=n, start=start).correction
        if other.start is not None and n == other.n_breaks:
            arrays[f"correction_at_start_alternative_{i}"] = _corrections(other, other.start)
    if m.variations:
        varied = [forward_fold(other.counts, other.fine, n_breaks=n, start=found.values if n else None) for other in m.variations.values()]
        # relative change of the unfolded counts (variations, r)
        arrays["variations"] = np.stack([other.counts / found.counts - 1 for other in varied])
    return Answer(
        counts=found.counts,
        covariance=found.covariance,
        refolded=found.refolded,
        effective=float(found.values.size),
        words=found.summary(),
        numbers={"names": list(found.names), "values": found.values, "errors": found.errors, "pvalue": found.pvalue, "n_breaks": n},
        arrays=arrays,
        figures={"fit": found.plot()},
    )


def _corrections(m: Measurement, theta: Array) -> Array:
    wanted, folded = (bin_integral(broken_power_law, edges, theta) for edges in (m.reco_edges, m.fine_edges))
    return np.asarray(wanted / m.fine.fold(folded))


def bayes_iterations(task: Task) -> Answer:
    """Iterative Bayes, stopped where toys are covered; with another prior, and with another spectrum below the first bin."""
    m, response = task.measurement, task.within
    rule = StoppingRule(n_toys=task.settings.n_toys, coverage=task.settings.coverage)
    prior = task.start[m.inner]
    found = ibu(m.counts, response, "coverage", prior, rule=rule, errors="expected", seed=task.seed("ibu"))
    other = ibu(m.counts, response, found.n_iterations, response.truth)
    below = np.where(m.fine_edges[:-1] < m.reco_edges[0] - 1e-9, m.fine_edges[:-1] - m.reco_edges[0], 0.0)
    steeper = m.within(task.spectrum * 10.0 ** (-_INDEX_BELOW * below))
    moved = ibu(m.counts, steeper, found.n_iterations, prior)
    assert found.stopping is not None  # a rule was given
    return Answer(
        counts=found.counts,
        covariance=found.covariance,
        parts={"data": found.covariance_data, "prior": found.covariance_prior},
        refolded=found.refolded,
        effective=float(np.trace((response.matrix / (1 - response.fakes)[:, None]) @ found.jacobian)),
        words=found.summary(),
        numbers={
            "n_iterations": found.n_iterations,
            "rule_met": found.stopping.met,
            "coverage_worst": float(found.stopping.coverage[-1].min()),
            "mean_pull_worst": float(np.abs(found.stopping.mean_pull[-1]).max()),
            "prior_spread_sigma": float((np.abs(other.counts - found.counts) / found.errors).max()),
            "index_below": _INDEX_BELOW,
            "migration_below": float(response.fakes[0]),
        },
        arrays={"other_prior": other.counts, "steeper_below": moved.counts / found.counts - 1, "from_outside": response.fakes},
        figures={"stopping": found.stopping.plot(), "response": response.plot()},
    )


def least_squares(task: Task) -> Answer:
    """Tikhonov's method at the smallest mean global correlation."""
    found = tikhonov(task.measurement.counts, task.within, prior=task.start[task.measurement.inner])
    return Answer(
        counts=found.counts,
        covariance=found.covariance,
        parts={"data": found.covariance_data},
        refolded=found.refolded,
        effective=found.effective,
        words=found.summary(),
        numbers={"strength": found.strength},
        figures={} if found.scan is None else {"scan": found.scan.plot()},
    )


def posterior(task: Task) -> Answer:
    """Posterior draws of the spectrum; the outer true bins are drawn along and integrated out."""
    from sbi_phys.unfold.bayes import bayesian_unfold

    m, s = task.measurement, task.settings
    found = bayesian_unfold(
        m.counts,
        task.extended,
        smoothness=s.bayes_smoothness or None,
        reference=task.start,
        n_draws=s.bayes_samples,
        seed=task.seed("bayes") % 2**31,
        progress=task.progress,
    )
    samples = np.asarray(found.samples)[:, m.inner]
    return Answer(
        counts=np.asarray(found.counts)[m.inner],
        covariance=np.asarray(found.covariance)[m.inner, m.inner],
        refolded=np.asarray(found.refolded),
        effective=float(found.effective),
        samples=samples,
        words=found.summary(),
        numbers={"n_effective": float(found.n_effective), "predictive_pvalue": float(found.predictive_pvalue)},
    )


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
    sizes: list[float] = []

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
        sizes.append(found.effective_sample_size)
        return found.weights

    answer = _from_weights(task, pairs, run, s.omnifold_replicas, "omnifold")
    words = f"OmniFold, {s.omnifold_iterations} iterations, {s.n_simulated} simulated events, {s.omnifold_replicas} replicas of the data"
    numbers = answer.numbers | {"n_iterations": s.omnifold_iterations, "effective_sample_size": sizes[0]}
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


# in the order of execution; the first gives the others their spectrum
METHODS: dict[str, Callable[[Task], Answer]] = {
    "folding": folding,
    "ibu": bayes_iterations,
    "tikhonov": least_squares,
    "bayes": posterior,
    "omnifold": weighting,
    "flow": networks,
}


def chi2_of(m: Measurement, answer: Answer) -> tuple[float, float]:
    """Poisson deviance of the counts from the refolded ones, and its degrees of freedom: bins minus parameters of the fit."""
    used = 0.0 if answer.effective is None else answer.effective
    return deviance(m.counts, np.maximum(answer.refolded, 1e-12)), m.counts.size - used


def require_methods(methods: tuple[str, ...]) -> tuple[str, ...]:
    """Return the methods in their order, forward folding always among them.   Raises: SettingError."""
    for name in methods:
        require_choice("method", name, METHODS)
    return tuple(name for name in METHODS if name == "folding" or name in methods)
