"""(d) Streaming from disk against rows in memory, by `benchmarks/streaming.py`."""

import json
import subprocess
import sys

from benchmarks.suite.context import Context
from benchmarks.suite.rows import Row, skipped
from benchmarks.suite.workers import ROOT, worker_environment

__all__ = ["run"]

SCRIPT = ROOT / "benchmarks" / "streaming.py"


def run(context: Context) -> list[Row]:
    """The rows of that script, with data 8 times the allowance: 8 MiB here, 64 MiB of rows, so that it takes minutes."""
    if not SCRIPT.exists():
        return [skipped("streaming: against rows in memory", "this version has no benchmarks/streaming.py")]
    out = context.folder / "streaming.json"
    memory, batch, repeats = ("0.5", "256", "1") if context.quick else ("8", "2048", str(min(2, context.repeats)))
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--memory-mib", memory, "--repeats", repeats]
    command += ["--batch", batch, "--threads", str(context.threads), "--folder", str(context.folder)]
    done = subprocess.run(command, cwd=ROOT, env=worker_environment(context.threads), capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        return [skipped("streaming: failed", words[-1])]
    return [_row(context, found) for found in json.loads(out.read_text(encoding="utf-8"))]


def _row(context: Context, found: dict[str, object]) -> Row:
    about, device = context.about(), str(found["device"])
    if not device.startswith("cpu"):
        about["device"] = device
    name, value, peer_value = str(found["name"]), float(str(found["value"])), float(str(found["peer_value"]))
    context.say(f"{name}: {value:.4g} {found['unit']}, {found['peer']} {peer_value:.4g}")
    return Row(
        name=name, values=[value], unit=str(found["unit"]), peer=str(found["peer"]), peer_values=[peer_value],
        note=f"{device}; medians of the script's own runs", **about,
    )  # fmt: skip
