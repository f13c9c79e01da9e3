import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sbi_phys.core.errors import SbiPhysError, SettingError, StoreError
from sbi_phys.simulation import _dispatch, clusters
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.clusters import ClusterFile, cluster_executor
from tests.store.helpers import digests
from tests.toys import Flaky, Poison, Slow

ROOT = Path(__file__).parents[2]
pytest.importorskip("distributed")


@contextlib.contextmanager
def started_scheduler(folder, n_workers=2):
    """Address of a scheduler, and its process and those of its workers, which talk over TCP."""
    file = folder / "scheduler.json"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    commands = [
        ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
        *[
            ["distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard", "--name", str(i)]
            for i in range(n_workers)
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
            yield json.loads(file.read_text())["address"], started
        finally:
            for process in started:
                # each with the processes it has started; asked politely they take several seconds
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    with started_scheduler(tmp_path_factory.mktemp("dask")) as (address, _):
        yield address


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


@pytest.fixture
def certificates(monkeypatch, tmp_path):
    """Certificates of openssl where the package cryptography is missing."""
    if importlib.util.find_spec("cryptography") is None:
        from distributed.security import Security

        if shutil.which("openssl") is None:
            pytest.skip("needs cryptography or openssl")
        options = ["req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=dask-internal", "-keyout", "key.pem", "-out", "cert.pem"]
        subprocess.run(["openssl", *options], cwd=tmp_path, check=True, capture_output=True)
        key, cert = (tmp_path / "key.pem").read_text(), (tmp_path / "cert.pem").read_text()
        monkeypatch.setattr(Security, "temporary", lambda: Security(tls_client_key=key, tls_client_cert=cert))


def test_a_cluster_admits_its_own_workers_alone(tmp_path, monkeypatch, certificates):
    """Without the certificate nobody can connect; the command of the job script can, and the key does not stay on the disk."""
    pytest.importorskip("dask_jobqueue")
    from distributed import Client

    monkeypatch.chdir(tmp_path)
    with ClusterFile(kind="slurm", jobs=1, settings={"cores": 1, "memory": "1 GB"}).start() as jobs:
        (folder,) = tmp_path.glob(".sbi_phys_tls_*")
        assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "key.pem")} == {0o700, 0o600}
        address = jobs.scheduler.address
        assert address.startswith("tls://")
        for other in (address, address.replace("tls", "tcp")):
            with pytest.raises((OSError, TypeError)):
                Client(other, timeout=2, set_as_default=False)
        command = shlex.split(next(line for line in jobs.job_script().splitlines() if "dask_worker" in line))
        with open(tmp_path / "log", "wb") as log:
            env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
            worker = subprocess.Popen([*command, "--no-dashboard"], env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            with Client(jobs, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=60)
                executor = client.get_executor(pure=False)
                store = simulate(Flaky(1.8, -1.8), 100, tmp_path / "store", seed=7, shard_size=50, executor=executor)
        finally:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    assert store.complete
    assert not folder.exists()


def test_an_encrypted_cluster_says_which_package_it_needs(monkeypatch):
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    file = ClusterFile(kind="slurm", jobs=1, settings={"cores": 1, "memory": "1 GB"})
    with pytest.raises(SbiPhysError, match=r"package cryptography; .* sbi_phys\[cluster\]., or encrypted = false"), file.start():
        pass


@pytest.mark.parametrize(
    "settings",
    [
        {"queue": "long\nrm -rf ~"},
        {"walltime": "1:00\r#SBATCH -A other"},
        {"job_extra_directives": ["--mem=1G", "-p a\nid"]},
        {"job_extra_directives": {"x\ny": "1"}},
        {"python": "python; id"},
        {"local_directory": "$(id)"},
        {"local_directory": "/tmp/`id`"},
        {"worker_extra_args": ["--lifetime", "1h && id"]},
        {"interface": "ib0 | id"},
        {"security": True},
    ],
)
def test_settings_cannot_add_to_the_job_script(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        ClusterFile(kind="slurm", jobs=1, settings={"cores": 1, "memory": "1 GB", **settings})


def test_settings_that_batch_systems_need_are_taken():
    settings = {
        "queue": "long",
        "local_directory": "$TMPDIR/${USER}",
        "job_script_prologue": ["module load python && ulimit -n 4096"],
        "job_extra_directives": ["--constraint='a|b'"],
    }
    file = ClusterFile(kind="slurm", jobs=1, settings={"cores": 1, "memory": "1 GB", **settings}, encrypted=False)
    script = file.job_script()
    assert all(line in script for line in ("--local-directory $TMPDIR/${USER}", "module load python && ulimit -n 4096", "'a|b'"))


@pytest.mark.parametrize(("stopped", "words"), [("scheduler", "has not answered for"), ("workers", "has had no worker for")])
def test_a_cluster_that_is_gone_ends_the_campaign(tmp_path, monkeypatch, stopped, words):
    """A frozen scheduler, and workers that are all dead: their futures never end."""
    monkeypatch.setattr(_dispatch, "_SILENT_S", 1.0)
    monkeypatch.setattr(_dispatch, "_ANSWER_S", 0.5)
    monkeypatch.setattr(_dispatch, "_LOOK_S", 0.2)
    with started_scheduler(tmp_path, n_workers=1) as (address, processes), cluster_executor(scheduler=address) as (executor, _):
        end = (processes[0].pid, signal.SIGSTOP) if stopped == "scheduler" else (processes[1].pid, signal.SIGKILL)
        threading.Timer(1.5, os.killpg, end).start()
        begin = time.monotonic()
        with pytest.raises(StoreError, match=words):
            simulate(Slow(0.1), 600, tmp_path / "store", shard_size=2, executor=executor)
        assert time.monotonic() - begin < 20
        if stopped == "scheduler":
            os.kill(processes[0].pid, signal.SIGCONT)


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
    text = f'kind = "{kind}"\njobs = 50\nencrypted = false\n[settings]\n' + "\n".join(f"{k} = {v!r}" for k, v in settings.items())
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
