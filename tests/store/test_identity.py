"""The identity of a simulator: the path of its class, settings that JSON holds without loss, and the fingerprint of its code."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from sbi_phys.core.errors import SimulatorMismatchError
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.simulation.external import CommandSimulator, FunctionSimulator
from sbi_phys.store.identity import class_path, code_fingerprint, fingerprint_difference, simulator_identity
from tests.toys import Counts, LinearGaussian


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


SOURCE = """
import math
from helper import rate

class Mine:
    '''A simulator.'''
    settings = {}

    def simulate(self, theta, rng):
        return rng.poisson(rate(theta))  # counts
"""
HELPER = """
import numpy as np
from more import scale

def rate(theta):
    return scale() * np.exp(theta)
"""
FILES = {"mine.py": SOURCE, "helper.py": HELPER, "more.py": "def scale():\n    return 2.0\n", "other.py": "A = 1\n"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of modules, imported from there; `load(name)` imports one anew."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def load(name="mine", kind="Mine", **files):
        for file, text in files.items():
            write(tmp_path / file.replace("_py", ".py"), text)
        for module in set(sys.modules) - before:
            if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
                del sys.modules[module]
        importlib.invalidate_caches()
        return getattr(importlib.import_module(name), kind)()

    for file, text in FILES.items():
        write(tmp_path / file, text)
    yield load
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    later = time.time_ns() + write.__dict__.setdefault("n", 0) * 10**9
    write.__dict__["n"] += 1
    os.utime(path, ns=(later, later))  # so that neither a cache of Python nor ours takes two versions for one


def parts(simulator):
    found = code_fingerprint(simulator)
    json.dumps(found, allow_nan=False)
    return found["parts"]


def test_the_module_and_those_beside_it_that_it_imports_count(project):
    assert sorted(parts(project())) == ["helper", "mine", "more"]


@pytest.mark.parametrize("file", ["mine_py", "helper_py", "more_py"])
def test_an_edit_of_any_of_them_changes_the_fingerprint_and_is_named(project, file):
    old = code_fingerprint(project())
    new = code_fingerprint(project(**{file: FILES[file.replace("_py", ".py")].replace("2.0", "3.0") + "B = 2\n"}))
    assert old["sha256"] != new["sha256"]
    assert fingerprint_difference(old, new) == f"{file.removesuffix('_py')} changed"
    assert fingerprint_difference(old, old) == ""


def test_a_module_that_is_not_imported_does_not_count(project):
    old = code_fingerprint(project())
    assert code_fingerprint(project(other_py="A = 2\n")) == old


def test_new_and_missing_modules_are_named(project):
    old = code_fingerprint(project())
    new = code_fingerprint(project(helper_py=HELPER.replace("from more import scale", "from other import A as scale")))
    assert fingerprint_difference(old, new) == "helper changed, other is new, more is gone"


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("# counts", "# numbers of events", True),
        ("'''A simulator.'''", "'''A simulator\n\n    of mine.\n    '''", True),
        ("    settings = {}\n", "\n\n    settings = {}   \n\n", True),
        ("import math\n", "import math\n'''\nlong text\n'''\n", True),
        ("import math\n", "import math\nA = '# not a comment'\n", False),
        ("settings = {}", "settings = {'a': 1}", False),
    ],
)
def test_comments_docstrings_and_empty_lines_do_not_count(project, before, after, same):
    assert before in SOURCE
    old = code_fingerprint(project())
    assert (code_fingerprint(project(mine_py=SOURCE.replace(before, after))) == old) == same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('A = """a\n\nb"""\n', 'A = """a\nb"""\n', False),
        ('A = """a  \nb"""\n', 'A = """a\nb"""\n', False),
        ('A = f"""a\n\n{1}"""\n', 'A = f"""a\n{1}"""\n', False),
        ("A = 1\n\n\nB = 2\n", "A = 1\nB = 2\n", True),
        ('A = """a\nb"""  # c\n', 'A = """a\nb"""\n', True),
        ("A = 'a' # 'b'\n", "A = 'a'\n", True),
        ("def f():\n    'text'\n    return 'text'\n", "def f():\n    return 'text'\n", True),
    ],
)
def test_lines_within_strings_count(project, one, other, same):
    first = parts(project(more_py=one + "scale = float\n"))["more"]
    assert (first == parts(project(more_py=other + "scale = float\n"))["more"]) == same


def test_a_package_counts_with_its_relative_imports(project):
    files = {
        "pkg/__init__.py": "",
        "pkg/mine.py": "from . import one\nfrom .two import b\nclass Mine:\n    pass\n",
        "pkg/one.py": "import numpy\na = 1\n",
        "pkg/two.py": "b = 1\n",
        "pkg/three.py": "c = 1\n",
    }
    assert sorted(parts(project("pkg.mine", **files))) == ["pkg.mine", "pkg.one", "pkg.two"]


def test_of_an_installed_package_only_its_own_modules_count(project, tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    write(site / "neighbour.py", "a = 1\n")
    write(site / "lib" / "one.py", "b = 1\n")
    write(site / "lib" / "mine.py", "import neighbour, lib.one\nclass Mine:\n    pass\n")
    assert sorted(parts(project("lib.mine"))) == ["lib.mine", "lib.one"]
    write(site / "single.py", "import neighbour\nclass Mine:\n    pass\n")
    assert sorted(parts(project("single"))) == ["single"]


def test_this_package_does_not_count():
    assert sorted(parts(Counts())) == ["tests.toys"]


def test_code_sources_name_files_functions_and_modules(project, tmp_path):
    table = tmp_path / "table.csv"
    write(table, "1,2\n")
    text = SOURCE + "    def code_sources(self):\n        import other\n        return ['" + str(table) + "', other, rate]\n"
    old = code_fingerprint(project(mine_py=text))
    assert sorted(old["parts"]) == ["helper", "mine", "more", "other", "table.csv"]
    write(table, "1,3\n")
    assert fingerprint_difference(old, code_fingerprint(project())) == "table.csv changed"
    table.unlink()
    with pytest.raises(SimulatorMismatchError, match=r"Mine.code_sources has the file .*table.csv, which cannot be read: No such file"):
        code_fingerprint(project())
    with pytest.raises(SimulatorMismatchError, match="code_sources has 3; expected paths of files, functions, classes or modules"):
        code_fingerprint(project(mine_py=SOURCE + "    code_sources = [3]\n"))


def test_two_files_of_one_name_are_told_apart(project, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "t.csv", name)
    simulator = project(mine_py="class Mine:\n    code_sources = %r\n" % [str(tmp_path / n / "t.csv") for n in "ab"])
    assert sorted(parts(simulator)) == ["mine", "t.csv", "t.csv (2)"]


@pytest.fixture(params=[True, False], ids=["script", "prompt"])
def main(request, tmp_path, monkeypatch, project):
    """Fingerprint of the class `Mine` of a script, or of a prompt, whose classes have no source; in this process or another."""

    def run(text, apart=False):
        path = tmp_path / "script.py"
        if request.param:
            write(path, text)
        if apart:
            text += "import json\nfrom sbi_phys.store.identity import code_fingerprint\nprint(json.dumps(code_fingerprint(Mine())))\n"
            if request.param:
                write(path, text)
            command = [sys.executable, str(path)] if request.param else [sys.executable, "-c", text]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
            return json.loads(subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout)
        for name in [n for n, m in sys.modules.items() if str(tmp_path) in str(getattr(m, "__file__", ""))]:
            del sys.modules[name]
        module = ModuleType("__main__")
        if request.param:
            module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "__main__", module)
        monkeypatch.chdir(tmp_path)
        exec(compile(text, str(path) if request.param else "<string>", "exec"), module.__dict__)
        return code_fingerprint(module.Mine())

    return run


SCRIPT = """
import json, sys
import numpy as np
import more
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.simulation.external import CommandSimulator, FunctionSimulator
from sbi_phys.store.identity import code_fingerprint
SCALE, UNUSED, calls = 2.0, 1, 0
EDGES = np.arange(4.0)
def rate(theta, power=2):
    global calls
    calls += 1
    return SCALE * theta**power * EDGES.sum()
class Base:
    def scale(self):
        return more.scale()
class Mine(Base):
    settings = {}
    def simulate(self, theta, rng):
        return rng.poisson(rate(theta) * self.scale())
n = 1000
"""


def test_classes_of_a_script_count_with_what_they_use(tmp_path, main):
    old = main(SCRIPT)
    names = ["__main__", "__main__:Base", "__main__:EDGES", "__main__:SCALE", "__main__:rate", "more"]
    assert [n for n in sorted(old["parts"]) if "defaults" not in n] == names
    assert main(SCRIPT, apart=True) == old
    for before, after, named in (
        ("n = 1000", "n = 2000", ""),
        ("UNUSED, calls = 2.0, 1, 0", "UNUSED, calls = 2.0, 3, 7", ""),
        ("SCALE, UNUSED, calls = 2.0", "SCALE, UNUSED, calls = 3.0", "__main__:SCALE changed"),
        ("np.arange(4.0)", "np.arange(5.0)", "__main__:EDGES changed"),
        ("rng.poisson(rate(theta) *", "rng.poisson(rate(theta) +", "__main__ changed"),
        ("return more.scale()", "return more.scale() + 1", "__main__:Base changed"),
        ("return SCALE *", "return SCALE +", "__main__:rate changed"),
    ):
        assert before in SCRIPT
        assert fingerprint_difference(old, main(SCRIPT.replace(before, after))) == named
    write(tmp_path / "more.py", FILES["more.py"].replace("2.0", "5.0"))
    assert fingerprint_difference(old, main(SCRIPT)) == "more changed"


def test_a_lambda_of_the_object_counts():
    class Mine:
        def __init__(self, rate):
            self.rate = rate

    source = {"Mine": Mine}
    exec("one, same, other = Mine(lambda a: 2 * a), Mine(lambda a: 2 * a), Mine(lambda a: 3 * a)", source)
    one, same, other = (code_fingerprint(source[name])["sha256"] for name in ("one", "same", "other"))
    assert one == same != other


def test_without_any_code_the_fingerprint_says_so():
    kind = type("Empty", (), {"__module__": "nowhere"})
    assert code_fingerprint(kind()) == {"sha256": "", "parts": {"unreadable": ""}}
    kind.value = np.float64(3.0)
    assert code_fingerprint(kind())["sha256"]


def test_functions_and_programs_name_their_code(project, tmp_path):
    prior, observables = BoxPrior([Parameter("a", 0, 1)]), [Observable("x", 1)]
    project(mine_py=SOURCE + "def one(theta, rng):\n    return [1.0]\n")
    assert sorted(parts(FunctionSimulator("mine:one", prior, observables))) == ["helper", "mine", "more"]
    program = tmp_path / "program.sh"
    write(program, "#!/bin/sh\necho 1\n")
    for command in (["sh", str(program)], [str(program), "{a}"]):
        program.chmod(0o755)
        old = code_fingerprint(CommandSimulator(command, prior, observables))
        assert sorted(old["parts"]) == ["program.sh"]
    write(program, "#!/bin/sh\necho 2\n")
    assert fingerprint_difference(old, code_fingerprint(CommandSimulator(command, prior, observables))) == "program.sh changed"
    assert sorted(parts(CommandSimulator(["echo", "1"], prior, observables))) == ["unreadable"]  # belongs to the system
