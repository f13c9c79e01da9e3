"""`sbi-phys limits counting`: what it prints are the functions' numbers, and a mistake is one clear line."""

import json

import pytest
from typer.testing import CliRunner

from sbi_phys.confidence import counting_cls, feldman_cousins, on_off
from sbi_phys.workflow.cli import app


def limits(*words):
    return CliRunner().invoke(app, ["limits", "counting", *(str(word) for word in words)])


def test_feldman_and_cousins_beside_wilks():
    result = limits("--n", 3, "--background", 0.5, "--level", 0.9, "--level", 0.95, "--json")
    found = json.loads(result.stdout)
    rows = {(row["level"], row["method"]): (row["low"], row["high"]) for row in found["intervals"]}
    assert rows[0.9, "Feldman-Cousins"] == pytest.approx((0.60, 6.92), abs=0.01)  # arXiv:physics/9711021, table IV
    assert rows[0.95, "Feldman-Cousins"] == pytest.approx(feldman_cousins(3, 0.5, 0.95))
    assert rows[0.9, "Wilks"][1] < rows[0.9, "Feldman-Cousins"][1]
    assert "90 %  Feldman-Cousins" in limits("--n", 3, "--background", 0.5).stdout


def test_sensitivity_is_the_published_one():
    found = json.loads(limits("--n", 0, "--background", 3, "--json").stdout)
    assert found["sensitivity"][0]["high"] == pytest.approx(4.42, abs=0.02)  # the same paper, table XII


def test_upper_limit_with_cls():
    found = json.loads(limits("--n", 1, "--background", 2, "--kind", "upper", "--json").stdout)
    assert found["intervals"][1] == {"level": 0.9, "method": "CLs", "low": 0.0, "high": counting_cls(1, 2.0, 0.9)}
    lower = json.loads(limits("--n", 9, "--background", 2, "--kind", "lower", "--json").stdout)
    assert all(row["high"] is None and row["low"] > 0 for row in lower["intervals"])


def test_a_counted_background():
    result = limits("--n", 4, "--off", 2, "--tau", 2, "--json")
    found = json.loads(result.stdout)
    assert (found["intervals"][0]["low"], found["intervals"][0]["high"]) == on_off(4, 2, 2.0, 0.9)
    assert found["significance"] > 1 and "Li-Ma significance" in limits("--n", 4, "--off", 2, "--tau", 2).stdout


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--background", 1], "SettingError: --n is not given"),
        (["--n", 3], "expected --background for a known background, or --off and --tau"),
        (["--n", 3, "--background", 1, "--off", 3, "--tau", 1], "expected --background for a known background, or"),
        (["--n", 3, "--off", 3], "expected --background for a known background, or --off and --tau"),
        (["--n", -3, "--background", 1], "DataError: n has -3; expected whole numbers"),
        (["--n", 3, "--background", -1], "background has -1"),
        (["--n", 3, "--background", 1, "--level", 2], "level is 2"),
        (["--n", 3, "--background", 1, "--kind", "both"], "--kind is 'both'; expected one of interval, upper, lower"),
        (["--n", 3, "--background", 1, "--parameter", "mu"], "--parameter was given with counting"),
    ],
)
def test_a_mistake_is_one_line(words, complaint):
    result = limits(*words)
    assert result.exit_code == 1 and complaint in result.stderr and result.stderr.count("\n") == 1
