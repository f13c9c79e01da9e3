"""Measurements as rows: medians in `latest.json`, single runs in `latest_runs.json`.

    {"name", "value", "unit", "peer", "peer_value", "ratio", "device", "versions"},   ratio = value / peer_value

A name begins with its topic and a colon. The ratio is None where there is no peer, and for losses in nats, of which the
difference counts. A row that could not be measured has the value None, and its note says why.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from sbi_phys.core.files import write_aside

__all__ = ["KEYS", "Row", "check_rows", "keep_curves", "merge_rows", "read_rows", "skipped", "topic_of", "write_rows"]

Curves = dict[str, list[tuple[float, float]]]
KEYS = ("name", "value", "unit", "peer", "peer_value", "ratio", "device", "versions")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison.

    Args: name: 'topic: what'. values, peer_values: one number a run, in `unit`. peer: name, '' without one. device: of ours.
    versions: package -> version. note: what the reader must know. load: load average when the topic began.
    """

    name: str
    values: Sequence[float]
    unit: str
    peer: str = ""
    peer_values: Sequence[float] = ()
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    load: float | None = None

    @property
    def value(self) -> float | None:
        """Median of the runs."""
        return median(self.values) if self.values else None

    @property
    def peer_value(self) -> float | None:
        """Median of the peer's runs."""
        return median(self.peer_values) if self.peer_values else None

    @property
    def ratio(self) -> float | None:
        """Value over the peer's value."""
        if self.unit == "nats" or self.value is None or not self.peer_value:
            return None
        return self.value / self.peer_value

    def to_dict(self) -> dict[str, Any]:
        """The eight keys that other programs read."""
        return {
            "name": self.name, "value": self.value, "unit": self.unit, "peer": self.peer or None, "peer_value": self.peer_value,
            "ratio": self.ratio, "device": self.device, "versions": dict(self.versions),
        }  # fmt: skip

    def to_runs(self) -> dict[str, Any]:
        """Every single run, with the note and the load."""
        return {
            "name": self.name, "peer": self.peer or None, "device": self.device, "values": list(self.values),
            "peer_values": list(self.peer_values), "note": self.note, "load": self.load,
        }  # fmt: skip


def skipped(name: str, reason: str, *, peer: str = "") -> Row:
    """A row without a value, for a measurement that was skipped, with the reason."""
    return Row(name=name, values=(), unit="", peer=peer, note=reason)


def topic_of(row: Mapping[str, Any]) -> str:
    """The part of a row's name before the colon."""
    return str(row["name"]).split(":", 1)[0]


def check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Check the form of `latest.json`.   Raises: ValueError, naming the row and what is wrong with it."""
    for i, row in enumerate(rows):
        if set(row) != set(KEYS):
            raise ValueError(f"row {i} has the keys {sorted(row)}; expected {sorted(KEYS)}")
        for key in ("name", "unit", "device"):
            if not isinstance(row[key], str):
                raise ValueError(f"row {i}: {key} is {row[key]!r}; expected text")
        if ": " not in row["name"]:
            raise ValueError(f"row {i}: name is {row['name']!r}; expected 'topic: what was measured'")
        for key in ("value", "peer_value", "ratio"):
            number = row[key]
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number)):
                raise ValueError(f"row {i}: {key} is {number!r}; expected a finite number or None")
        if row["peer"] is not None and not isinstance(row["peer"], str):
            raise ValueError(f"row {i}: peer is {row['peer']!r}; expected text or None")
        if not isinstance(row["versions"], dict) or not all(isinstance(v, str) for v in row["versions"].values()):
            raise ValueError(f"row {i}: versions is {row['versions']!r}; expected package -> version")


def merge_rows(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of this run, and those of earlier ones on other devices or of topics that were not run again.

    A row without a device says why something was not measured: it goes as soon as its topic runs again.
    """
    topics = {topic_of(row) for row in new}
    done = {(topic_of(row), row["device"]) for row in new} | {(topic, "") for topic in topics}
    return [row for row in old if (topic_of(row), row["device"]) not in done] + list(new)


def runs_path(out: Path) -> Path:
    """Path of the single runs that belong to a file of medians."""
    return out.with_name(f"{out.stem}_runs.json")


def read_rows(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Medians and single runs of an earlier run; empty where there are none."""
    medians, runs = (json.loads(p.read_text(encoding="utf-8")) if p.exists() else [] for p in (out, runs_path(out)))
    return medians, runs


def keep_curves(out: Path, curves: Curves) -> Curves:
    """Write the loss curves of this run next to its medians; if there are none, keep those of the previous run."""
    path = out.with_name(f"{out.stem}_curves.json")
    if curves:
        write_aside(path, json.dumps(curves) + "\n", make_folder=True)
        return curves
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_rows(out: Path, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Merge into `out` and the file of single runs next to it -> both, as written.   Raises: ValueError for a malformed row."""
    new = [row.to_dict() for row in rows]
    check_rows(new)
    old, old_runs = read_rows(out)
    merged, runs = merge_rows(old, new), merge_rows(old_runs, [row.to_runs() for row in rows])
    write_aside(out, json.dumps(merged, indent=1) + "\n", make_folder=True)
    write_aside(runs_path(out), json.dumps(runs, indent=1) + "\n", make_folder=True)
    return merged, runs
