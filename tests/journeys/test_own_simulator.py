"""The examples of docs/own_simulator.md, run as they stand there: files are written, commands typed, reports opened."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.report.browser import check_report, missing_browser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_simulator.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.M | re.S)


def follow(number: str, folder: Path) -> str:
    """Write the files of a section and run its commands -> what they print.   Fails with the first command that fails."""
    printed = []
    for kind, text in BLOCK.findall(SECTIONS[number]):
        if kind != "sh":
            first, rest = text.split("\n", 1)
            name = re.fullmatch(r"# file: (\S+)", first)
            assert name, f"the block in section {number} begins with {first!r}; expected '# file: NAME'"
            (folder / name[1]).write_text(rest if name[1].endswith(".csv") else text, encoding="utf-8")
            continue
        for line in text.strip().splitlines():
            printed.append(command(line, folder))
    return "\n".join(printed)


def command(line: str, folder: Path) -> str:
    program, *words = shlex.split(line)
    program_words = {"sbi-phys": [sys.executable, "-m", "sbi_phys"], "python": [sys.executable]}[program]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program_words, *words], cwd=folder, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr and "Warning:" not in done.stderr, f"{line}\n{done.stderr}"
    return done.stdout


def opens(report: Path) -> bool:
    """Whether a report exists and opens in the browser, if there is one, with its sections and pictures."""
    assert report.is_file()
    if not missing_browser():
        found = check_report(report)
        assert found.problems == [] and found.sections >= 4 and found.images >= 4
    return True


def test_the_page_has_eight_examples():
    assert list(SECTIONS) == list("12345678")


@pytest.mark.slow
@pytest.mark.browser
def test_a_class_of_your_own(tmp_path):
    printed = follow("1", tmp_path)
    assert re.search(r"^crab +\S+ \+\S+ -\S+", printed, flags=re.M) and "simulated-1" in printed
    assert opens(tmp_path / "run/observations/crab/report.html")
    exported = {p.suffix for p in (tmp_path / "run/observations/crab/export").iterdir()}
    assert exported == {".csv", ".tex", ".pdf"}


@pytest.mark.slow
@pytest.mark.browser
def test_a_function_that_sometimes_fails(tmp_path):
    printed = follow("2", tmp_path)
    assert "did not converge" in printed  # store info names the reason
    assert opens(tmp_path / "run/observations/simulated-3/report.html")


@pytest.mark.slow
@pytest.mark.browser
def test_an_external_program(tmp_path):
    follow("3", tmp_path)
    assert opens(tmp_path / "run/observations/simulated-1/report.html")


@pytest.mark.slow
@pytest.mark.browser
def test_images_with_dead_pixels(tmp_path):
    follow("4", tmp_path)
    assert opens(tmp_path / "run/observations/simulated-2/report.html")


@pytest.mark.slow
@pytest.mark.browser
def test_a_trace(tmp_path):
    follow("5", tmp_path)
    assert opens(tmp_path / "run/report.html")


@pytest.mark.slow
def test_sets_of_events(tmp_path):
    printed = follow("6", tmp_path)
    mean, sd, exact_mean, exact_sd = map(float, re.search(r"posterior (\S+) \+- (\S+); exact (\S+) \+- (\S+)", printed).groups())
    assert abs(mean - exact_mean) < exact_sd and 0.6 < sd / exact_sd < 1.7


@pytest.mark.slow
@pytest.mark.browser
def test_a_prior_of_your_own(tmp_path):
    follow("7", tmp_path)
    assert opens(tmp_path / "run/observations/simulated-1/report.html")


def test_the_posterior_of_another_tool(tmp_path):
    printed = follow("8", tmp_path)
    right, narrow = (float(re.search(rf"{name} p = (\S+):", printed)[1]) for name in ("right", "narrow"))
    assert right > 1e-3 and narrow < 1e-4


@pytest.mark.slow
@pytest.mark.browser
def test_from_nothing_to_the_first_report(tmp_path):
    begin = time.perf_counter()
    command("sbi-phys new nebula", tmp_path)
    folder = tmp_path / "nebula"
    command("sbi-phys check nebula:Nebula", folder)
    command("sbi-phys report nebula.toml --out run", folder)
    print(f"four commands to the first report: {time.perf_counter() - begin:.0f} s")
    assert opens(folder / "run" / "report.html")
