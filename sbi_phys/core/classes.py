"""Classes that files and settings name, 'package.module:Class': found, checked, and called only then.

To import a module is to run it. A name that a person has typed is imported; a name that a file holds is looked for among the modules
that have been imported, and its module is imported only with the permission of the caller. Modules of Python's standard library are
refused: none of them holds a network or a prior.
"""

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from sbi_phys.core.checks import did_you_mean
from sbi_phys.core.errors import SbiPhysError, SettingError

__all__ = ["call_class", "find_class", "plain_settings", "require_arguments", "source_hash", "spec_of", "split_spec"]

T = TypeVar("T")


def split_spec(what: str, spec: Any) -> tuple[str, str]:
    """Return (module, class) of 'package.module:Class'.   Raises: SettingError for another form."""
    module, colon, name = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise SettingError(f"{what} is {spec!r}; expected 'package.module:Class'")
    return module, name


def spec_of(kind: type) -> str:
    """Return 'package.module:Class' of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


def find_class(
    what: str, spec: Any, base: type[T], *, allow_import: bool = True, error: type[SbiPhysError] = SettingError, otherwise: str = ""
) -> type[T]:
    """Return the class of a name 'package.module:Class' if it is a subclass of `base`; nothing of it is called.

    Args: what: names the setting or file in messages. allow_import: whether its module may be imported; else it must have been.
    error: class of the errors. otherwise: what else a user can do, for messages.
    Raises: error (another form, a module or class that is not there or not allowed, no subclass of `base`).
    """
    other = f", or {otherwise}" if otherwise else ""
    try:
        module_name, name = split_spec(what, spec)
    except SettingError as err:
        raise error(str(err)) from None
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise error(f"{what} is {spec!r}, of Python's standard library; expected a module of yours or of an installed package{other}")
    module = sys.modules.get(module_name)
    if module is None:
        if not allow_import:
            raise error(
                f"{what} is {spec!r}, and the module {module_name} has not been imported; importing it runs its code: look at it, then"
                f" import {module_name} before, or allow_import=True{other}"
            )
        module = _imported(what, spec, module_name, error, other)
    found: Any = module
    for part in name.split("."):
        # what a file names is read from the namespace: a module's or a class's own __getattr__ is code too
        found = getattr(found, part, None) if allow_import else inspect.getattr_static(found, part, None)
    if found is None:
        classes = [n for n, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        near = did_you_mean(name, classes)
        raise error(f"{what} is {spec!r}, and the module {module_name} has no {name!r}; expected a class in it{other}{near}")
    if not isinstance(found, type) or not issubclass(found, base):
        got = f"a class, but none of {base.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise error(f"{what} is {spec!r}, {got}; expected a subclass of {base.__module__}.{base.__qualname__}{other}")
    return found


def call_class(what: str, kind: type[T], settings: Mapping[str, Any], *args: Any) -> T:
    """Return kind(*args, **settings).   Raises: SettingError for arguments that the class does not take, and for what it raises."""
    require_arguments(what, kind, settings, *args)
    try:
        return kind(*args, **settings)
    except SbiPhysError:
        raise
    except Exception as err:
        raise SettingError(f"{what} {spec_of(kind)} cannot be built with {dict(settings)}: {type(err).__name__}: {err}") from err


def require_arguments(what: str, kind: type, settings: Mapping[str, Any], *args: Any) -> None:
    """Raise SettingError for arguments that a class does not take; the class is not called."""
    try:
        inspect.signature(kind).bind(*args, **settings)
    except ValueError:
        pass  # a class without a readable signature
    except TypeError as err:
        raise SettingError(f"{what} {spec_of(kind)} takes {inspect.signature(kind)}; got {dict(settings)}: {err}") from err


def plain_settings(what: str, settings: Any) -> dict[str, Any]:
    """Return keyword arguments as plain JSON values.   Raises: SettingError for others, naming the key."""
    if not isinstance(settings, Mapping):
        raise SettingError(f"{what} is {settings!r}; expected a dict of keyword arguments")
    plain = {}
    for key, value in settings.items():
        try:
            plain[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as err:
            raise SettingError(f"{what} has {key} = {value!r}; expected numbers, text, lists or dicts that a file can hold: {err}") from err
    return plain


def source_hash(kind: type) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the source of a class; '' where Python has none (a class typed at a prompt)."""
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def _imported(what: str, spec: str, module_name: str, error: type[SbiPhysError], other: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        missing = err.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise error(f"{what} is {spec!r}, and there is no module {missing!r}; expected one on Python's path{other}") from err
        raise error(f"{what} is {spec!r}, whose module needs {missing!r}, which is not installed{other}") from err
    except Exception as err:
        raise error(f"{what} is {spec!r}, whose module cannot be imported: {type(err).__name__}: {err}{other}") from err
