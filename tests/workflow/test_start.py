"""`sbi-phys new`: the files work as they are."""

import subprocess
import sys

import numpy as np
import pytest

from sbi_phys.core.errors import RunFolderError, SettingError
from sbi_phys.simulation.protocol import check_simulator, load_simulator
from sbi_phys.workflow.observations import check_row, parse_source, read_file
from sbi_phys.workflow.settings import Config
from sbi_phys.workflow.start import new_project


@pytest.fixture
def project(tmp_path, monkeypatch):
    new_project("fresh_source", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "fresh_source"))
    yield tmp_path / "fresh_source"
    sys.modules.pop("fresh_source", None)


def test_the_simulator_the_settings_and_the_observation_fit_together(project, monkeypatch):
    monkeypatch.chdir(project)
    config = Config.read("fresh_source.toml")
    simulator = load_simulator(config.simulator.spec, config.simulator.settings)
    check_simulator(simulator, n_simulations=50)
    x = check_row(read_file(parse_source(config.infer.observation), simulator.observables), simulator.observables)
    theta = np.array([[2.2, 1.0, 250.0]])
    # the observation is a draw at these parameters: the deviance of 12 Poisson counts is about 12 +- 5
    expected = simulator.expected(theta)[0]
    assert 2 * np.sum(expected - x + np.where(x > 0, x * np.log(np.maximum(x, 1) / expected), 0)) < 40
    other = simulator.log_likelihood(x, np.array([[2.2, 1.0, 250.0], [3.4, 0.1, 60.0]]))
    assert other[0] > other[1] + 10


def test_its_own_test_passes(project):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["My Source", "json", "class", "1st", "", "../up", "numpy-like", "sbi_phys"])
def test_names_that_no_module_can_have(tmp_path, name):
    with pytest.raises(SettingError, match="expected one that a new module can have"):
        new_project(name, tmp_path)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="taken exists already; expected a name that is free"):
        new_project("taken", tmp_path)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.tex"]
