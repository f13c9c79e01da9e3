"""Inputs of every topic: the settings of the run, the data, and the processes of the measured tools."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suite.data import write_toy
from benchmarks.suite.workers import Worker, WorkerError

__all__ = ["NETWORKS", "OURS", "Context", "Network", "Trained"]

Network = dict[str, Any]
OURS = "sbi_phys"
MODULES = {
    OURS: "benchmarks.peers.sbi_phys_worker",
    "sbi": "benchmarks.peers.sbi_worker",
    "BayesFlow on torch": "benchmarks.peers.bayesflow_worker",
    "BayesFlow on JAX": "benchmarks.peers.bayesflow_worker",
}
BACKENDS = {"BayesFlow on torch": "torch", "BayesFlow on JAX": "jax"}

# sbi's nsf by default: 5 couplings, residual conditioners of width 50, 10 bins. `equal` has its width, depth and bins,
# `weights` as many weights (its conditioners take the observation in again in every block). BayesFlow's layers are
# pairs of couplings: 3 of them are 6.
NETWORKS: dict[str, Network] = {
    "equal": {"kind": "spline", "layers": 5, "width": 50, "bins": 10},
    "weights": {"kind": "spline", "layers": 5, "width": 97, "bins": 10},
    "compiled": {"kind": "spline", "layers": 5, "width": 50, "bins": 10, "compiled": True},
    "pairs": {"kind": "spline", "layers": 3, "width": 50, "bins": 10},
    "maf": {"kind": "maf", "layers": 5, "width": 50, "bins": 10},
    "affine": {"kind": "affine", "layers": 12, "width": 128, "bins": 10},
    "default": {"kind": "default"},
}


@dataclass(frozen=True, slots=True)
class Trained:
    """Answer of a tool to `train`, see the workers. valid: by epoch, on its own validation rows, in its own space."""

    wall: float
    n_train: int
    epoch_seconds: list[float]
    valid: list[float]
    held_out: float
    weights: int
    keeps_best: bool

    @property
    def rate(self) -> float:
        """Training rows per second over the epochs after the first."""
        steady = self.epoch_seconds[1:] or self.epoch_seconds
        return self.n_train * len(steady) / sum(steady)

    def curve(self) -> list[tuple[float, float]]:
        """(seconds, held-out loss) after each epoch.

        Each tool sees its own validation rows, some in their own coordinates: a constant apart from the common held-out
        loss, which was measured for the weights it ended with. What precedes the first epoch counts.
        """
        best = [min(self.valid[: i + 1]) for i in range(len(self.valid))] if self.keeps_best else self.valid
        shift, now = self.held_out - best[-1], self.wall - sum(self.epoch_seconds)
        out = []
        for seconds, loss in zip(self.epoch_seconds, best, strict=True):
            now += seconds
            out.append((now, loss + shift))
        return out


@dataclass
class Context:
    """Settings of one run.

    Args: quick: a check that all works, in minutes. repeats: of each timing. threads: of every process. folder: for data
    and logs, emptied by the driver. peers: interpreter with the peers, None without.
    """

    quick: bool
    repeats: int
    threads: int
    folder: Path
    peers: Path | None
    load: float = 0.0
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    _workers: dict[str, Worker | None] = field(default_factory=dict)
    _info: dict[str, dict[str, Any]] = field(default_factory=dict)
    _data: dict[int, Path] = field(default_factory=dict)
    _models: set[tuple[str, str]] = field(default_factory=set)
    _begin: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.perf_counter() - self._begin:6.0f} s] {text}", flush=True)

    def data(self, n: int) -> Path:
        """The toy with n training pairs, made once."""
        if n not in self._data:
            self._data[n] = write_toy(self.folder / f"toy_{n}.npz", n)
        return self._data[n]

    @property
    def n_rows(self) -> int:
        """Simulations that the tools are trained on."""
        return 2_000 if self.quick else 5_000

    def worker(self, tool: str) -> Worker | None:
        """The process of a tool, started at the first call; None where it cannot run (the reason was printed)."""
        if tool not in self._workers:
            self._workers[tool] = self._start(tool)
        return self._workers[tool]

    def _start(self, tool: str) -> Worker | None:
        if tool != OURS and self.peers is None:
            return None
        python = Path(sys.executable) if tool == OURS else self.peers
        assert python is not None
        log = self.folder / f"{tool.replace(' ', '_')}.log"
        settings = {"KERAS_BACKEND": BACKENDS[tool]} if tool in BACKENDS else {}
        worker = Worker(python, MODULES[tool], threads=self.threads, log=log, settings=settings)
        try:
            self._info[tool] = worker.call("info", timeout=180.0)
        except WorkerError as err:
            worker.close()
            if tool == OURS:
                raise
            self.say(f"{tool} is left out: {err}")
            return None
        return worker

    def info(self, tool: str = OURS) -> dict[str, Any]:
        """Device and versions of a running tool."""
        self.worker(tool)
        return self._info[tool]

    def about(self, *tools: str) -> dict[str, Any]:
        """Device, versions and load, as keywords of a Row."""
        versions = {name: text for tool in (OURS, *tools) if tool in self._info for name, text in self._info[tool]["versions"].items()}
        return {"device": self.info()["device"], "versions": versions, "load": self.load}

    def train(
        self, tool: str, network: str, *, batch: int, epochs: int = 0, seed: int = 0, n: int = 0, keep: bool = False
    ) -> Trained | None:
        """Train one tool on n rows; None where it cannot. With `keep` the model serves `model` from then on.

        Raises: WorkerError where ours fails.
        """
        key = f"{network} {batch}" if keep else "scratch"
        out = self.guarded(tool, self._train_now, key, network, batch, epochs, seed, n or self.n_rows)
        if out is None:
            return None
        if keep:
            self._models.add((tool, key))
        what = f"{tool}, {network}, batch {batch or 'default'}"
        self.say(f"{what}: {len(out.valid)} epochs in {out.wall:.1f} s, {out.rate:.0f} rows/s, loss {out.held_out:.3f}")
        return out

    def _train_now(self, worker: Worker, key: str, network: str, batch: int, epochs: int, seed: int, n: int) -> Trained:
        data = str(self.data(n))
        return Trained(**worker.call("train", data=data, key=key, network=NETWORKS[network], batch=batch, epochs=epochs, seed=seed, n=n))

    def guarded(self, tool: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """measure(worker, *arguments); a peer's failure is printed and gives None, ours is raised."""
        worker = self.worker(tool)
        if worker is None:
            return None
        try:
            return measure(worker, *arguments)
        except WorkerError as err:
            if tool == OURS:
                raise
            self.say(f"{tool}: {err}")
            return None

    def model(self, tool: str, network: str, *, batch: int) -> str | None:
        """Key of a fully trained model of a tool, trained now if it is not yet."""
        key = f"{network} {batch}"
        if (tool, key) not in self._models:
            # BayesFlow has no stopping rule: its sampling is as fast after few epochs as after many
            epochs = 3 if self.quick else 20 if tool in BACKENDS else 0
            if self.train(tool, network, batch=batch, epochs=epochs, keep=True) is None:
                return None
        return key

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            if worker is not None:
                worker.close()
        self._workers.clear()

    @staticmethod
    def load_now() -> float:
        """Load average of the last minute."""
        return os.getloadavg()[0]
