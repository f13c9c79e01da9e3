"""(c) Simulation-based calibration, 1000 observations with 1000 draws each: seconds for draws, ranks and test."""

from benchmarks.suite.context import OURS, Context
from benchmarks.suite.rows import Row
from benchmarks.suite.sampling import models
from benchmarks.suite.workers import Worker

__all__ = ["run"]


def run(context: Context) -> list[Row]:
    """One row for each peer; a tool that has taken half a minute is not run again."""
    n = 100 if context.quick else 1000
    ours = context.model(OURS, "equal", batch=0)
    assert ours is not None
    rows = []
    for tool, network, batch in models(context):
        peer = context.model(tool, network, batch=batch)
        if peer is None:
            continue
        seconds: dict[str, list[float]] = {OURS: [], tool: []}
        for repeat in range(context.repeats):
            for who, key in ((OURS, ours), (tool, peer)):
                if sum(seconds[who]) > 30:
                    continue
                took = context.guarded(who, _sbc, context, key, n, repeat)
                if took is not None:
                    seconds[who].append(took)
        context.say(f"sbc: {n} x {n}: {[round(s, 2) for s in seconds[OURS]]} s, {tool} {[round(s, 2) for s in seconds[tool]]} s")
        rows.append(
            Row(name=f"sbc: {n} x {n}", values=seconds[OURS], unit="s", peer=tool, peer_values=seconds[tool], **context.about(tool))
        )
    if not rows:
        values = [context.guarded(OURS, _sbc, context, ours, n, r) for r in range(context.repeats)]
        rows = [Row(name=f"sbc: {n} x {n}", values=values, unit="s", note="no peer ran", **context.about())]
    return rows


def _sbc(worker: Worker, context: Context, key: str, n: int, seed: int) -> float:
    data = str(context.data(context.n_rows))
    return float(worker.call("sbc", data=data, key=key, n_observations=n, n_draws=n, seed=seed))
