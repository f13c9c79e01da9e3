r"""Every method on one measured spectrum, in one form: counts in the measured bins with covariance, and what they fold back to.

Forward folding comes first. Its flux is used where its form hardly matters: as the spectrum within a bin, and for what migrates in from
outside. As the prior of iterative Bayes, Tikhonov and the posterior stands the single power law that describes the counts best: it knows
two numbers of the data, and nothing of breaks. The simulation of the learned methods is drawn from the fitted flux, as simulations are
reweighted to what is known: from a power law their networks smooth the breaks away. For each replica of the data the flux is fitted anew.
"""

from collections.abc import Callable

import numpy as np

from sbi_phys.core.checks import require_choice
from sbi_phys.core.types import Array
from sbi_phys.unfold import StoppingRule, forward_fold, ibu, tikhonov
from sbi_phys.unfold.folding import bin_integral, broken_power_law
from sbi_phys.unfold.ibu import deviance
from sbi_phys.unfold.measurement import Measurement
from sbi_phys.workflow.unfold_learned import networks, weighting
from sbi_phys.workflow.unfold_tasks import Answer, Task

__all__ = ["METHODS", "chi2_of", "require_methods", "starting_values"]


_INDEX_BELOW = 0.2  # change of the spectral index below the first bin, for what migrates in from there


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
    """Forward folding of broken power laws, the corrections of other descriptions of the detector, and what its constants are worth."""
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


# in the order in which they are run; the first gives the others their spectrum
METHODS: dict[str, Callable[[Task], Answer]] = {
    "folding": folding,
    "ibu": bayes_iterations,
    "tikhonov": least_squares,
    "bayes": posterior,
    "omnifold": weighting,
    "flow": networks,
}


def chi2_of(m: Measurement, answer: Answer) -> tuple[float, float]:
    """Poisson deviance of the counts from the refolded ones, and its degrees of freedom: bins less the parameters used up, where known."""
    used = 0.0 if answer.effective is None else answer.effective
    return deviance(m.counts, np.maximum(answer.refolded, 1e-12)), m.counts.size - used


def require_methods(methods: tuple[str, ...]) -> tuple[str, ...]:
    """Return the methods in their order, forward folding always among them.   Raises: SettingError."""
    for name in methods:
        require_choice("method", name, METHODS)
    return tuple(name for name in METHODS if name == "folding" or name in methods)
