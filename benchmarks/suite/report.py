"""Report of the measurements: a Markdown table in the marked block of `docs/benchmarks.md`, and a figure."""

import math
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite.rows import topic_of
from sbi_phys.core.files import open_aside, write_aside
from sbi_phys.plotting.style import COLOURS, house_style, new_figure
from sbi_phys.report.tables import Table

__all__ = ["MARKS", "block", "number", "plot", "table", "write_block"]

MARKS = re.compile(r"(<!-- benchmarks: begin[^\n]*-->\n).*?(<!-- benchmarks: end -->)", flags=re.DOTALL)
NONE = "\N{EN DASH}"
Dicts = Sequence[Mapping[str, Any]]
_TITLES = {
    "training": "Training",
    "sampling": "Posterior draws",
    "sbc": "Simulation-based calibration",
    "streaming": "Streaming",
    "step": "The training step",
    "simulation": "Simulations",
    "growth": "Growth",
}


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, or three decimals of nats; thousands are spaced."""
    if value is None:
        return NONE
    if unit == "nats":
        return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    rounded = round(value, 2 - math.floor(math.log10(abs(value)))) if value else 0.0
    return f"{rounded:,.{min(digits, 6)}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _spread(values: Sequence[float], unit: str) -> str:
    """Median with the least and the greatest run in brackets."""
    if not values:
        return NONE
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2] if len(ordered) % 2 else (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2
    if len(ordered) == 1:
        return number(middle, unit)
    return f"{number(middle, unit)} ({number(ordered[0], unit)}, {number(ordered[-1], unit)})"


def table(rows: Dicts, runs: Dicts) -> str:
    """Markdown of one topic's rows on one device; `runs` are the single runs of the same names."""
    details = {(run["name"], run["peer"], run["device"]): run for run in runs}
    lines = [_cells(row, details.get((row["name"], row["peer"], row["device"]))) for row in rows]
    return Table(("what", "sbi_phys", "unit", "peer", "peer's", "ratio", "runs", "notes"), tuple(lines)).to_markdown()


def _cells(row: Mapping[str, Any], runs: Mapping[str, Any] | None) -> tuple[str, ...]:
    unit = row["unit"]
    values, peers = (runs["values"], runs["peer_values"]) if runs else ([], [])
    if row["unit"] == "nats" and row["value"] is not None and row["peer_value"] is not None:
        ratio = f"{number(row['value'] - row['peer_value'], 'nats')} (difference)"
    else:
        ratio = number(row["ratio"])
    mine = _spread(values, unit) if values else number(row["value"], unit)
    theirs = _spread(peers, unit) if peers else number(row["peer_value"], unit)
    what = row["name"].split(": ", 1)[1]
    return (what, mine, unit or NONE, row["peer"] or NONE, theirs, ratio, str(len(values) or NONE), (runs["note"] if runs else "") or NONE)


def block(rows: Dicts, runs: Dicts) -> str:
    """Text between the marks: a table for each topic and device, with versions and load."""
    parts = []
    for topic in dict.fromkeys(topic_of(row) for row in rows):
        for device in dict.fromkeys(row["device"] for row in rows if topic_of(row) == topic):
            mine = [row for row in rows if topic_of(row) == topic and row["device"] == device]
            versions = {name: text for row in mine for name, text in row["versions"].items()}
            loads = [r["load"] for r in runs if topic_of(r) == topic and r["device"] == device and r["load"] is not None]
            about = [device or "nothing was measured", ", ".join(f"{name} {text}" for name, text in sorted(versions.items()))]
            about += [f"load average {max(loads):.1f} at the start"] if loads else []
            parts.append(f"### {_TITLES.get(topic, topic)}\n\n{'; '.join(a for a in about if a)}.\n\n{table(mine, runs)}")
    lead = (
        f"Python {platform.python_version()}, {platform.system()}. Medians, in brackets the least and the greatest of the runs; ratio is "
        "sbi_phys over the peer. Losses are mean -log q(theta given x) over 4000 fresh pairs, in the parameters' own units."
    )
    return lead + "\n\n" + "\n".join(parts)


def write_block(page: Path, text: str, *, figure: str = "") -> None:
    """Replace the text between the marks of a page; add the marks at its end where there are none yet."""
    begin = "<!-- benchmarks: begin (written by benchmarks/run.py; edit the rest of the page only) -->\n"
    old = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    if not MARKS.search(old):
        old = f"{old.rstrip()}\n\n## Against the peers\n\n{begin}<!-- benchmarks: end -->\n"
    body = f"{figure}\n\n{text}" if figure else text
    write_aside(page, MARKS.sub(lambda m: f"{m[1]}\n{body}\n{m[2]}", old, count=1), make_folder=True)


def plot(path: Path, rows: Dicts, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Path | None:
    """Loss against wall time, and ratios of rates as bars -> the PNG; None where there is neither."""
    rated = [r for r in rows if r["ratio"] is not None and topic_of(r) in ("training", "sampling") and r["unit"].endswith("/s")]
    bars = [r for r in rated if r["device"] == rated[-1]["device"]]  # of several devices, the one measured last
    if not bars and not curves:
        return None
    with house_style():
        n = bool(curves) + bool(bars)
        fig = new_figure(5.2 * n, max(3.6, 0.32 * len(bars) + 1.2 if bars else 3.6))
        axes = list(fig.subplots(1, n, squeeze=False)[0])
        if curves:
            _losses(axes.pop(0), curves)
        if bars:
            _bars(axes.pop(0), bars)
        with open_aside(path, make_folder=True) as file:
            fig.savefig(file, format="png", dpi=150, metadata={"Software": None})
        return path


def _losses(ax: Any, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    colours = [COLOURS[name] for name in ("flow", "truth", "published")]
    others = [COLOURS[name] for name in ("amortised", "grey", "reference", "prior")]
    for name, curve in curves.items():
        colour, style = (colours, "-") if name.startswith("sbi_phys") else (others, "--")
        ax.plot([s for s, _ in curve], [v for _, v in curve], style, color=colour.pop(0) if colour else None, label=name)
    last = min(v for curve in curves.values() for _, v in curve)
    first = sorted(v for curve in curves.values() for _, v in curve[:3])
    ax.set(xscale="log", xlabel="wall time [s]", ylabel="loss on held-out pairs [nats]", ylim=(last - 0.1, first[len(first) // 2] + 0.2))
    ax.xaxis.set_minor_formatter("")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(loc="lower left", fontsize="small")


def _bars(ax: Any, rows: Dicts) -> None:
    labels = [f"{row['name']}\nagainst {row['peer']}" for row in rows]
    ax.barh(range(len(rows)), [row["ratio"] for row in rows], color=COLOURS["flow"])
    ax.axvline(1, color=COLOURS["reference"], linewidth=0.8)
    for i, row in enumerate(rows):
        ax.text(row["ratio"], i, f" {row['ratio']:.1f}", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), labels, fontsize=6.5)
    ax.invert_yaxis()
    ends = [*(row["ratio"] for row in rows), 1.0]
    ax.xaxis.set_minor_formatter("")
    ax.set(xscale="log", xlim=(min(ends) / 1.5, max(ends) * 3), xlabel="rate of sbi_phys over the peer's")
