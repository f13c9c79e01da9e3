"""The conventions of docs/conventions.md, read off the signatures of all public functions, classes and their public methods.

The tests mirror the modules: tests/<folder>/test_<module>.py.
"""

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_examples import OBJECTS

ROOT = Path(__file__).parent.parent
PRIORS = ("priors/test_priors", "every prior meets the same tests")
UNFOLDING = ("workflow/test_unfold", "one unfolding run serves its command, methods, stages and page")
INFERENCE = ("workflow/test_stages", "one inference run serves its stages and page")
# Modules with logic and without a test file of their own: the file that tests them, and the reason.
TESTED_ELSEWHERE = {
    "core/figures": ("calibration/test_calibrate", "it forwards the figures of results to sbi_phys.plotting"),
    "plotting/calibration": ("calibration/test_calibrate", "its figures are drawn from the results of the calibration tests"),
    **dict.fromkeys(("priors/base", "priors/independent", "priors/parameters"), PRIORS),
    **dict.fromkeys(("workflow/cli_unfold", "workflow/unfold_methods", "workflow/unfold_page", "workflow/unfold_run"), UNFOLDING),
    **dict.fromkeys(("workflow/inference", "workflow/inference_page"), INFERENCE),
    "workflow/project": ("workflow/test_cli_project", "its functions are tested through the commands that call them"),
    "workflow/limits": ("workflow/test_methods", "limits are tested on the run that has every method"),
}

# Other words for what has a name: n_draws, n_replicas, n_simulations, x_obs, criteria, log_prob, seed.
OTHER_NAMES = {"n_samples", "n_boot", "n_trial", "observation", "asked", "log_target", "n_sims", "random_state"}


def signatures() -> dict[str, inspect.Signature]:
    """'name' or 'name.method' -> signature, of all that is public."""
    return dict(_signatures())


def _signatures() -> Iterator[tuple[str, inspect.Signature]]:
    for name, thing in OBJECTS.items():
        # a result's fields are no arguments that a user types
        if not (inspect.isclass(thing) and dataclasses.is_dataclass(thing)):
            yield name, inspect.signature(thing)
        if inspect.isclass(thing):
            for key, method in inspect.getmembers(thing, inspect.isfunction):
                if not key.startswith("_"):
                    yield f"{name}.{key}", inspect.signature(method)


SIGNATURES = signatures()


def faults(signature: inspect.Signature) -> list[str]:
    found = []
    for name, parameter in signature.parameters.items():
        # the hooks of an estimator (build, start) are called by the base class and have no default
        if name == "seed" and parameter.kind is not parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            found.append("seed is not keyword-only")
        if name == "level" and parameter.default not in (inspect.Parameter.empty, None, 0.9):
            found.append(f"level is {parameter.default} by default")
        if name == "kind" and parameter.default in ("two-sided", "both", "central"):
            found.append(f"kind is {parameter.default!r} by default")
        if name in OTHER_NAMES:
            found.append(f"an argument is called {name}")
    return found


def test_there_are_signatures():
    assert len(SIGNATURES) > 300


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_a_signature_keeps_the_conventions(name):
    assert faults(SIGNATURES[name]) == []


@pytest.mark.parametrize(
    ("method", "order"), [("log_prob", ["theta", "x"]), ("log_likelihood", ["x", "theta"]), ("log_ratio", ["x", "theta"])]
)
def test_densities_take_their_arguments_in_one_order(method, order):
    seen = 0
    for name, signature in SIGNATURES.items():
        arguments = [p for p in signature.parameters if p != "self"][:2]
        if name.endswith(f".{method}") and {"x", "theta"} <= set(arguments):
            assert arguments == order, name
            seen += 1
    assert seen > 0


def test_a_planted_fault_is_found():
    def wrong(x, seed=0, level=0.68, kind="two-sided", n_boot=3): ...

    assert len(faults(inspect.signature(wrong))) == 4


def modules_without_tests(root: Path) -> list[str]:
    """'folder/module' of each public module that has a function, and no tests/folder/test_module.py."""
    found = []
    for path in sorted(root.glob("sbi_phys/*/*.py")):
        logic = any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        if logic and not path.name.startswith("_") and not (root / f"tests/{path.parent.name}/test_{path.name}").exists():
            found.append(f"{path.parent.name}/{path.stem}")
    return found


def test_each_module_with_logic_has_its_test_file():
    assert modules_without_tests(ROOT) == sorted(TESTED_ELSEWHERE)  # an exception that is none any more fails as well
    assert [file for file, _ in TESTED_ELSEWHERE.values() if not (ROOT / f"tests/{file}.py").exists()] == []


def test_a_planted_module_without_tests_is_found(tmp_path):
    folder = tmp_path / "sbi_phys/nets"
    folder.mkdir(parents=True)
    for name, text in {"types": "X = 1\n", "_own": "def f(): ...\n", "flow": "class A:\n    def f(self): ...\n"}.items():
        (folder / f"{name}.py").write_text(text)
    assert modules_without_tests(tmp_path) == ["nets/flow"]
    (tmp_path / "tests/nets").mkdir(parents=True)
    (tmp_path / "tests/nets/test_flow.py").touch()
    assert modules_without_tests(tmp_path) == []
