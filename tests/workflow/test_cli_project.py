"""The commands around a project, as they are typed."""

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
