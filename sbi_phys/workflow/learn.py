"""Stages `simulate` and `train`: prior draws into the store, the store into an amortised network."""

import sys
from typing import Any

import torch

from sbi_phys.estimators.npe import NPE
from sbi_phys.simulation.campaign import simulate as run_simulations
from sbi_phys.simulation.clusters import cluster_executor
from sbi_phys.store.store import Store
from sbi_phys.workflow.run import Run

__all__ = ["simulate", "simulations", "train", "train_along"]


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
            shard_size=min(run.config.simulate.shard_size, n),
            dtype=run.config.simulate.dtype,
            layout=run.config.simulate.layout(),
            progress=run.progress,
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def simulate(run: Run, numbers: dict[str, Any]) -> None:
    """Draw theta from the prior and x from the simulator; rows that fail stay in the store, flagged."""
    store = simulations(run, "simulations", run.config.simulate.n, "simulate")
    numbers |= {"n_simulations": store.n_rows, "n_failed": store.n_failed}


def new_npe(run: Run, *key: int | str) -> NPE:
    """An untrained estimator with the run's settings."""
    config = run.config
    return NPE(
        run.simulator.prior,
        seed=run.seed(*key),
        flow=config.flow,
        embedding=config.embedding,
        n_ensemble=config.estimator.n_ensemble,
        x_transform=config.estimator.x_transform,
        device=config.run.device,
        observables=run.simulator.observables,
        simulator=run.simulator,
        config=config.train,
    )


def train_along(run: Run) -> NPE:
    """The training itself, which is all that a rank other than the first has to do."""
    run.path("training").mkdir(exist_ok=True)
    memory = run.config.run.memory or None
    checkpoint = run.path("training", "amortised")
    return new_npe(run, "train").fit(Store(run.path("simulations")), memory=memory, checkpoint=checkpoint, progress=run.progress)


def train(run: Run, numbers: dict[str, Any]) -> None:
    """Train the amortised network on the store; an interrupted training goes on from its checkpoint."""
    npe = train_along(run)
    npe.save(run.path("model.pt"))
    numbers |= {
        "validation_loss": [min(record["valid"] for record in member) for member in npe.history],
        "epochs": [len(member) for member in npe.history],
        "device": str(npe.device),
        "threads": torch.get_num_threads(),
    }
