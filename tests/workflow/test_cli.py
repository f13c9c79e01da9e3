"""The command line: what it says, what it returns, and that a mistake is one clear line."""

import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sbi_phys.core.errors import SettingError
from sbi_phys.workflow._console import plain_errors
from sbi_phys.workflow.cli import app, settings
from sbi_phys.workflow.settings import Config

ROOT = Path(__file__).parents[2]
TOY = ["--simulator", "tests.toys:LinearGaussian"]
SMALL = ["--n", "300", "--workers", "1", "--set", "train.max_epochs=2", "--set", "infer.observation=simulated"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "simulate", "train", "infer", "calibrate", "report", "info"):
        assert re.search(rf"^ +{command} ", result.stdout, flags=re.MULTILINE)


def test_help_loads_nothing_heavy():
    code = "import sys\nfrom sbi_phys.workflow.cli import app\nprint({'torch', 'matplotlib', 'scipy', 'h5py'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_info_names_versions_and_threads():
    result = run("info")
    assert result.exit_code == 0
    for word in ("python", "sbi_phys", "torch", "numpy", "cores", "torch threads"):
        assert re.search(rf"^{word} +\S", result.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train"], "SettingError: no settings: .*expected a CONFIG.toml or --simulator"),
        (["train", "absent.toml"], "SettingError: cannot read the configuration 'absent.toml'"),
        (["train", "--simulator", "tests.toys:LinearGausian"], "SettingError: .*did you mean 'LinearGaussian'"),
        (["train", "--simulator", "nonsense"], "SettingError: simulator.spec is 'nonsense'"),
        (["train", *TOY, "--set", "train.patienec=3"], "SettingError: .*did you mean 'patience'"),
        (["train", *TOY, "--set", "train.patience=-3"], "SettingError: patience is -3"),
        (["train", *TOY, "--set", "simulator.settings.dimm=3"], "SettingError: .*did you mean 'dim'"),
        (["train", *TOY, "--device", "tpu9"], "SettingError: device is 'tpu9'"),
        (["report", *TOY], "SettingError: infer.observation is 'observed', but .* has no observed"),
        (["demo", "--seed", "-1"], "SettingError: run.seed is -1"),
        (["demo", "--set", "simulator.settings.hadronic_model=EPOS"], "SettingError: .*hadronic_model is 'EPOS'.*did you mean 'EPOS-LHC'"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(tmp_path, words, complaint):
    result = run(*words, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert re.fullmatch(f"sbi-phys: {complaint}.*\n", result.stderr)
    assert not (tmp_path / "run" / "simulations").exists()  # found before any work


def test_debug_shows_the_traceback(tmp_path):
    assert isinstance(run("train", "--debug", "--out", tmp_path / "run").exception, SettingError)


def test_stages_one_by_one_then_again(tmp_path):
    out = tmp_path / "run"
    assert run("simulate", *TOY, *SMALL, "--out", out).exit_code == 0
    assert (out / "simulations").is_dir() and not (out / "model.pt").exists()
    made = (out / "simulations" / "shard-00000.h5").stat().st_mtime_ns
    result = run("train", "--out", out)
    assert result.exit_code == 0 and result.stdout == f"done: {out}\n"
    assert (out / "model.pt").exists()
    assert (out / "simulations" / "shard-00000.h5").stat().st_mtime_ns == made
    refused = run("train", "--out", out, "--seed", 5)
    assert refused.exit_code == 1
    assert re.search("RunFolderError: .*other settings: run.seed was 0 and is 5. Expected the same", refused.stderr)


def test_settings_come_from_file_then_quick_then_flags(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[simulate]\nn = 90000\n[run]\nseed = 4\n[train]\npatience = 7\n")
    config = settings(path, tmp_path / "out", {"simulate.n": None, "run.seed": 6}, ["infer.n_draws=5000"], quick=True)
    assert (config.run.seed, config.train.patience, config.infer.n_draws) == (6, 7, 5000)
    assert config.simulate.n == Config().override({"simulate.n": 90_000}).quick().simulate.n < 90_000


def listen_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    slow = ["--simulator", "tests.toys:Slow", "--set", "simulate.shard_size=10", "--n", "2000", "--workers", "1"]
    words = [sys.executable, "-m", "sbi_phys", "simulate", *slow, "--out", str(out)]
    # a shell that runs the tests in the background has them ignore Ctrl-C, and so their children
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_ctrl_c)
    try:
        wait_for(out / "simulations" / "shard-00001.h5")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command continues the run" in stderr and "Traceback" not in stderr
    assert not list(out.rglob("*.tmp"))


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_a_file_in_the_working_directory_does_not_take_the_place_of_an_installed_module(tmp_path):
    for name in ("numpy", "json", "torch", "h5py", "colorsys"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w').close()\n")
    (tmp_path / "mine.py").write_text("answer = 6 * 7\n")
    # as the console script does: the folder of the script, not the working directory, comes first
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p not in ('', '.')]\n"
        "from sbi_phys.workflow._console import prepare_process\n"
        "prepare_process()\n"
        "import json, numpy, h5py, colorsys, mine\n"
        "print(numpy.__name__, mine.answer)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout == "numpy 42\n", result.stderr
    assert not (tmp_path / "imported").exists()


def test_a_warning_is_one_line_without_code():
    former = warnings.formatwarning
    with plain_errors(False):
        assert warnings.formatwarning("3 rows failed", RuntimeWarning, "a.py", 3) == "sbi-phys: warning: 3 rows failed\n"
    assert warnings.formatwarning is former
