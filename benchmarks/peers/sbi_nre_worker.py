"""sbi's ratio estimators as a worker of the benchmark (run as `python -m benchmarks.peers.sbi_nre_worker`).

sbi's defaults are used: network, training and the vectorised slice sampler in 20 chains.
"""

import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from sbi.inference import BNRE, NRE_A, NRE_B, NRE_C  # type: ignore[import-not-found]
from sbi.utils import BoxUniform  # type: ignore[import-not-found]

from benchmarks.peers.worker import processor_name, serve

KINDS = {"nre-a": NRE_A, "nre-b": NRE_B, "nre-c": NRE_C, "bnre": BNRE}
POSTERIORS: dict[str, Any] = {}


def _arrays(path: str) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(np.asarray(file[name], dtype=np.float32)) for name in file}


def info() -> dict[str, Any]:
    """Versions and device."""
    return {"device": f"{processor_name()}, {torch.get_num_threads()} threads", "versions": {"sbi": version("sbi")}}


def train(*, data: str, key: str, seed: int, max_epochs: int) -> dict[str, Any]:
    """Train the kind `key` on theta and z of the file; returns seconds and epochs."""
    toy = _arrays(data)
    torch.manual_seed(seed)
    inference = KINDS[key](prior=BoxUniform(toy["low"], toy["high"]), show_progress_bars=False)
    begin = time.perf_counter()
    inference.append_simulations(toy["theta"], toy["z"])
    # sbi stops when its count exceeds the limit
    inference.train(**({"max_num_epochs": max_epochs - 1} if max_epochs else {}))
    POSTERIORS[key] = inference.build_posterior()
    return {"seconds": time.perf_counter() - begin, "epochs": len(inference.summary["validation_loss"])}


def sample(*, data: str, key: str, observation: int, n_draws: int, seed: int, out: str) -> float:
    """Draw for one held-out observation, write theta to `out` (.npy); returns seconds."""
    z, posterior = _arrays(data)["z_test"][observation], POSTERIORS[key]
    torch.manual_seed(seed)
    begin = time.perf_counter()
    draws = posterior.sample((n_draws,), x=z, show_progress_bars=False).numpy()
    seconds = time.perf_counter() - begin
    with open(out, "wb") as file:
        np.save(file, draws)
    return seconds


if __name__ == "__main__":
    serve({"info": info, "train": train, "sample": sample})
