"""The command `sbi-phys check`."""

import json
import sys

import pytest
from typer.testing import CliRunner

from sbi_phys.workflow.cli import app

CODE = """
import numpy as np, sbi_phys as sp
class Mine:
    parameters = (sp.Parameter("a", 1.0, 5.0),)
    prior = sp.BoxPrior(parameters)
    observables = (sp.Observable("n", 2, kind="counts"),)
    def __init__(self, scale=1.0, wrong=False):
        self.settings = {"scale": scale, "wrong": wrong}
    def simulate(self, theta, rng):
        draw = np.random.default_rng() if self.settings["wrong"] else rng
        return draw.poisson(self.settings["scale"] * np.repeat(theta, 2, axis=1))
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    (tmp_path / "checked_mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield lambda *args: CliRunner().invoke(app, ["check", *args, "--n", "200"])
    sys.modules.pop("checked_mine", None)


def test_a_right_simulator(check):
    result = check("checked_mine:Mine", "--set", "scale=20.0")
    assert result.exit_code == 0 and "no findings" in result.output
    assert "observable n (2,) counts" in result.output


def test_faults_give_status_1(check):
    result = check("checked_mine:Mine", "--set", "wrong=true", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["ok"] and [f["topic"] for f in found["findings"]] == ["random numbers"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere:Mine"], "was not found"),
        (["checked_mine:Mine", "--set", "scael=2"], "unknown key 'scael'"),
        (["checked_mine:Mine", "--set", "scale"], "has no '='"),
    ],
)
def test_wrong_names(check, args, words):
    result = check(*args)
    assert result.exit_code == 1 and words in result.output
