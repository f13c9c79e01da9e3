"""Array jobs on the command line, and the commands `store ...`."""

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from sbi_phys.store.shards import shard_name
from sbi_phys.store.store import Store
from sbi_phys.workflow import cli_store
from sbi_phys.workflow.cli import app
from sbi_phys.workflow.settings import Config
from tests.store.helpers import digests, flaky

TOY = ["--simulator", "tests.toys:LinearGaussian", "--n", "700", "--set", "simulate.shard_size=100", "--workers", "1"]


def run(command, out, *words):
    return CliRunner().invoke(app, [command, *TOY, "--out", str(out), *words])


def shards(folder):
    return {name: digest for name, digest in digests(folder).items() if not name.startswith(".")}


def test_array_jobs_make_the_store_of_the_run(tmp_path):
    assert run("simulate", tmp_path / "whole").exit_code == 0
    out = tmp_path / "jobs"
    first = run("simulate", out, "--shards", "1:4")
    assert first.exit_code == 0, first.output
    assert "shards 1:4 are complete: 3 of 3 written by this job\nmissing of all 7: 0, 4-6; store" in first.stdout
    assert "2 of 4 written by this job\nmissing of all 7: 0, 6; store" in run("simulate", out, "--shards", "2:6").stdout
    assert "missing of all 7: 6; store" in run("simulate", out, "--shards", "0/7").stdout
    assert "1 of 1 written by this job\nall 7 shards are complete; store" in run("simulate", out, "--shards", "6").stdout
    assert shards(out / "simulations") == shards(tmp_path / "whole" / "simulations")
    assert run("simulate", out).exit_code == 0  # nothing is left to do, and the stage gets its record
    assert (out / "stages" / "simulate.json").exists() and Store(out / "simulations").complete


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["simulate", "--shards", "5:9"], "SettingError: shards '5:9' runs past the end; expected within 0:7"),
        (["simulate", "--shards", "some"], "SettingError: shards is 'some'"),
        (["train", "--shards", "0:2"], "SettingError: --shards 0:2 was given to train; expected it with simulate"),
        (["simulate", "--shards", "0:2", "--scheduler", "tcp://x:1"], "SettingError: --shards 0:2 .*neither --scheduler nor --cluster"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, words, complaint):
    result = run(words[0], tmp_path, *words[1:])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert re.search(complaint, result.stderr)


def test_jobs_that_begin_a_run_folder_together(tmp_path):
    config = Config().override({"simulator.spec": "tests.toys:LinearGaussian", "simulate.n": 700})
    for i in range(5):
        with ThreadPoolExecutor(4) as threads:
            runs = list(threads.map(lambda _, i=i: cli_store._join_run(config, tmp_path / str(i)), range(4)))
        assert all(run.config == config for run in runs)
        assert Config.read(tmp_path / str(i) / "config.toml") == config


def test_the_store_commands(tmp_path):
    flaky(tmp_path / "a", 250, seed=1)
    flaky(tmp_path / "b", 250, seed=2)
    invoke = CliRunner().invoke
    got = invoke(app, ["store", "verify", str(tmp_path / "a")])
    assert got.exit_code == 0 and "3 of 3 shards are intact" in got.output
    got = invoke(app, ["store", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "ab")])
    assert got.exit_code == 0 and "rows       500 of 500" in got.output
    (tmp_path / "ab" / shard_name(2)).write_bytes(b"")
    got = invoke(app, ["store", "verify", str(tmp_path / "ab"), "--json"])
    found = json.load(io.StringIO(got.output[got.output.index("{") :].splitlines()[0]))
    assert got.exit_code == 1 and [f["kind"] for f in found["findings"]] == ["truncated"]
    got = invoke(app, ["store", "repair", str(tmp_path / "ab")])
    assert "moved to broken/shard-00002.h5" in got.output and "shards to simulate: 2" in got.output
    assert json.loads(invoke(app, ["store", "info", str(tmp_path / "a"), "--json"]).output)["n_rows"] == 250
    got = invoke(app, ["store", "info", str(tmp_path / "a"), "--watch", "--interval", "0.1"])
    assert got.exit_code == 0 and "complete" in got.output
