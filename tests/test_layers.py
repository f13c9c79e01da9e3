"""The order of the layers, read off the import statements: an arrow that runs back up fails."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from layers to its left, or from its own folder.
ORDER = [
    "errors",
    "checks",
    "rng",
    "quantities",
    "priors",
    "progress",
    "provenance",
    "protocol",
    "layout",
    "encoding",
    "shards",
    "storage",
    "store",
    "reweight",
    "processes",
    "sandbox",
    "workers",
    "dispatch",
    "simulate",
    "external",
    "clusters",
    "device",
    "dataset",
    "stream",
    "parallel",
    "batches",
    "online",
    "nets",
    "checkpoint",
    "optimize",
    "train",
    "samplers",
    "estimators",
    "calibration",
    "unfold",
    "confidence",
    "comparison",
    "calibrate",
    "report",
    "config",
    "pipeline",
    "cli_limits",
    "cli_store",
    "cli_unfold",
    "cli",
]
# Third-party packages that one place alone may import.
ONLY_IN = {"nflows": "sbi_phys/nets/", "arviz": "sbi_phys/report/arviz.py", "arviz_base": "sbi_phys/report/arviz.py"}


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever in the file it stands; relative imports made absolute."""
    here = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from sbi_phys import priors` names a layer too
            yield from ((node.lineno, f"{module}.{alias.name}" if module == "sbi_phys" else module) for alias in node.names)


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted([*root.glob("sbi_phys/**/*.py"), *root.glob("simulators/**/*.py")]):
        relative = path.relative_to(root).as_posix()
        for line, module in imported_modules(path, root):
            reason = _refused(relative, module)
            if reason:
                found.append(f"{relative}:{line} imports {module}: {reason}")
    return found


def _refused(relative: str, module: str) -> str:
    top = module.split(".")[0]
    if top in ONLY_IN and not relative.startswith(ONLY_IN[top]):
        return f"only {ONLY_IN[top]} may"
    if relative.startswith("simulators/"):
        return "a simulator may import sbi_phys.priors alone" if top == "sbi_phys" and module != "sbi_phys.priors" else ""
    if top == "simulators":
        return "the package must not know the simulators"
    if top != "sbi_phys" or relative == "sbi_phys/__init__.py":  # the public face names every layer
        return ""
    mine = relative.removeprefix("sbi_phys/").removesuffix(".py").split("/")[0]
    other = [*module.split("."), ""][1]
    if mine not in ORDER:
        return f"{mine} has no place in the order of layers"
    if other not in ORDER:
        return "" if other == "__version__" else f"{other or 'the public face'} is no layer"
    return "" if ORDER.index(other) < ORDER.index(mine) or other == mine else f"{other} lies above {mine}"


def test_every_import_points_down():
    assert violations(ROOT) == []


def test_the_walk_sees_the_whole_package():
    layers = {p.relative_to(ROOT / "sbi_phys").parts[0].removesuffix(".py") for p in ROOT.glob("sbi_phys/**/*.py")} - {"__init__"}
    assert layers <= set(ORDER)
    assert {"priors", "nets", "calibration", "config"} <= layers


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("sbi_phys/priors.py", "from sbi_phys.store import Store", "store lies above priors"),
        ("sbi_phys/nets/flow.py", "def f():\n    import sbi_phys.train", "train lies above nets"),
        ("sbi_phys/nets/flow.py", "from ..train import fit", "train lies above nets"),
        ("sbi_phys/train.py", "from sbi_phys import cli", "cli lies above train"),
        ("sbi_phys/config.py", "from sbi_phys import NPE", "NPE is no layer"),
        ("sbi_phys/novel.py", "from sbi_phys.errors import SbiPhysError", "novel has no place"),
        ("sbi_phys/cli.py", "from simulators import SourceSpectrum", "must not know the simulators"),
        ("sbi_phys/train.py", "from nflows.flows import Flow", "only sbi_phys/nets/ may"),
        ("sbi_phys/report/html.py", "import arviz as az", "only sbi_phys/report/arviz.py may"),
        ("simulators/shower.py", "from sbi_phys.errors import DataError", "sbi_phys.priors alone"),
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
        ("sbi_phys/store.py", "from sbi_phys.priors import Prior"),
        ("sbi_phys/nets/flow.py", "from sbi_phys.nets.layers import Layer\nfrom .layers import Layer\nimport nflows.transforms"),
        ("sbi_phys/report/arviz.py", "import arviz"),
        ("simulators/shower.py", "import numpy\nfrom sbi_phys.priors import BoxPrior"),
    ],
)
def test_a_downward_import_passes(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []
