"""The order of the folders, read off the import statements: an import from a folder further down the list fails, and so does a circle.

Every import counts: at the top of a file, within a function, under TYPE_CHECKING, and in the stubs `__init__.pyi`.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A folder imports only from itself and from folders before it in this list (docs/map.md).
ORDER = (
    "core",
    "priors",
    "store",
    "simulation",
    "training",
    "nets",
    "samplers",
    "estimators",
    "calibration",
    "comparison",
    "confidence",
    "unfold",
    "plotting",
    "report",
    "workflow",
)
# Third-party packages that one place alone may import.
ONLY_IN = {"nflows": "sbi_phys/nets/", "arviz": "sbi_phys/report/arviz.py", "arviz_base": "sbi_phys/report/arviz.py"}
# Pairs of files that import each other, each with its reason.
CIRCLES: dict[frozenset[str], str] = {}


def sources(root: Path) -> list[Path]:
    return sorted(p for pattern in ("sbi_phys/**/*.py", "sbi_phys/**/*.pyi", "simulators/**/*.py") for p in root.glob(pattern))


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports; relative imports made absolute; of `from a import b` both a and a.b."""
    here = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def violations(root: Path) -> list[str]:
    found = {}
    for path in sources(root):
        relative = path.relative_to(root).as_posix()
        for line, module in imported_modules(path, root):
            if reason := _refused(relative, module):
                found.setdefault((relative, line), f"{relative}:{line} imports {module}: {reason}")
    return list(found.values())


def _refused(relative: str, module: str) -> str:
    top, *rest = module.split(".")
    if top in ONLY_IN and not relative.startswith(ONLY_IN[top]):
        return f"only {ONLY_IN[top]} may"
    if relative.startswith("simulators/"):
        allowed = module == "sbi_phys.priors" or module.startswith("sbi_phys.priors.")
        return "a simulator may import sbi_phys.priors alone" if top == "sbi_phys" and not allowed else ""
    if top == "simulators":
        return "the package must not know the simulators"
    if top != "sbi_phys" or relative in ("sbi_phys/__init__.py", "sbi_phys/__init__.pyi", "sbi_phys/__main__.py"):
        return ""  # the public face names every folder
    mine = relative.split("/")[1]
    if mine not in ORDER:
        return f"{mine} has no place in the order of folders"
    if not rest or rest[0] not in ORDER:
        return f"{rest[0] if rest else 'the public face'} is not a folder of the package"
    other = rest[0]
    if other != mine and any(part.startswith("_") and not part.startswith("__") for part in rest[1:2]):
        return f"{'.'.join(rest[:2])} is private to its folder"
    return "" if ORDER.index(other) < ORDER.index(mine) or other == mine else f"{other} comes after {mine}"


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, a name of a package counting as the file that it comes from."""
    modules = {module_of(p, root) for p in sources(root)}
    return {module_of(p, root): set() for p in sources(root)} | {
        module_of(p, root): {m for _, m in imported_modules(p, root) if m in modules} - {module_of(p, root)}
        for p in sources(root)
        if p.name not in ("__init__.py", "__init__.pyi")  # the face of a folder names its files
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of one circle, [] if there is none."""
    allowed = {m: {o for o in others if frozenset((m, o)) not in CIRCLES} for m, others in graph.items()}
    try:
        TopologicalSorter(allowed).prepare()
    except CycleError as err:
        return list(err.args[1])
    return []


def test_every_import_points_down():
    assert violations(ROOT) == []


def test_no_file_imports_in_a_circle():
    assert circle(import_graph(ROOT)) == []


def test_the_walk_sees_the_whole_package():
    folders = {p.relative_to(ROOT / "sbi_phys").parts[0] for p in ROOT.glob("sbi_phys/*/*.py")}
    assert folders == set(ORDER)
    loose = {p.name for p in ROOT.glob("sbi_phys/*.py*")}
    assert loose == {"__init__.py", "__init__.pyi", "__main__.py"}
    assert len(import_graph(ROOT)) > 100


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("sbi_phys/priors/box.py", "from sbi_phys.store import Store", "store comes after priors"),
        ("sbi_phys/nets/flow.py", "def f():\n    import sbi_phys.estimators.npe", "estimators comes after nets"),
        ("sbi_phys/nets/flow.py", "if TYPE_CHECKING:\n    from sbi_phys.estimators import NPE", "estimators comes after nets"),
        ("sbi_phys/nets/flow.py", "from ..samplers import hmc", "samplers comes after nets"),
        ("sbi_phys/nets/__init__.pyi", "from ..samplers import hmc", "samplers comes after nets"),
        ("sbi_phys/training/loop.py", "from sbi_phys import workflow", "public face"),
        ("sbi_phys/workflow/run.py", "from sbi_phys import NPE", "public face"),
        ("sbi_phys/novel/new.py", "from sbi_phys.core.errors import SbiPhysError", "novel has no place"),
        ("sbi_phys/loose.py", "from sbi_phys.core.errors import SbiPhysError", "loose.py has no place"),
        ("sbi_phys/workflow/cli.py", "from simulators import SourceSpectrum", "must not know the simulators"),
        ("sbi_phys/training/loop.py", "from nflows.flows import Flow", "only sbi_phys/nets/ may"),
        ("sbi_phys/report/html.py", "import arviz as az", "only sbi_phys/report/arviz.py may"),
        ("sbi_phys/unfold/ibu.py", "from sbi_phys.confidence._climb import climb", "confidence._climb is private"),
        ("sbi_phys/unfold/ibu.py", "from sbi_phys.confidence import _climb", "confidence._climb is private"),
        ("simulators/shower.py", "from sbi_phys.core.errors import DataError", "sbi_phys.priors alone"),
        ("simulators/shower.py", "import sbi_phys", "sbi_phys.priors alone"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line, complaint):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    found = violations(tmp_path)
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("sbi_phys/store/store.py", "from sbi_phys.priors import Prior"),
        ("sbi_phys/nets/flow.py", "from sbi_phys.nets.layers import Layer\nfrom .layers import Layer\nimport nflows.transforms"),
        ("sbi_phys/confidence/sets.py", "from sbi_phys.confidence._climb import climb"),
        ("sbi_phys/report/arviz.py", "import arviz"),
        ("simulators/shower.py", "import numpy\nfrom sbi_phys.priors import BoxPrior"),
    ],
)
def test_a_downward_import_passes(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize("inner", ["", "def f():\n    ", "if TYPE_CHECKING:\n    "])
def test_a_planted_circle_is_found(tmp_path, inner):
    folder = tmp_path / "sbi_phys/nets"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from sbi_phys.nets.b import x\n")
    (folder / "b.py").write_text(f"{inner}from sbi_phys.nets.a import y\n")
    assert set(circle(import_graph(tmp_path))) == {"sbi_phys.nets.a", "sbi_phys.nets.b"}
    (folder / "b.py").write_text("import numpy\n")
    assert circle(import_graph(tmp_path)) == []
