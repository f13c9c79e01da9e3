"""Classes that files and settings name: what is found, what is refused, and that nothing is called before it is checked."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sbi_phys.core.classes import call_class, find_class, plain_settings, source_hash, spec_of, split_spec
from sbi_phys.core.errors import ModelFileError, SettingError


class Base:
    """A base that counts its objects."""

    made = 0

    def __init__(self, width: int = 1) -> None:
        type(self).made += 1
        if width < 0:
            raise RuntimeError("no negative widths")
        self.width = width

    class Inner:
        pass


class Derived(Base):
    pass


HERE = __name__


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module on Python's path that leaves a file when it is imported."""
    (tmp_path / "strangers.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nclass Stranger(dict):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers", raising=False)
    return "strangers"


def test_a_class_is_found_by_its_name() -> None:
    assert find_class("x", spec_of(Derived), Base) is Derived
    assert find_class("x", f"{HERE}:Base.Inner", object) is Base.Inner
    assert find_class("x", f"{HERE}:Derived", Base, allow_import=False) is Derived


def test_a_module_is_imported_only_with_permission(module: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"'strangers:Stranger'.*has not been imported; importing it runs its code.*, or call me"):
        find_class("model.pt", "strangers:Stranger", dict, allow_import=False, error=ModelFileError, otherwise="call me")
    assert not (tmp_path / "imported").exists() and module not in sys.modules
    assert find_class("embedding", "strangers:Stranger", dict).__name__ == "Stranger"
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("subprocess:Popen", "of Python's standard library"),
        ("os.path:join", "of Python's standard library"),
        (f"{HERE}:Missing", "has no 'Missing'"),
        (f"{HERE}:Derive", "did you mean 'Derived'"),
        (f"{HERE}:source_hash", "a function; expected a subclass of"),
        (f"{HERE}:Path", "a class, but none of Base"),
        ("no_such_module:Thing", "there is no module 'no_such_module'"),
        ("just_text", "expected 'package.module:Class'"),
        ("a:b:c", "expected 'package.module:Class'"),
        ("../evil:Class", "expected 'package.module:Class'"),
        (7, "expected 'package.module:Class'"),
    ],
)
def test_other_names_are_refused_and_nothing_is_called(spec: object, message: str) -> None:
    Base.made = Derived.made = 0
    with pytest.raises(SettingError, match=message):
        find_class("embedding", spec, Base)
    assert Base.made == Derived.made == 0


def test_a_module_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("1 / 0\n")
    (tmp_path / "needy_one.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingError, match="cannot be imported: ZeroDivisionError"):
        find_class("embedding", "broken_one:A", Base)
    with pytest.raises(SettingError, match="needs 'not_there_at_all', which is not installed"):
        find_class("embedding", "needy_one:A", Base)


def test_arguments_are_checked() -> None:
    assert call_class("x", Derived, {"width": 3}).width == 3
    with pytest.raises(SettingError, match=r"Derived takes \(width: int = 1\).*got \{'depth': 3\}"):
        call_class("x", Derived, {"depth": 3})
    with pytest.raises(SettingError, match="cannot be built with.*RuntimeError: no negative widths"):
        call_class("x", Derived, {"width": -3})


def test_settings_are_plain() -> None:
    assert plain_settings("x", {"a": (1, 2), "b": {"c": None}}) == {"a": [1, 2], "b": {"c": None}}
    for bad in ({"a": np.ones(2)}, {"a": float("nan")}, {"a": Base}):
        with pytest.raises(SettingError, match="x has a = .*that a file can hold"):
            plain_settings("x", bad)
    with pytest.raises(SettingError, match="expected a dict"):
        plain_settings("x", [1])


def test_the_hash_is_that_of_the_source() -> None:
    assert source_hash(Base) != source_hash(Derived)
    assert len(source_hash(Base)) == 16 and source_hash(Base) == source_hash(Base)
    assert source_hash(type("Typed", (), {})) == ""
    assert split_spec("x", "a.b:C.D") == ("a.b", "C.D")
