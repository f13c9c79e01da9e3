import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sbi_phys.core.errors import SettingError
from sbi_phys.simulation import _dispatch, clusters
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.clusters import ClusterFile, cluster_executor
from tests.store.helpers import digests
from tests.toys import Flaky, Poison

ROOT = Path(__file__).parents[2]
pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """Address of a scheduler with two workers, three processes that talk over TCP."""
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    commands = [
        ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
        *[
            ["distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard", "--name", str(i)]
            for i in range(2)
        ],
    ]
    with open(folder / "log", "wb") as log:
        started = [
            subprocess.Popen([sys.executable, "-m", *c], cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
            for c in commands
        ]
        try:
            deadline = time.monotonic() + 60
            while not file.is_file() or not file.read_text().strip():
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            yield json.loads(file.read_text())["address"]
        finally:
            for process in started:
                # each with the processes it has started; asked politely they take several seconds
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.parametrize("large", [_dispatch._LARGE, 0])
def test_the_bytes_are_those_of_one_worker(tmp_path, scheduler, monkeypatch, large):
    monkeypatch.setattr(_dispatch, "_LARGE", large)  # 0: the simulator goes apart from the shards
    with cluster_executor(scheduler=scheduler) as (executor, workers):
        assert executor is not None
        store = simulate(Flaky(1.8, -1.8), 650, tmp_path / "dask", seed=7, shard_size=50, executor=executor, workers=workers)
    assert store.complete
    simulate(Flaky(1.8, -1.8), 650, tmp_path / "one", seed=7, shard_size=50, workers=1)
    assert digests(tmp_path / "dask") == digests(tmp_path / "one")


def test_shards_are_sent_back_where_there_is_no_shared_folder(tmp_path, scheduler, monkeypatch):
    monkeypatch.setattr(
        _dispatch.Campaign, "shard", lambda run, i, shard=_dispatch.Campaign.shard: replace(shard(run, i), folder="/nowhere")
    )
    with cluster_executor(scheduler=scheduler) as (executor, workers):
        simulate(Flaky(1.8, -1.8), 650, tmp_path / "dask", seed=7, shard_size=50, executor=executor, workers=workers)
    monkeypatch.undo()
    simulate(Flaky(1.8, -1.8), 650, tmp_path / "one", seed=7, shard_size=50, workers=1)
    assert digests(tmp_path / "dask") == digests(tmp_path / "one")


@pytest.mark.slow
def test_rows_that_hang_are_flagged_on_a_cluster_too(tmp_path, scheduler):
    simulator = Poison("hangs")
    with cluster_executor(scheduler=scheduler) as (executor, workers):
        simulate(simulator, 24, tmp_path / "dask", seed=3, shard_size=12, executor=executor, workers=workers, timeout=0.25)
    store = simulate(simulator, 24, tmp_path / "one", seed=3, shard_size=12, workers=1, timeout=0.25)
    assert store.n_failed >= 1
    assert digests(tmp_path / "dask") == digests(tmp_path / "one")


def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(clusters, "_PATIENCE_S", 6.0)
    with (
        pytest.raises(SettingError, match=r"scheduler 'tcp://127.0.0.1:9' cannot be reached"),
        cluster_executor(scheduler="tcp://127.0.0.1:9"),
    ):
        pass


def test_both_at_once_are_refused():
    with pytest.raises(SettingError, match="both given"), cluster_executor(scheduler="tcp://a:1", cluster="b.toml"):
        pass


def test_neither_is_no_executor():
    with cluster_executor() as found:
        assert found == (None, None)


@pytest.mark.parametrize(
    ("kind", "settings", "lines"),
    [
        (
            "slurm",
            {"queue": "long", "cores": 8, "memory": "16 GB", "walltime": "12:00:00"},
            ["#SBATCH -p long", "#SBATCH --cpus-per-task=8"],
        ),
        ("htcondor", {"cores": 4, "memory": "8 GB", "disk": "2 GB"}, ["RequestCpus = MY.DaskWorkerCores", "Queue"]),
    ],
)
def test_the_submit_script_says_what_the_file_says(tmp_path, kind, settings, lines):
    pytest.importorskip("dask_jobqueue")
    text = f'kind = "{kind}"\njobs = 50\n[settings]\n' + "\n".join(f"{k} = {v!r}" for k, v in settings.items())
    (tmp_path / "cluster.toml").write_text(text.replace("'", '"'))
    script = ClusterFile.read(tmp_path / "cluster.toml").job_script()
    for line in lines:
        assert line in script


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind = 'slurm'", "has no jobs"),
        ("jobs = 3", "has no kind"),
        ("kind = 'cray'\njobs = 3", "kind"),
        ("kind = 'slurm'\njobs = 0", "jobs"),
        ("kind = 'slurm'\njobs = 1\nqueue = 'a'", "queue"),
        ("kind = ", "is not TOML"),
    ],
)
def test_a_wrong_cluster_file_is_explained(tmp_path, text, words):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(SettingError, match=words):
        ClusterFile.read(tmp_path / "c.toml")
    with pytest.raises(SettingError, match="cannot be read"):
        ClusterFile.read(tmp_path / "none.toml")
