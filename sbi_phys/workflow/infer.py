r"""Stages `infer`, `rounds` and `refine`: from the amortised network to the answer for the one observation.

    q(theta | x_o)  ->  networks trained where q has mass  ->  draws weighted with the exact likelihood

With the weights w = p(x_o | theta) p(theta) / q(theta | x_o) the final draws are exact up to their number, whatever the
network got wrong, and the effective share of the draws says how much that was.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from sbi_phys.core.errors import DataError
from sbi_phys.core.types import Array
from sbi_phys.estimators.base import load
from sbi_phys.estimators.npe import NPE
from sbi_phys.estimators.sequential import truncated_rounds
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.importance import importance_sample
from sbi_phys.store.store import Store
from sbi_phys.workflow.run import Run

__all__ = ["infer", "log_target", "refine", "rounds"]

_MIN_ESS = 100  # effective draws below which importance weights describe no posterior


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
    except DataError as err:  # the amortised posterior is too wide to be worth cutting off: a finding, and the run goes on without
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
    """The network that knows most about the observation, and what it is called."""
    sequential = run.path("model_rounds.pt")
    name, path = ("truncated rounds", sequential) if sequential.exists() else ("amortised network", run.path("model.pt"))
    return load(path, simulator=run.simulator, device=run.config.run.device), name


def refine(run: Run, numbers: dict[str, Any]) -> None:
    """Weight draws of the best network with the exact likelihood; without one its draws are the answer as they are."""
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
    else:  # a handful of points is no posterior: the network's own draws stay, and the report says so
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
