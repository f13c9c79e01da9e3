r"""Stages `train_nle`, `train_nre`, `infer_nle`, `infer_nre`: a learned likelihood or ratio beside the amortised posterior.

    store  ->  q(x | theta) or r(x | theta)  ->  theta ~ q(x_o | theta) p(theta)

They stand beside the default row of stages: each has files of its own, and what the posterior network leaves is not touched.
"""

from typing import Any

import numpy as np

from sbi_phys.core.errors import ConvergenceError
from sbi_phys.estimators.base import load
from sbi_phys.estimators.density_sampling import PosteriorDraws
from sbi_phys.estimators.nle import NLE
from sbi_phys.estimators.nre import NRE
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.samplers.diagnostics import split_r_hat
from sbi_phys.store.store import Store
from sbi_phys.workflow.run import Run

__all__ = ["METHODS", "TITLES", "infer_nle", "infer_nre", "new_nle", "new_nre", "require_converged", "train_nle", "train_nre"]

# method -> the file with its draws
METHODS = {"npe": "posterior_amortised.nc", "nle": "posterior_nle.nc", "nre": "posterior_nre.nc"}
TITLES = {"npe": "NPE, posterior", "nle": "NLE, likelihood", "nre": "NRE, ratio"}

MOST_R_HAT, LEAST_EFFECTIVE = 1.02, 100  # worse than that, chains have not met, or describe no posterior
_PARTS = 4  # of independent draws, to be held against one another as chains are


def _shared(run: Run) -> dict[str, Any]:
    """The settings that both estimators take alike."""
    config = run.config
    return {
        "embedding": config.embedding,
        "n_ensemble": config.estimator.n_ensemble,
        "x_transform": config.estimator.x_transform,
        "device": config.run.device,
        "observables": run.simulator.observables,
        "simulator": run.simulator,
        "config": config.train,
    }


def new_nle(run: Run) -> NLE:
    """An untrained likelihood with the run's settings."""
    layers = run.config.methods.nle_layers
    return NLE(
        run.simulator.prior,
        seed=run.seed("train_nle"),
        flow="auto" if layers is None else FlowConfig(n_layers=layers, hidden=32),
        **_shared(run),
    )


def new_nre(run: Run) -> NRE:
    """An untrained ratio with the run's settings."""
    return NRE(
        run.simulator.prior,
        seed=run.seed("train_nre"),
        loss=run.config.methods.nre_loss,
        **_shared(run),
    )


def train_nle(run: Run, numbers: dict[str, Any]) -> None:
    """Train the likelihood on the store; an interrupted training goes on from its checkpoint."""
    run.path("training").mkdir(exist_ok=True)
    nle = new_nle(run).fit(Store(run.path("simulations")), checkpoint=run.path("training", "nle"), progress=run.progress)
    nle.save(run.path("model_nle.pt"))
    numbers |= _training(nle) | {"n_layers": nle.flow.n_layers}


def train_nre(run: Run, numbers: dict[str, Any]) -> None:
    """Train the ratio on the store; an interrupted training goes on from its checkpoint."""
    run.path("training").mkdir(exist_ok=True)
    memory = run.config.run.memory or None
    checkpoint = run.path("training", "nre")
    nre = new_nre(run).fit(Store(run.path("simulations")), memory=memory, checkpoint=checkpoint, progress=run.progress)
    nre.save(run.path("model_nre.pt"))
    numbers |= _training(nre) | {"loss": nre.loss}


def _training(model: NLE | NRE) -> dict[str, Any]:
    return {
        "validation_loss": [min(record["valid"] for record in member) for member in model.history],
        "epochs": [len(member) for member in model.history],
        "device": str(model.device),
    }


def infer_nle(run: Run, numbers: dict[str, Any]) -> None:
    """Draw from the posterior of the observation by the learned likelihood."""
    _infer(run, "nle", numbers)


def infer_nre(run: Run, numbers: dict[str, Any]) -> None:
    """Draw from the posterior of the observation by the learned ratio."""
    _infer(run, "nre", numbers)


def _infer(run: Run, method: str, numbers: dict[str, Any]) -> None:
    model = load(run.path(f"model_{method}.pt"), simulator=run.simulator, device=run.config.run.device)
    sampler, title = run.config.methods.sampler, method.upper()
    try:
        found = model.posterior(
            run.observation, run.config.infer.n_draws, seed=run.seed(f"infer_{method}"), method=sampler, progress=run.progress
        )
    except ConvergenceError as err:
        others = "hmc" if sampler != "hmc" else "emcee"
        raise ConvergenceError(f"the posterior by {title} was not sampled: {err}; try --set methods.sampler={others}") from err
    numbers |= require_converged(title, found)
    run.write_draws(METHODS[method], found.theta, {"method": TITLES[method], **numbers})


def require_converged(title: str, found: PosteriorDraws) -> dict[str, Any]:
    """Return the numbers that draws are judged by: split R-hat by free parameter, effective draws, Pareto k.

    Of independent draws (importance sampling, a grid) R-hat is that of four parts of them.   Raises: ConvergenceError.
    """
    r_hat, chains = np.asarray(found.r_hat), True
    if not np.isfinite(r_hat).all():
        n, chains = len(found.theta) // _PARTS, False
        r_hat = split_r_hat(found.theta[: n * _PARTS].reshape(_PARTS, n, -1))
    # independent draws have no memory that R-hat could find: a part that differs is then chance, and their weights say more
    if (chains and r_hat.max() > MOST_R_HAT) or found.n_effective < LEAST_EFFECTIVE:
        raise ConvergenceError(
            f"the posterior by {title} is not to be trusted: split R-hat {r_hat.max():.3f}, {found.n_effective:.0f} effective draws; "
            f"expected at most {MOST_R_HAT} and at least {LEAST_EFFECTIVE}. {found.message}"
        )
    return {
        "n_draws": len(found.theta),
        "sampler": found.method,
        "r_hat": r_hat,
        "n_effective": found.n_effective,
        "pareto_k": found.pareto_k,
        "evaluations": found.evaluations,
        "log_evidence": found.log_evidence,
        "words": found.summary(),
    }
