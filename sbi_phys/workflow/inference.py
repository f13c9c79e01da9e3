r"""Stages of an inference run: simulate, train, infer, rounds, refine, reference, compare, calibrate, check.

    prior  ->  store  ->  q(theta | x)  ->  networks trained where q(theta | x_o) has mass  ->  draws weighted with the likelihood

With the weights w = p(x_o | theta) p(theta) / q(theta | x_o) the final draws are exact up to their number, whatever the error of the
network, and the effective sample size measures that error. `reference` runs Markov chains on the exact likelihood, `compare` tests the
posteriors against them. `calibrate` tests the amortised network on held-out simulations and at the observation. `check` is in `checks`.
"""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sbi_phys.calibration import c2st
from sbi_phys.calibration.calibrate import calibrate as run_tests
from sbi_phys.core.errors import DataError, SettingError, SimulatorMismatchError
from sbi_phys.core.types import Array
from sbi_phys.estimators.base import load
from sbi_phys.estimators.npe import NPE
from sbi_phys.estimators.sequential import truncated_rounds
from sbi_phys.plotting.posterior import panels_figure
from sbi_phys.priors import LogUniformPrior, Prior, standard_normal_log_prob
from sbi_phys.report.tables import shift_table
from sbi_phys.samplers.importance import importance_sample
from sbi_phys.samplers.mcmc import run_emcee
from sbi_phys.samplers.tempering import spread_start
from sbi_phys.simulation.campaign import simulate as run_simulations
from sbi_phys.simulation.clusters import cluster_executor
from sbi_phys.simulation.inspection import quick_check
from sbi_phys.store.manifest import MANIFEST
from sbi_phys.store.store import Store
from sbi_phys.workflow.checks import check
from sbi_phys.workflow.run import Run

__all__ = [
    "LogTarget", "calibrate", "check", "compare", "estimator_settings", "fit_network", "has_reference", "infer", "log_names", "log_target",
    "news", "observation_of", "reference", "refine", "rounds", "rows_used", "simulate", "simulations", "train", "training_rows",
]  # fmt: skip

_MIN_ESS = 100  # effective draws below which importance weights do not describe a posterior
# draws of each: the least with which a two-sample accuracy can be compared between runs, and the most that a few seconds allow
_C2ST_DRAWS = 2000
_POSTERIORS = {"amortised": "posterior_amortised.nc", "rounds": "posterior_rounds.nc", "final": "posterior.nc"}


def simulations(run: Run, folder: str, n: int, *key: int | str) -> Store:
    """The store of n prior draws in a folder of the run, made or completed."""
    where = run.config.run
    with cluster_executor(scheduler=where.scheduler, cluster=where.cluster, say=_say) as (executor, n_workers):
        return run_simulations(
            run.simulator,
            n,
            run.path(folder),
            seed=run.seed(*key),
            workers=n_workers or where.workers or None,
            executor=executor,
            shard_size=run.config.simulate.shard_size,
            dtype=run.config.simulate.dtype,
            layout=run.config.simulate.layout(),
            accept_code_change=run.accept_code_change,
            progress=run.progress,
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def simulate(run: Run, numbers: dict[str, Any]) -> None:
    """Check the simulator, draw theta from the prior and x from the simulator; failed rows stay in the store with a flag."""
    if not run.path("simulations", MANIFEST).exists():
        found = quick_check(run.simulator, seed=run.seed("check simulator"))
        for finding in found.warnings:
            _say(str(finding))
        if not found.ok:
            raise SimulatorMismatchError(f"{found.simulator} cannot be used: {'; '.join(f.text for f in found.errors)}")
    store = simulations(run, "simulations", run.config.simulate.n, "simulate")
    numbers |= {"n_simulations": store.n_rows, "n_failed": store.n_failed}


def estimator_settings(run: Run) -> dict[str, Any]:
    """The settings that every estimator of a run takes."""
    config = run.config
    return {
        "embedding": config.embedding,
        "n_ensemble": config.estimator.n_ensemble,
        "x_transform": config.estimator.x_transform,
        "standardise": config.estimator.standardise,
        "device": config.run.device,
        "observables": run.simulator.observables,
        "simulator": run.simulator,
        "config": config.train,
    }


def fit_network(run: Run) -> NPE:
    """Train the amortised network; under torchrun every process calls this."""
    run.path("training").mkdir(exist_ok=True)
    memory = run.config.run.memory or None
    checkpoint = run.path("training", "amortised")
    return NPE(run.simulator.prior, seed=run.seed("train"), flow=run.config.flow, **estimator_settings(run)).fit(
        *training_rows(run), memory=memory, checkpoint=checkpoint, progress=run.progress
    )


def rows_used(run: Run) -> int:
    """Rows of the store that the network is trained on."""
    return min(run.config.estimator.n_simulations or run.config.simulate.n, run.config.simulate.n)


def training_rows(run: Run) -> tuple[Any, ...]:
    """The arguments of `fit`: the store, or theta and x of its first rows where it has more than are used."""
    store, n = Store(run.path("simulations")), rows_used(run)
    if store.n_rows <= n:
        return (store,)
    parts, left = [], n
    for theta, x, status in store.shards():
        good = status[:left] == 0
        parts.append((theta[:left][good], x[:left][good]))
        left -= len(good)
        if left <= 0:
            break
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def train(run: Run, numbers: dict[str, Any]) -> None:
    """Train the amortised network on the store; an interrupted training continues from its checkpoint."""
    npe = fit_network(run)
    npe.save(run.path("model.pt"))
    numbers |= {
        "validation_loss": [min(record["valid"] for record in member) for member in npe.history],
        "epochs": [len(member) for member in npe.history],
        "device": str(npe.device),
        "threads": torch.get_num_threads(),
    }


def log_names(prior: Prior) -> list[str]:
    """Names of the parameters whose prior is log-uniform: figures have them on a logarithmic axis."""
    blocks = getattr(prior, "blocks", (prior,))
    return [p.name for block in blocks if isinstance(block, LogUniformPrior) for p in block.parameters]


def news(stage: str, numbers: dict[str, Any]) -> str:
    """Return what a finished stage found, in a few words for the progress display."""
    if isinstance(numbers.get("skipped"), str):
        return f"skipped: {numbers['skipped']}"
    n, failed = numbers.get("n_simulations", numbers.get("n", 0)), numbers.get("n_failed", 0)
    rows = f"{n} rows" + (f", {failed} failed" if failed else "")
    if stage == "train":
        loss = ", ".join(f"{value:.3f}" for value in numbers.get("validation_loss", ()))
        return f"{max(numbers.get('epochs', [0]))} epochs, validation loss {loss}"
    if stage == "compare":
        return ", ".join(f"{name} C2ST {found['c2st']:.3f}" for name, found in numbers.items() if "c2st" in found)
    words = {
        "simulate": rows,
        "rounds": rows,
        "infer": f"{numbers.get('n_draws', 0)} draws",
        "refine": f"effective sample size {numbers.get('ess', 0):.0f}",
        "reference": f"{'converged' if numbers.get('converged') else 'NOT converged'}, {numbers.get('n_effective', 0):.0f} effective draws",
        "calibrate": f"{len(numbers.get('failed', ()))} of {len(numbers.get('pvalues', ()))} tests fail",
        "check": f"predictive p = {numbers.get('pvalue', 0):.3g} from {numbers.get('n', 0)} replicas"
        + (f", {failed} failed" if failed else ""),
        "report": f"{len(numbers.get('sections', ()))} sections",
    }
    return words.get(stage, "")


def log_target(run: Run) -> "LogTarget | None":
    """The exact posterior in the whitened space, up to the evidence; None without an exact likelihood."""
    return LogTarget(run.simulator, run.observation) if callable(getattr(run.simulator, "log_likelihood", None)) else None


class LogTarget:
    """log p(x_o | theta(u)) + log N(u; 0, I) of u (n, free_dim) -> (n,): likelihood times prior, in whitened space."""

    def __init__(self, simulator: Any, x: Array) -> None:
        self._simulator, self._x = simulator, x

    def __call__(self, u: Array) -> Array:
        """Log density of u (n, free_dim) -> (n,), normalised up to the evidence."""
        theta = self._simulator.prior.from_unbounded(u)
        return np.asarray(self._simulator.log_likelihood(self._x, theta), dtype=np.float64) + standard_normal_log_prob(u)


def infer(run: Run, numbers: dict[str, Any]) -> None:
    """Draw from the amortised posterior of the observation."""
    npe = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
    theta = npe.sample(run.observation, run.config.infer.n_draws, seed=run.seed("infer"))
    run.write_draws("posterior_amortised.nc", theta, {"method": "amortised network"})
    numbers["n_draws"] = len(theta)


def rounds(run: Run, numbers: dict[str, Any]) -> None:
    """Train again on simulations from where the amortised posterior of the observation has its mass."""
    settings = run.config.rounds
    run.path("model_rounds.pt").unlink(missing_ok=True)
    if not settings.n_rounds:
        numbers["skipped"] = "rounds.n_rounds = 0"
        return
    amortised = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
    try:
        npe = truncated_rounds(
            amortised,
            run.simulator,
            run.observation,
            run.path("rounds"),
            n_rounds=settings.n_rounds,
            n_simulations=settings.n,
            epsilon=settings.epsilon,
            config=replace(run.config.train, max_epochs=settings.max_epochs or run.config.train.max_epochs),
            seed=run.seed("rounds"),
            workers=run.config.run.workers or None,
            progress=run.progress,
        )
    except DataError as err:  # the amortised posterior is too wide to truncate: the run continues without rounds
        numbers["skipped"] = f"no region to truncate to: {err}"
        return
    stores = [Store(run.path("rounds", f"round-{k + 1}")) for k in range(settings.n_rounds)]
    numbers |= {
        "n_rounds": settings.n_rounds,
        "n_simulations": sum(store.n_rows for store in stores),
        "n_failed": sum(store.n_failed for store in stores),
        "validation_loss": [min(record["valid"] for record in member) for member in npe.history],
    }
    run.write_draws("posterior_rounds.nc", npe.sample(run.observation, run.config.infer.n_draws, seed=run.seed("rounds")), dict(numbers))
    npe.save(run.path("model_rounds.pt"))


def best_network(run: Run) -> tuple[NPE, str]:
    """The network with the most training near the observation, and its name in the report."""
    sequential = run.path("model_rounds.pt")
    name, path = ("truncated rounds", sequential) if sequential.exists() else ("amortised network", run.path("model.pt"))
    return load(path, simulator=run.simulator, device=run.config.run.device), name


def refine(run: Run, numbers: dict[str, Any]) -> None:
    """Weight draws of the best network with the exact likelihood; without a likelihood its draws are the final ones."""
    npe, name = best_network(run)
    n, n_refine, target = run.config.infer.n_draws, run.config.infer.n_refine, log_target(run)
    if target is None or not n_refine:
        run.write_draws("posterior.nc", npe.sample(run.observation, n, seed=run.seed("refine")), {"method": name})
        numbers |= {"skipped": "no exact likelihood" if target is None else "infer.n_refine = 0", "method": name}
        return
    result = importance_sample(
        target,
        npe.proposal(run.observation),
        n_refine,
        seed=run.seed("refine"),
        target_ess=run.config.infer.target_ess,
        progress=run.progress,
    )
    usable = result.ess >= _MIN_ESS
    if usable:
        u = result.resample(n, run.rng("refine", "resample"))
        theta, numbers["unique_fraction"] = run.simulator.prior.from_unbounded(u), len(np.unique(u, axis=0)) / n
    else:  # too few effective draws: the network's own draws are kept, and the report says so
        theta = npe.sample(run.observation, n, seed=run.seed("refine"))
    numbers |= {
        "method": f"{name}, importance-weighted" if usable else f"{name}, refinement failed",
        "refined": usable,
        "n_proposals": len(result.log_weights),
        "ess": result.ess,
        "ess_fraction": result.ess_fraction,
        "pareto_k": result.pareto_k,
        "log_evidence": result.log_evidence if usable else None,
        "log_evidence_err": result.log_evidence_err if usable else None,
    }
    run.write_draws("posterior.nc", theta, dict(numbers))
    run.write_array("weights.npy", result.log_weights)


def has_reference(run: Run) -> bool:
    """Whether stage `reference` runs Markov chains: there is an exact likelihood and they are asked for."""
    return log_target(run) is not None and run.config.reference.method != "none"


def reference(run: Run, numbers: dict[str, Any]) -> None:
    """Run emcee on the exact posterior; walkers start at likely and unlikely points of the prior and of the amortised posterior."""
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
        raise_on_failure=False,  # the report says so; the other stages do not depend on it
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
                continue  # an intermediate posterior: the shifts suffice, and a two-sample test takes half a minute
            try:
                test = c2st(theta, exact, seed=run.seed("compare"), max_draws=_C2ST_DRAWS, workers=run.config.run.workers or 2)
            except DataError as err:  # importance weights of a bad network leave copies of few draws, which is a result to report
                numbers[name]["c2st_failed"] = str(err)
                continue
            numbers[name] |= {"c2st": test.accuracy, "c2st_err": test.standard_error, "c2st_n": test.n}
            task.advance(1, text=f"{name} {test.accuracy:.3f}")


def calibrate(run: Run, numbers: dict[str, Any]) -> None:
    """Every test of calibration of the amortised network, on fresh simulations and at the observation."""
    settings = run.config.calibrate
    if not settings.n:
        numbers["skipped"] = "calibrate.n = 0"
        return
    npe = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
    found = run_tests(
        npe,
        simulations(run, "held_out", settings.n, "held out"),
        settings.n,
        n_draws=settings.n_draws,
        x_obs=observation_of(run),
        simulator=run.simulator,
        names=run.simulator.parameters,
        seed=run.seed("calibrate"),
        progress=run.progress,
    )
    ranks, regions = found.results["sbc"], found.results["coverage"]
    run.save_figure(panels_figure({"SBC ranks": ranks, "Expected coverage": regions}), "calibration")
    run.save_figure(ranks.figure(), "sbc_histograms")
    for name, figure in found.figures().items():
        run.save_figure(figure, f"calibration_{name}")
    numbers |= found.to_dict() | {
        "sbc_pvalue": ranks.pvalue,
        "sbc_pvalues": {name: p for name, p in ranks.pvalues.items() if name in run.names},
        "sbc_verdicts": ranks.verdicts,
        "coverage_pvalue": regions.pvalue,
        "coverage": {"level": regions.level, "observed": regions.observed, "band": regions.band},
    }
    run.write_json("calibration.json", numbers)


def observation_of(run: Run) -> Array | None:
    """The observation, or None where the run has none; the tests at the observation are skipped then."""
    try:
        return run.observation
    except (SettingError, DataError):
        return None
