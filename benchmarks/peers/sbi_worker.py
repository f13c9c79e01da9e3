"""sbi as a worker of the benchmark (run as `python -m benchmarks.peers.sbi_worker` with the peers' interpreter).

sbi's defaults are used: learning rate 5e-4, Adam, clipping at 5, z-scored inputs, the best weights kept.
"""

import time
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from sbi.diagnostics import run_sbc  # type: ignore[import-not-found]
from sbi.inference import NPE  # type: ignore[import-not-found]
from sbi.neural_nets import posterior_nn  # type: ignore[import-not-found]
from sbi.utils import BoxUniform  # type: ignore[import-not-found]

from benchmarks.peers.worker import processor_name, serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSTERIORS: dict[str, Any] = {}


@cache
def _toy(path: str) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(np.asarray(file[name], dtype=np.float32)) for name in file}


def info() -> dict[str, Any]:
    """Versions and device."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else processor_name()
    return {
        "device": f"{name}, {torch.get_num_threads()} threads",
        "versions": {"sbi": version("sbi"), "torch": torch.__version__.split("+")[0]},
    }


def train(*, data: str, key: str, network: dict[str, Any], batch: int, epochs: int, seed: int, n: int) -> dict[str, Any]:
    """Train on the first n pairs; batch 0 is sbi's own (200), epochs 0 its own stopping rule (patience 20)."""
    toy = _toy(data)
    torch.manual_seed(seed)
    prior = BoxUniform(toy["low"], toy["high"], device=DEVICE)
    builder: Any = "maf"  # sbi's default
    if network["kind"] != "default":
        builder = posterior_nn(
            {"spline": "nsf", "maf": "maf"}[network["kind"]],
            hidden_features=network["width"],
            num_transforms=network["layers"],
            num_bins=network["bins"],
        )
    inference = NPE(prior=prior, density_estimator=builder, device=DEVICE, show_progress_bars=False)
    settings: dict[str, Any] = {"training_batch_size": batch} if batch else {}
    if epochs:
        # exactly the given number of epochs: sbi stops when its count exceeds the limit
        settings["max_num_epochs"] = epochs - 1
    begin = time.perf_counter()
    inference.append_simulations(toy["theta"][:n], toy["z"][:n])
    estimator = inference.train(**settings)
    wall = time.perf_counter() - begin
    POSTERIORS[key] = inference.build_posterior()
    summary, n_train = inference.summary, int(0.9 * n)  # an epoch leaves out the incomplete last batch
    with torch.no_grad():
        theta, z = (toy[name].to(DEVICE) for name in ("theta_test", "z_test"))
        held_out = float(estimator.loss(theta, condition=z).mean())
    return {
        "wall": wall, "n_train": n_train - n_train % min(batch or 200, n_train),
        "epoch_seconds": [float(s) for s in summary["epoch_durations_sec"]],
        "valid": [float(v) for v in summary["validation_loss"]], "held_out": held_out,
        "weights": sum(p.numel() for p in estimator.parameters()), "keeps_best": True,
    }  # fmt: skip


def sample(*, data: str, key: str, n_observations: int, n_draws: int, seed: int) -> float:
    """Seconds for n_draws of each of the first n_observations held-out observations."""
    z, posterior = _toy(data)["z_test"][:n_observations].to(DEVICE), POSTERIORS[key]
    torch.manual_seed(seed)
    begin = time.perf_counter()
    if n_observations == 1:
        draws = posterior.sample((n_draws,), x=z, show_progress_bars=False)
    else:
        draws = posterior.sample_batched((n_draws,), x=z, show_progress_bars=False)
    draws = draws.cpu().numpy()
    seconds = time.perf_counter() - begin
    assert draws.reshape(-1, 2).shape[0] == n_observations * n_draws
    return seconds


def sbc(*, data: str, key: str, n_observations: int, n_draws: int, seed: int) -> float:
    """Seconds for sbi's own check: draws and ranks."""
    toy = _toy(data)
    theta, z = (toy[name][:n_observations].to(DEVICE) for name in ("theta_test", "z_test"))
    torch.manual_seed(seed)
    begin = time.perf_counter()
    run_sbc(theta, z, POSTERIORS[key], num_posterior_samples=n_draws, show_progress_bar=False, use_batched_sampling=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    serve({"info": info, "train": train, "sample": sample, "sbc": sbc})
