"""BayesFlow as a worker of the benchmark (run as `python -m benchmarks.peers.bayesflow_worker` with the peers' interpreter).

The backend is the environment's KERAS_BACKEND. BayesFlow's defaults are used: `BasicWorkflow`, Adam with a cosine schedule from 5e-4,
parameters standardised.
"""

import os
import time
from functools import cache
from importlib.metadata import version
from typing import Any

import bayesflow as bf  # type: ignore[import-not-found]
import keras  # type: ignore[import-not-found]
import numpy as np

from benchmarks.peers.worker import processor_name, serve

BACKEND = os.environ["KERAS_BACKEND"]
WORKFLOWS: dict[str, Any] = {}


@cache
def _toy(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: np.asarray(file[name], dtype=np.float32) for name in file}


def _device() -> str:
    if BACKEND == "torch":
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    else:
        import jax  # type: ignore[import-not-found]

        kind = jax.devices()[0]
        name = processor_name() if kind.platform == "cpu" else kind.device_kind
    return f"{name}, {os.environ['OMP_NUM_THREADS']} threads"


def info() -> dict[str, Any]:
    """Versions and device."""
    return {"device": _device(), "versions": {"bayesflow": version("bayesflow"), "keras": version("keras"), BACKEND: version(BACKEND)}}


class _Clock(keras.callbacks.Callback):
    """Seconds of each epoch, validation included."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def _network(network: dict[str, Any]) -> Any:
    if network["kind"] == "default":
        return bf.networks.CouplingFlow()
    shape: dict[str, Any] = {"depth": network["layers"], "subnet_kwargs": {"widths": (network["width"],) * 2}}
    if network["kind"] == "spline":
        shape["transform_kwargs"] = {"bins": network["bins"]}
    return bf.networks.CouplingFlow(transform=network["kind"], **shape)


def _cache_compilation(folder: str) -> None:
    """Let JAX cache compiled code ('' ends this): rates exclude the epoch that compiles, times of whole trainings include it."""
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_compilation_cache_dir", folder or None)
        jax.config.update("jax_enable_compilation_cache", bool(folder))


def train(*, data: str, key: str, network: dict[str, Any], batch: int, epochs: int, seed: int, n: int) -> dict[str, Any]:
    """Train on the first n pairs, of which a tenth validates; batch 0 and epochs 0 are BayesFlow's own (32, 100)."""
    toy = _toy(data)
    _cache_compilation(os.path.join(os.path.dirname(data), "jax") if key == "scratch" else "")
    keras.utils.set_random_seed(seed)
    n_train = n - n // 10
    parts = [{"theta": toy["theta"][rows], "z": toy["z"][rows]} for rows in (slice(n_train), slice(n_train, n))]
    workflow = bf.BasicWorkflow(
        inference_network=_network(network), inference_variables=["theta"], inference_conditions=["z"], standardize="inference_variables"
    )
    settings: dict[str, Any] = {**({"batch_size": batch} if batch else {}), **({"epochs": epochs} if epochs else {})}
    clock = _Clock()
    begin = time.perf_counter()
    history = workflow.fit_offline(parts[0], validation_data=parts[1], callbacks=[clock], verbose=0, **settings)
    wall = time.perf_counter() - begin
    WORKFLOWS[key] = workflow
    held_out = workflow.approximator.log_prob({"theta": toy["theta_test"], "z": toy["z_test"]})
    return {
        "wall": wall, "n_train": n_train, "epoch_seconds": clock.seconds, "valid": [float(v) for v in history.history["val_loss"]],
        "held_out": -float(np.mean(np.asarray(held_out))), "keeps_best": False,
        "weights": sum(int(np.prod(w.shape)) for w in workflow.approximator.inference_network.trainable_weights),
    }  # fmt: skip


def _draw(data: str, key: str, n_observations: int, n_draws: int, seed: int) -> np.ndarray:
    keras.utils.set_random_seed(seed)
    conditions = {"z": _toy(data)["z_test"][:n_observations]}
    return np.asarray(WORKFLOWS[key].sample(num_samples=n_draws, conditions=conditions)["theta"])


def sample(*, data: str, key: str, n_observations: int, n_draws: int, seed: int) -> float:
    """Seconds for n_draws of each of the first n_observations held-out observations."""
    begin = time.perf_counter()
    draws = _draw(data, key, n_observations, n_draws, seed)
    seconds = time.perf_counter() - begin
    assert draws.reshape(-1, 2).shape[0] == n_observations * n_draws
    return seconds


def sbc(*, data: str, key: str, n_observations: int, n_draws: int, seed: int) -> float:
    """Seconds for draws and ranks."""
    theta = _toy(data)["theta_test"][:n_observations]
    begin = time.perf_counter()
    (_draw(data, key, n_observations, n_draws, seed) < theta[:, None]).sum(axis=1)
    return time.perf_counter() - begin


if __name__ == "__main__":
    serve({"info": info, "train": train, "sample": sample, "sbc": sbc})
