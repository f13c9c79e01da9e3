"""The README's code runs, its commands exist, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sbi_phys.workflow.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def small(code: str) -> str:
    """The same code with numbers for a test: simulations and draws by the hundred."""
    return re.sub(r"\b\d+_000\b", "100", code)


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    assert len(blocks("python")) >= 2
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in blocks("python"):
        exec(compile(small(code), "README.md", "exec"), namespace)
    assert namespace["draws"].shape == (100, 2)  # type: ignore[attr-defined]
    assert (tmp_path / "runs" / "sbc.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "SBC, 500 simulations x 1000 draws" in printed
    assert " of 9 " in printed  # the verdict


def test_every_command_is_known():
    assert {words[0] for words in commands()} == {"make", "sbi-phys"}


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "make"], ids=" ".join)
def test_make_target_exists(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        assert re.search(rf"^{name}\s*\?=" if equals else rf"^{name}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "sbi-phys"], ids=" ".join)
def test_sbi_phys_command_and_its_options_exist(words):
    result = CliRunner().invoke(app, [words[1], "--help"])
    assert result.exit_code == 0
    assert all(option in result.stdout for option in words[2:] if option.startswith("--"))


def test_ci_runs_the_readme_s_commands():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    script = script.replace('"$command"', " ".join(re.findall(r"for command in ([a-z ]+);", script)))
    for words in commands():
        assert re.search(rf"{words[0]} .*\b{words[1]}\b", script), words


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 4
    for link in links:
        if link != "docs/images/demo.png" and not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_paths_in_code_exist():
    for path in re.findall(r"`((?:sbi_phys|simulators|tests|notebooks|benchmarks|scripts|docs)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path
