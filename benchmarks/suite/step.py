"""(e) The training step (rows gathered, forward, backward, clipping, optimiser) against the bare matrix products of its layers."""

from benchmarks.suite.context import NETWORKS, OURS, Context
from benchmarks.suite.rows import Row, skipped

__all__ = ["run"]

BATCHES = (512, 2048, 8192)
TITLES = {"weights": "spline of 71k weights", "default": "our default"}


def run(context: Context) -> list[Row]:
    """One row for each network, batch and mode."""
    modes = (False, True) if context.info()["compile"] else (False,)
    rows = [row for compiled in modes for network in TITLES for batch in BATCHES for row in _one(context, network, batch, compiled)]
    if len(modes) == 1:
        rows.append(skipped("step: compiled", "this version's TrainConfig has no field `compile`", peer="bare matrix products"))
    return rows


def _one(context: Context, network: str, batch: int, compiled: bool) -> list[Row]:
    # a compilation takes most of a minute on two cores: one batch is enough, and none of it in a quick check
    if (compiled and (context.quick or batch != 2048)) or (context.quick and batch > 2048):
        return []
    worker = context.worker(OURS)
    assert worker is not None
    steps = max(4, 16384 // batch) // (4 if context.quick else 1)
    # a step of a small network runs on one thread (`loop._threads`): the same products are timed on one thread and on all
    counts = sorted({1, context.threads})
    ours: list[float] = []
    bare: dict[int, list[float]] = {threads: [] for threads in counts}
    weights = 0
    for _ in range(1 if context.quick else context.repeats):
        found = worker.call(
            "step", data=str(context.data(context.n_rows)), network=NETWORKS[network], batch=batch, steps=max(2, steps), compiled=compiled
        )
        ours.append(found["ms"])
        for threads in counts:
            bare[threads].append(worker.call("products", matrices=found["matrices"], batch=batch, repeats=12, threads=threads))
        weights = found["weights"]
    mode = "compiled" if compiled else "eager"
    context.say(f"step, {network}, batch {batch}, {mode}: {ours} ms, bare {bare} ms")
    name = f"step: {TITLES[network]}, batch {batch}, {mode}"
    note = f"{weights} weights"
    return [
        Row(name=name, values=ours, unit="ms", peer=f"bare matrix products, {threads} thread{'s' * (threads > 1)}",
            peer_values=bare[threads], note=note, **context.about())
        for threads in counts
    ]  # fmt: skip
