"""Speed of sbi_phys compared with sbi and BayesFlow: the same data, threads, networks and stopping rules, in one run.

    make bench                                   # with sbi and BayesFlow in .venv-bench
    python benchmarks/run.py --only step growth --threads 2

Every tool runs in its own process, and their runs alternate. Medians are written to benchmarks/results/latest.json, single runs
to latest_runs.json, a table to docs/benchmarks.md and a figure to docs/images/benchmarks.png. With --quick (a functional test)
the results are written to runs/bench/ and the page is not changed.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # run as a file, python puts this folder first on the path; the suite is found from the repository's root
    sys.path[0] = str(ROOT)

from benchmarks.suite import growth, sampling, sbc, simulation, step, streaming, training  # noqa: E402
from benchmarks.suite.context import Context  # noqa: E402
from benchmarks.suite.report import block, plot, write_block  # noqa: E402
from benchmarks.suite.rows import Row, keep_curves, skipped, write_rows  # noqa: E402
from benchmarks.suite.workers import WorkerError, worker_environment  # noqa: E402

__all__ = ["TOPICS", "main"]

TOPICS = {
    "rates": training.run_rates,
    "training": training.run,
    "sampling": sampling.run,
    "sbc": sbc.run,
    "streaming": streaming.run,
    "step": step.run,
    "simulation": simulation.run,
    "growth": growth.run,
}
LATEST = ROOT / "benchmarks" / "results" / "latest.json"


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--only", nargs="+", metavar="NAME", default=[], help=f"topics to run: {', '.join(TOPICS)}")
    out.add_argument("--quick", action="store_true", help="less of everything, in minutes; no number for a comparison")
    out.add_argument("--threads", type=int, default=2, help="threads of every process (2)")
    out.add_argument("--repeats", type=int, default=0, help="runs of each timing (3; 1 with --quick)")
    out.add_argument("--out", type=Path, default=None, help="JSON file (benchmarks/results/latest.json)")
    out.add_argument("--peers", type=Path, default=ROOT / ".venv-bench/bin/python", help="interpreter that has sbi and BayesFlow")
    return out


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parse = parser()
    options = parse.parse_args(arguments)
    options.only = [name for text in options.only for name in text.split(",") if name]
    for name in options.only:
        if name not in TOPICS:
            parse.error(f"--only got {name!r}; expected some of {', '.join(TOPICS)}")
    for name in ("threads", "repeats"):
        if getattr(options, name) < (1 if name == "threads" else 0):
            parse.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    return options


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Row], Context]:
    """Run the topics; the rows are there even if a later topic is interrupted by Ctrl-C."""
    peers = options.peers if options.peers.exists() else None
    context = Context(
        quick=options.quick, repeats=options.repeats or (1 if options.quick else 3), threads=options.threads, folder=folder, peers=peers
    )
    if peers is None:
        context.say(f"no peers: {options.peers} does not exist (`make bench` installs them); ours are measured alone")
    rows: list[Row] = []
    try:
        for name in options.only or TOPICS:
            context.load = context.load_now()
            context.say(f"== {name} (load average {context.load:.2f})")
            try:
                rows += TOPICS[name](context)
            except WorkerError as err:
                context.say(f"{name} failed: {err}")
                rows.append(skipped(f"{name}: failed", str(err)))
    except KeyboardInterrupt:
        context.say("interrupted: the topics that were finished are kept")
    finally:
        context.close()
    if context.quick:
        rows = [replace(row, note="; ".join(text for text in ("quick check", row.note) if text)) for row in rows]
    return rows, context


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print -> exit code."""
    options = _options(arguments)
    # one set of cores for all that follows: libraries that count the machine's cores by themselves see it too
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ.update({k: v for k, v in worker_environment(options.threads).items() if k.endswith(("_THREADS", "_POLICY"))})
    out = (options.out or (ROOT / "runs/bench/quick.json" if options.quick else LATEST)).resolve()
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        rows, context = measure(options, Path(folder))
    if not rows:
        print("nothing was measured")
        return 1
    merged, runs = write_rows(out, rows)
    page = out == LATEST.resolve()
    picture = plot(ROOT / "docs/images/benchmarks.png" if page else out.with_suffix(".png"), merged, keep_curves(out, context.curves))
    text = block(merged, runs)
    print(f"\n{text}\nwritten: {out}" + (f", {picture}" if picture else ""))
    if page:
        write_block(ROOT / "docs/benchmarks.md", text, figure="![Loss against wall time, and rates over the peers'](images/benchmarks.png)")
    return 1 if any(row.name.endswith(": failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
