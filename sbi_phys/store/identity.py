"""Identity of a simulator in stores and models: the path of its class, its settings, and a fingerprint of its code.

The fingerprint tells rows of edited code from those made before: a store keeps those that it was made with. It covers the module of the
simulator's class and the modules beside it that it imports, directly or indirectly. Comments, strings that are statements
(docstrings), empty lines and trailing blanks do not count. What else defines a simulator, a table that it reads for instance, is
named by its optional attribute `code_sources`. Classes of a script or notebook count with the functions and values that they use.
"""

import ast
import dis
import hashlib
import importlib.machinery
import inspect
import io
import json
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from sbi_phys.core.checks import shortened
from sbi_phys.core.errors import SimulatorMismatchError

__all__ = ["class_path", "code_fingerprint", "fingerprint_difference", "simulator_identity"]

_MAIN = ("__main__", "__mp_main__")
_OWN = __name__.partition(".")[0]
_UNREADABLE = "unreadable"
_LIKE_LINE_ENDS = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
_NOT_STATEMENTS = (tokenize.COMMENT, tokenize.NL)


def class_path(simulator: object) -> str:
    """Return 'package.module:Class'."""
    kind = type(simulator)
    return f"{kind.__module__}:{kind.__qualname__}"


def simulator_identity(simulator: object) -> dict[str, Any]:
    """Return {"class": "package.module:Class", "settings": {...}} as plain JSON values.

    Raises: SimulatorMismatchError if `settings` is missing or cannot be written as JSON.
    """
    settings = getattr(simulator, "settings", None)
    if not isinstance(settings, dict):
        raise SimulatorMismatchError(
            f"{class_path(simulator)}.settings is {shortened(repr(settings))}; expected a dict of keyword arguments"
        )
    try:
        plain = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as err:
        raise SimulatorMismatchError(
            f"{class_path(simulator)}.settings = {shortened(repr(settings))} cannot be written as JSON: {err}"
        ) from err
    return {"class": class_path(simulator), "settings": plain}


def code_fingerprint(simulator: object) -> dict[str, Any]:
    """Return {"sha256": of all parts, "parts": {module or file name: sha256}} of the code that defines a simulator.

    A module counts if it is the one of the simulator's class or is imported by one that counts and lies under the same folder; of an
    installed package only its own modules count. Packages that it merely uses do not. `code_sources`, an attribute or a method of the
    simulator, names what else counts: paths of data files, functions, classes, modules. Where no code can be read, sha256 is ''.

    Raises: SimulatorMismatchError for a `code_sources` that names a missing file or something of another type.
    """
    kind = type(simulator)
    more = getattr(simulator, "code_sources", None)
    more = more() if callable(more) and not isinstance(more, type) else more
    named = () if more is None else (more,) if isinstance(more, str | Path) or not isinstance(more, Iterable) else tuple(more)
    reader = _Reader()
    if kind.__module__.partition(".")[0] != _OWN or more is None:
        reader.add_object(kind)
    for value in getattr(simulator, "__dict__", {}).values():
        if isinstance(value := _unwrap(value), FunctionType):
            reader.add_object(value, installed=False)
    for source in named:
        if isinstance(source, str | Path):
            reader.add_file(Path(source), class_path(simulator))
        elif isinstance(source, ModuleType | type) or callable(source):
            reader.add_object(source)
        else:
            raise SimulatorMismatchError(
                f"{class_path(simulator)}.code_sources has {source!r:.80}; expected paths of files, functions, classes or modules"
            )
    if not reader.parts:
        return {"sha256": "", "parts": {_UNREADABLE: ""}}
    parts = dict(sorted(reader.parts.items()))
    return {"sha256": _sha256(json.dumps(parts, sort_keys=True)), "parts": parts}


def fingerprint_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the parts in which two fingerprints differ, '' if they are the same.

    >>> from sbi_phys.store.identity import fingerprint_difference
    >>> old = {"sha256": "1", "parts": {"shower": "a", "tables": "b"}}
    >>> fingerprint_difference(old, {"sha256": "2", "parts": {"shower": "c", "tables": "b", "atmosphere": "d"}})
    'shower changed, atmosphere is new'
    """
    if old.get("sha256") == new.get("sha256"):
        return ""
    before, now = dict(old.get("parts", {})), dict(new.get("parts", {}))
    words = [f"{name} changed" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    words += [f"{name} is new" for name in sorted(now.keys() - before.keys())]
    words += [f"{name} is gone" for name in sorted(before.keys() - now.keys())]
    return ", ".join(words) or "the code changed"


class _Reader:
    """Collects the parts of a fingerprint: modules by their files, and objects of scripts and notebooks by their own source."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self._seen: set[int] = set()

    def add_file(self, path: Path, where: str) -> None:
        """Add a data file.   Raises: SimulatorMismatchError."""
        try:
            stat = path.stat()
            digest = _hash_file(str(path.resolve()), stat.st_mtime_ns, stat.st_size)
        except OSError as err:
            raise SimulatorMismatchError(f"{where}.code_sources has the file {path}, which cannot be read: {err.strerror}") from err
        self._put(path.name, digest)

    def _put(self, label: str, digest: str) -> None:
        """Add a part, under another label if there is one of this name with other content."""
        name, number = label, 2
        while self.parts.get(name, digest) != digest:
            name, number = f"{label} ({number})", number + 1
        self.parts[name] = digest

    def add_object(self, value: Any, *, installed: bool = True) -> None:
        """Add what the simulator is made of: a class, a function, a module or a callable object; of installed packages if asked."""
        value = _unwrap(value)
        if not isinstance(value, ModuleType | type | FunctionType | BuiltinFunctionType):
            value = type(value)
        module = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
        path = _module_file(module) if isinstance(module, ModuleType) else None
        if path is None or module is None:
            folder = Path.cwd()
        else:
            name = module.__name__ if module.__name__ not in _MAIN else getattr(getattr(module, "__spec__", None), "name", path.stem)
            folder = _root(name, path)
            if not installed and (_is_installed(folder) or name.partition(".")[0] == _OWN):
                return
            if module.__name__ not in _MAIN:
                self._add_modules(name, path)
                return
        if isinstance(value, type | FunctionType):
            self._add_source(value, folder)

    def _add_modules(self, name: str, path: Path) -> None:
        """Add a module and those below the same folder that it imports, directly or indirectly."""
        top = name.partition(".")[0]
        root = _root(name, path)
        todo = {name: path}
        while todo:
            name, path = todo.popitem()
            if name in self.parts:
                continue
            stat = path.stat()
            digest, imports = _read_module(str(path), stat.st_mtime_ns, stat.st_size)
            if digest:  # an empty file defines nothing
                self.parts[name] = digest
            if top == _OWN:
                continue  # of this package the one module: its version stands in the manifest
            for other in _absolute(imports, name, path):
                if (found := _below(root, other, top)) is not None:
                    todo[other] = found

    def _add_source(self, value: Any, folder: Path) -> None:
        """Add a class or function of a script or notebook, and the functions and values of it that its code uses."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        module = _MAIN[0] if value.__module__ in (None, *_MAIN) else str(value.__module__)
        source = _own_code(value)
        if source:
            self._put(f"{module}:{value.__qualname__}" if module in self.parts else module, _sha256(source))
        for name in _absolute(_imports(source), module, Path()):
            self._add_beside(name, folder)
        for function in _functions(value):
            for key, used in _used_values(function):
                self._add_used(key, used, module, folder)
        for base in value.__bases__ if isinstance(value, type) else ():
            self._add_used(base.__name__, base, module, folder)

    def _add_used(self, key: str, used: Any, module: str, folder: Path) -> None:
        used = _unwrap(used)
        if isinstance(used, type | FunctionType):
            if used.__module__ in (module, *_MAIN):
                self._add_source(used, folder)
            else:
                self._add_beside(used.__module__, folder)
        elif isinstance(used, ModuleType):
            self._add_beside(used.__name__, folder)
        elif (text := _plain(used)) is not None:
            self._put(f"{module}:{key}", _sha256(text))

    def _add_beside(self, name: str, folder: Path) -> None:
        """Add a module that lies in the folder of the script."""
        found = _below(folder, name, "")
        if found is not None:
            self._add_modules(name, found)


def _sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text).hexdigest()


@lru_cache(maxsize=256)
def _hash_file(path: str, mtime_ns: int, size: int) -> str:
    """Hash of a file's bytes, kept as long as time and size of the file are the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Import = tuple[int, str, tuple[str, ...]]  # level, module, names


@lru_cache(maxsize=1024)
def _read_module(path: str, mtime_ns: int, size: int) -> tuple[str, tuple[Import, ...]]:
    """Hash of a module's code, '' without any, and its imports."""
    if not path.endswith(".py"):
        return _hash_file(path, mtime_ns, size), ()
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):
        return _hash_file(path, mtime_ns, size), ()
    code = _code_lines(text)
    return (_sha256(code) if code else ""), tuple(_imports(text))


def _code_lines(text: str) -> str:
    """Source without comments, strings that are statements, empty lines and trailing blanks; strings keep their lines."""
    lines = text.splitlines()
    inside: set[int] = set()  # lines that begin within a string
    drop: list[tuple[tuple[int, int], tuple[int, int]]] = []
    try:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline) if t.type != tokenize.NL]
    except (tokenize.TokenError, SyntaxError):
        return "\n".join(line.rstrip() for line in lines if line.strip())
    drop += [(t.start, t.end) for t in tokens if t.type == tokenize.COMMENT]
    words = [t for t in tokens if t.type not in _NOT_STATEMENTS]
    starts: list[int] = []  # of f-strings, whose parts are tokens of their own in later versions of Python
    for i, token in enumerate(words):
        alone = (i == 0 or words[i - 1].type in _LIKE_LINE_ENDS) and i + 1 < len(words) and words[i + 1].type == tokenize.NEWLINE
        name = tokenize.tok_name[token.type]
        if name == "STRING" and alone:
            drop.append((token.start, token.end))
        elif name == "STRING":
            inside.update(range(token.start[0] + 1, token.end[0] + 1))
        elif name in ("FSTRING_START", "TSTRING_START"):
            starts.append(token.start[0])
        elif name in ("FSTRING_END", "TSTRING_END"):
            inside.update(range(starts.pop() + 1, token.end[0] + 1))
    for (row, column), (last, end) in sorted(drop, reverse=True):
        lines[row - 1] = lines[row - 1][:column] + (lines[last - 1][end:] if last > row else lines[row - 1][end:])
        for other in range(row + 1, last + 1):
            lines[other - 1] = ""
    kept = []
    for number, line in enumerate(lines, 1):
        if number + 1 in inside:
            kept.append(line)  # its end lies within a string
        elif number in inside or line.strip():
            kept.append(line.rstrip())
    return "\n".join(kept)


def _imports(text: str) -> Iterator[Import]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", tuple(alias.name for alias in node.names)


def _absolute(imports: Iterable[Import], name: str, path: Path) -> Iterator[str]:
    """Full names of what a module imports, with the packages on the way; of `from a import b` both a and a.b."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for level, module, names in imports:
        base = here[: len(here) - level + 1] if level else []
        parts = [*base, *module.split(".")] if module else base
        for i in range(1, len(parts) + 1):
            yield ".".join(parts[:i])
        yield from (".".join([*parts, other]) for other in names)


def _module_file(module: ModuleType) -> Path | None:
    path = Path(getattr(module, "__file__", None) or "")
    return path if path.is_file() and path.suffix != ".pyc" else None


def _root(name: str, path: Path) -> Path:
    """Folder from which a module is imported under its name; that of the file where name and path do not belong together."""
    parts = name.split(".")
    stem = path.parent if path.name == "__init__.py" else path.with_name(path.name.partition(".")[0])
    return stem.parents[len(parts) - 1] if stem.parts[-len(parts) :] == tuple(parts) else path.parent


@lru_cache(maxsize=64)
def _is_installed(root: Path) -> bool:
    known = {Path(p).resolve() for key, p in sysconfig.get_paths().items() if key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return root.name in ("site-packages", "dist-packages") or root.resolve() in known


def _below(root: Path, name: str, top: str) -> Path | None:
    """File of the module `name` below `root`, None if it does not count."""
    first = name.partition(".")[0]
    if not name or first == _OWN or (first != top and _is_installed(root)):
        return None
    stem = root.joinpath(*name.split("."))
    ends = (".py", *importlib.machinery.EXTENSION_SUFFIXES)
    for path in (stem / "__init__.py", *(stem.with_name(stem.name + end) for end in ends)):
        if path.is_file():
            return path
    return None


def _unwrap(value: Any) -> Any:
    while True:
        if isinstance(value, partial):
            value = value.func
        elif isinstance(value, MethodType):
            value = value.__func__
        elif callable(value) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        else:
            return value


def _own_code(value: Any) -> str:
    """Normalised source of a class or function; where it cannot be read (or is a part of a line) its compiled code, '' without any."""
    if getattr(value, "__name__", "") != "<lambda>":
        with suppress(OSError, TypeError, SyntaxError):
            return _code_lines(textwrap.dedent(inspect.getsource(value)))
    if isinstance(value, FunctionType):
        return _code_text(value.__code__)
    texts = [_own_code(f) for f in _functions(value)]
    texts += [f"{name} = {text}" for name, v in sorted(vars(value).items()) if name[:2] != "__" and (text := _plain(v)) is not None]
    return "\n".join(texts)


def _functions(value: Any) -> list[FunctionType]:
    """Functions of a class, or the function itself."""
    if not isinstance(value, type):
        return [value] if isinstance(value, FunctionType) else []
    found = []
    for member in vars(value).values():
        plain = getattr(member, "__func__", member)
        for function in (plain.fget, plain.fset, plain.fdel) if isinstance(plain, property) else (getattr(plain, "func", plain),):
            if isinstance(function := _unwrap(function), FunctionType):
                found.append(function)
    return found


def _code_text(code: CodeType) -> str:
    constants = [_code_text(c) if isinstance(c, CodeType) else _plain(c) for c in code.co_consts]
    return f"{code.co_name}{code.co_varnames}{code.co_names}{code.co_code.hex()}{constants}"


def _used_values(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Global names that a function reads, and what it encloses, with their values; not what it writes itself."""
    read: set[str] = set()
    written: set[str] = set()
    todo = [function.__code__]
    while todo:
        code = todo.pop()
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(str(step.argval))
            elif step.opname == "STORE_GLOBAL":
                written.add(str(step.argval))
    for name in sorted(read - written):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # not filled yet
    if function.__defaults__:
        yield f"{function.__qualname__} defaults", function.__defaults__


def _plain(value: Any) -> str | None:
    """Text of a value that is plain data, the same in every process; None for other values."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
        return f"array {value.dtype.str} {value.shape} {_sha256(np.ascontiguousarray(value).tobytes())}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        texts = [_plain(v) for v in value]
        if any(t is None for t in texts):
            return None
        known = [t for t in texts if t is not None]
        return f"{type(value).__name__}({', '.join(sorted(known) if isinstance(value, set | frozenset) else known)})"
    if isinstance(value, dict):
        items = _plain(list(value)), _plain(list(value.values()))
        return None if None in items else f"dict{items}"
    return None
