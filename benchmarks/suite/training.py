"""(a) Training rows per second, and the loss reached in a given time on common held-out pairs.

Rates (`run_rates`) are alternating short runs of all tools, so that other load of the machine affects all of them. Then (`run`) complete
trainings, each with its tool's own stopping rule: the time after which sbi_phys reaches the final loss of the other tool, and the losses
after equal wall time. BayesFlow has no stopping rule; it gets the epochs that fill sbi's time, since its schedule depends on
their number.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.suite.context import OURS, Context, Trained
from benchmarks.suite.rows import Row, skipped

__all__ = ["loss_at", "run", "run_rates", "time_to"]

BATCHES = (200, 500, 1000, 2000, 4000)
JAX, TORCH = "BayesFlow on JAX", "BayesFlow on torch"
Case = tuple[str, str, int]  # tool, network, batch
Curve = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A row of rates: a case of ours against a peer's."""

    name: str
    ours: Case
    peer: Case
    note: str = ""


def run_rates(context: Context) -> list[Row]:
    """Rows a second, of all tools in turn."""
    ours, _ = _best_batch(context, OURS, "equal")
    sbi, _ = _best_batch(context, "sbi", "equal")
    flow = _faster_backend(context)
    flow_batch, _ = _best_batch(context, flow, "pairs") if flow else (0, 0.0)
    return _rates(context, _pairs(ours, sbi, flow, flow_batch, quick=context.quick))


def run(context: Context) -> list[Row]:
    """Compare whole trainings: the loss reached in a given time."""
    sbi, _ = _best_batch(context, "sbi", "equal")
    flow = _faster_backend(context)
    flow_batch, flow_rate = _best_batch(context, flow, "pairs") if flow else (0, 0.0)
    return _whole(context, sbi, (flow, "pairs", flow_batch), flow_rate)


def _epochs(context: Context) -> int:
    return 2 if context.quick else 3


def _rows_of(context: Context, case: Case) -> int:
    """Rows that a rate is measured on: fewer where the batch is BayesFlow's own 32, which takes minutes otherwise."""
    if case[0] in (JAX, TORCH) and not case[2]:
        return 1_000 if context.quick else 2_000
    return context.n_rows if context.quick else 2 * context.n_rows


def _measure(context: Context, case: Case) -> Trained | None:
    tool, network, batch = case
    return context.train(tool, network, batch=batch, epochs=_epochs(context), n=_rows_of(context, case))


def _best_batch(context: Context, tool: str, network: str) -> tuple[int, float]:
    """The batch of highest rate, and the rate; zeros where the tool does not run."""
    batches: tuple[int, ...] = BATCHES[:3] if context.quick else BATCHES
    if tool in (JAX, TORCH):
        batches = (512,) if context.quick else (512, 2000)  # each takes JAX a compilation
    rates = {batch: done.rate for batch in batches if (done := _measure(context, (tool, network, batch))) is not None}
    best = max(rates, key=lambda b: rates[b]) if rates else 0
    return best, rates.get(best, 0.0)


def _faster_backend(context: Context) -> str:
    """BayesFlow's backend of higher rate on this machine; '' where none runs."""
    # with JAX every network is compiled for half a minute first: left out of a quick check
    tools = (TORCH,) if context.quick else (JAX, TORCH)
    rates = {tool: done.rate for tool in tools if (done := _measure(context, (tool, "pairs", 512))) is not None}
    return max(rates, key=lambda t: rates[t]) if rates else ""


def _pairs(ours: int, sbi: int, flow: str, flow_batch: int, *, quick: bool) -> list[Pair]:
    out = []
    if sbi:
        nsf = ("sbi", "equal", 0)
        out += [
            Pair("spline, default batches", (OURS, "equal", 0), nsf),
            Pair("spline, batch 200", (OURS, "equal", 200), nsf),
            Pair(f"spline, ours at its best batch ({ours}), sbi at its default", (OURS, "equal", ours), nsf),
            Pair(f"spline, sbi at its best batch ({sbi})", (OURS, "equal", 0), ("sbi", "equal", sbi)),
            Pair(f"spline, best batch of each ({ours}, {sbi})", (OURS, "equal", ours), ("sbi", "equal", sbi)),
            Pair("spline of as many weights, default batches", (OURS, "weights", 0), nsf),
            Pair(f"spline of as many weights, best batch of each ({ours}, {sbi})", (OURS, "weights", ours), ("sbi", "equal", sbi)),
            Pair("masked autoregressive, default batches", (OURS, "maf", 0), ("sbi", "maf", 0)),
            Pair("each tool as it comes", (OURS, "default", 0), ("sbi", "default", 0), note="sbi's default is its maf"),
        ]
    if flow:
        out += [
            Pair("spline, batch 512", (OURS, "equal", 512), (JAX, "pairs", 512)),
            Pair("spline, batch 512, both compiled", (OURS, "compiled", 512), (JAX, "pairs", 512)),
            Pair("spline, batch 512", (OURS, "equal", 512), (TORCH, "pairs", 512)),
            Pair(f"spline, BayesFlow at its best batch ({flow_batch})", (OURS, "equal", 0), (flow, "pairs", flow_batch)),
            Pair("affine, batch 512", (OURS, "affine", 512), (TORCH, "default", 512)),
            Pair("each tool as it comes", (OURS, "default", 0), (TORCH, "default", 0), note="BayesFlow's default is affine, batch 32"),
        ]
    return [pair for pair in out if not quick or (pair.peer[0] != JAX and pair.peer != (TORCH, "default", 0))]


def _rates(context: Context, pairs: list[Pair]) -> list[Row]:
    alone: list[Case] = [] if pairs else [(OURS, "equal", 0), (OURS, "default", 0)]
    cases = list(dict.fromkeys([*alone, *(case for pair in pairs for case in (pair.ours, pair.peer))]))
    found: dict[Case, list[Trained]] = {case: [] for case in cases}
    for _ in range(context.repeats):
        for case in cases:
            done = _measure(context, case)
            if done is not None:
                found[case].append(done)
    rates = {case: [done.rate for done in found[case]] for case in alone}
    rows = [
        Row(name=f"training: spline, {network}", values=rates[tool, network, batch], unit="rows/s", note="no peer ran", **context.about())
        for tool, network, batch in alone
    ]
    for pair in pairs:
        ours, peer = found[pair.ours], found[pair.peer]
        name, who = f"training: {pair.name}", _title(pair.peer)
        if not peer:
            rows.append(skipped(name, f"{who} did not run", peer=who))
            continue
        sizes = f"{ours[0].weights} and {peer[0].weights} weights"
        note = "; ".join(text for text in (sizes, pair.note) if text)
        rows.append(
            Row(
                name=name, values=[t.rate for t in ours], unit="rows/s", peer=who, peer_values=[t.rate for t in peer], note=note,
                **context.about(pair.peer[0]),
            )
        )  # fmt: skip
    return rows


def _title(case: Case) -> str:
    tool, network, batch = case
    kinds = {"equal": "nsf", "maf": "maf", "default": "default", "pairs": "spline"}
    return f"{tool}, {kinds[network]}, batch {batch or {'sbi': 200}.get(tool, 32)}"


def time_to(curve: Curve, target: float) -> float | None:
    """Seconds after which a training's loss is at or below the target, or None."""
    return next((seconds for seconds, loss in curve if loss <= target), None)


def loss_at(curve: Curve, seconds: float) -> float:
    """Loss of a training at a given time; its first loss if that is later."""
    reached = [loss for when, loss in curve if when <= seconds]
    return reached[-1] if reached else curve[0][1]


def _whole(context: Context, sbi_batch: int, flow: Case, flow_rate: float) -> list[Row]:
    """Whole trainings, two seeds, ours and the peers' in turn."""
    cases: list[Case] = [(OURS, "equal", 0)]
    if sbi_batch:
        cases += [("sbi", "equal", 0), (OURS, "weights", 0)]
        cases += [("sbi", "equal", sbi_batch)] if sbi_batch != 200 else []
    cases += [(OURS, "default", 0), flow] if flow[0] else [(OURS, "default", 0)]
    found: dict[Case, list[Trained]] = {case: [] for case in cases}
    for seed in range(1 if context.quick else 2):
        for case in cases:
            epochs = _whole_epochs(context, case, found, flow_rate)
            done = context.train(case[0], case[1], batch=case[2], epochs=epochs, seed=seed, keep=True)
            if done is not None:
                found[case].append(done)
    found = {case: runs for case, runs in found.items() if runs}
    for case, runs in found.items():
        context.curves[f"{OURS}, {case[1]}" if case[0] == OURS else _title(case)] = runs[0].curve()
    return [row for peer in found if peer[0] != OURS for row in _whole_rows(context, found, peer)]


def _whole_epochs(context: Context, case: Case, found: dict[Case, list[Trained]], flow_rate: float) -> int:
    """0 is the tool's own rule; BayesFlow's epochs fill the longest time of an sbi training so far, at most its own 100."""
    if context.quick:
        return 5 if case[0] == OURS else 3
    if case[0] not in (JAX, TORCH):
        return 0
    seconds = max((t.wall for (tool, _, _), runs in found.items() if tool == "sbi" for t in runs), default=60.0)
    return max(5, min(100, round(seconds * flow_rate / (0.9 * context.n_rows))))


def _whole_rows(context: Context, found: dict[Case, list[Trained]], peer: Case) -> list[Row]:
    rows, theirs, who = [], found[peer], _title(peer)
    about = context.about(peer[0])
    for case in _ours_beside(peer, found):
        runs = list(zip(found[case], theirs, strict=False))
        what = {"equal": "equal size", "weights": "equal size", "default": "our default"}[case[1]]
        times = [time_to(a.curve(), b.held_out) for a, b in runs]
        reached = [t for t in times if t is not None]
        note = "" if len(reached) == len(times) else f"not reached in {len(times) - len(reached)} of {len(times)} runs"
        shared: dict[str, Any] = {"peer": who, **about}
        rows += [
            Row(
                name=f"training: time to the peer's final loss, {what}", values=reached if not note else (), unit="s",
                peer_values=[b.wall for _, b in runs], note=note, **shared,
            ),
            Row(
                name=f"training: loss in the time that the peer takes, {what}", values=[loss_at(a.curve(), b.wall) for a, b in runs],
                unit="nats", peer_values=[b.held_out for _, b in runs], note=_ended(runs), **shared,
            ),
            Row(
                name=f"training: loss in the time that we take, {what}", values=[a.held_out for a, _ in runs],
                unit="nats", peer_values=[loss_at(b.curve(), a.wall) for a, b in runs], note=_ended(runs), **shared,
            ),
        ]  # fmt: skip
    return rows


def _ours_beside(peer: Case, found: dict[Case, list[Trained]]) -> list[Case]:
    """Our networks to compare a peer's with: the one of as many weights, and the default."""
    size = "weights" if peer[0] == "sbi" else "equal"
    return [case for case in found if case[0] == OURS and case[1] in (size, "default")]


def _ended(runs: list[tuple[Trained, Trained]]) -> str:
    return f"ended after {', '.join(f'{a.wall:.1f}' for a, _ in runs)} s; peer {', '.join(f'{b.wall:.1f}' for _, b in runs)} s"
