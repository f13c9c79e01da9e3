"""(g) Growth: training time per row and peak memory, each size in a separate process."""

import sys
from pathlib import Path

from benchmarks.suite.context import Context
from benchmarks.suite.rows import Row
from benchmarks.suite.workers import Worker

__all__ = ["run"]

SIZES = {10_000: 4, 100_000: 2, 1_000_000: 1}  # rows -> epochs
DIMS = (2, 8, 32)


def run(context: Context) -> list[Row]:
    """Two rows for each size and dimension: microseconds a row in an epoch, peak memory."""
    sizes = {10_000: 2, 20_000: 1} if context.quick else SIZES
    return [row for n, epochs in sizes.items() for dim in (DIMS[:1] if context.quick else DIMS) for row in _one(context, n, dim, epochs)]


def _one(context: Context, n: int, dim: int, epochs: int) -> list[Row]:
    worker = Worker(Path(sys.executable), "benchmarks.peers.growth_worker", threads=context.threads, log=context.folder / "growth.log")
    try:
        found = worker.call("growth", n=n, dim=dim, epochs=epochs)
    finally:
        worker.close()
    per_row = 1e6 * found["epoch_seconds"] / n
    context.say(f"growth, {n} rows, theta {dim}-D: {per_row:.1f} us a row, peak {found['peak_mib']:.0f} MiB")
    what = f"growth: {n} rows, theta {dim}-D"
    data = n * (dim + 18) * 4 / 2**20
    seconds = f"{found['seconds']:.1f} s in all for {epochs} epoch{'s' if epochs > 1 else ''}"
    memory = f"data {data:.0f} MiB, the process {found['before_mib']:.0f} MiB before the training"
    return [
        Row(name=f"{what}, training time", values=[per_row], unit="us/row", note=seconds, **context.about()),
        Row(name=f"{what}, peak memory", values=[found["peak_mib"]], unit="MiB", note=memory, **context.about()),
    ]
