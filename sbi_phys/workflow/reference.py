"""Stages `reference` and `compare`: Markov chains on the exact likelihood, and how far the learned posteriors are from them."""

from typing import Any

import numpy as np

from sbi_phys.calibration import c2st
from sbi_phys.core.errors import DataError
from sbi_phys.report.tables import shift_table
from sbi_phys.samplers.mcmc import run_emcee
from sbi_phys.samplers.tempering import spread_start
from sbi_phys.workflow.infer import log_target
from sbi_phys.workflow.run import Run

__all__ = ["compare", "reference"]


def reference(run: Run, numbers: dict[str, Any]) -> None:
    """Run emcee on the exact posterior; walkers start at likely and at unlikely places of the prior and of the amortised posterior."""
    settings, target = run.config.reference, log_target(run)
    run.path("reference.nc").unlink(missing_ok=True)
    if target is None or settings.method == "none":
        numbers["skipped"] = "no exact likelihood" if target is None else "reference.method = none"
        return
    prior, rng = run.simulator.prior, run.rng("reference", "start")
    candidates = np.concatenate([prior.sample(20 * settings.n_walkers, rng), run.read_draws("posterior_amortised.nc").flat[:2000]])
    result = run_emcee(
        target,
        spread_start(target, prior.to_unbounded(candidates), settings.n_walkers, rng),
        n_draws=settings.n_draws,
        max_steps=settings.max_steps,
        seed=run.seed("reference"),
        raise_on_failure=False,  # the report says so; the rest of the run is still worth having
        progress=run.progress,
    )
    numbers |= {
        "converged": result.converged,
        "words": result.summary(),
        "autocorr_time": result.autocorr_time,
        "n_effective": result.n_effective,
        "acceptance": result.acceptance,
        "r_hat": result.r_hat,
        "r_hat_walkers": result.r_hat_walkers,
        "n_evaluations": result.n_evaluations,
    }
    run.write_draws("reference.nc", prior.from_unbounded(result.samples), {"method": "emcee", **numbers})


# draws of each: the least with which a two-sample accuracy can be compared between runs, and the most that a few seconds allow
_C2ST_DRAWS = 2000
_POSTERIORS = {"amortised": "posterior_amortised.nc", "rounds": "posterior_rounds.nc", "final": "posterior.nc"}


def compare(run: Run, numbers: dict[str, Any]) -> None:
    """Two-sample test and shifts of medians of every learned posterior against the reference."""
    if not run.path("reference.nc").exists():
        numbers["skipped"] = "no reference"
        return
    exact = run.read_draws("reference.nc").flat
    found = {name: file for name, file in _POSTERIORS.items() if run.path(file).exists()}
    with run.progress.task("two-sample tests", len(found)) as task:
        for name, file in found.items():
            theta = run.read_draws(file).flat
            numbers[name] = {"median_shift_sd": {row.name: row.shift for row in shift_table(theta, exact, run.simulator.parameters)}}
            if name == "rounds" and "final" in found:
                continue  # a stage on the way: the shifts say enough, and telling two good samples apart takes half a minute
            try:
                test = c2st(theta, exact, seed=run.seed("compare"), max_draws=_C2ST_DRAWS, workers=run.config.run.workers or 2)
            except DataError as err:  # refinement of a bad network leaves copies of few draws: that is a finding, not a crash
                numbers[name]["c2st_failed"] = str(err)
                continue
            numbers[name] |= {"c2st": test.accuracy, "c2st_err": test.standard_error, "c2st_n": test.n}
            task.advance(1, text=f"{name} {test.accuracy:.3f}")
