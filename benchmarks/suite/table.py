"""Numbers with their requirements: runs the parts of a benchmark one after another, prints a table and writes JSON.

A benchmark is a dictionary of parts, each a function that returns `Numbers`:

    def main() -> None:
        parser = arguments(__doc__, "ratios")
        parser.add_argument("--n", type=int, default=20_000)
        options = parser.parse_args()
        sys.exit(run({"toy": toy, "source": lambda: source(options.n)}, options, {"n_simulations": options.n}))
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sbi_phys.core.files import write_aside

__all__ = ["ROOT", "Numbers", "Part", "arguments", "fill", "report", "run", "run_parts", "table"]

ROOT = Path(__file__).resolve().parents[2]
Numbers = dict[str, tuple[float, str, float | None]]  # name -> value, '<=', '>=' or '==', bound (None: for information)
Part = Callable[[], Numbers]
_MET = {"<=": float.__le__, ">=": float.__ge__, "==": float.__eq__}


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Parser of a benchmark with the arguments that all have: --out and --only."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/{name}.json", help="JSON file to write")
    parser.add_argument("--only", help="one part; the rows of the others stay as the file has them")
    return parser


def run(parts: Mapping[str, Part], options: argparse.Namespace, facts: dict[str, Any] | None = None) -> int:
    """Run the parts that --only selects, print and write -> exit code: 1 if a requirement is not met."""
    return 0 if run_parts(parts, options, facts)[0] else 1


def run_parts(
    parts: Mapping[str, Part], options: argparse.Namespace, facts: dict[str, Any] | None = None
) -> tuple[bool, list[dict[str, Any]]]:
    """The same -> whether all requirements are met, and all rows of the file."""
    if options.only is not None and options.only not in parts:
        raise SystemExit(f"--only {options.only}: expected one of {', '.join(parts)}")
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.only and options.out.exists() else {}
    numbers: Numbers = {}
    seconds: dict[str, float] = kept.get("seconds", {})
    for name in [options.only] if options.only else parts:
        begin = time.perf_counter()
        numbers |= parts[name]()
        seconds[name] = round(time.perf_counter() - begin, 2)
        print(f"[{name}: {seconds[name]} s]", flush=True)
    return report(numbers, kept.get("rows", []), {**(facts or {}), "seconds": seconds}, options.out)


def report(numbers: Numbers, kept: list[dict[str, Any]], facts: dict[str, Any], out: Path) -> tuple[bool, list[dict[str, Any]]]:
    """Print and write numbers, together with the kept rows -> whether all requirements are met, and all rows."""
    rows = {row["name"]: row for row in kept}
    for name, (value, sign, bound) in numbers.items():
        met = bound is None or bool(_MET[sign](float(value), float(bound)))
        rows[name] = {"name": name, "value": float(value), "asked": None if bound is None else f"{sign} {bound:g}", "met": met}
        print(f"{name:<90} {value:<12.4g}" + ("" if bound is None else f" {sign} {bound:g}  {'met' if met else 'MISSED'}"), flush=True)
    machine = {"processor": f"{os.cpu_count()} cores", "load": os.getloadavg()[0]}
    text = json.dumps({**facts, "machine": machine, "rows": list(rows.values())}, indent=1) + "\n"
    write_aside(out, text, make_folder=True)
    return all(rows[name]["met"] for name in numbers), list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with their requirements."""
    lines = ["| | measured | required |", "| --- | --- | --- |"]
    lines += [f"| {r['name']} | {r['value']:.3g} | {r['asked'] or ''}{'' if r['met'] else ' **missed**'} |" for r in rows]
    return "\n".join(lines)


def fill(page: Path | None, name: str, text: str) -> None:
    """Print a text, and put it between its marks `<!-- name: begin -->` and `<!-- name: end -->` in a page.

    Raises: SystemExit if the page has no such marks.
    """
    print(text)
    if page is None:
        return
    old, begin, end = page.read_text(encoding="utf-8"), f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, _, rest = old.partition(begin)
    if end not in rest:
        raise SystemExit(f"{page} has no marks {begin.strip()} and {end}")
    new = f"{head}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}"
    write_aside(page, new)
