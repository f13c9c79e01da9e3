"""Streaming from disk against rows in memory, with data 8 times as large as the memory allowed for streaming.

python benchmarks/streaming.py [--out streaming.json] [--memory-mib 16] [--repeats 3] [--threads 2] [--batch 2048]

- rows a second of draining an epoch: bare, on one thread, against batches by index_select out of tensors in memory;
- rows a second of training the default network, streamed and in memory, epochs alternating;
- growth of the process's peak resident memory over a whole stream (the pass at the start, validation rows, an epoch)
  against the allowed memory, in a separate process.

Rows: {"name", "value", "unit", "peer", "peer_value", "ratio", "device", "versions"}, medians over the repeats.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sbi_phys
from sbi_phys.core.device import resolve_device
from sbi_phys.core.files import write_aside
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import PosteriorNet, npe_loss
from sbi_phys.priors import NormalPrior, Observable, Parameter
from sbi_phys.priors.parameters import observables_to_dicts
from sbi_phys.store.manifest import Manifest, write_manifest
from sbi_phys.store.shards import Header, ShardData, shard_name, write_shard
from sbi_phys.training.batches import MemoryBatches
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.training.stream import Stream

Row = dict[str, Any]
N_PARAMETERS, N_COLUMNS = 2, 18
ROW_BYTES = 4 * (N_PARAMETERS + N_COLUMNS)
PRIOR = NormalPrior([Parameter(f"t{i}") for i in range(N_PARAMETERS)])


def write_store(folder: Path, rows: int, *, shard_rows: int = 200_000) -> None:
    """Store of a linear Gaussian simulator: x = A theta + noise, float32."""
    matrix = rng_for(0, "matrix").standard_normal((N_PARAMETERS, N_COLUMNS))
    settings = {"class": "benchmarks:Linear", "settings": {}}
    observables = observables_to_dicts((Observable("x", N_COLUMNS),))
    header = Header(settings, PRIOR.to_dict(), observables, 0, shard_rows, "float32", "prior")
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, Manifest(header, rows))
    for index, start in enumerate(range(0, rows, shard_rows)):
        rng, n = rng_for(0, "shard", index), min(shard_rows, rows - start)
        theta = PRIOR.sample(n, rng)
        x = (theta @ matrix + rng.standard_normal((n, N_COLUMNS))).astype(np.float32)
        write_shard(folder / shard_name(index), header, index, ShardData(theta, x, np.zeros(n, dtype=np.uint8), {}))


def drain(batches: Iterable[tuple[Tensor, ...]]) -> float:
    """Rows per second of an epoch that only reads every batch."""
    start, rows = time.perf_counter(), 0
    for u, _ in batches:
        rows += len(u)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return rows / (time.perf_counter() - start)


def train_rate(batches: Stream | MemoryBatches, net: PosteriorNet, batch: int) -> float:
    """Rows a second of one epoch of training, without the validation after it."""
    config = TrainConfig(batch_size=batch, max_epochs=1)
    (record,) = fit(npe_loss, net, batches, None, config, seed=0)
    return batches.n / (1e-3 * record.step_ms * max(1, batches.n // batch))


def alternate(repeats: int, ours: Callable[[int], float], peer: Callable[[int], float]) -> tuple[list[float], list[float]]:
    """Run both alternately, so that other load affects both; the first run of each is discarded."""
    runs = [(ours(i), peer(i)) for i in range(repeats + 1)][1:]
    return [a for a, _ in runs], [b for _, b in runs]


def row(name: str, unit: str, ours: list[float], peer: str, theirs: list[float], device: str) -> Row:
    """One line of the result; the single runs are printed."""
    value, other = median(ours), median(theirs)
    print(
        f"{name:60s} {value:14.4g} {unit:9s} {peer} {other:.4g}, ratio {value / other:.3f}   runs {[f'{v:.4g}' for v in ours]}", flush=True
    )
    versions = {"sbi_phys": sbi_phys.__version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {
        "name": f"streaming: {name}", "value": value, "unit": unit, "peer": peer, "peer_value": other, "ratio": value / other,
        "device": device, "versions": versions,
    }  # fmt: skip


def peak_growth(folder: Path, memory: int) -> float:
    """MiB by which a fresh process's peak memory grows over a stream, above a stream of little data in little memory."""
    small = folder.parent / "small"
    if not small.exists():
        write_store(small, 5000, shard_rows=2000)
    command = [sys.executable, __file__, "--child", str(small), str(folder), str(memory)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(out.stdout) / 2**20


def child(small: str, large: str, memory: int) -> None:
    """The work that `peak_growth` measures, with new caches."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    before = 0
    for path, allowed in ((small, 2**20), (large, memory)):
        before = peak()
        with tempfile.TemporaryDirectory(dir=Path(path).parent) as cache, Stream(path, PRIOR, memory=allowed, cache=cache) as stream:
            drain(stream.epoch(0, -(-stream.n * 4096 // allowed)))  # batches as large as the memory permits, nearly
    print(peak() - before)


def measure(memory: int, folder: Path, repeats: int, threads: int, device: torch.device, *, batch: int, train: bool) -> list[Row]:
    """All rows, for a store of 8 times `memory` bytes of float32 rows in `folder`."""
    rows = 8 * memory // ROW_BYTES
    write_store(folder / "large", rows)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} threads"
    found = [
        row(
            "growth of peak memory, data 8 x the allowance",
            "MiB",
            [peak_growth(folder / "large", memory)],
            "allowance",
            [memory / 2**20],
            name,
        )
    ]
    torch.set_num_threads(1)
    with Stream(folder / "large", PRIOR, memory=memory, device=device) as stream:
        data = [torch.cat(t) for t in zip(*stream.epoch(0, max(1, stream.n // batch)), strict=True)]
        inside = MemoryBatches(data, stream.validation, seed=0)
        one = "cpu, 1 thread" if device.type == "cpu" else name
        drained = alternate(
            repeats,
            lambda i: drain(stream.epoch(i, max(1, stream.n // batch))),
            lambda i: drain(inside.epoch(i, max(1, stream.n // batch))),
        )
        found.append(row("bare epoch from the cache", "rows/s", drained[0], "in memory", drained[1], one))
        with Stream(folder / "large", PRIOR, memory=memory, device=device, cache=None) as live:
            rates = [drain(live.epoch(i, max(1, live.n // batch))) for i in range(2)]
        found.append(row("bare epoch from the shards, cache=None", "rows/s", rates, "in memory", drained[1], one))
        if not train:
            return found
        torch.set_num_threads(threads)
        net = PosteriorNet(PRIOR.free_dim, (N_COLUMNS,), FlowConfig(), EmbeddingConfig(), seed=0).to(device)
        trained = alternate(repeats, lambda _: train_rate(stream, net, batch), lambda _: train_rate(inside, net, batch))
        found.append(row("training, default network, data 8 x the allowance", "rows/s", trained[0], "in memory", trained[1], name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Streaming from disk against rows in memory.")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--memory-mib", type=float, default=16, help="memory that streaming is allowed (16)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2048, help="rows of a batch (2048); 16 of them must fit into the memory")
    parser.add_argument("--no-training", action="store_true", help="leave the training out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=None, help="where the data lie meanwhile (a temporary folder)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], int(args.child[2]))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        memory, device = int(args.memory_mib * 2**20), resolve_device(args.device)
        rows = measure(memory, Path(folder), args.repeats, args.threads, device, batch=args.batch, train=not args.no_training)
    if args.out is not None:
        write_aside(args.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
