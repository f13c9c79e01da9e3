"""The conventions of docs/conventions.md, read off the signatures of all public functions, classes and their public methods."""

import dataclasses
import inspect
from collections.abc import Iterator

import pytest

from tests.test_examples import OBJECTS

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
