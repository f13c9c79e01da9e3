"""(f) Simulations per second, by `benchmarks/simulator_speed.py`."""

import json
import subprocess
import sys

from benchmarks.suite.context import Context
from benchmarks.suite.rows import Row
from benchmarks.suite.workers import ROOT, worker_environment

__all__ = ["run"]

WANTED = {"simulations_per_second_one_process": "one process", "simulations_per_second_{workers}_processes": "{workers} processes"}


def run(context: Context) -> list[Row]:
    """Rates of the simulator's forms."""
    out = context.folder / "simulator.json"
    command = [sys.executable, "benchmarks/simulator_speed.py", "--out", str(out), "--workers", str(context.threads)]
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(1 if context.quick else min(2, context.repeats)):
        rows = "1000" if context.quick else "10000"
        subprocess.run([*command, "--rows", rows], check=True, cwd=ROOT, env=worker_environment(1), stdout=subprocess.DEVNULL)
        found.append(json.loads(out.read_text(encoding="utf-8")))
    return [
        Row(
            name=f"simulation: source spectrum, {form}, {text.format(workers=context.threads)}",
            values=[run[form][key.format(workers=context.threads)] for run in found],
            unit="simulations/s",
            **context.about(),
        )
        for form in ("free", "fixed")
        for key, text in WANTED.items()
    ]
