"""Every public name has an example in its docstring, and the examples run."""

import doctest
import importlib
import inspect
import types

import pytest

import sbi_phys as sp
from tests.test_layers import ORDER

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# An exception needs no example: its message is one.
EXEMPT = (BaseException,)


def public_objects() -> dict[str, object]:
    """'folder.name' -> function or class, for every name of the public face, of the folders' faces and of the simulators."""
    found = {}
    for room in ("", *ORDER, "simulators"):
        module = sp if not room else importlib.import_module(room if room == "simulators" else f"sbi_phys.{room}")
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            is_ours = callable(thing) and not isinstance(thing, types.ModuleType)
            if is_ours and not (inspect.isclass(thing) and issubclass(thing, EXEMPT)):
                found.setdefault(id(thing), (f"{room}.{name}" if room else name, thing))
    return dict(found.values())


OBJECTS = public_objects()


def example_of(thing: object) -> doctest.DocTest:
    """The examples of a docstring; of a class, those of the class itself."""
    text = inspect.cleandoc(thing.__doc__ or "")
    return doctest.DocTestParser().get_doctest(text, {}, getattr(thing, "__qualname__", str(thing)), None, 0)


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = example_of(OBJECTS[name])
    assert example.examples, f"{name} has no example in its docstring"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=said.append)
    assert not said, "".join(said)


def test_a_wrong_example_is_found():
    def wrong():
        """Say something else.

        >>> 1 + 1
        3
        """

    said: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example_of(wrong), out=said.append)
    assert "Expected:" in "".join(said)
