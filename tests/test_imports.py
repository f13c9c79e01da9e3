"""What `import sbi_phys` loads and what it names."""

import subprocess
import sys

import pytest

import sbi_phys as sp


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(out.stdout.split())


HEAVY = {"torch", "nflows", "matplotlib", "arviz", "sklearn", "emcee", "pandas", "xarray", "typer", "rich", "jinja2"}


def test_import_is_light():
    assert loaded_after("import sbi_phys") & HEAVY == set()


@pytest.mark.parametrize(
    "module", ["errors", "checks", "rng", "priors", "progress", "store", "simulate", "samplers", "calibration", "report.arviz"]
)
def test_modules_below_the_networks_need_no_torch(module):
    assert "torch" not in loaded_after(f"import sbi_phys.{module}")


def test_every_public_name_is_there():
    for name in sp.__all__:
        assert getattr(sp, name) is not None
        assert name in dir(sp)
    assert 15 <= len(sp.__all__) <= 30


@pytest.mark.parametrize("first", ["sbi_phys", "sbi_phys.simulate", "sbi_phys.store", "sbi_phys.cli"])
def test_simulate_is_the_function_whatever_is_imported_first(first):
    code = f"import {first}, sbi_phys; print(type(sbi_phys.simulate).__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "function\n"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'NPEE'.*NPE"):
        sp.NPEE  # noqa: B018
