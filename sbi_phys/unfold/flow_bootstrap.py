"""Errors of event-wise flow unfolding: the whole procedure again on resampled data, resampled simulation, and with other seeds."""

import numpy as np
import torch

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold.flow import FlowUnfolder
from sbi_phys.unfold.omnifold_inputs import as_columns, as_weights
from sbi_phys.unfold.replicas import SOURCES, WeightReplicas

__all__ = ["bootstrap_flow"]


def bootstrap_flow(
    truth: ArrayLike,
    reco: ArrayLike,
    data: ArrayLike,
    n_iterations: int = 1,
    *,
    n_boot: int = 10,
    reco_pass: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    data_weights: ArrayLike | None = None,
    background: ArrayLike | None = None,
    background_weights: ArrayLike | None = None,
    n_ensemble: int = 1,
    seed: int = 0,
    flow: str | FlowConfig = "spline",
    embedding: EmbeddingConfig | None = None,
    device: str | torch.device = "auto",
    config: TrainConfig | None = None,
    progress: Progress | None = None,
) -> WeightReplicas:
    """Weights of the simulated truths from `FlowUnfolder`, once, and n_boot times each with data, simulation and seeds varied.

    Args: n_boot: >= 2; 3 n_boot + 1 unfoldings of n_iterations trainings each. The others are those of `FlowUnfolder` and its `fit`.
    Returns: WeightReplicas.   Raises: what `FlowUnfolder` raises.   Source: `replicas`.
    Read: `.histogram(truth, edges)` gives the unfolded spectrum with covariances from data, simulation and training apart.
    """
    n_boot, seed = require_int("n_boot", n_boot, low=2), require_int("seed", seed, low=0)
    own = as_weights("weights", weights, len(as_columns("truth", truth)), "truth")
    counts = as_weights("data_weights", data_weights, len(as_columns("data", data)), "data")

    extra = None if background is None else as_columns("background", background)
    expected = None if extra is None else as_weights("background_weights", background_weights, len(extra), "background")
    if extra is None and background_weights is not None:
        raise DataError("background_weights was given without background; expected both or neither")

    def unfolded(simulated: Array, measured: Array, below: Array | None, member: int) -> Array:
        unfolder = FlowUnfolder(member, flow=flow, embedding=embedding, n_ensemble=n_ensemble, device=device, config=config)
        unfolder.fit(
            truth,
            reco,
            data,
            n_iterations,
            reco_pass=reco_pass,
            weights=simulated,
            data_weights=measured,
            background=extra,
            background_weights=below,
        )
        return unfolder.weights

    parts: dict[str, list[Array]] = {source: [] for source in SOURCES}
    with or_none(progress).task("bootstrap flow", 3 * n_boot + 1) as task:
        nominal = unfolded(own, counts, expected, seed)
        task.advance()
        for source in SOURCES:
            for b in range(n_boot):
                rng = rng_for(seed, "bootstrap flow", source, b)
                simulated = own * rng.poisson(1.0, len(own)) if source == "simulation" else own
                measured = counts * rng.poisson(1.0, len(counts)) if source == "data" else counts
                below = expected * rng.poisson(1.0, len(expected)) if expected is not None and source == "simulation" else expected
                parts[source].append(unfolded(simulated, measured, below, seed_for(seed, "bootstrap flow", source, b)))
                task.advance(1, text=source)
    stacked = {source: np.stack(replicas) for source, replicas in parts.items()}
    return WeightReplicas(weights=nominal, truth_pass=np.ones(len(own), dtype=np.bool_), **stacked)
