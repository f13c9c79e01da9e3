"""Numbers with what is asked of them: printed, written as JSON, and put between marks into a page."""

import json
import os
from pathlib import Path
from typing import Any

Numbers = dict[str, tuple[float, str, float | None]]  # name -> value, '<=', '>=' or '==', bound (None = for information)


def table(rows: list[dict[str, Any]]) -> str:
    """What was asked, as the page docs/scaling.md shows it."""
    lines = ["| | measured | asked |", "| --- | --- | --- |"]
    lines += [f"| {r['name']} | {r['value']:.3g} | {r['asked'] or ''}{'' if r['met'] else ' **missed**'} |" for r in rows]
    return "\n".join(lines)


def fill(page: Path | None, name: str, text: str) -> None:
    """Print a table, and put it between its marks in a page."""
    print(text)
    if page is None:
        return
    old, begin, end = page.read_text(encoding="utf-8"), f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, _, rest = old.partition(begin)
    if end not in rest:
        raise SystemExit(f"{page} has no marks {begin.strip()} and {end}")
    aside = page.with_suffix(".tmp")
    aside.write_text(f"{head}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    os.replace(aside, page)


def report(numbers: Numbers, kept: list[dict[str, Any]], facts: dict[str, Any], out: Path) -> tuple[bool, list[dict[str, Any]]]:
    """Print, write JSON with the rows that are kept; return whether all numbers are as asked, and all rows."""
    rows = {row["name"]: row for row in kept}
    tests = {"<=": float.__le__, ">=": float.__ge__, "==": float.__eq__}
    for name, (value, sign, bound) in numbers.items():
        met = bound is None or bool(tests[sign](float(value), bound))
        rows[name] = {"name": name, "value": float(value), "asked": None if bound is None else f"{sign} {bound:g}", "met": met}
        print(f"{name:<90} {value:<10.4g}" + ("" if bound is None else f" {sign} {bound:g}  {'met' if met else 'MISSED'}"), flush=True)
    machine = {"processor": f"{os.cpu_count()} cores", "load": os.getloadavg()[0]}
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(".tmp")
    aside.write_text(json.dumps({**facts, "machine": machine, "rows": list(rows.values())}, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, out)
    return all(rows[name]["met"] for name in numbers), list(rows.values())
