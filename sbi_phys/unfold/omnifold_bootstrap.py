"""Errors of OmniFold by bootstrap, and its weights in an HDF5 file.   Source: arXiv:1911.09107, 2105.04448."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.files import open_aside
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import ArrayLike
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold.omnifold_inputs import Events, check_events
from sbi_phys.unfold.omnifold_weights import OmniFold, check_settings, unfold_events
from sbi_phys.unfold.replicas import SOURCES, WeightReplicas

__all__ = ["bootstrap_omnifold", "write_weights"]


def bootstrap_omnifold(
    truth: ArrayLike,
    reco: ArrayLike,
    data: ArrayLike,
    n_iterations: int = 4,
    reco_pass: ArrayLike | None = None,
    truth_pass: ArrayLike | None = None,
    *,
    n_boot: int = 20,
    data_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    background: ArrayLike | None = None,
    background_weights: ArrayLike | None = None,
    fit_fakes: bool = False,
    smooth: bool | None = None,
    n_ensemble: int = 1,
    seed: int = 0,
    device: str | torch.device = "auto",
    config: TrainConfig | None = None,
    network: EmbeddingConfig | None = None,
    progress: Progress | None = None,
) -> WeightReplicas:
    """OmniFold once, and n_boot times each with data, simulation and the networks' seeds varied, one at a time.

    Args: n_boot: >= 2; 3 n_boot + 1 unfoldings are run, one after the other. The others are those of `omnifold`.
    Returns: WeightReplicas.   Raises: what `omnifold` raises.   Source: `replicas`.
    Read: `.histogram(truth[:, 0], edges)` gives unfolded counts with covariances from data, simulation and training apart.
    """
    n_boot, seed = require_int("n_boot", n_boot, low=2), require_int("seed", seed, low=0)
    events = check_events(truth, reco, data, reco_pass, truth_pass, data_weights, weights, background, background_weights)
    settings = check_settings(n_iterations, n_ensemble, device, config, network, fit_fakes, smooth)
    total = 2 * settings.n_iterations * settings.n_ensemble * (3 * n_boot + 1)
    with or_none(progress).task("bootstrap omnifold", total) as task:
        result = unfold_events(events, settings, seed=seed, task=task, warn=True)
        parts = {
            source: np.stack(
                [
                    unfold_events(_replica(events, source, seed, b), settings, seed=seed_for(seed, source, b), task=task).weights
                    for b in range(n_boot)
                ]
            )
            for source in SOURCES
        }
    return WeightReplicas(weights=result.weights, truth_pass=result.truth_pass, **parts)


def _replica(events: Events, source: str, seed: int, b: int) -> Events:
    """Events with the weights of one source drawn anew; nominal weights are scaled to the replica's data as they were to the data."""
    rng = rng_for(seed, "bootstrap", source, b)
    if source == "training":
        return events
    if source == "data":
        counts = events.data_weights * rng.poisson(1.0, len(events.data))
        own, expected = events.weights, events.background_weights
    else:
        counts = events.data_weights
        own = events.weights * rng.poisson(1.0, len(events.weights))
        expected = events.background_weights * rng.poisson(1.0, len(events.background))
    scale = max(counts.sum() - expected.sum(), 1e-3 * counts.sum()) / own[events.reco_pass].sum()
    return replace(events, data_weights=counts, background_weights=expected, weights=scale * own, scale=scale * events.scale)


def write_weights(path: str | os.PathLike[str], result: OmniFold, name: str = "omnifold", *, overwrite: bool = False) -> Path:
    """Write the unfolded weights to dataset weights/<name> of an HDF5 file -> its path; made if there is none.

    Args: path: e.g. the file of the pairs: what else is in it stays as it is. Datasets theta, x, truth and reco, where there are any,
    must have as many rows as the weights. name: without '/'. overwrite: replace weights of that name.
    The file is copied, written aside and renamed, so it is complete at any time. Settings and history are attributes of the dataset.
    Raises: DataError (a folder, no HDF5 file, weights of that name), ShapeError (other rows), SettingError (name).
    """
    import h5py

    target = Path(path)
    if not isinstance(name, str) or not name or "/" in name or name == ".":
        raise SettingError(f"name is {name!r}; expected text without '/'")
    if target.is_dir():
        raise DataError(f"{target} is a folder; expected an HDF5 file, or a path where there is none")
    if target.exists() and not h5py.is_hdf5(target):
        raise DataError(f"{target} is not an HDF5 file; expected one, or a path where there is none")
    with open_aside(target) as aside:
        if target.exists():
            with target.open("rb") as former:
                shutil.copyfileobj(former, aside)
        with h5py.File(aside, "r+" if target.exists() else "w") as file:
            for rows in ("theta", "x", "truth", "reco"):
                if rows in file and isinstance(file[rows], h5py.Dataset) and file[rows].shape[:1] != result.weights.shape:
                    raise ShapeError(f"{target} has {rows} of shape {file[rows].shape} and there are {result.weights.size} weights")
            group = file.require_group("weights")
            if name in group:
                if not overwrite:
                    raise DataError(f"{target} has weights {name!r}; expected another name, or overwrite=True")
                del group[name]
            dataset = group.create_dataset(name, data=result.weights)
            dataset.attrs.update({key: json.dumps(value) if key == "history" else value for key, value in result.to_dict().items()})
    return target
