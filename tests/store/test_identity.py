"""The identity of a simulator: the path of its class and settings that JSON holds without loss."""

import json
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from sbi_phys.core.errors import SimulatorMismatchError
from sbi_phys.store.identity import class_path, simulator_identity
from tests.toys import LinearGaussian


def with_settings(settings: Any) -> SimpleNamespace:
    return SimpleNamespace(settings=settings)


class Outer:
    class Inner:
        settings: ClassVar[dict[str, Any]] = {}


def test_the_path_names_module_and_class() -> None:
    assert class_path(LinearGaussian()) == "tests.toys:LinearGaussian"
    assert class_path(Outer.Inner()) == f"{__name__}:Outer.Inner"
    assert class_path(3) == "builtins:int"


def test_an_identity_is_plain_json_and_a_copy() -> None:
    nested = {"edges": (1, 2.5), "deep": {"on": True, "none": None}}
    found = simulator_identity(with_settings(nested))
    assert found == {"class": "types:SimpleNamespace", "settings": {"edges": [1, 2.5], "deep": {"on": True, "none": None}}}
    assert json.loads(json.dumps(found)) == found
    nested["deep"]["on"] = False
    assert found["settings"]["deep"]["on"] is True
    assert simulator_identity(Outer.Inner())["settings"] == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, "settings is None; expected a dict of keyword arguments"),
        ([("a", 1)], r"settings is \[\('a', 1\)\]; expected a dict"),
        ({"a": np.float32(1)}, "cannot be written as JSON: Object of type float32 is not JSON serializable"),
        ({"a": np.zeros(2)}, "cannot be written as JSON: Object of type ndarray"),
        ({"a": float("nan")}, "cannot be written as JSON: Out of range float"),
        ({"a": [1.0, float("inf")]}, "cannot be written as JSON: Out of range float"),
        ({("a", "b"): 1}, "cannot be written as JSON: keys must be str"),
    ],
)
def test_settings_that_json_does_not_hold(settings: Any, words: str) -> None:
    with pytest.raises(SimulatorMismatchError, match=f"types:SimpleNamespace.*{words}"):
        simulator_identity(with_settings(settings))


def test_no_settings_at_all() -> None:
    with pytest.raises(SimulatorMismatchError, match=r"builtins:object.settings is None"):
        simulator_identity(object())
