"""sbi_phys as a worker of the benchmark, by its public interface alone (run as `python -m benchmarks.peers.sbi_phys_worker`)."""

import tempfile
import time
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sbi_phys as sp
from benchmarks.peers.worker import processor_name, serve
from simulators import SourceSpectrum

MODELS: dict[str, sp.NPE] = {}


@cache
def _toy(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def info() -> dict[str, Any]:
    """Versions, and the device that the networks use."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    device = f"{name}, {torch.get_num_threads()} threads"
    return {"device": device, "versions": {"sbi_phys": sp.__version__, "torch": torch.__version__}, "compile": _can_compile()}


def _can_compile() -> bool:
    return any(f.name == "compile" for f in fields(sp.TrainConfig))


def _config(*, batch: int, epochs: int, compiled: bool = False) -> sp.TrainConfig:
    # the field is looked up, so that one benchmark serves versions with and without it
    extra: dict[str, Any] = {"compile": True} if compiled else {}
    return sp.TrainConfig(batch_size=batch, max_epochs=epochs, **extra)


def _npe(prior: Any, network: dict[str, Any], *, seed: int, **settings: Any) -> sp.NPE:
    """The package's defaults for kind 'default'; else a flow of the given shape on the observations themselves."""
    if network["kind"] == "default":
        return sp.NPE(prior, seed=seed, **settings)
    flow = sp.FlowConfig(kind=network["kind"], n_layers=network["layers"], hidden=network["width"], n_bins=network["bins"])
    return sp.NPE(prior, seed=seed, flow=flow, embedding=nn.Identity(), **settings)


def _matrices(npe: sp.NPE) -> tuple[int, list[tuple[int, int]]]:
    """Number of weights, and the shape of every matrix, read off the saved model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        npe.save(path)
        tensors = list(_tensors(torch.load(path, weights_only=True), below_weights=False))
    return sum(t.numel() for t in tensors), [tuple(t.shape) for t in tensors if t.ndim == 2]


def _tensors(node: Any, *, below_weights: bool) -> Any:
    if isinstance(node, torch.Tensor):
        if below_weights and node.is_floating_point():
            yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _tensors(value, below_weights=below_weights or key == "weights")
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _tensors(value, below_weights=below_weights)


def train(*, data: str, key: str, network: dict[str, Any], batch: int, epochs: int, seed: int, n: int) -> dict[str, Any]:
    """Train on the first n pairs; batch 0 and epochs 0 are the package's own choice."""
    toy, simulator = _toy(data), SourceSpectrum(composition="fixed")
    config = _config(batch=batch, epochs=epochs, compiled=network.get("compiled", False))
    npe = _npe(simulator.prior, network, seed=seed, observables=simulator.observables, config=config)
    begin = time.perf_counter()
    npe.fit(toy["theta"][:n], toy["x"][:n])
    wall = time.perf_counter() - begin
    MODELS[key] = npe
    history = npe.history[0]
    return {
        "wall": wall, "n_train": n - round(0.1 * n), "epoch_seconds": [r["seconds"] for r in history],
        "valid": [r["valid"] for r in history],
        "held_out": -float(np.mean(npe.log_prob(toy["theta_test"], toy["x_test"]))), "weights": _matrices(npe)[0], "keeps_best": True,
    }  # fmt: skip


def sample(*, data: str, key: str, n_observations: int, n_draws: int, seed: int) -> float:
    """Seconds for n_draws of each of the first n_observations held-out observations."""
    x = _toy(data)["x_test"][:n_observations]
    begin = time.perf_counter()
    draws = MODELS[key].sample(x[0] if n_observations == 1 else x, n_draws, seed=seed)
    seconds = time.perf_counter() - begin
    assert draws.reshape(-1, 2).shape[0] == n_observations * n_draws
    return seconds


def sbc(*, data: str, key: str, n_observations: int, n_draws: int, seed: int) -> float:
    """Seconds for the whole check: draws, ranks, test."""
    toy, parameters = _toy(data), SourceSpectrum(composition="fixed").parameters
    begin = time.perf_counter()
    draws = MODELS[key].sample(toy["x_test"][:n_observations], n_draws, seed=seed)
    sp.calibration.sbc(toy["theta_test"][:n_observations], draws, parameters)
    return time.perf_counter() - begin


def step(*, data: str, network: dict[str, Any], batch: int, steps: int, compiled: bool) -> dict[str, Any]:
    """Milliseconds a training step at one batch size, and the shapes of the network's matrices."""
    n_train = batch * steps
    n = next(m for m in range(n_train, 2 * n_train) if m - round(0.1 * m) >= n_train)
    toy, simulator = _toy(data), SourceSpectrum(composition="fixed")
    repeats = -(-n // len(toy["theta"]))  # the loss does not matter here, so rows may come twice
    theta, x = (np.tile(toy[name], (repeats, 1))[:n] for name in ("theta", "x"))
    config = _config(batch=batch, epochs=4, compiled=compiled)
    npe = _npe(simulator.prior, network, seed=0, observables=simulator.observables, config=config).fit(theta, x)
    weights, matrices = _matrices(npe)
    return {"ms": float(np.median([r["step_ms"] for r in npe.history[0][1:]])), "weights": weights, "matrices": matrices}


def products(*, matrices: list[tuple[int, int]], batch: int, repeats: int, threads: int) -> float:
    """Milliseconds of the bare matrix products of those layers on so many threads: x W^T forward, g W and g^T x backward."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _products(matrices, batch, repeats)
    finally:
        torch.set_num_threads(usual)


def _products(matrices: list[tuple[int, int]], batch: int, repeats: int) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = [
        (torch.randn(o, i, device=device), torch.randn(batch, i, device=device), torch.randn(batch, o, device=device)) for o, i in matrices
    ]
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for weight, x, g in made:
            torch.mm(x, weight.t())
            torch.mm(g, weight)
            torch.mm(g.t(), x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds[repeats // 4 :]))


if __name__ == "__main__":
    serve({"info": info, "train": train, "sample": sample, "sbc": sbc, "step": step, "products": products})
