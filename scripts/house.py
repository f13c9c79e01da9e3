"""Structure and speed of the package, compared with an earlier commit.

    python scripts/house.py [--before a771cce] [--speed] [--out house.json]

Counts folders and files, lines and docstrings, imports between folders (against the order of the earlier or the present layer
test), circles, duplicated lines and tests. `--speed` times import, simulation, training and draws of both versions alternately in one
run, and prints the ratio of the medians. Duplicates are found by `symilar` of pylint: blocks of six lines or more, without comments and
imports.
"""

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "a771cce"
# four things that a user waits for; both trees run the same text through public names alone
TIMED = """
import json, sys, tempfile, time
begin = time.perf_counter()
import sbi_phys as sp
seconds = {"import sbi_phys": time.perf_counter() - begin}
begin = time.perf_counter()
sp.NPE, sp.simulate, sp.calibrate
seconds["first use of NPE, simulate, calibrate"] = time.perf_counter() - begin
import numpy as np
import torch
from simulators import SourceSpectrum
torch.set_num_threads(1)
simulator = SourceSpectrum(composition="fixed")
with tempfile.TemporaryDirectory() as folder:
    begin = time.perf_counter()
    store = sp.simulate(simulator, 100_000, folder + "/store", seed=0, workers=1)
    seconds["simulate 1e5 rows"] = time.perf_counter() - begin
    theta, x = store.read()
config = sp.TrainConfig(max_epochs=4, patience=4, batch_size=512)
npe = sp.NPE(simulator.prior, seed=0, device="cpu", config=config)
npe.fit(theta[:4000], x[:4000])
begin = time.perf_counter()
npe.fit(theta[:40_000], x[:40_000])
seconds["train 4 epochs of 4e4 rows"] = time.perf_counter() - begin
npe.sample(x[:10], 1000, seed=0)
begin = time.perf_counter()
npe.sample(x[:1000], 200, seed=1)
seconds["draws, 1000 observations x 200"] = time.perf_counter() - begin
begin = time.perf_counter()
npe.sample(x[0], 100_000, seed=1)
seconds["draws, one observation x 1e5"] = time.perf_counter() - begin
print("TIMES " + json.dumps(seconds))
"""


def main() -> None:
    """Print the table, and with --speed the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with")
    parser.add_argument("--speed", action="store_true", help="time both trees too (minutes)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tests", action="store_true", help="count the tests too, by pytest --collect-only")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), options.before], check=True)
        try:
            found: dict[str, Any] = {"before": structure(tree), "after": structure(ROOT)}
            if options.tests:
                for name, root in (("before", tree), ("after", ROOT)):
                    found[name]["tests collected (with slow ones)"] = count_tests(root)
            print_table(found["before"], found["after"])
            if options.speed:
                found["speed"] = speed(tree, ROOT, options.repeats)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def structure(root: Path) -> dict[str, Any]:
    """Numbers of one tree."""
    files = sorted((root / "sbi_phys").rglob("*.py"))
    top = [p for p in (root / "sbi_phys").iterdir() if p.name != "__pycache__"]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    documented = sum(docstring_lines(tree) for tree in trees.values())
    functions = {
        f"{path.relative_to(root / 'sbi_phys')}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    graph = import_graph(root, trees)
    importers: dict[str, set[str]] = defaultdict(set)
    for module, others in graph.items():
        for other in others:
            importers[other].add(module)
    longest, function = max(lines, key=lambda p: lines[p]), max(functions, key=lambda f: functions[f])
    order = layer_order(root)
    arrows = {(room(a), room(b)) for a, others in graph.items() for b in others if room(a) and room(b) and room(a) != room(b)}
    upward = sorted(f"{a} -> {b}" for a, b in arrows if a in order and b in order and order.index(b) > order.index(a))
    return {
        "folders at the top of the package": sum(p.is_dir() and any(p.rglob("*.py")) for p in top),
        "loose modules at the top, without __init__ and __main__": sum(p.suffix == ".py" and not p.name.startswith("__") for p in top),
        "Python files": len(files),
        "lines": sum(lines.values()),
        "lines of docstrings": documented,
        "share of docstrings": round(documented / sum(lines.values()), 3),
        "files with at most one importer": sum(len(importers[m]) <= 1 for m in graph if not m.endswith(("__init__", "__main__"))),
        "lines of the longest file": f"{lines[longest]} ({longest.relative_to(root / 'sbi_phys')})",
        "lines of the longest function": f"{functions[function]} ({function})",
        "imports between folders": len(arrows),
        "of these upward, lazy and TYPE_CHECKING ones included": len(upward),
        "files in import circles": circles(graph),
        "duplicated lines, package (six lines or more)": duplicates(files),
        "duplicated lines, package, benchmarks, scripts and tests": duplicates(
            [*files, *(p for name in ("benchmarks", "scripts", "tests") for p in sorted((root / name).rglob("*.py")))]
        ),
        "lines of tests": sum(len(p.read_text(encoding="utf-8").splitlines()) for p in (root / "tests").rglob("*.py")),
        "lines of benchmarks and scripts": sum(
            len(p.read_text(encoding="utf-8").splitlines()) for name in ("benchmarks", "scripts") for p in (root / name).rglob("*.py")
        ),
    }


def docstring_lines(tree: ast.AST) -> int:
    """Lines that docstrings of modules, classes and functions take."""
    total = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                total += (first.end_lineno or 0) - first.lineno + 1
    return total


def import_graph(root: Path, trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, anywhere in the file."""
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in trees}
    known = set(names.values())
    graph = {}
    for path, tree in trees.items():
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names}
        graph[names[path]] = (found & known) - {names[path], "sbi_phys"}
    return graph


def room(module: str) -> str:
    """Folder, or loose module, at the top of the package; '' for the package itself."""
    return [*module.split("."), ""][1]


def layer_order(root: Path) -> list[str]:
    """The order that the tree's own layer test states."""
    text = (root / "tests/test_layers.py").read_text(encoding="utf-8")
    found = re.search(r"^ORDER = [\[(](.*?)^[\])]", text, re.S | re.M)
    return re.findall(r'"(\w+)"', found.group(1)) if found else []


def circles(graph: dict[str, set[str]]) -> int:
    """Files that lie on a circle of imports (the faces of folders left out)."""
    inner = {
        m: {o for o in others if o in graph} for m, others in graph.items() if any(m.startswith(f"{p}.") for p in [m.rpartition(".")[0]])
    }
    faces = {m for m in graph if any(o.startswith(f"{m}.") for o in graph)}
    left = {m: others - faces for m, others in inner.items() if m not in faces}
    found: set[str] = set()
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as err:
            circle = set(err.args[1])
            found |= circle
            for m in circle:
                left[m] = left.get(m, set()) - circle
        else:
            return len(found)


def duplicates(files: list[Path]) -> int:
    """Lines of blocks that occur twice, as `symilar` counts them."""
    command = [sys.executable, "-m", "pylint.checkers.symilar"]
    names = [str(p) for p in files if p.name != "__init__.py"]
    run = subprocess.run([*_symilar(command), "-d", "6", "-i", "--ignore-imports", *names], capture_output=True, text=True)
    found = re.search(r"duplicates=(\d+)", run.stdout)
    if not found:
        raise SystemExit(f"symilar printed no total: {run.stderr[-500:]}")
    return int(found.group(1))


def _symilar(fallback: list[str]) -> list[str]:
    beside = Path(sys.executable).with_name("symilar")
    return [str(beside)] if beside.exists() else fallback


def count_tests(root: Path) -> int:
    """Tests that pytest collects."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    found = re.search(r"(\d+)(?:/\d+)? tests collected", run.stdout)
    return int(found.group(1)) if found else -1


def speed(before: Path, after: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of both trees, run in turn."""
    times: dict[str, dict[str, list[float]]] = {"before": defaultdict(list), "after": defaultdict(list)}
    for k in range(repeats):
        turn = [("before", before), ("after", after)]
        for name, root in turn if k % 2 == 0 else reversed(turn):
            env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            run = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, cwd=root, env=env)
            line = next((line for line in run.stdout.splitlines() if line.startswith("TIMES ")), None)
            if line is None:
                raise SystemExit(f"the timed script failed in {root}:\n{run.stderr[-2000:]}")
            for what, value in json.loads(line.removeprefix("TIMES ")).items():
                times[name][what].append(value)
    found = {}
    print(f"\n{'seconds, median of ' + str(repeats):<44} {'before':>10} {'after':>10} {'ratio':>7}")
    for what in times["before"]:
        old, new = (statistics.median(times[name][what]) for name in ("before", "after"))
        found[what] = {"before": old, "after": new, "ratio": new / old}
        print(f"{what:<44} {old:>10.4f} {new:>10.4f} {new / old:>7.3f}", flush=True)
    return found


def print_table(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Both trees side by side."""
    print(f"{'':<62} {'before':<44} after")
    for name in after:
        print(f"{name:<62} {before.get(name, '')!s:<44} {after[name]}")


if __name__ == "__main__":
    main()
