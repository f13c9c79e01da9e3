"""The guide to likelihoods and ratios: its code runs and is right where an exact answer is known, its commands and links exist."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sbi_phys.workflow.cli import app

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/likelihoods.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)


def small(code: str) -> str:
    """The same code on fewer simulations, events and epochs."""
    for long, short in (("20_000", "1_500"), ("2_000", "500"), ("1_000", "250"), ("(200, 1)", "(40, 1)"), ("75 *", "15 *")):
        code = code.replace(long, short)
    return code.replace("seed=0).fit", "seed=0, config=SHORT).fit").replace('"log").fit', '"log", flow=AFFINE, config=SHORT).fit')


def test_the_code_runs_and_finds_the_rate(capsys):
    import sbi_phys as sp

    namespace: dict[str, object] = {"SHORT": sp.TrainConfig(max_epochs=4), "AFFINE": sp.FlowConfig(kind="affine", n_layers=1, hidden=16)}
    for code in blocks("python"):
        exec(compile(small(code), "docs/likelihoods.md", "exec"), namespace)
    printed = capsys.readouterr().out
    for words in ("draws by importance", "Mean ratio, 500 numerator", "Reliability, 1000 events", "Isotonic calibration"):
        assert words in printed
    events, draws = namespace["events"], namespace["draws"]
    # with the number, n decays count twice, and the exposure of 30 stands beside the sum of their times
    n, total = len(events), events.sum()  # type: ignore[arg-type, attr-defined]
    mean, sd = 2 * n / (total + 30), np.sqrt(2 * n) / (total + 30)
    assert abs(draws.theta.mean() - mean) < 3 * sd  # type: ignore[attr-defined]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_and_option_exists(words):
    result = CliRunner().invoke(app, [words[1], "--help"])
    assert words[0] == "sbi-phys" and result.exit_code == 0
    assert all(option in result.stdout for option in words[2:] if option.startswith("--"))


def test_links_and_paths_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"`((?:sbi_phys|benchmarks|docs)/[\w/.]*)`", GUIDE):
        assert (ROOT / path).exists(), path
    for page in ("README.md", "docs/map.md"):
        assert "likelihoods.md" in (ROOT / page).read_text(encoding="utf-8")
