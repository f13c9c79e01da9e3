"""What `import sbi_phys` loads and what it names."""

import importlib
import subprocess
import sys

import pytest

import sbi_phys as sp
from tests.test_layers import ORDER as ROOMS


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
    "module",
    [
        "core.errors",
        "core.progress",
        "priors",
        "store.store",
        "simulation.campaign",
        "samplers",
        "calibration",
        "report.arviz",
        "unfold.ibu",
    ],
)
def test_modules_below_the_networks_need_no_torch(module):
    assert "torch" not in loaded_after(f"import sbi_phys.{module}")


def test_estimators_and_their_flows_need_no_nflows_and_none_of_its_servers():
    loaded = loaded_after(
        "import sbi_phys as sp; sp.NPE(sp.NormalPrior([sp.Parameter('a')])); sp.NLE; sp.NRE; sp.load; sp.nets.ConditionalFlow"
    )
    assert "torch" in loaded
    assert loaded & {"nflows", "tensorboard", "grpc", "google", "matplotlib"} == set()


def test_every_public_name_is_there():
    for name in sp.__all__:
        assert getattr(sp, name) is not None
        assert name in dir(sp) or name == "__version__"


@pytest.mark.parametrize("room", ["sbi_phys", *(f"sbi_phys.{name}" for name in ROOMS)])
def test_every_name_of_every_stub_is_there(room):
    module = importlib.import_module(room)
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None


@pytest.mark.parametrize("first", ["sbi_phys.simulation.campaign", "sbi_phys.unfold.validation", "sbi_phys.workflow.cli"])
@pytest.mark.parametrize("name", ["simulate", "calibrate", "unfold.ibu", "unfold.omnifold", "unfold.validate", "calibration.calibrate"])
def test_a_function_stays_a_function_whatever_is_imported_first(first, name):
    code = f"import {first}, sbi_phys; print(type(sbi_phys.{name}).__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "function\n"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'NPEE'.*NPE"):
        sp.NPEE  # noqa: B018
