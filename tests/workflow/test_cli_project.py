"""The commands around a project, as they are typed."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from sbi_phys.workflow.cli import app
from sbi_phys.workflow.settings import Config


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_new_says_what_to_type_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("new", "nebula")
    assert done.exit_code == 0
    assert [p.name for p in sorted((tmp_path / "nebula").iterdir())] == ["nebula.py", "nebula.toml", "observation.csv", "test_nebula.py"]
    assert "sbi-phys report nebula.toml --out run" in done.stdout
    again = run("new", "nebula")
    assert again.exit_code == 1 and "RunFolderError: nebula exists already" in again.stderr


def test_config_prints_settings_that_can_be_read(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        (tmp_path / "config.toml").write_text("[simulate]\nn = 123\n")
        done = run("config", "--out", folder)
        (tmp_path / "printed.toml").write_text(done.stdout)
        assert done.exit_code == 0
        assert Config.read(tmp_path / "printed.toml").simulate.n == (123 if folder == tmp_path else Config().simulate.n)


MODULE = """
import numpy as np
import sbi_phys as sp

class Line:
    variants = {"scale up": {"scale": 1.2}}
    prior = sp.BoxPrior([sp.Parameter("a", 0.0, 10.0)])
    parameters = prior.parameters
    observables = (sp.Observable("y", 3),)
    def __init__(self, scale=1.0):
        self.settings = {"scale": scale}
    def simulate(self, theta, rng):
        return self.settings["scale"] * theta + rng.standard_normal((len(theta), 3))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "line_module.py").write_text(MODULE)
        (folder / "near.csv").write_text("3.1,2.9,3.0\n")
        (folder / "far.csv").write_text("7.1,6.9,7.0\n")
        small = ["--set", "train.max_epochs=8", "--set", "flow.n_layers=1", "--set", "embedding.hidden=16", "--set", "infer.n_draws=500"]
        assert run("train", "--simulator", "line_module:Line", "--n", 1500, "--workers", 1, *small, "--out", "run").exit_code == 0
        done = run("infer", "near.csv", "far.csv", "--out", "run")
        assert done.exit_code == 0, done.output
        yield folder, done.stdout
    sys.modules.pop("line_module", None)


def test_the_posteriors_of_many_observations_are_one_table(project):
    _, printed = project
    rows = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines()[1:]}
    assert abs(rows["near"] - 3) < 0.5 and abs(rows["far"] - 7) < 0.5


def test_networks_and_observations_are_compared(project):
    folder, _ = project
    alone = run("compare", "--n", 200, "--out", "run")
    assert alone.exit_code == 0 and "one trained network; expected two or more" in alone.stdout and "near" in alone.stdout
    assert run("train", "--name", "short", "--set", "train.max_epochs=1", "--out", "run").exit_code == 0
    done = run("compare", "--n", 200, "--out", "run")
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in ("default", "short", "near", "far"))
    found = json.loads((folder / "run" / "compare_networks.json").read_text())
    assert found["best"] == "default" and set(found["names"]) == {"default", "short"}
    assert (folder / "run" / "figures" / "compare_observations.png").exists()


def test_a_learning_curve_says_whether_more_would_help(project):
    folder, _ = project
    done = run("learning-curve", "--sizes", "200,400,800", "--n", 200, "--out", "run")
    assert done.exit_code == 0, done.output
    assert "Would more simulations help?" in done.stdout
    assert (folder / "run" / "learning_curve.csv").read_text().count("\n") >= 4
    wrong = run("learning-curve", "--sizes", "200,many", "--out", "run")
    assert wrong.exit_code == 1 and "--sizes is '200,many'; expected numbers" in wrong.stderr


def test_draws_are_exported_for_other_programs(project):
    folder, _ = project
    done = run("export", "near", "--format", "csv,npz", "--to", "elsewhere", "--out", "run")
    assert done.exit_code == 0, done.output
    assert {p.name for p in (folder / "elsewhere").iterdir()} == {"posterior_near.csv", "posterior_near.npz"}
    wrong = run("export", "near", "--format", "xls", "--out", "run")
    assert wrong.exit_code == 1 and "--format is 'xls'; expected one of csv, npz" in wrong.stderr
    lost = run("export", "moon", "--out", "run")
    assert lost.exit_code == 1 and "'moon' is neither a file nor a name of this project; its observations are near, far" in lost.stderr


def test_a_systematic_shift_is_that_of_the_variant(project):
    folder, _ = project
    done = run("systematics", "near", "--n", 100, "--out", "run")
    assert done.exit_code == 0, done.output
    table = (folder / "run" / "observations" / "near" / "systematics.csv").read_text().splitlines()
    # y is 1.2 a instead of a: the posterior of a = 3 moves by 0.6, which is 0.6 sqrt(3) standard deviations
    shift = float(table[1].split(",")[1].split()[0])
    assert table[1].startswith("scale up") and abs(shift - 0.6 * np.sqrt(3)) < 0.35


def test_an_observation_of_the_same_name_from_another_file_is_refused(project):
    folder, _ = project
    (folder / "other").mkdir()
    (folder / "other" / "near.csv").write_text("1,1,1\n")
    done = run("infer", "other/near.csv", "--out", "run")
    assert done.exit_code == 1 and "would have the name 'near', which is that of 'near.csv'" in done.stderr
