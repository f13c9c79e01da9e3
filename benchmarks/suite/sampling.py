"""(b) Posterior draws per second, for one observation and for a thousand at once."""

from benchmarks.suite.context import OURS, Context
from benchmarks.suite.rows import Row
from benchmarks.suite.workers import Worker

__all__ = ["models", "run"]

# tool, network, batch it is trained with; the batch does not matter to the draws
MODELS = (("sbi", "equal", 2000), ("BayesFlow on JAX", "pairs", 512), ("BayesFlow on torch", "pairs", 512))


def models(context: Context) -> tuple[tuple[str, str, int], ...]:
    """The peers' models: without JAX in a quick check, because it compiles for half a minute."""
    return tuple(m for m in MODELS if not context.quick or m[0] != "BayesFlow on JAX")


def run(context: Context) -> list[Row]:
    """Two rows for each peer."""
    cases = [(1, 10_000), (1000, 100)] if not context.quick else [(1, 1_000), (100, 20)]
    ours = context.model(OURS, "equal", batch=0)
    assert ours is not None
    rows = []
    for tool, network, batch in models(context):
        peer = context.model(tool, network, batch=batch)
        if peer is None:
            continue
        for n_observations, n_draws in cases:
            rates: dict[str, list[float]] = {OURS: [], tool: []}
            for repeat in range(context.repeats + 1):
                for who, key in ((OURS, ours), (tool, peer)):
                    seconds = context.guarded(who, _sample, context, key, n_observations, n_draws, repeat)
                    if seconds is not None and repeat:  # the first run warms up, and is not counted
                        rates[who].append(n_observations * n_draws / seconds)
            what = f"{n_observations} observation{'s' if n_observations > 1 else ''}, {n_draws} draws each"
            context.say(f"sampling: {what}: {[round(r) for r in rates[OURS]]}, {tool} {[round(r) for r in rates[tool]]} draws/s")
            row = Row(
                name=f"sampling: {what}", values=rates[OURS], unit="draws/s", peer=tool, peer_values=rates[tool], **context.about(tool)
            )
            rows.append(row)
    return rows or [_alone(context, ours)]


def _sample(worker: Worker, context: Context, key: str, n_observations: int, n_draws: int, seed: int) -> float:
    data = str(context.data(context.n_rows))
    return float(worker.call("sample", data=data, key=key, n_observations=n_observations, n_draws=n_draws, seed=seed))


def _alone(context: Context, key: str) -> Row:
    """Our rate where no peer runs."""
    n, draws = (100, 20) if context.quick else (1000, 100)
    seconds = [context.guarded(OURS, _sample, context, key, n, draws, r) for r in range(context.repeats)]
    rates = [n * draws / s for s in seconds]
    return Row(name=f"sampling: {n} observations, {draws} draws each", values=rates, unit="draws/s", note="no peer ran", **context.about())
