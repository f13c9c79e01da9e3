import subprocess
import sys

import pytest

from sbi_phys.core.figures import figures

INIT = """from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a lazy face of two names."""
    folder = tmp_path / "lazy_toy"
    folder.mkdir()
    (folder / "__init__.py").write_text(INIT)
    (folder / "__init__.pyi").write_text("from . import deep as deep\nfrom .deep import answer as answer\n")
    (folder / "deep.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "lazy_toy"
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazy_toy"]:
        del sys.modules[name]


def test_names_load_when_they_are_used(package):
    module = __import__(package)
    assert sorted(module.__all__) == ["answer", "deep"] and set(module.__all__) <= set(dir(module))
    assert "lazy_toy.deep" not in sys.modules
    assert module.answer == 42
    assert "lazy_toy.deep" in sys.modules and module.deep.answer == 42


def test_an_unknown_name_is_an_error_with_a_suggestion(package):
    module = __import__(package)
    with pytest.raises(AttributeError, match="lazy_toy' has no attribute 'anser'; did you mean 'answer'.; public names: .*answer"):
        _ = module.anser
    assert not hasattr(module, "other")


def test_a_package_without_a_stub_is_refused(package, tmp_path):
    (tmp_path / "lazy_toy" / "__init__.pyi").unlink()
    with pytest.raises(ValueError, match="stub"):
        __import__(package)


def test_figures_load_the_module_that_is_named():
    assert figures.style.__name__ == "sbi_phys.plotting.style"
    with pytest.raises(ImportError):
        _ = figures.nothing


def test_import_of_the_package_loads_neither_torch_nor_matplotlib():
    code = "import sys, sbi_phys, sbi_phys.store.store; print([m for m in ('torch', 'matplotlib', 'scipy.stats') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
